"""A teacher's towers: pretrained image models of any architecture, and a frozen sentence encoder to learn against."""

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    CLIPVisionModelWithProjection,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.utils import cached_file

from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.training.repository import create_image_processor, load_repository


# Texts that are encoded together for the cache.
TEXT_BATCH_SIZE = 256
# The text head, saved beside the image tower.
TEXT_HEAD_FILE = "text_projection.safetensors"
# The input of models that don't say theirs, pixels.
DEFAULT_IMAGE_SIZE = 224


def load_weights(
    model_class: type, name_or_path: str, kind: str, unused: str | Callable[[PreTrainedModel], str] = "", **options
) -> PreTrainedModel:
    """`model_class.from_pretrained` in float32.

    Raises `ValueError` where it isn't of this `kind` or lacks weights, which it names. Weights with `unused`, which may
    depend on the model, in their names may be missing.
    """
    options |= {"dtype": torch.float32, "output_loading_info": True}
    try:
        model, report = model_class.from_pretrained(name_or_path, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"{name_or_path}: expected {kind} on the Hub or in a local folder: {error}") from error
    # A mismatched weight comes as (name, shape in the file, shape in the model).
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in report["mismatched_keys"]}
    wrong = sorted(mismatched.union(report["missing_keys"]))
    if unused and wrong:
        part = unused if isinstance(unused, str) else unused(model)
        wrong = [name for name in wrong if part not in name]
    if wrong:
        raise ValueError(
            f"{name_or_path}: expected all weights of {kind}, {len(wrong)} are missing or of another shape: "
            f"{', '.join(wrong[:5])}"
        )
    return model


def pixel_statistics(name_or_path: str, subfolder: str = "") -> tuple[list[float], list[float]] | None:
    """Mean and deviation per channel that an image model's pixels are normalised by; `None` without a processor."""
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False, subfolder=subfolder)
        return list(processor.image_mean), list(processor.image_std)
    except Exception:
        # transformers raises errors of many types on malformed files.
        return None


def resize_pixels(pixel_values: torch.Tensor, image_size: int) -> torch.Tensor:
    """(B, 3, H, W) to squares of side `image_size`."""
    size = (image_size, image_size)
    if pixel_values.shape[-2:] == size:
        return pixel_values
    return F.interpolate(pixel_values, size, mode="bicubic", align_corners=False, antialias=True)


def input_size(config: PretrainedConfig) -> int:
    """Side of an image model's input, pixels."""
    size = getattr(config, "image_size", None)
    if size is None:
        # timm's.
        size = (getattr(config, "pretrained_cfg", None) or {}).get("input_size", DEFAULT_IMAGE_SIZE)
    return size if isinstance(size, int) else size[-1]


def output_layer(classifier: PreTrainedModel) -> str:
    """Name of the linear layer whose outputs are the logits; raises `ValueError` where there is none."""
    outputs, size = {}, input_size(classifier.config)

    def record(name: str) -> Callable:
        return lambda module, inputs, output: outputs.update({name: output})

    linear = {name: module for name, module in classifier.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_hook(record(name)) for name, module in linear.items()]
    with torch.no_grad():
        logits = classifier.eval()(pixel_values=torch.zeros(1, 3, size, size)).logits
    for handle in handles:
        handle.remove()
    names = [name for name, output in outputs.items() if output is logits and linear[name].bias is not None]
    if not names:
        raise ValueError(
            f"{classifier.name_or_path}: expected an image classifier with a linear layer and its bias at the end, "
            f"got {type(classifier).__name__}"
        )
    return names[0]


