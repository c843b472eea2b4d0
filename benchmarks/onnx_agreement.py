"""Captions of the exported graphs against PyTorch's: how many are the same, and what int8 costs in CIDEr.

    python benchmarks/onnx_agreement.py --dataset_name my_photos --split validation

Captions every photo three ways, by PyTorch, by the float32 graphs and by the int8 graphs, greedily and with the beams
of the generation config. Writes JSON and a Markdown table.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.results import benchmark_parser, run_facts, save_results
from tinycap.deploy.export import export_onnx
from tinycap.deploy.onnx_captioner import OnnxCaptioner
from tinycap.evaluation.captioning import caption_dataset, load_captioner
from tinycap.evaluation.metrics import score_captions
from tinycap.training.data import clean_captions, load_split, resolve_columns


def parse_args() -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "onnx_agreement")
    parser.add_argument("--model_name_or_path", default=".", help="a TinyCap repository")
    parser.add_argument("--dataset_name", required=True, help="photos with several captions each")
    parser.add_argument("--split", default="validation", help="its split")
    parser.add_argument("--max_samples", type=int, help="use only the first so many photos")
    parser.add_argument("--batch_size", type=int, default=32, help="photos run through the model together")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    dataset = load_split(args.dataset_name, args.split)
    columns = resolve_columns(dataset)
    if args.max_samples is not None:
        dataset = dataset.select(range(args.max_samples))
    references = [clean_captions(row) for row in dataset[columns.caption]]
    model, processor = load_captioner(args.model_name_or_path)
    results = {
        **run_facts(),
        "num_images": len(dataset),
        "num_beams": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(args.model_name_or_path, folder, quantize=True)
        captioners = {
            "onnx_float32": OnnxCaptioner.from_pretrained(folder),
            "onnx_int8": OnnxCaptioner.from_pretrained(folder, quantized=True),
        }
    for num_beams in sorted({1, model.generation_config.num_beams or 1}):
        options = {"image_column": columns.image, "batch_size": args.batch_size, "num_beams": num_beams}
        captions = {"pytorch": caption_dataset(model, processor, dataset, progress=True, **options).captions}
        for name, captioner in captioners.items():
            images = list(dataset[columns.image])
            captions[name] = [
                found[0].text for found in captioner(images, num_beams=num_beams, batch_size=args.batch_size)
            ]
        results["num_beams"][num_beams] = {
            name: {
                "same_captions": sum(ours == theirs for ours, theirs in zip(found, captions["pytorch"])),
                **score_captions(found, references),
            }
            for name, found in captions.items()
        }
        print(json.dumps(results["num_beams"][num_beams], indent=2), flush=True)
    write_results(Path(args.output_dir), results)


def write_results(output_dir: Path, results: dict) -> None:
    """JSON and a Markdown table."""
    lines = [
        f"| beams | captions by | same as PyTorch's, of {results['num_images']:,} | CIDEr | BLEU-4 |",
        "|---|---|---|---|---|",
    ]
    for num_beams, found in results["num_beams"].items():
        lines += [
            f"| {num_beams} | {name.replace('_', ' ')} | {row['same_captions']:,} "
            f"| {row['cider']:.2f} | {row['bleu_4']:.2f} |"
            for name, row in found.items()
        ]
    save_results(output_dir, "onnx_agreement", results, lines)


if __name__ == "__main__":
    main()
