"""Fault injection in training: kills, a full disk, dying workers and processes, NaN, changed data, clock changes.

    python tests/slow/training_faults.py --output_dir outputs/faults

Each fault is injected into a real `train_distill.py` on drawn scenes with a teacher of random weights, which is then
resumed. *Survived* means that the newest complete checkpoint was intact, and that the run ended with bit-identical
weights and losses to an undisturbed one, or was refused where it had to be. Every fault asserts that it took effect.
Linux only; the full disk needs the right to mount a tmpfs. Writes JSON and a Markdown table. Quick check:
`--kills 2 --terms 1 --times 1`.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.results import benchmark_parser, run_facts, save_results
from tinycap import REPOSITORY
from tinycap.training.checkpoints import complete_checkpoints
from tinycap.training.logs import write_json
from tinycap.training.scenes import scene_splits


STEPS = 120
# `train_distill.py` with a fault in its 21st step, which creates `happened`, so that a resumed run has none.
PATCHED = """
import sys, time
from pathlib import Path
from tinycap import train_distill
happened, clock, step_before, number = Path({happened!r}), time.time, train_distill.train_step, 0
def train_step(*args, **kwargs):
    global number
    number += 1
    if number == 21 and not happened.exists():
        happened.touch()
        {fault}
    return step_before(*args, **kwargs)
train_distill.train_step = train_step
train_distill.main(sys.argv[1:])
"""
POISON = "next(a for a in args if hasattr(a, 'batches')).batches[0]['pixel_values'][3, 0, 0, 0] = float('nan')"
SET_BACK = "time.time = lambda: clock() - 86400"


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Runs:
    """Runs by name in a folder; the others are compared with the undisturbed one, "whole"."""

    def __init__(self, folder: Path):
        self.folder, self.images = folder, folder / "images"
        shutil.rmtree(folder, ignore_errors=True)
        self.write_images()
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
        vision = {"image_size": 64, "patch_size": 16, **sizes}
        torch.manual_seed(0)
        CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)).save_pretrained(folder / "teacher")
        write_json(folder / "config.json", {"vision_config": vision, "text_config": sizes})
        assert self.start("whole").wait() == 0, self.log("whole")

    def write_images(self, without: int = 0) -> None:
        """Writes parquet files of scenes, `without` so many of the training scenes."""
        self.images.mkdir(parents=True)
        for split, rows in scene_splits(160, 16, 0, 64).items():
            rows = datasets.Dataset.from_list(list(rows.remove_columns("scene"))[without * (split == "train") :])
            rows.cast_column("image", datasets.Image()).to_parquet(self.images / f"{split}.parquet")

    def start(self, name: str, *more: str, fault: str | None = None, processes: int = 1) -> subprocess.Popen:
        """Starts the run, or resumes it if it has a checkpoint."""
        output_dir = self.folder / name
        flags = [
            *("--dataset_name", self.images, "--teacher_name_or_path", self.folder / "teacher"),
            *("--config_name", self.folder / "config.json", "--vocab_size", 400, "--max_caption_length", 32),
            *("--per_device_train_batch_size", 8 // processes, "--captions_per_image", 2, "--max_train_steps", STEPS),
            *("--checkpointing_steps", 4, "--logging_steps", 1, "--evaluation_steps", 50, "--num_warmup_steps", 5),
            *("--num_beams", 1, "--output_dir", output_dir, *more),
        ]
        if complete_checkpoints(output_dir):
            flags += ["--resume_from_checkpoint", "latest"]
        elif output_dir.exists():
            flags.append("--overwrite_output_dir")
        script = [REPOSITORY / "train_distill.py"]
        if fault is not None:
            script = [self.folder / f"{name}.py"]
            script[0].write_text(PATCHED.format(happened=str(self.happened(name)), fault=fault))
        if processes > 1:
            script = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *script]
        command = [sys.executable, *map(str, script), *map(str, flags)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        with open(self.folder / f"{name}.log", "a") as log:
            pipes = {"stdout": log, "stderr": log, "env": environment, "cwd": self.folder}
            return subprocess.Popen(command, start_new_session=True, **pipes)

    def start_to_step(self, name: str, step: int, *more: str, **options) -> subprocess.Popen:
        """Starts or resumes the run and waits until it has logged so many more steps."""
        process, step = self.start(name, *more, **options), self.step(name) + step
        while self.step(name) < step and process.poll() is None:
            time.sleep(0.02)
        return process

    def step(self, name: str) -> int:
        """The last step in the run's log."""
        path = self.folder / name / "metrics.jsonl"
        try:
            return json.loads(path.read_text().splitlines()[-1])["step"]
        except (FileNotFoundError, IndexError, json.JSONDecodeError):
            return 0

    def happened(self, name: str) -> Path:
        return self.folder / f"{name}.happened"

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-20_000:]

    def newest_checkpoint(self, name: str) -> str:
        """The name of the newest complete checkpoint, which is read completely; "" if there is none."""
        found = complete_checkpoints(self.folder / name)
        if not found:
            return ""
        json.loads((found[-1] / "trainer_state.json").read_text())
        load_file(found[-1] / "model.safetensors")
        for path in (*found[-1].glob("*.bin"), *found[-1].glob("*.pkl")):
            torch.load(path, weights_only=False)
        return found[-1].name

    def check_fails(self, process: subprocess.Popen, name: str, *words: str) -> None:
        """Checks that the run ends in an error with these words in its log, after an intact checkpoint."""
        assert process.wait(timeout=300) != 0 and all(word in self.log(name) for word in words), self.log(name)
        assert self.newest_checkpoint(name)

    def check_resumes(self, name: str, *more: str, like: str = "whole", **options) -> None:
        """Checks that the resumed run ends with the weights, steps and losses of another."""
        assert self.start(name, *more, **options).wait() == 0, self.log(name)
        self.check_exact(name, like)

    def check_exact(self, name: str, like: str = "whole") -> None:
        found, expected = (load_file(self.folder / run / "model.safetensors") for run in (name, like))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        keys = ("step", "loss", "caption_loss", "eval_caption_loss", "learning_rate")
        logs = [(self.folder / run / "metrics.jsonl").read_text().splitlines() for run in (name, like)]
        found, expected = ([[json.loads(line).get(key) for key in keys] for line in log] for log in logs)
        assert found == expected


