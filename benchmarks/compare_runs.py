"""Compares training runs: a row for each recipe, the mean over its seeds and half their range.

    python benchmarks/compare_runs.py --runs "weight 0=outputs/w0-seed42,outputs/w0-seed43" \\
        "weight 1=outputs/w1-seed42,outputs/w1-seed43" --plot_over distill_weight

A run is an output folder of `train_distill.py`. Metrics of an `evaluation` folder in it, by `python -m
tinycap.evaluation`, take precedence over those of its last validation. Writes `compare_runs.json`, a Markdown table
and, with `--plot_over`, `compare_runs.png`.
"""

import statistics
import sys
from pathlib import Path

from benchmarks.results import benchmark_parser, markdown_table, save_results
from tinycap.evaluation.reports import plot_groups
from tinycap.training.logs import hours_of, read_json


# Heading and digits by the name in the results.
METRICS = {
    **{"cider": ("CIDEr", 1), "bleu_4": ("BLEU-4", 1), "rouge_l": ("ROUGE-L", 1)},
    **{"distinct_captions": ("distinct captions", 0), "vocabulary_used": ("vocabulary used, %", 1)},
    **{"cosine_distance": ("cosine distance", 3), "constant_cosine_distance": ("that of a constant", 3)},
    **{"centered_cosine": ("centred cosine", 2), "recall_at_1": ("R@1", 1), "recall_at_5": ("R@5", 1)},
    **{"minutes": ("minutes", 1)},
}
# A panel of the plot each.
PLOTTED = ("cider", "centered_cosine", "recall_at_5")
# Flags in which the runs of a recipe may differ.
IGNORED = {"seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint"}


def read_recipe(text: str) -> dict:
    """The `label`, and the `arguments` and `metrics` of each run, from `label=folder,folder`.

    Raises:
        ValueError: the text has another form, a folder lacks a run's files, or runs differ by more than their seed.
    """
    label, separator, folders = text.rpartition("=")
    if not separator or not all(folders.split(",")):
        raise ValueError(f"--runs: expected 'label=folder,folder', got {text!r}")
    recipe = {"label": label, "arguments": [], "metrics": []}
    for folder in map(Path, folders.split(",")):
        recipe["arguments"].append(read_json(folder / "train_args.json"))
        metrics = read_json(folder / "eval_results.json")
        if (folder / "evaluation").is_dir():
            evaluated = read_json(folder / "evaluation" / "eval_results.json")
            metrics |= evaluated | evaluated.get("fidelity", {})
        recipe["metrics"].append({**metrics, "minutes": 60 * hours_of(folder)})
    first = recipe["arguments"][0]
    for other in recipe["arguments"]:
        names = (first.keys() | other.keys()) - IGNORED
        differing = sorted(name for name in names if other.get(name) != first.get(name))
        if differing:
            raise ValueError(f"{label}: expected runs that differ by their seed, they do by {differing}")
    return recipe


def values_of(recipe: dict, name: str) -> list[float]:
    """A metric of all runs; empty if a run lacks it."""
    values = [metrics.get(name) for metrics in recipe["metrics"]]
    return [] if None in values else values


def cell(values: list[float], digits: int) -> str:
    """The mean and, of several runs, half their range."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:,.{digits}f}"


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, "compare_runs")
    parser.add_argument("--runs", nargs="+", required=True, help="'label=folder,folder': the runs of a recipe")
    parser.add_argument("--plot_over", help="a flag with numbers, the x axis of the plot")
    args = parser.parse_args(argv)
    recipes = [read_recipe(text) for text in args.runs]
    flag, output_dir = args.plot_over, args.output_dir
    for value in [recipe["arguments"][0].get(flag) for recipe in recipes if flag is not None]:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"--plot_over: expected a flag with numbers, {flag} is {value!r}")
    shown = [name for name in METRICS if any(values_of(recipe, name) for recipe in recipes)]
    rows = []
    for recipe in recipes:
        cells = [cell(values_of(recipe, name), METRICS[name][1]) for name in shown]
        rows.append([recipe["label"], len(recipe["metrics"]), *cells])
    table = markdown_table(["recipe", "seeds", *(METRICS[name][0] for name in shown)], rows)
    save_results(output_dir, "compare_runs", {"recipes": recipes}, table)
    if flag is not None:
        recipes.sort(key=lambda recipe: recipe["arguments"][0][flag])
        panels = {METRICS[name][0]: [values_of(recipe, name) for recipe in recipes] for name in PLOTTED}
        labels = [f"{recipe['arguments'][0][flag]:g}" for recipe in recipes]
        plot_groups(labels, panels, flag, output_dir / "compare_runs.png")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"compare_runs.py: error: {error}")
