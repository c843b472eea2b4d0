"""Images without captions: loading, the order of an epoch, batches, streams, and whole runs with them."""

import json
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from ranks import Ranks
from safetensors.torch import load_file
from test_processes import seen_by
from test_train_distill import die_in_step
from tiny import CAPTIONS, draw_picture, log_rows, png_bytes
from torchdata.stateful_dataloader import StatefulDataLoader

from tinycap import train_distill
from tinycap.training.batches import CaptionCollator, CaptionDataset, EpochBatchSampler, join_batches
from tinycap.training.data import decode_dataset, image_keys, load_splits, resolve_columns
from tinycap.training.loading import create_loaders, load_data
from tinycap.training.skipped_rows import SkippedRows
from tinycap.training.streaming import EndlessStream, StreamingCaptionDataset
from tinycap.training.unlabelled import SharedOrder, load_unlabelled


def write_images(folder: Path, numbers, suffix: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.{suffix}").write_bytes(png_bytes(draw_picture(number)))
    return folder


@pytest.fixture
def unlabelled(tmp_path) -> str:
    """A folder of 40 image files, one of them damaged; two are copies of images of `photos`, one of them held out."""
    folder = write_images(tmp_path / "unlabelled" / "2019", [*range(100, 138), 3, 25])
    (folder / "117.png").write_bytes(b"damaged")
    return str(folder.parent)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_plain_folder_of_images_is_a_data_set_without_captions(tmp_path):
    write_images(tmp_path / "a", range(5))
    write_images(tmp_path / "b" / "val", range(5, 8))
    found = load_unlabelled(str(tmp_path), "train")
    assert found.columns.captions == [] and len(found.rows) == 5
    decoded = decode_dataset(found.rows, found.columns, 24, SkippedRows(), found.split)
    assert decoded["captions"][:] == [[]] * 5 and decoded["image_id"][0] == "a/0.png"
    assert len(load_unlabelled(str(tmp_path), "train[:2]").rows) == 2


def test_captions_of_an_unlabelled_set_are_ignored(photos):
    found = load_unlabelled(photos, "train")
    assert found.columns.caption is None and found.columns.image_id == "image_id"
    decoded = decode_dataset(found.rows, found.columns, 24, SkippedRows(), found.split)
    assert set(map(len, decoded["captions"])) == {0} and len(decoded) == 23


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_shards_need_no_caption_column(kind, tmp_path):
    if kind == "parquet":
        rows = {"image": [{"bytes": png_bytes(draw_picture(number)), "path": None} for number in range(5)]}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    else:
        write_images(tmp_path, range(5))
        with tarfile.open(tmp_path / "train-00000.tar", "w") as shard:
            for path in sorted(tmp_path.glob("*.png")):
                shard.add(path, path.name)
                path.unlink()
    found = load_unlabelled(str(tmp_path), "train")
    assert len(decode_dataset(found.rows, found.columns, 24, SkippedRows(), found.split)) == 5


def test_copies_and_known_images_are_left_out_of_an_unlabelled_set(tmp_path):
    write_images(tmp_path / "a", range(6))
    write_images(tmp_path / "b", range(3, 9))
    everything = load_unlabelled(str(tmp_path), "train")
    assert len(everything.rows) == 9
    rows = load_unlabelled(str(write_images(tmp_path / "known", [1, 7])), "train").rows
    keys = image_keys(rows, everything.columns)
    assert len(load_unlabelled(str(tmp_path / "a"), "train", known=keys).rows) == 5
    with pytest.raises(ValueError, match="--unlabelled_dataset_name .*got none of 2 rows"):
        load_unlabelled(str(tmp_path / "known"), "train", known=keys)


def test_an_unlabelled_set_that_is_not_there_is_an_error_that_names_the_flag(tmp_path):
    with pytest.raises(ValueError, match="--unlabelled_dataset_name .*no such folder"):
        load_unlabelled(str(tmp_path / "none"), "train")
    with pytest.raises(ValueError, match="--unlabelled_dataset_name .*no split 'testing'"):
        load_unlabelled(str(write_images(tmp_path / "some", range(2))), "testing")


@pytest.fixture
def partly_captioned(tmp_path) -> str:
    """A folder of 60 image files; every third one has captions."""
    folder = write_images(tmp_path / "partly", range(60))
    for number in range(0, 60, 3):
        (folder / f"{number}.txt").write_text(f"caption of {number}")
    return str(folder)


def test_held_out_images_have_captions_and_are_those_of_an_evaluation(partly_captioned):
    train, validation = load_splits(partly_captioned, seed=5, allow_missing_captions=True)
    assert len(train) == 59 and validation["captions"][:] != [None]
    assert validation["file_name"][:] == load_splits(partly_captioned, seed=5)[1]["file_name"][:]


def arguments(flags: list[str], *more: str):
    return train_distill.parse_args([*flags, *more])


def data_of(flags: list[str], *more: str, skipped: SkippedRows | None = None):
    return load_data(arguments(flags, *more), Accelerator(cpu=True), 24, 24, skipped or SkippedRows())


def test_images_without_captions_are_kept_only_when_allowed(flags, partly_captioned):
    flags = [*flags, "--dataset_name", partly_captioned]
    assert len(data_of(flags).train) == 19
    data = data_of(flags, "--allow_missing_captions")
    assert len(data.train) == 59 and len(data.unlabelled) == 40
    held_out = data.validation["captions"][0]
    assert sorted([*data.captions(), *held_out]) == sorted(f"caption of {number}" for number in range(0, 60, 3))


def test_a_runs_data_joins_both_sets_and_counts_bad_rows_of_each(flags, unlabelled, tmp_path):
    skipped = SkippedRows(tmp_path / "skipped.jsonl")
    data = data_of(flags, "--unlabelled_dataset_name", unlabelled, skipped=skipped)
    assert len(data.train) == 23 + 37 and data.unlabelled == list(range(23, 60))
    assert not {"2019/3.png", "2019/25.png"} & set(data.train["image_id"]), "copies of captioned images"
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["split"], line["image_id"]) for line in listed] == [
        ("train", "photo-5"),
        ("unlabelled train", "2019/117.png"),
    ]
    assert data.fingerprint != data_of(flags).fingerprint
    (Path(unlabelled) / "2019" / "100.png").write_bytes(png_bytes(draw_picture(999)))
    assert data.fingerprint != data_of(flags, "--unlabelled_dataset_name", unlabelled).fingerprint


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--unlabelled_dataset_name", "u"], "--unlabelled_dataset_name: needs --dataset_name"),
        (["--dataset_name", "d", "--unlabelled_split", "all"], "--unlabelled_split: needs --unlabelled_dataset_name"),
        (["--unlabelled_share", "1"], "--unlabelled_share: expected a number in (0, 1), got 1.0"),
        (
            ["--dataset_name", "d", "--unlabelled_dataset_name", "u", "--distill_weight", "0"],
            "--unlabelled_dataset_name: contradicts --distill_weight 0",
        ),
        (
            ["--dataset_name", "d", "--allow_missing_captions", "--distill_weight", "0", "--freeze_vision_model"],
            "--allow_missing_captions: contradicts --distill_weight 0",
        ),
        *(
            (["--objective", "scst", f"--{flag}", *value], f"--{flag}: contradicts --objective scst")
            for flag, value in (("unlabelled_dataset_name", ["u"]), ("allow_missing_captions", []))
        ),
        (["--streaming", "--unlabelled_dataset_name", "u"], "--streaming: needs --unlabelled_share"),
        (["--streaming", "--unlabelled_share", "0.5"], "--streaming: needs --unlabelled_share with"),
    ],
)
def test_images_without_captions_need_a_teacher_and_no_reward(extra, words, capsys):
    with pytest.raises(SystemExit):
        train_distill.parse_args(extra)
    assert words in capsys.readouterr().err


