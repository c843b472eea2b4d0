"""Other captioners at their published sizes, with random weights: speed doesn't depend on them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedModel


@dataclass
class Peer:
    """A captioner: its class, its configuration and the sizes of its inputs (pixels, tokens)."""

    model_class: type[PreTrainedModel]
    config: Callable
    image_size: int
    image_tokens: int = 0
    image_token_id: int = 0
    prompt_length: int = 0

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)
        return self.model_class(self.config()).eval()

    def inputs(self, batch_size: int) -> dict[str, torch.Tensor]:
        inputs = {"pixel_values": torch.randn(batch_size, 3, self.image_size, self.image_size)}
        if self.image_tokens:
            ids = [self.image_token_id] * self.image_tokens + list(range(5, 5 + self.prompt_length))
            inputs["input_ids"] = torch.tensor([ids]).expand(batch_size, -1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if self.model_class is transformers.SmolVLMForConditionalGeneration:
            # (B, tiles, 3, H, W)
            inputs["pixel_values"] = inputs["pixel_values"][:, None]
        return inputs


def vit_gpt2(decoder_layers: int) -> transformers.VisionEncoderDecoderConfig:
    """ViT-B/16 at 224 pixels and a GPT-2 that attends to its 197 tokens."""
    decoder = transformers.GPT2Config(n_layer=decoder_layers, add_cross_attention=True, is_decoder=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(transformers.ViTConfig(), decoder)
    config.decoder_start_token_id = config.pad_token_id = 50256
    return config


def florence_2_base() -> transformers.Florence2Config:
    """DaViT-B at 768 pixels and a BART-base of 51,289 tokens."""
    text = {"d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
    heads = {"encoder_attention_heads": 12, "decoder_attention_heads": 12, "vocab_size": 51289}
    return transformers.Florence2Config(
        text_config={"model_type": "bart", **text, **heads},
        vision_config={"projection_dim": 768},
        image_token_id=51288,
        is_encoder_decoder=True,
    )


def smolvlm_256m() -> transformers.SmolVLMConfig:
    """SigLIP-B/16 at 512 pixels, 64 tokens a tile, and SmolLM2-135M."""
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49280}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": False, "pad_token_id": 2}
    return transformers.SmolVLMConfig(
        vision_config={**vision, "image_size": 512, "patch_size": 16},
        text_config={"model_type": "llama", **text, **heads},
        scale_factor=4,
        image_token_id=49190,
        pad_token_id=2,
    )


def blip_base() -> transformers.BlipConfig:
    return transformers.BlipConfig(vision_config={"image_size": 384})


PEERS = {
    "Florence-2-base, 768 px": Peer(
        transformers.Florence2ForConditionalGeneration, florence_2_base, 768, 577, 51288, prompt_length=8
    ),
    "SmolVLM-256M, one 512 px tile": Peer(
        transformers.SmolVLMForConditionalGeneration, smolvlm_256m, 512, 64, 49190, prompt_length=16
    ),
    "BLIP-base, 384 px": Peer(transformers.BlipForConditionalGeneration, blip_base, 384),
    "vit-gpt2-image-captioning": Peer(transformers.VisionEncoderDecoderModel, lambda: vit_gpt2(12), 224),
    "GIT-base": Peer(transformers.GitForCausalLM, transformers.GitConfig, 224),
    "distilvit (ViT-B, distilGPT-2)": Peer(transformers.VisionEncoderDecoderModel, lambda: vit_gpt2(6), 224),
}


@torch.inference_mode()
def caption(model: PreTrainedModel, inputs: dict[str, torch.Tensor], num_tokens: int) -> torch.Tensor:
    """Exactly `num_tokens` greedy tokens after the prompt."""
    # `generate` fills in the model's own values for what a call leaves out.
    model.generation_config.eos_token_id = None
    model.generation_config.max_length = None
    return model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, num_beams=1)
