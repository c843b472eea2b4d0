"""Puts a trained model at the repository's root, and its metrics into `model_card.md`.

    python scripts/release.py --model_name_or_path outputs/flickr8k --dataset_name flickr8k \\
        --evaluation outputs/evaluation --teacher outputs/flickr8k-teacher \\
        --stages outputs/flickr8k-112px outputs/flickr8k-112px-mixed outputs/flickr8k-224px outputs/flickr8k-decoder \\
        outputs/flickr8k-cider \\
        --agreement outputs/tokenizer_agreement --latency outputs/caption_latency

Fills `docs/model_card_template.md` with the metrics of these folders. Copies its front matter to `README.md`, where the
Hub reads it, and writes training curves and captions of out-of-distribution images to `docs/`.
"""

import argparse
import datetime
import json
import random
import re
import shutil
import sys
from pathlib import Path
from string import Template

import torch
import transformers
from PIL import Image

from tinycap import REPOSITORY
from tinycap.evaluation.__main__ import main as run_evaluation
from tinycap.evaluation.failures import FAILURES
from tinycap.evaluation.reports import plot_curves
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training.logs import hours_of, read_json
from tinycap.training.teacher import FEATURES


ROOT = REPOSITORY
# What `from_pretrained` and `pipeline` read; the code is at the root already.
RELEASED = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
)
SYSTEMS = (
    ("constant", "one constant caption"),
    ("shuffled", "captions of other photos"),
    (None, "**TinyCap**"),
    ("model_leave_one_out", "TinyCap, against all humans but one"),
    ("human", "a human, against the others"),
)
# Lines of text from the evaluation that the card quotes: of each failure, and of all photos.
NUM_EXAMPLES, NUM_SAMPLES = 3, 8
SCORES = ("cider", "bleu_1", "bleu_4", "rouge_l", "distinct_captions")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--model_name_or_path", required=True, help="output folder of train_distill.py or of tinycap.training.soup"
    )
    parser.add_argument(
        "--evaluation",
        required=True,
        help="output folder of tinycap.evaluation, with a teacher, --baselines and --failures",
    )
    parser.add_argument("--dataset_name", help="evaluate on its validation split first, and write that to --evaluation")
    parser.add_argument("--teacher", required=True, help="output folder of train_teacher.py")
    parser.add_argument("--teacher_feature", choices=FEATURES, default="projected", help="what the student learnt")
    parser.add_argument("--earlier_teachers", nargs="*", default=[], help="folders of the earlier stages' teachers")
    parser.add_argument("--agreement", required=True, help="output folder of benchmarks/tokenizer_agreement.py")
    parser.add_argument("--latency", required=True, help="output folder of benchmarks/caption_latency.py")
    parser.add_argument(
        "--stages",
        nargs="+",
        required=True,
        help="output folders of the model's training runs, in their order",
    )
    return parser.parse_args(argv)


def score_table(evaluation: dict) -> str:
    """Rows of Markdown: what the model scores, between what the baselines score."""
    rows = []
    for name, label in SYSTEMS:
        scores = evaluation if name is None else evaluation["baselines"][name]
        values = [f"{scores[score]:.1f}" for score in SCORES[:-1]] + [f"{scores[SCORES[-1]]:,.0f}"]
        rows.append(f"| {label} | " + " | ".join(values) + " |")
    return "\n".join(rows)


def failure_table(failures: dict) -> str:
    """Rows of Markdown: each failure's rate, of the model, of a human and of captions of other photos."""
    rows = []
    for failure in (*FAILURES, "none of these"):
        rates = (failures[who][failure] for who in ("model", "human", "other_photos"))
        rows.append(f"| {failure} | " + " | ".join(f"{rate:.1f}" for rate in rates) + " |")
    return "\n".join(rows)


def category_table(categories: list[dict]) -> str:
    """Rows of Markdown: each category's score, how often it is named, and how often rightly."""
    rows = []
    for row in categories:
        right = "-" if row["right"] is None else f"{row['right']:.0f}"
        rates = [f"{row[name]:.0f}" for name in ("wrong object", "wrong count")]
        values = (f"{row['photos']:,}", f"{row['cider']:.1f}", f"{row['named']:.0f}", right, *rates)
        rows.append(f"| {row['category']} | " + " | ".join(values) + " |")
    return "\n".join(rows)


