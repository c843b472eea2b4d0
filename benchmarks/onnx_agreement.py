"""Compares the captions of the exported ONNX graphs with PyTorch's: how many are equal, and their scores.

    python benchmarks/onnx_agreement.py --dataset_name my_images --split validation

Captions every image by PyTorch, by the float32 and by the int8 graphs, greedily and with the beams of the generation
config. Writes JSON and a Markdown table.
"""

import tempfile

from benchmarks.results import benchmark_parser, markdown_table, save_results
from tinycap.deploy.export import export_onnx
from tinycap.deploy.onnx_captioner import OnnxCaptioner
from tinycap.evaluation.captioning import caption_dataset, load_captioner
from tinycap.evaluation.metrics import score_captions
from tinycap.training.captions import clean_captions
from tinycap.training.data import load_split, resolve_columns


def main() -> None:
    parser = benchmark_parser(__doc__, "onnx_agreement")
    parser.add_argument("--model_name_or_path", default=".", help="folder of a TinyCap repository")
    parser.add_argument("--dataset_name", required=True, help="images with several captions each")
    parser.add_argument("--split", default="validation", help="its split")
    parser.add_argument("--max_samples", type=int, help="use only the first so many images")
    parser.add_argument("--batch_size", type=int, default=32, help="images captioned together")
    args = parser.parse_args()

    dataset = load_split(args.dataset_name, args.split)
    columns = resolve_columns(dataset, root=args.dataset_name)
    dataset = dataset.select(range(args.max_samples or len(dataset)))
    references = [clean_captions(row) for row in dataset[columns.caption]]
    images = [columns.image_of(row) for row in dataset]
    model, processor = load_captioner(args.model_name_or_path)
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(args.model_name_or_path, folder, quantize=True)
        captioners = {
            "onnx float32": OnnxCaptioner.from_pretrained(folder),
            "onnx int8": OnnxCaptioner.from_pretrained(folder, quantized=True),
        }
    results, rows = {"num_images": len(images), "num_beams": {}}, []
    for num_beams in sorted({1, model.generation_config.num_beams or 1}):
        options = {"batch_size": args.batch_size, "num_beams": num_beams}
        expected = caption_dataset(model, processor, dataset, columns=columns, progress=True, **options)
        captions = {"pytorch": expected.captions}
        for name, captioner in captioners.items():
            captions[name] = [found[0].text for found in captioner(images, **options)]
        scored = results["num_beams"][num_beams] = {}
        for name, found in captions.items():
            same = sum(map(str.__eq__, found, expected.captions))
            scores = score_captions(found, references)
            scored[name] = {"same_captions": same, **scores}
            rows.append([num_beams, name, f"{same:,}", f"{scores['cider']:.2f}", f"{scores['bleu_4']:.2f}"])
    header = ["beams", "captions by", f"same as PyTorch's, of {len(images):,}", "CIDEr", "BLEU-4"]
    save_results(args.output_dir, "onnx_agreement", results, markdown_table(header, rows))


if __name__ == "__main__":
    main()
