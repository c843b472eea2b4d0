"""Captioned images: from a dataset on disk or on the Hub to decoded rows, one for each image."""

import hashlib
import importlib.util
import json
import logging
import math
import os
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from PIL import Image

from tinycap.processing_tinycap import load_image
from tinycap.training.captions import usable_captions
from tinycap.training.columns import AnyDataset, Columns, path_of, resolve_columns
from tinycap.training.folders import UNREADABLE, NoSplitError, find_broken_shard, read_folder, read_shards
from tinycap.training.skipped_rows import SkippedRows, refuse_remote_images


logger = logging.getLogger(__name__)

TEXT = datasets.Value("string")
# Number of a row in the table it was read from, or of the first row of its image.
ROW_COLUMN = "__row__"
# Share of the training images held out where a dataset has no validation split.
HELD_OUT = 0.05
# Part of the cache key: raise it when `decode_row` changes what it stores.
DECODE_VERSION = 3


def load_split(
    dataset_name: str,
    split: str,
    config: str | None = None,
    streaming: bool = False,
    allow_remote: bool = False,
    all_images: bool = False,
) -> AnyDataset:
    """Loads one split (slices such as `train[:100]` included) of a Hub dataset, of a local folder of shards (parquet,
    WebDataset), or of plain image files, undecoded; a stream reads the shards on the fly. `all_images`: also those
    image files that have no captions.

    Raises:
        NoSplitError: there is no such split; lists the splits.
        ValueError: there is no such folder, it can't be read, or its card names files elsewhere without `allow_remote`.
    """
    is_folder = os.path.isdir(dataset_name)
    if not is_folder and (os.path.isabs(dataset_name) or dataset_name.startswith(".")):
        raise ValueError(f"dataset_name: no such folder: {dataset_name}")
    if is_folder and (rows := read_folder(dataset_name, split, config, allow_remote, all_images)) is not None:
        rows = undecoded(rows)
        return rows.to_iterable_dataset(num_shards=min(64, len(rows))) if streaming else rows
    try:
        return undecoded(read_shards(dataset_name, split, config, streaming, allow_remote))
    except UNREADABLE as error:
        if re.search("(Unknown|Bad) split", str(error)):
            raise NoSplitError(f"dataset {dataset_name}: no split {split!r}: {error}") from error
        reason = find_broken_shard(dataset_name) or error.__cause__ or error
        raise ValueError(f"dataset {dataset_name}, split {split}: cannot be read: {reason}") from error


def load_splits(
    dataset_name: str,
    dataset_config_name: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    streaming: bool = False,
    seed: int = 0,
    num_proc: int | None = None,
    allow_missing_captions: bool = False,
    **columns: str | bool | None,
) -> tuple[AnyDataset, Dataset]:
    """The training and the validation split, one row for each image (a stream's training rows aren't merged).

    Args (others: see `load_split` and `resolve_columns`):
        validation_split: `None` for "validation" if there is one, else for 5 % of the training images, drawn by `seed`.
        max_train_samples, max_eval_samples: use only the first images; of a stream, 1,000 to validate on by default.
        num_proc: processes that hash the rows' images.
        allow_missing_captions: train on all images of a folder of image files, see `load_split`.

    Raises:
        ValueError: a split or column is missing, a stream has no validation split, or there are too few images.
    """
    options = (dataset_config_name, streaming, columns.get("allow_remote_images", False))
    train = load_split(dataset_name, train_split, *options, allow_missing_captions)
    columns = resolve_columns(train, root=dataset_name, **columns)
    try:
        validation = load_split(dataset_name, validation_split or "validation", *options)
    except NoSplitError as error:
        if streaming or validation_split is not None:
            raise NoSplitError(f"{error} A split to validate on is named by --validation_split.") from None
        train, validation = hold_out(merge_rows(train, columns, num_proc), columns, seed)
        logger.info(
            "dataset %s has no validation split: %d of its %d training images are held out, drawn by seed %d",
            *(dataset_name, len(validation), len(train) + len(validation), seed),
        )
    else:
        if streaming:
            logger.warning("dataset %s: a stream's rows are not merged: each row counts as an image", dataset_name)
            rows = list(validation.take(max_eval_samples or 1000))
            validation = Dataset.from_list(rows, features=validation.features)
        else:
            train = merge_rows(train, columns, num_proc)
        validation = merge_rows(validation, columns, num_proc)
    if max_train_samples:
        train = train.take(max_train_samples if streaming else min(max_train_samples, len(train)))
    return train, validation.take(min(max_eval_samples or len(validation), len(validation)))


def load_images(
    dataset_name: str, split: str, dataset_config_name: str | None = None, seed: int = 0, **columns: str | bool | None
) -> tuple[Dataset, Columns]:
    """One split with one row for each image, and its columns (`columns` as in `resolve_columns`).

    "validation" of a dataset without such a split is what `load_splits` holds out of "train" with the same seed.
    """
    try:
        rows = load_split(dataset_name, split, dataset_config_name, False, columns.get("allow_remote_images", False))
        rows = merge_rows(rows, resolve_columns(rows, root=dataset_name, **columns))
    except NoSplitError:
        if split != "validation":
            raise
        rows = load_splits(dataset_name, dataset_config_name, seed=seed, **columns)[1]
    return rows, resolve_columns(rows, root=dataset_name, **columns)


