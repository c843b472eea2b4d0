"""The output folder of a run: what may be in it before a start, what is cleared, and the arguments of a resumed run."""

import argparse
import json
import logging
import shutil
from pathlib import Path

from tinycap import REPOSITORY
from tinycap.training.best_model import BEST_FILE
from tinycap.training.checkpoints import STATE_FILE, complete_checkpoints
from tinycap.training.logs import write_json


logger = logging.getLogger(__name__)

ARGS_FILE = "train_args.json"
SKIPPED_FILE = "skipped.jsonl"
TEACHER_FOLDER = "teacher"
# A run that has left nothing else has not taken a step.
START_FILES = (ARGS_FILE, SKIPPED_FILE)
RUN_FILES = (*START_FILES, "metrics.jsonl", "eval_results.json", "curves.png", "samples.png", BEST_FILE)
CHECKPOINTS = ("checkpoint-*", ".checkpoint-*")
# What accelerate and `save_checkpoint` write into a checkpoint; transformers' Trainer writes other files too.
CHECKPOINT_FILES = (
    *(STATE_FILE, "process_state_*.json", "model*.safetensors", "optimizer*.bin", "scheduler*.bin", "sampler*.bin"),
    *("scaler.pt", "random_states_*.pkl"),
)
TEACHER_FILES = (*RUN_FILES, "*.json", "*.safetensors", *CHECKPOINTS)

# Arguments that a resumed run may change: none of them has a part in the weights.
FREE_ON_RESUME = {
    # Where the run is and how its arguments were given.
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "config_file"),
    # Checked through the `max_train_steps` that follow from it.
    "num_train_epochs",
    # What is written, shown and uploaded.
    *("report_to", "logging_steps", "evaluation_steps", "checkpointing_steps", "checkpoints_total_limit"),
    *("load_best_model_at_end", "push_to_hub", "hub_model_id"),
    # How captions are searched for, in validations and by the saved model.
    *("num_beams", "length_penalty", "per_device_eval_batch_size"),
    # How fast it goes; `on_bad_row` changes only whether it stops.
    *("dataloader_num_workers", "preprocessing_num_workers", "gradient_checkpointing", "on_bad_row"),
}
# With these a run's first steps don't depend on how many are to follow.
OPEN_ENDED_SCHEDULES = ("constant", "constant_with_warmup")


def run_args(args: argparse.Namespace) -> dict:
    """The arguments as they are recorded; `given` and `configured` are not the user's."""
    return {name: value for name, value in vars(args).items() if name not in ("given", "configured")}