class PretrainedImageTower(nn.Module):
    """An image classifier with a new head that projects to the joint space; called like a CLIP image tower.

    As in open_clip's towers from timm, the last linear layer has `projection_dim` outputs instead of classes: any model
    of `AutoModelForImageClassification` will do, timm's among them, and is saved in its own format.

    Args:
        statistics: mean and deviation per channel that its pixels are normalised by.
    """

    def __init__(self, classifier: PreTrainedModel, statistics: tuple[list[float], list[float]]):
        super().__init__()
        self.classifier, self.statistics = classifier, statistics
        self.head_name = output_layer(classifier)
        self.num_features = classifier.get_submodule(self.head_name).in_features

    @classmethod
    def from_pretrained(cls, name_or_path: str, projection_dim: int | None = None, subfolder: str = ""):
        """Loads a tower, with a new head of width `projection_dim` or the saved one, as `load_weights` does."""
        kind, options = "an image model with a classification head", {"subfolder": subfolder}
        if projection_dim is not None:
            options |= {"num_labels": projection_dim, "ignore_mismatched_sizes": True}
            options["unused"] = lambda model: f"{output_layer(model)}."
        classifier = load_weights(AutoModelForImageClassification, name_or_path, kind, **options)
        if projection_dim is not None:
            # timm's names of its classes.
            vars(classifier.config).pop("label_names", None)
        own = getattr(classifier.config, "pretrained_cfg", None)
        statistics = (own["mean"], own["std"]) if own else pixel_statistics(name_or_path, subfolder)
        return cls(classifier, statistics or (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))

    def remove_head(self) -> None:
        """Makes the features the output."""
        self.classifier.set_submodule(self.head_name, nn.Identity())

    @property
    def towers(self) -> list["PretrainedImageTower"]:
        """As in `ImageTowers`."""
        return [self]

    @property
    def config(self) -> SimpleNamespace:
        """`image_size` (pixels) and `projection_dim`, as in a CLIP image tower's configuration."""
        config = self.classifier.config
        return SimpleNamespace(image_size=input_size(config), projection_dim=config.num_labels)

    def set_image_size(self, image_size: int) -> None:
        """Sets the side of the input images, pixels; raises `ValueError` where learned positions fix another one."""
        fixed, names = self.config.image_size, [name for name, _ in self.classifier.named_parameters()]
        if image_size != fixed and any("position" in name or "pos_embed" in name for name in names):
            raise ValueError(
                f"image_size: expected {fixed}, at which the image model has learned positions, got {image_size}"
            )
        self.classifier.config.image_size = image_size

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        """(B, 3, H, W) pixels to `image_embeds` (B, projection_dim)."""
        # Convolutions on a CPU are faster with channels last.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return SimpleNamespace(image_embeds=self.classifier(pixel_values=pixel_values).logits)

    def save_pretrained(self, output_dir: str | Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Writes the classifier in its own format, from the tower's `state_dict` as `accelerate` gathers it, and its
        image processor."""
        tensors = {name.removeprefix("classifier."): value for name, value in state_dict.items()}
        self.classifier.save_pretrained(output_dir, state_dict=tensors)
        create_image_processor(self.config.image_size, *self.statistics).save_pretrained(output_dir)


class ImageTowers(nn.Module):
    """Several towers side by side; called like one of them.

    A linear layer on their concatenated features is the sum of a linear layer on each: `image_embeds` is the sum of the
    towers' own. Each sees the pixels in its size and by its statistics; they come normalised by those of the first.
    """

    def __init__(self, towers: list[PretrainedImageTower]):
        super().__init__()
        self.towers = nn.ModuleList(towers)
        # Tensors, so that they are part of a teacher cache's key.
        mean, std = (torch.tensor(values).view(-1, 3, 1, 1) for values in zip(*(tower.statistics for tower in towers)))
        self.register_buffer("scale", std[0] / std)
        self.register_buffer("shift", (mean[0] - mean) / std)
        self.register_buffer("image_sizes", torch.tensor([tower.config.image_size for tower in towers]))

    @property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Of the pixels that it is given."""
        return self.towers[0].statistics

    @property
    def config(self) -> SimpleNamespace:
        """As of one tower; `image_size` is the largest."""
        config = self.towers[0].config
        return SimpleNamespace(image_size=int(self.image_sizes.max()), projection_dim=config.projection_dim)

    def set_image_size(self, image_size: int) -> None:
        """As of one tower, for all of them."""
        for tower in self.towers:
            tower.set_image_size(image_size)
        self.image_sizes.fill_(image_size)

    def outputs(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) pixels to each tower's own `image_embeds`."""
        return [
            tower(resize_pixels(pixel_values * scale + shift, tower.config.image_size)).image_embeds
            for tower, scale, shift in zip(self.towers, self.scale, self.shift)
        ]

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        """(B, 3, H, W) pixels to `image_embeds` (B, projection_dim)."""
        return SimpleNamespace(image_embeds=sum(self.outputs(pixel_values)))

    def save_pretrained(self, output_dir: str | Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Writes every tower to a subfolder."""
        for index, tower in enumerate(self.towers):
            prefix = f"towers.{index}."
            own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
            tower.save_pretrained(Path(output_dir) / tower_subfolder(index), own)


class StudentTower(nn.Module):
    """A captioner's frozen student, called like a `PretrainedImageTower`: its embeddings are features and output.

    Texts that are trained against it are where the student embeds images, even if its own teacher has no texts.
    """

    def __init__(self, name_or_path: str):
        super().__init__()
        model, _, image_processor = load_repository(name_or_path, "--image_model_name_or_path")
        self.student, self.num_features = model.vision_model, model.config.vision_config.projection_dim
        self.statistics = list(image_processor.image_mean), list(image_processor.image_std)

    @property
    def towers(self) -> list["StudentTower"]:
        """As in `ImageTowers`."""
        return [self]

    @property
    def config(self) -> SimpleNamespace:
        """As of a `PretrainedImageTower`."""
        return SimpleNamespace(image_size=self.student.config.image_size, projection_dim=self.num_features)

    def set_image_size(self, image_size: int) -> None:
        """Raises `ValueError` for another one than the student's."""
        if image_size != self.config.image_size:
            raise ValueError(f"image_size: expected {self.config.image_size}, the captioner's own, got {image_size}")

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        """(B, 3, H, W) pixels to `image_embeds` (B, projection_dim), unit norm."""
        return SimpleNamespace(image_embeds=self.student(pixel_values, return_dict=True).image_embeds)


def tower_subfolder(index: int) -> str:
    return f"tower-{index}"


def is_captioner(name_or_path: str) -> bool:
    with suppress(OSError, ValueError):
        return TinyCapConfig.get_config_dict(name_or_path)[0].get("model_type") == TinyCapConfig.model_type
    return False


def load_towers(names: list[str], projection_dim: int) -> PretrainedImageTower | ImageTowers | StudentTower:
    """Pretrained image models with a new head, or a captioner, whose embeddings are final."""
    if any(map(is_captioner, names)):
        if len(names) > 1:
            raise ValueError(f"--image_model_name_or_path: expected a captioner alone, got {', '.join(names)}")
        return StudentTower(names[0])
    towers = [PretrainedImageTower.from_pretrained(name, projection_dim) for name in names]
    return towers[0] if len(towers) == 1 else ImageTowers(towers)


def load_saved_towers(name_or_path: str) -> ImageTowers | None:
    """What `ImageTowers.save_pretrained` has written; `None` where it hasn't."""
    subfolders = []
    with suppress(OSError, ValueError):
        while cached_file(name_or_path, f"{tower_subfolder(len(subfolders))}/config.json"):
            subfolders.append(tower_subfolder(len(subfolders)))
    towers = [PretrainedImageTower.from_pretrained(name_or_path, subfolder=name) for name in subfolders]
    return ImageTowers(towers) if towers else None


def load_sentence_encoder(name_or_path: str) -> PreTrainedModel:
    """Loads a text encoder as `load_weights` does; raises `ValueError` also where it isn't one."""
    # Sentences are pooled from the tokens: the encoder's own pooler is unused.
    text_model = load_weights(AutoModel, name_or_path, "a sentence encoder", unused="pooler")
    if text_model.main_input_name != "input_ids" or text_model.config.is_encoder_decoder:
        raise ValueError(f"{name_or_path}: expected a whole text encoder, got {type(text_model).__name__}")
    return text_model


@torch.no_grad()
def encode_sentences(
    text_model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Embeds texts (N, T) to (N, hidden_size), unit norm: the mean of their tokens' last hidden states."""
    hidden_states = text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask.unsqueeze(-1).to(hidden_states.dtype)
    return F.normalize((hidden_states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


def load_text_head(name_or_path: str, width: int) -> tuple[nn.Linear, float]:
    """The text projection of a tower that `train_teacher.py` has trained, from sentence embeddings of `width`, and its
    `logit_scale`; raises `ValueError` where it isn't there or doesn't fit."""
    try:
        head = load_file(cached_file(name_or_path, TEXT_HEAD_FILE))
        weight, logit_scale = head["text_projection.weight"], float(head["logit_scale"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{name_or_path}: expected the {TEXT_HEAD_FILE} of train_teacher.py: {error}") from error
    if weight.dim() != 2 or weight.shape[1] != width:
        shape = tuple(weight.shape)
        raise ValueError(f"{name_or_path}: {TEXT_HEAD_FILE}: expected sentences of width {shape[-1]}, got {width}")
    projection = nn.Linear(width, len(weight), bias=False)
    projection.weight.data.copy_(weight)
    return projection, logit_scale


class LockedTextModel(nn.Module):
    """An image tower to train and a frozen text tower, called like a `CLIPModel`.

    LiT (Zhai et al., 2022, https://arxiv.org/abs/2111.07991) locks the image tower and trains the text tower; here the
    text tower is locked, since a few thousand images teach little language. A text's embedding is the mean of its
    tokens' last hidden states (Reimers & Gurevych, 2019, https://arxiv.org/abs/1908.10084), projected linearly.
    """

    def __init__(self, vision_model: CLIPVisionModelWithProjection | nn.Module, text_model: PreTrainedModel):
        super().__init__()
        self.vision_model = vision_model
        self.text_model = text_model.eval().requires_grad_(False)
        width = vision_model.config.projection_dim
        self.text_projection = nn.Linear(text_model.config.hidden_size, width, bias=False)
        # CLIP's starting temperature (Radford et al., 2021, section 2.5).
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        # From `cache_text_embeddings`: a row for each text, and each text's row.
        self.sentences: torch.Tensor | None = None
        self.rows: dict[tuple[int, ...], int] = {}

    @classmethod
    def from_text_model(cls, vision_model: CLIPVisionModelWithProjection | nn.Module, name_or_path: str):
        """Loads the text tower; raises `ValueError` where it is no text encoder."""
        return cls(vision_model, load_sentence_encoder(name_or_path))

    def num_parameters(self) -> int:
        """Parameters that are trained."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def train(self, mode: bool = True) -> "LockedTextModel":
        super().train(mode)
        self.text_model.eval()
        return self

    def encode_sentences(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return encode_sentences(self.text_model, input_ids, attention_mask)

    def cache_text_embeddings(self, texts: Iterable[tuple[int, ...]]) -> None:
        """Encodes texts once for the whole training: token ids, unpadded, the start token included.

        They are sorted, so that a resumed run's embeddings are equal to the bit.
        """
        ordered = sorted(set(texts), key=lambda ids: (len(ids), ids))
        self.rows = {ids: row for row, ids in enumerate(ordered)}
        device, sentences = self.text_projection.weight.device, []
        for start in range(0, len(ordered), TEXT_BATCH_SIZE):
            group = [torch.tensor(ids, device=device) for ids in ordered[start : start + TEXT_BATCH_SIZE]]
            mask = pad_sequence([torch.ones_like(ids) for ids in group], batch_first=True)
            sentences.append(
                encode_sentences(self.text_model, pad_sequence(group, batch_first=True), mask).float().cpu()
            )
        self.sentences = torch.cat(sentences)

    def lookup_text_embeddings(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`encode_sentences`, from the cache where it has all of the texts."""
        lengths = attention_mask.sum(dim=1).tolist()
        rows = [self.rows.get(tuple(ids[:length])) for ids, length in zip(input_ids.tolist(), lengths)]
        if None in rows:
            return self.encode_sentences(input_ids, attention_mask)
        return self.sentences[rows].to(input_ids.device)

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> CLIPOutput:
        """Embeds images (B, 3, H, W), or features of `FrozenTowers`, and texts (N, T), padded on the right, to
        (B or N, projection_dim), unit norm."""
        image_embeds = self.vision_model(pixel_values=pixel_values).image_embeds
        text_embeds = self.text_projection(self.lookup_text_embeddings(input_ids, attention_mask))
        return CLIPOutput(image_embeds=F.normalize(image_embeds, dim=-1), text_embeds=F.normalize(text_embeds, dim=-1))

    def save_pretrained(self, output_dir: str | Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Writes the image tower in its own format, and the text head beside it."""
        prefix = "vision_model."
        vision = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        self.vision_model.save_pretrained(output_dir, state_dict=vision)
        head = {name: state_dict[name].contiguous() for name in ("text_projection.weight", "logit_scale")}
        save_file(head, Path(output_dir) / TEXT_HEAD_FILE)
