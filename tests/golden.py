"""Twenty reproducible images and the released checkpoint's captions of them.

Twelve are crops of the two photos in scikit-learn, eight are drawn. `python tests/golden.py` writes the captions of the
present code to `golden_captions.json`; run it only if a change of captions is intended.
"""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images


ROOT = Path(__file__).resolve().parents[1]
GOLDEN_FILE = Path(__file__).with_name("golden_captions.json")
# Arguments of `generate`, by the name in the file.
DECODING = {"greedy": {"num_beams": 1}, "3 beams": {"num_beams": 3}}


def golden_images() -> dict[str, Image.Image]:
    """Names and images, RGB, without an ICC profile."""
    images = {}
    for path, pixels in zip(load_sample_images().filenames, load_sample_images().images):
        photo, name = Image.fromarray(pixels), Path(path).stem
        width, height = photo.size
        images[name] = photo
        images[f"{name}, mirrored"] = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        images[f"{name}, left half"] = photo.crop((0, 0, width // 2, height))
        images[f"{name}, right half"] = photo.crop((width // 2, 0, width, height))
        images[f"{name}, middle"] = photo.crop((width // 3, height // 3, 2 * width // 3, 2 * height // 3))
        images[f"{name}, grey"] = photo.convert("L").convert("RGB")
    images["red"] = Image.new("RGB", (300, 200), (190, 30, 40))
    images["one pixel"] = Image.new("RGB", (1, 1), (20, 90, 200))
    images["noise"] = Image.frombytes("RGB", (224, 224), random.Random(0).randbytes(3 * 224 * 224))
    images["gradient"] = Image.linear_gradient("L").resize((260, 240)).convert("RGB")
    images["radial gradient"] = Image.radial_gradient("L").resize((500, 240)).convert("RGB")
    for name, ground, color in (("ball", "green", "white"), ("sun", "steelblue", "yellow"), ("hole", "white", "black")):
        images[name] = Image.new("RGB", (320, 240), ground)
        ImageDraw.Draw(images[name]).ellipse((90, 50, 230, 190), fill=color)
    return images


def read_golden_captions() -> dict[str, dict[str, str]]:
    """{image name: {"greedy": caption, "3 beams": caption}}."""
    return json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))


def make_captions(captioner) -> dict[str, dict[str, str]]:
    """The captions of an `image-to-text` pipeline, like `read_golden_captions`."""
    images = golden_images()
    captions = {name: {} for name in images}
    for decoding, kwargs in DECODING.items():
        for name, entries in zip(images, captioner(list(images.values()), batch_size=10, **kwargs)):
            captions[name][decoding] = entries[0]["generated_text"]
    return captions


if __name__ == "__main__":
    from transformers import pipeline

    made = make_captions(pipeline("image-to-text", model=str(ROOT), trust_remote_code=True))
    GOLDEN_FILE.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
