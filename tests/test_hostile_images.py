"""Untrusted image files: a caption or a clear error that names the file."""

import base64
import io
import os
import struct
import sys
import zlib

import pytest
from fuzz.hostile_images import MUTATIONS, SEEDS, caption_by_command, cases, drive, make_case, peak_memory, png_of
from PIL import Image, ImageDraw
from tiny import draw_picture, png_bytes
from transformers import pipeline

from tinycap import processing_tinycap
from tinycap.processing_tinycap import MAX_IMAGE_PIXELS, MAX_SLOW_IMAGE_PIXELS, load_image


# Pillow's warnings about the files aren't tested.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


@pytest.fixture(scope="module")
def captioner(repository):
    return pipeline("image-to-text", model=str(repository), trust_remote_code=True, max_new_tokens=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


def test_whole_files_are_opened_as_a_viewer_shows_them(captioner, folder):
    batch = [make_case(name, "none", 3, (64, 48), 0) for name in SEEDS]
    for case, outcome in zip(batch, drive(batch, captioner, folder)):
        assert not outcome.problems and outcome.caption is not None, (case.seed, outcome)


@pytest.mark.slow
def test_250_broken_files_end_in_captions_or_errors_naming_the_file(captioner, folder):
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    seen = []

    @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(cases(), min_size=25, max_size=25))
    def one(batch):
        for case, outcome in zip(batch, drive(batch, captioner, folder)):
            assert not outcome.problems, (case.seed, case.mutation, outcome)
            seen.append(case)

    with peak_memory() as peak:
        one()
    assert len(seen) == 250
    assert {case.mutation for case in seen} == set(MUTATIONS)
    assert {case.kind for case in seen} == {seed.kind for seed in SEEDS.values()}
    # The largest image that is decoded, once, in the decoder's buffers.
    assert not peak or peak[0] < 1500


def test_a_command_line_is_driven_like_the_loaders(captioner, folder, tmp_path):
    """As in `fuzz_images.py --command`: a program that reads the files, and one that crashes."""
    program = tmp_path / "command.py"
    program.write_text(
        "import sys, PIL.Image\n"
        "try:\n    PIL.Image.open(sys.argv[1]).load()\n"
        "except OSError as error:\n    sys.exit(f'{sys.argv[1]}: {error}')\n"
        "print('a caption')\n"
    )
    batch = [make_case("png", mutation, 3, (64, 48), 1) for mutation in ("none", "truncated")]
    command = caption_by_command(f"{sys.executable} {program}")
    good, bad = drive(batch, captioner, folder, (command,))
    assert not good.problems and not bad.problems and good.caption is not None and bad.caption is None
    program.write_text("raise KeyError('no such thing')")
    assert all("KeyError" in outcome.problems[0] for outcome in drive(batch, captioner, folder, (command,)))


# --- regressions ------------------------------------------------------------------------------------------------------


