"""Captions and embeddings for every picture of a data set."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import GitProcessor, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.pipeline_tinycap import caption_log_probs
from tinycap.processing_tinycap import load_image, preprocess_images
from tinycap.training.data import path_of


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
    """What `caption_dataset` found; the lists go together, row by row, in the data set's order.

    Args:
        rows: numbers of the rows that were captioned.
        captions: one for each.
        tokens: of each caption, without the start token and padding, with the end token where it came.
        log_probs: for each caption the sum of its tokens' log-probabilities (nats), where it was asked for.
        num_tokens: and how many tokens these are, the end token included.
        image_embeds: (len(rows), D), the student's, unit norm.
        teacher_embeds: the same of the teacher, where there is one.
        skipped: (row, reason) of the pictures that can't be read.
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
        # Padding comes after an end token only: what was cut off for its length fills its row.
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
    """Captions every picture once; with several processes, each takes its share and all get everything.

    Args:
        model: a TinyCap; each picture is encoded once, for its embedding and its caption.
        processor: the `GitProcessor` of the same folder (image processor and tokenizer).
        dataset: rows with a picture in `image_column`: decoded, encoded, or a path.
        batch_size: pictures run through the model together.
        accelerator: whose device and processes to use.
        teacher: embeds the same pixels to (B, D), unit norm.
        return_log_probs: keep what the model thought of its captions.
        progress: show a bar.
        skip: rows to leave out, by number, and why; they are listed in `skipped`.
        generate_kwargs: for `generate()`, over the model's generation config.

    Returns:
        `Captions`. Images that can't be read are listed in `skipped`.

    Raises:
        ValueError: not one picture can be read; gives the first reason.
    """
    device = accelerator.device if accelerator is not None else next(model.parameters()).device
    process, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    if isinstance(dataset, datasets.Dataset) and isinstance(dataset.features[image_column], datasets.Image):
        # Decoded here, row by row, so that a bad one is a bad row and not the end.
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    model.eval()
    if return_log_probs:
        generate_kwargs.update(return_dict_in_generate=True, output_logits=True)
    found = Captions()
    embeds, targets, batch = [], [], []

    def run() -> None:
        if not batch:
            return
        images = [image for _, image in batch]
        pixels = preprocess_images(processor.image_processor, images).to(device)
        encoded = model.get_encoder()(pixels, return_dict=True)
        sequences = model.generate(encoder_outputs=encoded, **generate_kwargs)
        if return_log_probs:
            log_probs, num_tokens = caption_log_probs(model, sequences)
            found.log_probs.extend(log_probs.tolist())
            found.num_tokens.extend(num_tokens.tolist())
            sequences = sequences.sequences
        texts = processor.batch_decode(sequences, skip_special_tokens=True)
        if len(texts) != len(batch):
            raise ValueError(f"expected one caption a picture, got num_return_sequences={len(texts) // len(batch)}")
        found.rows.extend(row for row, _ in batch)
        found.captions.extend(text.strip() for text in texts)
        found.tokens.extend(tokens_of(sequences, model.generation_config))
        embeds.append(encoded.image_embeds.float().cpu())
        if teacher is not None:
            targets.append(teacher(pixels).float().cpu())
        batch.clear()

    rows = enumerate(dataset)
    total = len(dataset) if hasattr(dataset, "__len__") else None
    for index, row in tqdm(rows, total=total, desc="Captioning", disable=not progress or process != 0):
        if index % processes != process:
            continue
        if skip and index in skip:
            found.skipped.append((index, skip[index]))
            continue
        path = path_of(row[image_column])
        try:
            image = load_image(row[image_column], name=f"of row {index}" + (f" ({path})" if path else ""))
            batch.append((index, image))
        except (ValueError, TypeError) as error:
            found.skipped.append((index, str(error)))
        if len(batch) == batch_size:
            run()
    run()
    if processes > 1:
        _gather(found, embeds, targets)
    if not found.rows:
        reason = found.skipped[0][1] if found.skipped else "the data set has no rows"
        raise ValueError(f"expected at least one picture that can be read, got none: {reason}")
    if found.skipped:
        logger.warning("%d rows were left out; the first: %s", len(found.skipped), min(found.skipped)[1])
    order = sorted(range(len(found.rows)), key=found.rows.__getitem__)
    found.image_embeds = torch.cat(embeds)[order]
    if targets:
        found.teacher_embeds = torch.cat(targets)[order]
    for name in ("rows", "captions", "tokens", "log_probs", "num_tokens"):
        values = getattr(found, name)
        setattr(found, name, [values[position] for position in order] if values else values)
    found.skipped.sort()
    return found


def _gather(found: Captions, embeds: list, targets: list) -> None:
    """Every process's share to every process."""
    found.rows = gather_object(found.rows)
    found.captions = gather_object(found.captions)
    found.tokens = gather_object(found.tokens)
    found.log_probs = gather_object(found.log_probs)
    found.num_tokens = gather_object(found.num_tokens)
    found.skipped = gather_object(found.skipped)
    embeds[:] = gather_object(embeds)
    targets[:] = gather_object(targets)
