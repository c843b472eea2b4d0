"""What training on COCO or twelve million pairs would take on a node of eight GPUs, computed from what is measured.

    python benchmarks/scale_estimate.py --output_dir outputs/scale

Measured here: the floating-point operations of a photo and of a caption in a training step (torch's own counter), how
much of this CPU's matrix speed `train_distill.py`'s step reaches, and how many photos a core decodes and augments a
second. Assumed, and flags: the GPU's peak, what share of it so small a model reaches, the node's cores and price. The
node's time is that of the slower of its GPUs and its cores. Writes JSON and a Markdown table.
"""

import argparse
import io
import random
import statistics
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.results import run_facts, save_results
from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.train_distill import joint_losses
from tinycap.training.data import Augmentation, Columns, decode_row, make_sample, stored_size_for
from tinycap.training.optimization import create_optimizer


# Photos, captions of each, epochs.
RUNS = {
    "COCO, 118k photos, 30 epochs": (118_287, 5, 30),
    "12M pairs, 8 epochs": (12_000_000, 1, 8),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=8, help="of the node")
    parser.add_argument("--gpu_tflops", type=float, default=989.0, help="peak of one: H100 SXM, bf16 without sparsity")
    parser.add_argument("--gpu_shares", type=float, nargs=2, default=[0.05, 0.2], help="of it reached: low, high")
    parser.add_argument("--cores", type=int, default=96, help="of the node, for decoding")
    parser.add_argument("--price", type=float, default=25.0, help="of the node, dollars an hour")
    parser.add_argument("--vocab_size", type=int, default=8192, help="tokens of the captions' vocabulary")
    parser.add_argument("--caption_tokens", type=int, default=14, help="of a caption, the end token included")
    parser.add_argument("--output_dir", default="outputs/scale_estimate", help="where the results go")
    return parser.parse_args()


def batch_of(photos: int, captions: int, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(photos, 3, 224, 224),
        "labels": torch.randint(3, args.vocab_size, (photos * captions, args.caption_tokens)),
    }


def step_flops(model, photos: int, captions: int, args: argparse.Namespace) -> int:
    """Floating-point operations of one forward and backward pass."""
    batch, teacher_embeds = batch_of(photos, captions, args), torch.randn(photos, 768)
    with FlopCounterMode(display=False) as counter:
        joint_losses(model, model, batch, teacher_embeds)["loss"].backward()
    return counter.get_total_flops()


def cpu_share(model, captions: int, args: argparse.Namespace, photos: int = 16, rounds: int = 5) -> dict[str, float]:
    """Median GFLOP/s of the training step and of a large matrix product, interleaved, both in float32."""
    optimizer = create_optimizer(model, 1e-4, 0.01)
    batch, teacher_embeds = batch_of(photos, captions, args), torch.randn(photos, 768)
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    flops = step_flops(model, photos, captions, args)
    steps, products = [], []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        joint_losses(model, model, batch, teacher_embeds)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(flops / (time.perf_counter() - start) / 1e9)
        start = time.perf_counter()
        for _ in range(8):
            a @ b
        products.append(8 * 2 * 1536**3 / (time.perf_counter() - start) / 1e9)
    step, product = statistics.median(steps[1:]), statistics.median(products[1:])
    return {"step_gflops": step, "matmul_gflops": product, "share": step / product}


def photos_a_core(seconds: float = 4.0) -> dict[str, float]:
    """640 x 480 JPEGs that one core decodes to the cache, and samples that it draws from there, a second."""
    noise = numpy.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=numpy.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    row = {"image": {"bytes": buffer.getvalue(), "path": None}, "caption": "a caption"}
    columns, size = Columns("image", "caption"), stored_size_for(224)
    decoded = decode_row(row, 0, columns, size)
    augmentation = Augmentation(0.5, True, 0.2)
    work = {
        "decoded": lambda: decode_row(row, 0, columns, size),
        "drawn": lambda: make_sample(decoded, 224, augmentation, 1, random.Random(0), random.Random(0)),
    }
    rates = {}
    for name, function in work.items():
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            function()
            count += 1
        rates[name] = count / (time.perf_counter() - start)
    return rates


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    model = TinyCapForConditionalGeneration(TinyCapConfig(text_config={"vocab_size": args.vocab_size})).train()
    one, five = (step_flops(model, 2, captions, args) / 2 for captions in (1, 5))
    per_caption = (five - one) / 4
    per_photo = one - per_caption
    teacher = CLIPVisionModelWithProjection(CLIPVisionConfig()).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher(torch.randn(1, 3, 224, 224))
    per_teaching = counter.get_total_flops()
    cpu, core = cpu_share(model, 5, args), photos_a_core()
    peak = args.gpus * args.gpu_tflops * 1e12
    lines = [
        f"A photo costs the student {per_photo / 1e9:.1f} GFLOP in a training step, a caption the decoder "
        f"{per_caption / 1e9:.2f} and the teacher's look at a photo {per_teaching / 1e9:.1f}. In float32 the step "
        f"reaches {cpu['share']:.0%} of this CPU's matrix speed. A core decodes {core['decoded']:.0f} photos of "
        f"640 x 480 a second and draws {core['drawn']:.0f} samples from the cache.",
        "",
        "| run | EFLOP | GPUs, minutes | cores, minutes | node, minutes | dollars |",
        "|---|---|---|---|---|---|",
    ]
    runs = {}
    for name, (photos, captions, epochs) in RUNS.items():
        # The teacher is asked once for each of the cache's eight views, or once an epoch if there are fewer.
        flops = photos * (epochs * (per_photo + captions * per_caption) + min(8, epochs) * per_teaching)
        gpus = [flops / (peak * share) / 60 for share in reversed(args.gpu_shares)]
        # Small sets are decoded once, streamed ones every time.
        decodes, draws = (1 if photos < 1_000_000 else epochs) * photos, epochs * photos
        cores = (decodes / core["decoded"] + draws / core["drawn"]) / args.cores / 60
        node = [max(minutes, cores) for minutes in gpus]
        dollars = [minutes / 60 * args.price for minutes in node]
        runs[name] = {
            "flops": flops,
            "gpu_minutes": gpus,
            "core_minutes": cores,
            "node_minutes": node,
            "dollars": dollars,
        }
        lines.append(
            f"| {name} | {flops / 1e18:.2f} | {gpus[0]:.1f} to {gpus[1]:.1f} | {cores:.1f} "
            f"| {node[0]:.1f} to {node[1]:.1f} | {dollars[0]:.2f} to {dollars[1]:.2f} |"
        )
    low, high = args.gpu_shares
    lines += [
        "",
        f"Assumed: {args.gpus} GPUs of {args.gpu_tflops:.0f} TFLOP/s, {low:.0%} to {high:.0%} of it reached, "
        f"{args.cores} cores, {args.price:.0f} dollars an hour. Start-up, validation and checkpoints come on top.",
    ]
    results = {
        **run_facts(),
        "assumed": {name: value for name, value in vars(args).items() if name != "output_dir"},
        "flops": {"photo": per_photo, "caption": per_caption, "teacher": per_teaching},
        "cpu": cpu,
        "photos_a_core": core,
        "runs": runs,
    }
    save_results(args.output_dir, "scale_estimate", results, lines)


if __name__ == "__main__":
    main()
