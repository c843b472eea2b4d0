"""Crops and mixtures computed in batches on a GPU, where decoded images lie or are sent as uint8.

The parameters of every view are drawn on the CPU (`augmentation.py`), so that the same seeds give the same crops
everywhere; only the pixels are computed here, by Pillow's own bicubic filter as two matrix products.
"""

import logging
import math
from collections.abc import Sequence

import datasets
import numpy as np
import torch

from tinycap.training.augmentation import Crop, View


logger = logging.getLogger(__name__)

# Crops that are resampled at a time: their filters and pixels take about 200 MB at 224 pixels.
CHUNK = 128
# Share of the free memory that the images may take; model, optimizer and activations need the rest.
MEMORY_SHARE = 0.5


def augments_on(device: torch.device) -> bool:
    """Whether training images are cropped, coloured and mixed on `device` instead of in the loader's workers."""
    return device.type == "cuda"


def free_memory(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0]


def load_images(rows: datasets.Dataset, device: torch.device) -> tuple[torch.Tensor, np.ndarray] | None:
    """All images of decoded rows on `device`, (pixels, 3) uint8 one after the other, and where each begins; `None`
    where they would take more than `MEMORY_SHARE` of its memory."""
    shapes = rows.select_columns(["height", "width"]).with_format("numpy")[:]
    ends = (shapes["height"].astype(np.int64) * shapes["width"]).cumsum()
    size = 3 * int(ends[-1])
    if size > MEMORY_SHARE * free_memory(device):
        logger.info("The training images (%.1f GB) don't fit on %s and are sent in batches.", size / 1e9, device)
        return None
    images, first = torch.empty(size, dtype=torch.uint8, device=device), 0
    for batch in rows.select_columns("pixels").iter(256):
        pixels = torch.frombuffer(bytearray(b"".join(batch["pixels"])), dtype=torch.uint8)
        images[first : first + len(pixels)] = pixels.to(device)
        first += len(pixels)
    return images.view(-1, 3), np.concatenate([[0], ends[:-1]])


def window_of(crop: Crop, image_size: int) -> tuple[int, int, int, int]:
    """The pixels (left, top, right, bottom) that the filter reads for a crop; resizing needs no others."""
    limits, edges = (crop.row["width"], crop.row["height"]), []
    for start, end, limit in zip(crop.box[:2], crop.box[2:], limits):
        reach = 2 * max(1.0, (end - start) / image_size)
        edges.append((max(0, math.floor(start - reach)), min(limit, math.ceil(end + reach))))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def pack_views(views: Sequence[View], image_size: int) -> dict:
    """The arguments of `DevicePixels` for a batch of views, without colours.

    Returns:
        dict with, for C crops (those of the B views, then the M that are mixed in), `start` and `stride` (C,), a
        window's first pixel and pixels a row, `size` (C, 2), its height and width, `box` (C, 4) within it, `mirrored`
        (C,); for the mixtures their `mixed` view, `weight` (M,) and `region` (M, 4) in pixels; `window`, the largest
        height and width; and `images` (P, 3) uint8, the windows' pixels, unless rows have an `offset`.
    """
    mixed = [number for number, view in enumerate(views) if view.other is not None]
    crops = [view.crop for view in views] + [views[number].other for number in mixed]
    windows = [window_of(crop, image_size) for crop in crops]
    sizes = [(bottom - top, right - left) for left, top, right, bottom in windows]
    boxes = [np.subtract(crop.box, window[:2] * 2).tolist() for crop, window in zip(crops, windows)]
    packed = {
        "size": torch.tensor(sizes),
        "box": torch.tensor(boxes),
        "mirrored": torch.tensor([crop.mirrored for crop in crops]),
        "mixed": torch.tensor(mixed, dtype=torch.int64),
        "weight": torch.tensor([views[number].weight for number in mixed]),
        "region": torch.tensor([views[number].region_pixels(image_size) for number in mixed]).view(len(mixed), 4),
        "window": tuple(map(max, zip(*sizes))),
    }
    if "offset" in crops[0].row:
        strides = [crop.row["width"] for crop in crops]
        starts = [
            crop.row["offset"] + top * crop.row["width"] + left for crop, (left, top, _, _) in zip(crops, windows)
        ]
    else:
        parts = []
        for crop, (left, top, right, bottom) in zip(crops, windows):
            pixels = np.frombuffer(crop.row["pixels"], np.uint8).reshape(crop.row["height"], crop.row["width"], 3)
            parts.append(pixels[top:bottom, left:right].reshape(-1, 3))
        packed["images"] = torch.from_numpy(np.concatenate(parts))
        strides, starts = [width for _, width in sizes], np.cumsum([0, *map(len, parts[:-1])]).tolist()
    return {**packed, "start": torch.tensor(starts), "stride": torch.tensor(strides)}


