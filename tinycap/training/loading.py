"""Loads both splits of a run and creates its data loaders, for both training scripts."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain

import datasets
from accelerate import Accelerator
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from tinycap.pipeline_tinycap import usable_workers
from tinycap.training.augmentation import Augmentation
from tinycap.training.batches import CaptionCollator, CaptionDataset, EpochBatchSampler
from tinycap.training.captions import usable_captions
from tinycap.training.columns import Columns, resolve_columns
from tinycap.training.data import content_fingerprint, decode_dataset, image_keys, load_splits
from tinycap.training.device_images import DevicePixels, augments_on, load_images
from tinycap.training.loop import init_worker, main_process_first
from tinycap.training.scenes import scene_splits
from tinycap.training.skipped_rows import SkippedRows
from tinycap.training.streaming import EndlessStream, StreamingCaptionDataset
from tinycap.training.teacher import Teacher
from tinycap.training.teacher_cache import FrozenModel, build_teacher_cache
from tinycap.training.train_batches import TrainBatches
from tinycap.training.unlabelled import SharedOrder, Unlabelled, load_unlabelled


# Arguments of `load_splits`.
SPLIT_FLAGS = {
    *("dataset_name", "dataset_config_name", "train_split", "validation_split", "max_train_samples"),
    *("streaming", "seed", "image_column", "caption_column", "allow_remote_images", "allow_missing_captions"),
}


@dataclass
class Data:
    """Both splits.

    Args:
        columns: of images and captions.
        train, validation: decoded rows; `train` is `None` for a stream, which is decoded while training. Its last rows
            are the images of `--unlabelled_dataset_name`.
        stream: undecoded training rows with images and captions; `None` for a data set.
        scenes: the true scenes of the validation images (JSON), where the images are drawn.
        unlabelled_stream: further rows, without captions, to a `stream`.
    """

    columns: Columns
    train: datasets.Dataset | None
    validation: datasets.Dataset
    stream: datasets.IterableDataset | None = None
    scenes: list[str] | None = None
    unlabelled_stream: Unlabelled | None = None

    @property
    def fingerprint(self) -> str | None:
        """The `content_fingerprint` of `train`; `None` for a stream."""
        return None if self.train is None else content_fingerprint(self.train)

    @cached_property
    def unlabelled(self) -> list[int]:
        """Numbers of the rows of `train` without captions."""
        return [row for row, captions in enumerate(self.train["captions"]) if not captions]

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
    workers, limit, scenes, unlabelled = args.preprocessing_num_workers, args.max_eval_samples, None, None

    def decode(rows: datasets.Dataset, columns: Columns, split: str) -> datasets.Dataset:
        return decode_dataset(rows, columns, stored_size, skipped, split, workers)

    # One process decodes into the cache, the others read it.
    with main_process_first(accelerator):
        if args.dataset_name is None:
            drawn = scene_splits(args.max_train_samples, limit, args.seed, image_size)
            train, validation, scenes = drawn["train"], drawn["validation"], drawn["validation"]["scene"]
            columns = resolve_columns(train)
        else:
            flags = {name: value for name, value in vars(args).items() if name in SPLIT_FLAGS}
            # Of a data set all of them, so that no held-out image is trained on without its captions.
            flags["max_eval_samples"] = limit if flags.get("streaming") else None
            train, validation = load_splits(**flags, num_proc=workers)
            source = (args.dataset_name, args.allow_remote_images)
            columns = resolve_columns(train, args.image_column, args.caption_column, *source)
            # Recorded for an evaluation of the same rows.
            args.image_column, args.caption_column = columns.image, columns.caption
        if (more := getattr(args, "unlabelled_dataset_name", None)) is not None:
            # What a stream holds isn't known before it is read.
            others = [validation] if args.streaming else [validation, train]
            known = {key for rows in others for key in image_keys(rows, columns, workers)}
            options = (args.streaming, args.allow_remote_images, workers)
            unlabelled = load_unlabelled(more, args.unlabelled_split, known, *options)
        shown = validation.take(min(limit or len(validation), len(validation)))
        shown = decode(shown, columns, args.validation_split or "validation")
        columns = replace(columns, requires_captions=not getattr(args, "allow_missing_captions", False))
        if isinstance(train, datasets.IterableDataset):
            return Data(columns, None, shown, train, unlabelled_stream=unlabelled)
        train = decode(train, columns, args.train_split)
        if unlabelled is not None:
            more = decode(unlabelled.rows, unlabelled.columns, unlabelled.split)
            train = datasets.concatenate_datasets([train, more])
        return Data(columns, train, shown, None, scenes)


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
    mixing = (getattr(args, name, 0.0) for name in ("mixup", "cutmix"))
    augmentation = Augmentation(args.crop_scale, args.horizontal_flip, args.color_jitter, *mixing)
    # Features of frozen towers, and a frozen student's embeddings in a cache, stand for the images.
    all_cached = getattr(args, "freeze_image_model", False)
    cached = all_cached or (not contrastive and args.freeze_vision_model and args.teacher_cache_dir is not None)
    pixels = DevicePixels(image_size) if augments_on(accelerator.device) and not cached else None
    variation = {"image_size": image_size, "augmentation": augmentation, "on_device": pixels is not None}
    variation |= {"captions_per_image": args.captions_per_image, "seed": args.seed, "without_pixels": cached}
    process = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    batch_size, captions_per_image = args.per_device_train_batch_size, args.captions_per_image
    options = {
        "collate_fn": collator,
        "worker_init_fn": init_worker,
        "pin_memory": accelerator.device.type == "cuda",
    }
    image_bytes, eval_batch_size = 4 * 3 * image_size**2, args.per_device_eval_batch_size
    dataset = None if data.train is None else CaptionDataset(data.train, **variation)
    loaded = None if pixels is None or dataset is None else load_images(data.train, accelerator.device)
    if loaded is not None:
        pixels.images, dataset.offsets = loaded
    # Where the images lie on the device, batches hold labels and numbers only.
    train_bytes = image_bytes if loaded is None else 4096
    workers, eval_workers = (
        usable_workers(args.dataloader_num_workers, size, in_use)
        for size, in_use in (
            (batch_size * train_bytes, args.gradient_accumulation_steps),
            (eval_batch_size * image_bytes, 1),
        )
    )
    endless_loader = None
    if dataset is None:
        loader = partial(StatefulDataLoader, num_workers=workers, persistent_workers=workers > 0, **options)
        source = {"skipped": skipped, **process}
        if data.unlabelled_stream is not None:
            if batch_size < 2:
                expected = "at least 2, an image with and one without captions"
                raise ValueError(f"--per_device_train_batch_size: expected {expected}, got {batch_size}")
            size = min(max(1, round(args.unlabelled_share * batch_size)), batch_size - 1)
            endless_loader = loader(EndlessStream(**variation, **vars(data.unlabelled_stream), **source), size)
            batch_size -= size
        main = {"rows": data.stream, "columns": data.columns, "split": args.train_split}
        train_loader = loader(StreamingCaptionDataset(**main, **variation, **source), batch_size)
    else:
        order = None
        if contrastive:
            batch_size = min(batch_size, len(dataset) // accelerator.num_processes)
            captions_per_image = min(5, max(map(len, data.validation["captions"])))
        if share := getattr(args, "unlabelled_share", None):
            captioned = sorted({*range(len(dataset))} - {*data.unlabelled})
            order = SharedOrder(captioned, data.unlabelled, share, args.seed)
        rows = order or dataset
        sampler = EpochBatchSampler(len(rows), batch_size, args.seed, **process, equal=contrastive, order=order)
        train_loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, **options)
    sizes = {"captions_per_image": captions_per_image, "seed": args.seed, "without_pixels": all_cached}
    validation = CaptionDataset(data.validation, image_size, **sizes)
    persistent = {"num_workers": eval_workers, "persistent_workers": eval_workers > 0}
    validation_loader = DataLoader(validation, eval_batch_size, **options, **persistent)
    batches = TrainBatches(train_loader, accelerator.device, pixels, endless_loader)
    return batches, accelerator.prepare(validation_loader)


def cache_teacher_embeddings(
    args: argparse.Namespace,
    accelerator: Accelerator,
    teacher: Teacher | FrozenModel,
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
    parts = [(loaders[0].loader.dataset, args.teacher_views)]
    if not isinstance(teacher, FrozenModel):
        # Validation images are always cropped alike: one view.
        parts.append((loaders[1].dataset, 1))
    for dataset, num_views in parts:
        sources = (accelerator, teacher, dataset.in_size(teacher_crop_size), collator)
        dataset.teacher_cache = build_teacher_cache(*sources, args.teacher_cache_dir, num_views, **options)
