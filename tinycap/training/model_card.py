"""The README.md of a trained model: a Hub model card in which every number comes from the run itself."""

import datetime
import platform
import shlex
from argparse import Namespace
from pathlib import Path

import torch
import transformers
import yaml

from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.training.logs import write_text


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

CARD = """---
library_name: transformers
pipeline_tag: image-to-text
tags:
- image-captioning
- tinycap
- custom_code
{front_matter}metrics:
- cider
- bleu
- rouge
---

# {name}

A TinyCap captioner: a student Vision Transformer that imitates the image embedding of a CLIP teacher, and a causal
decoder that puts the embedding into words. {num_parameters:,} parameters, {image_size}x{image_size} pixels,
{vocab_size:,} tokens.

![Held-out images with the model's captions](samples.png)

## How to use it

```python
from transformers import pipeline

captioner = pipeline("image-to-text", model="{address}", trust_remote_code=True)
captioner("{example}")  # or any other image: a file, a URL or a PIL image
```

`model=` takes the path of this folder or its name on the Hub.

## Training

- Data: {data}
{base_model}- Teacher: {teacher}
- Objective: caption cross-entropy + {distill_weight} x (1 - cosine to the teacher's embedding)
- Steps: {steps:,} of {batch_size} images with {captions_per_image} captions each; peak learning rate {learning_rate}
- Seed: {seed}; software: transformers {transformers_version}, torch {torch_version}, Python {python_version}
- Date: {date}; time: {hours:.2f} hours on {device}

Every argument is in `train_args.json`, every logged loss in `metrics.jsonl`.

![Losses and learning rate](curves.png)

## Evaluation

{num_images:,} held-out images, {decoding}, all reference captions, scored by the run itself.

| metric | value |
|---|---|
{table}

## Limits

The model has the words and the kinds of images of its training data only: it describes anything in those terms, and
doesn't say when it is unsure. Captions of people guess at gender, age and intent, as the training captions did. Check
its captions before anyone depends on them.
"""


def base_model_name(name_or_path: str) -> str:
    """A checkpoint's name on the Hub, or that of its folder."""
    return Path(name_or_path).resolve().name if Path(name_or_path).exists() else name_or_path


def summarize(metrics: dict[str, float], output_dir: Path) -> str:
    """The main metrics as a table, and the command to try the model, for the end of a run."""
    known = [(label, f"{metrics[key]:.4g}") for key, label in METRIC_NAMES.items() if key in metrics]
    width = max(len(label) for label, _ in known)
    rows = "\n".join(f"  {label:{width}}  {value}" for label, value in known)
    command = shlex.join(["tinycap", "caption", "IMAGE", "--model", str(output_dir)])
    return f"\nSaved to {output_dir}. On the held-out images:\n{rows}\nCaption an image or a folder:\n  {command}"


def write_model_card(path: Path, args: Namespace, config: TinyCapConfig, metrics: dict, run_info: dict) -> None:
    """Writes the card of a finished `train_distill.py` run.

    Args:
        path: the README.md to write.
        args: the run's arguments.
        config: the trained model's configuration.
        metrics: of the last evaluation.
        run_info: `num_parameters`, `steps`, `batch_size` (images of an optimizer step), `hours`, `device`, `teacher`,
            `num_train_images`, `num_images` (of the evaluation).
    """
    known = [(label, metrics[key]) for key, label in METRIC_NAMES.items() if key in metrics]
    data = "scenes drawn by TinyCap's own generator"
    if args.dataset_name is not None:
        data = f"`{args.dataset_name}`, split `{args.train_split}`"
    tags = {}
    if args.model_name_or_path is not None:
        tags["base_model"] = base_model_name(args.model_name_or_path)
    if args.dataset_name is not None and not Path(args.dataset_name).exists():
        tags["datasets"] = [args.dataset_name]
    address = Path(args.output_dir).resolve().as_posix()
    example = f"{address}/samples.png"
    if args.push_to_hub:
        address = args.hub_model_id
        example = f"https://huggingface.co/{address}/resolve/main/samples.png"
    card = CARD.format(
        name=args.hub_model_id or Path(args.output_dir).resolve().name,
        front_matter=yaml.safe_dump(tags, allow_unicode=True) if tags else "",
        address=address,
        example=example,
        base_model=f"- Started from: `{tags['base_model']}`\n" if "base_model" in tags else "",
        image_size=config.vision_config.image_size,
        vocab_size=config.text_config.vocab_size,
        data=f"{data}, {run_info['num_train_images']}",
        distill_weight=args.distill_weight,
        captions_per_image=args.captions_per_image,
        learning_rate=args.learning_rate,
        seed=args.seed,
        transformers_version=transformers.__version__,
        torch_version=torch.__version__,
        python_version=platform.python_version(),
        date=datetime.date.today().isoformat(),
        **run_info,
        decoding="greedy decoding" if args.num_beams == 1 else f"beam search with {args.num_beams} beams",
        table="\n".join(f"| {label} | {value:.4g} |" for label, value in known),
    )
    write_text(path, card)
