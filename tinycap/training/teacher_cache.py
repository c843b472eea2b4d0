"""Precomputed teacher embeddings: several views of each image, each of the exact crop that the student will see.

MobileCLIP calls this a reinforced dataset (Vasu et al., 2024, https://arxiv.org/abs/2311.17049); on the consistency of
the crops see Beyer et al. (2022, https://arxiv.org/abs/2106.05237). A view is a number: with the run's seed it
reproduces the image's crop, mirroring and colours, so that only embeddings are stored. The folder's name is a hash of
everything that shapes them. It depends on contents, not on paths or times, so that a folder can be shared.
"""

import hashlib
import json
import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from tinycap.commands import replacing, writing
from tinycap.pipeline_tinycap import usable_workers
from tinycap.training.batches import CaptionCollator, CaptionDataset
from tinycap.training.data import content_fingerprint
from tinycap.training.loop import init_worker, wait_for_slow_process
from tinycap.training.teacher import Teacher


logger = logging.getLogger(__name__)

# Rows of a file: the most that an interruption loses, and the unit that processes share.
SHARD_SIZE = 1024
# Part of the key: raise it when a view's image or the way it is stored changes.
CACHE_VERSION = 2
# Rows that are computed anew, each of another file, and their least cosine: another device or precision is no fault.
CHECKED_ROWS, MIN_COSINE = 32, 0.98


@dataclass
class FrozenModel:
    """An image model in a teacher's place: the student that a decoder alone trains on, or a tower without its head.

    Args:
        vision_model: called with pixels that are normalised for it; has `image_embeds`, (B, embed_dim).
        feature, scale, shift: part of the cache's key.
        is_normalised: whether the embeddings have unit norm.
    """

    vision_model: nn.Module
    feature: str
    embed_dim: int
    is_normalised: bool = True
    scale: torch.Tensor = torch.empty(0)
    shift: torch.Tensor = torch.empty(0)

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.vision_model(pixel_values).image_embeds


def teacher_recipe(
    teacher: Teacher | FrozenModel, dataset: CaptionDataset, collator: CaptionCollator, precision: str
) -> dict:
    """Everything that an embedding of the cache depends on, as JSON."""
    weights = hashlib.sha256()
    for name, value in sorted(teacher.vision_model.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.cpu().contiguous().numpy().tobytes())
    # Without mixing, the key of caches from before it.
    mixing = ("mixup", "cutmix")
    augmentation = {name: value for name, value in vars(dataset.augmentation).items() if name not in mixing or value}
    pixels = {"scale": teacher.scale, "shift": teacher.shift}
    pixels |= {"image_mean": collator.image_mean, "image_std": collator.image_std}
    return {
        **{"version": CACHE_VERSION, "shard_size": SHARD_SIZE, "precision": precision},
        **{"teacher": weights.hexdigest(), "feature": teacher.feature},
        **{name: values.flatten().tolist() for name, values in pixels.items()},
        **{"image_size": dataset.image_size, "augmentation": augmentation, "seed": dataset.seed},
        **{"num_rows": len(dataset), "dataset": content_fingerprint(dataset.rows)},
    }


