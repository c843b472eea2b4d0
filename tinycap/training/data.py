"""Captioned photos: from a dataset on disk or on the Hub to batches of tensors.

Reading order: which columns, which rows are bad, decoding (once, into a cache that `datasets` keys), one sample with
its seeded augmentation, one batch. A photo is encoded once for all its captions of a step, so a batch holds B photos
and B x K captions. Everything random follows from (seed, epoch, row), never from a worker's state.
"""

import ast
import copy
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import tokenize
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import datasets
import pyarrow
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from tinycap.processing_tinycap import load_image
from tinycap.training.folders import NoSplitError, read_folder
from tinycap.training.tokenizer import encode_captions


logger = logging.getLogger(__name__)

CAPTION_COLUMNS = (
    *("captions", "caption", "text", "sentences", "txt"),
    *("sentence", "raw", "comment", "description", "alt_text"),
)
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "photo")
ID_COLUMNS = ("image_id", "id", "filename", "file_name", "__key__")
# Where the objects of a list such as COCO's [{"raw": ...}] hold their text.
TEXT_KEYS = ("raw", "caption", "text", "sentence")
# Number of a row in the table that it was read from, or of the first of its image's rows.
ROW_COLUMN = "__row__"
# Share of the training images that are held out where a data set has no validation split.
HELD_OUT = 0.05

# Part of the key of every decoded cache: raise it when `decode_row` changes what it stores.
DECODE_VERSION = 3

# What `datasets` and what it is built on raise on files that aren't what they should be, or that aren't there. The
# errors of pyarrow are among ValueError, OSError and its own.
UNREADABLE = (datasets.exceptions.DatasetsError, pyarrow.ArrowException, ValueError, OSError, LookupError, TypeError)


# --- which dataset, which columns -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold the image, its caption or captions, and its id (None: file name or row number).

    `more_captions` are further columns of captions, such as caption_1 to caption_4 beside caption_0.
    """

    image: str
    caption: str
    image_id: str | None = None
    more_captions: tuple[str, ...] = ()

    @property
    def captions(self) -> list[str]:
        return [self.caption, *self.more_captions]

    def captions_of(self, row: dict) -> list[str]:
        """The row's usable captions; a `ValueError` where there are none (see `clean_captions`)."""
        return clean_captions([row[name] for name in self.captions] if self.more_captions else row[self.caption])

    def id_of(self, row: dict, number: int | str) -> str | int:
        """The row's id: that of its id column, else its file's name, else `number`."""
        if self.image_id and row[self.image_id] is not None:
            return row[self.image_id]
        path = path_of(row[self.image])
        return number if path is None else os.path.basename(path) if os.path.isabs(path) else path


def path_of(image: dict | str | bytes | None) -> str | None:
    """The path of an image that has not been decoded; `None` where it has none."""
    path = image.get("path") if isinstance(image, dict) else image
    return path if isinstance(path, str) and 0 < len(path) < 4096 and not path.startswith("data:") else None


