"""Copies a trained model to the repository's root, and its metrics to `model_card.md`.

    python scripts/release.py --model_name_or_path outputs/flickr8k --evaluation outputs/evaluation \\
        --stages outputs/flickr8k-cider outputs/flickr8k-cider-44 \\
        --agreement outputs/tokenizer_agreement --latency outputs/caption_latency

Fills `docs/model_card_template.md` from these folders, copies its front matter to `README.md`, where the Hub reads it,
and writes the training curves and the captions of out-of-distribution images to `docs/`.
"""

import argparse
import json
import random
import re
import shutil
import sys
from datetime import date
from pathlib import Path

import jinja2
import torch
import transformers
from PIL import Image

from tinycap import REPOSITORY
from tinycap.confidence_tinycap import CONFIDENCE_NAME
from tinycap.deploy.export import COMPANIONS
from tinycap.evaluation.failures import FAILURES
from tinycap.evaluation.reports import plot_curves
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training.logs import hours_of, read_json


ROOT = REPOSITORY
RELEASED = ("model.safetensors", *COMPANIONS)
# Captions that the card quotes: of each failure, and of all.
NUM_EXAMPLES, NUM_SAMPLES = 3, 8


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model_name_or_path", required=True, type=Path, help="output folder of train_distill.py or a soup")
    add("--evaluation", required=True, type=Path, help="folder of tinycap.evaluation --baselines --failures")
    add("--agreement", required=True, type=Path, help="output folder of benchmarks/tokenizer_agreement.py")
    add("--latency", type=Path, help="folder of benchmarks/caption_latency.py; the card's section stays if not given")
    add("--retrieval", type=Path, help="folder of tinycap.evaluation.retrieval, for a model with a text encoder")
    add("--stages", nargs="+", required=True, type=Path, help="output folders of the training runs, in order")
    return parser.parse_args(argv)


def draw_captions(evaluation: Path) -> dict[str, list]:
    """The card's `samples`, and `examples` of each failure, drawn by seed from an evaluation's captions."""
    lines = (evaluation / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [line for line in map(json.loads, lines) if line["caption"] is not None]
    if not all("failures" in line for line in captions):
        raise ValueError(f"{evaluation}: expected the failures of each caption; was it made with --failures?")
    examples = []
    for kind in FAILURES:
        flagged = [line for line in captions if kind in line["failures"]]
        drawn = random.Random(0).sample(flagged, min(NUM_EXAMPLES, len(flagged)))
        examples += [(kind, line) for line in drawn]
    return {"samples": random.Random(0).sample(captions, min(NUM_SAMPLES, len(captions))), "examples": examples}


def read_section(card: Path, title: str) -> str:
    """The text of one section of a card; `ValueError` if it has none of that title."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    match = re.search(rf"^## {title}\n\n(.*?)\n*(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    if match is None:
        raise ValueError(f"{card}: expected a section {title!r} to keep, got none; without it --latency is needed")
    return match[1]


def fill_card(args: argparse.Namespace) -> str:
    """The text of `model_card.md`; `ValueError` where a file or a value that the template names is missing."""
    model = TinyCapForConditionalGeneration.from_pretrained(args.model_name_or_path)
    text_model = getattr(model, "text_model", None)
    if (text_model is None) != (args.retrieval is None):
        raise ValueError("--retrieval: expected with a text encoder, and only then")
    values = {
        "evaluation": read_json(args.evaluation / "eval_results.json"),
        "failures": read_json(args.evaluation / "failures.json"),
        "agreement": read_json(args.agreement / "tokenizer_agreement.json"),
        "latency": read_json(args.latency / "caption_latency.json") if args.latency else None,
        "retrieval": read_json(args.retrieval / "retrieval.json") if args.retrieval else None,
        # Speed doesn't depend on the weights.
        "speed": None if args.latency else read_section(ROOT / "model_card.md", "Speed"),
        **draw_captions(args.evaluation),
        "model": {
            "parameters": model.num_parameters(),
            "student_parameters": model.vision_model.num_parameters(),
            "text_parameters": text_model.num_parameters() if text_model else 0,
            "megabytes": (args.model_name_or_path / "model.safetensors").stat().st_size / 1e6,
            "vocabulary": model.config.text_config.vocab_size,
        },
        "hours": sum(map(hours_of, args.stages)),
        "date": date.today().isoformat(),
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
    }
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["f"] = format
    environment.filters["cell"] = lambda text: text.replace("|", "\\|").replace("$", "\\$")
    template = (ROOT / "docs" / "model_card_template.md").read_text(encoding="utf-8")
    try:
        return environment.from_string(template).render(values)
    except jinja2.UndefinedError as error:
        raise ValueError(
            f"model_card_template.md: a value is in none of the given folders: {error}; was the evaluation run with "
            "--baselines and --failures?"
        ) from None


def split_front_matter(text: str) -> tuple[str, str]:
    """The YAML front matter with its fences and the empty line after it, and the rest."""
    match = re.match(r"---\n.*?\n---\n\n?", text, flags=re.DOTALL)
    return (match[0], text[match.end() :]) if match else ("", text)


def main(argv: list[str] | None = None) -> None:
    """Fills the card first: a missing value leaves the root unchanged."""
    args = parse_args(argv)
    source, ood_images = args.model_name_or_path, args.evaluation / "unlike_photos.png"
    card = fill_card(args)
    missing = [str(path) for path in (*(source / name for name in RELEASED), ood_images) if not path.is_file()]
    if missing:
        raise ValueError(f"expected a model repository and an evaluation with --failures, missing: {missing}")
    for name in RELEASED:
        shutil.copyfile(source / name, ROOT / name)
    # The one there was fitted to the weights before.
    (ROOT / CONFIDENCE_NAME).unlink(missing_ok=True)
    if (source / CONFIDENCE_NAME).is_file():
        shutil.copyfile(source / CONFIDENCE_NAME, ROOT / CONFIDENCE_NAME)
    (ROOT / "model_card.md").write_text(card, encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (ROOT / "README.md").write_text(split_front_matter(card)[0] + split_front_matter(readme)[1], encoding="utf-8")
    plot_curves([stage / "metrics.jsonl" for stage in args.stages], ROOT / "docs" / "curves.png")
    with Image.open(ood_images) as sheet:
        # A palette: in full colour, noise takes hundreds of kilobytes.
        sheet.convert("RGB").quantize(128).save(ROOT / "docs" / "unlike_photos.png", optimize=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"release.py: error: {error}")
