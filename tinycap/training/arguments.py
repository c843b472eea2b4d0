"""The flags that both training scripts share: data, optimisation, output; and the checks that go with them."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import huggingface_hub
import yaml
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from transformers import SchedulerType


FLAG = argparse.BooleanOptionalAction
# Share of a run's steps that a warm-up takes which wasn't asked for.
MAX_WARMUP_SHARE = 0.1


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says a flag's default, except `None`, whose meaning the help says in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Ends with an error of two lines, where argparse would print all flags before it."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all flags.\n")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which photos, which columns, how they are varied."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub id, folder of parquet, or imagefolder; drawn scenes if not given")
    data.add_argument("--dataset_config_name", help="configuration of the dataset, where it has several")
    data.add_argument("--train_split", default="train", help="split to train on")
    data.add_argument(
        "--validation_split",
        help="split to validate on; 'validation' if there is one, else 5 %% of the training photos are held out",
    )
    data.add_argument("--image_column", help="column of the images; found by its type if not given")
    data.add_argument("--caption_column", help="column of strings or lists of strings; found by its name if not given")
    data.add_argument("--max_train_samples", type=int, help="use only the first so many training photos")
    data.add_argument("--max_eval_samples", type=int, help="use only the first so many validation photos")
    data.add_argument("--max_caption_length", type=int, default=32, help="tokens of a caption, the end token included")
    data.add_argument("--on_bad_row", choices=("skip", "error"), default="skip", help="what to do with an unusable row")
    data.add_argument(
        "--crop_scale", type=float, default=0.5, help="smallest share of a photo that a crop keeps; 1: all"
    )
    data.add_argument("--horizontal_flip", action=FLAG, default=True, help="mirror half of the photos")
    data.add_argument("--color_jitter", type=float, default=0.2, help="largest relative change of the colours")
    data.add_argument("--dataloader_num_workers", type=int, default=1, help="processes that prepare batches")
    data.add_argument(
        "--preprocessing_num_workers", type=int, help="processes that decode the images once; one if not given"
    )


def add_optimisation_arguments(
    parser: argparse.ArgumentParser, batch_size: int, captions_per_image: int, learning_rate: float, weight_decay: float
) -> None:
    """Batches, learning rate, length of the run; the arguments are the defaults that differ between the scripts."""
    run = parser.add_argument_group("optimisation")
    run.add_argument("--per_device_train_batch_size", type=int, default=batch_size, help="photos in a device's step")
    run.add_argument("--captions_per_image", type=int, default=captions_per_image, help="captions of a photo in a step")
    run.add_argument("--per_device_eval_batch_size", type=int, default=64, help="photos in a validation batch")
    run.add_argument("--learning_rate", type=float, default=learning_rate, help="peak learning rate")
    run.add_argument(
        "--patch_learning_rate_scale",
        type=float,
        default=1.0,
        help="learning rate of the patch embedding over that of the rest; below 1 where patches are large",
    )
    run.add_argument("--weight_decay", type=float, default=weight_decay, help="decay of the weight matrices")
    run.add_argument("--num_train_epochs", type=float, default=20.0, help="passes over the photos")
    run.add_argument("--max_train_steps", type=int, help="optimizer steps; in place of --num_train_epochs")
    run.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches in an optimizer step")
    run.add_argument(
        "--lr_scheduler_type",
        default="cosine",
        choices=[kind.value for kind in SchedulerType],
        help="course of the learning rate",
    )
    run.add_argument(
        "--num_warmup_steps",
        type=int,
        default=200,
        help=f"optimizer steps of rising learning rate; if not given, at most {MAX_WARMUP_SHARE:.0%}% of all",
    )
    run.add_argument(
        "--max_grad_norm", type=float, default=1.0, help="gradients are scaled down to this norm; 0: never"
    )
    run.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="as accelerate is set up if not given")
    run.add_argument("--seed", type=int, default=42, help="fixes weights, data order, augmentation and dropout")


def add_output_arguments(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """Where the result goes, and what is written on the way."""
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default=output_dir, help="where the model and its reports go")
    output.add_argument(
        "--overwrite_output_dir", action=FLAG, default=False, help="clear what an earlier run left there"
    )
    output.add_argument("--checkpointing_steps", type=int, help="steps between checkpoints; once an epoch if not given")
    output.add_argument("--checkpoints_total_limit", type=int, default=2, help="newest checkpoints to keep")
    output.add_argument("--resume_from_checkpoint", help="a checkpoint folder, or 'latest'")
    output.add_argument("--logging_steps", type=int, default=10, help="steps between rows of metrics.jsonl")
    output.add_argument("--evaluation_steps", type=int, help="steps between validations; only at the end if not given")
    output.add_argument("--report_to", default="none", help="accelerate's trackers: none, all, tensorboard, wandb, ...")


def read_config_file(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """The flags that a YAML file stands for: `key: value` for `--key value`, `true` and `false` for switches.

    Values are read as they would be on the command line, so that `3e-4`, which YAML takes for text, is a number, and
    `no`, which it takes for false, can be a value. `null` leaves a flag at its default, as in a `train_args.json`.

    Args:
        parser: whose flags the file may set; ends the program with a message that names the file and the key where it
            has an unknown key, or a value that its flag doesn't take.
        path: of the file.
    """

    def refuse(problem: object) -> None:
        parser.error(f"--config_file {path}: {problem}")

    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        refuse(f"expected a readable YAML file: {error}")
    if not isinstance(values, dict):
        refuse(f"expected lines of 'key: value', got a {type(values).__name__}")
    known = vars(parser.parse_args([])).keys() - {"config_file"}
    words = []
    for name, value in values.items():
        if name not in known:
            refuse(f"unknown key {name!r}: expected the name of a flag without its dashes")
        if not isinstance(value, str):
            refuse(f"key {name!r}: expected one value, got a {type(value).__name__}")
        if value == "true":
            words.append(f"--{name}")
        elif value == "false":
            words.append(f"--no-{name}")
        elif value not in ("", "~", "null"):
            words.append(f"--{name}={value}")
    # Read by themselves first, for an error that tells the file's values from those of the command line.
    parser.exit_on_error = False
    try:
        _, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        refuse(error)
    finally:
        parser.exit_on_error = True
    if unknown:
        refuse(f"expected a value, got a switch: {' '.join(unknown)}")
    return words


def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None, scene_defaults: dict) -> argparse.Namespace:
    """Parses `argv` in the two stages of timm's scripts: what a `--config_file` sets, flags override.

    Without a `--dataset_name` in either, `scene_defaults` hold in place of the usual ones.

    Returns:
        The flags; in `given`, the names of those that file or command line set: a default overrules no configuration.
    """
    parser.add_argument("--config_file", help="YAML file of flags without their dashes; flags given here override it")
    parser.epilog = "Without --dataset_name, drawn scenes have these defaults instead: " + ", ".join(
        f"--{name} {value}" for name, value in scene_defaults.items()
    )
    argv = sys.argv[1:] if argv is None else argv
    # Only looks for this flag: errors are left to the real parser.
    scout = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scout.add_argument("--config_file")
    args, _ = scout.parse_known_args(argv)
    if args.config_file is not None:
        argv = [*read_config_file(parser, args.config_file), *argv]
    unset = object()
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), unset)))
    given = {name for name, value in vars(args).items() if value is not unset}
    if args.dataset_name is unset:
        parser.set_defaults(**scene_defaults)
    args = parser.parse_args(argv)
    args.given = given
    return args


def check_common_arguments(args: argparse.Namespace, refuse: Callable[[bool, str], None]) -> None:
    """Calls `refuse(condition, message)` for everything that is wrong with the flags above.

    Args:
        refuse: ends the program with the message where the condition holds.
    """
    if args.dataset_name is None:
        for name in ("dataset_config_name", "validation_split", "image_column", "caption_column"):
            refuse(bool(getattr(args, name)), f"--{name}: needs --dataset_name")
        refuse(args.train_split != "train", "--train_split: needs --dataset_name")
    refuse(
        args.overwrite_output_dir and args.resume_from_checkpoint is not None,
        "--overwrite_output_dir: contradicts --resume_from_checkpoint",
    )
    positive = (
        *("max_train_samples", "max_eval_samples", "captions_per_image", "max_train_steps", "num_train_epochs"),
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps"),
        *("learning_rate", "patch_learning_rate_scale", "checkpointing_steps", "evaluation_steps"),
        "checkpoints_total_limit",
    )
    for name in positive:
        value = getattr(args, name)
        refuse(value is not None and not value > 0, f"--{name}: expected a positive number, got {value}")
    for name in ("weight_decay", "num_warmup_steps", "max_grad_norm", "dataloader_num_workers"):
        refuse(not getattr(args, name) >= 0, f"--{name}: expected a number of at least 0, got {getattr(args, name)}")
    workers = args.preprocessing_num_workers
    refuse(workers is not None and workers < 1, f"--preprocessing_num_workers: expected at least 1, got {workers}")
    trackers = (*LoggerType.list(), "none")
    refuse(args.report_to not in trackers, f"--report_to: expected one of {', '.join(trackers)}, got {args.report_to}")
    refuse(
        args.report_to not in ("none", "all", *map(str, get_available_trackers())),
        f"--report_to {args.report_to}: expected its package, which is not installed: pip install {args.report_to}",
    )
    refuse(not 0 <= args.color_jitter < 1, f"--color_jitter: expected a number in [0, 1), got {args.color_jitter}")
    refuse(not 0 < args.crop_scale <= 1, f"--crop_scale: expected a number in (0, 1], got {args.crop_scale}")
    refuse(args.max_caption_length < 2, f"--max_caption_length: expected at least 2, got {args.max_caption_length}")


def check_sources(args: argparse.Namespace) -> None:
    """Raises `ValueError` for a folder that isn't there, where no library would look on the Hub for it either.

    What may be a name on the Hub is left to the libraries, unless the Hub is offline and has never been asked for it.
    """
    flags = ("model_name_or_path", "teacher_name_or_path", "tokenizer_name", "image_model_name_or_path")
    for flag in (*flags, "text_model_name_or_path", "dataset_name"):
        name = getattr(args, flag, None)
        if name is None or os.path.exists(name):
            continue
        try:
            validate_repo_id(name)
            is_path = name.startswith((".", "~"))
        except HFValidationError:
            is_path = True
        if is_path:
            raise ValueError(f"--{flag}: no such folder: {name}")
        if huggingface_hub.constants.HF_HUB_OFFLINE and not _is_cached(name, is_dataset=flag == "dataset_name"):
            raise ValueError(f"--{flag}: no such folder: {name}; as a name on the Hub it can't be had offline")


def _is_cached(name: str, is_dataset: bool) -> bool:
    kind = "dataset" if is_dataset else "model"
    folder = Path(huggingface_hub.constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind))
    if not is_dataset:
        return folder.exists()
    from datasets.config import HF_DATASETS_CACHE

    return folder.exists() or Path(HF_DATASETS_CACHE, name.replace("/", "___")).exists()
