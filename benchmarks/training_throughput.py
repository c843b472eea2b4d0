"""Training speed and memory: the step of `train_distill.py` against the published loop of this design.

    python benchmarks/training_throughput.py --dataset_name my_images --output_dir outputs/throughput

The published loop (`reference.py`) and `train_distill.py`'s own data, objective and optimizer, with the teacher's
embeddings from the cache, take turns on the same images in windows of a few steps, after a warm-up. Both compute the
same losses (`tests/test_benchmarks.py`). Teacher and student have their published sizes and random weights, since speed
doesn't depend on them. Peak memory is that of a new process for each loop. Writes JSON and a Markdown table.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, get_scheduler

from benchmarks.reference import ReferenceCaptioner, as_pairs, reference_losses
from benchmarks.results import benchmark_parser, markdown_table, peak_memory_mb, save_results
from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.train_distill import joint_losses, train_step
from tinycap.training.augmentation import Augmentation
from tinycap.training.batches import CaptionCollator, CaptionDataset, EpochBatchSampler
from tinycap.training.data import SkippedRows, decode_dataset, load_split, resolve_columns
from tinycap.training.loop import StopSignals, steps_of
from tinycap.training.optimization import create_optimizer
from tinycap.training.repository import create_image_processor
from tinycap.training.student import enable_gradient_checkpointing
from tinycap.training.teacher import Teacher
from tinycap.training.teacher_cache import build_teacher_cache
from tinycap.training.tokenizer import train_tokenizer
from tinycap.training.train_batches import TrainBatches


IMAGE_SIZE, CAPTIONS_PER_IMAGE, SEED = 224, 5, 0


def parse_args() -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "training_throughput")
    parser.add_argument("--dataset_name", required=True, help="images with five captions each")
    parser.add_argument("--split", default="train", help="its split")
    parser.add_argument("--num_photos", type=int, default=512, help="images that the batches are drawn from")
    parser.add_argument("--batch_size", type=int, default=26, help="images of a step, with all their captions")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="train_distill.py's flag of this name")
    parser.add_argument("--reference_batch_size", type=int, default=128, help="pairs of a step of the published loop")
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[50257, 8192], help="sizes of the embedding")
    parser.add_argument("--steps", type=int, default=2, help="steps of a window")
    parser.add_argument("--windows", type=int, default=4, help="windows of each loop")
    parser.add_argument("--only", choices=LOOPS, help="measure the peak memory of this loop and print it, in MB")
    return parser.parse_args()


class Setup:
    """Images, tokenizer and teacher of both loops; the samples carry the teacher's cached embeddings."""

    def __init__(self, args: argparse.Namespace):
        rows = load_split(args.dataset_name, args.split).select(range(args.num_photos))
        columns = resolve_columns(rows, root=args.dataset_name)
        rows = decode_dataset(rows, columns, IMAGE_SIZE, SkippedRows(), args.split)
        captions = (caption for group in rows["captions"] for caption in group)
        # Also for larger embeddings, whose rows cost the same whether they are used or not.
        self.tokenizer = train_tokenizer(captions, min(8192, *args.vocab_sizes), 64)
        processor = create_image_processor(IMAGE_SIZE)
        self.collator = CaptionCollator(self.tokenizer, 32, processor.image_mean, processor.image_std)
        self.dataset = CaptionDataset(rows, IMAGE_SIZE, Augmentation(0.5, True, 0.2), CAPTIONS_PER_IMAGE, SEED)
        torch.manual_seed(SEED)
        # The defaults are the sizes of ViT-B/32.
        self.teacher = Teacher(CLIPVisionModelWithProjection(CLIPVisionConfig()))
        parts = (Accelerator(cpu=True), self.teacher, self.dataset, self.collator, args.output_dir / "teacher_cache")
        self.dataset.teacher_cache = build_teacher_cache(*parts, num_views=1, batch_size=32, num_workers=1)

    def model(self, vocab_size: int) -> TinyCapForConditionalGeneration:
        torch.manual_seed(SEED)
        ids = {name: getattr(self.tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        # Without dropout, whose masks the two loops can't share.
        text_config = {"vocab_size": vocab_size, "hidden_dropout_prob": 0.0, **ids}
        return TinyCapForConditionalGeneration(TinyCapConfig(text_config=text_config)).train()

    def batches(self, num_images: int) -> Iterator[dict]:
        """Batches of endless epochs, with the loader settings of the training script."""
        sampler = EpochBatchSampler(len(self.dataset), num_images, SEED, equal=True)
        options = {"collate_fn": self.collator, "num_workers": 1}
        batches = TrainBatches(DataLoader(self.dataset, batch_sampler=sampler, **options), torch.device("cpu"))
        for epoch in count():
            yield from batches.epoch(epoch)


def tinycap_steps(setup: Setup, vocab_size: int, args: argparse.Namespace) -> Iterator[dict]:
    """Optimizer steps of `train_distill.py`; yields the losses of each."""
    accelerator, model = Accelerator(cpu=True), setup.model(vocab_size)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    optimizer = create_optimizer(model, 1e-4, 0.01)
    trained = accelerator.prepare(model, optimizer, get_scheduler("constant", optimizer))
    step_args = argparse.Namespace(seed=SEED, gradient_accumulation_steps=1, max_grad_norm=1.0)
    steps = steps_of(accelerator, setup.batches(args.batch_size), 1, StopSignals())
    model = trained[0]

    def losses_of(batch: dict) -> dict[str, torch.Tensor]:
        return joint_losses(model, model, batch, batch["teacher_embeds"])

    for number, step in enumerate(steps, 1):
        step.number = number
        yield train_step(step_args, accelerator, *trained, losses_of, step)


def reference_steps(setup: Setup, vocab_size: int, args: argparse.Namespace) -> Iterator[dict]:
    """Optimizer steps of the published loop, on a few images with all their captions; yields the losses of each."""
    model = ReferenceCaptioner(setup.model(vocab_size)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    ids = setup.tokenizer.bos_token_id, setup.tokenizer.pad_token_id
    for batch in setup.batches(-(-args.reference_batch_size // CAPTIONS_PER_IMAGE)):
        losses = reference_losses(model, setup.teacher, as_pairs(batch, args.reference_batch_size), *ids)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield losses


LOOPS = {"reference": reference_steps, "tinycap": tinycap_steps}


def compare_speed(setup: Setup, vocab_size: int, args: argparse.Namespace) -> dict:
    """Median pairs a second of both loops, and the median ratio of adjacent windows."""
    pairs = {"reference": args.reference_batch_size, "tinycap": CAPTIONS_PER_IMAGE * args.batch_size}
    loops = {name: steps(setup, vocab_size, args) for name, steps in LOOPS.items()}
    windows = {name: [] for name in LOOPS}
    for loop in loops.values():
        next(loop)
    for _ in range(args.windows):
        for name, loop in loops.items():
            start = time.perf_counter()
            for _ in range(args.steps):
                next(loop)
            windows[name].append(args.steps * pairs[name] / (time.perf_counter() - start))
        print(vocab_size, ", ".join(f"{name} {rates[-1]:.1f} pairs/s" for name, rates in windows.items()), flush=True)
    ratios = [ours / published for published, ours in zip(windows["reference"], windows["tinycap"])]
    return {**windows, "speedup": statistics.median(ratios)}


def peak_memory(name: str) -> float:
    """Peak MB of a new process that takes steps of one loop, with this process's flags."""
    command = [sys.executable, *sys.argv, "--only", name]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.splitlines()[-1])


def main() -> None:
    args = parse_args()
    setup = Setup(args)
    if args.only:
        if args.only == "tinycap":
            setup.teacher = None
        # Restarts the peak after the teacher's cache (Linux; man 5 proc_pid_clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
        for _ in islice(LOOPS[args.only](setup, args.vocab_sizes[0], args), 3):
            pass
        print(peak_memory_mb())
        return
    results, rows = {"threads": torch.get_num_threads(), "vocab_sizes": {}}, []
    for vocab_size in args.vocab_sizes:
        found = results["vocab_sizes"][vocab_size] = compare_speed(setup, vocab_size, args)
        rates = (f"{statistics.median(found[name]):.1f}" for name in LOOPS)
        rows.append([f"{vocab_size:,}", *rates, f"{found['speedup']:.1f}"])
    memory = results["peak_memory_mb"] = {name: peak_memory(name) for name in LOOPS}
    header = ["vocabulary", "published loop, pairs/s", "TinyCap, pairs/s", "speed-up"]
    summary = f"Peak memory at {args.vocab_sizes[0]:,} tokens: published loop {memory['reference']:,.0f} MB, "
    lines = [*markdown_table(header, rows), "", f"{summary}TinyCap {memory['tinycap']:,.0f} MB."]
    save_results(args.output_dir, "training_throughput", results, lines)


if __name__ == "__main__":
    main()
