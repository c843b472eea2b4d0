"""Trainings side by side: a row for each recipe, the mean over its seeds and how far they lie apart.

    python benchmarks/compare_runs.py --runs "weight 0=outputs/w0-seed42,outputs/w0-seed43" \\
        "weight 1=outputs/w1-seed42,outputs/w1-seed43" --plot_over distill_weight

A run is an output folder of `train_distill.py`. Where it holds an `evaluation` folder of
`python -m tinycap.evaluation`, that one's figures count before those of the run's own last validation. Writes
`compare_runs.json`, a Markdown table and, with `--plot_over`, `compare_runs.png`.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import benchmark_parser, run_facts, save_results
from tinycap.evaluation.reports import plot_groups
from tinycap.training.logs import hours_of, read_json


# Key in the results, heading, digits.
FIGURES = (
    ("cider", "CIDEr", 1),
    ("bleu_4", "BLEU-4", 1),
    ("rouge_l", "ROUGE-L", 1),
    ("distinct_captions", "distinct captions", 0),
    ("vocabulary_used", "vocabulary used, %", 1),
    ("cosine_distance", "cosine distance", 3),
    ("constant_cosine_distance", "that of a constant", 3),
    ("centered_cosine", "centred cosine", 2),
    ("recall_at_1", "R@1", 1),
    ("recall_at_5", "R@5", 1),
    ("minutes", "minutes", 1),
)
# What the plot shows, one panel each.
PLOTTED = ("cider", "centered_cosine", "recall_at_5")


@dataclass
class Recipe:
    """Runs that differ by their seed only.

    Args:
        label: what the row is called.
        arguments: of each run, as its `train_args.json` has them.
        figures: of each run, by name.
    """

    label: str
    arguments: list[dict]
    figures: list[dict[str, float]]

    def values(self, name: str) -> list[float]:
        """A figure of all runs; empty where a run doesn't have it."""
        found = [figures[name] for figures in self.figures if figures.get(name) is not None]
        return found if len(found) == len(self.figures) else []


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "compare_runs")
    parser.add_argument("--runs", nargs="+", required=True, help="'label=folder,folder': a recipe and its seeds' runs")
    parser.add_argument("--plot_over", help="a flag whose value becomes the plot's x axis")
    return parser.parse_args(argv)


def read_recipe(text: str) -> Recipe:
    """A recipe from `label=folder,folder`.

    Raises:
        ValueError: the text has another form, a folder lacks a run's files, or runs differ by more than their seed.
    """
    label, separator, folders = text.rpartition("=")
    if not separator or not all(folders.split(",")):
        raise ValueError(f"--runs: expected 'label=folder,folder', got {text!r}")
    recipe = Recipe(label, [], [])
    for folder in map(Path, folders.split(",")):
        arguments, figures = (read_json(folder / name) for name in ("train_args.json", "eval_results.json"))
        if (folder / "evaluation").is_dir():
            evaluated = read_json(folder / "evaluation" / "eval_results.json")
            figures |= evaluated | evaluated.get("fidelity", {})
        figures["minutes"] = 60 * hours_of(folder)
        recipe.arguments.append(arguments)
        recipe.figures.append(figures)
    ignored = {"seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint"}
    first = recipe.arguments[0]
    for arguments in recipe.arguments[1:]:
        names = (first.keys() | arguments.keys()) - ignored
        differing = [name for name in names if arguments.get(name) != first.get(name)]
        if differing:
            raise ValueError(f"{label}: expected runs that differ by their seed, they do by {sorted(differing)}")
    return recipe


def cell(values: list[float], digits: int) -> str:
    """The mean; of several runs, half of how far apart they lie behind it."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:,.{digits}f}"


def table(recipes: list[Recipe]) -> list[str]:
    """Markdown, with the figures that any of the recipes has."""
    shown = [figure for figure in FIGURES if any(recipe.values(figure[0]) for recipe in recipes)]
    lines = ["| recipe | seeds | " + " | ".join(heading for _, heading, _ in shown) + " |"]
    lines.append("|---" * (2 + len(shown)) + "|")
    for recipe in recipes:
        cells = [cell(recipe.values(name), digits) for name, _, digits in shown]
        lines.append(f"| {recipe.label} | {len(recipe.figures)} | " + " | ".join(cells) + " |")
    return lines


def plot(recipes: list[Recipe], flag: str, path: Path) -> None:
    """The runs' figures over the values of `flag`."""
    recipes = sorted(recipes, key=lambda recipe: recipe.arguments[0][flag])
    panels = {heading: [recipe.values(name) for recipe in recipes] for name, heading, _ in FIGURES if name in PLOTTED}
    plot_groups([f"{recipe.arguments[0][flag]:g}" for recipe in recipes], panels, flag, path)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    recipes = [read_recipe(text) for text in args.runs]
    if args.plot_over is not None:
        for recipe in recipes:
            value = recipe.arguments[0].get(args.plot_over)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"--plot_over: expected a flag with numbers, {args.plot_over} is {value!r}")
    results = run_facts() | {"recipes": [vars(recipe) for recipe in recipes]}
    save_results(args.output_dir, "compare_runs", results, table(recipes))
    if args.plot_over is not None:
        plot(recipes, args.plot_over, Path(args.output_dir) / "compare_runs.png")
    return results


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"compare_runs.py: error: {error}")