# --- faults: each injects the `number`th one and asserts the outcome --------------------------------------------------


def kill(runs: Runs, number: int, moments: random.Random) -> None:
    """A run that is killed repeatedly, every second time while a checkpoint is being written."""
    while True:
        since, process = time.time(), runs.start_to_step("killed", number % 2)
        while number % 2 and process.poll() is None and not half_written(runs, since):
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.03 if number % 2 else 15))
        if process.poll() is None:
            break
        # The run ended before the kill: start a new one.
        assert process.returncode == 0, runs.log("killed")
        runs.check_exact("killed")
        shutil.rmtree(runs.folder / "killed")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    runs.newest_checkpoint("killed")


def half_written(runs: Runs, since: float) -> bool:
    """Whether an incomplete checkpoint was begun after `since`, a wall-clock time."""
    try:
        return any(path.stat().st_mtime > since for path in (runs.folder / "killed").glob(".checkpoint-*"))
    except FileNotFoundError:
        return False


def terminate(runs: Runs, number: int, moments: random.Random) -> None:
    process = runs.start_to_step("terminated", moments.randrange(1, 8))
    time.sleep(moments.uniform(0, 0.1))
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, f"ended by itself: {process.returncode}"
    assert runs.newest_checkpoint("terminated") == f"checkpoint-{runs.step('terminated')}"


