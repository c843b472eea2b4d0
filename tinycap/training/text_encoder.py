"""Trains a captioner's text encoder: texts learn the teacher's text embeddings, as images have learnt its image ones.

    python -m tinycap.training.text_encoder --model_name_or_path outputs/tinycap --dataset_name my_images \\
        --teacher_name_or_path openai/clip-vit-base-patch32 --output_dir outputs/tinycap-search

Student and decoder stay as they are, so that captions and image embeddings don't change. Texts are the training
captions, and spans of them: a query is three words, not a sentence. Their targets are computed once, before the first
step. A run takes minutes on a CPU and keeps no checkpoints: after an interruption it starts again.
"""

import argparse
import contextlib
import copy
import logging
import random
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, CLIPModel, get_scheduler
from transformers.trainer_pt_utils import get_length_grouped_indices

from tinycap.commands import first_line, run_command, writing
from tinycap.confidence_tinycap import CONFIDENCE_NAME
from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.processing_tinycap import load_image, preprocess_images
from tinycap.training.batches import EpochBatchSampler
from tinycap.training.captions import usable_captions
from tinycap.training.data import load_images, load_split, resolve_columns, undecoded
from tinycap.training.logs import read_json, write_json
from tinycap.training.optimization import OPTIMIZERS, create_optimizer
from tinycap.training.repository import load_repository, save_repository, weights_sha256
from tinycap.training.run_folder import check_output_dir, clear_output_dir
from tinycap.training.tokenizer import load_tokenizer
from tinycap.training.towers import encode_sentences, load_sentence_encoder, load_text_head, load_weights


logger = logging.getLogger(__name__)

# Words of the longest span.
MAX_SPAN = 6
# Share of the texts that are kept out of training, to measure on; at most so many.
HELD_OUT, MAX_HELD_OUT = 0.05, 5000
IMAGE_BATCH_SIZE = 32


class TextTeacher(nn.Module):
    """The frozen text half of a teacher: texts to unit-norm embeddings in its joint space.

    Args:
        name_or_path: a `CLIPModel`, or the output of `train_teacher.py --text_model_name_or_path ...`.
        text_model: the sentence encoder that the latter was trained against.

    Raises:
        ValueError: it is neither, or the sentence encoder doesn't fit; names what was expected.
    """

    def __init__(self, name_or_path: str, text_model: str | None = None):
        super().__init__()
        self.visual_projection = None
        is_clip = False
        with contextlib.suppress(OSError, ValueError):
            # The folder of several towers has no config of its own.
            is_clip = AutoConfig.from_pretrained(name_or_path).model_type == "clip"
        if is_clip:
            if text_model is not None:
                raise ValueError(f"--text_model_name_or_path: expected none, since {name_or_path} has its own texts")
            self.model = load_weights(CLIPModel, name_or_path, "a CLIP model with both towers").eval()
            self.tokenizer, self.logit_scale = load_tokenizer(name_or_path), self.model.logit_scale.item()
            self.visual_projection = self.model.visual_projection.weight.detach().clone()
            self.model.vision_model = None
        else:
            if text_model is None:
                expected = "the sentence encoder that this teacher was trained against"
                raise ValueError(f"--text_model_name_or_path: expected {expected}, {name_or_path}, got none")
            self.model = load_sentence_encoder(text_model)
            self.projection, self.logit_scale = load_text_head(name_or_path, self.model.config.hidden_size)
            self.tokenizer = load_tokenizer(text_model)
        self.tokenizer.padding_side = "right"
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, texts: list[str]) -> torch.Tensor:
        """N texts to (N, D), unit norm."""
        device = next(self.model.parameters()).device
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if self.visual_projection is None:
            embeds = self.projection(encode_sentences(self.model, ids, mask))
        else:
            embeds = self.model.text_projection(self.model.text_model(ids, attention_mask=mask).pooler_output)
        return F.normalize(embeds.float(), dim=-1)


class TextStudent(nn.Module):
    """The text encoder with the decoder's frozen token embedding; returns the mean of 1 - cos to the targets.

    In training, with `image_embeds` (M, D), a contrastive loss of a given weight is added: the cross-entropy of each
    caption's own image among all of them, with the noise of the decoder's training: unseen images are embedded less
    accurately. `images` (N,) are the captions' images, -100 for a text without one.
    """

    def __init__(self, model: TinyCapForConditionalGeneration, image_embeds: torch.Tensor | None, weight: float):
        super().__init__()
        self.embed_tokens = model.decoder.embed_tokens.requires_grad_(False)
        self.text_model, self.add_noise = model.text_model, model.add_noise
        self.image_embeds, self.weight, self.scale = image_embeds, weight, model.logit_scale.exp().item()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, targets: torch.Tensor, images: torch.Tensor
    ) -> torch.Tensor:
        embeds = self.text_model(self.embed_tokens(input_ids), attention_mask, return_dict=True).text_embeds.float()
        loss = 1 - F.cosine_similarity(embeds, targets, dim=-1).mean()
        if self.image_embeds is None or not self.training:
            return loss
        logits = self.scale * embeds @ self.add_noise(self.image_embeds[:, None])[:, 0].t()
        # By the number of all texts, so that two processes weigh each caption as one does.
        return loss + self.weight * F.cross_entropy(logits, images, reduction="sum") / len(images)


