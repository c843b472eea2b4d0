"""The pieces of a training loop that both training scripts share."""

import logging
from collections.abc import Iterator

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from tinycap.training.data import StreamingCaptionDataset


class NonFiniteLossError(FloatingPointError):
    """The loss became infinite or no number at all; the run stops, its last checkpoint is intact."""


def check_finite(losses: dict[str, torch.Tensor], step: int, image_ids: list[str]) -> None:
    """Raises `NonFiniteLossError`, naming the step, the losses and the batch's photos, unless all are finite."""
    if all(torch.isfinite(loss) for loss in losses.values()):
        return
    raise NonFiniteLossError(
        f"step {step}: expected finite losses, got { ({name: loss.item() for name, loss in losses.items()}) } on the "
        f"photos with the ids {', '.join(image_ids)}; the last checkpoint is intact, and a lower --learning_rate or a "
        "look at these photos is what usually helps"
    )


def epoch_batches(accelerator: Accelerator, loader: DataLoader, epoch: int, skip: int) -> Iterator[dict]:
    """The batches of one epoch from the `skip`-th on, on the device."""
    if isinstance(loader.dataset, StreamingCaptionDataset):
        # Not accelerate's to divide: each process reads its own shards of the stream.
        loader.dataset.set_epoch(epoch)
        for index, batch in enumerate(loader):
            if index >= skip:
                yield send_to_device(batch, accelerator.device)
        return
    if skip:
        loader = accelerator.skip_first_batches(loader, skip)
    loader.set_epoch(epoch)
    yield from loader


def set_up_logging(accelerator: Accelerator) -> None:
    """One line a message; the libraries speak up on each machine's first process only."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO
    )
    for library in (datasets.utils.logging, transformers.utils.logging):
        library.set_verbosity_warning() if accelerator.is_local_main_process else library.set_verbosity_error()
    for chatty in ("httpx", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
