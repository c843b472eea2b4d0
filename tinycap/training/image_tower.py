"""A pretrained image model of any architecture as a teacher's image tower."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor


# Images that a frozen tower embeds together on a CPU: their activations fit the CPU's caches.
FROZEN_BATCH_SIZE = 32


class PretrainedImageTower(nn.Module):
    """An image classifier with a new head that projects to the joint space; called like a CLIP image tower.

    As in open_clip's towers from timm, the last linear layer has `projection_dim` outputs instead of classes: any model
    of `AutoModelForImageClassification` will do, and is saved in its own format.

    Args:
        classifier: the model; its `num_labels` is the width of the joint space.
        is_frozen: train the head only; everything before it stays in eval mode.
    """

    def __init__(self, classifier: PreTrainedModel, is_frozen: bool = False):
        super().__init__()
        self.classifier = classifier
        self.is_frozen = is_frozen
        if is_frozen:
            self.base.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, projection_dim: int | None = None, is_frozen: bool = False
    ) -> "PretrainedImageTower":
        """Loads a tower from the Hub or a folder.

        Args:
            projection_dim: width of a new head; `None` keeps the saved one.

        Raises:
            ValueError: it can't be found, is no image classifier, or weights of it are missing.
        """
        given = {} if projection_dim is None else {"num_labels": projection_dim, "ignore_mismatched_sizes": True}
        try:
            classifier, report = AutoModelForImageClassification.from_pretrained(
                name_or_path, dtype=torch.float32, output_loading_info=True, **given
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"image model {name_or_path}: expected an image model with a classification head on the Hub or in a "
                f"local folder: {error}"
            ) from error
        # A mismatched weight comes as (name, shape in the file, shape in the model).
        mismatched = [entry if isinstance(entry, str) else entry[0] for entry in report["mismatched_keys"]]
        wrong = sorted({*report["missing_keys"], *mismatched})
        if projection_dim is not None:
            # The new head has no saved weights.
            wrong = [name for name in wrong if name.startswith(f"{classifier.base_model_prefix}.")]
        if wrong:
            raise ValueError(
                f"image model {name_or_path}: expected all its weights, {len(wrong)} are missing or of another shape: "
                f"{', '.join(wrong[:5])}"
            )
        return cls(classifier, is_frozen)

    @property
    def base(self) -> PreTrainedModel:
        """The classifier without its head."""
        return self.classifier.base_model

    @property
    def config(self) -> SimpleNamespace:
        """`image_size` (pixels) and `projection_dim`, as in a CLIP image tower's configuration."""
        config = self.classifier.config
        return SimpleNamespace(image_size=config.image_size, projection_dim=config.num_labels)

    def set_image_size(self, image_size: int) -> None:
        """Sets the side of the input images, pixels; raises `ValueError` where learned positions fix another one."""
        config = self.classifier.config
        has_positions = any("position" in name for name, _ in self.base.named_parameters())
        if has_positions and image_size != config.image_size:
            raise ValueError(
                f"image_size: expected {config.image_size}, at which the image model has learned positions, "
                f"got {image_size}"
            )
        config.image_size = image_size

    def train(self, mode: bool = True) -> "PretrainedImageTower":
        super().train(mode)
        if self.is_frozen:
            # In train mode, batch statistics and dropped blocks would change its outputs.
            self.base.eval()
        return self

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        """(B, 3, H, W) pixels to `image_embeds` (B, projection_dim)."""
        # Convolutions on a CPU are faster with channels last.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        in_parts = self.is_frozen and pixel_values.device.type == "cpu"
        parts = pixel_values.split(FROZEN_BATCH_SIZE) if in_parts else [pixel_values]
        return SimpleNamespace(image_embeds=torch.cat([self.classifier(pixel_values=part).logits for part in parts]))

    def save_pretrained(self, output_dir: str | Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Writes the classifier in its own format, from the tower's `state_dict` as `accelerate` gathers it."""
        tensors = {name.removeprefix("classifier."): value for name, value in state_dict.items()}
        self.classifier.save_pretrained(output_dir, state_dict=tensors)


def pixel_statistics(name_or_path: str) -> tuple[list[float], list[float]] | None:
    """Mean and deviation per channel that an image model's pixels are normalised by; `None` without a processor."""
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError):
        return None
    return list(processor.image_mean), list(processor.image_std)
