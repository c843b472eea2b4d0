"""Trains TinyCap: a student ViT learns a CLIP teacher's image embedding, a decoder learns to say what it means.

    python train_distill.py
        trains on drawn scenes, with a teacher of their own; no files, no network.
    python train_distill.py --dataset_name my_photos --teacher_name_or_path openai/clip-vit-base-patch32
        trains on captioned images; `accelerate launch` in place of `python` does so on several devices.

Reading order: arguments, data, model, one evaluation, the loop, what is left behind.
"""

import argparse
import copy
import math
import os
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path


# Read when torch loads OpenMP: threads that spin while they wait take the cores from everything else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import datasets
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm.auto import tqdm
from transformers.models.auto.image_processing_auto import AutoImageProcessor

# Run as a script, the folder of this file is on the path and `tinycap.py` makes it the package.
from tinycap import train_teacher
from tinycap.configuration_tinycap import MEMORIES, TinyCapConfig
from tinycap.evaluation.fidelity import distillation_fidelity
from tinycap.evaluation.metrics import score_captions
from tinycap.evaluation.reports import contact_sheet, plot_curves
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training.arguments import (
    FLAG,
    ArgumentParser,
    add_data_arguments,
    add_optimisation_arguments,
    add_output_arguments,
    check_common_arguments,
    check_sources,
    parse_flags,
)
from tinycap.training.best_model import BEST_FILE, keep_best, load_best
from tinycap.training.checkpoints import (
    complete_checkpoints,
    load_checkpoint,
    resolve_resume,
    seed_step,
)
from tinycap.training.cider_reward import CiderReward
from tinycap.training.configuration import build_config, distillation_problems, fit_config
from tinycap.training.data import (
    Augmentation,
    CaptionCollator,
    CaptionDataset,
    Columns,
    EpochBatchSampler,
    SkippedRows,
    StreamingCaptionDataset,
    content_fingerprint,
    decode_dataset,
    load_splits,
    picture_of,
    resolve_columns,
)
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
from tinycap.training.model_card import summarize, write_model_card
from tinycap.training.optimization import (
    OPTIMIZERS,
    create_optimizer,
    create_scheduler,
    plan_steps,
    warn_of_few_steps,
)
from tinycap.training.repository import create_generation_config, create_image_processor, save_repository
from tinycap.training.run_folder import (
    SKIPPED_FILE,
    TEACHER_FOLDER,
    check_output_dir,
    compare_args,
    move_skipped_rows,
    open_output_dir,
    read_checkpoint_args,
    read_run_args,
    run_args,
    stopped_in_teacher,
)
from tinycap.training.scenes import scene_splits, score_scene_captions
from tinycap.training.scst import SelfCriticalObjective
from tinycap.training.teacher import FEATURES, Teacher
from tinycap.training.teacher_cache import build_teacher_cache
from tinycap.training.tokenizer import MIN_VOCAB_SIZE, load_tokenizer, train_tokenizer


logger = get_logger(__name__)

OBJECTIVES = ("cross_entropy", "scst")

# With no dataset: a small student whose patches are the cells of a scene, for ten minutes of two CPU cores.
SCENE_CONFIG = {
    "vision_config": {
        "image_size": 96,
        "patch_size": 32,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 384,
        "projection_dim": 256,
    },
    "text_config": {"hidden_size": 128, "intermediate_size": 384, "max_position_embeddings": 48},
}
SCENE_DEFAULTS = {
    "max_train_samples": 12000,
    "max_eval_samples": 500,
    "per_device_train_batch_size": 32,
    "captions_per_image": 1,
    "num_train_epochs": 10.0,
    "learning_rate": 1e-3,
    "patch_learning_rate_scale": 0.1,
    "num_warmup_steps": 100,
    "vocab_size": 512,
    "dropout": 0.0,
    "crop_scale": 1.0,
    "horizontal_flip": False,
    "color_jitter": 0.0,
    "max_caption_length": 40,
}
# Of the whole run's time, teacher and student, by processor time.
SCENE_TEACHER_SHARE = 0.25


