"""Trims a model's vocabulary to the tokens that a corpus uses.

GPT-2's 50,257 tokens take 12.9 of a TinyCap's 18.2 million parameters, and captions use a few thousand of them. Kept
are: the tokens of the corpus's texts and of the model's own captions of its images, special tokens, all 256 bytes, so
that any text can still be written, and the merges that make kept tokens, with the parts of these.

The corpus is tokenised as before: byte-pair encoding repeatedly applies the first merge in its list that fits. All
merges that it ever applied to the corpus are kept in their order, so that the first one is the same each time.

Greedy captions stay the same, since kept tokens keep their logits. Beam search compares sums of log-probabilities,
which grow by the dropped tokens' share of the softmax, so that a few captions may change: every image is captioned
before and after, and the report counts the captions that differ.
"""

import json
import logging
import operator
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.deploy.captioners import batches, install_command
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration, TinyCapVisionOutput
from tinycap.processing_tinycap import load_image, preprocess_images
from tinycap.training.repository import save_repository
from tinycap.training.tokenizer import encode_captions


logger = logging.getLogger(__name__)

REPORT_NAME = "trim_report.json"
# Settings of a generation config that hold token ids in shapes of their own.
UNSUPPORTED = ("sequence_bias", "force_words_ids", "forced_decoder_ids")


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@dataclass
class BytePairs:
    """A byte-level BPE tokenizer, as `tokenizer.json` holds it.

    Raises:
        ValueError: it is of another kind; says which.
    """

    content: dict

    def __post_init__(self):
        model = self.content["model"]
        if model["type"] != "BPE" or '"ByteLevel"' not in json.dumps(self.content.get("pre_tokenizer")):
            raise ValueError(f"tokenizer: expected a byte-level BPE such as GPT-2's, got {model['type']}")
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "ignore_merges", "byte_fallback"):
            if model.get(name):
                raise ValueError(f"tokenizer: expected a byte-level BPE without {name}, got {model[name]!r}")

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> "BytePairs":
        return cls(json.loads(tokenizer.backend_tokenizer.to_str()))

    @property
    def vocab(self) -> dict[str, int]:
        return self.content["model"]["vocab"]

    @property
    def merges(self) -> list[tuple[str, str]]:
        """In their order of precedence."""
        merges = self.content["model"]["merges"]
        return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]

    def closure(self, used: Iterable[int]) -> list[int]:
        """The ids to keep so that used ones can still be made: also bytes, added tokens and all parts; ascending."""
        tokens = {number: token for token, number in self.vocab.items()}
        parts: dict[str, set[str]] = {}
        for first, second in self.merges:
            # Several merges may make one token: which of them does depends on the text, so that all are kept.
            parts.setdefault(first + second, set()).update((first, second))
        added = {entry["id"] for entry in self.content["added_tokens"]}
        waiting = [tokens[number] for number in used if number in tokens]
        waiting += [token for token in pre_tokenizers.ByteLevel.alphabet() if token in self.vocab]
        kept: set[str] = set()
        while waiting:
            token = waiting.pop()
            if token not in kept:
                kept.add(token)
                waiting.extend(parts.get(token, ()))
        return sorted({self.vocab[token] for token in kept} | added)

    def trimmed(self, kept: Sequence[int]) -> dict:
        """The content with these ids alone, numbered from 0 in their order."""
        numbers = {old: new for new, old in enumerate(kept)}
        content = json.loads(json.dumps(self.content))
        vocab = {token: numbers[old] for token, old in self.vocab.items() if old in numbers}
        content["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
        content["model"]["merges"] = [
            list(pair) for pair in self.merges if pair[0] + pair[1] in vocab and pair[0] in vocab and pair[1] in vocab
        ]
        for entry in content["added_tokens"]:
            entry["id"] = numbers[entry["id"]]
        if content.get("padding"):
            content["padding"]["pad_id"] = numbers[content["padding"]["pad_id"]]
        content["post_processor"] = _renumber_processor(content.get("post_processor"), numbers)
        return content


def _renumber_processor(processor: dict | None, numbers: dict[int, int]) -> dict | None:
    if processor is None:
        return None
    processor = dict(processor)
    if "processors" in processor:
        processor["processors"] = [_renumber_processor(part, numbers) for part in processor["processors"]]
    for name in ("sep", "cls"):
        if name in processor:
            token, old = processor[name]
            processor[name] = [token, numbers[old]]
    for entry in (processor.get("special_tokens") or {}).values():
        entry["ids"] = [numbers[old] for old in entry["ids"]]
    return processor


def trim_tokenizer(tokenizer: PreTrainedTokenizerFast, kept: Sequence[int]) -> PreTrainedTokenizerFast:
    """The tokenizer with these ids alone, numbered from 0 in their order; see `BytePairs.closure`."""
    content = BytePairs.of(tokenizer).trimmed(kept)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        model_max_length=tokenizer.model_max_length,
        model_input_names=list(tokenizer.model_input_names),
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=False,
    )


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """The ids of each text and of its end, as training makes them but whole."""
    return encode_captions(tokenizer, texts, max_length=10**9) if texts else []


