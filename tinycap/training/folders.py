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
import yaml
from huggingface_hub import DatasetCard

from tinycap.processing_tinycap import IMAGE_ENDINGS


logger = logging.getLogger(__name__)

# Read by `datasets` itself.
SHARD_ENDINGS = (".parquet", ".arrow", ".tar", ".tgz")
TABLE_ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt")
SIDECAR_ENDINGS = (".txt", ".caption")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_name", "image_path", "path", "filepath")
# As in an imagefolder of `datasets`: `mask_file_name` names a further image, `mask`.
MORE_IMAGES = "_file_name"

SPLIT_NAME = re.compile(
    r"(?:.*[^a-z])?(?:(?P<train>train|training|restval)|(?P<validation>val|valid|validation|dev)"
    r"|(?P<test>test|testing|eval|evaluation))[_-]?(?:images?|imgs?|captions?|annotations?|data|set)?(?:[_-]?\d{4})?",
    re.IGNORECASE,
)

# What `datasets` raises on missing or damaged files; pyarrow's errors are partly ValueError and OSError.
UNREADABLE = (datasets.exceptions.DatasetsError, pyarrow.ArrowException, ValueError, OSError, LookupError, TypeError)

# Where a row stands ("captions.csv: line 3"), for errors, and its values by column: `image` is relative to the folder,
# `split` is the table's, if it has one.
Row = tuple[str, dict[str, Any]]


class NoSplitError(ValueError):
    """The dataset has no split of this name."""


def split_of(path: str) -> str | None:
    """The split that a folder of a relative path, or its file's stem, is named after; `None` for none."""
    matches = map(SPLIT_NAME.fullmatch, posixpath.splitext(path)[0].split("/"))
    return next((match.lastgroup for match in matches if match), None)


def read_folder(
    folder: str, split: str, config: str | None = None, allow_remote: bool = False, all_images: bool = False
) -> datasets.Dataset | None:
    """One split (slices included) of a plain folder of captioned images; `None` where it holds shards or no images, or
    for a configuration. `all_images`: images without captions are rows too, however many there are.

    Returns:
        Rows of `image` (paths), `file_name` (relative to the folder) and the table's other columns, or `captions`; one
        row for each row of the table.

    Raises:
        ValueError: a file can't be read or is elsewhere, there are images and no captions, or no such split; names it.
    """
    for card in () if allow_remote else ("README.md", ".huggingface.yaml"):
        _check_data_files(folder, card)
    if config is not None:
        return None
    files = list(_walk(folder))
    images = _Files([name for name in files if name.lower().endswith(IMAGE_ENDINGS)], folder)
    if not images.names or any(name.lower().endswith(SHARD_ENDINGS) for name in files):
        return None
    if "README.md" in files and re.search(r"^configs:", _read_text(folder, "README.md"), re.MULTILINE):
        return None
    texts = _Files([name for name in files if name.lower().endswith(SIDECAR_ENDINGS)])
    sidecars = {}
    for image in images.names:
        own = images.split_of(image)
        if text := texts.find(posixpath.splitext(image)[0], split=own) or texts.find(image, split=own):
            sidecars[image] = text
    used = {*images.names, *sidecars.values()}
    others = [name for name in files if name not in used]
    rows, unused = _read_tables(folder, others, images)
    if not rows:
        texts = ((image, text, _read_text(folder, text)) for image, text in sidecars.items())
        rows = [(text, {"image": image, "captions": captions}) for image, text, captions in texts]
    if not rows and not all_images:
        raise ValueError(
            f"{folder}: expected captions for {len(images.names)} images: a text file of the same name beside each "
            f"image, or a table (CSV, TSV, JSON lines, JSON) with file names and captions; got {unused or 'neither'}"
        )
    endings = Counter(posixpath.splitext(name)[1] for name in others if not name.lower().endswith(TABLE_ENDINGS))
    if endings or unused:
        logger.info("%s: left out: files by ending %s, files that name no image %s", folder, dict(endings), unused)
    rows += _uncaptioned(folder, rows, images, all_images)
    splits = defaultdict(list)
    for where, row in rows:
        splits[row.pop("split", None) or images.split_of(row["image"]) or "train"].append((where, row))
    return _to_dataset(folder, splits, split)


