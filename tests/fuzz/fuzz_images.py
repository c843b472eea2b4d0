"""Fuzzes image decoding: each hostile file must give a caption or a `ValueError` that names the file.

    python tests/fuzz/fuzz_images.py --num_cases 10000 --output_dir outputs/fuzz_images

Opens the files of `hostile_images.py` with the image loader, the decoder of training data and the pipeline; with
`--command`, also with a command line. Writes `fuzz_images.json` and `.md`, keeps the files that failed, and exits with
1 if there are any. A file that crashes or hangs Python remains, with its batch, in `OUTPUT_DIR/case`.
"""

import argparse
import collections
import faulthandler
import sys
from pathlib import Path

import hypothesis
from hostile_images import MUTATIONS, SEEDS, cases, command_door, drive
from PIL import __version__ as pillow_version

from benchmarks.results import benchmark_parser, run_facts, save_results
from tinycap.evaluation.captioning import load_captioner
from tinycap.pipeline_tinycap import ImageToTextPipeline


# Files in a batch of the pipeline, and seconds after which a batch counts as a hang.
GROUP, HANG = 20, 120


def run(args: argparse.Namespace) -> dict:
    """Runs all cases; returns the results."""
    folder, kept = Path(args.output_dir) / "case", Path(args.output_dir) / "failed"
    for made in (folder, kept):
        made.mkdir(parents=True, exist_ok=True)
    model, processor = load_captioner(args.model_name_or_path)
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    captioner = ImageToTextPipeline(model=model, **parts)
    doors = tuple(command_door(command) for command in args.command)
    table, opened, failed = collections.defaultdict(collections.Counter), [], []
    faulthandler.enable()

    @hypothesis.seed(args.seed)
    @hypothesis.settings(
        max_examples=-(-args.num_cases // GROUP),
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(hypothesis.strategies.lists(cases(), min_size=GROUP, max_size=GROUP))
    def one(batch) -> None:
        faulthandler.dump_traceback_later(HANG * (1 + len(doors)), exit=True)
        outcomes = drive(batch, captioner, folder, doors)
        faulthandler.cancel_dump_traceback_later()
        for case, outcome in zip(batch, outcomes):
            for key in ("all", case.kind, case.mutation):
                table[key].update(cases=1, captions=outcome.caption is not None, errors=outcome.caption is None)
            about = {"seed": case.seed, "mutation": case.mutation, "declared": case.declared, **vars(outcome)}
            opened.append(about)
            if outcome.problems:
                name = f"{len(failed):04}.{case.extension}"
                (kept / name).write_bytes(case.data)
                failed.append({"file": name, **about})

    one()
    return {
        **run_facts(),
        "pillow": pillow_version,
        "failed": failed,
        "over_a_second": sum(about["seconds"] > 1 for about in opened),
        "slowest": sorted(opened, key=lambda about: -about["seconds"])[:10],
        "most_memory": sorted(opened, key=lambda about: -(about["peak_mb"] or 0))[:10],
        "counts": table,
    }


def report(results: dict) -> list[str]:
    """Markdown lines."""
    counts = results["counts"]
    lines = [
        f"{counts['all']['cases']:,} cases: {len(results['failed'])} failed, {results['over_a_second']} took over a "
        f"second of processor time (the slowest {results['slowest'][0]['seconds']:.2f} s); "
        f"at most {results['most_memory'][0]['peak_mb'] or 0:.0f} MB of memory.",
        "",
        "| format, or what was done to the file | cases | captions | clear errors |",
        "|---|---|---|---|",
    ]
    for key in ("all", *sorted({seed.kind for seed in SEEDS.values()}), *MUTATIONS):
        row = counts[key]
        lines.append(f"| {key} | {row['cases']:,} | {row['captions']:,} | {row['errors']:,} |")
    return lines


def main() -> None:
    parser = benchmark_parser(__doc__, "fuzz_images")
    parser.add_argument("--model_name_or_path", default=".", help="a TinyCap repository")
    parser.add_argument("--num_cases", type=int, default=10_000, help="files to open")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument(
        "--command", action="append", default=[], help="prints the caption of the path appended to it; repeatable"
    )
    args = parser.parse_args()
    results = run(args)
    save_results(args.output_dir, "fuzz_images", results, report(results))
    sys.exit(1 if results["failed"] else 0)


if __name__ == "__main__":
    main()