# --- arguments --------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__.split("\n\n")[0])
    model = parser.add_argument_group(
        "model", "A flag that isn't given leaves the value of --model_name_or_path or --config_name as it is."
    )
    model.add_argument("--model_name_or_path", help="continue from this TinyCap checkpoint")
    model.add_argument(
        "--config_name", help="folder or JSON file of a TinyCapConfig; the seed architecture if not given"
    )
    model.add_argument(
        "--memory",
        choices=MEMORIES,
        help="what the decoder attends to; as the config says if not given. Other than a checkpoint's: its projection "
        "begins anew",
    )
    model.add_argument("--image_size", type=int, help="side of the pictures in pixels; as the config says if not given")
    model.add_argument("--tokenizer_name", help="a pretrained tokenizer; one is trained on the captions if not given")
    model.add_argument("--vocab_size", type=int, default=8192, help="tokens of the tokenizer trained on the captions")
    model.add_argument("--dropout", type=float, default=0.1, help="dropout of the decoder's embeddings and sublayers")
    model.add_argument(
        "--memory_noise",
        type=float,
        default=0.0,
        help="length of the noise that training adds to the embedding (of length 1) before the decoder sees it",
    )
    model.add_argument(
        "--freeze_vision_model", action=FLAG, default=False, help="train the decoder alone: the student stays as it is"
    )
    model.add_argument(
        "--patch_dropout", type=float, default=0.0, help="share of an image's patches left out of a training step"
    )

    teacher = parser.add_argument_group("teacher and objective")
    teacher.add_argument(
        "--teacher_name_or_path",
        help="a CLIP vision model, such as openai/clip-vit-base-patch32, or what train_teacher.py has trained",
    )
    teacher.add_argument(
        "--teacher_feature",
        choices=FEATURES,
        default="pooled",
        help="the target: the pooled output before the visual projection, or image_embeds after it",
    )
    teacher.add_argument(
        "--teacher_cache_dir",
        help="folder for the teacher's embeddings, computed once for all runs; asked in every step if not given",
    )
    teacher.add_argument(
        "--teacher_views", type=int, default=8, help="differently cropped views of a photo in the cache"
    )
    teacher.add_argument(
        "--distill_weight", type=float, default=1.0, help="weight of the distillation loss; 0: no teacher"
    )
    teacher.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="cross_entropy",
        help="what captions are trained by; scst: the CIDEr of sampled ones, for a model that captions already",
    )
    teacher.add_argument("--scst_samples", type=int, default=5, help="captions sampled for a photo with scst")
    teacher.add_argument(
        "--mixup",
        type=float,
        default=0.0,
        help="share of pictures mixed with another photo's, to learn the teacher's answer to them and no captions",
    )
    teacher.add_argument("--label_smoothing", type=float, default=0.0, help="label smoothing of the caption loss")

    add_data_arguments(parser)
    parser.add_argument("--streaming", action=FLAG, default=False, help="read the training photos as they come")
    add_optimisation_arguments(parser, batch_size=64, captions_per_image=5, learning_rate=1e-3, weight_decay=0.05)
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="what trains the weight matrices; muon learns more from a step, which takes longer: for large batches",
    )
    parser.add_argument("--gradient_checkpointing", action=FLAG, default=False, help="less memory, more time")
    add_output_arguments(parser, output_dir="outputs/tinycap")
    parser.add_argument("--num_beams", type=int, default=3, help="beams of validation and of the saved model")
    parser.add_argument(
        "--length_penalty",
        type=float,
        default=1.0,
        help="a beam search compares captions by log-probability / length ** this: above 0, it favours longer ones",
    )
    parser.add_argument(
        "--load_best_model_at_end",
        action=FLAG,
        default=False,
        help="save the weights of the best CIDEr, not the last",
    )
    parser.add_argument("--push_to_hub", action=FLAG, default=False, help="upload the result")
    parser.add_argument("--hub_model_id", help="repository to upload to; the output folder's name if not given")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads and checks the flags; every contradiction is an error that names them."""
    parser = build_parser()
    args = parse_flags(parser, argv, SCENE_DEFAULTS)

    def refuse(condition: bool, message: str) -> None:
        if condition:
            parser.error(message)

    check_common_arguments(args, refuse)
    refuse(args.streaming and args.mixup > 0, "--mixup: not with --streaming, which holds no other photo at hand")
    refuse(args.streaming and args.teacher_cache_dir is not None, "--teacher_cache_dir: not with --streaming")
    refuse(args.dataset_name is None and args.streaming, "--streaming: needs --dataset_name")
    if "distill_weight" in args.given or (args.model_name_or_path is None and args.config_name is None):
        for problem in distillation_problems(args):
            parser.error(problem)
    refuse(
        args.objective == "scst" and args.mixup > 0,
        "--mixup: not with --objective scst, whose reward needs the captions of every picture",
    )
    refuse(
        args.teacher_cache_dir is None and args.teacher_views != parser.get_default("teacher_views"),
        "--teacher_views: needs --teacher_cache_dir",
    )
    refuse(args.teacher_views < 1, f"--teacher_views: expected a positive number, got {args.teacher_views}")
    refuse(
        args.model_name_or_path is not None and args.config_name is not None,
        "--config_name: contradicts --model_name_or_path, which brings its own configuration",
    )
    refuse(
        args.model_name_or_path is not None and args.tokenizer_name is not None,
        "--tokenizer_name: contradicts --model_name_or_path, which brings its own tokenizer",
    )
    refuse(
        args.freeze_vision_model and args.model_name_or_path is None,
        "--freeze_vision_model: needs --model_name_or_path, a student that is worth keeping",
    )
    refuse(
        args.freeze_vision_model and args.distill_weight > 0,
        f"--distill_weight: expected 0 with --freeze_vision_model, which leaves a teacher nothing to teach, "
        f"got {args.distill_weight}",
    )
    refuse(
        args.freeze_vision_model and args.patch_dropout > 0,
        "--patch_dropout: contradicts --freeze_vision_model: the decoder learns from what the student will show it",
    )
    refuse(
        args.objective == "scst" and args.model_name_or_path is None,
        "--objective scst: needs --model_name_or_path, a model whose captions are worth comparing",
    )
    refuse(
        args.objective == "scst" and args.streaming, "--streaming: not with --objective scst, which counts all words"
    )
    refuse(
        args.objective == "scst" and args.label_smoothing > 0,
        "--label_smoothing: contradicts --objective scst, whose loss has no labels to smooth",
    )
    refuse(not args.memory_noise >= 0, f"--memory_noise: expected at least 0, got {args.memory_noise}")
    refuse(args.scst_samples < 2, f"--scst_samples: expected at least 2, got {args.scst_samples}")
    refuse(args.streaming and args.max_train_steps is None, "--streaming: needs --max_train_steps, the end of the run")
    refuse(args.hub_model_id is not None and not args.push_to_hub, "--hub_model_id: needs --push_to_hub")
    refuse(
        args.load_best_model_at_end and args.evaluation_steps is None,
        "--load_best_model_at_end: needs --evaluation_steps, validations to choose from",
    )
    refuse(args.num_beams < 1, f"--num_beams: expected a positive number, got {args.num_beams}")
    refuse(
        args.num_beams == 1 and args.length_penalty != parser.get_default("length_penalty"),
        "--length_penalty: needs --num_beams of at least 2, captions to choose from",
    )
    refuse(not args.distill_weight >= 0, f"--distill_weight: expected at least 0, got {args.distill_weight}")
    for name in ("dropout", "patch_dropout", "mixup", "label_smoothing"):
        value = getattr(args, name)
        refuse(not 0 <= value < 1, f"--{name}: expected a number in [0, 1), got {value}")
    return args


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Both splits: as they came, decoded, and what is known about them.

    Args:
        raw_train: rows with images and captions; may be a stream.
        raw_validation: the same; never a stream.
        columns: where they have what.
        train: decoded rows; `None` for a stream, which is decoded as it comes.
        validation: decoded rows.
        scenes: the true scenes of the validation pictures (JSON), where the pictures are drawn.
        fingerprint: the `content_fingerprint` of `train`; `None` for a stream.
    """

    raw_train: datasets.Dataset | datasets.IterableDataset
    raw_validation: datasets.Dataset
    columns: Columns
    train: datasets.Dataset | None
    validation: datasets.Dataset
    scenes: list[str] | None = None
    fingerprint: str | None = None


