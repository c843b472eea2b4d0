"""The command line `tinycap`: `caption`, `embed`, `search`, `export` and `trim-vocab`.

Large libraries are imported when a command needs them: `--help` answers at once, and `--backend onnx` never imports
PyTorch.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tinycap import REPOSITORY, __version__
from tinycap.commands import BAD_IMAGES, DONE, run_command, say
from tinycap.deploy.captioners import BACKENDS, CaptionOptions, check_model, extra_missing
from tinycap.deploy.inputs import UNREADABLE, LeftOut, list_images, read_lines
from tinycap.deploy.outputs import FORMATS, CaptionRows, Output, RowFile, Screen, Sidecars, write_results


STATUS = """exit status: 0, success; 1, some images failed: they are named, the others are done; 2, the command can't
run with these arguments; 3, the output can't be written; 130, interrupted; 143, terminated. After the last three the
same command resumes."""
# Unreadable files named on standard error if the output file lists all of them.
MAX_NAMED = 20


def number(convert: Callable, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`."""

    def parse(text: str) -> float:
        value = convert(text)
        if not low <= value <= high:
            expected = f"{low} or more" if high == float("inf") else f"a number from {low} to {high}"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    parse.__name__ = convert.__name__
    return parse


POSITIVE = number(int, 1)


def shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= part <= count:
        raise argparse.ArgumentTypeError(f"expected K/N with K from 1 to N, such as 3/8, got {text}")
    return part, count


def add(parser, name: str, help: str, **options) -> None:
    """Adds an argument, with its default appended to its help."""
    help += " (default: %(default)s)" if options.get("default") not in (None, []) else ""
    parser.add_argument(name, help=help, **options)


def add_inputs(parser: argparse.ArgumentParser) -> None:
    add(parser, "images", "files, folders, patterns, http(s) addresses; - reads a list from standard input", nargs="*")
    add(parser, "--input-list", "a file with more of them, one a line", metavar="FILE")
    add(parser, "--model", "a repository, local or (PyTorch) on the Hub (default: the released one)", metavar="FOLDER")
    add(parser, "--backend", "inference library", choices=BACKENDS, default="torch")
    add(parser, "--batch-size", "images in a batch", type=POSITIVE, default=8)
    add(parser, "--device", "PyTorch's name of the device (default: the first GPU, else cpu)")
    add(parser, "--quantized", "with --backend onnx: the int8 files", action="store_true")
    add(parser, "--num-threads", "threads of an operation (default: one a core)", type=POSITIVE)
    add(parser, "--num-workers", "processes, or threads (onnx, embed), that read ahead", type=number(int, 0), default=0)
    add(parser, "--overwrite", "start from the beginning instead of resuming", action="store_true")
    add(parser, "--quiet", "no progress bar and no summary", action="store_true")


def add_caption(parser: argparse.ArgumentParser) -> None:
    add_inputs(parser)
    where = parser.add_mutually_exclusive_group()
    add(where, "--output", "a .jsonl or .csv file of rows, resumed if it exists (default: the screen)", metavar="FILE")
    add(where, "--sidecar", "write photo.txt beside photo.jpg, unless it exists", action="store_true")
    add(parser, "--shard", "the K-th of N parts of the images, to captions.K-of-N.jsonl", type=shard, metavar="K/N")
    add(
        parser, "--format", 'text, alt="..." for HTML; on the screen also jsonl or csv (default: text)', choices=FORMATS
    )
    add(parser, "--num-beams", "beams (default: the model's own number)", type=POSITIVE)
    add(parser, "--num-captions", "captions of each image", type=POSITIVE, default=1)
    add(parser, "--max-new-tokens", "longest caption in tokens (default: the model's own)", type=POSITIVE)
    add(parser, "--confidence", "also give the probability that the first caption is right", action="store_true")
    add(parser, "--min-confidence", "leave out captions of a lower confidence", type=number(float, 0, 1), metavar="P")


