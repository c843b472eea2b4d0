import json

import datasets
import pytest
import torch
from tiny import CAPTIONS, draw_picture, png_bytes

from tinycap.training.data import (
    Augmentation,
    BadRowError,
    CaptionCollator,
    CaptionDataset,
    EpochSampler,
    SkippedRows,
    StreamingCaptionDataset,
    TooManyBadRowsError,
    clean_captions,
    decode_dataset,
    load_splits,
    picture_of,
    resolve_columns,
)


def png(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    return png_bytes(draw_picture(seed, size))


def rows_of(num: int, **bad) -> datasets.Dataset:
    """`num` rows of a picture with two captions; `bad` replaces the image or captions of a row: `image_3=b""`."""
    rows = {
        "image": [{"bytes": png(index), "path": None} for index in range(num)],
        "captions": [[CAPTIONS[index % 4], f"picture {index}"] for index in range(num)],
        "image_id": [f"id-{index}" for index in range(num)],
    }
    for name, value in bad.items():
        column, index = name.rsplit("_", 1)
        rows[column][int(index)] = {"bytes": value, "path": None} if column == "image" else value
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "image_id": datasets.Value("string"),
        }
    )
    return datasets.Dataset.from_dict(rows, features=features)


def decode(rows: datasets.Dataset, skipped: SkippedRows | None = None) -> datasets.Dataset:
    return decode_dataset(rows, resolve_columns(rows), 24, skipped or SkippedRows(), "train")


# --- columns and splits -----------------------------------------------------------------------------------------------


def test_columns_are_found_by_type_and_by_their_usual_names():
    rows = rows_of(2).rename_columns({"image": "photograph", "captions": "text"})
    columns = resolve_columns(rows)
    assert (columns.image, columns.caption, columns.image_id) == ("photograph", "text", "image_id")


@pytest.mark.parametrize("flag, name", [("image_column", "picture"), ("caption_column", "words")])
def test_a_column_that_is_not_there_is_an_error_that_names_it_and_those_there_are(flag, name):
    with pytest.raises(ValueError) as error:
        resolve_columns(rows_of(2), **{flag: name})
    assert all(word in str(error.value) for word in (flag, name, "captions", "image_id"))


def test_a_caption_column_of_numbers_is_an_error():
    rows = rows_of(2).remove_columns("captions").add_column("captions", [1, 2])
    with pytest.raises(ValueError, match="expected strings"):
        resolve_columns(rows)


