"""What training survives: kills, a full disk, dying workers and processes, bad numbers, changed data, a jumping clock.

    python benchmarks/training_faults.py --output_dir outputs/faults

Each fault is done to a real `train_distill.py` on drawn scenes with a teacher of random weights, which is then resumed.
Survived means: the newest complete checkpoint was intact after every blow, and the run ended with the weights and the
losses, to the bit, of one that nobody disturbed, or was refused with a reason where it had to be. Every fault asserts
that it really happened. Linux; the full disk needs the right to mount a tmpfs. Writes JSON and a Markdown table.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.results import run_facts, save_results
from tinycap.training.checkpoints import complete_checkpoints
from tinycap.training.logs import write_json
from tinycap.training.scenes import scene_splits


ROOT = Path(__file__).resolve().parents[1]
STEPS = 120
# Runs `train_distill.py` after a patch of its own process; `FAULT_FILE` appears when the fault has happened.
PATCHED = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tinycap import train_distill
happened = Path({happened!r})
{patch}
train_distill.main(sys.argv[1:])
"""
NAN_PATCH = """
step_before = train_distill.train_step
def poisoned(*args):
    if args[-1] == 21 and not happened.exists():
        args[-2].batches[0]["pixel_values"][3, 0, 0, 0] = float("nan")
        happened.touch()
    return step_before(*args)
train_distill.train_step = poisoned
"""
CLOCK_PATCH = """
clock, step_before = time.time, train_distill.train_step
def jump(*args):
    if args[-1] == 21:
        time.time = lambda: clock() - 86400
        happened.touch()
    return step_before(*args)
train_distill.train_step = jump
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs, every second one during a checkpoint write")
    parser.add_argument("--terms", type=int, default=5, help="SIGTERMs at random moments")
    parser.add_argument("--times", type=int, default=3, help="times of each other fault")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--output_dir", default="outputs/training_faults", help="where the results go")
    return parser.parse_args()


class Bench:
    """Scenes and a teacher on disk, and the undisturbed run that all others are compared with."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        self.photos = folder / "photos"
        self.write_photos(self.photos)
        torch.manual_seed(0)
        sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
        teacher = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=64, patch_size=16, **sizes))
        teacher.save_pretrained(folder / "teacher")
        vision = {
            "image_size": 64,
            "patch_size": 16,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "intermediate_size": 96,
        }
        text = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
        write_json(folder / "config.json", {"vision_config": {**vision, "num_attention_heads": 3}, "text_config": text})
        self.run("whole").wait()
        self.weights = load_file(folder / "whole" / "model.safetensors")

    def write_photos(self, folder: Path) -> None:
        drawn = scene_splits(160, 16, 0, 64)
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "validation"):
            rows = datasets.Dataset.from_list([row for row in drawn[split].remove_columns("scene")])
            rows.cast_column("image", datasets.Image()).to_parquet(folder / f"{split}.parquet")

    def run(self, name: str, *more: str, patch: str | None = None, processes: int = 1) -> subprocess.Popen:
        """Starts or resumes the run whose folder is `name`."""
        output_dir = self.folder / name
        flags = [
            *("--dataset_name", self.photos, "--teacher_name_or_path", self.folder / "teacher"),
            *("--config_name", self.folder / "config.json", "--vocab_size", 400, "--max_caption_length", 32),
            *("--per_device_train_batch_size", 8 // processes, "--captions_per_image", 2, "--max_train_steps", STEPS),
            *("--checkpointing_steps", 4, "--logging_steps", 1, "--evaluation_steps", 50, "--num_warmup_steps", 5),
            *("--num_beams", 1, "--output_dir", output_dir, *more),
        ]
        if complete_checkpoints(output_dir):
            flags += ["--resume_from_checkpoint", "latest"]
        elif output_dir.exists():
            flags.append("--overwrite_output_dir")
        script = [ROOT / "train_distill.py"]
        if patch is not None:
            path = self.folder / f"{name}.py"
            path.write_text(PATCHED.format(root=str(ROOT), happened=str(self.happened(name)), patch=patch))
            script = [path]
        if processes > 1:
            script = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *script]
        log = open(self.folder / f"{name}.log", "a")
        command = [sys.executable, *map(str, script), *map(str, flags)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=self.folder, start_new_session=True
        )

    def happened(self, name: str) -> Path:
        return self.folder / f"{name}.happened"

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def step(self, name: str) -> int:
        """The last step that the run has logged."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        try:
            return json.loads(lines[-1])["step"] if lines else 0
        except json.JSONDecodeError:
            return 0

    def wait_for_step(self, name: str, step: int, process: subprocess.Popen) -> None:
        while self.step(name) < step and process.poll() is None:
            time.sleep(0.02)

    def is_writing(self, name: str, since: float) -> bool:
        """Whether a checkpoint that isn't complete was begun after `since`, a wall-clock time."""
        try:
            return any(path.stat().st_mtime > since for path in (self.folder / name).glob(".checkpoint-*"))
        except FileNotFoundError:
            # It has just been completed, or cleared away.
            return False

    def newest_is_intact(self, name: str) -> bool:
        """Reads the newest complete checkpoint, if there is one, from end to end."""
        found = complete_checkpoints(self.folder / name)
        if found:
            json.loads((found[-1] / "trainer_state.json").read_text())
            load_file(found[-1] / "model.safetensors")
            for path in (*found[-1].glob("*.bin"), *found[-1].glob("*.pkl")):
                torch.load(path, weights_only=False)
        return True

    def is_exact(self, name: str, whole: str = "whole") -> bool:
        """Whether the run ended with the undisturbed one's weights, steps and losses."""
        found, expected = (load_file(self.folder / run / "model.safetensors") for run in (name, whole))
        same = found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        rows = [
            [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]
            for run in (name, whole)
        ]
        names = ("step", "loss", "caption_loss", "eval_caption_loss", "learning_rate")
        told = [[[row.get(key) for key in names] for row in group] for group in rows]
        return same and told[0] == told[1]