def undecoded(rows: AnyDataset) -> AnyDataset:
    """The rows with files as bytes or paths: a damaged image only costs its own row, and `datasets` opens no URL."""

    def plain(feature: Any) -> Any:
        if isinstance(feature, dict):
            return {name: plain(part) for name, part in feature.items()}
        if hasattr(feature, "feature"):
            return replace(feature, feature=plain(feature.feature))
        return replace(feature, decode=False) if getattr(feature, "decode", False) else feature

    for name, feature in (rows.features or {}).items():
        if (kind := plain(feature)) != feature:
            rows = rows.cast_column(name, kind)
    return rows


def image_key(row: dict, number: int, columns: Columns) -> dict[str, str]:
    """An equal `key` for rows of the same image: a hash of its file's bytes, else its path, else its row."""
    try:
        content = columns.image_of(row)
    except ValueError:
        content = None
    if isinstance(content, str):
        content = Path(content).read_bytes() if os.path.isfile(content) else None
    name = path_of(row[columns.image]) or f"row {number} of {columns.root}"
    return {"key": hashlib.blake2b(content, digest_size=16).hexdigest() if content else name}


def image_keys(rows: Dataset, columns: Columns, num_proc: int | None = None) -> list[str]:
    """The `image_key` of every row. Nothing is decoded, and `datasets` caches the hashes."""
    options = {"with_indices": True, "fn_kwargs": {"columns": columns}, "remove_columns": columns.image}
    images = undecoded(rows).select_columns([columns.image])
    refuse_remote_images(images, columns)
    return images.map(image_key, num_proc=num_proc, desc="Looking for rows of the same image", **options)["key"][:]


def merge_rows(rows: Dataset, columns: Columns, num_proc: int | None = None) -> Dataset:
    """One row for each image: the first of the rows whose files have the same bytes, with the distinct captions of all.

    `ROW_COLUMN` keeps the number of the row in `rows`.
    """
    keys = image_keys(rows, columns, num_proc)
    first: dict[str, int] = {}
    for number, key in enumerate(keys):
        first.setdefault(key, number)
    numbers = list(first.values())
    if len(first) == len(rows):
        return rows.add_column(ROW_COLUMN, numbers)
    logger.info("%d rows are of %d images: their captions are merged", len(rows), len(first))
    texts = {key: [] for key in first}
    for key, row in zip(keys, rows.select_columns(columns.captions).to_list()):
        texts[key] += usable_captions(row.values())
    captions = [list(dict.fromkeys(values)) for values in texts.values()]
    # Few rows at a time: images of several megabytes are held in memory.
    merged = undecoded(rows).select(numbers).remove_columns(columns.captions)
    merged = merged.flatten_indices(writer_batch_size=100, num_proc=num_proc)
    merged = merged.add_column(columns.caption, captions, feature=datasets.List(TEXT)).add_column(ROW_COLUMN, numbers)
    return merged.cast_column(columns.image, rows.features[columns.image])


def hold_out(rows: Dataset, columns: Columns, seed: int) -> tuple[Dataset, Dataset]:
    """The images to train on and those held out, drawn by `seed` among those with captions; rows that share an id stay
    together."""
    ids = list(range(len(rows)))
    if columns.image_id and len(set(names := rows[columns.image_id][:]) - {None}) > 1:
        ids = [number if name is None else f"id {name}" for number, name in enumerate(names)]
    captions = rows.select_columns(columns.captions)
    unique = list(dict.fromkeys(name for name, row in zip(ids, captions) if usable_captions(row.values())))
    if len(unique) < 2:
        raise ValueError(
            f"expected at least 2 images with captions, one of them to be held out for validation, got {len(unique)}"
        )
    drawn = set(random.Random(seed).sample(unique, math.ceil(HELD_OUT * len(unique))))
    kept, held_out = ([row for row, name in enumerate(ids) if (name in drawn) == out] for out in (False, True))
    return rows.select(kept), rows.select(held_out)


def uncaptioned(rows: Dataset, columns: Columns) -> dict[int, str]:
    """The rows without a usable caption: number and reason."""
    bad = {}
    for number, row in enumerate(rows.select_columns(columns.captions)):
        try:
            columns.captions_of(row)
        except ValueError as error:
            bad[number] = f"column {columns.caption!r}: {error}"
    if bad:
        logger.warning("%d rows have no caption and are left out", len(bad))
    return bad


