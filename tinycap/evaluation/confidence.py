"""Calibrates a model's confidence in its captions, and reports what a threshold on it brings.

    python -m tinycap.evaluation.confidence --model_name_or_path . --dataset_name my_photos --split validation

A caption counts as right when its CIDEr against the human captions of its image is at least what the lowest quarter of
human captions get against the others' (`--human_percentile`). A logistic regression on the mean log-probability of the
caption's tokens and on their number predicts the probability of that. It is evaluated on images that it wasn't fitted
on: half against half, and by cross-validation; the one that is stored is fitted on all of them.

Writes `confidence.json` into the model's folder, where the pipeline and the command line look for it, and to
`--output_dir` the metrics (`confidence_results.json`) and a report with its plot (`confidence.md`, `confidence.png`).
"""

import argparse
import datetime
import logging
import os
import sys
from pathlib import Path

import jinja2
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tinycap.commands import run_command, write_text, writing
from tinycap.confidence_tinycap import CONFIDENCE_NAME, FEATURES, caption_features
from tinycap.evaluation import captioning
from tinycap.evaluation.caption_metrics.caption_metrics import cider_of_each
from tinycap.evaluation.reports import plot_reliability
from tinycap.training.data import uncaptioned
from tinycap.training.logs import write_json
from tinycap.training.repository import weights_sha256


THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Fewer captions are too few for a row of the table; a regression needs twice as many right ones, and wrong ones.
MIN_CAPTIONS = 10
FOLDS = 10
# Jinja, filled by `report`.
TEMPLATE = Path(__file__).with_name("confidence_template.md")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = captioning.create_parser("tinycap.evaluation.confidence", __doc__.split("\n\n")[0], "outputs/confidence")
    add, switch = parser.add_argument, {"action": argparse.BooleanOptionalAction}
    add("--num_beams", type=int, nargs="+", help="beams to calibrate; 1 and the model's own if not given")
    add("--human_percentile", type=float, default=25.0, help="of human captions' CIDEr, from which a caption is right")
    add("--min_cider", type=float, help="CIDEr (times 100) from which a caption is right, instead of the percentile")
    add("--save_to_model", **switch, default=True, help="write confidence.json into the model's folder")
    return parser.parse_args(argv)


def logistic_regression():
    return make_pipeline(StandardScaler(), LogisticRegression())


def fit_calibration(features: np.ndarray, right: np.ndarray, num_beams: int) -> dict:
    """An entry of `confidence.json`'s `calibrations`, from (N, len(FEATURES)) features and (N,) bool."""
    scaler, regression = logistic_regression().fit(features, right)
    # For unscaled features, so that readers of the file needn't scale theirs.
    coefficients = regression.coef_[0] / scaler.scale_
    intercept = float(regression.intercept_[0] - float(coefficients @ scaler.mean_))
    return {"num_beams": num_beams, "intercept": intercept, "coefficients": dict(zip(FEATURES, coefficients.tolist()))}


def reliability(predicted: np.ndarray, right: np.ndarray, num_bins: int = 10) -> list[dict[str, float]]:
    """Bins of equally many captions: their mean `confidence`, the `share` of them that is right, and their `count`."""
    bins = np.array_split(np.argsort(predicted, kind="stable"), min(num_bins, len(predicted)))
    means = [(float(predicted[bin].mean()), float(right[bin].mean())) for bin in bins]
    return [{"confidence": mean, "share": share, "count": len(bin)} for bin, (mean, share) in zip(bins, means)]


def expected_calibration_error(bins: list[dict[str, float]]) -> float:
    """Mean distance between confidence and share over all captions (Naeini et al., 2015), in equally full bins."""
    total = sum(bin["count"] for bin in bins)
    return sum(bin["count"] * abs(bin["confidence"] - bin["share"]) for bin in bins) / total


def calibration_metrics(predicted: np.ndarray, right: np.ndarray, seed: int) -> dict:
    """Metrics of probabilities on held-out captions; `ece_by_chance`: of perfect probabilities on so few captions,
    `brier_of_base_rate`: of one probability for all."""
    bins = reliability(predicted, right)
    draws = np.random.default_rng(seed).random((200, len(predicted))) < predicted
    return {
        "num_captions": len(predicted),
        "share_right": float(right.mean()),
        "ece": expected_calibration_error(bins),
        "ece_by_chance": float(np.mean([expected_calibration_error(reliability(predicted, draw)) for draw in draws])),
        "auc": float(roc_auc_score(right, predicted)),
        "brier": float(brier_score_loss(right, predicted)),
        "brier_of_base_rate": float(right.mean() * (1 - right.mean())),
        "bins": bins,
    }


def threshold_table(predicted: np.ndarray, right: np.ndarray, ciders: np.ndarray) -> list[dict[str, float]]:
    """For each threshold: `share_left` of the captions, their `cider`, and the `share_right` among them."""
    rows = []
    for threshold in THRESHOLDS:
        left = predicted >= threshold
        if left.sum() < MIN_CAPTIONS:
            break
        values = (threshold, left.mean(), ciders[left].mean(), right[left].mean())
        rows.append(dict(zip(("min_confidence", "share_left", "cider", "share_right"), map(float, values))))
    return rows