def kills(bench: Bench, times: int, moments: random.Random) -> dict:
    """One run, killed again and again, every second time while a checkpoint is being written."""
    number = survived = half_written = 0
    life, exact = 0.0, True
    while number < times:
        writing = number % 2 == 1
        process = bench.run("killed")
        started, since = time.monotonic(), time.time()
        if writing:
            while not bench.is_writing("killed", since) and process.poll() is None:
                time.sleep(0.0005)
            time.sleep(moments.uniform(0, 0.03))
            life = time.monotonic() - started
        else:
            # From the start of the process to a few steps after its first checkpoint.
            time.sleep(moments.uniform(0, 1.1 * life if life else 12))
        if process.poll() is not None:
            # It came to its end before the blow: one more that is compared, and the next begins anew.
            assert process.returncode == 0, bench.log("killed")[-2000:]
            exact = exact and bench.is_exact("killed")
            shutil.rmtree(bench.folder / "killed")
            continue
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        number += 1
        half_written += bench.is_writing("killed", since)
        survived += bench.newest_is_intact("killed")
    process = bench.run("killed")
    assert process.wait() == 0, bench.log("killed")[-2000:]
    assert half_written >= times // 4, f"only {half_written} kills came while a checkpoint was written"
    exact = exact and bench.is_exact("killed")
    note = f"{half_written} of them left a half-written checkpoint aside; the end is exact: {exact}"
    return {"times": times, "survived": survived if exact else 0, "note": note}


def terms(bench: Bench, times: int, moments: random.Random) -> dict:
    """SIGTERM in the loop: the step ends, a checkpoint is written, the exit status says why."""
    survived = 0
    for _ in range(times):
        process = bench.run("termed")
        bench.wait_for_step("termed", bench.step("termed") + moments.randrange(1, 8), process)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM, f"ended by itself: {process.returncode}"
        newest = complete_checkpoints(bench.folder / "termed")[-1]
        survived += bench.newest_is_intact("termed") and newest.name == f"checkpoint-{bench.step('termed')}"
    assert bench.run("termed").wait() == 0
    exact = bench.is_exact("termed")
    return {"times": times, "survived": survived if exact else 0, "note": f"no step lost; the end is exact: {exact}"}


def repeated(times: int, once) -> dict:
    """Runs `once(number)`, which says whether the run survived and what was seen."""
    found = [once(number) for number in range(times)]
    return {"times": times, "survived": sum(ok for ok, _ in found), "note": found[-1][1]}


def full_disk(bench: Bench, number: int) -> tuple[bool, str]:
    name = f"full-{number}"
    folder = bench.folder / name
    folder.mkdir()
    size = sum(path.stat().st_size for path in (bench.folder / "whole" / f"checkpoint-{STEPS}").iterdir())
    # Room for one checkpoint, half of another and the logs.
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size) + 65536}", "none", folder], check=True)
    try:
        code = bench.run(name).wait()
        assert code != 0 and "CheckpointWriteError" in bench.log(name), bench.log(name)[-2000:]
        intact = bench.newest_is_intact(name) and bool(complete_checkpoints(folder))
        subprocess.run(["mount", "-o", f"remount,size={20 * size}", folder], check=True)
        again = bench.run(name).wait()
        return intact and again == 0 and bench.is_exact(name), "says how much is free; goes on when there is room"
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def dead_worker(bench: Bench, number: int) -> tuple[bool, str]:
    name = f"worker-{number}"
    process = bench.run(name, "--dataloader_num_workers", "2")
    bench.wait_for_step(name, 9 + number, process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in workers if "train_distill" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) >= 2, workers
    os.kill(int(workers[number % 2]), signal.SIGKILL)
    code = process.wait(timeout=120)
    assert code != 0 and "DataLoader worker" in bench.log(name), bench.log(name)[-2000:]
    again = bench.run(name, "--dataloader_num_workers", "2").wait()
    return again == 0 and bench.is_exact(name), "the run ends and names the worker; resumed to the same weights"


