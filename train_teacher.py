"""Trains a CLIP teacher from scratch, by the contrastive loss, on the same captioned images as the student.

    accelerate launch train_teacher.py --dataset_name my_images --output_dir my_teacher
    accelerate launch train_distill.py --dataset_name my_images --teacher_name_or_path my_teacher

For images unlike those of the web, and for machines without a network. For web images,
openai/clip-vit-base-patch32, trained on 400 million pairs, is the better teacher by far.

Reading order: arguments, model and losses, evaluation, the run. The optimizer step is `loop.train_step`.
"""

import argparse
import math
import os
from functools import partial
from pathlib import Path


# Read when torch loads OpenMP: threads that wait actively take the cores from the data loader.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed.nn
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

# In a clone, `tinycap` adds the repository's root to its path: its modules import one another by the package's name.
from tinycap.commands import writing
from tinycap.evaluation.metrics import retrieval_recall
from tinycap.modeling_tinycap import position_table
from tinycap.training.arguments import check_sources, parse_flags
from tinycap.training.batches import CaptionCollator
from tinycap.training.frozen_towers import FrozenTowers, cache_features
from tinycap.training.loading import create_loaders, load_data
from tinycap.training.logs import write_json
from tinycap.training.loop import StopSignals, create_accelerator, optimizer_steps, run_script, train_step
from tinycap.training.optimization import create_training
from tinycap.training.repository import create_image_processor, save_processors
from tinycap.training.run_folder import RunFolder
from tinycap.training.tokenizer import count_truncated, encode_captions, load_tokenizer, train_tokenizer
from tinycap.training.towers import LockedTextModel, StudentTower, load_towers


logger = get_logger(__name__)

# CLIP's own bound on the temperature (Radford et al., 2021, section 2.5).
MAX_LOGIT_SCALE = math.log(100.0)
# Most text embeddings to cache: at 384 values they take 0.3 GB in each process, with the captions' ids.
MAX_CACHED_CAPTIONS = 200_000
# The folder of a frozen image model's features in the output folder.
FEATURES_FOLDER = "features"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads and checks the flags; contradictions are errors that name them."""

    def problems(args: argparse.Namespace):
        if args.image_model_name_or_path is None and args.image_size % args.patch_size != 0:
            yield f"--image_size: expected a multiple of --patch_size {args.patch_size}, got {args.image_size}"
        for prefix in ("", "text_"):
            width, heads = getattr(args, f"{prefix}hidden_size"), getattr(args, f"{prefix}num_attention_heads")
            if width % heads != 0:
                yield f"--{prefix}hidden_size: expected a multiple of {heads} heads, got {width}"

    return parse_flags("teacher", argv, __doc__.split("\n\n")[0], problems)


def load_image_model(args: argparse.Namespace) -> torch.nn.Module | None:
    """Loads the pretrained image towers, and sets `image_size` to theirs; `None` for a new tower.

    Raises `ValueError` where flags contradict a captioner, which is kept as it is.
    """
    if args.image_model_name_or_path is None:
        return None
    set_seed(args.seed)
    towers = load_towers(args.image_model_name_or_path, args.projection_dim)
    if "image_size" in args.given:
        towers.set_image_size(args.image_size)
    args.image_size, width = towers.config.image_size, towers.config.projection_dim
    if isinstance(towers, StudentTower) and not args.freeze_image_model:
        raise ValueError("--freeze_image_model: expected with a captioner, whose embeddings are kept as they are")
    if "projection_dim" in args.given and args.projection_dim != width:
        raise ValueError(f"--projection_dim: expected {width}, the captioner's, got {args.projection_dim}")
    return towers


def build_model(args: argparse.Namespace, tokenizer, image_model=None) -> CLIPModel | LockedTextModel:
    """A `CLIPModel` with fresh weights, or an image tower, fresh or a pretrained `image_model`, with a frozen sentence
    encoder."""

    def tower(prefix: str) -> dict:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        sizes = {name: getattr(args, f"{prefix}{name}") for name in names}
        shared = {"attention_dropout": args.attention_dropout, "projection_dim": args.projection_dim}
        return {**sizes, "intermediate_size": 4 * sizes["hidden_size"], **shared}

    if image_model is not None:
        if args.freeze_image_model:
            image_model = FrozenTowers(image_model, args.feature_dropout)
        return LockedTextModel.from_text_model(image_model, args.text_model_name_or_path)
    vision = {"image_size": args.image_size, "patch_size": args.patch_size, **tower("")}
    if args.text_model_name_or_path is not None:
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision))
        init_positions(model)
        return LockedTextModel.from_text_model(model, args.text_model_name_or_path)
    if tokenizer.eos_token_id == 2:
        # CLIPTextModel takes it for the mark of its earliest checkpoints, and then pools another token.
        raise ValueError("tokenizer: expected an end token of another id than 2, got 2")
    # A caption's length doesn't count the start token.
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": args.max_caption_length + 1, **tower("text_")}
    text.update({name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")})
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=args.projection_dim))
    init_positions(model)
    return model


@torch.no_grad()
def init_positions(model: CLIPModel | CLIPVisionModelWithProjection) -> None:
    """Initialises the image tower's learned positions as the student's; see `position_table`."""
    config = getattr(model.config, "vision_config", model.config)
    table = position_table(config.image_size // config.patch_size, config.hidden_size)
    model.vision_model.embeddings.position_embedding.weight.copy_(table)


def model_inputs(batch: dict, tokenizer) -> dict[str, torch.Tensor]:
    """A batch's pixels, or features of a frozen image model, and captions."""
    images = batch["image_embeds"] if "image_embeds" in batch else batch["pixel_values"]
    return {"pixel_values": images, **text_inputs(batch["labels"], tokenizer)}


