"""Trains a CLIP teacher from scratch, by the contrastive loss, on the same captioned pictures as the student.

    accelerate launch train_teacher.py --dataset_name my_photos --output_dir my_teacher
    accelerate launch train_distill.py --dataset_name my_photos --teacher_name_or_path my_teacher

For people whose pictures are not web photos, and for machines without a hub. With web photos and a network,
openai/clip-vit-base-patch32 has seen 400 million pairs and is the better teacher by far.

Reading order: arguments, model, objective, one evaluation, the loop.
"""

import argparse
import math
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path


# Read when torch loads OpenMP: threads that spin while they wait take the cores from everything else.
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

# Run as a script, the folder of this file is on the path and `tinycap.py` makes it the package.
from tinycap.modeling_tinycap import position_table
from tinycap.training.arguments import build_parser, check_sources, parse_flags
from tinycap.training.batches import Augmentation, CaptionCollator, CaptionDataset, EpochBatchSampler
from tinycap.training.checkpoints import load_checkpoint, resolve_resume, seed_step
from tinycap.training.data import SkippedRows, decode_dataset, load_splits, resolve_columns
from tinycap.training.image_tower import PretrainedImageTower, pixel_statistics
from tinycap.training.locked_text import LockedTextModel
from tinycap.training.logs import RunLog, write_json
from tinycap.training.loop import (
    Step,
    TrainBatches,
    check_finite,
    ignore_interrupts,
    run_script,
    run_steps,
    set_cpu_threads,
    set_up_logging,
)
from tinycap.training.optimization import create_optimizer, create_scheduler, plan_steps
from tinycap.training.repository import create_image_processor, save_processors
from tinycap.training.run_folder import (
    SKIPPED_FILE,
    check_output_dir,
    compare_args,
    move_skipped_rows,
    open_output_dir,
    read_checkpoint_args,
    run_args,
)
from tinycap.training.scenes import scene_splits
from tinycap.training.tokenizer import encode_captions, load_tokenizer, train_tokenizer


logger = get_logger(__name__)

# CLIP's own bound on the temperature (Radford et al., 2021, section 2.5).
MAX_LOGIT_SCALE = math.log(100.0)
# Captions that a locked sentence encoder reads once: at 384 values 0.3 GB in each process, with the captions' ids.
MAX_REMEMBERED_CAPTIONS = 200_000


# --- arguments --------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads and checks the flags; every contradiction is an error that names them."""
    args = parse_flags("teacher", argv, __doc__.split("\n\n")[0])
    parser = build_parser("teacher")
    if args.image_model_name_or_path is None and args.image_size % args.patch_size != 0:
        parser.error(f"--image_size: expected a multiple of --patch_size {args.patch_size}, got {args.image_size}")
    for prefix in ("", "text_"):
        width, heads = getattr(args, f"{prefix}hidden_size"), getattr(args, f"{prefix}num_attention_heads")
        if width % heads != 0:
            parser.error(f"--{prefix}hidden_size: expected a multiple of {heads} heads, got {width}")
    return args


# --- model ------------------------------------------------------------------------------------------------------------


def build_model(args: argparse.Namespace, tokenizer) -> CLIPModel | LockedTextModel:
    """A `CLIPModel` with fresh weights, or an image tower, fresh or pretrained, beside a sentence encoder that isn't
    trained."""
    if args.image_model_name_or_path is not None:
        tower = PretrainedImageTower.from_pretrained(
            args.image_model_name_or_path, args.projection_dim, args.freeze_image_model
        )
        tower.set_image_size(args.image_size)
        return LockedTextModel.from_text_model(tower, args.text_model_name_or_path)
    vision = {
        "image_size": args.image_size,
        "patch_size": args.patch_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": 4 * args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": args.num_attention_heads,
        "attention_dropout": args.attention_dropout,
        "projection_dim": args.projection_dim,
    }
    if args.text_model_name_or_path is not None:
        vision_model = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision))
        start_positions(vision_model)
        return LockedTextModel.from_text_model(vision_model, args.text_model_name_or_path)
    if tokenizer.eos_token_id == 2:
        raise ValueError(
            "tokenizer: expected an end token of another id than 2, which CLIPTextModel takes for the mark of its "
            "earliest checkpoints and then pools the wrong token"
        )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": args.text_hidden_size,
        "intermediate_size": 4 * args.text_hidden_size,
        "num_hidden_layers": args.text_num_hidden_layers,
        "num_attention_heads": args.text_num_attention_heads,
        "attention_dropout": args.attention_dropout,
        # The start token comes on top of a caption's length.
        "max_position_embeddings": args.max_caption_length + 1,
        "projection_dim": args.projection_dim,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=args.projection_dim))
    start_positions(model)
    return model


