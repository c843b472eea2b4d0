"""Outputs of captions: the screen, one file of rows, or a text file beside each image.

A file of rows is a log: rows are appended and flushed batch by batch, so that a killed run loses only the row that it
was writing, and the next run resumes after the last whole one.
"""

import csv
import html
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from tinycap.deploy.captioners import CaptionResult


FORMATS = ("text", "alt", "jsonl", "csv")
# The csv module reads no longer field than 131,072 characters unless told; this is the most that it takes everywhere.
csv.field_size_limit(2**31 - 1)


def alt_attribute(caption: str) -> str:
    """`alt="..."`, escaped so that it can be pasted into an HTML tag whatever the caption holds."""
    return f'alt="{html.escape(caption, quote=True)}"'


class RowShape:
    """What a row of the output holds; the same for all rows of a file.

    Args:
        num_captions: captions of each image.
        confidence: there is a column for it.
        alt: there is a column for the `alt` attribute.
    """

    def __init__(self, num_captions: int = 1, confidence: bool = False, alt: bool = False):
        self.num_captions, self.confidence, self.alt = num_captions, confidence, alt

    def columns(self) -> list[str]:
        """Names of the columns of a CSV file."""
        captions = ["caption", *(f"caption_{number}" for number in range(2, self.num_captions + 1))]
        extra = [name for name in ("confidence", "alt") if getattr(self, name)]
        return ["image", *captions, *extra, "error"]

    def as_dict(self, result: CaptionResult) -> dict:
        """The row of a JSON-lines file: `image`, `caption` (None where there is none) and what else was asked for."""
        row = {"image": result.image, "caption": result.captions[0] if result.captions else None}
        if self.num_captions > 1:
            row["alternatives"] = result.captions[1:]
        if self.confidence:
            row["confidence"] = None if result.confidence is None else round(result.confidence, 4)
        if self.alt:
            row["alt"] = None if row["caption"] is None else alt_attribute(row["caption"])
        if result.error is not None:
            row["error"] = result.error
        return row

    def missing(self, row: dict) -> str:
        """What a row of an earlier run lacks of what was asked for now; empty where it is nothing."""
        names = {"confidence": self.confidence, "alt": self.alt}
        missing = [name for name, wanted in names.items() if wanted and name not in row]
        alternatives = row.get("alternatives")
        num_captions = 1 + (len(alternatives) if isinstance(alternatives, list) else 0)
        if row.get("caption") is not None and num_captions < self.num_captions:
            missing.append(f"{self.num_captions} captions")
        return " and ".join(missing)

    def as_fields(self, result: CaptionResult) -> list[str]:
        """The row of a CSV file, in the order of `columns`; empty where there is nothing."""
        row = self.as_dict(result)
        row.update({f"caption_{n}": text for n, text in enumerate(row.pop("alternatives", []), start=2)})
        return ["" if row.get(name) is None else str(row[name]) for name in self.columns()]


def json_line(row: dict) -> str:
    """One line of JSON; readable, unless a file's name is no text in any encoding."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        line = json.dumps(row)
    return line + "\n"


def csv_line(fields: list[str]) -> str:
    """One row of CSV, quoted where it must be."""
    buffer = io.StringIO()
    # Python 3.11 and older quote a line break only where it is one of the terminator's: with the default, both are.
    csv.writer(buffer).writerow(fields)
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def path_aside(path: Path) -> Path:
    """Where a file is written before it is renamed: beside it, by a name that isn't longer than most."""
    return path.with_name(f".tinycap-{os.getpid()}{path.suffix}")


# --- reading what is there --------------------------------------------------------------------------------------------