def bicubic_weights(
    start: torch.Tensor, end: torch.Tensor, limit: torch.Tensor, num_in: int, num_out: int
) -> torch.Tensor:
    """The weights of Pillow's antialiased bicubic filter (a = -0.5) that resizes each of C intervals.

    Args:
        start, end: (C,) the interval's edges, in pixels; limit: (C,) pixels that there are.

    Returns:
        (C, num_out, num_in), each row's sum 1.
    """
    scale = ((end - start) / num_out)[:, None]
    centers = start[:, None] + scale * (torch.arange(num_out, device=start.device) + 0.5)
    pixels = torch.arange(num_in, device=start.device) + 0.5
    distance = ((pixels - centers[:, :, None]) / scale.clamp(min=1.0)[:, :, None]).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    weights = torch.where(distance < 1.0, near, torch.where(distance < 2.0, far, 0.0))
    weights = weights * (pixels < limit[:, None])[:, None]
    return weights / weights.sum(dim=2, keepdim=True)


class DevicePixels:
    """Computes the pixels of packed views on the device of their tensors, as `View.pixels` does within rounding.

    Args:
        image_size: side of the squares, pixels.
        images: (P, 3) uint8 of all images, see `load_images`; `None` where batches bring their own.
    """

    def __init__(self, image_size: int, images: torch.Tensor | None = None):
        self.image_size, self.images = image_size, images

    @torch.no_grad()
    def __call__(self, views: dict) -> torch.Tensor:
        """(B, 3, image_size, image_size) float32, normalised, of what `pack_views` returns with each view's `gain` and
        `shift` (B, 3)."""
        images = views.get("images", self.images)
        names = ("start", "stride", "size", "box", "mirrored")
        chunks = zip(*(views[name].split(CHUNK) for name in names))
        crops = torch.cat([self.resample(images, views["window"], *chunk) for chunk in chunks])
        own, other = crops.split([len(views["gain"]), len(views["mixed"])])
        if len(other):
            places = torch.arange(self.image_size, device=own.device)
            left, top, right, bottom = views["region"].t()[:, :, None]
            columns, rows = (places >= left) & (places < right), (places >= top) & (places < bottom)
            weight = (rows[:, :, None] & columns[:, None]) * views["weight"][:, None, None]
            own[views["mixed"]] = torch.lerp(own[views["mixed"]], other, weight[:, None]).round_()
        return own * views["gain"][:, :, None, None] + views["shift"][:, :, None, None]

    def resample(self, images: torch.Tensor, window: tuple[int, int], start, stride, size, box, mirrored):
        """Crops (C, 3, image_size, image_size) of values from 0 to 255, rounded as Pillow's."""
        side, (height, width) = self.image_size, window
        rows = torch.arange(height, device=start.device).minimum(size[:, :1] - 1)
        columns = torch.arange(width, device=start.device).minimum(size[:, 1:] - 1)
        index = start[:, None, None] + rows[:, :, None] * stride[:, None, None] + columns[:, None]
        pixels = images[index].transpose(2, 3).float()
        across = bicubic_weights(box[:, 0], box[:, 2], size[:, 1], width, side)
        across = torch.where(mirrored[:, None, None], across.flip(1), across)
        down = bicubic_weights(box[:, 1], box[:, 3], size[:, 0], height, side)
        # Across first and rounded in between, as Pillow does it; Pillow 13 takes tall images the other way round.
        pixels = torch.bmm(pixels.reshape(-1, height * 3, width), across.transpose(1, 2)).round_().clamp_(0, 255)
        pixels = torch.bmm(down, pixels.view(-1, height, 3 * side)).round_().clamp_(0, 255)
        return pixels.view(-1, side, 3, side).transpose(1, 2)