def build_data(args: argparse.Namespace, image_size: int, seen_size: int, skipped: SkippedRows) -> Data:
    """Loads or draws both splits and decodes them into the cache; bad rows are counted in `skipped`.

    Args:
        image_size: side of the student's pictures, pixels.
        seen_size: side of the largest that anyone will be shown, pixels.
    """
    scenes = None
    if args.dataset_name is None:
        drawn = scene_splits(args.max_train_samples, args.max_eval_samples, args.seed, image_size)
        train, validation, scenes = drawn["train"], drawn["validation"], drawn["validation"]["scene"]
    else:
        train, validation = load_splits(
            args.dataset_name,
            args.dataset_config_name,
            args.train_split,
            args.validation_split,
            args.max_train_samples,
            args.max_eval_samples,
            args.streaming,
            args.seed,
            args.image_column,
            args.caption_column,
            args.preprocessing_num_workers,
        )
    columns = resolve_columns(train, args.image_column, args.caption_column)
    workers = args.preprocessing_num_workers
    split = args.validation_split or "validation"
    validation_rows = decode_dataset(validation, columns, seen_size, skipped, split, workers)
    if args.streaming:
        return Data(train, validation, columns, None, validation_rows, scenes)
    train_rows = decode_dataset(train, columns, seen_size, skipped, args.train_split, workers)
    return Data(train, validation, columns, train_rows, validation_rows, scenes, content_fingerprint(train_rows))