def read_jsonl(path: Path, shape: RowShape) -> Iterator[tuple[str, str, bool]]:
    """The whole rows of a file that `RowFile` wrote: their text, image and whether they hold an error.

    A last line that was being written when the run was stopped is left out.

    Raises:
        ValueError: any other line is no such row, or lacks what this run's rows hold; names it.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                image = row["image"]
            except (ValueError, RecursionError, TypeError, KeyError):
                image = None
            if not isinstance(image, str):
                if not line.endswith("\n"):
                    return
                raise ValueError(
                    f'{path}, line {number}: expected a row with an "image", got {line.strip()[:60]!r}; '
                    "is this another program's file?"
                )
            if missing := shape.missing(row):
                raise ValueError(
                    f"{path}, line {number}: expected rows with {missing}, got one without, which would stay so; "
                    "pass --overwrite or another name"
                )
            # An editor may have taken the last line's end.
            yield line.rstrip("\r\n") + "\n", image, row.get("error") is not None


def read_csv(path: Path, columns: list[str]) -> Iterator[tuple[str, str, bool]]:
    """As `read_jsonl`, of a CSV file with a head.

    Raises:
        ValueError: its columns aren't `columns`, or a row can't be parsed or has more or fewer of them; names its line.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        read: list[str] = []

        def lines():
            for line in file:
                read.append(line)
                yield line

        rows = csv.reader(lines(), strict=True)
        first = 1
        while True:
            read.clear()
            try:
                fields, reason = next(rows), ""
            except StopIteration:
                return
            except csv.Error as error:
                fields, reason = [], f": {error}"
            text = "".join(read)
            # A row that was being written when the run was stopped has no line end. One that has all its fields and a
            # caption is whole: an editor may have taken the end.
            is_whole = text.endswith("\n") or (
                first > 1 and len(fields) == len(columns) and bool(fields[1]) and not fields[-1]
            )
            # But an open quote in the middle of the file takes all rows behind it for one field.
            takes_rows = any(len(row) == len(columns) for line in read[1:] for row in csv.reader([line]))
            if not is_whole and not takes_rows:
                return
            if first == 1 and not reason and fields != columns:
                raise ValueError(
                    f"{path}: expected the columns {columns}, got {fields}; pass --overwrite or another name"
                )
            if len(fields) != len(columns):
                got = reason or f", got {len(fields)}"
                raise ValueError(
                    f"{path}, line {first}: expected a row of {len(columns)} fields{got}: {text.strip()[:60]!r}; "
                    "mend its quotes, or pass --overwrite or another name"
                )
            if first > 1:
                yield text.rstrip("\r\n") + "\n", fields[0], bool(fields[-1])
            first += len(read)


class RowFile:
    """A `.jsonl` or `.csv` file of captions to which runs append.

    Args:
        path: the file; its ending says which kind it is.
        shape: what its rows hold.

    Raises:
        ValueError: the ending is neither; names it.
    """

    def __init__(self, path: str | Path, shape: RowShape):
        self.path, self.shape, self.file = Path(path), shape, None
        self.kind = self.path.suffix.lower()[1:]
        if self.kind not in ("jsonl", "csv"):
            raise ValueError(f"--output: expected a name that ends in .jsonl or .csv, got {path}")

    def rows(self) -> Iterator[tuple[str, str, bool]]:
        """The whole rows: text, image, whether it holds an error."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            return iter(())
        if self.kind == "jsonl":
            return read_jsonl(self.path, self.shape)
        return read_csv(self.path, self.shape.columns())

    def done(self) -> set[str]:
        """The images that have their rows."""
        return {image for _, image, _ in self.rows()}

    def start(self, overwrite: bool, images: Iterable[str]) -> set[str]:
        """Rewrites the file without a half-written row and without errors of this run's images, which are retried.

        Killed in the middle, it leaves the file as it was.

        Args:
            overwrite: keep no row.
            images: those of this run.

        Returns:
            The images that have their rows.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows, retried = () if overwrite else self.rows(), set(images)
        aside = path_aside(self.path)
        try:
            with open(aside, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                if self.kind == "csv":
                    file.write(csv_line(self.shape.columns()))
                file.writelines(text for text, image, is_error in rows if not (is_error and image in retried))
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path)
        finally:
            aside.unlink(missing_ok=True)
        return self.done()

    def append(self, batch: Iterable[CaptionResult]) -> list[tuple[str, str]]:
        """Appends rows and flushes them; returns no failures, since rows can't fail one by one."""
        if self.file is None:
            self.file = open(self.path, "a", encoding="utf-8", errors="surrogateescape", newline="")
        for result in batch:
            if self.kind == "jsonl":
                self.file.write(json_line(self.shape.as_dict(result)))
            else:
                self.file.write(csv_line(self.shape.as_fields(result)))
        self.file.flush()
        return []

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


