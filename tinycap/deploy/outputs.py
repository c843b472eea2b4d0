"""Outputs: the screen, one file of rows, a text file beside each image; embeddings are in embeddings.py.

All outputs have the same interface; they are complete after a `with` block without an error:

    with output:
        done = output.start(images, overwrite)  # images written by an earlier run; none with `overwrite`
        failed = output.append(results)         # a batch; (image, reason) of what can't be written

Rows are appended to a file and flushed after every batch: a killed run loses only the row that it was writing, and the
next run resumes after the last complete row.
"""

import argparse
import contextlib
import csv
import html
import io
import json
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from tinycap.commands import OutputError, replacing, write_text, writing
from tinycap.deploy.captioners import ImageResult


if os.name == "nt":
    import msvcrt
else:
    import fcntl

FORMATS = ("text", "alt", "jsonl", "csv")
# File names may be invalid UTF-8.
AS_IT_IS = {"errors": "surrogateescape", "newline": ""}
# The csv module's limit is 131,072 characters by default; this is the maximum on all platforms.
csv.field_size_limit(2**31 - 1)


# Locks of this process. Its forks close them, or they would keep a lock after this process is killed.
HELD: "weakref.WeakSet[TextIO]" = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [file.close() for file in HELD])


def lock(path: Path) -> TextIO:
    """Locks an output until the returned file is closed; `OutputError` if another process has the lock."""
    name = path.with_name(f".{path.name}.lock")
    with writing(f"{path}, its lock {name.name}"):
        # It is never written to, and may be a link or another user's, who was killed.
        file = open(name, "a") if os.access(name, os.W_OK) or not name.exists() else open(name)
    HELD.add(file)
    try:
        if os.name == "nt":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink == 0:
            # The previous owner removed it in the meantime.
            raise BlockingIOError
    except (BlockingIOError, PermissionError):
        file.close()
        raise OutputError(f"cannot write {path}: another process is writing to it") from None
    except OSError:
        # Some network file systems don't support locks.
        pass
    return file


def check_file(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise OutputError(f"cannot write {path}: expected a file, got a folder, a pipe or a device")


@contextlib.contextmanager
def filling(folder: str | Path) -> Iterator[Path]:
    """Yields a temporary folder in `folder`; moves its files to there if the block succeeds. Raises `OutputError`."""
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tinycap-", dir=folder) as aside:
            yield Path(aside)
            for path in [path for path in Path(aside).rglob("*") if path.is_file()]:
                target = folder / path.relative_to(aside)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)


def alt_attribute(caption: str) -> str:
    """`alt="..."`, escaped for an HTML tag."""
    return f'alt="{html.escape(caption, quote=True)}"'


class Output:
    """Base class of the outputs."""

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close(finished=kind is None)

    def start(self, images: Sequence[str], overwrite: bool) -> set[str]:
        return set()

    def close(self, finished: bool) -> None:
        pass


class CaptionRows:
    """The content of caption rows: image, captions, `confidence` and `alt` if requested, and error."""

    def __init__(self, num_captions: int = 1, confidence: bool = False, alt: bool = False):
        self.num_captions = num_captions
        self.extra = [name for name, wanted in (("confidence", confidence), ("alt", alt)) if wanted]
        captions = ["caption", *(f"caption_{number}" for number in range(2, num_captions + 1))]
        self.columns = ["image", *captions, *self.extra, "error"]

    def head(self) -> str:
        """The first line of a `csv` file."""
        return csv_line(self.columns)

    def line(self, result: ImageResult, kind: str) -> str:
        """A row of a `csv` or `jsonl` file."""
        best = result.captions[0] if result.captions else None
        row = {"image": result.image, "caption": best}
        if self.num_captions > 1:
            row["alternatives"] = result.captions[1:]
        confidence = None if result.confidence is None else round(result.confidence, 4)
        extra = {"confidence": confidence, "alt": None if best is None else alt_attribute(best)}
        row |= {name: extra[name] for name in self.extra}
        if result.error is not None:
            row["error"] = result.error
        if kind == "jsonl":
            return json_line(row)
        row |= {f"caption_{n}": text for n, text in enumerate(result.captions[1:], start=2)}
        return csv_line(["" if row.get(name) is None else str(row[name]) for name in self.columns])

    def missing(self, row: dict) -> str:
        """The requested content that a JSON row of an earlier run lacks; empty if there is none."""
        missing = [name for name in self.extra if name not in row]
        alternatives = row.get("alternatives")
        num_captions = 1 + (len(alternatives) if isinstance(alternatives, list) else 0)
        if row.get("caption") is not None and num_captions < self.num_captions:
            missing.append(f"{self.num_captions} captions")
        return " and ".join(missing)


