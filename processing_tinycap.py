"""Opens one image the way a viewer would show it: any source, any mode in, an sRGB image out.

transformers' own `CLIPImageProcessor` and tokenizer, joined in a `GitProcessor`, make the tensors. Training,
evaluation, pipeline and ONNX captioner all open their images here, so that a file has the same pixels in each of them.
"""

import base64
import io
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from PIL import Image, ImageChops, ImageCms

from .checks_tinycap import check_heif, icon_sizes


# Pillow opens more, but EPS starts Ghostscript, and rare decoders are the least tested.
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000"),
    *("MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"),
)
# Endings of the files that a folder is searched for.
IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".hif"),
    *(".avif", ".jp2", ".j2k", ".mpo", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".qoi", ".dib"),
)
# Decoded pixels at most: 470 MB and half a second for a PNG of two megabytes.
MAX_IMAGE_PIXELS = 7 * 2**24
# Pixels of a JPEG of one scan, which is decoded at a fraction of its size: phones write 200 million (0.4 s, 50 MB).
MAX_JPEG_PIXELS = 2**28
# Slower decoders that keep several copies: 12 to 17 bytes a pixel for AVIF and WebP, 7 to 9 for HEIF (phones write 50
# million pixels) and up to 20 where it is deeper. An animated PNG (APNG) is composed frame upon frame.
DEEP_HEIF = "HEIF of more than 8 bits"
MAX_SLOW_IMAGE_PIXELS = {
    **{"AVIF": 2**25, "WEBP": 2**25, "HEIF": 8192 * 6144, DEEP_HEIF: 28_000_000},
    **{"JPEG2000": 2**24, "APNG": 2**25},
}
# By decoders written in Python: RLE BMP and QOI take a microsecond a pixel, PPM one for each of its values.
MAX_PYTHON_PIXELS = 2**22
# Reads of a file while its header is read, and four times as many while it is decoded: Pillow reads some headers, and
# those formats, byte by byte, in 1 to 2.5 microseconds each.
MAX_READS = 2**20
# Strips or tiles of a TIFF, 11 microseconds each, and Exif segments of a JPEG, which Pillow joins one by one.
MAX_TILES, MAX_EXIF_SEGMENTS = 2**16, 2**8
# Bytes of a compressed TIFF's pixels with its largest strip or tile, which libtiff decodes as a whole.
MAX_TIFF_BYTES = 2**29
# Bytes of a file at most: it is read into memory, since decoding a mapped file that shrinks kills the process.
MAX_FILE_SIZE = 2**29
# A progressive JPEG is decoded once a scan; it usually has ten, but a small file may hold thousands.
MAX_SCANNED_PIXELS = 2**30
# Coefficients of 2 bytes in a JPEG of several scans, which are all kept until the last scan is read.
MAX_COEFFICIENTS = 2**28
# The middle of a longer image is kept: the image processor, which resizes the shorter side, would take gigabytes.
MAX_ASPECT_RATIO = 4
# Before its colours are converted, which takes up to 16 bytes a pixel, an image with twice this shorter side or more
# than these pixels is reduced by a whole factor.
LARGE_SIDE, LARGE_PIXELS = 2048, 2**24
# Seconds for a URL as a whole, bytes of its answer and redirects at most; transformers limits none of them.
URL_TIMEOUT, MAX_DOWNLOAD, MAX_REDIRECTS = 10.0, 2**28, 5

# Brands behind `ftyp` at the head of a HEIC or HEIF file.
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")
# In compressed data, FF is followed by 0 or a restart marker.
JPEG_MARKER = rb"\xff[^\x00\x01\xff\xd0-\xd7]"
EXIF_ORIENTATION = 0x0112
TRANSPOSITIONS = {
    **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
    **{5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE},
    8: Image.Transpose.ROTATE_90,
}
# 16 x 16 x 16 colours, to find profiles that change nothing.
COLOURS = Image.frombytes("RGB", (64, 64), bytes(v for rgb in product(range(0, 256, 17), repeat=3) for v in rgb))