def iterate_captions(data: Data, num_streamed: int = 100_000):
    """The captions that a tokenizer is trained on: of every decoded photo, or of the first ones of a stream."""
    if data.train is not None:
        for captions in data.train["captions"]:
            yield from captions
        return
    for row in data.raw_train.select_columns(data.columns.captions).take(num_streamed):
        with suppress(ValueError):
            yield from data.columns.captions_of(row)


def build_loaders(
    args: argparse.Namespace,
    accelerator: Accelerator,
    data: Data,
    collator,
    image_size: int,
    seen_size: int,
    skipped: SkippedRows,
    teacher: Teacher | None,
) -> tuple[TrainBatches, DataLoader]:
    """This process's training batches, and one loader of validation batches in order.

    With `--teacher_cache_dir` the batches bring the teacher's embeddings along, and the teacher isn't needed any more:
    it has seen the student's crops in `seen_size` pixels, which may be more than the student's `image_size`.
    """
    augmentation = Augmentation(args.crop_scale, args.horizontal_flip, args.color_jitter, args.mixup)
    common = {
        "collate_fn": collator,
        "num_workers": args.dataloader_num_workers,
        "worker_init_fn": ignore_interrupts,
        "pin_memory": accelerator.device.type == "cuda",
    }
    processes = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    persistent = {"persistent_workers": args.dataloader_num_workers > 0}
    if args.streaming:
        stream = StreamingCaptionDataset(
            data.raw_train,
            data.columns,
            image_size,
            skipped,
            args.train_split,
            augmentation,
            args.captions_per_image,
            args.seed,
            **processes,
        )
        # Its workers are born anew each epoch, since they learn the epoch when they are.
        train_loader = StatefulDataLoader(stream, args.per_device_train_batch_size, **common)
    else:
        dataset = CaptionDataset(data.train, image_size, augmentation, args.captions_per_image, args.seed)
        sampler = EpochBatchSampler(len(dataset), args.per_device_train_batch_size, args.seed, **processes)
        train_loader = DataLoader(dataset, batch_sampler=sampler, **common, **persistent)
    shown = CaptionDataset(data.validation, image_size, None, args.captions_per_image, args.seed)
    validation_loader = DataLoader(shown, args.per_device_eval_batch_size, **common, **persistent)
    if args.teacher_cache_dir is not None:
        # Photos to validate on are always cropped alike: one view.
        views = ((dataset, args.teacher_views, data.fingerprint), (shown, 1, content_fingerprint(data.validation)))
        for photos, num_views, fingerprint in views:
            photos.teacher_cache = build_teacher_cache(
                accelerator,
                teacher,
                photos.in_size(seen_size),
                collator,
                args.teacher_cache_dir,
                num_views,
                args.per_device_eval_batch_size,
                fingerprint,
                args.dataloader_num_workers,
            )
    return TrainBatches(train_loader, accelerator.device), accelerator.prepare(validation_loader)


# --- teacher ----------------------------------------------------------------------------------------------------------


def train_scene_teacher(args: argparse.Namespace, accelerator: Accelerator, folder: Path) -> Path:
    """Trains the scenes' own teacher in `folder`, on the student's training scenes, unless it is there already.

    Raises:
        ValueError: it is there, and was trained on other scenes.
    """
    if (folder / "eval_results.json").exists():
        taught = {name: getattr(args, name) for name in ("seed", "max_train_samples", "max_eval_samples")}
        compare_args(f"teacher {folder}", read_run_args(folder) or {}, taught)
    else:
        logger.info("First, a teacher is trained on drawn scenes; then the student.")
        flags = {
            "output_dir": folder,
            # The same seed, the same splits: the validation scenes stay unseen by the teacher too.
            "seed": args.seed,
            "max_train_samples": args.max_train_samples,
            "max_eval_samples": args.max_eval_samples,
            "dataloader_num_workers": args.dataloader_num_workers,
            "preprocessing_num_workers": args.preprocessing_num_workers,
            "resume_from_checkpoint": "latest" if complete_checkpoints(folder) else None,
        }
        argv = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
        # What was there before the first checkpoint is of no use.
        argv = argv if flags["resume_from_checkpoint"] else [*argv, "--overwrite_output_dir"]
        train_teacher.main(argv, accelerator, share=SCENE_TEACHER_SHARE)
        # accelerate saves and loads everything that it has prepared: the student's checkpoints would hold the teacher.
        accelerator.free_memory()
    return folder


