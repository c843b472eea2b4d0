"""Averages the weights of several runs into one model: a soup (Wortsman et al., 2022, https://arxiv.org/abs/2203.05482).

    python -m tinycap.training.soup --models outputs/flickr8k-a outputs/flickr8k-b --output_dir outputs/flickr8k

Runs that started from the same checkpoint, each with another seed or other flags, err in different directions: their
mean captions better than any of them, at the cost of one. The weights of runs from different initialisations don't
correspond; their mean captions badly. The soup isn't scored here: evaluate it before you keep it.
"""

import argparse
import sys
from pathlib import Path

from torch.optim.swa_utils import AveragedModel
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training.logs import write_json
from tinycap.training.repository import CLIPImageProcessor, create_image_processor, save_repository
from tinycap.training.run_folder import check_output_dir, clear_output_dir
from tinycap.training.tokenizer import load_tokenizer


# In the soup's folder: the models that it averages.
SOUP_FILE = "soup.json"
# Config fields in which runs may differ: they affect training, not inference.
TRAINING_FIELDS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "patch_dropout"),
    *("distill_weight", "label_smoothing", "memory_noise", "initializer_range"),
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tinycap.training.soup", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", required=True, help="folders or Hub ids of two or more trained models")
    parser.add_argument("--output_dir", required=True, help="folder that becomes the model repository")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="write over an earlier one")
    args = parser.parse_args(argv)
    if len(args.models) < 2:
        parser.error(f"--models: expected two or more models, got {len(args.models)}")
    if Path(args.output_dir).resolve() in [Path(name).resolve() for name in args.models]:
        parser.error(f"--output_dir: expected a folder other than the models', got {args.output_dir}")
    return args


def architecture(config: TinyCapConfig) -> dict:
    """All fields of a config that affect inference, those of its parts by `part.field`."""
    fields = {}
    for name, value in config.to_dict().items():
        parts = {f"{name}.{key}": value[key] for key in value} if isinstance(value, dict) else {name: value}
        fields.update(parts)
    return {name: value for name, value in fields.items() if name.rpartition(".")[2] not in TRAINING_FIELDS}


def load_model(
    name_or_path: str,
) -> tuple[TinyCapForConditionalGeneration, PreTrainedTokenizerFast, CLIPImageProcessor]:
    """A trained model in float32 with its tokenizer and image processor.

    Raises:
        ValueError: one of them is missing or can't be read; names the model.
    """
    try:
        model = TinyCapForConditionalGeneration.from_pretrained(name_or_path).float()
        model.generation_config = GenerationConfig.from_pretrained(name_or_path)
        saved = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--models {name_or_path}: expected a trained TinyCap: {error}") from error
    processor = create_image_processor(model.config.vision_config.image_size, saved.image_mean, saved.image_std)
    return model, load_tokenizer(name_or_path), processor


def average(
    models: list[str],
) -> tuple[TinyCapForConditionalGeneration, PreTrainedTokenizerFast, CLIPImageProcessor]:
    """The mean of the models' weights, in float32; the rest is the first one's, its generation config included.

    Args:
        models: folders or Hub ids, two or more.

    Raises:
        ValueError: one can't be loaded, or differs from the first by more than its weights and `TRAINING_FIELDS`.
    """
    first, tokenizer, processor = load_model(models[0])
    soup = AveragedModel(first)
    soup.update_parameters(first)
    for name in models[1:]:
        model, other_tokenizer, other_processor = load_model(name)
        expected, actual = architecture(first.config), architecture(model.config)
        for field in sorted(expected.keys() | actual.keys()):
            if expected.get(field) != actual.get(field):
                raise ValueError(
                    f"--models {name}: expected the {field} of {models[0]}, {expected.get(field)!r}, "
                    f"got {actual.get(field)!r}"
                )
        if other_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"--models {name}: expected the tokenizer of {models[0]}, got another")
        if other_processor.to_dict() != processor.to_dict():
            raise ValueError(f"--models {name}: expected the image processor of {models[0]}, got another")
        soup.update_parameters(model)
    return soup.module, tokenizer, processor


def main(argv: list[str] | None = None) -> None:
    """Writes the soup's model repository, with the averaged models' names in `soup.json`.

    Raises:
        ValueError: a model can't be loaded or doesn't fit the first, or the folder isn't empty.
    """
    args = parse_args(argv)
    check_output_dir(args)
    model, tokenizer, processor = average(args.models)
    clear_output_dir(Path(args.output_dir))
    save_repository(args.output_dir, model, tokenizer, processor)
    write_json(Path(args.output_dir) / SOUP_FILE, {"models": args.models})
    print(f"{args.output_dir}: the mean of {len(args.models)} models")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"python -m tinycap.training.soup: error: {error}")
