"""The output folder of a run: checks before a start, clearing, resuming, checkpoints and log."""

import argparse
import json
import math
import re
import shutil
import tempfile
from pathlib import Path

import huggingface_hub
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_model

from tinycap import REPOSITORY
from tinycap.commands import replacing, writing
from tinycap.training import checkpoints
from tinycap.training.logs import RunLog, write_json
from tinycap.training.optimization import plan_steps
from tinycap.training.skipped_rows import SkippedRows


logger = get_logger(__name__)

ARGS_FILE, SKIPPED_FILE, BEST_FILE = "train_args.json", "skipped.jsonl", "best_model.safetensors"
TEACHER_FOLDER = "teacher"
# A run that left nothing else has not taken a step.
START_FILES = (ARGS_FILE, SKIPPED_FILE)
# What a run leaves beside the model, which is overwritten at the end.
RUN_FILES = (*START_FILES, "metrics.jsonl", "eval_results.json", "curves.png", "samples.png", BEST_FILE)
LEFTOVERS = (*RUN_FILES, "checkpoint-*", ".checkpoint-*", TEACHER_FOLDER)
TEACHER_FILE = rf"{TEACHER_FOLDER}/({checkpoints.CHECKPOINT_FILE}|[^/]+\.(jsonl?|safetensors))"

# Arguments that a resumed run may change: none of them affects the weights.
FREE_ON_RESUME = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "config_file", "report_to", "logging_steps"),
    *("evaluation_steps", "checkpointing_steps", "checkpoints_total_limit", "load_best_model_at_end", "push_to_hub"),
    *("hub_model_id", "num_beams", "length_penalty", "per_device_eval_batch_size", "dataloader_num_workers"),
    *("preprocessing_num_workers", "gradient_checkpointing", "on_bad_row", "feature_cache_dir"),
    # Checked through the `max_train_steps` that follow from it.
    "num_train_epochs",
}
# With these a run's first steps don't depend on how many are to follow.
OPEN_ENDED_SCHEDULES = ("constant", "constant_with_warmup")


