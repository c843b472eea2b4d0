import random

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny import CAPTIONS, draw_picture
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tinycap.training import teacher_cache
from tinycap.training.augmentation import Augmentation
from tinycap.training.batches import CaptionCollator, CaptionDataset
from tinycap.training.data import DECODED_FEATURES, content_fingerprint
from tinycap.training.teacher import Teacher
from tinycap.training.teacher_cache import build_teacher_cache


def make_teacher(seed: int = 0) -> Teacher:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 18, "intermediate_size": 22, "num_hidden_layers": 1, "num_attention_heads": 3}
    return Teacher(CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=16, patch_size=8, **sizes)))


def make_dataset(
    num_rows: int = 11, seed: int = 5, crop_scale: float = 0.4, mixup: float = 0.0, cutmix: float = 0.0
) -> CaptionDataset:
    rows = []
    for index in range(num_rows):
        picture = draw_picture(index)
        row = {"pixels": picture.tobytes(), "height": 29, "width": 37, "captions": CAPTIONS, "image_id": str(index)}
        rows.append({**row, "reason": ""})
    decoded = Dataset.from_list(rows, features=DECODED_FEATURES).remove_columns("reason")
    return CaptionDataset(decoded, 24, Augmentation(crop_scale, True, 0.2, mixup, cutmix), 2, seed)


@pytest.fixture
def collator(tokenizer) -> CaptionCollator:
    return CaptionCollator(tokenizer, 12, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])


@pytest.fixture
def build(collator, tmp_path, monkeypatch):
    """Builds the cache in small files and counts the images that the teacher embeds."""
    monkeypatch.setattr(teacher_cache, "SHARD_SIZE", 4)
    # Found files aren't compared with the teacher, whose images are counted.
    monkeypatch.setattr(teacher_cache, "CHECKED_ROWS", 0)
    seen = []

    def run(teacher=None, dataset=None, num_views=3):
        teacher, dataset = teacher or make_teacher(), dataset or make_dataset()
        teacher.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        return build_teacher_cache(
            Accelerator(cpu=True),
            teacher,
            dataset,
            collator,
            tmp_path / "cache",
            num_views,
            batch_size=3,
        )

    run.seen = seen
    return run


@pytest.mark.parametrize("mixup, cutmix", [(0.0, 0.0), (0.5, 0.0), (0.5, 1.0)])
def test_the_cache_holds_the_teachers_embedding_of_the_students_crop(build, collator, mixup, cutmix):
    teacher, dataset = make_teacher(), make_dataset(mixup=mixup, cutmix=cutmix)
    dataset.teacher_cache = build(teacher, dataset)
    keys = [(epoch, random.Random(epoch).randrange(11)) for epoch in range(9)]
    samples = [dataset[key] for key in keys]
    assert any(sample["mixed"] for sample in samples) == (mixup > 0)
    batch = collator(samples)
    torch.testing.assert_close(batch["teacher_embeds"], teacher(batch["pixel_values"]), atol=1e-6, rtol=0)


def test_a_teacher_may_see_the_students_crops_in_more_pixels(build, collator):
    teacher, dataset = make_teacher(), make_dataset()
    large = dataset.in_size(32)
    dataset.teacher_cache = build(teacher, large)
    keys = [(epoch, random.Random(epoch).randrange(11)) for epoch in range(9)]
    small, seen = collator([dataset[key] for key in keys]), collator([large[key[0] % 3, key[1]] for key in keys])
    assert seen["pixel_values"].shape[-1] == 32
    torch.testing.assert_close(small["teacher_embeds"], teacher(seen["pixel_values"]), atol=1e-6, rtol=0)
    shrunk = torch.nn.functional.interpolate(seen["pixel_values"], size=(24, 24), mode="area")
    assert (shrunk - small["pixel_values"]).abs().mean() < 0.1, "the same crops"


def test_epochs_take_turns_with_the_views_and_draw_other_captions(build):
    dataset = make_dataset()
    dataset.teacher_cache = build(dataset=dataset)
    first, second, again = (dataset[epoch, 6] for epoch in (0, 1, 3))
    assert torch.equal(first["pixels"], again["pixels"]) and not torch.equal(first["pixels"], second["pixels"])
    assert torch.equal(first["teacher_embeds"], again["teacher_embeds"])
    drawn = {tuple(dataset[epoch, 6]["captions"]) for epoch in range(0, 30, 3)}
    assert len(drawn) > 1, "the same view with other captions"


