"""Two plain implementations of TinyCap's architecture, on a TinyCap's weights, that the benchmarks compare with.

`Floor` is greedy decoding by hand: no module calls in its loops, no masks or stopping criteria (`caption_latency.py`).
`ReferenceCaptioner` and `reference_losses` are the published training loop (`training_throughput.py`): a pair of image
and caption is a sample, so that an image is encoded once for each of its captions; the teacher runs in every step; and
logits over the whole vocabulary are computed for every position, padding included.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn


def fuse_projections(attention: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (3 * width, width) and bias (3 * width,) of query, key and value in one."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return tuple(torch.cat([getattr(part, name).detach() for part in projections]) for name in ("weight", "bias"))


def embed_patches(embeddings: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 1 + patches, width)."""
    patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    states = torch.cat([embeddings.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    return states + embeddings.position_embeddings


class Floor:
    """A greedy captioner of a fixed number of tokens, with the weights of a `model` with memory "embedding"."""

    def __init__(self, model):
        self.start = model.config.decoder_start_token_id
        self.vision, self.text = model.vision_model, model.decoder
        self.vision_layers = [self.layer_weights(layer) for layer in self.vision.layers]
        self.text_layers = [self.layer_weights(layer) for layer in self.text.layers]
        # A transposed copy: some BLAS libraries read it faster for a single row.
        self.head = model.lm_head.weight.detach().t().contiguous()

    @staticmethod
    def layer_weights(layer: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        parts = {"norm": layer.layer_norm1, "out": layer.self_attn.out_proj, "fc1": layer.mlp.fc1, "fc2": layer.mlp.fc2}
        parts["mlp_norm"] = layer.layer_norm3 if hasattr(layer, "cross_attn") else layer.layer_norm2
        weights = {name: (part.weight, part.bias) for name, part in parts.items()}
        return {**weights, "qkv": fuse_projections(layer.self_attn)}

    @staticmethod
    def norm(states: torch.Tensor, weights: tuple, eps: float) -> torch.Tensor:
        return F.layer_norm(states, states.shape[-1:], *weights, eps)

    def mlp(self, states: torch.Tensor, layer: dict, eps: float) -> torch.Tensor:
        hidden = F.gelu(F.linear(self.norm(states, layer["mlp_norm"], eps), *layer["fc1"]))
        return F.linear(hidden, *layer["fc2"])

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, projection_dim), unit norm."""
        heads, eps = self.vision.config.num_attention_heads, self.vision.config.layer_norm_eps
        states = embed_patches(self.vision.embeddings, pixel_values)
        batch, length, width = states.shape
        for layer in self.vision_layers:
            qkv = F.linear(self.norm(states, layer["norm"], eps), *layer["qkv"]).view(batch, length, 3, heads, -1)
            attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
            states = states + F.linear(attended.transpose(1, 2).reshape(batch, length, width), *layer["out"])
            states = states + self.mlp(states, layer, eps)
        return F.normalize(self.vision.projection(self.vision.final_layer_norm(states[:, 0])), dim=-1)

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """(B, 3, H, W) -> the start token and `num_tokens` more, (B, 1 + num_tokens)."""
        text, heads, eps = self.text, self.text.config.num_attention_heads, self.text.config.layer_norm_eps
        tokens, positions = text.embed_tokens.weight, text.embed_positions.weight
        memory = text.memory_projection(self.encode(pixel_values) * text.memory_scale)
        # Cross-attention to a single vector doesn't depend on the query.
        constants = [layer.cross_attn.out_proj(layer.cross_attn.v_proj(memory)) for layer in text.layers]
        batch, width = memory.shape
        cache = memory.new_empty(len(constants), 2, batch, heads, num_tokens, width // heads)
        sequences = torch.full((batch, 1 + num_tokens), self.start)
        for index in range(num_tokens):
            states = tokens[sequences[:, index]] + positions[index]
            for layer, constant, (keys, values) in zip(self.text_layers, constants, cache):
                qkv = F.linear(self.norm(states, layer["norm"], eps), *layer["qkv"]).view(batch, 3, heads, 1, -1)
                keys[:, :, index], values[:, :, index] = qkv[:, 1, :, 0], qkv[:, 2, :, 0]
                attended = F.scaled_dot_product_attention(qkv[:, 0], keys[:, :, : index + 1], values[:, :, : index + 1])
                states = states + F.linear(attended.view(batch, width), *layer["out"]) + constant
                states = states + self.mlp(states, layer, eps)
            sequences[:, index + 1] = (text.final_layer_norm(states) @ self.head).argmax(dim=-1)
        return sequences


def copy_attention(ours: nn.Module, theirs: nn.MultiheadAttention) -> None:
    """Copies a `TinyCapAttention`'s four projections to torch's fused layout."""
    weight, bias = fuse_projections(ours)
    output = {f"out_proj.{name}": value for name, value in ours.out_proj.state_dict().items()}
    theirs.load_state_dict({"in_proj_weight": weight, "in_proj_bias": bias, **output})


def torch_layer(layer: nn.Module, config, layer_class: type[nn.Module]) -> nn.Module:
    """torch's own transformer layer with the weights of a TinyCap's layer."""
    sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
    built = layer_class(*sizes, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    pairs = [(built.linear1, layer.mlp.fc1), (built.linear2, layer.mlp.fc2)]
    pairs += [(getattr(built, f"norm{i}"), norm) for i in (1, 2, 3) if (norm := getattr(layer, f"layer_norm{i}", None))]
    copy_attention(layer.self_attn, built.self_attn)
    if hasattr(layer, "cross_attn"):
        copy_attention(layer.cross_attn, built.multihead_attn)
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    return built


class ReferenceCaptioner(nn.Module):
    """TinyCap's architecture assembled from torch's own layers: a copy of a `model` with memory "embedding"."""

    def __init__(self, model):
        super().__init__()
        vision, text = model.config.vision_config, model.config.text_config
        student, decoder = copy.deepcopy((model.vision_model, model.decoder))
        self.embeddings, self.projection = student.embeddings, student.projection
        self.tokens, self.token_positions = decoder.embed_tokens, decoder.embed_positions
        self.memory_scale, self.memory_projection = decoder.memory_scale, decoder.memory_projection
        self.encoder_norm, self.decoder_norm = student.final_layer_norm, decoder.final_layer_norm
        self.encoder = nn.ModuleList(torch_layer(layer, vision, nn.TransformerEncoderLayer) for layer in student.layers)
        self.decoder = nn.ModuleList(torch_layer(layer, text, nn.TransformerDecoderLayer) for layer in decoder.layers)

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, projection_dim), unit norm."""
        states = embed_patches(self.embeddings, pixel_values)
        for layer in self.encoder:
            states = layer(states)
        return F.normalize(self.projection(self.encoder_norm(states)[:, 0]), dim=-1)

    def decode(self, image_embeds: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, projection_dim) and (B, T) -> logits (B, T, vocab_size)."""
        length = input_ids.shape[1]
        memory = self.memory_projection(image_embeds.unsqueeze(1) * self.memory_scale)
        states = self.tokens(input_ids) + self.token_positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=states.device)
        for layer in self.decoder:
            states = layer(states, memory, tgt_mask=mask, tgt_is_causal=True)
        return self.decoder_norm(states) @ self.tokens.weight.t()

    @torch.inference_mode()
    def generate(self, pixel_values: torch.Tensor, start_token_id: int, num_tokens: int) -> torch.Tensor:
        """Greedy tokens (B, 1 + num_tokens), without a cache."""
        image_embeds = self.encode(pixel_values)
        tokens = torch.full((len(pixel_values), 1), start_token_id)
        for _ in range(num_tokens):
            best = self.decode(image_embeds, tokens)[:, -1:].argmax(dim=-1)
            tokens = torch.cat([tokens, best], dim=1)
        return tokens


def as_pairs(batch: dict, limit: int | None = None) -> dict[str, torch.Tensor]:
    """`pixel_values` and `labels` of a `CaptionCollator`'s batch, each image repeated for each of its captions; the
    first `limit` pairs."""
    pixel_values, labels = batch["pixel_values"], batch["labels"]
    pixel_values = pixel_values.repeat_interleave(len(labels) // len(pixel_values), dim=0)
    return {"pixel_values": pixel_values[:limit], "labels": labels[:limit]}


def reference_losses(
    model: ReferenceCaptioner, teacher, pairs: dict, start_token_id: int, pad_token_id: int
) -> dict[str, torch.Tensor]:
    """`loss`, `caption_loss` and `distill_loss` of a batch of pairs, see `as_pairs`; `distill_weight` is 1."""
    labels = pairs["labels"]
    target = teacher(pairs["pixel_values"])
    image_embeds = model.encode(pairs["pixel_values"])
    input_ids = F.pad(labels, (1, 0), value=start_token_id)[:, :-1]
    logits = model.decode(image_embeds, input_ids.masked_fill(input_ids == -100, pad_token_id))
    caption_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    distill_loss = (1 - F.cosine_similarity(image_embeds, target)).mean()
    return {"loss": caption_loss + distill_loss, "caption_loss": caption_loss, "distill_loss": distill_loss}