def check_tokenisation(
    tokenizer: PreTrainedTokenizerFast, trimmed: PreTrainedTokenizerFast, kept: Sequence[int], texts: list[str]
) -> None:
    """Raises `ValueError` for the first text that isn't tokenised as before."""
    for text, before, after in zip(texts, tokens_of(tokenizer, texts), tokens_of(trimmed, texts)):
        if [kept[number] for number in after] != before:
            raise ValueError(f"tokenizer: expected {text!r} to be tokenised as before, got other tokens")


# --- the model --------------------------------------------------------------------------------------------------------


def token_ids_of(config: dict[str, Any]) -> set[int]:
    """The ids that a config names as start, end, padding and the like.

    Raises:
        ValueError: it holds ids in a shape that isn't understood here; names the setting.
    """
    for name in UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"generation config: {name} can't be renumbered; expected it unset")
    ids: set[int] = set()
    for name, value in config.items():
        if name.endswith("_token_id") and value is not None:
            ids.update(value if isinstance(value, (list, tuple)) else [value])
    return ids


def renumber_config(config: dict[str, Any], numbers: dict[int, int]) -> dict[str, Any]:
    """A config with its token ids renumbered; what suppresses tokens that are gone is left out."""
    config = dict(config)
    for name, value in config.items():
        if name.endswith("_token_id") and value is not None:
            many = isinstance(value, (list, tuple))
            config[name] = [numbers[old] for old in value] if many else numbers[value]
        elif name in ("suppress_tokens", "begin_suppress_tokens") and value is not None:
            config[name] = [numbers[old] for old in value if old in numbers] or None
        elif name == "bad_words_ids" and value is not None:
            kept = [word for word in value if all(old in numbers for old in word)]
            config[name] = [[numbers[old] for old in word] for word in kept] or None
    return config


