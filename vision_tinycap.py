"""The student ViT, which is distilled from CLIP's image encoder, and the base class of all models.

The base class loads weights: it validates untrusted checkpoints before memory is allocated, and after.
"""

import copy
import math
import os
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import cached_file

from .checks_tinycap import check_generation, read_json, weight_files
from .confidence_tinycap import CONFIDENCE_NAME
from .configuration_tinycap import TinyCapConfig, TinyCapVisionConfig
from .layers_tinycap import TinyCapEncoderLayer, dropout_layer


# safetensors' names of weights that aren't quantised.
FLOATS = ("F64", "F32", "F16", "BF16")
# Far above any trained weight; far larger ones overflow in the layers.
MAX_WEIGHT = 1e6
QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class TinyCapVisionOutput(BaseModelOutputWithPooling):
    """Output of the student.

    Args:
        last_hidden_state: (B, 1 + patches, hidden_size), after the final layer norm; row 0 is `[CLS]`.
        pooler_output: (B, projection_dim), the image embedding, of unit norm; also called `image_embeds`.
        hidden_states, attentions: per layer, as transformers' own; the former before the final layer norm.
    """

    @property
    def image_embeds(self) -> torch.FloatTensor | None:
        return self.pooler_output


# --- loading, saving, initial weights -------------------------------------------------------------------------------


def stored_tensors(paths: list[str]) -> dict[str, tuple]:
    """(path, shape, dtype) of each tensor, by the headers of safetensors files; `ValueError` names a broken one."""
    stored = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name in stored:
                        raise ValueError(f"{path}: {name}: expected it once, got it in {stored[name][0]} too")
                    part = file.get_slice(name)
                    stored[name] = path, part.get_shape(), part.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{path}: expected safetensors, got something else: {error}") from error
    return stored


def check_shapes(source: str, stored: dict[str, tuple], model_class: type, config) -> None:
    """Raises `ValueError` where the stored shapes contradict the config; names the tensors."""
    # A student is stored alone or as part of a captioner, and loads from either into either.
    shapes = {name.removeprefix("vision_model."): shape for name, (_, shape, _) in stored.items()}
    # First the depths, since a model of many layers takes long to build.
    parts = {"layers": getattr(config, "vision_config", config), "decoder.layers": getattr(config, "text_config", None)}
    parts["text_model.layers"] = getattr(config, "text_encoder_config", None)
    for stack, part in parts.items():
        depth = len({name.removeprefix(f"{stack}.").split(".")[0] for name in shapes if name.startswith(f"{stack}.")})
        if depth and part is not None and depth != part.num_hidden_layers:
            raise ValueError(f"{source}: {stack}.*: the config expects {part.num_hidden_layers} layers, got {depth}")
    try:
        with torch.device("meta"):
            expected = model_class(copy.deepcopy(config)).state_dict()
    except (RuntimeError, TypeError) as error:
        # The number of a tensor's values overflows 64 bits.
        raise ValueError(f"{source}: expected a config of possible sizes: {error}") from error
    wrong = []
    for name, value in expected.items():
        got, shape = shapes.get(name.removeprefix("vision_model.")), list(value.shape)
        if got is not None and got != shape:
            wrong.append(f"{name}: the config expects the shape {shape}, got {got}")
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} tensors contradict the config: {'; '.join(wrong[:3])}")


def check_weights(source: str, stored: dict[str, tuple], model: nn.Module) -> None:
    """Raises `ValueError`, naming the first such tensor, where weights are no floats, huge, infinite or NaN."""
    places = {name.removeprefix("vision_model."): (path, dtype) for name, (path, _, dtype) in stored.items()}
    for name, value in model.named_parameters():
        path, dtype = places.get(name.removeprefix("vision_model."), (source, "F32"))
        # Only the library of a tensor subclass (quantised, distributed) can read its values.
        if type(value) is not nn.Parameter or not value.is_floating_point() or value.element_size() == 1:
            continue
        if dtype not in FLOATS:
            raise ValueError(f"{path}: {name}: expected weights of type {', '.join(FLOATS)}, got {dtype}")
        if not value.is_meta and value.numel() > 0:
            # Both extremes in one pass, without a copy; a NaN makes both NaN.
            low, high = torch.aminmax(value.detach())
            if not (-MAX_WEIGHT < low and high < MAX_WEIGHT):
                raise ValueError(f"{path}: {name}: expected finite weights, got values from {low} to {high}")


