"""`pipeline("image-to-text", model=..., trust_remote_code=True)`: images in, captions out.

transformers 5 removed this task; `custom_pipelines` in the config provides it, with the interface of transformers 4.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers.pipelines.base import Pipeline
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
    """Captions images; see `__call__`.

    Raises:
        ValueError: tokenizer or image processor contradict the model; names what was expected and what came.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True
    # Read by `save_pretrained` of transformers 5.0 to 5.3, which never sets it.
    modelcard = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config, tokenizer = self.model.config, self.tokenizer
        vocab_size, image_size = config.text_config.vocab_size, config.vision_config.image_size
        if len(tokenizer) > vocab_size:
            raise ValueError(f"tokenizer: expected at most vocab_size {vocab_size} tokens, got {len(tokenizer)}")
        for name in ("bos_token_id", "eos_token_id"):
            expected, got = getattr(config, name), getattr(tokenizer, name)
            if isinstance(expected, int) and got is not None and got != expected:
                raise ValueError(f"tokenizer: expected {name} {expected}, as the model was trained, got {got}")
        for name in ("crop_size", "size"):
            sides = [side for side in dict(getattr(self.image_processor, name, None) or {}).values() if side]
            # Resizing before the crop must not take gigabytes.
            if max(sides, default=0) > 8 * image_size:
                raise ValueError(
                    f"image_processor.{name}: expected pixels for an image_size of {image_size}, got {sides}"
                )

    def __call__(self, images: Any = None, **kwargs) -> list:
        """Captions one image or many.

        Args:
            images (also as `inputs=`): a path, an `http(s)://` URL, a base64 string, the bytes of a file or a PIL
                image; or a list, tuple, column of a `datasets.Dataset`, generator or `KeyDataset` of these.
            prompt: beginning of every caption, part of `generated_text`.
            max_new_tokens, ...: any argument of `generate()`; also as a dict `generate_kwargs`.
            batch_size: images in one forward pass.
            timeout: seconds for a URL as a whole.
            return_confidence: add `confidence` to each entry, the probability that the caption is right by the model's
                `confidence.json`.
            min_confidence: captions of a lower confidence are `None`; implies `return_confidence`.

        Returns:
            `[{"generated_text": ...}]` for one image, with as many entries as `num_return_sequences`; a list of such
            lists for a list, tuple or column, and an iterator over them for a generator or `KeyDataset`. Among several
            images, one that can't be read has the entry `{"generated_text": None, "error": <what is wrong with it>}`.

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
        given, generate_kwargs = generate_parameters, dict(generate_kwargs or {})
        if max_new_tokens is not None:
            given["max_new_tokens"] = max_new_tokens
        for name in given:
            if name in generate_kwargs:
                raise ValueError(f"{name}: expected it once, got it in generate_kwargs and as an argument of its own")
            if not hasattr(self.model.generation_config, name) and name not in ("generation_config", "streamer"):
                raise TypeError(f"{type(self).__name__} got an unexpected argument {name!r}")
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"prompt: expected one string for all images, got {type(prompt).__name__}")
        preprocess_params = {"prompt": prompt} if prompt is not None else {}
        preprocess_params |= {"timeout": timeout} if timeout is not None else {}
        # One by one, so that those of a call are added to those of the pipeline itself.
        forward_params, postprocess_params = {**generate_kwargs, **given}, {}
        if return_confidence or min_confidence is not None:
            if min_confidence is not None and not 0 <= min_confidence <= 1:
                raise ValueError(f"min_confidence: expected a probability from 0 to 1, got {min_confidence!r}")
            # By precedence, as in `generate`: its own arguments, a config given to it, the model's.
            arguments = {**getattr(self, "_forward_params", {}), **forward_params}
            configs = (self.model.generation_config, arguments.get("generation_config"))
            settings = [*(config.to_dict() for config in configs if config is not None), arguments]
            merged = {name: value for each in settings for name, value in each.items() if value is not None}
            if merged.get("do_sample"):
                raise ValueError("confidence: it is calibrated for greedy and beam search, got do_sample=True")
            forward_params["return_log_probs"] = True
            # The calibration is read before the first image.
            confidence = partial(self.calibration, num_beams=merged.get("num_beams") or 1)
            postprocess_params = {"confidence": confidence, "min_confidence": min_confidence}
        return preprocess_params, forward_params, postprocess_params

    @property
    def calibration(self) -> ConfidenceCalibration:
        """The model's own, from where it was loaded; `ValueError` where it has none, or a malformed one."""
        path = getattr(self.model, "confidence_path", None)
        if path is None:
            raise ValueError(f"model {self.model.config._name_or_path!r} has no {CONFIDENCE_NAME}; {HOW_TO_CALIBRATE}")
        return ConfidenceCalibration.from_file(path)

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        params = ({**preprocess_params, "keep_going": True}, forward_params, postprocess_params)
        return super().get_iterator(inputs, num_workers, batch_size, *params)

    def preprocess(
        self, image: Any, prompt: str | None = None, timeout: float | None = None, keep_going: bool = False
    ) -> dict[str, Any]:
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
        self, model_inputs: dict[str, Any], return_log_probs: bool = False, **generate_kwargs
    ) -> dict[str, Any]:
        errors = model_inputs.pop("error")
        if return_log_probs:
            generate_kwargs.update(return_dict_in_generate=True, output_logits=True)
        generated = self.model.generate(**model_inputs, **generate_kwargs)
        sequences = generated if isinstance(generated, torch.Tensor) else generated.sequences
        # (images, captions of one image, tokens): the iterator splits batches along the first axis.
        num_images = model_inputs["pixel_values"].shape[0]
        outputs = {"sequences": sequences.reshape(num_images, -1, sequences.shape[-1]), "error": errors}
        if return_log_probs:
            log_probs, num_tokens = caption_log_probs(self.model, generated)
            outputs |= {"log_probs": log_probs.view(num_images, -1), "num_tokens": num_tokens.view(num_images, -1)}
        return outputs

    def postprocess(
        self, model_outputs: dict[str, Any], confidence: Callable | None = None, min_confidence: float | None = None
    ) -> list[dict[str, str | float | None]]:
        if model_outputs["error"]:
            return [{"generated_text": None, "error": model_outputs["error"]}]
        texts = self.tokenizer.batch_decode(model_outputs["sequences"].flatten(0, 1), skip_special_tokens=True)
        entries = [{"generated_text": text.strip()} for text in texts]
        if confidence is not None:
            scores = (model_outputs[name].flatten().tolist() for name in ("log_probs", "num_tokens"))
            for entry, log_prob, num_tokens in zip(entries, *scores):
                entry["confidence"] = confidence(log_prob, num_tokens)
                if min_confidence is not None and entry["confidence"] < min_confidence:
                    entry["generated_text"] = None
        return entries


class ImageEmbeddingPipeline(ImageFeatureExtractionPipeline):
    """`pipeline("image-feature-extraction")`: the student's tokens, or with `pool=True` the image embedding."""

    def _forward(self, model_inputs):
        # The whole model's first output would be the decoder's logits.
        return self.model.get_image_features(**model_inputs)


__all__ = ["ImageEmbeddingPipeline", "ImageToTextPipeline", "caption_log_probs"]
