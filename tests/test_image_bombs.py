"""Files of kilobytes that would take Pillow minutes or gigabytes: an error before they do."""

import io
import os
import re
import struct
import zlib

import pytest
from fuzz.hostile_images import encoded, peak_memory, png_of
from PIL import Image
from tiny import draw_picture

from tinycap import processing_tinycap
from tinycap.processing_tinycap import MAX_READS, MAX_SLOW_IMAGE_PIXELS, MAX_TILES, load_image


TOO_MANY_PIECES = "in too many pieces"
# Stands for `MAX_READS`, a second of time, in all but one of the files that reach it.
FEW_READS = 2**13


def bmp_of_runs(width: int, height: int, runs: bytes, bits: int) -> bytes:
    """Run-length encoded; Pillow fills the rest of a row pixel by pixel."""
    palette = bytes(4 << bits)
    header = struct.pack("<IHHI", 54 + len(palette) + len(runs), 0, 0, 54 + len(palette))
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, {8: 1, 4: 2}[bits], len(runs), 0, 0, 0, 0)
    return b"BM" + header + info + palette + runs


def jpeg_with(head: bytes) -> bytes:
    data = encoded(draw_picture(0), "JPEG")
    return data[:2] + head + data[2:]


def jpeg_of_scans(side: int) -> bytes:
    """A progressive header with full chroma, and two scans of nothing."""
    layers = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    header = segment(0xDB, bytes([0] + [1] * 64)) + segment(0xC2, struct.pack(">BHHB", 8, side, side, 3) + layers)
    return b"\xff\xd8" + header + segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) * 2 + b"\xff\xd9"


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def png_with(chunks: list[tuple[bytes, bytes]], side: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side + 1) * side))
    return png_of([(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")])


def png_of_chunks(number: int) -> bytes:
    """With so many empty chunks behind its header, which ends at 33."""
    one, name = png_with([]), b"teSt"
    return one[:33] + struct.pack(">I4sI", 0, name, zlib.crc32(name)) * number + one[33:]


def icon_of(png: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 32, len(png), 22) + png


def late_header(png: bytes) -> bytes:
    """With a chunk before the header."""
    chunk = b"teSta"
    return png[:8] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[8:]


def tiff_of_strips(number: int) -> bytes:
    """One pixel row a strip, all of the same eight bytes."""
    after = 8 + 2 + 9 * 12 + 4
    tags = [(256, 8), (257, number), (258, 8), (259, 1), (262, 1), (273, after), (277, 1), (278, 1), (279, 0)]
    entries = b"".join(
        struct.pack("<HHII", tag, 4, number, after + (4 * number if tag == 279 else 0))
        if tag in (273, 279)
        else struct.pack("<HHII", tag, 4, 1, value)
        for tag, value in tags
    )
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 8) * (2 * number)


def tiff_of_one_strip(side: int) -> bytes:
    """Deflated RGB of 16 bits, without its pixels."""
    after = 8 + 2 + 9 * 12 + 4
    tags = [
        (256, side),
        (257, side),
        (258, after),
        (259, 8),
        (262, 2),
        (273, after + 6),
        (277, 3),
        (278, side),
        (279, 9),
    ]
    entries = b"".join(struct.pack("<HHII", tag, *((3, 3) if tag == 258 else (4, 1)), value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<HHH", 16, 16, 16) + bytes(9)


def heif_of_shared_metadata(copies: int) -> bytes:
    """HEIC whose blocks of metadata each reach over the whole file."""
    heif = pytest.importorskip("pillow_heif").from_pillow(Image.new("RGB", (64, 64)))
    block = {"type": "mime", "metadata_type": "mime", "content_type": "a/b", "data": b"x" * 100}
    heif.info["metadata"] = [block] * copies
    buffer = io.BytesIO()
    heif.save(buffer)
    data, more = buffer.getvalue(), 4_000_000
    at = data.index(b"iloc") - 4
    locations = data[at : at + int.from_bytes(data[at : at + 4], "big")]
    longer = locations.replace(struct.pack(">I", 100), struct.pack(">I", more))
    data = data.replace(locations, longer)
    at = data.index(b"mdat") - 4
    size = int.from_bytes(data[at : at + 4], "big") + more
    return data[:at] + struct.pack(">I", size) + data[at + 4 :] + bytes(more)


def deep_heif() -> bytes:
    heif, buffer = pytest.importorskip("pillow_heif"), io.BytesIO()
    heif.from_bytes("RGB;16", (64, 48), bytes(64 * 48 * 6)).save(buffer, chroma=444)
    return buffer.getvalue()


def heif_of_a_shared_profile() -> bytes:
    """Images of a HEIF file, each with the same colour profile of megabytes: only their boxes."""
    profile = struct.pack(">I", 12 + 2**22) + b"colrprof" + bytes(2**22)
    return struct.pack(">I4s4s", 16, b"ftyp", b"heic") + bytes(4) + b"infe" * 100 + profile


BOMBS = {
    "bmp-end-of-line": (lambda: bmp_of_runs(2**27, 1, b"\x01\x05\x00\x00\x00\x01", 8), "4,194,304 pixels"),
    "bmp-4-bits": (lambda: bmp_of_runs(2**14, 2**13, b"\xff\x12\x00\x00" * 2**13, 4), "4,194,304 pixels"),
    "qoi-runs": (lambda: b"qoif" + struct.pack(">IIBB", 9999, 9999, 4, 0) + b"\xfd" * 2**20, "4,194,304 pixels"),
    "pgm-of-another-maximum": (lambda: b"P5 3200 3200 254\n" + bytes(3200**2), "1,398,101 pixels"),
    "ppm-of-digits": (lambda: b"P3 2000 800 255\n" + b"1 " * 4_800_000, "1,398,101 pixels"),
    "pgm-header-of-spaces": (lambda: b"P5" + b" " * (FEW_READS + 1) + b"1 1 255\n0", TOO_MANY_PIECES),
    "jpeg-fill-bytes": (lambda: jpeg_with(b"\xff" * (MAX_READS + 1)), TOO_MANY_PIECES),
    "jpeg-comments": (lambda: jpeg_with(segment(0xFE, b"a") * (3 * FEW_READS // 5)), TOO_MANY_PIECES),
    "jpeg-exif-segments": (lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + bytes(40)) * 257), "256 Exif segments"),
    "jpeg-coefficients": (lambda: jpeg_of_scans(11585), "89,478,485 pixels in a JPEG of 2 scans"),
    "png-chunks": (lambda: png_of_chunks(3 * FEW_READS // 5), TOO_MANY_PIECES),
    "icon-of-a-large-png": (lambda: icon_of(png_with([], side=2**13)), "4,194,304 pixels"),
    "icon-of-a-late-header": (lambda: icon_of(late_header(png_with([], side=2**13))), "4,194,304 pixels"),
    "icon-of-a-bmp": (lambda: icon_of(bmp_of_runs(2**13, 2**13, b"\1\5" + bytes(2**21), 8)[14:]), "4,194,304 pixels"),
    "tiff-strips": (lambda: tiff_of_strips(MAX_TILES + 1), "65,536 strips or tiles"),
    "tiff-of-one-strip": (lambda: tiff_of_one_strip(11585), "a TIFF of at most 536,870,912 bytes"),
    "heif-metadata": (lambda: heif_of_shared_metadata(100), "268,435,456 bytes of metadata"),
    "heif-profile": (heif_of_a_shared_profile, "268,435,456 bytes of metadata"),
    "deep-heif": (lambda: deep_heif(), "768 pixels in an image of this kind (HEIF of more than 8 bits)"),
    "jpeg-2000": (lambda: encoded(Image.new("L", (4097, 4097)), "JPEG2000"), "16,777,216 pixels"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "jpeg-fill-bytes" else name for name in BOMBS]
)
def test_files_that_take_many_seconds_or_gigabytes_are_refused(name, monkeypatch):
    make, reason = BOMBS[name]
    if name in ("png-chunks", "jpeg-comments", "pgm-header-of-spaces"):
        monkeypatch.setattr(processing_tinycap._BoundedFile, "reads_left", FEW_READS)
    # An HEVC encoder takes a minute for 30 million pixels.
    monkeypatch.setitem(processing_tinycap.MAX_SLOW_IMAGE_PIXELS, "HEIF of more than 8 bits", 768)
    with pytest.raises(ValueError, match=f"cannot read image {name}: .*{re.escape(reason)}"):
        load_image(make(), name=name)


@pytest.mark.parametrize(
    "data",
    [
        bmp_of_runs(64, 2, b"\x40\x05\x00\x00\x40\x05\x00\x01", 8),
        b"P3 # a comment\n2 1 # another\n255\n1 2 3 # and one\n4 5 6\n",
        b"P5 2 1 254\n\x01\x02",
        encoded(draw_picture(0), "ICO"),
        jpeg_with(segment(0xFE, b"a comment") * 100 + b"\xff" * 100),
        tiff_of_strips(8),
        None,
    ],
    ids=["bmp", "ppm-with-comments", "pgm-of-another-maximum", "icon", "jpeg", "tiff", "heif-metadata"],
)
def test_small_files_of_the_same_kinds_are_read(data):
    assert load_image(heif_of_shared_metadata(9) if data is None else data).mode == "RGB"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "I;16", "1"])
def test_narrow_images_are_shrunk_before_their_colours_are_converted(mode):
    """At full size, conversion took 580 to 1,090 MB for 67 million pixels in files of under a megabyte."""
    image, buffer = Image.new(mode, (3000, 12000)), io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, **({"transparency": 0} if mode == "P" else {}))
    with peak_memory() as peak:
        assert load_image(buffer.getvalue()).size == (1500, 6000)
    assert not peak or peak[0] < 320, "36 million pixels: half a gigabyte at the largest size"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["WEBP", "AVIF"])
def test_the_largest_images_of_slow_formats_take_under_600_mb(kind):
    buffer = io.BytesIO()
    options = {"WEBP": {"lossless": True, "method": 0}, "AVIF": {"speed": 10, "subsampling": "4:4:4"}}[kind]
    Image.new("RGBA", (4095, MAX_SLOW_IMAGE_PIXELS[kind] // 4095), (9, 90, 200, 99)).save(buffer, kind, **options)
    with peak_memory() as peak:
        load_image(buffer.getvalue())
    assert not peak or peak[0] < 600


def test_comments_of_a_plain_ppm_are_skipped_in_one_pass():
    """A million of them: Pillow would copy what is left a million times."""
    assert load_image(b"P1 2 2\n" + b"#\n" * 2**20 + b"1 0 0 1\n").getpixel((1, 0)) == (255, 255, 255)


def test_a_full_hd_image_of_a_slow_format_is_read(monkeypatch):
    """QOI with two reads a pixel, each pixel unlike the one before: a hundredth of them in a hundredth of the reads."""
    monkeypatch.setattr(processing_tinycap, "MAX_READS", MAX_READS // 100)
    pixels = b"".join(b"\xfe" + bytes(rgb) for rgb in ((0, 0, 0), (255, 9, 99)))
    data = b"qoif" + struct.pack(">IIBB", 192, 108, 3, 0) + pixels * (192 * 108 // 2) + b"\0" * 7 + b"\1"
    assert load_image(data).getpixel((1, 0)) == (255, 9, 99)
    monkeypatch.setattr(processing_tinycap, "MAX_READS", MAX_READS // 110)
    with pytest.raises(ValueError, match=TOO_MANY_PIECES):
        load_image(data)


def test_a_file_that_shrinks_while_it_is_decoded_is_no_crash(tmp_path):
    """Pillow maps raw files into memory, which ends the process by SIGBUS when they shrink."""
    path = tmp_path / "raw.tif"
    Image.new("RGB", (500, 400), "red").save(path)
    with processing_tinycap._open(str(path), None) as image:
        os.truncate(path, 0)
        assert processing_tinycap.to_rgb(image).getpixel((9, 9)) == (255, 0, 0)


def test_a_file_beyond_the_memory_for_it_is_refused(monkeypatch):
    monkeypatch.setattr(processing_tinycap, "MAX_FILE_SIZE", 1000)
    buffer = io.BytesIO()
    Image.effect_noise((50, 50), 90).save(buffer, "PNG")
    with pytest.raises(ValueError, match="a file of at most 1,000 bytes"):
        load_image(buffer.getvalue())