def load_image(image: Any, timeout: float | None = None, name: str | None = None) -> "Image.Image":
    """Opens and decodes an image, upright and in sRGB.

    Args:
        image: a path, an `http(s)://` URL, a base64 string (with or without its `data:image/...` head), the bytes of an
            image file, a `PIL.Image.Image`, or a dict with `bytes` and/or `path` as `datasets` gives undecoded images.
        timeout: seconds for a URL as a whole, redirects and body included; `URL_TIMEOUT` when not given.
        name: of the image in errors; the path or URL when not given.

    Returns:
        An image in mode RGB, its sides at most 1:4 (the middle is kept), its shorter side below 2 x `LARGE_SIDE`.

    Raises:
        ValueError: the image can't be opened or decoded, is in none of `FORMATS`, or is too large; names it.
        TypeError: `image` is none of the kinds above.
    """
    if isinstance(image, dict):
        name = name or image.get("path")
        # Even empty bytes are the image: on this machine, the path may name another.
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    name = _describe(image) if name is None else name
    if image is None:
        raise ValueError(f"expected an image, got none: {name}")
    if not isinstance(image, (str, bytes, bytearray, memoryview, Image.Image)):
        raise TypeError(f"expected a path, URL, base64 string, bytes or PIL image, got {type(image).__name__}: {name}")
    try:
        if isinstance(image, Image.Image):
            return to_rgb(image)
        with _open(image, timeout) as opened:
            return to_rgb(opened, may_draft=True)
    except FileNotFoundError:
        raise ValueError(f"no such image file: {name}") from None
    except Exception as error:
        # Pillow's decoders raise a dozen unrelated types on broken files (struct.error, SyntaxError, EOFError, ...).
        # The message of `UnidentifiedImageError` is an address in memory.
        reason = "not an image file" if type(error).__name__ == "UnidentifiedImageError" else str(error)
        raise ValueError(f"cannot read image {name}: {reason or type(error).__name__}") from error


def to_rgb(image: "Image.Image", may_draft: bool = False) -> "Image.Image":
    """Converts as a viewer would: EXIF rotation and ICC profile applied, transparency over white, 16 bits scaled to 8.

    Args:
        image: an opened image of any mode; of an animation, the first frame is taken.
        may_draft: decode a large JPEG at a fraction of its size, which changes `image`.

    Raises:
        ValueError: the image has no pixels or too many, or they are no finite numbers.
    """
    _decode(image, may_draft)
    # Decoding a TIFF already rotates it; older releases of Pillow leave the tag.
    orientation = 1 if image.format == "TIFF" else _exif_orientation(image)
    (width, height), ratio = image.size, MAX_ASPECT_RATIO
    new_width, new_height = min(width, ratio * height), min(height, ratio * width)
    if (new_width, new_height) != image.size:
        left, top = (width - new_width) // 2, (height - new_height) // 2
        image = image.crop((left, top, left + new_width, top + new_height))
    image = _shrink(image)
    if orientation in TRANSPOSITIONS:
        image = image.transpose(TRANSPOSITIONS[orientation])
    if image.mode.startswith("I") or image.mode == "F":
        image = _scale_to_8_bits(image)
    profile, alpha = image.info.get("icc_profile"), None
    if _has_transparency(image):
        mode, image = image.mode, image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.getchannel("R") if mode in ("L", "LA", "La") else image.convert("RGB")
    image = _to_srgb(image, profile)
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    # Orientation and profile are applied: nothing must apply them again.
    image.info = {}
    return image


def preprocess_images(image_processor: Any, images: Sequence["Image.Image"]) -> Any:
    """Pixel values (len(images), 3, height, width), float, of RGB images by any of transformers' image processors."""
    images = [image if image.height > 4 else _enlarge(image, image_processor) for image in images]
    return image_processor(images, return_tensors="pt")["pixel_values"]


