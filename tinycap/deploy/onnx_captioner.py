"""Captions images with onnxruntime, tokenizers, numpy and Pillow alone: no PyTorch, no transformers.

    captioner = OnnxCaptioner.from_pretrained("exported", quantized=True)
    captioner(["photo.jpg"])[0][0].text

`tinycap.deploy.export` writes what it reads. Captions are those of `generate()` on the same checkpoint.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from tinycap.deploy.image_preprocessing import ImagePreprocessor
from tinycap.deploy.token_search import Sequences, beam_search, greedy_search
from tinycap.processing_tinycap import load_image


# Optimum's and transformers.js's names, in their folder `onnx`.
ENCODER, DECODER = "encoder_model", "decoder_model_merged"

# What a generation config may say beyond what is honoured here: the values that change nothing.
NEUTRAL = {
    **{"do_sample": False, "num_beam_groups": 1, "diversity_penalty": 0.0, "penalty_alpha": None, "use_cache": True},
    **{"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0},
    **{"encoder_no_repeat_ngram_size": 0, "renormalize_logits": False, "remove_invalid_values": False},
    **{"return_dict_in_generate": False, "num_return_sequences": 1, "token_healing": False},
    # Of sampling, which isn't asked for.
    **{"temperature": ..., "top_k": ..., "top_p": ..., "typical_p": ..., "epsilon_cutoff": ..., "eta_cutoff": ...},
    **{"output_scores": ..., "output_logits": ..., "output_attentions": ..., "output_hidden_states": ...},
    **{"transformers_version": ..., "_from_model_config": ..., "bos_token_id": ..., "pad_token_id": ...},
}
HONOURED = {
    *("num_beams", "max_new_tokens", "max_length", "length_penalty", "early_stopping"),
    *("eos_token_id", "decoder_start_token_id", "suppress_tokens"),
}


@dataclass
class Caption:
    """One caption of one image.

    Args:
        text: the caption; `None` for an image that can't be read.
        score: the sum of its tokens' log-probabilities, end token included.
        num_tokens: how many tokens that are, a prompt's not among them.
        error: why the image can't be read.
    """

    text: str | None
    score: float = 0.0
    num_tokens: int = 0
    error: str | None = None


class OnnxCaptioner:
    """A TinyCap as two ONNX graphs.

    Args:
        encoder: pixel values -> what the decoder's cross-attention reads, and the image embedding.
        decoder: tokens and the cache of those before -> logits of the last one, and the cache.
        tokenizer: as `tokenizer.json` holds it.
        preprocessor: makes the pixel values.
        generation_config: defaults of the arguments.
        max_positions: tokens that the decoder has positions for.

    Raises:
        ValueError: the generation config asks for something that isn't supported here; names it.
    """

    def __init__(
        self,
        encoder: onnxruntime.InferenceSession,
        decoder: onnxruntime.InferenceSession,
        tokenizer: Tokenizer,
        preprocessor: ImagePreprocessor,
        generation_config: dict,
        max_positions: int,
    ):
        for name, value in generation_config.items():
            if name in HONOURED or value is None or NEUTRAL.get(name) is ...:
                continue
            if name not in NEUTRAL or value != NEUTRAL[name]:
                raise ValueError(f"generation config: {name}={value!r} isn't supported without transformers")
        self.encoder, self.decoder = encoder, decoder
        self.tokenizer, self.preprocessor = tokenizer, preprocessor
        self.generation_config, self.max_positions = generation_config, max_positions
        eos = generation_config.get("eos_token_id")
        self.eos_token_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        self.start_token_id = generation_config["decoder_start_token_id"]
        inputs = decoder.get_inputs()
        # (batch, heads, tokens so far, head_dim) of every layer's keys and values.
        self.cache_shapes = {item.name: item.shape for item in inputs if item.name.startswith("past_key_values")}

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, quantized: bool = False, num_threads: int | None = None
    ) -> "OnnxCaptioner":
        """Loads what `export_onnx` wrote.

        Args:
            folder: with `onnx/`, the tokenizer and the configs.
            quantized: take the int8 graphs.
            num_threads: of onnxruntime; its own choice when not given.

        Raises:
            ValueError: the folder lacks one of the files, or asks for something unsupported; names it.
        """
        folder, suffix = Path(folder), "_quantized" if quantized else ""
        paths = [folder / "onnx" / f"{name}{suffix}.onnx" for name in (ENCODER, DECODER)]
        for path in (*paths, folder / "tokenizer.json", folder / "preprocessor_config.json"):
            if not path.is_file():
                raise ValueError(f"expected a folder that `tinycap export` wrote, got {folder} without {path.name}")
        options = onnxruntime.SessionOptions()
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        # Spinning threads would take CPU time from the caller.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        sessions = (onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"]) for path in paths)
        config = _read_json(folder / "config.json")
        names = ("decoder_start_token_id", "eos_token_id")
        generation_config = {name: config.get(name) for name in names} | _read_json(folder / "generation_config.json")
        if _read_json(folder / "tokenizer_config.json").get("clean_up_tokenization_spaces"):
            raise ValueError("tokenizer config: clean_up_tokenization_spaces isn't supported without transformers")
        return cls(
            *sessions,
            Tokenizer.from_file(os.fspath(folder / "tokenizer.json")),
            ImagePreprocessor.from_pretrained(folder),
            generation_config,
            config["text_config"]["max_position_embeddings"],
        )

    def __call__(
        self,
        images: Any,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        num_return_sequences: int = 1,
        length_penalty: float | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
    ) -> list[list[Caption]]:
        """Captions images.

        Args:
            images: a list of whatever `load_image` opens (paths, bytes, PIL images, ...), or one of these.
            num_beams: beams of the search, 1 for greedy; as the generation config says when not given.
            max_new_tokens: longest caption in tokens; likewise.
            num_return_sequences: captions of each image, the best first; at most `num_beams`.
            length_penalty: above 0 favours longer captions of a beam search; likewise.
            prompt: beginning of every caption, part of its text.
            batch_size: images run through the model together; all of them when not given.

        Returns:
            For each image, a list of `num_return_sequences` captions. Among several images, one that can't be read gets
            a single `Caption` without text that says why.

        Raises:
            ValueError: the only image can't be read, or an argument has a value that makes no sense; names it.
        """
        if not isinstance(images, (list, tuple)):
            images = [images]
        search = self._search(num_beams, max_new_tokens, num_return_sequences, length_penalty)
        prompt_ids = self._prompt_ids(prompt)
        captions: list[list[Caption]] = []
        for start in range(0, len(images), batch_size or len(images) or 1):
            opened, errors = [], {}
            batch = images[start : start + (batch_size or len(images))]
            for index, image in enumerate(batch):
                try:
                    opened.append(load_image(image))
                except (ValueError, TypeError) as error:
                    if len(images) == 1:
                        raise
                    errors[index] = str(error)
            results = iter(self._caption(opened, prompt_ids, search) if opened else ())
            captions += [
                [Caption(None, error=errors[index])] if index in errors else next(results)
                for index in range(len(batch))
            ]
        return captions

    def get_image_features(self, images: list) -> np.ndarray:
        """The student's embeddings of a list of images: (B, projection_dim), unit norm.

        Raises:
            ValueError: an image can't be read; names it.
        """
        return self.encode(self.preprocessor([load_image(image) for image in images]))[1]

    def encode(self, pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, 3, H, W) -> what the decoder reads (B, M, width), and the image embeddings (B, projection_dim)."""
        return tuple(self.encoder.run(["last_hidden_state", "image_embeds"], {"pixel_values": pixel_values}))

    def decoding_step(self, encoder_hidden_states: np.ndarray) -> Callable:
        """A `Step` of the searches over the captions of images (B, M, width); it keeps the cache."""
        cache = {}

        def step(tokens: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
            states = encoder_hidden_states
            if len(tokens) != len(states):
                states = np.repeat(states, len(tokens) // len(states), axis=0)
            if not cache:
                for name, (_, heads, _, head_dim) in self.cache_shapes.items():
                    cache[name] = np.zeros((len(tokens), heads, 0, head_dim), np.float32)
            elif rows is not None:
                cache.update({name: value[rows] for name, value in cache.items()})
            logits, *present = self.decoder.run(None, {"input_ids": tokens, "encoder_hidden_states": states, **cache})
            cache.update(zip(self.cache_shapes, present))
            return logits[:, -1]

        return step

    def _caption(self, opened: list, prompt_ids: list[int], search: Callable) -> list[list[Caption]]:
        states, _ = self.encode(self.preprocessor(opened))
        prompt = np.tile(np.array(prompt_ids, np.int64), (len(opened), 1))
        searched: Sequences = search(self.decoding_step(states), prompt)
        return [
            [
                Caption(self._decode(prompt_ids + tokens), float(score), len(tokens))
                for tokens, score in zip(sequences, scores)
            ]
            for sequences, scores in zip(searched.tokens, searched.scores)
        ]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _prompt_ids(self, prompt: str | None) -> list[int]:
        # A trailing space would be a token of its own, where captions have it at the head of the next word.
        ids = self.tokenizer.encode(prompt.rstrip()).ids if prompt else []
        ids = ids if ids[:1] == [self.start_token_id] else [self.start_token_id, *ids]
        if len(ids) >= self.max_positions:
            raise ValueError(f"prompt: expected fewer than {self.max_positions} tokens, got {len(ids)}")
        return ids

    def _search(self, num_beams, max_new_tokens, num_return_sequences, length_penalty) -> Callable:
        """The search that arguments and generation config ask for, as a function of a `Step` and a prompt."""
        config = self.generation_config

        def choose(name: str, value, default):
            value = config.get(name) if value is None else value
            return default if value is None else value

        num_beams = choose("num_beams", num_beams, 1)
        max_new_tokens = choose("max_new_tokens", max_new_tokens, None)
        for name, value in (("num_beams", num_beams), ("num_return_sequences", num_return_sequences)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        if num_return_sequences > num_beams:
            raise ValueError(
                f"num_return_sequences: expected at most {num_beams} (num_beams), got {num_return_sequences}"
            )
        beams = {
            "num_beams": num_beams,
            "num_return_sequences": num_return_sequences,
            "length_penalty": choose("length_penalty", length_penalty, 1.0),
            "early_stopping": choose("early_stopping", None, False),
        }

        def search(step, prompt: np.ndarray) -> Sequences:
            limit = choose("max_length", None, 20) - prompt.shape[1] if max_new_tokens is None else max_new_tokens
            limit = max(1, min(limit, self.max_positions - prompt.shape[1]))
            suppressed = config.get("suppress_tokens") or []
            if num_beams == 1:
                return greedy_search(step, prompt, self.eos_token_ids, limit, suppressed)
            return beam_search(step, prompt, self.eos_token_ids, limit, suppress_tokens=suppressed, **beams)

        return search


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
