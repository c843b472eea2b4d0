"""An image tower trained in the embedding space of a frozen sentence encoder."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, CLIPVisionModelWithProjection, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPOutput

from tinycap.training.image_tower import PretrainedImageTower


# The text head, saved beside the image tower.
TEXT_HEAD_FILE = "text_projection.safetensors"
# Texts that are encoded together for the cache.
TEXT_BATCH_SIZE = 256


class LockedTextModel(nn.Module):
    """An image tower to train and a frozen text tower, called like a `CLIPModel`.

    LiT (Zhai et al., 2022, https://arxiv.org/abs/2111.07991) locks the image tower and trains the text tower; here the
    text tower is locked, since a few thousand images teach little language. A text's embedding is the mean of its
    tokens' last hidden states (Reimers & Gurevych, 2019, https://arxiv.org/abs/1908.10084), projected linearly.

    Args:
        vision_model: the image tower; its `projection_dim` is the width of the joint space.
        text_model: an encoder whose output has a `last_hidden_state`, such as all-MiniLM-L6-v2.
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
    def from_text_model(
        cls, vision_model: CLIPVisionModelWithProjection | PretrainedImageTower, name_or_path: str
    ) -> "LockedTextModel":
        """Loads the text tower from the Hub or a folder.

        Raises:
            ValueError: it can't be found, is no text encoder, or weights of it are missing.
        """
        try:
            text_model, report = AutoModel.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"text model {name_or_path}: expected a sentence encoder on the Hub or in a local folder: {error}"
            ) from error
        # Sentences are pooled from the tokens: the encoder's own pooler is unused.
        missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
        if missing or text_model.main_input_name != "input_ids" or text_model.config.is_encoder_decoder:
            raise ValueError(
                f"text model {name_or_path}: expected a whole text encoder, got {type(text_model).__name__}"
                + (f" with {len(missing)} weights missing: {', '.join(missing[:5])}" if missing else "")
            )
        return cls(vision_model, text_model)

    def num_parameters(self) -> int:
        """Parameters that are trained."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def train(self, mode: bool = True) -> "LockedTextModel":
        super().train(mode)
        self.text_model.eval()
        return self

    @torch.no_grad()
    def encode_sentences(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embeds texts (N, T) to (N, text hidden size), unit norm."""
        hidden_states = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden_states.dtype)
        return F.normalize((hidden_states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)

    def cache_text_embeddings(self, texts: Iterable[tuple[int, ...]]) -> None:
        """Encodes texts once for the whole training: token ids, unpadded, the start token included.

        They are sorted, so that a resumed run's embeddings are equal to the bit.
        """
        ordered = sorted(set(texts), key=lambda ids: (len(ids), ids))
        device = self.text_projection.weight.device
        found = []
        for start in range(0, len(ordered), TEXT_BATCH_SIZE):
            group = [torch.tensor(ids) for ids in ordered[start : start + TEXT_BATCH_SIZE]]
            lengths = torch.tensor([len(ids) for ids in group])
            input_ids = pad_sequence(group, batch_first=True)
            attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
            found.append(self.encode_sentences(input_ids.to(device), attention_mask.to(device)).float().cpu())
        self.sentences = torch.cat(found) if found else None
        self.rows = {ids: row for row, ids in enumerate(ordered)}

    def lookup_text_embeddings(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor | None:
        """As `encode_sentences`, from the cache; `None` where one of the texts isn't in it."""
        if self.sentences is None:
            return None
        lengths = attention_mask.sum(dim=1).tolist()
        rows = [self.rows.get(tuple(ids[:length])) for ids, length in zip(input_ids.tolist(), lengths)]
        return None if None in rows else self.sentences[rows].to(input_ids.device)

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> CLIPOutput:
        """Embeds images (B, 3, H, W) and texts (N, T) to (B, projection_dim) and (N, projection_dim), unit norm.

        Texts are padded on the right.
        """
        image_embeds = self.vision_model(pixel_values=pixel_values).image_embeds
        sentences = self.lookup_text_embeddings(input_ids, attention_mask)
        if sentences is None:
            sentences = self.encode_sentences(input_ids, attention_mask)
        text_embeds = self.text_projection(sentences)
        return CLIPOutput(image_embeds=F.normalize(image_embeds, dim=-1), text_embeds=F.normalize(text_embeds, dim=-1))

    def save_pretrained(self, output_dir: str | Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Writes the image tower in its own format, and the text head beside it."""
        prefix = "vision_model."
        vision = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        self.vision_model.save_pretrained(output_dir, state_dict=vision)
        head = {name: state_dict[name].contiguous() for name in ("text_projection.weight", "logit_scale")}
        save_file(head, Path(output_dir) / TEXT_HEAD_FILE)