def _enlarge(image: "Image.Image", image_processor: Any) -> "Image.Image":
    """Bicubic, to the size that `CLIPImageProcessor` on Pillow gives an image.

    Processors guess the channel axis from the shape of an array, and take 1, 3 or 4 rows for channels; those on
    torchvision apply `input_data_format` to an array that they have already transposed.
    """
    edge, short = dict(image_processor.size).get("shortest_edge") or 224, min(image.size)
    return image.resize(tuple(int(edge * side / short) for side in image.size), Image.Resampling.BICUBIC)


# --- opening and decoding -------------------------------------------------------------------------------------------


def _open(image: Any, timeout: float | None) -> "Image.Image":
    """Opens a path, URL, base64 string or bytes, without decoding."""
    if isinstance(image, str) and image.startswith("data:image/"):
        image = base64.b64decode(image.partition(",")[2])
    if isinstance(image, str) and not os.path.exists(image):
        if image.startswith(("http://", "https://")):
            image = _download(image, URL_TIMEOUT if timeout is None else timeout)
        elif len(image) > 80 and "." not in image and not image.startswith(("/", "~")):
            # No image file is shorter than this in base64, and few paths are longer.
            image = base64.b64decode(image)
        else:
            raise FileNotFoundError(image)
    if isinstance(image, str):
        # Reading a pipe would block.
        if not os.path.isfile(image):
            raise ValueError("expected a file")
        with open(image, "rb") as file:
            image = file.read(MAX_FILE_SIZE + 1)
    data = bytes(image)
    if len(data) > MAX_FILE_SIZE:
        raise ValueError(f"expected a file of at most {MAX_FILE_SIZE:,} bytes")
    head = data[:64]
    # Registers Pillow's plugins.
    Image.init()
    is_heif = head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS and b"avif" not in head
    if is_heif and "HEIF" not in Image.OPEN:
        # transformers' check of remote code ignores imports in a `try`: this one is optional.
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise ValueError("HEIC: install pillow-heif (pip install pillow-heif)") from None
        register_heif_opener()
    if head[4:8] == b"ftyp":
        check_heif(data)
    if head[:2] in (b"P1", b"P2", b"P3"):
        # Pillow removes comments one by one, each time copying what is left.
        data = re.sub(rb"#[^\r\n]*", b"", data)
    if head.startswith(b"\xff\xd8\xff"):
        if data.count(b"Exif\0\0") > MAX_EXIF_SEGMENTS:
            raise ValueError(f"expected at most {MAX_EXIF_SEGMENTS} Exif segments in a JPEG")
        # `Image.open` would refuse 179 million pixels, although a JPEG needn't be decoded in full.
        return Image.OPEN["JPEG"][0](_BoundedFile(data))
    if head.startswith(b"\0\0\1\0"):
        for width, height in icon_sizes(data):
            _check_pixels(width * height, MAX_PYTHON_PIXELS, (width, height), "ICO")
    return Image.open(_BoundedFile(data), formats=[name for name in FORMATS if name in Image.OPEN])


class _BoundedFile(io.BytesIO):
    """An image file in memory that may be read `MAX_READS` times."""

    reads_left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ValueError("its header or pixels are in too many pieces")
        return super().read(size)


def _download(url: str, timeout: float) -> bytes:
    """The bytes behind a URL. A client's own timeout is for each read: a thread that is left behind when the time is
    over bounds name look-up, connections, redirects, headers and body together, and ends with the process."""
    content, failure = bytearray(), []
    deadline = time.monotonic() + timeout

    def work() -> None:
        try:
            for block in _blocks(url, timeout):
                content.extend(block)
                if len(content) > MAX_DOWNLOAD:
                    raise ValueError(f"expected an answer of at most {MAX_DOWNLOAD:,} bytes")
                if time.monotonic() > deadline:
                    return
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout)
    if failure:
        raise failure[0]
    if thread.is_alive() or time.monotonic() > deadline:
        raise ValueError(f"expected an answer within {timeout:g} s, got {len(content):,} bytes")
    return bytes(content)


