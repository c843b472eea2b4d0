"""Trims a model's vocabulary to the tokens that a corpus uses, GPT-2's 50,257 to a few thousand.

Kept are the tokens of the corpus's texts, of the model's own captions of its images and of the configs, all 256 bytes,
so that any text can still be encoded, and all merges that produce kept tokens, with their parts. Byte-pair encoding
repeatedly applies the first matching merge of its list: with these merges in their order, the corpus is tokenised as
before. Greedy captions don't change; beam search may: the report counts the captions that differ.
"""

import json
import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import GenerationConfig, GitProcessor, PreTrainedTokenizerFast

from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.deploy.outputs import filling
from tinycap.evaluation.captioning import Captions, caption_dataset
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training.data import Columns, load_images, uncaptioned
from tinycap.training.repository import load_repository, save_repository
from tinycap.training.tokenizer import encode_captions


logger = logging.getLogger(__name__)

REPORT_NAME = "trim_report.json"


def byte_pairs(tokenizer: PreTrainedTokenizerFast) -> dict:
    """The content of a byte-level BPE's `tokenizer.json`, merges as pairs; `ValueError` for other tokenizers."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE" or '"ByteLevel"' not in json.dumps(content.get("pre_tokenizer")):
        raise ValueError(f"tokenizer: expected a byte-level BPE such as GPT-2's, got {model['type']}")
    model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return content


def closure(tokenizer: PreTrainedTokenizerFast, used: Iterable[int]) -> list[int]:
    """The used ids, those of all parts that their merges need, bytes and added tokens; ascending."""
    content, used, size = byte_pairs(tokenizer), set(used), 0
    vocab = content["model"]["vocab"]
    kept = {token for token, number in vocab.items() if number in used}
    kept |= vocab.keys() & set(pre_tokenizers.ByteLevel.alphabet())
    while len(kept) > size:
        size = len(kept)
        # Several merges may produce the same token, depending on the text; all are kept.
        for first, second in reversed(content["model"]["merges"]):
            if first + second in kept:
                kept |= {first, second}
    return sorted({vocab[token] for token in kept} | {entry["id"] for entry in content["added_tokens"]})


def trim_tokenizer(tokenizer: PreTrainedTokenizerFast, kept: Sequence[int]) -> PreTrainedTokenizerFast:
    """The tokenizer with only these ids, renumbered from 0 in their order; see `closure`."""
    content = byte_pairs(tokenizer)
    model, ids = content["model"], {token: new for new, token in enumerate(tokenizer.convert_ids_to_tokens(kept))}
    model["vocab"] = {token: number for token, number in ids.items() if token in model["vocab"]}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= set(model["vocab"])]
    for entry in content["added_tokens"]:
        entry["id"] = ids[entry["content"]]
    if content.get("padding"):
        content["padding"]["pad_id"] = ids[content["padding"]["pad_token"]]
    content["post_processor"] = renumber_processor(content.get("post_processor"), ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        model_max_length=tokenizer.model_max_length,
        model_input_names=list(tokenizer.model_input_names),
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=False,
    )


def renumber_processor(part: Any, ids: dict[str, int]) -> Any:
    """A post-processor with new ids of its special tokens, which are {"ids", "tokens"} or [token, id]."""
    if isinstance(part, dict):
        part = {name: renumber_processor(value, ids) for name, value in part.items()}
        return {**part, "ids": [ids[token] for token in part["tokens"]]} if "tokens" in part else part
    if isinstance(part, list):
        is_pair = len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], int)
        return [part[0], ids[part[0]]] if is_pair else [renumber_processor(item, ids) for item in part]
    return part


def encode_whole(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """The ids of each text and of its end, as in training but not truncated."""
    return encode_captions(tokenizer, texts, max_length=10**9) if texts else []


def check_tokenisation(tokenizer, trimmed, kept: Sequence[int], texts: list[str]) -> None:
    """Raises `ValueError` for the first text that isn't tokenised as before."""
    for text, before, after in zip(texts, encode_whole(tokenizer, texts), encode_whole(trimmed, texts)):
        if [kept[number] for number in after] != before:
            raise ValueError(f"tokenizer: expected {text!r} to be tokenised as before, got other tokens")


def map_ids(config: dict[str, Any], change: Callable[[int], Any]) -> dict[str, Any]:
    """A model or generation config with `change` applied to each token id; `ValueError` if that isn't possible."""

    def mapped(value: Any) -> Any:
        return [mapped(item) for item in value] if isinstance(value, (list, tuple)) else change(value)

    result = dict(config)
    for name, value in config.items():
        if name in ("sequence_bias", "force_words_ids", "forced_decoder_ids") and value:
            raise ValueError(f"generation config: {name} can't be renumbered; expected it unset")
        if name == "text_config":
            result[name] = map_ids(value, change)
        elif value is not None and (name.endswith(("_token_id", "suppress_tokens")) or name == "bad_words_ids"):
            result[name] = mapped(value)
    return result


