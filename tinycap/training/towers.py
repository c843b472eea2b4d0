"""A teacher's towers: a pretrained image model of any architecture, and a frozen sentence encoder to learn against."""

import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForImageClassification, CLIPVisionModelWithProjection, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.utils import cached_file


# Images that a frozen tower embeds together on a CPU: their activations fit the CPU's caches.
FROZEN_BATCH_SIZE = 32
# Texts that are encoded together for the cache.
TEXT_BATCH_SIZE = 256
# The text head, saved beside the image tower.
TEXT_HEAD_FILE = "text_projection.safetensors"


def load_weights(model_class: type, name_or_path: str, kind: str, unused: str = "", **options) -> PreTrainedModel:
    """`model_class.from_pretrained` in float32.

    Raises `ValueError` where it isn't of this `kind` or lacks weights, which it names. Weights with `unused` in their
    names may be missing; `unused="head"` stands for all outside the base model.
    """
    options |= {"dtype": torch.float32, "output_loading_info": True}
    try:
        model, report = model_class.from_pretrained(name_or_path, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name_or_path}: expected {kind} on the Hub or in a local folder: {error}") from error
    # A mismatched weight comes as (name, shape in the file, shape in the model).
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in report["mismatched_keys"]}
    wrong = sorted(mismatched.union(report["missing_keys"]))
    if unused == "head":
        wrong = [name for name in wrong if name.startswith(f"{model.base_model_prefix}.")]
    elif unused:
        wrong = [name for name in wrong if unused not in name]
    if wrong:
        raise ValueError(
            f"{name_or_path}: expected all weights of {kind}, {len(wrong)} are missing or of another shape: "
            f"{', '.join(wrong[:5])}"
        )
    return model


def pixel_statistics(name_or_path: str) -> tuple[list[float], list[float]] | None:
    """Mean and deviation per channel that an image model's pixels are normalised by; `None` without a processor."""
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False)
        return list(processor.image_mean), list(processor.image_std)
    except Exception:
        # transformers raises errors of many types on malformed files.
        return None


class PretrainedImageTower(nn.Module):
    """An image classifier with a new head that projects to the joint space; called like a CLIP image tower.

    As in open_clip's towers from timm, the last linear layer has `projection_dim` outputs instead of classes: any model
    of `AutoModelForImageClassification` will do, and is saved in its own format.

    A frozen tower trains its head only; everything before it stays in eval mode.
    """

    def __init__(self, classifier: PreTrainedModel, is_frozen: bool = False):
        super().__init__()
        self.classifier, self.is_frozen = classifier, is_frozen
        if is_frozen:
            self.base.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, name_or_path: str, projection_dim: int | None = None, is_frozen: bool = False):
        """Loads a tower, with a new head of width `projection_dim` or the saved one, as `load_weights` does."""
        head = {"num_labels": projection_dim, "ignore_mismatched_sizes": True, "unused": "head"}
        kind, given = "an image model with a classification head", {} if projection_dim is None else head
        return cls(load_weights(AutoModelForImageClassification, name_or_path, kind, **given), is_frozen)

    @property
    def base(self) -> PreTrainedModel:
        """The classifier without its head."""
        return self.classifier.base_model

    @property
    def config(self) -> SimpleNamespace:
        """`image_size` (pixels) and `projection_dim`, as in a CLIP image tower's configuration."""
        config = self.classifier.config
        return SimpleNamespace(image_size=config.image_size, projection_dim=config.num_labels)

    def set_image_size(self, image_size: int) -> None:
        """Sets the side of the input images, pixels; raises `ValueError` where learned positions fix another one."""
        fixed = self.config.image_size
        has_positions = any("position" in name for name, _ in self.base.named_parameters())
        if has_positions and image_size != fixed:
            raise ValueError(
                f"image_size: expected {fixed}, at which the image model has learned positions, got {image_size}"
            )
        self.classifier.config.image_size = image_size

    def train(self, mode: bool = True) -> "PretrainedImageTower":
        super().train(mode)
        # In train mode, batch statistics and dropped blocks would change a frozen tower's outputs.
        self.base.train(mode and not self.is_frozen)
        return self

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        """(B, 3, H, W) pixels to `image_embeds` (B, projection_dim)."""
        # Convolutions on a CPU are faster with channels last.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        in_parts = self.is_frozen and pixel_values.device.type == "cpu"
        parts = pixel_values.split(FROZEN_BATCH_SIZE) if in_parts else [pixel_values]
        return SimpleNamespace(image_embeds=torch.cat([self.classifier(pixel_values=part).logits for part in parts]))

    def save_pretrained(self, output_dir: str | Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Writes the classifier in its own format, from the tower's `state_dict` as `accelerate` gathers it."""
        tensors = {name.removeprefix("classifier."): value for name, value in state_dict.items()}
        self.classifier.save_pretrained(output_dir, state_dict=tensors)


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

    def __init__(self, vision_model: CLIPVisionModelWithProjection | PretrainedImageTower, text_model: PreTrainedModel):
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
    def from_text_model(cls, vision_model: CLIPVisionModelWithProjection | PretrainedImageTower, name_or_path: str):
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
        """Embeds images (B, 3, H, W) and texts (N, T), padded on the right, to (B or N, projection_dim), unit norm."""
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
