"""Scores any TinyCap checkpoint on any captioned dataset.

    python -m tinycap.evaluation --model_name_or_path . --dataset_name my_photos --split validation --baselines

Writes `eval_results.json`, `captions.jsonl`, the contact sheet `samples.png` and `report.html`, which a browser opens
from disk, to `--output_dir`; with `--failures`, `failures.json` and `unlike_photos.png` too.
"""

import argparse
import json
import logging
import random
import sys
from pathlib import Path

from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from tinycap.commands import run_command, write_text, writing
from tinycap.evaluation import captioning, failures, html_report, metrics, ood_images
from tinycap.evaluation.caption_metrics.caption_metrics import cider_of_each, metric_caveats
from tinycap.evaluation.reports import contact_sheet
from tinycap.processing_tinycap import load_image
from tinycap.training.data import image_ids, load_splits, resolve_columns, uncaptioned
from tinycap.training.logs import write_json
from tinycap.training.teacher import FEATURES, Teacher


# Images on the contact sheet of each kind of those that aren't photos; the report shows twice as many.
SHOWN_OF_A_KIND = 2
GENERATION = ("num_beams", "length_penalty", "max_new_tokens")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = captioning.create_parser("tinycap.evaluation", __doc__.split("\n\n")[0], "outputs/evaluation")
    add, switch = parser.add_argument, {"action": argparse.BooleanOptionalAction, "default": False}
    add("--overwrite_output_dir", **switch, help="write over earlier results")
    add("--num_beams", type=int, help="beams; as the model's generation config says if not given")
    add("--length_penalty", type=float, help="above 0 favours longer captions of a beam search")
    add("--max_new_tokens", type=int, help="longest caption in tokens")
    add("--teacher_name_or_path", help="also compare the student's embeddings with this teacher's, and caption those")
    add("--teacher_feature", choices=FEATURES, default="pooled", help="which of its embeddings")
    add("--baselines", **switch, help="what a constant, a shuffled, a human caption scores")
    add("--failures", **switch, help="find errors by English word lists of everyday photos; caption drawings")
    add("--report_photos", type=int, default=200, help="images in report.html, drawn by seed; 0: no report")
    add("--num_shown", type=int, default=16, help="images on the contact sheet")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Runs the evaluation; returns what it writes to `eval_results.json`.

    Raises `ValueError` where the folder isn't empty, or model, data or teacher don't fit.
    """
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    accelerator = Accelerator()
    output_dir = Path(args.output_dir)
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    if any(output_dir.iterdir()) and not args.overwrite_output_dir:
        raise ValueError(f"--output_dir {output_dir}: expected an empty folder; --overwrite_output_dir writes over it")
    evaluation = Evaluation(args, accelerator)
    results = evaluation.score()
    if accelerator.is_main_process:
        evaluation.write_reports(results)
        print(summary(results, output_dir))
    return results


class Evaluation:
    """A captioned dataset, with its metrics and reports."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator):
        self.args, self.seed = args, args.seed or 0
        self.model, self.processor, self.dataset, self.columns = captioning.load_model_and_data(args)
        self.model.to(accelerator.device)
        teacher = None
        if args.teacher_name_or_path is not None:
            statistics = self.processor.image_processor.image_mean, self.processor.image_processor.image_std
            teacher = Teacher.from_pretrained(args.teacher_name_or_path, args.teacher_feature, *statistics)
            teacher.check_width(self.model.config.vision_config.projection_dim)
            teacher.to(accelerator.device)
        self.generation = {name: getattr(args, name) for name in GENERATION if getattr(args, name) is not None}
        options = {"columns": self.columns, "batch_size": args.batch_size, "accelerator": accelerator}
        options |= {"teacher": teacher, "progress": True, "skip": uncaptioned(self.dataset, self.columns)}
        options |= self.generation
        self.captioned = captioning.caption_dataset(self.model, self.processor, self.dataset, **options)
        self.references = captioning.references_of(self.dataset, self.columns, self.captioned.rows)

    def score(self) -> dict:
        """All metrics of captions and embeddings."""
        args, captioned = self.args, self.captioned
        results = {
            **{"model": args.model_name_or_path, "dataset": args.dataset_name, "split": args.split},
            **{"num_images": len(captioned.rows), "num_skipped": len(captioned.skipped)},
            **metrics.score_captions(captioned.captions, self.references),
        }
        if caveats := metric_caveats(self.references):
            results["caveats"] = caveats
        if captioned.teacher_embeds is not None:
            results["fidelity"] = metrics.distillation_fidelity(captioned.image_embeds, captioned.teacher_embeds)
            if self.model.config.memory != "patches":
                sources = (self.model, self.processor, captioned.teacher_embeds, args.batch_size)
                captions = captioning.caption_embeds(*sources, **self.generation)
                results["teacher_captions"] = metrics.score_captions(captions, self.references)
        if args.baselines:
            training = training_references(args)
            results["baselines"] = metrics.baseline_scores(captioned.captions, self.references, training, self.seed)
        # % of the tokens that the model could say.
        used = {token for caption in captioned.tokens for token in caption}
        results["vocabulary_used"] = 100 * len(used) / self.model.config.text_config.vocab_size
        defaults = {name: getattr(self.model.generation_config, name, None) for name in GENERATION}
        results["decoding"] = defaults | self.generation
        return results

    def draw(self, number: int) -> list[int]:
        """Positions of captioned images to show, drawn by seed: chosen ones would say nothing."""
        positions = range(len(self.captioned.rows))
        return sorted(random.Random(self.seed).sample(positions, min(number, len(positions))))

    def images(self, positions: list[int]) -> list[Image.Image]:
        rows = [self.dataset[self.captioned.rows[position]] for position in positions]
        return [load_image(self.columns.image_of(row)) for row in rows]

    def write_reports(self, results: dict) -> None:
        """Writes the files that the module names to `--output_dir`."""
        output_dir, captioned = Path(self.args.output_dir), self.captioned
        write_json(output_dir / "eval_results.json", results)
        ids = image_ids(self.dataset, self.columns)
        ciders = cider_of_each(captioned.captions, self.references)
        records = [
            {"image_id": ids[row], "caption": caption, "references": group, "cider": cider}
            for row, caption, group, cider in zip(captioned.rows, captioned.captions, self.references, ciders)
        ]
        analysis = None
        if self.args.failures:
            analysis = failures.analyse(captioned.captions, self.references, ciders, self.seed)
            analysis["token_probability"] = captioned.mean_token_probability()
            analysis["unlike_photos"] = ood_images.caption_ood_images(
                self.model, self.processor, self.seed, **self.generation
            )
            for record, photo in zip(records, analysis.pop("photos")):
                record.update(photo)
            write_failures(output_dir, analysis)
        skipped = [{"image_id": ids[row], "caption": None, "error": reason} for row, reason in captioned.skipped]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records + skipped]
        write_text(output_dir / "captions.jsonl", "".join(lines))
        shown = self.draw(self.args.num_shown)
        contact_sheet(
            self.images(shown),
            [captioned.captions[position] for position in shown],
            output_dir / "samples.png",
            references=[self.references[position][0] for position in shown],
            title="Model's caption, and a human's in grey",
        )
        if self.args.report_photos:
            data = self.html_data(records, results, analysis)
            data["skipped"] = [[str(record["image_id"]), record["error"]] for record in skipped]
            html_report.write_report(output_dir / "report.html", data)

    def html_data(self, records: list[dict], results: dict, analysis: dict | None) -> dict:
        """What `report.html` shows, but for the skipped images."""
        args, shown, photos = self.args, self.draw(self.args.report_photos), []
        for start in tqdm(range(0, len(shown), args.batch_size), desc="Explaining"):
            positions = shown[start : start + args.batch_size]
            tokens = [self.captioned.tokens[position] for position in positions]
            items = html_report.explain_images(self.model, self.processor, self.images(positions), tokens)
            for position, item in zip(positions, items):
                item["mean_token_probability"] = self.captioned.mean_token_probability(position)
                photos.append({**records[position], "id": str(records[position]["image_id"]), **item})
        drawings, tables = [], [html_report.score_table(results)]
        if analysis is not None:
            tables += html_report.failure_tables(analysis)
            for row in analysis["unlike_photos"]:
                images, tokens = (row[name][: 2 * SHOWN_OF_A_KIND] for name in ("images", "tokens"))
                items = html_report.explain_images(self.model, self.processor, images, tokens)
                drawings += [{**item, "kind": row["kind"]} for item in items]
        about = f"{args.model_name_or_path} on {len(records)} images of {args.dataset_name}, split {args.split}"
        if len(shown) < len(records):
            about += f"; {len(shown)} of them are shown, drawn by seed {self.seed}"
        decoding = ", ".join(f"{name} {value}" for name, value in results["decoding"].items() if value is not None)
        title = f"Captions of {Path(args.model_name_or_path).resolve().name}"
        data = {"title": title, "about": f"{about}. Decoding: {decoding}.", "tables": tables}
        return {**data, "photos": photos, "unlike_photos": drawings}


