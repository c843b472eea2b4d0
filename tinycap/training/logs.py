"""The log of a run: `metrics.jsonl`, trackers and the progress bar; and files written atomically."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm


logger = logging.getLogger(__name__)

# Steps before the first estimate of the time left, and seconds between estimates without a progress bar.
ESTIMATE_AFTER, ESTIMATE_EVERY = 20, 60.0


def write_text(path: str | Path, text: str) -> None:
    """Writes a file aside and renames it, so that no reader sees a part of it."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON as `write_text` does; values of other types as their `str`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> dict:
    """Reads a JSON file; raises `ValueError` if it doesn't exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is its folder the right one?") from None


def hours_of(folder: str | Path) -> float:
    """Hours that a run's loop took, from its `metrics.jsonl`."""
    path = Path(folder) / "metrics.jsonl"
    try:
        last = path.read_text(encoding="utf-8").splitlines()[-1]
    except (FileNotFoundError, IndexError):
        raise ValueError(f"{path}: expected the log of a run") from None
    return json.loads(last)["elapsed_seconds"] / 3600


class RunLog:
    """Writes rows of metrics to `metrics.jsonl`, to accelerate's trackers and to the progress bar; main process only.

    Args:
        output_dir: where `metrics.jsonl` goes.
        accelerator: of this process, with its trackers.
        total_steps: optimizer steps of the whole run.
        start_step: the step that a resumed run starts from; later rows, of the interrupted run, are dropped.
        share: of the whole run's time that this training takes, for the estimate of the time left.

    Every row carries `elapsed_seconds`, the time spent in the run's loop up to it. The bar needs a terminal; in a file
    the estimate is logged each minute instead.
    """

    def __init__(
        self,
        output_dir: str | Path,
        accelerator: Accelerator,
        total_steps: int,
        start_step: int = 0,
        share: float = 1.0,
    ):
        self.path = Path(output_dir) / "metrics.jsonl"
        self.accelerator = accelerator
        self.total_steps, self.start_step, self.share = total_steps, start_step, share
        # None: only on a terminal.
        shown = None if accelerator.is_main_process else True
        self.progress = tqdm(total=total_steps, initial=start_step, desc="Training", disable=shown)
        self.started = self.opened = self.estimated = time.perf_counter()
        if accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            lines = [line for line in lines if _step_of(line) <= start_step]
            write_text(self.path, "".join(lines))
            if lines:
                # The clock continues where the run was interrupted.
                self.started -= json.loads(lines[-1]).get("elapsed_seconds", 0.0)

    def train_row(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Writes one row of losses, which the progress bar shows too."""
        shown = {name.removesuffix("_loss"): f"{value:.3g}" for name, value in metrics.items() if "loss" in name}
        self.progress.set_postfix(shown, refresh=False)
        self._write({"step": step, "epoch": epoch, **metrics})

    def eval_row(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Writes one row of validation metrics, each with `eval_` before its name."""
        self._write({"step": step, "epoch": epoch, **{f"eval_{name}": value for name, value in metrics.items()}})

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`, and logs an estimate of the time left when one is due."""
        self.progress.update(step - self.progress.n)
        now = time.perf_counter()
        is_first = step == min(self.start_step + ESTIMATE_AFTER, self.total_steps - 1)
        is_due = self.progress.disable and now - self.estimated > ESTIMATE_EVERY
        if self.accelerator.is_main_process and (is_first or is_due):
            self.estimated = now
            seconds = (now - self.opened) / (step - self.start_step) * (self.total_steps - step)
            seconds += (now - self.opened + seconds) * (1 / self.share - 1)
            logger.info("Step %d of %d: about %s left.", step, self.total_steps, _duration(seconds))

    def close(self) -> None:
        self.progress.close()

    def _write(self, row: dict) -> None:
        if not self.accelerator.is_main_process:
            return
        row["elapsed_seconds"] = round(time.perf_counter() - self.started, 3)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def _duration(seconds: float) -> str:
    """In the unit that fits: "40 seconds", "7 minutes", "5.2 hours"."""
    if seconds < 90:
        return f"{math.ceil(seconds)} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        # The last line of a run that was killed while writing it.
        return float("inf")
