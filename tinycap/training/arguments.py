"""Parses the flags of both training scripts by their table, from a YAML file and the command line, and checks them."""

import argparse
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import yaml
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from tinycap.training.flags import GROUPS, SCENE_DEFAULTS, Flag


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default, except `None`, whose meaning the help says in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Ends with an error of two lines, where argparse would print all flags before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all flags.\n")


def flags_of(script: str) -> list[Flag]:
    """The flags of a script, "distill" or "teacher"."""
    return [flag for flags in GROUPS.values() for flag in flags if flag.script in (None, script)]


def build_parser(script: str, description: str = "") -> ArgumentParser:
    """The parser of a script, "distill" or "teacher"; its defaults are those for one's own images."""
    parser = ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            if flag.script not in (None, script):
                continue
            default = flag.default[script] if isinstance(flag.default, dict) else flag.default
            kind = flag.type or type(default)
            options = {"type": kind, "choices": flag.choices}
            if kind is bool:
                options = {"action": argparse.BooleanOptionalAction}
            group.add_argument(f"--{flag.name}", default=default, help=flag.help, **options)
    parser.epilog = "Without --dataset_name, drawn scenes have these defaults instead: " + ", ".join(
        f"--{name} {value}" for name, value in SCENE_DEFAULTS[script].items()
    )
    return parser


def parse_flags(script: str, argv: list[str] | None, description: str) -> argparse.Namespace:
    """Parses and checks the flags of a script, "distill" or "teacher".

    Defaults < the defaults of scenes, without a `dataset_name` < `--config_file` < command line.

    Returns:
        The flags; in `given`, the names of those that file or command line set: a default overrules no configuration.
    """
    parser = build_parser(script, description)
    unset = object()
    names = vars(parser.parse_args([]))
    values = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset))))
    values = {name: value for name, value in values.items() if value is not unset}
    if "config_file" in values:
        values = {**read_config_file(parser, values["config_file"]), **values}
    if "dataset_name" not in values:
        parser.set_defaults(**SCENE_DEFAULTS[script])
    defaults = {name: parser.get_default(name) for name in names}
    parser.set_defaults(**values)
    args = parser.parse_args([])
    problems = [*range_problems(args, flags_of(script)), *pair_problems(args, flags_of(script), defaults)]
    if problems:
        parser.error("; ".join(problems))
    check_tracker(parser, args.report_to)
    args.given = set(values)
    return args


def read_config_file(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """The values in a YAML file of `key: value` for `--key value`, with `true` and `false` for switches.

    A value is parsed by its flag, so that `3e-4`, a string in YAML, is a number, and `no`, a boolean, can be a value.
    `null` leaves a flag at its default, as in a `train_args.json`. Ends the program with a message that names file and
    key where a key is unknown or its flag doesn't take the value.
    """

    def refuse(problem: object) -> NoReturn:
        parser.error(f"--config_file {path}: {problem}")

    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        refuse(f"expected a readable YAML file: {error}")
    if not isinstance(content, dict):
        refuse(f"expected lines of 'key: value', got a {type(content).__name__}")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config_file")}
    values = {}
    for name, text in content.items():
        if name not in actions:
            refuse(f"unknown key {name!r}: expected the name of a flag without its dashes")
        if not isinstance(text, str):
            refuse(f"key {name!r}: expected one value, got a {type(text).__name__}")
        if text in ("", "~", "null"):
            continue
        action = actions[name]
        is_switch = isinstance(action, argparse.BooleanOptionalAction)
        try:
            values[name] = {"true": True, "false": False}[text] if is_switch else (action.type or str)(text)
        except (KeyError, ValueError):
            refuse(f"--{name}: expected {'true or false' if is_switch else action.type.__name__}, got {text!r}")
        if action.choices and values[name] not in action.choices:
            refuse(f"--{name}: expected one of {', '.join(action.choices)}, got {text!r}")
    return values


def range_problems(args: argparse.Namespace, flags: Iterable[Flag]) -> Iterator[str]:
    """A message for each flag outside its `range`."""
    for flag in flags:
        value = getattr(args, flag.name)
        if flag.range is None or value is None:
            continue
        low, high = map(float, flag.range[1:-1].split(","))
        above = low <= value if flag.range[0] == "[" else low < value
        below = value <= high if flag.range[-1] == "]" else value < high
        if above and below:
            continue
        expected = f"a number in {flag.range}"
        if high == math.inf:
            expected = "a positive number" if flag.range[0] == "(" else f"at least {low:g}"
        yield f"--{flag.name}: expected {expected}, got {value}"


def pair_problems(args: argparse.Namespace, flags: Iterable[Flag], defaults: dict[str, Any]) -> Iterator[str]:
    """A message for each flag that differs from its default, and whose `excludes` hold or whose `needs` don't."""

    def differs(name: str) -> bool:
        return hasattr(args, name) and getattr(args, name) != defaults[name]

    def holds(condition: str) -> bool:
        name, _, value = condition.partition(" ")
        if not value:
            return differs(name)
        actual = getattr(args, name, None)
        return actual is not None and actual == type(actual)(value)

    flags = [flag for flag in flags if differs(flag.name)]
    # With its value where that is what contradicts.
    shown = {flag.name: f"--{flag.name}" + f" {getattr(args, flag.name)}" * bool(flag.choices) for flag in flags}
    for flag in flags:
        for condition, why in flag.excludes.items():
            if holds(condition):
                yield f"{shown[flag.name]}: contradicts --{condition}{why and ', '}{why}"
        for condition, why in flag.needs.items():
            name, _, value = condition.partition(" ")
            if not hasattr(args, name) or holds(condition):
                continue
            if value:
                why = f"{why and ', '}{why}"
                yield f"--{name}: expected {value} with {shown[flag.name]}{why}, got {getattr(args, name)}"
            else:
                yield f"{shown[flag.name]}: needs --{name}{why and ', '}{why}"


def check_tracker(parser: argparse.ArgumentParser, name: str) -> None:
    """Ends the program where `--report_to` isn't a tracker of accelerate's, or its package isn't installed."""
    trackers = (*LoggerType.list(), "none")
    if name not in trackers:
        parser.error(f"--report_to: expected one of {', '.join(trackers)}, got {name}")
    if name not in ("none", "all", *map(str, get_available_trackers())):
        parser.error(f"--report_to {name}: expected its package, which is not installed: pip install {name}")


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
