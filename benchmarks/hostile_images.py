"""Image files as strangers send them: whole ones in every flavour of six formats, and the many ways to break them.

Reading order: a picture and how it looks in each flavour (`SEEDS`), what is done to its file (`MUTATIONS`), one case
of both (`Case`, drawn by hypothesis), and what cases must not do to those who open them (`drive`). Used by
`fuzz_images.py` for many thousand cases and by the tests for some hundreds.
"""

import contextlib
import io
import random
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageStat

from tinycap.processing_tinycap import load_image
from tinycap.training.data import Columns, decode_row


EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "TIFF": "tif", "BMP": "bmp"}
SIZES = ((1, 1), (1, 90), (3, 200), (37, 29), (64, 48), (97, 131), (250, 11), (320, 240))
ORIENTATION = 0x0112


# --- whole files ------------------------------------------------------------------------------------------------------


def draw(seed: int, size: tuple[int, int]) -> Image.Image:
    """A smooth picture of a few colours, so that a lossy format keeps it recognisable."""
    colors = random.Random(seed)
    picture = Image.new("RGB", (3, 2))
    picture.putdata([tuple(colors.randrange(256) for _ in range(3)) for _ in range(6)])
    return picture.resize(size, Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[0x010E] = "a picture"
    return exif.tobytes()


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, body) of every chunk."""
    found, position = [], 8
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        found.append((kind, data[position + 8 : position + 8 + length]))
        position += 12 + length
    return found


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """The file of chunks, with right checksums: what a checksum would catch is not what is looked for."""
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def png_16_bits(picture: Image.Image) -> bytes:
    """A PNG of 16 bits a channel, which Pillow can read and not write."""
    width, height = picture.size
    wide = [bytes(byte for value in picture.crop((0, y, width, y + 1)).tobytes() for byte in (value, value))
            for y in range(height)]  # fmt: skip
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + line for line in wide))
    return png_of([(b"IHDR", header), (b"IDAT", lines), (b"IEND", b"")])


def half_clear(picture: Image.Image) -> Image.Image:
    """The picture in RGBA, its left half transparent."""
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (0, 0, picture.width // 2, picture.height))
    picture = picture.copy()
    picture.putalpha(alpha)
    return picture


def over_white(picture: Image.Image) -> Image.Image:
    """How a viewer shows it."""
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def palette_with_clear_colour(picture: Image.Image) -> Image.Image:
    picture = picture.quantize(16)
    picture.info["transparency"] = 0
    return picture


def grey_16_bits(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("I").point(lambda value: value * 257).convert("I;16")


def png_with_clear_colour(picture: Image.Image, mode: str) -> bytes:
    """Without alpha, but with one value that means transparent: that of the first pixel."""
    if mode != "I;16":
        picture = picture.convert(mode)
        return encoded(picture, "PNG", transparency=picture.getpixel((0, 0)))
    picture = grey_16_bits(picture)
    # Not all releases of Pillow write this one.
    head, *chunks = png_chunks(encoded(picture, "PNG"))
    return png_of([head, (b"tRNS", struct.pack(">H", picture.getpixel((0, 0)))), *chunks])


def shown_without_colour(picture: Image.Image) -> Image.Image:
    """The picture, white where it has the colour of its first pixel."""
    pixels = bytearray(picture.tobytes())
    key = bytes(pixels[:3])
    for start in range(0, len(pixels), 3):
        if pixels[start : start + 3] == key:
            pixels[start : start + 3] = b"\xff\xff\xff"
    return Image.frombytes("RGB", picture.size, bytes(pixels))


def as_grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def negative(picture: Image.Image) -> list[Image.Image]:
    """Further frames that nobody should see."""
    return [ImageChops.invert(picture.convert("RGB"))] * 2


@dataclass(frozen=True)
class Seed:
    """A flavour of a format.

    Args:
        kind: format, as Pillow calls it.
        write: the file of a picture.
        show: the picture as a viewer would show that file.
        tolerance: mean difference of the channels, of 255, that the format's losses explain (lossy WebP has half the
            colours of a picture three pixels wide; a frame that should not be seen differs by more than 100).
    """

    kind: str
    write: Callable[[Image.Image], bytes]
    show: Callable[[Image.Image], Image.Image] = lambda picture: picture
    tolerance: float = 0.0


def saved(kind: str, change: Callable = lambda picture: picture, **options) -> Callable[[Image.Image], bytes]:
    return lambda picture: encoded(change(picture), kind, **options)


def turned(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.ROTATE_270)


def animated(kind: str, **options) -> Callable[[Image.Image], bytes]:
    return lambda picture: encoded(picture, kind, save_all=True, append_images=negative(picture), **options)


def in_palette(picture: Image.Image) -> Image.Image:
    return picture.quantize(64)


def shown_palette(picture: Image.Image) -> Image.Image:
    return in_palette(picture).convert("RGB")


SEEDS = {
    "jpeg": Seed("JPEG", saved("JPEG", quality=95, subsampling=0), tolerance=12),
    "jpeg progressive": Seed("JPEG", saved("JPEG", quality=95, subsampling=0, progressive=True), tolerance=12),
    "jpeg grey": Seed("JPEG", saved("JPEG", lambda p: p.convert("L"), quality=95), as_grey, 12),
    "jpeg cmyk": Seed("JPEG", saved("JPEG", lambda p: p.convert("CMYK"), quality=95), tolerance=12),
    "jpeg turned": Seed("JPEG", saved("JPEG", exif=exif_of(6), quality=95, subsampling=0), turned, 12),
    "png": Seed("PNG", saved("PNG")),
    "png grey": Seed("PNG", saved("PNG", lambda p: p.convert("L")), as_grey),
    "png black and white": Seed("PNG", saved("PNG", lambda p: p.convert("1")), lambda p: p.convert("1").convert("RGB")),
    "png alpha": Seed("PNG", saved("PNG", half_clear), lambda p: over_white(half_clear(p))),
    "png grey alpha": Seed(
        "PNG", saved("PNG", lambda p: half_clear(p).convert("LA")), lambda p: over_white(half_clear(p).convert("LA"))
    ),
    "png palette": Seed("PNG", saved("PNG", in_palette), shown_palette),
    "png palette, transparent": Seed(
        "PNG",
        lambda picture: encoded(palette_with_clear_colour(picture), "PNG", transparency=0),
        lambda picture: over_white(palette_with_clear_colour(picture)),
    ),
    "png transparent colour": Seed("PNG", lambda p: png_with_clear_colour(p, "RGB"), shown_without_colour),
    "png transparent grey": Seed(
        "PNG", lambda p: png_with_clear_colour(p, "L"), lambda p: shown_without_colour(as_grey(p))
    ),
    "png transparent grey, 16 bits": Seed(
        "PNG", lambda p: png_with_clear_colour(p, "I;16"), lambda p: shown_without_colour(as_grey(p)), 1
    ),
    "png 16 bits": Seed("PNG", png_16_bits),
    "png grey 16 bits": Seed("PNG", saved("PNG", grey_16_bits), as_grey, 1),
    "png turned": Seed("PNG", saved("PNG", exif=exif_of(6)), turned),
    "png animated": Seed("PNG", animated("PNG")),
    "webp": Seed("WEBP", saved("WEBP", quality=95), tolerance=45),
    "webp lossless": Seed("WEBP", saved("WEBP", lossless=True)),
    "webp alpha": Seed("WEBP", saved("WEBP", half_clear, lossless=True), lambda p: over_white(half_clear(p))),
    "webp animated": Seed("WEBP", animated("WEBP", lossless=True)),
    "webp turned": Seed("WEBP", saved("WEBP", lossless=True, exif=exif_of(6)), turned),
    "gif": Seed("GIF", saved("GIF", in_palette), shown_palette),
    "gif animated": Seed(
        "GIF",
        lambda p: encoded(in_palette(p), "GIF", save_all=True, append_images=negative(p)),
        shown_palette,
    ),
    "gif transparent": Seed(
        "GIF",
        lambda picture: encoded(palette_with_clear_colour(picture), "GIF", transparency=0),
        lambda picture: over_white(palette_with_clear_colour(picture)),
    ),
    "tiff": Seed("TIFF", saved("TIFF")),
    "tiff lzw": Seed("TIFF", saved("TIFF", compression="tiff_lzw")),
    "tiff deflate": Seed("TIFF", saved("TIFF", compression="tiff_adobe_deflate")),
    "tiff jpeg": Seed("TIFF", saved("TIFF", compression="jpeg", quality=95), tolerance=12),
    "tiff cmyk": Seed("TIFF", saved("TIFF", lambda p: p.convert("CMYK")), tolerance=2),
    "tiff alpha": Seed("TIFF", saved("TIFF", half_clear), lambda p: over_white(half_clear(p))),
    "tiff black and white": Seed(
        "TIFF", saved("TIFF", lambda p: p.convert("1"), compression="group4"), lambda p: p.convert("1").convert("RGB")
    ),
    "tiff grey 16 bits": Seed("TIFF", saved("TIFF", grey_16_bits), as_grey, 1),
    "tiff grey 32 bits": Seed(
        "TIFF", saved("TIFF", lambda p: p.convert("L").convert("I").point(lambda value: value * 257)), as_grey, 1
    ),
    "tiff float": Seed(
        "TIFF", saved("TIFF", lambda p: p.convert("L").convert("F").point(lambda v: v * (1 / 255))), as_grey, 1
    ),  # fmt: skip
    "tiff turned": Seed("TIFF", saved("TIFF", tiffinfo={ORIENTATION: 6}), turned),
    "tiff pages": Seed("TIFF", animated("TIFF")),
    "bmp": Seed("BMP", saved("BMP")),
    "bmp palette": Seed("BMP", saved("BMP", in_palette), shown_palette),
    "bmp grey": Seed("BMP", saved("BMP", lambda p: p.convert("L")), as_grey),
    "bmp black and white": Seed("BMP", saved("BMP", lambda p: p.convert("1")), lambda p: p.convert("1").convert("RGB")),
}


# --- what is done to them ---------------------------------------------------------------------------------------------


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for place in rng.sample(range(8 * len(data)), min(rng.choice((1, 2, 5, 20, 200)), 8 * len(data))):
        changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def flip_header_bits(data: bytes, rng: random.Random) -> bytes:
    return flip_bits(data[:64], rng) + data[64:]


def write_extreme_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes that lengths and offsets trip over: all bits, none, the sign."""
    changed = bytearray(data)
    start = rng.randrange(len(data))
    for place in range(start, min(len(data), start + rng.choice((1, 2, 4, 8, 100)))):
        value = rng.choice((0x00, 0x7F, 0x80, 0xFF))
        changed[place] = value if value != changed[place] else value ^ 1
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def cut_out(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randint(1, 200) :]