def position_table(side: int, width: int) -> torch.Tensor:
    """Initial position embeddings: sines and cosines of both coordinates, for `[CLS]` and side x side patches.

    Patch embeddings sum hundreds of correlated pixels and grow ~50x larger than N(0, 0.02) positions, which then barely
    influence attention. 2D waves as in MAE (He et al., 2022, https://arxiv.org/abs/2111.06377), from half a period
    across the image to half a period a patch. Returns (1 + side * side, width), from -1 to 1, row 0 (`[CLS]`) zero.
    """
    frequencies = 0.5 * math.pi * side ** torch.linspace(0, 1, -(-width // 4))
    angles = (torch.arange(side)[:, None] + 0.5) / side * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    # Interleaved, so that a width that isn't a multiple of 4 truncates both coordinates alike.
    both = torch.stack([waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)], dim=-1)
    return torch.cat([torch.zeros(1, width), both.flatten(2).flatten(0, 1)[:, :width]])


class TinyCapPreTrainedModel(PreTrainedModel):
    """Loading with validation, initial weights, and the attributes that transformers reads."""

    config_class = TinyCapConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["TinyCapVisionEmbeddings", "TinyCapEncoderLayer", "TinyCapDecoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Otherwise transformers guesses it from how the source is spelled, by rules that change with its versions.
        return True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """`PreTrainedModel.from_pretrained`, of safetensors only, with validation of untrusted checkpoints.

        Raises:
            ValueError: there is a pickle instead; header, weights and configuration contradict each other, which is
                found before memory is allocated; weights are infinite or NaN; some are missing, unless
                `output_loading_info=True` or `ignore_mismatched_sizes=True`.
        """
        source, stored = pretrained_model_name_or_path, {}
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors: expected True or None, since nothing else is read, got False")
        for name in ("gguf_file", "from_tf", "from_flax", "transformers_weights"):
            if kwargs.get(name):
                raise ValueError(f"{name}: expected none, since only model.safetensors is read, got {kwargs[name]!r}")
        kwargs["use_safetensors"] = True
        wants_report, tolerant = kwargs.pop("output_loading_info", False), kwargs.get("ignore_mismatched_sizes", False)
        hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if source is not None and kwargs.get("state_dict") is None:
            source = os.fspath(source)
            find = partial(cached_file, source, **hub_kwargs, **QUIET)
            folder = os.path.join(source, hub_kwargs.get("subfolder") or "")
            stored = stored_tensors(weight_files(source, folder, find, kwargs.get("variant")))
            config = kwargs.get("config")
            if not hasattr(config, "to_dict"):
                config = cls.config_class.from_pretrained(source if config is None else config, **hub_kwargs)
            cls.check_before_loading(source, stored, config, tolerant, find)
        model, report = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
        check_weights(source, stored, model)
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        if head is not None and model.config.tie_word_embeddings and "lm_head.weight" not in stored:
            # transformers 5.3 leaves the head of remote code untied. Quantised and offloaded weights are left alone.
            if type(head.weight) is nn.Parameter and not table.weight.is_meta and not hasattr(head, "_hf_hook"):
                head.weight = table.weight
        if source is not None:
            # Looked up here, because only this call knows the model's revision, token and cache.
            model.confidence_path = cached_file(source, CONFIDENCE_NAME, **hub_kwargs, **QUIET)
        missing = sorted(report["missing_keys"])
        # A student alone initialises a captioner, whose decoder is new.
        is_student = bool(stored) and not any(name.startswith(("decoder.", "vision_model.")) for name in stored)
        if missing and source is not None and not (wants_report or tolerant or is_student):
            raise ValueError(
                f"{source}: expected all weights, {len(missing)} are missing: {', '.join(missing[:5])}; "
                "output_loading_info=True loads the others all the same"
            )
        return (model, report) if wants_report else model

    @classmethod
    def check_before_loading(
        cls, source: str, stored: dict[str, tuple], config, tolerant: bool, find: Callable
    ) -> None:
        """Raises `ValueError` where the weights' headers, the config and `generation_config.json` aren't valid."""
        names = ("quantization_config", "transformers_weights")
        quantization, named = (getattr(config, name, None) for name in names)
        if named is not None:
            raise ValueError(f"{source}: config.json: transformers_weights: expected none, got {named!r}")
        # A quantised checkpoint stores packed tensors of other shapes; transformers ignores methods it doesn't know.
        if quantization is None:
            if stored and not tolerant:
                check_shapes(source, stored, cls, config)
        elif not AutoHfQuantizer.supports_quant_method(getattr(quantization, "to_dict", lambda: quantization)()):
            raise ValueError(
                f"{source}: config.json: quantization_config: expected a known method, got {quantization!r}"
            )
        for name in ("generation_config.json", "preprocessor_config.json", "tokenizer_config.json"):
            path = find(name) if hasattr(config, "text_config") else None
            # transformers replaces the first by defaults if it isn't JSON; its errors don't name the others.
            content = {} if path is None else read_json(path)
            if path is not None and name == "generation_config.json":
                check_generation(content, path, config.text_config.vocab_size)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, TinyCapVisionEmbeddings):
            nn.init.trunc_normal_(module.cls_token, std=std)
            # transformers 5 keeps what was loaded from `nn.init`, but not from a copy.
            if not getattr(module.position_embeddings, "_is_hf_initialized", False):
                table = position_table(math.isqrt(module.num_patches), module.config.hidden_size)
                module.position_embeddings.copy_(table.unsqueeze(0))

    def output_flags(self, *flags: bool | None) -> list[bool]:
        """`output_attentions`, `output_hidden_states`, `return_dict`: from the call, or else from the config."""
        names = ("output_attentions", "output_hidden_states", "return_dict")
        return [getattr(self.config, name) if flag is None else flag for name, flag in zip(names, flags)]


# --- student ViT ----------------------------------------------------------------------------------------------------


class TinyCapVisionEmbeddings(nn.Module):
    """Pixels (B, C, H, W) -> tokens (B, 1 + patches, hidden_size), `[CLS]` first."""

    def __init__(self, config: TinyCapVisionConfig):
        super().__init__()
        self.config = config
        self.num_patches = (config.image_size // config.patch_size) ** 2
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + self.num_patches, config.hidden_size))
        self.dropout = dropout_layer(config.hidden_dropout_prob)

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """The position table, interpolated to a grid of `rows` x `columns` patches."""
        side = math.isqrt(self.num_patches)
        if (rows, columns) == (side, side):
            return self.position_embeddings
        cls_position, grid = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid.float(), size=(rows, columns), mode="bicubic", align_corners=False).to(grid.dtype)
        return torch.cat([cls_position, grid.flatten(2).transpose(1, 2)], dim=1)

    def drop_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """Leaves out a random `patch_dropout` of each image's patches (B, patches, hidden_size)."""
        batch, length, width = patches.shape
        kept = max(1, round(length * (1.0 - self.config.patch_dropout)))
        index = torch.rand(batch, length, device=patches.device).argsort(dim=1)[:, :kept]
        return patches.gather(1, index.unsqueeze(-1).expand(-1, -1, width))

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        size, channels = self.config.image_size, self.config.num_channels
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values: expected (batch, {channels}, height, width), got {tuple(pixel_values.shape)}"
            )
        height, width = pixel_values.shape[2:]
        if not interpolate_pos_encoding and (height, width) != (size, size):
            raise ValueError(
                f"pixel_values: expected {size}x{size} pixels, got {height}x{width}; "
                "pass interpolate_pos_encoding=True to encode another size"
            )
        patches = self.patch_embedding(pixel_values.to(self.cls_token.dtype))
        positions = self.positions(*patches.shape[2:])
        patches = patches.flatten(2).transpose(1, 2) + positions[:, 1:]
        if self.training and self.config.patch_dropout > 0:
            patches = self.drop_patches(patches)
        cls_token = (self.cls_token + positions[:, :1]).expand(patches.shape[0], -1, -1)
        return self.dropout(torch.cat([cls_token, patches], dim=1))


