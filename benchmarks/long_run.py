"""Whether memory, file handles and throughput stay flat over thousands of captions and of training steps.

    python benchmarks/long_run.py --output_dir outputs/long_run

Runs, each in a process of its own, 5,000 captions through the pipeline (files of several sizes and formats, some
broken, one call each) and 2,000 steps of `train_distill.main` on drawn scenes (a small model, no teacher, a loader
process, checkpoints and validations on the way). A thread samples resident memory, open file handles and progress.
Writes `long_run.json`, a Markdown table and `long_run.png`. Linux, for /proc.
"""

import argparse
import json
import multiprocessing
import os
import queue as queue_module
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy
import psutil

from tinycap.training.logs import write_json, write_text


# The beginning, in which caches fill, allocators grow and the first validation starts a second loader, is left out.
WARM_UP = 0.3
# Parts of all that is done in which throughput is taken: one after the warm-up, and the last.
EARLY, LATE = (0.3, 0.5), (0.8, 1.0)
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20
TINY_CONFIG = {
    "model_type": "tinycap",
    "vision_config": {
        "image_size": 48,
        "patch_size": 16,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "projection_dim": 64,
    },
    "text_config": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "max_position_embeddings": 40,
        "vocab_size": 512,
    },
}


class Sampler(threading.Thread):
    """Notes, until it is stopped: seconds, resident MB of this process and of its children, open handles, progress, and
    the processor time that this process took, seconds."""

    def __init__(self, progress: Callable[[], int], interval: float):
        super().__init__(daemon=True)
        self.progress, self.interval = progress, interval
        self.samples, self.done, self.started = [], threading.Event(), time.perf_counter()

    def run(self) -> None:
        process = psutil.Process()
        while not self.done.wait(self.interval):
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_MB
            children = 0.0
            for child in process.children(recursive=True):
                try:
                    children += child.memory_info().rss / 2**20
                except psutil.NoSuchProcess:
                    # A loader's worker, gone since it was listed.
                    continue
            handles = len(os.listdir("/proc/self/fd"))
            passed, worked = time.perf_counter() - self.started, time.process_time()
            self.samples.append((passed, resident, children, handles, self.progress(), worked))


def run_captions(args: argparse.Namespace, folder: Path) -> dict:
    """`args.num_captions` calls of the pipeline."""
    from PIL import Image
    from transformers import pipeline

    captioner = pipeline("image-to-text", model=args.model_name_or_path, trust_remote_code=True)
    rng = numpy.random.default_rng(0)
    paths = []
    for index in range(60):
        pixels = rng.integers(0, 256, (3 + index % 5, 4 + index % 7, 3), dtype=numpy.uint8)
        picture = Image.fromarray(pixels).resize((160 + 16 * index, 120 + 9 * index))
        path = folder / f"{index}.{('jpg', 'png', 'webp', 'gif')[index % 4]}"
        picture.save(path)
        if index % 20 == 19:
            path.write_bytes(path.read_bytes()[:200])
        paths.append(path)
    count = {"captions": 0, "errors": 0}
    sampler = Sampler(lambda: sum(count.values()), args.interval)
    sampler.start()
    for index in range(args.num_captions):
        try:
            captioner(str(paths[index % len(paths)]))
            count["captions"] += 1
        except ValueError:
            count["errors"] += 1
    sampler.done.set()
    sampler.join()
    return {"samples": sampler.samples, **count}


def run_training(args: argparse.Namespace, folder: Path) -> dict:
    """`args.num_steps` steps of `train_distill.main`."""
    from tinycap import train_distill

    write_json(folder / "config.json", TINY_CONFIG)
    output_dir, logged = folder / "run", 10
    metrics = output_dir / "metrics.jsonl"
    sampler = Sampler(lambda: logged * metrics.read_bytes().count(b'"images_per_second"') if metrics.exists() else 0,
                      args.interval)  # fmt: skip
    sampler.start()
    found = train_distill.main(
        [
            *("--output_dir", str(output_dir), "--config_name", str(folder / "config.json")),
            *("--distill_weight", "0", "--max_train_samples", "512", "--max_eval_samples", "64"),
            *("--per_device_train_batch_size", "16", "--captions_per_image", "2", "--image_size", "48"),
            *("--max_caption_length", "40", "--max_train_steps", str(args.num_steps), "--logging_steps", str(logged)),
            *("--checkpointing_steps", "200", "--evaluation_steps", "500", "--num_beams", "1"),
            *("--dataloader_num_workers", "1"),
        ]
    )
    sampler.done.set()
    sampler.join()
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return {
        "samples": [sample for sample in sampler.samples if sample[4]],
        "steps": args.num_steps,
        "images_per_second": [
            (row["step"], row["images_per_second"]) for row in rows if row.get("images_per_second") is not None
        ],
        "caption_loss": found["caption_loss"],
    }


