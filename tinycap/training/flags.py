"""The table of flags of both training scripts, grouped by what a person wants to do, and what contradicts what."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate.utils import LoggerType
from transformers import SchedulerType

from tinycap.configuration_tinycap import MEMORIES
from tinycap.training.optimization import MAX_WARMUP_SHARE, OPTIMIZERS
from tinycap.training.teacher import FEATURES


@dataclass(frozen=True)
class Flag:
    """One flag, by its name without dashes, with its help in argparse's format.

    Args:
        default: for one's own images; a dict where it differs between the scripts. A `bool` makes a pair of switches.
        allowed: a tuple of choices, or an interval such as "[0, 1)".
        script: "distill" or "teacher", where only one script has it.
        several: takes a list of values.
    """

    name: str
    default: Any
    help: str
    allowed: tuple[str, ...] | str | None = None
    script: str | None = None
    several: bool = False

    def default_of(self, script: str) -> Any:
        return self.default[script] if isinstance(self.default, dict) else self.default

    @property
    def type(self) -> type:
        """That of the default; without one, `float` for a `PROPER_SHARE`, `int` for another number."""
        default = self.default_of("teacher")
        if default is not None:
            return type(default)
        return float if self.allowed == PROPER_SHARE else int if isinstance(self.allowed, str) else str


DistillFlag, TeacherFlag = partial(Flag, script="distill"), partial(Flag, script="teacher")
POSITIVE, NOT_NEGATIVE, SHARE, PROPER_SHARE = "(0, inf)", "[0, inf)", "[0, 1)", "(0, 1)"
SCHEDULES = tuple(kind.value for kind in SchedulerType)

GROUPS: dict[str, tuple[Flag, ...]] = {
    "repeat a run": (
        Flag("config_file", None, "YAML file of flags without their dashes; flags given here override it"),
        Flag("seed", 42, "fixes weights, data order, augmentation and dropout"),
    ),
    "train on your own images": (
        Flag("dataset_name", None, "Hub id, folder of parquet, or imagefolder; drawn scenes if not given"),
        Flag("dataset_config_name", None, "configuration of the dataset, where it has several"),
        Flag("train_split", "train", "split to train on"),
        Flag("validation_split", None, "if not given: 'validation', or 5 %% of the training images are held out"),
        Flag("image_column", None, "column of the images; found by its type if not given"),
        Flag("caption_column", None, "column of strings or lists of strings; found by its name if not given"),
        Flag("max_train_samples", None, "use only the first so many training images", POSITIVE),
        Flag("max_eval_samples", None, "use only the first so many validation images", POSITIVE),
        Flag("allow_remote_images", False, "open URLs and files outside the data set's folder that its rows name"),
        Flag("on_bad_row", "skip", "what to do with an unusable row", ("skip", "error")),
        DistillFlag("streaming", False, "read the training images while training, without storing them"),
    ),
    "add images without captions, which teach the student alone": (
        DistillFlag("unlabelled_dataset_name", None, "more images: Hub id, folder of shards or of image files"),
        DistillFlag("unlabelled_split", "train", "split of these"),
        DistillFlag("unlabelled_share", None, "their share of a batch; all of them in each epoch else", PROPER_SHARE),
        DistillFlag("allow_missing_captions", False, "keep the training images that have no captions"),
    ),
    "start from a model or choose its sizes (a flag that isn't given never overrules a configuration)": (
        DistillFlag("model_name_or_path", None, "continue from this TinyCap checkpoint"),
        DistillFlag("config_name", None, "folder or JSON of a TinyCapConfig; the seed architecture if not given"),
        DistillFlag("freeze_vision_model", False, "train the decoder alone: the student's weights stay as they are"),
        DistillFlag("memory", None, "what the decoder attends to; as the config says if not given", MEMORIES),
        DistillFlag("image_size", None, "side of the images in pixels; as the config says if not given", POSITIVE),
        TeacherFlag(
            "image_model_name_or_path", None, "pretrained classifiers, or a captioner; else a new tower", several=True
        ),
        TeacherFlag(
            "freeze_image_model", False, "train only a linear head on their features; on a captioner's, only texts"
        ),
        TeacherFlag("feature_views", 8, "crops of an image whose features are computed, once", POSITIVE),
        TeacherFlag("feature_cache_dir", None, "store features here; in the output folder if not given"),
        TeacherFlag("text_model_name_or_path", None, "frozen sentence encoder to learn against; a new text tower else"),
        TeacherFlag("image_size", 224, "side of the images in pixels; a pretrained model's own", POSITIVE),
        TeacherFlag("patch_size", 32, "side of a patch in pixels", POSITIVE),
        TeacherFlag("hidden_size", 256, "width of the image tower", POSITIVE),
        TeacherFlag("num_hidden_layers", 6, "layers of the image tower", POSITIVE),
        TeacherFlag("num_attention_heads", 4, "heads of the image tower", POSITIVE),
        TeacherFlag("text_hidden_size", 256, "width of the text tower", POSITIVE),
        TeacherFlag("text_num_hidden_layers", 3, "layers of the text tower", POSITIVE),
        TeacherFlag("text_num_attention_heads", 4, "heads of the text tower", POSITIVE),
        TeacherFlag("projection_dim", 512, "width of the joint image-text space", POSITIVE),
        Flag("tokenizer_name", None, "a pretrained tokenizer; one is trained on the captions if not given"),
        Flag("vocab_size", 8192, "tokens of the tokenizer trained on the captions"),
        Flag("max_caption_length", 32, "tokens of a caption, the end token included", "[2, inf)"),
    ),
    "learn from a teacher": (
        DistillFlag("teacher_name_or_path", None, "a CLIP vision model: Hub id, folder, or output of train_teacher.py"),
        DistillFlag("teacher_feature", "pooled", "target: before the visual projection, or image_embeds", FEATURES),
        DistillFlag("distill_weight", 1.0, "weight of the distillation loss; 0: no teacher", NOT_NEGATIVE),
        DistillFlag(
            "teacher_cache_dir", None, "store a teacher's or frozen student's embeddings here; else asked in each step"
        ),
        DistillFlag("teacher_views", 8, "differently cropped views of an image in the cache", POSITIVE),
        DistillFlag("mixup", 0.0, "share of images mixed with another, trained by distillation alone", SHARE),
        DistillFlag("cutmix", 0.0, "share of those with a box of the other image in place of a blend", "[0, 1]"),
    ),
    "choose the caption objective": (
        DistillFlag("objective", "cross_entropy", "scst: the CIDEr of sampled captions", ("cross_entropy", "scst")),
        DistillFlag("scst_samples", 5, "captions sampled for an image with scst", "[2, inf)"),
        DistillFlag("cross_entropy_weight", 0.0, "weight of the human captions' loss with scst", NOT_NEGATIVE),
        DistillFlag("label_smoothing", 0.0, "label smoothing of the caption loss", SHARE),
        Flag("captions_per_image", {"distill": 5, "teacher": 1}, "captions of an image in a step", POSITIVE),
    ),
    "train longer or at another rate": (
        Flag("num_train_epochs", 20.0, "passes over the images", POSITIVE),
        Flag("max_train_steps", None, "optimizer steps; in place of --num_train_epochs", POSITIVE),
        Flag("learning_rate", 1e-3, "peak learning rate", POSITIVE),
        Flag("lr_scheduler_type", "cosine", "schedule of the learning rate", SCHEDULES),
        Flag("num_warmup_steps", 200, f"if not given, at most {MAX_WARMUP_SHARE:.0%}% of the steps", NOT_NEGATIVE),
        Flag("patch_learning_rate_scale", 1.0, "rate of the patch embedding over that of the rest", POSITIVE),
        DistillFlag("optimizer", "adamw", "muon: slower steps that learn more, for large batches", OPTIMIZERS),
        Flag("max_grad_norm", 1.0, "gradients are scaled down to this norm; 0: never", NOT_NEGATIVE),
    ),
    "regularise and augment": (
        Flag("weight_decay", {"distill": 0.05, "teacher": 0.1}, "decay of the weight matrices", NOT_NEGATIVE),
        DistillFlag("dropout", 0.1, "dropout of the decoder's embeddings and sublayers", SHARE),
        TeacherFlag("attention_dropout", 0.0, "dropout of the attention weights", SHARE),
        TeacherFlag("feature_dropout", 0.2, "dropout of the features of frozen image models", SHARE),
        DistillFlag("patch_dropout", 0.0, "share of an image's patches left out of a training step", SHARE),
        DistillFlag("memory_noise", 0.0, "norm of the noise on the embedding, of norm 1, in training", NOT_NEGATIVE),
        Flag("crop_scale", 0.5, "smallest share of an image that a crop keeps; 1: all", "(0, 1]"),
        Flag("horizontal_flip", True, "mirror half of the images"),
        Flag("color_jitter", 0.2, "largest relative change of the colours", SHARE),
    ),
    "fit the machine": (
        Flag("per_device_train_batch_size", {"distill": 64, "teacher": 256}, "images in a device's batch", POSITIVE),
        Flag("per_device_eval_batch_size", 64, "images in a device's validation batch", POSITIVE),
        Flag("gradient_accumulation_steps", 1, "batches in an optimizer step", POSITIVE),
        DistillFlag("gradient_checkpointing", False, "less memory, more time"),
        Flag("mixed_precision", None, "as accelerate is configured if not given", ("no", "fp16", "bf16")),
        Flag("dataloader_num_workers", 1, "processes that prepare batches", NOT_NEGATIVE),
        Flag("preprocessing_num_workers", None, "processes that decode the images once; one if not given", "[1, inf)"),
    ),
    "follow and validate the run": (
        Flag("logging_steps", 10, "steps between rows of metrics.jsonl", POSITIVE),
        Flag("evaluation_steps", None, "steps between validations; only at the end if not given", POSITIVE),
        DistillFlag("num_beams", 3, "beams of validation and of the saved model", POSITIVE),
        DistillFlag("length_penalty", 1.0, "beams rank by log-probability / length ** this: above 0, longer ones win"),
        DistillFlag("load_best_model_at_end", False, "save the weights of the best CIDEr, not the last"),
        Flag("report_to", "none", "accelerate's trackers", ("none", *map(str, LoggerType))),
    ),
    "save, resume and share": (
        Flag("output_dir", {"distill": "outputs/tinycap", "teacher": "outputs/teacher"}, "where model and reports go"),
        Flag("overwrite_output_dir", False, "clear what an earlier run left there"),
        Flag("checkpointing_steps", None, "steps between checkpoints; once an epoch if not given", POSITIVE),
        Flag("checkpoints_total_limit", 2, "newest checkpoints to keep", POSITIVE),
        Flag("resume_from_checkpoint", None, "a checkpoint folder, or 'latest'"),
        DistillFlag("push_to_hub", False, "upload the result"),
        DistillFlag("hub_model_id", None, "repository to upload to; the output folder's name if not given"),
    ),
}

# A condition that needs or contradicts another one, and why. A condition is the name of a flag, which then differs from
# its default, or a name with a value.
DATA_FLAGS = ("dataset_config_name", "train_split", "validation_split", "image_column", "caption_column", "streaming")
DATA_FLAGS += ("allow_remote_images", "unlabelled_dataset_name", "allow_missing_captions")
IMAGE_TOWER = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "attention_dropout")
TEXT_TOWER = ("text_hidden_size", "text_num_hidden_layers", "text_num_attention_heads", "tokenizer_name")
RULES = (
    *((name, "needs", "dataset_name", "") for name in DATA_FLAGS),
    ("streaming", "needs", "max_train_steps", "the end of the run"),
    ("freeze_vision_model", "needs", "model_name_or_path", "a trained student"),
    ("freeze_vision_model", "needs", "distill_weight 0", "since a frozen student can't be distilled"),
    ("freeze_image_model", "needs", "image_model_name_or_path", ""),
    *((name, "needs", "freeze_image_model", "") for name in ("feature_views", "feature_cache_dir", "feature_dropout")),
    ("image_model_name_or_path", "needs", "text_model_name_or_path", "a sentence encoder to learn against"),
    ("teacher_views", "needs", "teacher_cache_dir", ""),
    ("unlabelled_split", "needs", "unlabelled_dataset_name", ""),
    ("objective scst", "needs", "model_name_or_path", "a model whose captions are worth comparing"),
    ("cross_entropy_weight", "needs", "objective scst", "beside whose reward it counts"),
    ("load_best_model_at_end", "needs", "evaluation_steps", "validations to choose from"),
    ("hub_model_id", "needs", "push_to_hub", ""),
    ("config_name", "contradicts", "model_name_or_path", "which brings its own configuration"),
    ("tokenizer_name", "contradicts", "model_name_or_path", "which brings its own tokenizer"),
    *((name, "contradicts", "image_model_name_or_path", "which brings its own") for name in IMAGE_TOWER),
    *((name, "contradicts", "text_model_name_or_path", "which brings its own") for name in TEXT_TOWER),
    ("teacher_cache_dir", "contradicts", "streaming", "whose images are not stored"),
    ("mixup", "contradicts", "objective scst", "whose reward needs the captions of every image"),
    ("cutmix", "needs", "mixup", "the share of mixed images"),
    ("unlabelled_dataset_name", "contradicts", "objective scst", "whose reward needs the captions of every image"),
    ("allow_missing_captions", "contradicts", "objective scst", "whose reward needs the captions of every image"),
    ("label_smoothing", "contradicts", "objective scst", "whose loss has no labels to smooth"),
    ("streaming", "contradicts", "objective scst", "whose CIDEr counts the words of all captions"),
    ("patch_dropout", "contradicts", "freeze_vision_model", "whose embeddings must be those of inference"),
    ("length_penalty", "contradicts", "num_beams 1", "which has no captions to rank"),
    ("overwrite_output_dir", "contradicts", "resume_from_checkpoint", ""),
)

# Without --dataset_name: by script. For the student, ten minutes of two CPU cores.
SCENES = {
    **{"max_train_samples": 12000, "max_eval_samples": 500, "vocab_size": 512, "max_caption_length": 40},
    **{"learning_rate": 1e-3, "patch_learning_rate_scale": 0.1},
    **{"crop_scale": 1.0, "horizontal_flip": False, "color_jitter": 0.0},
}
SCENE_DEFAULTS = {
    "distill": {
        **{"per_device_train_batch_size": 32, "captions_per_image": 1, "num_train_epochs": 10.0, "dropout": 0.0},
        **{"num_warmup_steps": 100, **SCENES},
    },
    "teacher": {
        **{"image_size": 96, "patch_size": 32, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
        **{"text_hidden_size": 128, "text_num_hidden_layers": 2, "text_num_attention_heads": 4, "projection_dim": 256},
        **{"per_device_train_batch_size": 128, "num_train_epochs": 4.0, "num_warmup_steps": 50, **SCENES},
    },
}
