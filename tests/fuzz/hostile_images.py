"""Image files in all variants of six formats (`SEEDS`), mutations (`MUTATIONS`), and the expected outcomes.

`cases` is a hypothesis strategy for a file; `drive` opens files with the image loader, the training data's decoder and
the pipeline. Used by `test_hostile_images.py` for 250 cases and by `fuzz_images.py` for any number.
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


def same(image: Image.Image) -> Image.Image:
    return image


def turned(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.ROTATE_270)


def grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def mode(name: str) -> Callable[[Image.Image], Image.Image]:
    """Converts to a mode; grey of 16 and 32 bits and float in the whole range of such files."""

    def change(image: Image.Image) -> Image.Image:
        if name == "F":
            return image.convert("L").convert("F").point(lambda value: value * (1 / 255))
        if name.startswith("I"):
            image = image.convert("L").convert("I").point(lambda value: value * 257)
        return image.convert(name)

    return change


def half_clear(image: Image.Image) -> Image.Image:
    """In RGBA, the left half transparent."""
    alpha, image = Image.new("L", image.size, 255), image.copy()
    alpha.paste(0, (0, 0, image.width // 2, image.height))
    image.putalpha(alpha)
    return image


def in_palette(image: Image.Image) -> Image.Image:
    return image.quantize(64)


def palette_with_clear_color(image: Image.Image) -> Image.Image:
    image = image.quantize(16)
    image.info["transparency"] = 0
    return image


def without_first_color(image: Image.Image) -> Image.Image:
    """The image with white for the colour of its first pixel."""
    pixels = np.array(image)
    pixels[(pixels == pixels[0, 0]).all(axis=-1)] = 255
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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
    parts = ((len(body), name + body) for name, body in chunks)
    packed = (struct.pack(">I", length) + part + struct.pack(">I", zlib.crc32(part)) for length, part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def png_16_bits(image: Image.Image) -> bytes:
    """16 bits a channel, which Pillow reads but doesn't write."""
    header = struct.pack(">IIBBBBB", *image.size, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in np.asarray(image).repeat(2, axis=2)))
    return png_of([(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")])


def png_with_clear_color(change: Callable) -> Callable[[Image.Image], bytes]:
    """Writes PNGs without alpha in which the colour of the first pixel means transparent."""
    return lambda image: encoded(change(image), "PNG", transparency=change(image).getpixel((0, 0)))


@dataclass(frozen=True)
class Seed:
    """A variant of a format.

    `change` converts the RGB image to the one to save, or to the bytes of its file; `show` to what a viewer shows, by
    default the result of `change` over white. `tolerance`: mean difference of the channels, of 255, due to compression
    (lossy WebP halves the resolution of colours; a wrong frame differs by more than 100). With `frames`, two negatives
    follow. `options`: of `Image.save`.
    """

    kind: str
    change: Callable = same
    show: Callable | None = None
    tolerance: float = 0.0
    frames: bool = False
    options: dict = field(default_factory=dict)

    def write(self, image: Image.Image, **metadata) -> bytes:
        saved = self.change(image)
        more = {"save_all": True, "append_images": [ImageChops.invert(image)] * 2} if self.frames else {}
        return saved if isinstance(saved, bytes) else encoded(saved, self.kind, **self.options, **more, **metadata)

    def shown(self, image: Image.Image) -> Image.Image:
        if self.show:
            return self.show(image)
        image = self.change(image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


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
    if name == "another format's header":
        header = rng.choice([header for header in HEADERS if not data.startswith(header)])
        return header + data[len(header) :]
    if name == "another file's tail":
        other = SEEDS[rng.choice(sorted(SEEDS))].write(draw(rng.randrange(9), rng.choice(SIZES)))
        return data[:start] + other[rng.randrange(len(other)) :] + b"\0"
    tails = {"truncated": b"", "a part cut out": data[end:]}
    repeated = data[start:end] * (1 + rng.choice((1, 3, 50))) + data[end:]
    return data[:start] + tails.get(name, repeated)


HUGE_SIDES = (65_535, 30_000, 30_000, 16_383, 11_585)


def declare_huge(kind: str, data: bytes, width: int, height: int) -> bytes:
    """The same file with another size in its header (WebP has no more than 14 bits for a side)."""
    if kind == "PNG":
        (name, header), *chunks = png_chunks(data)
        return png_of([(name, struct.pack(">II", width, height) + header[8:]), *chunks])
    low = [min(side, 16_383) for side in (width, height)]
    changes = {}
    if kind == "GIF":
        changes = dict.fromkeys((6, data.index(b"\x2c\0\0\0\0") + 5), struct.pack("<HH", width, height))
    elif kind == "BMP":
        changes[18] = struct.pack("<ii", width, height)
    elif kind == "JPEG":
        changes[max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5] = struct.pack(">HH", height, width)
    elif kind == "TIFF":
        (start,) = struct.unpack("<I", data[4:8])
        for place in range(start + 2, start + 2 + 12 * data[start], 12):
            side = {256: width, 257: height}.get(int.from_bytes(data[place : place + 2], "little"))
            changes |= {} if side is None else {place + 2: struct.pack("<HII", 4, 1, side)}
    elif data[12:16] == b"VP8 ":
        changes[26] = struct.pack("<HH", *low)
    elif data[12:16] == b"VP8L":
        changes[21] = struct.pack("<I", data[24] >> 4 << 28 | (low[1] - 1) << 14 | (low[0] - 1))
    else:
        changes[24] = b"".join((side - 1).to_bytes(3, "little") for side in low)
    for place, written in changes.items():
        data = data[:place] + written + data[place + len(written) :]
    return data


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


def with_broken_metadata(seed: Seed, image: Image.Image, is_exif: bool, rng: random.Random) -> bytes | None:
    """The file with invalid EXIF or an invalid colour profile; `None` if the format doesn't support it."""
    if seed.options.get("exif") or seed.kind not in ("JPEG", "PNG", "WEBP"):
        return None
    exif = rng.choice((*EXIF_GARBAGE, b"MM\0*" + rng.randbytes(40), flip_bits(TURNING_EXIF[:-6], rng)))
    profile = rng.choice((b"\0", b"acsp" * 40, rng.randbytes(300), b"\0\0\xff\xff" * 100))
    if seed.kind == "PNG":
        head, *chunks = png_chunks(seed.write(image))
        profile = b"profile\0\0" + rng.choice((zlib.compress(profile), profile))
        return png_of([head, (b"eXIf", exif) if is_exif else (b"iCCP", profile), *chunks])
    if is_exif:
        return seed.write(image, exif=b"Exif\0\0" + exif if seed.kind == "JPEG" else exif or b"\0")
    numbers = rng.choice((b"\1\1", b"\2\1", b"\0\0", b"\xff\xff"))
    return seed.write(image, icc_profile=profile).replace(b"ICC_PROFILE\0\1\1", b"ICC_PROFILE\0" + numbers)


@dataclass(frozen=True)
class Case:
    """One file to open, of a seed and a mutation; `declared`: width and height in a header of a huge size."""

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
    data, extension, declared = seed.write(image), EXTENSIONS[seed.kind], None
    original = data
    if mutation in DAMAGES:
        data = damage(mutation, data, rng)
    elif mutation == "huge declared size":
        declared = rng.choice(HUGE_SIDES), rng.choice(HUGE_SIDES)
        data = declare_huge(seed.kind, data, *declared)
    elif mutation == "garbage at the end":
        data += rng.choice((b"\0" * 1000, b"<script>", rng.randbytes(3000), b"PK\x03\x04" + rng.randbytes(99)))
    elif mutation == "wrong extension":
        extension = rng.choice([other for other in (*EXTENSIONS.values(), "eps", "txt", "") if other != extension])
    elif mutation != "none":
        data = with_broken_metadata(seed, image, mutation == "broken exif", rng)
    if data is None:
        return None
    assert (data == original) == (mutation in ("none", "wrong extension")), (seed_name, mutation, "isn't there")
    return Case(seed_name, mutation, image, data, extension, declared)


def cases():
    """A hypothesis strategy for a `Case`, which shrinks towards small unmodified files."""
    from hypothesis import strategies as st  # Takes a second, for one slow test.

    parts = (st.sampled_from(list(SEEDS)), st.sampled_from(MUTATIONS[::-1]), st.integers(0, 8), st.sampled_from(SIZES))
    return st.builds(make_case, *parts, st.integers(0, 2**32)).filter(lambda case: case is not None)


# --- opening the files ------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The pipeline's caption or `load_image`'s error of a case, violated expectations (`problems`), CPU time of the
    slowest single way to open it, and its peak of resident memory in MB, if known."""

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

    def agree(self, name: str, path: str, error: str | None) -> None:
        """Records a problem unless `load_image` rejects the same files, and the error names the file."""
        if bool(error) != (self.error is not None):
            self.problems.append(f"{name}: {error!r} where load_image says {self.error!r}")
        elif error and path not in error:
            self.problems.append(f"{name}: the error doesn't name the file: {error}")


def drive(batch: list[Case], captioner, folder: Path, also: tuple[Callable[[Path], str], ...] = ()) -> list[Outcome]:
    """Opens each case with the image loader, the training data's decoder and the pipeline, and checks the outcome.

    The pipeline gets all files as one list, then the unreadable ones one by one. The files remain in `folder` until the
    next call. `also`: further functions from a path to a caption, with a `ValueError` for an unreadable file.
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
            outcome.agree("pipeline", str(path), entry["error"] if outcome.caption is None else None)
            if outcome.caption is None:
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
        outcome.agree("decode_row", str(path), decoded["reason"])
    for caption in also:
        outcome.agree("command", str(path), outcome.attempt("command", str(path), caption, path)[1])
    if case.declared is not None and min(case.declared) >= 30_000 and case.kind != "WEBP" and image is not None:
        outcome.problems.append(f"a claim of {case.declared} was not refused but opened as {image.size}")
    if case.mutation in HARMLESS:
        outcome.problems += judge_image(case, image, outcome.error)


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


def caption_by_command(command: str, timeout: float = 120) -> Callable[[Path], str]:
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
    """Yields a list that holds, after the block and on Linux, its peak of resident memory in MB above the start."""
    found = []

    def high_water() -> float:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

    try:
        # 5 resets the peak to the present size.
        Path("/proc/self/clear_refs").write_text("5")
        start = high_water()
    except OSError:
        start = None
    yield found
    if start is not None:
        found.append(high_water() - start)
