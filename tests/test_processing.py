import io
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageCms, features
from tiny import draw_picture
from transformers import BatchFeature

from tinycap.deploy.image_preprocessing import ImagePreprocessor
from tinycap.evaluation.captioning import caption_dataset
from tinycap.processing_tinycap import MAX_ASPECT_RATIO, load_image, preprocess_images, to_rgb
from tinycap.training.repository import create_image_processor


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def declared_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes with any declared size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_a_plain_picture_comes_back_pixel_by_pixel():
    picture = draw_picture(1)
    assert load_image(encoded(picture)).tobytes() == picture.tobytes()
    assert load_image(picture).tobytes() == picture.tobytes()


def test_paths_bytes_and_datasets_dicts_give_the_same_picture(tmp_path):
    picture = draw_picture(2)
    path = tmp_path / "photo.png"
    picture.save(path)
    for image in (path, str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, {"path": str(path)}):
        assert load_image(image).tobytes() == picture.tobytes()


def test_exif_rotation_is_applied():
    picture = draw_picture(3, (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = load_image(encoded(picture, exif=exif))
    assert turned.size == (20, 40)
    assert turned.tobytes() == picture.transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_shown_over_white(mode):
    clear = Image.new(mode, (7, 5), (0,) * (len(mode) - 1) + (0,))
    assert load_image(encoded(clear)).getpixel((3, 3)) == (255, 255, 255)


def test_a_transparent_palette_colour_is_white_too():
    image = Image.new("P", (6, 6), 0)
    image.putpalette([10, 200, 30, 0, 0, 255])
    image.putpixel((1, 1), 1)
    shown = load_image(encoded(image, transparency=0))
    assert shown.getpixel((0, 0)) == (255, 255, 255) and shown.getpixel((1, 1)) == (0, 0, 255)


def test_cmyk_and_grey_become_rgb():
    assert load_image(encoded(Image.new("CMYK", (9, 7), (0, 255, 255, 0)), "JPEG")).getpixel((4, 3))[0] > 200
    assert load_image(encoded(Image.new("L", (9, 7), 77))).getpixel((4, 3)) == (77, 77, 77)


def test_sixteen_bits_are_scaled_and_not_clipped_to_white():
    image = Image.new("I;16", (9, 7), 32_768)
    assert 120 < load_image(encoded(image)).getpixel((4, 3))[0] < 135


# --- colour profiles ------------------------------------------------------------------------------------------------


def linear_profile(space: bytes = b"RGB ", swapped: bool = False) -> bytes:
    """A matrix (or grey) profile of linear light, with green and blue primaries swapped if requested."""
    columns = [(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7139)]
    if swapped:
        columns[1:] = columns[:0:-1]

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(value * 65_536) for value in values))

    linear = b"curv\0\0\0\0" + struct.pack(">I", 0)
    tags = {b"wtpt": xyz(0.9642, 1.0, 0.8249)}
    if space == b"GRAY":
        tags[b"kTRC"] = linear
    else:
        for name, column in zip((b"r", b"g", b"b"), columns):
            tags |= {name + b"XYZ": xyz(*column), name + b"TRC": linear}
    table, body, offset = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    header = struct.pack(
        ">I4sI4s4s4s12x4s", offset + len(body), b"\0" * 4, 0x02400000, b"mntr", space, b"XYZ ", b"acsp"
    )
    header = header.ljust(68, b"\0") + struct.pack(">iii", 63_190, 65_536, 54_061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def largest_difference(image: Image.Image, other: Image.Image) -> int:
    return max(high for _, high in ImageChops.difference(image, other).getextrema())


def by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    return ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF", "HEIF"])
def test_colours_are_those_of_the_embedded_profile(kind):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    elif kind == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    profile = linear_profile(swapped=True)
    data = encoded(draw_picture(3), kind, icc_profile=profile)
    with Image.open(io.BytesIO(data)) as opened:
        stored = opened.convert("RGB")
    shown = load_image(data)
    assert largest_difference(shown, by_profile(stored, profile)) == 0
    assert largest_difference(shown, stored) > 50
    assert largest_difference(load_image(shown), shown) == 0, "once"


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_mode_is_converted_by_a_profile_of_its_kind(mode):
    profile = linear_profile(b"GRAY" if mode in ("L", "LA", "1") else b"RGB ")
    picture = draw_picture(3)
    image = picture.quantize(8) if mode == "P" else picture.convert(mode)
    if mode.endswith("A"):
        mask = Image.new("L", picture.size, 0)
        mask.paste(255, (0, 0, 20, 29))
        image.putalpha(mask)
    plain = load_image(image)
    image.info["icc_profile"] = profile
    shown = load_image(image)
    if mode in ("CMYK", "1"):
        # Of another colour space; black and white are unchanged.
        assert largest_difference(shown, plain) == 0
    else:
        assert sum(shown.convert("L").tobytes()) > 1.1 * sum(plain.convert("L").tobytes()), "linear light is brighter"
    if mode.endswith("A"):
        assert shown.getpixel((30, 10)) == (255, 255, 255)


def test_lab_is_shown_with_its_colours():
    lab = ImageCms.profileToProfile(
        draw_picture(3), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert largest_difference(load_image(encoded(lab, "TIFF")), draw_picture(3)) < 20


def test_the_srgb_profile_changes_no_pixel():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    assert load_image(encoded(picture, icc_profile=profile)).tobytes() == picture.tobytes()


def test_a_broken_profile_is_ignored():
    whole, picture = linear_profile(), draw_picture(3)
    for broken in (b"x", b"\0" * 300, whole[:200], whole[:132] + b"\xff" * 400, linear_profile(b"GRAY"), "text"):
        picture.info["icc_profile"] = broken
        assert load_image(picture).tobytes() == draw_picture(3).tobytes()


@pytest.mark.slow
def test_a_large_image_is_shrunk_before_its_profile_is_applied():
    profile, picture = linear_profile(swapped=True), draw_picture(6).resize((4_400, 4_200))
    picture.info["icc_profile"] = profile
    shown = load_image(picture)
    assert shown.size == (2_200, 2_100)
    assert largest_difference(shown, by_profile(picture.reduce(2), profile)) == 0


# --- HEIC -------------------------------------------------------------------------------------------------------------


def test_heic_is_opened_where_pillow_heif_is_installed():
    heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    heif.from_pillow(draw_picture(3, (64, 48))).save(buffer, quality=90)
    shown = load_image(buffer.getvalue())
    assert shown.size == (64, 48) and largest_difference(shown, draw_picture(3, (64, 48))) < 120


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"hevc"])
def test_without_pillow_heif_the_error_names_it(tmp_path, monkeypatch, brand):
    Image.init()
    monkeypatch.setattr(Image, "OPEN", {name: each for name, each in Image.OPEN.items() if name != "HEIF"})
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic")
    for image in (path, path.read_bytes()):
        with pytest.raises(ValueError, match="HEIC: install pillow-heif"):
            load_image(image)


