"""TinyCap: a student ViT distilled from CLIP, and a causal decoder that captions the student's image embedding.

Reading order follows the data: image -> student (`vision_tinycap.py`) -> memory -> decoder -> caption.

What is unusual here:
- The decoder attends to ONE memory vector, the image embedding times `memory_scale`, projected. A softmax over one key
  is 1, so without gradients cross-attention is a constant per image and layer, computed once and cached.
- One image may come with K captions: `labels` of B * K rows go with B images, and the student runs once per image.
- `forward(pixel_values, labels, teacher_embeds)` returns the joint loss and each named part of it.

Shapes: B images, N = B * K captions, T or L tokens, M memory vectors (1, or the student's tokens).
"""

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import __version__ as TRANSFORMERS_VERSION
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import ModelOutput

from .checks_tinycap import check_generation
from .configuration_tinycap import TinyCapConfig, TinyCapTextConfig
from .layers_tinycap import TinyCapAttention, TinyCapMLP, dropout_layer
from .text_tinycap import TextFeaturesMixin, TinyCapTextModel
from .vision_tinycap import TinyCapPreTrainedModel, TinyCapVisionModel, TinyCapVisionOutput, position_table


if TYPE_CHECKING:
    # `save_pretrained` copies the files named in relative imports; transformers 4 only looks at those of this file.
    from .confidence_tinycap import ConfidenceCalibration  # noqa: F401
    from .pipeline_tinycap import ImageToTextPipeline  # noqa: F401
    from .processing_tinycap import load_image  # noqa: F401
    from .zero_shot_tinycap import TinyCapForZeroShotImageClassification  # noqa: F401


# Rows of logits that exist at once when the caption loss is computed without returning logits.
LOSS_CHUNK = 256
# `None`, but 20 in transformers 4.
DEFAULT_MAX_LENGTH = GenerationConfig().max_length


@dataclass
class TinyCapOutput(Seq2SeqLMOutput):
    """Output of `TinyCapForConditionalGeneration`: `Seq2SeqLMOutput` and the named parts of the loss.

    Args:
        loss: scalar, `caption_loss + distill_weight * distill_loss`, of the parts that could be computed.
        logits: (N, T, vocab_size); `None` with `skip_logits=True`.
        cache (`past_key_values` before transformers 5.24): the `EncoderDecoderCache`, with `use_cache`.
        decoder_hidden_states, decoder_attentions, cross_attentions: per layer, when asked for.
        encoder_last_hidden_state, encoder_hidden_states, encoder_attentions: see `TinyCapVisionOutput`.
        image_embeds: (B, projection_dim), unit norm; only beside a loss.
        caption_loss: scalar, mean cross-entropy (nats) over the labels that aren't -100.
        distill_loss: scalar, mean of 1 - cos(image_embeds, teacher_embeds).
    """

    image_embeds: torch.FloatTensor | None = None
    caption_loss: torch.FloatTensor | None = None
    distill_loss: torch.FloatTensor | None = None


# --- causal decoder -------------------------------------------------------------------------------------------------


class TinyCapDecoderOutput(NamedTuple):
    """Of one step; a `ModelOutput` would take as long to build as a layer takes to compute a token."""

    last_hidden_state: torch.Tensor
    hidden_states: tuple | None
    attentions: tuple | None
    cross_attentions: tuple | None