def _blocks(url: str, timeout: float) -> Iterator[bytes]:
    """The answer's blocks, by the HTTP client that transformers uses: requests before version 5, httpx since.

    transformers' own `load_image` would also convert the image, with transparency as black. No client follows a
    redirect to a file. Answers aren't decompressed: a kilobyte may hold gigabytes.
    """
    # Imported here, because it imports PyTorch.
    from transformers import image_utils

    headers = {"Accept-Encoding": "identity"}
    if hasattr(image_utils, "httpx"):
        options = {"timeout": timeout, "headers": headers, "follow_redirects": True, "max_redirects": MAX_REDIRECTS}
        with image_utils.httpx.Client(**options) as client, client.stream("GET", url) as answer:
            answer.raise_for_status()
            yield from answer.iter_raw()
    else:
        with image_utils.requests.Session() as session:
            session.max_redirects = MAX_REDIRECTS
            with session.get(url, timeout=timeout, headers=headers, stream=True) as answer:
                answer.raise_for_status()
                # Waits for a whole block.
                yield from answer.raw.stream(2**10, decode_content=False)


def _describe(image: Any) -> str:
    if isinstance(image, str):
        return image if len(image) <= 300 else f"{image[:40]}... ({len(image):,} characters)"
    if isinstance(image, (bytes, bytearray, memoryview)):
        return f"<{len(image):,} bytes>"
    return getattr(image, "filename", "") or f"<{type(image).__name__}>"


