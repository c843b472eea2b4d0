"""The pieces of a training loop that both training scripts share."""

import logging
import os
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


def use_all_cores(accelerator: Accelerator) -> None:
    """Lets one process on a CPU use all its cores.

    `accelerate launch` sets OMP_NUM_THREADS to 1 where it wasn't told to expect a CPU, and training takes twice as long
    on two cores. Where nobody launched, or several processes share the cores, the environment says what is wanted.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1 and launched:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(cores)


def set_up_logging(accelerator: Accelerator) -> None:
    """One line a message; the libraries speak up on each machine's first process only."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO
    )
    for library in (datasets.utils.logging, transformers.utils.logging):
        library.set_verbosity_warning() if accelerator.is_local_main_process else library.set_verbosity_error()
    for chatty in ("httpx", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
