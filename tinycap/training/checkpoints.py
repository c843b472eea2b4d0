"""Checkpoints: written aside and renamed, so that the newest one is always complete; damage is found by checksums."""

import json
import logging
import os
import random
import re
import shutil
import zlib
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from tinycap.commands import OutputError


logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
RANK_STATE_FILE = "process_state_{}.json"
# What accelerate and `save_checkpoint` write into a checkpoint; transformers' Trainer writes other files too.
CHECKPOINT_FILE = (
    r"\.?checkpoint-\d+/(trainer_state\.json|process_state_\d+\.json|model[^/]*\.safetensors"
    r"|(optimizer|scheduler|sampler)[^/]*\.bin|scaler\.pt|random_states_\d+\.pkl)"
)


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, state: dict, keep: int | None = None, rank_state: dict | None = None
) -> Path:
    """Writes `checkpoint-<step>`: accelerate's state (safetensors weights, optimizer, scheduler, scaler) and `state`.

    Args:
        state: of the run, the same for all processes; JSON, with the `step`. `rank_state`: of this process; JSON.
        keep: how many of the newest checkpoints to keep; `None` keeps all.
    """
    final, aside = output_dir / f"checkpoint-{state['step']}", output_dir / f".checkpoint-{state['step']}"
    if accelerator.is_main_process:
        clear_unfinished(output_dir)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(aside))
    except (OSError, RuntimeError, SafetensorError) as error:
        # The errors of torch and safetensors about a full disk do not say that it is full.
        free = shutil.disk_usage(output_dir).free
        raise OutputError(
            f"checkpoint {final}: could not be written, {free / 1e6:,.1f} MB are free there; the checkpoints before it "
            f"are intact: {error}"
        ) from error
    if rank_state is not None:
        (aside / RANK_STATE_FILE.format(accelerator.process_index)).write_text(json.dumps(rank_state))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {path.name: checksum(path) for path in sorted(aside.iterdir())}
        facts = {**state, "num_processes": accelerator.num_processes, "files": files}
        (aside / STATE_FILE).write_text(json.dumps(facts, indent=2))
        for path in [*aside.iterdir(), aside]:
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        _flush(output_dir)
        # Those of later steps are of the run that this one went back from.
        found = sorted(complete_checkpoints(output_dir), key=lambda path: step_of(path) <= state["step"])
        for old in found[: -keep if keep else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def clear_unfinished(output_dir: Path) -> None:
    """Deletes the checkpoints that a killed run left half written; a folder with files of others stays."""
    for stale in output_dir.glob(".checkpoint-*"):
        names = [path.relative_to(output_dir).as_posix() for path in stale.rglob("*")]
        if stale.is_dir() and not stale.is_symlink() and all(re.fullmatch(CHECKPOINT_FILE, name) for name in names):
            shutil.rmtree(stale)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            value = zlib.crc32(chunk, value)
    return value


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-", 1)[1])


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [path.parent for path in output_dir.glob(f"checkpoint-*/{STATE_FILE}")]
    return sorted((path for path in found if path.name.split("-", 1)[1].isdecimal()), key=step_of)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, by their checksums; `None` for an intact one."""
    state_file = checkpoint / STATE_FILE
    if not state_file.is_file():
        return f"no {STATE_FILE}"
    try:
        files = json.loads(state_file.read_text(encoding="utf-8"))["files"]
        for name, value in files.items():
            path = checkpoint / Path(name).name
            # No pipe or device, which would be read for ever.
            if not path.is_file() or checksum(path) != value:
                return f"{name}, which {'is not as it was written' if path.exists() else 'is missing'}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{STATE_FILE} or files that can't be read ({type(error).__name__}: {error})"
    return None


def resolve_resume(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to resume from, or `None`: a folder, or for "latest" the newest one that is complete and intact;
    a warning names the others."""
    if resume_from_checkpoint is None:
        return None
    latest = resume_from_checkpoint == "latest"
    found = complete_checkpoints(output_dir) if latest else [Path(resume_from_checkpoint)]
    damage = f"no {STATE_FILE}"
    for checkpoint in reversed(found):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        if latest:
            logger.warning("%s is left out: expected a complete checkpoint, got %s", checkpoint, damage)
    folder = output_dir if latest else found[-1]
    raise ValueError(f"--resume_from_checkpoint: expected a complete checkpoint in {folder}, got {damage}")


def load_checkpoint(accelerator: Accelerator, path: Path) -> tuple[dict, dict | None]:
    """Restores everything that was prepared; returns the saved `state` and this process's `rank_state`."""
    state = json.loads((path / STATE_FILE).read_text())
    saved = state.pop("num_processes")
    state.pop("files")
    if saved != accelerator.num_processes:
        # Another number of processes would share the rest of the epoch otherwise.
        raise ValueError(
            f"checkpoint {path}: expected {saved} processes, as it was written by, got {accelerator.num_processes}"
        )
    accelerator.load_state(str(path))
    rank_state = path / RANK_STATE_FILE.format(accelerator.process_index)
    return state, json.loads(rank_state.read_text()) if rank_state.exists() else None


def seed_step(seed: int, step: int, process_index: int) -> None:
    """Makes every random choice of a step a function of (seed, step, process) only."""
    value = random.Random(f"{seed}/{step}/{process_index}").getrandbits(63)
    random.seed(value)
    numpy.random.seed(value % 2**32)
    torch.manual_seed(value)
