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
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tinycap.deploy.captioners import BACKENDS, RELEASED_MODEL, CaptionOptions, Found, create_captioner
from tinycap.deploy.inputs import list_images, read_list
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
    parser.add_argument("--num-threads", type=positive, help="with --backend onnx: threads (default: its own choice)")
    parser.add_argument(
        "--num-workers", type=count, default=0, help="processes (onnx: threads) that open images ahead (default: 0)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew instead of going on with what is there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinycap", description="Captions images on this machine, offline.", allow_abbrev=False
    )
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
        description="Makes a smaller model with the same captions from one with a big vocabulary.",
        allow_abbrev=False,
    )
    trim.add_argument(
        "images", nargs="*", help="files, folders or patterns of photos whose captions must stay the same"
    )
    trim.add_argument("--model", metavar="FOLDER", required=True, help="a TinyCap repository")
    trim.add_argument("--output", metavar="FOLDER", required=True, help="where the smaller one goes")
    trim.add_argument(
        "--dataset-name", help="captioned photos as well: a name on the Hub, a folder of parquet, an imagefolder"
    )
    trim.add_argument("--split", default="validation", help="split whose photos are captioned (default: %(default)s)")
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
    trim.add_argument("--max-samples", type=positive, help="caption only the first so many photos")
    trim.add_argument("--batch-size", type=positive, default=16, help="photos run together (default: %(default)s)")
    trim.set_defaults(run=run_trim)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status. Arguments that make no sense end the process with status 2."""
    args = create_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, ImportError) as error:
        print(f"tinycap {args.command}: error: {error}", file=sys.stderr)
        return BAD_COMMAND
    except KeyboardInterrupt:
        print(f"tinycap {args.command}: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the captions has seen enough; Python would complain again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


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


def find_inputs(args: argparse.Namespace, processes: Processes) -> list[str]:
    """The images of the command line and of `--input-list`.

    Raises:
        ValueError: there are none.
    """
    if not args.images and args.input_list is None:
        raise ValueError("expected images: files, folders, patterns, addresses, - or --input-list")
    entries = list(args.images) + (read_list(args.input_list) if args.input_list is not None else [])
    images = list_images(entries, sys.stdin if processes.count == 1 else None)
    if not images:
        raise ValueError("expected images, got an empty list")
    return images


def options_of(args: argparse.Namespace, processes: Processes) -> CaptionOptions:
    """The captioner's options.

    Raises:
        ValueError: an option belongs to the other backend.
    """
    if args.backend != "onnx":
        for name in ("quantized", "num_threads"):
            if getattr(args, name):
                raise ValueError(f"--{name.replace('_', '-')} is an option of --backend onnx")
    device = args.device
    if args.backend == "torch":
        device = processes.device(device)
    captions = {}
    if args.command == "caption":
        names = ("num_beams", "num_captions", "max_new_tokens")
        captions = {name: getattr(args, name) for name in names}
        captions["confidence"] = args.confidence or args.min_confidence is not None
    return CaptionOptions(
        model=args.model or str(RELEASED_MODEL),
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
    images = find_inputs(args, processes)
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
                output.start(args.overwrite)
            done = output.done()
    if isinstance(output, Sidecars) and not args.overwrite:
        done = output.done(images)
    # A later process may look at the sidecars of an earlier one's captions otherwise.
    processes.wait()

    pending = [image for image in images if image not in done]
    bad = caption_all(args, captioner, pending[processes.index :: processes.count], output, processes)
    bad = processes.gather(bad)
    processes.wait()
    if isinstance(output, RowFile) and processes.count > 1 and processes.is_main:
        output.settle(keep_errors=True)
    if processes.is_main:
        report(args, len(images), len(pending), bad)
    processes.end()
    # One process's status is the command's; a launcher would report each that isn't 0.
    return BAD_IMAGES if bad and processes.is_main else DONE


def caption_all(
    args: argparse.Namespace, captioner, images: list[str], output, processes: Processes
) -> list[tuple[str, str]]:
    """Captions images to the output, batch by batch; returns the bad ones with what is wrong with them."""
    bad, batch = [], []
    shown = processes.is_main and not args.quiet and len(images) > args.batch_size
    try:
        for found in progress_bar(captioner(images), len(images), shown):
            if found.error is not None:
                bad.append((found.image, found.error))
            batch.append(withhold(found, args.min_confidence))
            if len(batch) == args.batch_size:
                output.append(batch)
                batch = []
    finally:
        # Also what was found before an interruption.
        output.append(batch)
        output.close()
    return bad


def report(args: argparse.Namespace, total: int, pending: int, bad: list[tuple[str, str]]) -> None:
    """What went wrong, always; and what was done, unless `--quiet`."""
    listed = args.command == "caption" and args.output is not None
    named = bad[:MAX_NAMED] if listed else bad
    for image, error in named:
        print(f"tinycap {args.command}: {error if image in error else f'{image}: {error}'}", file=sys.stderr)
    if len(bad) > len(named):
        print(f"tinycap {args.command}: ... all {len(bad)} of them have an error in {args.output}", file=sys.stderr)
    if bad or (total > 1 and not args.quiet):
        kept = f", {total - pending} were there already" if total > pending else ""
        print(
            f"tinycap {args.command}: {pending - len(bad)} of {total} images done{kept}"
            + (f", {len(bad)} could not be read" if bad else ""),
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
    images = find_inputs(args, processes)
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
    return BAD_IMAGES if bad else DONE


def run_export(args: argparse.Namespace) -> int:
    """`tinycap export`; returns the exit status."""
    from tinycap.deploy.export import export_onnx

    for path in export_onnx(args.model or RELEASED_MODEL, args.output, args.quantize).values():
        print(f"{Path(path).stat().st_size:>12,}  {path}")
    return DONE


def run_trim(args: argparse.Namespace) -> int:
    """`tinycap trim-vocab`; returns the exit status."""
    import json
    import logging

    from tinycap.deploy.trim_vocab import load_corpus, read_texts, trim_repository

    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if args.corpus_split and args.dataset_name is None:
        raise ValueError("--corpus-split: expected --dataset-name with it")
    texts = [text for path in args.corpus for text in read_texts(path)]
    images = list_images(args.images)[: args.max_samples]
    if args.dataset_name is not None:
        captions, photos = load_corpus(args.dataset_name, args.split, args.corpus_split, args.max_samples)
        texts += captions
        images += photos
    report = trim_repository(args.model, args.output, texts, images, args.batch_size)
    print(json.dumps(report, indent=2))
    return DONE