# --- the order of an epoch --------------------------------------------------------------------------------------------


def order_of(captioned: int, unlabelled: int, share: float, seed: int = 4) -> SharedOrder:
    rows = list(range(captioned + unlabelled))
    return SharedOrder(rows[:captioned], rows[captioned:], share, seed)


@pytest.mark.parametrize("captioned, unlabelled, share", [(30, 70, 0.6), (13, 200, 0.3), (40, 7, 0.75), (9, 5, 0.01)])
def test_an_epoch_is_a_pass_over_the_captioned_images_with_the_share(captioned, unlabelled, share):
    order = order_of(captioned, unlabelled, share)
    met = []
    for epoch in range(8):
        keys = order(epoch)
        assert len(keys) == len(order) and order(epoch) == keys
        told = [key for key in keys if key[1] < captioned]
        assert sorted(told) == [(epoch, row) for row in range(captioned)]
        untold = [key for key in keys if key[1] >= captioned]
        assert len(untold) == max(1, round(captioned * share / (1 - share)))
        for size in (5, 8):
            for first in range(0, len(keys) - size, size):
                number = sum(row >= captioned for _, row in keys[first : first + size])
                assert abs(number - size * len(untold) / len(keys)) < 1
        met += untold
    assert len(set(met)) == len(met), "an image that comes again is varied anew"
    counts = Counter(row for _, row in met)
    assert max(counts.values()) - min([counts[row] for row in range(captioned, captioned + unlabelled)]) <= 1
    passes = [number for number, _ in met]
    assert passes == sorted(passes)
    assert order(0) != order(1) and order(0) != order_of(captioned, unlabelled, share, seed=5)(0)


