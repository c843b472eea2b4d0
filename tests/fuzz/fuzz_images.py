"""Fuzzes image decoding: each hostile file must give a caption or a `ValueError` that names the file.

    python tests/fuzz/fuzz_images.py --num_cases 10000 --output_dir outputs/fuzz_images

Opens the files of `hostile_images.py` with the image loader, the decoder of training data and the pipeline; with
`--command`, also with a command line. Writes `fuzz_images.json` and `.md`, keeps the files that failed, and exits with
1 if there are any. A file that crashes or hangs Python remains, with its batch, in `OUTPUT_DIR/case`.
"""

import collections
import faulthandler
import sys
from pathlib import Path

import hypothesis
from hostile_images import MUTATIONS, SEEDS, caption_by_command, cases, drive
from PIL import __version__ as pillow_version

from benchmarks.results import benchmark_parser, run_facts, save_results
from tinycap.evaluation.captioning import load_captioner
from tinycap.pipeline_tinycap import ImageToTextPipeline


# Files in a batch of the pipeline, and seconds after which a batch counts as a hang.
GROUP, HANG = 20, 120

parser = benchmark_parser(__doc__, "fuzz_images")
parser.add_argument("--model_name_or_path", default=".", help="a TinyCap repository")
parser.add_argument("--num_cases", type=int, default=10_000, help="files to open")
parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
parser.add_argument(
    "--command", action="append", default=[], help="prints the caption of the path appended to it; repeatable"
)
args = parser.parse_args()
folder, kept = Path(args.output_dir) / "case", Path(args.output_dir) / "failed"
for made in (folder, kept):
    made.mkdir(parents=True, exist_ok=True)
model, processor = load_captioner(args.model_name_or_path)
captioner = ImageToTextPipeline(model, tokenizer=processor.tokenizer, image_processor=processor.image_processor)
commands = tuple(map(caption_by_command, args.command))
table, opened, failed = collections.defaultdict(collections.Counter), [], []


@hypothesis.seed(args.seed)
@hypothesis.settings(
    max_examples=-(-args.num_cases // GROUP),
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(hypothesis.strategies.lists(cases(), min_size=GROUP, max_size=GROUP))
def run(batch) -> None:
    faulthandler.dump_traceback_later(HANG * (1 + len(commands)), exit=True)
    outcomes = drive(batch, captioner, folder, commands)
    faulthandler.cancel_dump_traceback_later()
    for case, outcome in zip(batch, outcomes):
        for key in ("all", case.kind, case.mutation):
            table[key].update(cases=1, captions=outcome.caption is not None, errors=outcome.caption is None)
        opened.append({"seed": case.seed, "mutation": case.mutation, "declared": case.declared, **vars(outcome)})
        if outcome.problems:
            name = f"{len(failed):04}.{case.extension}"
            (kept / name).write_bytes(case.data)
            failed.append({"file": name, **opened[-1]})


faulthandler.enable()
run()
slowest = sorted(opened, key=lambda case: -case["seconds"])[:10]
most_memory = sorted(opened, key=lambda case: -(case["peak_mb"] or 0))[:10]
lines = [
    f"{len(opened):,} cases: {len(failed)} failed, {sum(case['seconds'] > 1 for case in opened)} took over a second of "
    f"processor time (the slowest {slowest[0]['seconds']:.2f} s); at most {most_memory[0]['peak_mb'] or 0:.0f} MB.",
    *("", "| format, or what was done to the file | cases | captions | clear errors |", "|---|---|---|---|"),
]
for key in ("all", *sorted({seed.kind for seed in SEEDS.values()}), *MUTATIONS):
    lines.append(f"| {key} | " + " | ".join(f"{table[key][name]:,}" for name in ("cases", "captions", "errors")) + " |")
results = {"pillow": pillow_version, "failed": failed, "slowest": slowest, "most_memory": most_memory, "counts": table}
save_results(args.output_dir, "fuzz_images", {**run_facts(), **results}, lines)
sys.exit(1 if failed else 0)
