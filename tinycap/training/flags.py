"""The table of flags of both training scripts, grouped by what a person wants to do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import SchedulerType

from tinycap.configuration_tinycap import MEMORIES
from tinycap.training.optimization import MAX_WARMUP_SHARE, OPTIMIZERS
from tinycap.training.teacher import FEATURES


POSITIVE, NOT_NEGATIVE, SHARE = "(0, inf)", "[0, inf)", "[0, 1)"


@dataclass(frozen=True)
class Flag:
    """One flag.

    Args:
        name: without its dashes.
        default: for one's own images; a dict where it differs between the scripts.
        help: what it does; argparse's format, so that a percent sign is `%%`.
        type: of its values; that of the default if `None`. A `bool` becomes a pair of switches.
        choices: the only values it takes.
        range: the interval that its values lie in, as "[0, 1)".
        needs, excludes: conditions that must, or must not, hold where the flag differs from its default, with the
            reason: another flag's name (it differs from its default), or its name and value as "num_beams 1".
        script: "distill" or "teacher", where only one script has it.
    """

    name: str
    default: Any
    help: str
    type: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    range: str | None = None
    needs: Mapping[str, str] = field(default_factory=dict)
    excludes: Mapping[str, str] = field(default_factory=dict)
    script: str | None = None


OWN_IMAGES = {"dataset_name": ""}
NO_TEACHER = {"distill_weight 0": "with which there is no teacher"}
OWN_TOWER = {"image_model_name_or_path": "which brings its own"}
OWN_TEXT_TOWER = {"text_model_name_or_path": "which brings its own"}

GROUPS: dict[str, tuple[Flag, ...]] = {
    "repeat a run": (
        Flag("config_file", None, "YAML file of flags without their dashes; flags given here override it", str),
        Flag("seed", 42, "fixes weights, data order, augmentation and dropout"),
    ),
    "train on your own images": (
        Flag("dataset_name", None, "Hub id, folder of parquet, or imagefolder; drawn scenes if not given", str),
        Flag("dataset_config_name", None, "configuration of the dataset, where it has several", str, needs=OWN_IMAGES),
        Flag("train_split", "train", "split to train on", needs=OWN_IMAGES),
        Flag(
            "validation_split",
            None,
            "split to validate on; 'validation' if there is one, else 5 %% of the training images are held out",
            str,
            needs=OWN_IMAGES,
        ),
        Flag("image_column", None, "column of the images; found by its type if not given", str, needs=OWN_IMAGES),
        Flag(
            "caption_column",
            None,
            "column of strings or lists of strings; found by its name if not given",
            str,
            needs=OWN_IMAGES,
        ),
        Flag("max_train_samples", None, "use only the first so many training images", int, range=POSITIVE),
        Flag("max_eval_samples", None, "use only the first so many validation images", int, range=POSITIVE),
        Flag("on_bad_row", "skip", "what to do with an unusable row", choices=("skip", "error")),
        Flag(
            "streaming",
            False,
            "read the training images while training, without storing them",
            needs={**OWN_IMAGES, "max_train_steps": "the end of the run"},
            script="distill",
        ),
    ),
    "start from a model or choose its sizes (a flag that isn't given never overrules a configuration)": (
        Flag("model_name_or_path", None, "continue from this TinyCap checkpoint", str, script="distill"),
        Flag(
            "config_name",
            None,
            "folder or JSON file of a TinyCapConfig; the seed architecture if not given",
            str,
            excludes={"model_name_or_path": "which brings its own configuration"},
            script="distill",
        ),
        Flag(
            "freeze_vision_model",
            False,
            "train the decoder alone: the student's weights stay as they are",
            needs={
                "model_name_or_path": "a trained student",
                "distill_weight 0": "a frozen student can't be distilled",
            },
            script="distill",
        ),
        Flag(
            "memory",
            None,
            "what the decoder attends to; as the config says if not given",
            str,
            MEMORIES,
            script="distill",
        ),
        Flag(
            "image_model_name_or_path",
            None,
            "a pretrained image classifier of any architecture to start the image tower from, with a new head; a CLIP "
            "image tower with fresh weights if not given",
            str,
            needs={"text_model_name_or_path": "a sentence encoder to learn against"},
            script="teacher",
        ),
        Flag(
            "freeze_image_model",
            False,
            "train only the pretrained image model's new head",
            needs={"image_model_name_or_path": ""},
            script="teacher",
        ),
        Flag(
            "text_model_name_or_path",
            None,
            "a frozen sentence encoder to learn against; a text tower is trained if not given",
            str,
            script="teacher",
        ),
        Flag(
            "image_size",
            {"distill": None, "teacher": 224},
            "side of the images in pixels; as the config says if not given",
            int,
            range=POSITIVE,
        ),
        Flag("patch_size", 32, "side of a patch in pixels", range=POSITIVE, excludes=OWN_TOWER, script="teacher"),
        *(
            Flag(name, default, help, range=POSITIVE, excludes=excludes, script="teacher")
            for name, default, help, excludes in (
                ("hidden_size", 256, "width of the image tower", OWN_TOWER),
                ("num_hidden_layers", 6, "layers of the image tower", OWN_TOWER),
                ("num_attention_heads", 4, "heads of the image tower", OWN_TOWER),
                ("text_hidden_size", 256, "width of the text tower", OWN_TEXT_TOWER),
                ("text_num_hidden_layers", 3, "layers of the text tower", OWN_TEXT_TOWER),
                ("text_num_attention_heads", 4, "heads of the text tower", OWN_TEXT_TOWER),
                ("projection_dim", 512, "width of the joint image-text space", {}),
            )
        ),
        Flag(
            "tokenizer_name",
            None,
            "a pretrained tokenizer; one is trained on the captions if not given",
            str,
            excludes={"model_name_or_path": "which brings its own tokenizer", **OWN_TEXT_TOWER},
        ),
        Flag("vocab_size", 8192, "tokens of the tokenizer trained on the captions"),
        Flag("max_caption_length", 32, "tokens of a caption, the end token included", range="[2, inf)"),
    ),
    "learn from a teacher": (
        Flag(
            "teacher_name_or_path",
            None,
            "a CLIP vision model, such as openai/clip-vit-base-patch32, or a model trained by train_teacher.py",
            str,
            excludes=NO_TEACHER,
            script="distill",
        ),
        Flag(
            "teacher_feature",
            "pooled",
            "the target: the pooled output before the visual projection, or image_embeds after it",
            choices=FEATURES,
            script="distill",
        ),
        Flag(
            "distill_weight",
            1.0,
            "weight of the distillation loss; 0: no teacher",
            range=NOT_NEGATIVE,
            script="distill",
        ),
        Flag(
            "teacher_cache_dir",
            None,
            "folder for the teacher's embeddings, computed once for all runs; computed in every step if not given",
            str,
            excludes={"streaming": "whose images are not stored", **NO_TEACHER},
            script="distill",
        ),
        Flag(
            "teacher_views",
            8,
            "differently cropped views of an image in the cache",
            range=POSITIVE,
            needs={"teacher_cache_dir": ""},
            script="distill",
        ),
        Flag(
            "mixup",
            0.0,
            "share of images blended with another one, which train the distillation and have no captions",
            range=SHARE,
            excludes={
                "streaming": "which has no other image to blend with",
                "objective scst": "whose reward needs the captions of every image",
                **NO_TEACHER,
            },
            script="distill",
        ),
    ),
    "choose the caption objective": (
        Flag(
            "objective",
            "cross_entropy",
            "caption objective; scst: the CIDEr of sampled captions, for a model that captions already",
            choices=("cross_entropy", "scst"),
            needs={"model_name_or_path": "a model whose captions are worth comparing"},
            excludes={"streaming": "since CIDEr counts the words of all captions"},
            script="distill",
        ),
        Flag("scst_samples", 5, "captions sampled for an image with scst", range="[2, inf)", script="distill"),
        Flag(
            "label_smoothing",
            0.0,
            "label smoothing of the caption loss",
            range=SHARE,
            excludes={"objective scst": "whose loss has no labels to smooth"},
            script="distill",
        ),
        Flag("captions_per_image", {"distill": 5, "teacher": 1}, "captions of an image in a step", range=POSITIVE),
    ),
    "train longer or at another rate": (
        Flag("num_train_epochs", 20.0, "passes over the images", range=POSITIVE),
        Flag("max_train_steps", None, "optimizer steps; in place of --num_train_epochs", int, range=POSITIVE),
        Flag("learning_rate", 1e-3, "peak learning rate", range=POSITIVE),
        Flag(
            "lr_scheduler_type",
            "cosine",
            "schedule of the learning rate",
            choices=tuple(kind.value for kind in SchedulerType),
        ),
        Flag(
            "num_warmup_steps",
            200,
            f"optimizer steps of rising learning rate; if not given, at most {MAX_WARMUP_SHARE:.0%}% of all",
            range=NOT_NEGATIVE,
        ),
        Flag(
            "patch_learning_rate_scale",
            1.0,
            "learning rate of the patch embedding over that of the rest; below 1 where patches are large",
            range=POSITIVE,
        ),
        Flag(
            "optimizer",
            "adamw",
            "optimizer of the weight matrices; muon learns more from a step, which takes longer: for large batches",
            choices=OPTIMIZERS,
            script="distill",
        ),
        Flag("max_grad_norm", 1.0, "gradients are scaled down to this norm; 0: never", range=NOT_NEGATIVE),
    ),
    "regularise and augment": (
        Flag("weight_decay", {"distill": 0.05, "teacher": 0.1}, "decay of the weight matrices", range=NOT_NEGATIVE),
        Flag("dropout", 0.1, "dropout of the decoder's embeddings and sublayers", range=SHARE, script="distill"),
        Flag(
            "attention_dropout",
            0.0,
            "dropout of the attention weights",
            range=SHARE,
            excludes=OWN_TOWER,
            script="teacher",
        ),
        Flag(
            "patch_dropout",
            0.0,
            "share of an image's patches left out of a training step",
            range=SHARE,
            excludes={"freeze_vision_model": "whose embeddings must be those of inference"},
            script="distill",
        ),
        Flag(
            "memory_noise",
            0.0,
            "norm of the noise that training adds to the embedding (of norm 1) that the decoder attends to",
            range=NOT_NEGATIVE,
            script="distill",
        ),
        Flag("crop_scale", 0.5, "smallest share of an image that a crop keeps; 1: all", range="(0, 1]"),
        Flag("horizontal_flip", True, "mirror half of the images"),
        Flag("color_jitter", 0.2, "largest relative change of the colours", range=SHARE),
    ),
    "fit the machine": (
        Flag(
            "per_device_train_batch_size",
            {"distill": 64, "teacher": 256},
            "images in a device's batch",
            range=POSITIVE,
        ),
        Flag("per_device_eval_batch_size", 64, "images in a device's validation batch", range=POSITIVE),
        Flag("gradient_accumulation_steps", 1, "batches in an optimizer step", range=POSITIVE),
        Flag("gradient_checkpointing", False, "less memory, more time", script="distill"),
        Flag("mixed_precision", None, "as accelerate is configured if not given", str, choices=("no", "fp16", "bf16")),
        Flag("dataloader_num_workers", 1, "processes that prepare batches", range=NOT_NEGATIVE),
        Flag(
            "preprocessing_num_workers",
            None,
            "processes that decode the images once; one if not given",
            int,
            range="[1, inf)",
        ),
    ),
    "follow and validate the run": (
        Flag("logging_steps", 10, "steps between rows of metrics.jsonl", range=POSITIVE),
        Flag("evaluation_steps", None, "steps between validations; only at the end if not given", int, range=POSITIVE),
        Flag("num_beams", 3, "beams of validation and of the saved model", range=POSITIVE, script="distill"),
        Flag(
            "length_penalty",
            1.0,
            "beam search ranks captions by log-probability / length ** this: above 0, it favours longer ones",
            excludes={"num_beams 1": "which has no captions to rank"},
            script="distill",
        ),
        Flag(
            "load_best_model_at_end",
            False,
            "save the weights of the best CIDEr, not the last",
            needs={"evaluation_steps": "validations to choose from"},
            script="distill",
        ),
        Flag("report_to", "none", "accelerate's trackers: none, all, tensorboard, wandb, ..."),
    ),
    "save, resume and share": (
        Flag(
            "output_dir",
            {"distill": "outputs/tinycap", "teacher": "outputs/teacher"},
            "where the model and its reports go",
        ),
        Flag(
            "overwrite_output_dir",
            False,
            "clear what an earlier run left there",
            excludes={"resume_from_checkpoint": ""},
        ),
        Flag("checkpointing_steps", None, "steps between checkpoints; once an epoch if not given", int, range=POSITIVE),
        Flag("checkpoints_total_limit", 2, "newest checkpoints to keep", range=POSITIVE),
        Flag("resume_from_checkpoint", None, "a checkpoint folder, or 'latest'", str),
        Flag("push_to_hub", False, "upload the result", script="distill"),
        Flag(
            "hub_model_id",
            None,
            "repository to upload to; the output folder's name if not given",
            str,
            needs={"push_to_hub": ""},
            script="distill",
        ),
    ),
}

# Without --dataset_name: by script. For the student, ten minutes of two CPU cores.
SCENE_DEFAULTS = {
    "distill": {
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
    },
    "teacher": {
        "max_train_samples": 12000,
        "max_eval_samples": 500,
        "image_size": 96,
        "patch_size": 32,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": 256,
        "text_hidden_size": 128,
        "text_num_hidden_layers": 2,
        "text_num_attention_heads": 4,
        "vocab_size": 512,
        "max_caption_length": 40,
        "per_device_train_batch_size": 128,
        "learning_rate": 1e-3,
        "patch_learning_rate_scale": 0.1,
        "num_train_epochs": 4.0,
        "num_warmup_steps": 50,
        "crop_scale": 1.0,
        "horizontal_flip": False,
        "color_jitter": 0.0,
    },
}
