"""The command line: `tinycap caption photo.jpg`.

    tinycap caption     captions of images, to the screen, to one file, or to a text file beside each image
    tinycap embed       image embeddings for search
    tinycap export      ONNX files for `--backend onnx`
    tinycap trim-vocab  a smaller model from one with a big vocabulary

Large libraries are imported when a command needs them: `--help` answers at once, and `--backend onnx` never imports
PyTorch. Exit status: 0, success; 1, some images failed (they are named, the others have their captions); 2, the
command can't run with these arguments; 130, interrupted.
"""

import argparse
import hashlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tinycap.deploy.captioners import (
    BACKENDS,
    RELEASED_MODEL,
    CaptionOptions,
    CaptionResult,
    check_model,
    create_captioner,
    naming_model,
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


def shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(f"expected K/N with K from 1 to N, such as 3/8, got {text}")
    return number, count


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
    parser.add_argument("--batch-size", type=positive, default=8, help="images in a batch (default: %(default)s)")
    parser.add_argument("--device", help="PyTorch's name of the device (default: the first GPU, else cpu)")
    parser.add_argument("--quantized", action="store_true", help="with --backend onnx: the int8 files")
    parser.add_argument("--num-threads", type=positive, help="threads of a step (default: one a core)")
    parser.add_argument(
        "--num-workers", type=count, default=0, help="processes (onnx: threads) that open images ahead (default: 0)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew instead of resuming")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


def installed_version() -> str:
    """The package's version; that of `pyproject.toml` in a clone that isn't installed."""
    try:
        return importlib.metadata.version("tinycap")
    except importlib.metadata.PackageNotFoundError:
        text = (RELEASED_MODEL / "pyproject.toml").read_text(encoding="utf-8")
        return re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1]


def add_command(commands, name: str, run, **options) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, allow_abbrev=False, **options)
    parser.set_defaults(run=run)
    return parser


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinycap", description="Captions images on this machine, offline.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"tinycap {installed_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    caption = add_command(commands, "caption", run_caption, help="caption images", description="Captions images.")
    add_caption_arguments(caption)
    embed = add_command(
        commands,
        "embed",
        run_embed,
        help="embed images for search",
        description="Writes image embeddings: (N, D) float32, unit norm, so that a dot product is the similarity.",
    )
    add_input_arguments(embed)
    embed.add_argument(
        "--output",
        metavar="FILE",
        required=True,
        help="a .safetensors file (tensor image_embeds, metadata ids), or a .npy file (ids beside it, in .ids.json)",
    )
    export = add_command(
        commands, "export", run_export, help="write ONNX files", description="Writes what --backend onnx reads."
    )
    export.add_argument("--model", metavar="FOLDER", help="a TinyCap repository (default: the released checkpoint)")
    export.add_argument("--output", metavar="FOLDER", required=True, help="folder for the files")
    export.add_argument(
        "--quantize", action=argparse.BooleanOptionalAction, default=True, help="also write int8 files (default: yes)"
    )
    trim = add_command(
        commands,
        "trim-vocab",
        run_trim,
        help="drop the tokens that a corpus never uses",
        description="Makes a smaller model from one with a big vocabulary; reports how many captions change.",
    )
    add_trim_arguments(trim)
    return parser


def add_caption_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--output",
        metavar="FILE",
        help="a .jsonl or .csv file of rows, resumed if it exists (default: the screen)",
    )
    where.add_argument(
        "--sidecar", action="store_true", help="write photo.txt beside photo.jpg; images that have one are skipped"
    )
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="K/N",
        help="caption the K-th of N parts of the images; captions.jsonl becomes captions.K-of-N.jsonl",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help='text, or alt="..." attributes for HTML; on the screen also rows as jsonl or csv (default: text)',
    )
    parser.add_argument("--num-beams", type=positive, help="beams (default: the model's own number)")
    parser.add_argument("--num-captions", type=positive, default=1, help="captions of each image (default: 1)")
    parser.add_argument("--max-new-tokens", type=positive, help="longest caption in tokens (default: the model's own)")
    parser.add_argument(
        "--confidence", action="store_true", help="also give the probability that the first caption is right"
    )
    parser.add_argument(
        "--min-confidence", type=probability, metavar="P", help="leave out captions with a lower confidence"
    )


