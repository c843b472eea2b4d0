"""Command line, environment and output files of the benchmarks. Imports nothing heavy: cold starts are measured."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path


def benchmark_parser(doc: str, name: str) -> argparse.ArgumentParser:
    """A parser with the docstring's first paragraph and `--output_dir`, by default `outputs/<name>`."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", type=Path, default=f"outputs/{name}", help="where the results are written")
    return parser


def run_facts() -> dict[str, str]:
    """The command, date, machine and library versions of this run."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: version(name) for name in ("torch", "transformers")},
    }


def peak_memory_mb() -> float:
    """Peak resident memory of this process; `getrusage` would include that of the parent before `exec`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def markdown_table(header: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    """The lines of a Markdown table."""
    head, *body = (f"| {' | '.join(map(str, row))} |" for row in (header, *rows))
    return [head, "|---" * len(header) + "|", *body]


def save_results(output_dir: Path, name: str, results: dict, lines: list[str]) -> None:
    """Writes `<name>.json` and `<name>.md` to `output_dir` and prints the latter."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**run_facts(), **results}, indent=2, ensure_ascii=False, default=str)
    (output_dir / f"{name}.json").write_text(content + "\n", encoding="utf-8")
    (output_dir / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
