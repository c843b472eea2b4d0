"""The published training loop of this design in plain PyTorch: what `training_throughput.py` is measured against.

A pair of photo and caption is a sample: the student encodes a photo once for each of its captions, the teacher is
asked in every step, and logits over the whole vocabulary are made for every position, padding included.
"""

import torch
import torch.nn.functional as F
from torch import nn


class ReferenceCaptioner(nn.Module):
    """TinyCap's architecture assembled from torch's own layers, with a TinyCap's weights.

    Args:
        model: the `TinyCapForConditionalGeneration` (memory "embedding") to copy; its dropout must be 0.
    """

    def __init__(self, model):
        super().__init__()
        vision, text = model.config.vision_config, model.config.text_config
        student, decoder = model.vision_model, model.decoder
        self.patch_size = vision.patch_size
        self.patch_embedding = nn.Conv2d(3, vision.hidden_size, vision.patch_size, vision.patch_size)
        self.cls_token = nn.Parameter(student.embeddings.cls_token.detach().clone())
        self.positions = nn.Parameter(student.embeddings.position_embeddings.detach().clone())
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(
                vision.hidden_size, vision.num_attention_heads, vision.intermediate_size, **options
            )
            for _ in student.layers
        )
        self.encoder_norm = nn.LayerNorm(vision.hidden_size)
        self.projection = nn.Linear(vision.hidden_size, vision.projection_dim)
        self.tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.token_positions = nn.Embedding(text.max_position_embeddings, text.hidden_size)
        self.memory_scale = decoder.memory_scale
        self.memory_projection = nn.Linear(vision.projection_dim, text.hidden_size)
        self.decoder = nn.ModuleList(
            nn.TransformerDecoderLayer(text.hidden_size, text.num_attention_heads, text.intermediate_size, **options)
            for _ in decoder.layers
        )
        self.decoder_norm = nn.LayerNorm(text.hidden_size)
        pairs = {
            student.embeddings.patch_embedding: self.patch_embedding,
            student.final_layer_norm: self.encoder_norm,
            student.projection: self.projection,
            decoder.embed_tokens: self.tokens,
            decoder.embed_positions: self.token_positions,
            decoder.memory_projection: self.memory_projection,
            decoder.final_layer_norm: self.decoder_norm,
        }
        for ours, theirs in zip([*student.layers, *decoder.layers], [*self.encoder, *self.decoder]):
            pairs.update({ours.mlp.fc1: theirs.linear1, ours.mlp.fc2: theirs.linear2})
            pairs.update({ours.layer_norm1: theirs.norm1, ours.layer_norm2: theirs.norm2})
            copy_attention(ours.self_attn, theirs.self_attn)
            if hasattr(ours, "cross_attn"):
                pairs[ours.layer_norm3] = theirs.norm3
                copy_attention(ours.cross_attn, theirs.multihead_attn)
        for ours, theirs in pairs.items():
            theirs.load_state_dict(ours.state_dict())

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, projection_dim), unit norm."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        states = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.positions
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


def copy_attention(ours, theirs: nn.MultiheadAttention) -> None:
    """Copies a `TinyCapAttention`'s four projections to torch's fused layout."""
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        theirs.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())


def as_pairs(batch: dict) -> dict:
    """A `CaptionCollator`'s batch with every photo repeated for each of its captions."""
    repeats = len(batch["labels"]) // len(batch["pixel_values"])
    return {**batch, "pixel_values": batch["pixel_values"].repeat_interleave(repeats, dim=0)}


def reference_losses(
    model: ReferenceCaptioner, teacher, pairs: dict, start_token_id: int, pad_token_id: int
) -> dict[str, torch.Tensor]:
    """`loss`, `caption_loss` and `distill_loss` of a batch of pairs; `distill_weight` is 1.

    Args:
        teacher: embeds (N, 3, H, W) to (N, projection_dim), unit norm.
        pairs: `pixel_values` (N, 3, H, W) and `labels` (N, T), -100 on padding; see `as_pairs`.
    """
    labels = pairs["labels"]
    target = teacher(pairs["pixel_values"])
    image_embeds = model.encode(pairs["pixel_values"])
    input_ids = F.pad(labels, (1, 0), value=start_token_id)[:, :-1]
    logits = model.decode(image_embeds, input_ids.masked_fill(input_ids == -100, pad_token_id))
    caption_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    distill_loss = (1 - F.cosine_similarity(image_embeds, target)).mean()
    return {"loss": caption_loss + distill_loss, "caption_loss": caption_loss, "distill_loss": distill_loss}
