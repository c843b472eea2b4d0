"""Trimming the vocabulary keeps texts and captions."""

import json
import random
import shutil

import pytest
import torch
from tiny import CAPTIONS, draw_picture, png_bytes, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from tinycap.deploy import cli, trim_vocab
from tinycap.deploy.inputs import read_lines
from tinycap.deploy.trim_vocab import closure, trim_model, trim_repository, trim_tokenizer
from tinycap.training.repository import create_generation_config, create_image_processor, save_repository
from tinycap.training.tokenizer import encode_captions, train_tokenizer


def many_texts(count: int = 3000) -> list[str]:
    """Texts with words that captions don't have, some with the same letters."""
    draw = random.Random(5)
    words = ["".join(draw.choices("abcdefghilmnorstu", k=draw.randrange(3, 9))) for _ in range(700)]
    return [" ".join(draw.choices(words, k=8)) for _ in range(count)]


@pytest.fixture(scope="module")
def big_tokenizer():
    tokenizer = train_tokenizer([*CAPTIONS * 300, *many_texts()], 2500, 19)
    assert len(tokenizer) == 2500
    return tokenizer


def save_big_repository(folder, tokenizer, penalty: float):
    """A model with more embedding rows than its tokenizer has tokens, like padded vocabularies.

    Args:
        penalty: subtracted from the logits of tokens that captions don't use, in nats.
    """
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = tiny_model(text_config={"vocab_size": 2519, **ids})
    unused = torch.ones(2519, dtype=torch.bool)
    unused[[*{number for ids in encode_captions(tokenizer, CAPTIONS, 99) for number in ids}, 310, 311, 312]] = False
    with torch.no_grad():
        # A layer norm's output has the mean of its bias, so that this shifts a logit equally for any image.
        model.decoder.final_layer_norm.bias.fill_(1.0)
        width = model.config.text_config.hidden_size
        weight = model.decoder.embed_tokens.weight
        weight[unused] -= penalty / width
        # Tokens that the tokenizer can't decode are never generated.
        model.decoder.embed_tokens.weight[2500:] = -99.0 / width
    model.generation_config = create_generation_config(tokenizer, max_new_tokens=7, num_beams=3)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 900]
    model.generation_config.bad_words_ids = [[2400], [tokenizer.convert_tokens_to_ids("a"), 901], [310]]
    model.generation_config.suppress_tokens = [311, 2499]
    save_repository(folder, model, tokenizer, create_image_processor(24))
    return folder


@pytest.fixture(scope="module")
def big_repository(big_tokenizer, tmp_path_factory):
    return save_big_repository(tmp_path_factory.mktemp("hub") / "big-vocabulary", big_tokenizer, 14.0)


