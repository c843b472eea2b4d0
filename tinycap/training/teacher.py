"""The frozen CLIP teacher: embeds the student's pixels to the student's target."""

import logging

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import cached_file

from tinycap.training.towers import (
    TEXT_HEAD_FILE,
    ImageTowers,
    PretrainedImageTower,
    load_saved_towers,
    load_weights,
    pixel_statistics,
    resize_pixels,
)


logger = logging.getLogger(__name__)

FEATURES = ("pooled", "projected")


class VisionTower(CLIPVisionModelWithProjection):
    """CLIP's vision tower, from its own checkpoint or a whole `CLIPModel`'s, whose text tower is ignored."""

    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]


class Teacher(nn.Module):
    """A frozen CLIP vision model, or other image towers in its place, always in eval mode.

    Args:
        vision_model (`CLIPVisionModelWithProjection`, `PretrainedImageTower` or `ImageTowers`): the image tower.
        feature (`str`): "pooled" for the pooled output before the visual projection (768 values for ViT-B/32),
            "projected" for `image_embeds` after it (512).
        teacher_mean, teacher_std: per channel, what the teacher's pixels are normalised by; CLIP's if not given.
        image_mean, image_std: per channel, what the incoming pixels are normalised by; the teacher's if not given.
    """

    # Whether outputs have unit norm.
    is_normalised = True

    def __init__(
        self, vision_model, feature="pooled", teacher_mean=None, teacher_std=None, image_mean=None, image_std=None
    ):
        super().__init__()
        if feature not in FEATURES:
            raise ValueError(f"teacher_feature: expected one of {', '.join(FEATURES)}, got {feature!r}")
        if feature != "projected" and isinstance(vision_model, PretrainedImageTower | ImageTowers):
            name = type(getattr(vision_model, "classifier", vision_model)).__name__
            raise ValueError(f"teacher_feature: expected projected, the only one of a {name}, got {feature!r}")
        self.vision_model = vision_model.eval().requires_grad_(False)
        self.feature = feature
        config = vision_model.config
        self.embed_dim = config.hidden_size if feature == "pooled" else config.projection_dim
        self.image_size = config.image_size
        teacher_mean = torch.tensor(teacher_mean or OPENAI_CLIP_MEAN)
        teacher_std = torch.tensor(teacher_std or OPENAI_CLIP_STD)
        image_mean = teacher_mean if image_mean is None else torch.tensor(image_mean)
        image_std = teacher_std if image_std is None else torch.tensor(image_std)
        # (pixels * image_std + image_mean - teacher_mean) / teacher_std, as one multiplication and one addition.
        self.register_buffer("scale", (image_std / teacher_std).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((image_mean - teacher_mean) / teacher_std).view(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, name_or_path: str, feature="pooled", image_mean=None, image_std=None) -> "Teacher":
        """Loads a `CLIPModel`, its vision half, or other image towers that `train_teacher.py` has trained against
        texts; arguments as in the class. Raises `ValueError` where it is none of them or lacks weights.
        """
        try:
            model_type = AutoConfig.from_pretrained(name_or_path).model_type
        except (OSError, ValueError, ImportError) as error:
            if (towers := load_saved_towers(name_or_path)) is not None:
                return cls(towers, feature, *towers.statistics, image_mean, image_std)
            raise ValueError(
                f"teacher {name_or_path}: expected a CLIP model on the Hub or in a local folder: {error}"
            ) from error
        if model_type in ("clip", "clip_vision_model"):
            # The pooled feature doesn't use the projection.
            unused = "visual_projection" if feature == "pooled" else ""
            vision_model = load_weights(VisionTower, name_or_path, "a CLIP vision model", unused)
            statistics = pixel_statistics(name_or_path)
        else:
            # Any image classifier has this format; only one trained against texts is a teacher.
            try:
                cached_file(name_or_path, TEXT_HEAD_FILE)
            except OSError as error:
                raise ValueError(
                    f"teacher {name_or_path}: expected a CLIP vision model (model_type clip or clip_vision_model), or "
                    f"an image tower with the {TEXT_HEAD_FILE} that train_teacher.py leaves beside it, "
                    f"got model_type {model_type!r}"
                ) from error
            vision_model = PretrainedImageTower.from_pretrained(name_or_path)
            statistics = vision_model.statistics
        if statistics is None:
            logger.info("teacher %s has no preprocessor_config.json; CLIP's mean and deviation are taken", name_or_path)
        return cls(vision_model, feature, *(statistics or (None, None)), image_mean, image_std)

    def check_width(self, projection_dim: int) -> None:
        """Raises `ValueError` unless the student's `projection_dim` is the teacher's width; names both."""
        if projection_dim != self.embed_dim:
            raise ValueError(
                f"projection_dim: expected {self.embed_dim}, the width of the teacher's {self.feature} feature, "
                f"got {projection_dim}"
            )

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode."""
        return super().train(False)

    def own_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) pixels, normalised by `image_mean` and `image_std`, in the image tower's size and by its own."""
        return resize_pixels(pixel_values.float() * self.scale + self.shift, self.image_size)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embeds (B, 3, H, W) pixels, normalised by `image_mean` and `image_std`, to (B, embed_dim) of unit norm."""
        pixel_values = self.own_pixels(pixel_values)
        if self.feature == "pooled":
            embeds = self.vision_model.vision_model(pixel_values=pixel_values).pooler_output
        else:
            embeds = self.vision_model(pixel_values=pixel_values).image_embeds
        return F.normalize(embeds, dim=-1)
