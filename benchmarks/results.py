"""What every benchmark leaves: where and when it ran, its figures as JSON, and a Markdown table for the documents."""

import argparse
import datetime
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from tinycap.training.logs import write_json, write_text


def benchmark_parser(doc: str, name: str) -> argparse.ArgumentParser:
    """A parser with the docstring's first paragraph and `--output_dir`, by default `outputs/<name>`."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", default=f"outputs/{name}", help="where the results go")
    return parser


def run_facts() -> dict[str, str | int]:
    """The command, date, machine and versions of this run."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def save_results(output_dir: str | Path, name: str, results: dict, lines: list[str]) -> None:
    """Writes `<name>.json` and `<name>.md` to `output_dir`, which is made, and prints the latter."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / f"{name}.json", results)
    write_text(output_dir / f"{name}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