def add_embed(parser: argparse.ArgumentParser) -> None:
    add_inputs(parser)
    output = "a .safetensors file (tensor image_embeds, metadata ids), or a .npy file (ids beside it, in .ids.json)"
    add(parser, "--output", output, metavar="FILE", required=True)


def add_search(parser: argparse.ArgumentParser) -> None:
    add(parser, "query", "what to look for, such as 'a dog on the beach'", nargs="?")
    add_inputs(parser)
    how = parser.add_mutually_exclusive_group()
    add(how, "--like", "look for images like this one, in place of a query", metavar="IMAGE")
    add(how, "--duplicates", "groups of near duplicates, in place of a query", action="store_true")
    near = number(float, 0, 1)
    add(parser, "--threshold", "cosine from which on images are duplicates", type=near, metavar="COSINE", default=0.95)
    add(parser, "--number", "images, or groups of duplicates, to show", type=POSITIVE, default=10)
    add(parser, "--format", "html is a page of thumbnails", choices=("text", "json", "tsv", "html"), default="text")
    add(parser, "--output", "file for the answer (default: the screen)", metavar="FILE")
    add(parser, "--index", "folder of the index (default: beside the images' folder)", metavar="FOLDER")
    switch = {"action": argparse.BooleanOptionalAction, "default": True}
    add(parser, "--refresh", "look for new, changed and deleted images first", **switch)
    add(parser, "--captions", "caption what is found", **switch)


def add_export(parser: argparse.ArgumentParser) -> None:
    add(parser, "--model", "a TinyCap repository (default: the released checkpoint)", metavar="FOLDER")
    where = parser.add_mutually_exclusive_group(required=True)
    add(where, "--output", "folder for the files", metavar="FOLDER")
    page = "folder for a web page instead, which captions photos in the browser"
    add(where, "--web", page, metavar="FOLDER")
    npm = "with --web: a folder with the page's npm packages (default: npm installs them)"
    add(parser, "--npm", npm, metavar="FOLDER")
    add(parser, "--quantize", "write int8 files too", action=argparse.BooleanOptionalAction, default=True)


def add_trim(parser: argparse.ArgumentParser) -> None:
    add(parser, "images", "files, folders or patterns of images that are captioned before and after", nargs="*")
    add(parser, "--model", "a TinyCap repository", metavar="FOLDER", required=True)
    add(parser, "--output", "folder for the smaller one", metavar="FOLDER", required=True)
    add(parser, "--dataset-name", "captioned images as well: a name on the Hub, a folder of parquet, an imagefolder")
    add(parser, "--split", "split whose images are captioned", default="validation")
    several = {"action": "append", "default": []}
    add(parser, "--corpus", "texts whose tokens to keep, one a line; repeatable", **several, metavar="FILE")
    add(
        parser, "--corpus-split", "another split whose captions' tokens to keep; repeatable", **several, metavar="SPLIT"
    )
    add(parser, "--max-samples", "caption only the first so many images", type=POSITIVE)
    add(parser, "--batch-size", "images in a batch", type=POSITIVE, default=16)


