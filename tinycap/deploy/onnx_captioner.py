"""Captions images with onnxruntime, tokenizers, numpy and Pillow, without PyTorch and transformers.

    captioner = OnnxCaptioner.from_pretrained("exported", quantized=True)
    captioner(["photo.jpg"])[0][0].text

The folder is written by `tinycap.deploy.export`. Captions equal those of `generate()` on the same checkpoint.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from tinycap.checks_tinycap import MAX_INTEGER, check_generation, check_number, check_pixels, read_json
from tinycap.commands import first_line
from tinycap.deploy.captioners import VISUAL_PROJECTION
from tinycap.deploy.image_preprocessing import ImagePreprocessor
from tinycap.deploy.inputs import run_batches
from tinycap.deploy.token_search import beam_search
from tinycap.processing_tinycap import load_image


# Optimum's and transformers.js's names, in their folder `onnx`.
ENCODER, DECODER, TEXT_MODEL = "encoder_model", "decoder_model_merged", "text_model"
# The sizes that are read from `config.json`: in exports the names of these stock models, which transformers.js and
# Optimum know, by part; in repositories, and exports of earlier versions, TinyCap's own.
EXPORTED_TYPE, PART_TYPES = "vision-encoder-decoder", {"encoder": "vit", "decoder": "trocr"}
OWN_PARTS = {"encoder": "vision_config", "decoder": "text_config"}
SIZES = {
    "encoder": {"image_size": "image_size", "num_channels": "num_channels"},
    "decoder": {
        **{"vocab_size": "vocab_size", "max_position_embeddings": "max_position_embeddings"},
        **{"num_hidden_layers": "decoder_layers", "num_attention_heads": "decoder_attention_heads"},
        **{"hidden_size": "d_model"},
    },
}

# Those of a search that neither generation config nor caller give, as in transformers.
DEFAULTS = {"num_beams": 1, "length_penalty": 1.0, "max_length": 20, "early_stopping": False, "suppress_tokens": []}
# Supported settings of a generation config, and those that affect neither greedy nor beam search.
ANY_VALUE = {
    *("num_beams", "max_new_tokens", "max_length", "length_penalty", "early_stopping", "suppress_tokens"),
    *("eos_token_id", "decoder_start_token_id", "bos_token_id", "pad_token_id"),
    *("temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    *("transformers_version", "_from_model_config"),
}
# Other settings, with the value that has no effect.
NEUTRAL = {
    **{"do_sample": False, "num_beam_groups": 1, "diversity_penalty": 0.0, "use_cache": True, "token_healing": False},
    **{"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0},
    **{"encoder_no_repeat_ngram_size": 0, "renormalize_logits": False, "remove_invalid_values": False},
    **{"return_dict_in_generate": False, "num_return_sequences": 1},
}


@dataclass
class Caption:
    """One caption of one image: its text, and the sum of the log-probabilities of its `num_tokens` tokens, with the end
    token, without the prompt's; or why the image can't be read."""

    text: str | None
    score: float = 0.0
    num_tokens: int = 0
    error: str | None = None


def load_graph(path: Path, options: onnxruntime.SessionOptions, shapes: dict[str, tuple]):
    """A session of a graph whose inputs and outputs have shapes that end in these; `ValueError` names a file that isn't
    such a graph, or refers to other files."""
    # The key of a tensor's external data; `tinycap export` writes none.
    if b"location" in path.read_bytes():
        raise ValueError(f"{path}: expected a graph with its weights, got one with external data")
    try:
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime's errors share no base class of their own.
        raise ValueError(f"{path}: expected an ONNX graph: {first_line(error)}") from error
    found = {item.name: tuple(item.shape[1:]) for item in (*session.get_inputs(), *session.get_outputs())}
    for name, shape in shapes.items():
        if name not in found or found[name][len(found[name]) - len(shape) :] != shape:
            raise ValueError(f"{path}: expected {name} with a shape that ends in {shape}, got {found.get(name)}")
    return session


def run_graph(session: onnxruntime.InferenceSession, outputs: list[str] | None, inputs: dict) -> list[np.ndarray]:
    """The outputs; `ValueError` where the graph fails, or the first of them isn't finite."""
    try:
        found = session.run(outputs, inputs)
    except Exception as error:
        raise ValueError(f"the graph of {next(iter(inputs))} fails: {first_line(error)}") from error
    if not np.isfinite(found[0]).all():
        raise ValueError(f"the graph of {next(iter(inputs))}: expected finite outputs, got NaN or infinite ones")
    return found


