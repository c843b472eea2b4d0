"""Image files in all variants of six formats (`SEEDS`), mutations (`MUTATIONS`), and the expected outcomes.

`cases` is a hypothesis strategy for a file; `drive` opens files with the image loader, the training data's decoder and
the pipeline. Used by `test_hostile_images.py` for 500 cases and by `fuzz_images.py` for any number.
"""

import contextlib
import io
import random
import shlex
import struct
import subprocess
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageStat

from tinycap.processing_tinycap import load_image
from tinycap.training.data import Columns, decode_row


EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "TIFF": "tif", "BMP": "bmp"}
SIZES = ((1, 1), (1, 90), (3, 200), (37, 29), (64, 48), (97, 131), (250, 11), (320, 240))
ORIENTATION = 0x0112
TURNING_EXIF = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


# --- whole files ------------------------------------------------------------------------------------------------------


def draw(seed: int, size: tuple[int, int]) -> Image.Image:
    """A smooth image of six colours, which survives lossy compression."""
    image = Image.frombytes("RGB", (3, 2), random.Random(seed).randbytes(18))
    return image.resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.ROTATE_270)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(name, body) of every chunk."""
    found, position = [], 8
    while position < len(data):
        length, name = struct.unpack(">I4s", data[position : position + 8])
        found.append((name, data[position + 8 : position + 8 + length]))
        position += 12 + length
    return found


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A file of these chunks with valid checksums, so that decoding continues past them."""
    body = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def png_16_bits(image: Image.Image) -> bytes:
    """16 bits a channel, which Pillow reads but doesn't write."""
    rows = np.asarray(image).repeat(2, axis=2)
    header = struct.pack(">IIBBBBB", *image.size, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return png_of([(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")])


def mode(name: str) -> Callable[[Image.Image], Image.Image]:
    """Converts to a mode; grey of 16 and 32 bits and float in the whole range of such files."""

    def change(image: Image.Image) -> Image.Image:
        if name == "F":
            return image.convert("L").convert("F").point(lambda value: value * (1 / 255))
        if name.startswith("I"):
            image = image.convert("L").convert("I").point(lambda value: value * 257)
        return image.convert(name)

    return change


def grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def half_clear(image: Image.Image) -> Image.Image:
    """In RGBA, the left half transparent."""
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, image.width // 2, image.height))
    image = image.copy()
    image.putalpha(alpha)
    return image


def in_palette(image: Image.Image) -> Image.Image:
    return image.quantize(64)


def palette_with_clear_color(image: Image.Image) -> Image.Image:
    image = image.quantize(16)
    image.info["transparency"] = 0
    return image


def png_with_clear_color(change: Callable) -> Callable[[Image.Image], bytes]:
    """Writes PNGs without alpha in which the colour of the first pixel means transparent."""

    def write(image: Image.Image) -> bytes:
        image = change(image)
        color = np.atleast_1d(image.getpixel((0, 0)))
        head, *chunks = png_chunks(encoded(image, "PNG"))
        return png_of([head, (b"tRNS", struct.pack(f">{len(color)}H", *color)), *chunks])

    return write


def without_first_color(image: Image.Image) -> Image.Image:
    """The image with white for the colour of its first pixel."""
    pixels = np.array(image)
    pixels[(pixels == pixels[0, 0]).all(axis=-1)] = 255
    return Image.fromarray(pixels)


def over_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@dataclass(frozen=True)
class Seed:
    """A variant of a format.

    Args:
        kind: Pillow's name of the format.
        change: converts the RGB image to the one to save, or to the bytes of its file.
        show: converts the RGB image to what a viewer shows; by default the result of `change` over white.
        tolerance: mean difference of the channels, of 255, that the format's losses explain (lossy WebP halves the
            resolution of colours; a frame that should not be shown differs by more than 100).
        frames: whether two more frames follow, the image's negative.
        options: of `Image.save`.
    """

    kind: str
    change: Callable = lambda image: image
    show: Callable | None = None
    tolerance: float = 0.0
    frames: bool = False
    options: dict = field(default_factory=dict)

    def write(self, image: Image.Image) -> bytes:
        saved = self.change(image)
        if isinstance(saved, bytes):
            return saved
        more = {"save_all": True, "append_images": [ImageChops.invert(image)] * 2} if self.frames else {}
        return encoded(saved, self.kind, **self.options, **more)

    def shown(self, image: Image.Image) -> Image.Image:
        return self.show(image) if self.show else over_white(self.change(image))


def same(image: Image.Image) -> Image.Image:
    return image


BEST, TURN = {"quality": 95, "subsampling": 0}, {"exif": b"Exif\0\0" + TURNING_EXIF}
SEEDS = {
    "jpeg": Seed("JPEG", tolerance=12, options=BEST),
    "jpeg progressive": Seed("JPEG", tolerance=12, options={**BEST, "progressive": True}),
    "jpeg grey": Seed("JPEG", mode("L"), tolerance=12, options=BEST),
    "jpeg cmyk": Seed("JPEG", mode("CMYK"), same, 12, options={"quality": 95}),
    "jpeg turned": Seed("JPEG", show=turned, tolerance=12, options={**BEST, **TURN}),
    "png": Seed("PNG"),
    "png grey": Seed("PNG", mode("L")),
    "png black and white": Seed("PNG", mode("1")),
    "png alpha": Seed("PNG", half_clear),
    "png grey alpha": Seed("PNG", lambda image: half_clear(image).convert("LA")),
    "png palette": Seed("PNG", in_palette),
    "png palette, transparent": Seed("PNG", palette_with_clear_color),
    "png transparent colour": Seed("PNG", png_with_clear_color(same), without_first_color),
    "png transparent grey": Seed("PNG", png_with_clear_color(mode("L")), lambda p: without_first_color(grey(p))),
    "png transparent grey, 16 bits": Seed(
        "PNG", png_with_clear_color(mode("I;16")), lambda image: without_first_color(grey(image)), 1
    ),
    "png 16 bits": Seed("PNG", png_16_bits, same),
    "png grey 16 bits": Seed("PNG", mode("I;16"), grey, 1),
    "png turned": Seed("PNG", show=turned, options=TURN),
    "png animated": Seed("PNG", frames=True),
    "webp": Seed("WEBP", tolerance=45, options={"quality": 95}),
    "webp lossless": Seed("WEBP", options={"lossless": True}),
    "webp alpha": Seed("WEBP", half_clear, options={"lossless": True}),
    "webp animated": Seed("WEBP", frames=True, options={"lossless": True}),
    "webp turned": Seed("WEBP", show=turned, options={"lossless": True, **TURN}),
    "gif": Seed("GIF", in_palette),
    "gif animated": Seed("GIF", in_palette, frames=True),
    "gif transparent": Seed("GIF", palette_with_clear_color, options={"transparency": 0}),
    "tiff": Seed("TIFF"),
    "tiff lzw": Seed("TIFF", options={"compression": "tiff_lzw"}),
    "tiff deflate": Seed("TIFF", options={"compression": "tiff_adobe_deflate"}),
    "tiff jpeg": Seed("TIFF", tolerance=12, options={"compression": "jpeg", "quality": 95}),
    "tiff cmyk": Seed("TIFF", mode("CMYK"), same, 2),
    "tiff alpha": Seed("TIFF", half_clear),
    "tiff black and white": Seed("TIFF", mode("1"), options={"compression": "group4"}),
    "tiff grey 16 bits": Seed("TIFF", mode("I;16"), grey, 1),
    "tiff grey 32 bits": Seed("TIFF", mode("I"), grey, 1),
    "tiff float": Seed("TIFF", mode("F"), grey, 1),
    "tiff turned": Seed("TIFF", show=turned, options={"tiffinfo": {ORIENTATION: 6}}),
    "tiff pages": Seed("TIFF", frames=True),
    "bmp": Seed("BMP"),
    "bmp palette": Seed("BMP", in_palette),
    "bmp grey": Seed("BMP", mode("L")),
    "bmp black and white": Seed("BMP", mode("1")),
}


# --- mutations --------------------------------------------------------------------------------------------------------


HEADERS = (
    *(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", b"\x89PNG\r\n\x1a\n", b"RIFF\x40\x00\x00\x00WEBPVP8 ", b"GIF89a"),
    *(b"II*\x00\x08\x00\x00\x00", b"BM\x36\x10\x00\x00", b"%PDF-1.7\n", b"PK\x03\x04", b"<!DOCTYPE html><html>"),
    # Formats that Pillow opens with external programs, or that are rarely tested.
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n",
    *(b"8BPS\x00\x01", b"<svg xmlns='http://www.w3.org/2000/svg'>"),
)
# These may give any caption or an error.
DAMAGES = (
    *("bit flips", "bit flips in the header", "extreme bytes", "truncated", "a part cut out", "a part repeated"),
    *("another format's header", "another file's tail"),
)
# These don't change the image, which must be shown as drawn.
HARMLESS = ("none", "garbage at the end", "wrong extension", "broken exif", "broken icc")
MUTATIONS = (*DAMAGES, "huge declared size", *HARMLESS)


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for place in rng.sample(range(8 * len(data)), min(rng.choice((1, 2, 5, 20, 200)), 8 * len(data))):
        changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def damage(name: str, data: bytes, rng: random.Random) -> bytes:
    """The file after one of `DAMAGES`."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randint(1, 200))
    if name == "bit flips":
        return flip_bits(data, rng)
    if name == "bit flips in the header":
        return flip_bits(data[:64], rng) + data[64:]
    if name == "extreme bytes":
        # All bits, none, the sign: edge cases of lengths and offsets.
        part = data[start : start + rng.choice((1, 2, 4, 8, 100))]
        written = (rng.choice([new for new in (0x00, 0x7F, 0x80, 0xFF) if new != old]) for old in part)
        return data[:start] + bytes(written) + data[start + len(part) :]
    if name == "truncated":
        return data[:start]
    if name == "a part cut out":
        return data[:start] + data[end:]
    if name == "a part repeated":
        return data[:end] + data[start:end] * rng.choice((1, 3, 50)) + data[end:]
    if name == "another format's header":
        header = rng.choice([header for header in HEADERS if not data.startswith(header)])
        return header + data[len(header) :]
    other = SEEDS[rng.choice(sorted(SEEDS))].write(draw(rng.randrange(9), rng.choice(SIZES)))
    return data[:start] + other[rng.randrange(len(other)) :] + b"\0"


HUGE_SIDES = (65_535, 30_000, 30_000, 16_383, 11_585)


def declare_huge(kind: str, data: bytes, width: int, height: int) -> bytes:
    """The same file with another size in its header (WebP has no more than 14 bits for a side)."""
    if kind == "PNG":
        (name, header), *chunks = png_chunks(data)
        return png_of([(name, struct.pack(">II", width, height) + header[8:]), *chunks])
    changed = bytearray(data)
    if kind == "GIF":
        for place in (6, data.index(b"\x2c\0\0\0\0") + 5):
            changed[place : place + 4] = struct.pack("<HH", width, height)
    elif kind == "BMP":
        changed[18:26] = struct.pack("<ii", width, height)
    elif kind == "JPEG":
        place = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
        changed[place : place + 4] = struct.pack(">HH", height, width)
    elif kind == "TIFF":
        (start,) = struct.unpack("<I", data[4:8])
        for place in range(start + 2, start + 2 + 12 * data[start], 12):
            tag = int.from_bytes(data[place : place + 2], "little")
            if tag in (256, 257):
                changed[place + 2 : place + 12] = struct.pack("<HII", 4, 1, width if tag == 256 else height)
    elif data[12:16] == b"VP8 ":
        changed[26:30] = struct.pack("<HH", min(width, 16_383), min(height, 16_383))
    elif data[12:16] == b"VP8L":
        bits = data[24] >> 4 << 28 | (min(height, 16_383) - 1) << 14 | (min(width, 16_383) - 1)
        changed[21:25] = struct.pack("<I", bits)
    else:
        sides = (min(side, 16_383) - 1 for side in (width, height))
        changed[24:30] = b"".join(side.to_bytes(3, "little") for side in sides)
    return bytes(changed)


EXIF_GARBAGE = (
    b"",
    b"II*\0\xff\xff\xff\xff",
    # A directory that claims 65,535 entries, one that lists itself, one whose orientation is text at a far offset.
    b"II*\0\x08\0\0\0\xff\xff",
    b"MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x08\0\0\0\x08",
    b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\xff\xff\xff\xff\xff\xff\xff\xf0\0\0\0\0",
    # An orientation of 99, one that is a list, one without its value.
    b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
    b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x02\0\x63\0\x63\0\0\0\0",
    b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0",
    # A tag that breaks rewriting the EXIF of a rotated image.
    b"MM\0*\0\0\0\x08\0\x02\x01\x0f\0\x0a\0\0\0\x01\0\0\0\0\x01\x12\0\x03\0\0\0\x01\0\x01\0\0\0\0\0\0",
    bytes(range(256)),
)


def with_block(seed: Seed, whole: bytes, size: tuple[int, int], name: str, body: bytes) -> bytes | None:
    """The file with another block of metadata, "exif" or "icc"; `None` if the format doesn't support it."""
    if seed.options.get("exif") or seed.kind not in ("JPEG", "PNG", "WEBP") or whole[12:16] == b"VP8X":
        return None
    is_exif = name == "exif"
    if seed.kind == "PNG":
        head, *chunks = png_chunks(whole)
        return png_of([head, (b"eXIf" if is_exif else b"iCCP", body), *chunks])
    if seed.kind == "JPEG":
        body = (b"Exif\0\0" if is_exif else b"ICC_PROFILE\0") + body
        return (
            whole[:2] + (b"\xff\xe1" if is_exif else b"\xff\xe2") + struct.pack(">H", len(body) + 2) + body + whole[2:]
        )
    # Converts a simple WebP to the extended layout: the profile before the pixels, EXIF after them.
    block = (b"EXIF" if is_exif else b"ICCP") + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    head = struct.pack("<4sIBxxx", b"VP8X", 10, 0x08 if is_exif else 0x20)
    head += b"".join((side - 1).to_bytes(3, "little") for side in size)
    inside = b"WEBP" + head + (whole[12:] + block if is_exif else block + whole[12:])
    return b"RIFF" + struct.pack("<I", len(inside)) + inside


def broken_exif(rng: random.Random, kind: str) -> bytes:
    return rng.choice((*EXIF_GARBAGE, b"MM\0*" + rng.randbytes(40), flip_bits(TURNING_EXIF[:-6], rng)))


def broken_icc(rng: random.Random, kind: str) -> bytes:
    """An invalid colour profile."""
    profile = rng.choice((b"\0", b"acsp" * 40, rng.randbytes(300), b"\0\0\xff\xff" * 100))
    if kind == "PNG":
        return b"profile\0\0" + rng.choice((zlib.compress(profile), profile))
    return rng.choice((b"\1\1", b"\2\1", b"\0\0", b"\xff\xff")) * (kind == "JPEG") + profile


@dataclass(frozen=True)
class Case:
    """One file to open.

    Args:
        seed, mutation: keys of `SEEDS` and `MUTATIONS`.
        image: what was drawn.
        data: the content of the file.
        extension: of its name.
        declared: width and height in the header, with "huge declared size".
    """

    seed: str
    mutation: str
    image: Image.Image
    data: bytes
    extension: str
    declared: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        return SEEDS[self.seed].kind


def make_case(seed_name: str, mutation: str, image_seed: int, size: tuple[int, int], number: int) -> Case | None:
    """The case of these choices; `None` if the mutation doesn't apply to the variant."""
    seed, rng = SEEDS[seed_name], random.Random(f"{seed_name}/{mutation}/{image_seed}/{number}")
    image = draw(image_seed, size)
    original, extension, declared = seed.write(image), EXTENSIONS[seed.kind], None
    data = original
    if mutation in DAMAGES:
        data = damage(mutation, original, rng)
    elif mutation == "huge declared size":
        declared = rng.choice(HUGE_SIDES), rng.choice(HUGE_SIDES)
        data = declare_huge(seed.kind, original, *declared)
    elif mutation == "garbage at the end":
        garbage = (b"\0" * 1000, b"<script>", rng.randbytes(3000), b"PK\x03\x04" + rng.randbytes(99))
        data = original + rng.choice(garbage)
    elif mutation == "wrong extension":
        extension = rng.choice([other for other in (*EXTENSIONS.values(), "eps", "txt", "") if other != extension])
    elif mutation != "none":
        body = (broken_exif if mutation == "broken exif" else broken_icc)(rng, seed.kind)
        data = with_block(seed, original, size, mutation.removeprefix("broken "), body)
    if data is None:
        return None
    assert (data == original) == (mutation in ("none", "wrong extension")), (seed_name, mutation, "isn't there")
    return Case(seed_name, mutation, image, data, extension, declared)


def cases() -> st.SearchStrategy[Case]:
    """A hypothesis strategy, which shrinks towards small unmodified files."""
    parts = (st.sampled_from(list(SEEDS)), st.sampled_from(MUTATIONS[::-1]), st.integers(0, 8), st.sampled_from(SIZES))
    return st.builds(make_case, *parts, st.integers(0, 2**32)).filter(lambda case: case is not None)


# --- opening the files ------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The outcome of a case.

    Args:
        caption: of the pipeline, or `None` with an `error`.
        problems: violated expectations.
        seconds: CPU time of the slowest single way to open it.
        peak_mb: peak of resident memory above that before; `None` if unknown.
    """

    caption: str | None = None
    error: str | None = None
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_mb: float | None = None

    def attempt(self, name: str, named: str, function: Callable, *args):
        """Calls a function; returns its result and its error's text. Errors other than `ValueError` are problems."""
        started = time.process_time()
        try:
            return function(*args), None
        except Exception as error:
            if not isinstance(error, ValueError) or named not in str(error):
                self.problems.append(f"{name}: expected a ValueError that names the file, got {error!r}")
            return None, str(error)
        finally:
            self.seconds = max(self.seconds, time.process_time() - started)

    def agree(self, name: str, refused: bool, said) -> bool:
        """Records a problem unless the function and `load_image` reject the same files."""
        if refused != (self.error is not None):
            self.problems.append(f"{name}: {said!r} where load_image says {self.error!r}")
        return refused == (self.error is not None)


def drive(batch: list[Case], captioner, folder: Path, also: tuple[Callable[[Path], str], ...] = ()) -> list[Outcome]:
    """Opens each case with the image loader, the training data's decoder and the pipeline, and checks the outcome.

    The pipeline gets all files as one list, then the unreadable ones one by one.

    Args:
        captioner: the project's pipeline.
        folder: for the files, which remain until the next call.
        also: further functions from a path to a caption, with a `ValueError` for an unreadable file.
    """
    for old in folder.glob("case-*"):
        old.unlink()
    paths = [folder / f"case-{number}.{case.extension}" for number, case in enumerate(batch)]
    outcomes = [Outcome() for _ in batch]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case, path, outcome in zip(batch, paths, outcomes):
            path.write_bytes(case.data)
            with peak_memory() as peak:
                drive_alone(case, path, outcome, also)
            outcome.peak_mb = peak[0] if peak else None
        found, _ = outcomes[0].attempt("pipeline", "", lambda: captioner(list(map(str, paths)), batch_size=len(paths)))
        if found is None or len(found) != len(batch):
            outcomes[0].problems.append(f"pipeline: expected {len(batch)} captions or errors, got {found}")
            return outcomes
        for path, outcome, (entry, *_) in zip(paths, outcomes, found):
            outcome.caption = entry["generated_text"]
            if outcome.agree("pipeline", outcome.caption is None, entry) and outcome.caption is None:
                if str(path) not in entry["error"]:
                    outcome.problems.append(f"pipeline: the error doesn't name the file: {entry}")
                alone, _ = outcome.attempt("pipeline alone", str(path), captioner, str(path))
                if alone is not None:
                    outcome.problems.append(f"pipeline alone: {alone} where it says {entry} among several")
    return outcomes


def drive_alone(case: Case, path: Path, outcome: Outcome, also: tuple[Callable[[Path], str], ...]) -> None:
    """Opens one file in all ways that take a single file; they must agree."""
    image, outcome.error = outcome.attempt("load_image", str(path), load_image, path)
    row = {"image": {"bytes": case.data, "path": None}, "caption": "a caption", "id": str(path)}
    decoded, _ = outcome.attempt("decode_row", "", decode_row, row, 7, Columns("image", "caption", "id"), 64)
    if decoded is not None:
        outcome.agree("decode_row", bool(decoded["reason"]), decoded["reason"])
        if decoded["reason"] and str(path) not in decoded["reason"]:
            outcome.problems.append(f"decode_row: the reason doesn't name the row: {decoded['reason']}")
    for door in also:
        said, why = outcome.attempt("door", str(path), door, path)
        outcome.agree("door", said is None, why)
    if case.declared is not None and min(case.declared) >= 30_000 and case.kind != "WEBP" and image is not None:
        outcome.problems.append(f"a claim of {case.declared} was not refused but opened as {image.size}")
    if case.mutation in HARMLESS:
        outcome.problems.extend(judge_image(case, image, outcome.error))


def judge_image(case: Case, image: Image.Image | None, refused: str | None) -> list[str]:
    """The problems in how an undamaged image was opened."""
    if image is None:
        return [f"a whole image was refused: {refused}"]
    seed = SEEDS[case.seed]
    # The loader crops extreme aspect ratios; this does the same with the expected image.
    expected = load_image(seed.shown(case.image))
    if image.mode != "RGB" or image.size != expected.size:
        return [f"expected {expected.size} in RGB, got {image.size} in {image.mode}"]
    difference = sum(ImageStat.Stat(ImageChops.difference(image, expected)).mean) / 3
    return [f"another image: channels differ by {difference:.1f} of 255"] if difference > seed.tolerance else []


def command_door(command: str, timeout: float = 120) -> Callable[[Path], str]:
    """Runs a command line with a path appended: returns the printed caption, or raises for its exit status."""

    def caption(path: Path) -> str:
        done = subprocess.run([*shlex.split(command), str(path)], capture_output=True, text=True, timeout=timeout)
        if done.returncode < 0 or "Traceback" in done.stderr:
            raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-500:]}")
        if done.returncode:
            raise ValueError(done.stderr)
        return done.stdout

    return caption


@contextlib.contextmanager
def peak_memory():
    """Yields a list that holds, after the block, the peak of resident memory in it, in MB above that at its start.

    Read from /proc on Linux; elsewhere the list stays empty.
    """
    found = []

    def high_water() -> float:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

    try:
        # 5 resets the peak to the present size.
        Path("/proc/self/clear_refs").write_text("5")
        start = high_water()
    except OSError:
        start = None
    yield found
    if start is not None:
        found.append(high_water() - start)
