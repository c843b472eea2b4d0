"""A report to open from disk: every photo with its captions, scores, token probabilities and saliency, in one file.

`report_template.html` draws it; this file makes the data that lies inside. Nothing is fetched when it is opened.
"""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps

from tinycap.evaluation.explanation import TokenProbability, mean_token_probability, saliency, token_probabilities
from tinycap.evaluation.failures import FAILURES
from tinycap.processing_tinycap import preprocess_images
from tinycap.training.logs import write_text


# Pixels of a thumbnail's side: as large as the page shows it, some 5 kB.
THUMBNAIL = 224
TEMPLATE = Path(__file__).with_name("report_template.html")


def thumbnail(image: Image.Image, side: int = THUMBNAIL) -> str:
    """The middle square that the model sees, as base64 of a WebP file."""
    buffer = io.BytesIO()
    ImageOps.fit(image.convert("RGB"), (side, side)).save(buffer, "WEBP", quality=60)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def encode_map(values: torch.Tensor) -> dict:
    """A map (rows, columns) as signed bytes in base64, scaled by its largest absolute value, which is its `peak`."""
    largest = values.abs().max().clamp(min=1e-12)
    scaled = (127 * values / largest).round().to(torch.int8)
    return {
        "rows": values.shape[0],
        "columns": values.shape[1],
        "values": base64.b64encode(scaled.cpu().numpy().tobytes()).decode("ascii"),
        "peak": values.max().item(),
    }


def token_items(tokenizer, tokens: Sequence[TokenProbability]) -> list[list]:
    """[text, probability, [[text, probability], ...]] of each token; the end token reads as such."""

    def text(token_id: int) -> str:
        if token_id == tokenizer.eos_token_id:
            return " (end)"
        return tokenizer.decode([token_id])

    return [
        [text(token.token_id), token.probability, [[text(other), share] for other, share in token.alternatives]]
        for token in tokens
    ]


def explain_pictures(model, processor, images: Sequence[Image.Image], tokens, batch_size: int = 32) -> list[dict]:
    """Image, tokens, saliency and mean token probability of N captioned pictures, as the page takes them.

    Args:
        model: a TinyCap in eval mode; processor: of the same folder.
        images: decoded pictures; tokens: of the caption of each, as `caption_dataset` gives them.
    """
    items = []
    for start in range(0, len(images), batch_size):
        some, captions = images[start : start + batch_size], tokens[start : start + batch_size]
        pixel_values = preprocess_images(processor.image_processor, some).to(model.device)
        found = token_probabilities(model, pixel_values, captions)
        for image, caption, map_ in zip(some, found, saliency(model, pixel_values, captions)):
            items.append(
                {
                    "image": thumbnail(image),
                    "tokens": token_items(processor.tokenizer, caption),
                    "map": encode_map(map_),
                    "mean_token_probability": mean_token_probability(caption),
                }
            )
    return items


def row_of(*cells: str | int | float | None, **filters: str) -> dict:
    """A row of a table: shares and scores to one decimal, counts as they are; `filters` are set by a click on it."""
    texts = ["–" if cell is None else f"{cell:.1f}" if isinstance(cell, float) else cell for cell in cells]
    return {"cells": texts, "filter": filters}


def score_table(results: dict) -> dict:
    """The model's scores beside those of the baselines."""
    scores = {"CIDEr": "cider", "BLEU-1": "bleu_1", "BLEU-4": "bleu_4", "ROUGE-L": "rouge_l"}
    columns = {**scores, "distinct captions": "distinct_captions", "words": "mean_length"}
    labels = {
        "constant": "one constant caption",
        "shuffled": "the model's captions, at other photos",
        "human": "a human, against the other humans",
        "model_leave_one_out": "the model, against all humans but one",
    }
    systems = {"the model": results}
    systems.update({labels[name]: found for name, found in results.get("baselines", {}).items()})
    rows = [row_of(label, *(found[column] for column in columns.values())) for label, found in systems.items()]
    constant = results.get("baselines", {}).get("constant")
    note = None if constant is None else f"The constant caption: “{constant['caption']}”"
    return {"title": "Scores", "columns": ["", *columns], "rows": rows, "note": note}


def failure_tables(analysis: dict) -> list[dict]:
    """The failures, categories, genders and unlike pictures of `failures.py` and `ood_images.py`."""
    whose = {"model": "the model, %", "human": "a human, %", "other_photos": "captions of other photos, %"}
    whose = {name: label for name, label in whose.items() if name in analysis["failures"]}
    failures = {
        "title": "Failures",
        "columns": ["", *whose.values()],
        "rows": [
            row_of(
                failure,
                *(analysis["failures"][name][failure] for name in whose),
                failure=failure if failure in FAILURES else "none",
            )
            for failure in (*FAILURES, "none of these")
        ],
        "note": "Found by word lists and the human captions. The human column is the rate of false alarms: a human "
        "caption against the others of its photo.",
    }
    columns = ("photos", "cider", "named", "right", *FAILURES)
    categories = {
        "title": "Categories",
        "columns": ["", "photos", "CIDEr", "named in its photos, %", "right where named, %"]
        + [f"{failure}, %" for failure in FAILURES],
        "rows": [
            row_of(row["category"], *(row[column] for column in columns), category=row["category"])
            for row in analysis["categories"]
        ],
        "note": "A photo belongs to a category that more than half of its human captions name.",
    }
    verdicts = ("confirmed", "contradicted", "open")
    genders = {
        "title": "Gender",
        "columns": ["", "captions", *(f"{verdict}, %" for verdict in verdicts)],
        "rows": [
            row_of(
                f"{'a human' if who == 'human' else 'the model'} says {gender}",
                found[f"{gender}_named"],
                *(found[f"{gender}_{verdict}"] for verdict in verdicts),
            )
            for who, found in analysis["gender"].items()
            for gender in ("male", "female")
        ],
        "note": "By the words of the human captions, which are guesses from looks, too.",
    }
    unlike = {
        "title": "Pictures that aren't photos",
        "columns": ["", "pictures", "distinct captions", "name a person or a dog, %", "mean token probability"]
        + ["commonest caption"],
        "rows": [
            row_of(
                *(row[name] for name in ("kind", "pictures", "distinct", "names_person_or_dog")),
                f"{row['token_probability']:.2f}",
                row["commonest"],
            )
            for row in analysis["unlike_photos"]
        ],
        "note": f"The mean token probability on the photos is {analysis['token_probability']:.2f}.",
    }
    return [failures, categories, genders, unlike]


def write_report(path: str | Path, data: dict) -> None:
    """Writes the page.

    Args:
        path: of the HTML file.
        data: `title`, `about`, `tables`, `photos`, `unlike_photos`, `skipped`, as `report_template.html` reads them.
    """
    # Inside a script element, "<" alone could end it.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8")
    head, tail = page.split("__DATA__")
    write_text(Path(path), head + text + tail)