def test_a_finished_cache_is_not_computed_again(build):
    build()
    assert sum(build.seen) == 3 * 11
    build()
    assert sum(build.seen) == 3 * 11
    build(num_views=4)
    assert sum(build.seen) == 4 * 11, "one more view is added to those there"


def test_a_cache_serves_the_same_photos_from_another_place(build, tmp_path):
    build()
    moved = make_dataset()
    moved.rows.save_to_disk(tmp_path / "elsewhere")
    moved.rows = Dataset.load_from_disk(tmp_path / "elsewhere")
    build(dataset=moved)
    assert sum(build.seen) == 3 * 11, "nothing is computed again"


def test_one_changed_pixel_or_caption_is_another_dataset():
    rows = make_dataset(4).rows
    table = rows.to_list()

    def changed(index: int, **values) -> str:
        rows = [{**row, **(values if place == index else {})} for place, row in enumerate(table)]
        return content_fingerprint(Dataset.from_list(rows, features=make_dataset(4).rows.features))

    pixels = bytearray(table[2]["pixels"])
    pixels[-1] ^= 1
    found = [changed(0), changed(2, pixels=bytes(pixels)), changed(3, captions=["other"]), changed(1, width=38)]
    assert found[0] == content_fingerprint(rows) and len(set(found)) == 4
    assert content_fingerprint(rows.select([1, 0, 2, 3])) != found[0], "their order counts"
    assert content_fingerprint(rows.select([3, 0]).select([1, 0])) == content_fingerprint(rows.select([0, 3]))


def test_an_interrupted_build_goes_on_where_it_stopped(build, tmp_path):
    whole = build()
    folder = next((tmp_path / "cache").iterdir())
    lost = sorted(folder.glob("view-001-*"))[1]
    # Killed while writing this file.
    lost.rename(folder / f".{lost.name}.0")
    resumed = build()
    assert sum(build.seen) == 3 * 11 + 4
    assert all(torch.equal(whole(view, row), resumed(view, row)) for view in range(3) for row in range(11))


def test_what_shapes_an_embedding_is_part_of_the_key(build, tmp_path):
    build()
    others = [
        {"teacher": make_teacher(1)},
        {"dataset": make_dataset(seed=6)},
        {"dataset": make_dataset(crop_scale=0.5)},
        {"dataset": make_dataset(num_rows=10)},
        {"dataset": make_dataset(mixup=0.5)},
        {"dataset": make_dataset(mixup=0.5, cutmix=0.5)},
    ]
    for number, other in enumerate(others, start=2):
        before = sum(build.seen)
        build(**other)
        assert len(list((tmp_path / "cache").iterdir())) == number and sum(build.seen) > before, other


def test_a_damaged_file_is_an_error_that_names_it(build, tmp_path):
    build()
    path = sorted((tmp_path / "cache").glob("*/view-002-*"))[0]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="view-002-000000"):
        build()


FORGED = [
    (lambda embeds: embeds * 0, "norm 1, got 0 in row 0 and 4 such"),
    (lambda embeds: embeds * 1.5, "norm 1, got 1.5"),
    (lambda embeds: embeds / 0, "norm 1"),
    (lambda embeds: embeds.index_fill(0, torch.tensor([2]), float("nan")), "norm 1, got nan in row 2 and 1 such"),
    (lambda embeds: (embeds * 127).to(torch.int8), "torch.float32, got .* of torch.int8"),
    (lambda embeds: embeds.half(), "torch.float32, got .* of torch.float16"),
    (lambda embeds: embeds[:, :-1], "expected embeddings"),
    (lambda embeds: embeds.roll(1, 1), "row ., got another"),
    (lambda embeds: torch.nn.functional.normalize(torch.ones_like(embeds)), "row ., got another"),
]


def test_embeddings_of_something_else_are_an_error(build, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "CHECKED_ROWS", 32)
    build()
    build()
    path = sorted((tmp_path / "cache").glob("*/view-001-*"))[0]
    embeds = load_file(path)["image_embeds"].clone()
    for change, message in FORGED:
        save_file({"image_embeds": change(embeds).contiguous()}, path)
        with pytest.raises(ValueError, match=f"view-001-000000.*{message}"):
            build()
