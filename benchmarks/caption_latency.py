"""What a caption costs: TinyCap by PyTorch and by ONNX, the floor, the reference implementation and published peers.

    python benchmarks/caption_latency.py --output_dir outputs/caption_latency

All captioners take turns in one process, warm, on one thread, each making exactly 16 tokens greedily, TinyCap also with
its default of 3 beams: wall and CPU time for batches, every ratio to the greedy floor taken within its round. Start-up
and peak memory are those of a cold process each, until its first caption. Peers have their published sizes and random
weights (`peers.py`); TinyCap is the released checkpoint. Writes JSON, a Markdown table and a plot. A short try:
`--without_peers --batch_sizes 1 --rounds 1`.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from floor import Floor
from peers import PEERS, caption
from PIL import Image
from reference import ReferenceCaptioner

from benchmarks.results import benchmark_parser, run_facts, save_results
from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.deploy.export import export_onnx

# With its telemetry off, which is decided before its first import.
from tinycap.deploy.onnx_captioner import OnnxCaptioner, onnxruntime
from tinycap.deploy.token_search import beam_search, greedy_search
from tinycap.evaluation.captioning import load_captioner
from tinycap.evaluation.reports import plot_bars
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.pipeline_tinycap import ImageToTextPipeline
from tinycap.processing_tinycap import load_image


NUM_TOKENS = 16
FLOOR, FLOOR_FROM_FILE = "floor: by hand, from pixels", "floor: by hand, from a file"
REFERENCE = "reference implementation"


def parse_args() -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "caption_latency")
    parser.add_argument("--model_name_or_path", default=".", help="a TinyCap repository")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32], help="images run together")
    parser.add_argument("--num_beams", type=int, nargs="+", default=[1, 3], help="beams of TinyCap, a row for each")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each captioner at each batch size")
    parser.add_argument("--without_peers", action="store_true", help="TinyCap, floor and reference only")
    parser.add_argument(
        "--patience", type=float, default=60.0, help="leave out what would take more seconds a call, by batch size 1"
    )
    return parser.parse_args()


def draw_photo(path: Path) -> None:
    """A picture of a camera's kind: 640 x 480, with detail everywhere, as JPEG."""
    noise = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)


def tinycap_captioners(
    folder: str, exported: Path, photo: Path, beams: list[int]
) -> dict[str, Callable[[int], Callable]]:
    """For each name, what makes a call for a batch size; rows of more than one beam say so in their names."""
    model, processor = load_captioner(folder)
    # An end token that no caption reaches, so that the check for it is paid for and never met.
    never_ends = {"max_new_tokens": NUM_TOKENS, "eos_token_id": model.config.pad_token_id}
    floor = Floor(model)
    pipe = ImageToTextPipeline(model=model, tokenizer=processor.tokenizer, image_processor=processor.image_processor)
    sessions = {
        "ONNX float32": OnnxCaptioner.from_pretrained(exported, num_threads=1),
        "ONNX int8": OnnxCaptioner.from_pretrained(exported, quantized=True, num_threads=1),
    }

    def pixels(batch_size: int) -> torch.Tensor:
        return processor.image_processor([load_image(photo)] * batch_size, return_tensors="pt").pixel_values

    def of_pixels(call: Callable) -> Callable[[int], Callable]:
        def prepare(batch_size: int) -> Callable:
            pixel_values = pixels(batch_size)
            return lambda: call(pixel_values)

        return prepare

    def of_files(call: Callable) -> Callable[[int], Callable]:
        return lambda batch_size: lambda: call([str(photo)] * batch_size)

    check_same_captions(model, floor, sessions["ONNX float32"], pixels(2), never_ends)
    captioners = {
        FLOOR: of_pixels(lambda pixel_values: floor(pixel_values, NUM_TOKENS)),
        FLOOR_FROM_FILE: of_files(
            lambda files: processor.batch_decode(floor(pixels(len(files)), NUM_TOKENS), skip_special_tokens=True)
        ),
    }
    for num_beams in beams:
        suffix = "" if num_beams == 1 else f", {num_beams} beams"
        options = {**never_ends, "num_beams": num_beams}
        captioners[f"TinyCap, generate(){suffix}"] = of_pixels(
            lambda pixel_values, options=options: model.generate(pixel_values, **options)
        )
        captioners[f"TinyCap, pipeline, from a file{suffix}"] = of_files(
            lambda files, options=options: pipe(files, batch_size=len(files), **options)
        )
        for name, captioner in sessions.items():
            captioners[f"TinyCap, {name}{suffix}"] = of_pixels(
                lambda pixel_values, captioner=captioner, num_beams=num_beams: search_by_onnx(
                    captioner, pixel_values.numpy(), num_beams
                )
            )
            captioner.eos_token_ids = []
            captioners[f"TinyCap, {name}, from a file{suffix}"] = of_files(
                lambda files, captioner=captioner, num_beams=num_beams: captioner(
                    files, num_beams=num_beams, max_new_tokens=NUM_TOKENS
                )
            )
    return captioners


