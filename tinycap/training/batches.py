"""Decoded images to batches: samples, the order of an epoch, tensors.

An image is encoded once for all its captions of a step: a batch holds B images and B x K captions. Everything random
follows from (seed, epoch, row), never from a worker's state.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import datasets
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from tinycap.training.augmentation import Augmentation
from tinycap.training.tokenizer import encode_captions


@dataclass(eq=False)
class SampleMaker:
    """Makes samples of rows (decoded, or of a stream).

    Args:
        image_size: side of the square images, pixels.
        captions_per_image: captions to draw, without repeats while there are enough; `None` for all.
        seed: with the epoch and the row, fixes every draw.
    """

    rows: datasets.Dataset | datasets.IterableDataset
    image_size: int
    augmentation: Augmentation = Augmentation()
    captions_per_image: int | None = None
    seed: int = 0

    def make_sample(self, row: dict, index: int | str, epoch: int, view: int) -> dict:
        """`pixels`, `gain`, `shift` (see `Augmentation`) follow from (seed, view, index), `captions` from (seed, epoch,
        index); `references` are all captions."""
        captions = list(row["captions"])
        if self.captions_per_image is not None:
            random.Random(f"{self.seed}/{epoch}/{index}").shuffle(captions)
            captions = [captions[i % len(captions)] for i in range(self.captions_per_image)]
        image = self.augmentation(row, self.image_size, random.Random(f"picture/{self.seed}/{view}/{index}"))
        return {**image, "captions": captions, "references": row["captions"], "image_id": row["image_id"]}


@dataclass(eq=False)
class CaptionDataset(SampleMaker, Dataset):
    """Samples of decoded rows, drawn anew in every epoch; see `SampleMaker`.

    A key is `(epoch, row)`, so that workers need not know the epoch, or a row of epoch 0. With a `TeacherCache`, epochs
    cycle through its views, and samples carry `teacher_embeds`, the teacher's embedding of their view; `image_embeds`
    instead where it is a frozen student's (`caches_student`).
    """

    teacher_cache: Callable[[int, int], torch.Tensor] | None = None
    caches_student: bool = False

    def in_size(self, image_size: int) -> "CaptionDataset":
        """The same crops of the same images, resized to another side (pixels), without a teacher cache."""
        return replace(self, image_size=image_size, teacher_cache=None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        view = epoch if self.teacher_cache is None else epoch % self.teacher_cache.num_views
        sample = self.make_sample(self.rows[index], index, epoch, view)
        rng = random.Random(f"mixup/{self.seed}/{view}/{index}")
        if self.augmentation.mixup > 0 and rng.random() < self.augmentation.mixup:
            other = self.augmentation(self.rows[rng.randrange(len(self))], self.image_size, rng)["pixels"]
            # The image's own share is the larger one; the other image is mixed at its own index.
            mixed = torch.lerp(sample["pixels"].float(), other.float(), rng.uniform(0.0, 0.5))
            sample.update(pixels=mixed.round_().to(torch.uint8), mixed=True)
        if self.teacher_cache is not None:
            sample["image_embeds" if self.caches_student else "teacher_embeds"] = self.teacher_cache(view, index)
        return sample


@dataclass(eq=False)
class EpochBatchSampler(Sampler):
    """A process's share of the images of every step; yields lists of `(epoch, row)`.

    What all processes take together in a step follows from (seed, epoch) and the step's size only: two processes with
    batches of 8 see what one sees with batches of 16. Every image comes exactly once an epoch, and the steps of an
    epoch differ by one image at most. `equal` drops what doesn't fill a batch of every process, for objectives that
    compare a batch's images.

    Raises:
        ValueError: there are too few images for the processes.
    """

    num_rows: int
    batch_size: int
    seed: int
    process_index: int = 0
    num_processes: int = 1
    equal: bool = False
    epoch: int = 0
    first_batch: int = 0

    def __post_init__(self):
        step_size, self.used_rows = self.batch_size * self.num_processes, self.num_rows
        # At least one image for each process.
        self.num_batches = min(-(-self.num_rows // step_size), self.num_rows // self.num_processes)
        if self.equal:
            self.num_batches = self.num_rows // step_size
            self.used_rows = self.num_batches * step_size
        if not self.num_batches:
            raise ValueError(
                f"expected {f'a batch of {self.batch_size}' if self.equal else 'one'} of the training images for each "
                f"of {self.num_processes} processes, got {self.num_rows} images"
            )

    def set_position(self, epoch: int, batch: int) -> None:
        """Sets the next epoch, and the batch it starts from."""
        self.epoch, self.first_batch = epoch, batch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = list(range(self.num_rows))
        random.Random(f"{self.seed}/{self.epoch}/-1").shuffle(order)
        shares = self.num_batches * self.num_processes
        for batch in range(self.first_batch, self.num_batches):
            share = batch * self.num_processes + self.process_index
            first, end = (self.used_rows * edge // shares for edge in (share, share + 1))
            yield [(self.epoch, row) for row in order[first:end]]


@dataclass
class CaptionCollator:
    """B samples with K captions each to a batch of tensors.

    Args:
        max_caption_length: ids a caption may have, the end token included.
        end_truncated: whether truncated captions have an end token, see `encode_captions`.
        image_mean, image_std: per channel, of pixels from 0 to 1.

    Returns (from a call):
        dict of `pixel_values` (B, 3, H, W) float32; `labels` (B * K, T) int64, the captions of an image in adjacent
        rows, each with its end token and -100 as padding, all -100 for a mixed image; `references`, B lists of all
        captions of an image; `image_ids`, B strings; `teacher_embeds` or `image_embeds` (B, embed_dim) where the
        samples carry them.
    """

    tokenizer: PreTrainedTokenizerBase
    max_caption_length: int
    image_mean: list[float]
    image_std: list[float]
    end_truncated: bool = True

    def __post_init__(self):
        self.image_mean, self.image_std = torch.tensor(self.image_mean), torch.tensor(self.image_std)

    def __call__(self, samples: list[dict]) -> dict:
        pixels = torch.stack([sample["pixels"] for sample in samples]).permute(0, 3, 1, 2).float()
        # Jitter, scaling to 0..1 and normalisation are one multiplication and one addition.
        gain = torch.tensor([sample["gain"] for sample in samples]) / (255 * self.image_std)
        shift = (torch.tensor([sample["shift"] for sample in samples]) - self.image_mean) / self.image_std
        captions = [caption for sample in samples for caption in sample["captions"]]
        encoded = encode_captions(self.tokenizer, captions, self.max_caption_length, self.end_truncated)
        labels = pad_sequence([torch.tensor(ids) for ids in encoded], batch_first=True, padding_value=-100)
        labels[torch.tensor([sample.get("mixed", False) for sample in samples for _ in sample["captions"]])] = -100
        batch = {
            "pixel_values": pixels.mul_(gain[:, :, None, None]).add_(shift[:, :, None, None]).contiguous(),
            "labels": labels,
            "references": [sample["references"] for sample in samples],
            "image_ids": [sample["image_id"] for sample in samples],
        }
        for name in {"teacher_embeds", "image_embeds"} & samples[0].keys():
            batch[name] = torch.stack([sample[name] for sample in samples])
        return batch

    def dummy_batch(self, image_size: int, captions_per_image: int) -> dict:
        """A batch of one black image with empty captions, for a process without images where others have some."""
        pixels = torch.zeros(image_size, image_size, 3, dtype=torch.uint8)
        sample = {"pixels": pixels, "gain": [1.0] * 3, "shift": [0.0] * 3, "references": [], "image_id": ""}
        return self([{**sample, "captions": [""] * captions_per_image}])


def image_inputs(batch: dict) -> dict:
    """What a model captions, by the names of its arguments: pixels, or a frozen student's embeddings of them."""
    if "image_embeds" in batch:
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=batch["image_embeds"].unsqueeze(1))}
    return {"pixel_values": batch["pixel_values"]}
