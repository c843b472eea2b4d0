"""Checks and measures training and captioning on a GPU, without a network and in a few minutes.

    python benchmarks/gpu.py --output_dir outputs/gpu
    python benchmarks/gpu.py --smoke --output_dir outputs/smoke

Images, captions and teacher are made up in seconds; the captioner is the released checkpoint. Each part (`--parts`, the
functions named `measure_`) is measured by itself: one that fails leaves its error in the results, and the script ends
with status 1. `--smoke` takes tiny sizes, also on a CPU. Writes JSON and a Markdown table after each part.
"""

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.reference import Floor
from benchmarks.results import benchmark_parser, markdown_table, save_results
from tinycap import REPOSITORY
from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.evaluation.captioning import load_captioner
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.train_distill import joint_losses, teacher_embeddings
from tinycap.training.augmentation import Augmentation
from tinycap.training.batches import CaptionCollator, CaptionDataset
from tinycap.training.data import Columns, cache_size, decode_dataset
from tinycap.training.device_images import DevicePixels, augments_on, load_images
from tinycap.training.loop import Step, train_step
from tinycap.training.optimization import create_optimizer
from tinycap.training.repository import create_image_processor
from tinycap.training.skipped_rows import SkippedRows
from tinycap.training.teacher import Teacher
from tinycap.training.tokenizer import load_tokenizer


FULL = {"images": 8192, "image_size": 224, "batch": 512, "epochs": 5, "workers": 8, "repeats": 8, "captions": 64}
SMOKE = {"images": 24, "image_size": 32, "batch": 8, "epochs": 2, "workers": 0, "repeats": 1, "captions": 2}
TINY = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
AUGMENTATION = {"crop_scale": 0.25, "horizontal_flip": True, "color_jitter": 0.3, "mixup": 0.75, "cutmix": 0.33}
MAX_CAPTION_LENGTH, NUM_TOKENS = 24, 16
OPTIMIZER = "muon" if hasattr(torch.optim, "Muon") else "adamw"