@pytest.fixture(scope="module")
def trimmed(big_repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trimmed") / "small"
    pictures = [draw_picture(seed) for seed in range(7)]
    return folder, trim_repository(str(big_repository), folder, CAPTIONS, pictures, batch_size=5)


def test_captions_are_the_same_greedily_and_by_beams(big_repository, trimmed):
    folder, report = trimmed
    pictures = [draw_picture(seed) for seed in range(7)]
    before, after = (
        pipeline("image-to-text", model=str(path), trust_remote_code=True) for path in (big_repository, folder)
    )
    for num_beams in (1, 3):
        expected = before(pictures, num_beams=num_beams, batch_size=4)
        assert after(pictures, num_beams=num_beams, batch_size=4) == expected
        assert len({entries[0]["generated_text"] for entries in expected}) > 1
    assert report["captions_checked"] == {"1": 7, "3": 7} and report["captions_that_differ"] == {"1": 0, "3": 0}


def test_texts_are_tokenised_the_same_and_any_other_can_be_written(big_tokenizer, trimmed):
    folder, report = trimmed
    small = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert len(small) == report["after"]["vocab_size"] < 1000
    for text in CAPTIONS:
        assert small.tokenize(text) == big_tokenizer.tokenize(text)
    for text in ("Ünïcode 🦊 zebra-crossing\t!", "ndarray"):
        assert small.decode(small(text).input_ids, skip_special_tokens=True) == text
        assert small(text).input_ids[0] == small.bos_token_id
    assert (small.pad_token, small.bos_token, small.eos_token) == ("<pad>", "<s>", "</s>")
    assert small.padding_side == "left"


def test_sizes_are_of_what_lies_there(big_repository, trimmed):
    folder, report = trimmed
    before, after = report["before"], report["after"]
    assert report == json.loads((folder / "trim_report.json").read_text())
    rows = before["vocab_size"] - after["vocab_size"]
    assert before["parameters"] - after["parameters"] == rows * 16, "the head shares the embedding"
    for path, sizes in ((big_repository, before), (folder, after)):
        assert sizes["model.safetensors_bytes"] == (path / "model.safetensors").stat().st_size
    assert after["tokenizer.json_bytes"] < before["tokenizer.json_bytes"] / 2


def test_every_id_in_the_configs_means_the_same_token(big_repository, big_tokenizer, trimmed):
    folder, _ = trimmed
    small = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    old, new = (json.loads((path / "generation_config.json").read_text()) for path in (big_repository, folder))
    for name in ("bos_token_id", "pad_token_id", "decoder_start_token_id", "eos_token_id"):
        assert small.convert_ids_to_tokens(new[name]) == big_tokenizer.convert_ids_to_tokens(old[name])
    tokens = {
        path: [read.convert_ids_to_tokens(ids) for ids in [*config["bad_words_ids"], config["suppress_tokens"]]]
        for path, read, config in (("old", big_tokenizer, old), ("new", small, new))
    }
    assert tokens["old"] == tokens["new"] and old["suppress_tokens"] != new["suppress_tokens"]
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["eos_token_id"] == small.eos_token_id == config["eos_token_id"]
    assert config["text_config"]["vocab_size"] == len(small)


def test_the_closure_holds_what_a_token_is_made_of(big_tokenizer):
    token = max(big_tokenizer.tokenize(CAPTIONS[0]), key=len)
    kept = closure(big_tokenizer, [big_tokenizer.convert_tokens_to_ids(token)])
    small = trim_tokenizer(big_tokenizer, kept)
    assert small.tokenize(token.replace("Ġ", " ")) == [token]
    # 256 bytes, three special tokens, and one merge for each letter but the first.
    assert 256 + 3 < len(kept) <= 256 + 3 + len(token) - 1


def test_a_text_whose_words_were_dropped_is_noticed(big_tokenizer):
    kept = closure(big_tokenizer, [])
    small = trim_tokenizer(big_tokenizer, kept)
    with pytest.raises(ValueError, match="brown dog"):
        trim_vocab.check_tokenisation(big_tokenizer, small, kept, CAPTIONS)


@pytest.mark.slow
def test_beam_captions_that_differ_are_counted_and_reported(big_tokenizer, tmp_path, capsys):
    """Beam search's sums change by the dropped tokens' share of the probability, which is most of it here."""
    big, small = save_big_repository(tmp_path / "unsure-model", big_tokenizer, 5.0), tmp_path / "small"
    for seed in range(24):
        draw_picture(seed).save(tmp_path / f"{seed:02}.png")
    (tmp_path / "corpus.txt").write_text("\n".join(CAPTIONS))
    flags = ["--model", str(big), "--corpus", str(tmp_path / "corpus.txt"), "--output", str(small)]
    assert cli.main(["trim-vocab", *flags, str(tmp_path / "*.png")]) == 0
    report = json.loads(capsys.readouterr().out)
    images = [str(path) for path in sorted(tmp_path.glob("*.png"))]
    before, after = (
        [entries[0]["generated_text"] for entries in captioner(images)]
        for captioner in (pipeline("image-to-text", model=str(path), trust_remote_code=True) for path in (big, small))
    )
    differing = sum(one != other for one, other in zip(before, after))
    assert report["captions_that_differ"] == {"1": 0, "3": differing} and 0 < differing < 24


def test_logits_of_kept_tokens_are_unchanged(pixel_values):
    model = tiny_model(tie_word_embeddings=False)
    kept = [0, 1, 2, 5, 7, 30, 36]
    small = trim_model(model, kept)
    with torch.no_grad():
        before = model(pixel_values, decoder_input_ids=torch.tensor([[1, 7, 36]] * 5)).logits
        after = small(pixel_values, decoder_input_ids=torch.tensor([[1, 4, 6]] * 5)).logits
    torch.testing.assert_close(after, before[..., kept], rtol=0, atol=1e-5)


def gpt2_like() -> PreTrainedTokenizerFast:
    """A tokenizer like GPT-2's: a single special token, the last one, and no template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CAPTIONS * 300, *many_texts(500)], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    token = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=token, eos_token=token, pad_token=token, model_max_length=19
    )


@pytest.mark.slow
def test_a_tokenizer_with_one_special_token_for_everything(tmp_path, capsys):
    tokenizer = gpt2_like()
    ids = {name: tokenizer.eos_token_id for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    assert set(ids.values()) == {900}
    model = tiny_model(text_config={"vocab_size": 901, **ids})
    model.generation_config = create_generation_config(tokenizer, max_new_tokens=6)
    save_repository(tmp_path / "big", model, tokenizer, create_image_processor(24))
    draw_picture(1).save(tmp_path / "photo.png")
    (tmp_path / "corpus.txt").write_text("\n".join(CAPTIONS))
    flags = ["--model", str(tmp_path / "big"), "--corpus", str(tmp_path / "corpus.txt"), str(tmp_path / "photo.png")]
    assert cli.main(["trim-vocab", *flags, "--output", str(tmp_path / "small")]) == 0
    assert json.loads(capsys.readouterr().out)["captions_checked"] == {"1": 1}
    before, after = (
        pipeline("image-to-text", model=str(tmp_path / name), trust_remote_code=True) for name in ("big", "small")
    )
    assert before(str(tmp_path / "photo.png")) == after(str(tmp_path / "photo.png"))
    assert after.tokenizer.eos_token_id == after.model.config.eos_token_id == len(after.tokenizer) - 1
    encoded = [encode_captions(one.tokenizer, CAPTIONS, 19) for one in (before, after)]
    texts = [
        [pipe.tokenizer.convert_ids_to_tokens(row) for row in rows] for pipe, rows in zip((before, after), encoded)
    ]
    assert texts[0] == texts[1]
    assert cli.main(["trim-vocab", *flags, "--output", str(tmp_path / "small")]) == 2
    assert "empty folder" in capsys.readouterr().err


def test_a_corpus_has_each_image_once_and_leaves_out_rows_without_captions(tmp_path, caplog):
    from datasets import Dataset

    images = [{"bytes": png_bytes(draw_picture(index)), "path": f"{index}.png"} for index in (0, 1, 1, 2)]
    captions = ["", "a dog", "a cat\na man", "a child"]
    Dataset.from_dict({"image": images, "caption": captions}).to_parquet(tmp_path / "validation.parquet")
    texts, photos = trim_vocab.load_corpus(str(tmp_path), "validation", max_samples=1)
    assert texts == ["a dog", "a cat", "a man", "a child"] and photos == [images[1]["bytes"]]
    assert "1 rows have no caption" in caplog.text


def test_what_cannot_be_trimmed_is_an_error_that_says_why(big_repository, tmp_path):
    (tmp_path / "photo.txt").write_bytes(b"\xff\xd8")
    with pytest.raises(ValueError, match="photo.txt"):
        read_lines(tmp_path / "photo.txt")
    with pytest.raises(ValueError, match="got none"):
        trim_repository(str(big_repository), tmp_path / "small", [], [])
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="byte-level BPE"):
        closure(PreTrainedTokenizerFast(tokenizer_object=words), [])
    with pytest.raises(ValueError, match="sequence_bias"):
        trim_vocab.map_ids({"sequence_bias": [[[3], 1.0]]}, int)
    with pytest.raises(ValueError, match=r"ids of the tokenizer's 2500 tokens, got \{2510\}"):
        config = json.loads((big_repository / "generation_config.json").read_text())
        folder = shutil.copytree(big_repository, tmp_path / "beyond")
        (folder / "generation_config.json").write_text(json.dumps({**config, "suppress_tokens": [2510]}))
        trim_repository(str(folder), tmp_path / "small", CAPTIONS, [])
