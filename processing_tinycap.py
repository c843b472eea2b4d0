"""Opens one image the way a viewer would show it: any source, any mode in, an RGB picture out.

The tensors themselves are made by transformers' own `CLIPImageProcessor` and the tokenizer, joined in a
`GitProcessor` (see `preprocessor_config.json`); this file covers what these leave to the caller. Training,
evaluation, the pipeline and the captioner without PyTorch all open their images here, so that a file looks the same to
each of them.
"""

import importlib
import io
import os
import warnings
from typing import Any


# Pillow, by its name: an import statement of a remote-code file may name no package but torch and transformers, and
# transformers would bring PyTorch to those who caption without it.
Image, ImageOps = (importlib.import_module(f"PIL.{module}") for module in ("Image", "ImageOps"))

# About 180 million pixels (540 MB as RGB), where Pillow itself begins to refuse.
MAX_IMAGE_PIXELS = 178_956_970
# The image processor resizes the shorter side and then keeps the middle square, so that what lies further out than
# this is never seen; resizing it all the same would let a 1 x 50,000 image ask for gigabytes.
MAX_ASPECT_RATIO = 4


def load_image(image: Any, timeout: float | None = None, name: str | None = None) -> "Image.Image":
    """Opens and decodes an image, upright and in RGB.

    Args:
        image: a path, an `http(s)://` URL, a base64 string (with or without its `data:image/...` head), the bytes of an
            image file, a `PIL.Image.Image`, or a dict with `bytes` and/or `path` as `datasets` gives an image that it
            has not decoded.
        timeout: seconds to wait for a URL.
        name: what to call the image in an error; the path or URL when not given.

    Returns:
        A `PIL.Image.Image` in mode RGB, its sides at most 1:4 (the middle is kept).

    Raises:
        ValueError: the image can't be opened or decoded, or claims more than `MAX_IMAGE_PIXELS`; names it.
        TypeError: `image` is none of the kinds above.
    """
    if isinstance(image, dict):
        name = name or image.get("path")
        image = image.get("bytes") or image.get("path")
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    if name is None:
        name = _describe(image)
    if image is None:
        raise ValueError(f"expected an image, got none: {name}")
    if not isinstance(image, (str, bytes, bytearray, memoryview, Image.Image)):
        raise TypeError(f"expected a path, URL, base64 string, bytes or PIL image, got {type(image).__name__}: {name}")
    try:
        with warnings.catch_warnings():
            # Pillow only warns between half its limit and the limit; below the limit the image is served.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return to_rgb(_open(image, timeout))
    except FileNotFoundError:
        raise ValueError(f"no such image file: {name}") from None
    except Exception as error:
        # Pillow's decoders raise a dozen unrelated types on broken files (struct.error, SyntaxError, EOFError, ...).
        # "cannot identify image file <BytesIO object at ...>" says nothing but an address.
        reason = "not an image file" if type(error).__name__ == "UnidentifiedImageError" else str(error)
        raise ValueError(f"cannot read image {name}: {reason or type(error).__name__}") from error


def to_rgb(image: "Image.Image") -> "Image.Image":
    """Converts as a viewer would: EXIF rotation applied, transparency over white, 16 bits scaled to 8.

    Args:
        image: an opened image of any mode; of an animation, the first frame is taken.

    Raises:
        ValueError: the image has no pixels or more than `MAX_IMAGE_PIXELS`.
    """
    width, height = image.size
    if not 0 < width * height <= MAX_IMAGE_PIXELS:
        raise ValueError(f"expected 1 to {MAX_IMAGE_PIXELS:,} pixels, got {width} x {height}")
    if image.mode != "RGB" or image.getexif():
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _scale_to_8_bits(image)
        has_transparency = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
        if has_transparency:
            image = image.convert("RGBA")
            canvas = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(canvas, image)
        image = image.convert("RGB")
    else:
        image.load()
    return _crop_to_aspect_ratio(image, MAX_ASPECT_RATIO)


def _open(image: Any, timeout: float | None) -> "Image.Image":
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (bytes, bytearray, memoryview)):
        return Image.open(io.BytesIO(image))
    if os.path.exists(image):
        return Image.open(image)
    if image.startswith(("http://", "https://", "data:image/")) or _may_be_base64(image):
        # Only here, since it imports PyTorch: a file on the disk needs neither.
        from transformers.image_utils import load_image as load_from_url

        return load_from_url(image, timeout=timeout)
    raise FileNotFoundError(image)


def _may_be_base64(text: str) -> bool:
    # No image file is shorter than this in base64, and hardly a path is longer.
    return len(text) > 80 and "." not in text and not text.startswith(("/", "~"))


def _describe(image: Any) -> str:
    if isinstance(image, str):
        return image if len(image) <= 300 else f"{image[:40]}... ({len(image):,} characters)"
    if isinstance(image, (bytes, bytearray, memoryview)):
        return f"<{len(image):,} bytes>"
    return getattr(image, "filename", "") or f"<{type(image).__name__}>"


def _scale_to_8_bits(image: "Image.Image") -> "Image.Image":
    """Integer and float grey images to mode L. `Image.convert` would clip them at 255 to a white picture."""
    is_float = image.mode == "F"
    if not is_float:
        image = image.convert("I")
    low, high = image.getextrema()
    if is_float and 0 <= low and high <= 1:
        low, span = 0, 1
    elif 0 <= low and high <= 255:
        low, span = 0, 255
    elif 0 <= low and high <= 65_535:
        low, span = 0, 65_535
    else:
        span = (high - low) or 1
    scale = 255 / span
    return image.point(lambda value: value * scale - low * scale).convert("L")


def _crop_to_aspect_ratio(image: "Image.Image", max_ratio: int) -> "Image.Image":
    width, height = image.size
    new_width, new_height = min(width, max_ratio * height), min(height, max_ratio * width)
    if (new_width, new_height) == (width, height):
        return image
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))
