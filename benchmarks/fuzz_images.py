"""Thousands of hostile image files, each of which must end in a caption or in a clear error naming the file.

    python benchmarks/fuzz_images.py --num_cases 10000 --output_dir outputs/fuzz_images

Draws files in the flavours of JPEG, PNG, WebP, GIF, TIFF and BMP, breaks them (`hostile_images.py`), and opens each by
the image loader, the decoder of training data and the pipeline, among others and alone; with `--command`, also by a
command line. Of pictures that were not damaged it compares what was opened with what was drawn.
Writes `fuzz_images.json` and a Markdown report, keeps every file that did what it must not, and exits with 1 if there
is one. A file that crashes Python itself is left, among its group, in `OUTPUT_DIR/case`.
"""

import argparse
import collections
import faulthandler
import logging
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hypothesis
import PIL
import torch
import transformers
from PIL import features

from benchmarks.hostile_images import MUTATIONS, SEEDS, cases, drive
from tinycap.evaluation.captioning import load_captioner
from tinycap.pipeline_tinycap import ImageToTextPipeline
from tinycap.training.logs import write_json, write_text


# Seconds after which a group of files is a hang, and the process ends with a trace of where it stood.
HANG = 120
# Files that the pipeline gets at once.
GROUP = 20


def command_door(command: str) -> Callable[[Path], str]:
    """A command line that prints a file's caption, as a door for `drive`: exit status 0 and a caption, or an error.

    Args:
        command: words of the command, to which the path is appended.
    """

    def caption(path: Path) -> str:
        done = subprocess.run([*shlex.split(command), str(path)], capture_output=True, text=True, timeout=HANG)
        if done.returncode < 0 or "Traceback" in done.stderr:
            raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-500:]}")
        if done.returncode:
            raise ValueError(done.stderr)
        return done.stdout

    return caption


def run(args: argparse.Namespace) -> dict:
    """Drives all cases; returns what is written."""
    output_dir = Path(args.output_dir)
    folder, kept = output_dir / "case", output_dir / "failed"
    for made in (folder, kept):
        made.mkdir(parents=True, exist_ok=True)
    model, processor = load_captioner(args.model_name_or_path)
    captioner = ImageToTextPipeline(
        model=model, tokenizer=processor.tokenizer, image_processor=processor.image_processor
    )
    doors = tuple(command_door(command) for command in args.command)
    table = {}
    counts, errors, warned = collections.Counter(), collections.Counter(), collections.Counter()
    slowest, hungriest, failed = [], [], []
    started = time.perf_counter()
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
        for number, (case, outcome) in enumerate(zip(batch, outcomes)):
            kind = "captions" if outcome.caption is not None else "errors"
            for row in (counts, *(table.setdefault(key, collections.Counter()) for key in (case.kind, case.mutation))):
                row.update(cases=1, **{kind: 1})
            if outcome.error:
                errors[re.sub(r"\d+|b'.*'|0x\w+", "#", outcome.error.rpartition(": ")[2])[:90]] += 1
            warned.update({re.sub(r"\d+", "#", text)[:90] for text in outcome.warned})
            about = {"seed": case.seed, "mutation": case.mutation, "declared": case.declared, "error": outcome.error}
            about = {"seconds": outcome.seconds, "peak_mb": outcome.peak_mb, "bytes": len(case.data), **about}
            counts["over a second"] += outcome.seconds > 1
            slowest.append(about)
            hungriest.append(about)
            if outcome.problems:
                name = f"{len(failed):04}-{number}.{case.extension}"
                (kept / name).write_bytes(case.data)
                failed.append({"file": name, **about, "problems": outcome.problems})
        slowest.sort(key=lambda about: -about["seconds"])
        hungriest.sort(key=lambda about: -(about["peak_mb"] or 0))
        del slowest[10:], hungriest[10:]
        if counts["cases"] % 500 < GROUP:
            logging.info("%s in %.0f s, %d failed", dict(counts), time.perf_counter() - started, len(failed))

    one()
    return {
        "num_cases": counts["cases"],
        "captions": counts["captions"],
        "errors": counts["errors"],
        "failed": failed,
        "over_a_second": counts["over a second"],
        "slowest": slowest,
        "most_memory": hungriest,
        "formats": {kind: dict(table.get(kind, {})) for kind in sorted({seed.kind for seed in SEEDS.values()})},
        "mutations": {mutation: dict(table.get(mutation, {})) for mutation in MUTATIONS},
        "error_texts": dict(errors.most_common(40)),
        "warnings": dict(warned.most_common(40)),
        "seconds": time.perf_counter() - started,
        "model": args.model_name_or_path,
        "commands": args.command,
        "seed": args.seed,
        "versions": {
            "pillow": PIL.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hypothesis": hypothesis.__version__,
            "libjpeg_turbo": features.version_feature("libjpeg_turbo"),
            "webp": features.version_module("webp"),
            "libtiff": features.version_codec("libtiff"),
        },
    }


def report(results: dict) -> str:
    """The Markdown of what `run` found."""
    lines = [
        f"{results['num_cases']:,} cases: {results['captions']:,} captions, {results['errors']:,} errors that name the "
        f"file, {len(results['failed'])} failed, {results['over_a_second']} took over a second of processor time "
        f"(the slowest {results['slowest'][0]['seconds']:.2f} s); the hungriest needed "
        + (f"{peak:.0f} MB." if (peak := results["most_memory"][0]["peak_mb"]) is not None else "(not measured)."),
        "",
    ]
    for title, name in (("format", "formats"), ("what was done to the file", "mutations")):
        lines += [f"| {title} | cases | captions | clear errors |", "|---|---|---|---|"]
        lines += [
            f"| {key} | {row.get('cases', 0):,} | {row.get('captions', 0):,} | {row.get('errors', 0):,} |"
            for key, row in results[name].items()
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model_name_or_path", default=".", help="a TinyCap repository")
    parser.add_argument("--num_cases", type=int, default=10_000, help="files to open")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument(
        "--command",
        action="append",
        default=[],
        help="a command line that prints the caption of the file whose path is appended; may be given several times",
    )
    parser.add_argument("--output_dir", default="outputs/fuzz_images", help="where the results go")
    args = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    results = run(args)
    output_dir = Path(args.output_dir)
    write_json(output_dir / "fuzz_images.json", results)
    write_text(output_dir / "fuzz_images.md", report(results))
    print(report(results))
    sys.exit(1 if results["failed"] else 0)


if __name__ == "__main__":
    main()
