"""Captions and embeddings of many images, one after the other, by PyTorch or by ONNX Runtime.

Both captioners take paths or addresses and yield one `CaptionResult` for each, in order. Neither library is imported
before a captioner of its kind is made.
"""

import contextlib
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tinycap import REPOSITORY
from tinycap.confidence_tinycap import CONFIDENCE_NAME, ConfidenceCalibration


BACKENDS = ("torch", "onnx")
# The folder of this package's own checkpoint: the repository's root in a clone, the package's folder in a wheel.
RELEASED_MODEL = REPOSITORY


def check_model(model: str) -> str:
    """`model`, if it is a folder or could be a name on the Hub; before anything heavy is imported.

    Raises:
        ValueError: it is neither.
    """
    if not os.path.isdir(model) and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model):
        raise ValueError(f"--model {model}: no such folder")
    return model


def install_command(extra: str) -> str:
    """How to install one of this package's extras: in a clone, or by name."""
    is_clone = (RELEASED_MODEL / "pyproject.toml").is_file()
    return f'pip install -e ".[{extra}]"' if is_clone else f'pip install "tinycap[{extra}]"'


@dataclass
class CaptionResult:
    """The captions of one image, or why there are none.

    Args:
        image: its path or address.
        captions: best first; empty where `error` is set.
        confidence: probability that the first one is right, where it was asked for.
        error: why the image can't be captioned.
    """

    image: str
    captions: list[str] = field(default_factory=list)
    confidence: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class CaptionOptions:
    """How to caption.

    Args:
        model: a local folder or, with PyTorch, a name on the Hub.
        batch_size: images run through the model together.
        num_beams: beams; the model's own number if `None`.
        num_captions: captions of each image.
        max_new_tokens: longest caption in tokens; the model's own if `None`.
        confidence: compute it.
        device: PyTorch's name of the device; the first GPU or else the CPU if `None`.
        quantized: ONNX: the int8 files instead of the fp32 ones.
        num_threads: threads of a step; the library's own choice, one a core, if `None`.
        num_workers: PyTorch: processes that open images ahead, 0 for none; ONNX: threads that do.
    """

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
        """The arguments of `generate()` that were given."""
        given = {"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens}
        if self.num_captions > 1:
            given["num_return_sequences"] = self.num_captions
        return {name: value for name, value in given.items() if value is not None}

    def check_num_captions(self, models_num_beams: int | None) -> None:
        """Raises `ValueError` where more captions than beams are asked for."""
        num_beams = self.num_beams or models_num_beams or 1
        if self.num_captions > num_beams:
            raise ValueError(
                f"--num-captions: expected at most as many as there are beams ({num_beams}), got {self.num_captions}"
            )


class TorchCaptioner:
    """The `image-to-text` pipeline, by this package's own classes: no remote code is run.

    Raises:
        ValueError: the model isn't there or isn't a TinyCap, has no `confidence.json` where a confidence is wanted, or
            the device can't be used.
    """

    def __init__(self, options: CaptionOptions):
        import torch
        from transformers import PreTrainedTokenizerFast, logging
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        from tinycap.configuration_tinycap import TinyCapConfig
        from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
        from tinycap.pipeline_tinycap import ImageToTextPipeline

        # The bar of this program is about images.
        logging.disable_progress_bar()
        self.options = options
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            # AssertionError: a PyTorch that was built without it.
            raise ValueError(f"--device {device}: {first_line(error)}") from error
        try:
            content, _ = TinyCapConfig.get_config_dict(options.model)
            if content.get("model_type") != TinyCapConfig.model_type:
                raise ValueError(f"expected model_type {TinyCapConfig.model_type!r}, got {content.get('model_type')!r}")
            model = TinyCapForConditionalGeneration.from_pretrained(options.model)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model)
            image_processor = AutoImageProcessor.from_pretrained(options.model, trust_remote_code=False)
        except (OSError, ValueError) as error:
            where = "" if os.path.isdir(options.model) else "no such folder, and from the Hub: "
            raise ValueError(f"--model {options.model}: {where}{first_line(error)}") from error
        options.check_num_captions(model.generation_config.num_beams)
        self.pipeline = ImageToTextPipeline(
            model=model,
            tokenizer=tokenizer,
            image_processor=image_processor,
            device=torch.device(device),
        )
        self.arguments = {"batch_size": options.batch_size, "num_workers": options.num_workers, **options.generation()}
        if options.confidence:
            self.arguments["return_confidence"] = True
            self.pipeline.calibration  # noqa: B018 - a model without one is an error before the first image

    def __call__(self, images: Sequence[str]) -> Iterator[CaptionResult]:
        from torch.utils.data import Dataset

        class Images(Dataset):
            # The pipeline streams a data set, but captions a whole list before it returns.
            def __len__(self):
                return len(images)

            def __getitem__(self, index):
                return images[index]

        for image, entries in zip(images, self.pipeline(Images(), **self.arguments)):
            if "error" in entries[0]:
                yield CaptionResult(image, error=entries[0]["error"])
            else:
                captions = [entry["generated_text"] for entry in entries]
                yield CaptionResult(image, captions, confidence=entries[0].get("confidence"))

    def embed(self, images: Sequence[str]) -> Iterator[tuple[str, "object | str"]]:
        """Yields for each image its embedding, a float32 numpy array (D,), unit norm; or its error."""
        import torch

        for batch in batches(images, self.options.batch_size):
            inputs = [(image, self.pipeline.preprocess(image, keep_going=True)) for image in batch]
            with torch.inference_mode():
                pixels = torch.cat([item["pixel_values"] for _, item in inputs]).to(self.pipeline.device)
                embeds = self.pipeline.model.get_image_features(pixels).pooler_output.float().cpu().numpy()
            for (image, item), row in zip(inputs, embeds):
                yield image, item["error"] or row


