"""Scores any TinyCap checkpoint on any captioned data set.

    python -m tinycap.evaluation --model_name_or_path . --dataset_name my_photos --split validation --baselines

Writes `eval_results.json`, `captions.jsonl`, the contact sheet `samples.png` and `report.html`, which a browser opens
from disk, to `--output_dir`; with `--failures`, `failures.json` and `unlike_photos.png` too.
"""

import argparse
import json
import logging
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from tinycap.evaluation.baselines import baseline_scores
from tinycap.evaluation.caption_metrics.caption_metrics import cider_of_each, metric_caveats
from tinycap.evaluation.captioning import Captions, caption_dataset, load_captioner
from tinycap.evaluation.failures import analyse
from tinycap.evaluation.fidelity import distillation_fidelity
from tinycap.evaluation.html_report import explain_pictures, failure_tables, score_table, write_report
from tinycap.evaluation.metrics import score_captions
from tinycap.evaluation.ood_images import caption_ood_images, draw_ood_images, mean_caption_probability
from tinycap.evaluation.reports import contact_sheet
from tinycap.processing_tinycap import load_image, preprocess_images
from tinycap.training.arguments import check_sources
from tinycap.training.data import (
    Columns,
    image_ids,
    load_images,
    load_splits,
    resolve_columns,
    uncaptioned,
)
from tinycap.training.logs import write_json, write_text
from tinycap.training.teacher import FEATURES, Teacher


logger = logging.getLogger(__name__)

