"""Calibrates a model's confidence in its captions, and shows what a threshold on it brings.

    python -m tinycap.evaluation.confidence --model_name_or_path . --dataset_name my_photos --split validation

A caption counts as right when its CIDEr against the human captions of its photo is at least what the lowest quarter of
human captions get against the others' (`--human_percentile`). A logistic regression on the mean log-probability of the
caption's tokens and on their number says how probable that is. It is judged on photos that it wasn't fitted on: half
against half, and by cross-validation; the one that is stored is fitted on all of them.

Writes `confidence.json` into the model's folder, where the pipeline and the command line look for it, and to
`--output_dir` the metrics (`confidence_results.json`) and a report with its plot (`confidence.md`, `confidence.png`).
"""

import argparse
import datetime
import hashlib
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import Accelerator

from tinycap.confidence_tinycap import CONFIDENCE_NAME, FEATURES, ConfidenceCalibration, caption_features
from tinycap.evaluation.__main__ import add_data_arguments, open_model_and_data, references_of
from tinycap.evaluation.caption_metrics.caption_metrics import cider_of_each
from tinycap.evaluation.captioning import Captions, caption_dataset
from tinycap.evaluation.reports import plot_reliability
from tinycap.training.data import uncaptioned
from tinycap.training.logs import write_json, write_text


logger = logging.getLogger(__name__)

THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Fewer captions of a kind are too few for a regression or for a row of the table.
MIN_CAPTIONS = 10
FOLDS = 10


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tinycap.evaluation.confidence",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = argparse.BooleanOptionalAction
    add_data_arguments(parser)
    parser.add_argument(
        "--num_beams", type=int, nargs="+", help="ways of decoding to calibrate; 1 and the model's own if not given"
    )
    parser.add_argument(
        "--human_percentile",
        type=float,
        default=25.0,
        help="a caption is right from this percentile of the human captions' own CIDEr on",
    )
    parser.add_argument("--min_cider", type=float, help="a caption is right from this CIDEr (times 100) on, instead")
    parser.add_argument("--seed", type=int, help="of the halves and folds (0 if not given) and of held-out images")
    parser.add_argument(
        "--save_to_model", action=flag, default=True, help="write confidence.json into the model's folder"
    )
    parser.add_argument("--output_dir", default="outputs/confidence", help="folder for metrics, report and plot")
    return parser.parse_args(argv)


# --- fitting and judging ----------------------------------------------------------------------------------------------


def logistic_regression():
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("calibration needs scikit-learn: pip install 'tinycap[evaluation]'") from error
    return make_pipeline(StandardScaler(), LogisticRegression())


def fit_calibration(features: np.ndarray, right: np.ndarray, num_beams: int) -> dict:
    """An entry of `confidence.json`'s `calibrations`.

    Args:
        features: (N, len(FEATURES)), in their order.
        right: (N,) bool.

    Raises:
        ValueError: there are too few right or too few wrong captions to fit anything.
    """
    check_captions(right)
    scaler, regression = logistic_regression().fit(features, right)
    # For unscaled features, so that readers of the file needn't scale theirs.
    coefficients = regression.coef_[0] / scaler.scale_
    intercept = regression.intercept_[0] - float(coefficients @ scaler.mean_)
    return {
        "num_beams": num_beams,
        "intercept": float(intercept),
        "coefficients": dict(zip(FEATURES, map(float, coefficients))),
    }


def check_captions(right: np.ndarray) -> None:
    """Raises `ValueError` where there are too few right or too few wrong captions."""
    kinds = {"right": int(right.sum()), "wrong": int((~right).sum())}
    for kind, count in kinds.items():
        if count < 2 * MIN_CAPTIONS:
            raise ValueError(
                f"expected at least {2 * MIN_CAPTIONS} {kind} captions to calibrate with, got {count} of {len(right)}; "
                "more images, or another --human_percentile or --min_cider?"
            )


def calibrated(entry: dict, features: np.ndarray) -> np.ndarray:
    """(N,) probabilities, by the code that the pipeline runs."""
    calibration = ConfidenceCalibration({"calibrations": [entry]})
    return np.array([calibration(mean * tokens, round(tokens), entry["num_beams"]) for mean, tokens in features])


def reliability(predicted: np.ndarray, right: np.ndarray, num_bins: int = 10) -> list[dict[str, float]]:
    """Bins of equally many captions: their mean `confidence`, the `share` of them that is right, and their `count`."""
    bins = np.array_split(np.argsort(predicted, kind="stable"), min(num_bins, len(predicted)))
    return [
        {"confidence": float(predicted[bin].mean()), "share": float(right[bin].mean()), "count": len(bin)}
        for bin in bins
    ]