def unlike_table(rows: list[dict]) -> str:
    """Rows of Markdown: the model's captions of each kind of out-of-distribution image."""
    return "\n".join(
        f"| {row['kind']} | {row['distinct']} of {row['pictures']} | {row['names_person_or_dog']:.0f} | "
        f"{row['token_probability']:.2f} | {row['commonest']} |"
        for row in rows
    )


def latency_table(latency: dict) -> str:
    """Rows of Markdown: what one caption costs by each way to run TinyCap and by each peer, and what starting does."""
    rows = []
    turns = latency["batches"]["1"]
    for name, system in latency["systems"].items():
        if "bytes_on_disk" not in system:
            continue
        timing = turns[name if name in turns else f"{name}, from a file"]["cpu"]
        cells = (
            f"{timing['milliseconds']:.0f}, {timing['ratio_to_floor']:.2f}",
            f"{system['parameters'] / 1e6:.1f} M",
            f"{system['bytes_on_disk'] / 1e6:.1f}",
            f"{system['cpu_seconds']:.1f}",
            f"{system['peak_memory_mb']:,.0f}",
        )
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def read_captions(path: Path) -> list[dict]:
    """The captioned photos of a `captions.jsonl`; a run without `--failures` is an error."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is its folder the right one?") from None
    lines = [line for line in lines if line["caption"] is not None]
    if not all("failures" in line for line in lines):
        raise ValueError(f"{path}: expected the failures of each caption; was it made with --failures?")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("$", "\\$")


def sample_table(lines: list[dict]) -> str:
    """Rows of Markdown: captions drawn by seed, each with one of a human and its CIDEr."""
    drawn = random.Random(0).sample(lines, min(NUM_SAMPLES, len(lines)))
    return "\n".join(
        f"| {line['image_id']} | {_cell(line['caption'])} | {_cell(line['references'][0])} | {line['cider']:.0f} |"
        for line in drawn
    )


def example_list(lines: list[dict]) -> str:
    """Markdown: of each failure some captions, drawn by seed, with what speaks against them."""
    items = []
    for failure in FAILURES:
        failed = [line for line in lines if failure in line["failures"]]
        for line in random.Random(0).sample(failed, min(NUM_EXAMPLES, len(failed))):
            items.append(f"- {failure}: “{_cell(line['caption'])}”: {_cell(line['failures'][failure])}")
    return "\n".join(items)


def gender_cells(genders: dict) -> dict[str, str]:
    """The values of `failures.gender_metrics`, as the template names them: `model_male_confirmed` and so on."""
    return {f"{who}_{name}": f"{value:.0f}" for who, metrics in genders.items() for name, value in metrics.items()}


def fill_card(args: argparse.Namespace) -> str:
    """The text of `model_card.md`.

    Raises:
        ValueError: a file or a value that the template names is missing.
    """
    evaluation = read_json(Path(args.evaluation) / "eval_results.json")
    teacher = read_json(Path(args.teacher) / "eval_results.json")
    agreement = read_json(Path(args.agreement) / "tokenizer_agreement.json")
    latency = read_json(Path(args.latency) / "caption_latency.json")
    for name in ("fidelity", "baselines"):
        if name not in evaluation:
            raise ValueError(f"{args.evaluation}: expected an evaluation with {name}, got {sorted(evaluation)}")
    # A generation config that doesn't name it leaves it to transformers' default.
    length_penalty = evaluation["decoding"]["length_penalty"]
    failures = read_json(Path(args.evaluation) / "failures.json")
    captions = read_captions(Path(args.evaluation) / "captions.jsonl")
    model = TinyCapForConditionalGeneration.from_pretrained(args.model_name_or_path)
    values = {
        "parameters": f"{model.num_parameters():,}",
        "student_parameters": f"{model.vision_model.num_parameters():,}",
        "megabytes": f"{(Path(args.model_name_or_path) / 'model.safetensors').stat().st_size / 1e6:.1f}",
        "vocabulary": f"{model.config.text_config.vocab_size:,}",
        "num_images": f"{evaluation['num_images']:,}",
        "num_beams": evaluation["decoding"]["num_beams"],
        "length_penalty": 1.0 if length_penalty is None else length_penalty,
        "table": score_table(evaluation),
        "vocabulary_used": f"{evaluation['vocabulary_used']:.1f}",
        "constant_caption": evaluation["baselines"]["constant"]["caption"],
        "constant_chosen_from": evaluation["baselines"]["constant"]["chosen_from"],
        "failure_table": failure_table(failures["failures"]),
        "false_alarms": f"{100 - failures['failures']['human']['none of these']:.0f}",
        "invented_by_human": f"{failures['failures']['human']['invented detail']:.0f}",
        "category_table": category_table(failures["categories"]),
        "unlike_table": unlike_table(failures["unlike_photos"]),
        "token_probability": f"{failures['token_probability']:.2f}",
        "num_samples": min(NUM_SAMPLES, len(captions)),
        "sample_table": sample_table(captions),
        "example_list": example_list(captions),
        **gender_cells(failures["gender"]),
        "teacher_hours": f"{sum(map(hours_of, [*args.earlier_teachers, args.teacher])):.1f}",
        "student_hours": f"{sum(map(hours_of, args.stages)):.1f}",
        "date": datetime.date.today().isoformat(),
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "agreement": f"{agreement['largest_move']:.2f}",
        "latency_table": latency_table(latency),
        "latency_tokens": latency["num_tokens"],
        "latency_machine": latency["machine"],
        "latency_date": latency["date"],
        **{name: f"{evaluation[name]:.2f}" for name in SCORES[:-1]},
        **{f"teacher_{name}": f"{value:.1f}" for name, value in teacher.items()},
        **{name: f"{evaluation['fidelity'][name]:.3f}" for name in evaluation["fidelity"]},
        **{name: f"{evaluation['fidelity'][name]:.1f}" for name in ("recall_at_1", "recall_at_5")},
    }
    template = Template((ROOT / "docs" / "model_card_template.md").read_text(encoding="utf-8"))
    try:
        return template.substitute(values)
    except KeyError as error:
        raise ValueError(f"model_card_template.md names the value {error}, which no given folder has") from None


def with_front_matter(text: str, card: str) -> str:
    """`text` with the YAML front matter of `card` in place of its own, if it has any."""
    front, _ = split_front_matter(card)
    return front + split_front_matter(text)[1]


def split_front_matter(text: str) -> tuple[str, str]:
    """The front matter with its fences and the empty line after it, and the rest."""
    match = re.match(r"---\n.*?\n---\n\n?", text, flags=re.DOTALL)
    return (match[0], text[match.end() :]) if match else ("", text)


def evaluate(args: argparse.Namespace) -> None:
    """Runs the evaluation that the card quotes."""
    run_evaluation(
        [
            *("--model_name_or_path", args.model_name_or_path, "--dataset_name", args.dataset_name),
            *("--split", "validation", "--baselines", "--failures"),
            *("--teacher_name_or_path", args.teacher, "--teacher_feature", args.teacher_feature),
            *("--output_dir", args.evaluation, "--overwrite_output_dir"),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Fills the card, then copies the model: a missing value leaves the root as it was."""
    args = parse_args(argv)
    if args.dataset_name is not None:
        evaluate(args)
    card = fill_card(args)
    missing = [name for name in RELEASED if not (Path(args.model_name_or_path) / name).is_file()]
    if missing:
        raise ValueError(f"{args.model_name_or_path}: expected a model repository, {', '.join(missing)} missing")
    if not (Path(args.evaluation) / "unlike_photos.png").is_file():
        raise ValueError(f"{args.evaluation}: expected unlike_photos.png; was it made with --failures?")
    for name in RELEASED:
        shutil.copyfile(Path(args.model_name_or_path) / name, ROOT / name)
    (ROOT / "model_card.md").write_text(card, encoding="utf-8")
    # The Hub reads what a repository is from the head of its README.
    readme = ROOT / "README.md"
    readme.write_text(with_front_matter(readme.read_text(encoding="utf-8"), card), encoding="utf-8")
    plot_curves([Path(stage) / "metrics.jsonl" for stage in args.stages], ROOT / "docs" / "curves.png")
    # A palette: the noise among the images would take hundreds of kilobytes in full colour.
    with Image.open(Path(args.evaluation) / "unlike_photos.png") as sheet:
        sheet.convert("RGB").quantize(128).save(ROOT / "docs" / "unlike_photos.png", optimize=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"release.py: error: {error}")