def draw_spans(caption: str, number: int, rng: random.Random) -> list[str]:
    """`number` runs of one to `MAX_SPAN` adjacent words of a caption."""
    words, spans = caption.split(), []
    for _ in range(number):
        length = rng.randint(1, min(MAX_SPAN, len(words)))
        start = rng.randint(0, len(words) - length)
        spans.append(" ".join(words[start : start + length]))
    return spans


def collect_texts(args: argparse.Namespace) -> list[str]:
    """The distinct captions of the data set, lines of the text files, and spans of both, in random order."""
    sources: list[Iterable] = []
    if args.dataset_name is not None:
        rows = load_split(args.dataset_name, args.train_split, args.dataset_config_name)
        columns = resolve_columns(rows, args.image_column, args.caption_column, args.dataset_name)
        sources.append(value for row in rows.select_columns(columns.captions) for value in row.values())
    for path in args.text_file:
        try:
            sources.append([Path(path).read_text(encoding="utf-8")])
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text_file {path}: expected UTF-8 text, a caption a line: {error}") from error
    texts = list(dict.fromkeys(text for source in sources for text in usable_captions(source)))
    rng = random.Random(args.seed)
    spans = [span for text in texts for span in draw_spans(text, args.spans_per_caption, rng)]
    texts = list(dict.fromkeys(texts + spans))
    rng.shuffle(texts)
    if len(texts) < 2:
        raise ValueError(f"expected at least 2 texts in {args.dataset_name or args.text_file}, got {len(texts)}")
    return texts


@torch.no_grad()
def embed_images(args: argparse.Namespace, model, image_processor) -> tuple[torch.Tensor, dict[str, int]]:
    """The data set's images (M, D) where texts are embedded, unit norm, and the number of each caption's image."""
    options = {"image_column": args.image_column, "caption_column": args.caption_column}
    rows, columns = load_images(args.dataset_name, args.train_split, args.dataset_config_name, **options)
    embeds, image_of = [], {}

    def readable_images() -> Iterator:
        number = 0
        for index, row in enumerate(tqdm(undecoded(rows), desc="Embedding images", leave=False)):
            try:
                image = load_image(columns.image_of(row), name=f"of row {index}")
                captions = columns.captions_of(row)
            except (ValueError, TypeError) as error:
                logger.warning("An image is left out: %s", first_line(error))
                continue
            image_of.update({caption: number for caption in captions if caption not in image_of})
            number += 1
            yield image

    images = readable_images()
    while batch := list(islice(images, IMAGE_BATCH_SIZE)):
        pixels = preprocess_images(image_processor, batch).to(model.device)
        embeds.append(model.project_for_texts(model.get_image_features(pixels, return_dict=True).pooler_output).float())
    if not embeds:
        raise ValueError(f"--dataset_name {args.dataset_name}: expected captioned images that can be read, got none")
    return torch.cat(embeds), image_of


