"""A process's training batches on its device, epoch by epoch and from any position on."""

from collections.abc import Iterator

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from tinycap.training.batches import join_batches
from tinycap.training.device_images import DevicePixels
from tinycap.training.streaming import StreamingCaptionDataset


class TrainBatches:
    """A process's training batches, from any position on; the next epoch's are prepared while one ends.

    Not prepared by accelerate, which repeats or drops images to give every process equally many batches: the loader's
    `EpochBatchSampler`, or its stream, selects this process's share.

    Args:
        pixels: computes `pixel_values` on the device where the loader leaves them to it.
        endless_loader: of an `EndlessStream`, one of whose batches joins each batch of the stream.
    """

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device,
        pixels: DevicePixels | None = None,
        endless_loader: StatefulDataLoader | None = None,
    ):
        self.loader, self.device, self.pixels = loader, device, pixels
        self.endless_loader, self.endless_batches = endless_loader, None
        self.is_stream = isinstance(loader.dataset, StreamingCaptionDataset)
        self.finished = False
        # The sampler's batches, and the epoch and the batch that the next one is of.
        self.iterator, self.position = None, None

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[dict]:
        """The batches of an epoch; a stream ignores `first_batch` and continues from `load_state_dict`."""
        if not self.is_stream:
            yield from self._epoch_of_sampler(epoch, first_batch)
            return
        self.loader.dataset.set_epoch(epoch)
        if not self.finished:
            for batch in self.loader:
                batch = self._on_device(batch)
                yield batch if self.endless_loader is None else join_batches(batch, self._next_endless())
        # Until all processes have finished, see `optimizer_steps`: a checkpoint in between must not restart the epoch.
        self.finished = True

    def _epoch_of_sampler(self, epoch: int, first_batch: int) -> Iterator[dict]:
        num_batches = len(self.loader)
        if self.position != (epoch, first_batch):
            self.loader.batch_sampler.set_position(epoch, first_batch)
            self.iterator = iter(self.loader)
        for number in range(first_batch, num_batches):
            batch = next(self.iterator)
            self.position = (epoch, number + 1) if number + 1 < num_batches else (epoch + 1, 0)
            yield self._on_device(batch)

    def _on_device(self, batch: dict) -> dict:
        # From pinned memory, without waiting for the device.
        batch = send_to_device(batch, self.device, non_blocking=self.device.type == "cuda")
        if "views" in batch:
            batch["pixel_values"] = self.pixels(batch.pop("views"))
        return batch

    def _next_endless(self) -> dict:
        if self.endless_batches is None:
            # It goes on from epoch to epoch.
            self.endless_batches = iter(self.endless_loader)
        batch = next(self.endless_batches, None)
        if batch is None:
            split = self.endless_loader.dataset.split
            raise ValueError(f"split {split}: expected at least one usable image for each process, got none")
        return self._on_device(batch)

    def state_dict(self) -> dict | None:
        """The position in a stream, as JSON; `None` for a data set, whose epoch and batch suffice."""
        if not self.is_stream:
            return None
        state = {"finished": self.finished, "loader": None if self.finished else self.loader.state_dict()}
        if self.endless_loader is not None:
            state["endless_loader"] = self.endless_loader.state_dict()
        return state

    def load_state_dict(self, state: dict | None) -> None:
        if state is not None:
            self.finished = state["finished"]
            if not self.finished:
                self.loader.load_state_dict(state["loader"])
            if self.endless_loader is not None:
                self.endless_loader.load_state_dict(state["endless_loader"])
