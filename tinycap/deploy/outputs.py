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
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from tinycap.deploy.captioners import Found


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

    def missing(self, row: dict) -> str:
        """What a row of an earlier run lacks of what was asked for now; empty where it is nothing."""
        names = {"confidence": self.confidence, "alt": self.alt}
        missing = [name for name, wanted in names.items() if wanted and name not in row]
        if row.get("caption") is not None and len(row.get("alternatives", ())) < self.num_captions - 1:
            missing.append(f"{self.num_captions} captions")
        return " and ".join(missing)

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
            except (json.JSONDecodeError, TypeError, KeyError):
                if not line.endswith("\n"):
                    return
                raise ValueError(
                    f'{path}, line {number}: expected a row with an "image", got {line.strip()[:60]!r}; '
                    "is this another program's file?"
                ) from None
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
        return read_jsonl(path, self.shape) if self.kind == "jsonl" else read_csv(path, self.shape.columns())

    def done(self) -> set[str]:
        """The images that have their rows."""
        return {image for _, image, _ in self.rows(self.path)}

    def start(self, overwrite: bool, images: Iterable[str]) -> None:
        """Gets the file ready for this run's images, by one process before the others: gone on with, or begun anew."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for path in (self.path, *self.parts()):
                path.unlink(missing_ok=True)
        self.settle(retried=set(images))

    def settle(self, retried: Collection[str] = ()) -> None:
        """Makes one whole file of what an earlier run left: parts are put in, and a half-written row is left out.

        Run by one process while no other writes. Killed in the middle, it leaves everything as it was.

        Args:
            retried: images whose rows are left out if they hold an error.
        """
        parts = self.parts()
        # Turn by turn, as the images were dealt out: parts of a run that went through give their order back.
        turns = itertools.zip_longest(*map(self.rows, parts))
        dealt = (row for turn in turns for row in turn if row is not None)
        aside = path_aside(self.path)
        seen: set[str] = set()
        try:
            with open(aside, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                if self.kind == "csv":
                    file.write(csv_line(self.shape.columns()))
                for rows, is_part in ((self.rows(self.path), False), (dealt, True)):
                    for text, image, is_error in rows:
                        # A part is removed after its rows are in the file: killed in between, both have them.
                        if not (is_part and image in seen) and not (is_error and image in retried):
                            file.write(text)
                            seen.add(image)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path)
        finally:
            aside.unlink(missing_ok=True)
        for part in parts:
            part.unlink()

    def append(self, batch: Iterable[Found]) -> list[tuple[str, str]]:
        """Adds rows and hands them to the system; none of them fails alone."""
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

    def done(self, images: Iterable[str]) -> set[str]:
        """The images that have a file beside them, whoever wrote it."""
        # Not `Path.exists`, which raises an error on a name that is too long.
        return {image for image in images if os.path.isfile(self.path_of(image))}

    def append(self, batch: Iterable[Found]) -> list[tuple[str, str]]:
        """Writes the files, each aside and renamed; none where there is no caption.

        Returns:
            The images whose file can't be written, with the reason.
        """
        failed = []
        for found in batch:
            lines = [caption for caption in found.captions if caption is not None]
            if not lines:
                continue
            if self.format == "alt":
                lines = [alt_attribute(line) for line in lines]
            path = self.path_of(found.image)
            aside = path_aside(path)
            try:
                aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
                os.replace(aside, path)
            except OSError as error:
                aside.unlink(missing_ok=True)
                failed.append((found.image, f"cannot write {path}: {error.strerror}"))
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

    def append(self, batch: Iterable[Found]) -> list[tuple[str, str]]:
        for found in batch:
            if self.format == "jsonl":
                self.stream.write(json_line(self.shape.as_dict(found)))
            elif self.format == "csv":
                self.stream.write(csv_line(self.shape.as_fields(found)))
            elif found.error is None:
                self._write_lines(found)
        self.stream.flush()
        return []

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