def search_by_onnx(captioner: OnnxCaptioner, pixel_values: np.ndarray, num_beams: int = 1) -> list[list[int]]:
    """The best `NUM_TOKENS` tokens of each image, (B, 3, H, W)."""
    step = captioner.decoding_step(captioner.encode(pixel_values)[0])
    prompt = np.full((len(pixel_values), 1), captioner.start_token_id, np.int64)
    if num_beams == 1:
        found = greedy_search(step, prompt, [], NUM_TOKENS)
    else:
        found = beam_search(step, prompt, [], NUM_TOKENS, num_beams)
    return [rows[0] for rows in found.tokens]


def check_same_captions(model, floor, captioner, pixel_values, never_ends) -> None:
    """What is compared for its speed says the same.

    Raises:
        ValueError: it doesn't.
    """
    expected = floor(pixel_values, NUM_TOKENS)
    generated = model.generate(pixel_values, num_beams=1, **never_ends)
    if (
        not torch.equal(generated, expected)
        or search_by_onnx(captioner, pixel_values.numpy()) != expected[:, 1:].tolist()
    ):
        raise ValueError("expected the same captions of floor, generate() and ONNX, got different ones")


def reference_captioner() -> tuple[Callable[[int], Callable], int]:
    """The seed architecture with its vocabulary of 50,257: no cache, the head on all positions. And its parameters."""
    torch.manual_seed(0)
    config = TinyCapConfig(text_config={"hidden_dropout_prob": 0.0})
    model = ReferenceCaptioner(TinyCapForConditionalGeneration(config)).eval()

    @torch.inference_mode()
    def run(pixel_values: torch.Tensor) -> None:
        image_embeds = model.encode(pixel_values)
        tokens = torch.full((len(pixel_values), 1), config.decoder_start_token_id)
        for _ in range(NUM_TOKENS):
            logits = model.decode(image_embeds, tokens)
            tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)

    def prepare(batch_size: int) -> Callable:
        pixel_values = torch.randn(batch_size, 3, 224, 224)
        return lambda: run(pixel_values)

    return prepare, sum(parameter.numel() for parameter in model.parameters())


def timed(call: Callable) -> dict[str, float]:
    """Median seconds of one call, several of them where it is short."""
    found = []
    while not found or (len(found) < 9 and sum(wall for wall, _ in found) < 0.3):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        "wall": statistics.median(wall for wall, _ in found),
        "cpu": statistics.median(cpu for _, cpu in found),
    }


def measure(captioners: dict[str, Callable], batch_size: int, rounds: int) -> dict[str, dict]:
    """Turns of all captioners; medians, and ratios to the floor of the same kind within each round."""
    calls = {name: prepare(batch_size) for name, prepare in captioners.items()}
    for call in calls.values():
        call()
    turns = {name: [] for name in calls}
    for index in range(rounds):
        for name, call in calls.items():
            turns[name].append(timed(call))
        print(f"batch {batch_size}: round {index + 1} of {rounds}", flush=True)
    results = {}
    for name, found in turns.items():
        floors = turns[FLOOR_FROM_FILE if "from a file" in name else FLOOR]
        results[name] = {
            kind: {
                "milliseconds": 1e3 * statistics.median(turn[kind] for turn in found),
                "ratio_to_floor": statistics.median(turn[kind] / floor[kind] for turn, floor in zip(found, floors)),
            }
            for kind in ("wall", "cpu")
        }
        results[name]["images_per_second"] = batch_size / statistics.median(turn["wall"] for turn in found)
    return results


