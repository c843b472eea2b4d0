"""Loads both splits of a run and creates its data loaders, for both training scripts."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import datasets
from accelerate import Accelerator
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from tinycap.pipeline_tinycap import usable_workers
from tinycap.training.augmentation import Augmentation
from tinycap.training.batches import CaptionCollator, CaptionDataset, EpochBatchSampler
from tinycap.training.captions import usable_captions
from tinycap.training.data import Columns, content_fingerprint, decode_dataset, load_splits, resolve_columns
from tinycap.training.loop import TrainBatches, init_worker, main_process_first
from tinycap.training.scenes import scene_splits
from tinycap.training.skipped_rows import SkippedRows
from tinycap.training.streaming import StreamingCaptionDataset
from tinycap.training.teacher import Teacher
from tinycap.training.teacher_cache import FrozenStudent, build_teacher_cache


# Arguments of `load_splits`.
SPLIT_FLAGS = {
    *("dataset_name", "dataset_config_name", "train_split", "validation_split", "max_train_samples"),
    *("max_eval_samples", "streaming", "seed", "image_column", "caption_column", "allow_remote_images"),
}


@dataclass
class Data:
    """Both splits.

    Args:
        columns: of images and captions.
        train, validation: decoded rows; `train` is `None` for a stream, which is decoded while training.
        stream: undecoded training rows with images and captions; `None` for a data set.
        scenes: the true scenes of the validation images (JSON), where the images are drawn.
    """

    columns: Columns
    train: datasets.Dataset | None
    validation: datasets.Dataset
    stream: datasets.IterableDataset | None = None
    scenes: list[str] | None = None

    @property
    def fingerprint(self) -> str | None:
        """The `content_fingerprint` of `train`; `None` for a stream."""
        return None if self.train is None else content_fingerprint(self.train)

    def captions(self, num_rows: int = 100_000) -> Iterator[str]:
        """The captions to train a tokenizer on: all of a data set, or those of a stream's first `num_rows`."""
        if self.train is not None:
            return chain.from_iterable(self.train["captions"])
        rows = self.stream.select_columns(self.columns.captions).take(num_rows)
        return (caption for row in rows for caption in usable_captions(row.values()))


def load_data(
    args: argparse.Namespace, accelerator: Accelerator, image_size: int, stored_size: int, skipped: SkippedRows
) -> Data:
    """Loads or draws both splits and decodes them into the cache; sets the columns in `args` to those found.

    Args:
        image_size: side of the model's images, pixels.
        stored_size: side of the largest crop that a model is given, pixels.
        skipped: counts the unusable rows.
    """
    workers, scenes = args.preprocessing_num_workers, None
    # One process decodes into the cache, the others read it.
    with main_process_first(accelerator):
        if args.dataset_name is None:
            drawn = scene_splits(args.max_train_samples, args.max_eval_samples, args.seed, image_size)
            train, validation, scenes = drawn["train"], drawn["validation"], drawn["validation"]["scene"]
            columns = resolve_columns(train)
        else:
            flags = {name: value for name, value in vars(args).items() if name in SPLIT_FLAGS}
            train, validation = load_splits(**flags, num_proc=workers)
            source = (args.dataset_name, args.allow_remote_images)
            columns = resolve_columns(train, args.image_column, args.caption_column, *source)
            # Recorded for an evaluation of the same rows.
            args.image_column, args.caption_column = columns.image, columns.caption
        split = args.validation_split or "validation"
        validation = decode_dataset(validation, columns, stored_size, skipped, split, workers)
        if isinstance(train, datasets.IterableDataset):
            return Data(columns, None, validation, train)
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
    variation = (image_size, augmentation, args.captions_per_image, args.seed)
    process = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    batch_size, captions_per_image = args.per_device_train_batch_size, args.captions_per_image
    options = {
        "collate_fn": collator,
        "worker_init_fn": init_worker,
        "pin_memory": accelerator.device.type == "cuda",
    }
    image_bytes, eval_batch_size = 4 * 3 * image_size**2, args.per_device_eval_batch_size
    workers, eval_workers = (
        usable_workers(args.dataloader_num_workers, size * image_bytes, in_use)
        for size, in_use in ((batch_size, args.gradient_accumulation_steps), (eval_batch_size, 1))
    )
    if data.stream is not None:
        source = {"columns": data.columns, "skipped": skipped, "split": args.train_split}
        stream = StreamingCaptionDataset(data.stream, *variation, **source, **process)
        # Workers are started anew each epoch, since they get the epoch when they start.
        train_loader = StatefulDataLoader(stream, batch_size, num_workers=workers, **options)
    else:
        dataset = CaptionDataset(data.train, *variation)
        if contrastive:
            batch_size = min(batch_size, len(dataset) // accelerator.num_processes)
            captions_per_image = min(5, max(map(len, data.validation["captions"])))
        sampler = EpochBatchSampler(len(dataset), batch_size, args.seed, **process, equal=contrastive)
        persistent = {"num_workers": workers, "persistent_workers": workers > 0}
        train_loader = DataLoader(dataset, batch_sampler=sampler, **options, **persistent)
    validation = CaptionDataset(data.validation, image_size, Augmentation(), captions_per_image, args.seed)
    persistent = {"num_workers": eval_workers, "persistent_workers": eval_workers > 0}
    validation_loader = DataLoader(validation, eval_batch_size, **options, **persistent)
    return TrainBatches(train_loader, accelerator.device), accelerator.prepare(validation_loader)


def cache_teacher_embeddings(
    args: argparse.Namespace,
    accelerator: Accelerator,
    teacher: Teacher | FrozenStudent,
    data: Data,
    loaders: tuple[TrainBatches, DataLoader],
    teacher_crop_size: int,
) -> None:
    """Computes the teacher's embeddings once, so that the batches of both loaders carry them; a frozen student's only
    for training.

    Args:
        teacher_crop_size: side of the crops that the teacher sees, pixels; it may be larger than the student's.
    """
    collator = loaders[0].loader.collate_fn
    options = {"batch_size": args.per_device_eval_batch_size, "num_workers": args.dataloader_num_workers}
    parts = [(loaders[0].loader.dataset, args.teacher_views, data.fingerprint)]
    if isinstance(teacher, FrozenStudent):
        loaders[0].loader.dataset.caches_student = True
    else:
        # Validation images are always cropped alike: one view.
        parts.append((loaders[1].dataset, 1, content_fingerprint(data.validation)))
    for dataset, num_views, fingerprint in parts:
        crops, options["dataset_fingerprint"] = dataset.in_size(teacher_crop_size), fingerprint
        dataset.teacher_cache = build_teacher_cache(
            accelerator, teacher, crops, collator, args.teacher_cache_dir, num_views, **options
        )
