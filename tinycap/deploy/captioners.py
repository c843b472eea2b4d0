"""Captions and embeddings of many images by PyTorch or by ONNX Runtime.

A captioner takes paths or addresses and yields an `ImageResult` for each, in order: `captioner(images)` captions
them, `captioner.embed(images)` embeds them. Each library is imported only when its captioner is created.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinycap import REPOSITORY
from tinycap.checks_tinycap import check_generation
from tinycap.commands import first_line
from tinycap.confidence_tinycap import ConfidenceCalibration
from tinycap.deploy.inputs import run_batches


NO_TEXTS = "expected a checkpoint with a text encoder, got one without; docs/search.md says how to train it"
# In an exported folder's `onnx`, beside the graphs.
VISUAL_PROJECTION = "visual_projection.npy"


def check_model(model: str) -> str:
    """Returns `model`; `ValueError` unless it is a folder or a valid Hub name. Imports no large library."""
    if not os.path.isdir(model) and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model):
        raise ValueError(f"--model {model}: no such folder")
    return model


def extra_missing(reason: str, extra: str, error: ImportError) -> ImportError:
    """An error with the command that installs one of this package's extras, in a clone or by name."""
    is_clone = (REPOSITORY / "pyproject.toml").is_file()
    command = f'pip install -e ".[{extra}]"' if is_clone else f'pip install "tinycap[{extra}]"'
    return ImportError(f"{reason}: {command} ({error})")


@dataclass
class ImageResult:
    """The result for one image: captions, best first, with the first one's confidence if requested; or an embedding,
    (D,) float32 with unit norm; or the error of an unreadable image."""

    image: str
    captions: list[str] = field(default_factory=list)
    confidence: float | None = None
    error: str | None = None
    embedding: Any = None


@dataclass(frozen=True)
class CaptionOptions:
    """The captioner's options, named as in `tinycap caption`; `None` is the model's or the library's default."""

    model: str
    batch_size: int = 8
    num_beams: int | None = None
    num_captions: int = 1
    max_new_tokens: int | None = None
    confidence: bool = False
    device: str | None = None
    quantized: bool = False
    num_threads: int | None = None
    num_workers: int = 0

    def generation(self) -> dict[str, int]:
        """The given arguments of `generate()`."""
        given = {"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens}
        given = {name: value for name, value in given.items() if value is not None}
        # Given even if it is 1: a model's own default would be other rows than asked for.
        return {**given, "num_return_sequences": self.num_captions}

    def resolve_num_beams(self, models_num_beams: int | None) -> int:
        """The number of beams; `ValueError` if more captions than beams are requested, or more than memory holds."""
        check_generation(self.generation(), "arguments")
        num_beams = self.num_beams or models_num_beams or 1
        if self.num_captions > num_beams:
            raise ValueError(
                f"--num-captions: expected at most as many as there are beams ({num_beams}), got {self.num_captions}"
            )
        return num_beams


class Captioner:
    """The captioners' base class.

    `embed_texts(texts)` embeds N texts to (N, D) float32 of unit norm; `ValueError` without a text encoder.
    `tokens(text)` is how a text is spelled.
    `fingerprint()` tells embeddings of this checkpoint and library from others.
    """

    # Tokens of a text; `None` without a text encoder.
    max_text_length: int | None = None
    # (D, width of the image embedding), where texts are embedded elsewhere.
    visual_projection: Any = None

    def _run(self, run: Callable[[list], Iterable[dict]], images: Sequence[str]) -> Iterator[ImageResult]:
        """An `ImageResult` for each image, with the fields that `run` gives for each opened image of a batch."""
        for image, found in run_batches(run, images, self.options.batch_size, self.options.num_workers):
            yield ImageResult(image, **({"error": str(found)} if isinstance(found, Exception) else found))

    def embed(self, images: Sequence[str]) -> Iterator[ImageResult]:
        """Embeds images by the student, (projection_dim,) each."""
        return self._run(lambda batch: ({"embedding": row} for row in self.embed_batch(batch)), images)

    def embed_for_texts(self, images: Sequence[str]) -> Iterator[ImageResult]:
        """Embeds images where texts are, (D,) each; see `project_for_texts` of the model."""
        for result in self.embed(images):
            if self.visual_projection is not None and result.error is None:
                result.embedding = self.visual_projection @ result.embedding
                result.embedding /= (result.embedding**2).sum() ** 0.5
            yield result


class TorchCaptioner(Captioner):
    """The `image-to-text` pipeline.

    Raises `ValueError` where the model can't be loaded, has no `confidence.json` if confidence is requested, or the
    device isn't available.
    """

    def __init__(self, options: CaptionOptions):
        import torch
        from transformers import logging

        from tinycap.pipeline_tinycap import ImageToTextPipeline
        from tinycap.training.repository import load_repository
        from tinycap.workers import start_worker

        self.options = options
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            # AssertionError: PyTorch was built without this device.
            raise ValueError(f"--device {device}: {first_line(error)}") from error
        # The command line has a progress bar of its own.
        logging.disable_progress_bar()
        model, tokenizer, processor = load_repository(options.model, "--model")
        options.resolve_num_beams(model.generation_config.num_beams)
        self.pipeline = ImageToTextPipeline(
            model=model, tokenizer=tokenizer, image_processor=processor, device=torch.device(device)
        )
        self.pipeline.worker_init_fn = start_worker
        self.arguments = {"batch_size": options.batch_size, "num_workers": options.num_workers, **options.generation()}
        if model.config.text_encoder_config is not None:
            self.max_text_length = model.config.text_encoder_config.max_position_embeddings
        if hasattr(model, "visual_projection"):
            self.visual_projection = model.visual_projection.weight.detach().float().cpu().numpy()
        if options.confidence:
            self.arguments["return_confidence"] = True
            self.pipeline.calibration  # noqa: B018 - fails before the first image if there is none

    def __call__(self, images: Sequence[str]) -> Iterator[ImageResult]:
        from transformers.pipelines.pt_utils import KeyDataset

        # The pipeline streams a data set; a list is captioned completely before it returns.
        rows = KeyDataset([{"image": image} for image in images], "image")
        try:
            for image, entries in zip(images, self.pipeline(rows, **self.arguments) if images else ()):
                captions = [entry["generated_text"] for entry in entries if "error" not in entry]
                yield ImageResult(image, captions, entries[0].get("confidence"), entries[0].get("error"))
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise OSError(f"--num-workers: expected processes that work to the end: {first_line(error)}") from error

    def embed_batch(self, images: list) -> Any:
        import torch

        from tinycap.processing_tinycap import preprocess_images

        model = self.pipeline.model
        with torch.inference_mode():
            pixel_values = preprocess_images(self.pipeline.image_processor, images).to(model.device, model.dtype)
            return model.get_image_features(pixel_values).pooler_output.float().cpu().numpy()

    def embed_texts(self, texts: list[str]) -> Any:
        import torch

        model, tokenizer = self.pipeline.model, self.pipeline.tokenizer
        if self.max_text_length is None:
            raise ValueError(f"--model {self.options.model}: {NO_TEXTS}")
        options = {"padding": True, "truncation": True, "max_length": self.max_text_length}
        with torch.inference_mode():
            inputs = tokenizer(texts, **options, return_tensors="pt").to(model.device)
            embeds = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).text_embeds
            return embeds.float().cpu().numpy()

    def tokens(self, text: str) -> list[str]:
        return self.pipeline.tokenizer.tokenize(text)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for value in self.pipeline.model.vision_model.state_dict().values():
            digest.update(value.float().cpu().contiguous().numpy().tobytes())
        return f"torch-{digest.hexdigest()[:16]}"


