"""Loads a checkpoint and a dataset by the flags that the commands of this package share, and captions every image."""

import argparse
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm
from transformers import GitProcessor
from transformers.modeling_outputs import BaseModelOutput

from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.pipeline_tinycap import caption_log_probs
from tinycap.processing_tinycap import load_image, preprocess_images
from tinycap.training.arguments import ArgumentParser, check_sources
from tinycap.training.data import Columns, load_images, path_of, undecoded
from tinycap.training.repository import load_repository


logger = logging.getLogger(__name__)


def create_parser(module: str, description: str, output_dir: str) -> argparse.ArgumentParser:
    """A parser for `python -m MODULE` with the flags on model, data and output."""
    options = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser(prog=f"python -m {module}", description=description, **options)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="a TinyCap repository")
    add("--dataset_name", required=True, help="name on the Hub, or a folder of shards or images")
    add("--dataset_config_name", help="configuration of the dataset, where it has several")
    add("--split", default="validation", help="split; 'validation' of a dataset without one: what training held out")
    add("--image_column", help="column of the images; found by its type if not given")
    add("--caption_column", help="column of the captions; found by its name if not given")
    help_text = "open URLs and files outside the data set's folder that its rows name"
    add("--allow_remote_images", action=argparse.BooleanOptionalAction, default=False, help=help_text)
    add("--max_samples", type=int, help="use only the first so many images")
    add("--batch_size", type=int, default=32, help="images run through the model together")
    add("--seed", type=int, help="of all that is drawn; if not given, 0, and the training seed for held-out images")
    add("--output_dir", default=output_dir, help="folder for the results")
    return parser


def load_model_and_data(args: argparse.Namespace) -> tuple:
    """The model, its processor, the rows to caption and their `Columns`, as the flags of `create_parser` say.

    Raises `ValueError` where there is no such folder, split or column, or the model isn't a TinyCap.
    """
    check_sources(args)
    source = (args.dataset_name, args.split, args.dataset_config_name, hold_out_seed(args))
    options = {name: getattr(args, name) for name in ("image_column", "caption_column", "allow_remote_images")}
    dataset, columns = load_images(*source, **options)
    if args.max_samples is not None:
        dataset = dataset.select(range(min(args.max_samples, len(dataset))))
    return *load_captioner(args.model_name_or_path), dataset, columns


def hold_out_seed(args: argparse.Namespace) -> int:
    """The seed of held-out images: as given, else that of the model's `train_args.json`, else the scripts' default."""
    path = Path(args.model_name_or_path) / "train_args.json"
    if args.seed is not None or not path.is_file():
        return 42 if args.seed is None else args.seed
    return json.loads(path.read_text(encoding="utf-8")).get("seed", 42)


def load_captioner(name_or_path: str) -> tuple[TinyCapForConditionalGeneration, GitProcessor]:
    """A TinyCap checkpoint and its processor; see `load_repository`."""
    model, tokenizer, image_processor = load_repository(name_or_path)
    return model, GitProcessor(image_processor, tokenizer)


def references_of(dataset: datasets.Dataset, columns: Columns, rows: Iterable[int]) -> list[list[str]]:
    """The human captions of the images in these rows."""
    table = dataset.select_columns(columns.captions)
    return [columns.captions_of(table[row]) for row in rows]


@dataclass
class Captions:
    """The results of `caption_dataset`; the lists have an entry for each captioned image, in the dataset's order.

    Args:
        rows: numbers of the captioned rows.
        captions: one for each.
        tokens: of each caption, without the start token and padding, with the end token where there is one.
        log_probs, num_tokens: the sum of these tokens' log-probabilities (nats), and their number.
        image_embeds: (len(rows), D), the student's, unit norm.
        teacher_embeds: the same of the teacher, where there is one.
        skipped: (row, reason) of the rows that are left out.
    """

    rows: list[int]
    captions: list[str]
    tokens: list[list[int]]
    log_probs: list[float]
    num_tokens: list[int]
    image_embeds: torch.Tensor
    teacher_embeds: torch.Tensor | None
    skipped: list[tuple[int, str]]

    def mean_token_probability(self, position: int | slice = slice(None)) -> float:
        """Geometric mean of the decoder's probabilities of all tokens of a caption, or of several together."""
        return math.exp(np.sum(self.log_probs[position]) / np.sum(self.num_tokens[position]))