def read_shards(name: str, split: str, config: str | None = None, streaming: bool = False, allow_remote: bool = False):
    """One split of a dataset on the Hub or in a folder of shards, by `datasets`.

    Raises:
        ValueError: its card names data files elsewhere, unless `allow_remote`.
    """
    builder = datasets.load_dataset_builder(name, config)
    # Of a data set's present name, and of a bucket. `datasets` before 5.1 reads any file.
    own = (f"hf://datasets/{builder.repo_id or name}@", f"hf://{name}/")
    files = [str(path) for paths in (builder.config.data_files or {}).values() for path in paths]
    elsewhere = [path for path in files if not path.split("::")[-1].startswith(own)]
    if elsewhere and not (os.path.isdir(name) or allow_remote):
        expected = "data files in its own repository (see --allow_remote_images)"
        raise ValueError(f"the card of {name}: expected {expected}, got {elsewhere[0][:300]}")
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _check_data_files(folder: str, card: str) -> None:
    """Refuses a folder whose card lets `datasets` read URLs or files outside the folder."""
    if not os.path.isfile(path := os.path.join(folder, card)):
        return
    text = _read_text(folder, card)
    if card == "README.md" and not text.lstrip().startswith("---"):
        return
    try:
        # As `datasets` reads them.
        content = DatasetCard(text).data.to_dict() if card == "README.md" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"{path}: not a card: {error}") from None
    waiting, seen = [content.get("configs")] if isinstance(content, dict) else [], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list)) and id(value) not in seen:
            # Aliases may repeat the same part without end.
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and (
            os.path.isabs(value) or "://" in value or "::" in value or ".." in re.split(r"[/\\]", value)
        ):
            expected = "data files below this folder (see --allow_remote_images)"
            raise ValueError(f"{path}: expected {expected}, got {value[:300]}")


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


def _file_named(cell: Any) -> str:
    """The file name in a cell such as `images\\a.jpg` or Flickr8k's `a.jpg#0`."""
    return re.sub(r"#\d+$", "", str(cell).strip()).replace("\\", "/") if isinstance(cell, (str, int)) else ""


class _Files:
    """Finds the files that tables name: by path, by file name, by file name without its ending."""

    def __init__(self, names: list[str], folder: str = ""):
        self.names, self.root = dict.fromkeys(names), os.path.abspath(folder).replace(os.sep, "/") + "/"
        self.splits: dict[str, str] = {}
        self.by_name, self.by_stem = defaultdict(list), defaultdict(list)
        for name in names:
            self.by_name[posixpath.basename(name)].append(name)
            self.by_stem[posixpath.splitext(posixpath.basename(name))[0]].append(name)

    def split_of(self, name: str) -> str | None:
        return self.splits.get(name) or split_of(posixpath.dirname(name) + "/")

    def find(self, name: str, base: str = "", split: str | None = None, by_stem: bool = True) -> str | None:
        """The file that a table in the folder `base` names: by its path, or the only one of its name, or of those the
        one beside the table or in its split; `None` for none."""
        if not name:
            return None
        for path in (posixpath.normpath(posixpath.join(base, name)), posixpath.normpath(name)):
            if (path := path.removeprefix(self.root)) in self.names:
                return path
        here, name = posixpath.split(posixpath.join(base, name))
        found = self.by_name.get(name) or (by_stem and self.by_stem.get(name)) or []
        if len(found) > 1:
            beside = [path for path in found if posixpath.dirname(path) == here][:1]
            found = beside or [path for path in found if self.split_of(path) == split]
        # Elsewhere: `Columns.image_of` decides whether it is opened.
        is_elsewhere = os.path.isabs(path) and path.lower().endswith(IMAGE_ENDINGS)
        return found[0] if len(found) == 1 else path if is_elsewhere else None


def _printable(name: str) -> str:
    """A file name as Arrow can store it; one that isn't UTF-8 then names no file, and its row is skipped."""
    return name.encode("utf-8", "backslashreplace").decode()