class OnnxRuntimeCaptioner(Captioner):
    """`OnnxCaptioner` over many images: neither PyTorch nor transformers is imported.

    Raises `ValueError` where the folder wasn't written by `tinycap export`, or has no `confidence.json` if confidence
    is requested; `ImportError` without onnxruntime.
    """

    def __init__(self, options: CaptionOptions):
        try:
            from tinycap.deploy.onnx_captioner import OnnxCaptioner
        except ImportError as error:
            raise extra_missing("--backend onnx needs onnxruntime", "onnx", error) from error

        if options.device not in (None, "cpu"):
            raise ValueError(f"--device: expected cpu with --backend onnx, got {options.device}")
        try:
            self.captioner = OnnxCaptioner.from_pretrained(options.model, options.quantized, options.num_threads)
        except ValueError as error:
            raise ValueError(f"--model {options.model}: {error}") from error
        self.options = options
        self.num_beams = options.resolve_num_beams(self.captioner.generation_config.get("num_beams"))
        self.calibration = ConfidenceCalibration.from_file(options.model) if options.confidence else None
        self.embed_batch = self.captioner.get_image_features
        self.visual_projection = self.captioner.visual_projection
        self.max_text_length = self.captioner.max_text_length

    def __call__(self, images: Sequence[str]) -> Iterator[ImageResult]:
        return self._run(self.caption_batch, images)

    def embed_texts(self, texts: list[str]) -> Any:
        if self.max_text_length is None:
            raise ValueError(f"--model {self.options.model}: {NO_TEXTS}")
        return self.captioner.get_text_features(texts)

    def tokens(self, text: str) -> list[str]:
        return self.captioner.tokenizer.encode(text, add_special_tokens=False).tokens

    def fingerprint(self) -> str:
        return f"onnx-{hashlib.sha256(self.captioner.encoder_path.read_bytes()).hexdigest()[:16]}"

    def caption_batch(self, images: list) -> Iterator[dict]:
        for found in self.captioner(images, **self.options.generation()):
            result = {"captions": [caption.text for caption in found]}
            if self.calibration is not None:
                result["confidence"] = self.calibration(found[0].score, found[0].num_tokens, self.num_beams)
            yield result


BACKENDS = {"torch": TorchCaptioner, "onnx": OnnxRuntimeCaptioner}