def create_parser() -> argparse.ArgumentParser:
    description = "Captions images on this machine, offline."
    parser = argparse.ArgumentParser(prog="tinycap", description=description, epilog=STATUS, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tinycap {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    embeds = "write image embeddings for search: (N, D) float32, unit norm, so that a dot product is the similarity"
    trims = "drop the tokens that a corpus never uses; reports how many captions change"
    for name, run, add_arguments, what in (
        ("caption", run_images, add_caption, "caption images"),
        ("embed", run_images, add_embed, embeds),
        ("search", run_search, add_search, "find images by words, by an image, or near duplicates, with an index"),
        ("export", run_export, add_export, "write the ONNX files that --backend onnx reads"),
        ("trim-vocab", run_trim, add_trim, trims),
    ):
        command = commands.add_parser(name, help=what, description=what, epilog=STATUS, allow_abbrev=False)
        command.set_defaults(run=run, prog=command.prog)
        add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status. Invalid arguments exit with status 2."""
    args = create_parser().parse_args(argv)
    # Spinning idle threads slow down others on busy cores. OpenMP libraries read this when PyTorch loads them: GNU's
    # and, on macOS and Windows, LLVM's or Intel's.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    return run_command(args.prog, lambda: args.run(args), "the same command goes on from here")


def find_inputs(args: argparse.Namespace) -> tuple[list[str], LeftOut]:
    """The images of the command line and of `--input-list`; what was left out of folders, after printing it."""
    left_out = LeftOut()
    images = list_images(args.images, left_out=left_out)
    if getattr(args, "input_list", None) is not None:
        listed = list_images(read_lines(args.input_list, "surrogateescape"), left_out=left_out, from_list=True)
        images = list(dict.fromkeys([*images, *listed]))
    if str(left_out) and (left_out[UNREADABLE] or not getattr(args, "quiet", False)):
        say(args.prog, str(left_out))
    return images, left_out


def in_shard(image: str, shard: tuple[int, int]) -> bool:
    """Whether an image is in shard K of N, by a hash of its name, so that images added later don't move others."""
    part, count = shard
    return int.from_bytes(hashlib.sha256(os.fsencode(image)).digest()[:8], "big") % count == part - 1


def shard_path(path: str, shard: tuple[int, int]) -> str:
    """`captions.3-of-8.jsonl` for `captions.jsonl`; zero-padded, so that names sort."""
    part, count = shard
    stem, suffix = os.path.splitext(path)
    return f"{stem}.{part:0{len(str(count))}}-of-{count}{suffix}"


def check_arguments(args: argparse.Namespace) -> CaptionOptions:
    """Returns the captioner's options; `ValueError` for contradictory arguments."""
    if args.quantized and args.backend != "onnx":
        raise ValueError("--quantized is an option of --backend onnx")
    options = {name: value for name, value in vars(args).items() if name in CaptionOptions.__dataclass_fields__}
    options["model"] = check_model(args.model or str(REPOSITORY))
    if args.command == "caption":
        options["confidence"] = args.confidence or args.min_confidence is not None
        if args.format in ("jsonl", "csv") and (args.sidecar or args.output is not None):
            raise ValueError(f"--format {args.format}: is for the screen; --output says by its ending what it writes")
        if args.shard is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("several processes would write the same captions; start each with its own --shard K/N")
    return CaptionOptions(**options)


def create_output(args: argparse.Namespace, images: list[str], options: CaptionOptions) -> Output:
    """The output that the arguments ask for; `images` are those of all shards."""
    if args.command == "embed":
        from tinycap.deploy.embeddings import EmbeddingFile

        model = f"{options.model}, {args.backend}{' int8' if options.quantized else ''}"
        return EmbeddingFile(args.output, model, args.overwrite)
    shape = CaptionRows(args.num_captions, options.confidence, alt=args.format == "alt")
    if args.output is not None:
        args.output = shard_path(args.output, args.shard) if args.shard else args.output
        return RowFile(args.output, shape)
    if args.sidecar:
        return Sidecars(images, args.format)
    return Screen(sys.stdout, args.format, shape, len(images) > 1, args.confidence)


def run_images(args: argparse.Namespace) -> int:
    """`tinycap caption` and `tinycap embed`; returns the exit status."""
    options = check_arguments(args)
    images, left_out = find_inputs(args)
    if not images:
        raise ValueError("expected images: files, folders, patterns, addresses, - or --input-list; got none")
    output = create_output(args, images, options)
    if getattr(args, "shard", None):
        images = [image for image in images if in_shard(image, args.shard)]
    # Before the output is opened: if the model can't be loaded, the output stays unchanged.
    captioner = BACKENDS[args.backend](options)
    with output:
        done = output.start(images, args.overwrite)
        pending = [image for image in images if image not in done]
        results = captioner.embed(pending) if args.command == "embed" else captioner(pending)
        bad, failed, num_unsure = write_results(args, results, len(pending), output.append)
    report(args, len(images), len(pending), bad, failed, num_unsure)
    return BAD_IMAGES if bad or failed or left_out[UNREADABLE] else DONE


def report(args: argparse.Namespace, total: int, pending: int, bad: list, failed: list, num_unsure: int) -> None:
    """Prints failures, and the number of completed images unless `--quiet`."""
    named = bad[:MAX_NAMED] if args.command == "caption" and args.output is not None else bad
    for image, error in (*named, *failed):
        say(args.prog, error if image in error else f"{image}: {error}")
    if len(bad) > len(named):
        say(args.prog, f"... all {len(bad)} of them have an error in {args.output}")
    if bad or failed or (total > 1 and not args.quiet):
        kept = f", {total - pending} were there already" if total > pending else ""
        unread = f", {len(bad)} could not be read" if bad else ""
        unwritten = f", {len(failed)} could not be written" if failed else ""
        unsure = f", {num_unsure} without a caption: below --min-confidence" if num_unsure else ""
        say(args.prog, f"{pending - len(bad) - len(failed)} of {total} images done{kept}{unread}{unwritten}{unsure}")


def run_search(args: argparse.Namespace) -> int:
    if args.like is not None or args.duplicates:
        # Without a query, its place is the first image's.
        args.images, args.query = [args.query, *args.images] if args.query is not None else args.images, None
    elif args.query is None or not args.query.strip():
        raise ValueError("expected a query, or --like or --duplicates, and images; got no query")
    if args.input_list is not None:
        args.images += read_lines(args.input_list, "surrogateescape")
    if not args.images:
        raise ValueError("expected images: a folder, files or patterns; got none")
    captioner = BACKENDS[args.backend](check_arguments(args))
    from tinycap.deploy.search import search

    bad, left_out = search(args, captioner)
    for image, error in bad[:MAX_NAMED]:
        say(args.prog, error if image in error else f"{image}: {error}")
    if len(bad) > MAX_NAMED:
        say(args.prog, f"... {len(bad)} images could not be read; they are tried again once they change")
    return BAD_IMAGES if bad or left_out[UNREADABLE] else DONE


def run_export(args: argparse.Namespace) -> int:
    model = check_model(args.model or str(REPOSITORY))
    if args.web is None and args.npm is not None:
        raise ValueError("--npm: expected --web with it")
    if args.web is not None and not args.quantize:
        raise ValueError("--no-quantize: the page of --web has the int8 files only")
    from tinycap.deploy.export import export_onnx

    if args.web is not None:
        from tinycap.deploy.web_export import export_web

        paths = export_web(model, args.web, args.npm)
    else:
        paths = export_onnx(model, args.output, args.quantize).values()
    for path in paths:
        print(f"{Path(path).stat().st_size:>12,}  {path}")
    return DONE


def run_trim(args: argparse.Namespace) -> int:
    check_model(args.model)
    import logging

    try:
        from tinycap.deploy.trim_vocab import load_corpus, trim_repository
    except ImportError as error:
        raise extra_missing("trim-vocab needs datasets", "evaluation", error) from error

    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if args.corpus_split and args.dataset_name is None:
        raise ValueError("--corpus-split: expected --dataset-name with it")
    texts = [text for path in args.corpus for text in read_lines(path)]
    images = find_inputs(args)[0][: args.max_samples]
    if args.dataset_name is not None:
        captions, rows = load_corpus(args.dataset_name, args.split, args.corpus_split, args.max_samples)
        texts += captions
        images += rows
    report = trim_repository(args.model, args.output, texts, images, args.batch_size)
    print(json.dumps(report, indent=2))
    return DONE
