"""The best weights so far, by a validation's CIDEr."""

import os
from pathlib import Path

from safetensors.torch import load_model, save_model
from torch import nn


BEST_FILE = "best_model.safetensors"


def keep_best(output_dir: str | Path, model: nn.Module, metrics: dict[str, float], state: dict) -> None:
    """Saves the weights if they are the best so far, and records their step in `state["best"]`.

    Args:
        model: the unwrapped model, on the process that writes.
        metrics: of a validation, with its `cider`.
        state: of the run, with its `step`; part of every checkpoint.
    """
    best = state.get("best")
    if best is not None and metrics["cider"] <= best["value"]:
        return
    state["best"] = {"name": "cider", "value": metrics["cider"], "step": state["step"]}
    aside = Path(output_dir) / f".{BEST_FILE}"
    save_model(model, str(aside))
    os.replace(aside, Path(output_dir) / BEST_FILE)


def load_best(output_dir: str | Path, model: nn.Module) -> None:
    """Loads the best weights so far into `model`, the unwrapped one."""
    load_model(model, str(Path(output_dir) / BEST_FILE), device=str(next(model.parameters()).device))
