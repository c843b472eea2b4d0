"""CPU time of a caption: TinyCap by PyTorch and by ONNX, a hand-written loop, a reference and published peers.

    python benchmarks/caption_latency.py --output_dir outputs/caption_latency

Every captioner generates exactly 16 tokens on one thread, greedily or with the beams of `--num_beams`. Rounds over all
captioners are interleaved in one warm process, and ratios to the floor (`reference.py`) are taken within a round. Cold
start (CPU seconds to the first caption) and peak memory are those of a new process each. TinyCap is the released
checkpoint; peers have random weights (`peers.py`) and run with the first batch size only. Writes JSON and Markdown.
Quick check: `--without_peers --batch_sizes 1 --rounds 1`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from benchmarks.peers import PEERS, caption
from benchmarks.reference import Floor, ReferenceCaptioner
from benchmarks.results import benchmark_parser, markdown_table, save_results
from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.deploy.export import export_onnx
from tinycap.deploy.onnx_captioner import OnnxCaptioner
from tinycap.evaluation.captioning import load_captioner
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.pipeline_tinycap import ImageToTextPipeline
from tinycap.processing_tinycap import load_image


NUM_TOKENS = 16
FROM_FILE = ", from a file"
FLOOR, FLOOR_FROM_FILE = "floor: by hand, from pixels", "floor: by hand, from a file"
# Captioners by name: functions that caption a batch of a given size.
Captioners = dict[str, Callable[[int], object]]
# What a new process runs until its first caption, on one thread.
COMMAND_LINE = "from tinycap.deploy.cli import main; assert main(sys.argv[1:]) == 0"
# Without tokenizer and image processor, which favours the peers.
PEER = """
import torch
from benchmarks.peers import PEERS, caption
torch.set_num_threads(1)
name, folder = sys.argv[1:]
caption(PEERS[name].model_class.from_pretrained(folder).eval(), PEERS[name].inputs(1), 16)
"""
USAGE = """
cpu_seconds = sum(os.times()[:2])
from benchmarks.results import peak_memory_mb
print(json.dumps({"cpu_seconds": cpu_seconds, "peak_memory_mb": peak_memory_mb()}))
"""


def parse_args() -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "caption_latency")
    parser.add_argument("--model_name_or_path", default=".", help="folder of a TinyCap repository")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32], help="images captioned together")
    parser.add_argument("--num_beams", type=int, nargs="+", default=[1, 3], help="beams of TinyCap, a row for each")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all captioners, for each batch size")
    parser.add_argument("--without_peers", action="store_true", help="TinyCap, floor and reference only")
    return parser.parse_args()


def draw_image(path: Path) -> None:
    """640 x 480 pixels with detail everywhere, as a camera's JPEG."""
    noise = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)


def tinycap_captioners(folder: str, graphs: Path, image: Path, beams: list[int]) -> Captioners:
    """The floor and the ways to run TinyCap, with a row for each number of beams."""
    model, processor = load_captioner(folder)
    floor = Floor(model)
    pipe = ImageToTextPipeline(model=model, tokenizer=processor.tokenizer, image_processor=processor.image_processor)
    onnx = {
        f"TinyCap, {name}{FROM_FILE}": OnnxCaptioner.from_pretrained(graphs, quantized=quantized, num_threads=1)
        for name, quantized in (("ONNX float32", False), ("ONNX int8", True))
    }
    for captioner in onnx.values():
        captioner.eos_token_ids = []

    def read(size: int) -> torch.Tensor:
        return processor.image_processor([load_image(image)] * size, return_tensors="pt").pixel_values

    def floor_from_file(size: int) -> list[str]:
        return processor.batch_decode(floor(read(size), NUM_TOKENS), skip_special_tokens=True)

    def with_beams(num_beams: int) -> Captioners:
        options = {"num_beams": num_beams, "max_new_tokens": NUM_TOKENS}
        # No caption reaches this end token: the stopping criterion is evaluated and never met.
        torch_options = {**options, "eos_token_id": model.config.pad_token_id}
        rows = {
            "TinyCap, generate()": lambda size: model.generate(pixels(size), **torch_options),
            f"TinyCap, pipeline{FROM_FILE}": lambda size: pipe([str(image)] * size, batch_size=size, **torch_options),
        }
        for name, captioner in onnx.items():
            rows[name] = lambda size, captioner=captioner: captioner([str(image)] * size, **options)
        return rows if num_beams == 1 else {f"{name}, {num_beams} beams": call for name, call in rows.items()}

    pixels = cache(read)
    captioners = {FLOOR: lambda size: floor(pixels(size), NUM_TOKENS), FLOOR_FROM_FILE: floor_from_file}
    for num_beams in beams:
        captioners |= with_beams(num_beams)
    return captioners


def reference_captioner() -> tuple[Callable[[int], object], int]:
    """The default architecture with its vocabulary of 50,257, without a cache; and its number of parameters."""
    torch.manual_seed(0)
    config = TinyCapConfig(text_config={"hidden_dropout_prob": 0.0})
    model = ReferenceCaptioner(TinyCapForConditionalGeneration(config)).eval()

    def call(size: int) -> torch.Tensor:
        return model.generate(torch.randn(size, 3, 224, 224), config.decoder_start_token_id, NUM_TOKENS)

    return call, sum(parameter.numel() for parameter in model.parameters())


def peer_captioner(name: str, model) -> Callable[[int], object]:
    inputs = cache(PEERS[name].inputs)
    return lambda size: caption(model, inputs(size), NUM_TOKENS)