# --- model ------------------------------------------------------------------------------------------------------------


def read_config(args: argparse.Namespace) -> TinyCapConfig:
    """The configuration before data and teacher have their say; see `build_config`."""
    return build_config(args, SCENE_CONFIG if args.dataset_name is None else {})


def load_processors(args: argparse.Namespace, image_size: int) -> tuple:
    """The tokenizer, `None` where one is to be trained, and the image processor."""
    if args.model_name_or_path is None:
        tokenizer = None if args.tokenizer_name is None else load_tokenizer(args.tokenizer_name)
        if tokenizer is None and args.vocab_size < MIN_VOCAB_SIZE:
            # Before a teacher is trained for the scenes.
            raise ValueError(f"--vocab_size: expected at least {MIN_VOCAB_SIZE}, got {args.vocab_size}")
        return tokenizer, create_image_processor(image_size)
    tokenizer = load_tokenizer(args.model_name_or_path)
    try:
        saved = AutoImageProcessor.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model_name_or_path {args.model_name_or_path}: expected its preprocessor_config.json: {error}"
        ) from error
    return tokenizer, create_image_processor(image_size, saved.image_mean, saved.image_std)


def change_image_size(model: TinyCapForConditionalGeneration, image_size: int) -> None:
    """Fits a trained model to square pictures of `image_size` pixels, by resampling its position table.

    Small pictures are cheap to learn most things from; a few epochs at the final size do the rest (Dosovitskiy et al.,
    2021, section 3.2).
    """
    embeddings = model.vision_model.embeddings
    if embeddings.config.image_size == image_size:
        return
    side = image_size // embeddings.config.patch_size
    embeddings.position_embeddings = torch.nn.Parameter(embeddings.positions(side, side).detach().clone())
    embeddings.num_patches = side**2
    # Each part of a model keeps its own copy of its configuration.
    for config in (embeddings.config, model.vision_model.config, model.config.vision_config):
        config.image_size = image_size


def change_memory(model: TinyCapForConditionalGeneration, memory: str) -> TinyCapForConditionalGeneration:
    """A trained model whose decoder attends to another memory, of another width: its projection begins anew."""
    if model.config.memory == memory:
        return model
    config = copy.deepcopy(model.config)
    config.memory, config.memory_scale = memory, None
    changed = TinyCapForConditionalGeneration(config)
    kept = {name: value for name, value in model.state_dict().items() if "memory_projection" not in name}
    changed.load_state_dict(kept, strict=False)
    return changed


def enable_gradient_checkpointing(model: TinyCapForConditionalGeneration) -> None:
    """Computes the layers' activations again in the backward pass instead of keeping them."""
    # Renamed in transformers 5.24.
    renamed = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable)()


def build_model(args: argparse.Namespace, config: TinyCapConfig) -> TinyCapForConditionalGeneration:
    """A new model with fresh weights, or the one to continue from, as far as the flags keep it."""
    if args.model_name_or_path is None:
        model = TinyCapForConditionalGeneration(config)
    else:
        saved = copy.deepcopy(config)
        saved.vision_config.image_size = args.configured["image_size"]
        saved.memory, saved.memory_scale = args.configured["memory"], args.configured["memory_scale"]
        model, report = TinyCapForConditionalGeneration.from_pretrained(
            args.model_name_or_path, config=saved, dtype=torch.float32, output_loading_info=True
        )
        problems = {
            kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "mismatched_keys") if report[kind]
        }
        if problems:
            raise ValueError(
                f"--model_name_or_path {args.model_name_or_path}: weights don't fit its config: {problems}"
            )
        change_image_size(model, config.vision_config.image_size)
        model = change_memory(model, config.memory)
        if args.freeze_vision_model:
            model.vision_model.requires_grad_(False)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


