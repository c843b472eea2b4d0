"""Captions and tables in the wild: text stays text, and errors name file, row and column."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tiny import CAPTIONS, draw_picture, png_bytes

from tinycap.training.batches import CaptionCollator, CaptionDataset
from tinycap.training.captions import clean_captions
from tinycap.training.data import (
    NoSplitError,
    SkippedRows,
    decode_dataset,
    load_split,
    load_splits,
    resolve_columns,
)
from tinycap.training.streaming import StreamingCaptionDataset
from tinycap.training.tokenizer import encode_captions, train_tokenizer


HOSTILE = {
    "control characters": "a \x00dog\x1b[31m ru\x07ns\x9b",
    "emoji": "a 👩‍👩‍👧‍👦 family 🇩🇪 and a 🐕‍🦺",
    "right to left": "كلب يركض על הדשא",
    "direction overrides": "a \u202edog\u202c runs",
    "10,000 words": "dog " * 10_000,
    "one word of 100,000 letters": "a" * 100_000,
    "special tokens": "<s> a </s> dog <pad> <|endoftext|> [CLS] <unk>",
    "lone surrogate": "a \ud800 dog",
    "combining marks": "e" + "\u0301" * 500,
    "byte order mark": "\ufeffa dog",
    "not a character": "a \uffff dog \U0010ffff",
    "template": "{caption} %s ${x} {{a}}",
}


def rows_with(captions: list, images: list | None = None) -> datasets.Dataset:
    images = images or [png_bytes(draw_picture(index, (40, 30))) for index in range(len(captions))]
    rows = {"image": [{"bytes": image, "path": None} for image in images], "captions": captions}
    features = {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_text_to_tokenizer_and_collator(name, tokenizer):
    text = clean_captions(HOSTILE[name])[0]
    text.encode()
    assert not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in text)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    for own in (tokenizer, train_tokenizer([text, *CAPTIONS] * 2, 400, 19)):
        ids = encode_captions(own, [text], max_length=10**6)[0]
        assert ids[-1] == own.eos_token_id and not special & set(ids[:-1])
        assert own.decode(ids[:-1]) == text

    skipped = SkippedRows()
    rows = rows_with([[text], [CAPTIONS[0]]])
    dataset = CaptionDataset(decode_dataset(rows, resolve_columns(rows), 24, skipped, "train"), 24)
    batch = CaptionCollator(tokenizer, 12, [0.5] * 3, [0.2] * 3)([dataset[0], dataset[1]])
    labels = batch["labels"][0]
    assert not skipped.count and batch["labels"].shape[1] <= 12
    kept = labels[labels != -100].tolist()
    assert kept[-1] == tokenizer.eos_token_id and not special & set(kept[:-1])


@pytest.mark.parametrize(
    "text", ["   ", "\t\n\u00a0\u3000", "\u200b\u200d", "\u202e\u202c", "\x00\x1b", "\ud800", "\ufeff"]
)
def test_text_with_nothing_to_see_is_no_caption(text):
    with pytest.raises(ValueError, match="expected a caption"):
        clean_captions([text])
    assert clean_captions([text, "a dog"]) == ["a dog"]


def test_a_tokenizer_of_hostile_text_keeps_its_special_tokens():
    texts = [caption for text in HOSTILE.values() for caption in clean_captions(text)]
    tokenizer = train_tokenizer(texts * 3, 600, 19)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    for text in texts:
        assert tokenizer.decode(encode_captions(tokenizer, [text], 10**6)[0][:-1]) == text


def test_a_prompt_that_spells_special_tokens_is_text(repository, pictures):
    from transformers import pipeline

    captioner = pipeline("image-to-text", model=str(repository), trust_remote_code=True)
    inputs = captioner.preprocess(pictures[0], prompt="</s> a dog <pad>")["input_ids"][0].tolist()
    tokenizer = captioner.tokenizer
    assert inputs[0] == tokenizer.bos_token_id
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & set(inputs[1:])


@pytest.mark.parametrize(
    "value, captions",
    [
        ("A dog runs .\nTwo men .\r\n\r\nA cat .", ["A dog runs.", "Two men.", "A cat."]),
        ("['A dog .', \"It's a cat .\"]", ["A dog.", "It's a cat."]),
        ('["A dog .", "A \\"cat\\" .", null]', ["A dog.", 'A "cat".']),
        ("('A dog .', 'A cat .')", ["A dog.", "A cat."]),
        ("['A dog .' 'A cat .'\n \"It's a man .\"]", ["A dog.", "A cat.", "It's a man."]),
        ('[{"raw": "A dog ."}, {"raw": "A cat ."}]', ["A dog.", "A cat."]),
        ("[{'raw': 'A dog .', 'sentid': 1}, {'raw': \"It's a cat .\", 'box': None}]", ["A dog.", "It's a cat."]),
        ("[{'raw': dog}]", ["[{'raw': dog}]"]),
        (["['A dog .']", "A cat .\nA man ."], ["A dog.", "A cat.", "A man."]),
        ([{"raw": "A dog .", "sentid": 1}, {"raw": "A cat .", "sentid": 2}], ["A dog.", "A cat."]),
        ([{"caption": "A dog ."}, {"caption": None}], ["A dog."]),
        ({"raw": ["A dog .", "A cat ."], "sentid": [1, 2]}, ["A dog.", "A cat."]),
        ("[CLS] a dog [SEP]", ["[CLS] a dog [SEP]"]),
        ("(a dog)", ["(a dog)"]),
        ("[1, 2]", ["[1, 2]"]),
        ("[" * 5000 + "]" * 5000, ["[" * 5000 + "]" * 5000]),
        ("['open", ["['open"]),
        ("[u'A dog .', u'A cat .']", ["A dog.", "A cat."]),
        (r"['no escape: \x .']", [r"['no escape: \x.']"]),
    ],
)
def test_captions_that_were_joined_or_written_as_a_list_are_several(value, captions):
    assert clean_captions(value) == captions


def test_the_reason_of_a_skipped_row_names_its_column(tmp_path):
    good = png_bytes(draw_picture(1))
    captions = [["a dog"]] * 30
    captions[4] = ["\x1b\x07"]
    rows = rows_with(captions, [good] * 11 + [good[:40]] + [good] * 18)
    skipped = SkippedRows(tmp_path / "skipped.jsonl")
    decode_dataset(rows, resolve_columns(rows), 24, skipped, "train")
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reason"].split(":")[0]) for line in lines] == [
        (4, "column 'captions'"),
        (11, "column 'image'"),
    ]


def test_an_empty_file_is_not_replaced_by_one_of_its_name_here(tmp_path, monkeypatch):
    (tmp_path / "photo.png").write_bytes(png_bytes(draw_picture(1)))
    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"", "path": "photo.png"}, {"bytes": png_bytes(draw_picture(2)), "path": "b.png"}],
         "captions": ["a dog", "a cat"]}
    )  # fmt: skip
    skipped = SkippedRows(max_share=1.0)
    assert len(decode_dataset(rows, resolve_columns(rows), 24, skipped, "train")) == 1 and skipped.count == 1


# --- tables -----------------------------------------------------------------------------------------------------------


def imagefolder(folder, change=lambda lines: lines, text=lambda text: text):
    """Twelve images and a metadata.jsonl with changed lines or text."""
    train = folder / "photos" / "train"
    train.mkdir(parents=True)
    for index in range(12):
        (train / f"{index}.png").write_bytes(png_bytes(draw_picture(index)))
    whole = [{"file_name": f"{index}.png", "captions": ["one", f"two {index}"]} for index in range(12)]
    plain = "\n".join(map(json.dumps, whole))
    changed = text("\n".join(map(json.dumps, change([dict(line) for line in whole]))))
    assert changed != plain, "nothing was injected"
    (train / "metadata.jsonl").write_text(changed)
    return str(folder / "photos")


def with_captions(number, value):
    def change(lines):
        lines[number]["captions"] = value
        return lines

    return change


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "change, text, named",
    [
        (None, lambda text: text[:-25], ["metadata.jsonl", "line 12", "not JSON"]),
        (None, lambda text: text.replace("\n", "\nhello\n", 1), ["metadata.jsonl", "line 2", "not JSON"]),
        (None, lambda text: "[1]\n" + text, ["metadata.jsonl", "line 1", "object"]),
        (None, lambda text: "", ["metadata.jsonl", "no rows"]),
        (with_captions(7, 5), None, ["metadata.jsonl", "line 8", "'captions'", "number"]),
        (with_captions(7, "one"), None, ["metadata.jsonl", "line 8", "'captions'", "string"]),
        (with_captions(7, ["one", 5]), None, ["metadata.jsonl", "line 8", "'captions'", "int"]),
        (with_captions(7, ["\ud800"]), None, ["metadata.jsonl", "line 8", "'captions'", "surrogate"]),
    ],
    ids=["cut", "no json", "no object", "empty", "number", "string", "mixed list", "surrogate"],
)
def test_bad_json_lines_are_an_error_with_file_line_and_column(tmp_path, change, text, named, streaming):
    folder = imagefolder(tmp_path, *(part for part in [change or (lambda lines: lines), text] if part))
    with pytest.raises(ValueError) as error:
        load_split(folder, "train", streaming=streaming)
    assert all(word in str(error.value) for word in named), error.value


@pytest.mark.parametrize("value", [None, [], [None], ["", "  "]])
def test_nulls_and_empty_captions_are_skipped_rows(tmp_path, value):
    rows = load_split(imagefolder(tmp_path, with_captions(7, value)), "train")
    skipped = SkippedRows()
    assert len(decode_dataset(rows, resolve_columns(rows), 24, skipped, "train")) == 11 and skipped.count == 1


def parquet(folder, spoil=None, **columns):
    """A parquet file of twelve rows; `columns` replaces columns, `spoil` the file's bytes."""
    train = folder / "train"
    train.mkdir()
    images = [{"bytes": png_bytes(draw_picture(index)), "path": None} for index in range(12)]
    table = {"image": images, "captions": [["a dog", "a cat"]] * 12, **columns}
    path = train / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({name: value for name, value in table.items() if value}), path)
    if spoil is not None:
        whole = path.read_bytes()
        path.write_bytes(spoil(whole))
        assert path.read_bytes() != whole
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_cut_parquet_file_is_an_error_that_names_it(tmp_path, streaming):
    folder = parquet(tmp_path, lambda data: data[: len(data) // 2])
    with pytest.raises(ValueError, match="data.parquet: not a whole parquet file"):
        load_split(folder, "train", streaming=streaming)


def test_damage_inside_a_parquet_file_is_an_error_that_names_it(tmp_path):
    folder = parquet(tmp_path, lambda data: data[:200] + bytes(300) + data[500:])
    with pytest.raises(ValueError, match="data.parquet: not a whole parquet file"):
        load_split(folder, "train")


def test_damage_inside_a_streamed_parquet_file_is_an_error(tmp_path):
    folder = parquet(tmp_path, lambda data: data[:200] + bytes(300) + data[500:])
    stream = load_split(folder, "train", streaming=True)
    columns = resolve_columns(stream)
    rows = StreamingCaptionDataset(stream, 24, columns=columns, skipped=SkippedRows(), split="train")
    with pytest.raises(ValueError, match="split train: cannot be read after 0 rows"):
        list(rows)


@pytest.mark.parametrize(
    "columns, named",
    [
        ({"captions": None}, ["caption_column", "'image'"]),
        ({"image": None}, ["image_column", "'captions'"]),
        ({"captions": list(range(12))}, ["caption_column", "'captions'", "int64"]),
        ({"captions": [{"raw": "a dog"}] * 12}, ["caption_column", "'captions'", "raw"]),
        ({"captions": [b"caf\xe9"] * 12}, ["caption_column", "'captions'", "binary"]),
        ({"captions": pyarrow.nulls(12)}, ["caption_column", "'captions'", "null"]),
        ({"image": list(range(12))}, ["image_column", "'image'", "int64"]),
        ({"image": [[1.5, 2.5]] * 12}, ["image_column", "'image'", "float64"]),
    ],
    ids=["no captions", "no image", "numbers", "objects", "bytes", "nulls", "image of numbers", "image of lists"],
)
def test_a_wrong_schema_is_an_error_that_names_column_and_type(tmp_path, columns, named):
    rows = load_split(parquet(tmp_path, **columns), "train")
    with pytest.raises(ValueError) as error:
        resolve_columns(rows)
    assert all(word in str(error.value) for word in named), error.value


@pytest.mark.parametrize("other, named", [({"picture": [1] * 3}, "'image'"), ({"captions": [1] * 3}, "'captions'")])
def test_files_of_different_schemas_are_an_error_with_file_and_column(tmp_path, other, named):
    folder = parquet(tmp_path)
    images = [{"bytes": png_bytes(draw_picture(index)), "path": None} for index in range(3)]
    table = {"image": images, "captions": [["a dog"]] * 3, **other}
    if "picture" in other:
        table.pop("image")
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "train" / "more.parquet")
    with pytest.raises(ValueError, match=f"more.parquet: .*column {named}"):
        load_split(folder, "train")


def test_a_broken_validation_split_is_an_error(tmp_path):
    folder = parquet(tmp_path)
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "data.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="data.parquet: not a whole parquet file"):
        load_splits(folder)
    with pytest.raises(NoSplitError, match="testing"):
        load_split(parquet_of_one(tmp_path), "testing")


def parquet_of_one(folder):
    (folder / "one").mkdir()
    return parquet(folder / "one")
