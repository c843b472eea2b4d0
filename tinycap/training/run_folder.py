"""The output folder of a run: checks before a start, clearing, resuming, checkpoints, log and upload."""

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger

from tinycap import REPOSITORY
from tinycap.training.best_model import BEST_FILE, keep_best, load_best
from tinycap.training.checkpoints import (
    STATE_FILE,
    complete_checkpoints,
    load_checkpoint,
    resolve_resume,
    save_checkpoint,
)
from tinycap.training.logs import RunLog, write_json
from tinycap.training.optimization import plan_steps
from tinycap.training.skipped_rows import SkippedRows


logger = get_logger(__name__)

ARGS_FILE = "train_args.json"
SKIPPED_FILE = "skipped.jsonl"
TEACHER_FOLDER = "teacher"
# A run that left nothing else has not taken a step.
START_FILES = (ARGS_FILE, SKIPPED_FILE)
RUN_FILES = (*START_FILES, "metrics.jsonl", "eval_results.json", "curves.png", "samples.png", BEST_FILE)
CHECKPOINTS = ("checkpoint-*", ".checkpoint-*")
# What accelerate and `save_checkpoint` write into a checkpoint; transformers' Trainer writes other files too.
CHECKPOINT_FILES = (
    *(STATE_FILE, "process_state_*.json", "model*.safetensors", "optimizer*.bin", "scheduler*.bin", "sampler*.bin"),
    *("scaler.pt", "random_states_*.pkl"),
)
TEACHER_FILES = (*RUN_FILES, "*.json", "*.safetensors", *CHECKPOINTS)

# Arguments that a resumed run may change: none of them affects the weights.
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


class RunFolder:
    """The output folder of a run in progress.

    Nothing is written to it before `start`, which is called once everything has been found to fit.

    Args:
        args: of either script; `mixed_precision` is set to what `accelerator` uses.
        accelerator: of this process.
        project: the run's name in accelerate's trackers.
        share: of the whole run's time that this training takes, for the estimate of the time left.

    Attributes:
        skipped: collects the unusable rows.
        state: `step`, `epoch`, `batch` (batches of the epoch that are done), `data` (fingerprint) and `args`.
        log: rows of metrics.

    Raises:
        ValueError: the folder can't be used, or there is nothing to resume from.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, project: str, share: float = 1.0):
        self.args, self.accelerator, self.project, self.share = args, accelerator, project, share
        self.path = Path(args.output_dir)
        self.is_open = False
        self.resume_from = None
        if not stopped_in_teacher(args):
            self.resume_from = resolve_resume(self.path, args.resume_from_checkpoint)
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                check_output_dir(args)
        args.mixed_precision = accelerator.mixed_precision
        aside = Path(tempfile.mkdtemp(), SKIPPED_FILE) if accelerator.is_main_process else None
        self.skipped = SkippedRows(aside, args.on_bad_row)

    def open(self) -> None:
        """Creates the folder; the first call clears what an earlier run left, unless it is resumed."""
        if self.accelerator.is_main_process:
            open_output_dir(self.args, clear=not self.is_open)
        self.is_open = True

    def start(self, batches, fingerprint: str | None = None) -> None:
        """Plans the steps and opens the folder.

        Args:
            batches: the `TrainBatches`.
            fingerprint: of the training images, where they have one.

        Raises:
            ValueError: arguments or images differ from those of the checkpoint, or there is nowhere to upload to.
        """
        args, streaming = self.args, batches.is_stream
        steps_per_epoch = None if streaming else math.ceil(len(batches.loader) / args.gradient_accumulation_steps)
        saved_args = read_checkpoint_args(self.resume_from, fingerprint)
        plan_steps(args, steps_per_epoch, saved_args)
        if saved_args is not None:
            # With a fingerprint, the folder of the same images may have moved.
            free = () if fingerprint is None else ("dataset_name",)
            compare_args(f"checkpoint {self.resume_from}", saved_args, run_args(args), free)
        if self.accelerator.is_main_process and getattr(args, "push_to_hub", False):
            args.hub_model_id = create_hub_repository(args)
        self.open()
        if self.accelerator.is_main_process:
            move_skipped_rows(self.skipped, self.path, keep=streaming and self.resume_from is not None)
        self.checkpointing_steps = args.checkpointing_steps or steps_per_epoch or args.max_train_steps
        self.state = {"step": 0, "epoch": 0, "batch": 0, "data": fingerprint}

    def resume(self, batches) -> None:
        """Loads the checkpoint to resume from into everything that was prepared, and opens the log and trackers."""
        if self.args.report_to != "none":
            self.accelerator.init_trackers(self.project, config=run_args(self.args))
        if self.resume_from is not None:
            self.state, rank_state = load_checkpoint(self.accelerator, self.resume_from)
            batches.load_state_dict(rank_state)
            logger.info("Resuming from %s at step %d.", self.resume_from, self.state["step"])
        self.state["args"] = run_args(self.args)
        total_steps = self.args.max_train_steps
        self.log = RunLog(self.path, self.accelerator, total_steps, self.state["step"], self.share)

    def save_checkpoint(self, batches) -> None:
        limit = self.args.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.path, self.state, limit, batches.state_dict())

    def log_validation(self, metrics: dict[str, float]) -> None:
        self.log.eval_row(self.state["step"], self.state["epoch"], metrics)

    def keep_best(self, model, metrics: dict[str, float]) -> None:
        """Keeps the unwrapped model's weights if `--load_best_model_at_end` asks for it and they are the best."""
        if self.args.load_best_model_at_end and self.accelerator.is_main_process:
            keep_best(self.path, model, metrics, self.state)

    def load_best(self, model) -> None:
        """Loads the best weights so far into the unwrapped model."""
        self.accelerator.wait_for_everyone()
        load_best(self.path, model)
        if self.accelerator.is_main_process:
            logger.info("The best weights are those of step %d.", self.state["best"]["step"])


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
    """Creates the run's folder and records its arguments there; `check_output_dir` comes first.

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

    Its teacher is kept, trained or with checkpoints, and the student starts.
    """
    folder = Path(args.output_dir)
    has_teacher = args.dataset_name is None and read_run_args(folder / TEACHER_FOLDER) is not None
    return args.resume_from_checkpoint == "latest" and has_teacher and not complete_checkpoints(folder)