def calibrate(captioned: captioning.Captions, ciders: np.ndarray, right: np.ndarray, beams: int, seed: int) -> tuple:
    """The calibration of one number of beams: its entry of `confidence.json`, and its metrics.

    Raises `ValueError` where too few captions are right, or wrong.
    """
    for kind, count in {"right": right.sum(), "wrong": (~right).sum()}.items():
        if count < 2 * MIN_CAPTIONS:
            raise ValueError(
                f"expected at least {2 * MIN_CAPTIONS} {kind} captions to calibrate with, got {count} of {len(right)}; "
                "more images, or another --human_percentile or --min_cider?"
            )
    features = [caption_features(*pair) for pair in zip(captioned.log_probs, captioned.num_tokens)]
    features = np.array([[values[name] for name in FEATURES] for values in features])
    fitted, rest = train_test_split(np.arange(len(right)), test_size=0.5, random_state=seed, stratify=right)
    half = logistic_regression().fit(features[fitted], right[fitted]).predict_proba(features[rest])[:, 1]
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    crossed = cross_val_predict(logistic_regression(), features, right, cv=folds, method="predict_proba")[:, 1]
    return fit_calibration(features, right, beams), {
        "num_beams": beams,
        "cider": float(ciders.mean()),
        "share_right": float(right.mean()),
        "half_against_half": calibration_metrics(half, right[rest], seed),
        "cross_validated": calibration_metrics(crossed, right, seed),
        "thresholds": threshold_table(crossed, right, ciders),
    }


def human_ciders(references: list[list[str]]) -> np.ndarray:
    """CIDEr of every human caption against the other ones of its image; `ValueError` where all images have one."""
    several = [group for group in references if len(group) > 1]
    if not several:
        raise ValueError("expected several captions an image; with one each, set a right one's CIDEr by --min_cider")
    ciders = []
    for position in range(max(map(len, several))):
        groups = [group for group in several if position < len(group)]
        others = [group[:position] + group[position + 1 :] for group in groups]
        ciders.extend(cider_of_each([group[position] for group in groups], others))
    return np.array(ciders)


def calibrate_model(args: argparse.Namespace, accelerator: Accelerator) -> tuple[dict, dict]:
    """Captions the images once for each number of beams and calibrates.

    Returns the content of `confidence_results.json` and that of `confidence.json`. Raises `ValueError` where model or
    data don't fit, or too few captions are right or wrong.
    """
    model, processor, dataset, columns = captioning.load_model_and_data(args)
    model.to(accelerator.device)
    options = {"columns": columns, "batch_size": args.batch_size, "skip": uncaptioned(dataset, columns)}
    options |= {"accelerator": accelerator, "progress": True, "do_sample": False}
    entries, decodings, min_cider = [], [], args.min_cider
    for num_beams in sorted(set(args.num_beams or [1, model.generation_config.num_beams or 1])):
        captioned = captioning.caption_dataset(model, processor, dataset, num_beams=num_beams, **options)
        references = captioning.references_of(dataset, columns, captioned.rows)
        if min_cider is None:
            min_cider = float(np.percentile(human_ciders(references), args.human_percentile))
        ciders = np.array(cider_of_each(captioned.captions, references))
        entry, metrics = calibrate(captioned, ciders, ciders >= min_cider, num_beams, args.seed or 0)
        entries.append(entry)
        decodings.append(metrics)
    right_means = f"chosen by --min_cider {args.min_cider}"
    if args.min_cider is None:
        share = f"{100 - args.human_percentile:g} %"
        right_means = f"what {share} of human captions reach against the other human captions of their photo"
    origin = {"split": args.split, "num_images": len(captioned.rows), "min_cider": min_cider}
    origin |= {"right_means": right_means, "date": datetime.date.today().isoformat()}
    origin |= {"torch": torch.__version__, "transformers": transformers.__version__}
    # Without the path of a local folder, which means nothing on another machine.
    name = Path(args.dataset_name).name if os.path.isdir(args.dataset_name) else args.dataset_name
    results = {"model": args.model_name_or_path, "dataset": name, **origin}
    results |= {"num_skipped": len(captioned.skipped), "decodings": decodings}
    return results, {"calibrations": entries, **origin, "weights_sha256": weights_sha256(args.model_name_or_path)}


def report(results: dict) -> str:
    """The Markdown of `confidence.md`."""
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True)
    return template.render(results, folds=FOLDS)


def main(argv: list[str] | None = None) -> dict:
    """Runs the calibration; returns what it writes to `confidence_results.json`."""
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    accelerator = Accelerator()
    results, stored = calibrate_model(args, accelerator)
    if not accelerator.is_main_process:
        return results
    output_dir, text = Path(args.output_dir), report(results)
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "confidence_results.json", results)
    write_json(output_dir / CONFIDENCE_NAME, stored)
    write_text(output_dir / "confidence.md", text)
    bins = {f"beams: {metrics['num_beams']}": metrics["cross_validated"]["bins"] for metrics in results["decodings"]}
    plot_reliability(bins, output_dir / "confidence.png")
    if args.save_to_model and os.path.isdir(args.model_name_or_path):
        write_json(Path(args.model_name_or_path) / CONFIDENCE_NAME, stored)
    print(text)
    return results


if __name__ == "__main__":
    sys.exit(run_command("python -m tinycap.evaluation.confidence", main))
