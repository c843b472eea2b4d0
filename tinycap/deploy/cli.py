"""The command line: `tinycap caption photo.jpg`.

    tinycap caption     captions of images, to the screen, to one file, or to a text file beside each image
    tinycap embed       image embeddings for search
    tinycap export      ONNX files for `--backend onnx`
    tinycap trim-vocab  a smaller model from one with a big vocabulary

Nothing heavy is imported before it is known to be needed: `--help` answers at once, and `--backend onnx` never imports
PyTorch. Exit status: 0, all went well; 1, some images are bad (they are named, the others have their captions); 2, the
command can't be run as it is; 130, interrupted.
"""

import argparse
import contextlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tinycap.deploy.captioners import (
    BACKENDS,
    RELEASED_MODEL,
    CaptionOptions,
    Found,
    check_model,
    create_captioner,
)
from tinycap.deploy.inputs import LeftOut, list_images, read_list
from tinycap.deploy.outputs import FORMATS, RowFile, RowShape, Screen, Sidecars


DONE, BAD_IMAGES, BAD_COMMAND, INTERRUPTED = 0, 1, 2, 130
# Bad files named on the screen where an output file lists them all.
MAX_NAMED = 20


# --- the arguments ----------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return value


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a probability from 0 to 1, got {text}")
    return value


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="*", help="files, folders, patterns, http(s) addresses; - reads a list from the standard input"
    )
    parser.add_argument("--input-list", metavar="FILE", help="a file with more of them, one a line")
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="a TinyCap repository, local or, with PyTorch, by its name on the Hub (default: the released checkpoint)",
    )
    parser.add_argument("--backend", choices=BACKENDS, default="torch", help="what runs it (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=8, help="images run together (default: %(default)s)")
    parser.add_argument("--device", help="PyTorch's name of the device (default: the first GPU, else cpu)")
    parser.add_argument("--quantized", action="store_true", help="with --backend onnx: the int8 files")
    parser.add_argument("--num-threads", type=positive, help="threads of a step (default: one a core)")
    parser.add_argument(
        "--num-workers", type=count, default=0, help="processes (onnx: threads) that open images ahead (default: 0)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew instead of going on with what is there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


def installed_version() -> str:
    """The package's version; that of `pyproject.toml` in a clone that isn't installed."""
    try:
        return importlib.metadata.version("tinycap")
    except importlib.metadata.PackageNotFoundError:
        text = (RELEASED_MODEL / "pyproject.toml").read_text(encoding="utf-8")
        return re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1]


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinycap", description="Captions images on this machine, offline.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"tinycap {installed_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    caption = commands.add_parser("caption", help="caption images", description="Captions images.", allow_abbrev=False)
    add_input_arguments(caption)
    where = caption.add_mutually_exclusive_group()
    where.add_argument(
        "--output",
        metavar="FILE",
        help="a .jsonl or .csv file of rows, gone on with if it is there (default: the screen)",
    )
    where.add_argument(
        "--sidecar", action="store_true", help="write photo.txt beside photo.jpg; images that have one are left alone"
    )
    caption.add_argument(
        "--format",
        choices=FORMATS,
        help='text, or alt="..." attributes for HTML; on the screen also rows as jsonl or csv (default: text)',
    )
    caption.add_argument("--num-beams", type=positive, help="beams (default: the model's own number)")
    caption.add_argument("--num-captions", type=positive, default=1, help="captions of each image (default: 1)")
    caption.add_argument("--max-new-tokens", type=positive, help="longest caption in tokens (default: the model's own)")
    caption.add_argument(
        "--confidence", action="store_true", help="also give the probability that the first caption is right"
    )
    caption.add_argument(
        "--min-confidence", type=probability, metavar="P", help="no caption rather than one right with less than this"
    )
    caption.set_defaults(run=run_caption)

    embed = commands.add_parser(
        "embed",
        help="embed images for search",
        description="Writes image embeddings: (N, D) float32, unit norm, so that a dot product is the similarity.",
        allow_abbrev=False,
    )
    add_input_arguments(embed)
    embed.add_argument(
        "--output",
        metavar="FILE",
        required=True,
        help="a .safetensors file (tensor image_embeds, metadata ids), or a .npy file (ids beside it, in .ids.json)",
    )
    embed.set_defaults(run=run_embed)

    export = commands.add_parser(
        "export", help="write ONNX files", description="Writes what --backend onnx reads.", allow_abbrev=False
    )
    export.add_argument("--model", metavar="FOLDER", help="a TinyCap repository (default: the released checkpoint)")
    export.add_argument("--output", metavar="FOLDER", required=True, help="where the files go")
    export.add_argument(
        "--quantize", action=argparse.BooleanOptionalAction, default=True, help="also write int8 files (default: yes)"
    )
    export.set_defaults(run=run_export)

    trim = commands.add_parser(
        "trim-vocab",
        help="drop the tokens that a corpus never uses",
        description="Makes a smaller model from one with a big vocabulary; reports how many captions change.",
        allow_abbrev=False,
    )
    trim.add_argument(
        "images", nargs="*", help="files, folders or patterns of images that are captioned before and after"
    )
    trim.add_argument("--model", metavar="FOLDER", required=True, help="a TinyCap repository")
    trim.add_argument("--output", metavar="FOLDER", required=True, help="where the smaller one goes")
    trim.add_argument(
        "--dataset-name", help="captioned images as well: a name on the Hub, a folder of parquet, an imagefolder"
    )
    trim.add_argument("--split", default="validation", help="split whose images are captioned (default: %(default)s)")
    trim.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="FILE",
        help="texts whose tokens to keep, one a line; repeatable",
    )
    trim.add_argument(
        "--corpus-split",
        action="append",
        default=[],
        metavar="SPLIT",
        help="another split of the data set whose captions' tokens to keep; repeatable",
    )
    trim.add_argument("--max-samples", type=positive, help="caption only the first so many images")
    trim.add_argument("--batch-size", type=positive, default=16, help="images run together (default: %(default)s)")
    trim.set_defaults(run=run_trim)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status. Arguments that make no sense end the process with status 2."""
    args = create_parser().parse_args(argv)
    # Threads that spin while they wait take the CPU from those that compute where the cores are busy. Read when PyTorch
    # loads its OpenMP library: GNU's and, on macOS and Windows, LLVM's or Intel's.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"tinycap {args.command}: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the captions has seen enough; Python would complain again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (ValueError, ImportError, OSError) as error:
        # OSError: an output that can't be written.
        print(f"tinycap {args.command}: error: {error}", file=sys.stderr)
        return BAD_COMMAND


# --- several processes ------------------------------------------------------------------------------------------------


class Processes:
    """This process among those that `accelerate launch` or `torchrun` started; alone where they didn't.

    PyTorch and `accelerate` are imported only where there are several.

    Args:
        on_cpu: run there although there may be GPUs.
    """

    def __init__(self, on_cpu: bool = False):
        self.index, self.count, self.state = 0, 1, None
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started > 1:
            import datetime

            import torch
            from accelerate import PartialState

            # Shares of a big folder end hours apart, and the first waits for the last.
            timeout = datetime.timedelta(days=7)
            self.state = PartialState(cpu=on_cpu or not torch.accelerator.is_available(), timeout=timeout)
            self.index, self.count = self.state.process_index, self.state.num_processes
            if self.count != started:
                raise ValueError(f"expected {started} processes, as WORLD_SIZE says, got {self.count} that talk")

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def wait(self) -> None:
        if self.state is not None:
            self.state.wait_for_everyone()

    def gather(self, items: list) -> list:
        """Everybody's items, to everybody."""
        if self.state is None:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Others begin after the main process is through. An error of it ends the others too: their wait breaks off."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def end(self) -> None:
        """Waits for everybody's end: a launcher ends all processes when the first one fails."""
        if self.state is not None:
            self.wait()
            self.state.destroy_process_group()

    def device(self, given: str | None) -> str | None:
        """The device that was asked for, or this process's own."""
        return str(self.state.device) if given is None and self.state is not None else given