def judge(found: dict) -> dict:
    """Slopes by least squares over what follows the warm-up, per 1,000 captions or steps."""
    samples = numpy.array(found["samples"])
    # What comes after the last step, a validation and the saving of the model, is no part of the course.
    samples = samples[: 1 + numpy.argmax(samples[:, 4] == samples[-1, 4])]
    kept = samples[samples[:, 4] >= WARM_UP * samples[-1, 4]]
    thousands = kept[:, 4] / 1000
    judged = {"num_samples": len(kept)}
    for column, name in ((1, "resident_mb"), (2, "children_mb"), (3, "handles")):
        judged[name] = {
            "first": float(kept[0, column]),
            "last": float(kept[-1, column]),
            "largest": float(kept[:, column].max()),
            "slope_per_thousand": float(numpy.polyfit(thousands, kept[:, column], 1)[0]),
        }
    # By processor time too, since other programs may run beside.
    speeds, walls = [], []
    for start, end in (EARLY, LATE):
        share = samples[:, 4] / samples[-1, 4]
        part = samples[(share >= start) & (share <= end)]
        done = part[-1, 4] - part[0, 4]
        speeds.append(float(done / (part[-1, 5] - part[0, 5])))
        walls.append(float(done / (part[-1, 0] - part[0, 0])))
    for name, (early, late) in (("per_processor_second", speeds), ("per_second", walls)):
        judged[name] = {"early": early, "late": late, "ratio": late / early}
    return judged


def plot(results: dict, path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, len(results), figsize=(10, 7), squeeze=False, sharex="col")
    for column, (name, found) in enumerate(results.items()):
        samples = numpy.array(found["samples"])
        axes[0, column].plot(samples[:, 4], samples[:, 1], label="process")
        if samples[:, 2].any():
            axes[0, column].plot(samples[:, 4], samples[:, 2], label="loader processes")
            axes[0, column].legend()
        axes[1, column].plot(samples[:, 4], samples[:, 3])
        step = max(1, len(samples) // 40)
        coarse = samples[::step]
        axes[2, column].plot(coarse[1:, 4], numpy.diff(coarse[:, 4]) / numpy.diff(coarse[:, 5]))
        axes[0, column].set_title(name)
        axes[2, column].set_xlabel(name)
        for row, label in enumerate(("resident memory, MB", "open file handles", f"{name} a processor second")):
            axes[row, column].set_ylabel(label)
            axes[row, column].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def in_child(function: Callable, args: argparse.Namespace, folder: Path, queue) -> None:
    queue.put(function(args, folder))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model_name_or_path", default=".", help="a TinyCap repository, for the captions")
    parser.add_argument("--num_captions", type=int, default=5000, help="calls of the pipeline; 0: none")
    parser.add_argument("--num_steps", type=int, default=2000, help="training steps; 0: none")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between samples")
    parser.add_argument("--output_dir", default="outputs/long_run", help="where the results go")
    args = parser.parse_args()
    output_dir = Path(args.output_dir)
    results = {}
    context = multiprocessing.get_context("spawn")
    for name, function, count in (
        ("captions", run_captions, args.num_captions),
        ("steps", run_training, args.num_steps),
    ):
        if not count:
            continue
        folder = output_dir / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        queue = context.Queue()
        process = context.Process(target=in_child, args=(function, args, folder, queue))
        process.start()
        while True:
            try:
                found = queue.get(timeout=5)
                break
            except queue_module.Empty:
                if not process.is_alive():
                    sys.exit(f"long_run.py: error: the process of {name} ended with {process.exitcode}")
        process.join()
        results[name] = {**found, "judged": judge(found)}
    write_json(output_dir / "long_run.json", results)
    plot(results, output_dir / "long_run.png")
    lines = [
        "| run | done | resident MB, first to last | slope, MB per 1,000 | handles, first to last | slope per 1,000 "
        "| done in a processor second, from 30 to 50 % of the run | in its last 20 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        judged = found["judged"]
        memory, handles, speed = judged["resident_mb"], judged["handles"], judged["per_processor_second"]
        lines.append(
            f"| {name} | {found['samples'][-1][4]:,} | {memory['first']:.0f} to {memory['last']:.0f} "
            f"| {memory['slope_per_thousand']:+.2f} | {handles['first']:.0f} to {handles['last']:.0f} "
            f"| {handles['slope_per_thousand']:+.2f} | {speed['early']:.1f} | {speed['late']:.1f} |"
        )
    write_text(output_dir / "long_run.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
