"""Captioned photos: from a dataset on disk or on the Hub to batches of tensors.

Reading order: which columns, which rows are bad, decoding (once, into a cache that `datasets` keys), one sample with
its seeded augmentation, one batch. A photo is encoded once for all its captions of a step, so a batch holds B photos
and B x K captions. Everything random follows from (seed, epoch, row), never from a worker's state.
"""

import copy
import hashlib
import json
import logging
import math
import os
import random
import re
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
from tinycap.training.table_faults import find_table_fault
from tinycap.training.tokenizer import encode_captions


logger = logging.getLogger(__name__)

CAPTION_COLUMNS = ("captions", "caption", "text", "sentences", "txt")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "photo")
ID_COLUMNS = ("image_id", "id", "filename", "file_name", "__key__")

# Part of the key of every decoded cache: raise it when `decode_row` changes what it stores.
DECODE_VERSION = 3

# What `datasets` and what it is built on raise on files that aren't what they should be, or that aren't there. The
# errors of pyarrow are among ValueError, OSError and its own.
UNREADABLE = (datasets.exceptions.DatasetsError, pyarrow.ArrowException, ValueError, OSError, LookupError, TypeError)


# --- which dataset, which columns -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold the image, its caption or captions, and its id (None: the row number)."""

    image: str
    caption: str
    image_id: str | None = None


class NoSplitError(ValueError):
    """The data set has no split of this name."""


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
    try:
        return datasets.load_dataset(dataset_name, dataset_config_name, split=split, streaming=streaming)
    except UNREADABLE as error:
        # How the two modes of `datasets` say the same.
        if re.search("(Unknown|Bad) split", str(error)):
            raise NoSplitError(f"dataset {dataset_name}: no split {split!r}: {error}") from error
        fault = find_table_fault(dataset_name) if os.path.isdir(dataset_name) else None
        reason = fault or error.__cause__ or error
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
) -> tuple[datasets.Dataset | datasets.IterableDataset, datasets.Dataset]:
    """The training and the validation split, cut to the numbers of rows that were asked for.

    Args:
        validation_split: `None` for "validation" if there is one, else for 5 % of the training rows, drawn by `seed`.
        streaming: the training split comes as a stream; of the validation split, `max_eval_samples` rows (1,000 when
            not given) are kept, since scores need the same photos each time.
        Others: see `load_split`.

    Raises:
        ValueError: a split isn't there, or a stream has none to validate on.
    """
    train = load_split(dataset_name, train_split, dataset_config_name, streaming)
    try:
        validation = load_split(dataset_name, validation_split or "validation", dataset_config_name, streaming)
    except NoSplitError:
        if validation_split is not None:
            raise
        if streaming:
            raise ValueError(
                f"dataset {dataset_name}: expected a split to validate on; name it by --validation_split"
            ) from None
        logger.info("dataset %s has no validation split: 5 %% of its training rows are held out", dataset_name)
        held_out = train.train_test_split(test_size=0.05, seed=seed)
        train, validation = held_out["train"], held_out["test"]
    if streaming:
        rows = list(validation.take(max_eval_samples or 1000))
        validation = datasets.Dataset.from_list(rows, features=validation.features)
        return train.take(max_train_samples) if max_train_samples else train, validation
    return (
        train.select(range(min(len(train), max_train_samples or len(train)))),
        validation.select(range(min(len(validation), max_eval_samples or len(validation)))),
    )