def _read_text(folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    try:
        if not os.path.isfile(path):
            raise OSError("not a regular file")
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a text file in UTF-8: {error}") from None


def _read_tables(folder: str, names: list[str], images: _Files) -> tuple[list[Row], list[str]]:
    """The rows of all tables that name images, and the tables that name none."""
    captions = {posixpath.dirname(name) for name in names if re.search(r"captions[^/]*\.json$", name)}
    rows, unused = [], []
    for name in names:
        base, split = posixpath.dirname(name), split_of(name)
        # Beside its captions, COCO keeps boxes and key points (470 MB), and Flickr8k the captions' lemmas.
        is_other = name.endswith(".json") and "captions" not in name and base in captions
        if is_other or not name.lower().endswith(TABLE_ENDINGS) or "lemma" in posixpath.basename(name):
            continue
        read = _read_table(folder, name)
        if (column := _file_column(read, base, split, images)) is None:
            unused.append(name)
        else:
            rows += [_resolve(row, where, column, base, split, images) for where, row in read]
    # Rows of nothing but a file are of a split's list, which assigns the rows of other tables to it.
    lists = (row for _, row in rows if row.keys() == {"image", "split"})
    images.splits = {row["image"]: row["split"] for row in lists}
    return [(where, row) for where, row in rows if len(row) > 2], unused


def _file_column(rows: list[Row], base: str, split: str | None, images: _Files) -> str | None:
    """The column that names files: by its name where there are several."""
    ranks = {name: place for place, name in enumerate(FILE_COLUMNS)}
    names = dict.fromkeys(name for _, row in rows for name in row)
    for by_stem in (False, True):
        for name in sorted(names, key=lambda name: ranks.get(name.lower(), len(ranks))):
            if any(images.find(_file_named(row.get(name)), base, split, by_stem) for _, row in rows):
                return name
    return None


def _resolve(row: dict, where: str, column: str, base: str, split: str | None, images: _Files) -> Row:
    """A table's row with its `image` (a path, found or not), its `split`, and without the column of the file name."""
    if isinstance(own := row.get("split"), str) and own:
        split = split_of(own) or own
    values = {name: value for name, value in row.items() if name not in (column, "image", "file_name")}
    for name in values:
        if name.endswith(MORE_IMAGES):
            values[name] = images.find(_file_named(values[name]), base, split) or str(values[name])
    name = _file_named(row.get(column))
    image = images.find(name, base, split) or posixpath.join(base, name)
    return where, {**values, "image": image, "split": split}


def _read_table(folder: str, name: str) -> list[Row]:
    text, path, ending = _read_text(folder, name), os.path.join(folder, name), posixpath.splitext(name)[1].lower()
    if ending not in (".json", ".jsonl", ".ndjson"):
        return _delimited_rows(text, path, ending)
    where, rows = path, []
    try:
        if ending == ".json":
            return [(f"{path}: entry {number}", row) for number, row in enumerate(_json_rows(json.loads(text)))]
        for number, line in enumerate(text.split("\n"), start=1):
            where = f"{path}: line {number}"
            if line.strip():
                rows.append((where, json.loads(line)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def _json_rows(content: Any) -> list[dict]:
    """The rows of a list of objects, itself or under any key (Karpathy's splits), of COCO's annotations, or of captions
    by file name."""
    if not isinstance(content, dict):
        return _objects(content)
    images, annotations = _objects(content.get("images")), _objects(content.get("annotations"))
    if images and annotations:
        names = {image.get("id"): image.get("file_name") for image in images}
        return [{**row, "file_name": names.get(row.get("image_id"))} for row in annotations if "caption" in row]
    captions = {name: [value] if isinstance(value, str) else value for name, value in content.items()}
    by_name = [{"file_name": name, "captions": value} for name, value in captions.items() if isinstance(value, list)]
    return next(filter(None, map(_objects, content.values())), by_name)


def _objects(values: Any) -> list[dict]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _delimited_rows(text: str, path: str, ending: str) -> list[Row]:
    first = text.partition("\n")[0]
    delimiter = min((mark for mark in "\t,;|" if mark in first), key=first.index, default=None)
    if delimiter is None:
        return [(path, {"file_name": line}) for line in text.split("\n")]
    # Flickr8k's and Flickr30k's own files have no quoting: a caption may begin with a quotation mark.
    plain = delimiter == "|" or (delimiter == "\t" and ending == ".txt")
    quoting = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, skipinitialspace=True, strict=True)
    try:
        table = [(f"{path}: line {reader.line_num}", [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        if ending == ".txt":
            return []  # Prose, such as a licence.
        raise ValueError(f"{path}: line {reader.line_num}: {error}") from None
    header = table[0][1]
    files = [place for place, cell in enumerate(header) if _file_named(cell).lower().endswith(IMAGE_ENDINGS)]
    if len(files) > 1:
        return []  # Flickr8k's judgements of pairs of images.
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
    return [(where, dict(zip(header, cells))) for where, cells in rows]


def _uncaptioned(folder: str, rows: list[Row], images: _Files, all_images: bool = False) -> list[Row]:
    """Rows for images without captions in folders where others have some: decoding skips and counts them.

    More than a tenth: only a part of the folder was meant to be captioned. They are left out with a warning, unless
    `all_images` are wanted, of all folders.
    """
    used = {value for _, row in rows for value in row.values() if isinstance(value, str)}
    left = [image for image in images.names if image not in used]
    if all_images:
        return [(image, {"image": image}) for image in left]
    folders = {posixpath.dirname(row["image"]) for _, row in rows}
    beside = [image for image in left if posixpath.dirname(image) in folders]
    if left:
        shown = ", ".join(map(_printable, (beside or left)[:5])) + ", ..." * (len(left) > 5)
        logger.warning("%s: %d images have no captions: %s", folder, len(left), shown)
    if 10 * len(beside) > len(rows):
        return []
    return [(image, {"image": image}) for image in beside]


def _to_dataset(folder: str, splits: dict[str, list[Row]], split: str) -> datasets.Dataset:
    lengths = {name: len(entries) for name, entries in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        raise NoSplitError(f"dataset {folder}: no split {split!r}: {error}") from None
    rows = [row for part in parts for row in splits[part.splitname][part.from_ : part.to]]
    columns, features = {}, datasets.Features()
    for name in dict.fromkeys(["image", "file_name", *(name for _, row in rows for name in row)]):
        values = [_printable(row["image"]) if name == "file_name" else row.get(name) for _, row in rows]
        if name == "image" or name.endswith(MORE_IMAGES):
            name = name.removesuffix(MORE_IMAGES)
            values = [None if value is None else os.path.join(folder, _printable(value)) for value in values]
            features[name] = datasets.Image()
        else:
            schema = pyarrow.schema({name: _type_of(name, values, [where for where, _ in rows])})
            features.update(datasets.Features.from_arrow_schema(schema))
        columns[name] = values
    # A replaced file of the same name is another image.
    found = [path for path in dict.fromkeys(columns["image"]) if Path(path).is_relative_to(folder)]
    found = filter(os.path.isfile, found)
    stamps = {path: (os.path.getsize(path), os.path.getmtime(path)) for path in found}
    # As text, of which `datasets` makes its cache's key: lists pickle slowly.
    content = {"columns": json.dumps(columns), "stamps": json.dumps(stamps)}
    name = datasets.NamedSplit(re.split(r"[\[+]", split)[0])
    return datasets.Dataset.from_generator(_each_row, features=features, gen_kwargs=content, split=name)


def _each_row(columns: str, stamps: str) -> Iterator[dict]:
    columns = json.loads(columns)
    for values in zip(*columns.values()):
        yield dict(zip(columns, values))


def _type_of(name: str, values: list, wheres: list[str]) -> pyarrow.DataType:
    """The type of a column's values; where types differ, an error that names the first row that does."""

    def infer(number: int) -> pyarrow.DataType | Exception:
        try:
            return pyarrow.array(values[:number]).type
        except (pyarrow.ArrowException, UnicodeEncodeError, ValueError, TypeError, OverflowError) as error:
            return error

    if not isinstance(found := infer(len(values)), Exception):
        return found
    row = bisect.bisect_left(range(1, len(values)), True, key=lambda number: isinstance(infer(number), Exception))
    kind = type(values[row])
    kind = {int: "number", float: "number", str: "string", dict: "object"}.get(kind, kind.__name__)
    raise ValueError(f"{wheres[row]}, column {name!r}: expected a value like those before, got {kind}: {found}")
