"""A tiny model of odd, distinct sizes, so that swapped axes fail, and small inputs."""

import copy
import io
import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers.modeling_outputs import Seq2SeqLMOutput

from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration


CAPTIONS = [
    "A brown dog runs across the grass .",
    "Two men are walking along a wet street .",
    "a small child in a red coat jumps into a puddle",
    "A woman with a hat is reading a book on a bench .",
]

# The cache's name in `generate` and outputs: transformers 5.24 renamed it.
CACHE = "cache" if "cache" in Seq2SeqLMOutput.__dataclass_fields__ else "past_key_values"

# Before 5.4, static caches need explicit write positions: the model raises an error.
static_cache = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 4), reason="needs transformers 5.4 or newer"
)

VISION = {
    "image_size": 24,
    "patch_size": 8,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "projection_dim": 14,
}
TEXT = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 28,
    "max_position_embeddings": 19,
    "hidden_dropout_prob": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# For `tiny_model`, where a layer costs seconds: graphs are traced layer by layer.
ONE_LAYER = {"vision_config": {"num_hidden_layers": 1}, "text_config": {"num_hidden_layers": 1}}

# Of a text encoder.
ENCODER = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 22},
    **{"max_position_embeddings": 17, "projection_dim": 14},
}


def tiny_config(**changes) -> TinyCapConfig:
    """The tiny configuration; `vision_config` and `text_config` are merged into it, the rest replaces."""
    vision = {**VISION, **changes.pop("vision_config", {})}
    text = {**TEXT, **changes.pop("text_config", {})}
    return TinyCapConfig(vision_config=vision, text_config=text, **changes)


def tiny_model(**changes) -> TinyCapForConditionalGeneration:
    """A tiny model in eval mode whose weights are large enough for differences to show."""
    made = repr(changes)
    if made not in MADE:
        torch.manual_seed(3)
        model = TinyCapForConditionalGeneration(tiny_config(initializer_range=0.3, **changes)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.normal_(std=0.3)
        MADE[made] = model, torch.get_rng_state()
    # A copy takes half the time, and leaves random numbers as the first one did.
    model, state = MADE[made]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


# The models of `tiny_model` by their changes.
MADE: dict[str, tuple] = {}


def tiny_repository_model(tokenizer, **sizes) -> TinyCapForConditionalGeneration:
    """The tiny model with a tokenizer's vocabulary and special tokens; `sizes` change both of its parts."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return tiny_model(vision_config=sizes, text_config={"vocab_size": len(tokenizer), **ids, **sizes})


def draw_picture(seed: int, size: tuple[int, int] = (37, 29)) -> Image.Image:
    """An image of random coloured blocks."""
    colors = random.Random(seed)
    picture = Image.new("RGB", (5, 3))
    picture.putdata([tuple(colors.randrange(256) for _ in range(3)) for _ in range(15)])
    return picture.resize(size, Image.Resampling.NEAREST)


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def log_rows(folder: Path) -> list[dict]:
    """The rows of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
