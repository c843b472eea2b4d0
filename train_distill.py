"""Trains TinyCap: a student ViT learns a CLIP teacher's image embedding, a decoder learns to put it into words.

    python train_distill.py
        trains on drawn scenes, after their own teacher; no files, no network.
    python train_distill.py --dataset_name my_images --teacher_name_or_path openai/clip-vit-base-patch32
        trains on captioned images; `accelerate launch` in place of `python` does so on several devices.

Reading order: arguments, teacher, losses, evaluation, results, the run. The optimizer step is `loop.train_step`.
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path


# Read when torch loads OpenMP: threads that wait actively take the cores from the data loader.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

# In a clone, `tinycap` adds the repository's root to its path: its modules import one another by the package's name.
from tinycap import train_teacher
from tinycap.commands import writing
from tinycap.evaluation.metrics import distillation_fidelity, score_captions
from tinycap.evaluation.reports import contact_sheet, plot_curves
from tinycap.training.arguments import check_sources, parse_flags
from tinycap.training.batches import CaptionCollator, image_inputs
from tinycap.training.checkpoints import complete_checkpoints
from tinycap.training.data import decoded_image
from tinycap.training.loading import Data, cache_teacher_embeddings, create_loaders, load_data
from tinycap.training.logs import write_json
from tinycap.training.loop import (
    StopSignals,
    create_accelerator,
    optimizer_steps,
    run_script,
    train_step,
    wait_for_slow_process,
)
from tinycap.training.model_card import summarize, write_model_card
from tinycap.training.optimization import create_training, warn_of_few_steps
from tinycap.training.repository import create_generation_config, save_repository
from tinycap.training.run_folder import TEACHER_FOLDER, RunFolder, compare_args, push_to_hub, read_run_args
from tinycap.training.scenes import score_scene_captions
from tinycap.training.scst import CiderReward, SelfCriticalObjective
from tinycap.training.student import build_config, build_model, distillation_problems, fit_config, load_processors
from tinycap.training.teacher import Teacher
from tinycap.training.teacher_cache import FrozenModel
from tinycap.training.tokenizer import count_truncated, train_tokenizer


logger = get_logger(__name__)

# Of the processor time of a whole run on scenes, teacher and student.
SCENE_TEACHER_SHARE = 0.25


# --- arguments --------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads and checks the flags; contradictions are errors that name them."""

    def problems(args: argparse.Namespace):
        # Where a configuration may set the weight, `build_config` checks it.
        is_default = args.model_name_or_path is None and args.config_name is None
        if is_default or "distill_weight" in args.given:
            yield from distillation_problems(args)
        if args.streaming and (args.unlabelled_dataset_name is None) != (args.unlabelled_share is None):
            yield "--streaming: needs --unlabelled_share with --unlabelled_dataset_name, since it counts no images"

    return parse_flags("distill", argv, __doc__.split("\n\n")[0], problems)


# --- teacher ----------------------------------------------------------------------------------------------------------


def load_teacher(args: argparse.Namespace, accelerator: Accelerator, run: RunFolder, image_processor) -> Teacher | None:
    """The teacher on its device, trained first where scenes have none; `None` with `--distill_weight 0`.

    It is compiled if accelerate is configured to compile models, as `prepare` does with the student.
    """
    if args.distill_weight == 0:
        return None
    name_or_path = args.teacher_name_or_path or train_scene_teacher(args, accelerator, run)
    statistics = (image_processor.image_mean, image_processor.image_std)
    teacher = Teacher.from_pretrained(name_or_path, args.teacher_feature, *statistics).to(accelerator.device)
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        teacher.compile(**accelerator.state.dynamo_plugin.to_kwargs())
    return teacher


def train_scene_teacher(args: argparse.Namespace, accelerator: Accelerator, run: RunFolder) -> Path:
    """Trains the scenes' teacher in the run's folder, on the student's training scenes, unless it is there already.

    Raises:
        ValueError: it is there, and was trained on other scenes.
    """
    if args.resume_from_checkpoint is None:
        # A resumed run's arguments are compared with its checkpoint's first.
        run.open()
    folder = run.path / TEACHER_FOLDER
    # The same seed, the same splits: the validation scenes are unseen by the teacher too.
    scenes = {name: getattr(args, name) for name in ("seed", "max_train_samples", "max_eval_samples")}
    if (folder / "eval_results.json").exists():
        compare_args(f"teacher {folder}", read_run_args(folder) or {}, scenes)
        return folder
    logger.info("First, a teacher is trained on drawn scenes; then the student.")
    workers = {name: getattr(args, name) for name in ("dataloader_num_workers", "preprocessing_num_workers")}
    flags = {"output_dir": folder, **scenes, **workers}
    argv = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    argv += ["--resume_from_checkpoint=latest"] if complete_checkpoints(folder) else ["--overwrite_output_dir"]
    train_teacher.main(argv, accelerator, share=SCENE_TEACHER_SHARE)
    # accelerate saves everything that it has prepared: without this, the student's checkpoints would hold the teacher.
    accelerator.free_memory()
    return folder