def test_a_share_needs_images_of_both_kinds():
    with pytest.raises(ValueError, match="--unlabelled_share: expected .* got 3 with and 0 without"):
        order_of(3, 0, 0.5)


def test_processes_share_an_epoch_with_a_share_as_one_would():
    order = order_of(30, 70, 0.6)

    def batches(batch_size: int, process: int = 0, processes: int = 1, first: int = 0) -> list:
        sampler = EpochBatchSampler(len(order), batch_size, 4, process, processes, order=order)
        sampler.set_position(2, first)
        return list(islice(sampler, len(sampler) - first))

    together = [sum(step, []) for step in zip(*(batches(4, process, 2) for process in range(2)), strict=True)]
    assert together == batches(8) and sum(together, []) == order(2)
    assert batches(8, first=3) == batches(8)[3:]


# --- samples and batches ----------------------------------------------------------------------------------------------


def rows_of(num: int, first: int = 0, captioned: bool = True) -> datasets.Dataset:
    rows = {
        "image": [{"bytes": png_bytes(draw_picture(number)), "path": None} for number in range(first, first + num)],
        "captions": [CAPTIONS[:2] if captioned else [] for _ in range(num)],
        "image_id": [f"id-{number}" for number in range(first, first + num)],
    }
    features = {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    features["image_id"] = datasets.Value("string")
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.fixture
def collator(tokenizer) -> CaptionCollator:
    return CaptionCollator(tokenizer, 12, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3])


def decoded_rows() -> datasets.Dataset:
    """Three images with captions and two without."""
    rows = datasets.concatenate_datasets([rows_of(3), rows_of(2, 3, captioned=False)])
    columns = resolve_columns(rows)
    with pytest.raises(ValueError, match="2 of 5"):
        decode_dataset(rows, columns, 24, SkippedRows(), "train")
    return decode_dataset(rows, replace(columns, requires_captions=False), 24, SkippedRows(), "train")


def test_an_image_without_captions_has_pixels_and_no_labels(collator):
    dataset = CaptionDataset(decoded_rows(), 24, captions_per_image=2)
    batch = collator([dataset[row] for row in range(5)])
    assert batch["captioned"].tolist() == [0, 1, 2]
    assert batch["labels"].shape[0] == 6 and (batch["labels"] != -100).any(dim=1).all()
    assert batch["references"][3:] == [[], []] and batch["pixel_values"][4].std() > 0.1


def test_an_image_without_captions_changes_no_caption_loss(collator, model):
    dataset = CaptionDataset(decoded_rows(), 24, captions_per_image=2)
    teacher = torch.nn.functional.normalize(torch.randn(5, 14), dim=-1)

    def losses(rows: list[int]):
        batch = collator([dataset[row] for row in rows])
        batch["labels"].clamp_(max=36)
        options = {name: batch[name] for name in ("pixel_values", "labels", "captioned")}
        return model(**options, teacher_embeds=teacher[rows], skip_logits=True)

    both, captioned, other = losses([3, 0, 4, 1, 2]), losses([0, 1, 2]), losses([3, 4])
    torch.testing.assert_close(both.caption_loss, captioned.caption_loss)
    torch.testing.assert_close(both.distill_loss, 0.6 * captioned.distill_loss + 0.4 * other.distill_loss)
    assert other.caption_loss == 0
    other.loss.backward()
    # DDP finds no unused parameter: the decoder's gradient is zero, not missing.
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.decoder.embed_tokens.weight.grad.abs().max() == 0
    assert model.vision_model.projection.weight.grad.abs().max() > 0


def test_joined_batches_hold_the_images_of_both(collator):
    dataset = CaptionDataset(decoded_rows(), 24, captions_per_image=2)
    samples = [dataset[row] for row in range(5)]
    joined, whole = join_batches(collator(samples[:3]), collator(samples[3:])), collator(samples)
    assert joined.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(joined[name], value) if isinstance(value, torch.Tensor) else joined[name] == value


