"""The log of a run: `metrics.jsonl`, trackers and the progress bar; and files written atomically."""

import datetime
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from tinycap.commands import write_text, writing


logger = logging.getLogger(__name__)

# Steps before the first estimate of the time left, and seconds between estimates without a progress bar.
ESTIMATE_AFTER, ESTIMATE_EVERY = 20, 60.0


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
        return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["elapsed_seconds"] / 3600
    except (FileNotFoundError, IndexError):
        raise ValueError(f"{path}: expected the log of a run") from None


class RunLog:
    """Writes rows of metrics to `metrics.jsonl`, to accelerate's trackers and to the progress bar; main process only.

    Every row has `elapsed_seconds`, the time spent in the run's loop. Where there is no terminal for the bar, an
    estimate of the time left is logged each minute.

    Args:
        start_step: the step that a resumed run starts from; later rows, of the interrupted run, are dropped.
        share: of the whole run's time that this training takes, for the estimate.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, total_steps: int, start_step: int = 0, share: float = 1.0
    ):
        self.path, self.accelerator = folder / "metrics.jsonl", accelerator
        self.total_steps, self.start_step, self.share = total_steps, start_step, share
        # None: only on a terminal.
        shown = None if accelerator.is_main_process else True
        self.progress = tqdm(total=total_steps, initial=start_step, desc="Training", disable=shown)
        self.started = self.opened = self.estimated = time.perf_counter()
        self.losses, self.num_images, self.waited, self.seconds = {}, 0, 0.0, 0.0
        if accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            # The last line of a run that was killed while writing it has no end.
            lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start_step]
            write_text(self.path, "".join(lines))
            if lines:
                # The clock continues where the run was interrupted.
                self.started -= json.loads(lines[-1]).get("elapsed_seconds", 0.0)

    def add(self, step, losses: dict[str, torch.Tensor]) -> None:
        """Accumulates a `loop.Step`, just taken, and its losses for the next row."""
        for name, value in losses.items():
            self.losses.setdefault(name, []).append(value)
        self.num_images, self.waited = self.num_images + step.num_images, self.waited + step.waited
        self.seconds += time.perf_counter() - step.started

    def means(self) -> dict[str, float]:
        """Means over processes and the steps since the last call, with the images per second."""
        means = {
            name: self.accelerator.reduce(torch.stack(values).mean(), "mean").item()
            for name, values in self.losses.items()
        }
        means.update(images_per_second=self.num_images / self.seconds, waiting_share=self.waited / self.seconds)
        self.losses, self.num_images, self.waited, self.seconds = {}, 0, 0.0, 0.0
        return means

    def write(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Writes one row; the progress bar shows its losses."""
        shown = {name.removesuffix("_loss"): f"{value:.3g}" for name, value in metrics.items() if "loss" in name}
        self.progress.set_postfix(shown, refresh=False)
        if self.accelerator.is_main_process:
            row = {"epoch": epoch, **metrics, "elapsed_seconds": round(time.perf_counter() - self.started, 3)}
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **row}) + "\n")
            self.accelerator.log(row, step=step)

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`, and logs an estimate of the time left when one is due."""
        self.progress.update(step - self.progress.n)
        if step == self.total_steps:
            self.progress.close()
        now = time.perf_counter()
        is_first = step == min(self.start_step + ESTIMATE_AFTER, self.total_steps - 1)
        is_due = self.progress.disable and now - self.estimated > ESTIMATE_EVERY
        if self.accelerator.is_main_process and (is_first or is_due):
            self.estimated = now
            seconds = (now - self.opened) / (step - self.start_step) * (self.total_steps - step)
            seconds += (now - self.opened + seconds) * (1 / self.share - 1)
            left = datetime.timedelta(seconds=round(seconds))
            logger.info("Step %d of %d: about %s left.", step, self.total_steps, left)