def text_inputs(labels: torch.Tensor, tokenizer) -> dict[str, torch.Tensor]:
    """The text tower's inputs for the collator's `labels` (N, T): a start token in front, padding masked."""
    input_ids = F.pad(labels, (1, 0), value=tokenizer.bos_token_id)
    is_padding = input_ids == -100
    return {
        "input_ids": input_ids.masked_fill(is_padding, tokenizer.pad_token_id),
        "attention_mask": 1 - is_padding.long(),
    }


def cache_captions(args: argparse.Namespace, accelerator: Accelerator, model, rows, tokenizer) -> None:
    """Embeds each training caption once by the frozen sentence encoder, if the run draws more captions than there are,
    and memory suffices."""
    captions = [caption for captions in rows["captions"] for caption in captions]
    num_images = args.max_train_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size
    if len(captions) < num_images * args.captions_per_image and len(captions) <= MAX_CACHED_CAPTIONS:
        logger.info(f"Caching the sentence embeddings of {len(captions):,} captions.")
        encoded = encode_captions(tokenizer, captions, args.max_caption_length)
        with accelerator.autocast():
            model.cache_text_embeddings((tokenizer.bos_token_id, *ids) for ids in encoded)


def contrastive_loss(image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric loss (Radford et al., 2021, figure 3), the mean of both directions.

    Args:
        image_embeds: (B, D), unit norm.
        text_embeds: (B * K, D), unit norm, an image's K captions next to each other; all of them are its positives.
        logit_scale: scalar, what cosines are multiplied by.
    """
    logits = logit_scale * image_embeds @ text_embeds.t()
    per_image = len(text_embeds) // len(image_embeds)
    owner = torch.arange(len(image_embeds), device=logits.device).repeat_interleave(per_image)
    targets = F.one_hot(owner, len(image_embeds)).t().to(logits.dtype)
    image_to_text = F.cross_entropy(logits, targets / targets.sum(dim=1, keepdim=True))
    return (image_to_text + F.cross_entropy(logits.t(), owner)) / 2


def compute_losses(accelerator: Accelerator, model, tokenizer, batch: dict) -> dict[str, torch.Tensor]:
    """The contrastive loss of a batch among the images and captions of all processes."""
    output = model(**model_inputs(batch, tokenizer))
    embeds = [output.image_embeds.float(), output.text_embeds.float()]
    if accelerator.num_processes > 1:
        # Through which gradients flow back, other than through accelerate's gather.
        embeds = [torch.cat(torch.distributed.nn.all_gather(part)) for part in embeds]
    loss = contrastive_loss(*embeds, accelerator.unwrap_model(model).logit_scale.exp())
    return {"loss": loss, "contrastive_loss": loss}


@torch.inference_mode()
def evaluate(accelerator: Accelerator, model, loader: DataLoader, tokenizer) -> dict[str, float]:
    """Retrieval among all validation images and their captions, by the unwrapped model."""
    model.eval()
    image_embeds, text_embeds = [], []
    progress = tqdm(loader, desc="Validating", leave=False, disable=None if accelerator.is_local_main_process else True)
    for batch in progress:
        with accelerator.autocast():
            output = model(**model_inputs(batch, tokenizer))
        # One row an image, so that images repeated in the last batch are dropped from both alike.
        texts = output.text_embeds.view(len(output.image_embeds), -1)
        image_embeds.append(accelerator.gather_for_metrics(output.image_embeds.float()).cpu())
        text_embeds.append(accelerator.gather_for_metrics(texts.float()).cpu())
    model.train()
    images, texts = torch.cat(image_embeds), torch.cat(text_embeds)
    return {"num_images": len(images), **retrieval_recall(images, texts.view(-1, images.shape[1]))}


def save_results(accelerator: Accelerator, model, tokenizer, image_processor, run: RunFolder, metrics: dict) -> None:
    """Writes the unwrapped model with its processors and its metrics to the run's folder."""
    if accelerator.is_main_process:
        model.save_pretrained(run.path, state_dict=model.state_dict())
        save_processors(run.path, tokenizer, image_processor, processor_class="CLIPProcessor")
        write_json(run.path / "eval_results.json", metrics)
    accelerator.wait_for_everyone()
    recall = [metrics[f"{name}_recall_at_1"] for name in ("image_to_text", "text_to_image")]
    logger.info("Saved to %s. Recall at 1: image to text %.1f %%, text to image %.1f %%.", run.path, *recall)


def main(argv: list[str] | None = None, accelerator: Accelerator | None = None, share: float = 1.0) -> dict[str, float]:
    """Runs the whole training, as `train_distill.main`; returns the last evaluation's metrics.

    Args:
        accelerator: the caller's, when this is part of a larger run.
        share: of that run's time which this training takes; for the estimate of the time left.
    """
    args = parse_args(argv)
    check_sources(args)
    is_part = accelerator is not None
    accelerator = accelerator or create_accelerator(args)
    run = RunFolder(args, accelerator, "tinycap-teacher", share)
    image_model = load_image_model(args)
    data = load_data(args, accelerator, args.image_size, args.image_size, run.skipped)

    if args.text_model_name_or_path or args.tokenizer_name:
        tokenizer = load_tokenizer(args.text_model_name_or_path or args.tokenizer_name)
    else:
        tokenizer = train_tokenizer(data.captions(), args.vocab_size, args.max_caption_length + 1)
    # Those of a pretrained tower; else CLIP's.
    image_processor = create_image_processor(args.image_size, *(image_model.statistics if image_model else ()))
    set_seed(args.seed)
    model = build_model(args, tokenizer, image_model)

    statistics = (image_processor.image_mean, image_processor.image_std)
    collator = CaptionCollator(tokenizer, args.max_caption_length, *statistics)
    sources = (args, accelerator, data, collator, args.image_size, run.skipped)
    loaders = batches, validation_loader = create_loaders(*sources, contrastive=True)
    run.start(batches)
    sizes = (model.num_parameters(), len(data.train), args.max_train_steps)
    logger.info("Training a teacher of {:,} parameters on {:,} images, {:,} steps.".format(*sizes))
    limit = args.max_caption_length
    counts = count_truncated(tokenizer, data.captions(), limit) if accelerator.is_main_process else {}
    if args.freeze_image_model:
        cache_dir = Path(args.feature_cache_dir or run.path / FEATURES_FOLDER)
        cache_features(args, accelerator, model.vision_model, loaders, cache_dir)
    optimizer, lr_scheduler = create_training(model, args, accelerator.num_processes)
    wrapped, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    run.resume(batches)
    if args.text_model_name_or_path is not None:
        cache_captions(args, accelerator, model, data.train, tokenizer)

    losses_of = partial(compute_losses, accelerator, wrapped, tokenizer)
    model.train()
    with StopSignals() as signals:
        for step in optimizer_steps(run, batches, signals):
            losses = train_step(args, accelerator, wrapped, optimizer, lr_scheduler, losses_of, step)
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            run.log_step(step, {**losses, "logit_scale": model.logit_scale.detach().exp()}, lr_scheduler)
            if step.validates:
                run.log_validation(evaluate(accelerator, model, validation_loader, tokenizer), model)
            if step.saves:
                run.save_checkpoint(batches)
    metrics = evaluate(accelerator, model, validation_loader, tokenizer)
    run.log_validation(metrics, model)
    metrics.update(counts)
    with writing(args.output_dir):
        save_results(accelerator, model, tokenizer, image_processor, run, metrics)
    if not is_part:
        accelerator.end_training()
    return metrics


if __name__ == "__main__":
    run_script(main)
