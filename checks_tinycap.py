"""Validation of an untrusted model folder: which weights are read, JSON files, settings of pixels and generation; and
of image files that hold several images.

`vision_tinycap.py` validates the weights themselves. Standard library only: the ONNX captioner runs without PyTorch.
"""

import json
import os
import re
import reprlib
import struct
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any


# Characters of a JSON file at most: an index of shards of a large model has a million.
MAX_JSON_SIZE = 2**24
# The memory of a search grows with its beams and with the captions of an image.
MAX_BEAMS = 128
MAX_INTEGER = 2**31 - 1
# Kind and range of generation settings; lengths are also limited by the position table.
GENERATION = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (Integral, 1, MAX_BEAMS)),
    **dict.fromkeys(("max_new_tokens", "max_length"), (Integral, 1, MAX_INTEGER)),
    **dict.fromkeys(("min_new_tokens", "min_length", "no_repeat_ngram_size", "top_k"), (Integral, 0, MAX_INTEGER)),
    **dict.fromkeys(("top_p", "typical_p", "min_p", "epsilon_cutoff", "eta_cutoff"), (Real, 0, 1)),
    **dict.fromkeys(("temperature", "repetition_penalty", "encoder_repetition_penalty"), (Real, 0, 1e6)),
    **{"length_penalty": (Real, -10, 10), "diversity_penalty": (Real, 0, 1e6)},
}
SWITCHES = {**dict.fromkeys(("do_sample", "use_cache"), (True, False)), "early_stopping": (True, False, "never")}
TOKEN_IDS = (
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "suppress_tokens"),
    *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
)
# Shards lie beside their index.
SHARD = r"[\w.-]+\.safetensors"
# Bytes of metadata and colour profiles in memory.
MAX_HEIF_COPIES = 2**28
# Of image processors.
PIXEL_SETTINGS = (
    *("do_resize", "do_center_crop", "do_pad", "do_rescale", "do_normalize", "size", "crop_size", "pad_size"),
    *("resample", "rescale_factor", "image_mean", "image_std"),
)


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file; `ValueError` names a file that isn't one, or isn't a file (a pipe would block)."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(
            f"{path}: expected a JSON file, got {'no regular' if os.path.lexists(path) else 'no such'} file"
        )
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_JSON_SIZE + 1)
        if len(text) > MAX_JSON_SIZE:
            raise ValueError(f"more than {MAX_JSON_SIZE:,} characters")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON file, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {reprlib.repr(content)}")
    return content


def weight_files(source: str, folder: str, find: Callable, variant: str | None) -> list[str]:
    """The safetensors files that `PreTrainedModel.from_pretrained` will read; empty if there are none.

    Args:
        source: a local folder or a name on the Hub.
        folder: of the files, if they are local.
        find: from a file's name to its path, downloaded, or to `None`.
        variant: part of the files' names.

    Raises:
        ValueError: it would read something else: a pickle, an adapter, files outside the folder; names it.
    """
    if os.path.isfile(source):
        raise ValueError(f"{source}: expected a folder or a name on the Hub, got a file")
    files = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    end = f".{variant}" if variant else ""
    single = find(f"model{end}.safetensors")
    index = None if single else find(f"model.safetensors.index{end}.json")
    # transformers adds the first to the model, if peft is installed, and prefers the others to the model.
    foreign = [path for path in [find("adapter_config.json")] if path] + [f for f in files if f.startswith("shard-")]
    if foreign:
        raise ValueError(f"{source}: expected model.safetensors and no other weights, got {foreign[0]} beside it")
    pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if pickles and not (single or index):
        raise ValueError(
            f"{source}: expected model.safetensors, got {pickles[0]}, a pickle, which may run code when it is loaded; "
            "convert it once, where you trust it: "
            "weights = torch.load('pytorch_model.bin', weights_only=True); safetensors.torch.save_file("
            "{name: value.clone() for name, value in weights.items()}, 'model.safetensors', metadata={'format': 'pt'})"
        )
    if index is None:
        return [single] if single else []
    content, paths = read_json(index), []
    if not all(isinstance(content.get(name), dict) for name in ("metadata", "weight_map")):
        raise ValueError(f"{index}: expected metadata and weight_map, both objects, got {reprlib.repr(content)}")
    for shard in sorted({str(shard) for shard in content["weight_map"].values()}):
        path = find(shard) if re.fullmatch(SHARD, shard) else None
        if path is None:
            raise ValueError(f"{index}: weight_map: expected names of safetensors files beside it, got {shard[:99]!r}")
        paths.append(path)
    return paths


def check_number(place: str, value: Any, kind: type, low: float, high: float) -> None:
    """Raises `ValueError` unless `value` is a number of that kind (`Integral`, `Real`) from `low` to `high`."""
    # NaN fails every comparison.
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
        article = "an integer" if kind is Integral else "a number"
        limits = f"{article} of at least {low}" if high == MAX_INTEGER else f"{article} from {low:g} to {high:g}"
        raise ValueError(f"{place}: expected {low if low == high else limits}, got {reprlib.repr(value)}")