class RunFolder:
    """The output folder of a run. Nothing is written to it before `start`, when everything is known to fit.

    Args:
        args: of either script; `mixed_precision` is set to what `accelerator` uses.
        project: the run's name in accelerate's trackers.
        share: of the whole run's time that this training takes, for the estimate of the time left.

    Attributes:
        skipped: the `SkippedRows`.
        state: `step`, `epoch`, `batch` (of the epoch, done), `data` (fingerprint), `args`, `best` (validation so far).

    Raises:
        ValueError: the folder can't be used, or there is nothing to resume from.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, project: str, share: float = 1.0):
        self.args, self.accelerator, self.project, self.share = args, accelerator, project, share
        self.path, self.is_open, self.resume_from = Path(args.output_dir), False, None
        if not stopped_in_teacher(args):
            self.resume_from = checkpoints.resolve_resume(self.path, args.resume_from_checkpoint)
        if accelerator.is_main_process:
            check_output_dir(args)
        args.mixed_precision = accelerator.mixed_precision
        aside = Path(tempfile.mkdtemp(), SKIPPED_FILE) if accelerator.is_main_process else None
        self.skipped = SkippedRows(aside, args.on_bad_row)

    def open(self) -> None:
        """Creates the folder; the first call clears what an earlier run left, unless it is resumed."""
        if self.accelerator.is_main_process:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            if self.args.resume_from_checkpoint is None and not self.is_open:
                clear_output_dir(self.path)
            checkpoints.clear_unfinished(self.path)
            write_json(self.path / ARGS_FILE, run_args(self.args))
        self.is_open = True

    def start(self, batches, fingerprint: str | None = None) -> None:
        """Plans the steps of the `TrainBatches` and opens the folder, unless arguments or images (by their
        `fingerprint`, where they have one) differ from those of the checkpoint, or there is nowhere to upload to."""
        args, streaming = self.args, batches.is_stream
        steps_per_epoch = None if streaming else math.ceil(len(batches.loader) / args.gradient_accumulation_steps)
        saved_args, source = None, f"checkpoint {self.resume_from}"
        if self.resume_from is not None:
            saved = json.loads((self.resume_from / checkpoints.STATE_FILE).read_text(encoding="utf-8"))
            if saved.get("data") != fingerprint:
                raise ValueError(
                    f"{source}: expected the training images that it was written with, of fingerprint "
                    f"{saved.get('data')}, got {fingerprint}; to train on others, start from --model_name_or_path"
                )
            saved_args = saved["args"]
            if getattr(args, "load_best_model_at_end", False) and "best" in saved:
                check_best(self.path / BEST_FILE, self.resume_from / "model.safetensors")
        plan_steps(args, steps_per_epoch, saved_args)
        if saved_args is not None:
            # With a fingerprint, the folder of the same images may have moved.
            free = () if fingerprint is None else ("dataset_name", "unlabelled_dataset_name")
            compare_args(source, saved_args, run_args(args), free)
        if self.accelerator.is_main_process and getattr(args, "push_to_hub", False):
            args.hub_model_id = create_hub_repository(args)
        self.open()
        if self.accelerator.is_main_process:
            self._move_skipped_rows(keep=streaming and self.resume_from is not None)
        self.checkpointing_steps = args.checkpointing_steps or steps_per_epoch or args.max_train_steps
        self.state = {"step": 0, "epoch": 0, "batch": 0, "data": fingerprint}

    def _move_skipped_rows(self, keep: bool) -> None:
        """Moves the list of skipped rows here, or adds to the one to `keep`: a resumed stream doesn't read its earlier
        rows again."""
        skipped, aside = self.skipped, self.skipped.path
        skipped.path, skipped.written = self.path / SKIPPED_FILE, None
        if aside.exists() and not (keep and skipped.path.exists()):
            shutil.move(aside, skipped.path)
        shutil.rmtree(aside.parent, ignore_errors=True)
        if skipped.count:
            logger.warning("%d rows skipped; they are listed in %s", skipped.count, skipped.path)

    def resume(self, batches) -> None:
        """Loads the checkpoint to resume from into everything that was prepared, and opens the log and trackers."""
        if self.args.report_to != "none":
            self.accelerator.init_trackers(self.project, config=run_args(self.args))
        if self.resume_from is not None:
            self.state, rank_state = checkpoints.load_checkpoint(self.accelerator, self.resume_from)
            batches.load_state_dict(rank_state)
            logger.info("Resuming from %s at step %d.", self.resume_from, self.state["step"])
        self.state["args"] = run_args(self.args)
        self.log = RunLog(self.path, self.accelerator, self.args.max_train_steps, self.state["step"], self.share)

    def log_step(self, step, losses: dict, lr_scheduler) -> None:
        """Logs a `loop.Step` and its losses: a row every `--logging_steps`."""
        self.log.add(step, losses)
        if step.number % self.args.logging_steps == 0 or step.is_last:
            row = {**self.log.means(), "learning_rate": lr_scheduler.get_last_lr()[0]}
            self.log.write(step.number, self.state["epoch"], row)
        self.log.advance(step.number)

    def log_validation(self, metrics: dict[str, float], model) -> None:
        """Logs the metrics; `--load_best_model_at_end` keeps the weights of the unwrapped model if its CIDEr is the
        best so far."""
        row = {f"eval_{name}": value for name, value in metrics.items()}
        self.log.write(self.state["step"], self.state["epoch"], row)
        best = self.state.get("best")
        is_best = best is None or metrics["cider"] > best["value"]
        if getattr(self.args, "load_best_model_at_end", False) and self.accelerator.is_main_process and is_best:
            self.state["best"] = {"name": "cider", "value": metrics["cider"], "step": self.state["step"]}
            with replacing(self.path / BEST_FILE) as aside:
                save_model(model, str(aside))

    def load_best(self, model) -> None:
        """Loads the best weights so far into the unwrapped model."""
        self.accelerator.wait_for_everyone()
        load_model(model, str(self.path / BEST_FILE), device=str(self.accelerator.device))
        if self.accelerator.is_main_process:
            logger.info("The best weights are those of step %d.", self.state["best"]["step"])

    def save_checkpoint(self, batches) -> None:
        limit = self.args.checkpoints_total_limit
        with writing(self.path):
            checkpoints.save_checkpoint(self.accelerator, self.path, self.state, limit, batches.state_dict())


def run_args(args: argparse.Namespace) -> dict:
    """The arguments as they are recorded; `given` and `configured` are not the user's."""
    return {name: value for name, value in vars(args).items() if name not in ("given", "configured")}


