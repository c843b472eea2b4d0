"""`pipeline("zero-shot-image-classification", model=..., trust_remote_code=True)`: images and labels in, scores out."""

import torch
from transformers.models.clip.modeling_clip import CLIPOutput

from .modeling_tinycap import TinyCapForConditionalGeneration


class TinyCapForZeroShotImageClassification(TinyCapForConditionalGeneration):
    """The captioner with CLIP's `forward`: compares images with texts. For checkpoints with a text encoder."""

    def forward(
        self,
        pixel_values: torch.FloatTensor,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> CLIPOutput:
        """Compares B images with N texts.

        Args:
            pixel_values: (B, C, image_size, image_size).
            input_ids, attention_mask: (N, L).

        Returns:
            `CLIPOutput` of `logits_per_image` (B, N), cosines times `logit_scale.exp()`; its transpose
            `logits_per_text`; `image_embeds` (B, D) and `text_embeds` (N, D), of unit norm; both encoders' outputs.

        Raises:
            ValueError: the checkpoint has no text encoder.
        """
        texts = self.get_text_features(input_ids, attention_mask, return_dict=True)
        images = self.get_image_features(pixel_values, return_dict=True)
        image_embeds = self.project_for_texts(images.image_embeds)
        logits = self.logit_scale.exp() * image_embeds @ texts.text_embeds.T
        return CLIPOutput(
            logits_per_image=logits,
            logits_per_text=logits.T,
            text_embeds=texts.text_embeds,
            image_embeds=image_embeds,
            text_model_output=texts,
            vision_model_output=images,
        )


TinyCapForZeroShotImageClassification.register_for_auto_class("AutoModelForZeroShotImageClassification")


__all__ = ["TinyCapForZeroShotImageClassification"]
