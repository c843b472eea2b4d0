"""Builds the model to train, new or from a checkpoint, with its tokenizer and image processor."""

import argparse
import copy

import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training.repository import CLIPImageProcessor, create_image_processor
from tinycap.training.tokenizer import MIN_VOCAB_SIZE, load_tokenizer


def load_processors(
    args: argparse.Namespace, image_size: int
) -> tuple[PreTrainedTokenizerFast | None, CLIPImageProcessor]:
    """The tokenizer, `None` where one is to be trained, and the image processor.

    Raises:
        ValueError: one of them can't be loaded, or `--vocab_size` is too small to train one.
    """
    if args.model_name_or_path is None:
        tokenizer = None if args.tokenizer_name is None else load_tokenizer(args.tokenizer_name)
        if tokenizer is None and args.vocab_size < MIN_VOCAB_SIZE:
            # Checked here already, before a teacher is trained for the scenes.
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


def resize_position_embeddings(model: TinyCapForConditionalGeneration, image_size: int) -> None:
    """Resamples the position embeddings of a trained model for square images of `image_size` pixels.

    Training on small images is cheap; a few epochs at the final size suffice (Dosovitskiy et al., 2021, section 3.2).
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


def enable_gradient_checkpointing(model: TinyCapForConditionalGeneration) -> None:
    """Recomputes the layers' activations in the backward pass instead of storing them."""
    # Renamed in transformers 5.24.
    renamed = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable)()


def build_model(args: argparse.Namespace, config: TinyCapConfig) -> TinyCapForConditionalGeneration:
    """A new model with fresh weights, or that of `--model_name_or_path` in float32, at the size of `config`.

    Raises:
        ValueError: the checkpoint's weights don't fit its config.
    """
    if args.model_name_or_path is None:
        model = TinyCapForConditionalGeneration(config)
    else:
        saved = copy.deepcopy(config)
        saved.vision_config.image_size = args.configured["image_size"]
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
        resize_position_embeddings(model, config.vision_config.image_size)
        if args.freeze_vision_model:
            model.vision_model.requires_grad_(False)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model