def trim_model(model: TinyCapForConditionalGeneration, kept: Sequence[int]) -> TinyCapForConditionalGeneration:
    """A model whose embedding and head have these rows alone, in their order; ids in its configs are renumbered."""
    numbers = {old: new for new, old in enumerate(kept)}
    config = renumber_config(model.config.to_dict(), numbers)
    config["text_config"] = renumber_config({**config["text_config"], "vocab_size": len(kept)}, numbers)
    trimmed = TinyCapForConditionalGeneration(TinyCapConfig(**config)).to(model.dtype)
    state = model.state_dict()
    for name in ("decoder.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][torch.tensor(kept, device=model.device)]
    trimmed.load_state_dict(state)
    trimmed.generation_config = GenerationConfig(**renumber_config(model.generation_config.to_dict(), numbers))
    return trimmed.eval().to(model.device)


# --- captions before and after ----------------------------------------------------------------------------------------


@torch.inference_mode()
def encode_images(model, image_processor, images: Sequence[Any], batch_size: int) -> tuple[list[ModelOutput], int]:
    """The student's outputs for images, batch by batch, and how many images couldn't be read.

    The student is the same before and after trimming, so that each image is encoded once.
    """
    encoded, unreadable = [], 0
    for batch in batches(images, batch_size):
        opened = []
        for image in batch:
            try:
                opened.append(load_image(image))
            except (ValueError, TypeError) as error:
                logger.warning("skipped: %s", error)
                unreadable += 1
        if opened:
            pixel_values = preprocess_images(image_processor, opened).to(model.device)
            output = model.get_encoder()(pixel_values, return_dict=True)
            tokens = output.last_hidden_state if model.config.memory == "patches" else output.last_hidden_state[:, :1]
            encoded.append(TinyCapVisionOutput(last_hidden_state=tokens.clone(), pooler_output=output.pooler_output))
    return encoded, unreadable


@torch.inference_mode()
def caption_tokens(model, encoded: list[ModelOutput], num_beams: int) -> list[list[int]]:
    """The token ids of each image's caption, padding included."""
    batches = (model.generate(encoder_outputs=batch, num_beams=num_beams, do_sample=False) for batch in encoded)
    return [row for batch in batches for row in batch.tolist()]


def decode(tokenizer: PreTrainedTokenizerFast, captions: dict[int, list[list[int]]]) -> dict[int, list[str]]:
    """Texts of captions, by number of beams."""
    return {n: tokenizer.batch_decode(rows, skip_special_tokens=True) for n, rows in captions.items()}


# --- the corpus -------------------------------------------------------------------------------------------------------


def read_texts(path: str | Path) -> list[str]:
    """The lines of a text file that hold anything.

    Raises:
        ValueError: it can't be read, or isn't UTF-8; names it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a text file in UTF-8: {error}") from None
    return [line for line in text.splitlines() if line.strip()]


def load_corpus(
    dataset_name: str, split: str, text_splits: Sequence[str] = (), max_samples: int | None = None
) -> tuple[list[str], list[dict]]:
    """The captions of a data set's splits, and the images of the first of them, not yet decoded.

    Args:
        dataset_name: Hub id, folder of parquet, or imagefolder.
        split: whose images and captions are taken.
        text_splits: whose captions are taken too.
        max_samples: images at most; all captions are taken.

    Raises:
        ValueError: a split or a column isn't there. Rows without captions are left out with a warning.
        ImportError: `datasets` isn't installed.
    """
    try:
        from tinycap.training.data import load_images, uncaptioned, undecoded
    except ImportError as error:
        raise ImportError(f"data sets need the package datasets: {install_command('evaluation')} ({error})") from error
    texts, images = [], None
    for name in dict.fromkeys([split, *text_splits]):
        rows, columns = load_images(dataset_name, name)
        bad = uncaptioned(rows, columns)
        good = [number for number in range(len(rows)) if number not in bad]
        table = rows.select_columns(columns.captions)
        texts += [text for number in good for text in columns.captions_of(table[number])]
        if images is None:
            images = undecoded(rows.select_columns([columns.image]), columns.image).select(good[:max_samples])
            images = images[columns.image][:]
    return texts, images


# --- the command ------------------------------------------------------------------------------------------------------


def time_captions(models: dict[str, Any], encoded: list[ModelOutput], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of 16 greedy tokens for one image and for a batch, from embeddings on; models alternate."""
    first = encoded[0]
    one = TinyCapVisionOutput(last_hidden_state=first.last_hidden_state[:1], pooler_output=first.pooler_output[:1])
    options = {"num_beams": 1, "do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16}
    times = {name: {} for name in models}
    for label, batch in (("one_image_ms", one), (f"batch_of_{len(first.pooler_output)}_ms", first)):
        seconds = {name: [] for name in models}
        for _ in range(rounds + 2):
            for name, model in models.items():
                began = time.perf_counter()
                model.generate(encoder_outputs=batch, **options)
                seconds[name].append(time.perf_counter() - began)
        for name, values in seconds.items():
            # The first two rounds warm up.
            times[name][label] = 1000 * statistics.median(values[2:])
    return times


def trim_repository(
    model_name_or_path: str,
    output_dir: str | Path,
    texts: list[str],
    images: Sequence[Any],
    batch_size: int = 16,
    rounds: int = 15,
) -> dict:
    """Trims a model repository to a corpus and writes it, with `trim_report.json`, to another folder.

    Args:
        model_name_or_path: the model with the big vocabulary.
        output_dir: an empty or new folder.
        texts: what must be tokenised as before.
        images: captioned before and after, greedily and by the generation config's own number of beams; anything that
            `load_image` opens.
        batch_size: images run together.
        rounds: captions timed for each model; 0 for none.

    Returns:
        The report: tokens by their reason, sizes and speeds before and after, texts and captions checked, and how many
        captions differ.

    Raises:
        ValueError: the folder isn't empty, the tokenizer isn't a byte-level BPE, or there are no texts and no images.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"--output: expected an empty folder, got {output_dir}, which isn't")
    model = TinyCapForConditionalGeneration.from_pretrained(model_name_or_path).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_name_or_path)
    image_processor = AutoImageProcessor.from_pretrained(model_name_or_path, trust_remote_code=False)
    pairs = BytePairs.of(tokenizer)
    encoded, unreadable = encode_images(model, image_processor, images, batch_size)
    if not texts and not encoded:
        raise ValueError("expected texts or images to trim to, got none")

    tokens = {n: caption_tokens(model, encoded, n) for n in sorted({1, model.generation_config.num_beams or 1})}
    by_texts = {number for ids in tokens_of(tokenizer, texts) for number in ids}
    by_captions = {number for captions in tokens.values() for caption in captions for number in caption}
    by_configs = token_ids_of(model.generation_config.to_dict()) | token_ids_of(model.config.to_dict())
    kept = pairs.closure(by_texts | by_captions | by_configs)
    trimmed, trimmed_tokenizer = trim_model(model, kept), trim_tokenizer(tokenizer, kept)
    check_tokenisation(tokenizer, trimmed_tokenizer, kept, texts)
    before = decode(tokenizer, tokens)
    after = decode(trimmed_tokenizer, {n: caption_tokens(trimmed, encoded, n) for n in tokens})
    save_repository(output_dir, trimmed, trimmed_tokenizer, image_processor)
    report = {
        "model": str(model_name_or_path),
        "texts_tokenised_as_before": len(texts),
        "images": len(before[1]),
        "images_unreadable": unreadable,
        "captions_checked": {str(n): len(captions) for n, captions in before.items()},
        "captions_that_differ": {str(n): sum(map(operator.ne, before[n], after[n])) for n in before},
        "distinct_captions": {str(n): len(set(captions)) for n, captions in before.items()},
        "tokens": {
            "used_by_texts": len(by_texts),
            "used_by_captions_alone": len(by_captions - by_texts),
            "kept": len(kept),
        },
        "before": _sizes(model, tokenizer, Path(model_name_or_path)),
        "after": _sizes(trimmed, trimmed_tokenizer, output_dir),
    }
    if encoded and rounds:
        for name, times in time_captions({"before": model, "after": trimmed}, encoded, rounds).items():
            report[name].update(times)
    (output_dir / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _sizes(model, tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, int]:
    sizes = {
        "vocab_size": model.config.text_config.vocab_size,
        "tokenizer_size": len(tokenizer),
        "parameters": model.num_parameters(),
    }
    for name in ("model.safetensors", "tokenizer.json"):
        if (folder / name).is_file():
            sizes[f"{name}_bytes"] = (folder / name).stat().st_size
    return sizes
