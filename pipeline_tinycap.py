"""`pipeline("image-to-text", model=..., trust_remote_code=True)`: images in, captions out.

transformers 5 removed this task; `custom_pipelines` in the config provides it, with the interface of transformers 4.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.pipelines.base import GenericTensor, Pipeline
from transformers.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline

from .confidence_tinycap import CONFIDENCE_NAME, HOW_TO_CALIBRATE, ConfidenceCalibration
from .processing_tinycap import load_image, preprocess_images


def caption_log_probs(model, generated) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's log-probabilities of the captions that it generated, by any search.

    Args:
        model: the captioner.
        generated: output of `generate(return_dict_in_generate=True, output_logits=True)` for N captions.

    Returns:
        (N,) float32, the sum of the log-probabilities (nats) of each caption's tokens, its end token included and a
        prompt's left out; (N,) int64, their number.
    """
    # Not from the scores: logits processors change these, and those of a beam search are sums.
    tokens_log_probs = model.compute_transition_scores(
        generated.sequences, generated.logits, getattr(generated, "beam_indices", None), normalize_logits=True
    ).float()
    tokens = generated.sequences[:, -tokens_log_probs.shape[1] :]
    ends = torch.isin(tokens, torch.as_tensor(model.generation_config.eos_token_id, device=tokens.device))
    # Behind the first end token there is padding.
    counted = ends.cumsum(dim=1) - ends.long() == 0
    return tokens_log_probs.masked_fill(~counted, 0.0).sum(dim=1), counted.sum(dim=1)