def cpu_seconds(call: Callable[[], object]) -> float:
    """Median CPU seconds of one to nine calls, as many as take 0.3 s."""
    timer = timeit.Timer(call, timer=time.process_time)
    first = timer.timeit(1)
    return statistics.median([first, *timer.repeat(min(8, int(0.3 / first)), number=1)])


def measure(captioners: Captioners, batch_size: int, rounds: int) -> dict[str, dict]:
    """Medians over interleaved rounds, of the times and of the ratios to the floor with the same input."""
    for call in captioners.values():
        call(batch_size)
    seconds = {name: [] for name in captioners}
    for number in range(rounds):
        for name, call in captioners.items():
            seconds[name].append(cpu_seconds(partial(call, batch_size)))
        print(f"batch {batch_size}: round {number + 1} of {rounds}", flush=True)
    results = {}
    for name, own in seconds.items():
        floors = seconds[FLOOR_FROM_FILE if FROM_FILE in name else FLOOR]
        ratio = statistics.median(mine / floor for mine, floor in zip(own, floors))
        results[name] = {"cpu": {"milliseconds": 1e3 * statistics.median(own), "ratio_to_floor": ratio}}
    return results


def cold_start(program: str, *argv: str | Path, times: int = 3) -> dict[str, float]:
    """Medians over new processes; the wall time includes the interpreter's start."""
    command = [sys.executable, "-c", f"import json, os, sys\n{program}\n{USAGE}", *map(str, argv)]
    runs = []
    for _ in range(times):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{argv}: {done.stderr[-2000:]}")
        usage = json.loads(done.stdout.splitlines()[-1])
        runs.append({**usage, "wall_seconds": time.perf_counter() - started})
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def describe_systems(folder: str, graphs: Path, image: Path) -> dict[str, dict]:
    """Parameters, bytes on disk, cold start and peak memory of the ways to run TinyCap."""
    parameters = TinyCapForConditionalGeneration.from_pretrained(folder).num_parameters()
    sizes = {path.name: path.stat().st_size for path in graphs.glob("onnx/*")}
    quantized = sum(size for name, size in sizes.items() if "_quantized" in name)
    onnx = ("--model", graphs, "--backend", "onnx")
    ways = {
        "TinyCap, pipeline": (Path(folder, "model.safetensors").stat().st_size, ("--model", folder)),
        "TinyCap, ONNX float32": (sum(sizes.values()) - quantized, onnx),
        "TinyCap, ONNX int8": (quantized, (*onnx, "--quantized")),
    }
    common = ("caption", image, "--num-threads", "1", "--quiet")
    return {
        name: {"parameters": parameters, "bytes_on_disk": size, **cold_start(COMMAND_LINE, *common, *argv)}
        for name, (size, argv) in ways.items()
    }


def describe_peer(name: str, model) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        start = cold_start(PEER, name, folder, times=1)
        return {"parameters": model.num_parameters(), "bytes_on_disk": size, **start}


def write_results(output_dir: Path, results: dict) -> None:
    batches, systems = results["batches"], results["systems"]
    rows = [[name] for name in next(iter(batches.values()))]
    for row in rows:
        for size, timings in batches.items():
            cpu = timings[row[0]]["cpu"] if row[0] in timings else None
            row.append(f"{cpu['milliseconds'] / size:.1f}, {cpu['ratio_to_floor']:.2f}" if cpu else "-")
    header = ["captioner", *(f"batch {size}: CPU ms an image, ratio to the floor" for size in batches)]
    lines = [*markdown_table(header, rows), ""]
    rows = []
    for name, system in systems.items():
        cells = ["-"] * 3
        if "bytes_on_disk" in system:
            seconds = f"{system['cpu_seconds']:.2f} ({system['wall_seconds']:.2f})"
            cells = [f"{system['bytes_on_disk'] / 1e6:,.1f}", seconds, f"{system['peak_memory_mb']:,.0f}"]
        rows.append([name, f"{system['parameters'] / 1e6:.1f} M", *cells])
    header = ["captioner", "parameters", "MB on disk", "start to first caption, CPU s (wall s)", "peak memory, MB"]
    save_results(output_dir, "caption_latency", results, lines + markdown_table(header, rows))


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    results = {"onnxruntime": version("onnxruntime"), "num_tokens": NUM_TOKENS, "rounds": args.rounds, "batches": {}}
    with tempfile.TemporaryDirectory() as folder:
        image, graphs = Path(folder) / "image.jpg", Path(folder) / "graphs"
        draw_image(image)
        export_onnx(args.model_name_or_path, graphs, quantize=True)
        systems = results["systems"] = describe_systems(args.model_name_or_path, graphs, image)
        captioners = tinycap_captioners(args.model_name_or_path, graphs, image, args.num_beams)
        reference, parameters = reference_captioner()
        captioners["reference implementation"] = reference
        systems["reference implementation"] = {"parameters": parameters}
        peers = {}
        for name in () if args.without_peers else PEERS:
            model = PEERS[name].build()
            systems[name], peers[name] = describe_peer(name, model), peer_captioner(name, model)
        for batch_size in args.batch_sizes:
            results["batches"][batch_size] = measure(captioners | peers, batch_size, args.rounds)
            # After each batch size: an interrupted run leaves its results.
            write_results(args.output_dir, results)
            peers = {}


if __name__ == "__main__":
    main()