def repeat_a_part(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randint(1, 200))
    return data[:end] + data[start:end] * rng.choice((1, 3, 50)) + data[end:]


HEADERS = {
    "JPEG": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "WEBP": b"RIFF\x40\x00\x00\x00WEBPVP8 ",
    "GIF": b"GIF89a",
    "TIFF": b"II*\x00\x08\x00\x00\x00",
    "BMP": b"BM\x36\x10\x00\x00",
    # Formats that open other programs or that hardly anybody tests.
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n",
    "PSD": b"8BPS\x00\x01",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'>",
    "PDF": b"%PDF-1.7\n",
    "ZIP": b"PK\x03\x04",
    "HTML": b"<!DOCTYPE html><html>",
}


def swap_header(data: bytes, rng: random.Random) -> bytes:
    header = rng.choice([header for header in HEADERS.values() if not data.startswith(header)])
    return header + data[len(header) :]


def splice(data: bytes, rng: random.Random) -> bytes:
    """The head of this file, the tail of another."""
    other = SEEDS[rng.choice(sorted(SEEDS))].write(draw(rng.randrange(9), rng.choice(SIZES)))
    cut = rng.randrange(len(data))
    spliced = data[:cut] + other[rng.randrange(len(other)) :]
    return spliced if spliced != data else spliced + b"\0"


