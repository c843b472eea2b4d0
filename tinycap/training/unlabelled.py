"""Images without captions: they teach the student alone, by the teacher's embedding, which needs no caption."""

import logging
import random
from collections.abc import Collection
from dataclasses import dataclass

from tinycap.training.columns import AnyDataset, Columns, resolve_columns
from tinycap.training.data import ROW_COLUMN, image_keys, load_split


logger = logging.getLogger(__name__)


@dataclass
class Unlabelled:
    """Undecoded rows without captions: one for each image file, or a stream's.

    Args:
        split: its name in reports of bad rows.
        known: `image_key`s of images that a stream is to leave out; data sets are without them.
    """

    rows: AnyDataset
    columns: Columns
    split: str
    known: frozenset[str] = frozenset()


def load_unlabelled(
    dataset_name: str,
    split: str,
    known: Collection[str] = (),
    streaming: bool = False,
    allow_remote_images: bool = False,
    num_proc: int | None = None,
) -> Unlabelled:
    """One split of a data set whose captions, if it has any, are ignored.

    Args:
        dataset_name, split: as in `load_split`; a folder of nothing but image files is a data set too.
        known: `image_key`s of images to leave out, so that no copy of a validation image is trained on.

    Raises:
        ValueError: it can't be read, has no such split, no column of images, or no image that isn't known.
    """
    try:
        rows = load_split(dataset_name, split, None, streaming, allow_remote_images, all_images=True)
        source = {"root": dataset_name, "allow_remote_images": allow_remote_images}
        columns = resolve_columns(rows, captions=False, **source)
    except ValueError as error:
        raise ValueError(f"--unlabelled_dataset_name {dataset_name}: {error}") from error
    name = f"unlabelled {split}"
    if streaming:
        return Unlabelled(rows, columns, name, frozenset(known))
    first: dict[str, int] = {}
    keys = image_keys(rows, columns, num_proc)
    for number, key in enumerate(keys):
        first.setdefault(key, number)
    kept = [number for key, number in first.items() if key not in known]
    if len(kept) < len(rows):
        copies = (len(rows) - len(first), len(first) - len(kept))
        logger.info("%s: left out %d copies within the set and %d of captioned images", dataset_name, *copies)
    if not kept:
        raise ValueError(
            f"--unlabelled_dataset_name {dataset_name}: expected images that aren't among the captioned ones, "
            f"got none of {len(rows)} rows"
        )
    return Unlabelled(rows.add_column(ROW_COLUMN, list(range(len(rows)))).select(kept), columns, name)


@dataclass
class SharedOrder:
    """The order of an epoch in which a share of the images, evenly spread, has no captions.

    An epoch is a pass over the captioned images. The others come in passes of their own, which go on from epoch to
    epoch: none comes again before all have come. Both follow from (seed, epoch).

    Args:
        captioned, unlabelled: row numbers.
        share: of the images without captions, above 0 and below 1.

    Raises:
        ValueError: there are no images with captions, or none without.
    """

    captioned: list[int]
    unlabelled: list[int]
    share: float
    seed: int

    def __post_init__(self):
        if not (self.captioned and self.unlabelled):
            raise ValueError(
                "--unlabelled_share: expected images with and without captions, from --unlabelled_dataset_name or "
                f"--allow_missing_captions, got {len(self.captioned)} with and {len(self.unlabelled)} without"
            )
        self.num_unlabelled = max(1, round(len(self.captioned) * self.share / (1 - self.share)))

    def __len__(self) -> int:
        """Images of an epoch."""
        return len(self.captioned) + self.num_unlabelled

    def _shuffled(self, rows: list[int], name: str) -> list[int]:
        return random.Random(f"{self.seed}/{name}/-1").sample(rows, len(rows))

    def __call__(self, epoch: int) -> list[tuple[int, int]]:
        """Keys of a `CaptionDataset`: `(epoch, row)`, and `(pass, row)` without captions, since an image that comes
        again in the same epoch is varied anew."""
        captioned = iter(self._shuffled(self.captioned, str(epoch)))
        first, size = epoch * self.num_unlabelled, len(self.unlabelled)
        passes = range(first // size, (first + self.num_unlabelled - 1) // size + 1)
        walk = [(number, row) for number in passes for row in self._shuffled(self.unlabelled, f"pass {number}")]
        walk = iter(walk[first % size :])
        # As in Bresenham's line: any part of the epoch has the share, to within one image.
        edges = [place * self.num_unlabelled // len(self) for place in range(len(self) + 1)]
        return [next(walk) if after > before else (epoch, next(captioned)) for before, after in zip(edges, edges[1:])]
