"""Builds the model's configuration from a checkpoint or a file, the flags, the tokenizer and the teacher."""

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig

from tinycap.configuration_tinycap import TinyCapConfig


# Flags that set a field of the configuration: the part that has it (None: the top), and its name there.
CONFIG_FLAGS = {
    "image_size": ("vision_config", "image_size"),
    "patch_dropout": ("vision_config", "patch_dropout"),
    "dropout": ("text_config", "hidden_dropout_prob"),
    "memory": (None, "memory"),
    "memory_noise": (None, "memory_noise"),
    "label_smoothing": (None, "label_smoothing"),
    "distill_weight": (None, "distill_weight"),
}
# Flags that set a field of the checkpoint's generation configuration: its name there, and the default of `generate`.
GENERATION_FLAGS = {
    "num_beams": ("num_beams", 1),
    "length_penalty": ("length_penalty", 1.0),
    "max_caption_length": ("max_new_tokens", None),
}


# Without a dataset: a small student whose patches are the cells of a scene.
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


def build_config(args: argparse.Namespace) -> TinyCapConfig:
    """Builds the config from checkpoint, file and flags; `fit_config` fills in vocabulary and teacher width later.

    Flags that were not given get the configuration's values, so that `args` says what the run does. `args.configured`
    keeps the fields that `fit_config` and `build_model` ask for.

    Raises:
        ValueError: the configuration can't be read, or it contradicts the flags.
    """
    # The defaults leave widths to the teacher and the tokenizer, a user's configuration doesn't.
    fixed = args.model_name_or_path is not None or args.config_name is not None
    default = SCENE_CONFIG if args.dataset_name is None else {}
    values = read_config_values(args) if fixed else copy.deepcopy(default)
    vision, text = values.setdefault("vision_config", {}), values.setdefault("text_config", {})
    saved = TinyCapConfig(**copy.deepcopy(values))
    if args.model_name_or_path is not None and args.memory not in (None, saved.memory):
        raise ValueError(f"--memory: expected {saved.memory}, as --model_name_or_path has, got {args.memory}")
    args.configured = {
        "image_size": saved.vision_config.image_size,
        "vocab_size": text.get("vocab_size") if fixed else None,
        "projection_dim": vision.get("projection_dim") if fixed else None,
    }
    for flag, (part, field) in CONFIG_FLAGS.items():
        section = values[part] if part else values
        # A default holds where the configuration says nothing.
        if flag in args.given or (getattr(args, flag) is not None and field not in section):
            section[field] = getattr(args, flag)
    if args.freeze_vision_model:
        # The frozen student keeps the weight of its training, and its embeddings are those of inference.
        values["distill_weight"] = saved.distill_weight
        vision.update(hidden_dropout_prob=0.0, patch_dropout=0.0)
    config = TinyCapConfig(**values)
    for flag, (part, field) in CONFIG_FLAGS.items():
        if not (flag == "distill_weight" and args.freeze_vision_model):
            setattr(args, flag, getattr(getattr(config, part) if part else config, field))
    resolve_lengths(args, config)
    for problem in distillation_problems(args):
        raise ValueError(problem)
    return config


def read_config_values(args: argparse.Namespace) -> dict:
    """The fields of `--model_name_or_path`'s or `--config_name`'s configuration; runs no code of a checkpoint."""
    if args.model_name_or_path is not None:
        flag = f"--model_name_or_path {args.model_name_or_path}"
        try:
            values, _ = PretrainedConfig.get_config_dict(args.model_name_or_path)
        except OSError as error:
            raise ValueError(f"{flag}: expected a TinyCap, in a folder or on the Hub: {error}") from error
        if values.get("model_type") != TinyCapConfig.model_type:
            raise ValueError(
                f"{flag}: expected a checkpoint of model_type {TinyCapConfig.model_type!r}, "
                f"got {values.get('model_type')!r}"
            )
        return values
    path = Path(args.config_name)
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--config_name {args.config_name}: expected a TinyCapConfig as JSON: {error}") from error
    kind = values.get("model_type", TinyCapConfig.model_type) if isinstance(values, dict) else type(values).__name__
    if kind != TinyCapConfig.model_type:
        raise ValueError(
            f"--config_name {args.config_name}: expected model_type {TinyCapConfig.model_type!r}, got {kind!r}"
        )
    return values


def resolve_lengths(args: argparse.Namespace, config: TinyCapConfig) -> None:
    """Sets the flags of caption length, vocabulary and beam search that were not given to the checkpoint's values."""
    if args.model_name_or_path is not None:
        try:
            saved = GenerationConfig.from_pretrained(args.model_name_or_path)
        except OSError:
            saved = None
        for flag, (field, default) in GENERATION_FLAGS.items():
            value = None if saved is None else getattr(saved, field, None) or default
            if flag not in args.given and value is not None:
                setattr(args, flag, value)
        if args.num_beams == 1 and "length_penalty" not in args.given:
            args.length_penalty = 1.0
    if "vocab_size" not in args.given and args.configured["vocab_size"] is not None:
        args.vocab_size = args.configured["vocab_size"]
    positions = config.text_config.max_position_embeddings
    if "max_caption_length" not in args.given:
        args.max_caption_length = min(args.max_caption_length, positions)
    if args.max_caption_length > positions:
        raise ValueError(
            f"--max_caption_length: expected at most max_position_embeddings {positions}, got {args.max_caption_length}"
        )


def distillation_problems(args: argparse.Namespace) -> Iterator[str]:
    """A message for each contradiction to `--distill_weight`, given or the configuration's."""
    if args.distill_weight > 0:
        if args.dataset_name is not None and not args.teacher_name_or_path:
            yield "--teacher_name_or_path: needed with --dataset_name, unless --distill_weight is 0"
        return
    for name in ("teacher_name_or_path", "teacher_cache_dir"):
        if getattr(args, name) is not None:
            yield f"--{name}: contradicts --distill_weight 0, with which there is no teacher"
    if args.mixup > 0:
        yield "--mixup: contradicts --distill_weight 0, with which there is no teacher for mixed images"


def fit_config(args: argparse.Namespace, config: TinyCapConfig, tokenizer, teacher) -> None:
    """Fills the tokenizer's vocabulary and ids and the teacher's width into `config`.

    Raises:
        ValueError: they don't fit a configuration that was given; names both values.
    """
    if args.configured["vocab_size"] is None:
        config.text_config.vocab_size = len(tokenizer)
    elif len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"tokenizer: expected at most the configuration's vocab_size of {config.text_config.vocab_size} tokens, "
            f"got {len(tokenizer)}"
        )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if args.model_name_or_path is not None and getattr(config, name) != getattr(tokenizer, name):
            raise ValueError(
                f"tokenizer of {args.model_name_or_path}: expected {name} {getattr(config, name)}, as its config says, "
                f"got {getattr(tokenizer, name)}"
            )
        setattr(config, name, getattr(tokenizer, name))
        setattr(config.text_config, name, getattr(tokenizer, name))
    config.decoder_start_token_id = tokenizer.bos_token_id
    if teacher is not None:
        if args.configured["projection_dim"] is None:
            config.vision_config.projection_dim = teacher.embed_dim
        teacher.check_width(config.vision_config.projection_dim)