# --- tinycap caption --------------------------------------------------------------------------------------------------


def find_inputs(args: argparse.Namespace, processes: Processes) -> tuple[list[str], LeftOut]:
    """The images of the command line and of `--input-list`, and what was left out of folders.

    Raises:
        ValueError: there are no images.
    """
    if not args.images and args.input_list is None:
        raise ValueError("expected images: files, folders, patterns, addresses, - or --input-list")
    left_out = LeftOut()
    images = list_images(args.images, sys.stdin if processes.count == 1 else None, left_out)
    if args.input_list is not None:
        listed = list_images(read_list(args.input_list), left_out=left_out, from_list=True)
        images = list(dict.fromkeys([*images, *listed]))
    if not images:
        raise ValueError("expected images, got an empty list")
    if processes.is_main:
        print_left_out(args, left_out)
    return images, left_out


def print_left_out(args: argparse.Namespace, left_out: LeftOut) -> None:
    """What folders hold beyond images; with `--quiet`, only where some can't be read."""
    if str(left_out) and (left_out.unreadable or not getattr(args, "quiet", False)):
        print(f"tinycap {args.command}: {left_out}", file=sys.stderr)


def options_of(args: argparse.Namespace, processes: Processes) -> CaptionOptions:
    """The captioner's options.

    Raises:
        ValueError: an option belongs to the other backend.
    """
    if args.quantized and args.backend != "onnx":
        raise ValueError("--quantized is an option of --backend onnx")
    device = args.device
    if args.backend == "torch":
        device = processes.device(device)
    captions = {}
    if args.command == "caption":
        names = ("num_beams", "num_captions", "max_new_tokens")
        captions = {name: getattr(args, name) for name in names}
        captions["confidence"] = args.confidence or args.min_confidence is not None
    return CaptionOptions(
        model=check_model(args.model or str(RELEASED_MODEL)),
        batch_size=args.batch_size,
        device=device,
        quantized=args.quantized,
        num_threads=args.num_threads,
        num_workers=args.num_workers,
        **captions,
    )