def run_leftovers(folder: Path) -> list[Path]:
    """Files and folders of an earlier run beside the model, which is overwritten at the end.

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
    """Whether a run with the arguments `earlier` has written the path, judged by all its contents."""
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
    # Only a run on drawn scenes trains its own teacher.
    is_own = earlier.get("dataset_name") is None and earlier.get("teacher_name_or_path") is None
    if not is_own or read_run_args(path) is None:
        return False
    entries_known = all(any(entry.match(pattern) for pattern in TEACHER_FILES) for entry in path.iterdir())
    return entries_known and bool(run_leftovers(path))


def read_checkpoint_args(checkpoint: Path | None, fingerprint: str | None = None) -> dict | None:
    """The arguments of the run that wrote a checkpoint; `None` for no checkpoint.

    Args:
        fingerprint: of the images to resume with, where they have one.

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
            f"{state.get('data')}, got {fingerprint}; to train on other images, start from --model_name_or_path"
        )
    return state["args"]


def compare_args(source: str, saved: dict, given: dict, free: tuple[str, ...] = ()) -> None:
    """Refuses to resume with arguments that change what a run computes.

    Args:
        source: what was written with `saved`, for the message.
        given: the arguments to resume with, resolved; those of `saved` that are not among them aren't compared.
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
    """Moves the list of skipped rows to the run's folder, where later ones are appended.

    Args:
        skipped: the `SkippedRows`, whose path is that of a temporary file.
        keep: keep the list that is there: a resumed stream doesn't read its earlier rows again.
    """
    aside, skipped.path, skipped.written = skipped.path, folder / SKIPPED_FILE, None
    if aside.exists() and not (keep and skipped.path.exists()):
        shutil.move(aside, skipped.path)
    shutil.rmtree(aside.parent, ignore_errors=True)
    if skipped.count:
        logger.warning("%d rows skipped; they are listed in %s", skipped.count, skipped.path)


def create_hub_repository(args: argparse.Namespace) -> str:
    """Creates the repository to upload to if it doesn't exist; returns its name with its owner's.

    Raises:
        ValueError: the Hub can't be reached, or refuses the token.
    """
    from huggingface_hub import HfApi

    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return HfApi().create_repo(name, exist_ok=True).repo_id
    except (OSError, ValueError) as error:
        raise ValueError(f"--push_to_hub: expected a repository {name} to upload to: {error}") from error


def push_to_hub(args: argparse.Namespace) -> str:
    """Uploads the model repository and its reports, without checkpoints and logs; returns its name."""
    from huggingface_hub import HfApi

    repo_id = create_hub_repository(args)
    HfApi().upload_folder(
        repo_id=repo_id,
        folder_path=args.output_dir,
        # A model repository has no folders: those here hold checkpoints, the teacher or a tracker's logs.
        ignore_patterns=["checkpoint-*", "teacher/*", "*/*", BEST_FILE, SKIPPED_FILE, ".*"],
        commit_message="A trained TinyCap",
    )
    return repo_id