def test_one_pixel_is_a_picture():
    assert load_image(encoded(Image.new("RGB", (1, 1), "red"))).size == (1, 1)


def test_the_middle_of_an_extreme_aspect_ratio_is_kept():
    long = Image.new("RGB", (3_000, 10), "blue")
    long.paste("red", (1_490, 0, 1_510, 10))
    shown = load_image(encoded(long))
    assert shown.size == (10 * MAX_ASPECT_RATIO, 10)
    assert shown.getpixel((shown.width // 2, 5)) == (255, 0, 0)


def test_an_animation_shows_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    shown = load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert shown.getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    "content",
    [b"", b"no image at all", encoded(draw_picture(4))[:60], encoded(draw_picture(4, (200, 200)), "JPEG")[:500]],
    ids=["empty", "text", "cut header", "cut jpeg"],
)
def test_a_file_that_is_no_whole_image_is_an_error_naming_it(tmp_path, content):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_image(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("size", [(30_000, 30_000), (400_000, 1_000)])
def test_a_bomb_is_refused_by_its_header(size):
    with pytest.raises(ValueError, match="bomb.png"):
        load_image(declared_png(*size), name="bomb.png")


def test_what_is_no_image_source_is_a_type_error():
    with pytest.raises(TypeError, match="got int"):
        load_image(7)
    with pytest.raises(ValueError, match="got none"):
        load_image({"bytes": None, "path": None}, name="row 3")


def test_the_callers_picture_is_left_as_it_was():
    picture = Image.new("RGBA", (5, 5), (1, 2, 3, 4))
    to_rgb(picture)
    assert picture.mode == "RGBA" and picture.getpixel((0, 0)) == (1, 2, 3, 4)


# --- image processors -------------------------------------------------------------------------------------------------


class TransposingProcessor:
    """Like torchvision-based processors, it transposes to channels-first before `input_data_format` is used."""

    size = {"shortest_edge": 24}

    def __call__(self, images, input_data_format=None, return_tensors=None):
        pixels = torch.stack([torch.from_numpy(np.array(image.resize((24, 24)))).permute(2, 0, 1) for image in images])
        if input_data_format == "channels_last":
            pixels = pixels.permute(0, 3, 1, 2)
        return BatchFeature({"pixel_values": (pixels - 128) / 64.0})


def test_a_processor_that_transposes_images_itself_serves_every_door(repository, pictures):
    from transformers import AutoProcessor, pipeline

    captioner = pipeline("image-to-text", model=str(repository), trust_remote_code=True)
    captioner.image_processor = TransposingProcessor()
    assert captioner(pictures[0])[0]["generated_text"]
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
    processor.image_processor = TransposingProcessor()
    captions = caption_dataset(captioner.model, processor, [{"image": picture} for picture in pictures]).captions
    assert captions == [captioner(picture)[0]["generated_text"] for picture in pictures]


@pytest.mark.parametrize("size", [(1, 1), (60, 3), (3, 60), (2, 1), (4, 1), (5, 2), (12, 3), (16, 4), (20, 5)])
def test_rows_of_a_tiny_image_are_not_taken_for_channels(size):
    images = [draw_picture(3, (24, 24)).resize(size), draw_picture(4, (31, 29))]
    processor = create_image_processor(24)
    expected = torch.from_numpy(ImagePreprocessor(processor.to_dict())(images))
    # torchvision's bicubic filter differs.
    torch.testing.assert_close(preprocess_images(processor, images), expected, rtol=0, atol=0.1)