def progress_bar(items: Iterable, total: int, shown: bool) -> Iterable:
    """`items`, with a bar on the standard error while they are gone through."""
    if not shown:
        return items
    from tqdm import tqdm

    # A log file wants a line now and then, a terminal a moving bar.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(items, total=total, unit="image", mininterval=interval, file=sys.stderr)


def withhold(found: Found, min_confidence: float | None) -> Found:
    """The same without a caption, where the confidence is too low."""
    if min_confidence is not None and found.confidence is not None and found.confidence < min_confidence:
        return Found(found.image, [None], found.confidence)
    return found


def check_format(args: argparse.Namespace) -> str:
    """The format, with its default.

    Raises:
        ValueError: it contradicts the output.
    """
    if args.format in ("jsonl", "csv") and (args.sidecar or args.output is not None):
        raise ValueError(f"--format {args.format}: is for the screen; --output says by its ending what it writes")
    return args.format or "text"


def run_caption(args: argparse.Namespace) -> int:
    """`tinycap caption`; returns the exit status.

    Raises:
        ValueError: something about the command makes no sense; says what.
    """
    processes = Processes(on_cpu=args.backend == "onnx" or args.device == "cpu")
    format = check_format(args)
    images, left_out = find_inputs(args, processes)
    options = options_of(args, processes)
    shape = RowShape(args.num_captions, options.confidence, alt=format == "alt")
    if args.output is not None:
        output = RowFile(args.output, shape, processes.index, processes.count)
    elif args.sidecar:
        output = Sidecars(images, format)
    elif processes.count > 1:
        raise ValueError("several processes need --output or --sidecar: on one screen their captions would mix")
    else:
        output = Screen(sys.stdout, format, shape, len(images) > 1, args.confidence)
    # Before the output is touched: a model that can't be loaded leaves it as it was.
    captioner = create_captioner(args.backend, options)
    done: set[str] = set()
    with processes.main_first():
        if isinstance(output, RowFile):
            if processes.is_main:
                output.start(args.overwrite, images)
            done = output.done()
    if isinstance(output, Sidecars) and not args.overwrite:
        done = output.done(images)
    # A later process may look at the sidecars of an earlier one's captions otherwise.
    processes.wait()

    pending = [image for image in images if image not in done]
    bad, failed = caption_all(args, captioner, pending[processes.index :: processes.count], output, processes)
    bad, failed = processes.gather(bad), processes.gather(failed)
    processes.wait()
    if isinstance(output, RowFile) and processes.count > 1 and processes.is_main:
        output.settle()
    if processes.is_main:
        report(args, len(images), len(pending), bad, failed)
    processes.end()
    # One process's status is the command's; a launcher would report each that isn't 0.
    return BAD_IMAGES if (bad or failed or left_out.unreadable) and processes.is_main else DONE