@pytest.fixture
def parquet(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rows_of(20).to_parquet(folder / "train.parquet")
    return folder


def test_without_a_validation_split_a_seeded_twentieth_is_held_out(parquet):
    splits = [load_splits(str(parquet), seed=seed) for seed in (1, 1, 2)]
    assert [(len(train), len(validation)) for train, validation in splits] == [(19, 1)] * 3
    assert splits[0][1]["image_id"] == splits[1][1]["image_id"]
    assert not set(splits[0][0]["image_id"]) & set(splits[0][1]["image_id"])


def test_a_named_split_that_is_not_there_is_an_error(parquet):
    with pytest.raises(ValueError, match="testing"):
        load_splits(str(parquet), validation_split="testing")
    with pytest.raises(ValueError, match="no such folder"):
        load_splits(str(parquet / "nowhere"))


def test_an_imagefolder_with_metadata_is_read(tmp_path):
    folder = tmp_path / "photos" / "train"
    folder.mkdir(parents=True)
    lines = []
    for index in range(3):
        (folder / f"{index}.png").write_bytes(png(index))
        lines.append(json.dumps({"file_name": f"{index}.png", "captions": ["one", f"two {index}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    train, validation = load_splits(str(tmp_path / "photos"))
    decoded = decode(train)
    assert len(train) + len(validation) == 3 and decoded[0]["captions"][0] == "one"


# --- bad rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, cleaned", [(" a  dog \n runs . ", ["a dog runs."]), (["one", "", None], ["one"])])
def test_captions_are_cleaned_of_stray_whitespace(value, cleaned):
    assert clean_captions(value) == cleaned


@pytest.mark.parametrize("value", [None, "", "   ", [], [None], 7])
def test_a_caption_that_is_missing_empty_or_no_string_is_an_error(value):
    with pytest.raises(ValueError, match="expected a caption"):
        clean_captions(value)


def test_bad_rows_are_skipped_counted_and_listed_with_their_ids(tmp_path):
    skipped = SkippedRows(tmp_path / "skipped.jsonl")
    rows = rows_of(40, image_3=b"", image_7=png(7)[:50], captions_9=[], captions_11=["  "])
    decoded = decode(rows, skipped)
    assert len(decoded) == 36 and skipped.count == 4
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in listed] == ["id-3", "id-7", "id-9", "id-11"]
    assert all(line["reason"] and line["split"] == "train" for line in listed)
    assert not {"id-3", "id-7", "id-9", "id-11"} & set(decoded["image_id"])


def test_pictures_and_captions_never_shift_against_each_other():
    decoded = decode(rows_of(40, image_3=b"", captions_9=[]))
    for row in decoded:
        index = int(row["image_id"].removeprefix("id-"))
        assert row["captions"][1] == f"picture {index}"
        assert picture_of(row).size == (37, 28)
        assert picture_of(row).getpixel((1, 1)) == draw_picture(index, (40, 30)).getpixel((1, 1))


def test_the_first_bad_row_stops_the_run_when_asked():
    with pytest.raises(BadRowError, match="row 3, id id-3"):
        decode(rows_of(40, image_3=b"", image_5=b""), SkippedRows(on_bad_row="error"))


def test_more_than_a_tenth_of_bad_rows_is_an_error():
    bad = {f"image_{index}": b"" for index in range(5)}
    with pytest.raises(TooManyBadRowsError, match="5 of 40"):
        decode(rows_of(40, **bad))
    assert len(decode(rows_of(50, **bad))) == 45


# --- samples and batches ----------------------------------------------------------------------------------------------


def batch_of(dataset: CaptionDataset, tokenizer, keys) -> dict:
    collator = CaptionCollator(tokenizer, 12, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    return collator([dataset[key] for key in keys])


def test_a_batch_holds_each_picture_once_and_its_captions_side_by_side(tokenizer):
    dataset = CaptionDataset(decode(rows_of(5)), 24, captions_per_image=2)
    batch = batch_of(dataset, tokenizer, range(5))
    assert batch["pixel_values"].shape == (5, 3, 24, 24) and batch["labels"].shape[0] == 10
    for index in range(5):
        pair = [tokenizer.decode(row[row != -100][:-1]) for row in batch["labels"][2 * index : 2 * index + 2]]
        assert f"picture {index}" in pair
    lengths = (batch["labels"] != -100).sum(dim=1)
    assert all(row[length - 1] == tokenizer.eos_token_id for row, length in zip(batch["labels"], lengths))
    assert batch["labels"].shape[1] <= 12


def test_pixels_are_normalised_as_the_image_processor_does(tokenizer):
    from tinycap.training.repository import create_image_processor

    processor = create_image_processor(24)
    # Of the model's own size, so that neither resizes.
    rows = decode(rows_of(3, **{f"image_{index}": png(index, (24, 24)) for index in range(3)}))
    collator = CaptionCollator(tokenizer, 12, processor.image_mean, processor.image_std)
    batch = collator([CaptionDataset(rows, 24)[index] for index in range(3)])
    expected = processor([picture_of(row) for row in rows], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected, atol=1e-5, rtol=0)


def test_every_draw_follows_from_seed_epoch_and_row():
    rows, augmentation = decode(rows_of(6)), Augmentation(0.3, True, 0.4)
    first = CaptionDataset(rows, 24, augmentation, 1, seed=5)
    again = CaptionDataset(rows, 24, augmentation, 1, seed=5)
    assert (
        torch.equal(first[(2, 3)]["pixels"], again[(2, 3)]["pixels"]) and first[(2, 3)]["gain"] == again[(2, 3)]["gain"]
    )
    assert not torch.equal(first[(2, 3)]["pixels"], first[(3, 3)]["pixels"])
    captions = {first[(epoch, 3)]["captions"][0] for epoch in range(12)}
    assert captions == set(rows[3]["captions"])


def test_captions_that_say_left_or_right_are_not_mirrored():
    sided = rows_of(1, captions_0=["a dog on the left"])
    plain = rows_of(1)
    for rows, kinds in ((sided, 1), (plain, 2)):
        dataset = CaptionDataset(decode(rows), 24, Augmentation(horizontal_flip=True), 1)
        assert len({dataset[(epoch, 0)]["pixels"].numpy().tobytes() for epoch in range(20)}) == kinds


def test_each_epoch_visits_every_row_once_in_an_order_of_its_own():
    sampler = EpochSampler(31, seed=4)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert sorted(row for _, row in keys) == list(range(31)) and {e for e, _ in keys} == {epoch}
        orders.append([row for _, row in keys])
    assert orders[0] != orders[1]


def test_a_stream_gives_the_same_pictures_and_skips_bad_rows():
    rows = rows_of(12, image_2=b"")
    skipped = SkippedRows()
    stream = StreamingCaptionDataset(
        rows.to_iterable_dataset(), resolve_columns(rows), 24, skipped, "train", shuffle_buffer=0
    )
    streamed = {sample["image_id"]: sample["pixels"] for sample in stream}
    mapped = CaptionDataset(decode(rows_of(12)), 24)
    assert set(streamed) == {f"id-{index}" for index in range(12) if index != 2} and skipped.count == 1
    assert all(torch.equal(streamed[mapped[i]["image_id"]], mapped[i]["pixels"]) for i in range(12) if i != 2)


def test_two_processes_share_a_stream_without_overlap():
    rows = rows_of(12)
    shares = []
    for process in range(2):
        stream = StreamingCaptionDataset(
            rows.to_iterable_dataset(num_shards=4),
            resolve_columns(rows),
            24,
            SkippedRows(),
            "train",
            process_index=process,
            num_processes=2,
        )
        shares.append({sample["image_id"] for sample in stream})
    assert not shares[0] & shares[1] and len(shares[0] | shares[1]) == 12
