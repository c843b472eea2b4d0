"""Crops and mixtures as a GPU computes them, on a CPU: the same code, beside Pillow's."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import CAPTIONS, draw_picture, log_rows
from torch.utils.data import DataLoader

from tinycap import REPOSITORY, train_distill
from tinycap.processing_tinycap import load_image
from tinycap.training import device_images, loading
from tinycap.training.augmentation import Augmentation
from tinycap.training.batches import CaptionCollator, CaptionDataset, EpochBatchSampler
from tinycap.training.data import DECODED_FEATURES, cache_size
from tinycap.training.device_images import DevicePixels, load_images
from tinycap.training.train_batches import TrainBatches


CPU = torch.device("cpu")
VARIED = Augmentation(0.25, True, 0.3, mixup=0.7, cutmix=0.5)


def decoded_rows(images: list) -> Dataset:
    rows = [
        {"pixels": image.tobytes(), "height": image.height, "width": image.width, "captions": CAPTIONS, "image_id": "a"}
        for image in images
    ]
    features = {name: kind for name, kind in DECODED_FEATURES.items() if name != "reason"}
    return Dataset.from_list(rows, features=type(DECODED_FEATURES)(features))


def photos(image_size: int) -> Dataset:
    """The photos of the gallery, as they are decoded for training at `image_size`."""
    images = [load_image(str(path)) for path in sorted((REPOSITORY / "docs" / "photos").glob("*.jpg"))]
    assert len(images) > 5
    sizes = [max(1, min(image.size) // cache_size(image_size)) for image in images]
    return decoded_rows([image.reduce(size) for image, size in zip(images, sizes)])


def pictures(num: int) -> Dataset:
    """Images of several shapes, some smaller than their square."""
    return decoded_rows([draw_picture(seed, (20 + 7 * seed, 31 + seed % 3)) for seed in range(num)])


@pytest.fixture
def collator(tokenizer) -> CaptionCollator:
    return CaptionCollator(tokenizer, 12, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])


@pytest.fixture
def room(monkeypatch):
    """Lets a CPU be the device that images are cropped on, with this much memory."""

    def give(free_bytes: int) -> None:
        monkeypatch.setattr(loading, "augments_on", lambda device: True)
        monkeypatch.setattr(device_images, "free_memory", lambda device: free_bytes)

    return give


def grey_levels(collator: CaptionCollator, pixel_values: torch.Tensor) -> torch.Tensor:
    return 255 * pixel_values * collator.image_std.view(3, 1, 1)


@pytest.mark.parametrize("image_size", [56, pytest.param(112, marks=pytest.mark.slow)])
def test_a_devices_views_of_photos_are_pillows_within_a_grey_level(image_size, collator):
    # Also crops much larger than the square, as where a teacher with larger inputs shares the images.
    dataset = CaptionDataset(photos(112), image_size, VARIED, 1, seed=3)
    keys = [(epoch, row) for epoch in range(12) for row in range(len(dataset))]
    expected = collator([dataset[key] for key in keys])
    batch = collator([replace(dataset, on_device=True)[key] for key in keys])
    assert "pixel_values" not in batch and 40 < len(batch["views"]["mixed"]) < 90
    found = DevicePixels(image_size)(batch["views"])
    difference = grey_levels(collator, found - expected["pixel_values"]).abs()
    # One level of an image, times a contrast and a brightness of at most 1.3 each and a channel's gain of 1.15.
    # Pillow 13 resizes tall images in another order, with other roundings in between.
    assert difference.max() < 2.0 and difference.mean() < 0.3
    assert torch.equal(batch["labels"], expected["labels"]) and batch["num_tokens"] == expected["num_tokens"] > 0


def test_images_that_lie_on_the_device_give_the_pixels_of_sent_ones(collator, room):
    room(10**9)
    dataset = CaptionDataset(pictures(9), 24, VARIED, 1, seed=3, on_device=True)
    keys = [(epoch, row) for epoch in range(5) for row in range(9)]
    sent = collator([dataset[key] for key in keys])["views"]
    images, dataset.offsets = load_images(dataset.rows, CPU)
    del dataset.read_rows
    lying = collator([dataset[key] for key in keys])["views"]
    assert "images" in sent and "images" not in lying
    assert torch.equal(DevicePixels(24)(sent), DevicePixels(24, images)(lying))
    assert dataset.in_size(24)[(1, 2)]["pixels"].shape == (24, 24, 3), "a teacher's cache has pixels still"


def test_images_lie_on_the_device_only_where_they_fit(room):
    rows = pictures(4)
    size = sum(len(row["pixels"]) for row in rows)
    room(2 * size)
    images, offsets = load_images(rows.select([2, 0, 3]), CPU)
    assert offsets.tolist() == [0, 34 * 33, 34 * 33 + 20 * 31]
    first = torch.frombuffer(bytearray(rows[0]["pixels"]), dtype=torch.uint8).view(-1, 3)
    assert torch.equal(images[34 * 33 :][: len(first)], first)
    room(2 * size - 2)
    assert load_images(rows, CPU) is None


@pytest.mark.parametrize("augmentation", [Augmentation(), VARIED])
def test_chunks_of_crops_give_the_pixels_of_all_at_once(augmentation, collator, monkeypatch):
    dataset = CaptionDataset(pictures(7), 24, augmentation, 1, 5, on_device=True)
    views = collator([dataset[(1, row)] for row in range(7)])["views"]
    whole = DevicePixels(24)(views)
    assert whole.shape == (7, 3, 24, 24) and bool(len(views["mixed"])) == (augmentation.mixup > 0)
    monkeypatch.setattr(device_images, "CHUNK", 3)
    torch.testing.assert_close(DevicePixels(24)(views), whole, atol=1e-5, rtol=0)


# --- batches across epochs --------------------------------------------------------------------------------------------


def numbers_of(batch: list) -> dict:
    return {"keys": [sample for sample in batch]}


class Keys(CaptionDataset):
    """Samples that are their keys."""

    def __getitem__(self, key):
        return key


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_of_all_epochs_come_from_one_iteration(workers, monkeypatch):
    dataset = Keys(pictures(11), 24)
    starts, iterate = [], DataLoader.__iter__
    monkeypatch.setattr(DataLoader, "__iter__", lambda loader: starts.append(loader) or iterate(loader))

    def batches() -> TrainBatches:
        sampler = EpochBatchSampler(11, 4, seed=2)
        return TrainBatches(DataLoader(dataset, batch_sampler=sampler, collate_fn=numbers_of, num_workers=workers), CPU)

    whole = batches()
    epochs = [[batch["keys"] for batch in whole.epoch(epoch)] for epoch in range(4)]
    assert len(starts) == 1 and all(len(epoch) == 3 for epoch in epochs)
    for number, epoch in enumerate(epochs):
        assert sorted(sum(epoch, [])) == [(number, row) for row in range(11)]
    assert len({tuple(sum(epoch, [])) for epoch in [[[row for _, row in batch] for batch in e] for e in epochs]}) == 4
    resumed = batches()
    rest = [[batch["keys"] for batch in resumed.epoch(*start)] for start in ((1, 2), (2, 0), (3, 0))]
    assert rest == [epochs[1][2:], *epochs[2:]] and len(starts) == 2
    # A jump, which no run makes, starts anew.
    assert [batch["keys"] for batch in resumed.epoch(1)] == epochs[1] and len(starts) == 3


# --- whole runs -------------------------------------------------------------------------------------------------------

MIXED = ["--mixup", "0.6", "--cutmix", "0.5"]


@pytest.mark.slow
def test_a_run_with_views_of_the_device_is_that_of_the_cpu_and_resumes(flags, tmp_path, room):
    """Whether the images lie on the device or are sent."""
    flags = [*flags, *MIXED, "--dataloader_num_workers", "1"]
    train_distill.main([*flags, "--output_dir", str(tmp_path / "cpu")])
    for free_bytes in (10**9, 0):
        room(free_bytes)
        out = tmp_path / f"{free_bytes}"
        on_device = [*flags, "--output_dir", str(out)]
        train_distill.main(on_device)
        losses = [[row["loss"] for row in log_rows(folder) if "loss" in row] for folder in (tmp_path / "cpu", out)]
        assert losses[1] == pytest.approx(losses[0], abs=0.02) and losses[1] != losses[0]
        whole = load_file(out / "model.safetensors")
        train_distill.main([*on_device, "--resume_from_checkpoint", str(out / "checkpoint-4")])
        resumed = load_file(out / "model.safetensors")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_a_stream_mixes_on_the_device_as_on_the_cpu(flags, tmp_path, room):
    flags = [*flags, *MIXED, "--streaming"]
    train_distill.main([*flags, "--output_dir", str(tmp_path / "cpu")])
    room(0)
    train_distill.main(flags)
    losses = [[row["loss"] for row in log_rows(tmp_path / name) if "loss" in row] for name in ("cpu", "out")]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