def teacher_embeddings(teacher: Teacher | None, batch: dict) -> torch.Tensor | None:
    """The targets of a batch: from the cache, or of a teacher; `None` without one."""
    if teacher is None or "teacher_embeds" in batch:
        return batch.get("teacher_embeds")
    return teacher(batch["pixel_values"])


# --- losses -----------------------------------------------------------------------------------------------------------


def joint_losses(model, unwrapped, batch: dict, teacher_embeds: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The model's losses by name: `loss`, `caption_loss` and, with a teacher, `distill_loss`."""
    output = model(
        **image_inputs(batch),
        labels=batch["labels"],
        captioned=batch["captioned"],
        teacher_embeds=teacher_embeds,
        skip_logits=True,
        use_cache=False,
    )
    return {name: output[name] for name in ("loss", "caption_loss", "distill_loss") if output.get(name) is not None}


def create_objective(args: argparse.Namespace, data: Data, tokenizer):
    """`joint_losses`, or another function of its arguments for self-critical training."""
    if args.objective == "cross_entropy":
        return joint_losses
    logger.info("Counting the words of the training captions, for their CIDEr.")
    reward = CiderReward(data.train["captions"])
    sizes = (args.scst_samples, args.max_caption_length)
    return SelfCriticalObjective(tokenizer, reward, *sizes, args.cross_entropy_weight)


def compute_losses(
    accelerator: Accelerator, model, teacher: Teacher | None, objective, batch: dict
) -> dict[str, torch.Tensor]:
    """The named losses of a batch."""
    with accelerator.autocast():
        return objective(model, accelerator.unwrap_model(model), batch, teacher_embeddings(teacher, batch))


# --- evaluation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model, loader: DataLoader, data: Data, tokenizer, teacher: Teacher | None
) -> tuple[dict[str, float], list[str]]:
    """Metrics, and a caption for each validation image, in order, by `model.generation_config`.

    With several processes the losses may count a few images of the last batch twice; captions and scores don't.

    Args:
        model: the unwrapped model.
    """
    model.eval()
    captions, student_embeds, teacher_embeds, losses = [], [], [], []
    progress = tqdm(loader, desc="Validating", leave=False, disable=None if accelerator.is_local_main_process else True)
    for batch in progress:
        target = teacher_embeddings(teacher, batch)
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
    metrics.update(score_captions(captions, list(data.validation["captions"])))
    if data.scenes is not None:
        metrics.update(score_scene_captions(captions, data.scenes))
    return metrics, captions


# --- results ----------------------------------------------------------------------------------------------------------


def describe_run(args, accelerator: Accelerator, data: Data, tokenizer, model, teacher: Teacher | None) -> dict:
    """Facts for the model card, see its template, and counts of captions; logs the main ones."""
    batch_size = args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    precision = accelerator.mixed_precision.replace("no", "float32")
    facts = {
        "num_parameters": f"{model.num_parameters():,}",
        "num_train_images": count_train_images(args, data),
        "steps": f"{args.max_train_steps:,} of {batch_size} images with {args.captions_per_image} caption(s) each",
        "device": f"{accelerator.num_processes} x {accelerator.device.type}, {precision}",
        "teacher": "none",
    }
    if teacher is not None:
        name = args.teacher_name_or_path or "trained in the same run"
        facts["teacher"] = f"{name}, {args.teacher_feature} feature of width {teacher.embed_dim}"
    logger.info("Training %(num_parameters)s parameters on %(num_train_images)s, steps: %(steps)s; %(device)s.", facts)
    limit = args.max_caption_length
    facts["counts"] = count_truncated(tokenizer, data.captions(1000), limit) if accelerator.is_main_process else {}
    return facts


def count_train_images(args, data: Data) -> str:
    """How many images there are to train on, with and without captions, for the model card."""
    source = f" of `{args.unlabelled_dataset_name}`" if args.unlabelled_dataset_name else ""
    if data.train is None:
        return f"a stream, and one without captions{source}" if source else "a stream"
    counts = f"{len(data.train) - len(data.unlabelled):,} images"
    if data.unlabelled:
        counts += f" with captions and {len(data.unlabelled):,} without{source}"
    if args.unlabelled_share is not None:
        counts += f", which are {args.unlabelled_share:.0%} of a step's"
    return counts


