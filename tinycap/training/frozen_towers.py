"""Frozen image towers: the features of several crops of each image are computed once, and a linear head is trained on
them, where an epoch takes seconds."""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from tinycap.training.augmentation import Augmentation
from tinycap.training.batches import CaptionCollator, CaptionDataset, EpochBatchSampler
from tinycap.training.data import content_fingerprint
from tinycap.training.loading import Data
from tinycap.training.teacher_cache import TeacherCache, build_teacher_cache
from tinycap.training.tokenizer import encode_captions
from tinycap.training.towers import ImageTowers, PretrainedImageTower
from tinycap.training.train_batches import TrainBatches


# Of the crops: runs with other seeds share the features.
CROP_SEED = 0


class FrozenTowers(nn.Module):
    """A linear head to train on the features of frozen towers; called like an image tower.

    The towers' own heads are removed until they are saved: with their parts of the head, they are an ordinary teacher.

    Args:
        dropout: of the features.
    """

    def __init__(self, towers: PretrainedImageTower | ImageTowers, dropout: float):
        super().__init__()
        self.config = towers.config
        self.image_model = towers.eval().requires_grad_(False)
        for tower in towers.towers:
            tower.classifier.set_submodule(tower.head_name, nn.Identity())
        num_features = sum(tower.num_features for tower in towers.towers)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(num_features, towers.config.projection_dim)

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        """Features (B, num_features) in place of pixels to `image_embeds` (B, projection_dim)."""
        return SimpleNamespace(image_embeds=self.head(self.dropout(pixel_values)))

    def save_pretrained(self, output_dir: str | Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Writes the towers with their parts of the head, from the `state_dict` as `accelerate` gathers it."""
        prefix, towers = "image_model.", self.image_model.towers
        tensors = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        weight, bias = state_dict["head.weight"], state_dict["head.bias"]
        # The towers' sum has the bias once.
        biases = [bias, *[torch.zeros_like(bias)] * (len(towers) - 1)]
        parts = weight.split([tower.num_features for tower in towers], dim=1)
        is_several = isinstance(self.image_model, ImageTowers)
        for index, (tower, own_weight, own_bias) in enumerate(zip(towers, parts, biases)):
            name = f"{f'towers.{index}.' if is_several else ''}classifier.{tower.head_name}"
            tensors |= {f"{name}.weight": own_weight.contiguous(), f"{name}.bias": own_bias}
        self.image_model.save_pretrained(output_dir, state_dict=tensors)


class FeatureExtractor(nn.Module):
    """A tower without its head, as `build_teacher_cache` calls a `Teacher`."""

    feature, is_normalised = "features", False

    def __init__(self, tower: PretrainedImageTower):
        super().__init__()
        self.vision_model, self.embed_dim = tower, tower.num_features
        # Pixels come by the tower's own statistics.
        self.scale, self.shift = torch.ones(3), torch.zeros(3)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to (B, num_features)."""
        return self.vision_model(pixel_values).image_embeds


@dataclass(eq=False)
class FeatureDataset(Dataset):
    """Features and captions of images, drawn anew in every epoch; a key is `(epoch, row)`, or a row of epoch 0.

    Args:
        image_ids, captions: by row; captions as token ids, without the start token.
        captions_per_image: captions to draw, without repeats while there are enough.
        seed: with the epoch and the row, fixes the draw.
        caches: the features of each tower, through whose views epochs cycle.
    """

    image_ids: list[str]
    captions: list[list[list[int]]]
    captions_per_image: int
    seed: int
    caches: list[TeacherCache] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, row = key if isinstance(key, tuple) else (0, key)
        captions = list(self.captions[row])
        random.Random(f"{self.seed}/{epoch}/{row}").shuffle(captions)
        captions = [captions[i % len(captions)] for i in range(self.captions_per_image)]
        features = torch.cat([cache(epoch % cache.num_views, row) for cache in self.caches])
        return {"features": features, "captions": captions, "image_id": self.image_ids[row]}


def collate_features(samples: list[dict]) -> dict:
    """A batch of `features` (B, num_features), and `labels`, `num_tokens` and `image_ids` as in `CaptionCollator`."""
    captions = [torch.tensor(ids) for sample in samples for ids in sample["captions"]]
    return {
        "features": torch.stack([sample["features"] for sample in samples]),
        "labels": pad_sequence(captions, batch_first=True, padding_value=-100),
        "num_tokens": sum(map(len, captions)),
        "image_ids": [sample["image_id"] for sample in samples],
    }


def create_feature_loaders(
    args: argparse.Namespace, accelerator: Accelerator, data: Data, tokenizer
) -> tuple[TrainBatches, DataLoader]:
    """As `create_loaders`; `cache_features` fills their datasets."""

    def dataset_of(rows, captions_per_image: int) -> FeatureDataset:
        captions = [encode_captions(tokenizer, captions, args.max_caption_length) for captions in rows["captions"]]
        return FeatureDataset(list(rows["image_id"]), captions, captions_per_image, args.seed)

    train = dataset_of(data.train, args.captions_per_image)
    validation = dataset_of(data.validation, min(5, max(map(len, data.validation["captions"]))))
    batch_size = min(args.per_device_train_batch_size, len(train) // accelerator.num_processes)
    process = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    sampler = EpochBatchSampler(len(train), batch_size, args.seed, **process, equal=True)
    loader = DataLoader(train, batch_sampler=sampler, collate_fn=collate_features)
    validation_loader = DataLoader(validation, args.per_device_eval_batch_size, collate_fn=collate_features)
    return TrainBatches(loader, accelerator.device), accelerator.prepare(validation_loader)


def cache_features(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: FrozenTowers,
    data: Data,
    loaders: tuple[TrainBatches, DataLoader],
    collator_of: Callable[..., CaptionCollator],
    cache_dir: Path,
) -> None:
    """Computes what `cache_dir` lacks of the features of both loaders' images.

    Args:
        collator_of: makes a collator of a mean and a deviation.
    """
    train, validation = loaders[0].loader.dataset, loaders[1].dataset
    augmentation = Augmentation(args.crop_scale, args.horizontal_flip, args.color_jitter)
    workers = args.dataloader_num_workers
    for tower in model.image_model.towers:
        extractor = FeatureExtractor(tower).to(accelerator.device)
        for dataset, rows, views, variation in (
            (train, data.train, args.feature_views, augmentation),
            (validation, data.validation, 1, Augmentation()),
        ):
            crops = CaptionDataset(rows, tower.config.image_size, variation, captions_per_image=1, seed=CROP_SEED)
            sources = (accelerator, extractor, crops, collator_of(*tower.statistics), cache_dir, views)
            options = (args.per_device_eval_batch_size, content_fingerprint(rows), workers)
            dataset.caches.append(build_teacher_cache(*sources, *options))
