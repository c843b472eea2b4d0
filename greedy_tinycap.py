"""Greedy captions as arithmetic alone: what `GenerationMixin._sample` says, of a decoder with one memory vector.

A step of so small a decoder computes for half a millisecond. Calling its modules, gathering their arguments and taking
their outputs apart costs as much again, and here there is none of it: the weights are read from the modules once for a
search. When that stands for the modules, `TinyCapForConditionalGeneration` decides; that it does, a test shows.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import EosTokenCriteria, LogitsProcessorList, StoppingCriteriaList


class GreedySteps:
    """The decoder's steps for one token of each row, from the first on.

    Args:
        decoder: a `TinyCapDecoder` of plain modules.
        head: its language-modelling head.
        memory: (B, 1, hidden_size), projected.
        cache: empty; gets the memory's constants now and keys and values at the end, as from the modules.
        max_length: tokens that there may be.
    """

    def __init__(
        self, decoder: nn.Module, head: nn.Linear, memory: torch.Tensor, cache: EncoderDecoderCache, max_length: int
    ):
        self.embed_tokens, self.embed_positions = decoder.embed_tokens.weight, decoder.embed_positions.weight
        self.final_layer_norm, self.head = decoder.final_layer_norm, head
        self.cache, self.length = cache, 0
        batch, _, width = memory.shape
        self.layers = []
        for layer in decoder.layers:
            attention = layer.self_attn
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            constant, _ = layer.cross_attn.memory_states(memory, 1, cache)
            heads = (batch, attention.num_heads, max_length, attention.head_dim)
            self.layers.append(
                {
                    "norm1": _norm(layer.layer_norm1),
                    "qkv": tuple(
                        torch.cat([getattr(part, name) for part in projections]) for name in ("weight", "bias")
                    ),
                    "keys": memory.new_empty(heads),
                    "values": memory.new_empty(heads),
                    "scaling": attention.scaling,
                    "out": _linear(attention.out_proj),
                    "memory": constant.reshape(batch, width),
                    "norm3": _norm(layer.layer_norm3),
                    "fc1": _linear(layer.mlp.fc1),
                    "activation": layer.mlp.activation,
                    "fc2": _linear(layer.mlp.fc2),
                }
            )
        self.split = (batch, 3, attention.num_heads, 1, attention.head_dim)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,) token ids -> (B, vocab_size) logits of those that follow."""
        place = self.length
        self.length = length = place + 1
        states = self.embed_tokens[tokens] + self.embed_positions[place]
        for layer in self.layers:
            query, key, value = (
                F.linear(F.layer_norm(states, *layer["norm1"]), *layer["qkv"]).view(self.split).unbind(1)
            )
            layer["keys"][:, :, place], layer["values"][:, :, place] = key[:, :, 0], value[:, :, 0]
            seen = (layer["keys"][:, :, :length], layer["values"][:, :, :length])
            attended = F.scaled_dot_product_attention(query, *seen, scale=layer["scaling"])
            states = states + F.linear(attended.view(states.shape), *layer["out"]) + layer["memory"]
            hidden = layer["activation"](F.linear(F.layer_norm(states, *layer["norm3"]), *layer["fc1"]))
            states = states + F.linear(hidden, *layer["fc2"])
        return F.linear(F.layer_norm(states, *_norm(self.final_layer_norm)), *_linear(self.head))

    def fill_cache(self) -> None:
        """Puts the keys and values of all steps into the cache, whose owner may go on with it."""
        for index, layer in enumerate(self.layers):
            keys, values = layer["keys"][:, :, : self.length], layer["values"][:, :, : self.length]
            self.cache.self_attention_cache.update(keys, values, index)


def _linear(module: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    return module.weight, module.bias


def _norm(module: nn.LayerNorm) -> tuple[tuple[int, ...], torch.Tensor, torch.Tensor, float]:
    return module.normalized_shape, module.weight, module.bias, module.eps


def greedy_search(
    steps: GreedySteps,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    padding: torch.Tensor,
) -> torch.LongTensor:
    """The likeliest token after the likeliest token.

    Args:
        input_ids: (B, 1), the start tokens.
        stopping_criteria: the longest length and, where there are any, the tokens that end a caption.
        padding: the token that follows an end token.

    Returns:
        (B, at most the longest length).
    """
    ends = [criterion.eos_token_id for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)]
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    tokens = input_ids[:, 0]
    while True:
        tokens = logits_processor(input_ids, steps(tokens).float()).argmax(dim=-1)
        if ends:
            tokens = torch.where(finished, padding, tokens)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        for end in ends:
            finished = finished | (tokens[:, None] == end).any(dim=1)
        if input_ids.shape[1] >= stopping_criteria.max_length or (ends and bool(finished.all())):
            steps.fill_cache()
            return input_ids
