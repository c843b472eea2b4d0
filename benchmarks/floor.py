"""The floor: this architecture's forward pass and greedy loop by hand, on a TinyCap's weights, and nothing else.

No module calls, no flags, no masks, no stopping rules: what is left is arithmetic. `caption_latency.py` holds
everything else to it, `tests/test_benchmarks.py` holds it to `generate()`.
"""

import torch
import torch.nn.functional as F


class Floor:
    """A greedy captioner of a fixed number of tokens.

    Args:
        model: the `TinyCapForConditionalGeneration` (memory "embedding") whose weights to use.
    """

    def __init__(self, model):
        vision, text = model.vision_model, model.decoder
        self.start = model.config.decoder_start_token_id
        self.eps = (vision.config.layer_norm_eps, text.config.layer_norm_eps)
        self.embeddings, self.heads = vision.embeddings, vision.config.num_attention_heads
        self.student = [self._layer(layer) for layer in vision.layers]
        self.student_norm = (vision.final_layer_norm.weight, vision.final_layer_norm.bias)
        self.projection = (vision.projection.weight, vision.projection.bias)
        self.memory_scale = text.memory_scale
        self.memory_projection = (text.memory_projection.weight, text.memory_projection.bias)
        self.tokens, self.positions = text.embed_tokens.weight, text.embed_positions.weight
        self.text_heads = text.config.num_attention_heads
        self.text = [self._layer(layer) for layer in text.layers]
        self.text_norm = (text.final_layer_norm.weight, text.final_layer_norm.bias)
        # A transposed copy: at one row some BLAS read it faster.
        self.head = model.lm_head.weight.detach().t().contiguous()

    @staticmethod
    def _layer(layer) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        parts = {
            "qkv": tuple(torch.cat([getattr(part, name) for part in projections]) for name in ("weight", "bias")),
            "out": attention.out_proj,
            "norm1": layer.layer_norm1,
            "mlp_norm": layer.layer_norm2,
            "fc1": layer.mlp.fc1,
            "fc2": layer.mlp.fc2,
        }
        if hasattr(layer, "cross_attn"):
            cross = layer.cross_attn
            parts |= {"mlp_norm": layer.layer_norm3, "cross_v": cross.v_proj, "cross_out": cross.out_proj}
        return {name: part if isinstance(part, tuple) else (part.weight, part.bias) for name, part in parts.items()}

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, projection_dim), unit norm."""
        embeddings = self.embeddings
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        states = torch.cat([embeddings.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        states = states + embeddings.position_embeddings
        batch, length, width = states.shape
        for layer in self.student:
            normed = F.layer_norm(states, (width,), *layer["norm1"], self.eps[0])
            qkv = F.linear(normed, *layer["qkv"]).view(batch, length, 3, self.heads, -1)
            attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
            states = states + F.linear(attended.transpose(1, 2).reshape(batch, length, width), *layer["out"])
            states = states + self._mlp(states, layer, self.eps[0])
        cls = F.layer_norm(states[:, 0], (width,), *self.student_norm, self.eps[0])
        return F.normalize(F.linear(cls, *self.projection), dim=-1)

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """(B, 3, H, W) -> the start token and `num_tokens` more, (B, 1 + num_tokens)."""
        memory = F.linear(self.encode(pixel_values) * self.memory_scale, *self.memory_projection)
        constants = [F.linear(F.linear(memory, *layer["cross_v"]), *layer["cross_out"]) for layer in self.text]
        batch, width = memory.shape
        head_dim = width // self.text_heads
        cache = memory.new_empty(len(self.text), 2, batch, self.text_heads, num_tokens, head_dim)
        sequences = torch.full((batch, 1 + num_tokens), self.start)
        for index in range(num_tokens):
            states = self.tokens[sequences[:, index]] + self.positions[index]
            for layer, constant, (keys, values) in zip(self.text, constants, cache):
                normed = F.layer_norm(states, (width,), *layer["norm1"], self.eps[1])
                qkv = F.linear(normed, *layer["qkv"]).view(batch, 3, self.text_heads, 1, head_dim)
                keys[:, :, index], values[:, :, index] = qkv[:, 1, :, 0], qkv[:, 2, :, 0]
                attended = F.scaled_dot_product_attention(qkv[:, 0], keys[:, :, : index + 1], values[:, :, : index + 1])
                states = states + F.linear(attended.view(batch, width), *layer["out"]) + constant
                states = states + self._mlp(states, layer, self.eps[1])
            states = F.layer_norm(states, (width,), *self.text_norm, self.eps[1])
            sequences[:, index + 1] = (states @ self.head).argmax(dim=-1)
        return sequences

    @staticmethod
    def _mlp(states: torch.Tensor, layer: dict, eps: float) -> torch.Tensor:
        normed = F.layer_norm(states, states.shape[-1:], *layer["mlp_norm"], eps)
        return F.linear(F.gelu(F.linear(normed, *layer["fc1"])), *layer["fc2"])
