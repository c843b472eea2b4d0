"""Sizes and ids of TinyCap: the only source of shapes.

`TinyCapConfig` is composite, as CLIP's and BLIP's: `vision_config` describes the student ViT, `text_config` the causal
decoder. What joins the two (kind and scale of the memory, weights of the losses) is at the top level.
"""

import copy
import math

from transformers.configuration_utils import PretrainedConfig


MEMORIES = ("embedding", "patches")

# What the Hub's loaders look for.
CAPTIONER, IMAGE_TEXT = "modeling_tinycap.TinyCapForConditionalGeneration", "AutoModelForImageTextToText"
ZERO_SHOT = {
    "AutoModelForZeroShotImageClassification": "zero_shot_tinycap.TinyCapForZeroShotImageClassification",
}
LOADERS = {
    "auto_map": {
        "AutoConfig": "configuration_tinycap.TinyCapConfig",
        **dict.fromkeys(("AutoModel", IMAGE_TEXT, "AutoModelForMultimodalLM"), CAPTIONER),
    },
    "custom_pipelines": {
        "image-to-text": {"impl": "pipeline_tinycap.ImageToTextPipeline", "pt": [IMAGE_TEXT], "type": "multimodal"},
        "image-feature-extraction": {
            "impl": "pipeline_tinycap.ImageEmbeddingPipeline",
            "pt": ["AutoModel"],
            "type": "image",
        },
    },
}

# Name of a field: what it must be, and whether a number is that. Others are checked against the weights when loading.
SIZES = (
    *("image_size", "patch_size", "num_channels", "projection_dim", "vocab_size", "max_position_embeddings"),
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
)
SHARES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "patch_dropout", "label_smoothing")
NOT_NEGATIVE = ("initializer_range", "memory_noise", "distill_weight")
RULES = {
    **dict.fromkeys(SIZES, ("a positive integer", lambda value: isinstance(value, int) and value >= 1)),
    **dict.fromkeys(SHARES, ("a number in [0, 1)", lambda value: 0 <= value < 1)),
    **dict.fromkeys(NOT_NEGATIVE, ("a number of at least 0", lambda value: 0 <= value < math.inf)),
    "layer_norm_eps": ("a positive number up to 1", lambda value: 0 < value <= 1),
    "memory_scale": ("a positive number up to 10,000", lambda value: 0 < value <= 1e4),
}
# Weights of other types make no captions; quantised ones are stored beside such a type.
DTYPES = ("float16", "bfloat16", "float32", "float64", "auto", "None")
DIVISORS = {"hidden_size": "num_attention_heads", "image_size": "patch_size"}


