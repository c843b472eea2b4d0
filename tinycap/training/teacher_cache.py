"""Precomputed teacher embeddings: several views of each image, each of the exact crop that the student will see.

MobileCLIP calls this a reinforced dataset (Vasu et al., 2024, https://arxiv.org/abs/2311.17049); on the consistency of
the crops see Beyer et al. (2022, https://arxiv.org/abs/2106.05237). A view is a number: with the run's seed it
reproduces the image's crop, mirroring and colours, so that only embeddings are stored. The folder's name is a hash of
everything that shapes them. It depends on contents, not on paths or times, so that a folder can be shared.
"""

import hashlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from tinycap.training.batches import CaptionCollator, CaptionDataset
from tinycap.training.teacher import Teacher


logger = logging.getLogger(__name__)

# Rows of a file: the most that an interruption loses, and the unit that processes share.
SHARD_SIZE = 1024
# Part of the key: raise it when a view's image or the way it is stored changes.
CACHE_VERSION = 2


def teacher_recipe(
    teacher: Teacher, dataset: CaptionDataset, collator: CaptionCollator, dataset_fingerprint: str
) -> dict:
    """Everything that an embedding of the cache depends on, as JSON."""
    weights = hashlib.sha256()
    for name, value in sorted(teacher.vision_model.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.cpu().contiguous().numpy().tobytes())
    augmentation = vars(dataset.augmentation).copy()
    if not augmentation["mixup"]:
        # Keeps the key of caches from before mixup.
        del augmentation["mixup"]
    pixels = {"scale": teacher.scale, "shift": teacher.shift}
    pixels |= {"image_mean": collator.image_mean, "image_std": collator.image_std}
    return {
        "version": CACHE_VERSION,
        "shard_size": SHARD_SIZE,
        "teacher": weights.hexdigest(),
        "feature": teacher.feature,
        **{name: values.flatten().tolist() for name, values in pixels.items()},
        "image_size": dataset.image_size,
        "augmentation": augmentation,
        "seed": dataset.seed,
        "num_rows": len(dataset),
        "dataset": dataset_fingerprint,
    }


@dataclass
class TeacherCache:
    """Embeddings by view and row, memory-mapped: 3 kB for a view of an image at width 768.

    Args:
        shards: for each view, its files' tensors (rows, embed_dim) in order.
    """

    shards: list[list[torch.Tensor]]

    @property
    def num_views(self) -> int:
        return len(self.shards)

    def __call__(self, view: int, row: int) -> torch.Tensor:
        """(embed_dim,) float32, unit norm."""
        return self.shards[view][row // SHARD_SIZE][row % SHARD_SIZE]


@torch.no_grad()
def build_teacher_cache(
    accelerator: Accelerator,
    teacher: Teacher,
    dataset: CaptionDataset,
    collator: CaptionCollator,
    cache_dir: str | Path,
    num_views: int,
    batch_size: int,
    dataset_fingerprint: str,
    num_workers: int = 0,
) -> TeacherCache:
    """Computes what `cache_dir` doesn't hold yet, each process its share, and opens the whole cache.

    Every file is written under a temporary name and renamed, so that an interrupted build continues where it stopped,
    and later runs with more views only add theirs.

    Args:
        dataset: the images; its augmentation and seed define the views.
        dataset_fingerprint: the `content_fingerprint` of the dataset's rows.

    Raises:
        ValueError: a file in the cache isn't what its name says; names it.
    """
    recipe = teacher_recipe(teacher, dataset, collator, dataset_fingerprint)
    recipe["precision"] = accelerator.mixed_precision
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:20]
    folder = Path(cache_dir) / f"teacher-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    starts = range(0, len(dataset), SHARD_SIZE)
    shards = [
        (view, range(start, min(start + SHARD_SIZE, len(dataset)))) for view in range(num_views) for start in starts
    ]
    paths = [folder / f"view-{view:03}-{rows.start // SHARD_SIZE:06}.safetensors" for view, rows in shards]
    missing = [(path, view, rows) for path, (view, rows) in zip(paths, shards) if not path.exists()]
    # Before any process writes: all must come to the same list.
    accelerator.wait_for_everyone()
    share = missing[accelerator.process_index :: accelerator.num_processes]
    if missing:
        logger.info("Teacher embeddings of %d views are written to %s", num_views, folder)
    total = sum(math.ceil(len(rows) / batch_size) for *_, rows in share)
    hidden = not accelerator.is_main_process or not missing
    with tqdm(total=total, desc="Precomputing teacher embeddings", disable=hidden) as progress:
        for path, view, rows in share:
            keys = [(view, row) for row in rows]
            loader = DataLoader(dataset, batch_size, sampler=keys, collate_fn=collator, num_workers=num_workers)
            embeds = []
            for batch in loader:
                with accelerator.autocast():
                    embeds.append(teacher(batch["pixel_values"].to(accelerator.device)).float().cpu())
                progress.update()
            aside = path.with_name(f".{path.name}.{accelerator.process_index}")
            save_file({"image_embeds": torch.cat(embeds)}, aside)
            aside.replace(path)
    accelerator.wait_for_everyone()
    opened = [_open_shard(path, (len(rows), teacher.embed_dim)) for path, (_, rows) in zip(paths, shards)]
    return TeacherCache([opened[view * len(starts) :][: len(starts)] for view in range(num_views)])


def _open_shard(path: Path, shape: tuple[int, int]) -> torch.Tensor:
    try:
        embeds = load_file(path)["image_embeds"]
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{path}: expected a file of embeddings, delete it to have it made anew: {error}") from error
    if embeds.shape != shape:
        raise ValueError(f"{path}: expected embeddings {shape}, got {tuple(embeds.shape)}; delete it")
    return embeds