def check_generation(settings: Mapping, place: str, vocab_size: int | None = None) -> None:
    """Raises `ValueError` for the first generation setting of a wrong type or out of range; `None` is no setting.

    Args:
        settings: by name, of a config or a call; settings that aren't listed above are left to the search.
        place: file or arguments, for the error.
        vocab_size: if given, token ids are validated too.
    """
    for name, limits in GENERATION.items():
        if settings.get(name) is not None:
            check_number(f"{place}: {name}", settings[name], *limits)
    for name, allowed in SWITCHES.items():
        if settings.get(name) is not None and settings[name] not in allowed:
            raise ValueError(f"{place}: {name}: expected one of {allowed}, got {reprlib.repr(settings[name])}")
    for name in TOKEN_IDS if vocab_size is not None else ():
        value = settings.get(name)
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            check_number(f"{place}: {name}", token, Integral, 0, vocab_size - 1)


def sides_of(size: Any) -> dict[str, Any]:
    """The sides of a size: a number, a dict, or transformers' `SizeDict`."""
    try:
        return {name: side for name, side in dict(size).items() if side is not None} or {"side": size}
    except (TypeError, ValueError):
        return {"side": size}


def check_pixels(settings: Mapping, image_size: int, num_channels: int, place: str) -> None:
    """Raises `ValueError` unless an image processor's settings make finite pixels of the model's size.

    Args:
        settings: by the names of `preprocessor_config.json`, with defaults filled in.
        image_size, num_channels: the model's.
        place: the file, for the error.
    """
    numbers = {"image_mean": (-1e4, 1e4), "image_std": (1e-4, 1e4), "rescale_factor": (1e-6, 1e4)}
    for name, limits in numbers.items():
        is_factor = name == "rescale_factor"
        if not settings.get("do_rescale" if is_factor else "do_normalize", True):
            continue
        values = settings.get(name)
        is_list = isinstance(values, (list, tuple)) and not is_factor
        if is_list and len(values) != num_channels:
            raise ValueError(f"{place}: {name}: expected {num_channels} numbers, got {reprlib.repr(values)}")
        for value in values if is_list else [values]:
            check_number(f"{place}: {name}", value, Real, *limits)
    # Resizing before the crop must not take gigabytes; padding around a smaller image would be captioned too.
    crops = settings.get("do_center_crop", True)
    sizes = {"size": 8 if crops else 1} if settings.get("do_resize", True) else {}
    sizes |= {"crop_size": 1} if crops else {}
    sizes |= {"pad_size": 8} if settings.get("do_pad") and settings.get("pad_size") is not None else {}
    for name, factor in sizes.items():
        sides = sides_of(settings.get(name))
        if factor == 1 and sorted(sides) not in (["height", "width"], ["side"]):
            raise ValueError(f"{place}: {name}: expected height and width, got {reprlib.repr(settings.get(name))}")
        for side in sides.values():
            check_number(f"{place}: {name}", side, Integral, image_size, factor * image_size)
    if settings.get("resample") is not None:
        # Pillow's filters.
        check_number(f"{place}: resample", settings["resample"], Integral, 0, 5)


def icon_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Width and height of the PNG and BMP files in an icon, whose directory may tell others."""
    for sides in re.findall(rb"IHDR(.{8})", data, re.DOTALL):
        yield struct.unpack(">II", sides)
    entries = data[6 : 6 + 16 * int.from_bytes(data[4:6], "little")]
    for (start,) in struct.iter_unpack("<12xI", entries[: len(entries) // 16 * 16]):
        if len(header := data[start : start + 12]) == 12 and not header.startswith(b"\x89PNG"):
            # Headers of 12 bytes have sides of 16 bits. Rows may be stored from top to bottom: a negative height.
            is_old = header.startswith(b"\x0c\0\0\0")
            width, height = struct.unpack_from("<HH" if is_old else "<ii", header, 4)
            yield abs(width), abs(height)


def check_heif(data: bytes) -> None:
    """Raises `ValueError` for a HEIF file whose metadata and colour profiles, which its images may share, would take
    more memory than `MAX_HEIF_COPIES`: pillow-heif copies them for each image."""
    # A reference from metadata to images has 12 bytes and 2 for each image; the metadata may be the whole file.
    references = re.findall(rb"(\0...)cdsc", data, re.DOTALL)
    copies = len(data) * sum((int.from_bytes(size, "big") - 12) // 2 for size in references)
    profiles = re.findall(rb"(\0...)colr(?:prof|rICC)", data, re.DOTALL)
    copies += data.count(b"infe") * int.from_bytes(max(profiles, default=b""), "big")
    if copies > MAX_HEIF_COPIES:
        raise ValueError(f"expected at most {MAX_HEIF_COPIES:,} bytes of metadata in a HEIF file, got up to {copies:,}")