class TinyCapCrossAttention(TinyCapAttention):
    """Attention from the text to the memory (B, M, hidden_size).

    With M = 1 the softmax is 1 whatever query and key are, and the output is `out_proj(v_proj(memory))` for every
    token. Without gradients that constant is computed once per image and cached. Training takes the general path, so
    that every parameter takes part in the graph, as `DistributedDataParallel` requires. `norm`, the layer's, is applied
    to what the queries are made of, on the general path.
    """

    def memory_states(
        self, memory: torch.Tensor | None, memory_length: int, cache: EncoderDecoderCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, heads, M, head_dim); with M = 1 and a cache, the constant stands in the keys' place."""
        if memory is None:
            cached = cache.cross_attention_cache.layers[self.layer_idx]
            if cached.keys.shape[2] == memory_length:
                return cached.keys, cached.values
            # A static cache may be longer than the memory.
            return cached.keys[:, :, :memory_length], cached.values[:, :, :memory_length]
        values = self.v_proj(memory)
        # With M = 1 any key of the right shape serves the general path too, since its weight is 1.
        constant = memory_length == 1 and (cache is not None or not torch.is_grad_enabled())
        keys = self.split_heads(self.out_proj(values) if constant else self.k_proj(memory))
        values = self.split_heads(values)
        if cache is not None:
            cache.cross_attention_cache.update(keys, values, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return keys, values

    def forward(self, hidden_states, norm, memory, memory_length: int, cache=None, output_attentions=False, **kwargs):
        keys, values = self.memory_states(memory, memory_length, cache)
        if memory_length == 1 and not (self.training or torch.is_grad_enabled() or output_attentions):
            return keys.reshape(keys.shape[0], 1, -1), None
        return self.attend(norm(hidden_states), keys, values, output_attentions=output_attentions, **kwargs)


class TinyCapDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: TinyCapTextConfig, layer_idx: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = TinyCapAttention(config, layer_idx, is_causal=True)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = TinyCapCrossAttention(config, layer_idx)
        self.layer_norm3 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TinyCapMLP(config)
        self.dropout = dropout_layer(config.hidden_dropout_prob)

    def forward(self, hidden_states, memory, memory_length: int, attention_mask=None, **kwargs):
        attended, self_weights = self.self_attn(self.layer_norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        attended, cross_weights = self.cross_attn(hidden_states, self.layer_norm2, memory, memory_length, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        hidden_states = hidden_states + self.dropout(self.mlp(self.layer_norm3(hidden_states)))
        return hidden_states, self_weights, cross_weights


def check_static_cache() -> None:
    """Raises `ValueError` before transformers 5.4, whose static layers write every token to the first slot."""
    if tuple(map(int, TRANSFORMERS_VERSION.split(".")[:2])) < (5, 4):
        raise ValueError(f"cache: a static one needs transformers 5.4 or newer, got {TRANSFORMERS_VERSION}")


class TinyCapDecoder(TinyCapPreTrainedModel):
    """Memory and tokens -> hidden states. Pre-norm, learned positions, causal self-attention, cross-attention."""

    config_class = TinyCapTextConfig

    def __init__(self, config: TinyCapTextConfig, memory_width: int, memory_scale: float):
        super().__init__(config)
        self.memory_scale = memory_scale
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.memory_projection = nn.Linear(memory_width, config.hidden_size)
        self.layers = nn.ModuleList([TinyCapDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = dropout_layer(config.hidden_dropout_prob)
        self.gradient_checkpointing = False
        self.post_init()

    def project_memory(self, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, M, projection_dim or the student's hidden_size) -> (B, M, hidden_size of the text)."""
        # The layer norm has the dtype of the computation; a quantised linear layer has that of its storage.
        memory = encoder_hidden_states.to(self.final_layer_norm.weight.dtype) * self.memory_scale
        return self.memory_projection(memory)

    def position_ids(self, attention_mask: torch.Tensor | None, past_length, length: int, device) -> torch.Tensor:
        """(L,) or (N, L): counted from each row's first real token, so that left padding changes nothing."""
        if attention_mask is None:
            return past_length + torch.arange(length, device=device)
        if attention_mask.dim() == 4:
            seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            return (seen[:, 0].sum(dim=-1) - 1).clamp(min=0)
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]

    def causal_mask(self, attention_mask, past_length, static_length: int, hidden_states, eager: bool):
        """The mask for the attention function: `None` where it needs none, else (N or 1, 1, L, keys).

        There are past_length + L keys, or `static_length` of them, empty ones last, when that isn't 0.
        """
        length, device, dtype = hidden_states.shape[1], hidden_states.device, hidden_states.dtype
        if attention_mask is None:
            if not static_length and (length == 1 or (past_length == 0 and not eager)):
                return None
        elif attention_mask.dim() == 4:
            return attention_mask
        if not eager and "flash" in self.config._attn_implementation:
            return attention_mask
        keys = torch.arange(static_length or past_length + length, device=device)
        allowed = (keys <= past_length + torch.arange(length, device=device)[:, None])[None, None]
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (0, len(keys) - attention_mask.shape[1]))
            allowed = allowed & attention_mask[:, None, None, :].bool()
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    def cache_lengths(self, cache, length: int, attention_mask: torch.Tensor | None) -> tuple:
        """Tokens in the cache, and slots of a static one (0 for others); see `forward` for the errors."""
        past_length = static_length = 0
        if cache is not None:
            if not isinstance(cache, EncoderDecoderCache):
                raise ValueError(f"cache: expected an EncoderDecoderCache, got {type(cache).__name__}")
            past_length, layers = cache.get_seq_length(), cache.self_attention_cache.layers
            # Only the layers of a static cache have this attribute; those of a dynamic one may not exist yet.
            static_length = getattr(layers[0], "max_cache_len", 0) if layers else 0
        # By shapes alone: reading positions would break graphs and synchronise with the device in every step.
        last = static_length or past_length + length
        if attention_mask is not None and attention_mask.dim() == 2:
            last = max(last, attention_mask.shape[1])
        if last > self.embed_positions.num_embeddings:
            raise ValueError(
                f"expected at most {self.embed_positions.num_embeddings} tokens (max_position_embeddings), got {last}"
                f"{' slots of a static cache' if static_length else ', padding included'}"
            )
        if static_length:
            check_static_cache()
        return past_length, static_length

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        **kwargs,
    ) -> TinyCapDecoderOutput:
        """Runs the decoder over the tokens that aren't in the cache yet.

        Args:
            input_ids: (N, L), or `inputs_embeds` (N, L, hidden_size), exactly one of them.
            encoder_hidden_states: (N, M, width): the memory, neither scaled nor projected.
            attention_mask: (N, cached + L), 0 on padding, or a 4-dimensional mask for the attention function.
            cache: updated in place.

        Raises:
            ValueError: both or neither input; a cache of another kind; more tokens than positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of decoder_input_ids and decoder_inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length, memory_length = hidden_states.shape[1], encoder_hidden_states.shape[1]
        past_length, static_length = self.cache_lengths(cache, length, attention_mask)
        position_ids = self.position_ids(attention_mask, past_length, length, hidden_states.device)
        hidden_states = self.dropout(hidden_states + self.embed_positions(position_ids))
        eager = output_attentions or self.config._attn_implementation == "eager"
        mask = self.causal_mask(attention_mask, past_length, static_length, hidden_states, eager)
        kwargs |= {"attention_mask": mask, "cache": cache, "output_attentions": output_attentions}
        cached = cache is not None and cache.is_updated.get(len(self.layers) - 1)
        memory = None if cached else self.project_memory(encoder_hidden_states)
        all_hidden_states, self_attentions, cross_attentions = (hidden_states,), (), ()
        for layer in self.layers:
            hidden_states, self_weights, cross_weights = layer(hidden_states, memory, memory_length, **kwargs)
            all_hidden_states += (hidden_states,)
            self_attentions += (self_weights,)
            cross_attentions += (cross_weights,)
        return TinyCapDecoderOutput(
            last_hidden_state=self.final_layer_norm(hidden_states),
            hidden_states=all_hidden_states if output_hidden_states else None,
            attentions=self_attentions if output_attentions else None,
            cross_attentions=cross_attentions if output_attentions else None,
        )


# --- the captioner --------------------------------------------------------------------------------------------------


def shift_tokens_right(labels: torch.Tensor, decoder_start_token_id: int, pad_token_id: int) -> torch.Tensor:
    """Decoder inputs (N, T) for `labels` (N, T): the start token, then every label but the last; -100 becomes pad."""
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


class TinyCapForConditionalGeneration(TinyCapPreTrainedModel, TextFeaturesMixin, GenerationMixin):
    """Student, decoder, joint objective `L = caption_loss + distill_weight * distill_loss`; may have a text encoder."""

    _tied_weights_keys = {"lm_head.weight": "decoder.embed_tokens.weight"}
    # The losses are means over the micro-batch, which `Trainer` scales for gradient accumulation.
    accepts_loss_kwargs = False

    def __init__(self, config: TinyCapConfig):
        super().__init__(config)
        self.vision_model = TinyCapVisionModel._from_config(config.vision_config)
        width, scale = config.vision_config.hidden_size, 1.0
        if config.memory == "embedding":
            # A unit-norm vector of 768 has entries near 0.036; this brings them back to the size of 1.
            width, scale = config.vision_config.projection_dim, math.sqrt(config.vision_config.projection_dim)
        self.memory_width, scale = width, config.memory_scale or scale
        self.decoder = TinyCapDecoder._from_config(config.text_config, memory_width=width, memory_scale=scale)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.add_text_encoder(config)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> TinyCapVisionModel:
        return self.vision_model

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        self.decoder.embed_tokens = value

    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> TinyCapVisionOutput | tuple:
        """`TinyCapVisionModel.forward`, under the name of CLIP's in transformers 5.

        The output's `pooler_output` (B, projection_dim) is the image embedding. Unlike CLIP's it has unit norm.
        """
        # This model's config counts, not the student's.
        return self.vision_model(pixel_values, **{"return_dict": self.config.return_dict, **kwargs})

    def get_memory(self, encoder_outputs: ModelOutput) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the decoder attends to, from the student's output or from bare embeddings.

        Args:
            encoder_outputs: a `TinyCapVisionOutput`; with `memory="embedding"` also a `BaseModelOutput` whose
                `pooler_output` (B, projection_dim) or `last_hidden_state` (B, 1, projection_dim) is an embedding of any
                norm, as a teacher's.

        Returns:
            The memory (B, M, width) and `image_embeds` (B, projection_dim) or `None`.

        Raises:
            ValueError: neither of the two; names the expected shapes.
        """
        memory, image_embeds = encoder_outputs.last_hidden_state, getattr(encoder_outputs, "pooler_output", None)
        width = self.memory_width
        if self.config.memory == "patches":
            if memory.dim() != 3 or memory.shape[-1] != width:
                shapes = f"last_hidden_state (B, tokens, {width}), got {tuple(memory.shape)}"
                raise ValueError(f"encoder_outputs: with memory='patches' expected {shapes}")
            return memory, image_embeds
        memory = memory if image_embeds is None else image_embeds.unsqueeze(1)
        if memory.dim() != 3 or memory.shape[1:] != (1, width):
            shapes = f"pooler_output (B, {width}) or last_hidden_state (B, 1, {width}), got {tuple(memory.shape)}"
            raise ValueError(f"encoder_outputs: expected {shapes}")
        if image_embeds is None or not isinstance(encoder_outputs, TinyCapVisionOutput):
            memory = F.normalize(memory.float(), dim=-1).to(memory.dtype)
        return memory, memory[:, 0]

    def add_noise(self, memory: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, 1, projection_dim) of unit norm, each moved by `memory_noise` in a random direction."""
        noise = torch.randn_like(memory, dtype=torch.float32) * memory.shape[-1] ** -0.5
        return F.normalize(memory.float() + self.config.memory_noise * noise, dim=-1).to(memory.dtype)

    def expand_memory(self, memory: torch.Tensor, num_captions: int) -> torch.Tensor:
        """The memory (N, M, width) of N captions, from that of B images; with noise in training."""
        if num_captions % memory.shape[0]:
            raise ValueError(f"expected K captions for each of {memory.shape[0]} images, got {num_captions} captions")
        if num_captions != memory.shape[0]:
            memory = memory.repeat_interleave(num_captions // memory.shape[0], dim=0)
        return self.add_noise(memory) if self.training and self.config.memory_noise > 0 else memory

    # --- the objective ---

    def caption_loss(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean cross-entropy, in nats, over the labels that aren't -100; 0 where all are.

        Args:
            hidden_states: (N, T, hidden_size), the decoder's.
            labels: (N, T).
            logits: (N, T, vocab_size). Without them, padding never reaches the head and at most `LOSS_CHUNK` rows of
                logits exist at a time: the backward pass recomputes each chunk.
        """
        smoothing, wanted = self.config.label_smoothing if self.training else 0.0, labels != -100

        def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction="sum")

        def of_chunk(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return cross_entropy(self.lm_head(states), labels)

        if logits is not None:
            total = cross_entropy(logits.flatten(0, 1), labels.flatten())
        else:
            chunks = zip(hidden_states[wanted].split(LOSS_CHUNK), labels[wanted].split(LOSS_CHUNK))
            total = sum(checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks)
        # Divided last, so that a gradient scaler's factor reaches float16 gradients before the division.
        return total / wanted.sum().clamp(min=1)

    def distill_loss(self, image_embeds: torch.Tensor | None, teacher_embeds: torch.Tensor) -> torch.Tensor:
        """Mean of 1 - cos over the batch; both (B, projection_dim), or `ValueError` names both shapes."""
        expected = None if image_embeds is None else tuple(image_embeds.shape)
        if expected != tuple(teacher_embeds.shape):
            raise ValueError(
                f"teacher_embeds: expected the student's shape (batch, projection_dim) = {expected}, "
                f"got {tuple(teacher_embeds.shape)}"
            )
        return (1.0 - F.cosine_similarity(image_embeds.float(), teacher_embeds.float(), dim=-1)).mean()

    def named_losses(self, hidden_states, labels, logits, image_embeds, teacher_embeds) -> dict[str, torch.Tensor]:
        """The loss, its parts and `image_embeds`; empty, as `Seq2SeqLMOutput` for callers who index it, without one."""
        losses = {}
        if labels is not None:
            losses["caption_loss"] = self.caption_loss(hidden_states, labels, logits)
        if teacher_embeds is not None:
            losses["distill_loss"] = self.distill_loss(image_embeds, teacher_embeds)
        if losses:
            distilled = self.config.distill_weight * losses.get("distill_loss", 0.0)
            losses |= {"loss": losses.get("caption_loss", 0.0) + distilled, "image_embeds": image_embeds}
        return losses

    # --- forward ---

    def prepare_texts(self, input_ids, attention_mask, inputs_embeds, labels, kwargs: dict) -> tuple:
        """The decoder's inputs, from `forward`'s arguments, a processor's names in `kwargs`, or the labels."""
        # Not in the signature: there, GenerationMixin of transformers 4 would make an `attention_mask` for the images.
        ids, mask, embeds = [kwargs.pop(name, None) for name in ("input_ids", "attention_mask", "inputs_embeds")]
        if ids is not None and labels is not None and ids.shape == labels.shape:
            # The convention of decoder-only models; here it would teach the decoder to copy its input.
            if not torch.compiler.is_compiling() and bool(((ids == labels) | (labels == -100)).all()):
                raise ValueError("labels: expected the tokens that follow input_ids, got input_ids; leave those out")
        input_ids = ids if input_ids is None else input_ids
        inputs_embeds = embeds if inputs_embeds is None else inputs_embeds
        if input_ids is None and inputs_embeds is None and labels is not None:
            input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        return input_ids, mask if attention_mask is None else attention_mask, inputs_embeds

    def prepare_cache(self, cache, past_key_values, use_cache: bool | None, labels: torch.Tensor | None) -> tuple:
        """The `EncoderDecoderCache` to decode with, or `None`, and whether to return it."""
        # What `generate` calls the cache before transformers 5.24.
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and labels is None
        if self.decoder.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # The backward pass runs every layer again and would write its keys a second time.
            tokens = 0 if cache is None else int(cache.get_seq_length())
            if tokens > 0:
                raise ValueError(f"cache: expected an empty one with gradient checkpointing, got {tokens} tokens")
            return None, False
        return EncoderDecoderCache(DynamicCache(), DynamicCache()) if use_cache and cache is None else cache, use_cache

    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple | None = None,
        cache: EncoderDecoderCache | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        teacher_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        interpolate_pos_encoding: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        captioned: torch.LongTensor | None = None,
        **kwargs,
    ) -> TinyCapOutput | tuple:
        """Scores captions of images, and the images' embeddings against a teacher's.

        Args:
            pixel_values: (B, C, image_size, image_size); not needed with `encoder_outputs`.
            decoder_input_ids: (N, L), N = B * K captions, those of an image next to each other; made from `labels`
                when absent, and the start token alone without labels.
            decoder_attention_mask: (N, cached + L), 0 on padding.
            encoder_outputs: output of the student, or bare embeddings (see `get_memory`).
            cache: `EncoderDecoderCache` of the tokens before; updated in place.
            decoder_inputs_embeds: (N, L, hidden_size), in place of `decoder_input_ids`.
            labels: (N, T), the caption's tokens and the end token, no start token; -100 is ignored.
            teacher_embeds: (B, projection_dim), the target of the image embeddings.
            use_cache: return the cache; by default as the config says, and not with labels.
            interpolate_pos_encoding: accept images of another size.
            logits_to_keep: compute only that many last positions' logits; 0 means all.
            skip_logits: with labels, compute the loss without keeping logits: padding never reaches the head.
            past_key_values: the cache, before transformers 5.24.
            captioned: (C,) numbers of the images that the captions are of, then N = C * K; all if not given.
            input_ids, attention_mask, inputs_embeds: the decoder's, under the names that a processor gives them.

        Raises:
            ValueError: an argument has the wrong shape or is missing; names it, what was expected and what came.
        """
        cache, use_cache = self.prepare_cache(cache, past_key_values, use_cache, labels)
        attentions, states, return_dict = self.output_flags(output_attentions, output_hidden_states, return_dict)
        texts = (decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds)
        input_ids, attention_mask, inputs_embeds = self.prepare_texts(*texts, labels, kwargs)
        if encoder_outputs is None:
            encoder_outputs = self.vision_model(pixel_values, interpolate_pos_encoding, attentions, states, True)
        elif isinstance(encoder_outputs, (tuple, list)):
            encoder_outputs = TinyCapVisionOutput(*encoder_outputs[:2])
        memory, image_embeds = self.get_memory(encoder_outputs)
        memory = memory if captioned is None else memory[captioned]
        if input_ids is None and inputs_embeds is None:
            input_ids = memory.new_full((memory.shape[0], 1), self.config.decoder_start_token_id, dtype=torch.long)
        memory = self.expand_memory(memory, len(input_ids if inputs_embeds is None else inputs_embeds))
        decoded = self.decoder(
            input_ids=input_ids,
            encoder_hidden_states=memory,
            attention_mask=attention_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
            output_attentions=attentions,
            output_hidden_states=states,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = None if skip_logits and labels is not None else self.lm_head(decoded.last_hidden_state[:, kept])
        losses = self.named_losses(decoded.last_hidden_state, labels, logits, image_embeds, teacher_embeds)
        output = TinyCapOutput(
            losses.pop("loss", None),
            logits,
            # By position: transformers 5.24 renamed this field, and `generate` looks for its own version's name.
            cache if use_cache else None,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            **losses,
        )
        return output if return_dict else output.to_tuple()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Decoder inputs (N, T) for `labels` (N, T), as `DataCollatorForSeq2Seq` asks for them."""
        return shift_tokens_right(labels, self.config.decoder_start_token_id, self.config.pad_token_id)

    # --- generation: GenerationMixin's; these adapt prompts, steps and lengths to the decoder ---

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, *args, **kwargs):
        """`GenerationMixin.generate`, with the prompt as a processor gives it.

        Args:
            inputs: `pixel_values` (B, C, H, W); or give `pixel_values=` or `encoder_outputs=`.
            input_ids (or decoder_input_ids): (B, L), the beginning of each caption, with or without its start token,
                padded on the left; `attention_mask` (or `decoder_attention_mask`) says where. What is returned begins
                with them, without columns that are padding in every row.
            kwargs: as `GenerationMixin.generate`. Captions end at `max_position_embeddings` tokens at the latest, start
                token and prompt included.

        Raises:
            ValueError: there are no images; a prompt leaves no room in the position table, or under `max_length`.
        """
        if inputs is None and kwargs.get("pixel_values") is None and kwargs.get("encoder_outputs") is None:
            raise ValueError(
                "pixel_values: expected images, got none; pipeline('image-text-to-text') takes images=... with text=''"
            )
        if isinstance(kwargs.get("encoder_outputs"), ModelOutput):
            # GenerationMixin repeats its tensors for every beam in place, which must not reach the caller's object.
            kwargs["encoder_outputs"] = copy.copy(kwargs["encoder_outputs"])
        prompt, mask = kwargs.pop("input_ids", None), kwargs.pop("attention_mask", None)
        prompt, mask = kwargs.pop("decoder_input_ids", prompt), kwargs.pop("decoder_attention_mask", mask)
        length = 1
        if prompt is not None:
            # With the mask: given a cache, GenerationMixin tells new tokens from old by its length.
            prompt, kwargs["decoder_attention_mask"] = self.start_prompts(prompt, mask)
            kwargs["decoder_input_ids"], length = prompt, prompt.shape[1]
        configs = [vars(config) for config in (generation_config, self.generation_config) if config is not None]
        static = "static" in next(filter(None, (each.get("cache_implementation") for each in (kwargs, *configs))), "")
        if static:
            check_static_cache()
        # What outlives the call can't be of inference mode: that couldn't be trained on or written to.
        returns_dict = any(each.get("return_dict_in_generate") for each in (kwargs, *configs))
        given_cache = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        mode = nullcontext() if static or returns_dict or given_cache else torch.inference_mode()
        limit = self.caption_limit(length, kwargs, configs)
        # One of the two lengths reaches GenerationMixin: it prefers its own config's `max_new_tokens` to `max_length`.
        if generation_config is None:
            kwargs.update(max_length=limit, max_new_tokens=None)
        else:
            generation_config = copy.deepcopy(generation_config)
            generation_config.max_length, generation_config.max_new_tokens = DEFAULT_MAX_LENGTH, limit - length
            kwargs = {name: value for name, value in kwargs.items() if name not in ("max_length", "max_new_tokens")}
        with mode:
            generated = super().generate(inputs, generation_config, *args, **kwargs)
        return generated.clone() if isinstance(generated, torch.Tensor) else generated

    def caption_limit(self, length: int, kwargs: dict, configs: list[dict]) -> int:
        """The most tokens of a caption, as the caller or else the configs say, and the position table has.

        Raises:
            ValueError: start token and prompt, `length` tokens, leave no room for another.
        """
        table = self.config.text_config.max_position_embeddings
        if length >= table:
            raise ValueError(f"prompt: expected fewer than {table} tokens, got {length}")
        for settings in (kwargs, *configs):
            check_generation(settings, "generate")
        # As GenerationMixin, 20 new tokens unless anything is set; the first that sets a length counts.
        limit = length + 20
        for settings in (kwargs, *configs):
            new_tokens, total = settings.get("max_new_tokens"), settings.get("max_length")
            if new_tokens is not None:
                limit = length + new_tokens
                break
            if total is not None and (settings is kwargs or total != DEFAULT_MAX_LENGTH):
                limit = total
                break
        if limit <= length:
            raise ValueError(f"max_length: expected more than {length} (start token and prompt), got {limit}")
        return min(limit, table)

    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, **kwargs) -> dict:
        """GenerationMixin's for the first step; afterwards, with a dynamic cache, one more token is all that changes.

        Its general preparation would take a fifth of so short a step.
        """
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        first = kwargs.get("is_first_iteration", False) or kwargs.get("next_sequence_length") != 1
        if first or cache is None or cache.is_compileable:
            return super().prepare_inputs_for_generation(input_ids, **kwargs)
        for name in ("next_sequence_length", "is_first_iteration", "labels"):
            kwargs.pop(name, None)
        return {"decoder_input_ids": input_ids[:, -1:], **kwargs}

    def start_prompts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts the start token right before the first real token of each row that doesn't begin with it.

        Columns on the left that are padding in every row are left out: before them GenerationMixin would put a start
        token of its own.
        """
        start, length = self.config.decoder_start_token_id, input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
        # One more column on the left: now every row has a slot before its first real token.
        input_ids = F.pad(input_ids, (1, 0), value=self.config.pad_token_id)
        mask = F.pad(mask, (1, 0))
        first = torch.where(mask.any(dim=1), mask.argmax(dim=1), length + 1).unsqueeze(1)
        started = (first <= length) & (input_ids.gather(1, first.clamp(max=length)) == start)
        slot = (torch.arange(length + 1, device=input_ids.device) == first - 1) & ~started
        input_ids, mask = input_ids.masked_fill(slot, start), mask.masked_fill(slot, 1)
        padding = int(mask.any(dim=0).int().argmax())
        return input_ids[:, padding:], mask[:, padding:]


TinyCapForConditionalGeneration.register_for_auto_class("AutoModel")


__all__ = [
    "TinyCapForConditionalGeneration",
    "TinyCapOutput",
    "TinyCapPreTrainedModel",
    "TinyCapTextModel",
    "TinyCapVisionModel",
    "TinyCapVisionOutput",
    "position_table",
    "shift_tokens_right",
]
