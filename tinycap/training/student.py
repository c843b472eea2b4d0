"""The model to train: its configuration from a checkpoint or a file, flags, tokenizer and teacher; its weights."""

import argparse
import copy
import logging
from collections.abc import Iterator

import torch
from transformers import GenerationConfig, PretrainedConfig

from tinycap.checks_tinycap import check_generation
from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training.repository import create_image_processor
from tinycap.training.tokenizer import MIN_VOCAB_SIZE, load_tokenizer
from tinycap.training.towers import pixel_statistics


logger = logging.getLogger(__name__)

# Flags that set a field of the configuration: the part that has it (None: the top), and its name there.
CONFIG_FLAGS = {
    "image_size": ("vision_config", "image_size"),
    "patch_dropout": ("vision_config", "patch_dropout"),
    "dropout": ("text_config", "hidden_dropout_prob"),
    **{name: (None, name) for name in ("memory", "memory_noise", "label_smoothing", "distill_weight")},
}
# Without a dataset: a small student whose patches are the cells of a scene.
SCENE_CONFIG = {
    "vision_config": {
        **{"image_size": 96, "patch_size": 32, "projection_dim": 256},
        **{"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384},
    },
    "text_config": {"hidden_size": 128, "intermediate_size": 384, "max_position_embeddings": 48},
}


def build_config(args: argparse.Namespace) -> TinyCapConfig:
    """Builds the config from checkpoint, file and flags; `fit_config` fills in vocabulary and teacher width later.

    Flags that were not given get the configuration's values, so that `args` says what the run does. `args.configured`
    keeps the fields that `fit_config` and `build_model` ask for. Raises `ValueError` where flags contradict it.
    """
    # The defaults leave widths to the teacher and the tokenizer, a user's configuration doesn't.
    fixed = args.model_name_or_path is not None or args.config_name is not None
    default = SCENE_CONFIG if args.dataset_name is None else {}
    values = read_config_values(args) if fixed else copy.deepcopy(default)
    if values.pop("text_encoder_config", None) is not None:
        # It embeds texts where the student embedded images before, from the decoder's token embedding.
        logger.warning("The text encoder is left out: train one for the new weights by tinycap.training.text_encoder.")
    vision, text = values.setdefault("vision_config", {}), values.setdefault("text_config", {})
    saved = TinyCapConfig(**values)
    if args.model_name_or_path is not None and args.memory not in (None, saved.memory):
        raise ValueError(f"--memory: expected {saved.memory}, as --model_name_or_path has, got {args.memory}")
    args.configured = {
        "image_size": saved.vision_config.image_size,
        "vocab_size": text.get("vocab_size") if fixed else None,
        "projection_dim": vision.get("projection_dim") if fixed else None,
    }
    flags = dict(CONFIG_FLAGS)
    if args.freeze_vision_model:
        # The frozen student keeps the weight of its training, and its embeddings are those of inference.
        del flags["distill_weight"]
        vision.update(hidden_dropout_prob=0.0, patch_dropout=0.0)
    for flag, (part, field) in flags.items():
        section = values[part] if part else values
        # A default holds where the configuration says nothing.
        if flag in args.given or (getattr(args, flag) is not None and field not in section):
            section[field] = getattr(args, flag)
    config = TinyCapConfig(**values)
    for flag, (part, field) in flags.items():
        setattr(args, flag, getattr(getattr(config, part) if part else config, field))
    resolve_lengths(args, config)
    for problem in distillation_problems(args):
        raise ValueError(problem)
    return config


def read_config_values(args: argparse.Namespace) -> dict:
    """The fields of `--model_name_or_path`'s or `--config_name`'s configuration; runs no code of a checkpoint."""
    flag = "config_name" if args.model_name_or_path is None else "model_name_or_path"
    source, expected = getattr(args, flag), TinyCapConfig.model_type
    try:
        values, _ = PretrainedConfig.get_config_dict(source)
        # A file of one's own may leave the type out.
        kind = values.get("model_type", expected if flag == "config_name" else None)
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--{flag} {source}: expected a TinyCap's folder, or its config as JSON: {error}") from error
    if kind != expected:
        raise ValueError(f"--{flag} {source}: expected a configuration of model_type {expected!r}, got {kind!r}")
    return values


def resolve_lengths(args: argparse.Namespace, config: TinyCapConfig) -> None:
    """Sets the flags of vocabulary, beam search and caption length that were not given to the checkpoint's values."""
    inherited = {"vocab_size": args.configured["vocab_size"]}
    if args.model_name_or_path is not None:
        try:
            saved = GenerationConfig.from_pretrained(args.model_name_or_path)
            check_generation(vars(saved), "generation_config.json")
            inherited |= {"num_beams": saved.num_beams or 1, "length_penalty": saved.length_penalty or 1.0}
            inherited |= {"max_caption_length": saved.max_new_tokens}
        except OSError:
            # There is none, or it isn't JSON, which loading the model reports.
            pass
        except Exception as error:
            # transformers compares settings of any type.
            raise ValueError(f"--model_name_or_path {args.model_name_or_path}: {error}") from error
    for flag, value in inherited.items():
        if value is not None and flag not in args.given:
            setattr(args, flag, value)
    check_generation({"num_beams": args.num_beams, "length_penalty": args.length_penalty}, "flags or checkpoint")
    if args.num_beams == 1 and "length_penalty" not in args.given:
        args.length_penalty = 1.0
    positions = config.text_config.max_position_embeddings
    if "max_caption_length" not in args.given:
        args.max_caption_length = min(args.max_caption_length, positions)
    if args.max_caption_length > positions:
        raise ValueError(
            f"--max_caption_length: expected at most max_position_embeddings {positions}, got {args.max_caption_length}"
        )


def distillation_problems(args: argparse.Namespace) -> Iterator[str]:
    """A message for each contradiction to `--distill_weight`, given or the configuration's."""
    if args.distill_weight == 0:
        # A frozen student's embeddings are cached like a teacher's.
        names = ("teacher_name_or_path", "mixup", *(() if args.freeze_vision_model else ("teacher_cache_dir",)))
        for name in (*names, "unlabelled_dataset_name", "allow_missing_captions"):
            if getattr(args, name):
                yield f"--{name}: contradicts --distill_weight 0, with which there is no teacher"
        if args.teacher_cache_dir and args.memory == "patches":
            yield "--teacher_cache_dir: contradicts memory patches, of which a cache would hold 197 vectors an image"
    elif args.dataset_name is not None and not args.teacher_name_or_path:
        yield "--teacher_name_or_path: needed with --dataset_name, unless --distill_weight is 0"


def fit_config(args: argparse.Namespace, config: TinyCapConfig, tokenizer, teacher) -> None:
    """Fills the tokenizer's vocabulary and ids and the teacher's width into `config`.

    Raises `ValueError` with both values where they don't fit a configuration that was given.
    """
    limit = config.text_config.vocab_size = args.configured["vocab_size"] or len(tokenizer)
    if len(tokenizer) > limit:
        raise ValueError(
            f"tokenizer: expected at most the configuration's vocab_size of {limit} tokens, got {len(tokenizer)}"
        )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        expected, token = getattr(config, name), getattr(tokenizer, name)
        if args.model_name_or_path is not None and token != expected:
            raise ValueError(
                f"tokenizer of {args.model_name_or_path}: expected {name} {expected}, as its config says, got {token}"
            )
        setattr(config, name, token)
        setattr(config.text_config, name, token)
    config.decoder_start_token_id = tokenizer.bos_token_id
    if teacher is not None:
        config.vision_config.projection_dim = args.configured["projection_dim"] or teacher.embed_dim
        teacher.check_width(config.vision_config.projection_dim)


def load_processors(args: argparse.Namespace, image_size: int):
    """The tokenizer, `None` where one is to be trained, and the image processor; `ValueError` where there is none."""
    name = args.model_name_or_path or args.tokenizer_name
    # Before a teacher is trained for the scenes.
    if name is None and args.vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"--vocab_size: expected at least {MIN_VOCAB_SIZE}, got {args.vocab_size}")
    tokenizer = None if name is None else load_tokenizer(name)
    statistics = pixel_statistics(args.model_name_or_path) if args.model_name_or_path else ()
    if statistics is None:
        raise ValueError(f"--model_name_or_path {name}: expected a preprocessor_config.json that can be read, got none")
    try:
        return tokenizer, create_image_processor(image_size, *statistics)
    except ValueError as error:
        raise ValueError(f"{name}: preprocessor_config.json: {error}") from error


def build_model(args: argparse.Namespace, config: TinyCapConfig) -> TinyCapForConditionalGeneration:
    """A new model with fresh weights, or that of `--model_name_or_path` in float32, at the image size of `config`."""
    name, image_size = args.model_name_or_path, config.vision_config.image_size
    if name is None:
        model = TinyCapForConditionalGeneration(config)
    else:
        saved = copy.deepcopy(config)
        saved.vision_config.image_size = args.configured["image_size"]
        model = TinyCapForConditionalGeneration.from_pretrained(name, config=saved, dtype=torch.float32)
        if image_size != saved.vision_config.image_size:
            resize_position_embeddings(model, image_size)
        model.vision_model.requires_grad_(not args.freeze_vision_model)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


def resize_position_embeddings(model: TinyCapForConditionalGeneration, image_size: int) -> None:
    """Resamples a trained model's position embeddings for square images of `image_size` pixels.

    Training on small images is cheap; a few epochs at the final size suffice (Dosovitskiy et al., 2021, section 3.2).
    """
    embeddings = model.vision_model.embeddings
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
