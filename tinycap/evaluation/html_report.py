"""A report to open from disk: images with their captions, scores, token probabilities and saliency, in one file.

`report_template.html` draws it from the data that this file puts into it. Nothing is fetched when it is opened.
"""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps

from tinycap.commands import write_text
from tinycap.evaluation.explanation import saliency, token_probabilities
from tinycap.evaluation.failures import FAILURES
from tinycap.processing_tinycap import preprocess_images


# As large as the page shows it, some 5 kB.
THUMBNAIL = (224, 224)
TEMPLATE = Path(__file__).with_name("report_template.html")


def thumbnail(image: Image.Image) -> str:
    """The middle square that the model sees, as base64 of a WebP file."""
    buffer = io.BytesIO()
    ImageOps.fit(image.convert("RGB"), THUMBNAIL).save(buffer, "WEBP", quality=60)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def encode_map(values: torch.Tensor) -> dict:
    """A map (rows, columns) as signed bytes in base64, scaled by its largest absolute value; `peak`: its maximum."""
    scaled = (127 * values / values.abs().max().clamp(min=1e-12)).round().to(torch.int8)
    content = base64.b64encode(scaled.cpu().numpy().tobytes()).decode("ascii")
    return {"rows": values.shape[0], "columns": values.shape[1], "values": content, "peak": values.max().item()}


def explain_images(model, processor, images: Sequence[Image.Image], tokens: Sequence[Sequence[int]]) -> list[dict]:
    """Thumbnail, token probabilities and saliency of images with their captions' tokens, as the page takes them."""
    tokenizer = processor.tokenizer

    def text(token_id: int) -> str:
        return " (end)" if token_id == tokenizer.eos_token_id else tokenizer.decode([token_id])

    pixel_values = preprocess_images(processor.image_processor, images).to(model.device)
    probabilities, maps = token_probabilities(model, pixel_values, tokens), saliency(model, pixel_values, tokens)
    items = []
    for image, caption, map_ in zip(images, probabilities, maps):
        item = {"image": thumbnail(image), "map": encode_map(map_)}
        item["tokens"] = [
            [text(token_id), probability, [[text(other), share] for other, share in alternatives]]
            for token_id, probability, alternatives in caption
        ]
        items.append(item)
    return items


def _table(title: str, columns: Iterable[str], rows: Iterable[dict], note: str | None) -> dict:
    return {"title": title, "columns": ["", *columns], "rows": list(rows), "note": note}


def _row(*cells: str | int | float | None, **filters: str) -> dict:
    """Shares and scores to one decimal, counts as they are; a click on the row sets its `filters`."""
    texts = ["–" if cell is None else f"{cell:.1f}" if isinstance(cell, float) else cell for cell in cells]
    return {"cells": texts, "filter": filters}


def score_table(results: dict) -> dict:
    """The model's scores beside those of the baselines."""
    columns = {"CIDEr": "cider", "BLEU-1": "bleu_1", "BLEU-4": "bleu_4", "ROUGE-L": "rouge_l"}
    columns |= {"distinct captions": "distinct_captions", "words": "mean_length"}
    labels = {
        "constant": "one constant caption",
        "shuffled": "the model's captions, at other images",
        "human": "a human, against the other humans",
        "model_leave_one_out": "the model, against all humans but one",
    }
    baselines = results.get("baselines", {})
    systems = {"the model": results} | {labels[name]: scores for name, scores in baselines.items()}
    rows = [_row(label, *(scores[column] for column in columns.values())) for label, scores in systems.items()]
    note = f"The constant caption: “{baselines['constant']['caption']}”" if baselines else None
    return _table("Scores", columns, rows, note)


def failure_tables(analysis: dict) -> list[dict]:
    """The failures, categories and genders of `failures.analyse` and the rows of `ood_images.caption_ood_images`."""
    whose = {"model": "the model, %", "human": "a human, %", "other_photos": "captions of other images, %"}
    whose = {name: label for name, label in whose.items() if name in analysis["failures"]}
    rates = {name: [analysis["failures"][who][name] for who in whose] for name in (*FAILURES, "none of these")}
    failures = [_row(name, *cells, failure=name if name in FAILURES else "none") for name, cells in rates.items()]
    note = (
        "Found by word lists and the human captions. The human column is the rate of false alarms: a human caption "
        "against the others of its image."
    )
    columns = {"images": "photos", "CIDEr": "cider", "named in its images, %": "named", "right where named, %": "right"}
    columns |= {f"{failure}, %": failure for failure in FAILURES}
    categories = [
        _row(row["category"], *(row[name] for name in columns.values()), category=row["category"])
        for row in analysis["categories"]
    ]
    who_says, verdicts = {"model": "the model", "human": "a human"}, ("confirmed", "contradicted", "open")
    genders = [
        _row(f"{who_says[who]} says {gender}", *(metrics[f"{gender}_{name}"] for name in ("named", *verdicts)))
        for who, metrics in analysis["gender"].items()
        for gender in ("male", "female")
    ]
    ood_columns = ["images", "distinct captions", "name a person or a dog, %", "mean token probability"]
    ood_names = ("kind", "pictures", "distinct", "names_person_or_dog")
    ood_images = [
        _row(*(row[name] for name in ood_names), f"{row['token_probability']:.2f}", row["commonest"])
        for row in analysis["unlike_photos"]
    ]
    mean = f"The mean token probability on the photos is {analysis['token_probability']:.2f}."
    return [
        _table("Failures", whose.values(), failures, note),
        _table("Categories", columns, categories, "What more than half of an image's human captions name."),
        _table(
            "Gender",
            ["captions", *(f"{verdict}, %" for verdict in verdicts)],
            genders,
            "By the words of the human captions, which are guesses from looks, too.",
        ),
        _table("Images that aren't photos", [*ood_columns, "commonest caption"], ood_images, mean),
    ]


def write_report(path: str | Path, data: dict) -> None:
    """Writes the page; `data`: as `report_template.html` reads it."""
    # Inside a script element, "<" alone could end it.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("__DATA__")
    write_text(Path(path), head + text + tail)