def _decode(image: "Image.Image", may_draft: bool) -> None:
    """Loads the pixels, after a look at the header."""
    width, height = image.size
    kind = "APNG" if image.format == "PNG" and getattr(image, "is_animated", False) else image.format
    is_plain = image.info.get("bit_depth") == 8 or (image.info.get("chroma"), image.mode) == (420, "RGB")
    kind = DEEP_HEIF if kind == "HEIF" and not is_plain else kind
    limit = MAX_SLOW_IMAGE_PIXELS.get(kind, MAX_IMAGE_PIXELS)
    tiles = getattr(image, "tile", None) or []
    if tiles and tiles[0][0] in Image.DECODERS:
        limit = MAX_PYTHON_PIXELS // (3 if kind == "PPM" else 1)
    if len(tiles) > MAX_TILES:
        raise ValueError(f"expected at most {MAX_TILES:,} strips or tiles, got {len(tiles):,}")
    decoded = width * height
    if tiles and tiles[0][0] == "libtiff":
        strip = image.tag_v2.get(322, width) * min(height, image.tag_v2.get(323, image.tag_v2.get(278, height)))
        needed = decoded * (1 if image.mode in ("1", "L", "P") else 4) + strip * sum(image.tag_v2.get(258, (1,))) // 8
        if needed > MAX_TIFF_BYTES:
            expected = f"a TIFF of at most {MAX_TIFF_BYTES:,} bytes with its largest strip or tile"
            raise ValueError(f"expected {expected}, got {needed:,} ({width} x {height} pixels)")
    if kind in ("JPEG", "MPO"):
        scans, shrinking = _count_scans(image), _shrink_factor(image)
        if scans > 16 and scans * decoded > MAX_SCANNED_PIXELS:
            most = max(16, MAX_SCANNED_PIXELS // decoded)
            raise ValueError(f"expected at most {most} scans in a JPEG of {decoded:,} pixels, got {scans}")
        sampling = [across * down for _, across, down, _ in getattr(image, "layer", ())] or [1]
        if scans > 1 and decoded * sum(sampling) > MAX_COEFFICIENTS * max(sampling):
            most = MAX_COEFFICIENTS * max(sampling) // sum(sampling)
            raise ValueError(f"expected at most {most:,} pixels in a JPEG of {scans} scans, got {decoded:,}")
        if may_draft and shrinking > 1 and decoded <= MAX_JPEG_PIXELS:
            # Decodes every second, fourth or eighth pixel.
            image.draft(None, (width // shrinking, height // shrinking))
            # Several scans are kept at full size until the last is read.
            decoded = image.width * image.height if scans == 1 else decoded
    _check_pixels(decoded, limit, (width, height), kind)
    if isinstance(getattr(image, "fp", None), _BoundedFile):
        image.fp.reads_left = 4 * MAX_READS
    image.load()


def _check_pixels(decoded: int, limit: int, size: tuple[int, int], kind: str | None) -> None:
    if not 0 < decoded <= limit:
        of_kind = f" of this kind ({kind})" if kind else ""
        raise ValueError(f"expected 1 to {limit:,} pixels in an image{of_kind}, got {size[0]} x {size[1]}")


def _count_scans(image: "Image.Image") -> int:
    """Scans of a JPEG that isn't decoded yet, without those of an embedded thumbnail."""
    file = getattr(image, "fp", None)
    if file is None:
        return 0
    before = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(before)
    scans, position = 0, 2
    for marker in re.finditer(JPEG_MARKER, data):
        if marker.start() < position:
            continue
        if marker[0] == b"\xff\xd9":
            break
        scans += marker[0] == b"\xff\xda"
        # A segment's length follows its marker.
        position = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    return scans


# --- colours and sizes ----------------------------------------------------------------------------------------------


def _to_srgb(image: "Image.Image", profile: bytes | None) -> "Image.Image":
    """A new RGB image, converted by an ICC profile; one that is broken or of another colour space is ignored."""
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    if profile:
        try:
            srgb = ImageCms.createProfile("sRGB")
            transform = ImageCms.buildTransform(io.BytesIO(profile), srgb, image.mode, "RGB")
            colours = COLOURS.convert(image.mode)
            changes = ImageChops.difference(ImageCms.applyTransform(colours, transform), colours.convert("RGB"))
            # An sRGB profile itself would only add rounding errors.
            if max(high for _, high in changes.getextrema()) > 2:
                return ImageCms.applyTransform(image, transform)
        except (ImageCms.PyCMSError, ImportError, TypeError):
            # ImportError: a Pillow that was built without LittleCMS.
            pass
    return image.convert("RGB")


def _exif_orientation(image: "Image.Image") -> int:
    """1 to 8; 1 without readable EXIF, as in viewers."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:
        # Pillow raises a dozen unrelated types on malformed EXIF; the image itself may be intact.
        return 1


def _has_transparency(image: "Image.Image") -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _shrink_factor(image: "Image.Image") -> int:
    short = min(image.size)
    pixels = min(image.width * image.height, MAX_ASPECT_RATIO * short**2)
    return max(short // LARGE_SIDE, math.ceil(math.sqrt(pixels / LARGE_PIXELS)))


def _shrink(image: "Image.Image") -> "Image.Image":
    """Averages a large image by blocks; strip by strip, since conversion before it takes memory."""
    factor = _shrink_factor(image)
    if factor < 2:
        return image
    if image.mode.startswith("I"):
        mode = "I"
    elif _has_transparency(image):
        mode = "RGBA"
    else:
        mode = {"1": "L", "P": "RGB"}.get(image.mode, image.mode)
    (width, height), step = image.size, 64 * factor
    small = Image.new(mode, (math.ceil(width / factor), math.ceil(height / factor)))
    for top in range(0, height, step):
        strip = image.crop((0, top, width, min(height, top + step))).convert(mode).reduce(factor)
        small.paste(strip, (0, top // factor))
        small.info = dict(strip.info)
    return small


def _scale_to_8_bits(image: "Image.Image") -> "Image.Image":
    """Integer and float grey images to mode L; `Image.convert` would clip them at 255."""
    is_float = image.mode == "F"
    if not is_float:
        image = image.convert("I")
    low, high = image.getextrema()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"expected finite pixels, got {low} to {high}")
    limits = (1, 255, 65_535) if is_float else (255, 65_535)
    span = next((limit for limit in limits if 0 <= low and high <= limit), None)
    low, span = (0, span) if span else (low, (high - low) or 1)
    scale = 255 / span
    scaled = image.point(lambda value: value * scale - low * scale).convert("L")
    if isinstance(image.info.get("transparency"), int):
        scaled.info["transparency"] = round((image.info["transparency"] - low) * scale)
    return scaled