def check_fields(config: PretrainedConfig, base_fields: dict) -> None:
    """Raises `ValueError` for the first field that breaks its rule; names it, what was expected and what came."""
    for name in ("dtype", "torch_dtype"):
        if str(base_fields.get(name)).removeprefix("torch.") not in DTYPES:
            raise ValueError(
                f"{type(config).__name__}.{name}: expected one of {', '.join(DTYPES[:4])}, got {base_fields[name]!r}"
            )
    fields, place = vars(config), type(config).__name__
    for name, value in fields.items():
        if name not in RULES or (name == "memory_scale" and value is None):
            continue
        expected, is_valid = RULES[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not is_valid(value):
            raise ValueError(f"{place}.{name}: expected {expected}, got {value!r}")
    for whole, part in DIVISORS.items():
        if whole in fields and fields[whole] % fields[part]:
            got = f"{whole} {fields[whole]} and {part} {fields[part]}"
            raise ValueError(f"{place}: expected a {whole} that {part} divides, got {got}")


def set_fields(config: PretrainedConfig, kwargs: dict, token_ids: tuple[str, ...] = ()) -> dict:
    """Sets the fields of a part's `DEFAULTS` from `kwargs`, checks them, and returns the other keywords.

    Not by a base class: transformers 5 writes an `__init__` for a config class that doesn't have its own.
    """
    others = {**kwargs}
    for name, default in config.DEFAULTS.items():
        setattr(config, name, others.pop(name, default))
    check_fields(config, others)
    for name in token_ids:
        if others.get(name) is None:
            others[name] = config.vocab_size - 1
    return others


class TinyCapVisionConfig(PretrainedConfig):
    """Configuration of the student ViT (`TinyCapVisionModel`); the defaults make 3,003,456 parameters."""

    model_type = "tinycap_vision_model"
    base_config_key = "vision_config"
    DEFAULTS = {
        "image_size": 224,  # side of the square input, in pixels
        "patch_size": 16,  # side of a patch, in pixels; divides image_size
        "num_channels": 3,  # channels of the input
        "hidden_size": 192,  # width of the tokens
        "num_hidden_layers": 6,  # number of pre-norm layers
        "num_attention_heads": 3,  # heads of each attention; divides hidden_size
        "intermediate_size": 768,  # width of the MLPs
        "hidden_act": "gelu",  # activation of the MLPs; "gelu" is the exact one
        "layer_norm_eps": 1e-5,  # epsilon of the layer norms
        "projection_dim": 768,  # width of image_embeds, the teacher's
        "hidden_dropout_prob": 0.0,  # dropout after the embeddings, attentions and MLPs
        "attention_probs_dropout_prob": 0.0,  # dropout of the attention weights
        # Share of the patches left out in each training step (Liu et al., 2022, https://arxiv.org/abs/2212.00794).
        "patch_dropout": 0.0,
        "initializer_range": 0.02,  # standard deviation of the initial weights
    }

    def __init__(self, **kwargs):
        super().__init__(**set_fields(self, kwargs))


class TinyCapTextConfig(PretrainedConfig):
    """Configuration of the causal decoder; the defaults are GPT-2's vocabulary and two layers.

    `pad_token_id`, `bos_token_id` and `eos_token_id` are each the vocabulary's last token unless given: GPT-2 has that
    one for all of them.
    """

    model_type = "tinycap_text_model"
    base_config_key = "text_config"
    DEFAULTS = {
        "vocab_size": 50257,  # number of tokens
        "hidden_size": 256,  # width of the tokens and of the memory
        "num_hidden_layers": 2,  # number of pre-norm layers
        "num_attention_heads": 4,  # heads of each attention; divides hidden_size
        "intermediate_size": 1024,  # width of the MLPs
        "hidden_act": "gelu",  # activation of the MLPs
        "layer_norm_eps": 1e-5,  # epsilon of the layer norms
        "max_position_embeddings": 64,  # rows of the position table: the longest caption, its start token included
        "hidden_dropout_prob": 0.1,  # dropout after the embeddings, attentions and MLPs
        "attention_probs_dropout_prob": 0.0,  # dropout of the attention weights
        "initializer_range": 0.02,  # standard deviation of the initial weights
        "use_cache": True,  # return key/value caches
    }

    def __init__(self, **kwargs):
        # transformers 5 has no such fields in its base class, transformers 4 reads them from the keywords.
        super().__init__(**set_fields(self, kwargs, ("pad_token_id", "bos_token_id", "eos_token_id")))


class TinyCapTextEncoderConfig(PretrainedConfig):
    """Configuration of `TinyCapTextModel`, which embeds texts for search; the defaults make 1,793,792 parameters."""

    model_type = "tinycap_text_encoder"
    base_config_key = "text_encoder_config"
    DEFAULTS = {
        "hidden_size": 256,  # width of the tokens, the decoder's: both share the token embedding
        "num_hidden_layers": 2,  # number of pre-norm layers
        "num_attention_heads": 4,  # heads of each attention; divides hidden_size
        "intermediate_size": 1024,  # width of the MLPs
        "hidden_act": "gelu",  # activation of the MLPs
        "layer_norm_eps": 1e-5,  # epsilon of the layer norms
        "max_position_embeddings": 64,  # rows of the position table: the longest text
        "projection_dim": 768,  # width of text_embeds
        "hidden_dropout_prob": 0.0,  # dropout after attentions and MLPs
        "attention_probs_dropout_prob": 0.0,  # dropout of the attention weights
        "initializer_range": 0.02,  # standard deviation of the initial weights
    }

    def __init__(self, **kwargs):
        super().__init__(**set_fields(self, kwargs))


class TinyCapConfig(PretrainedConfig):
    """Configuration of `TinyCapForConditionalGeneration`; the defaults make 18,189,888 parameters.

    Args:
        vision_config (`dict` or `TinyCapVisionConfig`, *optional*): the student ViT.
        text_config (`dict` or `TinyCapTextConfig`, *optional*): the causal decoder.
        text_encoder_config (`dict` or `TinyCapTextEncoderConfig`, *optional*): embeds texts for search; `None` for a
            captioner without it.
        memory (`str`, default `"embedding"`): what the decoder attends to: `"embedding"`, the image embedding as one
            vector, or `"patches"`, all tokens of the student.
        memory_scale (`float`, *optional*): factor on the memory before its projection. `None` stands for
            `sqrt(projection_dim)` with `memory="embedding"`, which brings the entries of a unit-norm vector to the size
            of 1, and for 1 with `memory="patches"`, whose tokens come out of a layer norm.
        memory_noise (`float`, default 0.0): norm of the random vector that is added to the unit-norm embedding in each
            training step (as CapDec's, Nukrai et al., 2022, https://arxiv.org/abs/2211.00575), since embeddings of
            unseen images are less accurate. With `memory="embedding"` only.
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
    # Without the text encoder's, since transformers 4 expects that none of them is `None`.
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
        text_encoder_config=None,
        **kwargs,
    ):
        self.vision_config = self._as_config(vision_config, TinyCapVisionConfig)
        self.text_config = self._as_config(text_config, TinyCapTextConfig)
        self.text_encoder_config = None
        if text_encoder_config is not None:
            self.text_encoder_config = self._as_config(text_encoder_config, TinyCapTextEncoderConfig)
            width, expected = self.text_encoder_config.hidden_size, self.text_config.hidden_size
            if width != expected:
                place = f"{type(self).__name__}.text_encoder_config.hidden_size"
                raise ValueError(f"{place}: expected {expected}, the decoder's, got {width}")
        self.memory, self.memory_scale, self.memory_noise = memory, memory_scale, memory_noise
        self.distill_weight, self.label_smoothing = distill_weight, label_smoothing
        self.initializer_range = initializer_range
        check_fields(self, kwargs)
        if memory not in MEMORIES:
            raise ValueError(f"TinyCapConfig.memory: expected one of {', '.join(MEMORIES)}, got {memory!r}")
        if memory == "patches" and memory_noise > 0:
            raise ValueError(f"TinyCapConfig.memory_noise: expected 0 with memory='patches', got {memory_noise!r}")

        # Ids given here are written into the text config, and read from there otherwise.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self.text_config, name)
            setattr(self.text_config, name, kwargs[name])
        if kwargs.get("decoder_start_token_id") is None:
            kwargs["decoder_start_token_id"] = kwargs["bos_token_id"]
        vocab_size = self.text_config.vocab_size
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            value = kwargs[name]
            for token in value if isinstance(value, (list, tuple)) else [value]:
                if not isinstance(token, int) or not 0 <= token < vocab_size:
                    raise ValueError(
                        f"TinyCapConfig.{name}: expected an id below vocab_size {vocab_size}, got {value!r}"
                    )
        # transformers 4 ties the head when the text config says so.
        self.text_config.tie_word_embeddings = tie_word_embeddings
        # A config made in Python names what a Hub user's loaders look for, as a downloaded one does.
        kwargs = {**copy.deepcopy(LOADERS), **kwargs, "is_encoder_decoder": True}
        # One without texts may come from one that had them.
        others = {name: place for name, place in (kwargs["auto_map"] or {}).items() if name not in ZERO_SHOT}
        kwargs["auto_map"] = {**others, **(ZERO_SHOT if text_encoder_config is not None else {})}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # The folder of a student alone initialises a captioner, whose decoder is new.
        if config_dict.get("model_type") == TinyCapVisionConfig.model_type:
            config_dict = {"vision_config": config_dict}
        return super().from_dict(config_dict, **kwargs)

    @staticmethod
    def _as_config(value, config_class):
        # Not by isinstance: two copies of this file may be loaded as remote code.
        value = value.to_dict() if hasattr(value, "to_dict") else value
        if not isinstance(value, (dict, type(None))):
            raise ValueError(f"{config_class.base_config_key}: expected a dict or a config, got {type(value).__name__}")
        return config_class(**(value or {}))


TinyCapVisionConfig.register_for_auto_class()
TinyCapConfig.register_for_auto_class()


__all__ = ["TinyCapConfig", "TinyCapTextConfig", "TinyCapTextEncoderConfig", "TinyCapVisionConfig"]
