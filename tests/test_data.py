import json
import sys
from dataclasses import replace
from itertools import islice

import datasets
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS, draw_picture, png_bytes
from torchdata.stateful_dataloader import StatefulDataLoader

from tinycap.training import streaming
from tinycap.training.augmentation import Augmentation
from tinycap.training.batches import CaptionCollator, CaptionDataset, EpochBatchSampler
from tinycap.training.captions import clean_captions
from tinycap.training.data import (
    NoSplitError,
    SkippedRows,
    content_fingerprint,
    decode_dataset,
    decoded_image,
    load_images,
    load_split,
    load_splits,
    resolve_columns,
)
from tinycap.training.streaming import StreamingCaptionDataset


def png(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    return png_bytes(draw_picture(seed, size))


def rows_of(num: int, **bad) -> datasets.Dataset:
    """`num` rows of an image with two captions; `bad` replaces the image or captions of a row: `image_3=b""`."""
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
def test_a_missing_column_is_an_error_that_names_it_and_those_there_are(flag, name):
    with pytest.raises(ValueError) as error:
        resolve_columns(rows_of(2), **{flag: name})
    assert all(word in str(error.value) for word in (flag, name, "captions", "image_id"))


@pytest.mark.parametrize(
    "names, taken",
    [
        (["mask", "image"], "image"),
        (["depth", "Image"], "Image"),
        (["mask", "img"], "img"),
        (["photograph", "mask"], "photograph"),
    ],
)
def test_of_several_image_columns_that_of_the_usual_name_is_taken_and_said(names, taken, caplog):
    rows = rows_of(2).rename_column("image", names[0])
    rows = rows.cast(datasets.Features({**rows.features, names[0]: datasets.Image(decode=False)}))
    rows = rows.map(lambda row: {names[1]: row[names[0]]}).cast_column(names[0], datasets.Image())
    rows = rows.cast_column(names[1], datasets.Image())
    assert resolve_columns(rows).image == taken
    assert f"image_column: took '{taken}' of the columns" in caplog.text and all(name in caplog.text for name in names)
    assert resolve_columns(rows, image_column=names[0]).image == names[0]


def test_numbered_caption_columns_are_captions_of_one_image():
    rows = rows_of(12).remove_columns("captions")
    for number in (10, 0, 2):
        rows = rows.add_column(f"caption_{number}", [f"caption {number} of {row}" for row in range(12)])
    columns = resolve_columns(rows)
    assert columns.captions == ["caption_0", "caption_2", "caption_10"]
    decoded = decode_dataset(rows, columns, 24, SkippedRows(), "train")
    assert decoded[3]["captions"] == ["caption 0 of 3", "caption 2 of 3", "caption 10 of 3"]
    assert resolve_columns(rows, caption_column="caption_2").captions == ["caption_2"]


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


def one_row_a_caption(num: int, ids: bool = True, first: int = 0) -> datasets.Dataset:
    """`num` images with three captions each, a row for each caption; rows of an image aren't adjacent."""
    rows = [
        {
            "image": {"bytes": png(index), "path": None},
            "caption": f"caption {number} of {index}",
            "image_id": f"id-{index}" if ids else f"row-{number}-{index}",
        }
        for number in range(3)
        for index in range(first, first + num)
    ]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


@pytest.mark.parametrize("ids", [True, False])
def test_rows_of_one_image_are_one_image_with_all_captions(ids, tmp_path):
    one_row_a_caption(20, ids).to_parquet(tmp_path / "train.parquet")
    splits = load_splits(str(tmp_path), seed=3)
    assert [len(split) for split in splits] == [19, 1]
    train, validation = (decode(split) for split in splits)
    assert not set(train["pixels"]) & set(validation["pixels"])
    for row in [*train, *validation]:
        index = row["image_id"].split("-")[-1]
        assert row["captions"] == [f"caption {number} of {index}" for number in range(3)]


def test_rows_of_a_validation_split_are_merged_too(tmp_path):
    one_row_a_caption(5).to_parquet(tmp_path / "train.parquet")
    one_row_a_caption(4, first=5).to_parquet(tmp_path / "validation.parquet")
    train, validation = load_splits(str(tmp_path), max_train_samples=2)
    assert [len(train), len(validation)] == [2, 4] and set(map(len, validation["caption"])) == {3}
    assert len(load_images(str(tmp_path), "train")[0]) == 5


def test_copies_of_a_file_under_other_names_are_one_image(tmp_path):
    for index in range(20):
        for copy in range(2):
            (tmp_path / f"{index}-{copy}.png").write_bytes(png(index))
            (tmp_path / f"{index}-{copy}.txt").write_text(f"caption {copy} of {index}")
    splits = load_splits(str(tmp_path))
    assert [len(split) for split in splits] == [19, 1]
    assert all(len(captions) == 2 for split in splits for captions in decode(split)["captions"])


def test_images_that_share_an_id_are_held_out_together(tmp_path):
    rows = rows_of(40).map(lambda row, index: {"image_id": f"id-{index // 2}"}, with_indices=True)
    rows.to_parquet(tmp_path / "train.parquet")
    train, validation = load_splits(str(tmp_path))
    assert [len(train), len(validation)] == [38, 2] and not set(train["image_id"]) & set(validation["image_id"])


def test_an_id_that_all_rows_share_is_none(tmp_path):
    rows_of(20).map(lambda row: {"image_id": "0"}).to_parquet(tmp_path / "train.parquet")
    assert [len(split) for split in load_splits(str(tmp_path))] == [19, 1]


def test_missing_images_are_not_taken_for_one(tmp_path):
    rows_of(40, image_3=b"", image_5=b"").to_parquet(tmp_path / "train.parquet")
    skipped = SkippedRows()
    assert sum(len(decode(split, skipped)) for split in load_splits(str(tmp_path))) == 38 and skipped.count == 2


def test_what_is_held_out_can_be_loaded_alone(parquet):
    for seed in (1, 2):
        held_out, columns = load_images(str(parquet), "validation", seed=seed)
        assert held_out["image_id"][:] == load_splits(str(parquet), seed=seed)[1]["image_id"][:]
        assert columns == resolve_columns(held_out)
    with pytest.raises(NoSplitError):
        load_images(str(parquet), "test")


def test_a_set_too_small_to_hold_anything_out_is_an_error(tmp_path):
    rows_of(1).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="at least 2 images"):
        load_splits(str(tmp_path))


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


