"""Sizes and ids of TinyCap: the only source of shapes.

`TinyCapConfig` is composite, as CLIP's and BLIP's: `vision_config` describes the student ViT, `text_config` the causal
decoder. What joins the two (kind and scale of the memory, weights of the losses) is at the top level.
"""

import copy
import math

from transformers.configuration_utils import PretrainedConfig


MEMORIES = ("embedding", "patches")

CAPTIONER = "modeling_tinycap.TinyCapForConditionalGeneration"
LOADERS = {
    "auto_map": {
        "AutoConfig": "configuration_tinycap.TinyCapConfig",
        **dict.fromkeys(("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"), CAPTIONER),
    },
    "custom_pipelines": {
        task: {"impl": f"pipeline_tinycap.{pipeline}", "pt": [auto_class], "type": kind}
        for task, pipeline, auto_class, kind in (
            ("image-to-text", "ImageToTextPipeline", "AutoModelForImageTextToText", "multimodal"),
            ("image-feature-extraction", "ImageEmbeddingPipeline", "AutoModel", "image"),
        )
    },
}

# Upper bounds, so that a corrupt config fails early. Loading compares the sizes with the weights' header, too.
MAX_SIZE, MAX_LAYERS = 2**24, 1024

POSITIVE_INTEGER, SHARE = "a positive integer", "a number in [0, 1)"
POSITIVE_NUMBER, NUMBER = "a positive number", "a number of at least 0"
IS_VALID = {
    POSITIVE_INTEGER: lambda value: isinstance(value, int) and value >= 1,
    SHARE: lambda value: 0 <= value < 1,
    POSITIVE_NUMBER: lambda value: 0 < value < math.inf,
    NUMBER: lambda value: 0 <= value < math.inf,
}


def check_fields(config: PretrainedConfig, expected: str, names: tuple[str, ...]) -> None:
    """Raises `ValueError` for the first of the fields that isn't what is `expected`, a key of `IS_VALID`."""
    for name in names:
        value, limit = getattr(config, name), MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not IS_VALID[expected](value):
            raise ValueError(f"{type(config).__name__}.{name}: expected {expected}, got {value!r}")
        if expected == POSITIVE_INTEGER and value > limit:
            raise ValueError(f"{type(config).__name__}.{name}: expected at most {limit:,}, got {value:,}")


def check_transformer(config: PretrainedConfig, *sizes: str) -> None:
    """Checks the fields that student and decoder share, and `sizes`."""
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    check_fields(config, POSITIVE_INTEGER, (*sizes, *shared))
    check_fields(config, SHARE, ("hidden_dropout_prob", "attention_probs_dropout_prob"))
    check_fields(config, POSITIVE_NUMBER, ("layer_norm_eps",))
    check_fields(config, NUMBER, ("initializer_range",))
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{type(config).__name__}: expected a hidden_size that num_attention_heads divides, "
            f"got hidden_size {config.hidden_size} and num_attention_heads {config.num_attention_heads}"
        )


