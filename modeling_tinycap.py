"""TinyCap: a student ViT that imitates CLIP's image embedding, and a causal decoder that says what it means.

Reading order follows the data: image -> student -> memory -> decoder -> caption.

What is unusual here:
- The decoder sees the image as ONE memory vector, the student's embedding times `memory_scale`, projected. Softmax over
  one key is 1, so without gradients cross-attention is a constant per image and layer, computed once and cached.
- One image may come with K captions: `labels` of B * K rows go with B images, and the student runs once per image.
- `forward(pixel_values, labels, teacher_embeds)` returns the joint loss and each named part of it.
"""

import copy
import math
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import __version__ as TRANSFORMERS_VERSION
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithCrossAttentions,
    BaseModelOutputWithPooling,
    Seq2SeqLMOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import ModelOutput, cached_file, logging

from .confidence_tinycap import CONFIDENCE_NAME
from .configuration_tinycap import TinyCapConfig, TinyCapTextConfig, TinyCapVisionConfig
from .weights_tinycap import HUB_ARGUMENTS, check_finite_weights, check_shapes, find_weights, stored_shapes


if TYPE_CHECKING:
    # `save_pretrained` copies the files it finds in relative imports: this brings the pipeline along. transformers 4
    # looks no further than this file, so that what the pipeline imports stands here too.
    from .pipeline_tinycap import ImageToTextPipeline  # noqa: F401
    from .processing_tinycap import load_image  # noqa: F401


logger = logging.get_logger(__name__)

# Rows of logits held at once when the caption loss is computed without returning logits.
LOSS_CHUNK = 256


class TinyCapVisionOutput(BaseModelOutputWithPooling):
    """Output of the student.

    Args:
        last_hidden_state: (B, 1 + patches, hidden_size), after the final layer norm; row 0 is `[CLS]`.
        pooler_output: (B, projection_dim), the image embedding, of unit norm; also called `image_embeds`.
        hidden_states: num_hidden_layers + 1 tensors like `last_hidden_state`, before the final layer norm.
        attentions: num_hidden_layers tensors (B, heads, tokens, tokens).
    """

    @property
    def image_embeds(self) -> torch.FloatTensor | None:
        return self.pooler_output


@dataclass
class TinyCapOutput(Seq2SeqLMOutput):
    """Output of `TinyCapForConditionalGeneration`: `Seq2SeqLMOutput` and the named parts of the loss.

    Args:
        loss: scalar, `caption_loss + distill_weight * distill_loss`, of the parts that could be computed.
        logits: (captions, T, vocab_size); `None` with `skip_logits=True`.
        cache (`past_key_values` before transformers 5.24): the `EncoderDecoderCache`, with `use_cache`.
        decoder_hidden_states, decoder_attentions, cross_attentions: per layer, when asked for.
        encoder_last_hidden_state, encoder_hidden_states, encoder_attentions: see `TinyCapVisionOutput`.
        image_embeds: (B, projection_dim), unit norm; where there is a loss.
        caption_loss: scalar, mean cross-entropy (nats) over the labels that aren't -100.
        distill_loss: scalar, mean of 1 - cos(image_embeds, teacher_embeds).
    """

    image_embeds: torch.FloatTensor | None = None
    caption_loss: torch.FloatTensor | None = None
    distill_loss: torch.FloatTensor | None = None


