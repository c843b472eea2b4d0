"""Where captions go: the screen, one file of rows, or a text file beside each image; and what is there already.

A file of rows is a log: rows are appended and flushed batch by batch, so that a stopped run has lost nothing but the
row it was writing, and the next run goes on after the last whole one. Several processes write a part each, which are
put into the one file at the end, or at the start of the next run.
"""

import csv
import html
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from tinycap.deploy.captioners import Found


FORMATS = ("text", "alt", "jsonl", "csv")


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

    def as_dict(self, found: Found) -> dict:
        """The row of a JSON-lines file: `image`, `caption` (None where there is none) and what else was asked for."""
        row = {"image": found.image, "caption": found.captions[0] if found.captions else None}
        if self.num_captions > 1:
            row["alternatives"] = found.captions[1:]
        if self.confidence:
            row["confidence"] = None if found.confidence is None else round(found.confidence, 4)
        if self.alt:
            row["alt"] = None if row["caption"] is None else alt_attribute(row["caption"])
        if found.error is not None:
            row["error"] = found.error
        return row

    def as_fields(self, found: Found) -> list[str]:
        """The row of a CSV file, in the order of `columns`; empty where there is nothing."""
        row = self.as_dict(found)
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
    csv.writer(buffer, lineterminator="\n").writerow(fields)
    return buffer.getvalue()


# --- reading what is there --------------------------------------------------------------------------------------------


def read_jsonl(path: Path) -> Iterator[tuple[str, str, bool]]:
    """The whole rows of a file that `RowFile` wrote: their text, image and whether they hold an error.

    A last line that was being written when the run was stopped is left out.

    Raises:
        ValueError: a line before the last is no such row; names it.
    """
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                row = json.loads(line)
                image = row["image"]
            except (json.JSONDecodeError, TypeError, KeyError):
                raise ValueError(
                    f'{path}, line {number}: expected a row with an "image", got {line.strip()[:60]!r}; '
                    "is this another program's file?"
                ) from None
            yield line, image, row.get("error") is not None


def read_csv(path: Path, columns: list[str]) -> Iterator[tuple[str, str, bool]]:
    """As `read_jsonl`, of a CSV file with a head.

    Raises:
        ValueError: its columns aren't `columns`, or a row before the last has more or fewer of them.
    """
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        read: list[str] = []

        def lines():
            for line in file:
                read.append(line)
                yield line

        rows = csv.reader(lines(), strict=True)
        first = True
        while True:
            read.clear()
            try:
                fields = next(rows)
            except (StopIteration, csv.Error):
                # Unfinished quotes at the end: the row that was being written.
                return
            text = "".join(read)
            if not text.endswith("\n"):
                return
            if first and fields != columns:
                raise ValueError(
                    f"{path}: expected the columns {columns}, got {fields}; pass --overwrite or another name"
                )
            if not first and len(fields) != len(columns):
                raise ValueError(f"{path}: expected {len(columns)} fields in a row, got {text.strip()[:60]!r}")
            if not first:
                yield text, fields[0], bool(fields[-1])
            first = False


