"""Plain folders of captioned images, as cameras, annotators and well-known data sets leave them.

    a.jpg + a.txt                      a text file beside each image (or in a folder of its own), one caption a line
    images/ + captions.csv             a CSV, TSV, JSON-lines or JSON table whose rows name a file and its captions
    Images/ + captions.txt             Flickr8k's "a.jpg,caption", with or without a header
    Flickr8k.token.txt                 Flickr8k's "a.jpg#0<TAB>caption"
    annotations/captions_*.json        COCO's annotations, and Karpathy's splits

Splits are folders and tables called train, val2017 and the like, a table's column `split`, and lists of file names
such as `Flickr_8k.devImages.txt`; everything else is "train".
"""

import bisect
import csv
import hashlib
import io
import json
import logging
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from tinycap.processing_tinycap import IMAGE_ENDINGS


logger = logging.getLogger(__name__)

# Read by `datasets` itself.
SHARD_ENDINGS = {".parquet", ".arrow", ".tar", ".tgz"}
TABLE_ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt")
SIDECAR_ENDINGS = (".txt", ".caption")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_name", "image_path", "path", "filepath")

SPLIT_NAME = re.compile(
    r"(?:.*[^a-z])?(?:(?P<train>train|training|restval)|(?P<validation>val|valid|validation|dev)"
    r"|(?P<test>test|testing|eval|evaluation))[_-]?(?:images?|imgs?|captions?|annotations?|data|set)?(?:[_-]?\d{4})?",
    re.IGNORECASE,
)

# What `datasets` raises on missing or damaged files; pyarrow's errors are partly ValueError and OSError.
UNREADABLE = (datasets.exceptions.DatasetsError, pyarrow.ArrowException, ValueError, OSError, LookupError, TypeError)

# Where a row stands ("captions.csv: line 3"), for errors, and its values by column.
Row = tuple[str, dict[str, Any]]


class NoSplitError(ValueError):
    """The dataset has no split of this name."""


def split_of(path: str) -> str | None:
    """The split that a folder of a relative path, or its file's stem, is named after; `None` for none."""
    matches = map(SPLIT_NAME.fullmatch, posixpath.splitext(path)[0].split("/"))
    return next((match.lastgroup for match in matches if match), None)


def read_folder(folder: str, split: str) -> datasets.Dataset | None:
    """One split of a plain folder of captioned images; `None` where the folder holds shards or no image files.

    Args:
        folder: a local folder, searched with all folders below it.
        split: name of the split, slices such as `train[:100]` included.

    Returns:
        Rows of `image` (paths), `file_name` (relative to the folder) and the table's other columns, or `captions`; one
        row for each row of the table.

    Raises:
        ValueError: a file can't be read, there are images and no captions, or there is no such split; names it.
    """
    files = list(_walk(folder))
    images = _Files([name for name in files if name.lower().endswith(IMAGE_ENDINGS)])
    if not images.names or any(posixpath.splitext(name)[1].lower() in SHARD_ENDINGS for name in files):
        return None
    if "README.md" in files and re.search(r"^configs:", _read_text(folder, "README.md"), re.MULTILINE):
        return None
    sidecars = _find_sidecars(files, images)
    used = images.names.keys() | set(sidecars.values())
    rows, unused = _table_rows(folder, [name for name in files if name not in used], images)
    if not rows:
        rows = [
            (text, {"image": image, "captions": _read_text(folder, text), "split": images.split_of(image)})
            for image, text in sidecars.items()
        ]
    if not rows:
        raise ValueError(
            f"{folder}: expected captions for {len(images.names)} images: a text file of the same name beside each "
            f"image, or a table (CSV, TSV, JSON lines, JSON) with file names and captions; got {unused or 'neither'}"
        )
    others = (name.lower() for name in files if name not in used and not name.lower().endswith(TABLE_ENDINGS))
    if (endings := dict(Counter(posixpath.splitext(name)[1] for name in others))) or unused:
        logger.info("%s: left out: files by ending %s, files that name no image %s", folder, endings, unused)
    return _to_dataset(folder, rows + _uncaptioned(folder, rows, images), split)