def expected_calibration_error(bins: list[dict[str, float]]) -> float:
    """Mean distance between confidence and share over all captions (Naeini et al., 2015), in equally full bins."""
    total = sum(bin["count"] for bin in bins)
    return sum(bin["count"] * abs(bin["confidence"] - bin["share"]) for bin in bins) / total


def judge(predicted: np.ndarray, right: np.ndarray, seed: int) -> dict:
    """Metrics of probabilities on held-out captions.

    Returns:
        `ece`; `ece_by_chance`, that of perfect probabilities on so few captions; `auc`; `brier` and
        `brier_of_base_rate`, that of one probability for all; `bins`.
    """
    from sklearn.metrics import brier_score_loss, roc_auc_score

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
        rows.append(
            {
                "min_confidence": threshold,
                "share_left": float(left.mean()),
                "cider": float(ciders[left].mean()),
                "share_right": float(right[left].mean()),
            }
        )
    return rows


@dataclass
class Decoding:
    """The calibration of one number of beams: the `entry` to store, and the `metrics` of its report."""

    entry: dict
    metrics: dict


def calibrate(captioned: Captions, ciders: np.ndarray, min_cider: float, num_beams: int, seed: int) -> Decoding:
    """Fits and judges one way of decoding.

    Raises:
        ValueError: too few captions are right, or wrong.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_predict, train_test_split

    features = np.array(
        [
            [caption_features(log_prob, num_tokens)[name] for name in FEATURES]
            for log_prob, num_tokens in zip(captioned.log_probs, captioned.num_tokens)
        ]
    )
    right = ciders >= min_cider
    check_captions(right)
    fitted, judged = train_test_split(np.arange(len(right)), test_size=0.5, random_state=seed, stratify=right)
    half = logistic_regression().fit(features[fitted], right[fitted])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    crossed = cross_val_predict(logistic_regression(), features, right, cv=folds, method="predict_proba")[:, 1]
    entry = fit_calibration(features, right, num_beams)
    metrics = {
        "num_beams": num_beams,
        "cider": float(ciders.mean()),
        "share_right": float(right.mean()),
        "half_against_half": judge(half.predict_proba(features[judged])[:, 1], right[judged], seed),
        "cross_validated": judge(crossed, right, seed),
        "thresholds": threshold_table(crossed, right, ciders),
        # How far the stored calibration is from the cross-validated ones.
        "largest_difference_to_cross_validated": float(np.abs(calibrated(entry, features) - crossed).max()),
    }
    return Decoding(entry, metrics)


# --- the run ----------------------------------------------------------------------------------------------------------


def human_ciders(references: list[list[str]]) -> np.ndarray:
    """CIDEr of every human caption against the other ones of its photo.

    Raises:
        ValueError: no photo has several captions.
    """
    several = [group for group in references if len(group) > 1]
    if not several:
        raise ValueError("expected several captions a photo; with one each, say from which --min_cider on one is right")
    ciders = []
    for position in range(max(map(len, several))):
        groups = [group for group in several if position < len(group)]
        others = [group[:position] + group[position + 1 :] for group in groups]
        ciders.extend(cider_of_each([group[position] for group in groups], others))
    return np.array(ciders)


def weights_sha256(folder: str) -> str | None:
    """The digest of a local model's weights, by which its calibration is recognised; `None` for a model on the Hub."""
    path = Path(folder) / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def report(args: argparse.Namespace, results: dict) -> str:
    """The Markdown of `confidence.md`."""
    beams = ", ".join(str(metrics["num_beams"]) for metrics in results["decodings"])
    lines = [
        "# How far a caption can be trusted",
        "",
        f"Written by `python -m tinycap.evaluation.confidence` on {results['date']} with torch {results['torch']} and "
        f"transformers {results['transformers']}; {results['num_images']:,} photos of the {results['split']} split, "
        f"{beams} beams.",
        "",
        f"A caption counts as *right* when its CIDEr is at least {results['min_cider']:.1f}: {results['right_means']}.",
        "",
        "The confidence is the probability of that, by a logistic regression on the mean log-probability of the "
        "caption's tokens and on their number. All metrics here are of captions that the regression wasn't fitted on.",
        "",
        "![Reliability](confidence.png)",
        "",
        "| beams | judged on | captions | right | calibration error | by chance | AUC | Brier | of the base rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for metrics in results["decodings"]:
        for name, label in (("half_against_half", "the other half"), ("cross_validated", f"{FOLDS} folds")):
            judged = metrics[name]
            lines.append(
                f"| {metrics['num_beams']} | {label} | {judged['num_captions']:,} | {judged['share_right']:.1%} "
                f"| {judged['ece']:.3f} | {judged['ece_by_chance']:.3f} | {judged['auc']:.3f} | {judged['brier']:.3f} "
                f"| {judged['brier_of_base_rate']:.3f} |"
            )
    lines += [
        "",
        "*Calibration error*: the mean distance between confidence and share of right captions over ten equally full "
        "bins; *by chance*: what perfect probabilities would show on so few captions.",
    ]
    for metrics in results["decodings"]:
        lines += [
            "",
            f"## What a threshold brings, {metrics['num_beams']} beam{'s' * (metrics['num_beams'] > 1)}",
            "",
            "| `min_confidence` | captions left | their CIDEr | right among them |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {row['min_confidence']:.2f} | {row['share_left']:.1%} | {row['cider']:.1f} | {row['share_right']:.1%} |"
            for row in metrics["thresholds"]
        ]
    return "\n".join(lines) + "\n"


def calibrate_model(args: argparse.Namespace, accelerator: Accelerator) -> tuple[dict, dict]:
    """Captions the images once for each number of beams and calibrates.

    Returns:
        The metrics for the report, and the content of `confidence.json`.

    Raises:
        ValueError: model or data don't fit, or too few captions are right or wrong.
    """
    model, processor, dataset, columns = open_model_and_data(args)
    model.to(accelerator.device)
    skip = uncaptioned(dataset, columns)
    decodings, min_cider = [], args.min_cider
    for num_beams in sorted(set(args.num_beams or [1, model.generation_config.num_beams or 1])):
        captioned = caption_dataset(
            model,
            processor,
            dataset,
            image_column=columns.image,
            batch_size=args.batch_size,
            accelerator=accelerator,
            return_log_probs=True,
            progress=True,
            skip=skip,
            num_beams=num_beams,
            do_sample=False,
        )
        references = references_of(dataset, columns, captioned.rows)
        if min_cider is None:
            min_cider = float(np.percentile(human_ciders(references), args.human_percentile))
        ciders = np.array(cider_of_each(captioned.captions, references))
        decodings.append(calibrate(captioned, ciders, min_cider, num_beams, args.seed))
    share = f"{100 - args.human_percentile:g} %"
    origin = {
        "split": args.split,
        "num_images": len(captioned.rows),
        "min_cider": min_cider,
        "right_means": f"what {share} of human captions reach against the other human captions of their photo"
        if args.min_cider is None
        else f"chosen by --min_cider {args.min_cider}",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    results = {
        "model": args.model_name_or_path,
        # Without the path of a local folder, which means nothing on another machine.
        "dataset": Path(args.dataset_name).name if os.path.isdir(args.dataset_name) else args.dataset_name,
        **origin,
        "num_skipped": len(captioned.skipped),
        "decodings": [decoding.metrics for decoding in decodings],
    }
    digest = {"weights_sha256": weights_sha256(args.model_name_or_path)}
    return results, {"calibrations": [decoding.entry for decoding in decodings], **origin, **digest}


def save(args: argparse.Namespace, results: dict, stored: dict) -> None:
    """Writes metrics, report and plot, and `confidence.json`, into the model's folder too if that is wanted."""
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "confidence_results.json", results)
    write_json(output_dir / CONFIDENCE_NAME, stored)
    text = report(args, results)
    write_text(output_dir / "confidence.md", text)
    bins = {
        f"{metrics['num_beams']} beam{'s' * (metrics['num_beams'] > 1)}": metrics["cross_validated"]["bins"]
        for metrics in results["decodings"]
    }
    plot_reliability(bins, output_dir / "confidence.png")
    if args.save_to_model and os.path.isdir(args.model_name_or_path):
        write_json(Path(args.model_name_or_path) / CONFIDENCE_NAME, stored)
    print(text)


def main(argv: list[str] | None = None) -> dict:
    """Runs the calibration; returns what it writes to `confidence_results.json`."""
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logistic_regression()  # Fails without scikit-learn, before the images are captioned, which takes minutes.
    accelerator = Accelerator()
    results, stored = calibrate_model(args, accelerator)
    if accelerator.is_main_process:
        save(args, results, stored)
    return results


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"python -m tinycap.evaluation.confidence: error: {error}")
