"""Parses the flags of both training scripts by their table, from a YAML file and the command line, and checks them."""

import argparse
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml
from accelerate.tracking import get_available_trackers
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from tinycap.training.flags import GROUPS, RULES, SCENE_DEFAULTS, Flag


class ArgumentParser(argparse.ArgumentParser):
    """Ends with an error of two lines, where argparse would print all flags before it."""

    source = ""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {self.source}{message}\n{self.prog} --help lists all flags.\n")


def flags_of(script: str) -> dict[str, Flag]:
    """The flags of a script, "distill" or "teacher", by name."""
    return {flag.name: flag for flags in GROUPS.values() for flag in flags if flag.script in (None, script)}


def build_parser(script: str, description: str) -> ArgumentParser:
    """The parser of a script; it returns the flags that were given and no defaults."""
    options = {"usage": "%(prog)s [--FLAG VALUE ...]", "allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    parser = ArgumentParser(description=description, **options)
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            if flag.script in (None, script):
                default = flag.default_of(script)
                text = flag.help if default is None else f"{flag.help} (default: {default})"
                kind = {"action": argparse.BooleanOptionalAction} if flag.type is bool else {"type": flag.type}
                if flag.several:
                    kind["nargs"] = "+"
                choices = flag.allowed if isinstance(flag.allowed, tuple) else None
                group.add_argument(f"--{flag.name}", help=text, choices=choices, **kind)
    scenes = ", ".join(f"--{name} {value}" for name, value in SCENE_DEFAULTS[script].items())
    parser.epilog = f"Without --dataset_name, drawn scenes have these defaults instead: {scenes}"
    return parser


def parse_flags(
    script: str, argv: list[str] | None, description: str, other_problems: Callable[..., Iterable[str]]
) -> argparse.Namespace:
    """Parses and checks the flags of a script, "distill" or "teacher"; every contradiction is reported at once.

    Defaults < the defaults of scenes, without a `dataset_name` < `--config_file` < command line. `given` has the names
    of the flags that file or command line set: a default overrules no configuration.
    """
    parser, flags = build_parser(script, description), flags_of(script)
    given = vars(parser.parse_args(argv))
    if "config_file" in given:
        given = {**read_config_file(parser, flags, given["config_file"]), **given}
    defaults = {name: flag.default_of(script) for name, flag in flags.items()}
    if "dataset_name" not in given:
        defaults.update(SCENE_DEFAULTS[script])
    args = argparse.Namespace(**{**defaults, **given}, given=set(given))
    problems = [*range_problems(args, flags), *pair_problems(args, defaults), *other_problems(args)]
    if args.report_to not in ("none", "all", *map(str, get_available_trackers())):
        package = args.report_to
        problems.append(f"--report_to {package}: expected its package, which is not installed: pip install {package}")
    if problems:
        parser.error("; ".join(problems))
    return args


def read_config_file(parser: ArgumentParser, flags: dict[str, Flag], path: str) -> dict[str, Any]:
    """The flags in a YAML file of `key: value` for `--key value`; `null` leaves one at its default.

    Values are parsed as those of the command line: `3e-4`, a string in YAML, is a number, and `no` is no boolean.
    """
    parser.source, words = f"--config_file {path}: ", []
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"expected a readable YAML file: {error}")
    if not isinstance(content, dict):
        parser.error(f"expected lines of 'key: value', got a {type(content).__name__}")
    for name, text in content.items():
        if name not in flags or name == "config_file":
            parser.error(f"unknown key {name!r}: expected the name of a flag without its dashes")
        if flags[name].several and isinstance(text, list):
            words += [f"--{name}", *map(str, text)]
            continue
        if not isinstance(text, str):
            parser.error(f"key {name!r}: expected one value, got a {type(text).__name__}")
        if text in ("", "~", "null"):
            continue
        if flags[name].type is not bool:
            words.append(f"--{name}={text}")
        elif text in ("true", "false"):
            words.append(f"--{name}" if text == "true" else f"--no-{name}")
        else:
            parser.error(f"--{name}: expected true or false, got {text!r}")
    given = vars(parser.parse_args(words))
    parser.source = ""
    return given


def range_problems(args: argparse.Namespace, flags: dict[str, Flag]) -> Iterator[str]:
    """A message for each flag outside its interval."""
    for name, flag in flags.items():
        value, interval = getattr(args, name), flag.allowed
        if not isinstance(interval, str) or value is None:
            continue
        low, high = map(float, interval[1:-1].split(","))
        above = low <= value if interval[0] == "[" else low < value
        below = value <= high if interval[-1] == "]" else value < high
        if above and below:
            continue
        expected = f"a number in {interval}"
        if high == math.inf:
            expected = "a positive number" if interval[0] == "(" else f"at least {low:g}"
        yield f"--{name}: expected {expected}, got {value}"


def pair_problems(args: argparse.Namespace, defaults: dict[str, Any]) -> Iterator[str]:
    """A message for each of the `RULES` that the flags break."""

    def holds(condition: str) -> bool:
        name, _, value = condition.partition(" ")
        return getattr(args, name) == type(defaults[name])(value) if value else getattr(args, name) != defaults[name]

    for subject, relation, condition, why in RULES:
        names = {subject.partition(" ")[0], condition.partition(" ")[0]}
        if names <= defaults.keys() and holds(subject) and holds(condition) != (relation == "needs"):
            yield f"--{subject}: {relation} --{condition}{why and ', '}{why}"


def check_sources(args: argparse.Namespace) -> None:
    """Raises `ValueError` for a folder that isn't there, where no library would look on the Hub for it either.

    What may be a name on the Hub is left to the libraries, unless the Hub is offline and has never been asked for it.
    """
    flags = ("model_name_or_path", "teacher_name_or_path", "tokenizer_name", "text_model_name_or_path", "dataset_name")
    sources = [(flag, getattr(args, flag, None)) for flag in (*flags, "unlabelled_dataset_name")]
    sources += [("image_model_name_or_path", name) for name in getattr(args, "image_model_name_or_path", None) or ()]
    for flag, name in sources:
        if name is None or os.path.exists(name):
            continue
        try:
            validate_repo_id(name)
            is_path = name.startswith((".", "~"))
        except HFValidationError:
            is_path = True
        if is_path:
            raise ValueError(f"--{flag}: no such folder: {name}")
        cached = repo_folder_name(repo_id=name, repo_type="dataset" if "dataset" in flag else "model")
        places = (Path(constants.HF_HUB_CACHE, cached), Path(HF_DATASETS_CACHE, name.replace("/", "___")))
        if constants.HF_HUB_OFFLINE and not any(place.exists() for place in places):
            raise ValueError(f"--{flag}: no such folder: {name}; as a name on the Hub it can't be had offline")
