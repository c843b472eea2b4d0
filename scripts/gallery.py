"""Captions the photos of docs/photos with the released checkpoint, for the gallery in README.md.

    python scripts/gallery.py

Writes docs/gallery.png: each photo with its caption, the caption's confidence, and what a person sees in it.
"""

import json

from PIL import Image
from transformers import pipeline

from tinycap import REPOSITORY
from tinycap.evaluation.reports import contact_sheet


# What a person sees, so that a reader can compare.
DESCRIPTIONS = {
    "astronaut": "A smiling astronaut in an orange suit before a flag.",
    "cat": "A tabby cat looks past the camera.",
    "coffee": "A cup of coffee with a spoon on a wooden table.",
    "officer": "A naval officer in uniform before a flag.",
    "photographer": "A man in a coat looks through a camera on a tripod.",
    "raccoon": "A raccoon sits among green leaves.",
    "rocket": "A rocket on its launch pad at dusk.",
    "temple": "A Chinese tower with tiered roofs above a lake.",
}


def main() -> None:
    folder = REPOSITORY / "docs" / "photos"
    paths = [folder / f"{name}.jpg" for name in DESCRIPTIONS]
    captioner = pipeline("image-to-text", model=str(REPOSITORY), trust_remote_code=True)
    entries = [entry[0] for entry in captioner([str(path) for path in paths], return_confidence=True)]
    captions = [f"{entry['generated_text']} ({entry['confidence']:.2f})" for entry in entries]
    gallery = REPOSITORY / "docs" / "gallery.png"
    contact_sheet(
        [Image.open(path) for path in paths],
        captions,
        gallery,
        references=list(DESCRIPTIONS.values()),
        title="The released model's caption (its confidence), and what a person sees",
    )
    with Image.open(gallery) as sheet:
        sheet.convert("RGB").quantize(128).save(gallery, optimize=True)
    print(json.dumps(dict(zip(DESCRIPTIONS, captions)), indent=2))


if __name__ == "__main__":
    main()
