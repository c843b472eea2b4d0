"""How a training image is varied: crop, mirror, colours, mixing."""

import math
import random
import re
from dataclasses import dataclass

import torch
from PIL import Image

from tinycap.training.data import decoded_image


SIDE_WORDS = re.compile(r"\b(left|right)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Augmentation:
    """How a training image is varied; `Augmentation()` is the evaluation crop.

    Args:
        crop_scale: smallest share of the image's area that a random crop keeps (1.0: the whole centre square).
        horizontal_flip: mirror half of the images, except where the captions say left or right.
        color_jitter: largest relative change of brightness, contrast and each channel's gain.
        mixup: share of the samples that another image's crop is blended into (Zhang et al., 2018,
            https://arxiv.org/abs/1710.09412). No caption describes these: only the teacher embeds them, like any image
            (Beyer et al., 2022, https://arxiv.org/abs/2106.05237).
    """

    crop_scale: float = 1.0
    horizontal_flip: bool = False
    color_jitter: float = 0.0
    mixup: float = 0.0

    def crop_box(self, width: int, height: int, rng: random.Random) -> tuple[float, float, float, float]:
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

    def __call__(self, row: dict, image_size: int, rng: random.Random) -> dict:
        """A decoded row's `pixels` (image_size, image_size, 3) uint8, cropped and mirrored; per channel its `gain` and
        `shift`, to be applied as `pixel * gain + shift` to pixels from 0 to 1."""
        box = self.crop_box(row["width"], row["height"], rng)
        size = (image_size, image_size)
        image = decoded_image(row).resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        # All captions, not those drawn: pixels must not depend on which captions are drawn.
        mirrored = rng.random() < 0.5 and not any(map(SIDE_WORDS.search, row["captions"]))
        if self.horizontal_flip and mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        gain, shift = [1.0] * 3, [0.0] * 3
        if vary := self.color_jitter:
            brightness, contrast = rng.uniform(1 - vary, 1 + vary), rng.uniform(1 - vary, 1 + vary)
            gain = [brightness * contrast * rng.uniform(1 - vary / 2, 1 + vary / 2) for _ in range(3)]
            # Contrast scales about the middle grey.
            shift = [0.5 * (1 - contrast)] * 3
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*size, 3)
        return {"pixels": pixels, "gain": gain, "shift": shift}