# --- one evaluation ---------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """What a validation found: named figures, and a caption for each validation photo, in order."""

    metrics: dict[str, float]
    captions: list[str]


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model, loader: DataLoader, rows: datasets.Dataset, tokenizer, teacher, scenes
) -> Evaluation:
    """Losses, captions by `model.generation_config`, their scores, and the embeddings' fidelity to the teacher.

    With several processes the losses may count a few photos of the last batch twice; captions and scores don't.

    Args:
        model: the whole one.
    """
    model.eval()
    captions, student_embeds, teacher_embeds, losses = [], [], [], []
    progress = tqdm(loader, desc="Validating", leave=False, disable=None if accelerator.is_local_main_process else True)
    for batch in progress:
        target = batch.get("teacher_embeds")
        if target is None and teacher is not None:
            target = teacher(batch["pixel_values"])
        with accelerator.autocast():
            encoder_outputs = model.get_encoder()(batch["pixel_values"], return_dict=True)
            output = model(
                encoder_outputs=encoder_outputs, labels=batch["labels"], teacher_embeds=target, skip_logits=True
            )
            sequences = model.generate(encoder_outputs=encoder_outputs)
        num_tokens = (batch["labels"] != -100).sum()
        losses.append(accelerator.gather(torch.stack([output.caption_loss * num_tokens, num_tokens])[None].double()))
        texts = [text.strip() for text in tokenizer.batch_decode(sequences, skip_special_tokens=True)]
        captions.extend(accelerator.gather_for_metrics(texts, use_gather_object=True))
        if target is not None:
            student_embeds.append(accelerator.gather_for_metrics(encoder_outputs.image_embeds.float()).cpu())
            teacher_embeds.append(accelerator.gather_for_metrics(target.float()).cpu())
    model.train()
    total, tokens = torch.cat(losses).sum(dim=0).tolist()
    metrics = {"caption_loss": total / tokens}
    if teacher_embeds:
        metrics.update(distillation_fidelity(torch.cat(student_embeds), torch.cat(teacher_embeds)))
    metrics.update(score_captions(captions, list(rows["captions"])))
    if scenes is not None:
        metrics.update(score_scene_captions(captions, scenes))
    return Evaluation(metrics, captions)


# --- the loop ---------------------------------------------------------------------------------------------------------


