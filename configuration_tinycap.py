"""Sizes and ids of TinyCap: the only source of shapes.

`TinyCapConfig` is composite, as CLIP's and BLIP's: `vision_config` describes the student ViT, `text_config` the causal
decoder. What joins the two (the kind of memory, its scale, the weights of the losses) stands at the top.
"""

import math

from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

MEMORIES = ("embedding", "patches")

# Beyond these a configuration is a mistake or an attack: it would ask for more memory than there is before anybody
# noticed. A downloaded checkpoint's sizes are held against its weights, besides (see `modeling_tinycap.py`).
MAX_SIZE = 2**24
MAX_LAYERS = 1024
MAX_PARAMETERS = 2**32


def _check_positive_integers(config: PretrainedConfig, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(config).__name__}.{name}: expected a positive integer, got {value!r}")
        limit = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
        if value > limit:
            raise ValueError(f"{type(config).__name__}.{name}: expected at most {limit:,}, got {value:,}")


def _check_shares(config: PretrainedConfig, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
            raise ValueError(f"{type(config).__name__}.{name}: expected a number in [0, 1), got {value!r}")


def _check_numbers(config: PretrainedConfig, names: tuple[str, ...], positive: bool = False) -> None:
    for name in names:
        value = getattr(config, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or value < 0 or (positive and value == 0):
            expected = "a positive number" if positive else "a number of at least 0"
            raise ValueError(f"{type(config).__name__}.{name}: expected {expected}, got {value!r}")


def _check_parameters(config: PretrainedConfig, tables: int, attentions: int) -> None:
    """Adds up the matrices: `tables` values in embeddings and projections, `attentions` in each layer."""
    width, layers = config.hidden_size, config.num_hidden_layers
    count = tables * width + layers * width * (4 * attentions * width + 2 * config.intermediate_size)
    if count > MAX_PARAMETERS:
        raise ValueError(
            f"{type(config).__name__}: expected sizes that make at most {MAX_PARAMETERS:,} parameters, got {count:,}"
        )


def _check_heads(config: PretrainedConfig) -> None:
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
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.projection_dim = projection_dim
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.patch_dropout = patch_dropout
        self.initializer_range = initializer_range

        sizes = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers")
        _check_positive_integers(self, (*sizes, "num_attention_heads", "intermediate_size", "projection_dim"))
        _check_shares(self, ("hidden_dropout_prob", "attention_probs_dropout_prob", "patch_dropout"))
        _check_heads(self)
        if image_size % patch_size:
            raise ValueError(
                "TinyCapVisionConfig: expected an image_size that patch_size divides, "
                f"got image_size {image_size} and patch_size {patch_size}"
            )
        _check_numbers(self, ("layer_norm_eps",), positive=True)
        _check_numbers(self, ("initializer_range",))
        tables = (image_size // patch_size) ** 2 + num_channels * patch_size**2 + projection_dim
        _check_parameters(self, tables, attentions=1)
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
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.initializer_range = initializer_range
        self.use_cache = use_cache

        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        _check_positive_integers(self, (*sizes, "max_position_embeddings"))
        _check_shares(self, ("hidden_dropout_prob", "attention_probs_dropout_prob"))
        _check_heads(self)
        _check_numbers(self, ("layer_norm_eps",), positive=True)
        _check_numbers(self, ("initializer_range",))
        _check_parameters(self, vocab_size + max_position_embeddings, attentions=2)
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
            `sqrt(projection_dim)` with `memory="embedding"`, since a unit-norm vector of 768 has entries near 0.036
            and would enter the decoder some 28 times too quietly, and for 1 with `memory="patches"`, whose tokens
            come out of a layer norm.
        memory_noise (`float`, default 0.0): length of the random vector that is added to the embedding, of length 1, in
            each training step before the decoder sees it (as CapDec's, Nukrai et al., 2022,
            https://arxiv.org/abs/2211.00575): photos that the student hasn't seen get embeddings that are less right
            than those of its training photos; no effect in eval mode. With `memory="embedding"` only.
        distill_weight (`float`, default 1.0): weight of the distillation loss in the total.
        label_smoothing (`float`, default 0.0): label smoothing of the caption loss.
        initializer_range (`float`, default 0.02): standard deviation of the initial weights outside both parts.
        tie_word_embeddings (`bool`, default `True`): the head shares the token embedding's weight.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): override those of `text_config`.
        decoder_start_token_id (`int`, *optional*): first token of every caption; `bos_token_id` unless given.

    Raises:
        ValueError: a size, share or id makes no sense; names the field, what was expected and what came.
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
        self.memory = memory
        self.memory_scale = memory_scale
        self.memory_noise = memory_noise
        self.distill_weight = distill_weight
        self.label_smoothing = label_smoothing
        self.initializer_range = initializer_range

        if memory not in MEMORIES:
            raise ValueError(f"TinyCapConfig.memory: expected one of {', '.join(MEMORIES)}, got {memory!r}")
        if memory_scale is not None:
            _check_numbers(self, ("memory_scale",), positive=True)
        _check_numbers(self, ("memory_noise", "distill_weight", "initializer_range"))
        _check_shares(self, ("label_smoothing",))
        if memory == "patches" and memory_noise > 0:
            raise ValueError(f"TinyCapConfig.memory_noise: expected 0 with memory='patches', got {memory_noise!r}")

        # One truth: ids given here are written into the text config, and read from there otherwise.
        ids = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        for name, value in ids.items():
            if value is None:
                ids[name] = getattr(self.text_config, name)
            else:
                setattr(self.text_config, name, value)
        # transformers 4 ties the head when the text config says so.
        self.text_config.tie_word_embeddings = tie_word_embeddings
        ids["decoder_start_token_id"] = (
            ids["bos_token_id"] if decoder_start_token_id is None else decoder_start_token_id
        )
        for name, value in ids.items():
            for token in value if isinstance(value, (list, tuple)) else [value]:
                if not isinstance(token, int) or not 0 <= token < self.text_config.vocab_size:
                    raise ValueError(
                        f"TinyCapConfig.{name}: expected an id below vocab_size {self.text_config.vocab_size}, "
                        f"got {value!r}"
                    )

        # A config made in Python carries what a Hub user's loaders look for, as a downloaded one does.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_tinycap.TinyCapConfig",
                "AutoModel": "modeling_tinycap.TinyCapForConditionalGeneration",
                "AutoModelForImageTextToText": "modeling_tinycap.TinyCapForConditionalGeneration",
                "AutoModelForMultimodalLM": "modeling_tinycap.TinyCapForConditionalGeneration",
            },
        )
        kwargs.setdefault(
            "custom_pipelines",
            {
                "image-to-text": {
                    "impl": "pipeline_tinycap.ImageToTextPipeline",
                    "pt": ["AutoModelForImageTextToText"],
                    "type": "multimodal",
                },
                "image-feature-extraction": {
                    "impl": "pipeline_tinycap.ImageEmbeddingPipeline",
                    "pt": ["AutoModel"],
                    "type": "image",
                },
            },
        )
        kwargs["is_encoder_decoder"] = True
        super().__init__(tie_word_embeddings=tie_word_embeddings, **ids, **kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # The folder of a student alone begins a captioner: its weights load, and the decoder is new.
        if config_dict.get("model_type") == TinyCapVisionConfig.model_type:
            config_dict = {"vision_config": config_dict}
        return super().from_dict(config_dict, **kwargs)

    @staticmethod
    def _as_config(value, config_class):
        # Compared by what it offers, not by isinstance: two copies of this file may be loaded as remote code.
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
