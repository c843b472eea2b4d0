"""A smaller model from one with a big vocabulary: the tokens that a corpus never uses are dropped, its captions stay.

GPT-2's 50,257 tokens take 12.9 of a TinyCap's 18.2 million parameters, and captions use a few thousand of them. What
is kept: the tokens that the corpus's texts and the model's own captions of its photos use, special tokens, all 256
bytes, so that any text can still be written, and the merges that make kept tokens, with the parts of these.

Why texts are tokenised as before: byte-pair encoding applies, again and again, the first merge in its list that fits.
All merges that it ever applied to the corpus are kept, in their order, so that each time the same one is the first.

Why captions are the same: kept tokens keep their logits, so that a greedy search that only ever chose kept tokens
chooses them again. A beam search compares sums of log-probabilities, and these grow by the dropped tokens' share, which
label smoothing makes a tenth. Where that changes a caption, one token stands in for all that were dropped: its row is
fitted so that its logit is the logarithm of their summed exponentials, and it is suppressed, so that it counts in every
softmax and is never said. Every photo is captioned again, greedily and by beams; while a caption still differs, the
most probable dropped tokens are taken back.
"""

import json
import logging
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration, TinyCapVisionOutput
from tinycap.processing_tinycap import load_image, preprocess_images
from tinycap.training.repository import save_repository
from tinycap.training.tokenizer import encode_captions


logger = logging.getLogger(__name__)

REPORT_NAME = "trim_report.json"
# Tokens taken back at first when a beam search ends otherwise; doubled each time.
FIRST_TAKEN_BACK = 64
# The token that stands in for all that were dropped, and how many steps of captions its row is fitted to at most.
STAND_IN, MAX_FITTED = "<dropped>", 8192
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


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerFast, kept: Sequence[int], stand_in: bool = False
) -> PreTrainedTokenizerFast:
    """The tokenizer with these ids alone, numbered from 0 in their order; see `BytePairs.closure`.

    Args:
        stand_in: one more special token follows, which stands in for the dropped ones.
    """
    content = BytePairs.of(tokenizer).trimmed(kept)
    trimmed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        model_max_length=tokenizer.model_max_length,
        model_input_names=list(tokenizer.model_input_names),
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=False,
    )
    if stand_in:
        trimmed.add_tokens([AddedToken(STAND_IN, special=True)], special_tokens=True)
    return trimmed


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
    found: set[int] = set()
    for name, value in config.items():
        if name.endswith("_token_id") and value is not None:
            found.update(value if isinstance(value, (list, tuple)) else [value])
    return found


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