@torch.no_grad()
def start_positions(model: CLIPModel | CLIPVisionModelWithProjection) -> None:
    """Lets the image tower's learned positions begin as the student's do; see `position_table`."""
    config = getattr(model.config, "vision_config", model.config)
    table = position_table(config.image_size // config.patch_size, config.hidden_size)
    model.vision_model.embeddings.position_embedding.weight.copy_(table)


def text_inputs(labels: torch.Tensor, tokenizer) -> dict[str, torch.Tensor]:
    """The text tower's inputs for the collator's `labels` (N, T): a start token in front, padding masked."""
    input_ids = F.pad(labels, (1, 0), value=tokenizer.bos_token_id)
    attention_mask = (input_ids != -100).long()
    return {
        "input_ids": input_ids.masked_fill(input_ids == -100, tokenizer.pad_token_id),
        "attention_mask": attention_mask,
    }


def remember_captions(args: argparse.Namespace, accelerator: Accelerator, model, rows, tokenizer) -> None:
    """Lets a sentence encoder that doesn't learn see each training caption once, where the run would show it more
    often and memory holds what it says."""
    num_captions = sum(map(len, rows["captions"]))
    batches = args.max_train_steps * args.gradient_accumulation_steps
    num_drawn = batches * args.per_device_train_batch_size * args.captions_per_image
    if not num_captions < num_drawn or num_captions > MAX_REMEMBERED_CAPTIONS:
        return
    logger.info("The sentence encoder reads %s captions once.", f"{num_captions:,}")
    captions = [caption for captions in rows["captions"] for caption in captions]
    start = [tokenizer.bos_token_id]
    with accelerator.autocast():
        accelerator.unwrap_model(model).cache_text_embeddings(
            tuple(start + ids) for ids in encode_captions(tokenizer, captions, args.max_caption_length)
        )


# --- objective --------------------------------------------------------------------------------------------------------


def contrastive_loss(image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric loss (Radford et al., 2021, figure 3), for one or several captions of each image.

    Args:
        image_embeds: (B, D), unit norm.
        text_embeds: (B * K, D), unit norm, the K captions of an image next to each other.
        logit_scale: scalar, what cosines are multiplied by.

    Returns:
        The mean of both directions; with K > 1 an image is asked for all its captions alike.
    """
    logits = logit_scale * image_embeds @ text_embeds.t()
    owner = torch.arange(len(image_embeds), device=logits.device).repeat_interleave(
        len(text_embeds) // len(image_embeds)
    )
    targets = F.one_hot(owner, len(image_embeds)).t().to(logits.dtype)
    image_to_text = F.cross_entropy(logits, targets / targets.sum(dim=1, keepdim=True))
    return (image_to_text + F.cross_entropy(logits.t(), owner)) / 2


def gather_with_gradient(embeds: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """(n, D) of each process -> (n * processes, D), through which gradients flow back."""
    if accelerator.num_processes == 1:
        return embeds
    return torch.cat(torch.distributed.nn.all_gather(embeds))


# --- one evaluation ---------------------------------------------------------------------------------------------------


def retrieval_recall(image_embeds: torch.Tensor, text_embeds: torch.Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict:
    """How often the right one is among the k nearest, in percent, in both directions.

    Args:
        image_embeds: (N, D); text_embeds: (N * K, D), the K captions of an image next to each other; unit norm.
    """
    per_image = len(text_embeds) // len(image_embeds)
    similarity = image_embeds @ text_embeds.t()
    owner = torch.arange(len(text_embeds)) // per_image
    images = torch.arange(len(image_embeds))
    found = {}
    for k in ks:
        nearest = similarity.topk(min(k, len(text_embeds)), dim=1).indices
        found[f"image_to_text_recall_at_{k}"] = 100 * (owner[nearest] == images[:, None]).any(1).double().mean().item()
    for k in ks:
        nearest = similarity.t().topk(min(k, len(image_embeds)), dim=1).indices
        found[f"text_to_image_recall_at_{k}"] = 100 * (nearest == owner[:, None]).any(1).double().mean().item()
    return found


@torch.inference_mode()
def evaluate(accelerator: Accelerator, model, loader: DataLoader, tokenizer) -> dict[str, float]:
    """Retrieval among all validation pictures and their captions."""
    model = accelerator.unwrap_model(model)
    model.eval()
    image_embeds, text_embeds = [], []
    for batch in tqdm(
        loader, desc="Validating", leave=False, disable=None if accelerator.is_local_main_process else True
    ):
        with accelerator.autocast():
            output = model(pixel_values=batch["pixel_values"], **text_inputs(batch["labels"], tokenizer))
        # One row an image, so that what the last batch holds twice is dropped from both alike.
        texts = output.text_embeds.view(len(output.image_embeds), -1)
        image_embeds.append(accelerator.gather_for_metrics(output.image_embeds.float()).cpu())
        text_embeds.append(accelerator.gather_for_metrics(texts.float()).cpu())
    model.train()
    images, texts = torch.cat(image_embeds), torch.cat(text_embeds)
    return {"num_images": len(images), **retrieval_recall(images, texts.view(-1, images.shape[1]))}


# --- the loop ---------------------------------------------------------------------------------------------------------


def train_step(
    args: argparse.Namespace, accelerator: Accelerator, model, optimizer, scheduler, tokenizer, step: Step, number: int
) -> dict[str, torch.Tensor]:
    """One optimizer step, the `number`-th; returns the mean `contrastive_loss` of its batches and the `logit_scale`.

    Raises:
        NonFiniteLossError: the loss is infinite or no number; nothing has been changed then.
    """
    logit_scale = accelerator.unwrap_model(model).logit_scale
    losses = []
    for index, batch in enumerate(step.batches):
        seed_step(args.seed, number * args.gradient_accumulation_steps + index, accelerator.process_index)
        is_last = index == len(step.batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            output = model(pixel_values=batch["pixel_values"], **text_inputs(batch["labels"], tokenizer))
            loss = contrastive_loss(
                gather_with_gradient(output.image_embeds.float(), accelerator),
                gather_with_gradient(output.text_embeds.float(), accelerator),
                logit_scale.exp(),
            )
            check_finite({"contrastive_loss": loss}, number, batch["image_ids"])
            accelerator.backward(loss / len(step.batches))
        losses.append(loss.detach())
    if args.max_grad_norm > 0:
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    with torch.no_grad():
        logit_scale.clamp_(0, MAX_LOGIT_SCALE)
    return {"contrastive_loss": torch.stack(losses).mean(), "logit_scale": logit_scale.detach().exp()}


def main(argv: list[str] | None = None, accelerator: Accelerator | None = None, share: float = 1.0) -> dict[str, float]:
    """Runs the whole training; returns the last evaluation's figures.

    Args:
        accelerator: the caller's, when this is part of a larger run.
        share: of that run's time which this training takes; for the estimate of the time left.

    Raises:
        ValueError: an argument, a dataset or a checkpoint doesn't fit; nothing has been trained then.
        NonFiniteLossError: the loss became infinite or no number.
        StoppedError: SIGTERM or SIGINT came; a `SystemExit` of status 143 or 130, behind a checkpoint.
    """
    args = parse_args(argv)
    own = accelerator is None
    if own:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=args.output_dir,
        )
        set_up_logging(accelerator)
        set_cpu_threads(accelerator)
    output_dir = Path(args.output_dir)
    resume_from = resolve_resume(output_dir, args.resume_from_checkpoint)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            check_output_dir(args)
    check_sources(args)
    args.mixed_precision = accelerator.mixed_precision

    # Nothing is written to the output folder before everything has been found to fit.
    aside = Path(tempfile.mkdtemp(), SKIPPED_FILE) if accelerator.is_main_process else None
    skipped = SkippedRows(aside, args.on_bad_row)
    # One process decodes into the cache, the others read it.
    with accelerator.main_process_first():
        if args.dataset_name is None:
            drawn = scene_splits(args.max_train_samples, args.max_eval_samples, args.seed, args.image_size)
            train_rows, validation_rows = drawn["train"], drawn["validation"]
        else:
            train_rows, validation_rows = load_splits(
                args.dataset_name,
                args.dataset_config_name,
                args.train_split,
                args.validation_split,
                args.max_train_samples,
                args.max_eval_samples,
                seed=args.seed,
                image_column=args.image_column,
                caption_column=args.caption_column,
                num_proc=args.preprocessing_num_workers,
            )
        workers = args.preprocessing_num_workers
        columns = resolve_columns(train_rows, args.image_column, args.caption_column)
        validation_rows = decode_dataset(validation_rows, columns, args.image_size, skipped, "validation", workers)
        train_rows = decode_dataset(train_rows, columns, args.image_size, skipped, args.train_split, workers)

    pretrained = args.text_model_name_or_path or args.tokenizer_name
    if pretrained is not None:
        tokenizer = load_tokenizer(pretrained)
    else:
        captions = (caption for captions in train_rows["captions"] for caption in captions)
        tokenizer = train_tokenizer(captions, args.vocab_size, args.max_caption_length + 1)
    # A pretrained tower knows pixels by its own mean and deviation; where it doesn't say, and else: CLIP's.
    statistics = pixel_statistics(args.image_model_name_or_path) if args.image_model_name_or_path else None
    image_processor = create_image_processor(args.image_size, *(statistics or ()))
    set_seed(args.seed)
    model = build_model(args, tokenizer)

    augmentation = Augmentation(args.crop_scale, args.horizontal_flip, args.color_jitter)
    train_set = CaptionDataset(train_rows, args.image_size, augmentation, args.captions_per_image, args.seed)
    # Retrieval is judged with five captions a picture, as is usual, or with as many as there are.
    per_image = min(5, max(map(len, validation_rows["captions"])))
    validation_set = CaptionDataset(validation_rows, args.image_size, None, per_image, args.seed)
    common = {
        "collate_fn": CaptionCollator(
            tokenizer, args.max_caption_length, image_processor.image_mean, image_processor.image_std
        ),
        "num_workers": args.dataloader_num_workers,
        "worker_init_fn": ignore_interrupts,
        "persistent_workers": args.dataloader_num_workers > 0,
    }
    sampler = EpochBatchSampler(
        len(train_set),
        min(args.per_device_train_batch_size, len(train_set) // accelerator.num_processes),
        args.seed,
        accelerator.process_index,
        accelerator.num_processes,
        # Every photo is compared with those of all processes.
        equal=True,
    )
    train_loader = DataLoader(train_set, batch_sampler=sampler, **common)
    validation_loader = accelerator.prepare(DataLoader(validation_set, args.per_device_eval_batch_size, **common))

    steps_per_epoch = math.ceil(len(train_loader) / args.gradient_accumulation_steps)
    saved_args = read_checkpoint_args(resume_from)
    plan_steps(args, steps_per_epoch, saved_args)
    if saved_args is not None:
        compare_args(f"checkpoint {resume_from}", saved_args, run_args(args))
    if accelerator.is_main_process:
        open_output_dir(args)
        move_skipped_rows(skipped, output_dir)
    optimizer = create_optimizer(
        model, args.learning_rate, args.weight_decay, kernel_scale=args.patch_learning_rate_scale
    )
    scheduler = create_scheduler(optimizer, args, accelerator.num_processes)
    num_parameters = model.num_parameters()
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    if own and args.report_to != "none":
        accelerator.init_trackers("tinycap-teacher", config={k: str(v) for k, v in run_args(args).items()})
    state = {"step": 0, "epoch": 0, "batch": 0}
    if resume_from is not None:
        state, _ = load_checkpoint(accelerator, resume_from)
    state["args"] = run_args(args)
    logger.info(
        "Training a teacher of %s parameters on %s pictures, %s steps.",
        f"{num_parameters:,}",
        f"{len(train_set):,}",
        f"{args.max_train_steps:,}",
    )
    log = RunLog(output_dir, accelerator, total_steps=args.max_train_steps, start_step=state["step"], share=share)

    def take_step(step: Step, number: int) -> dict[str, torch.Tensor]:
        return train_step(args, accelerator, model, optimizer, scheduler, tokenizer, step, number)

    def validate() -> dict[str, float]:
        return evaluate(accelerator, model, validation_loader, tokenizer)

    if args.text_model_name_or_path is not None:
        remember_captions(args, accelerator, model, train_rows, tokenizer)
    batches = TrainBatches(train_loader, accelerator.device)
    checkpointing_steps = args.checkpointing_steps or steps_per_epoch
    model.train()
    run_steps(args, accelerator, batches, scheduler, state, log, take_step, validate, checkpointing_steps)
    metrics = validate()
    log.eval_row(state["step"], state["epoch"], metrics)
    log.close()

    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output_dir, state_dict=state_dict)
        save_processors(output_dir, tokenizer, image_processor, processor_class="CLIPProcessor")
        write_json(output_dir / "eval_results.json", metrics)
    accelerator.wait_for_everyone()
    recall = [metrics[f"{name}_recall_at_1"] for name in ("image_to_text", "text_to_image")]
    logger.info("Saved to %s. Recall at 1: image to text %.1f %%, text to image %.1f %%.", output_dir, *recall)
    if own:
        accelerator.end_training()
    return metrics


if __name__ == "__main__":
    run_script(main)
