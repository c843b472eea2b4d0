"""Loads both splits of a run and creates its data loaders, for both training scripts."""

import argparse
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import datasets
from accelerate import Accelerator
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from tinycap.training.batches import Augmentation, CaptionCollator, CaptionDataset, EpochBatchSampler
from tinycap.training.data import Columns, content_fingerprint, decode_dataset, load_splits, resolve_columns
from tinycap.training.loop import TrainBatches, ignore_interrupts
from tinycap.training.scenes import scene_splits
from tinycap.training.skipped_rows import SkippedRows
from tinycap.training.streaming import StreamingCaptionDataset
from tinycap.training.teacher import Teacher
from tinycap.training.teacher_cache import build_teacher_cache


@dataclass
class Data:
    """Both splits.

    Args:
        columns: of images and captions.
        train: decoded rows; `None` for a stream, which is decoded while training.
        validation: decoded rows.
        stream: undecoded training rows with images and captions; `None` for a data set.
        scenes: the true scenes of the validation images (JSON), where the images are drawn.
    """

    columns: Columns
    train: datasets.Dataset | None
    validation: datasets.Dataset
    stream: datasets.IterableDataset | None = None
    scenes: list[str] | None = None

    @cached_property
    def fingerprint(self) -> str | None:
        """The `content_fingerprint` of `train`; `None` for a stream."""
        return None if self.train is None else content_fingerprint(self.train)

    def captions(self, num_streamed: int = 100_000) -> Iterator[str]:
        """The captions to train a tokenizer on: all of a data set, or those of the first rows of a stream."""
        if self.train is not None:
            yield from chain.from_iterable(self.train["captions"])
            return
        for row in self.stream.select_columns(self.columns.captions).take(num_streamed):
            with suppress(ValueError):
                yield from self.columns.captions_of(row)


def load_data(
    args: argparse.Namespace, accelerator: Accelerator, image_size: int, stored_size: int, skipped: SkippedRows
) -> Data:
    """Loads or draws both splits and decodes them into the cache; sets the columns in `args` to those found.

    Args:
        image_size: side of the model's images, pixels.
        stored_size: side of the largest crop that a model is given, pixels.
        skipped: counts the unusable rows.
    """
    streaming, scenes, workers = getattr(args, "streaming", False), None, args.preprocessing_num_workers
    # One process decodes into the cache, the others read it.
    with accelerator.main_process_first():
        if args.dataset_name is None:
            drawn = scene_splits(args.max_train_samples, args.max_eval_samples, args.seed, image_size)
            train, validation, scenes = drawn["train"], drawn["validation"], drawn["validation"]["scene"]
        else:
            train, validation = load_splits(
                args.dataset_name,
                args.dataset_config_name,
                args.train_split,
                args.validation_split,
                args.max_train_samples,
                args.max_eval_samples,
                streaming,
                args.seed,
                args.image_column,
                args.caption_column,
                workers,
            )
        columns = resolve_columns(train, args.image_column, args.caption_column)
        if args.dataset_name is not None:
            # Recorded for an evaluation of the same rows.
            args.image_column, args.caption_column = columns.image, columns.caption
        split = args.validation_split or "validation"
        validation = decode_dataset(validation, columns, stored_size, skipped, split, workers)
        if streaming:
            return Data(columns, None, validation, train, scenes)
        train = decode_dataset(train, columns, stored_size, skipped, args.train_split, workers)
        return Data(columns, train, validation, None, scenes)


def create_loaders(
    args: argparse.Namespace,
    accelerator: Accelerator,
    data: Data,
    collator: CaptionCollator,
    image_size: int,
    skipped: SkippedRows,
    contrastive: bool = False,
) -> tuple[TrainBatches, DataLoader]:
    """This process's training batches, and the prepared loader of validation batches, in order.

    Args:
        contrastive: every image is compared with those of all processes, so that all have batches of one size; and
            retrieval is measured with five captions an image, as is usual, or with as many as there are.
    """
    augmentation = Augmentation(args.crop_scale, args.horizontal_flip, args.color_jitter, getattr(args, "mixup", 0.0))
    process = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    batch_size = args.per_device_train_batch_size
    common = {
        "collate_fn": collator,
        "num_workers": args.dataloader_num_workers,
        "worker_init_fn": ignore_interrupts,
        "pin_memory": accelerator.device.type == "cuda",
    }
    persistent = {"persistent_workers": args.dataloader_num_workers > 0}
    variation = (augmentation, args.captions_per_image, args.seed)
    if data.stream is not None:
        stream = StreamingCaptionDataset(
            data.stream, data.columns, image_size, skipped, args.train_split, *variation, **process
        )
        # Workers are started anew each epoch, since they get the epoch when they start.
        train_loader = StatefulDataLoader(stream, batch_size, **common)
    else:
        dataset = CaptionDataset(data.train, image_size, *variation)
        if contrastive:
            batch_size = min(batch_size, len(dataset) // accelerator.num_processes)
        sampler = EpochBatchSampler(len(dataset), batch_size, args.seed, **process, equal=contrastive)
        train_loader = DataLoader(dataset, batch_sampler=sampler, **common, **persistent)
    captions_per_image = args.captions_per_image
    if contrastive:
        captions_per_image = min(5, max(map(len, data.validation["captions"])))
    validation = CaptionDataset(data.validation, image_size, None, captions_per_image, args.seed)
    validation_loader = DataLoader(validation, args.per_device_eval_batch_size, **common, **persistent)
    return TrainBatches(train_loader, accelerator.device), accelerator.prepare(validation_loader)


def cache_teacher_embeddings(
    args: argparse.Namespace,
    accelerator: Accelerator,
    teacher: Teacher,
    data: Data,
    loaders: tuple[TrainBatches, DataLoader],
    teacher_crop_size: int,
) -> None:
    """Computes the teacher's embeddings once, so that the batches of both loaders carry them.

    Args:
        teacher_crop_size: side of the crops that the teacher sees, pixels; it may be larger than the student's.
    """
    batches, validation_loader = loaders
    train, validation = batches.loader.dataset, validation_loader.dataset
    # Validation images are always cropped alike: one view.
    for dataset, num_views, fingerprint in (
        (train, args.teacher_views, data.fingerprint),
        (validation, 1, content_fingerprint(data.validation)),
    ):
        dataset.teacher_cache = build_teacher_cache(
            accelerator,
            teacher,
            dataset.in_size(teacher_crop_size),
            batches.loader.collate_fn,
            args.teacher_cache_dir,
            num_views,
            args.per_device_eval_batch_size,
            fingerprint,
            args.dataloader_num_workers,
        )