def save_results(args, model, tokenizer, image_processor, data: Data, metrics, captions, run_info: dict) -> None:
    """Writes the model repository, its reports and its card to `args.output_dir`, and uploads them if asked for."""
    output_dir = Path(args.output_dir)
    save_repository(output_dir, model, tokenizer, image_processor)
    metrics.update(run_info["counts"])
    write_json(output_dir / "eval_results.json", metrics)
    plot_curves(output_dir / "metrics.jsonl", output_dir / "curves.png")
    shown = [data.validation[row] for row in range(min(16, len(captions)))]
    title = "Held-out images: the model's caption, and a human's" if args.dataset_name else "Unseen scenes"
    images, references = [decoded_image(row) for row in shown], [row["captions"][0] for row in shown]
    contact_sheet(images, captions[: len(shown)], output_dir / "samples.png", references=references, title=title)
    write_model_card(output_dir / "README.md", args, model.config, metrics, run_info)
    if args.push_to_hub:
        logger.info("Uploaded to %s", push_to_hub(args))
    print(summarize(metrics, output_dir))


# --- the run ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the whole training; returns the last evaluation's metrics.

    Raises:
        ValueError: an argument, a dataset, a teacher or a checkpoint doesn't fit; nothing has been trained then.
        NonFiniteLossError: a loss became infinite or NaN.
        StoppedBySignal: SIGTERM or SIGINT was received; a checkpoint is saved.
    """
    args = parse_args(argv)
    started = time.perf_counter()
    check_sources(args)
    config = build_config(args)
    # Without a teacher, a decoder that attends to patches leaves the projection unused.
    accelerator = create_accelerator(args, find_unused_parameters=args.distill_weight == 0)
    run = RunFolder(args, accelerator, "tinycap")

    image_size = config.vision_config.image_size
    tokenizer, image_processor = load_processors(args, image_size)
    teacher = load_teacher(args, accelerator, run, image_processor)
    # Precomputed teacher embeddings may be those of larger crops than the student's.
    cached = teacher is not None and args.teacher_cache_dir is not None
    teacher_crop_size = max(image_size, teacher.image_size) if cached else image_size
    data = load_data(args, accelerator, image_size, teacher_crop_size, run.skipped)
    if tokenizer is None:
        tokenizer = train_tokenizer(data.captions(), args.vocab_size, config.text_config.max_position_embeddings)
    fit_config(args, config, tokenizer, teacher)
    set_seed(args.seed)
    model = build_model(args, config)
    decoding = (args.max_caption_length, args.num_beams, args.length_penalty)
    model.generation_config = create_generation_config(tokenizer, *decoding)

    statistics = (image_processor.image_mean, image_processor.image_std)
    collator = CaptionCollator(tokenizer, args.max_caption_length, *statistics, end_truncated=False)
    batches, validation_loader = create_loaders(args, accelerator, data, collator, image_size, run.skipped)
    if args.teacher_cache_dir is not None:
        student = model.vision_model.to(accelerator.device)
        source = teacher or FrozenModel(student, "student", config.vision_config.projection_dim)
        cache_teacher_embeddings(args, accelerator, source, (batches, validation_loader), teacher_crop_size)
    run.start(batches, data.fingerprint)
    warn_of_few_steps(args)
    run_info = describe_run(args, accelerator, data, tokenizer, model, teacher)
    if args.teacher_cache_dir is not None:
        # Frees it (350 MB for ViT-B/32): all its embeddings are cached.
        teacher = None
    optimizer, lr_scheduler = create_training(model, args, accelerator.num_processes)
    wrapped, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    run.resume(batches)

    objective = create_objective(args, data, tokenizer)
    losses_of = partial(compute_losses, accelerator, wrapped, teacher, objective)
    validate = partial(evaluate, accelerator, model, validation_loader, data, tokenizer, teacher)
    dummy_batch = partial(collator.dummy_batch, image_size, args.captions_per_image)
    model.train()
    with StopSignals() as signals:
        for step in optimizer_steps(run, batches, signals, dummy_batch):
            losses = train_step(args, accelerator, wrapped, optimizer, lr_scheduler, losses_of, step)
            run.log_step(step, losses, lr_scheduler)
            if step.validates:
                run.log_validation(validate()[0], model)
            if step.saves:
                run.save_checkpoint(batches)
    metrics, captions = validate()
    run.log_validation(metrics, model)
    if args.load_best_model_at_end:
        run.load_best(model)
        metrics, captions = validate()
    run_info.update(hours=(time.perf_counter() - started) / 3600, num_images=len(captions))
    if accelerator.is_main_process:
        with writing(args.output_dir):
            save_results(args, model, tokenizer, image_processor, data, metrics, captions, run_info)
    # The last reference to the process group is DDP's, which waits for gloo's threads without releasing the GIL; one of
    # them may need it to free the tensors of the last gather. Here they get it.
    wait_for_slow_process(accelerator)
    accelerator.end_training()
    return metrics


if __name__ == "__main__":
    run_script(main)
