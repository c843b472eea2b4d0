"""Samples from a dataset too large for the disk: decoded on the fly, shuffled block by block."""

import copy
from collections.abc import Iterator
from itertools import islice

import datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from tinycap.training.batches import SampleMaker, sample_rng
from tinycap.training.data import Columns, cache_size, decode_row, undecoded
from tinycap.training.folders import UNREADABLE
from tinycap.training.skipped_rows import SkippedRows


# Before this many rows, a single bad row may exceed the tolerated share.
MIN_ROWS_TO_JUDGE = 100


class StreamingCaptionDataset(SampleMaker, IterableDataset):
    """The samples of a `CaptionDataset`, from a stream.

    The order of the shards is shuffled each epoch, and so are the rows of each block. Unlike `datasets`' shuffle
    buffer, a block and the position in it can be saved: `state_dict` is the stream's position, and `load_state_dict`
    continues there, reading only the current block again.

    Args:
        dataset: a `datasets.IterableDataset`; each process, and in it each worker, reads its own shards.
        skipped: counts bad rows; each worker counts its own.
        split: the split's name, for the report.
        process_index, num_processes: which share of the stream is this process's.
        shuffle_block: rows that are shuffled together; 0 keeps the order.
        Others: as in `SampleMaker`.

    Raises:
        ValueError: the augmentation mixes images, or (while iterating) a shard can't be read.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        columns: Columns,
        image_size: int,
        skipped: SkippedRows,
        split: str,
        *args,
        process_index: int = 0,
        num_processes: int = 1,
        shuffle_block: int = 1000,
        **kwargs,
    ):
        super().__init__(image_size, *args, **kwargs)
        if (mixup := self.augmentation.mixup) > 0:
            raise ValueError(f"mixup: expected 0 for a stream, which holds no other photo, got {mixup}")
        dataset = undecoded(dataset, columns.image)
        if shuffle_block:
            # Only the order of the shards: a buffer of one row holds nothing that a state would have to save.
            dataset = dataset.shuffle(seed=self.seed, buffer_size=1, max_buffer_input_shards=1)
        self.dataset = split_dataset_by_node(dataset, rank=process_index, world_size=num_processes)
        self.columns = columns
        self.skipped = skipped
        self.split = split
        self.process_index = process_index
        self.shuffle_block = shuffle_block
        self.epoch = 0
        self.position = self.resumed = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def state_dict(self) -> dict | None:
        """The stream's position, as JSON; `None` before its first row."""
        return copy.deepcopy(self.position)

    def load_state_dict(self, state: dict | None) -> None:
        """Lets the next iteration start at `state` instead of the beginning of the epoch."""
        self.resumed = state

    def _next_rows(self, stream: Iterator[dict], size: int, first: int) -> list[dict]:
        """The next block of rows, from number `first` on."""
        rows = []
        try:
            for row in islice(stream, size):
                rows.append(row)
        except UNREADABLE as error:
            where = f"split {self.split}: cannot be read after {first + len(rows)} rows"
            raise ValueError(f"{where}: {error.__cause__ or error}") from error
        return rows

    def __iter__(self) -> Iterator[dict]:
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
                name = f"{share}/{index}"
                decoded = decode_row(rows[order[place]], name, self.columns, cache_size(self.image_size))
                if not decoded["reason"]:
                    yield self.make_sample(decoded, name, self.epoch, self.epoch)
                    continue
                self.skipped.add(self.split, None, decoded["image_id"], decoded["reason"])
                if index >= MIN_ROWS_TO_JUDGE:
                    self.skipped.check(self.split, index + 1)
            block, given, block_start = block + 1, 0, copy.deepcopy(self.dataset.state_dict())