def caption_all(
    args: argparse.Namespace, captioner, images: list[str], output, processes: Processes
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Captions images to the output, batch by batch.

    Returns:
        The images that can't be read and those whose caption can't be written, each with the reason.
    """
    bad, failed, batch = [], [], []
    shown = processes.is_main and not args.quiet and len(images) > args.batch_size
    try:
        for found in progress_bar(captioner(images), len(images), shown):
            if found.error is not None:
                bad.append((found.image, found.error))
            batch.append(withhold(found, args.min_confidence))
            if len(batch) == args.batch_size:
                failed += output.append(batch)
                batch = []
    finally:
        # Also what was found before an interruption.
        failed += output.append(batch)
        output.close()
    return bad, failed


def report(
    args: argparse.Namespace,
    total: int,
    pending: int,
    bad: list[tuple[str, str]],
    failed: Sequence[tuple[str, str]] = (),
) -> None:
    """What went wrong, always; and what was done, unless `--quiet`."""
    listed = args.command == "caption" and args.output is not None
    named = bad[:MAX_NAMED] if listed else bad
    for image, error in (*named, *failed):
        print(f"tinycap {args.command}: {error if image in error else f'{image}: {error}'}", file=sys.stderr)
    if len(bad) > len(named):
        print(f"tinycap {args.command}: ... all {len(bad)} of them have an error in {args.output}", file=sys.stderr)
    if bad or failed or (total > 1 and not args.quiet):
        kept = f", {total - pending} were there already" if total > pending else ""
        print(
            f"tinycap {args.command}: {pending - len(bad) - len(failed)} of {total} images done{kept}"
            + (f", {len(bad)} could not be read" if bad else "")
            + (f", {len(failed)} could not be written" if failed else ""),
            file=sys.stderr,
        )


# --- tinycap embed, export, trim-vocab --------------------------------------------------------------------------------


def run_embed(args: argparse.Namespace) -> int:
    """`tinycap embed`; returns the exit status."""
    from tinycap.deploy.embeddings import EmbeddingFile

    processes = Processes()
    if processes.count > 1:
        raise ValueError("embed runs in one process; give each process a list and an output of its own")
    output = EmbeddingFile(args.output)
    if output.path.exists() and not args.overwrite:
        raise ValueError(f"--output: {args.output} is there already; pass --overwrite to write over it")
    images, left_out = find_inputs(args, processes)
    captioner = create_captioner(args.backend, options_of(args, processes))
    bad, ids, embeds = [], [], []
    shown = not args.quiet and len(images) > args.batch_size
    for image, row in progress_bar(captioner.embed(images), len(images), shown):
        if isinstance(row, str):
            bad.append((image, row))
        else:
            ids.append(image)
            embeds.append(row)
    if not ids:
        report(args, len(images), len(images), bad)
        return BAD_IMAGES
    output.write(ids, embeds)
    report(args, len(images), len(images), bad)
    return BAD_IMAGES if bad or left_out.unreadable else DONE


def run_export(args: argparse.Namespace) -> int:
    """`tinycap export`; returns the exit status."""
    model = check_model(args.model or str(RELEASED_MODEL))
    from tinycap.deploy.export import export_onnx

    for path in export_onnx(model, args.output, args.quantize).values():
        print(f"{Path(path).stat().st_size:>12,}  {path}")
    return DONE


def run_trim(args: argparse.Namespace) -> int:
    """`tinycap trim-vocab`; returns the exit status."""
    import json
    import logging

    check_model(args.model)
    from tinycap.deploy.trim_vocab import load_corpus, read_texts, trim_repository

    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if args.corpus_split and args.dataset_name is None:
        raise ValueError("--corpus-split: expected --dataset-name with it")
    texts = [text for path in args.corpus for text in read_texts(path)]
    left_out = LeftOut()
    images = list_images(args.images, left_out=left_out)[: args.max_samples]
    print_left_out(args, left_out)
    if args.dataset_name is not None:
        captions, photos = load_corpus(args.dataset_name, args.split, args.corpus_split, args.max_samples)
        texts += captions
        images += photos
    report = trim_repository(args.model, args.output, texts, images, args.batch_size)
    print(json.dumps(report, indent=2))
    return DONE