def training_references(args: argparse.Namespace) -> list[list[str]] | None:
    """The captions of split "train", to choose the constant baseline from; `None` where it is scored or isn't there."""
    if args.split == "train":
        return None
    columns = {name: getattr(args, name) for name in ("image_column", "caption_column", "allow_remote_images")}
    try:
        dataset, _ = load_splits(
            args.dataset_name, args.dataset_config_name, seed=captioning.hold_out_seed(args), **columns
        )
    except ValueError:
        return None
    columns = resolve_columns(dataset, **columns)
    bad = uncaptioned(dataset, columns)
    return captioning.references_of(dataset, columns, (row for row in range(len(dataset)) if row not in bad))


def write_failures(output_dir: Path, analysis: dict) -> None:
    """Writes `failures.json` and `unlike_photos.png`."""
    rows = analysis["unlike_photos"]
    stored = [{name: row[name] for name in row if name not in ("tokens", "images")} for row in rows]
    write_json(output_dir / "failures.json", {**analysis, "unlike_photos": stored})
    contact_sheet(
        [image for row in rows for image in row["images"][:SHOWN_OF_A_KIND]],
        [caption for row in rows for caption in row["captions"][:SHOWN_OF_A_KIND]],
        output_dir / "unlike_photos.png",
        columns=2 * SHOWN_OF_A_KIND,
        title="Captions of images that aren't photos",
    )


def summary(results: dict, output_dir: Path) -> str:
    """The metrics of model and baselines as a table, and where the rest is, for the terminal."""
    table = html_report.score_table(results)
    cells = [table["columns"], *(row["cells"] for row in table["rows"])]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*cells)]
    lines = ["  ".join(f"{str(cell):>{width}}" for cell, width in zip(row, widths)) for row in cells]
    lines.append(f"{results['num_images']} images, {results['num_skipped']} skipped. All results: {output_dir}")
    return "\n".join(lines + results.get("caveats", []))


if __name__ == "__main__":
    sys.exit(run_command("python -m tinycap.evaluation", main))
