"""One row through the language model head, its weight stored by rows or by columns (`store_head_transposed`).

    python benchmarks/head_layout.py --output_dir outputs/head_layout

Both layouts take turns, the cache flushed in between, on one thread. Writes JSON and a Markdown table.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks.results import run_facts, save_results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[4096, 8192, 50257], help="rows of the weight")
    parser.add_argument("--hidden_size", type=int, default=256, help="its columns")
    parser.add_argument("--rounds", type=int, default=60, help="turns of each layout")
    parser.add_argument("--output_dir", default="outputs/head_layout", help="where the results go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    states, flush = torch.randn(1, 1, args.hidden_size), torch.zeros(2_000_000)
    results = {**run_facts(), "milliseconds": {}}
    lines = ["| vocabulary | by rows, CPU ms | by columns, CPU ms |", "|---|---|---|"]
    for vocab_size in args.vocab_sizes:
        rows, columns = (nn.Linear(args.hidden_size, vocab_size, bias=False) for _ in range(2))
        columns.weight.data = columns.weight.data.t().contiguous().t()
        found = {"rows": [], "columns": []}
        with torch.no_grad():
            for _ in range(args.rounds):
                for name, head in (("rows", rows), ("columns", columns)):
                    flush.add_(1)
                    started = time.process_time()
                    head(states)
                    found[name].append(1e3 * (time.process_time() - started))
        medians = {name: statistics.median(times) for name, times in found.items()}
        results["milliseconds"][vocab_size] = medians
        lines.append(f"| {vocab_size:,} | {medians['rows']:.2f} | {medians['columns']:.2f} |")
    save_results(args.output_dir, "head_layout", results, lines)


if __name__ == "__main__":
    main()
