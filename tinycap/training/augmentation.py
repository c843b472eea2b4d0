"""How a training image is varied: crop, mirror, colours, mixing. All draws are here, and the pixels on a CPU."""

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from PIL import Image

from tinycap.training.data import decoded_image


SIDE_WORDS = re.compile(r"\b(left|right)\b", re.IGNORECASE)
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Crop:
    """A box (left, top, right, bottom; pixels) of a decoded row's image, to be resized to a square, mirrored or not."""

    row: dict
    box: Box
    mirrored: bool

    def pixels(self, image_size: int) -> torch.Tensor:
        """(image_size, image_size, 3) uint8, resized by Pillow's bicubic filter."""
        size = (image_size, image_size)
        image = decoded_image(self.row).resize(size, Image.Resampling.BICUBIC, box=self.box, reducing_gap=3.0)
        if self.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*size, 3)


@dataclass
class View:
    """What a student sees of an image: a crop, or a mixture of two.

    Args:
        gain, shift: per channel, to be applied as `pixel * gain + shift` to pixels from 0 to 1.
        other: the crop that is mixed in, `None` for an image alone.
        weight: its share of the pixels in `region`, from 0 to 1.
        region: where it is mixed in (left, top, right, bottom), as shares of the square's side.
    """

    crop: Crop
    gain: list[float] = field(default_factory=lambda: [1.0] * 3)
    shift: list[float] = field(default_factory=lambda: [0.0] * 3)
    other: Crop | None = None
    weight: float = 0.0
    region: Box = WHOLE

    def region_pixels(self, image_size: int) -> tuple[int, int, int, int]:
        """`region` in pixels of a square of `image_size`."""
        return tuple(round(edge * image_size) for edge in self.region)

    def pixels(self, image_size: int) -> torch.Tensor:
        """(image_size, image_size, 3) uint8, without `gain` and `shift`."""
        pixels = self.crop.pixels(image_size)
        if self.other is not None:
            left, top, right, bottom = self.region_pixels(image_size)
            own, other = (image[top:bottom, left:right] for image in (pixels, self.other.pixels(image_size)))
            own.copy_(torch.lerp(own.float(), other.float(), self.weight).round_())
        return pixels


@dataclass(frozen=True)
class Augmentation:
    """How a training image is varied; `Augmentation()` is the evaluation crop.

    Args:
        crop_scale: smallest share of the image's area that a random crop keeps (1.0: the whole centre square).
        horizontal_flip: mirror half of the images, except where the captions say left or right.
        color_jitter: largest relative change of brightness, contrast and each channel's gain.
        mixup: share of the samples that another image's crop is mixed into, blended over the whole square (Zhang et
            al., 2018, https://arxiv.org/abs/1710.09412). No caption describes these: only the teacher embeds them, like
            any image (Beyer et al., 2022, https://arxiv.org/abs/2106.05237).
        cutmix: share of the mixed samples that get a box of the other crop in place of a blend (Yun et al., 2019,
            https://arxiv.org/abs/1905.04899); timm's `mixup_switch_prob`.
    """

    crop_scale: float = 1.0
    horizontal_flip: bool = False
    color_jitter: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def crop_box(self, width: int, height: int, rng: random.Random) -> Box:
        """(left, top, right, bottom) in pixels; aspect ratios from 3:4 to 4:3 as in Inception (Szegedy et al. 2015)."""
        for _ in range(10 if self.crop_scale < 1.0 else 0):
            area = rng.uniform(self.crop_scale, 1.0) * width * height
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            crop_width, crop_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if crop_width <= width and crop_height <= height:
                left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
                return left, top, left + crop_width, top + crop_height
        side = min(width, height)
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2

    def draw_view(self, row: dict, rng: random.Random) -> View:
        """A view of a decoded row, unmixed; its `pixels` aren't read."""
        box = self.crop_box(row["width"], row["height"], rng)
        # All captions, not those drawn: pixels must not depend on which captions are drawn.
        mirrored = rng.random() < 0.5 and not any(map(SIDE_WORDS.search, row["captions"]))
        view = View(Crop(row, box, self.horizontal_flip and mirrored))
        if vary := self.color_jitter:
            brightness, contrast = rng.uniform(1 - vary, 1 + vary), rng.uniform(1 - vary, 1 + vary)
            view.gain = [brightness * contrast * rng.uniform(1 - vary / 2, 1 + vary / 2) for _ in range(3)]
            # Contrast scales about the middle grey.
            view.shift = [0.5 * (1 - contrast)] * 3
        return view

    def draw_mixing(self, view: View, draw_row: Callable[[random.Random], dict], rng: random.Random) -> None:
        """Mixes the decoded row that `draw_row` returns into a share of the views."""
        if self.mixup == 0 or rng.random() >= self.mixup:
            return
        view.other = self.draw_view(draw_row(rng), rng).crop
        if self.cutmix > 0 and rng.random() < self.cutmix:
            # The box's share of the area is uniform before the image's edges cut it, as in CutMix.
            half, x, y = math.sqrt(rng.random()) / 2, rng.random(), rng.random()
            edges = (x - half, y - half, x + half, y + half)
            view.weight, view.region = 1.0, tuple(min(max(edge, 0.0), 1.0) for edge in edges)
        else:
            # The image's own share is the larger one; the other image is mixed at its own index.
            view.weight = rng.uniform(0.0, 0.5)
