"""CPU seconds and memory that `load_image` takes for the largest images that are accepted, format by format.

    python tests/fuzz/image_costs.py

Each image is drawn and decoded by a process of its own. Prints a table: docs/command_line.md.
"""

import io
import multiprocessing
import resource
import sys
import time

from PIL import Image

from tinycap.processing_tinycap import DEEP_HEIF, MAX_IMAGE_PIXELS, MAX_SLOW_IMAGE_PIXELS, load_image


LIMITS = MAX_SLOW_IMAGE_PIXELS
# Format, mode, pixels, sides' ratio, and how it is saved.
CASES = {
    "JPEG": ("JPEG", "RGB", 12_240 * 16_320, 0.75, {}),
    "PNG": ("PNG", "RGB", MAX_IMAGE_PIXELS, 0.75, {"compress_level": 1}),
    "PNG, narrow, transparent": ("PNG", "RGBA", 4 * 4095**2, 0.25, {"compress_level": 1}),
    "WebP": ("WEBP", "RGB", LIMITS["WEBP"], 0.75, {"method": 0}),
    "WebP, lossless, narrow, transparent": ("WEBP", "RGBA", LIMITS["WEBP"], 0.34, {"method": 0, "lossless": True}),
    "AVIF": ("AVIF", "RGB", LIMITS["AVIF"], 0.75, {"speed": 10}),
    "AVIF, 4:4:4, narrow, transparent": ("AVIF", "RGBA", LIMITS["AVIF"], 0.34, {"speed": 10, "subsampling": "4:4:4"}),
    "HEIC": ("HEIF", "RGB", LIMITS["HEIF"], 0.75, {}),
    "HEIC, 10 bits, 4:4:4, transparent": ("HEIF", "RGBA;16", LIMITS[DEEP_HEIF], 0.75, {"chroma": 444}),
    "JPEG 2000": ("JPEG2000", "RGB", LIMITS["JPEG2000"], 0.75, {}),
}


def draw(kind: str, mode: str, pixels: int, ratio: float, options: dict) -> bytes:
    Image.MAX_IMAGE_PIXELS = None
    height = int((pixels / ratio) ** 0.5)
    size, buffer = (int(height * ratio), height), io.BytesIO()
    if kind == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
        options = {"quality": 10, "enc_params": {"preset": "ultrafast"}, **options}
    if mode.endswith("16"):
        bands = len(mode) - 3
        pillow_heif.from_bytes(mode, size, b"\x10" * (2 * bands * size[0] * size[1])).save(buffer, **options)
    else:
        Image.new(mode, size, (9, 90, 200, 99)[: len(mode)]).save(buffer, kind, **options)
    return buffer.getvalue()


def peak() -> float:
    """Resident MB of this process at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def measure(data: bytes) -> tuple[float, float]:
    """CPU seconds and MB above the start."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    # Loads Pillow's plugins.
    load_image(buffer.getvalue())
    start, before = time.process_time(), peak()
    load_image(data)
    return time.process_time() - start, peak() - before


if __name__ == "__main__":
    print("| | megapixels | seconds | MB |\n|---|---|---|---|")
    for name, case in CASES.items():
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            data = pool.apply(draw, case)
            seconds, megabytes = pool.apply(measure, (data,))
        print(f"| {name} | {case[2] / 1e6:.0f} | {seconds:.1f} | {megabytes:,.0f} |", flush=True)