def resolve_columns(
    dataset: datasets.Dataset | datasets.IterableDataset,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Columns:
    """Finds the image, caption and id columns, by the given names or by the usual ones.

    Raises:
        ValueError: a named column isn't there, none of the usual names is, the caption column holds no text, or the
            image column neither images nor bytes nor paths.
    """
    names = list(dataset.column_names or next(iter(dataset)).keys())
    features = dataset.features or {}

    def pick(flag: str, given: str | None, usual: tuple[str, ...]) -> str:
        candidates = (given,) if given else usual
        found = next((name for name in candidates if name in names), None)
        if found is None:
            raise ValueError(f"{flag}: expected a column named {' or '.join(candidates)}, got columns {names}")
        return found

    if image_column is None:
        image_column = next((name for name, feature in features.items() if isinstance(feature, datasets.Image)), None)
    caption = pick("caption_column", caption_column, CAPTION_COLUMNS)
    kind = features.get(caption)
    inner = getattr(kind, "feature", kind)
    if kind is not None and not (isinstance(inner, datasets.Value) and "string" in inner.dtype):
        raise ValueError(f"caption_column: expected strings or lists of strings in {caption!r}, got {kind}")
    image = pick("image_column", image_column, IMAGE_COLUMNS)
    kind = features.get(image)
    is_image = isinstance(kind, datasets.Image) or (isinstance(kind, dict) and {"bytes", "path"} & set(kind))
    is_file = isinstance(kind, datasets.Value) and ("binary" in kind.dtype or "string" in kind.dtype)
    if kind is not None and not (is_image or is_file):
        raise ValueError(f"image_column: expected images, bytes of image files or paths in {image!r}, got {kind}")
    return Columns(
        image=image,
        caption=caption,
        image_id=next((name for name in ID_COLUMNS if name in names and name != caption), None),
    )


# Control characters steer terminals and lone surrogates can't be written down; neither says anything of a picture.
UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


def clean_captions(value: str | list[str] | None) -> list[str]:
    """The usable captions of one row: control characters and whitespace folded, no space before closing punctuation,
    left out where nothing visible remains.

    Raises:
        ValueError: not one usable caption is left; says what came.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    captions = [
        re.sub(r"\s+([.,;:!?])", r"\1", " ".join(UNWRITABLE.sub(" ", text).split()))
        for text in values
        if isinstance(text, str)
    ]
    # Zero-width spaces and direction marks alone are no caption.
    captions = [text for text in captions if any(unicodedata.category(letter)[0] not in "CZ" for letter in text)]
    if not captions:
        raise ValueError(f"expected a caption or a list of captions, got {str(value)[:80]!r} ({type(value).__name__})")
    return captions


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

    def add(self, split: str, row: int | str, image_id: str, reason: str) -> None:
        """Counts one row. Raises `BadRowError` where the run was asked to stop at the first."""
        if self.on_bad_row == "error":
            raise BadRowError(f"split {split}, row {row}, id {image_id}: {reason}")
        self.count += 1
        self.by_split[split] = self.by_split.get(split, 0) + 1
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                line = {"split": split, "row": row, "image_id": image_id, "reason": reason}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

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
        index: its number, which is its id when the dataset has no id column.
        columns: where to look.
        stored_size: pixels of the stored picture's shorter side; smaller pictures are stored as they are.
        version: only there to be part of the cache's key.

    Returns:
        dict of `pixels` (height x width x 3 bytes, RGB), `height`, `width`, `captions`, `image_id`, `reason` ("" when
        the row is good).
    """
    image_id = str(row[columns.image_id]) if columns.image_id and row[columns.image_id] is not None else str(index)
    decoded = {"pixels": b"", "height": 0, "width": 0, "captions": [], "image_id": image_id, "reason": ""}
    column = columns.caption
    try:
        captions = clean_captions(row[columns.caption])
        column = columns.image
        image = load_image(row[columns.image], name=image_id)
    except (ValueError, TypeError) as error:
        return {**decoded, "reason": f"column {column!r}: {error}"}
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
    wanted = [name for name in (columns.image, columns.caption, columns.image_id) if name]
    rows = dataset.select_columns(wanted)
    if isinstance(rows.features[columns.image], datasets.Image):
        rows = rows.cast_column(columns.image, datasets.Image(decode=False))
    decoded = rows.map(
        decode_row,
        with_indices=True,
        fn_kwargs={"columns": columns, "stored_size": stored_size_for(image_size), "version": DECODE_VERSION},
        remove_columns=rows.column_names,
        features=DECODED_FEATURES,
        num_proc=num_proc,
        # 200 photos of 200 kB: what is held in memory before it is written.
        writer_batch_size=200,
        desc=f"Decoding {split}",
    )
    reasons = decoded["reason"]
    good = [row for row, reason in enumerate(reasons) if not reason]
    if len(good) < len(decoded):
        for row, reason in enumerate(reasons):
            if reason:
                skipped.add(split, row, decoded[row]["image_id"], reason)
        skipped.check(split, len(decoded))
        decoded = decoded.select(good)
    if not good:
        raise ValueError(f"split {split}: expected at least one usable row, got none of {len(reasons)}")
    return decoded.remove_columns("reason")


def content_fingerprint(rows: datasets.Dataset) -> str:
    """A hash of everything that decoded rows hold: the same on any machine, another if a single pixel changes.

    `datasets`' own fingerprint follows from paths and times of files, which neither a shared cache nor a resumed run
    should depend on. Reads every row once: 1 GB/s or so.
    """
    found = hashlib.blake2b(digest_size=16)
    for batch in rows.with_format("arrow").iter(batch_size=100):
        for name in sorted(batch.column_names):
            column = batch.column(name)
            if name == "pixels":
                for pixels in column:
                    found.update(pixels.as_buffer())
            else:
                found.update(json.dumps(column.to_pylist(), ensure_ascii=False).encode())
    return found.hexdigest()


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
                    self.skipped.add(self.split, index, decoded["image_id"], decoded["reason"])
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