def read_sizes(config: dict, place: str) -> dict[str, int]:
    """The fields of `SIZES` by TinyCap's names; `ValueError` names one that is no positive integer."""
    sizes, is_export = {}, config.get("model_type") == EXPORTED_TYPE
    for part, names in SIZES.items():
        part = part if is_export else OWN_PARTS[part]
        section = config[part] if isinstance(config.get(part), dict) else {}
        for name, exported in names.items():
            key = exported if is_export else name
            check_number(f"{place}: {part}.{key}", section.get(key), Integral, 1, MAX_INTEGER)
            sizes[name] = section[key]
    return sizes


class OnnxCaptioner:
    """A TinyCap as two ONNX graphs, in a folder that `export_onnx` wrote.

    Args:
        quantized: use the int8 graphs.
        num_threads: of onnxruntime; its default if not given.

    Raises:
        ValueError: a file is missing, or a setting of a config isn't supported; names it.
    """

    def __init__(self, folder: str | Path, quantized: bool = False, num_threads: int | None = None):
        folder, suffix = Path(folder), "_quantized" if quantized else ""
        paths = [folder / "onnx" / f"{name}{suffix}.onnx" for name in (ENCODER, DECODER)]
        for path in (*paths, folder / "tokenizer.json", folder / "preprocessor_config.json"):
            if not path.is_file():
                raise ValueError(f"expected a folder that `tinycap export` wrote, got {folder} without {path.name}")
        tokenizer_config, generation_config = (
            read_json(folder / name) if os.path.lexists(folder / name) else {}
            for name in ("tokenizer_config.json", "generation_config.json")
        )
        if tokenizer_config.get("clean_up_tokenization_spaces"):
            raise ValueError("tokenizer config: clean_up_tokenization_spaces isn't supported without transformers")
        generation_config = {name: value for name, value in generation_config.items() if value is not None}
        for name, value in generation_config.items():
            if name not in ANY_VALUE and (name not in NEUTRAL or value != NEUTRAL[name]):
                raise ValueError(f"generation config: {name}={value!r} isn't supported without transformers")
        config = read_json(folder / "config.json")
        sizes = read_sizes(config, os.fspath(folder / "config.json"))
        # Number of the decoder's positions.
        self.max_positions = sizes["max_position_embeddings"]
        ids = {name: config.get(name) for name in ("decoder_start_token_id", "eos_token_id")}
        self.generation_config = {**DEFAULTS, **ids, **generation_config}
        check_generation(self.generation_config, f"{folder / 'generation_config.json'}", sizes["vocab_size"])
        self.start_token_id, eos = (self.generation_config[name] for name in ids)
        self.eos_token_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        try:
            self.tokenizer = Tokenizer.from_file(os.fspath(folder / "tokenizer.json"))
        except Exception as error:
            # `tokenizers` raises plain `Exception`.
            raise ValueError(f"{folder / 'tokenizer.json'}: expected a tokenizer, got {error}") from error
        path = folder / "preprocessor_config.json"
        pixels = {**ImagePreprocessor.DEFAULTS, **read_json(path)}
        check_pixels(pixels, sizes["image_size"], sizes["num_channels"], os.fspath(path))
        self.preprocessor, self.quantized = ImagePreprocessor(pixels), quantized
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0
        # Spinning threads would take CPU time from the caller.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        image = (sizes["num_channels"], sizes["image_size"], sizes["image_size"])
        self.encoder = load_graph(
            paths[0], options, {"pixel_values": image, "last_hidden_state": (), "image_embeds": ()}
        )
        self.decoder = load_graph(paths[1], options, {"input_ids": (), "logits": (sizes["vocab_size"],)})
        self.encoder_path, self.text_model, self.visual_projection, self.max_text_length = paths[0], None, None, None
        if (path := folder / "onnx" / f"{TEXT_MODEL}{suffix}.onnx").is_file():
            self.text_model = load_graph(path, options, {"input_ids": (), "attention_mask": (), "text_embeds": ()})
            section, name = config.get("text_encoder_config") or {}, "max_position_embeddings"
            place = f"{folder / 'config.json'}: text_encoder_config.{name}"
            check_number(place, section.get(name), Integral, 1, MAX_INTEGER)
            self.max_text_length = section[name]
            if (path := folder / "onnx" / VISUAL_PROJECTION).is_file():
                self.visual_projection = np.load(path, allow_pickle=False)
        inputs = self.decoder.get_inputs()
        # (batch, heads, tokens so far, head_dim) of every layer's keys and values.
        self.cache_shapes = {item.name: item.shape for item in inputs if item.name.startswith("past_key_values")}
        heads, layers = sizes["num_attention_heads"], sizes["num_hidden_layers"]
        expected = [(heads, sizes["hidden_size"] // heads)] * min(2 * layers, len(inputs))
        if [tuple(shape[1::2]) for shape in self.cache_shapes.values()] != expected:
            raise ValueError(f"{paths[1]}: config.json expects a cache of {layers} layers and {heads} heads")

    @classmethod
    def from_pretrained(cls, folder: str | Path, quantized: bool = False, num_threads: int | None = None):
        """The same as the class, by transformers' name."""
        return cls(folder, quantized, num_threads)

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
        """Captions images; the generation config has the defaults of the search.

        Args:
            images: a list of whatever `load_image` opens (paths, bytes, PIL images, ...), or one of these.
            num_beams: beams of the search, 1 for greedy.
            max_new_tokens: longest caption in tokens.
            num_return_sequences: captions of each image, the best first; at most `num_beams`.
            length_penalty: above 0 favours longer captions of a beam search.
            prompt: beginning of every caption, part of its text.
            batch_size: images run through the model together; by default all.

        Returns:
            For each image, a list of captions. Among several images, an unreadable one has a single `Caption` with an
            error and without text.

        Raises:
            ValueError: the only image can't be read, or an argument is invalid; names it.
        """
        images = images if isinstance(images, (list, tuple)) else [images]
        given = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "length_penalty": length_penalty}
        given = {name: value for name, value in given.items() if value is not None}
        settings = {**self.generation_config, **given, "num_return_sequences": num_return_sequences}
        check_generation(settings, "arguments")
        if num_return_sequences > settings["num_beams"]:
            at_most = f"{settings['num_beams']} (num_beams)"
            raise ValueError(f"num_return_sequences: expected at most {at_most}, got {num_return_sequences}")
        # A trailing space would be a separate token; in captions it is part of the next word.
        prompt_ids = self.tokenizer.encode(prompt.rstrip()).ids if prompt else []
        if prompt_ids[:1] != [self.start_token_id]:
            prompt_ids = [self.start_token_id, *prompt_ids]
        if len(prompt_ids) >= self.max_positions:
            raise ValueError(f"prompt: expected fewer than {self.max_positions} tokens, got {len(prompt_ids)}")
        captions, run = [], partial(self._caption, prompt_ids, settings)
        for _, found in run_batches(run, images, batch_size or len(images) or 1):
            if isinstance(found, Exception) and len(images) == 1:
                raise found
            captions.append([Caption(None, error=str(found))] if isinstance(found, Exception) else found)
        return captions

    def get_image_features(self, images: list) -> np.ndarray:
        """The student's embeddings of B images, (B, projection_dim), unit norm; `ValueError` if one can't be read."""
        return self.encode(self.preprocessor([load_image(image) for image in images]))[1]

    def get_text_features(self, texts: list[str]) -> np.ndarray:
        """Embeddings of N texts, (N, D), unit norm; for checkpoints with a text encoder."""
        # One at a time, for the reason that `encode` gives, and without padding.
        rows = [self.tokenizer.encode(text).ids[: self.max_text_length] for text in texts]
        inputs = [{"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)} for ids in rows]
        return np.concatenate([run_graph(self.text_model, ["text_embeds"], row)[0] for row in inputs])

    def encode(self, pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, 3, H, W) -> the decoder's input (B, M, width) and the image embeddings (B, projection_dim)."""
        # In int8 one at a time, which isn't slower: each activation has one scale for the batch, so that results would
        # depend on the other images.
        batches = pixel_values[:, None] if self.quantized else [pixel_values]
        names = ["last_hidden_state", "image_embeds"]
        parts = [run_graph(self.encoder, names, {"pixel_values": batch}) for batch in batches]
        return tuple(map(np.concatenate, zip(*parts)))

    def decoding_step(self, encoder_hidden_states: np.ndarray) -> Callable:
        """A `Step` of the searches for encoded images (B, M, width), with their cache."""
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
            inputs = {"input_ids": tokens, "encoder_hidden_states": states, **cache}
            logits, *present = run_graph(self.decoder, None, inputs)
            cache.update(zip(self.cache_shapes, present))
            return logits[:, -1]

        return step

    def _caption(self, prompt_ids: list[int], settings: dict, images: list) -> list[list[Caption]]:
        """The captions of opened images, with the settings of `__call__`."""
        limit = settings.get("max_new_tokens") or settings["max_length"] - len(prompt_ids)
        limit = max(1, min(limit, self.max_positions - len(prompt_ids)))
        step = self.decoding_step(self.encode(self.preprocessor(images))[0])
        prompt = np.tile(np.array(prompt_ids, np.int64), (len(images), 1))
        search = {name: settings[name] for name in (*DEFAULTS, "num_return_sequences") if name != "max_length"}
        found = beam_search(step, prompt, self.eos_token_ids, limit, **search)

        def decode(tokens: list[int]) -> str:
            return self.tokenizer.decode(prompt_ids + tokens, skip_special_tokens=True).strip()

        return [
            [Caption(decode(tokens), float(score), len(tokens)) for tokens, score in zip(*image)]
            for image in zip(*found)
        ]
