"""Scores any TinyCap checkpoint on any captioned data set.

    python -m tinycap.evaluation --model_name_or_path . --dataset_name my_photos --split validation --baselines

Writes `eval_results.json`, `captions.jsonl` and the contact sheet `samples.png` to `--output_dir`.
"""

import argparse
import json
import logging
import random
import sys
from pathlib import Path

from accelerate import Accelerator
from transformers import AutoModelForImageTextToText, AutoProcessor

from tinycap.evaluation.captioning import Captions, caption_dataset
from tinycap.evaluation.fidelity import distillation_fidelity
from tinycap.evaluation.metrics import score_captions
from tinycap.evaluation.reports import contact_sheet
from tinycap.processing_tinycap import load_image
from tinycap.training.data import clean_captions, load_split, resolve_columns
from tinycap.training.logs import write_json, write_text
from tinycap.training.teacher import FEATURES, Teacher


logger = logging.getLogger(__name__)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model captions which pictures."""
    parser.add_argument("--model_name_or_path", required=True, help="a TinyCap repository")
    parser.add_argument("--dataset_name", required=True, help="Hub id, folder of parquet, or imagefolder")
    parser.add_argument("--dataset_config_name", help="configuration of the dataset, where it has several")
    parser.add_argument("--split", default="validation", help="split to caption")
    parser.add_argument("--image_column", help="column of the images; found by its type if not given")
    parser.add_argument("--caption_column", help="column of the captions; found by its name if not given")
    parser.add_argument("--max_samples", type=int, help="use only the first so many pictures")
    parser.add_argument("--batch_size", type=int, default=32, help="pictures run through the model together")


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
    parser.add_argument("--num_shown", type=int, default=16, help="pictures on the contact sheet")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures shown and of the shuffled captions")
    parser.add_argument("--output_dir", default="outputs/evaluation", help="where the results go")
    parser.add_argument("--overwrite_output_dir", action=flag, default=False, help="write over earlier results")
    return parser.parse_args(argv)


def baseline_scores(captions: list[str], references: list[list[str]], seed: int) -> dict[str, dict[str, float]]:
    """What to hold the scores against.

    Returns:
        `constant`: one caption for all pictures, the human one that shares most words with all others; `shuffled`: the
        model's captions, each at another picture; `human`: one person's caption against the other persons'.
    """
    everyone = [caption for group in references for caption in group]
    counts: dict[str, int] = {}
    for caption in everyone:
        for word in set(caption.lower().split()):
            counts[word] = counts.get(word, 0) + 1
    words = [caption.lower().split() for caption in everyone]
    # The mean share of captions that hold each of its words; very short ones would win by their articles alone.
    typical = max(
        (index for index in range(len(words)) if len(words[index]) >= 6),
        key=lambda index: sum(counts[word] for word in words[index]) / len(words[index]),
        default=0,
    )
    shift = random.Random(seed).randrange(1, len(captions)) if len(captions) > 1 else 0
    found = {
        "constant": score_captions([everyone[typical]] * len(references), references),
        "shuffled": score_captions(captions[shift:] + captions[:shift], references),
    }
    several = [group for group in references if len(group) > 1]
    if several:
        found["human"] = score_captions([group[0] for group in several], [group[1:] for group in several])
    return found


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
    dataset = load_split(args.dataset_name, args.split, args.dataset_config_name)
    columns = resolve_columns(dataset, args.image_column, args.caption_column)
    if args.max_samples is not None:
        dataset = dataset.select(range(min(args.max_samples, len(dataset))))
    model = AutoModelForImageTextToText.from_pretrained(args.model_name_or_path, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(args.model_name_or_path, trust_remote_code=True)
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
        model.to(accelerator.device),
        processor,
        dataset,
        image_column=columns.image,
        batch_size=args.batch_size,
        accelerator=accelerator,
        teacher=teacher,
        progress=True,
        **generation,
    )
    results = score(args, dataset, columns, found)
    results["decoding"] = {
        name: generation.get(name, getattr(model.generation_config, name, None))
        for name in ("num_beams", "length_penalty", "max_new_tokens")
    }
    if accelerator.is_main_process:
        write_results(args, dataset, columns, found, results)
        print(json.dumps(results, indent=2))
    return results


def score(args: argparse.Namespace, dataset, columns, found: Captions) -> dict:
    """All figures of the captions and embeddings that were found."""
    references = references_of(dataset, columns, found)
    results = {
        "model": args.model_name_or_path,
        "dataset": args.dataset_name,
        "split": args.split,
        "num_images": len(found.rows),
        "num_skipped": len(found.skipped),
        **score_captions(found.captions, references, tuple(args.java_metrics)),
    }
    if found.teacher_embeds is not None:
        results["fidelity"] = distillation_fidelity(found.image_embeds, found.teacher_embeds)
    if args.baselines:
        results["baselines"] = baseline_scores(found.captions, references, args.seed)
    return results


def references_of(dataset, columns, found: Captions) -> list[list[str]]:
    """The human captions of the pictures that were captioned; a picture without any is an error that names its row."""
    captions = dataset.select_columns([columns.caption])
    references = []
    for row in found.rows:
        try:
            references.append(clean_captions(captions[row][columns.caption]))
        except ValueError as error:
            raise ValueError(f"row {row}, column {columns.caption}: {error}") from error
    return references


def write_results(args: argparse.Namespace, dataset, columns, found: Captions, results: dict) -> None:
    """Writes `eval_results.json`, `captions.jsonl` and `samples.png`."""
    output_dir = Path(args.output_dir)
    write_json(output_dir / "eval_results.json", results)
    references = references_of(dataset, columns, found)
    ids = dataset[columns.image_id] if columns.image_id else list(range(len(dataset)))
    lines = [
        {"image_id": ids[row], "caption": caption, "references": group}
        for row, caption, group in zip(found.rows, found.captions, references)
    ]
    if found.teacher_embeds is not None:
        for line, cosine in zip(lines, (found.image_embeds * found.teacher_embeds).sum(dim=-1).tolist()):
            line["teacher_cosine"] = cosine
    lines += [{"image_id": ids[row], "caption": None, "error": reason} for row, reason in found.skipped]
    write_text(output_dir / "captions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    # Drawn by seed, not chosen: a contact sheet of the best ones would say nothing.
    shown = sorted(random.Random(args.seed).sample(range(len(found.rows)), min(args.num_shown, len(found.rows))))
    contact_sheet(
        [load_image(dataset[found.rows[position]][columns.image]) for position in shown],
        [found.captions[position] for position in shown],
        output_dir / "samples.png",
        references=[references[position][0] for position in shown],
        title="Model's caption, and a human's in grey",
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"python -m tinycap.evaluation: error: {error}")