# Photos whose token probability stands beside that of pictures unlike photos, and how many of those are shown.
NUM_COMPARED, SHOWN_OF_A_KIND = 200, 2


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model captions which pictures."""
    parser.add_argument("--model_name_or_path", required=True, help="a TinyCap repository")
    parser.add_argument("--dataset_name", required=True, help="Hub id, folder of parquet, or imagefolder")
    parser.add_argument("--dataset_config_name", help="configuration of the dataset, where it has several")
    parser.add_argument(
        "--split",
        default="validation",
        help="split to caption; 'validation' of a data set without one: the images that training held out",
    )
    parser.add_argument("--image_column", help="column of the images; found by its type if not given")
    parser.add_argument("--caption_column", help="column of the captions; found by its name if not given")
    parser.add_argument("--max_samples", type=int, help="use only the first so many pictures")
    parser.add_argument("--batch_size", type=int, default=32, help="pictures run through the model together")


def open_model_and_data(args: argparse.Namespace) -> tuple:
    """The model, its processor, the rows to caption and their `Columns`, as `add_data_arguments`'s flags say.

    Raises:
        ValueError: there is no such folder, split or column, or the model isn't a TinyCap; names what there is.
    """
    check_sources(args)
    args.hold_out_seed = training_seed(args.model_name_or_path) if args.seed is None else args.seed
    args.seed = args.seed or 0
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    dataset, columns = load_images(
        args.dataset_name, args.split, args.dataset_config_name, args.hold_out_seed, **columns
    )
    if args.max_samples is not None:
        dataset = dataset.select(range(min(args.max_samples, len(dataset))))
    return *load_captioner(args.model_name_or_path), dataset, columns


def training_seed(model_name_or_path: str) -> int:
    """The seed that a model was trained with, as its folder says, else the training scripts' default."""
    path = Path(model_name_or_path) / "train_args.json"
    return json.loads(path.read_text(encoding="utf-8")).get("seed", 42) if path.is_file() else 42


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tinycap.evaluation",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = argparse.BooleanOptionalAction
    add_data_arguments(parser)
    parser.add_argument("--num_beams", type=int, help="beams; as the model's generation config says if not given")
    parser.add_argument("--length_penalty", type=float, help="above 0 favours longer captions of a beam search")
    parser.add_argument("--max_new_tokens", type=int, help="longest caption in tokens")
    parser.add_argument("--teacher_name_or_path", help="also compare the student's embeddings with this teacher's")
    parser.add_argument("--teacher_feature", choices=FEATURES, default="pooled", help="which of its embeddings")
    parser.add_argument("--java_metrics", nargs="*", default=[], help="meteor and/or spice, where Java is installed")
    parser.add_argument(
        "--baselines", action=flag, default=False, help="what a constant, a shuffled, a human caption scores"
    )
    parser.add_argument(
        "--baseline_split",
        help="split that the constant caption is chosen from; 'train' if there is one, else the captioned one",
    )
    parser.add_argument(
        "--failures",
        action=flag,
        default=False,
        help="what is wrong with the captions, by English word lists of everyday photos; what drawings are taken for",
    )
    parser.add_argument(
        "--report_photos", type=int, default=200, help="pictures in report.html, drawn by seed; 0: none"
    )
    parser.add_argument("--num_shown", type=int, default=16, help="pictures on the contact sheet")
    parser.add_argument(
        "--seed",
        type=int,
        help="of the images shown, the constant and the shuffled captions (0 if not given), and of the images that "
        "training held out (if not given: as the model's train_args.json says)",
    )
    parser.add_argument("--output_dir", default="outputs/evaluation", help="where the results go")
    parser.add_argument("--overwrite_output_dir", action=flag, default=False, help="write over earlier results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Runs the evaluation; returns what it writes to `eval_results.json`.

    Raises:
        ValueError: the folder isn't empty, or model, data or teacher don't fit.
    """
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    accelerator = Accelerator()
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if any(output_dir.iterdir()) and not args.overwrite_output_dir:
        raise ValueError(
            f"--output_dir: expected an empty folder, got {output_dir}, which isn't; "
            "pass --overwrite_output_dir to write over it"
        )
    model, processor, dataset, columns = open_model_and_data(args)
    model.to(accelerator.device)
    teacher = None
    if args.teacher_name_or_path is not None:
        statistics = processor.image_processor.image_mean, processor.image_processor.image_std
        teacher = Teacher.from_pretrained(args.teacher_name_or_path, args.teacher_feature, *statistics)
        teacher.check_width(model.config.vision_config.projection_dim)
        teacher.to(accelerator.device)
    generation = {
        name: getattr(args, name)
        for name in ("num_beams", "length_penalty", "max_new_tokens")
        if getattr(args, name) is not None
    }
    found = caption_dataset(
        model,
        processor,
        dataset,
        image_column=columns.image,
        batch_size=args.batch_size,
        accelerator=accelerator,
        teacher=teacher,
        progress=True,
        skip=uncaptioned(dataset, columns),
        **generation,
    )
    references = references_of(dataset, columns, found.rows)
    results = score(args, found, references)
    # % of the tokens that the model could say.
    used = len({token for caption in found.tokens for token in caption})
    results["vocabulary_used"] = 100 * used / model.config.text_config.vocab_size
    results["decoding"] = {
        name: generation.get(name, getattr(model.generation_config, name, None))
        for name in ("num_beams", "length_penalty", "max_new_tokens")
    }
    if accelerator.is_main_process:
        evaluated = Evaluated(dataset, columns, found, references, cider_of_each(found.captions, references))
        analysis = None
        if args.failures:
            analysis = analyse_failures(args, model, processor, evaluated, generation)
        write_results(args, evaluated, results, analysis)
        if args.report_photos:
            write_html(args, model, processor, evaluated, results, analysis)
        print(summary(results, output_dir))
    return results


def summary(results: dict, output_dir: Path) -> str:
    """What the terminal shows at the end: the metrics of model and baselines as a table, and where the rest is."""
    table = score_table(results)
    cells = [table["columns"], *(row["cells"] for row in table["rows"])]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*cells)]
    lines = ["  ".join(f"{str(cell):>{width}}" for cell, width in zip(row, widths)) for row in cells]
    lines.append(f"{results['num_images']} images, {results['num_skipped']} skipped. All results: {output_dir}")
    return "\n".join(lines + results.get("caveats", []))


@dataclass
class Evaluated:
    """What the reports are made of; the lists go row by row with `found.rows`.

    Args:
        dataset: the rows, with `columns`.
        found: captions, tokens and embeddings.
        references: the human captions.
        ciders: CIDEr of each caption, times 100.
    """

    dataset: datasets.Dataset
    columns: Columns
    found: Captions
    references: list[list[str]]
    ciders: list[float]

    def picture(self, position: int) -> Image.Image:
        return load_image(self.dataset[self.found.rows[position]][self.columns.image])

    def ids(self) -> list:
        """The id of every row of the data set."""
        return image_ids(self.dataset, self.columns)

    def draw(self, number: int, seed: int) -> list[int]:
        """Positions of pictures to show: drawn by seed, not chosen, for the best ones would say nothing."""
        return sorted(random.Random(seed).sample(range(len(self.found.rows)), min(number, len(self.found.rows))))


def references_of(dataset, columns: Columns, rows: list[int]) -> list[list[str]]:
    """The human captions of the images that were captioned."""
    table = dataset.select_columns(columns.captions)
    return [columns.captions_of(table[row]) for row in rows]


def training_references(args: argparse.Namespace) -> list[list[str]] | None:
    """The human captions that the constant baseline is chosen from; `None` where there are none but the scored ones."""
    split = args.baseline_split or "train"
    if split == args.split:
        return None
    options = {name: getattr(args, name) for name in ("dataset_config_name", "image_column", "caption_column")}
    try:
        dataset, _ = load_splits(args.dataset_name, train_split=split, seed=args.hold_out_seed, **options)
    except ValueError:
        if args.baseline_split is not None:
            raise
        return None
    columns = resolve_columns(dataset, args.image_column, args.caption_column)
    # What can't be trained on can't be chosen either.
    bad = uncaptioned(dataset, columns)
    return references_of(dataset, columns, [row for row in range(len(dataset)) if row not in bad])


def score(args: argparse.Namespace, found: Captions, references: list[list[str]]) -> dict:
    """All figures of the captions and embeddings that were found."""
    results = {
        "model": args.model_name_or_path,
        "dataset": args.dataset_name,
        "split": args.split,
        "num_images": len(found.rows),
        "num_skipped": len(found.skipped),
        **score_captions(found.captions, references, tuple(args.java_metrics)),
    }
    if caveats := metric_caveats(references):
        results["caveats"] = caveats
    if found.teacher_embeds is not None:
        results["fidelity"] = distillation_fidelity(found.image_embeds, found.teacher_embeds)
    if args.baselines:
        results["baselines"] = baseline_scores(found.captions, references, training_references(args), args.seed)
    return results


def analyse_failures(args: argparse.Namespace, model, processor, evaluated: Evaluated, generation: dict) -> dict:
    """`failures.analyse`, what the model says to pictures that aren't photos, and how sure it is of both."""
    found = evaluated.found
    analysis = analyse(found.captions, evaluated.references, evaluated.ciders, args.seed)
    drawn = evaluated.draw(NUM_COMPARED, args.seed)
    pixel_values = preprocess_images(processor.image_processor, [evaluated.picture(position) for position in drawn])
    analysis["token_probability"] = mean_caption_probability(
        model, pixel_values.to(model.device), [found.tokens[position] for position in drawn]
    )
    analysis["unlike_photos"] = caption_ood_images(model, processor, args.seed, **generation)
    return analysis


def write_results(args: argparse.Namespace, evaluated: Evaluated, results: dict, analysis: dict | None) -> None:
    """Writes `eval_results.json`, `captions.jsonl`, `samples.png` and, with an analysis, `failures.json`."""
    output_dir, found, ids = Path(args.output_dir), evaluated.found, evaluated.ids()
    write_json(output_dir / "eval_results.json", results)
    lines = [
        {"image_id": ids[row], "caption": caption, "references": group, "cider": cider}
        for row, caption, group, cider in zip(found.rows, found.captions, evaluated.references, evaluated.ciders)
    ]
    if found.teacher_embeds is not None:
        for line, cosine in zip(lines, (found.image_embeds * found.teacher_embeds).sum(dim=-1).tolist()):
            line["teacher_cosine"] = cosine
    if analysis is not None:
        for line, photo in zip(lines, analysis["photos"]):
            line.update(photo)
        figures = {name: value for name, value in analysis.items() if name != "photos"}
        figures["unlike_photos"] = [
            {name: value for name, value in row.items() if name != "tokens"} for row in analysis["unlike_photos"]
        ]
        write_json(output_dir / "failures.json", figures)
    lines += [{"image_id": ids[row], "caption": None, "error": reason} for row, reason in found.skipped]
    write_text(output_dir / "captions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    shown = evaluated.draw(args.num_shown, args.seed)
    contact_sheet(
        [evaluated.picture(position) for position in shown],
        [found.captions[position] for position in shown],
        output_dir / "samples.png",
        references=[evaluated.references[position][0] for position in shown],
        title="Model's caption, and a human's in grey",
    )
    if analysis is not None:
        drawn = draw_ood_images(args.seed)
        contact_sheet(
            [drawn[row["kind"]][number] for row in analysis["unlike_photos"] for number in range(SHOWN_OF_A_KIND)],
            [row["captions"][number] for row in analysis["unlike_photos"] for number in range(SHOWN_OF_A_KIND)],
            output_dir / "unlike_photos.png",
            columns=2 * SHOWN_OF_A_KIND,
            title="What the model says to pictures that aren't photos",
        )


def write_html(
    args: argparse.Namespace, model, processor, evaluated: Evaluated, results: dict, analysis: dict | None
) -> None:
    """Writes `report.html`."""
    found, ids = evaluated.found, evaluated.ids()
    shown = evaluated.draw(args.report_photos, args.seed)
    photos = []
    for start in tqdm(range(0, len(shown), args.batch_size), desc="Explaining"):
        positions = shown[start : start + args.batch_size]
        images = [evaluated.picture(position) for position in positions]
        tokens = [found.tokens[position] for position in positions]
        for position, item in zip(positions, explain_pictures(model, processor, images, tokens)):
            item.update(
                id=str(ids[found.rows[position]]),
                caption=found.captions[position],
                references=evaluated.references[position],
                cider=evaluated.ciders[position],
                **({} if analysis is None else analysis["photos"][position]),
            )
            photos.append(item)
    unlike, tables = [], [score_table(results)]
    if analysis is not None:
        tables += failure_tables(analysis)
        drawn = draw_ood_images(args.seed)
        for row in analysis["unlike_photos"]:
            pictures = drawn[row["kind"]][: 2 * SHOWN_OF_A_KIND]
            tokens = row["tokens"][: len(pictures)]
            unlike += [{**item, "kind": row["kind"]} for item in explain_pictures(model, processor, pictures, tokens)]
    about = f"{args.model_name_or_path} on {results['num_images']} pictures of {args.dataset_name}, split {args.split}"
    if len(shown) < len(found.rows):
        about += f"; {len(shown)} of them are shown, drawn by seed {args.seed}"
    decoding = ", ".join(f"{name} {value}" for name, value in results["decoding"].items() if value is not None)
    data = {
        "title": f"Captions of {Path(args.model_name_or_path).resolve().name}",
        "about": f"{about}. Decoding: {decoding}.",
        "tables": tables,
        "photos": photos,
        "unlike_photos": unlike,
        "skipped": [[str(ids[row]), reason] for row, reason in found.skipped],
    }
    write_report(Path(args.output_dir) / "report.html", data)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"python -m tinycap.evaluation: error: {error}")