@torch.inference_mode()
def caption_dataset(
    model,
    processor,
    dataset: datasets.Dataset | Iterable[dict],
    *,
    columns: Columns | None = None,
    batch_size: int = 32,
    accelerator: Accelerator | None = None,
    teacher: Callable[[torch.Tensor], torch.Tensor] | None = None,
    progress: bool = False,
    skip: Mapping[int, str] | None = None,
    **generate_kwargs: Any,
) -> Captions:
    """Captions every image once; each process captions its share, and all return all captions.

    Args:
        model: a TinyCap; each image is encoded once, for its embedding and its caption.
        processor: the `GitProcessor` of the same folder (image processor and tokenizer).
        dataset: rows of images: decoded, encoded, or paths.
        columns: of the images ("image" if not given), and which files their rows may name.
        accelerator: whose device and processes to use.
        teacher: embeds the same pixels to (B, D), unit norm.
        skip: rows to leave out, by number, with the reason.
        generate_kwargs: for `generate()`, over the model's generation config.

    Raises:
        ValueError: no image can be read; gives the first reason.
    """
    device = accelerator.device if accelerator is not None else next(model.parameters()).device
    columns = columns or Columns("image", "captions")
    process, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    if isinstance(dataset, datasets.Dataset):
        dataset = undecoded(dataset.select_columns([columns.image]))
    model.eval()
    skipped: list[tuple[int, str]] = []

    def readable_images() -> Iterator[tuple[int, Image.Image]]:
        total = len(dataset) if hasattr(dataset, "__len__") else None
        rows = tqdm(enumerate(dataset), total=total, desc="Captioning", disable=not progress or process != 0)
        for index, row in rows:
            if index % processes != process:
                continue
            if skip and index in skip:
                skipped.append((index, skip[index]))
                continue
            path = path_of(row[columns.image])
            try:
                image = load_image(columns.image_of(row), name=f"of row {index}" + (f" ({path})" if path else ""))
            except (ValueError, TypeError) as error:
                skipped.append((index, str(error)))
            else:
                yield index, image

    captioned, images = [], readable_images()
    while batch := list(itertools.islice(images, batch_size)):
        captioned += _caption_batch(batch, model, processor, teacher, device, generate_kwargs)
    if processes > 1:
        captioned, skipped = gather_object(captioned), gather_object(skipped)
    skipped.sort()
    if not captioned:
        reason = skipped[0][1] if skipped else "the dataset has no rows"
        raise ValueError(f"expected at least one image that can be read, got none: {reason}")
    if skipped:
        logger.warning("%d rows were left out; the first: %s", len(skipped), skipped[0][1])
    *lists, image_embeds, teacher_embeds = map(list, zip(*sorted(captioned, key=itemgetter(0))))
    teacher_embeds = torch.from_numpy(np.stack(teacher_embeds)) if teacher is not None else None
    return Captions(*lists, torch.from_numpy(np.stack(image_embeds)), teacher_embeds, skipped)


def _caption_batch(batch: list[tuple], model, processor, teacher, device, generate_kwargs: dict) -> list[tuple]:
    """Captions (row, image) pairs; returns a tuple for each, in the order of the fields of `Captions`."""
    rows, images = zip(*batch)
    pixels = preprocess_images(processor.image_processor, list(images)).to(device)
    encoded = model.get_encoder()(pixels, return_dict=True)
    options = {"return_dict_in_generate": True, "output_logits": True, **generate_kwargs}
    output = model.generate(encoder_outputs=encoded, **options)
    texts = [text.strip() for text in processor.batch_decode(output.sequences, skip_special_tokens=True)]
    if len(texts) != len(batch):
        raise ValueError(f"expected one caption an image, got num_return_sequences={len(texts) // len(batch)}")
    log_probs, num_tokens = (values.tolist() for values in caption_log_probs(model, output))
    tokens = [row[1 : 1 + number] for row, number in zip(output.sequences.tolist(), num_tokens)]
    image_embeds, teacher_embeds = encoded.image_embeds.float().cpu().numpy(), [None] * len(batch)
    if teacher is not None:
        teacher_embeds = teacher(pixels).float().cpu().numpy()
    return list(zip(rows, texts, tokens, log_probs, num_tokens, image_embeds, teacher_embeds))


@torch.inference_mode()
def caption_embeds(model, processor, embeds: torch.Tensor, batch_size: int, **generate_kwargs: Any) -> list[str]:
    """Captions of embeddings (N, D), unit norm, in the place of the student's."""
    captions = []
    for part in embeds.to(model.device).split(batch_size):
        memory = BaseModelOutput(last_hidden_state=part[:, None])
        sequences = model.generate(encoder_outputs=memory, **generate_kwargs)
        captions += [text.strip() for text in processor.batch_decode(sequences, skip_special_tokens=True)]
    return captions