def load_split(
    dataset_name: str, split: str, dataset_config_name: str | None = None, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Loads one split of a Hub dataset, a local folder of parquet or WebDataset shards, or an `imagefolder`.

    Args:
        dataset_name: Hub id or local folder.
        split: name of the split, slices such as `train[:100]` included.
        dataset_config_name: configuration of the dataset, where it has several.
        streaming: read the shards as they come, instead of a memory-mapped copy.

    Raises:
        NoSplitError: there is no such split; names what there is.
        ValueError: the folder does not exist or can't be read; names file, row and column where these can be found.
    """
    if not os.path.isdir(dataset_name) and (os.path.isabs(dataset_name) or dataset_name.startswith(".")):
        raise ValueError(f"dataset_name: no such folder: {dataset_name}")
    if os.path.isdir(dataset_name) and dataset_config_name is None:
        rows = read_folder(dataset_name, split)
        if rows is not None:
            return rows.to_iterable_dataset(num_shards=min(64, len(rows))) if streaming else rows
    try:
        return datasets.load_dataset(dataset_name, dataset_config_name, split=split, streaming=streaming)
    except UNREADABLE as error:
        # How the two modes of `datasets` say the same.
        if re.search("(Unknown|Bad) split", str(error)):
            raise NoSplitError(f"dataset {dataset_name}: no split {split!r}: {error}") from error
        reason = _broken_shard(dataset_name) or error.__cause__ or error
        raise ValueError(f"dataset {dataset_name}, split {split}: cannot be read: {reason}") from error


def _broken_shard(folder: str) -> str | None:
    """The first shard of a folder that can't be read or has other columns, which libraries say without its name."""
    kinds = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv", ".tar": "webdataset"}
    first = None
    for path in sorted(Path(folder).rglob("*")) if os.path.isdir(folder) else ():
        if (kind := kinds.get(path.suffix)) is None:
            continue
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


def load_splits(
    dataset_name: str,
    dataset_config_name: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    streaming: bool = False,
    seed: int = 0,
    image_column: str | None = None,
    caption_column: str | None = None,
    num_proc: int | None = None,
) -> tuple[datasets.Dataset | datasets.IterableDataset, datasets.Dataset]:
    """The training and the validation split, one row an image, cut to the numbers of images that were asked for.

    Args:
        validation_split: `None` for "validation" if there is one, else for 5 % of the training images, drawn by `seed`.
        streaming: the training split comes as a stream, whose rows stay as they are; of the validation split,
            `max_eval_samples` rows (1,000 when not given) are kept, since scores need the same images each time.
        image_column, caption_column: see `resolve_columns`.
        num_proc: processes to look for rows of the same image with.
        Others: see `load_split`.

    Raises:
        ValueError: a split or column isn't there, a stream has none to validate on, or there are too few images to hold
            some out.
    """
    train = load_split(dataset_name, train_split, dataset_config_name, streaming)
    columns = resolve_columns(train, image_column, caption_column)
    try:
        validation = load_split(dataset_name, validation_split or "validation", dataset_config_name, streaming)
    except NoSplitError:
        if validation_split is not None:
            raise
        if streaming:
            raise ValueError(
                f"dataset {dataset_name}: expected a split to validate on; name it by --validation_split"
            ) from None
        train, validation = hold_out(merge_rows(train, columns, num_proc), columns, seed)
        logger.info(
            "dataset %s has no validation split: %d of its %d training images are held out, drawn by seed %d",
            *(dataset_name, len(validation), len(train) + len(validation), seed),
        )
    else:
        if streaming:
            logger.warning("dataset %s: a stream's rows are not merged: each row is taken for an image", dataset_name)
            rows = list(validation.take(max_eval_samples or 1000))
            validation = datasets.Dataset.from_list(rows, features=validation.features)
            train = train.take(max_train_samples) if max_train_samples else train
        else:
            train = merge_rows(train, columns, num_proc)
        validation = merge_rows(validation, columns, num_proc)
    if not streaming:
        train = train.select(range(min(len(train), max_train_samples or len(train))))
    return train, validation.select(range(min(len(validation), max_eval_samples or len(validation))))


def load_images(
    dataset_name: str,
    split: str,
    dataset_config_name: str | None = None,
    seed: int = 0,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> tuple[datasets.Dataset, Columns]:
    """One split with one row an image, and its columns.

    "validation" of a data set without such a split is what `load_splits` holds out of "train" by the same seed.
    """
    try:
        rows = load_split(dataset_name, split, dataset_config_name)
    except NoSplitError:
        if split != "validation":
            raise
        options = {"seed": seed, "image_column": image_column, "caption_column": caption_column}
        _, rows = load_splits(dataset_name, dataset_config_name, **options)
        return rows, resolve_columns(rows, image_column, caption_column)
    rows = merge_rows(rows, resolve_columns(rows, image_column, caption_column))
    return rows, resolve_columns(rows, image_column, caption_column)


# --- one row an image -------------------------------------------------------------------------------------------------


def undecoded(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """The rows with images as bytes or paths, so that a bad one is a bad row and not the end."""
    is_image = isinstance(rows.features[column], datasets.Image)
    return rows.cast_column(column, datasets.Image(decode=False)) if is_image else rows


def image_key(row: dict, number: int, column: str) -> dict[str, str]:
    """The same `key` for rows of the same image: a hash of its file's bytes, else its path, else the row's number."""
    image, path = row[column], path_of(row[column])
    content = image.get("bytes") if isinstance(image, dict) else None if isinstance(image, str) else image
    if content is None and path is not None and os.path.isfile(path):
        content = Path(path).read_bytes()
    return {"key": hashlib.blake2b(content, digest_size=16).hexdigest() if content else path or f"row {number}"}


def merge_rows(rows: datasets.Dataset, columns: Columns, num_proc: int | None = None) -> datasets.Dataset:
    """One row an image: the first of its rows, with the captions of all of them (equal ones once) in a list.

    Rows are of the same image where their files hold the same bytes. Nothing is decoded, and `datasets` caches the
    hashes. `ROW_COLUMN` keeps the number of each row in `rows`.
    """
    files = undecoded(rows, columns.image)
    keys = files.select_columns([columns.image]).map(
        image_key,
        with_indices=True,
        fn_kwargs={"column": columns.image},
        remove_columns=columns.image,
        num_proc=num_proc,
        desc="Looking for rows of the same image",
    )["key"][:]
    groups: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    if len(groups) == len(rows):
        return rows if ROW_COLUMN in rows.column_names else rows.add_column(ROW_COLUMN, list(range(len(rows))))
    logger.info("%d rows are of %d images: their captions are merged", len(rows), len(groups))
    table = rows.select_columns(columns.captions).to_list()
    captions = [_clean(value for number in group for value in table[number].values()) for group in groups.values()]
    features = {name: kind for name, kind in files.features.items() if name not in columns.more_captions}
    features.update({columns.caption: datasets.List(datasets.Value("string")), ROW_COLUMN: datasets.Value("int64")})
    first = [group[0] for group in groups.values()]
    merged = files.select(first).map(
        _merged_row,
        with_indices=True,
        fn_kwargs={
            "column": columns.caption,
            "captions": [list(dict.fromkeys(texts)) for texts in captions],
            "rows": first,
        },
        remove_columns=list(columns.more_captions),
        features=datasets.Features(features),
        # Images of some megabytes are held in memory before they are written.
        writer_batch_size=100,
        num_proc=num_proc,
        desc="Merging captions",
    )
    return merged.cast_column(columns.image, rows.features[columns.image])


def _merged_row(row: dict, number: int, column: str, captions: list[list[str]], rows: list[int]) -> dict:
    return {column: captions[number], ROW_COLUMN: rows[number]}


def hold_out(rows: datasets.Dataset, columns: Columns, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The images to train on and those held out (`HELD_OUT` of them), drawn by `seed`; each in the rows' order.

    Args:
        rows: from `merge_rows`. Rows that share an id, such as two encodings of an image, stay together.

    Raises:
        ValueError: there are fewer than two images.
    """
    ids = list(range(len(rows)))
    if columns.image_id:
        named = rows[columns.image_id][:]
        ids = [f"id {name}" if name is not None else number for number, name in enumerate(named)]
        if len(set(ids)) < 2:
            ids = list(range(len(rows)))
    unique = list(dict.fromkeys(ids))
    if len(unique) < 2:
        raise ValueError(f"expected at least 2 images, one of them to be held out for validation, got {len(unique)}")
    drawn = set(random.Random(seed).sample(unique, math.ceil(HELD_OUT * len(unique))))
    kept, held_out = ([row for row, name in enumerate(ids) if (name in drawn) == out] for out in (False, True))
    return rows.select(kept), rows.select(held_out)


def uncaptioned(rows: datasets.Dataset, columns: Columns) -> dict[int, str]:
    """The rows without a usable caption, by number, and why."""
    bad = {}
    for number, row in enumerate(rows.select_columns(columns.captions)):
        try:
            columns.captions_of(row)
        except ValueError as error:
            bad[number] = f"column {columns.caption!r}: {error}"
    if bad:
        logger.warning("%d rows have no caption and are left out", len(bad))
    return bad


def image_ids(rows: datasets.Dataset, columns: Columns) -> list[str | int]:
    """The id of every row: see `Columns.id_of`."""
    wanted = [name for name in (columns.image, columns.image_id, ROW_COLUMN) if name in rows.column_names]
    bare = undecoded(rows.select_columns(wanted), columns.image)
    return [columns.id_of(row, row.get(ROW_COLUMN, number)) for number, row in enumerate(bare)]


# --- columns ----------------------------------------------------------------------------------------------------------


def resolve_columns(
    dataset: datasets.Dataset | datasets.IterableDataset,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Columns:
    """Finds the image, caption and id columns, by the given names or by the usual ones.

    Where several could be meant, those with the usual names come first, and a warning says what was taken.

    Raises:
        ValueError: a named column isn't there, none of the usual names is, the caption column holds no text, or the
            image column neither images nor bytes nor paths.
    """
    names = list(dataset.column_names or next(iter(dataset)).keys())
    features = dataset.features or {}

    def named(wanted: tuple[str, ...], pattern: str = "") -> list[str]:
        return [
            name for base in wanted for name in names if re.fullmatch(re.escape(base) + pattern, name, re.IGNORECASE)
        ]

    def pick(flag: str, given: str | None, found: list[str], usual: tuple[str, ...]) -> str:
        if given is not None:
            found, usual = [name for name in names if name == given], (given,)
        if not found:
            raise ValueError(f"{flag}: expected a column named {' or '.join(usual)}, got columns {names}")
        if len(found) > 1:
            logger.warning("%s: took %r of the columns %s", flag, found[0], found)
        return found[0]

    numbered = sorted(named(CAPTION_COLUMNS, r"[ _-]?\d+"), key=lambda name: int(re.search(r"\d+$", name).group()))
    caption = pick("caption_column", caption_column, named(CAPTION_COLUMNS) or numbered[:1], CAPTION_COLUMNS)
    more = []
    if caption_column is None:
        stem = re.sub(r"[ _-]?\d+$", "", caption)
        more = [name for name in named((stem,), r"[ _-]?\d+") if name != caption]
    for name in (caption, *more):
        if name in features and not _holds_text(features[name]):
            kind = features[name]
            raise ValueError(f"caption_column: expected strings or lists of strings in {name!r}, got {kind}")
    files = [name for name in named(IMAGE_COLUMNS) if name != caption]
    images = [name for name in files if _holds_files(features.get(name))]
    images += [name for name in names if isinstance(features.get(name), datasets.Image) and name not in images]
    image = pick("image_column", image_column, images or files, IMAGE_COLUMNS)
    kind = features.get(image)
    is_path = isinstance(kind, datasets.Value) and "string" in kind.dtype
    if kind is not None and not (is_path or _holds_files(kind)):
        raise ValueError(f"image_column: expected images, bytes of image files or paths in {image!r}, got {kind}")
    return Columns(
        image=image,
        caption=caption,
        image_id=next((name for name in ID_COLUMNS if name in names and name not in (caption, image)), None),
        more_captions=tuple(sorted(more, key=lambda name: int(re.search(r"\d+$", name).group()))),
    )


def _holds_files(kind: object) -> bool:
    """Whether a feature is of images or of the bytes of image files."""
    is_struct = isinstance(kind, dict) and bool({"bytes", "path"} & set(kind))
    return (
        is_struct or isinstance(kind, datasets.Image) or (isinstance(kind, datasets.Value) and "binary" in kind.dtype)
    )


def _holds_text(kind: object, is_list: bool = False) -> bool:
    """Whether a feature is of strings, of lists of them, or of lists of objects with a text each."""
    if isinstance(kind, datasets.Value):
        return "string" in kind.dtype
    if isinstance(kind, dict):
        inner = next((kind[key] for key in TEXT_KEYS if key in kind), None)
        return _holds_text(inner) and (is_list or not isinstance(inner, datasets.Value))
    return hasattr(kind, "feature") and _holds_text(kind.feature, is_list=True)


# Control characters steer terminals and lone surrogates can't be written down; neither says anything of a picture.
UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


def clean_captions(value: str | list | dict | None) -> list[str]:
    """The usable captions of one row: control characters and whitespace folded, no space before closing punctuation,
    left out where nothing visible remains.

    Args:
        value: one caption, several with a line each, a list of captions, such a list written as text (JSON, Python's or
            NumPy's), or a list of objects such as COCO's `{"raw": ...}`.

    Raises:
        ValueError: not one usable caption is left; says what came.
    """
    captions = _clean([value])
    if not captions:
        raise ValueError(f"expected a caption or a list of captions, got {str(value)[:80]!r} ({type(value).__name__})")
    return captions


def _clean(values) -> list[str]:
    captions = [
        re.sub(r"\s+([.,;:!?])", r"\1", " ".join(UNWRITABLE.sub(" ", text).split()))
        for value in values
        for text in _texts(value)
    ]
    # Zero-width spaces and direction marks alone are no caption.
    return [text for text in captions if any(unicodedata.category(letter)[0] not in "CZ" for letter in text)]


def _texts(value) -> Iterator[str]:
    if isinstance(value, str):
        listed = _listed(value)
        yield from re.split(r"[\r\n]+", value) if listed is None else filter(None, listed)
    elif isinstance(value, dict):
        yield from _texts(next((value[key] for key in TEXT_KEYS if key in value), None))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _texts(entry)


def _listed(text: str) -> list | None:
    """The strings (or JSON's objects) of a list that was written as text; `None` where the text is none."""
    text = text.strip()
    if (text[:1], text[-1:]) not in (("[", "]"), ("(", ")")):
        return None
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        try:
            tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip()]
        except (tokenize.TokenError, SyntaxError):
            return None
        if any(
            token.type != tokenize.STRING and token.string not in ("[", "]", "(", ")", ",", "None") for token in tokens
        ):
            return None
        # String by string: NumPy leaves the commas out, and Python would join what lies side by side.
        entries = [ast.literal_eval(token.string) for token in tokens if token.type == tokenize.STRING]
    entries = [
        next((entry[key] for key in TEXT_KEYS if key in entry), None) if isinstance(entry, dict) else entry
        for entry in entries
    ]
    return entries if any(entries) and all(isinstance(entry, (str, type(None))) for entry in entries) else None


# --- bad rows ---------------------------------------------------------------------------------------------------------


class TooManyBadRowsError(ValueError):
    """More rows are unusable than a dataset in good order would have."""


class BadRowError(ValueError):
    """A row is unusable and the run was asked to stop at the first."""


@dataclass
class SkippedRows:
    """Counts the rows that were left out and writes each to a file, so that none is lost silently.

    Args:
        path: the JSON-lines file, `skipped.jsonl` in the output folder; None to count only.
        on_bad_row: "skip", or "error" to stop at the first one.
        max_share: share of bad rows above which the dataset is refused.
    """

    path: Path | None = None
    on_bad_row: str = "skip"
    max_share: float = 0.10
    count: int = 0
    by_split: dict[str, int] = field(default_factory=dict)
    written: set[str] | None = None

    def add(self, split: str, row: int | None, image_id: str, reason: str) -> None:
        """Counts one row; `row` is its number in the table that it was read from, `None` in a stream.

        A line that is in the file already, from an earlier epoch or the run that is resumed, is not written again.

        Raises:
            BadRowError: the run was asked to stop at the first one.
        """
        if self.on_bad_row == "error":
            raise BadRowError(f"split {split}, row {row}, id {image_id}: {reason}")
        self.count += 1
        self.by_split[split] = self.by_split.get(split, 0) + 1
        if self.path is not None:
            if self.written is None:
                self.written = set(self.path.read_text("utf-8").splitlines()) if self.path.exists() else set()
            line = {"split": split, "row": row, "image_id": image_id, "reason": reason}
            line = json.dumps(line, ensure_ascii=False)
            if line not in self.written:
                self.written.add(line)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(line + "\n")

    def check(self, split: str, total: int) -> None:
        """Raises `TooManyBadRowsError` when more than `max_share` of the split's `total` rows so far were bad."""
        bad = self.by_split.get(split, 0)
        if bad > self.max_share * total:
            raise TooManyBadRowsError(
                f"split {split}: expected at most {self.max_share:.0%} bad rows, got {bad} of {total}"
                + (f"; they are listed in {self.path}" if self.path else "")
            )


# --- decoding, once ---------------------------------------------------------------------------------------------------


def decode_row(row: dict, index: int | str, columns: Columns, stored_size: int, version: int = DECODE_VERSION) -> dict:
    """Checks and decodes one row; a bad one comes back with its reason and no pixels.

    Args:
        row: a row whose image has not been decoded (`Image(decode=False)`).
        index: its number, which is its id when the dataset has neither ids nor file names.
        columns: where to look.
        stored_size: pixels of the stored picture's shorter side; smaller pictures are stored as they are.
        version: only there to be part of the cache's key.

    Returns:
        dict of `pixels` (height x width x 3 bytes, RGB), `height`, `width`, `captions`, `image_id`, `reason` ("" when
        the row is good; it names the file).
    """
    image_id, path = str(columns.id_of(row, row.get(ROW_COLUMN, index))), path_of(row[columns.image])
    decoded = {"pixels": b"", "height": 0, "width": 0, "captions": [], "image_id": image_id, "reason": ""}
    column = columns.caption
    try:
        captions = columns.captions_of(row)
        column = columns.image
        image = load_image(row[columns.image], name=path or image_id)
    except (ValueError, TypeError) as error:
        # `load_image` names the file itself.
        where = f" of {path}" if path and column == columns.caption else ""
        return {**decoded, "reason": f"column {column!r}{where}: {error}"}
    width, height = image.size
    if min(width, height) > stored_size:
        ratio = stored_size / min(width, height)
        size = (max(stored_size, round(width * ratio)), max(stored_size, round(height * ratio)))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
        width, height = image.size
    return {**decoded, "pixels": image.tobytes(), "height": height, "width": width, "captions": captions}


DECODED_FEATURES = datasets.Features(
    {
        "pixels": datasets.Value("binary"),
        "height": datasets.Value("int32"),
        "width": datasets.Value("int32"),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("string"),
        "reason": datasets.Value("string"),
    }
)


def stored_size_for(image_size: int) -> int:
    """Shorter side to store for training at `image_size`: a little more, so that a crop is seldom enlarged."""
    return math.ceil(image_size * 8 / 7)


def decode_dataset(
    dataset: datasets.Dataset,
    columns: Columns,
    image_size: int,
    skipped: SkippedRows,
    split: str,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Decodes every photo once and leaves the bad rows out.

    The result is `datasets`' own Arrow cache, keyed by the dataset's fingerprint, the columns and the size; it needs
    about 3 x (8/7 x image_size)^2 bytes a photo (200 kB at 224) and is memory-mapped, so that processes share it.

    Args:
        dataset: rows with an image and its captions.
        columns: their names.
        image_size: side of the pictures that the model will see.
        skipped: where bad rows are counted.
        split: the split's name, for the report.
        num_proc: processes to decode with.

    Returns:
        A dataset of `pixels`, `height`, `width`, `captions`, `image_id` (see `decode_row`).

    Raises:
        TooManyBadRowsError, BadRowError: see `SkippedRows`.
        ValueError: no good row is left.
    """
    wanted = [columns.image, *columns.captions, columns.image_id, ROW_COLUMN]
    rows = dataset.select_columns([name for name in wanted if name in dataset.column_names])
    numbers = rows[ROW_COLUMN][:] if ROW_COLUMN in rows.column_names else range(len(rows))
    decoded = undecoded(rows, columns.image).map(
        _decode_and_hash,
        with_indices=True,
        fn_kwargs={"columns": columns, "stored_size": stored_size_for(image_size), "version": DECODE_VERSION},
        remove_columns=rows.column_names,
        features=datasets.Features({**DECODED_FEATURES, "digest": datasets.Value("string")}),
        num_proc=num_proc,
        # 200 photos of 200 kB: what is held in memory before it is written.
        writer_batch_size=200,
        desc=f"Decoding {split}",
    )
    reasons = decoded["reason"][:]
    good = [row for row, reason in enumerate(reasons) if not reason]
    if len(good) < len(decoded):
        for row, reason in enumerate(reasons):
            if reason:
                skipped.add(split, numbers[row], decoded[row]["image_id"], reason)
        skipped.check(split, len(decoded))
        decoded = decoded.select(good)
    if not good:
        raise ValueError(f"split {split}: expected at least one usable row, got none of {len(reasons)}")
    return decoded.remove_columns("reason")


def _decode_and_hash(row: dict, index: int, **options) -> dict:
    decoded = decode_row(row, index, **options)
    return {**decoded, "digest": row_digest(decoded)}


def row_digest(row: dict) -> str:
    """A hash of a decoded row's pixels and texts."""
    texts = json.dumps([row[name] for name in ("height", "width", "captions", "image_id")], ensure_ascii=False)
    return hashlib.blake2b(row["pixels"] + texts.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def content_fingerprint(rows: datasets.Dataset) -> str:
    """A hash of everything that decoded rows hold: the same on any machine, another if a single pixel changes.

    `datasets`' own fingerprint follows from paths and times of files, which neither a shared cache nor a resumed run
    should depend on. `decode_dataset` has left each row's hash beside it, so that no pixels are read here.
    """
    digests = rows["digest"][:] if "digest" in rows.column_names else map(row_digest, rows)
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def picture_of(row: dict) -> Image.Image:
    """The picture of a decoded row, without a copy."""
    return Image.frombuffer("RGB", (row["width"], row["height"]), row["pixels"], "raw", "RGB", 0, 1)


# --- one sample -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """How a training photo is varied. The defaults vary nothing; `Augmentation()` is the evaluation crop.

    Args:
        crop_scale: smallest share of the photo's area that a random crop keeps (1.0: the whole centre square).
        horizontal_flip: mirror half of the photos, except where the captions say left or right.
        color_jitter: largest relative change of brightness, contrast and each channel's gain.
        mixup: share of the samples whose picture is mixed with another photo's, and which lose their captions.
    """

    crop_scale: float = 1.0
    horizontal_flip: bool = False
    color_jitter: float = 0.0
    mixup: float = 0.0

    def crop_box(self, width: int, height: int, rng: random.Random) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels; aspect ratios from 3:4 to 4:3 as in Inception (Szegedy et al. 2015)."""
        if self.crop_scale < 1.0:
            for _ in range(10):
                area = rng.uniform(self.crop_scale, 1.0) * width * height
                ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
                crop_width, crop_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
                if crop_width <= width and crop_height <= height:
                    left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
                    return left, top, left + crop_width, top + crop_height
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    def color_gain_and_shift(self, rng: random.Random) -> tuple[list[float], list[float]]:
        """Per channel (gain, shift), to be applied as `pixel * gain + shift` to pixels from 0 to 1."""
        if not self.color_jitter:
            return [1.0] * 3, [0.0] * 3
        vary = self.color_jitter
        brightness, contrast = rng.uniform(1 - vary, 1 + vary), rng.uniform(1 - vary, 1 + vary)
        gains = [brightness * contrast * rng.uniform(1 - vary / 2, 1 + vary / 2) for _ in range(3)]
        # Contrast turns about the middle grey.
        return gains, [0.5 * (1 - contrast)] * 3


SIDE_WORDS = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def make_sample(
    row: dict,
    image_size: int,
    augmentation: Augmentation,
    captions_per_image: int | None,
    picture_rng: random.Random,
    caption_rng: random.Random,
) -> dict:
    """One decoded row to what the collator takes.

    Args:
        row: as `decode_row` returns it.
        image_size: side of the square picture, pixels.
        augmentation: how to vary it.
        captions_per_image: captions to draw, without repeats while there are enough; None for all.
        picture_rng: what crop, mirroring and colours follow from, and nothing else.
        caption_rng: what the choice of captions follows from.

    Returns:
        dict of `pixels` (image_size, image_size, 3) uint8 tensor, `gain` and `shift` (3 floats), `captions` (those
        drawn), `references` (all), `image_id`. A mixed picture's has `mixed` beside them.
    """
    captions = list(row["captions"])
    if captions_per_image is not None:
        caption_rng.shuffle(captions)
        captions = [captions[i % len(captions)] for i in range(captions_per_image)]
    pixels, gain, shift = vary_picture(row, image_size, augmentation, picture_rng)
    return {
        "pixels": pixels,
        "gain": gain,
        "shift": shift,
        "captions": captions,
        "references": row["captions"],
        "image_id": row["image_id"],
    }


def vary_picture(
    row: dict, image_size: int, augmentation: Augmentation, picture_rng: random.Random
) -> tuple[torch.Tensor, list[float], list[float]]:
    """One decoded row's picture, varied: `pixels`, `gain` and `shift` of `make_sample`."""
    image = picture_of(row)
    box = augmentation.crop_box(row["width"], row["height"], picture_rng)
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    # All captions, not those drawn: a picture must not depend on what is said of it this time.
    mirrored = picture_rng.random() < 0.5 and not any(map(SIDE_WORDS.search, row["captions"]))
    if augmentation.horizontal_flip and mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain, shift = augmentation.color_gain_and_shift(picture_rng)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image_size, image_size, 3)
    return pixels, gain, shift


def sample_rng(seed: int, epoch: int, index: int | str) -> random.Random:
    """The randomness of one row in one epoch, the same in whatever worker or process it is drawn."""
    return random.Random(f"{seed}/{epoch}/{index}")


def sample_rngs(seed: int, view: int, epoch: int, index: int | str) -> tuple[random.Random, random.Random]:
    """What a row's picture follows from in a view, and what its captions follow from in an epoch."""
    return random.Random(f"picture/{seed}/{view}/{index}"), sample_rng(seed, epoch, index)


def mixing_rng(seed: int, view: int, index: int) -> random.Random:
    """What follows from it: whether a row's picture is mixed in a view, with which other row's, and how much of it."""
    return random.Random(f"mixup/{seed}/{view}/{index}")


class CaptionDataset(Dataset):
    """Decoded photos, varied afresh in every epoch.

    Args:
        rows: from `decode_dataset`.
        image_size: side of the pictures, pixels.
        augmentation: how to vary them.
        captions_per_image: captions to draw for a photo; None for all.
        seed: with the epoch and the row number, fixes every draw.

    A key is `(epoch, row)`, as `EpochBatchSampler` gives it, so that workers need not be told the epoch; a plain row
    number means epoch 0. With a `teacher_cache` (see `teacher_cache.py`), epochs take turns with its views, and a
    sample carries the teacher's embedding of its view.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_size: int,
        augmentation: Augmentation | None = None,
        captions_per_image: int | None = None,
        seed: int = 0,
    ):
        self.rows = rows
        self.image_size = image_size
        self.augmentation = augmentation or Augmentation()
        self.captions_per_image = captions_per_image
        self.seed = seed
        self.teacher_cache = None

    def in_size(self, image_size: int) -> "CaptionDataset":
        """The same crops of the same photos, in another number of pixels."""
        return CaptionDataset(self.rows, image_size, self.augmentation, self.captions_per_image, self.seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        view = epoch if self.teacher_cache is None else epoch % self.teacher_cache.num_views
        rngs = sample_rngs(self.seed, view, epoch, index)
        sample = make_sample(self.rows[index], self.image_size, self.augmentation, self.captions_per_image, *rngs)
        if self.augmentation.mixup > 0:
            self._mix(sample, mixing_rng(self.seed, view, index))
        if self.teacher_cache is not None:
            sample["teacher_embeds"] = self.teacher_cache(view, index)
        return sample

    def _mix(self, sample: dict, rng: random.Random) -> None:
        """Lays another photo's crop over a share of the samples, as thick as mixup (Zhang et al., 2018,
        https://arxiv.org/abs/1710.09412, with alpha = 1). No caption says what is seen then: only the teacher does, who
        is asked about the mixture as about any picture (Beyer et al., 2022, https://arxiv.org/abs/2106.05237).
        """
        if rng.random() >= self.augmentation.mixup:
            return
        other, _, _ = vary_picture(self.rows[rng.randrange(len(self))], self.image_size, self.augmentation, rng)
        # The photo's own share is the larger one; the other photo's turn comes with its own index.
        mixed = torch.lerp(sample["pixels"].float(), other.float(), rng.uniform(0.0, 0.5))
        sample.update(pixels=mixed.round_().to(torch.uint8), mixed=True)


class EpochBatchSampler(Sampler):
    """A process's share of every step's photos; yields lists of `(epoch, row)`.

    What all processes take together in a step follows from (seed, epoch) and the photos of a step, not from how many
    processes share them: two processes with batches of 8 see what one sees with batches of 16. Every photo comes just
    once an epoch, and steps of an epoch are of one size, give or take a photo, rather than all full but the last.

    Args:
        num_rows: photos of the dataset.
        batch_size: photos that a process takes in a batch.
        seed: with the epoch, fixes the order.
        process_index, num_processes: whose share it is.
        equal: leave out what doesn't fill a batch of every process, for objectives that compare a batch's photos.

    Raises:
        ValueError: there are too few photos for the processes.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        equal: bool = False,
    ):
        step_size = batch_size * num_processes
        if num_rows < (step_size if equal else num_processes):
            wanted = f"a batch of {batch_size}" if equal else "one"
            raise ValueError(
                f"expected {wanted} of the training photos for each of {num_processes} processes, got {num_rows} photos"
            )
        # At least one photo for each process.
        self.num_batches = num_rows // step_size if equal else min(-(-num_rows // step_size), num_rows // num_processes)
        self.num_rows = num_rows
        self.used_rows = self.num_batches * step_size if equal else num_rows
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.set_position(0, 0)

    def set_position(self, epoch: int, batch: int) -> None:
        """Which epoch comes next, and from which of its batches on."""
        self.epoch = epoch
        self.first_batch = batch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = list(range(self.num_rows))
        sample_rng(self.seed, self.epoch, -1).shuffle(order)
        shares = self.num_batches * self.num_processes
        for batch in range(self.first_batch, self.num_batches):
            share = batch * self.num_processes + self.process_index
            first, end = (self.used_rows * edge // shares for edge in (share, share + 1))
            yield [(self.epoch, row) for row in order[first:end]]


class StreamingCaptionDataset(IterableDataset):
    """The same samples from a dataset too large for the disk: decoded as they come, shuffled block by block.

    Shards come in another order each epoch, and of what a shard holds, blocks of rows are shuffled. A block and the
    place in it, unlike `datasets`' rolling buffer, can be written down: `state_dict` says where the stream stands, and
    after `load_state_dict` it goes on from there, having read nothing but the block it was in.

    Args:
        dataset: a `datasets.IterableDataset`; each process reads its own shards, and in it each worker its own.
        columns: where to look.
        skipped: where bad rows are counted; with workers each counts its own.
        split: the split's name, for the report.
        process_index, num_processes: which share of the stream is this process's.
        shuffle_block: rows that are read and shuffled together; 0 keeps the order.
        Others: as in `CaptionDataset`.

    Raises:
        ValueError: the augmentation mixes photos.
    """

    # Before this many rows, one bad row may well be more than the tolerated share.
    MIN_ROWS_TO_JUDGE = 100

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        columns: Columns,
        image_size: int,
        skipped: SkippedRows,
        split: str,
        augmentation: Augmentation | None = None,
        captions_per_image: int | None = None,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        shuffle_block: int = 1000,
    ):
        if augmentation is not None and augmentation.mixup > 0:
            raise ValueError(f"mixup: expected 0 for a stream, which holds no other photo, got {augmentation.mixup}")
        if isinstance((dataset.features or {}).get(columns.image), datasets.Image):
            dataset = dataset.cast_column(columns.image, datasets.Image(decode=False))
        if shuffle_block:
            # Only the order of the shards: a buffer of one row holds nothing back that a state would have to tell.
            dataset = dataset.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)
        self.dataset = split_dataset_by_node(dataset, rank=process_index, world_size=num_processes)
        self.columns = columns
        self.image_size = image_size
        self.skipped = skipped
        self.split = split
        self.augmentation = augmentation or Augmentation()
        self.captions_per_image = captions_per_image
        self.seed = seed
        self.process_index = process_index
        self.shuffle_block = shuffle_block
        self.epoch = 0
        self.position = self.resumed = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def state_dict(self) -> dict | None:
        """Where the stream stands, as JSON; `None` before its first row."""
        return copy.deepcopy(self.position)

    def load_state_dict(self, state: dict | None) -> None:
        """Lets the next iteration go on where `state` says, instead of at the beginning of the epoch."""
        self.resumed = state

    def _next_rows(self, stream: Iterator[dict], size: int, index: int) -> list[dict]:
        """The next block of rows, from the `index`-th on; a `ValueError` says where a shard can't be read."""
        rows = []
        try:
            for row in islice(stream, size):
                rows.append(row)
        except UNREADABLE as error:
            reason = error.__cause__ or error
            where = f"split {self.split}: cannot be read after {index + len(rows)} rows"
            raise ValueError(f"{where}: {reason}") from error
        return rows

    def __iter__(self) -> Iterator[dict]:
        stored_size = stored_size_for(self.image_size)
        worker = get_worker_info()
        share = f"{self.process_index}.{worker.id if worker else 0}"
        start, self.resumed = self.resumed or {"block": 0, "given": 0, "stream": None}, None
        if start["stream"] is not None:
            self.dataset.load_state_dict(start["stream"])
        block, given, block_start = start["block"], start["given"], start["stream"]
        stream = iter(self.dataset)
        size = max(1, self.shuffle_block)
        while rows := self._next_rows(stream, size, block * size):
            order = list(range(len(rows)))
            if self.shuffle_block:
                sample_rng(self.seed, self.epoch, f"{share}/block {block}").shuffle(order)
            for place in range(given, len(rows)):
                self.position = {"block": block, "given": place + 1, "stream": block_start}
                index = block * size + order[place]
                decoded = decode_row(rows[order[place]], f"{share}/{index}", self.columns, stored_size)
                if decoded["reason"]:
                    self.skipped.add(self.split, None, decoded["image_id"], decoded["reason"])
                    if index >= self.MIN_ROWS_TO_JUDGE:
                        self.skipped.check(self.split, index + 1)
                    continue
                rngs = sample_rngs(self.seed, self.epoch, self.epoch, f"{share}/{index}")
                yield make_sample(decoded, self.image_size, self.augmentation, self.captions_per_image, *rngs)
            block, given, block_start = block + 1, 0, copy.deepcopy(self.dataset.state_dict())


# --- one batch --------------------------------------------------------------------------------------------------------


class CaptionCollator:
    """Samples to a batch of tensors.

    Args:
        tokenizer: the caption tokenizer.
        max_caption_length: ids a caption may have, the end token included.
        image_mean, image_std: per channel, of pixels from 0 to 1.

    Returns (from a call on B samples with K captions each):
        dict of `pixel_values` (B, 3, H, W) float32; `labels` (B * K, T) int64, the captions of a photo side by side,
        each ended by the end token and filled up with -100, those of a mixed picture wholly; `references`, B lists of
        all captions of a photo; `image_ids`, B strings; `teacher_embeds` (B, embed_dim) where the samples carry them.
    """

    def __init__(self, tokenizer, max_caption_length: int, image_mean: list[float], image_std: list[float]):
        self.tokenizer = tokenizer
        self.max_caption_length = max_caption_length
        self.image_mean = torch.tensor(image_mean)
        self.image_std = torch.tensor(image_std)

    def __call__(self, samples: list[dict]) -> dict:
        pixels = torch.stack([sample["pixels"] for sample in samples]).permute(0, 3, 1, 2).float()
        gain = torch.tensor([sample["gain"] for sample in samples])
        shift = torch.tensor([sample["shift"] for sample in samples])
        # Jitter, scaling to 0..1 and normalisation are one multiplication and one addition.
        gain = gain / (255 * self.image_std)
        shift = (shift - self.image_mean) / self.image_std
        pixel_values = pixels.mul_(gain[:, :, None, None]).add_(shift[:, :, None, None]).contiguous()

        captions = [caption for sample in samples for caption in sample["captions"]]
        encoded = encode_captions(self.tokenizer, captions, self.max_caption_length)
        labels = torch.full((len(encoded), max(map(len, encoded))), -100)
        for row, ids in enumerate(encoded):
            labels[row, : len(ids)] = torch.tensor(ids)
        mixed = [sample.get("mixed", False) for sample in samples for _ in sample["captions"]]
        labels[torch.tensor(mixed)] = -100
        batch = {
            "pixel_values": pixel_values,
            "labels": labels,
            "references": [sample["references"] for sample in samples],
            "image_ids": [sample["image_id"] for sample in samples],
        }
        if "teacher_embeds" in samples[0]:
            batch["teacher_embeds"] = torch.stack([sample["teacher_embeds"] for sample in samples])
        return batch

    def blank(self, image_size: int, captions_per_image: int) -> dict:
        """A batch of one black picture with empty captions, for a process that has no photo left where others have."""
        return self(
            [
                {
                    "pixels": torch.zeros(image_size, image_size, 3, dtype=torch.uint8),
                    "gain": [1.0] * 3,
                    "shift": [0.0] * 3,
                    "captions": [""] * captions_per_image,
                    "references": [],
                    "image_id": "",
                }
            ]
        )