def trim_model(model: TinyCapForConditionalGeneration, kept: Sequence[int]) -> TinyCapForConditionalGeneration:
    """The model with only these rows of embedding and head, in their order, and renumbered ids in its configs."""
    number = {old: new for new, old in enumerate(kept)}.__getitem__
    config = map_ids(model.config.to_dict(), number)
    config["text_config"]["vocab_size"] = len(kept)
    trimmed = TinyCapForConditionalGeneration(TinyCapConfig(**config)).to(model.dtype)
    state = model.state_dict()
    for name in ("decoder.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][torch.tensor(kept, device=model.device)]
    trimmed.load_state_dict(state)
    trimmed.generation_config = GenerationConfig(**map_ids(model.generation_config.to_dict(), number))
    return trimmed.eval().to(model.device)


def allowed_image(columns: Columns, row: dict) -> Any:
    """The row's image, or `None`, which counts as unreadable, for one that a data set must not name."""
    try:
        return columns.image_of(row)
    except ValueError as error:
        logger.warning("%s", error)
        return None


def load_corpus(
    dataset_name: str, split: str, text_splits: Sequence[str] = (), max_samples: int | None = None
) -> tuple[list[str], list[dict]]:
    """All captions of a data set's splits, and the first captioned images of `split`, undecoded."""
    texts, images = [], None
    for name in dict.fromkeys([split, *text_splits]):
        rows, columns = load_images(dataset_name, name)
        bad = uncaptioned(rows, columns)
        rows = rows.select([number for number in range(len(rows)) if number not in bad])
        texts += [text for row in rows.select_columns(columns.captions) for text in columns.captions_of(row)]
        if images is None:
            chosen = rows.select_columns([columns.image]).take(min(max_samples or len(rows), len(rows)))
            images = [allowed_image(columns, row) for row in chosen]
    return texts, images


def trim_repository(
    model_name_or_path: str, output_dir: str | Path, texts: list[str], images: Sequence[Any], batch_size: int = 16
) -> dict:
    """Trims a model repository to a corpus and writes it, with `trim_report.json`, to an empty or new folder.

    Args:
        texts: what must be tokenised as before.
        images: captioned before and after, greedily and by the generation config's own number of beams; anything that
            `load_image` opens.

    Returns:
        The report: tokens, sizes, texts and captions checked, and how many captions differ.

    Raises:
        ValueError: the folder isn't empty, the tokenizer isn't a byte-level BPE, there are no texts and no images, or a
            text would be tokenised otherwise.
    """
    output_dir = Path(output_dir)
    # A killed run leaves a folder of its own.
    if output_dir.exists() and any(not path.name.startswith(".tinycap-") for path in output_dir.iterdir()):
        raise ValueError(f"--output: expected an empty folder, got {output_dir}, which isn't")
    model, tokenizer, image_processor = load_repository(model_name_or_path, "--model")
    if not texts and not images:
        raise ValueError("expected texts or images to trim to, got none")
    beams, named = sorted({1, model.generation_config.num_beams or 1}), set()
    for config in (model.config, model.generation_config):
        map_ids(config.to_dict(), named.add)

    def caption(model, tokenizer) -> dict[int, Captions]:
        rows, processor = [{"image": image} for image in images], GitProcessor(image_processor, tokenizer)
        options = {"batch_size": batch_size, "do_sample": False}
        return {n: caption_dataset(model, processor, rows, num_beams=n, **options) for n in beams if images}

    before = caption(model, tokenizer)
    by_texts = {number for ids in encode_whole(tokenizer, texts) for number in ids}
    by_captions = {number for found in before.values() for ids in found.tokens for number in ids}
    kept = closure(tokenizer, by_texts | by_captions | named)
    if named - set(kept):
        raise ValueError(f"config: expected ids of the tokenizer's {len(tokenizer)} tokens, got {named - set(kept)}")
    trimmed, trimmed_tokenizer = trim_model(model, kept), trim_tokenizer(tokenizer, kept)
    check_tokenisation(tokenizer, trimmed_tokenizer, kept, texts)
    after = caption(trimmed, trimmed_tokenizer)
    differ = {n: sum(map(operator.ne, found.captions, after[n].captions)) for n, found in before.items()}
    unreadable = len(before[1].skipped) if images else 0
    report = {
        "model": str(model_name_or_path),
        "texts_tokenised_as_before": len(texts),
        "images": len(images) - unreadable,
        "images_unreadable": unreadable,
        "captions_checked": {str(n): len(found.captions) for n, found in before.items()},
        "captions_that_differ": {str(n): number for n, number in differ.items()},
        "before": sizes(model, tokenizer, Path(model_name_or_path)),
    }
    with filling(output_dir) as aside:
        save_repository(aside, trimmed, trimmed_tokenizer, image_processor)
        report["after"] = sizes(trimmed, trimmed_tokenizer, aside)
        (aside / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def sizes(model, tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, int]:
    files = [folder / name for name in ("model.safetensors", "tokenizer.json")]
    return {
        "vocab_size": model.config.text_config.vocab_size,
        "tokenizer_size": len(tokenizer),
        "parameters": model.num_parameters(),
        **{f"{path.name}_bytes": path.stat().st_size for path in files if path.is_file()},
    }