# --- a file beside each image -----------------------------------------------------------------------------------------


class Sidecars:
    """`photo.txt` beside `photo.jpg`, with the captions, one a line.

    Args:
        images: all that will be captioned, to see that no two share a file.
        format: "text" or "alt".

    Raises:
        ValueError: two images would share a file, or an image is an address; names them.
    """

    def __init__(self, images: Iterable[str], format: str):
        self.format = format
        owners: dict[Path, str] = {}
        for image in images:
            if image.startswith(("http://", "https://")):
                raise ValueError(f"--sidecar: expected files, got the address {image}")
            other = owners.setdefault(self.path_of(image), image)
            if other != image:
                raise ValueError(f"--sidecar: {other} and {image} would share {self.path_of(image)}; use --output")

    @staticmethod
    def path_of(image: str) -> Path:
        return Path(image).with_suffix(".txt")

    def start(self, overwrite: bool, images: Iterable[str]) -> set[str]:
        """The images that have a file beside them, whoever wrote it; none if they are to be overwritten."""
        # Not `Path.exists`, which raises an error on a name that is too long.
        return set() if overwrite else {image for image in images if os.path.isfile(self.path_of(image))}

    def append(self, batch: Iterable[CaptionResult]) -> list[tuple[str, str]]:
        """Writes the files, each aside and renamed; none where there is no caption.

        Returns:
            The images whose file can't be written, with the reason.
        """
        failed = []
        for result in batch:
            lines = [caption for caption in result.captions if caption is not None]
            if not lines:
                continue
            if self.format == "alt":
                lines = [alt_attribute(line) for line in lines]
            path = self.path_of(result.image)
            aside = path_aside(path)
            try:
                aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
                os.replace(aside, path)
            except OSError as error:
                aside.unlink(missing_ok=True)
                failed.append((result.image, f"cannot write {path}: {error.strerror}"))
        return failed

    def close(self) -> None:
        pass


# --- the screen -------------------------------------------------------------------------------------------------------


class Screen:
    """Captions as lines of the standard output.

    `text` and `alt` write a line for each caption; the image's name stands before it where there are several images,
    and the confidence where it was asked for, separated by tabs. `jsonl` and `csv` write the rows of a file.

    Args:
        stream: where to, such as `sys.stdout`.
        format: one of `FORMATS`.
        show_names: put the image's name first.
        show_confidence: put the confidence before the caption.
    """

    def __init__(self, stream: TextIO, format: str, shape: RowShape, show_names: bool, show_confidence: bool):
        self.stream, self.format, self.shape = stream, format, shape
        if hasattr(stream, "reconfigure"):
            # A file's name needn't be text in any encoding; it goes out as it came in.
            stream.reconfigure(errors="surrogateescape")
        self.show_names, self.show_confidence = show_names, show_confidence
        if format == "csv":
            stream.write(csv_line(shape.columns()))

    def start(self, overwrite: bool, images: Iterable[str]) -> set[str]:
        return set()

    def append(self, batch: Iterable[CaptionResult]) -> list[tuple[str, str]]:
        for result in batch:
            if self.format == "jsonl":
                self.stream.write(json_line(self.shape.as_dict(result)))
            elif self.format == "csv":
                self.stream.write(csv_line(self.shape.as_fields(result)))
            elif result.error is None:
                self._write_lines(result)
        self.stream.flush()
        return []

    def _write_lines(self, result: CaptionResult) -> None:
        for caption in result.captions:
            fields = [result.image] if self.show_names else []
            if self.show_confidence:
                fields.append(f"{result.confidence:.2f}")
            text = caption or ""
            fields.append(alt_attribute(text) if self.format == "alt" and caption is not None else text)
            self.stream.write("\t".join(fields) + "\n")

    def close(self) -> None:
        pass