@pytest.mark.parametrize("value, cleaned", [(" a  dog \t runs . ", ["a dog runs."]), (["one", "", None], ["one"])])
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


def test_a_skipped_row_of_a_held_out_split_has_its_file_and_row_number(tmp_path):
    lines = []
    for index in range(40):
        (tmp_path / f"{index}.png").write_bytes(png(index)[: 60 if index in (7, 21) else None])
        lines.append(json.dumps({"file_name": f"{index}.png", "text": "" if index == 30 else "a dog"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    path = tmp_path / ".skipped.jsonl"
    for _ in range(2):  # A run and its resumption.
        skipped = SkippedRows(path, max_share=1.0)
        for split in load_splits(str(tmp_path)):
            decode(split, skipped)
        assert skipped.count == 3
    lines = sorted(map(json.loads, path.read_text().splitlines()), key=lambda line: line["row"])
    assert [(line["row"], line["image_id"]) for line in lines] == [(7, "7.png"), (21, "21.png"), (30, "30.png")]
    assert all(line["image_id"] in line["reason"] for line in lines)


def test_the_id_of_a_row_without_one_is_its_file(tmp_path):
    rows = rows_of(3).remove_columns("image_id")
    rows = rows.map(lambda row, index: {"image": {"bytes": png(index), "path": f"a/{index}.png"}}, with_indices=True)
    assert decode(rows)["image_id"][:] == ["a/0.png", "a/1.png", "a/2.png"]


def test_heic_is_decoded_once_its_package_is_installed(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(draw_picture(3, (64, 48))).save(tmp_path / "a.heic", format="HEIF")
    (tmp_path / "a.txt").write_text("a dog")
    Image.init()
    with monkeypatch.context() as missing:
        missing.setattr(Image, "OPEN", {name: each for name, each in Image.OPEN.items() if name != "HEIF"})
        missing.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(ValueError, match="install pillow-heif"):
            decode(load_split(str(tmp_path), "train"))
    assert decode(load_split(str(tmp_path), "train"))["captions"][:] == [["a dog"]]


def test_two_processes_decode_the_same_in_the_same_order():
    rows = rows_of(23, image_7=b"")
    alone, together = (
        decode_dataset(rows, resolve_columns(rows), 24, SkippedRows(), "train", num_proc=number) for number in (None, 2)
    )
    assert alone.to_list() == together.to_list() and len(together) == 22
    assert content_fingerprint(alone) == content_fingerprint(together)


def test_the_fingerprint_of_decoded_rows_reads_no_pixels():
    rows = decode(rows_of(6))
    found = content_fingerprint(rows.remove_columns("digest"))
    assert found == content_fingerprint(rows) == content_fingerprint(rows.remove_columns("pixels"))
    assert found != content_fingerprint(rows.select([1, 0, 2, 3, 4, 5]))
    assert found != content_fingerprint(decode(rows_of(6, image_2=png(9))))


def test_pictures_and_captions_never_shift_against_each_other():
    decoded = decode(rows_of(40, image_3=b"", captions_9=[]))
    for row in decoded:
        index = int(row["image_id"].removeprefix("id-"))
        assert row["captions"][1] == f"picture {index}"
        assert decoded_image(row).size == (37, 28)
        assert decoded_image(row).getpixel((1, 1)) == draw_picture(index, (40, 30)).getpixel((1, 1))


def test_the_first_bad_row_stops_the_run_when_asked():
    with pytest.raises(ValueError, match="row 3, id id-3"):
        decode(rows_of(40, image_3=b"", image_5=b""), SkippedRows(on_bad_row="error"))


def test_more_than_a_tenth_of_bad_rows_is_an_error():
    bad = {f"image_{index}": b"" for index in range(5)}
    with pytest.raises(ValueError, match="5 of 40, first: column 'image': cannot read image id-0"):
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
    # The model's input size, so that neither resizes.
    rows = decode(rows_of(3, **{f"image_{index}": png(index, (24, 24)) for index in range(3)}))
    collator = CaptionCollator(tokenizer, 12, processor.image_mean, processor.image_std)
    batch = collator([CaptionDataset(rows, 24)[index] for index in range(3)])
    expected = processor([decoded_image(row) for row in rows], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected, atol=1e-5, rtol=0)


def test_every_draw_follows_from_seed_epoch_and_row():
    rows, augmentation = decode(rows_of(6)), Augmentation(0.3, True, 0.4)
    first = CaptionDataset(rows, 24, augmentation, 1, seed=5)
    again = CaptionDataset(rows, 24, augmentation, 1, seed=5)
    assert torch.equal(first[(2, 3)]["pixels"], again[(2, 3)]["pixels"])
    assert first[(2, 3)]["view"] == again[(2, 3)]["view"] != first[(3, 3)]["view"]
    assert not torch.equal(first[(2, 3)]["pixels"], first[(3, 3)]["pixels"])
    captions = {first[(epoch, 3)]["captions"][0] for epoch in range(12)}
    assert captions == set(rows[3]["captions"])


def test_captions_that_say_left_or_right_are_not_mirrored():
    sided = rows_of(1, captions_0=["a dog on the left"])
    plain = rows_of(1)
    for rows, kinds in ((sided, 1), (plain, 2)):
        dataset = CaptionDataset(decode(rows), 24, Augmentation(horizontal_flip=True), 1)
        assert len({dataset[(epoch, 0)]["pixels"].numpy().tobytes() for epoch in range(20)}) == kinds


def test_a_mixed_picture_is_two_photos_in_one_and_has_no_captions(tokenizer):
    rows = decode(rows_of(6))
    plain, half = (CaptionDataset(rows, 24, Augmentation(mixup=share), 2, seed=5) for share in (0.0, 0.5))
    alone = [plain[(0, row)]["pixels"].float() for row in range(6)]
    keys = [(epoch, row) for epoch in range(40) for row in range(6)]
    samples = [half[key] for key in keys]
    batch = batch_of(half, tokenizer, keys)
    described = [number for number, sample in enumerate(samples) if not sample["mixed"]]
    assert batch["captioned"].tolist() == described and len(batch["labels"]) == 2 * len(described)
    others = set()
    for (_, row), sample in zip(keys, samples):
        if not sample["mixed"]:
            assert torch.equal(sample["pixels"].float(), alone[row])
            continue
        # Which other image, with which weight, explains the difference to the image alone?
        difference = sample["pixels"].float() - alone[row]
        errors = {}
        for other in range(6):
            direction = alone[other] - alone[row]
            share = ((difference * direction).sum() / (direction**2).sum().clamp(min=1)).item()
            errors[other] = ((difference - share * direction).abs().max().item(), share)
        found = min(errors, key=errors.get)
        assert errors[found][0] <= 1.0 and -0.01 <= errors[found][1] <= 0.51
        others.add((row, found))
    assert 0.4 < sum(sample["mixed"] for sample in samples) / len(keys) < 0.6
    assert len(others) > 25, "every photo meets every other one"


def test_mixup_follows_from_seed_view_and_row_and_changes_no_other_draw():
    rows = decode(rows_of(6))
    augmentation = Augmentation(0.3, True, 0.4)
    plain = CaptionDataset(rows, 24, augmentation, 1, seed=5)
    mixing = CaptionDataset(rows, 24, replace(augmentation, mixup=0.5), 1, seed=5)
    again = CaptionDataset(rows, 24, replace(augmentation, mixup=0.5), 1, seed=5)
    mixed = 0
    for key in [(epoch, row) for epoch in range(5) for row in range(6)]:
        assert torch.equal(mixing[key]["pixels"], again[key]["pixels"])
        assert mixing[key]["captions"] == plain[key]["captions"]
        assert mixing[key]["view"].gain == plain[key]["view"].gain
        assert torch.equal(mixing[key]["pixels"], plain[key]["pixels"]) != mixing[key]["mixed"]
        mixed += mixing[key]["mixed"]
    assert 5 < mixed < 25


def test_cutmix_pastes_boxes_and_its_share_is_one_of_the_mixed():
    rows = decode(rows_of(6))
    blend, cut, half = (CaptionDataset(rows, 24, Augmentation(mixup=0.6, cutmix=share), 1, 5) for share in (0, 1, 0.5))
    keys, covered, boxes = [(epoch, row) for epoch in range(40) for row in range(6)], [], 0
    for key in keys:
        view, pixels = cut[key]["view"], cut[key]["pixels"]
        assert cut[key]["mixed"] == half[key]["mixed"] == blend[key]["mixed"] == (view.other is not None)
        if view.other is None:
            continue
        assert view.other == blend[key]["view"].other == half[key]["view"].other, "the same images are mixed"
        boxes += half[key]["view"].weight == 1.0
        left, top, right, bottom = view.region_pixels(24)
        inside = torch.zeros(24, 24, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        covered.append(inside.float().mean().item())
        assert torch.equal(pixels[inside], view.other.pixels(24)[inside])
        assert torch.equal(pixels[~inside], view.crop.pixels(24)[~inside])
    assert 0.4 < boxes / len(covered) < 0.6
    # A uniform share of the area, less what lies beyond the edges.
    assert 0.25 < sum(covered) / len(covered) < 0.45 and max(covered) > 0.6


def share_of(num_rows: int, batch_size: int, process: int = 0, processes: int = 1, epoch: int = 0, **kwargs) -> list:
    sampler = EpochBatchSampler(num_rows, batch_size, 4, process, processes, **kwargs)
    sampler.set_position(epoch, 0)
    return list(islice(sampler, len(sampler)))


def test_each_epoch_visits_every_row_once_in_an_order_of_its_own():
    orders = []
    for epoch in (0, 1):
        keys = [key for batch in share_of(31, 8, epoch=epoch) for key in batch]
        assert sorted(row for _, row in keys) == list(range(31)) and {e for e, _ in keys} == {epoch}
        orders.append([row for _, row in keys])
    assert orders[0] != orders[1]


@pytest.mark.parametrize("num_rows, batch_size, processes", [(31, 4, 2), (32, 4, 2), (100, 3, 5), (7, 1, 3), (3, 9, 3)])
def test_processes_together_take_the_steps_that_one_would(num_rows, batch_size, processes):
    alone = share_of(num_rows, batch_size * processes)
    shares = [share_of(num_rows, batch_size, process, processes) for process in range(processes)]
    together = [sum(step, []) for step in zip(*shares, strict=True)]
    assert sorted(row for step in together for _, row in step) == list(range(num_rows)), "each just once"
    assert all(batch for share in shares for batch in share), "nobody stands idle"
    if num_rows > 10:
        # With fewer images each process gets one, where a single process would take two steps.
        assert together == alone
        sizes = [len(step) for step in together]
        assert max(sizes) - min(sizes) <= 1


def test_batches_of_equal_size_leave_out_what_does_not_fill_one():
    shares = [share_of(31, 4, process, 2, equal=True) for process in range(2)]
    assert [len(batch) for share in shares for batch in share] == [4] * 6
    assert len({row for share in shares for batch in share for _, row in batch}) == 24


def test_an_epoch_goes_on_from_any_of_its_batches():
    whole = share_of(31, 4, 1, 2, epoch=3)
    sampler = EpochBatchSampler(31, 4, 4, 1, 2)
    sampler.set_position(3, 2)
    following = share_of(31, 4, 1, 2, epoch=4)
    assert list(islice(sampler, len(whole) - 2 + 3)) == [*whole[2:], *following[:3]], "and then to the next"


@pytest.mark.parametrize("equal, words", [(False, "one of the training images"), (True, "a batch of 4")])
def test_too_few_photos_for_the_processes_are_an_error(equal, words):
    with pytest.raises(ValueError, match=f"{words}.*2 processes, got 1 images"):
        EpochBatchSampler(1, 4, 0, 0, 2, equal=equal)


def stream_of(rows: datasets.Dataset, num_shards: int, **kwargs) -> StreamingCaptionDataset:
    options = {"columns": resolve_columns(rows), "skipped": SkippedRows(), "split": "train", **kwargs}
    return StreamingCaptionDataset(rows.to_iterable_dataset(num_shards=num_shards), 24, **options)


def test_a_stream_gives_the_same_pictures_and_skips_bad_rows():
    rows = rows_of(12, image_2=b"")
    skipped = SkippedRows()
    stream = stream_of(rows, 1, skipped=skipped)
    streamed = {sample["image_id"]: sample["pixels"] for sample in stream}
    mapped = CaptionDataset(decode(rows_of(12)), 24)
    assert set(streamed) == {f"id-{index}" for index in range(12) if index != 2} and skipped.count == 1
    assert all(torch.equal(streamed[mapped[i]["image_id"]], mapped[i]["pixels"]) for i in range(12) if i != 2)


def test_a_stream_mixes_images_of_a_block_but_no_bad_ones():
    stream = stream_of(rows_of(12, image_1=b""), 1, augmentation=Augmentation(mixup=0.9), shuffle_block=4)
    rows = {row["pixels"]: number for number, row in enumerate(decode(rows_of(12)))}
    pairs = []
    for epoch in range(8):
        stream.set_epoch(epoch)
        for view in (sample["view"] for sample in stream):
            if view.other is not None:
                pairs.append((rows[view.crop.row["pixels"]], rows[view.other.row["pixels"]]))
    assert len(pairs) > 60 and all(own // 4 == other // 4 for own, other in pairs)
    assert {other for _, other in pairs} == {*range(12)} - {1}
    assert stream.skipped.count == 8, "once an epoch, in its own turn"


def test_two_processes_share_a_stream_without_overlap():
    streams = (stream_of(rows_of(12), 4, process_index=process, num_processes=2) for process in range(2))
    shares = [{sample["image_id"] for sample in stream} for stream in streams]
    assert not shares[0] & shares[1] and len(shares[0] | shares[1]) == 12


def varied_stream(num_rows: int, num_shards: int, epoch: int = 0, **kwargs) -> StreamingCaptionDataset:
    mixing = {"mixup": kwargs.pop("mixup", 0.0), "cutmix": 0.5}
    variation = {"augmentation": Augmentation(0.3, True, 0.4, **mixing), "captions_per_image": 1, "seed": 9}
    stream = stream_of(rows_of(num_rows), num_shards, **variation, **kwargs)
    stream.set_epoch(epoch)
    return stream


def told(samples) -> list[tuple]:
    return [(sample["image_id"], sample["captions"], sample["pixels"].numpy().tobytes()) for sample in samples]


def test_a_stream_comes_in_another_order_each_epoch():
    orders = [[sample["image_id"] for sample in varied_stream(20, 5, epoch, shuffle_block=3)] for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    assert orders[0] != sorted(orders[0], key=lambda name: int(name[3:]))


@pytest.mark.parametrize("seen", [0, 1, 3, 4, 8, 10])
def test_a_resumed_stream_reads_only_the_block_it_was_in_again(seen, monkeypatch):
    whole = told(varied_stream(20, 4, 2, shuffle_block=4, num_processes=2))
    stream = varied_stream(20, 4, 2, shuffle_block=4, num_processes=2)
    samples = iter(stream)
    first = told(next(samples) for _ in range(seen))
    state = json.loads(json.dumps(stream.state_dict()))
    decoded, decode_row = [], streaming.decode_row
    monkeypatch.setattr(streaming, "decode_row", lambda row, *args: decoded.append(row) or decode_row(row, *args))
    resumed = varied_stream(20, 4, 2, shuffle_block=4, num_processes=2)
    resumed.load_state_dict(state)
    rest = told(resumed)
    assert first + rest == whole and len(decoded) == len(rest), "what was seen isn't decoded again"
    resumed.set_epoch(3)
    assert told(resumed) == told(varied_stream(20, 4, 3, shuffle_block=4, num_processes=2)), "then a whole epoch"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_a_stream_goes_on_at_the_place_of_each_of_its_workers(workers):
    def loader():
        stream = varied_stream(23, 4, 1, shuffle_block=3, mixup=0.6)
        options = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": told}
        return StatefulDataLoader(stream, 2, **options)

    whole = list(loader())
    stopped = loader()
    batches = iter(stopped)
    first = [next(batches) for _ in range(5)]
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = loader()
    resumed.load_state_dict(state)
    assert first + list(resumed) == whole
    assert len({sample[0] for batch in whole for sample in batch}) == 23
    # Another epoch by the same workers, stopped before each of them has given a batch.
    again, stopped = loader(), loader()
    again.dataset.set_epoch(2)
    stopped.dataset.set_epoch(2)
    expected = list(again)
    resumed.dataset.set_epoch(2)
    assert expected != whole and next(iter(resumed)) == expected[0]
    stopped.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    assert list(stopped) == expected[1:]
    assert list(resumed) == expected