def dead_process(bench: Bench, number: int) -> tuple[bool, str]:
    name = f"pair-{number}"
    if number == 0:
        assert bench.run("pair", processes=2).wait() == 0
    process = bench.run(name, processes=2)
    bench.wait_for_step(name, 9 + number, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[number % 2]), signal.SIGKILL)
    died = time.monotonic()
    code = process.wait(timeout=120)
    seconds = time.monotonic() - died
    assert code != 0 and "Signal 9" in bench.log(name), bench.log(name)[-2000:]
    again = bench.run(name, processes=2).wait()
    exact = bench.is_exact(name, "pair")
    return seconds < 60 and again == 0 and exact, f"the other ends after {seconds:.1f} s; resumed to the same weights"


def poisoned_batch(bench: Bench, number: int) -> tuple[bool, str]:
    name = f"nan-{number}"
    code = bench.run(name, patch=NAN_PATCH).wait()
    assert bench.happened(name).exists() and code != 0
    told = "NonFiniteLossError" in bench.log(name) and "step 21" in bench.log(name)
    newest = complete_checkpoints(bench.folder / name)[-1].name
    again = bench.run(name, patch=NAN_PATCH).wait()
    ok = told and newest == "checkpoint-20" and again == 0 and bench.is_exact(name)
    return ok, "stops at the step, names the photos; its last checkpoint is from before"


def jumping_clock(bench: Bench, number: int) -> tuple[bool, str]:
    name = f"clock-{number}"
    code = bench.run(name, patch=CLOCK_PATCH).wait()
    assert bench.happened(name).exists()
    rows = (bench.folder / name / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(row)["elapsed_seconds"] for row in rows]
    return code == 0 and bench.is_exact(name) and seconds == sorted(seconds), "set back a day: nothing changes"


def changed_data(bench: Bench, number: int) -> tuple[bool, str]:
    name = f"data-{number}"
    process = bench.run(name)
    bench.wait_for_step(name, 9, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.move(bench.photos, bench.folder / "kept")
    try:
        gone = bench.run(name).wait()
        bench.write_photos(bench.photos)
        rows = datasets.Dataset.from_parquet(str(bench.photos / "train.parquet"), cache_dir=str(bench.folder / "rows"))
        rows.select(range(number + 1, len(rows))).to_parquet(bench.photos / "train.parquet")
        changed = bench.run(name).wait()
        told = "expected the training photos that it was written with" in bench.log(name)
        shutil.rmtree(bench.photos)
    finally:
        shutil.move(bench.folder / "kept", bench.photos)
    assert gone != 0 and changed != 0
    again = bench.run(name).wait()
    ok = told and again == 0 and bench.is_exact(name)
    return ok, "gone or changed between two runs: refused; back again: the same weights"


def main() -> None:
    args = parse_args()
    moments = random.Random(args.seed)
    bench = Bench(Path(args.output_dir).resolve() / "runs")
    faults = {
        "SIGKILL, every second one while a checkpoint is written": lambda: kills(bench, args.kills, moments),
        "SIGTERM": lambda: terms(bench, args.terms, moments),
        "full disk while saving": lambda: repeated(args.times, lambda n: full_disk(bench, n)),
        "a loader's worker killed": lambda: repeated(args.times, lambda n: dead_worker(bench, n)),
        "one of two processes killed": lambda: repeated(args.times, lambda n: dead_process(bench, n)),
        "NaN in a batch": lambda: repeated(args.times, lambda n: poisoned_batch(bench, n)),
        "clock set back by a day": lambda: repeated(args.times, lambda n: jumping_clock(bench, n)),
        "data gone, then changed": lambda: repeated(args.times, lambda n: changed_data(bench, n)),
    }
    results = {**run_facts(), "faults": {}}
    lines = ["| fault | times | survived | lost | what was seen |", "|---|---|---|---|---|"]
    for fault, inject in faults.items():
        started = time.monotonic()
        found = inject()
        results["faults"][fault] = {**found, "minutes": (time.monotonic() - started) / 60}
        lost = found["times"] - found["survived"]
        lines.append(f"| {fault} | {found['times']} | {found['survived']} | {lost} | {found['note']} |")
        print(lines[-1], flush=True)
    save_results(args.output_dir, "training_faults", results, lines)
    shutil.rmtree(bench.folder)


if __name__ == "__main__":
    main()