def first_line(error: Exception) -> str:
    """The first line of an error message, without the advice that libraries add."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def naming_model(model: str) -> Iterator[None]:
    """For a model that isn't there: a `ValueError` that says where it was looked for, not transformers' `OSError`."""
    try:
        yield
    except OSError as error:
        # The system's own errors have a number: an output that can't be written.
        if os.path.isdir(model) or error.errno is not None:
            raise
        raise ValueError(f"--model {model}: no such folder, and from the Hub: {first_line(error)}") from error


def batches(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """`items` in pieces of `size`, the last one shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def read_ahead(read, images: Sequence[str], num_workers: int, ahead: int) -> Iterator:
    """`read` of each image, in order, by that many threads, at most `ahead` images early; 0 threads read as asked."""
    if num_workers == 0:
        yield from map(read, images)
        return
    with ThreadPoolExecutor(num_workers) as threads:
        waiting = deque()
        for image in images:
            waiting.append(threads.submit(read, image))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def find_calibration(folder: str | os.PathLike) -> ConfidenceCalibration:
    """The `confidence.json` of a local model.

    Raises:
        ValueError: there is none; names the file.
    """
    return ConfidenceCalibration.from_file(Path(folder) / CONFIDENCE_NAME)


class OnnxRuntimeCaptioner:
    """`OnnxCaptioner` over many images: neither PyTorch nor transformers is imported.

    Raises:
        ValueError: the folder isn't one that `tinycap export` wrote, or has no `confidence.json` where a confidence is
            wanted.
        ImportError: onnxruntime isn't installed.
    """

    def __init__(self, options: CaptionOptions):
        try:
            from tinycap.deploy.onnx_captioner import OnnxCaptioner
        except ImportError as error:
            raise ImportError(f"--backend onnx needs onnxruntime: {install_command('onnx')} ({error})") from error

        if options.device not in (None, "cpu"):
            raise ValueError(f"--device: expected cpu with --backend onnx, got {options.device}")
        try:
            self.captioner = OnnxCaptioner.from_pretrained(options.model, options.quantized, options.num_threads)
        except ValueError as error:
            raise ValueError(f"--model {options.model}: {error}") from error
        self.options = options
        self.num_beams = options.num_beams or self.captioner.generation_config.get("num_beams") or 1
        options.check_num_captions(self.num_beams)
        self.calibration = find_calibration(options.model) if options.confidence else None

    def __call__(self, images: Sequence[str]) -> Iterator[CaptionResult]:
        for batch in self._opened_batches(images):
            opened = [image for _, image in batch if not isinstance(image, str)]
            results = iter(self.captioner(opened, **self.options.generation()) if opened else ())
            for name, image in batch:
                if isinstance(image, str):
                    yield CaptionResult(name, error=image)
                    continue
                captions = next(results)
                confidence = None
                if self.calibration is not None:
                    confidence = self.calibration(captions[0].score, captions[0].num_tokens, self.num_beams)
                yield CaptionResult(name, [caption.text for caption in captions], confidence)

    def embed(self, images: Sequence[str]) -> Iterator[tuple[str, "object | str"]]:
        """As `TorchCaptioner.embed`."""
        for batch in self._opened_batches(images):
            opened = [image for _, image in batch if not isinstance(image, str)]
            embeds = iter(self.captioner.get_image_features(opened) if opened else ())
            for name, image in batch:
                yield name, image if isinstance(image, str) else next(embeds)

    def _opened_batches(self, images: Sequence[str]) -> Iterator[list[tuple[str, "object | str"]]]:
        """Batches of names with opened images, or with errors."""
        from tinycap.processing_tinycap import load_image

        def read(image: str):
            try:
                return image, load_image(image)
            except (ValueError, TypeError) as error:
                return image, str(error)

        batch = []
        for pair in read_ahead(read, images, self.options.num_workers, 2 * self.options.batch_size):
            batch.append(pair)
            if len(batch) == self.options.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


def create_captioner(backend: str, options: CaptionOptions) -> "TorchCaptioner | OnnxRuntimeCaptioner":
    """The captioner of a backend; see the classes for what they raise."""
    return {"torch": TorchCaptioner, "onnx": OnnxRuntimeCaptioner}[backend](options)