def flat_png(width: int, height: int) -> bytes:
    """A complete PNG of one grey, of any size."""
    packer = zlib.compressobj(1)
    lines = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    return png_of([(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", lines), (b"IEND", b"")])


def webp_that_claims(width: int, height: int) -> bytes:
    """A small animation on a canvas of another declared size."""
    frames = [draw_picture(1), draw_picture(2)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", lossless=True, save_all=True, append_images=frames[1:])
    data = bytearray(buffer.getvalue())
    data[24:30] = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return bytes(data)


def test_a_small_animation_on_an_enormous_canvas_is_refused():
    """Decoding it would take 18 seconds and 4.7 GB."""
    data = webp_that_claims(9_000, 16_000)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.size == (9_000, 16_000), "the claim isn't there"
    with peak_memory() as peak, pytest.raises(ValueError, match=f"{MAX_SLOW_IMAGE_PIXELS['WEBP']:,} pixels"):
        load_image(data)
    assert not peak or peak[0] < 100


def test_thousands_of_scans_over_a_large_jpeg_are_refused():
    """Decoding its 422 kB would take 16 seconds of CPU time."""
    buffer = io.BytesIO()
    Image.new("L", (2_900, 2_800), 90).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    assert load_image(data).size == (2_900, 2_800)
    end = data.rindex(b"\xff\xd9")
    last_scan = data[data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda")) : end]
    assert load_image(data[:end] + last_scan * 20 + data[end:]).size == (2_900, 2_800)
    with pytest.raises(ValueError, match="scans in a JPEG"):
        load_image(data[:end] + last_scan * 300 + data[end:])


@pytest.mark.slow
def test_large_images_are_shrunk_before_their_colours_are_converted():
    """At full size, transparency over white would take four copies of all pixels: 2 GB for 3 MB of PNG."""
    picture = Image.new("LA", (4_500, 4_400), (0, 0))
    ImageDraw.Draw(picture).rectangle((0, 0, 2_250, 4_400), fill=(40, 255))
    data = png_bytes(picture)
    with peak_memory() as peak:
        shown = load_image(data)
    assert shown.size == (2_250, 2_200)
    assert shown.getpixel((100, 100)) == (40, 40, 40) and shown.getpixel((2_000, 100)) == (255, 255, 255)
    assert not peak or peak[0] < 200, "a picture of 79 MB"


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "I;16", "CMYK"])
def test_shrinking_keeps_the_colours_of_every_mode(mode, monkeypatch):
    picture = draw_picture(5, (60, 40)).resize((240, 160), Image.Resampling.NEAREST)
    if mode == "I;16":
        picture = picture.convert("L").convert("I").point(lambda value: value * 257).convert("I;16")
    else:
        picture = picture.quantize(8) if mode == "P" else picture.convert(mode)
    whole = load_image(picture)
    monkeypatch.setattr(processing_tinycap, "LARGE_SIDE", 40)
    small = load_image(picture)
    assert small.size == (60, 40) and whole.size == (240, 160)
    assert max(abs(ours - theirs) for ours, theirs in zip(small.tobytes(), whole.reduce(4).tobytes())) <= 2


@pytest.mark.slow
def test_large_photos_are_decoded_small_the_callers_own_is_untouched():
    buffer = io.BytesIO()
    draw_picture(6, (6_000, 4_100)).save(buffer, "JPEG")
    assert load_image(buffer.getvalue()).size == (3_000, 2_050)
    with Image.open(buffer) as opened:
        assert load_image(opened).size == (3_000, 2_050)
        assert opened.size == (6_000, 4_100)


def test_more_pixels_than_any_phone_takes_are_refused():
    data = flat_png(16_000, 9_000)
    assert 16_000 * 9_000 > MAX_IMAGE_PIXELS > 12_032 * 9_024
    with peak_memory() as peak, pytest.raises(ValueError, match="big.png: expected 1 to"):
        load_image(data, name="big.png")
    assert not peak or peak[0] < 50


@pytest.mark.slow
def test_a_jpeg_of_200_megapixels_is_decoded_at_a_fraction():
    """Phones take such photos; Pillow's limit is 179 million pixels."""
    flat = Image.new("L", (16_320, 12_240), 90)
    buffer = io.BytesIO()
    # Like a camera's file, with a thumbnail whose scan isn't one of the image's.
    exif = b"Exif\0\0" + b"\xff\xd8\xff\xda\xff\xd9"
    flat.save(buffer, "JPEG", exif=exif)
    flat.close()
    with peak_memory() as peak:
        assert load_image(buffer.getvalue()).size == (4_080, 3_060)
    assert not peak or peak[0] < 150


@pytest.mark.parametrize("width, height", [(16_390, 16_390), (65_000, 2_000), (65_000, 65_000)])
def test_a_jpeg_too_large_even_at_a_fraction_is_refused(width, height):
    buffer = io.BytesIO()
    Image.new("L", (16, 16)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    with peak_memory() as peak, pytest.raises(ValueError, match=f"got {width} x {height}"):
        load_image(bytes(data))
    assert not peak or peak[0] < 50


def test_large_jpegs_of_several_scans_are_refused():
    """The decoder keeps all coefficients until the last scan: 640 MB for 200 million pixels."""
    buffer = io.BytesIO()
    Image.new("L", (2_000, 1_000)).save(buffer, "JPEG", progressive=True)
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xc2") + 5
    data[at : at + 4] = struct.pack(">HH", 12_240, 16_320)
    with peak_memory() as peak, pytest.raises(ValueError, match="got 16320 x 12240"):
        load_image(bytes(data))
    assert not peak or peak[0] < 50


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "HEIF", "JPEG2000"])
def test_slow_formats_have_limits_of_their_own(kind, monkeypatch):
    """Photos of phones, which have 48 and 50 megapixels as HEIC, are within the limits."""
    limits = processing_tinycap.MAX_SLOW_IMAGE_PIXELS
    assert limits["HEIF"] == 8_192 * 6_144
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    buffer = io.BytesIO()
    draw_picture(1, (64, 48)).save(buffer, kind)
    assert load_image(buffer.getvalue()).size == (64, 48)
    monkeypatch.setitem(limits, kind, 64 * 48 - 1)
    with pytest.raises(ValueError, match=rf"of this kind \({kind}\), got 64 x 48"):
        load_image(buffer.getvalue())


@pytest.mark.parametrize("source", ["path", "bytes"])
def test_a_file_that_would_start_ghostscript_is_not_opened(tmp_path, monkeypatch, source):
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(path) as opened:
        assert opened.format == "EPS", "Pillow itself takes it for a picture"
    from PIL import EpsImagePlugin

    def never(*args, **kwargs):
        raise AssertionError("Ghostscript was asked")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", never)
    with pytest.raises(ValueError, match="not an image file"):
        load_image(path if source == "path" else path.read_bytes())


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match="photo.jpg: expected a file"):
        load_image(tmp_path / "photo.jpg")


def test_a_device_is_not_read(tmp_path):
    """`/dev/zero` never ends."""
    (tmp_path / "photo.jpg").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="photo.jpg: expected a file"):
        load_image(tmp_path / "photo.jpg")


def test_base64_shows_transparency_over_white():
    """Like files."""
    data = png_bytes(Image.new("LA", (60, 50), (0, 0)))
    assert load_image(data).getpixel((3, 3)) == (255, 255, 255)
    coded = base64.b64encode(data).decode()
    for text in (coded, f"data:image/png;base64,{coded}"):
        assert load_image(text).getpixel((3, 3)) == (255, 255, 255)


def test_pixels_that_are_no_numbers_are_an_error():
    picture = Image.new("F", (20, 10), 0.5)
    picture.putpixel((3, 3), float("nan"))
    picture.putpixel((4, 3), float("inf"))
    buffer = io.BytesIO()
    picture.save(buffer, "TIFF")
    with pytest.raises(ValueError, match="finite"):
        load_image(buffer.getvalue())


def test_no_file_stays_open(tmp_path):
    """Otherwise a folder of corrupt files runs out of file handles."""
    path = tmp_path / "cut.png"
    path.write_bytes(png_bytes(draw_picture(1, (200, 200)))[:-40])
    before = len(os.listdir("/proc/self/fd"))
    kept = []
    for _ in range(5):
        with pytest.raises(ValueError) as error:
            load_image(path)
        # The error refers to its frames, and these to the open image.
        kept.append(error)
    assert len(os.listdir("/proc/self/fd")) == before
