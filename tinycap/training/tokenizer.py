"""The caption tokenizer: a pretrained one by name, or a byte-level BPE trained on the training captions."""

import logging
import re
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast


logger = logging.getLogger(__name__)

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<pad>", "<s>", "</s>"
# 256 bytes and the three tokens above; below this not every text can be written.
MIN_VOCAB_SIZE = 256 + 3
# Learning merges takes the square of a word's length, half an hour for a million letters without a space.
LONG_WORD = re.compile(r"(\S{200})(?=\S)")


def train_tokenizer(captions: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2) whose words are the captions' own.

    Args:
        captions: the training captions.
        vocab_size: tokens at most, special ones included; fewer when the captions don't hold that many merges.
        model_max_length: tokens a caption may have, special ones included.

    Returns:
        A fast tokenizer that writes `<s>` before every text and knows `<pad>`, `<s>` and `</s>`.

    Raises:
        ValueError: `vocab_size` is below 259.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size: expected at least {MIN_VOCAB_SIZE} (256 bytes and 3 special tokens), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # A merge seen once would spend a row of the embedding on one caption's typing error.
        min_frequency=2,
        # The end token mustn't be id 2: CLIP's text model takes that for the mark of its earliest checkpoints.
        special_tokens=[PAD_TOKEN, EOS_TOKEN, BOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((LONG_WORD.sub(r"\1 ", caption) for caption in captions), trainer)
    # With the start token in the template, an empty prompt is [<s>] and generation can begin from it.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, tokenizer.token_to_id(BOS_TOKEN))]
    )
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
    """Loads a pretrained tokenizer and makes sure that captions can be framed with it.

    BERT's, which knows no start and end token by these names, begins with `[CLS]` and ends with `[SEP]`.
    A tokenizer without a pad token (GPT-2's) pads with its end token: labels are masked by length, not by token id, so
    the end token is still learnt, and the vocabulary keeps its size. One without a start token starts with its end
    token, as GPT-2 was trained to.

    Raises:
        ValueError: there is no end token, or no tokenizer that can be read.
    """
    try:
        # No code of the checkpoint's is run, and nobody is asked whether it should be.
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:
        # The Rust half of `tokenizers` raises plain `Exception`, the Python half whatever a broken file leads to.
        raise ValueError(f"tokenizer {name_or_path}: expected one that transformers can load: {error}") from error
    for token, substitute in (("bos_token", tokenizer.cls_token), ("eos_token", tokenizer.sep_token)):
        if getattr(tokenizer, token) is None and substitute is not None:
            setattr(tokenizer, token, substitute)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {name_or_path}: expected an end token (eos_token), where generation stops, got none"
        )
    for token in ("pad_token", "bos_token"):
        if getattr(tokenizer, token) is None:
            logger.info("tokenizer %s has no %s; %s serves as one", name_or_path, token, tokenizer.eos_token)
            setattr(tokenizer, token, tokenizer.eos_token)
    # Prompts of a batch end where generation goes on.
    tokenizer.padding_side = "left"
    return tokenizer


def encode_captions(tokenizer: PreTrainedTokenizerFast, captions: list[str], max_length: int) -> list[list[int]]:
    """Captions to target ids: the caption's tokens, cut to leave room, then the end token.

    Special tokens spelled out in a caption ("</s>") are text like any other.

    Args:
        captions: N texts.
        max_length: ids a caption may have, the end token included.

    Returns:
        N lists of 1 to `max_length` ids, without the start token: the model shifts them right.
    """
    # Not verbose: captions longer than the model can take are cut here, where transformers would warn of them.
    options = {"split_special_tokens": True, "return_attention_mask": False, "verbose": False}
    encoded = tokenizer(captions, add_special_tokens=False, **options)
    return [ids[: max_length - 1] + [tokenizer.eos_token_id] for ids in encoded["input_ids"]]