def cold_start(kind: str, folder: str | Path, argument: str | Path, times: int) -> dict[str, float]:
    """Medians over cold processes; wall time by this process's clock."""
    script, found = Path(__file__).with_name("first_caption.py"), []
    for _ in range(times):
        started = time.perf_counter()
        command = [sys.executable, str(script), kind, str(folder), str(argument)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{kind} {argument}: {done.stderr[-2000:]}")
        figures = json.loads(done.stdout.splitlines()[-1])
        found.append({**figures, "wall_seconds": time.perf_counter() - started})
    return {name: statistics.median(figures[name] for figures in found) for name in found[0]}


def size_of(*paths: Path) -> int:
    return sum(path.stat().st_size for path in paths)


def describe_tinycap(folder: Path, exported: Path, photo: Path) -> dict[str, dict]:
    """Parameters, bytes on disk, start-up and peak memory of the three ways to run TinyCap."""
    model = TinyCapForConditionalGeneration.from_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    graphs = exported / "onnx"
    return {
        "TinyCap, pipeline": {
            "parameters": parameters,
            "bytes_on_disk": size_of(folder / "model.safetensors"),
            **cold_start("pytorch", folder, photo, 3),
        },
        "TinyCap, ONNX float32": {
            "parameters": parameters,
            "bytes_on_disk": size_of(graphs / "encoder_model.onnx", graphs / "decoder_model_merged.onnx"),
            **cold_start("onnx", exported, photo, 3),
        },
        "TinyCap, ONNX int8": {
            "parameters": parameters,
            "bytes_on_disk": size_of(*graphs.glob("*_quantized.onnx")),
            **cold_start("onnx_int8", exported, photo, 3),
        },
    }


def describe_peer(name: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        model = PEERS[name].build()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(folder)
        del model
        gc.collect()
        found = {"parameters": parameters, "bytes_on_disk": size_of(*Path(folder).glob("*.safetensors"))}
        return {**found, **cold_start("peer", folder, name, 1)}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    output_dir = Path(args.output_dir)
    results = {
        **run_facts(),
        "onnxruntime": onnxruntime.__version__,
        "num_tokens": NUM_TOKENS,
        "rounds": args.rounds,
        "batches": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        photo, exported = Path(folder) / "photo.jpg", Path(folder) / "exported"
        draw_photo(photo)
        export_onnx(args.model_name_or_path, exported, quantize=True)
        results["systems"] = describe_tinycap(Path(args.model_name_or_path), exported, photo)
        captioners = tinycap_captioners(args.model_name_or_path, exported, photo, args.num_beams)
        captioners[REFERENCE], parameters = reference_captioner()
        results["systems"][REFERENCE] = {"parameters": parameters}
        if not args.without_peers:
            for name, peer in PEERS.items():
                print(f"{name}: start-up", flush=True)
                results["systems"][name] = describe_peer(name)
                captioners[name] = prepare_peer(name, peer.build())
        for batch_size in args.batch_sizes:
            kept = captioners
            if results["batches"]:
                first = results["batches"][args.batch_sizes[0]]
                limit = 1e3 * args.patience * args.batch_sizes[0] / batch_size
                kept = {
                    name: captioner
                    for name, captioner in captioners.items()
                    if name in first and first[name]["wall"]["milliseconds"] <= limit
                }
            results["batches"][batch_size] = measure(kept, batch_size, args.rounds)
            # After each size, so that a run that is broken off leaves what it found.
            write_results(output_dir, results)


def prepare_peer(name: str, model) -> Callable[[int], Callable]:
    def prepare(batch_size: int) -> Callable:
        inputs = PEERS[name].inputs(batch_size)
        return lambda: caption(model, inputs, NUM_TOKENS)

    return prepare


def write_results(output_dir: Path, results: dict) -> None:
    """JSON, a Markdown table and a plot."""
    sizes = list(results["batches"])
    first = results["batches"][sizes[0]]
    head = [f"batch {size}: CPU ms an image, ratio to the floor" for size in sizes]
    lines = ["| captioner | " + " | ".join(head) + " |", "|---" * (1 + len(sizes)) + "|"]
    for name in first:
        cells = []
        for size in sizes:
            found = results["batches"][size].get(name)
            cells.append(
                f"{found['cpu']['milliseconds'] / size:.1f}, {found['cpu']['ratio_to_floor']:.2f}" if found else "-"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| captioner | parameters | MB on disk | start to first caption, CPU s (wall s) | peak memory, MB |",
        "|---|---|---|---|---|",
    ]
    for name, found in results["systems"].items():
        if "bytes_on_disk" in found:
            start = f"{found['cpu_seconds']:.2f} ({found['wall_seconds']:.2f}) | {found['peak_memory_mb']:,.0f}"
            lines.append(
                f"| {name} | {found['parameters'] / 1e6:.1f} M | {found['bytes_on_disk'] / 1e6:,.1f} | {start} |"
            )
        else:
            lines.append(f"| {name} | {found['parameters'] / 1e6:.1f} M | - | - | - |")
    save_results(output_dir, "caption_latency", results, lines)
    bars = {name: found["cpu"]["ratio_to_floor"] for name, found in first.items() if "from a file" not in name}
    plot_bars(bars, output_dir / "caption_latency.png", "CPU time for one caption, as a multiple of the floor")


if __name__ == "__main__":
    main()
