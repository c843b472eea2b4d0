"""Compares the captions of the exported ONNX graphs with PyTorch's: how many are equal, and their scores.

    python benchmarks/onnx_agreement.py --model_name_or_path . --dataset_name my_images

Captions every image by PyTorch, by the float32 and by the int8 graphs, greedily and with the beams of the generation
config. Writes JSON and a Markdown table.
"""

import tempfile

from benchmarks.results import markdown_table, save_results
from tinycap.deploy.export import export_onnx
from tinycap.deploy.onnx_captioner import OnnxCaptioner
from tinycap.evaluation.captioning import caption_dataset, create_parser, load_model_and_data, references_of
from tinycap.evaluation.metrics import score_captions
from tinycap.training.data import uncaptioned


def main() -> None:
    parser = create_parser("benchmarks.onnx_agreement", __doc__.split("\n\n")[0], "outputs/onnx_agreement")
    args = parser.parse_args()
    model, processor, dataset, columns = load_model_and_data(args)
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(args.model_name_or_path, folder, quantize=True)
        captioners = {"onnx float32": OnnxCaptioner(folder), "onnx int8": OnnxCaptioner(folder, quantized=True)}
    results, rows = {"num_beams": {}}, []
    for num_beams in sorted({1, model.generation_config.num_beams or 1}):
        options = {"batch_size": args.batch_size, "num_beams": num_beams}
        skip = uncaptioned(dataset, columns)
        expected = caption_dataset(model, processor, dataset, columns=columns, progress=True, skip=skip, **options)
        references = references_of(dataset, columns, expected.rows)
        images = [columns.image_of(dataset[row]) for row in expected.rows]
        captions = {"pytorch": expected.captions}
        for name, captioner in captioners.items():
            captions[name] = [found[0].text for found in captioner(images, **options)]
        scored = results["num_beams"][num_beams] = {}
        for name, found in captions.items():
            same = sum(map(str.__eq__, found, expected.captions))
            scores = score_captions(found, references)
            scored[name] = {"same_captions": same, **scores}
            rows.append([num_beams, name, f"{same:,}", f"{scores['cider']:.2f}", f"{scores['bleu_4']:.2f}"])
    results["num_images"] = len(images)
    header = ["beams", "captions by", f"same as PyTorch's, of {len(images):,}", "CIDEr", "BLEU-4"]
    save_results(args.output_dir, "onnx_agreement", results, markdown_table(header, rows))


if __name__ == "__main__":
    main()
