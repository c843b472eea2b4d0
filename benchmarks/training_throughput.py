"""Pairs of photo and caption a second, memory and where the time goes: `train_distill.py` against the published loop.

    python benchmarks/training_throughput.py --dataset_name my_photos --output_dir outputs/throughput

The published loop (`reference.py`) and `train_distill.py`'s own (its data, objective and optimizer, the teacher's
embeddings from the cache) take turns on the same photos, in one run, after a warm-up. Teacher and student have their
published sizes; weights are random, since speed doesn't depend on them. Memory is that of a process of its own for each
loop. Writes JSON, a Markdown table and a plot.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import torch
from accelerate import Accelerator
from reference import ReferenceCaptioner, as_pairs, reference_losses
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, get_scheduler

from benchmarks.results import benchmark_parser, run_facts, save_results
from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.evaluation.reports import plot_bars
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.train_distill import joint_losses
from tinycap.training.batches import Augmentation, CaptionCollator, CaptionDataset, EpochBatchSampler
from tinycap.training.data import SkippedRows, content_fingerprint, decode_dataset, load_split, resolve_columns
from tinycap.training.loop import StopSignals, TrainBatches, steps_of, train_step
from tinycap.training.optimization import create_optimizer
from tinycap.training.repository import create_image_processor
from tinycap.training.student import enable_gradient_checkpointing
from tinycap.training.teacher import Teacher
from tinycap.training.teacher_cache import build_teacher_cache
from tinycap.training.tokenizer import train_tokenizer


IMAGE_SIZE = 224
SEED = 0


def parse_args() -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "training_throughput")
    parser.add_argument("--dataset_name", required=True, help="photos with five captions each")
    parser.add_argument("--split", default="train", help="its split")
    parser.add_argument("--num_photos", type=int, default=512, help="photos that the batches are drawn from")
    parser.add_argument("--batch_size", type=int, default=26, help="photos in a step of ours, with all their captions")
    parser.add_argument(
        "--gradient_checkpointing", action="store_true", help="ours as train_distill.py's flag of this name"
    )
    parser.add_argument("--reference_batch_size", type=int, default=128, help="pairs in a step of the reference")
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[50257, 8192], help="sizes of the embedding")
    parser.add_argument("--steps", type=int, default=2, help="steps of a window")
    parser.add_argument("--windows", type=int, default=4, help="windows of each loop")
    parser.add_argument("--only", choices=("reference", "tinycap"), help="one loop, for its peak memory")
    return parser.parse_args()


class Set:
    """Photos, tokenizer and teacher that both loops share; batches of ours carry the teacher's embeddings."""

    def __init__(self, args: argparse.Namespace):
        rows = load_split(args.dataset_name, args.split).select(range(args.num_photos))
        columns = resolve_columns(rows)
        decoded = decode_dataset(rows, columns, IMAGE_SIZE, SkippedRows(), args.split)
        captions = (caption for group in decoded["captions"] for caption in group)
        # Its tokens serve both sizes of embedding: what isn't used costs all the same.
        self.tokenizer = train_tokenizer(captions, min(8192, *args.vocab_sizes), 64)
        processor = create_image_processor(IMAGE_SIZE)
        self.collator = CaptionCollator(self.tokenizer, 32, processor.image_mean, processor.image_std)
        self.dataset = CaptionDataset(decoded, IMAGE_SIZE, Augmentation(0.5, True, 0.2), 5, SEED)
        torch.manual_seed(SEED)
        # The defaults are ViT-B/32's sizes.
        self.teacher = Teacher(CLIPVisionModelWithProjection(CLIPVisionConfig()))

    def model(self, vocab_size: int) -> TinyCapForConditionalGeneration:
        torch.manual_seed(SEED)
        ids = {name: getattr(self.tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        # Without dropout, whose masks two loops can't share.
        text_config = {"vocab_size": vocab_size, "hidden_dropout_prob": 0.0, **ids}
        return TinyCapForConditionalGeneration(TinyCapConfig(text_config=text_config))

    def batches(self, num_photos: int):
        """Batches without end, by the training script's own loader settings."""
        sampler = EpochBatchSampler(len(self.dataset), num_photos, SEED, equal=True)
        options = {"collate_fn": self.collator, "num_workers": 1, "persistent_workers": True}
        batches = TrainBatches(DataLoader(self.dataset, batch_sampler=sampler, **options), torch.device("cpu"))
        for epoch in count():
            yield from batches.epoch(epoch)


class Loop:
    """Steps of one of the two loops, and the seconds that each stage took."""

    def __init__(self, data: Set, vocab_size: int, num_photos: int, pairs_a_step: int):
        self.data = data
        self.pairs_a_step = pairs_a_step
        self.seconds = {"waiting": 0.0, "forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        self.batches = data.batches(num_photos)
        self.prepare(data.model(vocab_size).train())

    def timed(self, stage: str, function):
        """`function`, whose time counts as `stage`'s."""

        def run(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[stage] += time.perf_counter() - start
            return result

        return run

    def window(self, steps: int) -> float:
        """Pairs a second over `steps` steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        return steps * self.pairs_a_step / (time.perf_counter() - start)

    def shares(self) -> dict[str, float]:
        """What part of the steps' time each stage took."""
        total = sum(self.seconds.values())
        return {stage: seconds / total for stage, seconds in self.seconds.items()}


class OurLoop(Loop):
    """`train_distill.py`'s own step, from `steps_of` to the optimizer."""

    name = "tinycap"

    def __init__(self, data: Set, vocab_size: int, args: argparse.Namespace):
        self.args = argparse.Namespace(**vars(args), seed=SEED, gradient_accumulation_steps=1, max_grad_norm=1.0)
        super().__init__(data, vocab_size, args.batch_size, 5 * args.batch_size)

    def prepare(self, model) -> None:
        self.accelerator = Accelerator(cpu=True)
        if self.args.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        optimizer = create_optimizer(model, 1e-4, 0.01)
        scheduler = get_scheduler("constant", optimizer)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.steps = steps_of(self.accelerator, self.batches, 1, StopSignals())
        self.accelerator.backward = self.timed("backward", self.accelerator.backward)
        self.optimizer.step = self.timed("optimizer", self.optimizer.step)
        self.losses = self.timed(
            "forward", lambda batch: joint_losses(self.model, self.model, batch, batch["teacher_embeds"])
        )

    def step(self) -> None:
        step = next(self.steps)
        self.seconds["waiting"] += step.waited
        train_step(self.args, self.accelerator, self.model, self.optimizer, self.scheduler, self.losses, step)


class ReferenceLoop(Loop):
    """The published step; a batch of pairs is a few photos with all their captions, the same samples as ours."""

    name = "reference"

    def __init__(self, data: Set, vocab_size: int, args: argparse.Namespace):
        super().__init__(data, vocab_size, args.reference_batch_size // 5 + 1, args.reference_batch_size)

    def prepare(self, model) -> None:
        self.model = ReferenceCaptioner(model).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.01)
        self.next_batch = self.timed("waiting", lambda: next(self.batches))
        self.forward = self.timed("forward", self.losses)
        self.backward = self.timed("backward", lambda loss: loss.backward())
        self.update = self.timed("optimizer", self.optimizer.step)

    def losses(self, batch: dict) -> dict[str, torch.Tensor]:
        pairs = {key: value[: self.pairs_a_step] for key, value in as_pairs(batch).items() if torch.is_tensor(value)}
        tokenizer = self.data.tokenizer
        return reference_losses(self.model, self.data.teacher, pairs, tokenizer.bos_token_id, tokenizer.pad_token_id)

    def step(self) -> None:
        self.backward(self.forward(self.next_batch())["loss"])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.update()
        self.optimizer.zero_grad()


LOOPS = {loop.name: loop for loop in (ReferenceLoop, OurLoop)}


def largest_loss_difference(data: Set, vocab_size: int, steps: int = 3) -> float:
    """Largest difference of any named loss over the first steps on the same batches, each loop taking its own steps."""
    ours = data.model(vocab_size).train()
    reference = ReferenceCaptioner(data.model(vocab_size)).train()
    ids = data.tokenizer.bos_token_id, data.tokenizer.pad_token_id
    # The same optimizer for both: what is compared is the objective.
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0) for model in (ours, reference)]
    batches, largest = data.batches(6), 0.0
    for _ in range(steps):
        batch = next(batches)
        pairs = {key: value for key, value in as_pairs(batch).items() if torch.is_tensor(value)}
        found = [
            joint_losses(ours, ours, batch, batch["teacher_embeds"]),
            reference_losses(reference, data.teacher, pairs, *ids),
        ]
        largest = max(largest, *(abs(found[0][name] - found[1][name]).item() for name in found[0]))
        for optimizer, losses in zip(optimizers, found):
            losses["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    return largest


def peak_memory(name: str, args: argparse.Namespace) -> dict[str, float]:
    """MB that one process of its own held at most, and held before its first step."""
    command = [sys.executable, __file__, "--only", name, "--dataset_name", args.dataset_name, "--split", args.split]
    for flag in ("num_photos", "batch_size", "reference_batch_size"):
        command += [f"--{flag}", str(getattr(args, flag))]
    command += ["--vocab_sizes", str(args.vocab_sizes[0]), "--output_dir", args.output_dir]
    command += ["--gradient_checkpointing"] * args.gradient_checkpointing
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def memory_of_this_process(name: str) -> float:
    """MB resident, now (`VmRSS`) or at most (`VmHWM`); `getrusage` would count what the parent process held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status: expected a line {name}")


def reset_peak_of_this_process() -> None:
    """Lets `VmHWM` begin anew (Linux: man 5 proc, clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    args = parse_args()
    data = Set(args)
    cache_dir = Path(args.output_dir) / "teacher_cache"
    data.dataset.teacher_cache = build_teacher_cache(
        Accelerator(cpu=True),
        data.teacher,
        data.dataset,
        data.collator,
        cache_dir,
        1,
        32,
        content_fingerprint(data.dataset.rows),
        num_workers=1,
    )
    if args.only:
        if args.only == "tinycap":
            # As in a run that has its cache.
            data.teacher = None
        loop = LOOPS[args.only](data, args.vocab_sizes[0], args)
        before = memory_of_this_process("VmRSS")
        # The teacher's forward passes are behind us.
        reset_peak_of_this_process()
        loop.window(3)
        peak = memory_of_this_process("VmHWM")
        print(json.dumps({"before_mb": before, "peak_mb": peak, "steps_mb": peak - before}))
        return

    results = {
        **run_facts(),
        "vocab_sizes": {},
    }
    for vocab_size in args.vocab_sizes:
        found = {"largest_loss_difference": largest_loss_difference(data, vocab_size)}
        loops = [loop(data, vocab_size, args) for loop in LOOPS.values()]
        rates = {loop.name: [] for loop in loops}
        for loop in loops:
            loop.window(1)
            loop.seconds = dict.fromkeys(loop.seconds, 0.0)
        for _ in range(args.windows):
            for loop in loops:
                rates[loop.name].append(loop.window(args.steps))
                print(vocab_size, loop.name, f"{rates[loop.name][-1]:.1f} pairs/s", flush=True)
        for loop in loops:
            found[loop.name] = {
                "pairs_per_second": statistics.median(rates[loop.name]),
                "windows": rates[loop.name],
                "shares": loop.shares(),
            }
        ratios = [b / a for a, b in zip(rates["reference"], rates["tinycap"])]
        found["speedup"] = statistics.median(ratios)
        results["vocab_sizes"][vocab_size] = found
    results["memory"] = {name: peak_memory(name, args) for name in ("reference", "tinycap")}
    write_results(Path(args.output_dir), results)


def write_results(output_dir: Path, results: dict) -> None:
    """JSON, a Markdown table and a plot."""
    reference, ours = results["memory"]["reference"], results["memory"]["tinycap"]
    lines = [
        "| vocabulary | published loop, pairs/s | TinyCap, pairs/s | speed-up | waiting for data | losses differ by |",
        "|---|---|---|---|---|---|",
    ]
    for vocab_size, found in results["vocab_sizes"].items():
        lines.append(
            f"| {vocab_size:,} | {found['reference']['pairs_per_second']:.1f} "
            f"| {found['tinycap']['pairs_per_second']:.1f} | {found['speedup']:.1f} "
            f"| {found['tinycap']['shares']['waiting']:.1%} | {found['largest_loss_difference']:.0e} |"
        )
    lines += ["", "| share of a step | waiting | forward | backward | optimizer |", "|---|---|---|---|---|"]
    for vocab_size, found in results["vocab_sizes"].items():
        for name, title in (("reference", "published loop"), ("tinycap", "TinyCap")):
            shares = " | ".join(f"{share:.1%}" for share in found[name]["shares"].values())
            lines.append(f"| {title}, {vocab_size:,} tokens | {shares} |")
    lines += [
        "",
        f"Peak memory: {reference['peak_mb']:,.0f} MB published, {ours['peak_mb']:,.0f} MB ours; of the steps alone "
        f"{reference['steps_mb']:,.0f} MB and {ours['steps_mb']:,.0f} MB.",
    ]
    save_results(output_dir, "training_throughput", results, lines)
    bars = {
        f"{name}, {vocab_size:,} tokens": found[name]["pairs_per_second"]
        for vocab_size, found in results["vocab_sizes"].items()
        for name in ("reference", "tinycap")
    }
    plot_bars(bars, output_dir / "training_throughput.png", "pairs of photo and caption a second")


if __name__ == "__main__":
    main()
