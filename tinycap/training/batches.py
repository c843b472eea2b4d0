"""Decoded images to batches: samples, the order of an epoch, tensors.

An image is encoded once for all its captions of a step: a batch holds B images and B x K captions. Everything random
follows from (seed, epoch, row), never from a worker's state.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count

import datasets
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from tinycap.training.augmentation import Augmentation, View
from tinycap.training.device_images import pack_views
from tinycap.training.tokenizer import encode_captions


@dataclass(eq=False)
class SampleMaker:
    """Makes samples of rows (decoded, or of a stream).

    Args:
        image_size: side of the square images, pixels.
        captions_per_image: captions to draw, without repeats while there are enough; `None` for all.
        seed: with the epoch and the row, fixes every draw.
        on_device: samples have no pixels: a `DevicePixels` computes them where the model is.
        without_pixels: samples have no pixels: cached embeddings stand for the images.
    """

    rows: datasets.Dataset | datasets.IterableDataset
    image_size: int
    augmentation: Augmentation = Augmentation()
    captions_per_image: int | None = None
    seed: int = 0
    on_device: bool = False
    without_pixels: bool = False

    def make_sample(self, row: dict, index: int | str, epoch: int, view: int, draw_row: Callable) -> dict:
        """The `view` (see `View`) and its `pixels` follow from (seed, view, index), `captions` from (seed, epoch,
        index); `references` are all captions. An image without captions has empty ones, and no references; a `mixed`
        one holds a row of `draw_row` too, see `Augmentation`."""
        captions = list(row["captions"]) or [""]
        if self.captions_per_image is not None:
            random.Random(f"{self.seed}/{epoch}/{index}").shuffle(captions)
            captions = [captions[i % len(captions)] for i in range(self.captions_per_image)]
        drawn = self.augmentation.draw_view(row, random.Random(f"picture/{self.seed}/{view}/{index}"))
        self.augmentation.draw_mixing(drawn, draw_row, random.Random(f"mixup/{self.seed}/{view}/{index}"))
        sample = {"view": drawn, "mixed": drawn.other is not None, "image_id": row["image_id"]}
        if self.on_device:
            sample["image_size"] = self.image_size
        elif not self.without_pixels:
            sample["pixels"] = drawn.pixels(self.image_size)
        return {**sample, "captions": captions, "references": row["captions"]}


@dataclass(eq=False)
class CaptionDataset(SampleMaker, Dataset):
    """Samples of decoded rows, drawn anew in every epoch; see `SampleMaker`.

    A key is `(epoch, row)`, so that workers need not know the epoch, or a row of epoch 0. With a `TeacherCache`, epochs
    cycle through its views, and samples carry `teacher_embeds`, the teacher's embedding of their view; `without_pixels`
    it is called `image_embeds`.

    Args:
        offsets: of every row in a `DevicePixels` that holds all images, which aren't read here then.
    """

    teacher_cache: Callable[[int, int], torch.Tensor] | None = None
    offsets: Sequence[int] | None = None

    def in_size(self, image_size: int) -> "CaptionDataset":
        """The same crops of the same images, resized to another side (pixels) on the CPU, without a teacher cache."""
        replaced = {"teacher_cache": None, "on_device": False, "without_pixels": False, "offsets": None}
        return replace(self, image_size=image_size, **replaced)

    @cached_property
    def read_rows(self) -> datasets.Dataset:
        return self.rows.remove_columns("pixels") if self.offsets is not None or self.without_pixels else self.rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        view = epoch if self.teacher_cache is None else epoch % self.teacher_cache.num_views
        sample = self.make_sample(self._row(index), index, epoch, view, self._draw_row)
        if self.teacher_cache is not None:
            sample["image_embeds" if self.without_pixels else "teacher_embeds"] = self.teacher_cache(view, index)
        return sample

    def _row(self, index: int) -> dict:
        row = self.read_rows[index]
        return row if self.offsets is None else {**row, "offset": self.offsets[index]}

    def _draw_row(self, rng: random.Random) -> dict:
        return self._row(rng.randrange(len(self)))


@dataclass(eq=False)
class EpochBatchSampler(Sampler):
    """A process's share of the images of every step; yields lists of `(epoch, row)`, epoch after epoch without end, so
    that a loader prepares an epoch's first batches while the one before ends.

    What all processes take together in a step follows from (seed, epoch) and the step's size only: two processes with
    batches of 8 see what one sees with batches of 16. Every image comes exactly once an epoch, and the steps of an
    epoch differ by one image at most. `equal` drops what doesn't fill a batch of every process, for objectives that
    compare a batch's images. `order` returns the keys of an epoch's `num_rows` images in their order, where it isn't a
    shuffled pass over all rows.

    Raises:
        ValueError: there are too few images for the processes.
    """

    num_rows: int
    batch_size: int
    seed: int
    process_index: int = 0
    num_processes: int = 1
    equal: bool = False
    order: Callable[[int], list[tuple[int, int]]] | None = None
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
        """Sets the epoch and the batch that the next iteration starts from."""
        self.epoch, self.first_batch = epoch, batch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        yield from self.epoch_batches(self.epoch, self.first_batch)
        for epoch in count(self.epoch + 1):
            yield from self.epoch_batches(epoch)

    def epoch_batches(self, epoch: int, first_batch: int = 0) -> Iterator[list[tuple[int, int]]]:
        """The batches of one epoch."""
        keys = (self.order or self._shuffled)(epoch)
        shares = self.num_batches * self.num_processes
        for batch in range(first_batch, self.num_batches):
            share = batch * self.num_processes + self.process_index
            first, end = (self.used_rows * edge // shares for edge in (share, share + 1))
            yield keys[first:end]

    def _shuffled(self, epoch: int) -> list[tuple[int, int]]:
        rows = list(range(self.num_rows))
        random.Random(f"{self.seed}/{epoch}/-1").shuffle(rows)
        return [(epoch, row) for row in rows]


@dataclass
class CaptionCollator:
    """B samples with K captions each to a batch of tensors, C of them neither mixed nor without captions.

    Args:
        max_caption_length: ids a caption may have, the end token included.
        end_truncated: whether truncated captions have an end token, see `encode_captions`.
        image_mean, image_std: per channel, of pixels from 0 to 1.

    Returns (from a call):
        dict of `pixel_values` (B, 3, H, W) float32, or the `views` that `DevicePixels` makes them of, where samples
        have pixels; `teacher_embeds` or `image_embeds` (B, embed_dim) where they carry them; `captioned` (C,), their
        numbers; `labels` (C * K, T) int64, their captions, those of an image in adjacent rows, each with its end token
        and -100 as padding; `num_tokens`, how many labels aren't -100; `references`, B lists of all captions of an
        image; `image_ids`, B strings. With C = 0, `captioned` is the first image, and its labels are all -100.
    """

    tokenizer: PreTrainedTokenizerBase
    max_caption_length: int
    image_mean: list[float]
    image_std: list[float]
    end_truncated: bool = True

    def __post_init__(self):
        self.image_mean, self.image_std = torch.tensor(self.image_mean), torch.tensor(self.image_std)

    def __call__(self, samples: list[dict]) -> dict:
        views = [sample["view"] for sample in samples]
        # Jitter, scaling to 0..1 and normalisation are one multiplication and one addition.
        gain = torch.tensor([view.gain for view in views]) / (255 * self.image_std)
        shift = (torch.tensor([view.shift for view in views]) - self.image_mean) / self.image_std
        # Only the teacher describes the others. Without any, one image's labels of -100 keep the decoder in the graph.
        captioned = [number for number, sample in enumerate(samples) if sample["references"] and not sample["mixed"]]
        captions = [caption for number in captioned or [0] for caption in samples[number]["captions"]]
        encoded = encode_captions(self.tokenizer, captions, self.max_caption_length, self.end_truncated)
        labels = pad_sequence([torch.tensor(ids) for ids in encoded], batch_first=True, padding_value=-100)
        if not captioned:
            labels.fill_(-100)
        embeds = {"teacher_embeds", "image_embeds"} & samples[0].keys()
        images = {name: torch.stack([sample[name] for sample in samples]) for name in embeds}
        if "pixels" in samples[0]:
            pixels = torch.stack([sample["pixels"] for sample in samples]).permute(0, 3, 1, 2).float()
            pixels = pixels.mul_(gain[:, :, None, None]).add_(shift[:, :, None, None]).contiguous()
            images["pixel_values"] = pixels
        elif "image_size" in samples[0]:
            images["views"] = {**pack_views(views, samples[0]["image_size"]), "gain": gain, "shift": shift}
        return {
            **images,
            "labels": labels,
            "captioned": torch.tensor(captioned or [0]),
            # Counted here: on a device, the count would wait for all its work.
            "num_tokens": int((labels != -100).sum()),
            "references": [sample["references"] for sample in samples],
            "image_ids": [sample["image_id"] for sample in samples],
        }

    def dummy_batch(self, image_size: int, captions_per_image: int) -> dict:
        """A batch of one black image with empty captions, for a process without images where others have some."""
        pixels = torch.zeros(image_size, image_size, 3, dtype=torch.uint8)
        sample = {"pixels": pixels, "view": View(None), "mixed": False, "references": [], "image_id": ""}
        return self([{**sample, "captions": [""] * captions_per_image}])


def join_batches(batch: dict, uncaptioned: dict) -> dict:
    """One batch of the images of two, the second of which has no captions."""
    joined = {
        name: torch.cat([value, uncaptioned[name]]) if isinstance(value, torch.Tensor) else value + uncaptioned[name]
        for name, value in batch.items()
        if name not in ("labels", "captioned")
    }
    return {**batch, **joined}


def image_inputs(batch: dict) -> dict:
    """What a model captions, by the names of its arguments: pixels, or a frozen student's embeddings of them."""
    if "image_embeds" in batch:
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=batch["image_embeds"].unsqueeze(1))}
    return {"pixel_values": batch["pixel_values"]}
