"""The caption tokenizer: a pretrained one by name, or a byte-level BPE trained on the training captions."""

import logging
import re
from collections.abc import Iterable
from itertools import islice

from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast


logger = logging.getLogger(__name__)

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<pad>", "<s>", "</s>"
# 256 bytes and the three tokens above, so that every text can be encoded.
MIN_VOCAB_SIZE = 256 + 3
# Learning merges is quadratic in a word's length: half an hour for a million letters without a space.
LONG_WORD = re.compile(r"(\S{200})(?=\S)")


def train_tokenizer(captions: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2) on the captions.

    Args:
        vocab_size: tokens at most, special ones included; fewer if the captions have fewer merges; at least 259.
        model_max_length: tokens a caption may have, special ones included.

    Returns:
        A fast tokenizer with `<pad>`, `<s>` and `</s>` that puts `<s>` before every text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size: expected at least {MIN_VOCAB_SIZE} (256 bytes and 3 special tokens), got {vocab_size}"
        )
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        (LONG_WORD.sub(r"\1 ", caption) for caption in captions),
        vocab_size,
        # A merge seen once is often a typing error.
        min_frequency=2,
        # The end token mustn't be id 2, which CLIP's text model handles as in its earliest checkpoints.
        special_tokens=[PAD_TOKEN, EOS_TOKEN, BOS_TOKEN],
        show_progress=False,
    )
    tokenizer = Tokenizer.from_str(bpe.to_str())
    # With the start token in the template, generation can start from an empty prompt.
    start = [(BOS_TOKEN, tokenizer.token_to_id(BOS_TOKEN))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS_TOKEN} $A", special_tokens=start)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """Loads a pretrained tokenizer and fills in missing special tokens, without enlarging the vocabulary.

    BERT's `[CLS]` and `[SEP]` serve as start and end token. Without a pad or start token (GPT-2) the end token serves;
    it is still learnt, since labels are masked by length, not by token id. Raises `ValueError` without an end token.
    """
    try:
        # Without the argument, transformers would ask whether to run the checkpoint's code.
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:
        # `tokenizers` raises plain `Exception`, and transformers various errors on a damaged file.
        raise ValueError(f"tokenizer {name_or_path}: expected one that transformers can load: {error}") from error
    end = tokenizer.eos_token or tokenizer.sep_token
    if end is None or tokenizer.convert_tokens_to_ids(end) is None:
        raise ValueError(f"tokenizer {name_or_path}: expected an end token (eos_token) to stop generation, got none")
    substitutes = {"eos_token": end, "bos_token": tokenizer.cls_token or end, "pad_token": end}
    for token, substitute in substitutes.items():
        if getattr(tokenizer, token) is None:
            logger.info("tokenizer %s has no %s; %s serves as one", name_or_path, token, substitute)
            setattr(tokenizer, token, substitute)
    # The prompts of a batch must end at the same position.
    tokenizer.padding_side = "left"
    return tokenizer


def encode_captions(
    tokenizer: PreTrainedTokenizerFast, captions: list[str], max_length: int, end_truncated: bool = True
) -> list[list[int]]:
    """N captions to N lists of 1 to `max_length` target ids: the caption's tokens, truncated, then the end token, which
    truncated captions only have with `end_truncated`: to generate, a model must not learn to stop there.

    There is no start token: the model shifts the ids right. Special tokens spelled out in a caption ("</s>") are text.
    """
    # Not verbose: no warning about captions that are truncated here anyway.
    options = {"split_special_tokens": True, "return_attention_mask": False, "verbose": False}
    encoded = tokenizer(captions, add_special_tokens=False, **options)
    end = [tokenizer.eos_token_id]
    return [
        ids + end if len(ids) < max_length else ids[: max_length - 1] + end if end_truncated else ids[:max_length]
        for ids in encoded["input_ids"]
    ]


def count_truncated(
    tokenizer: PreTrainedTokenizerFast, captions: Iterable[str], max_length: int
) -> dict[str, int | float]:
    """How many captions there are, and how many of them `encode_captions` truncates; logs them."""
    total, truncated, captions = 0, 0, iter(captions)
    while chunk := list(islice(captions, 10_000)):
        total += len(chunk)
        # One more than fits, so that the longest captions have it.
        truncated += sum(len(ids) > max_length for ids in encode_captions(tokenizer, chunk, max_length + 1))
    share = truncated / max(1, total)
    if truncated:
        logger.warning(
            "%d of %d training captions (%.1f %%) have more than --max_caption_length %d tokens with their end; they "
            "are cut",
            *(truncated, total, 100 * share, max_length),
        )
    return {"train_captions": total, "truncated_train_captions": truncated}
