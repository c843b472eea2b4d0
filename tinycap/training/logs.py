"""What a run writes while it goes on: `metrics.jsonl`, trackers and the progress bar."""

import json
import os
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm


def write_text(path: str | Path, text: str) -> None:
    """Writes a file aside and renames it, so that nobody ever reads half of it."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON as `write_text` does; what JSON doesn't know becomes its text."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> dict:
    """Reads a JSON file; one that isn't there is a `ValueError`."""
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
    """Rows of figures to `metrics.jsonl`, to accelerate's trackers and to the progress bar; main process only.

    Args:
        output_dir: where `metrics.jsonl` goes.
        accelerator: knows the main process and the trackers.
        total_steps: optimizer steps of the whole run.
        start_step: the step a resumed run goes on from; rows after it, from the run that broke off, are dropped.

    Every row carries `elapsed_seconds`, the time spent in the run's loop up to it.
    """

    def __init__(self, output_dir: str | Path, accelerator: Accelerator, total_steps: int, start_step: int = 0):
        self.path = Path(output_dir) / "metrics.jsonl"
        self.accelerator = accelerator
        self.progress = tqdm(
            total=total_steps, initial=start_step, desc="Training", disable=not accelerator.is_main_process
        )
        self.started = time.perf_counter()
        if accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            lines = [line for line in lines if _step_of(line) <= start_step]
            write_text(self.path, "".join(lines))
            if lines:
                # The clock goes on where the run broke off.
                self.started -= json.loads(lines[-1]).get("elapsed_seconds", 0.0)

    def train_row(self, step: int, epoch: int, figures: dict[str, float]) -> None:
        """Writes one row of losses; they also stand beside the progress bar."""
        shown = {name: f"{value:.3g}" for name, value in figures.items() if "loss" in name or "per_second" in name}
        self.progress.set_postfix(shown, refresh=False)
        self._write({"step": step, "epoch": epoch, **figures})

    def eval_row(self, step: int, epoch: int, figures: dict[str, float]) -> None:
        """Writes one row of validation figures, each with `eval_` before its name."""
        self._write({"step": step, "epoch": epoch, **{f"eval_{name}": value for name, value in figures.items()}})

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`."""
        self.progress.update(step - self.progress.n)

    def close(self) -> None:
        self.progress.close()

    def _write(self, row: dict) -> None:
        if not self.accelerator.is_main_process:
            return
        row["elapsed_seconds"] = round(time.perf_counter() - self.started, 3)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        # The last line of a run that was killed while it wrote.
        return float("inf")