def find_broken_shard(folder: str) -> str | None:
    """The first unreadable shard of a folder, or the first with another schema: `datasets` doesn't name the file."""
    kinds = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv", ".tar": "webdataset"}
    first = None
    for path in sorted(path for path in Path(folder).rglob("*") if path.suffix in kinds):
        kind = kinds[path.suffix]
        try:
            stream = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
            for _ in stream.with_format("arrow"):
                pass
        except (*UNREADABLE, StopIteration) as error:
            return f"{path}: not a whole {kind} file: {error.__cause__ or error}"
        first = first or stream.features
        for name in first or ():
            if stream.features and stream.features.get(name) != first[name]:
                return f"{path}: column {name!r}: expected {first[name]}, got {stream.features.get(name)}"
    return None


def _walk(folder: str) -> Iterator[str]:
    """Relative paths of all files but hidden ones; a folder that is linked several times is visited once."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"dataset_name: cannot read the folder {error.filename}: {error.strerror}")

    seen = set()
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(here, name), folder).replace(os.sep, "/")


def file_named(cell: Any) -> str:
    """The file name in a cell such as `images\\a.jpg` or Flickr8k's `a.jpg#0`."""
    return re.sub(r"#\d+$", "", str(cell).strip()).replace("\\", "/")


class _Files:
    """Finds the files that tables name: by path, by file name, by file name without its ending."""

    def __init__(self, names: list[str]):
        self.names = dict.fromkeys(names)
        self.splits: dict[str, str] = {}
        self.by_name, self.by_stem = defaultdict(list), defaultdict(list)
        for name in names:
            self.by_name[posixpath.basename(name)].append(name)
            self.by_stem[posixpath.splitext(posixpath.basename(name))[0]].append(name)

    def split_of(self, name: str) -> str | None:
        return self.splits.get(name) or split_of(posixpath.dirname(name) + "/")

    def find(self, cell: Any, base: str = "", split: str | None = None, by_stem: bool = True) -> str | None:
        """The file that a cell of a table in the folder `base` names; `None` for none, or for several."""
        if not isinstance(cell, (str, int)) or not (name := file_named(cell)):
            return None
        for path in (posixpath.normpath(posixpath.join(base, name)), posixpath.normpath(name)):
            if path in self.names or (os.path.isabs(path) and os.path.isfile(path)):
                return path
        name = posixpath.basename(name)
        found = self.by_name.get(name) or (self.by_stem.get(name, []) if by_stem else [])
        if len(found) > 1:
            found = [name for name in found if self.split_of(name) == split]
        return found[0] if len(found) == 1 else None


def _find_sidecars(files: list[str], images: _Files) -> dict[str, str]:
    """For each image its text file: beside it, or the only one of its name elsewhere."""
    by_ending = {stem + ending.lower(): stem + ending for stem, ending in map(posixpath.splitext, files)}
    texts = _Files([name for name in by_ending if name.endswith(SIDECAR_ENDINGS)])
    sidecars = {}
    for image in images.names:
        beside = [base + ending for base in (posixpath.splitext(image)[0], image) for ending in SIDECAR_ENDINGS]
        found = [name for name in beside if name in texts.names]
        found += filter(None, (texts.find(name, by_stem=False) for name in beside))
        if found:
            sidecars[image] = by_ending[found[0]]
    return sidecars


