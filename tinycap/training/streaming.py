"""Samples from a dataset too large for the disk: decoded on the fly, shuffled block by block."""

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from tinycap.training.batches import SampleMaker
from tinycap.training.columns import Columns
from tinycap.training.data import cache_size, decode_row, image_key, undecoded
from tinycap.training.folders import UNREADABLE
from tinycap.training.skipped_rows import SkippedRows


# Before this many rows, a single bad row may exceed the tolerated share.
MIN_ROWS_TO_JUDGE = 100


@dataclass(eq=False, kw_only=True)
class StreamingCaptionDataset(SampleMaker, IterableDataset):
    """The samples of a `CaptionDataset`, from a stream; each process, and in it each worker, reads its own shards.
    Images are mixed with others of their block.

    The order of the shards is shuffled each epoch, and so are the rows of each block. Unlike `datasets`' shuffle
    buffer, a block and the position in it can be saved: `state_dict` is the stream's position, and `load_state_dict`
    continues there, reading only the current block again.

    Args (others: see `SampleMaker`):
        columns: of `rows`.
        skipped: counts bad rows; each worker counts its own.
        split: the split's name, for the report.
        known: `image_key`s of images to leave out.
        process_index, num_processes: which share of the stream is this process's.
        shuffle_block: rows that are shuffled together.

    Raises:
        ValueError: (while iterating) a shard can't be read.
    """

    columns: Columns
    skipped: SkippedRows
    split: str
    known: frozenset[str] = frozenset()
    process_index: int = 0
    num_processes: int = 1
    shuffle_block: int = 1000

    def __post_init__(self):
        # Only the order of the shards: a buffer of one row holds nothing that a state would have to save.
        rows = undecoded(self.rows).shuffle(self.seed, buffer_size=1, max_buffer_input_shards=1)
        self.rows = split_dataset_by_node(rows, rank=self.process_index, world_size=self.num_processes)
        self.num_seen = 0
        self.position = self.resumed = None

    @property
    def epoch(self) -> int:
        """In memory that a loader's workers share, so that they stay from epoch to epoch."""
        return self.rows.epoch

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)

    def state_dict(self) -> dict | None:
        """The stream's position, as JSON; `None` before its first row."""
        return copy.deepcopy(self.position)

    def load_state_dict(self, state: dict | None) -> None:
        """Lets the next iteration start at `state` instead of the beginning of the epoch."""
        self.resumed = state

    def _next_rows(self, stream: Iterator[dict], first: int) -> list[dict]:
        """The next block of rows, from number `first` on."""
        rows = []
        try:
            rows.extend(islice(stream, self.shuffle_block))
        except UNREADABLE as error:
            where = f"split {self.split}: cannot be read after {first + len(rows)} rows"
            raise ValueError(f"{where}: {error.__cause__ or error}") from error
        return rows

    def _decoded(self, row: dict, name: str) -> dict | None:
        if self.known and image_key(row, 0, self.columns)["key"] in self.known:
            return None
        return decode_row(row, name, self.columns, cache_size(self.image_size))

    def _draw_row(self, rows: list[dict], rng: random.Random) -> dict:
        """A usable one of the block's rows, which holds at least one; bad ones are counted in their own turn."""
        while (decoded := self._decoded(rows[rng.randrange(len(rows))], "")) is None or decoded["reason"]:
            pass
        return decoded

    def __iter__(self) -> Iterator[dict]:
        start, self.resumed = self.resumed or {"block": 0, "given": 0, "stream": None}, None
        # Before the first sample: a loader saves the state in which its workers begin another epoch.
        self.position = None
        return self._samples(start)

    def _samples(self, start: dict) -> Iterator[dict]:
        worker = get_worker_info()
        share = f"{self.process_index}.{worker.id if worker else 0}"
        if start["stream"] is not None:
            self.rows.load_state_dict(start["stream"])
        stream = iter(self.rows)
        while rows := self._next_rows(stream, start["block"] * self.shuffle_block):
            order = list(range(len(rows)))
            random.Random(f"{self.seed}/{self.epoch}/{share}/block {start['block']}").shuffle(order)
            for place in range(start["given"], len(rows)):
                self.position = {**start, "given": place + 1}
                index = start["block"] * self.shuffle_block + order[place]
                name = f"{share}/{index}"
                decoded = self._decoded(rows[order[place]], name)
                if decoded is None:
                    continue
                self.num_seen += 1
                if not decoded["reason"]:
                    others = partial(self._draw_row, rows)
                    yield self.make_sample(decoded, name, self.epoch, self.epoch, others)
                    continue
                self.skipped.add(self.split, None, decoded["image_id"], decoded["reason"])
                if self.num_seen > MIN_ROWS_TO_JUDGE:
                    self.skipped.check(self.split, self.num_seen)
            start = {"block": start["block"] + 1, "given": 0, "stream": copy.deepcopy(self.rows.state_dict())}


class EndlessStream(StreamingCaptionDataset):
    """A stream that begins another pass where one ends; the pass is its epoch, and part of its position."""

    def state_dict(self) -> dict | None:
        position = super().state_dict()
        return position and {"pass": self.epoch, **position}

    def __iter__(self) -> Iterator[dict]:
        # Each worker has passes of its own.
        self.rows = copy.deepcopy(self.rows)
        is_whole = self.resumed is None
        if not is_whole:
            self.set_epoch(self.resumed["pass"])
        while True:
            is_empty = True
            for sample in super().__iter__():
                is_empty = False
                yield sample
            # A worker without shards, or without a usable row.
            if is_whole and is_empty:
                return
            self.set_epoch(self.epoch + 1)
            is_whole = True