def fill_disk(runs: Runs, number: int, moments: random.Random) -> None:
    name = f"full-{number}"
    folder = runs.folder / name
    folder.mkdir()
    size = sum(path.stat().st_size for path in (runs.folder / "whole" / f"checkpoint-{STEPS}").iterdir())
    # Room for one checkpoint, half of another and the logs.
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size) + 65536}", "none", folder], check=True)
    try:
        runs.check_fails(runs.start(name), name, "could not be written")
        subprocess.run(["mount", "-o", f"remount,size={20 * size}", folder], check=True)
        runs.check_resumes(name)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def kill_worker(runs: Runs, number: int, moments: random.Random) -> None:
    name, more = f"worker-{number}", ("--dataloader_num_workers", "2")
    process = runs.start_to_step(name, 9 + number, *more)
    workers = [pid for pid in children(process.pid) if "train_distill" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[number % 2], signal.SIGKILL)
    runs.check_fails(process, name, "DataLoader worker")
    runs.check_resumes(name, *more)


def kill_process(runs: Runs, number: int, moments: random.Random) -> None:
    if number == 0:
        assert runs.start("pair", processes=2).wait() == 0, runs.log("pair")
    name = f"pair-{number}"
    process = runs.start_to_step(name, 9 + number, processes=2)
    os.kill(children(process.pid)[number % 2], signal.SIGKILL)
    died = time.monotonic()
    runs.check_fails(process, name, "Signal 9")
    assert time.monotonic() - died < 60
    runs.check_resumes(name, like="pair", processes=2)


def poison_batch(runs: Runs, number: int, moments: random.Random) -> None:
    name = f"nan-{number}"
    runs.check_fails(runs.start(name, fault=POISON), name, "step 21: expected finite losses")
    assert runs.happened(name).exists() and runs.newest_checkpoint(name) == "checkpoint-20"
    runs.check_resumes(name, fault=POISON)


def set_clock_back(runs: Runs, number: int, moments: random.Random) -> None:
    name = f"clock-{number}"
    runs.check_resumes(name, fault=SET_BACK)
    rows = (runs.folder / name / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(row)["elapsed_seconds"] for row in rows]
    assert runs.happened(name).exists() and seconds == sorted(seconds)


def change_data(runs: Runs, number: int, moments: random.Random) -> None:
    name = f"data-{number}"
    process = runs.start_to_step(name, 9)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.move(runs.images, runs.folder / "kept")
    runs.check_fails(runs.start(name), name, str(runs.images))
    runs.write_images(without=number + 1)
    runs.check_fails(runs.start(name), name, "that it was written with")
    shutil.rmtree(runs.images)
    shutil.move(runs.folder / "kept", runs.images)
    runs.check_resumes(name)


# Title -> the function, the flag with its number of times, the run that all of them share.
FAULTS = {
    "SIGKILL, every second one while a checkpoint is written": (kill, "kills", "killed"),
    "SIGTERM": (terminate, "terms", "terminated"),
    "full disk while saving": (fill_disk, "times", None),
    "a loader's worker killed": (kill_worker, "times", None),
    "one of two processes killed": (kill_process, "times", None),
    "NaN in a batch": (poison_batch, "times", None),
    "clock set back by a day": (set_clock_back, "times", None),
    "data gone, then changed": (change_data, "times", None),
}


def main() -> None:
    parser = benchmark_parser(__doc__, "training_faults")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs")
    parser.add_argument("--terms", type=int, default=5, help="SIGTERMs")
    parser.add_argument("--times", type=int, default=3, help="times of each other fault")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    runs = Runs(Path(args.output_dir).resolve() / "runs")
    results, lines = {**run_facts(), "faults": {}}, ["| fault | times | survived |", "|---|---|---|"]
    for title, (inject, flag, shared) in FAULTS.items():
        times, errors = vars(args)[flag], []
        for number in range(times):
            try:
                inject(runs, number, moments)
                if shared and number == times - 1:
                    runs.check_resumes(shared)
            except Exception:
                errors.append(traceback.format_exc())
        results["faults"][title] = {"times": times, "survived": times - len(errors), "errors": errors}
        lines.append(f"| {title} | {times} | {times - len(errors)} |")
        print(lines[-1], *errors, sep="\n", flush=True)
    save_results(args.output_dir, "training_faults", results, lines)
    if any(found["errors"] for found in results["faults"].values()):
        sys.exit(1)
    shutil.rmtree(runs.folder)


if __name__ == "__main__":
    main()
