"""Writes docs/gallery.png: the images of docs/photos with the released checkpoint's captions and a person's.

python scripts/gallery.py
"""

import csv

from PIL import Image
from transformers import pipeline

from tinycap import REPOSITORY
from tinycap.evaluation.reports import contact_sheet


def main() -> None:
    folder, gallery = REPOSITORY / "docs" / "photos", REPOSITORY / "docs" / "gallery.png"
    with open(folder / "captions.csv", newline="", encoding="utf-8") as file:
        references = {str(folder / row["file_name"]): row["caption"] for row in csv.DictReader(file)}
    captioner = pipeline("image-to-text", model=str(REPOSITORY), trust_remote_code=True)
    entries = [entry[0] for entry in captioner(list(references), return_confidence=True)]
    captions = [f"{entry['generated_text']} ({entry['confidence']:.2f})" for entry in entries]
    title = "The released model's caption (its confidence), and what a person sees"
    contact_sheet([Image.open(path) for path in references], captions, gallery, list(references.values()), title=title)
    with Image.open(gallery) as sheet:
        sheet.convert("RGB").quantize(128).save(gallery, optimize=True)
    print("\n".join(captions))


if __name__ == "__main__":
    main()
