"""The best weights so far, by one of a validation's figures."""

import os
from pathlib import Path

from safetensors.torch import load_model, save_model
from torch import nn


BEST_FILE = "best_model.safetensors"
# Of these less is better, of all others more.
LESS_IS_BETTER = ("caption_loss", "cosine_distance")


def is_better(name: str, value: float, than: dict | None) -> bool:
    """Whether `value` of the figure `name` beats `than["value"]`; anything beats nothing."""
    if than is None:
        return True
    return value < than["value"] if name in LESS_IS_BETTER else value > than["value"]


def keep_best(output_dir: str | Path, model: nn.Module, metrics: dict[str, float], name: str, state: dict) -> None:
    """Keeps the weights if they are the best so far, and writes down in `state["best"]` of which step they are.

    Args:
        model: the whole model, on the process that writes.
        metrics: of a validation.
        name: the figure that counts.
        state: of the run, with its `step`; a checkpoint brings it back.

    Raises:
        ValueError: the validation has no such figure; names those it has.
    """
    if name not in metrics:
        raise ValueError(f"--metric_for_best_model: expected one of {', '.join(sorted(metrics))}, got {name}")
    if not is_better(name, metrics[name], state.get("best")):
        return
    state["best"] = {"name": name, "value": metrics[name], "step": state["step"]}
    aside = Path(output_dir) / f".{BEST_FILE}"
    save_model(model, str(aside))
    os.replace(aside, Path(output_dir) / BEST_FILE)


def load_best(output_dir: str | Path, model: nn.Module) -> None:
    """Puts the best weights so far into `model`, the whole one."""
    load_model(model, str(Path(output_dir) / BEST_FILE), device=str(next(model.parameters()).device))