def image_ids(rows: Dataset, columns: Columns) -> list[str | int]:
    """The id of every row: see `Columns.id_of`."""
    wanted = [name for name in (columns.image, columns.image_id, ROW_COLUMN) if name in rows.column_names]
    bare = undecoded(rows.select_columns(wanted))
    return [columns.id_of(row, row.get(ROW_COLUMN, number)) for number, row in enumerate(bare)]


DECODED_FEATURES = datasets.Features(
    {"pixels": datasets.Value("binary"), "height": datasets.Value("int32"), "width": datasets.Value("int32")}
    | {"captions": datasets.List(TEXT), "image_id": TEXT, "reason": TEXT}
)


def cache_size(image_size: int) -> int:
    """Shorter side (pixels) of the cached images for training at `image_size`: crops are then rarely enlarged."""
    return math.ceil(image_size * 8 / 7)


def decode_row(row: dict, index: int | str, columns: Columns, size: int, version: tuple = ()) -> dict:
    """Checks and decodes one row with an undecoded image.

    Args:
        index: the id where the dataset has neither ids nor file names.
        size: shorter side of the decoded image, pixels; smaller images keep their size.
        version: only part of the cache key.

    Returns:
        dict of `pixels` (height x width x 3 bytes, RGB), `height`, `width`, `captions`, `image_id`, `digest`, `reason`
        ("" for a good row; a bad one has no pixels).
    """
    image_id, path = str(columns.id_of(row, row.get(ROW_COLUMN, index))), path_of(row[columns.image])
    decoded = {"pixels": b"", "height": 0, "width": 0, "captions": [], "image_id": image_id, "reason": ""}
    where = f"{columns.caption!r} of {path}" if path else repr(columns.caption)
    try:
        captions = columns.captions_of(row)
        where = repr(columns.image)
        image = load_image(columns.image_of(row), name=path or image_id)
    except (ValueError, TypeError) as error:
        return {**decoded, "reason": f"column {where}: {error}", "digest": ""}
    if min(image.size) > size:
        ratio = size / min(image.size)
        shape = tuple(max(size, round(side * ratio)) for side in image.size)
        image = image.resize(shape, Image.Resampling.BICUBIC, reducing_gap=3.0)
    decoded.update(pixels=image.tobytes(), width=image.width, height=image.height, captions=captions)
    return {**decoded, "digest": row_digest(decoded)}


def decode_dataset(
    dataset: Dataset, columns: Columns, image_size: int, skipped: SkippedRows, split: str, num_proc: int | None = None
) -> Dataset:
    """Decodes every image once, with `num_proc` processes, for models that see squares of `image_size` pixels.

    The result is `datasets`' own Arrow cache, keyed by the dataset's fingerprint, the columns and the size; it takes
    about 3 x (8/7 x image_size)^2 bytes an image (200 kB at 224) and is memory-mapped, so that processes share it.

    Returns:
        What `decode_row` returns for the good rows, without `reason`.

    Raises:
        ValueError: no good row is left, or there are too many bad ones (see `SkippedRows`).
    """
    wanted = [columns.image, *columns.captions, columns.image_id, ROW_COLUMN]
    rows = dataset.select_columns([name for name in wanted if name in dataset.column_names])
    # Rows that failed for want of the package are decoded again once it is installed.
    version = (DECODE_VERSION, importlib.util.find_spec("pillow_heif") is not None)
    decoded = undecoded(rows).map(
        decode_row,
        with_indices=True,
        fn_kwargs={"columns": columns, "size": cache_size(image_size), "version": version},
        remove_columns=rows.column_names,
        features=datasets.Features({**DECODED_FEATURES, "digest": TEXT}),
        num_proc=num_proc,
        writer_batch_size=200,  # 40 MB of memory for images of 200 kB.
        desc=f"Decoding {split}",
    )
    reasons = decoded["reason"][:]
    if any(reasons):
        numbers = rows[ROW_COLUMN][:] if ROW_COLUMN in rows.column_names else range(len(rows))
        for number, image_id, reason in zip(numbers, decoded["image_id"][:], reasons):
            if reason:
                skipped.add(split, number, image_id, reason)
        skipped.check(split, len(rows))
        decoded = decoded.select([row for row, reason in enumerate(reasons) if not reason])
    if not len(decoded):
        raise ValueError(f"split {split}: expected at least one usable row, got none of {len(rows)}")
    return decoded.remove_columns("reason")


def row_digest(row: dict) -> str:
    """A hash of a decoded row's pixels and texts."""
    texts = json.dumps([row[name] for name in ("height", "width", "captions", "image_id")], ensure_ascii=False)
    return hashlib.blake2b(row["pixels"] + texts.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def content_fingerprint(rows: Dataset) -> str:
    """A hash of all that decoded rows hold: unlike `datasets`' own fingerprint, independent of paths and file times."""
    digests = rows["digest"][:] if "digest" in rows.column_names else map(row_digest, rows)
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def decoded_image(row: dict) -> Image.Image:
    """The image of a decoded row, without a copy."""
    return Image.frombuffer("RGB", (row["width"], row["height"]), row["pixels"], "raw", "RGB", 0, 1)
