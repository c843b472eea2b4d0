"""Layers that student, decoder and text encoder share: attention, MLP, and a bidirectional pre-norm layer."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_tinycap import TinyCapTextConfig, TinyCapTextEncoderConfig, TinyCapVisionConfig


def dropout_layer(probability: float) -> nn.Module:
    return nn.Dropout(probability) if probability > 0 else nn.Identity()


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention as written (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762).

    Query, key and value are (B, heads, length, head_dim); the mask is added to the scores, or bool with `False` where
    attention is forbidden. Returns the output (B, L, heads, head_dim) and the weights (B, heads, L, S).
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
        self.num_key_value_groups = 1
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(B, L, hidden_size) -> (B, heads, L, head_dim)."""
        return states.view(*states.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def attend(self, hidden_states, key, value, attention_mask=None, output_attentions=False, **kwargs):
        query = self.split_heads(self.q_proj(hidden_states))
        implementation = "eager" if output_attentions else self.config._attn_implementation
        attention = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        kwargs["dropout"] = self.config.attention_probs_dropout_prob if self.training else 0.0
        output, weights = attention(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, **kwargs)
        return self.out_proj(output.flatten(2)), weights if output_attentions else None

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, cache=None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        key, value = self.split_heads(self.k_proj(hidden_states)), self.split_heads(self.v_proj(hidden_states))
        if cache is not None:
            key, value = cache.self_attention_cache.update(key, value, self.layer_idx)
        return self.attend(hidden_states, key, value, attention_mask, **kwargs)


class TinyCapMLP(nn.Module):
    def __init__(self, config: TinyCapVisionConfig | TinyCapTextConfig):
        super().__init__()
        if config.hidden_act not in ACT2FN:
            raise ValueError(
                f"{type(config).__name__}.hidden_act: expected one of {', '.join(sorted(ACT2FN))}, "
                f"got {config.hidden_act!r}"
            )
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class TinyCapEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: TinyCapVisionConfig | TinyCapTextEncoderConfig, layer_idx: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = TinyCapAttention(config, layer_idx)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TinyCapMLP(config)
        self.dropout = dropout_layer(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, **kwargs):
        attended, weights = self.self_attn(self.layer_norm1(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        hidden_states = hidden_states + self.dropout(self.mlp(self.layer_norm2(hidden_states)))
        return hidden_states, weights