# --- attention and MLP, shared by student and decoder ---------------------------------------------------------------


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention as written (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762), with its weights.

    Args:
        query: (B, heads, L, head_dim); `key` and `value`: (B, heads, S, head_dim).
        attention_mask: (B or 1, 1, L, S), added to the scores, or bool with `False` where attention is forbidden.

    Returns:
        The output (B, L, heads, head_dim) and the weights (B, heads, L, S).
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class TinyCapAttention(nn.Module):
    """Multi-head self-attention over (B, L, hidden_size), causal or not, through transformers' attention interface."""

    def __init__(self, config: TinyCapVisionConfig | TinyCapTextConfig, layer_idx: int, is_causal: bool = False):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.num_key_value_groups = 1

        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(B, L, hidden_size) -> (B, heads, L, head_dim)."""
        return states.view(*states.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def attend(self, query, key, value, attention_mask, output_attentions, **kwargs):
        implementation = "eager" if output_attentions else self.config._attn_implementation
        attention = eager_attention_forward
        if implementation != "eager":
            attention = ALL_ATTENTION_FUNCTIONS[implementation]
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        output = output.reshape(*output.shape[:2], self.num_heads * self.head_dim)
        return self.out_proj(output), weights if output_attentions else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        output_attentions: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self.split_heads(self.q_proj(hidden_states))
        key = self.split_heads(self.k_proj(hidden_states))
        value = self.split_heads(self.v_proj(hidden_states))
        if cache is not None:
            key, value = cache.self_attention_cache.update(key, value, self.layer_idx)
        return self.attend(query, key, value, attention_mask, output_attentions, **kwargs)


class TinyCapCrossAttention(TinyCapAttention):
    """Attention from the text to the memory (B, M, hidden_size).

    With M = 1 the softmax is 1 whatever query and key say, and the output is `out_proj(v_proj(memory))` for every
    token. Where no gradient is wanted that constant is computed once per image and kept in the cache. Training takes
    the general path, so that every parameter takes part in the graph, as `DistributedDataParallel` asks.
    """

    def memory_states(
        self, memory: torch.Tensor | None, memory_length: int, cache: EncoderDecoderCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, heads, M, head_dim); with M = 1 and a cache, the constant stands in the keys' place."""
        if memory is None:
            cached = cache.cross_attention_cache.layers[self.layer_idx]
            # A static cache is as long as its owner made it.
            return cached.keys[:, :, :memory_length], cached.values[:, :, :memory_length]
        values = self.v_proj(memory)
        if memory_length == 1 and (cache is not None or not torch.is_grad_enabled()):
            # Any key of the right shape serves the general path too, since its weight is 1.
            keys = self.out_proj(values)
        else:
            keys = self.k_proj(memory)
        keys, values = self.split_heads(keys), self.split_heads(values)
        if cache is not None:
            cache.cross_attention_cache.update(keys, values, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return keys, values

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: torch.Tensor | None,
        memory_length: int,
        cache: EncoderDecoderCache | None = None,
        output_attentions: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        keys, values = self.memory_states(memory, memory_length, cache)
        if memory_length == 1 and not self.training and not torch.is_grad_enabled():
            constant = keys.transpose(1, 2).flatten(2)
            weights = None
            if output_attentions:
                weights = keys.new_ones(keys.shape[0], self.num_heads, hidden_states.shape[1], 1)
            return constant, weights
        query = self.split_heads(self.q_proj(hidden_states))
        return self.attend(query, keys, values, None, output_attentions, **kwargs)


class TinyCapMLP(nn.Module):
    def __init__(self, config: TinyCapVisionConfig | TinyCapTextConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        if config.hidden_act not in ACT2FN:
            raise ValueError(
                f"{type(config).__name__}.hidden_act: expected one of {', '.join(sorted(ACT2FN))}, "
                f"got {config.hidden_act!r}"
            )
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


# --- student ViT ----------------------------------------------------------------------------------------------------


def position_table(side: int, width: int) -> torch.Tensor:
    """What learned positions begin as: sines and cosines of both coordinates, for `[CLS]` and side x side patches.

    A patch is hundreds of pixels that mostly agree, so that its embedding is some fifty times as large as the usual
    initial positions (normal, 0.02) and moves as much faster under Adam: those would stay unheard for a long training.
    Waves of two dimensions as in MAE (He et al., 2022, https://arxiv.org/abs/2111.06377), their frequencies from half
    a period across the picture to half a period a patch.

    Returns:
        (1 + side * side, width), entries from -1 to 1, row 0 (`[CLS]`) zero.
    """
    quarter = -(-width // 4)
    frequencies = 0.5 * math.pi * side ** torch.linspace(0, 1, quarter)
    angles = (torch.arange(side)[:, None] + 0.5) / side * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    # Alternating, so that a width that is no multiple of 4 cuts both coordinates alike.
    both = torch.stack([waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)], dim=-1)
    return torch.cat([torch.zeros(1, width), both.flatten(2).flatten(0, 1)[:, :width]])


class TinyCapVisionEmbeddings(nn.Module):
    """Pixels (B, C, H, W) -> tokens (B, 1 + patches, hidden_size), `[CLS]` first."""

    def __init__(self, config: TinyCapVisionConfig):
        super().__init__()
        self.config = config
        self.num_patches = (config.image_size // config.patch_size) ** 2
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + self.num_patches, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """The position table, interpolated to a grid of `rows` x `columns` patches."""
        side = math.isqrt(self.num_patches)
        if (rows, columns) == (side, side):
            return self.position_embeddings
        cls_position, grid = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid.float(), size=(rows, columns), mode="bicubic", align_corners=False).to(grid.dtype)
        return torch.cat([cls_position, grid.flatten(2).transpose(1, 2)], dim=1)

    def drop_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """Leaves a random `patch_dropout` of each image's patches out, another choice for each image."""
        batch, length, width = patches.shape
        kept = max(1, round(length * (1.0 - self.config.patch_dropout)))
        index = torch.rand(batch, length, device=patches.device).argsort(dim=1)[:, :kept]
        return patches.gather(1, index.unsqueeze(-1).expand(-1, -1, width))

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        size, patch = self.config.image_size, self.config.patch_size
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values: expected (batch, {self.config.num_channels}, height, width), "
                f"got {tuple(pixel_values.shape)}"
            )
        height, width = pixel_values.shape[2:]
        if not interpolate_pos_encoding and (height, width) != (size, size):
            raise ValueError(
                f"pixel_values: expected {size}x{size} pixels, got {height}x{width}; "
                "pass interpolate_pos_encoding=True to encode another size"
            )
        if height < patch or width < patch:
            raise ValueError(f"pixel_values: expected at least {patch}x{patch} pixels, got {height}x{width}")
        patches = self.patch_embedding(pixel_values.to(self.cls_token.dtype))
        positions = self.positions(*patches.shape[2:])
        patches = patches.flatten(2).transpose(1, 2) + positions[:, 1:]
        if self.training and self.config.patch_dropout > 0:
            patches = self.drop_patches(patches)
        cls_token = (self.cls_token + positions[:, :1]).expand(patches.shape[0], -1, -1)
        return self.dropout(torch.cat([cls_token, patches], dim=1))


class TinyCapVisionLayer(GradientCheckpointingLayer):
    def __init__(self, config: TinyCapVisionConfig, layer_idx: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = TinyCapAttention(config, layer_idx)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TinyCapMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, output_attentions: bool = False, **kwargs):
        attended, weights = self.self_attn(
            self.layer_norm1(hidden_states), output_attentions=output_attentions, **kwargs
        )
        hidden_states = hidden_states + self.dropout(attended)
        hidden_states = hidden_states + self.dropout(self.mlp(self.layer_norm2(hidden_states)))
        return hidden_states, weights


class TinyCapPreTrainedModel(PreTrainedModel):
    """Initial weights, loading and saving, and what transformers asks about the family."""

    config_class = TinyCapConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["TinyCapVisionEmbeddings", "TinyCapVisionLayer", "TinyCapDecoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Otherwise transformers guesses it from how the source is spelled, by rules that change with its versions.
        return True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """`PreTrainedModel.from_pretrained`, for weights that anybody may have made.

        Reads safetensors and nothing else, and holds their header against the configuration before a model of its
        sizes is built.

        Raises:
            ValueError: there is a pickle instead, header, weights and configuration contradict each other, weights are
                infinite or no numbers, or some are missing (where neither `output_loading_info=True` nor
                `ignore_mismatched_sizes=True` says that the caller will see to these).
        """
        source = pretrained_model_name_or_path
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors: expected True or None, since nothing else is read, got False")
        kwargs["use_safetensors"] = True
        wants_report, tolerant = kwargs.pop("output_loading_info", False), kwargs.get("ignore_mismatched_sizes", False)
        shapes = {}
        hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if source is not None and kwargs.get("state_dict") is None:
            path = find_weights(os.fspath(source), **hub_kwargs)
            config = kwargs.get("config")
            if path is not None:
                shapes = stored_shapes(path)
                if not hasattr(config, "to_dict"):
                    config = cls.config_class.from_pretrained(source if config is None else config, **hub_kwargs)
                # A quantised checkpoint stores packed tensors of other shapes.
                if not tolerant and getattr(config, "quantization_config", None) is None:
                    check_shapes(path, shapes, config)
        model, report = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
        check_finite_weights(model, source)
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        if head is not None and model.config.tie_word_embeddings and "lm_head.weight" not in shapes:
            # transformers 5.3 leaves the head of remote code untied: random, or on the meta device. What accelerate
            # offloads is there, too, and has a hook.
            is_own = type(head.weight) is nn.Parameter and head.weight is not table.weight
            if is_own and not table.weight.is_meta and not hasattr(head, "_hf_hook"):
                head.weight = table.weight
        if source is not None:
            # Looked up here, because only this call knows the model's revision, token and cache.
            quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
            model.confidence_path = cached_file(source, CONFIDENCE_NAME, **hub_kwargs, **quiet)
        missing = sorted(report["missing_keys"])
        # A student alone begins a captioner: its decoder is new.
        is_student = bool(shapes) and not any(name.startswith(("decoder.", "vision_model.")) for name in shapes)
        if missing and source is not None and not (wants_report or tolerant or is_student):
            raise ValueError(
                f"{source}: expected all weights, {len(missing)} are missing: {', '.join(missing[:5])}; "
                "output_loading_info=True loads the others all the same"
            )
        return (model, report) if wants_report else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, TinyCapVisionEmbeddings):
            nn.init.trunc_normal_(module.cls_token, std=std)
            # transformers 5 keeps what was loaded from `nn.init`, but not from a copy.
            if not getattr(module.position_embeddings, "_is_hf_initialized", False):
                table = position_table(math.isqrt(module.num_patches), module.config.hidden_size)
                module.position_embeddings.copy_(table.unsqueeze(0))

    def _flags(self, output_attentions, output_hidden_states, return_dict) -> tuple[bool, bool, bool]:
        """The three output flags, from the call or else from the config."""
        config = self.config
        return (
            config.output_attentions if output_attentions is None else output_attentions,
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            config.return_dict if return_dict is None else return_dict,
        )


class TinyCapVisionModel(TinyCapPreTrainedModel):
    """The student ViT alone (Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929, pre-norm), with a projection
    of `[CLS]` to the teacher's width. Loads from the folder of a whole TinyCap too."""

    config_class = TinyCapVisionConfig
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^lm_head\."]

    def __init__(self, config: TinyCapVisionConfig):
        super().__init__(config)
        self.embeddings = TinyCapVisionEmbeddings(config)
        self.layers = nn.ModuleList([TinyCapVisionLayer(config, index) for index in range(config.num_hidden_layers)])
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def forward(
        self,
        pixel_values: torch.FloatTensor,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> TinyCapVisionOutput | tuple:
        """Encodes images.

        Args:
            pixel_values: (B, num_channels, image_size, image_size), normalised by the image processor.
            interpolate_pos_encoding: accept other heights and widths.

        Returns:
            `TinyCapVisionOutput`, or its values as a tuple with `return_dict=False`.

        Raises:
            ValueError: `pixel_values` has another shape; names the expected one.
        """
        output_attentions, output_hidden_states, return_dict = self._flags(
            output_attentions, output_hidden_states, return_dict
        )
        if pixel_values is None:
            raise ValueError("pixel_values: expected a tensor of images, got None")
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        all_hidden_states, all_attentions = [hidden_states], []
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, output_attentions=output_attentions, **kwargs)
            all_hidden_states.append(hidden_states)
            all_attentions.append(weights)
        last_hidden_state = self.final_layer_norm(hidden_states)
        image_embeds = self.projection(last_hidden_state[:, 0])
        # The norm in float32: the squares of 768 half-precision numbers lose too much.
        image_embeds = F.normalize(image_embeds.float(), dim=-1).to(image_embeds.dtype)
        output = TinyCapVisionOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=image_embeds,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()


# --- causal decoder -------------------------------------------------------------------------------------------------


class TinyCapDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: TinyCapTextConfig, layer_idx: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = TinyCapAttention(config, layer_idx, is_causal=True)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = TinyCapCrossAttention(config, layer_idx)
        self.layer_norm3 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TinyCapMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: torch.Tensor | None,
        memory_length: int,
        attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        output_attentions: bool = False,
        **kwargs,
    ):
        attended, self_weights = self.self_attn(
            self.layer_norm1(hidden_states), attention_mask, cache, output_attentions, **kwargs
        )
        hidden_states = hidden_states + self.dropout(attended)
        attended, cross_weights = self.cross_attn(
            self.layer_norm2(hidden_states), memory, memory_length, cache, output_attentions, **kwargs
        )
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
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        self.embed_tokens = value

    def project_memory(self, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, M, projection_dim or the student's hidden_size) -> (B, M, hidden_size of the text)."""
        # The layer norm's dtype is that of the computation. A quantised linear layer has that of its storage.
        memory = encoder_hidden_states.to(self.final_layer_norm.weight.dtype) * self.memory_scale
        return self.memory_projection(memory)

    def position_ids(self, attention_mask: torch.Tensor | None, past_length, length: int, device) -> torch.Tensor:
        """(1 or B, length): counted from each row's first real token, so that left padding changes nothing."""
        if attention_mask is None:
            return (past_length + torch.arange(length, device=device)).unsqueeze(0)
        if attention_mask.dim() == 4:
            seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            return (seen[:, 0].sum(dim=-1) - 1).clamp(min=0)
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]

    def causal_mask(
        self,
        attention_mask: torch.Tensor | None,
        past_length: int,
        static_length: int,
        hidden_states: torch.Tensor,
        eager: bool,
    ) -> torch.Tensor | None:
        """The mask for the attention function: `None` where it needs none, else (B or 1, 1, L, keys).

        There are past_length + L keys, or `static_length` of them, empty ones last, when that isn't 0.
        """
        if attention_mask is not None and attention_mask.dim() == 4:
            return attention_mask
        length, device, dtype = hidden_states.shape[1], hidden_states.device, hidden_states.dtype
        if not eager and "flash" in self.config._attn_implementation:
            return attention_mask
        if attention_mask is None and not static_length and (length == 1 or (past_length == 0 and not eager)):
            return None
        keys = torch.arange(static_length or past_length + length, device=device)
        allowed = (keys <= past_length + torch.arange(length, device=device)[:, None])[None, None]
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (0, len(keys) - attention_mask.shape[1]))
            allowed = allowed & attention_mask[:, None, None, :].bool()
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

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
    ) -> BaseModelOutputWithCrossAttentions:
        """Runs the decoder over the tokens that aren't in the cache yet.

        Args:
            input_ids: (B, L), or `inputs_embeds` (B, L, hidden_size), exactly one of them.
            encoder_hidden_states: (B, M, width): the memory, neither scaled nor projected.
            attention_mask: (B, cached + L), 0 on padding, or a 4-dimensional mask for the attention function.
            cache: the cache; updated in place.

        Raises:
            ValueError: both or neither input; no memory; a cache of another kind; more tokens than positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of decoder_input_ids and decoder_inputs_embeds")
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states: expected the memory to describe, got None")
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise ValueError(f"cache: expected an EncoderDecoderCache, got {type(cache).__name__}")

        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length = hidden_states.shape[1]
        past_length = 0 if cache is None else cache.get_seq_length()
        # Only the layers of a static cache have this; those of a dynamic one may not exist yet.
        layers = [] if cache is None else cache.self_attention_cache.layers
        static_length = getattr(layers[0], "max_cache_len", 0) if layers else 0
        # By shapes alone: reading positions would break graphs and wait for the device in every step.
        last = static_length or past_length + length
        if attention_mask is not None and attention_mask.dim() == 2:
            last = max(last, attention_mask.shape[1])
        if last > self.config.max_position_embeddings:
            raise ValueError(
                f"expected at most {self.config.max_position_embeddings} tokens (max_position_embeddings), got {last}"
                f"{' slots of a static cache' if static_length else ', padding included'}"
            )
        if static_length:
            check_static_cache()
        position_ids = self.position_ids(attention_mask, past_length, length, hidden_states.device)
        hidden_states = self.dropout(hidden_states + self.embed_positions(position_ids))

        eager = output_attentions or self.config._attn_implementation == "eager"
        mask = self.causal_mask(attention_mask, past_length, static_length, hidden_states, eager)
        cached = cache is not None and cache.is_updated.get(len(self.layers) - 1)
        memory = None if cached else self.project_memory(encoder_hidden_states)
        memory_length = encoder_hidden_states.shape[1]

        all_hidden_states, all_self_attentions, all_cross_attentions = [hidden_states], [], []
        for layer in self.layers:
            hidden_states, self_weights, cross_weights = layer(
                hidden_states,
                memory,
                memory_length,
                attention_mask=mask,
                cache=cache,
                output_attentions=output_attentions,
                **kwargs,
            )
            all_hidden_states.append(hidden_states)
            all_self_attentions.append(self_weights)
            all_cross_attentions.append(cross_weights)
        return BaseModelOutputWithCrossAttentions(
            last_hidden_state=self.final_layer_norm(hidden_states),
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_self_attentions) if output_attentions else None,
            cross_attentions=tuple(all_cross_attentions) if output_attentions else None,
        )


# --- the captioner --------------------------------------------------------------------------------------------------


def shift_tokens_right(labels: torch.Tensor, decoder_start_token_id: int, pad_token_id: int) -> torch.Tensor:
    """Decoder inputs (N, T) for `labels` (N, T): the start token, then every label but the last; -100 becomes pad."""
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


class TinyCapForConditionalGeneration(TinyCapPreTrainedModel, GenerationMixin):
    """Student, decoder and joint objective: `L = caption_loss + distill_weight * distill_loss`."""

    _tied_weights_keys = {"lm_head.weight": "decoder.embed_tokens.weight"}
    # The losses are means over the micro-batch: `Trainer` scales them for gradient accumulation itself.
    accepts_loss_kwargs = False

    def __init__(self, config: TinyCapConfig):
        super().__init__(config)
        self.vision_model = TinyCapVisionModel._from_config(config.vision_config)
        vision = config.vision_config
        width, scale = vision.hidden_size, 1.0
        if config.memory == "embedding":
            # A unit-norm vector of 768 has entries near 0.036; this brings them back to the size of 1.
            width, scale = vision.projection_dim, math.sqrt(vision.projection_dim)
        scale = config.memory_scale or scale
        self.decoder = TinyCapDecoder._from_config(config.text_config, memory_width=width, memory_scale=scale)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> TinyCapVisionModel:
        return self.vision_model

    def get_decoder(self) -> TinyCapDecoder:
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        self.decoder.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head = value

    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> TinyCapVisionOutput | tuple:
        """Embeds images, with the interface of CLIP's in transformers 5.

        Args:
            pixel_values: (B, num_channels, image_size, image_size), normalised by the image processor.
            kwargs: `interpolate_pos_encoding`, `output_attentions`, `output_hidden_states`, `return_dict`, as in
                `TinyCapVisionModel.forward`; `input_ids` and `attention_mask` are ignored.

        Returns:
            `TinyCapVisionOutput`, a `BaseModelOutputWithPooling`. Its `pooler_output` (B, projection_dim) is the
            embedding. Unlike CLIP's it has unit norm.
        """
        # What a processor gives for texts comes along with `**inputs`.
        kwargs = {name: value for name, value in kwargs.items() if name not in ("input_ids", "attention_mask")}
        return self.vision_model(pixel_values, **kwargs)

    def get_memory(self, encoder_outputs: ModelOutput | tuple) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the decoder attends to, from the student's output or from bare embeddings.

        Args:
            encoder_outputs: a `TinyCapVisionOutput`, or its values as a tuple; with `memory="embedding"` also a
                `BaseModelOutput` whose `pooler_output` (B, projection_dim) or `last_hidden_state`
                (B, 1, projection_dim) is an embedding of any norm, as a teacher's.

        Returns:
            The memory (B, M, width) and `image_embeds` (B, projection_dim) or `None`.

        Raises:
            ValueError: neither of the two; says what was expected and what came.
        """
        if isinstance(encoder_outputs, (tuple, list)):
            encoder_outputs = TinyCapVisionOutput(*encoder_outputs[:2])
        hidden_states, image_embeds = encoder_outputs[0], getattr(encoder_outputs, "pooler_output", None)
        if self.config.memory == "patches":
            width = self.config.vision_config.hidden_size
            if hidden_states.dim() != 3 or hidden_states.shape[-1] != width:
                raise ValueError(
                    f"encoder_outputs: with memory='patches' expected last_hidden_state (B, tokens, {width}), "
                    f"got {tuple(hidden_states.shape)}"
                )
            return hidden_states, image_embeds
        width = self.config.vision_config.projection_dim
        embeds = hidden_states if image_embeds is None else image_embeds.unsqueeze(1)
        if embeds.dim() != 3 or embeds.shape[1:] != (1, width):
            raise ValueError(
                f"encoder_outputs: expected pooler_output (B, {width}) or last_hidden_state (B, 1, {width}), "
                f"got {tuple(embeds.shape if image_embeds is None else image_embeds.shape)}"
            )
        if image_embeds is None or not isinstance(encoder_outputs, TinyCapVisionOutput):
            embeds = F.normalize(embeds.float(), dim=-1).to(embeds.dtype)
        return embeds, embeds[:, 0]

    def add_noise(self, memory: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, 1, projection_dim) of unit norm, each moved by `memory_noise` in a random direction."""
        noise = torch.randn_like(memory, dtype=torch.float32) * memory.shape[-1] ** -0.5
        return F.normalize(memory.float() + self.config.memory_noise * noise, dim=-1).to(memory.dtype)

    def caption_loss(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean cross-entropy, in nats, over the labels that aren't -100; 0 where all are.

        Args:
            hidden_states: (N, T, hidden_size), the decoder's.
            labels: (N, T).
            logits: (N, T, vocab_size). Without them, padding never reaches the head and no more than `LOSS_CHUNK` rows
                of logits exist at a time: the backward pass computes each chunk again.
        """
        smoothing, wanted = self.config.label_smoothing if self.training else 0.0, labels != -100

        def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction="sum")

        def chunk_loss(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return cross_entropy(self.lm_head(states), labels)

        if logits is not None:
            total = cross_entropy(logits.flatten(0, 1), labels.flatten())
        else:
            chunks = zip(hidden_states[wanted].split(LOSS_CHUNK), labels[wanted].split(LOSS_CHUNK))
            total = sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks)
        # Divided at the end, so that a gradient scaler's factor reaches float16 gradients before this one.
        return total / wanted.sum().clamp(min=1)

    def distill_loss(self, image_embeds: torch.Tensor | None, teacher_embeds: torch.Tensor) -> torch.Tensor:
        """Mean of 1 - cos over the batch; both (B, projection_dim).

        Raises:
            ValueError: the teacher's embeddings have another shape; names both.
        """
        expected = None if image_embeds is None else tuple(image_embeds.shape)
        if expected != tuple(teacher_embeds.shape):
            raise ValueError(
                f"teacher_embeds: expected the student's shape (batch, projection_dim) = {expected}, "
                f"got {tuple(teacher_embeds.shape)}"
            )
        return (1.0 - F.cosine_similarity(image_embeds.float(), teacher_embeds.float(), dim=-1)).mean()

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
            teacher_embeds: (B, projection_dim), what the student should embed the images to.
            use_cache: return the cache; by default as the config says, and not with labels.
            interpolate_pos_encoding: accept images of another size.
            logits_to_keep: compute only that many last positions' logits; 0 means all.
            skip_logits: with labels, compute the loss without keeping logits: padding never reaches the head.
            past_key_values: what `generate` calls `cache` before transformers 5.24.
            input_ids, attention_mask, inputs_embeds: the decoder's, under the names that a processor gives them.

        Returns:
            `TinyCapOutput`, or its values as a tuple with `return_dict=False`.

        Raises:
            ValueError: an argument has the wrong shape or is missing; names it, what was expected and what came.
        """
        if past_key_values is not None:
            cache = past_key_values
            if "cache" in TinyCapOutput.__dataclass_fields__:
                # Only where `generate` doesn't use this name itself.
                warnings.warn("`past_key_values` is deprecated, expected `cache`", FutureWarning, stacklevel=2)
        output_attentions, output_hidden_states, return_dict = self._flags(
            output_attentions, output_hidden_states, return_dict
        )
        # Not in the signature: there, GenerationMixin of transformers 4 would make an `attention_mask` for the images.
        input_ids, attention_mask = kwargs.pop("input_ids", None), kwargs.pop("attention_mask", None)
        inputs_embeds = kwargs.pop("inputs_embeds", None)
        if input_ids is not None and labels is not None and input_ids.shape == labels.shape:
            # As models without an encoder are trained: here it would teach the decoder to copy its input.
            if not torch.compiler.is_compiling() and bool(((input_ids == labels) | (labels == -100)).all()):
                raise ValueError("labels: expected the tokens that follow input_ids, got input_ids; leave those out")
        decoder_input_ids = input_ids if decoder_input_ids is None else decoder_input_ids
        decoder_attention_mask = attention_mask if decoder_attention_mask is None else decoder_attention_mask
        decoder_inputs_embeds = inputs_embeds if decoder_inputs_embeds is None else decoder_inputs_embeds
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and labels is None
        if self.decoder.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # The backward pass runs every layer again, which would write its keys a second time.
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(
                    "cache: expected none or an empty one in training with gradient checkpointing, "
                    f"got {int(cache.get_seq_length())} tokens"
                )
            cache, use_cache = None, False
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        if encoder_outputs is None:
            encoder_outputs = self.vision_model(
                pixel_values,
                interpolate_pos_encoding,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
        memory, image_embeds = self.get_memory(encoder_outputs)

        if decoder_input_ids is None and decoder_inputs_embeds is None:
            start = self.config.decoder_start_token_id
            if labels is not None:
                decoder_input_ids = shift_tokens_right(labels, start, self.config.pad_token_id)
            else:
                decoder_input_ids = torch.full((memory.shape[0], 1), start, device=memory.device)
        num_captions = (decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds).shape[0]
        if num_captions % memory.shape[0]:
            raise ValueError(f"expected K captions for each of {memory.shape[0]} images, got {num_captions} captions")
        if num_captions != memory.shape[0]:
            memory = memory.repeat_interleave(num_captions // memory.shape[0], dim=0)
        if self.training and self.config.memory_noise > 0:
            memory = self.add_noise(memory)

        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=memory,
            attention_mask=decoder_attention_mask,
            cache=cache,
            inputs_embeds=decoder_inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        hidden_states = decoder_outputs.last_hidden_state

        logits, losses = None, {}
        if not skip_logits or labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
        if labels is not None:
            losses["caption_loss"] = self.caption_loss(hidden_states, labels, logits)
        if teacher_embeds is not None:
            losses["distill_loss"] = self.distill_loss(image_embeds, teacher_embeds)
        weights = {"caption_loss": 1.0, "distill_loss": self.config.distill_weight}
        loss = sum(weights[name] * value for name, value in losses.items()) if losses else None

        output = TinyCapOutput(
            loss,
            logits,
            # By position: transformers 5.24 renamed this field, and `generate` looks for its own version's name.
            cache if use_cache else None,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
            # Without a loss there are the fields of `Seq2SeqLMOutput` alone, for callers who go by their number.
            image_embeds=image_embeds if losses else None,
            **losses,
        )
        return output if return_dict else output.to_tuple()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Decoder inputs (N, T) for `labels` (N, T), as `DataCollatorForSeq2Seq` asks for them."""
        return shift_tokens_right(labels, self.config.decoder_start_token_id, self.config.pad_token_id)

    # --- generation: everything is GenerationMixin's; these fit prompts, steps and lengths to the decoder ---

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, *args, **kwargs
    ):
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
            # GenerationMixin repeats its tensors for every beam, in place: the caller's object stays as it is.
            kwargs["encoder_outputs"] = copy.copy(kwargs["encoder_outputs"])
        prompt = kwargs.pop("input_ids", None)
        mask = kwargs.pop("attention_mask", None)
        prompt = kwargs.pop("decoder_input_ids", prompt)
        mask = kwargs.pop("decoder_attention_mask", mask)
        if prompt is not None:
            # The mask always goes along: with a cache, its length is how GenerationMixin tells new tokens from old.
            kwargs["decoder_input_ids"], kwargs["decoder_attention_mask"] = self._start_prompts(prompt, mask)
        length = 1 if prompt is None else kwargs["decoder_input_ids"].shape[1]
        limit = self.config.text_config.max_position_embeddings
        if length >= limit:
            raise ValueError(f"prompt: expected fewer than {limit} tokens, got {length}")
        limit = min(limit, self._max_length(length, generation_config, kwargs))
        if limit <= length:
            raise ValueError(
                f"max_length: expected more than {length} (start token and prompt), got {limit}; "
                "max_new_tokens: expected at least 1"
            )
        implementations = (
            settings.get("cache_implementation") for settings in self._settings(generation_config, kwargs)
        )
        if "static" in (next(filter(None, implementations), None) or ""):
            check_static_cache()
        # One of the two lengths reaches GenerationMixin: it prefers its own config's `max_new_tokens` to `max_length`.
        if generation_config is None:
            kwargs.update(max_length=limit, max_new_tokens=None)
        else:
            generation_config = copy.deepcopy(generation_config)
            generation_config.max_new_tokens = limit - length
            generation_config.max_length = GenerationConfig().max_length
            kwargs = {name: value for name, value in kwargs.items() if name not in ("max_length", "max_new_tokens")}
        return super().generate(inputs, generation_config, *args, **kwargs)

    def _settings(self, generation_config: GenerationConfig | None, kwargs: dict) -> list[dict]:
        """The call's arguments, its config's settings and the model's: the first that says something counts."""
        configs = [config for config in (generation_config, self.generation_config) if config is not None]
        # Without defaults: transformers 4 fills in a `max_length` of 20.
        return [kwargs, *(config.to_diff_dict() for config in configs)]

    def _max_length(self, prompt_length: int, generation_config: GenerationConfig | None, kwargs: dict) -> int:
        """Tokens asked for, prompt included, by the call's arguments, else its config, else the model's config."""
        for settings in self._settings(generation_config, kwargs):
            if settings.get("max_new_tokens") is not None:
                return prompt_length + settings["max_new_tokens"]
            if settings.get("max_length") is not None:
                return settings["max_length"]
        # As GenerationMixin.
        return prompt_length + 20

    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, **kwargs) -> dict:
        """GenerationMixin's, without what it looks up anew for every token (a fifth of such a short step): after the
        first step with a dynamic cache, one more token is all that changes."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        first = kwargs.get("is_first_iteration", False) or kwargs.get("next_sequence_length") != 1
        if first or cache is None or cache.is_compileable:
            return super().prepare_inputs_for_generation(input_ids, **kwargs)
        for name in ("next_sequence_length", "is_first_iteration", "labels"):
            kwargs.pop(name, None)
        return {"decoder_input_ids": input_ids[:, -1:], **kwargs}

    def _start_prompts(
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


TinyCapVisionModel.register_for_auto_class("AutoModel")
TinyCapForConditionalGeneration.register_for_auto_class("AutoModel")


__all__ = ["TinyCapForConditionalGeneration", "TinyCapPreTrainedModel", "TinyCapVisionModel"]
