"""Averages the weights of several runs into one model: a soup (Wortsman et al., 2022, https://arxiv.org/abs/2203.05482).

    python -m tinycap.training.soup --models outputs/flickr8k-a outputs/flickr8k-b --output_dir outputs/flickr8k

With `--weights 2 1`, the first model counts twice. The runs must have started from the same checkpoint: weights of
different initialisations don't correspond. The soup isn't scored here: evaluate it before you keep it. It has no text
encoder: that of a model fits the model's own weights.
"""

import argparse
import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch

from tinycap.commands import run_command, writing
from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training.logs import write_json
from tinycap.training.repository import load_repository, save_repository
from tinycap.training.run_folder import check_output_dir, clear_output_dir


logger = logging.getLogger(__name__)

SOUP_FILE = "soup.json"
# Config fields in which runs may differ: they affect training, not inference.
TRAINING_FIELDS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "patch_dropout"),
    *("distill_weight", "label_smoothing", "memory_noise", "initializer_range"),
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"),
)


def load_captioner(name: str) -> tuple[TinyCapForConditionalGeneration, Any, Any]:
    """`load_repository`, without the model's text encoder."""
    model, tokenizer, image_processor = load_repository(name, "--models")
    if model.config.text_encoder_config is None:
        return model, tokenizer, image_processor
    logger.warning(
        "%s: the text encoder is left out: train one for the new weights by tinycap.training.text_encoder.", name
    )
    config = TinyCapConfig(**{**model.config.to_dict(), "text_encoder_config": None})
    captioner = TinyCapForConditionalGeneration(config)
    captioner.load_state_dict(model.state_dict(), strict=False)
    captioner.generation_config = model.generation_config
    return captioner, tokenizer, image_processor


def traits(model, tokenizer, processor) -> dict[str, Any]:
    """Everything besides the weights that affects inference, by name; a config's parts by `part.field`."""
    config = model.config.to_dict()
    for part in ("vision_config", "text_config"):
        config.update({f"{part}.{name}": value for name, value in config.pop(part).items()})
    fields = {name: value for name, value in config.items() if name.rpartition(".")[2] not in TRAINING_FIELDS}
    return {**fields, "tokenizer": tokenizer.get_vocab(), "image processor": processor.to_dict()}


def main(argv: list[str] | None = None) -> None:
    """Writes the repository of the mean model, and the models' names in `soup.json`; all besides the weights is the
    first one's. A model that can't be loaded or doesn't fit the first is a `ValueError`."""
    args = parse_args(argv)
    check_output_dir(args)
    first, *others = args.models
    model, tokenizer, processor = load_captioner(first)
    model.float()
    expected, total = traits(model, tokenizer, processor), args.weights[0]
    for name, weight in zip(others, args.weights[1:]):
        loaded = load_captioner(name)
        actual = traits(*loaded)
        for field in sorted(expected.keys() | actual.keys()):
            if expected.get(field) != actual.get(field):
                values = [f"{found.get(field)!r:.60}" for found in (expected, actual)]
                raise ValueError(f"--models {name}: expected the {field} of {first}, {values[0]}, got {values[1]}")
        total += weight
        with torch.no_grad():
            for parameter, other in zip(model.parameters(), loaded[0].parameters(), strict=True):
                parameter.lerp_(other.float(), weight / total)
    clear_output_dir(Path(args.output_dir))
    with writing(args.output_dir):
        save_repository(args.output_dir, model, tokenizer, processor)
    write_json(Path(args.output_dir) / SOUP_FILE, {"models": args.models, "weights": args.weights})
    print(f"{args.output_dir}: the mean of {len(args.models)} models")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    description = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser("python -m tinycap.training.soup", description=description, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", required=True, help="folders or Hub ids of two or more trained models")
    parser.add_argument("--weights", nargs="+", type=float, help="how much each model counts; all alike if not given")
    parser.add_argument("--output_dir", required=True, help="folder that becomes the model repository")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="write over an earlier one")
    args = parser.parse_args(argv)
    if len(args.models) < 2:
        parser.error(f"--models: expected two or more models, got {len(args.models)}")
    args.weights = args.weights or [1.0] * len(args.models)
    if len(args.weights) != len(args.models) or not all(0 < weight < math.inf for weight in args.weights):
        parser.error(f"--weights: expected a positive number for each of {len(args.models)} models, got {args.weights}")
    if Path(args.output_dir).resolve() in [Path(name).resolve() for name in args.models]:
        parser.error(f"--output_dir: expected a folder other than the models', got {args.output_dir}")
    return args


if __name__ == "__main__":
    sys.exit(run_command("python -m tinycap.training.soup", main))