# --- streams ----------------------------------------------------------------------------------------------------------


def endless(num: int = 11, num_shards: int = 3, **kwargs) -> EndlessStream:
    rows = rows_of(num, captioned=False)
    options = {"columns": resolve_columns(rows, captions=False), "skipped": SkippedRows(), "split": "u"}
    stream = {"captions_per_image": 1, "seed": 9, "shuffle_block": 2, **options, **kwargs}
    return EndlessStream(rows.to_iterable_dataset(num_shards=num_shards), 24, **stream)


def ids_of(samples) -> list[str]:
    return [sample["image_id"] for sample in samples]


def test_an_endless_stream_shows_every_image_in_each_pass():
    passes = ids_of(islice(endless(), 33))
    orders = [passes[first : first + 11] for first in (0, 11, 22)]
    assert all(len(set(order)) == 11 for order in orders) and orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_endless_stream_resumes_in_the_middle_of_any_pass(workers):
    def loader():
        return StatefulDataLoader(endless(), 3, num_workers=workers, collate_fn=ids_of)

    whole = list(islice(loader(), 14))
    for seen in (1, 6, 11):
        stopped = loader()
        batches = iter(stopped)
        assert [next(batches) for _ in range(seen)] == whole[:seen]
        resumed = loader()
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        assert list(islice(resumed, 14 - seen)) == whole[seen:]


def test_a_stream_without_usable_images_ends_instead_of_waiting():
    rows = rows_of(3, captioned=False).map(lambda row: {"image": {"bytes": b"broken", "path": None}})
    stream = endless()
    broken = EndlessStream(rows.to_iterable_dataset(), 24, columns=stream.columns, skipped=SkippedRows(), split="u")
    assert list(broken) == []


def test_a_stream_leaves_out_the_images_it_is_told_to():
    rows = rows_of(11, captioned=False)
    known = frozenset(image_keys(rows, resolve_columns(rows, captions=False))[2:5])
    assert len(set(ids_of(islice(endless(known=known), 24)))) == 8


@pytest.mark.parametrize("required, kept", [(True, 3), (False, 5)])
def test_a_stream_keeps_images_without_captions_when_allowed(required, kept):
    rows = datasets.concatenate_datasets([rows_of(3), rows_of(2, 3, captioned=False)])
    columns = replace(resolve_columns(rows), requires_captions=required)
    options = {"columns": columns, "skipped": SkippedRows(), "split": "train", "captions_per_image": 1}
    samples = list(StreamingCaptionDataset(rows.to_iterable_dataset(), 24, **options))
    assert sorted(len(sample["references"]) for sample in samples) == [0] * (kept - 3) + [2] * 3


def test_bad_rows_of_earlier_passes_do_not_add_up_to_too_many(monkeypatch):
    monkeypatch.setattr("tinycap.training.streaming.MIN_ROWS_TO_JUDGE", 5)
    rows = rows_of(20).cast_column("image", datasets.Image(decode=False))
    rows = rows.map(
        lambda row, index: {"image": {"bytes": b"broken" if index == 3 else row["image"]["bytes"], "path": None}},
        with_indices=True,
        features=rows.features,
    )
    options = {"columns": resolve_columns(rows), "skipped": SkippedRows(max_share=0.2), "split": "train"}
    stream = StreamingCaptionDataset(rows.to_iterable_dataset(), 24, **options)
    for epoch in range(9):
        stream.set_epoch(epoch)
        assert len(list(stream)) == 19