class ImageToTextPipeline(Pipeline):
    """Captions images.

    `pipe(images)` takes a path, an `http(s)://` URL, a base64 string, the bytes of a file or a PIL image; or a list,
    tuple, a column of a `datasets.Dataset`, a generator or a `KeyDataset` of these. One image gives
    `[{"generated_text": ...}]`, with as many entries as `num_return_sequences`; a list, tuple or column gives a list of
    such lists; a generator or `KeyDataset` gives an iterator over them.

    An image that can't be read is a `ValueError` naming it. Among several, it yields
    `[{"generated_text": None, "error": <what is wrong with it>}]` instead, and the others get their captions.

    With `return_confidence=True` each entry carries `confidence`, the probability that the caption is right by the
    model's `confidence.json`; with `min_confidence` a caption below it is `None`.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True
    _pipeline_calls_generate = True
    # Read by `save_pretrained` of transformers 5.0 to 5.3, which never sets it.
    modelcard = None

    def __init__(self, *args, **kwargs):
        """As `Pipeline`; `ValueError` names a tokenizer or image processor that contradicts the model."""
        super().__init__(*args, **kwargs)
        config, tokenizer = self.model.config, self.tokenizer
        if tokenizer is not None and hasattr(config, "text_config"):
            if len(tokenizer) > config.text_config.vocab_size:
                raise ValueError(
                    f"tokenizer: expected at most the model's vocab_size of {config.text_config.vocab_size} tokens, "
                    f"got {len(tokenizer)}"
                )
            for name in ("bos_token_id", "eos_token_id"):
                expected, found = getattr(config, name), getattr(tokenizer, name)
                if isinstance(expected, int) and found is not None and found != expected:
                    raise ValueError(f"tokenizer: expected {name} {expected}, as the model was trained, got {found}")
        vision = getattr(config, "vision_config", None)
        for name in ("crop_size", "size"):
            sides = [side for side in dict(getattr(self.image_processor, name, None) or {}).values() if side]
            # Resizing before the crop must not take gigabytes.
            if vision is not None and sides and max(sides) > 8 * vision.image_size:
                raise ValueError(
                    f"image_processor.{name}: expected pixels for an image_size of {vision.image_size}, got {sides}"
                )

    def _sanitize_parameters(
        self,
        max_new_tokens: int | None = None,
        generate_kwargs: dict | None = None,
        prompt: str | None = None,
        timeout: float | None = None,
        return_confidence: bool = False,
        min_confidence: float | None = None,
        **generate_parameters,
    ):
        generate_kwargs = dict(generate_kwargs or {})
        if max_new_tokens is not None:
            generate_parameters["max_new_tokens"] = max_new_tokens
        for name in generate_parameters:
            if name in generate_kwargs:
                raise ValueError(f"{name}: expected it once, got it in generate_kwargs and as an argument of its own")
            if not hasattr(self.model.generation_config, name) and name not in ("generation_config", "streamer"):
                raise TypeError(f"{type(self).__name__} got an unexpected argument {name!r}")
        generate_kwargs.update(generate_parameters)
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"prompt: expected one string for all images, got {type(prompt).__name__}")
        given = {"prompt": prompt, "timeout": timeout}
        preprocess_params = {name: value for name, value in given.items() if value is not None}
        forward_params, postprocess_params = {"generate_kwargs": generate_kwargs} if generate_kwargs else {}, {}
        if return_confidence or min_confidence is not None:
            if min_confidence is not None and not 0 <= min_confidence <= 1:
                raise ValueError(f"min_confidence: expected a probability from 0 to 1, got {min_confidence!r}")
            # By precedence, as in `generate`: its own arguments, a config given to it, the model's.
            configs = (self.model.generation_config, generate_kwargs.get("generation_config"))
            settings = [*(config.to_dict() for config in configs if config is not None), generate_kwargs]
            merged = {name: value for each in settings for name, value in each.items() if value is not None}
            if merged.get("do_sample"):
                raise ValueError("confidence: it is calibrated for greedy and beam search, got do_sample=True")
            num_beams = merged.get("num_beams") or 1
            # Read here, so that a model without one is an error before the first image.
            self.calibration  # noqa: B018
            forward_params["return_log_probs"] = True
            postprocess_params = {"min_confidence": min_confidence, "num_beams": num_beams}
        return preprocess_params, forward_params, postprocess_params

    @property
    def calibration(self) -> ConfidenceCalibration:
        """The model's own, from where it was loaded; `ValueError` where it has none, or a malformed one."""
        if not hasattr(self, "_calibration"):
            path = getattr(self.model, "confidence_path", None)
            if path is None:
                name = self.model.config._name_or_path
                raise ValueError(f"model {name!r} has no {CONFIDENCE_NAME}; {HOW_TO_CALIBRATE}")
            self._calibration = ConfidenceCalibration.from_file(path)
        return self._calibration

    def __call__(self, images: Any = None, **kwargs) -> list:
        """Captions one image or many; see the class for inputs and outputs.

        Args:
            images: the image or images (also as `inputs=`).
            prompt: beginning of every caption, part of `generated_text`.
            max_new_tokens, ...: any argument of `generate()`; also as a dict `generate_kwargs`.
            batch_size: images in one forward pass.
            timeout: seconds to wait for a URL.
            return_confidence: add `confidence` to each entry, the probability that the caption is right.
            min_confidence: captions of a lower confidence are `None`; implies `return_confidence`.

        Raises:
            ValueError: the image can't be read; names it. A confidence is asked for, but the model has no
                `confidence.json`, or captions are sampled.
        """
        images = kwargs.pop("inputs", images)
        if images is None:
            raise ValueError("images: expected a path, URL, PIL image, or several of them, got None")
        if isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray, memoryview)):
            if not len(images):
                return []
            if not isinstance(images, list):
                # A column of a `datasets.Dataset` decodes images lazily: all of them may not fit into memory.
                return list(super().__call__((image for image in images), **kwargs))
        return super().__call__(images, **kwargs)

    def get_inference_context(self):
        # Faster than the base class's `no_grad`; only text leaves the pipeline.
        return torch.inference_mode

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        params = ({**preprocess_params, "keep_going": True}, forward_params, postprocess_params)
        return super().get_iterator(inputs, num_workers, batch_size, *params)

    def preprocess(
        self, image: Any, prompt: str | None = None, timeout: float | None = None, keep_going: bool = False
    ) -> dict[str, GenericTensor]:
        error = ""
        try:
            pixel_values = preprocess_images(self.image_processor, [load_image(image, timeout=timeout)])
        except (ValueError, TypeError) as problem:
            if not keep_going:
                raise
            # A blank image, so that every item of a batch has the same keys and shapes.
            error = str(problem)
            vision = self.model.config.vision_config
            pixel_values = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size)
        model_inputs = {"pixel_values": pixel_values.to(self.dtype), "error": error}
        if prompt:
            # Captions have a space at the head of the next word, not as a trailing token. "</s>" is read as text.
            encoded = self.tokenizer(prompt.rstrip(), return_tensors="pt", split_special_tokens=True)
            model_inputs["input_ids"] = encoded.input_ids
        return model_inputs

    def _forward(
        self, model_inputs: dict[str, Any], generate_kwargs: dict | None = None, return_log_probs: bool = False
    ) -> dict[str, Any]:
        errors = model_inputs.pop("error")
        generate_kwargs = dict(generate_kwargs or {})
        if hasattr(self, "_prepare_generate_kwargs"):
            generate_kwargs = self._prepare_generate_kwargs(generate_kwargs)
        elif "generation_config" not in generate_kwargs:
            # As arguments, which `generate` deprecates beside a config. The pipeline's own arguments are where its
            # config differs from the model's.
            own, default = self.generation_config.to_dict(), self.model.generation_config.to_dict()
            own = {name: value for name, value in own.items() if value != default.get(name)}
            generate_kwargs = {**own, **generate_kwargs}
        if return_log_probs:
            generate_kwargs.update(return_dict_in_generate=True, output_logits=True)
        generated = self.model.generate(**model_inputs, **generate_kwargs)
        sequences = generated if isinstance(generated, torch.Tensor) else generated.sequences
        # (images, captions of one image, tokens): the iterator splits batches along the first axis.
        num_images = model_inputs["pixel_values"].shape[0]
        outputs = {"sequences": sequences.reshape(num_images, -1, sequences.shape[-1]), "error": errors}
        if return_log_probs:
            scores = dict(zip(("log_probs", "num_tokens"), caption_log_probs(self.model, generated)))
            outputs |= {name: value.reshape(num_images, -1) for name, value in scores.items()}
        return outputs

    def postprocess(
        self, model_outputs: dict[str, Any], min_confidence: float | None = None, num_beams: int | None = None
    ) -> list[dict[str, str | float | None]]:
        if model_outputs["error"]:
            return [{"generated_text": None, "error": model_outputs["error"]}]
        texts = self.tokenizer.batch_decode(model_outputs["sequences"].flatten(0, 1), skip_special_tokens=True)
        entries = [{"generated_text": text.strip()} for text in texts]
        if "log_probs" in model_outputs:
            scores = zip(model_outputs["log_probs"].flatten().tolist(), model_outputs["num_tokens"].flatten().tolist())
            for entry, (log_prob, num_tokens) in zip(entries, scores):
                entry["confidence"] = self.calibration(log_prob, num_tokens, num_beams)
                if min_confidence is not None and entry["confidence"] < min_confidence:
                    entry["generated_text"] = None
        return entries


class ImageEmbeddingPipeline(ImageFeatureExtractionPipeline):
    """`pipeline("image-feature-extraction")`: the student's tokens, or with `pool=True` the image embedding."""

    def _forward(self, model_inputs):
        # The whole model's first output would be the decoder's logits.
        return self.model.get_image_features(**model_inputs)


__all__ = ["ImageEmbeddingPipeline", "ImageToTextPipeline", "caption_log_probs"]
