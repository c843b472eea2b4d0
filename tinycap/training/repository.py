"""Writes a complete model repository: a folder that loads from anywhere."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tinycap import REPOSITORY
from tinycap.checks_tinycap import check_pixels
from tinycap.commands import first_line
from tinycap.confidence_tinycap import CONFIDENCE_NAME
from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.pipeline_tinycap import check_image_processor


try:
    # On Pillow. By the other name, transformers 5.4 and later ask for torchvision on the screen.
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

# A generic class of transformers that joins an image processor and a tokenizer, so that AutoProcessor needs no remote
# code.
PROCESSOR_CLASS = "GitProcessor"


def create_image_processor(
    image_size: int, image_mean: Sequence[float] = OPENAI_CLIP_MEAN, image_std: Sequence[float] = OPENAI_CLIP_STD
) -> CLIPImageProcessor:
    """CLIP's preprocessing at `image_size`: shorter side resized, middle square kept, pixels normalised by channel."""
    settings = {
        **{"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}},
        **{"image_mean": list(image_mean), "image_std": list(image_std), "rescale_factor": 1 / 255},
    }
    check_pixels(settings, image_size, len(OPENAI_CLIP_MEAN), "image processor")
    return CLIPImageProcessor(**settings)


def create_generation_config(
    tokenizer: PreTrainedTokenizerFast, max_new_tokens: int, num_beams: int = 1, length_penalty: float = 1.0
) -> GenerationConfig:
    """The saved model's default decoding; beams are ranked by log-probability / length ** `length_penalty`."""
    return GenerationConfig(
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        decoder_start_token_id=tokenizer.bos_token_id,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        # transformers rejects length_penalty with num_beams=1.
        **({"length_penalty": length_penalty} if num_beams > 1 and length_penalty != 1.0 else {}),
    )


def load_repository(
    name_or_path: str, source: str = "model"
) -> tuple[TinyCapForConditionalGeneration, PreTrainedTokenizerFast, Any]:
    """A TinyCap, its tokenizer and its image processor, by this package's own classes: runs no code of the repository.

    Raises:
        ValueError: it doesn't exist, isn't a TinyCap, or a part of it is missing or can't be read; names it, after its
            `source`.
    """
    try:
        model_type = TinyCapConfig.get_config_dict(name_or_path)[0].get("model_type")
        if model_type != TinyCapConfig.model_type:
            raise ValueError(f"expected model_type {TinyCapConfig.model_type}, got {model_type}")
        model = TinyCapForConditionalGeneration.from_pretrained(name_or_path)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name_or_path)
        image_processor = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False)
        check_image_processor(model, image_processor)
        return model, tokenizer, image_processor
    except Exception as error:
        # transformers and `tokenizers` raise errors of many types on malformed files.
        where = "" if Path(name_or_path).is_dir() else "no such folder, and from the Hub: "
        raise ValueError(f"{source} {name_or_path}: {where}{first_line(error)}") from error


def weights_sha256(folder: str | Path) -> str | None:
    """The digest of a local model's weights, which identifies its calibration; `None` for a model on the Hub."""
    path = Path(folder) / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def save_repository(
    output_dir: str | Path,
    model: TinyCapForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    image_processor: CLIPImageProcessor,
) -> None:
    """Writes weights, configs, code, tokenizer and processor to `output_dir`; deletes a calibration of other weights.

    Raises:
        ValueError: `output_dir` is the folder that the code itself was loaded from.
    """
    output_dir = Path(output_dir)
    if output_dir.resolve() == REPOSITORY:
        raise ValueError(f"output_dir: expected a folder other than the code's own, got {output_dir}")
    output_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output_dir)
    # Was fitted to the weights that were here.
    (output_dir / CONFIDENCE_NAME).unlink(missing_ok=True)
    save_processors(output_dir, tokenizer, image_processor, PROCESSOR_CLASS)
    # safetensors writes files that only their owner can read.
    (output_dir / "model.safetensors").chmod(0o644)


def save_processors(
    output_dir: Path, tokenizer: PreTrainedTokenizerFast, image_processor: CLIPImageProcessor, processor_class: str
) -> None:
    """Writes tokenizer and image processor so that `AutoProcessor` joins them as `processor_class`."""
    tokenizer.save_pretrained(output_dir)
    image_processor.save_pretrained(output_dir)
    changes = {
        # transformers 5 writes a class name that transformers 4 lacks; this one loads in both.
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"},
        "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"},
    }
    for name, values in changes.items():
        path = output_dir / name
        content = {**json.loads(path.read_text(encoding="utf-8")), **values, "processor_class": processor_class}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
