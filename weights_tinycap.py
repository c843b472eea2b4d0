"""Weights that strangers made: what is looked at before a model of their sizes is built, and after.

Only safetensors is read. Its header says which tensors of which shapes a file holds, so that a file that lies, or one
that doesn't fit its configuration, is an error before any large allocation.
"""

import json
import os
import re
from pathlib import Path

import torch
from torch import nn
from transformers.utils import cached_file


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# The longest header that the safetensors format allows, in bytes.
MAX_HEADER = 100_000_000
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def find_weights(name_or_path: str, **hub_kwargs) -> Path | None:
    """The `model.safetensors` of a folder or a Hub repository, which is downloaded; `None` where its index leads on.

    Raises:
        ValueError: a folder holds a pickle instead; says how to convert it.
    """
    folder = os.path.join(name_or_path, hub_kwargs.get("subfolder") or "")
    files = sorted(os.listdir(folder)) if os.path.isdir(folder) else [name_or_path]
    pickles = [file for file in files if file.endswith(PICKLES)]
    if pickles and not any(file.endswith((".safetensors", ".safetensors.index.json")) for file in files):
        raise ValueError(
            f"{name_or_path}: expected model.safetensors, got {pickles[0]}, a pickle, which may run code when it is "
            "loaded; convert it once, where you trust it: "
            "weights = torch.load('pytorch_model.bin', weights_only=True); safetensors.torch.save_file("
            "{name: value.clone() for name, value in weights.items()}, 'model.safetensors', metadata={'format': 'pt'})"
        )
    try:
        found = cached_file(name_or_path, "model.safetensors", **hub_kwargs)
    except OSError:
        # Several files with an index, or none at all: `PreTrainedModel.from_pretrained` says which.
        return None
    return None if found is None else Path(found)


def stored_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes by name, from the header of a safetensors file; no weight is read.

    Raises:
        ValueError: the header doesn't describe the file; names it.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{path}: expected safetensors, got a header of {length:,} bytes in a file of {size:,}")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            shapes = {name: [int(length) for length in entry["shape"]] for name, entry in tensors.items()}
            end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: expected a safetensors header, got something else: {error!r}") from error
    if end != size - 8 - length:
        raise ValueError(f"{path}: expected {end:,} bytes of weights, as its header says, got {size - 8 - length:,}")
    return shapes


def check_shapes(path: Path, shapes: dict[str, list[int]], config) -> None:
    """Holds a configuration against the weights, before a model of its sizes is built.

    Raises:
        ValueError: they contradict each other; names the tensor, what the configuration expects and what is there.
    """
    vision, text = getattr(config, "vision_config", config), getattr(config, "text_config", None)
    # A student may have been saved alone.
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in shapes) else ""
    patches, patch = (vision.image_size // vision.patch_size) ** 2, vision.patch_size
    expected = {
        f"{prefix}embeddings.position_embeddings": [1, 1 + patches, vision.hidden_size],
        f"{prefix}embeddings.patch_embedding.weight": [vision.hidden_size, vision.num_channels, patch, patch],
        f"{prefix}layers.0.mlp.fc1.weight": [vision.intermediate_size, vision.hidden_size],
        f"{prefix}projection.weight": [vision.projection_dim, vision.hidden_size],
    }
    depths = {f"{prefix}layers.": vision.num_hidden_layers}
    if text is not None and any(name.startswith("decoder.") for name in shapes):
        expected |= {
            "decoder.embed_tokens.weight": [text.vocab_size, text.hidden_size],
            "decoder.embed_positions.weight": [text.max_position_embeddings, text.hidden_size],
            "decoder.layers.0.mlp.fc1.weight": [text.intermediate_size, text.hidden_size],
        }
        depths["decoder.layers."] = text.num_hidden_layers
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape:
            raise ValueError(f"{path}: {name}: the config expects the shape {shape}, got {shapes[name]}")
    for start, depth in depths.items():
        found = {match[1] for name in shapes if (match := re.match(re.escape(start) + r"(\d+)\.", name))}
        if found and len(found) != depth:
            raise ValueError(f"{path}: {start}*: the config expects {depth} layers, got {len(found)}")


def check_finite_weights(model: nn.Module, name_or_path: str) -> None:
    """Raises `ValueError`, naming the first such tensor, where a weight is infinite or no number."""
    for name, value in model.named_parameters():
        # A tensor subclass holds quantised or distributed values, of which only its library can read the extremes.
        plain = type(value) is nn.Parameter and not value.is_meta
        if not plain or not value.is_floating_point() or value.element_size() < 2:
            continue
        # Both extremes in one pass, and no copy; a NaN is both.
        low, high = torch.aminmax(value.detach()) if value.numel() else (value.new_zeros(()),) * 2
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ValueError(f"{name_or_path}: {name}: expected finite weights, got values from {low} to {high}")