class TinyCapVisionConfig(PretrainedConfig):
    """Configuration of the student ViT (`TinyCapVisionModel`); the defaults make 3,003,456 parameters.

    Args:
        image_size (`int`, default 224): side of the square input, in pixels.
        patch_size (`int`, default 16): side of a patch, in pixels; divides `image_size`.
        num_channels (`int`, default 3): channels of the input.
        hidden_size (`int`, default 192): width of the tokens.
        num_hidden_layers (`int`, default 6): number of pre-norm layers.
        num_attention_heads (`int`, default 3): heads of each attention; divides `hidden_size`.
        intermediate_size (`int`, default 768): width of the MLPs.
        hidden_act (`str`, default `"gelu"`): activation of the MLPs (`"gelu"` is the exact one).
        layer_norm_eps (`float`, default 1e-5): epsilon of the layer norms.
        projection_dim (`int`, default 768): width of `image_embeds`, the teacher's.
        hidden_dropout_prob (`float`, default 0.0): dropout after the embeddings, attentions and MLPs.
        attention_probs_dropout_prob (`float`, default 0.0): dropout of the attention weights.
        patch_dropout (`float`, default 0.0): share of the patches left out in each training step (Liu et al., 2022,
            https://arxiv.org/abs/2212.00794); no effect in eval mode.
        initializer_range (`float`, default 0.02): standard deviation of the initial weights.
    """

    model_type = "tinycap_vision_model"
    base_config_key = "vision_config"

    def __init__(
        self,
        image_size=224,
        patch_size=16,
        num_channels=3,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        projection_dim=768,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        patch_dropout=0.0,
        initializer_range=0.02,
        **kwargs,
    ):
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.intermediate_size = num_attention_heads, intermediate_size
        self.hidden_act, self.layer_norm_eps = hidden_act, layer_norm_eps
        self.projection_dim = projection_dim
        self.hidden_dropout_prob, self.attention_probs_dropout_prob = hidden_dropout_prob, attention_probs_dropout_prob
        self.patch_dropout, self.initializer_range = patch_dropout, initializer_range

        check_transformer(self, "image_size", "patch_size", "num_channels", "projection_dim")
        check_fields(self, SHARE, ("patch_dropout",))
        if image_size % patch_size:
            raise ValueError(
                "TinyCapVisionConfig: expected an image_size that patch_size divides, "
                f"got image_size {image_size} and patch_size {patch_size}"
            )
        super().__init__(**kwargs)