def trim_model(
    model: TinyCapForConditionalGeneration, kept: Sequence[int], stand_in: torch.Tensor | None = None
) -> TinyCapForConditionalGeneration:
    """A model whose embedding and head have these rows alone, in their order; ids in its configs are renumbered.

    Args:
        stand_in: (hidden_size,), a row that follows them, of a token that is never said.
    """
    numbers = {old: new for new, old in enumerate(kept)}
    config = renumber_config(model.config.to_dict(), numbers)
    vocab_size = len(kept) + (stand_in is not None)
    config["text_config"] = renumber_config({**config["text_config"], "vocab_size": vocab_size}, numbers)
    trimmed = TinyCapForConditionalGeneration(TinyCapConfig(**config)).to(model.dtype)
    state = model.state_dict()
    rows = torch.tensor(kept, device=model.device)
    for name in ("decoder.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][rows]
        if stand_in is not None:
            state[name] = torch.cat([state[name], stand_in[None].to(state[name])])
    trimmed.load_state_dict(state)
    generation = renumber_config(model.generation_config.to_dict(), numbers)
    if stand_in is not None:
        generation["suppress_tokens"] = [*(generation.get("suppress_tokens") or []), len(kept)]
    trimmed.generation_config = GenerationConfig(**generation)
    return trimmed.eval().to(model.device)


# --- the same captions ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def encode_photos(model, image_processor, images: Iterable[Any], batch_size: int) -> tuple[list[ModelOutput], int]:
    """The student's outputs for images, batch by batch, and how many images couldn't be read.

    The student is the same before and after, so that each photo is encoded once for all comparisons.
    """
    encoded, batch, unreadable = [], [], 0

    def run() -> None:
        pixel_values = preprocess_images(image_processor, batch).to(model.device)
        output = model.get_encoder()(pixel_values, return_dict=True)
        tokens = output.last_hidden_state if model.config.memory == "patches" else output.last_hidden_state[:, :1]
        encoded.append(TinyCapVisionOutput(last_hidden_state=tokens.clone(), pooler_output=output.pooler_output))
        batch.clear()

    for image in images:
        try:
            batch.append(load_image(image))
        except (ValueError, TypeError) as error:
            logger.warning("left out: %s", error)
            unreadable += 1
        if len(batch) == batch_size:
            run()
    if batch:
        run()
    return encoded, unreadable


@torch.inference_mode()
def caption_tokens(model, encoded: list[ModelOutput], num_beams: int) -> list[list[int]]:
    """The tokens of each photo's caption, without what pads it."""
    captions = []
    for batch in encoded:
        for row in model.generate(encoder_outputs=batch, num_beams=num_beams, do_sample=False).tolist():
            captions.append(_without_padding(row, model.generation_config))
    return captions


def _without_padding(row: list[int], config: GenerationConfig) -> list[int]:
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    # The first token starts the caption, also where one token is start and end.
    last = next((position for position, token in enumerate(row[1:], start=1) if token in ends), len(row) - 1)
    return row[: last + 1]


@torch.inference_mode()
def decoding_states(model, encoded: list[ModelOutput], num_beams: int) -> torch.Tensor:
    """(steps, hidden_size): what the head saw in steps of a search's captions, `MAX_FITTED` of them at most."""
    found = []
    for batch in encoded:
        options = {"num_beams": num_beams, "num_return_sequences": num_beams, "do_sample": False}
        sequences = model.generate(encoder_outputs=batch, **options)
        memory = model.get_memory(batch)[0].repeat_interleave(num_beams, dim=0)
        states = model.decoder(sequences[:, :-1], encoder_hidden_states=memory).last_hidden_state
        for row, caption in zip(states, sequences.tolist()):
            found.append(row[: len(_without_padding(caption, model.generation_config)) - 1])
    states = torch.cat(found)
    # Drawn from all photos alike.
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(0))[:MAX_FITTED]
    return states[order.to(states.device)]


@torch.inference_mode()
def token_mass(model, states: torch.Tensor) -> torch.Tensor:
    """(vocab_size,): how probable each token was, summed over decoding states (steps, hidden_size)."""
    return sum(model.lm_head(part).float().softmax(dim=-1).double().sum(dim=0) for part in states.split(256))