def _read_text(folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a text file in UTF-8: {error}") from None


# --- tables -----------------------------------------------------------------------------------------------------------


def _table_rows(folder: str, names: list[str], images: _Files) -> tuple[list[Row], list[str]]:
    """The rows of all tables that name images, as `_to_dataset` takes them, and the tables that name none."""
    # Flickr8k's folder holds its captions once more, lemmatised, and COCO's annotations also boxes and key points.
    tables = [name for name in names if name.lower().endswith(TABLE_ENDINGS) and not re.search(r"lemma[^/]*$", name)]
    captions = {posixpath.dirname(name) for name in tables if re.search(r"captions[^/]*\.json$", name)}
    tables = [
        name
        for name in tables
        if not name.endswith(".json") or "captions" in name or posixpath.dirname(name) not in captions
    ]
    rows, unused = [], []
    # Lists of a split's file names first: they assign the rows of other tables to splits.
    contents = sorted(((name, *_read_table(folder, name)) for name in tables), key=lambda content: bool(content[2]))
    for name, listed, read in contents:
        base, split = posixpath.dirname(name), split_of(name)
        found = [image for cell in listed if (image := images.find(cell, base, split))] if split else []
        images.splits.update(dict.fromkeys(found, split))
        if (column := _file_column(read, base, split, images)) is not None:
            rows += [_resolve(row, where, column, base, split, images) for where, row in read]
        elif not found:
            unused.append(name)
    return rows, unused


def _file_column(rows: list[Row], base: str, split: str | None, images: _Files) -> str | None:
    """The column that names files: by its name where there are several."""
    ranks = {name: place for place, name in enumerate(FILE_COLUMNS)}
    names = dict.fromkeys(name for _, row in rows for name in row)
    for by_stem in (False, True):
        for name in sorted(names, key=lambda name: ranks.get(name.lower(), len(ranks))):
            if any(images.find(row.get(name), base, split, by_stem) for _, row in rows):
                return name
    return None


class _Path(str):
    """A further image of a row."""


def _resolve(row: dict, where: str, column: str, base: str, split: str | None, images: _Files) -> Row:
    """A table's row with its `image` (a path, found or not), its `split`, and without the column of the file name."""
    if isinstance(own := row.get("split"), str) and own:
        split = split_of(own) or own
    image = images.find(row.get(column), base, split)
    resolved = {name: value for name, value in row.items() if name not in (column, "image", "file_name")}
    # As in an imagefolder of `datasets`: further images of the row.
    for name in [name for name in resolved if name.endswith("_file_name")]:
        other = resolved.pop(name)
        resolved[name.removesuffix("_file_name")] = _Path(images.find(other, base, split) or str(other))
    image = image or posixpath.join(base, file_named(row.get(column)))
    return where, {**resolved, "image": image, "split": split or images.split_of(image)}


def _read_table(folder: str, name: str) -> tuple[list[str], list[Row]]:
    """The cells of a table of one column, which may be a list of files, or else its rows."""
    text, path = _read_text(folder, name), os.path.join(folder, name)
    ending = posixpath.splitext(name)[1].lower()
    if ending == ".json":
        return [], [(f"{path}: entry {number}", row) for number, row in enumerate(_json_rows(_parse(text, path)))]
    if ending not in (".jsonl", ".ndjson"):
        return _delimited_rows(text, path, ending)
    lines = [(f"{path}: line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows = [(where, _parse(line, where)) for where, line in lines]
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
    if not rows:
        raise ValueError(f"{path}: no rows")
    return [], rows


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def _json_rows(content: Any) -> list[dict]:
    """The rows of a list of objects, itself or under any key (Karpathy's splits), of COCO's annotations, or of captions
    by file name."""
    if isinstance(content, list):
        return [row for row in content if isinstance(row, dict)]
    if not isinstance(content, dict):
        return []
    images, annotations = content.get("images"), content.get("annotations")
    if isinstance(images, list) and isinstance(annotations, list):
        names = {image.get("id"): image.get("file_name") for image in images}
        return [
            {"file_name": names.get(row.get("image_id")), "caption": row["caption"], "image_id": row.get("image_id")}
            for row in annotations
            if "caption" in row
        ]
    for value in content.values():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return _json_rows(value)
    return [
        {"file_name": name, "captions": [value] if isinstance(value, str) else value}
        for name, value in content.items()
        if isinstance(value, (str, list))
    ]


def _delimited_rows(text: str, path: str, ending: str) -> tuple[list[str], list[Row]]:
    first = text.partition("\n")[0]
    delimiter = min((mark for mark in "\t,;|" if mark in first), key=first.index, default=None)
    if delimiter is None:
        return text.split("\n"), []
    # Flickr8k's and Flickr30k's own files have no quoting: a caption may begin with a quotation mark.
    plain = delimiter == "|" or (delimiter == "\t" and ending == ".txt")
    quoting = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, skipinitialspace=True, strict=True)
    try:
        table = [(f"{path}: line {reader.line_num}", [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        if ending == ".txt":
            return [], []  # Prose, such as a licence.
        raise ValueError(f"{path}: line {reader.line_num}: {error}") from None
    header = table[0][1]
    files = [place for place, cell in enumerate(header) if file_named(cell).lower().endswith(IMAGE_ENDINGS)]
    if len(files) > 1:
        return [], []  # Flickr8k's judgements of pairs of images.
    if files:
        # No header. The caption is all that follows the file's name and numbers.
        caption = next((place for place in range(files[0] + 1, len(header)) if not header[place].isdigit()), 0)
        header = [f"column_{place}" for place in range(caption)] + ["caption"]
        header[files[0]] = "file_name"
    else:
        table = table[1:]
    last = len(header) - 1
    # The last column takes the rest of the line: a caption with unquoted commas.
    rows = [(where, [*cells[:last], f"{delimiter} ".join(cells[last:])]) for where, cells in table if any(cells)]
    return [], [(where, dict(zip(header, cells))) for where, cells in rows]


# --- rows to a dataset ------------------------------------------------------------------------------------------------


def _uncaptioned(folder: str, rows: list[Row], images: _Files) -> list[Row]:
    """Rows for images without captions in folders where others have some: decoding skips and counts them.

    Many of them mean that only a part of the folder was meant to be captioned: they are left out with a warning.
    """
    captioned = {row["image"] for _, row in rows}
    used = captioned | {value for _, row in rows for value in row.values() if isinstance(value, _Path)}
    left = [image for image in images.names if image not in used]
    folders = {posixpath.dirname(image) for image in captioned}
    beside = [image for image in left if posixpath.dirname(image) in folders]
    if left:
        shown = ", ".join((beside or left)[:5]) + ", ..." * (len(left) > 5)
        logger.warning("%s: %d images have no captions: %s", folder, len(left), shown)
    if 10 * len(beside) > len(rows):
        return []
    return [(image, {"image": image, "split": images.split_of(image)}) for image in beside]


def _to_dataset(folder: str, rows: list[Row], split: str) -> datasets.Dataset:
    splits = defaultdict(list)
    for where, row in rows:
        splits[row.pop("split", None) or "train"].append((where, row))
    lengths = {name: len(entries) for name, entries in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        raise NoSplitError(f"dataset {folder}: no split {split!r}: {error}") from None
    rows = [row for part in parts for row in splits[part.splitname][part.from_ : part.to]]
    names = dict.fromkeys(["image", "file_name", *(name for _, row in rows for name in row)])
    table = [{**dict.fromkeys(names), **row, "file_name": row["image"]} for _, row in rows]
    features = {}
    for name in names:
        values = [row[name] for row in table]
        if name == "image" or any(isinstance(value, _Path) for value in values):
            features[name] = datasets.Image()
            for row in table:
                row[name] = None if row[name] is None else os.path.join(folder, row[name])
        else:
            schema = pyarrow.schema({name: _type_of(name, values, [where for where, _ in rows])})
            features.update(datasets.Features.from_arrow_schema(schema))
    return datasets.Dataset.from_generator(
        _Rows(table), features=datasets.Features(features), split=datasets.NamedSplit(re.split(r"[\[+]", split)[0])
    )


class _Rows:
    """Generates rows for `datasets`, which keys its cache by the pickle: a hash here, since rows pickle slowly."""

    def __init__(self, rows: list[dict]):
        self.rows = rows
        # A replaced file of the same name is another image.
        stamps = [_stamp(path) for path in dict.fromkeys(row["image"] for row in rows)]
        self.digest = hashlib.blake2b(json.dumps([rows, stamps]).encode(), digest_size=16).hexdigest()

    def __reduce__(self):
        return _Rows, (self.digest,)

    def __call__(self) -> Iterator[dict]:
        return iter(self.rows)


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        return os.stat(path).st_size, os.stat(path).st_mtime_ns
    except OSError:
        return None


def _type_of(name: str, values: list, wheres: list[str]) -> pyarrow.DataType:
    """The type of a column's values; where types differ, an error that names the first row that does."""
    mixed = (pyarrow.ArrowException, UnicodeEncodeError, ValueError, TypeError, OverflowError)

    def differ(number: int) -> bool:
        try:
            return pyarrow.array(values[:number]) is None
        except mixed:
            return True

    try:
        return pyarrow.array(values).type
    except mixed as error:
        row = bisect.bisect_left(range(1, len(values)), True, key=differ)
        kind = _kind_of(values[row])
        raise ValueError(
            f"{wheres[row]}, column {name!r}: expected a value like those before, got {kind}: {error}"
        ) from None


def _kind_of(value: Any) -> str:
    if isinstance(value, list):
        return f"list of {' and '.join(sorted(set(map(_kind_of, value))))}"
    return {int: "number", float: "number", str: "string", dict: "object"}.get(type(value), type(value).__name__)
