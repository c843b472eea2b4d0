"""The README.md of a trained model: a Hub model card in which every number comes from the run itself."""

import datetime
import shlex
from argparse import Namespace
from pathlib import Path
from platform import python_version

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from tinycap.commands import write_text
from tinycap.configuration_tinycap import TinyCapConfig


# Jinja, filled by `write_model_card`.
TEMPLATE = Path(__file__).with_name("model_card_template.md")
# Metrics of an evaluation in the order in which they are shown, with their labels.
METRIC_NAMES = {
    "cider": "CIDEr",
    "bleu_1": "BLEU-1",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "distinct_captions": "distinct captions",
    "caption_loss": "cross-entropy of the captions, nats a token",
    "cosine_distance": "mean cosine distance to the teacher",
    "constant_cosine_distance": "the same for the best constant vector",
    "centered_cosine": "mean cosine after centring",
    "recall_at_1": "student to teacher R@1, %",
    "recall_at_5": "student to teacher R@5, %",
    "object_accuracy": "objects right",
    "color_accuracy": "colours right",
    "count_accuracy": "counts right",
    "relation_accuracy": "relations right",
}


def base_model_name(name_or_path: str) -> str:
    """A checkpoint's name on the Hub, or that of its folder."""
    return Path(name_or_path).resolve().name if Path(name_or_path).exists() else name_or_path


def metric_rows(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """The metrics that are shown, each with its label."""
    return [(label, f"{metrics[key]:.4g}") for key, label in METRIC_NAMES.items() if key in metrics]


def summarize(metrics: dict[str, float], output_dir: Path) -> str:
    """The main metrics as a table, and the command to try the model, for the end of a run."""
    rows = metric_rows(metrics)
    width = max(len(label) for label, _ in rows)
    table = "\n".join(f"  {label:{width}}  {value}" for label, value in rows)
    command = shlex.join(["tinycap", "caption", "IMAGE", "--model", str(output_dir)])
    return f"\nSaved to {output_dir}. On the held-out images:\n{table}\nCaption an image or a folder:\n  {command}"


def write_model_card(path: Path, args: Namespace, config: TinyCapConfig, metrics: dict, run_info: dict) -> None:
    """Writes the card of a finished `train_distill.py` run, whose other facts are in `run_info`; see the template."""
    folder = Path(args.output_dir).resolve()
    address, files = folder.as_posix(), folder.as_posix()
    if args.push_to_hub:
        address, files = args.hub_model_id, f"https://huggingface.co/{args.hub_model_id}/resolve/main"
    sources = (args.dataset_name, args.unlabelled_dataset_name)
    on_hub = [name for name in sources if name is not None and not Path(name).exists()]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-to-text",
        tags=["image-captioning", "tinycap", "custom_code"],
        base_model=args.model_name_or_path and base_model_name(args.model_name_or_path),
        datasets=on_hub or None,
        metrics=["cider", "bleu", "rouge"],
    )
    card = ModelCard.from_template(
        card_data,
        TEMPLATE,
        name=args.hub_model_id or folder.name,
        address=address,
        files=files,
        args=args,
        config=config,
        run=run_info,
        versions={"transformers": transformers.__version__, "torch": torch.__version__, "python": python_version()},
        date=datetime.date.today().isoformat(),
        metrics=metric_rows(metrics),
    )
    write_text(path, f"{card}\n")
