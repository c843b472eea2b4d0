"""Compares an exported TinyCap in transformers.js with distilvit's sizes, Firefox's captioner: bytes and times.

    tinycap export --output graphs
    python -m benchmarks.transformers_js --graphs graphs --npm packages

Needs Node, @huggingface/transformers in the folder `--npm`, and for the first run `optimum-onnx[onnxruntime]`, which
exports the peer with random weights to `<output_dir>/distilvit`. Both have int8 graphs and caption one image in
turn, on one thread, with the same number of tokens. Writes JSON and a Markdown table.
"""

import json
import statistics
import subprocess
import tempfile
from pathlib import Path

from benchmarks.peers import PEERS
from benchmarks.results import benchmark_parser, markdown_table, save_results


PEER = "distilvit (ViT-B, distilGPT-2)"
GRAPHS = ("encoder_model", "decoder_model_merged")


def export_peer(folder: Path) -> None:
    """Writes the peer's int8 graphs as they are published for transformers.js, and a tokenizer of its size."""
    from onnxruntime.quantization import quantize_dynamic
    from optimum.exporters.onnx import main_export
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, ViTImageProcessor

    model = PEERS[PEER].build()
    size = model.config.decoder.vocab_size
    tokenizer = Tokenizer(models.WordLevel({f"word{index}": index for index in range(size)}, unk_token="word0"))
    (folder / "onnx").mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        source, exported = Path(temporary, "model"), Path(temporary, "exported")
        for part in (model, PreTrainedTokenizerFast(tokenizer_object=tokenizer), ViTImageProcessor()):
            part.save_pretrained(source)
            if part is not model:
                part.save_pretrained(folder)
        model.config.save_pretrained(folder)
        main_export(str(source), exported, task="image-to-text-with-past", do_validation=False)
        for name in GRAPHS:
            quantized = folder / "onnx" / f"{name}_quantized.onnx"
            # The merged decoder's two ways, with and without a cache, are subgraphs.
            quantize_dynamic(exported / f"{name}.onnx", quantized, extra_options={"EnableSubgraph": True})


def main() -> None:
    parser = benchmark_parser(__doc__, "transformers_js")
    parser.add_argument("--graphs", type=Path, required=True, help="folder that `tinycap export` wrote")
    parser.add_argument("--npm", type=Path, required=True, help="folder where npm installed @huggingface/transformers")
    parser.add_argument("--image", default="docs/photos/cat.jpg", help="the image")
    parser.add_argument("--num_tokens", type=int, default=16, help="tokens of each caption")
    parser.add_argument("--num_rounds", type=int, default=20, help="captions of each model")
    args = parser.parse_args()
    folders = {"TinyCap": args.graphs, PEER: Path(args.output_dir) / "distilvit"}
    if not (folders[PEER] / "onnx" / f"{GRAPHS[-1]}_quantized.onnx").exists():
        export_peer(folders[PEER])
    script = Path(__file__).with_suffix(".mjs")
    numbers = [str(args.num_tokens), str(args.num_rounds)]
    command = ["node", script, args.npm, *numbers, args.image, *folders.values()]
    times = json.loads(subprocess.check_output(list(map(str, command)), text=True))
    results, rows = {}, []
    for name, folder in folders.items():
        found = times[str(folder)]
        found["bytes"] = sum((folder / "onnx" / f"{graph}_quantized.onnx").stat().st_size for graph in GRAPHS)
        found["median_ms"] = statistics.median(found["ms"])
        ratios = [other / own for other, own in zip(found["ms"], times[str(folders["TinyCap"])]["ms"])]
        results[name] = {**found, "ratio": statistics.median(ratios)}
        rows.append([name, f"{found['bytes'] / 1e6:.1f}", f"{found['median_ms']:.0f}", f"{results[name]['ratio']:.1f}"])
    header = ["model, int8", "MB of graphs", "ms a caption", "ratio"]
    save_results(args.output_dir, "transformers_js", results, markdown_table(header, rows))


if __name__ == "__main__":
    main()