def embed_texts(teacher: TextTeacher, texts: list[str], batch_size: int) -> torch.Tensor:
    """(N, D) float16 targets in the order of `texts`; those of like lengths are embedded together."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    targets = None
    for start in tqdm(range(0, len(order), batch_size), desc="Embedding texts by the teacher", leave=False):
        rows = order[start : start + batch_size]
        embeds = teacher([texts[row] for row in rows]).half().cpu()
        targets = embeds.new_empty(len(texts), embeds.shape[1]) if targets is None else targets
        targets[rows] = embeds
    return targets


def add_text_encoder(
    model: TinyCapForConditionalGeneration, teacher: TextTeacher, width: int, args: argparse.Namespace
) -> TinyCapForConditionalGeneration:
    """The captioner with a text encoder of `width` outputs beside its own weights: a new one, or its own to go on with.

    Raises:
        ValueError: neither the teacher's texts nor its projection of images fit the image embeddings, or the text
            encoder that is there has other sizes.
    """
    config, image_width = copy.deepcopy(model.config), model.config.vision_config.projection_dim
    projection = teacher.visual_projection
    if width != image_width and (projection is None or projection.shape != (width, image_width)):
        raise ValueError(
            f"--teacher_name_or_path: expected the captioner's teacher, with texts of the image embedding's width "
            f"{image_width} or a projection of images to theirs, got width {width}"
        )
    sizes = {name: getattr(config.text_config, name) for name in ("hidden_size", "num_attention_heads")}
    sizes |= {"intermediate_size": config.text_config.intermediate_size, "projection_dim": width}
    encoder = {**sizes, "num_hidden_layers": args.num_hidden_layers, "hidden_dropout_prob": args.dropout}
    if (own := config.text_encoder_config) is not None:
        encoder["max_position_embeddings"] = own.max_position_embeddings
        wrong = [name for name in (*sizes, "num_hidden_layers") if getattr(own, name) != encoder[name]]
        if wrong:
            place = f"--model_name_or_path: its text encoder's {wrong[0]}"
            raise ValueError(f"{place}: expected {encoder[wrong[0]]}, got {getattr(own, wrong[0])}")
    new = TinyCapForConditionalGeneration(TinyCapConfig(**{**config.to_dict(), "text_encoder_config": encoder}))
    new.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        new.logit_scale.fill_(teacher.logit_scale)
        if width != image_width:
            new.visual_projection.weight.copy_(projection)
    new.generation_config = model.generation_config
    return new


def create_sampler(args: argparse.Namespace, accelerator: Accelerator, lengths: list[int]) -> EpochBatchSampler:
    """This process's batches of texts, whose `lengths` are alike in a step, so that little of it is padding."""
    size = max(1, min(args.per_device_train_batch_size, len(lengths) // accelerator.num_processes))
    step_size = size * accelerator.num_processes

    def order(epoch: int) -> list[tuple[int, int]]:
        generator = torch.Generator().manual_seed(args.seed + epoch)
        rows = get_length_grouped_indices(lengths, step_size, generator=generator)
        steps = [rows[start : start + step_size] for start in range(0, len(rows) - step_size + 1, step_size)]
        random.Random(f"{args.seed}/{epoch}").shuffle(steps)
        return [(epoch, row) for step in steps for row in step]

    process = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    return EpochBatchSampler(len(lengths), size, args.seed, **process, equal=True, order=order)


def train(args: argparse.Namespace, accelerator: Accelerator, model, processors, texts, targets) -> float:
    """Trains the model's text encoder; returns the mean cosine distance of held-out texts."""
    # A copy: a tokenizer keeps padding and truncation, and would be saved with them.
    tokenizer, image_processor = copy.deepcopy(processors[0]), processors[1]
    image_embeds, image_of = None, {}
    if args.contrastive_weight > 0:
        image_embeds, image_of = embed_images(args, model.eval(), image_processor)
    held_out = min(MAX_HELD_OUT, max(1, int(HELD_OUT * len(texts))))
    student = TextStudent(model, image_embeds, args.contrastive_weight)
    limit = model.config.text_encoder_config.max_position_embeddings

    def collate(keys: list[tuple[int, int]], is_training: bool) -> dict[str, torch.Tensor]:
        chosen = [texts[row] for _, row in keys]
        images = torch.tensor([image_of.get(text, -100) for text in chosen])
        if is_training:
            # Queries are rarely capitalised; the usual teachers ignore capitals.
            draws = [random.Random(f"{args.seed}/{epoch}/{row}").random() for epoch, row in keys]
            chosen = [text.lower() if draw < 0.5 else text for text, draw in zip(chosen, draws)]
        inputs = tokenizer(chosen, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        batch |= {"targets": targets[[row for _, row in keys]].float(), "images": images}
        return send_to_device(batch, accelerator.device)

    sampler = create_sampler(args, accelerator, [len(text) for text in texts[held_out:]])
    steps = max(1, round(args.num_train_epochs * len(sampler)))
    optimizer = create_optimizer(student, args.learning_rate, args.weight_decay, args.optimizer)
    schedule = get_scheduler("cosine", optimizer, min(100, steps // 10), steps)
    wrapped, optimizer = accelerator.prepare(student, optimizer)
    student.train()
    progress = tqdm(range(1, steps + 1), desc="Training the text encoder", disable=not accelerator.is_main_process)
    for step, keys in zip(progress, sampler):
        loss = wrapped(**collate([(epoch, held_out + row) for epoch, row in keys], is_training=True))
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(distance=f"{loss.item():.3f}")
        if not torch.isfinite(loss):
            raise FloatingPointError(f"step {step}: expected a finite loss, got {loss.item()}")
    student.eval()
    total = 0.0
    with torch.no_grad():
        # On every process: it takes a second.
        for first in range(0, held_out, args.per_device_train_batch_size):
            rows = range(first, min(first + args.per_device_train_batch_size, held_out))
            total += len(rows) * student(**collate([(0, row) for row in rows], is_training=False)).item()
    return total / held_out


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Writes the captioner with a text encoder to `--output_dir`; returns its metrics.

    Raises:
        ValueError: an argument, the captioner, the teacher or the texts don't fit; nothing has been trained then.
    """
    args = parse_args(argv)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if accelerator.is_main_process:
        check_output_dir(args)
    model, tokenizer, image_processor = load_repository(args.model_name_or_path, "--model_name_or_path")
    calibration = read_json(Path(model.confidence_path)) if model.confidence_path is not None else None
    digest = weights_sha256(args.model_name_or_path)
    teacher = TextTeacher(args.teacher_name_or_path, args.text_model_name_or_path).to(accelerator.device)
    texts = collect_texts(args)
    width = teacher(texts[:1]).shape[1]
    set_seed(args.seed)
    model = add_text_encoder(model, teacher, width, args).to(accelerator.device)
    targets = embed_texts(teacher, texts, args.per_device_train_batch_size)
    distance = train(args, accelerator, model, (tokenizer, image_processor), texts, targets)
    metrics = {"text_cosine_distance": distance, "num_texts": len(texts)}
    if accelerator.is_main_process:
        output_dir = Path(args.output_dir)
        clear_output_dir(output_dir)
        with writing(output_dir):
            save_repository(output_dir, model.cpu(), tokenizer, image_processor)
            if calibration is not None and digest in (None, calibration.get("weights_sha256")):
                # Captions are as they were, and so is the confidence in them.
                stored = {**calibration, "weights_sha256": weights_sha256(output_dir)}
                write_json(output_dir / CONFIDENCE_NAME, stored)
            write_json(output_dir / "eval_results.json", metrics)
        print(f"{output_dir}: cosine distance to the teacher's embeddings of held-out texts {distance:.3f}")
    accelerator.end_training()
    return metrics


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    description = __doc__.split("\n\n")[0]
    name = "python -m tinycap.training.text_encoder"
    parser = argparse.ArgumentParser(name, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="the captioner that gets a text encoder: folder or Hub id")
    add("--teacher_name_or_path", required=True, help="its teacher: a CLIP model, or an output of train_teacher.py")
    add("--text_model_name_or_path", help="the sentence encoder that the latter was trained against")
    add("--dataset_name", help="captions to learn from: Hub id or folder, as for train_distill.py")
    add("--dataset_config_name", help="configuration of the dataset, where it has several")
    add("--train_split", default="train", help="split to train on")
    add("--image_column", help="column of the images; found by its type if not given")
    add("--caption_column", help="column of strings or lists of strings; found by its name if not given")
    add("--text_file", action="append", default=[], help="more texts, one a line; repeatable")
    add("--spans_per_caption", type=int, default=2, help="spans of one to six words drawn from each text")
    add("--contrastive_weight", type=float, default=0.0, help="weight of a contrastive loss with the dataset's images")
    add("--num_hidden_layers", type=int, default=2, help="layers of the text encoder")
    add("--dropout", type=float, default=0.0, help="dropout of its sublayers")
    add("--num_train_epochs", type=float, default=10.0, help="passes over the texts")
    add("--per_device_train_batch_size", type=int, default=256, help="texts in a device's batch")
    add("--learning_rate", type=float, default=2e-3, help="peak learning rate; the schedule is a cosine")
    add("--weight_decay", type=float, default=0.05, help="decay of the weight matrices")
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="muon needs torch 2.9")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="as accelerate is configured if not given")
    add("--seed", type=int, default=42, help="fixes weights, spans and order")
    add("--output_dir", required=True, help="folder that becomes the model repository")
    add("--overwrite_output_dir", action="store_true", help="write over an earlier one")
    args = parser.parse_args(argv)
    if args.dataset_name is None and not args.text_file:
        parser.error("expected --dataset_name or --text_file, got neither")
    for flag in ("num_hidden_layers", "num_train_epochs", "per_device_train_batch_size", "learning_rate"):
        if not getattr(args, flag) > 0:
            parser.error(f"--{flag}: expected a positive number, got {getattr(args, flag)}")
    for flag in ("spans_per_caption", "contrastive_weight"):
        if not getattr(args, flag) >= 0:
            parser.error(f"--{flag}: expected 0 or more, got {getattr(args, flag)}")
    if args.contrastive_weight and args.dataset_name is None:
        parser.error("--contrastive_weight: needs --dataset_name, whose images texts are compared with")
    return args


if __name__ == "__main__":
    sys.exit(run_command("python -m tinycap.training.text_encoder", main))