def json_line(row: dict) -> str:
    """A line of JSON, escaped only if a file name is invalid UTF-8."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        line = json.dumps(row)
    return line + "\n"


def csv_line(fields: list[str]) -> str:
    buffer = io.StringIO()
    # Up to Python 3.11, only the terminator's characters are quoted; the default terminator has both line breaks.
    csv.writer(buffer).writerow(fields)
    return buffer.getvalue().removesuffix("\r\n") + "\n"


class RowFile(Output):
    """A `.jsonl` or `.csv` file (`ValueError` for other extensions) to which runs append, one at a time.

    `shape` defines the content of its rows, like `CaptionRows`; one that `is_temporary` is removed when it is finished.
    """

    def __init__(self, path: str | Path, shape, is_temporary: bool = False):
        # Resolved, so that links to the same file share its lock.
        self.path, self.shape, self.file, self.lock = Path(os.path.realpath(path)), shape, None, None
        self.is_temporary = is_temporary
        self.kind = self.path.suffix.lower()[1:]
        if self.kind not in ("jsonl", "csv"):
            raise ValueError(f"--output: expected a name that ends in .jsonl or .csv, got {path}")

    def start(self, images: Sequence[str], overwrite: bool) -> set[str]:
        """Removes a half-written row and the errors of this run's images, which are retried.

        The file is replaced atomically. It stays unchanged if it contains anything else (`ValueError`).
        """
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.path)
            check_file(self.path)
            retried, done = set(images), set()
            with replacing(self.path) as aside, open(aside, "w", encoding="utf-8", **AS_IT_IS) as file:
                file.write(self.shape.head() if self.kind == "csv" else "")
                for text, row in () if overwrite else self.rows():
                    if not row.get("error") or row["image"] not in retried:
                        file.write(text)
                        done.add(row["image"])
                file.flush()
                os.fsync(file.fileno())
            self.file = open(self.path, "a", encoding="utf-8", **AS_IT_IS)
        return done

    def append(self, results: Iterable[ImageResult]) -> list[tuple[str, str]]:
        with writing(self.path):
            self.file.writelines(self.shape.line(result, self.kind) for result in results)
            self.file.flush()
        return []

    def close(self, finished: bool) -> None:
        file, held, self.file, self.lock = self.file, self.lock, None, None
        try:
            if file is not None:
                with writing(self.path):
                    file.close()
                    if finished and self.is_temporary:
                        self.path.unlink()
        finally:
            if held is not None:
                # Windows can't remove an open file.
                with contextlib.suppress(OSError):
                    os.unlink(held.name)
                held.close()

    def rows(self) -> Iterator[tuple[str, dict]]:
        """The complete rows of the file, as text and as dicts."""
        if not self.path.exists() or not self.path.stat().st_size:
            return
        with open(self.path, encoding="utf-8-sig", **AS_IT_IS) as file:
            for number, text, row, expected in self._read_csv(file) if self.kind == "csv" else self._read_jsonl(file):
                if expected:
                    raise ValueError(
                        f"{self.path}, line {number}: expected {expected}, got {text.strip()[:60]!r}; fix it, or pass "
                        "--overwrite or another name"
                    )
                # An editor may have changed or removed the line end.
                yield text.rstrip("\r\n") + "\n", row

    def _read_jsonl(self, file: TextIO) -> Iterator[tuple[int, str, dict, str]]:
        """Yields line number, text and content of each row, and what was expected instead if it is invalid."""
        for number, text in enumerate(file, start=1):
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and isinstance(row.get("image"), str):
                missing = self.shape.missing(row)
                yield number, text, row, f"rows with {missing}" if missing else ""
            elif text.endswith("\n"):
                yield number, text, {}, 'a row with an "image"'

    def _read_csv(self, file: TextIO) -> Iterator[tuple[int, str, dict, str]]:
        columns, lines = self.shape.columns, []
        rows = csv.reader((lines.append(line) or line for line in file), strict=True)
        while True:
            number = rows.line_num + 1
            lines.clear()
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error:
                fields = []
            text, is_row = "".join(lines), len(fields) == len(columns)
            # A half-written row has no line end. With all fields, a caption and no error it is complete: an editor may
            # have removed the line end. An unclosed quote from an editor includes all rows after it.
            is_whole = text.endswith("\n") or (number > 1 and is_row and bool(fields[1]) and not fields[-1])
            takes_rows = any(len(row) == len(columns) for line in lines[1:] for row in csv.reader([line]))
            if is_whole or takes_rows:
                if number == 1 and fields != columns:
                    yield number, text, {}, f"the columns {columns}"
                elif number > 1:
                    yield number, text, dict(zip(columns, fields)), "" if is_row else f"{len(columns)} fields"


class Sidecars(Output):
    """`photo.txt` beside `photo.jpg`, with a caption a line, as "text" or "alt".

    Raises `ValueError` where an image is a URL, or its sidecar is that of another image or an image itself.
    """

    def __init__(self, images: Sequence[str], format: str | None):
        self.format = format
        taken = {os.path.realpath(image): f"over the image {image}" for image in images}
        for image in images:
            if image.startswith(("http://", "https://")):
                raise ValueError(f"--sidecar: expected files, got the address {image}")
            path = self.path_of(image)
            # On a case-insensitive file system, an image `photo.TXT` is its own sidecar.
            is_image = os.path.exists(path) and os.path.samefile(path, image)
            real = os.path.realpath(image if is_image else path)
            if real in taken:
                raise ValueError(f"--sidecar: the caption of {image} would be written {taken[real]}; use --output")
            taken[real] = f"to {path}, as that of {image}"

    @staticmethod
    def path_of(image: str) -> Path:
        return Path(image).with_suffix(".txt")

    def start(self, images: Sequence[str], overwrite: bool) -> set[str]:
        # `Path.exists` raises an error if the name is too long.
        return set() if overwrite else {image for image in images if os.path.isfile(self.path_of(image))}

    def append(self, results: Iterable[ImageResult]) -> list[tuple[str, str]]:
        failed = []
        for result in results:
            path = self.path_of(result.image)
            lines = [caption for caption in result.captions if caption is not None]
            if self.format == "alt":
                lines = [alt_attribute(line) for line in lines]
            try:
                if lines:
                    write_text(path, "".join(f"{line}\n" for line in lines))
            except OutputError as error:
                failed.append((result.image, str(error)))
        return failed


class Screen(Output):
    """Lines of image name, confidence (both optional) and caption, separated by tabs; or the rows of a file."""

    def __init__(self, stream: TextIO, format: str | None, shape: CaptionRows, show_names: bool, show_confidence: bool):
        self.stream, self.format, self.shape = stream, format, shape
        self.show_names, self.show_confidence = show_names, show_confidence
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=AS_IT_IS["errors"])

    def start(self, images: Sequence[str], overwrite: bool) -> set[str]:
        if self.stream is None:
            raise OutputError("cannot write to the standard output: it is closed")
        with writing("to the standard output"):
            self.stream.write(self.shape.head() if self.format == "csv" else "")
        return set()

    def append(self, results: Iterable[ImageResult]) -> list[tuple[str, str]]:
        with writing("to the standard output"):
            for result in results:
                if self.format in ("jsonl", "csv"):
                    self.stream.write(self.shape.line(result, self.format))
                    continue
                for caption in result.captions:
                    fields = [result.image] if self.show_names else []
                    fields += [f"{result.confidence:.2f}"] if self.show_confidence else []
                    is_alt = self.format == "alt" and caption is not None
                    fields.append(alt_attribute(caption) if is_alt else caption or "")
                    self.stream.write("\t".join(fields) + "\n")
            self.stream.flush()
        return []


def write_results(
    args: argparse.Namespace, results: Iterable[ImageResult], total: int, append: Callable, name: str | None = None
) -> tuple[list, list, int]:
    """Appends results in batches, also those before an interruption, with a progress bar for more than one batch.

    Args:
        append: as of an `Output`.
        name: of the progress bar.

    Returns:
        The unreadable images and those whose result can't be written, as (image, reason), and the number of captions
        left out by `--min-confidence`.
    """
    from tqdm import tqdm

    bad, failed, batch, num_unsure = [], [], [], 0
    # In a log file, each update is a line.
    options = {"unit": "image", "mininterval": 0.2 if sys.stderr.isatty() else 10.0, "file": sys.stderr, "desc": name}

    def write() -> None:
        ready = batch.copy()
        # First, so that an interrupted batch isn't written twice.
        batch.clear()
        failed.extend(append(ready) if ready else ())

    try:
        for result in tqdm(results, total=total, disable=args.quiet or total <= args.batch_size, **options):
            low = getattr(args, "min_confidence", None)
            if result.error is not None:
                bad.append((result.image, result.error))
            elif low is not None and result.confidence < low:
                result.captions = [None]
                num_unsure += 1
            batch.append(result)
            if len(batch) == args.batch_size:
                write()
    finally:
        write()
    return bad, failed, num_unsure