def add_trim_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="*", help="files, folders or patterns of images that are captioned before and after"
    )
    parser.add_argument("--model", metavar="FOLDER", required=True, help="a TinyCap repository")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="folder for the smaller one")
    parser.add_argument(
        "--dataset-name", help="captioned images as well: a name on the Hub, a folder of parquet, an imagefolder"
    )
    parser.add_argument("--split", default="validation", help="split whose images are captioned (default: %(default)s)")
    parser.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="FILE",
        help="texts whose tokens to keep, one a line; repeatable",
    )
    parser.add_argument(
        "--corpus-split",
        action="append",
        default=[],
        metavar="SPLIT",
        help="another split of the data set whose captions' tokens to keep; repeatable",
    )
    parser.add_argument("--max-samples", type=positive, help="caption only the first so many images")
    parser.add_argument("--batch-size", type=positive, default=16, help="images run together (default: %(default)s)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status. Arguments that make no sense end the process with status 2."""
    args = create_parser().parse_args(argv)
    # Waiting threads that spin slow down computing ones on busy cores. Read when PyTorch loads its OpenMP library:
    # GNU's and, on macOS and Windows, LLVM's or Intel's.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"tinycap {args.command}: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe; Python would raise again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (ValueError, ImportError, OSError) as error:
        # OSError: an output that can't be written.
        print(f"tinycap {args.command}: error: {error}", file=sys.stderr)
        return BAD_COMMAND


# --- tinycap caption --------------------------------------------------------------------------------------------------


def find_inputs(args: argparse.Namespace) -> tuple[list[str], LeftOut]:
    """The images of the command line and of `--input-list`, and what was left out of folders.

    Raises:
        ValueError: there are no images.
    """
    if not args.images and args.input_list is None:
        raise ValueError("expected images: files, folders, patterns, addresses, - or --input-list")
    left_out = LeftOut()
    images = list_images(args.images, left_out=left_out)
    if args.input_list is not None:
        listed = list_images(read_list(args.input_list), left_out=left_out, from_list=True)
        images = list(dict.fromkeys([*images, *listed]))
    if not images:
        raise ValueError("expected images, got an empty list")
    print_left_out(args, left_out)
    return images, left_out


def in_shard(image: str, shard: tuple[int, int]) -> bool:
    """Whether an image belongs to shard K of N: by a hash of its name, so that images added later move no others."""
    number, count = shard
    return int.from_bytes(hashlib.sha256(os.fsencode(image)).digest()[:8], "big") % count == number - 1


def shard_path(path: str, shard: tuple[int, int]) -> str:
    """`captions.3-of-8.jsonl` for `captions.jsonl`; numbers have leading zeros, so that names sort."""
    number, count = shard
    stem, suffix = os.path.splitext(path)
    return f"{stem}.{number:0{len(str(count))}}-of-{count}{suffix}"


def print_left_out(args: argparse.Namespace, left_out: LeftOut) -> None:
    """Prints what was left out of folders; with `--quiet`, only if some can't be read."""
    if str(left_out) and (left_out.unreadable or not getattr(args, "quiet", False)):
        print(f"tinycap {args.command}: {left_out}", file=sys.stderr)


def options_of(args: argparse.Namespace) -> CaptionOptions:
    """The captioner's options.

    Raises:
        ValueError: an option belongs to the other backend.
    """
    if args.quantized and args.backend != "onnx":
        raise ValueError("--quantized is an option of --backend onnx")
    options = {name: value for name, value in vars(args).items() if name in CaptionOptions.__dataclass_fields__}
    options["model"] = check_model(args.model or str(RELEASED_MODEL))
    options["confidence"] = args.command == "caption" and (args.confidence or args.min_confidence is not None)
    return CaptionOptions(**options)


def progress_bar(items: Iterable, total: int, shown: bool) -> Iterable:
    """`items`, with a progress bar on the standard error if `shown`."""
    if not shown:
        return items
    from tqdm import tqdm

    # Rarely in a log file, where each update is a line.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(items, total=total, unit="image", mininterval=interval, file=sys.stderr)


def withhold(result: CaptionResult, min_confidence: float | None) -> CaptionResult:
    """The same without a caption, where the confidence is too low."""
    if min_confidence is not None and result.confidence is not None and result.confidence < min_confidence:
        return CaptionResult(result.image, [None], result.confidence)
    return result


def create_output(args: argparse.Namespace, images: list[str], shape: RowShape) -> RowFile | Sidecars | Screen:
    """Where the captions go, by the arguments; `images` are those of all shards."""
    if args.output is not None:
        return RowFile(args.output, shape)
    if args.sidecar:
        return Sidecars(images, args.format)
    return Screen(sys.stdout, args.format, shape, len(images) > 1, args.confidence)


def run_caption(args: argparse.Namespace) -> int:
    """`tinycap caption`; returns the exit status.

    Raises:
        ValueError: arguments contradict each other; says which.
    """
    if args.format in ("jsonl", "csv") and (args.sidecar or args.output is not None):
        raise ValueError(f"--format {args.format}: is for the screen; --output says by its ending what it writes")
    if args.shard is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("several processes would write the same captions; start each with its own --shard K/N")
    args.format = args.format or "text"
    if args.shard is not None and args.output is not None:
        args.output = shard_path(args.output, args.shard)
    images, left_out = find_inputs(args)
    options = options_of(args)
    output = create_output(args, images, RowShape(args.num_captions, options.confidence, alt=args.format == "alt"))
    if args.shard is not None:
        images = [image for image in images if in_shard(image, args.shard)]
    # Before the output is touched: a model that can't be loaded leaves it as it was.
    captioner = create_captioner(args.backend, options)
    done = output.start(args.overwrite, images)
    pending = [image for image in images if image not in done]
    bad, failed = caption_all(args, captioner, pending, output)
    report(args, len(images), len(pending), bad, failed)
    return BAD_IMAGES if bad or failed or left_out.unreadable else DONE


def caption_all(
    args: argparse.Namespace, captioner, images: list[str], output: RowFile | Sidecars | Screen
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Captions images to the output, batch by batch.

    Returns:
        The images that can't be read and those whose caption can't be written, each with the reason.
    """
    bad, failed, batch = [], [], []
    shown = not args.quiet and len(images) > args.batch_size
    try:
        for result in progress_bar(captioner(images), len(images), shown):
            if result.error is not None:
                bad.append((result.image, result.error))
            batch.append(withhold(result, args.min_confidence))
            if len(batch) == args.batch_size:
                failed += output.append(batch)
                batch = []
    finally:
        # Also after an interruption: these are done.
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
    """Prints failures, and the number of images done unless `--quiet`."""
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

    output = EmbeddingFile(args.output)
    if output.path.exists() and not args.overwrite:
        raise ValueError(f"--output: {args.output} is there already; pass --overwrite to write over it")
    images, left_out = find_inputs(args)
    captioner = create_captioner(args.backend, options_of(args))
    bad, ids, embeds = [], [], []
    shown = not args.quiet and len(images) > args.batch_size
    for image, row in progress_bar(captioner.embed(images), len(images), shown):
        if isinstance(row, str):
            bad.append((image, row))
        else:
            ids.append(image)
            embeds.append(row)
    if ids:
        output.write(ids, embeds)
    report(args, len(images), len(images), bad)
    return BAD_IMAGES if bad or left_out.unreadable else DONE


def run_export(args: argparse.Namespace) -> int:
    """`tinycap export`; returns the exit status."""
    model = check_model(args.model or str(RELEASED_MODEL))
    from tinycap.deploy.export import export_onnx

    with naming_model(model):
        paths = export_onnx(model, args.output, args.quantize)
    for path in paths.values():
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
        captions, rows = load_corpus(args.dataset_name, args.split, args.corpus_split, args.max_samples)
        texts += captions
        images += rows
    with naming_model(args.model):
        report = trim_repository(args.model, args.output, texts, images, args.batch_size)
    print(json.dumps(report, indent=2))
    return DONE
