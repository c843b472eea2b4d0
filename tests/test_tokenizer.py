import pytest
from tiny import CAPTIONS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinycap.training.tokenizer import count_truncated, encode_captions, load_tokenizer, train_tokenizer


@pytest.mark.parametrize("text", [*CAPTIONS, "Ünïcode 日本語 🙂 and\ttabs", "<s> is text, </s> too"])
def test_every_text_comes_back_from_its_ids(tokenizer, text):
    ids = encode_captions(tokenizer, [text], max_length=200)[0]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == text


def test_special_tokens_spelled_out_in_a_caption_are_text(tokenizer):
    ids = encode_captions(tokenizer, ["a </s> b <pad> <s>"], max_length=50)[0]
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id} & set(ids[:-1])


def test_truncation_keeps_the_end_tokens_place(tokenizer):
    whole = encode_captions(tokenizer, [CAPTIONS[0]], max_length=100)[0]
    cut = encode_captions(tokenizer, [CAPTIONS[0]], max_length=5)[0]
    assert cut == whole[:4] + [tokenizer.eos_token_id]


def test_truncated_captions_are_counted_and_needn_t_be_taught_to_end(tokenizer, caplog):
    whole = encode_captions(tokenizer, [CAPTIONS[0]], 100)[0]
    for length in (len(whole) - 1, len(whole), len(whole) + 1):
        fits = length >= len(whole)
        found = encode_captions(tokenizer, [CAPTIONS[0]], length, end_truncated=False)[0]
        assert found == (whole if fits else whole[:length])
        counts = count_truncated(tokenizer, [CAPTIONS[0], "a"], length)
        assert counts == {"train_captions": 2, "truncated_train_captions": 0 if fits else 1}
    assert caplog.text.count("1 of 2 training captions (50.0 %) have more than --max_caption_length") == 1


def test_an_empty_prompt_is_the_start_token(tokenizer):
    assert tokenizer("").input_ids == [tokenizer.bos_token_id]
    assert tokenizer("A").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.padding_side == "left"


def test_the_end_token_is_not_the_id_that_clip_misreads(tokenizer):
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, 2}) == 3
    assert tokenizer.eos_token_id != 2


def test_training_twice_gives_the_same_vocabulary():
    first, second = (train_tokenizer(CAPTIONS * 2, 290, 19).get_vocab() for _ in range(2))
    assert first == second and len(first) <= 290


def test_too_small_a_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="at least 259 .*got 100"):
        train_tokenizer(CAPTIONS, 100, 19)


def save_tokenizer(folder, **special_tokens):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "dog": 1, "<end>": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special_tokens).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_without_pad_and_start_token_uses_its_end_token(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, eos_token="<end>"))
    assert tokenizer.pad_token_id == tokenizer.bos_token_id == tokenizer.eos_token_id == 2
    assert len(tokenizer) == 4
    assert encode_captions(tokenizer, ["a dog"], 9) == [[0, 1, 2]]


def test_berts_marks_serve_as_start_and_end_token(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, cls_token="a", sep_token="<end>", pad_token="<unk>"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("a", "<end>", "<unk>")
    assert encode_captions(tokenizer, ["dog dog"], 9) == [[1, 1, 2]]


def test_a_tokenizer_without_end_token_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="eos_token"):
        load_tokenizer(save_tokenizer(tmp_path))