def draw_photo(seed: int, width: int, height: int) -> Image.Image:
    """An image with large shapes, edges and fine detail."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    blocks = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height), 0)
    pixels = np.asarray(Image.blend(coarse, blocks, 0.4), np.int16) + rng.integers(-12, 13, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


class Setup:
    """Synthetic data, a teacher with random weights of ViT-B/32's size, tokenizer and device."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.sizes, self.folder, self.is_smoke = SMOKE if args.smoke else FULL, folder, args.smoke
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision)
        self.device, self.precision = self.accelerator.device, args.mixed_precision
        self.tokenizer = load_tokenizer(str(REPOSITORY))
        processor = create_image_processor(self.sizes["image_size"])
        self.statistics = (processor.image_mean, processor.image_std)
        self.collator = CaptionCollator(self.tokenizer, MAX_CAPTION_LENGTH, *self.statistics)
        self.data, self.config_name = folder / "photos", folder / "config.json"
        self.write_photos()
        self.teacher_name = args.teacher_name_or_path or self.save_teacher()
        tiny = {"vision_config": {**TINY, "image_size": 32}, "text_config": TINY} if args.smoke else {}
        self.config_name.write_text(json.dumps(tiny))

    def write_photos(self) -> None:
        """JPEGs with five captions each: some hundred images, each file distinct by the bytes after its end."""
        side, rng = cache_size(self.sizes["image_size"]), random.Random(0)
        words = [word for word in map(self.tokenizer.decode, range(len(self.tokenizer))) if word.strip().isalpha()]
        files = []
        for seed in range(min(256, self.sizes["images"])):
            buffer = io.BytesIO()
            draw_photo(seed, *((side, side * 4 // 3) if seed % 3 else (side * 4 // 3, side))).save(buffer, "JPEG")
            files.append(buffer.getvalue())
        self.data.mkdir()
        for split, number in (("train", self.sizes["images"]), ("validation", self.sizes["captions"])):
            contents = [files[row % len(files)] + f"{split} {row}".encode() for row in range(number)]
            captions = [[" ".join(rng.choices(words, k=11)) for _ in range(5)] for _ in range(number)]
            columns = {"image": [{"bytes": content, "path": None} for content in contents], "captions": captions}
            rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
            rows.to_parquet(self.data / f"{split}.parquet")

    def save_teacher(self) -> Path:
        folder = self.folder / "teacher"
        torch.manual_seed(0)
        sizes = {**TINY, "image_size": 32} if self.is_smoke else {}
        CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=768, **sizes)).save_pretrained(folder)
        return folder

    def dataset(self) -> tuple[CaptionDataset, DevicePixels]:
        """A batch of training images with a caption each, which lie on the device if it is a GPU."""
        rows = datasets.Dataset.from_parquet(str(self.data / "train.parquet"), cache_dir=str(self.folder / "cache"))
        rows, size = rows.select(range(min(self.sizes["batch"], len(rows)))), self.sizes["image_size"]
        rows = decode_dataset(rows, Columns("image", "captions"), size, SkippedRows(), "train")
        dataset = CaptionDataset(rows, size, Augmentation(**AUGMENTATION), 1, on_device=True)
        pixels = DevicePixels(size)
        if augments_on(self.device):
            pixels.images, dataset.offsets = load_images(rows, self.device)
        return dataset, pixels

    def model(self) -> TinyCapForConditionalGeneration:
        torch.manual_seed(0)
        ids = {name: getattr(self.tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        values = json.loads(self.config_name.read_text())
        text = {**values.get("text_config", {}), "vocab_size": len(self.tokenizer), "hidden_dropout_prob": 0.0, **ids}
        vision = {**values.get("vision_config", {}), "projection_dim": 768}
        return TinyCapForConditionalGeneration(TinyCapConfig(vision_config=vision, text_config=text)).train()

    def teacher(self) -> Teacher:
        return Teacher.from_pretrained(str(self.teacher_name), "projected", *self.statistics).to(self.device)

    def train(self, name: str, *flags: object, launch: tuple[str, ...] = ()) -> Path:
        """Runs `train_distill.py` in a process of its own; returns its output folder."""
        out, sizes = self.folder / name, self.sizes
        argv = ["--dataset_name", self.data, "--config_name", self.config_name, "--tokenizer_name", REPOSITORY]
        argv += ["--teacher_name_or_path", self.teacher_name, "--teacher_feature", "projected", "--num_beams", 1]
        argv += ["--max_caption_length", MAX_CAPTION_LENGTH, "--optimizer", OPTIMIZER, "--captions_per_image", 1]
        argv += ["--per_device_train_batch_size", sizes["batch"], "--num_train_epochs", sizes["epochs"]]
        argv += ["--dataloader_num_workers", sizes["workers"], "--preprocessing_num_workers", sizes["workers"] or 1]
        argv += ["--logging_steps", 2, "--output_dir", out, "--mixed_precision", self.precision, *flags]
        for flag, value in AUGMENTATION.items():
            argv += [f"--{flag}"] if value is True else [f"--{flag}", value]
        run_training(list(map(str, argv)), launch)
        return out


def run_training(argv: list[str], launch: tuple[str, ...]) -> None:
    """`accelerate launch train_distill.py` with these flags; its output is shown."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no"] if "--mixed_precision" not in launch else []
    command += [*(() if "--dynamo_backend" in launch else ("--dynamo_backend", "no")), *launch]
    status = subprocess.run([*command, str(REPOSITORY / "train_distill.py"), *argv], check=False).returncode
    if status != 0:
        raise RuntimeError(f"train_distill.py: expected exit status 0, got {status}; its output is above")


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Mean seconds of a call, after one that isn't counted."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - started) / repeats


def on_device(batch: dict, pixels: DevicePixels, device: torch.device) -> dict:
    """A collated batch with its pixels, on the device."""
    moved = send_to_device(batch, device)
    return {**moved, "pixel_values": pixels(moved["views"])}


# --- parts ------------------------------------------------------------------------------------------------------------


def measure_numerics(setup: Setup) -> dict:
    """Grey levels between the device's crops and Pillow's; losses of a step; captions in half precision."""
    (dataset, pixels), count = setup.dataset(), min(64, setup.sizes["batch"])
    batch = on_device(setup.collator([dataset[row] for row in range(count)]), pixels, setup.device)
    dataset = dataset.in_size(dataset.image_size)
    expected = setup.collator([dataset[row] for row in range(count)])
    difference = 255 * (batch["pixel_values"].cpu() - expected["pixel_values"]) * setup.collator.image_std.view(3, 1, 1)
    results = {"grey_levels_mean": difference.abs().mean().item(), "grey_levels_max": difference.abs().max().item()}
    losses, teacher, model = {}, setup.teacher(), setup.model()
    for name, device, precision in (
        ("cpu", torch.device("cpu"), None),
        ("device", setup.device, None),
        ("device bf16", setup.device, torch.bfloat16),
    ):
        moved = {key: expected[key].to(device) for key in ("pixel_values", "labels", "captioned")}
        with torch.autocast(device.type, precision, enabled=precision is not None):
            target = teacher_embeddings(teacher.to(device), moved)
            loss = joint_losses(model.to(device), model, moved, target)["loss"]
        losses[name] = loss.item()
    results["losses"] = losses
    model, processor = load_captioner(str(REPOSITORY))
    photos = [draw_photo(seed, 300, 240) for seed in range(setup.sizes["captions"])]
    photos += [Image.open(path).convert("RGB") for path in sorted((REPOSITORY / "docs" / "photos").glob("*.jpg"))]
    pixels = processor.image_processor(photos, return_tensors="pt").pixel_values
    expected = model.generate(pixels, num_beams=1)
    results["captions"] = len(photos)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = model.to(setup.device, dtype).generate(pixels.to(setup.device, dtype), num_beams=1).cpu()
        texts = [processor.batch_decode(ids, skip_special_tokens=True) for ids in (expected, found)]
        results[f"same_captions_{str(dtype)[6:]}"] = sum(map(str.__eq__, *texts))
        model.float().cpu()
    return results


def measure_resume(setup: Setup) -> dict:
    """The largest difference between the weights of a resumed run and an uninterrupted one."""
    steps = 6
    flags = ("--max_train_steps", steps, "--checkpointing_steps", steps // 2, "--num_warmup_steps", 1)
    out = setup.train("resume", *flags)
    whole = load_file(out / "model.safetensors")
    setup.train("resume", *flags, "--resume_from_checkpoint", out / f"checkpoint-{steps // 2}")
    resumed = load_file(out / "model.safetensors")
    difference = max((whole[name] - resumed[name]).abs().max().item() for name in whole)
    return {"steps": steps, "weights_max_difference": difference}


def measure_teacher(setup: Setup) -> dict:
    """Photos a second of the teacher alone, as it is and compiled."""
    results, sizes = {}, setup.sizes
    pixels = torch.rand(sizes["batch"], 3, sizes["image_size"], sizes["image_size"], device=setup.device)
    for name in ("eager", "compiled")[: 1 if setup.is_smoke else 2]:
        teacher = setup.teacher()
        if name == "compiled":
            teacher.compile()

        def embed(teacher=teacher) -> None:
            with setup.accelerator.autocast():
                teacher(pixels)

        results[f"{name}_photos_per_second"] = sizes["batch"] / seconds_of(embed, setup.device, sizes["repeats"])
    return results


def measure_step(setup: Setup) -> dict:
    """Photos a second of augmentation alone, of the loader's work in one process, and of optimizer steps; on a GPU also
    how often a step waits for it."""
    sizes, (dataset, pixels), teacher = setup.sizes, setup.dataset(), setup.teacher()
    rows = range(len(dataset))
    started = time.perf_counter()
    collated = setup.collator([dataset[row] for row in rows])
    results = {"loader_photos_per_second": len(dataset) / (time.perf_counter() - started)}
    place = (pixels, setup.device)
    seconds = seconds_of(lambda: on_device(collated, *place), setup.device, sizes["repeats"])
    results["augmentation_photos_per_second"] = len(dataset) / seconds
    batch = on_device(collated, *place)
    model = setup.model()
    optimizer = create_optimizer(model, 1e-3, 0.05, OPTIMIZER)
    model, optimizer = setup.accelerator.prepare(model, optimizer)
    schedule = torch.optim.lr_scheduler.ConstantLR(getattr(optimizer, "optimizer", optimizer), 1.0)
    args = argparse.Namespace(seed=0, gradient_accumulation_steps=1, max_grad_norm=1.0)

    def take(with_teacher: bool) -> None:
        def losses_of(batch: dict) -> dict:
            with setup.accelerator.autocast():
                target = teacher(batch["pixel_values"]) if with_teacher else embeds
                return joint_losses(model, setup.accelerator.unwrap_model(model), batch, target)

        step = Step([batch], [1.0], [1.0], len(dataset), 0, 0.0, 0.0)
        train_step(args, setup.accelerator, model, optimizer, schedule, losses_of, step)

    embeds = torch.nn.functional.normalize(torch.rand(len(dataset), 768, device=setup.device), dim=-1)
    for name, with_teacher in (("bare_step", False), ("step_with_teacher", True)):
        seconds = seconds_of(lambda: take(with_teacher), setup.device, sizes["repeats"])  # noqa: B023
        results[f"{name}_photos_per_second"] = len(dataset) / seconds
    if setup.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            take(True)
        torch.cuda.set_sync_debug_mode("default")
        results["waits_in_a_step"] = [f"{Path(found.filename).name}:{found.lineno}" for found in caught]
        results["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return results


def summarize_log(path: Path, images: int, batch: int, skipped_epochs: int = 0) -> dict:
    """Photos a second and the share of waiting, from the second row of a run's log on: the first has the start-up.
    The rows of the first `skipped_epochs` are left out.

    `waiting_at_epochs` is that of the rows in which an epoch of `images` begins.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    epoch = -(-images // batch)
    rows = [row for row in rows if "waiting_share" in row and row["step"] >= skipped_epochs * epoch]
    spans = [(row["step"], later["step"]) for row, later in zip(rows, rows[1:])]
    seconds = [later["elapsed_seconds"] - row["elapsed_seconds"] for row, later in zip(rows, rows[1:])]
    waiting = [row["waiting_share"] for row in rows[1:]]
    at_epochs = [share for share, (before, last) in zip(waiting, spans) if (before - 1) // epoch < (last - 1) // epoch]
    return {
        "photos_per_second": (spans[-1][1] - spans[0][0]) * images / epoch / sum(seconds),
        "waiting_share": sum(map(float.__mul__, waiting, seconds)) / sum(seconds),
        "waiting_at_epochs": sum(at_epochs) / max(1, len(at_epochs)),
    }


def measure_training(setup: Setup, *launch: str) -> dict:
    """`train_distill.py` itself, over whole epochs; with flags of the launcher without the first, which compiles."""
    out = setup.train(launch[-1] if launch else "training", "--checkpointing_steps", 10**6, launch=launch)
    sizes = (setup.sizes["images"], setup.sizes["batch"])
    return summarize_log(out / "metrics.jsonl", *sizes, skipped_epochs=1 if launch else 0)


def measure_inductor(setup: Setup) -> dict:
    """The same, compiled by accelerate."""
    return measure_training(setup, "--dynamo_backend", "inductor")


def measure_generate(setup: Setup) -> dict:
    """Images a second with captions of 16 tokens: `generate()` and the loop by hand, in three precisions."""
    model, _ = load_captioner(str(REPOSITORY))
    size, results = model.config.vision_config.image_size, {}
    options = {"num_beams": 1, "max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        floor = Floor(model.to(setup.device, dtype))
        for batch in (1, setup.sizes["captions"]):
            pixels = torch.rand(batch, 3, size, size, device=setup.device, dtype=dtype)
            calls = {
                "generate": partial(model.generate, pixels, **options),
                "floor": partial(floor, pixels, NUM_TOKENS),
            }
            for name, call in calls.items():
                seconds = seconds_of(call, setup.device, setup.sizes["repeats"])
                results[f"{name}_{str(dtype)[6:]}_batch_{batch}_images_per_second"] = batch / seconds
        model.float()
    return results


PARTS: dict[str, Callable[[Setup], dict]] = {
    name.removeprefix("measure_"): part for name, part in {**globals()}.items() if name.startswith("measure_")
}


def table_rows(results: dict) -> list[list[str]]:
    rows = []
    for part, values in results.items():
        for name, value in values.items():
            rows.append([part, name, f"{value:,.4g}" if isinstance(value, float) else str(value).splitlines()[-1]])
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, "gpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, also for a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--mixed_precision", default="bf16", choices=("no", "bf16", "fp16"), help="of training")
    parser.add_argument("--teacher_name_or_path", help="a teacher of width 768; one with random weights if not given")
    args = parser.parse_args(argv)
    results, failed = {}, False
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        setup = Setup(args, Path(folder))
        device = torch.cuda.get_device_name() if setup.device.type == "cuda" else "CPU"
        facts = {"device": device, "mixed_precision": setup.precision, **setup.sizes}
        print(f"set-up: {time.perf_counter() - started:.1f} s on {device}", flush=True)
        for name in args.parts:
            started = time.perf_counter()
            try:
                results[name] = PARTS[name](setup)
            except Exception:
                # The other parts are measured all the same.
                results[name], failed = {"error": traceback.format_exc(limit=-2)}, True
                traceback.print_exc()
            results[name]["seconds"] = time.perf_counter() - started
            lines = markdown_table(["part", "what", device], table_rows(results))
            save_results(args.output_dir, "gpu", {**facts, "parts": results}, lines)
    print(json.dumps({**facts, "parts": results}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