class TinyCapTextConfig(PretrainedConfig):
    """Configuration of the causal decoder; the defaults are GPT-2's vocabulary and two layers.

    Args:
        vocab_size (`int`, default 50257): number of tokens.
        hidden_size (`int`, default 256): width of the tokens and of the memory.
        num_hidden_layers (`int`, default 2): number of pre-norm layers.
        num_attention_heads (`int`, default 4): heads of each attention; divides `hidden_size`.
        intermediate_size (`int`, default 1024): width of the MLPs.
        hidden_act (`str`, default `"gelu"`): activation of the MLPs.
        layer_norm_eps (`float`, default 1e-5): epsilon of the layer norms.
        max_position_embeddings (`int`, default 64): rows of the position table: the longest caption, its start token
            included.
        hidden_dropout_prob (`float`, default 0.1): dropout after the embeddings, attentions and MLPs.
        attention_probs_dropout_prob (`float`, default 0.0): dropout of the attention weights.
        initializer_range (`float`, default 0.02): standard deviation of the initial weights.
        use_cache (`bool`, default `True`): return key/value caches.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): special tokens. Each is the vocabulary's last
            token unless given: GPT-2 has that one for all of them.
    """

    model_type = "tinycap_text_model"
    base_config_key = "text_config"

    def __init__(
        self,
        vocab_size=50257,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=1024,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        max_position_embeddings=64,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.02,
        use_cache=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.intermediate_size = num_attention_heads, intermediate_size
        self.hidden_act, self.layer_norm_eps = hidden_act, layer_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.hidden_dropout_prob, self.attention_probs_dropout_prob = hidden_dropout_prob, attention_probs_dropout_prob
        self.initializer_range, self.use_cache = initializer_range, use_cache

        check_transformer(self, "vocab_size", "max_position_embeddings")
        # transformers 5 has no such fields in its base class, transformers 4 reads them from the keywords.
        ids = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(**{name: vocab_size - 1 if value is None else value for name, value in ids.items()}, **kwargs)


class TinyCapConfig(PretrainedConfig):
    """Configuration of `TinyCapForConditionalGeneration`; the defaults make 18,189,888 parameters.

    Args:
        vision_config (`dict` or `TinyCapVisionConfig`, *optional*): the student ViT.
        text_config (`dict` or `TinyCapTextConfig`, *optional*): the causal decoder.
        memory (`str`, default `"embedding"`): what the decoder attends to: `"embedding"`, the image embedding as one
            vector, or `"patches"`, all tokens of the student.
        memory_scale (`float`, *optional*): factor on the memory before its projection. `None` stands for
            `sqrt(projection_dim)` with `memory="embedding"`, which brings the entries of a unit-norm vector to the size
            of 1, and for 1 with `memory="patches"`, whose tokens come out of a layer norm.
        memory_noise (`float`, default 0.0): norm of the random vector that is added to the unit-norm embedding in each
            training step (as CapDec's, Nukrai et al., 2022, https://arxiv.org/abs/2211.00575), since embeddings of
            unseen images are less accurate; no effect in eval mode. With `memory="embedding"` only.
        distill_weight (`float`, default 1.0): weight of the distillation loss in the total.
        label_smoothing (`float`, default 0.0): label smoothing of the caption loss.
        initializer_range (`float`, default 0.02): standard deviation of the initial weights outside both parts.
        tie_word_embeddings (`bool`, default `True`): the head shares the token embedding's weight.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): override those of `text_config`.
        decoder_start_token_id (`int`, *optional*): first token of every caption; `bos_token_id` unless given.

    Raises:
        ValueError: a size, share or id is out of range; names the field, what was expected and what came.
    """

    model_type = "tinycap"
    sub_configs = {"vision_config": TinyCapVisionConfig, "text_config": TinyCapTextConfig}

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        memory="embedding",
        memory_scale=None,
        memory_noise=0.0,
        distill_weight=1.0,
        label_smoothing=0.0,
        initializer_range=0.02,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        decoder_start_token_id=None,
        **kwargs,
    ):
        self.vision_config = self._as_config(vision_config, TinyCapVisionConfig)
        self.text_config = self._as_config(text_config, TinyCapTextConfig)
        self.memory, self.memory_scale, self.memory_noise = memory, memory_scale, memory_noise
        self.distill_weight, self.label_smoothing, self.initializer_range = (
            distill_weight,
            label_smoothing,
            initializer_range,
        )

        if memory not in MEMORIES:
            raise ValueError(f"TinyCapConfig.memory: expected one of {', '.join(MEMORIES)}, got {memory!r}")
        if memory_scale is not None:
            check_fields(self, POSITIVE_NUMBER, ("memory_scale",))
        check_fields(self, NUMBER, ("memory_noise", "distill_weight", "initializer_range"))
        check_fields(self, SHARE, ("label_smoothing",))
        if memory == "patches" and memory_noise > 0:
            raise ValueError(f"TinyCapConfig.memory_noise: expected 0 with memory='patches', got {memory_noise!r}")

        # Ids given here are written into the text config, and read from there otherwise.
        ids = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        for name, value in ids.items():
            ids[name] = getattr(self.text_config, name) if value is None else value
            setattr(self.text_config, name, ids[name])
        ids["decoder_start_token_id"] = (
            ids["bos_token_id"] if decoder_start_token_id is None else decoder_start_token_id
        )
        # transformers 4 ties the head when the text config says so.
        self.text_config.tie_word_embeddings = tie_word_embeddings
        vocab_size = self.text_config.vocab_size
        for name, value in ids.items():
            for token in value if isinstance(value, (list, tuple)) else [value]:
                if not isinstance(token, int) or not 0 <= token < vocab_size:
                    raise ValueError(
                        f"TinyCapConfig.{name}: expected an id below vocab_size {vocab_size}, got {value!r}"
                    )
        # A config made in Python names what a Hub user's loaders look for, as a downloaded one does.
        kwargs = {**copy.deepcopy(LOADERS), **kwargs, "is_encoder_decoder": True}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **ids, **kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # The folder of a student alone initialises a captioner, whose decoder is new.
        if config_dict.get("model_type") == TinyCapVisionConfig.model_type:
            config_dict = {"vision_config": config_dict}
        return super().from_dict(config_dict, **kwargs)

    @staticmethod
    def _as_config(value, config_class):
        # Not by isinstance: two copies of this file may be loaded as remote code.
        if value is None:
            return config_class()
        if hasattr(value, "to_dict"):
            value = value.to_dict()
        if not isinstance(value, dict):
            raise ValueError(f"{config_class.base_config_key}: expected a dict or a config, got {type(value).__name__}")
        return config_class(**value)


TinyCapVisionConfig.register_for_auto_class()
TinyCapConfig.register_for_auto_class()


__all__ = ["TinyCapConfig", "TinyCapTextConfig", "TinyCapVisionConfig"]