def joint_losses(model, unwrapped, batch: dict, teacher_embeds: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The model's own objective, by name: `loss`, `caption_loss` and, with a teacher, `distill_loss`."""
    output = model(
        pixel_values=batch["pixel_values"],
        labels=batch["labels"],
        teacher_embeds=teacher_embeds,
        skip_logits=True,
        use_cache=False,
    )
    return {name: output[name] for name in ("loss", "caption_loss", "distill_loss") if output.get(name) is not None}


def train_step(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model,
    optimizer,
    scheduler,
    teacher: Teacher | None,
    objective,
    step: Step,
    number: int,
) -> dict[str, torch.Tensor]:
    """One optimizer step, the `number`-th.

    Returns:
        This process's part of each named loss; the mean over the processes is the whole step's. `grad_norm` beside
        them, where gradients are clipped.

    Raises:
        NonFiniteLossError: a loss is infinite or no number; nothing has been changed then.
    """
    named = {}
    for index, batch in enumerate(step.batches):
        # Dropout and patch dropout follow from the step, so that a resumed run makes the same choices.
        seed_step(args.seed, number * args.gradient_accumulation_steps + index, accelerator.process_index)
        is_last = index == len(step.batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            with accelerator.autocast():
                teacher_embeds = batch.get("teacher_embeds")
                if teacher_embeds is None and teacher is not None:
                    teacher_embeds = teacher(batch["pixel_values"])
                losses = objective(model, accelerator.unwrap_model(model), batch, teacher_embeds)
            check_finite(losses, number, batch["image_ids"])
            # The caption loss is a mean over tokens, the others over photos.
            photos, tokens = step.photo_shares[index], step.token_shares[index]
            loss = photos * losses["loss"]
            if "caption_loss" in losses:
                loss = loss + (tokens - photos) * losses["caption_loss"]
            accelerator.backward(loss)
        losses["loss"] = loss
        for name, value in losses.items():
            share = {"loss": 1.0, "caption_loss": tokens}.get(name, photos)
            named[name] = named.get(name, 0.0) + share * value.detach()
    if args.max_grad_norm > 0:
        named["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return named


# --- what is left behind ----------------------------------------------------------------------------------------------


def save(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model,
    tokenizer,
    image_processor,
    data: Data,
    evaluation: Evaluation,
    facts: dict,
) -> None:
    """Writes the model repository, its reports and its card to `args.output_dir`; `model` is the whole one."""
    if not accelerator.is_main_process:
        return
    output_dir = Path(args.output_dir)
    save_repository(output_dir, model, tokenizer, image_processor)
    write_json(output_dir / "eval_results.json", evaluation.metrics)
    plot_curves(output_dir / "metrics.jsonl", output_dir / "curves.png")
    shown = range(min(16, len(evaluation.captions)))
    contact_sheet(
        [picture_of(data.validation[row]) for row in shown],
        [evaluation.captions[row] for row in shown],
        output_dir / "samples.png",
        references=[data.validation[row]["captions"][0] for row in shown],
        title="Held-out pictures: the model's caption, and a human's" if args.dataset_name else "Unseen scenes",
    )
    write_model_card(output_dir / "README.md", args, model.config, evaluation.metrics, facts)


def create_hub_repository(args: argparse.Namespace) -> str:
    """Creates the repository to upload to, or finds it there; returns its name with its owner's.

    Raises:
        ValueError: the Hub can't be reached, or doesn't know who asks.
    """
    from huggingface_hub import HfApi

    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return HfApi().create_repo(name, exist_ok=True).repo_id
    except (OSError, ValueError) as error:
        raise ValueError(f"--push_to_hub: expected a repository {name} to upload to: {error}") from error


def push_to_hub(args: argparse.Namespace) -> str:
    """Uploads the model repository and its reports without what else lies there; returns its name."""
    from huggingface_hub import HfApi

    repo_id = create_hub_repository(args)
    HfApi().upload_folder(
        repo_id=repo_id,
        folder_path=args.output_dir,
        # A model repository has no folders: what has one is a checkpoint's, the teacher's or a tracker's.
        ignore_patterns=["checkpoint-*", "teacher/*", "*/*", BEST_FILE, SKIPPED_FILE, ".*"],
        commit_message="A trained TinyCap",
    )
    return repo_id


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the whole training; returns the last evaluation's metrics.

    Raises:
        ValueError: an argument, a dataset, a teacher or a checkpoint doesn't fit; nothing has been trained then.
        NonFiniteLossError: the loss became infinite or no number.
        StoppedError: SIGTERM or SIGINT came; a `SystemExit` of status 143 or 130, behind a checkpoint.
    """
    args = parse_args(argv)
    started = time.perf_counter()
    check_sources(args)
    config = read_config(args)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        # A decoder that looks at patches leaves the projection to the teacher: without one nothing trains it.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=args.distill_weight == 0)],
    )
    set_up_logging(accelerator)
    set_cpu_threads(accelerator)
    output_dir = Path(args.output_dir)
    resume_from = None if stopped_in_teacher(args) else resolve_resume(output_dir, args.resume_from_checkpoint)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            check_output_dir(args)
    args.mixed_precision = accelerator.mixed_precision
    set_seed(args.seed)

    image_size = config.vision_config.image_size
    tokenizer, image_processor = load_processors(args, image_size)
    teacher = None
    if args.distill_weight > 0:
        name_or_path = args.teacher_name_or_path
        if name_or_path is None:
            # A resumed run's arguments are compared with its checkpoint's first.
            if accelerator.is_main_process and args.resume_from_checkpoint is None:
                open_output_dir(args)
            name_or_path = train_scene_teacher(args, accelerator, output_dir / TEACHER_FOLDER)
        statistics = (image_processor.image_mean, image_processor.image_std)
        teacher = Teacher.from_pretrained(name_or_path, args.teacher_feature, *statistics).to(accelerator.device)
    # A teacher that is asked ahead may see more of a crop than the student will.
    seen_size = image_size if args.teacher_cache_dir is None else max(image_size, teacher.image_size)

    # Nothing is written to the output folder before everything has been found to fit.
    aside = Path(tempfile.mkdtemp(), SKIPPED_FILE) if accelerator.is_main_process else None
    skipped = SkippedRows(aside, args.on_bad_row)
    # One process decodes into the cache, the others read it.
    with accelerator.main_process_first():
        data = build_data(args, image_size, seen_size, skipped)
    if args.dataset_name is not None:
        # Recorded for an evaluation of the same rows.
        args.image_column, args.caption_column = data.columns.image, data.columns.caption
    if tokenizer is None:
        tokenizer = train_tokenizer(iterate_captions(data), args.vocab_size, config.text_config.max_position_embeddings)
    fit_config(args, config, tokenizer, teacher)
    set_seed(args.seed)
    model = build_model(args, config)
    model.generation_config = create_generation_config(
        tokenizer, args.max_caption_length, args.num_beams, args.length_penalty
    )
    num_parameters = model.num_parameters()

    collator = CaptionCollator(
        tokenizer, args.max_caption_length, image_processor.image_mean, image_processor.image_std
    )
    batches, validation_loader = build_loaders(
        args, accelerator, data, collator, image_size, seen_size, skipped, teacher
    )
    teacher_fact = "none"
    if teacher is not None:
        name = args.teacher_name_or_path or "trained in the same run"
        teacher_fact = f"{name}, {args.teacher_feature} feature of width {teacher.embed_dim}"
    if args.teacher_cache_dir is not None:
        # 350 MB for ViT-B/32, which has said all it will be asked.
        teacher = None
    steps_per_epoch = None
    if not args.streaming:
        steps_per_epoch = math.ceil(len(batches.loader) / args.gradient_accumulation_steps)
    saved_args = read_checkpoint_args(resume_from, data.fingerprint)
    plan_steps(args, steps_per_epoch, saved_args)
    if saved_args is not None:
        # Images are compared by their fingerprint: the data set's folder may have moved.
        free = () if args.streaming else ("dataset_name",)
        compare_args(f"checkpoint {resume_from}", saved_args, run_args(args), free)
    if accelerator.is_main_process:
        if args.push_to_hub:
            args.hub_model_id = create_hub_repository(args)
        # A teacher of the run's own is there by now.
        open_output_dir(args, clear=args.distill_weight == 0 or args.teacher_name_or_path is not None)
        move_skipped_rows(skipped, output_dir, keep=args.streaming and resume_from is not None)
    warn_of_few_steps(args)
    checkpointing_steps = args.checkpointing_steps or steps_per_epoch or args.max_train_steps
    optimizer = create_optimizer(
        model, args.learning_rate, args.weight_decay, args.optimizer, args.patch_learning_rate_scale
    )
    scheduler = create_scheduler(optimizer, args, accelerator.num_processes)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    if args.report_to != "none":
        accelerator.init_trackers("tinycap", config=run_args(args))

    state = {"step": 0, "epoch": 0, "batch": 0, "data": data.fingerprint}
    if resume_from is not None:
        state, own_state = load_checkpoint(accelerator, resume_from)
        batches.load_state_dict(own_state)
        logger.info("Going on from %s at step %d.", resume_from, state["step"])
    state["args"] = run_args(args)
    batch_size = args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    num_train_images = "a stream" if args.streaming else f"{len(data.train):,} pictures"
    logger.info(
        "Training %s parameters on %s, %s steps of %d images, %d caption(s) each, on %s x %d, %s.",
        f"{num_parameters:,}",
        num_train_images,
        f"{args.max_train_steps:,}",
        batch_size,
        args.captions_per_image,
        accelerator.device,
        accelerator.num_processes,
        accelerator.mixed_precision,
    )

    scored = (data.validation, tokenizer, teacher, data.scenes)
    log = RunLog(output_dir, accelerator, total_steps=args.max_train_steps, start_step=state["step"])

    def validate() -> Evaluation:
        whole = accelerator.unwrap_model(model)
        found = evaluate(accelerator, whole, validation_loader, *scored)
        if args.load_best_model_at_end and accelerator.is_main_process:
            keep_best(output_dir, whole, found.metrics, state)
        return found

    objective = joint_losses
    if args.objective == "scst":
        logger.info("Counting the words of the training captions, for their CIDEr.")
        reward = CiderReward(data.train["captions"])
        objective = SelfCriticalObjective(tokenizer, reward, args.scst_samples, args.max_caption_length)

    def take_step(step: Step, number: int) -> dict[str, torch.Tensor]:
        return train_step(args, accelerator, model, optimizer, scheduler, teacher, objective, step, number)

    def blank() -> dict:
        return collator.blank(image_size, args.captions_per_image)

    model.train()
    run_steps(
        *(args, accelerator, batches, scheduler, state, log, take_step),
        *(lambda: validate().metrics, checkpointing_steps, blank),
    )
    evaluation = validate()
    log.eval_row(state["step"], state["epoch"], evaluation.metrics)
    log.close()
    model = accelerator.unwrap_model(model)
    if args.load_best_model_at_end:
        accelerator.wait_for_everyone()
        load_best(output_dir, model)
        evaluation = evaluate(accelerator, model, validation_loader, *scored)
        if accelerator.is_main_process:
            logger.info("The best weights are those of step %d.", state["best"]["step"])

    facts = {
        "num_parameters": num_parameters,
        "steps": state["step"],
        "batch_size": batch_size,
        "hours": (time.perf_counter() - started) / 3600,
        "device": f"{accelerator.num_processes} x {accelerator.device.type}",
        "teacher": teacher_fact,
        "num_train_images": num_train_images,
        "num_images": len(evaluation.captions),
    }
    save(args, accelerator, model, tokenizer, image_processor, data, evaluation, facts)
    if args.push_to_hub and accelerator.is_main_process:
        logger.info("Uploaded to %s", push_to_hub(args))
    accelerator.end_training()
    if accelerator.is_main_process:
        print(summarize(evaluation.metrics, output_dir))
    return evaluation.metrics


if __name__ == "__main__":
    run_script(main)