def test_a_streams_batch_has_the_share_without_captions(flags, unlabelled, collator):
    more = ("--streaming", "--unlabelled_dataset_name", unlabelled, "--unlabelled_share", "0.4")
    args, accelerator = arguments(flags, *more), Accelerator(cpu=True)
    data = load_data(args, accelerator, 24, 24, SkippedRows())
    batches, _ = create_loaders(args, accelerator, data, collator, 24, SkippedRows())
    counts = [(len(batch["references"]), batch["references"].count([])) for batch in batches.epoch(0)]
    assert counts == [(7, 3)] * 5 + [(6, 3)]
    args.per_device_train_batch_size = 1
    with pytest.raises(ValueError, match="--per_device_train_batch_size: expected at least 2.* got 1"):
        create_loaders(args, accelerator, data, collator, 24, SkippedRows())


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_with_images_without_captions_says_so_in_its_card(flags, unlabelled, tmp_path):
    train_distill.main([*flags, "--unlabelled_dataset_name", unlabelled, "--unlabelled_share", "0.7"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"23 images with captions and 37 without of `{unlabelled}`, which are 70% of a step's" in card
    rows = [row for row in log_rows(tmp_path / "out") if "loss" in row]
    # 23 captioned images and 54 others, seven at a time.
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and {row["epoch"] for row in rows} == {0}
    assert all(row["distill_loss"] > 0 for row in rows)


@pytest.mark.slow
def test_a_killed_run_with_them_resumes_to_the_same_weights(flags, unlabelled, tmp_path, monkeypatch):
    # More than an epoch and more than a pass.
    flags = [*flags, "--unlabelled_dataset_name", unlabelled, "--unlabelled_share", "0.6", "--mixup", "0.5"]
    flags += ["--teacher_cache_dir", str(tmp_path / "cache"), "--teacher_views", "2"]
    flags += ["--max_train_steps", "14", "--checkpointing_steps", "3"]
    train_distill.main([*flags, "--output_dir", str(tmp_path / "whole")])
    resume = []
    for step in (6, 12):
        die_in_step(monkeypatch, [*flags, *resume], step)
        resume = ["--resume_from_checkpoint", "latest"]
    train_distill.main([*flags, *resume])
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [[(row["step"], row["loss"]) for row in log_rows(tmp_path / n) if "loss" in row] for n in ("whole", "out")]
    assert losses[0] == losses[1] and log_rows(tmp_path / "out")[-1]["epoch"] > 0
    (Path(unlabelled) / "2019" / "100.png").unlink()
    with pytest.raises(ValueError, match="expected the training images that it was written with"):
        train_distill.main([*flags, *resume])


@pytest.mark.slow
def test_two_processes_with_them_come_to_the_weights_of_one(flags, unlabelled, tmp_path):
    # Nine images in ten have no captions, so that some batches of a process, and some steps, have none.
    common = [*flags, "--dropout", "0", "--patch_dropout", "0", "--max_train_steps", "12", "--learning_rate", "3e-3"]
    common += ["--unlabelled_dataset_name", unlabelled, "--unlabelled_share", "0.9"]
    common += ["--gradient_accumulation_steps", "2"]
    both = Ranks([*common, "--per_device_train_batch_size", "2"], tmp_path / "log", tmp_path / "seen")
    train_distill.main([*common, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "one")])
    both.finish()
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "one"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)
    rows = [row for row in log_rows(tmp_path / "out") if "loss" in row]
    assert any(row["caption_loss"] == 0 for row in rows) and any(row["caption_loss"] > 0 for row in rows)
    for rank in range(2):
        steps = map(json.loads, Path(f"{tmp_path / 'seen'}-{rank}").read_text().splitlines())
        assert any(not any("photo" in name for name in step["ids"]) for step in steps)


@pytest.mark.slow
def test_two_processes_resume_two_streams_to_the_same_weights(flags, unlabelled, tmp_path):
    # Of four images in a batch, one has captions: one process has 12 batches an epoch, the other 11.
    flags = [*flags, "--streaming", "--unlabelled_dataset_name", unlabelled, "--unlabelled_share", "0.75"]
    flags += ["--per_device_train_batch_size", "4", "--dataloader_num_workers", "1"]
    flags += ["--max_train_steps", "15", "--checkpointing_steps", "6"]
    out = tmp_path / "out"
    Ranks(flags, tmp_path / "log", tmp_path / "whole").finish()
    whole = load_file(out / "model.safetensors")
    states = [json.loads((out / "checkpoint-12" / f"process_state_{rank}.json").read_text()) for rank in range(2)]
    assert sorted(state["finished"] for state in states) == [False, True]
    (out / "model.safetensors").unlink()
    resume = ["--resume_from_checkpoint", out / "checkpoint-12"]
    Ranks([*flags, *resume], tmp_path / "log", tmp_path / "resumed").finish()
    assert seen_by(tmp_path / "resumed") == seen_by(tmp_path / "whole", after=12)
    resumed = load_file(out / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    seen = Counter(sum(seen_by(tmp_path / "whole"), []))
    captioned = {name: number for name, number in seen.items() if "photo" in name}
    assert len(captioned) == 23 and set(captioned.values()) == {1, 2}
    # All but a damaged file and a copy of a validation image, in more than two passes.
    assert len(seen) == 23 + 38 and {seen[name] for name in seen.keys() - captioned} == {2, 3}
