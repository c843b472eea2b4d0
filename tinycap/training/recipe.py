"""Runs the stages of a recipe, one after the other: several trainings that make one captioner.

    python -m tinycap.training.recipe configs/flickr8k.yaml dataset=flickr8k unlabelled=photos \\
        text_model=all-MiniLM-L6-v2

A recipe is a YAML file of `stages`, each with what to `run` (a training script or a module of this package) and its
flags, and of `defaults`, the flags that all stages of a script share. `from: stage` starts from another stage's model.
A finished stage is not run again, and an interrupted one resumes from its newest checkpoint.
"""

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import yaml

from tinycap import REPOSITORY
from tinycap.commands import CommandError, run_command
from tinycap.training.checkpoints import complete_checkpoints


# The file that only a finished stage has, by the script it runs.
RESULTS = {
    "train_teacher.py": "eval_results.json",
    "train_distill.py": "eval_results.json",
    "tinycap.training.efficientnet_lite": "config.json",
    "tinycap.training.soup": "soup.json",
    "tinycap.training.text_encoder": "eval_results.json",
}


def read_stages(path: Path, variables: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The flags of each stage, by its name; `run` and `from` among them, and the `variables` in place of `{name}`."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        defaults, stages = recipe.get("defaults", {}), recipe["stages"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a recipe with `stages`: {error!r}") from error

    def fill(value: Any) -> Any:
        if isinstance(value, list):
            return [fill(item) for item in value]
        return value.format(**variables) if isinstance(value, str) else value

    filled = {}
    for name, stage in stages.items():
        where, flags = f"{path}, stage {name}", {**defaults.get(stage.get("run"), {}), **stage}
        if stage.get("run") not in RESULTS:
            raise ValueError(f"{where}: run: expected one of {', '.join(RESULTS)}, got {stage.get('run')}")
        if "from" in stage and stage["from"] not in filled:
            raise ValueError(f"{where}: from: expected a stage before it, got {stage['from']}")
        try:
            filled[name] = {flag: fill(value) for flag, value in flags.items()}
        except KeyError as missing:
            raise ValueError(f"{where}: no value for {missing}; give it as {missing.args[0]}=...") from None
    return filled


def stage_command(stage: dict[str, Any], folder: Path) -> list[str]:
    """The command line of a stage that writes to `folder`."""
    flags = {flag: value for flag, value in stage.items() if flag not in ("run", "from")}
    if "from" in stage:
        flags["model_name_or_path"] = folder.parent / stage["from"]
    words = ["--output_dir", str(folder)]
    for flag, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    if not stage["run"].endswith(".py"):
        return [sys.executable, "-m", stage["run"], *words]
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    if "mixed_precision" in flags:
        launch += ["--mixed_precision", flags["mixed_precision"]]
    start = ["--resume_from_checkpoint", "latest"] if complete_checkpoints(folder) else ["--overwrite_output_dir"]
    return [*launch, str(REPOSITORY / stage["run"]), *words, *start]


def main(argv: list[str] | None = None) -> None:
    """Runs every stage that isn't finished; a recipe that can't be read is an error before anything is run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("recipe", type=Path, help="YAML file, such as configs/flickr8k.yaml")
    parser.add_argument("variables", nargs="*", metavar="NAME=VALUE", help="what {NAME} stands for in the recipe")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="folder of the stages' folders")
    args = parser.parse_intermixed_args(argv)
    variables = dict(variable.partition("=")[::2] for variable in args.variables)
    stages = read_stages(args.recipe, {"out": str(args.output_dir), **variables})
    for name, stage in stages.items():
        folder = args.output_dir / name
        if not (folder / RESULTS[stage["run"]]).is_file():
            run_stage(name, stage_command(stage, folder))


def run_stage(name: str, command: list[str]) -> None:
    """Runs a stage. If this process is interrupted or terminated, the stage is too, and is waited for: it may write a
    checkpoint."""
    process = subprocess.Popen(command)
    try:
        status = process.wait()
    except BaseException:
        stage = psutil.Process(process.pid)
        # The launcher and the training itself, but not its data loaders, which its last step needs.
        started = [*stage.children(), stage]
        for each in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.terminate()
        psutil.wait_procs(started)
        raise
    if status != 0:
        raise CommandError(f"stage {name} failed with exit status {status}; see its messages above")


if __name__ == "__main__":
    sys.exit(run_command("python -m tinycap.training.recipe", main, "the same command goes on from here"))