class TinyCapVisionModel(TinyCapPreTrainedModel):
    """The student ViT alone (Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929, pre-norm), with a projection
    of `[CLS]` to the teacher's width. Loads from the folder of a whole TinyCap too."""

    config_class = TinyCapVisionConfig
    _keys_to_ignore_on_load_unexpected = [r"^(decoder|lm_head|text_model|visual_projection)\.", r"^logit_scale$"]

    def __init__(self, config: TinyCapVisionConfig):
        super().__init__(config)
        self.embeddings = TinyCapVisionEmbeddings(config)
        self.layers = nn.ModuleList([TinyCapEncoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def forward(
        self,
        pixel_values: torch.FloatTensor,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> TinyCapVisionOutput | tuple:
        """Encodes `pixel_values` (B, num_channels, image_size, image_size), normalised by the image processor.

        Another height and width need `interpolate_pos_encoding`. With `return_dict=False` the output is a tuple.

        Raises:
            ValueError: `pixel_values` has another shape; names the expected one.
        """
        attentions, states, return_dict = self.output_flags(output_attentions, output_hidden_states, return_dict)
        if pixel_values is None:
            raise ValueError("pixel_values: expected a tensor of images, got None")
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        all_hidden_states, all_attentions = (hidden_states,), ()
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, output_attentions=attentions)
            all_hidden_states += (hidden_states,)
            all_attentions += (weights,)
        last_hidden_state = self.final_layer_norm(hidden_states)
        image_embeds = self.projection(last_hidden_state[:, 0])
        # The norm in float32: the sum of 768 squares loses too much in half precision.
        image_embeds = F.normalize(image_embeds.float(), dim=-1).to(image_embeds.dtype)
        output = TinyCapVisionOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=image_embeds,
            hidden_states=all_hidden_states if states else None,
            attentions=all_attentions if attentions else None,
        )
        return output if return_dict else output.to_tuple()


TinyCapVisionModel.register_for_auto_class("AutoModel")


__all__ = ["TinyCapPreTrainedModel", "TinyCapVisionModel", "TinyCapVisionOutput", "position_table"]