@dataclass
class TeacherCache:
    """Memory-mapped embeddings, 3 kB for a view of an image at width 768, by view and part of the rows."""

    shards: dict[tuple[int, int], torch.Tensor]
    num_views: int

    def __call__(self, view: int, row: int) -> torch.Tensor:
        """(embed_dim,) float32, of unit norm where the teacher's are."""
        return self.shards[view, row // SHARD_SIZE][row % SHARD_SIZE]


@torch.no_grad()
def build_teacher_cache(
    accelerator: Accelerator,
    teacher: Teacher | FrozenModel,
    dataset: CaptionDataset,
    collator: CaptionCollator,
    cache_dir: str | Path,
    num_views: int,
    batch_size: int,
    num_workers: int = 0,
) -> TeacherCache:
    """Computes what `cache_dir` doesn't hold yet, each process its share, and opens the whole cache.

    Every file is written under a temporary name and renamed, so that an interrupted build continues where it stopped,
    and later runs with more views only add theirs. The dataset's augmentation and seed define the views. Raises
    `ValueError` for a damaged file, or one of other embeddings, which it names.
    """
    recipe = teacher_recipe(teacher, dataset, collator, accelerator.mixed_precision)
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:20]
    folder = Path(cache_dir) / f"teacher-{key}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    parts = [range(start, min(start + SHARD_SIZE, len(dataset))) for start in range(0, len(dataset), SHARD_SIZE)]
    shards = [(view, part) for view in range(num_views) for part in range(len(parts))]
    paths = {(view, part): folder / f"view-{view:03}-{part:06}.safetensors" for view, part in shards}
    missing = [shard for shard in shards if not paths[shard].exists()]
    # Before any process writes: all must come to the same list.
    accelerator.wait_for_everyone()
    if missing:
        logger.info("Teacher embeddings of %d views are written to %s", num_views, folder)
    share = missing[accelerator.process_index :: accelerator.num_processes]
    hidden = not accelerator.is_main_process or not missing
    options = {"collate_fn": collator, "worker_init_fn": init_worker}
    workers = usable_workers(num_workers, 4 * 3 * batch_size * dataset.image_size**2)

    def embed(keys: list[tuple[int, int]], num_workers: int = 0) -> torch.Tensor:
        embeds = []
        for batch in DataLoader(dataset, batch_size, sampler=keys, num_workers=num_workers, **options):
            with accelerator.autocast():
                embeds.append(teacher(batch["pixel_values"].to(accelerator.device)).float().cpu())
        return torch.cat(embeds)

    for view, part in tqdm(share, desc="Precomputing teacher embeddings", disable=hidden):
        path = paths[view, part]
        with replacing(path) as aside:
            save_file({"image_embeds": embed([(view, row) for row in parts[part]], workers)}, aside)
    wait_for_slow_process(accelerator)
    shapes = {shard: (len(parts[shard[1]]), teacher.embed_dim) for shard in shards}
    opened = {shard: _open_shard(paths[shard], shapes[shard], teacher.is_normalised) for shard in shards}
    cache = TeacherCache(opened, num_views)
    # Files that were there already, maybe from somebody else.
    rng, found = random.Random(key), sorted({*shards} - {*missing})
    rows = {shard: rng.choice(parts[shard[1]]) for shard in rng.sample(found, min(len(found), CHECKED_ROWS))}
    embeds = embed([(view, row) for (view, _), row in rows.items()]) if rows else ()
    for (shard, row), expected in zip(rows.items(), embeds):
        if (cosine := float(F.cosine_similarity(cache(shard[0], row), expected, dim=0))) < MIN_COSINE:
            got = f"got another (cosine {cosine:.2f}); delete it"
            raise ValueError(f"{paths[shard]}: expected this teacher's embedding of row {row}, {got}")
    return cache


def _open_shard(path: Path, shape: tuple[int, int], is_normalised: bool) -> torch.Tensor:
    try:
        if not path.is_file():
            raise OSError("not a file")
        embeds = load_file(path)["image_embeds"]
        if embeds.shape != shape or embeds.dtype != torch.float32:
            raise ValueError(f"expected {shape} of torch.float32, got {tuple(embeds.shape)} of {embeds.dtype}")
        norms = embeds.norm(dim=1)
        # Those in half precision are off by 0.004; NaN is close to nothing.
        is_right = (norms - 1).abs() < 1e-2 if is_normalised else norms.isfinite()
        if wrong := (~is_right).nonzero().flatten().tolist():
            expected, row = "norm 1" if is_normalised else "a finite norm", wrong[0]
            raise ValueError(f"expected {expected}, got {norms[row]:.3g} in row {row} and {len(wrong)} such rows")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: expected embeddings, delete it to have it made anew: {error}") from error
    return embeds
