"""Puts a trained model at the repository's root, and its figures into `model_card.md`.

    python -m tinycap.evaluation.release --model_name_or_path outputs/flickr8k --evaluation outputs/evaluation \\
        --teacher outputs/teacher --agreement outputs/tokenizer_agreement --earlier_stages outputs/flickr8k-112px

The card is `docs/model_card_template.md`, filled: no figure in it is written by hand.
"""

import argparse
import datetime
import json
import shutil
import sys
from pathlib import Path
from string import Template

import torch
import transformers

from tinycap.modeling_tinycap import TinyCapForConditionalGeneration


ROOT = Path(__file__).resolve().parents[1]
# What `from_pretrained` and `pipeline` read; the code is at the root already.
RELEASED = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
)
SYSTEMS = (
    ("constant", "one constant caption"),
    ("shuffled", "captions of other photos"),
    (None, "**TinyCap**"),
    ("human", "a human"),
)
SCORES = ("cider", "bleu_1", "bleu_4", "rouge_l", "distinct_captions")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tinycap.evaluation.release", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", required=True, help="output folder of train_distill.py")
    parser.add_argument(
        "--evaluation", required=True, help="output folder of tinycap.evaluation, with a teacher and --baselines"
    )
    parser.add_argument("--teacher", required=True, help="output folder of train_teacher.py")
    parser.add_argument("--agreement", required=True, help="output folder of benchmarks/tokenizer_agreement.py")
    parser.add_argument("--earlier_stages", nargs="*", default=[], help="output folders that the run continued from")
    return parser.parse_args(argv)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is its folder the right one?") from None


def hours_of(folder: str | Path) -> float:
    """Hours that a run's loop took, from its `metrics.jsonl`."""
    path = Path(folder) / "metrics.jsonl"
    try:
        last = path.read_text(encoding="utf-8").splitlines()[-1]
    except (FileNotFoundError, IndexError):
        raise ValueError(f"{path}: expected the log of a run") from None
    return json.loads(last)["elapsed_seconds"] / 3600


def score_table(evaluation: dict) -> str:
    """Rows of Markdown: what the model scores, between what the baselines score."""
    rows = []
    for name, label in SYSTEMS:
        scores = evaluation if name is None else evaluation["baselines"][name]
        figures = [f"{scores[score]:.1f}" for score in SCORES[:-1]] + [f"{scores[SCORES[-1]]:,}"]
        rows.append(f"| {label} | " + " | ".join(figures) + " |")
    return "\n".join(rows)


def fill_card(args: argparse.Namespace) -> str:
    """The text of `model_card.md`.

    Raises:
        ValueError: a file or a figure that the template names is missing.
    """
    evaluation = read_json(Path(args.evaluation) / "eval_results.json")
    teacher = read_json(Path(args.teacher) / "eval_results.json")
    agreement = read_json(Path(args.agreement) / "tokenizer_agreement.json")
    for name in ("fidelity", "baselines"):
        if name not in evaluation:
            raise ValueError(f"{args.evaluation}: expected an evaluation with {name}, got {sorted(evaluation)}")
    model = TinyCapForConditionalGeneration.from_pretrained(args.model_name_or_path)
    stages = [*args.earlier_stages, args.model_name_or_path]
    figures = {
        "parameters": f"{model.num_parameters():,}",
        "student_parameters": f"{model.vision_model.num_parameters():,}",
        "megabytes": f"{(Path(args.model_name_or_path) / 'model.safetensors').stat().st_size / 1e6:.1f}",
        "vocabulary": f"{model.config.text_config.vocab_size:,}",
        "num_images": f"{evaluation['num_images']:,}",
        "num_beams": evaluation["decoding"]["num_beams"],
        "table": score_table(evaluation),
        "teacher_hours": f"{hours_of(args.teacher):.1f}",
        "student_hours": f"{sum(map(hours_of, stages)):.1f}",
        "date": datetime.date.today().isoformat(),
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "agreement": f"{agreement['largest_move']:.2f}",
        **{name: f"{evaluation[name]:.2f}" for name in SCORES[:-1]},
        **{f"teacher_{name}": f"{value:.1f}" for name, value in teacher.items()},
        **{name: f"{evaluation['fidelity'][name]:.3f}" for name in evaluation["fidelity"]},
        **{name: f"{evaluation['fidelity'][name]:.1f}" for name in ("recall_at_1", "recall_at_5")},
    }
    template = Template((ROOT / "docs" / "model_card_template.md").read_text(encoding="utf-8"))
    try:
        return template.substitute(figures)
    except KeyError as error:
        raise ValueError(f"model_card_template.md names the figure {error}, which no given folder has") from None


def main(argv: list[str] | None = None) -> None:
    """Fills the card, then copies the model: a figure that is missing leaves the root as it was."""
    args = parse_args(argv)
    card = fill_card(args)
    missing = [name for name in RELEASED if not (Path(args.model_name_or_path) / name).is_file()]
    if missing:
        raise ValueError(f"{args.model_name_or_path}: expected a model repository, {', '.join(missing)} missing")
    for name in RELEASED:
        shutil.copyfile(Path(args.model_name_or_path) / name, ROOT / name)
    (ROOT / "model_card.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"python -m tinycap.evaluation.release: error: {error}")
