"""Captions and embeddings for every image of a dataset."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm
from transformers import GitProcessor, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.pipeline_tinycap import caption_log_probs
from tinycap.processing_tinycap import load_image, preprocess_images
from tinycap.training.data import path_of, undecoded


logger = logging.getLogger(__name__)


def load_captioner(name_or_path: str) -> tuple[TinyCapForConditionalGeneration, GitProcessor]:
    """A TinyCap checkpoint and its processor, by this package's own classes: no code of the repository's is run.

    Raises:
        ValueError: it isn't a TinyCap, or a part of it is missing or can't be read; names it.
    """
    try:
        content, _ = TinyCapConfig.get_config_dict(name_or_path)
        if content.get("model_type") != TinyCapConfig.model_type:
            raise ValueError(f"expected model_type {TinyCapConfig.model_type!r}, got {content.get('model_type')!r}")
        model = TinyCapForConditionalGeneration.from_pretrained(name_or_path)
        image_processor = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False)
        return model, GitProcessor(image_processor, PreTrainedTokenizerFast.from_pretrained(name_or_path))
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name_or_path}: {error}") from error


@dataclass
class Captions:
    """The results of `caption_dataset`; the lists go together, row by row, in the dataset's order.

    Args:
        rows: numbers of the captioned rows.
        captions: one for each.
        tokens: of each caption, without the start token and padding, with the end token where there is one.
        log_probs: for each caption the sum of its tokens' log-probabilities (nats), where requested.
        num_tokens: the number of these tokens, the end token included.
        image_embeds: (len(rows), D), the student's, unit norm.
        teacher_embeds: the same of the teacher, where there is one.
        skipped: (row, reason) of the images that can't be read.
    """

    rows: list[int] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    image_embeds: torch.Tensor | None = None
    teacher_embeds: torch.Tensor | None = None
    skipped: list[tuple[int, str]] = field(default_factory=list)


def tokens_of(sequences: torch.Tensor, generation_config) -> list[list[int]]:
    """The tokens of captions as `generate` returns them, (N, T), without the start token and what follows the end."""
    end = generation_config.eos_token_id
    ends = set(end if isinstance(end, (list, tuple)) else [end])
    captions = []
    for row in sequences[:, 1:].tolist():
        # A truncated caption has no end token, and no padding.
        stop = next((place for place, token in enumerate(row) if token in ends), None)
        captions.append(row if stop is None else row[: stop + 1])
    return captions


@torch.inference_mode()
def caption_dataset(
    model,
    processor,
    dataset: datasets.Dataset | Iterable[dict],
    *,
    image_column: str = "image",
    batch_size: int = 32,
    accelerator: Accelerator | None = None,
    teacher: Callable[[torch.Tensor], torch.Tensor] | None = None,
    return_log_probs: bool = False,
    progress: bool = False,
    skip: Mapping[int, str] | None = None,
    **generate_kwargs: Any,
) -> Captions:
    """Captions every image once; each process captions its share, and all return all captions.

    Args:
        model: a TinyCap; each image is encoded once, for its embedding and its caption.
        processor: the `GitProcessor` of the same folder (image processor and tokenizer).
        dataset: rows with an image in `image_column`: decoded, encoded, or a path.
        batch_size: images run through the model together.
        accelerator: whose device and processes to use.
        teacher: embeds the same pixels to (B, D), unit norm.
        return_log_probs: also return the captions' log-probabilities.
        progress: show a bar.
        skip: rows to leave out, by number, with the reason; they are listed in `skipped`.
        generate_kwargs: for `generate()`, over the model's generation config.

    Returns:
        `Captions`. Images that can't be read are listed in `skipped`.

    Raises:
        ValueError: no image can be read; gives the first reason.
    """
    device = accelerator.device if accelerator is not None else next(model.parameters()).device
    process, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    if isinstance(dataset, datasets.Dataset):
        dataset = undecoded(dataset, image_column)
    model.eval()
    if return_log_probs:
        generate_kwargs.update(return_dict_in_generate=True, output_logits=True)
    parts: list[Captions] = []
    skipped: list[tuple[int, str]] = []
    batch: list[tuple[int, Image.Image]] = []

    def run() -> None:
        if batch:
            parts.append(_caption_batch(batch, model, processor, teacher, device, generate_kwargs))
            batch.clear()

    total = len(dataset) if hasattr(dataset, "__len__") else None
    rows = tqdm(enumerate(dataset), total=total, desc="Captioning", disable=not progress or process != 0)
    for index, row in rows:
        if index % processes != process:
            continue
        if skip and index in skip:
            skipped.append((index, skip[index]))
            continue
        path = path_of(row[image_column])
        try:
            image = load_image(row[image_column], name=f"of row {index}" + (f" ({path})" if path else ""))
            batch.append((index, image))
        except (ValueError, TypeError) as error:
            skipped.append((index, str(error)))
        if len(batch) == batch_size:
            run()
    run()
    if processes > 1:
        parts, skipped = gather_object(parts), gather_object(skipped)
    return _merge_parts(parts, sorted(skipped))


def _caption_batch(batch: list[tuple], model, processor, teacher, device, generate_kwargs: dict) -> Captions:
    """Captions (row, image) pairs."""
    rows, images = map(list, zip(*batch))
    pixels = preprocess_images(processor.image_processor, images).to(device)
    encoded = model.get_encoder()(pixels, return_dict=True)
    output = model.generate(encoder_outputs=encoded, **generate_kwargs)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    texts = processor.batch_decode(sequences, skip_special_tokens=True)
    if len(texts) != len(batch):
        raise ValueError(f"expected one caption an image, got num_return_sequences={len(texts) // len(batch)}")
    captions = Captions(rows, [text.strip() for text in texts], tokens_of(sequences, model.generation_config))
    if output is not sequences:
        captions.log_probs, captions.num_tokens = (part.tolist() for part in caption_log_probs(model, output))
    captions.image_embeds = encoded.image_embeds.float().cpu()
    if teacher is not None:
        captions.teacher_embeds = teacher(pixels).float().cpu()
    return captions


def _merge_parts(parts: list[Captions], skipped: list[tuple[int, str]]) -> Captions:
    """The captions of all batches, in the dataset's order."""
    if not parts:
        reason = skipped[0][1] if skipped else "the dataset has no rows"
        raise ValueError(f"expected at least one picture that can be read, got none: {reason}")
    if skipped:
        logger.warning("%d rows were left out; the first: %s", len(skipped), skipped[0][1])
    merged = Captions(skipped=skipped)
    order = sorted((row, place) for place, row in enumerate(row for part in parts for row in part.rows))
    order = [place for _, place in order]
    for name in ("rows", "captions", "tokens", "log_probs", "num_tokens"):
        values = [value for part in parts for value in getattr(part, name)]
        setattr(merged, name, [values[place] for place in order] if values else [])
    merged.image_embeds = torch.cat([part.image_embeds for part in parts])[order]
    if parts[0].teacher_embeds is not None:
        merged.teacher_embeds = torch.cat([part.teacher_embeds for part in parts])[order]
    return merged