def read_run_args(folder: Path) -> dict | None:
    """The arguments recorded in a run's folder; `None` where no run has written any."""
    try:
        values = json.loads((folder / ARGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and "output_dir" in values else None


# --- checking and clearing the folder ---------------------------------------------------------------------------------


def check_output_dir(args: argparse.Namespace) -> None:
    """Raises `ValueError` for a folder that the run must not write to: it is a file, the code's or what the run reads;
    or it isn't empty, and may neither be cleared nor resumed. Writes nothing itself."""
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir: expected a folder, got the file {folder}")
    if folder.resolve() == REPOSITORY or (folder / "train_distill.py").exists():
        raise ValueError(f"--output_dir: expected a folder other than the code's own, got {folder}")
    models = ("model_name_or_path", "teacher_name_or_path", "image_model_name_or_path")
    for name in (*models, "dataset_name", "unlabelled_dataset_name"):
        value = getattr(args, name, None)
        folders = [Path(source).resolve() for source in (value if isinstance(value, list) else [value]) if source]
        if folder.exists() and folder.resolve() in folders:
            raise ValueError(f"--output_dir: expected a folder other than --{name}, got {folder} for both")
    if getattr(args, "resume_from_checkpoint", None) is not None or not folder.exists():
        return
    if args.overwrite_output_dir:
        run_leftovers(folder)
    elif any(path.name not in START_FILES for path in folder.iterdir()):
        resume = ", or --resume_from_checkpoint latest to go on" if hasattr(args, "resume_from_checkpoint") else ""
        raise ValueError(
            f"--output_dir: expected an empty folder, got {folder}, which isn't; "
            f"pass --overwrite_output_dir to clear it{resume}"
        )


def clear_output_dir(folder: Path) -> None:
    for path in run_leftovers(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_leftovers(folder: Path) -> list[Path]:
    """What an earlier run left; an error where something has the name of it, but no run has written all of it."""
    earlier, known = read_run_args(folder), [*START_FILES]
    if earlier is not None:
        known += [*RUN_FILES, checkpoints.CHECKPOINT_FILE]
        # Only a run on drawn scenes trains its own teacher.
        is_own = earlier.get("dataset_name") is None and earlier.get("teacher_name_or_path") is None
        known += [TEACHER_FILE] if is_own and read_run_args(folder / TEACHER_FOLDER) is not None else []
    found = [path for pattern in LEFTOVERS for path in folder.glob(pattern)]
    for path in found:
        is_folder = path.is_dir() and not path.is_symlink()
        files = [item for item in path.rglob("*") if item.is_symlink() or not item.is_dir()] if is_folder else [path]
        if not all(re.fullmatch("|".join(known), file.relative_to(folder).as_posix()) for file in files):
            raise ValueError(
                f"--overwrite_output_dir: expected an earlier run's files in {folder}, got {path.name}, which none "
                "has written; move it away, or choose another --output_dir"
            )
    return found


# --- resuming and uploading -------------------------------------------------------------------------------------------


def stopped_in_teacher(args: argparse.Namespace) -> bool:
    """Whether `--resume_from_checkpoint latest` finds a run on scenes without a checkpoint of the student's yet: it
    keeps the teacher, trained or with checkpoints, and starts the student."""
    folder = Path(args.output_dir)
    has_teacher = args.dataset_name is None and read_run_args(folder / TEACHER_FOLDER) is not None
    return args.resume_from_checkpoint == "latest" and has_teacher and not checkpoints.complete_checkpoints(folder)


def compare_args(source: str, saved: dict, given: dict, free: tuple[str, ...] = ()) -> None:
    """Refuses to go on from `source`, written with other arguments that change what a run computes; names each with
    both values. Those in `FREE_ON_RESUME` and `free` may differ, and what isn't `given` isn't compared."""
    free = {*FREE_ON_RESUME, *free}
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


def check_best(path: Path, like: Path) -> None:
    """Raises `ValueError` unless `path` holds the best weights so far: finite, and of the shapes in the file `like`."""
    try:
        if not path.is_file():
            raise OSError("no such file")
        best, last = load_file(path), load_file(like)
        if sorted(value.shape for value in best.values()) != sorted(value.shape for value in last.values()):
            raise ValueError("got the weights of another model")
        if not all(value.isfinite().all() for value in best.values()):
            raise ValueError("got weights that aren't finite")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{path}: expected the best weights so far, for --load_best_model_at_end: {error}; resume without this flag"
        ) from error


def create_hub_repository(args: argparse.Namespace) -> str:
    """Creates the repository to upload to if it doesn't exist; returns its name with its owner's."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return huggingface_hub.HfApi().create_repo(name, exist_ok=True).repo_id
    except (OSError, ValueError) as error:
        raise ValueError(f"--push_to_hub: expected a repository {name} to upload to: {error}") from error


def push_to_hub(args: argparse.Namespace) -> str:
    """Uploads the model repository and its reports, without checkpoints and logs; returns its name."""
    repo_id = create_hub_repository(args)
    # A model repository has no folders: those here hold checkpoints, the teacher or a tracker's logs.
    ignored = ["checkpoint-*", "teacher/*", "*/*", BEST_FILE, SKIPPED_FILE, ".*"]
    options = {"ignore_patterns": ignored, "commit_message": "A trained TinyCap"}
    huggingface_hub.HfApi().upload_folder(repo_id=repo_id, folder_path=args.output_dir, **options)
    return repo_id
