"""The text encoder, which embeds texts where the student embeds images: for search and zero-shot classification.

Data flows: text -> token embedding (the decoder's) -> text encoder -> text embedding, beside an image embedding.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_tinycap import TinyCapConfig, TinyCapTextEncoderConfig
from .layers_tinycap import TinyCapEncoderLayer
from .vision_tinycap import TinyCapPreTrainedModel


class TinyCapTextOutput(BaseModelOutputWithPooling):
    """Output of the text encoder.

    Args:
        last_hidden_state: (N, L, hidden_size), after the final layer norm.
        pooler_output: (N, projection_dim), the text embedding, of unit norm; also called `text_embeds`.
        hidden_states, attentions: per layer, as transformers' own; the former before the final layer norm.
    """

    @property
    def text_embeds(self) -> torch.FloatTensor | None:
        return self.pooler_output


class TinyCapTextModel(TinyCapPreTrainedModel):
    """Bidirectional encoder of texts, pre-norm, with learned positions.

    A text's embedding is the projected mean of its tokens' last hidden states, as in Sentence-BERT (Reimers & Gurevych,
    2019, https://arxiv.org/abs/1908.10084).
    """

    config_class = TinyCapTextEncoderConfig
    main_input_name = "inputs_embeds"
    input_modalities = ("text",)

    def __init__(self, config: TinyCapTextEncoderConfig):
        super().__init__(config)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([TinyCapEncoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        inputs_embeds: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> TinyCapTextOutput | tuple:
        """Encodes texts.

        Args:
            inputs_embeds: (N, L, hidden_size), the token embeddings of the decoder.
            attention_mask: (N, L), 0 on padding, at either end.

        Raises:
            ValueError: a text has no token, or more tokens than there are positions.
        """
        attentions, states, return_dict = self.output_flags(output_attentions, output_hidden_states, return_dict)
        length, limit = inputs_embeds.shape[1], self.embed_positions.num_embeddings
        if not 0 < length <= limit:
            raise ValueError(f"input_ids: expected 1 to {limit} tokens (max_position_embeddings), got {length}")
        if attention_mask is None:
            attention_mask = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.long)
        # Counted from each text's first token, so that padding on the left changes nothing.
        position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        hidden_states = inputs_embeds + self.embed_positions(position_ids)
        mask = attention_mask
        if attentions or "flash" not in self.config._attn_implementation:
            mask = attention_mask[:, None, None, :].bool()
        all_hidden_states, all_attentions = (hidden_states,), ()
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, attention_mask=mask, output_attentions=attentions)
            all_hidden_states += (hidden_states,)
            all_attentions += (weights,)
        last_hidden_state = self.final_layer_norm(hidden_states)
        counted = attention_mask.unsqueeze(-1).to(last_hidden_state.dtype)
        # A row of padding only has no tokens to count; its embedding is that of a zero vector.
        mean = (last_hidden_state * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)
        text_embeds = self.projection(mean)
        text_embeds = F.normalize(text_embeds.float(), dim=-1).to(text_embeds.dtype)
        output = TinyCapTextOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=text_embeds,
            hidden_states=all_hidden_states if states else None,
            attentions=all_attentions if attentions else None,
        )
        return output if return_dict else output.to_tuple()


class TextFeaturesMixin:
    """CLIP's text side for the captioner; without a `text_encoder_config`, nothing but an error."""

    def add_text_encoder(self, config: TinyCapConfig) -> None:
        if config.text_encoder_config is None:
            return
        self.text_model = TinyCapTextModel._from_config(config.text_encoder_config)
        image_width, width = config.vision_config.projection_dim, config.text_encoder_config.projection_dim
        if image_width != width:
            # CLIP's own, where the student has learned the teacher's embedding before it (`teacher_feature="pooled"`).
            self.visual_projection = nn.Linear(image_width, width, bias=False)
        # CLIP's starting temperature (Radford et al., 2021, section 2.5).
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def get_text_features(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> TinyCapTextOutput | tuple:
        """`TinyCapTextModel.forward` of texts (N, L), under the name of CLIP's in transformers 5.

        The output's `pooler_output` (N, D), of unit norm, is to be compared with images by `project_for_texts`.

        Raises:
            ValueError: the checkpoint has no text encoder; a text has no token, or more than there are positions.
        """
        if self.config.text_encoder_config is None:
            raise ValueError("expected a checkpoint with a text encoder (text_encoder_config), got one without")
        if attention_mask is None and self.config.pad_token_id is not None:
            # CLIP's embeddings don't depend on padding either.
            attention_mask = (input_ids != self.config.pad_token_id).long()
        inputs_embeds = self.decoder.embed_tokens(input_ids)
        return self.text_model(inputs_embeds, attention_mask, **{"return_dict": self.config.return_dict, **kwargs})

    def project_for_texts(self, image_embeds: torch.FloatTensor) -> torch.FloatTensor:
        """The image embeddings (B, projection_dim) where the text embeddings are, (B, D) of unit norm."""
        if hasattr(self, "visual_projection"):
            image_embeds = self.visual_projection(image_embeds)
        return F.normalize(image_embeds.float(), dim=-1).to(image_embeds.dtype)


__all__ = ["TextFeaturesMixin", "TinyCapTextModel", "TinyCapTextOutput"]