class RowFile:
    """A `.jsonl` or `.csv` file of captions that grows, run by run.

    Args:
        path: the file; its ending says which kind it is.
        shape: what its rows hold.
        process_index, num_processes: which share of the images is this process's; with several, its rows go to a part.

    Raises:
        ValueError: the ending is neither; names it.
    """

    def __init__(self, path: str | Path, shape: RowShape, process_index: int = 0, num_processes: int = 1):
        self.path, self.shape = Path(path), shape
        self.kind = self.path.suffix.lower()[1:]
        if self.kind not in ("jsonl", "csv"):
            raise ValueError(f"--output: expected a name that ends in .jsonl or .csv, got {path}")
        self.own_path = self.path
        if num_processes > 1:
            self.own_path = self._part_path(process_index, num_processes)
        self.file = None

    def _part_path(self, process_index: int, num_processes: int) -> Path:
        name = f"{self.path.stem}-{process_index:05d}-of-{num_processes:05d}{self.path.suffix}"
        return self.path.with_name(name)

    def parts(self) -> list[Path]:
        """The parts that processes, however many, have left."""
        pattern = re.compile(re.escape(self.path.stem) + r"-\d{5}-of-\d{5}" + re.escape(self.path.suffix))
        return sorted(path for path in self.path.parent.glob("*") if pattern.fullmatch(path.name))

    def rows(self, path: Path) -> Iterator[tuple[str, str, bool]]:
        """The whole rows of a file: text, image, whether it holds an error."""
        if not path.exists() or path.stat().st_size == 0:
            return iter(())
        return read_jsonl(path) if self.kind == "jsonl" else read_csv(path, self.shape.columns())

    def done(self) -> set[str]:
        """The images that have their rows."""
        return {image for _, image, _ in self.rows(self.path)}

    def start(self, overwrite: bool) -> None:
        """Gets the file ready for this run's rows, by one process before the others: gone on with, or begun anew."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for path in (self.path, *self.parts()):
                path.unlink(missing_ok=True)
        self.settle(keep_errors=False)

    def settle(self, keep_errors: bool) -> None:
        """Makes one whole file of what an earlier run left: parts are put in, and a half-written row is left out.

        Run by one process while no other writes. Killed in the middle, it leaves everything as it was.

        Args:
            keep_errors: also keep rows of images that couldn't be read. Without them, these are tried again.
        """
        parts = self.parts()
        # Turn by turn, as the images were dealt out: parts of a run that went through give their order back.
        turns = itertools.zip_longest(*map(self.rows, parts))
        dealt = (row for turn in turns for row in turn if row is not None)
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        seen: set[str] = set()
        try:
            with open(aside, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                if self.kind == "csv":
                    file.write(csv_line(self.shape.columns()))
                for text, image, is_error in itertools.chain(self.rows(self.path), dealt):
                    # A part is removed after its rows are in the file: killed in between, both have them.
                    if image not in seen and (keep_errors or not is_error):
                        file.write(text)
                        seen.add(image)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path)
        finally:
            aside.unlink(missing_ok=True)
        for part in parts:
            part.unlink()

    def append(self, batch: Iterable[Found]) -> None:
        """Adds rows and hands them to the system."""
        if self.file is None:
            new = not self.own_path.exists() or self.own_path.stat().st_size == 0
            self.file = open(self.own_path, "a", encoding="utf-8", errors="surrogateescape", newline="")
            if new and self.kind == "csv":
                self.file.write(csv_line(self.shape.columns()))
        for found in batch:
            if self.kind == "jsonl":
                self.file.write(json_line(self.shape.as_dict(found)))
            else:
                self.file.write(csv_line(self.shape.as_fields(found)))
        self.file.flush()

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

    def done(self, images: Iterable[str]) -> set[str]:
        """The images that have a file beside them, whoever wrote it."""
        return {image for image in images if self.path_of(image).exists()}

    def append(self, batch: Iterable[Found]) -> None:
        """Writes the files, each aside and renamed; none where there is no caption."""
        for found in batch:
            lines = [caption for caption in found.captions if caption is not None]
            if not lines:
                continue
            if self.format == "alt":
                lines = [alt_attribute(line) for line in lines]
            path = self.path_of(found.image)
            aside = path.with_name(f".{path.name}.{os.getpid()}")
            aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            os.replace(aside, path)

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

    def append(self, batch: Iterable[Found]) -> None:
        for found in batch:
            if self.format == "jsonl":
                self.stream.write(json_line(self.shape.as_dict(found)))
            elif self.format == "csv":
                self.stream.write(csv_line(self.shape.as_fields(found)))
            elif found.error is None:
                self._write_lines(found)
        self.stream.flush()

    def _write_lines(self, found: Found) -> None:
        for caption in found.captions:
            fields = [found.image] if self.show_names else []
            if self.show_confidence:
                fields.append(f"{found.confidence:.2f}")
            text = caption or ""
            fields.append(alt_attribute(text) if self.format == "alt" and caption is not None else text)
            self.stream.write("\t".join(fields) + "\n")

    def close(self) -> None:
        pass
