"""Frozen image towers: the features of several crops of each image are computed once, and a linear head is trained on
them, where an epoch takes seconds."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from tinycap.training.teacher_cache import FrozenModel, TeacherCache, build_teacher_cache
from tinycap.training.towers import ImageTowers, PretrainedImageTower, StudentTower
from tinycap.training.train_batches import TrainBatches


# Of the crops: runs with other seeds share the features.
CROP_SEED = 0


class FrozenTowers(nn.Module):
    """A linear head to train on the features of frozen towers; called like an image tower. A student has no head.

    The towers' own heads are removed until they are saved: with their parts of the head, they are an ordinary teacher.

    Args:
        dropout: of the features.
    """

    def __init__(self, towers: PretrainedImageTower | ImageTowers | StudentTower, dropout: float):
        super().__init__()
        self.config = towers.config
        self.image_model = towers.eval().requires_grad_(False)
        self.dropout, self.head = nn.Dropout(dropout), nn.Identity()
        if not isinstance(towers, StudentTower):
            for tower in towers.towers:
                tower.remove_head()
            num_features = sum(tower.num_features for tower in towers.towers)
            self.head = nn.Linear(num_features, towers.config.projection_dim)

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        """Features (B, num_features) in place of pixels to `image_embeds` (B, projection_dim)."""
        return SimpleNamespace(image_embeds=self.head(self.dropout(pixel_values)))

    def save_pretrained(self, output_dir: str | Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Writes the towers with their parts of the head, from the `state_dict` as `accelerate` gathers it. A student,
        which hasn't changed, isn't written."""
        if isinstance(self.image_model, StudentTower):
            return
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


@dataclass
class FeatureCache:
    """Features of several towers, joined; called like a `TeacherCache`."""

    caches: list[TeacherCache]

    @property
    def num_views(self) -> int:
        return self.caches[0].num_views

    def __call__(self, view: int, row: int) -> torch.Tensor:
        """(num_features,) float32."""
        return torch.cat([cache(view, row) for cache in self.caches])


def cache_features(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: FrozenTowers,
    loaders: tuple[TrainBatches, DataLoader],
    cache_dir: Path,
) -> None:
    """Computes what `cache_dir` lacks of the features of both loaders' images, which stand for their pixels then."""
    train, validation = loaders[0].loader.dataset, loaders[1].dataset
    options = {"batch_size": args.per_device_eval_batch_size, "num_workers": args.dataloader_num_workers}
    for dataset, options["num_views"] in ((train, args.feature_views), (validation, 1)):
        caches = []
        for tower in model.image_model.towers:
            # Its pixels come by its own statistics: neither scaled nor shifted.
            key = ("features", tower.num_features, False, torch.ones(3), torch.zeros(3))
            source = FrozenModel(tower.to(accelerator.device), *key)
            crops = replace(dataset.in_size(tower.config.image_size), captions_per_image=1, seed=CROP_SEED)
            mean, std = tower.statistics
            collator = replace(loaders[0].loader.collate_fn, image_mean=mean, image_std=std)
            caches.append(build_teacher_cache(accelerator, source, crops, collator, cache_dir, **options))
        dataset.teacher_cache = FeatureCache(caches)