def append_garbage(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((b"\0" * 1000, b"<script>", rng.randbytes(3000), HEADERS["ZIP"] + rng.randbytes(99)))


HUGE_SIDES = (65_535, 30_000, 30_000, 16_383, 11_585)


def declare_huge(kind: str, data: bytes, width: int, height: int) -> bytes | None:
    """The same file with another size in its header; None where this flavour has no such place."""
    changed = bytearray(data)
    if kind == "PNG":
        chunks = png_chunks(data)
        return png_of([(b"IHDR", struct.pack(">II", width, height) + chunks[0][1][8:]), *chunks[1:]])
    if kind == "GIF":
        changed[6:10] = struct.pack("<HH", width, height)
        frame = data.find(b"\x2c\0\0\0\0")
        if frame > 0:
            changed[frame + 5 : frame + 9] = struct.pack("<HH", width, height)
    elif kind == "BMP":
        changed[18:26] = struct.pack("<ii", width, height)
    elif kind == "JPEG":
        frame = next((place for code in (b"\xff\xc0", b"\xff\xc2") if (place := data.find(code)) > 0), -1)
        changed[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    elif kind == "TIFF":
        order = "<" if data[:2] == b"II" else ">"
        (start,) = struct.unpack(order + "I", data[4:8])
        (entries,) = struct.unpack(order + "H", data[start : start + 2])
        for place in range(start + 2, start + 2 + 12 * entries, 12):
            (tag,) = struct.unpack(order + "H", data[place : place + 2])
            if tag in (256, 257):
                size = width if tag == 256 else height
                changed[place + 2 : place + 12] = struct.pack(order + "HII", 4, 1, size)
    elif kind == "WEBP":
        width, height = min(width, 16_383), min(height, 16_383)
        code = data[12:16]
        if code == b"VP8 ":
            changed[26:30] = struct.pack("<HH", width, height)
        elif code == b"VP8L":
            (bits,) = struct.unpack("<I", data[21:25])
            bits = bits >> 28 << 28 | (height - 1) << 14 | (width - 1)
            changed[21:25] = struct.pack("<I", bits)
        else:
            changed[24:30] = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return bytes(changed)


EXIF_GARBAGE = (
    b"",
    b"Exif\0\0",
    b"Exif\0\0II*\0\xff\xff\xff\xff",
    # A directory that claims 65,535 entries, one that lists itself, one whose orientation is text at a far offset.
    b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x08\0\0\0\x08",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\xff\xff\xff\xff\xff\xff\xff\xf0\0\0\0\0",
    # An orientation of 99, one that is a list, one without its value.
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x02\0\x63\0\x63\0\0\0\0",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0",
    # A tag that turning the picture would have to write again, and can't.
    b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x0f\0\x0a\0\0\0\x01\0\0\0\0\x01\x12\0\x03\0\0\0\x01\0\x01\0\0\0\0\0\0",
    bytes(range(256)),
)


def break_exif(seed: Seed, picture: Image.Image, rng: random.Random) -> bytes | None:
    """The same picture, unturned, with an EXIF block that makes no sense."""
    if seed.kind not in ("JPEG", "PNG", "WEBP"):
        return None
    exif = rng.choice((*EXIF_GARBAGE, b"Exif\0\0MM\0*" + rng.randbytes(40), flip_bits(exif_of(1), rng)))
    whole = seed.write(picture)
    if b"Exif" in whole or b"EXIF" in whole or b"eXIf" in whole:
        return None
    if seed.kind == "PNG":
        chunks = png_chunks(whole)
        return png_of([chunks[0], (b"eXIf", exif.removeprefix(b"Exif\0\0")), *chunks[1:]])
    if seed.kind == "JPEG":
        return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[2:]
    return with_webp_chunk(whole, picture, b"EXIF", exif, flag=0x08)


def with_webp_chunk(whole: bytes, picture: Image.Image, name: bytes, body: bytes, flag: int) -> bytes | None:
    """A plain WebP in the extended layout, with one more chunk."""
    if whole[12:16] == b"VP8X":
        return None
    head = struct.pack("<4sIBxxx", b"VP8X", 10, flag)
    head += struct.pack("<I", picture.width - 1)[:3] + struct.pack("<I", picture.height - 1)[:3]
    extra = name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    inside = b"WEBP" + head + (extra + whole[12:] if name == b"ICCP" else whole[12:] + extra)
    return b"RIFF" + struct.pack("<I", len(inside)) + inside


def break_icc(seed: Seed, picture: Image.Image, rng: random.Random) -> bytes | None:
    """The same picture with a colour profile that is none."""
    profile = rng.choice((b"\0", b"acsp" * 40, rng.randbytes(300), b"\0\0\xff\xff" * 100))
    whole = seed.write(picture)
    if seed.kind == "PNG":
        chunks = png_chunks(whole)
        packed = rng.choice((zlib.compress(profile), profile))
        return png_of([chunks[0], (b"iCCP", b"profile\0\0" + packed), *chunks[1:]])
    if seed.kind == "JPEG":
        body = b"ICC_PROFILE\0" + rng.choice((b"\1\1", b"\2\1", b"\0\0", b"\xff\xff")) + profile
        return whole[:2] + b"\xff\xe2" + struct.pack(">H", len(body) + 2) + body + whole[2:]
    if seed.kind == "WEBP":
        return with_webp_chunk(whole, picture, b"ICCP", profile, flag=0x20)
    return None


# Name -> function of (file, rng); these may end in a caption of something else or in an error.
DAMAGES = {
    "bit flips": flip_bits,
    "bit flips in the header": flip_header_bits,
    "extreme bytes": write_extreme_bytes,
    "truncated": truncate,
    "a part cut out": cut_out,
    "a part repeated": repeat_a_part,
    "another format's header": swap_header,
    "another file's tail": splice,
}
# These leave the picture as it is, so that its caption may not change.
HARMLESS = ("none", "garbage at the end", "wrong extension", "broken exif", "broken icc")
MUTATIONS = (*DAMAGES, "huge declared size", *HARMLESS)


# --- a case -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One file to open.

    Args:
        seed, mutation: keys of `SEEDS` and `MUTATIONS`.
        picture: what was drawn.
        original: the whole file.
        data: the file as it is opened.
        extension: its name's end.
        declared: width and height that the header claims, with "huge declared size".
    """

    seed: str
    mutation: str
    picture: Image.Image
    original: bytes
    data: bytes
    extension: str
    declared: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        return SEEDS[self.seed].kind

    @property
    def harmless(self) -> bool:
        return self.mutation in HARMLESS

    def injected(self) -> bool:
        """Whether the mutation is really there."""
        if self.mutation == "none":
            return self.data == self.original
        if self.mutation == "wrong extension":
            return self.extension != EXTENSIONS[self.kind]
        return self.data != self.original


def make_case(seed_name: str, mutation: str, picture_seed: int, size: tuple[int, int], number: int) -> Case | None:
    """The case that these choices make; None where the flavour has no place for the mutation."""
    seed, rng = SEEDS[seed_name], random.Random(f"{seed_name}/{mutation}/{picture_seed}/{number}")
    picture = draw(picture_seed, size)
    original = seed.write(picture)
    data, extension, declared = original, EXTENSIONS[seed.kind], None
    if mutation in DAMAGES:
        data = DAMAGES[mutation](original, rng)
    elif mutation == "huge declared size":
        declared = rng.choice(HUGE_SIDES), rng.choice(HUGE_SIDES)
        data = declare_huge(seed.kind, original, *declared)
    elif mutation == "garbage at the end":
        data = append_garbage(original, rng)
    elif mutation == "wrong extension":
        extension = rng.choice([other for other in (*EXTENSIONS.values(), "eps", "txt", "") if other != extension])
    elif mutation == "broken exif":
        data = break_exif(seed, picture, rng)
    elif mutation == "broken icc":
        data = break_icc(seed, picture, rng)
    if data is None:
        return None
    return Case(seed_name, mutation, picture, original, data, extension, declared)


def cases() -> st.SearchStrategy[Case]:
    """What hypothesis draws, and shrinks towards plain small files."""
    parts = (st.sampled_from(list(SEEDS)), st.sampled_from(MUTATIONS[::-1]), st.integers(0, 8), st.sampled_from(SIZES))
    return st.builds(make_case, *parts, st.integers(0, 2**32)).filter(lambda case: case is not None)


# --- what opens it ----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of a case.

    Args:
        caption: what the pipeline said, or `None` with an `error`.
        problems: whatever a case must not do.
        seconds: processor time of the slowest single way to open it (waiting for ever is for the caller to notice).
        peak_mb: peak of resident memory while it was opened, above what was resident before; `None` if unknown.
        warned: texts of the warnings that reached the caller.
    """

    caption: str | None = None
    error: str | None = None
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_mb: float | None = None
    warned: list[str] = field(default_factory=list)

    def attempt(self, name: str, named: str, function: Callable, *args):
        """Calls a door; returns what it gives, and its error's text. What isn't a `ValueError` is a problem."""
        started = time.process_time()
        try:
            return function(*args), None
        except ValueError as error:
            if named not in str(error):
                self.problems.append(f"{name}: the error doesn't name the file: {error}")
            return None, str(error)
        except Exception as error:
            self.problems.append(f"{name}: {type(error).__name__}: {error}")
            return None, f"{type(error).__name__}: {error}"
        finally:
            self.seconds = max(self.seconds, time.process_time() - started)


def drive(batch: list[Case], captioner, folder: Path, also: tuple[Callable[[Path], str], ...] = ()) -> list[Outcome]:
    """Opens each case by the image loader, by the training data's decoder and by the pipeline, and judges what they do.

    The pipeline gets all of them as one list, as a folder full of broken downloads would come, and then, one by one,
    those that it couldn't read.

    Args:
        captioner: the project's pipeline.
        folder: where the files are written; they stay there until the next call.
        also: further doors, each from a path to a caption, a `ValueError` for a file that can't be read.

    Returns:
        An `Outcome` for each case; what no caller of these doors is told to expect is among its problems.
    """
    for old in folder.glob("case-*"):
        old.unlink()
    paths = [folder / f"case-{number}.{case.extension}" for number, case in enumerate(batch)]
    outcomes = []
    for case, path in zip(batch, paths):
        path.write_bytes(case.data)
        outcome = Outcome()
        if not case.injected():
            outcome.problems.append("nothing was injected")
        with recorded(outcome):
            drive_loaders(case, path, outcome)
            for number, door in enumerate(also):
                said, why = outcome.attempt(f"door {number}", str(path), door, path)
                if (said is None) != (outcome.error is not None):
                    outcome.problems.append(f"door {number}: {said!r} / {why} where load_image says {outcome.error}")
        outcomes.append(outcome)

    group = Outcome()
    with recorded(group):
        found, _ = group.attempt("pipeline", "", lambda: captioner(list(map(str, paths)), batch_size=len(paths)))
    if found is None or len(found) != len(batch):
        outcomes[0].problems.append(f"pipeline: expected {len(batch)} captions or errors, got {found}")
        outcomes[0].problems.extend(group.problems)
        return outcomes
    for path, outcome, entries in zip(paths, outcomes, found):
        outcome.caption = entries[0]["generated_text"]
        if (outcome.caption is None) != (outcome.error is not None):
            outcome.problems.append(f"pipeline: {entries} where load_image says {outcome.error}")
        elif outcome.caption is None:
            if str(path) not in entries[0]["error"]:
                outcome.problems.append(f"pipeline: the error doesn't name the file: {entries}")
            alone, _ = outcome.attempt("pipeline alone", str(path), captioner, str(path))
            if alone is not None:
                outcome.problems.append(f"pipeline alone: {alone} where it says {entries} among several")
        elif not isinstance(outcome.caption, str):
            outcome.problems.append(f"pipeline: neither a caption nor an error: {entries}")
    return outcomes


def drive_loaders(case: Case, path: Path, outcome: Outcome) -> None:
    """The two doors behind all others, which must agree."""
    image, outcome.error = outcome.attempt("load_image", str(path), load_image, path)
    row = {"image": {"bytes": case.data, "path": None}, "caption": "a picture", "id": str(path)}
    columns = Columns("image", "caption", "id")
    decoded, _ = outcome.attempt("decode_row", str(path), decode_row, row, 7, columns, 64)
    if decoded is not None and bool(decoded["reason"]) != (image is None):
        outcome.problems.append(f"decode_row: {decoded['reason']!r} where load_image says {outcome.error!r}")
    if decoded is not None and decoded["reason"] and str(path) not in decoded["reason"]:
        outcome.problems.append(f"decode_row: the reason doesn't name the row: {decoded['reason']}")
    if case.declared is not None and min(case.declared) >= 30_000 and case.kind != "WEBP" and image is not None:
        outcome.problems.append(f"a claim of {case.declared} was not refused but opened as {image.size}")
    if case.harmless:
        outcome.problems.extend(judge_picture(case, image, outcome.error))


@contextlib.contextmanager
def recorded(outcome: Outcome):
    """Notes the warnings and the peak of memory inside the block."""
    with peak_memory() as peak, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    outcome.warned.extend(str(warning.message) for warning in caught)
    outcome.peak_mb = peak[0] if peak else None


def judge_picture(case: Case, image: Image.Image | None, refused: str | None) -> list[str]:
    """Whether a whole picture came out as a viewer would show it."""
    if image is None:
        return [f"a whole picture was refused: {refused}"]
    seed = SEEDS[case.seed]
    # The loader keeps the middle of an extreme aspect ratio; so does this, of a picture that is right by construction.
    expected = load_image(seed.show(case.picture))
    if image.mode != "RGB" or image.size != expected.size:
        return [f"expected {expected.size} in RGB, got {image.size} in {image.mode}"]
    difference = sum(ImageStat.Stat(ImageChops.difference(image, expected)).mean) / 3
    if difference > seed.tolerance:
        return [f"the picture is another one: channels differ by {difference:.1f} of 255 on average"]
    return []


@contextlib.contextmanager
def peak_memory():
    """Yields a list that holds, at the end, the peak of resident memory inside the block, in MB above its beginning.

    Linux tells it in /proc; elsewhere the list stays empty.
    """
    found = []

    def high_water() -> float:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

    try:
        # 5 sets the high-water mark back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        start = high_water()
    except OSError:
        start = None
    yield found
    if start is not None:
        found.append(high_water() - start)