def read_run_args(folder: Path) -> dict | None:
    """The arguments in a run's folder; `None` where no run has written any."""
    try:
        values = json.loads((folder / ARGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and "output_dir" in values else None


def check_output_dir(args: argparse.Namespace) -> None:
    """Refuses an output folder that the run must not write to; writes nothing itself.

    Raises:
        ValueError: `--output_dir` is a file, the folder of the code or of something that the run reads; or it isn't
            empty, and neither `--overwrite_output_dir` nor `--resume_from_checkpoint` was given; or something in it
            has the name of a run's file or folder, but no run has written it.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir: expected a folder, got the file {folder}")
    if folder.resolve() == REPOSITORY or (folder / "train_distill.py").exists():
        raise ValueError(f"--output_dir: expected a folder other than the code's own, got {folder}")
    for name in ("model_name_or_path", "teacher_name_or_path", "image_model_name_or_path", "dataset_name"):
        source = getattr(args, name, None)
        if source is not None and Path(source).is_dir() and Path(source).resolve() == folder.resolve():
            raise ValueError(f"--output_dir: expected a folder other than --{name}, got {folder} for both")
    if getattr(args, "resume_from_checkpoint", None) is not None or not folder.exists():
        return
    if args.overwrite_output_dir:
        run_leftovers(folder)
    elif any(path.name not in START_FILES for path in folder.iterdir()):
        raise ValueError(
            f"--output_dir: expected an empty folder, got {folder}, which isn't; "
            "pass --overwrite_output_dir to clear it, or --resume_from_checkpoint latest to go on"
        )


def open_output_dir(args: argparse.Namespace, clear: bool = True) -> None:
    """Makes the run's folder and records its arguments there; `check_output_dir` comes first.

    Args:
        clear: delete what an earlier run left, unless this one resumes it.
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if clear and args.resume_from_checkpoint is None:
        clear_output_dir(folder)
    write_json(folder / ARGS_FILE, run_args(args))


def clear_output_dir(folder: Path) -> None:
    """Deletes what an earlier run left; see `run_leftovers`."""
    for path in run_leftovers(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def stopped_in_teacher(args: argparse.Namespace) -> bool:
    """Whether `--resume_from_checkpoint latest` finds a run on scenes that was stopped before its first checkpoint.

    Its teacher is kept, trained or with checkpoints of its own, and the student starts.
    """
    folder = Path(args.output_dir)
    has_teacher = args.dataset_name is None and read_run_args(folder / TEACHER_FOLDER) is not None
    return args.resume_from_checkpoint == "latest" and has_teacher and not complete_checkpoints(folder)


def run_leftovers(folder: Path) -> list[Path]:
    """What an earlier run left in its folder beside the model, which is written over at the end.

    Raises:
        ValueError: something has the name of a run's file or folder, but no run has written it.
    """
    earlier = read_run_args(folder)
    found = [path for pattern in (*RUN_FILES, *CHECKPOINTS, TEACHER_FOLDER) for path in folder.glob(pattern)]
    for path in found:
        if not _is_of_run(path, earlier):
            raise ValueError(
                f"--overwrite_output_dir: expected an earlier run's files in {folder}, got {path.name}, which none "
                "has written; move it away, or choose another --output_dir"
            )
    return found


def _is_of_run(path: Path, earlier: dict | None) -> bool:
    """Whether a run whose arguments were `earlier` has written the path, by all that is in it."""
    if path.name in START_FILES:
        return path.is_file()
    if earlier is None or path.is_symlink():
        return False
    if path.name in RUN_FILES:
        return path.is_file()
    if not path.is_dir():
        return False
    if path.name != TEACHER_FOLDER:
        return all(any(entry.match(pattern) for pattern in CHECKPOINT_FILES) for entry in path.iterdir())
    # Only a run on drawn scenes trains a teacher of its own.
    is_own = earlier.get("dataset_name") is None and earlier.get("teacher_name_or_path") is None
    if not is_own or read_run_args(path) is None:
        return False
    entries_known = all(any(entry.match(pattern) for pattern in TEACHER_FILES) for entry in path.iterdir())
    return entries_known and bool(run_leftovers(path))


def read_checkpoint_args(checkpoint: Path | None, fingerprint: str | None = None) -> dict | None:
    """The arguments of the run that wrote a checkpoint; `None` for no checkpoint.

    Args:
        fingerprint: of the images to go on with, where they have one.

    Raises:
        ValueError: the checkpoint has no arguments, or was written with other images.
    """
    if checkpoint is None:
        return None
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    if "args" not in state:
        raise ValueError(f"checkpoint {checkpoint}: expected the arguments of its run in {STATE_FILE}, got none")
    if state.get("data") != fingerprint:
        raise ValueError(
            f"checkpoint {checkpoint}: expected the training images that it was written with, of fingerprint "
            f"{state.get('data')}, got {fingerprint}; other images are for --model_name_or_path to go on with"
        )
    return state["args"]


def compare_args(source: str, saved: dict, given: dict, free: tuple[str, ...] = ()) -> None:
    """Refuses to go on with arguments that change what a run computes.

    Args:
        source: what was written with `saved`, for the message.
        given: the arguments to go on with, resolved; those of `saved` that are not among them aren't compared.
        free: names that may differ, besides `FREE_ON_RESUME`.

    Raises:
        ValueError: others differ; names each, with the value expected and the one that was given.
    """
    free = FREE_ON_RESUME | set(free)
    if given.get("lr_scheduler_type") in OPEN_ENDED_SCHEDULES:
        free.add("max_train_steps")
    differing = [
        f"--{name}: expected {saved.get(name)}, got {value}"
        for name, value in given.items()
        if name not in free and saved.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{source}: expected the arguments that it was written with, got others: {'; '.join(differing)}. "
            "A run with other arguments starts from a model (--model_name_or_path), not from a checkpoint"
        )


def move_skipped_rows(skipped, folder: Path, keep: bool = False) -> None:
    """Moves the list of rows left out so far to the run's folder, where the rest of the run adds to it.

    Args:
        skipped: the `SkippedRows`, whose path is that of a temporary file.
        keep: an earlier list there is complete up to here: a stream's, whose earlier rows aren't read again.
    """
    aside, skipped.path, skipped.written = skipped.path, folder / SKIPPED_FILE, None
    if aside.exists() and not (keep and skipped.path.exists()):
        shutil.move(aside, skipped.path)
    shutil.rmtree(aside.parent, ignore_errors=True)
    if skipped.count:
        logger.warning("%d rows left out; they are listed in %s", skipped.count, skipped.path)