@torch.inference_mode()
def fit_stand_in(model, states: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """A row (hidden_size,) whose logit is, at decoding states, the log of the dropped tokens' summed exponentials.

    Ridge regression around the dropped rows' mean: rows that training only ever pushed away lie close together, so that
    what is left to fit is little more than the logarithm of their number. A head has no bias, but the final layer norm
    leads to one: its output, divided by its scale, has the same mean for every state.
    """
    dropped = torch.ones(model.config.text_config.vocab_size, dtype=torch.bool, device=model.device)
    dropped[list(kept)] = False
    rows = model.lm_head.weight[dropped].float()
    target = torch.cat([(part @ rows.T).logsumexp(dim=-1) for part in states.float().split(256)]).double()
    states, mean = states.double(), rows.double().mean(dim=0)
    # Faint: along the direction that makes up for a bias the row is hundreds long, and that is what is wanted.
    scale = 1e-9 * states.square().sum() / states.shape[1]
    gram = states.T @ states + scale * torch.eye(states.shape[1], dtype=states.dtype, device=states.device)
    return mean + torch.linalg.solve(gram, states.T @ (target - states @ mean))


def most_probable(model, states: torch.Tensor | None, dropped: set[int], count: int) -> set[int]:
    """The `count` most probable of the dropped ids at decoding states, or all of them."""
    if not count:
        return set()
    candidates = torch.tensor(sorted(dropped))
    mass = token_mass(model, states).cpu()[candidates]
    return set(candidates[mass.argsort(descending=True)[:count]].tolist())


def count_differences(
    model, kept: Sequence[int], encoded: list[ModelOutput], expected: dict[int, list[list[int]]], batches: Iterable[int]
) -> dict[int, dict[int, int]]:
    """How many captions of a trimmed model are not the original ones: by number of beams and batch, where any are."""
    starts = [0]
    for batch in encoded:
        starts.append(starts[-1] + len(batch.image_embeds))
    found: dict[int, dict[int, int]] = {num_beams: {} for num_beams in expected}
    for num_beams, captions in expected.items():
        for index in batches:
            after = caption_tokens(model, [encoded[index]], num_beams)
            pairs = zip(captions[starts[index] : starts[index + 1]], after, strict=True)
            count = sum([kept[number] for number in caption] != before for before, caption in pairs)
            if count:
                found[num_beams][index] = count
    return found


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
    """The captions of a data set's splits, and the photos of the first of them, not yet decoded.

    Args:
        dataset_name: Hub id, folder of parquet, or imagefolder.
        split: whose photos and captions are taken.
        text_splits: whose captions are taken too.
        max_samples: photos at most; captions are taken all.

    Raises:
        ValueError: a split, a column, or a row's caption isn't there.
        ImportError: `datasets` isn't installed.
    """
    try:
        from datasets import Image

        from tinycap.training.data import clean_captions, load_split, resolve_columns
    except ImportError as error:
        raise ImportError(
            f"data sets need the package datasets: pip install 'tinycap[evaluation]' ({error})"
        ) from error
    rows = load_split(dataset_name, split)
    columns = resolve_columns(rows)
    texts = []
    for name in dict.fromkeys([split, *text_splits]):
        groups = (rows if name == split else load_split(dataset_name, name)).select_columns([columns.caption])
        texts += [text for group in groups[columns.caption] for text in clean_captions(group)]
    photos = rows.select_columns([columns.image])
    if isinstance(photos.features[columns.image], Image):
        photos = photos.cast_column(columns.image, Image(decode=False))
    return texts, photos.select(range(min(len(photos), max_samples or len(photos))))[columns.image][:]


# --- the whole --------------------------------------------------------------------------------------------------------


def speeds(models: dict[str, Any], encoded: list[ModelOutput], rounds: int = 15, new_tokens: int = 16) -> dict:
    """Median milliseconds of greedy captions, of one photo and of a batch, from its embedding on; models take turns."""
    one = TinyCapVisionOutput(
        last_hidden_state=encoded[0].last_hidden_state[:1], pooler_output=encoded[0].pooler_output[:1]
    )
    options = {"num_beams": 1, "do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    found = {name: {} for name in models}
    for label, batch in (("one_photo_ms", one), (f"batch_of_{len(encoded[0].image_embeds)}_ms", encoded[0])):
        seconds = {name: [] for name in models}
        for turn in range(rounds + 2):
            for name, model in models.items():
                began = time.perf_counter()
                model.generate(encoder_outputs=batch, **options)
                # The first two turns warm up.
                if turn >= 2:
                    seconds[name].append(time.perf_counter() - began)
        for name, values in seconds.items():
            found[name][label] = 1000 * statistics.median(values)
    return found


def trim_repository(
    model_name_or_path: str,
    output_dir: str | Path,
    texts: list[str],
    images: Iterable[Any],
    batch_size: int = 16,
    rounds: int = 15,
) -> dict:
    """Trims a model repository to a corpus and writes it, with `trim_report.json`, to another folder.

    Args:
        model_name_or_path: the model with the big vocabulary.
        output_dir: an empty or new folder.
        texts: what must be tokenised as before.
        images: what must be captioned as before, greedily and by the generation config's own number of beams; anything
            that `load_image` opens.
        batch_size: photos run together.
        rounds: captions timed for each model; 0 for none.

    Returns:
        The report: tokens by their reason, sizes and speeds before and after, texts and captions checked.

    Raises:
        ValueError: the folder isn't empty, the tokenizer isn't a byte-level BPE, or there is nothing to go by.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"--output: expected an empty folder, got {output_dir}, which isn't")
    model = TinyCapForConditionalGeneration.from_pretrained(model_name_or_path).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_name_or_path)
    image_processor = AutoImageProcessor.from_pretrained(model_name_or_path, trust_remote_code=False)
    pairs = BytePairs.of(tokenizer)
    encoded, unreadable = encode_photos(model, image_processor, images, batch_size)
    if not texts and not encoded:
        raise ValueError("expected texts or photos to trim to, got none")

    expected = {n: caption_tokens(model, encoded, n) for n in sorted({1, model.generation_config.num_beams or 1})}
    by_texts = {number for ids in tokens_of(tokenizer, texts) for number in ids}
    by_captions = {number for captions in expected.values() for caption in captions for number in caption}
    by_configs = token_ids_of(model.generation_config.to_dict()) | token_ids_of(model.config.to_dict())
    used = by_texts | by_captions | by_configs

    taken_back, with_stand_in, states, suspects = 0, False, None, []
    while True:
        back = most_probable(model, states, set(pairs.vocab.values()) - set(pairs.closure(used)), taken_back)
        kept = pairs.closure(used | back)
        # With nothing dropped there is nothing to stand in for.
        with_stand_in = with_stand_in and len(kept) < model.config.text_config.vocab_size
        trimmed = trim_model(model, kept, fit_stand_in(model, states, kept) if with_stand_in else None)
        # Where captions differed before, first: only when they don't any more is the rest worth its time.
        for batches in (suspects, range(len(encoded))):
            differences = count_differences(trimmed, kept, encoded, expected, batches)
            suspects = sorted({index for found in differences.values() for index in found})
            if suspects:
                break
        differences = {num_beams: sum(found.values()) for num_beams, found in differences.items()}
        logger.info(
            "%d of %d tokens kept%s: captions that differ, by beams: %s",
            len(kept),
            model.config.text_config.vocab_size,
            " and a stand-in" if with_stand_in else "",
            differences,
        )
        if not suspects:
            break
        if len(back) < taken_back:
            raise ValueError(f"captions differ, by beams {differences}, with all tokens of the tokenizer kept")
        if states is not None:
            taken_back = 2 * taken_back or FIRST_TAKEN_BACK
        else:
            with_stand_in, states = True, decoding_states(model, encoded, max(expected))
    trimmed_tokenizer = trim_tokenizer(tokenizer, kept, with_stand_in)
    check_tokenisation(tokenizer, trimmed_tokenizer, kept, texts)
    said = [tokenizer.batch_decode(expected[n], skip_special_tokens=True) for n in expected]
    say = [
        trimmed_tokenizer.batch_decode(caption_tokens(trimmed, encoded, n), skip_special_tokens=True) for n in expected
    ]
    if said != say:
        raise ValueError("expected the captions of the smaller model to be the same text, got another")

    save_repository(output_dir, trimmed, trimmed_tokenizer, image_processor)
    report = {
        "model": str(model_name_or_path),
        "texts_tokenised_as_before": len(texts),
        "photos": len(expected[1]),
        "photos_unreadable": unreadable,
        "captions_checked": {str(n): len(captions) for n, captions in expected.items()},
        "captions_that_differ": {str(n): count for n, count in differences.items()},
        "distinct_captions": {str(n): len(set(map(tuple, captions))) for n, captions in expected.items()},
        "tokens": {
            "used_by_texts": len(by_texts),
            "used_by_captions_alone": len(by_captions - by_texts),
            "taken_back": len(back),
            "stand_in": with_stand_in,
            "kept": len(kept),
        },
        "before": _sizes(model, tokenizer, Path(model_name_or_path)),
        "after": _sizes(trimmed, trimmed_tokenizer, output_dir),
    }
    if encoded and rounds:
        measured = speeds({"before": model, "after": trimmed}, encoded, rounds)
        for name in measured:
            report[name].update(measured[name])
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
