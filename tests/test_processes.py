"""Training in two real processes over gloo on a CPU, with DDP."""

import json
import time
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
from tiny import CAPTIONS, draw_picture, log_rows, png_bytes

from tinycap import train_distill


pytestmark = pytest.mark.slow


def without(flags: list[str], *dropped: str) -> list[str]:
    return [word for flag in zip(flags[::2], flags[1::2]) if flag[0] not in dropped for word in flag]


def seen_by(witness: Path, after: int = 0) -> list[list[str]]:
    """For each process, the images of all its steps from `after` on."""
    rows = [[json.loads(line) for line in Path(f"{witness}-{rank}").read_text().splitlines()] for rank in range(2)]
    return [[name for row in share if row["step"] > after for name in row["ids"]] for share in rows]


def test_two_processes_come_to_the_weights_of_one_within_1e5(flags, tmp_path):
    # 23 images by 2 x 3 x 2: the last step of an epoch is smaller, and captions differ in length.
    common = [*flags, "--dropout", "0", "--patch_dropout", "0", "--max_train_steps", "12", "--learning_rate", "3e-3"]
    common += ["--gradient_accumulation_steps", "2", "--checkpointing_steps", "12"]
    both = Ranks([*common, "--per_device_train_batch_size", "3"], tmp_path / "log", tmp_path / "seen")
    train_distill.main([*common, "--per_device_train_batch_size", "6", "--output_dir", str(tmp_path / "one")])
    both.finish()
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "one"))
    assert two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)
    losses = [[row["loss"] for row in log_rows(tmp_path / name) if "loss" in row] for name in ("one", "out")]
    assert len(losses[0]) == 12 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    counts = [Counter(share) for share in seen_by(tmp_path / "seen")]
    # 12 steps of two batches, four batches an epoch: each image once in each of six epochs.
    assert set((counts[0] + counts[1]).values()) == {6} and len(counts[0] + counts[1]) == 23


def test_two_processes_share_the_pictures_and_write_one_result(flags, tmp_path):
    cache = ("--teacher_cache_dir", tmp_path / "cache", "--teacher_views", "2")
    more = ("--per_device_train_batch_size", "3", "--max_train_steps", "3")
    Ranks([*flags, *more, *cache], tmp_path / "log").finish()
    out = tmp_path / "out"
    assert [row["step"] for row in log_rows(out) if "loss" in row] == [1, 2, 3]
    assert (out / "model.safetensors").exists() and (out / "checkpoint-3" / "random_states_1.pkl").exists()
    assert len((out / "skipped.jsonl").read_text().splitlines()) == 1


@pytest.fixture
def further(flags, repository) -> list[str]:
    """A run without a teacher that starts from a captioner."""
    own = ("--config_name", "--vocab_size", "--teacher_name_or_path", "--patch_dropout", "--max_train_steps")
    return [*without(flags, *own), "--model_name_or_path", str(repository), "--distill_weight", "0"]


def test_two_processes_cache_a_frozen_student_and_train_as_one(further, repository, tmp_path):
    common = [*further, "--freeze_vision_model", "--dropout", "0", "--teacher_views", "2", "--max_train_steps", "6"]
    both = [*common, "--per_device_train_batch_size", "3", "--teacher_cache_dir", tmp_path / "by-two"]
    both = Ranks(both, tmp_path / "log")
    alone = [*common, "--per_device_train_batch_size", "6", "--teacher_cache_dir", str(tmp_path / "by-one")]
    train_distill.main([*alone, "--output_dir", str(tmp_path / "one")])
    both.finish()
    folders = (repository, tmp_path / "out", tmp_path / "one")
    start, two, one = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(two[name], start[name]) for name in start if name.startswith("vision_model."))
    # Of others, such as the keys' biases, the gradient is rounding errors, which Adam enlarges.
    for name in ("decoder.memory_projection.weight", "decoder.embed_tokens.weight"):
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)
        assert not torch.allclose(one[name], start[name], atol=1e-4)
    losses = [[row["loss"] for row in log_rows(tmp_path / name) if "loss" in row] for name in ("one", "out")]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    views = [sorted(path.name for path in tmp_path.glob(f"{name}/*/view-*")) for name in ("by-two", "by-one")]
    assert views[0] == views[1] and len(views[0]) == 2, "one for each process"


def test_two_processes_resume_a_reward_with_human_captions_exactly(further, tmp_path):
    flags = [*further, "--objective", "scst", "--scst_samples", "3", "--cross_entropy_weight", "0.1"]
    flags += ["--per_device_train_batch_size", "3", "--max_train_steps", "3"]
    Ranks(flags, tmp_path / "log").finish()
    whole = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors").unlink()
    Ranks([*flags, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2"], tmp_path / "log").finish()
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = [row for row in log_rows(tmp_path / "out") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["cross_entropy"] > 0 for row in rows)


@pytest.fixture
def uneven(tmp_path) -> str:
    """Two shards of nine and two images, and three validation images."""
    folder = tmp_path / "uneven"
    folder.mkdir()
    first = 0
    for name, num in (("train-0", 9), ("train-1", 2), ("validation", 3)):
        rows = [
            {"image": {"bytes": png_bytes(draw_picture(index)), "path": None}, "caption": CAPTIONS[index % 4]}
            for index in range(first, first + num)
        ]
        rows = [{**row, "image_id": f"photo-{first + place}"} for place, row in enumerate(rows)]
        features = {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "image_id": datasets.Value("string"),
        }
        datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(folder / f"{name}.parquet")
        first += num
    return str(folder)


def test_uneven_shards_show_every_image_once_an_epoch_also_resumed(flags, uneven, tmp_path):
    # One process has five batches an epoch, the other one.
    common = [*flags, "--dataset_name", uneven, "--streaming", "--per_device_train_batch_size", "2"]
    common += ["--captions_per_image", "1", "--checkpointing_steps", "3", "--dataloader_num_workers", "1"]
    common += ["--checkpoints_total_limit", "9"]
    common += ["--max_train_steps", "10"]
    Ranks(common, tmp_path / "log", tmp_path / "whole").finish()
    seen = seen_by(tmp_path / "whole")
    assert [len(share) for share in seen] in ([18, 4], [4, 18])
    assert Counter(sum(seen, [])) == {f"photo-{index}": 2 for index in range(11)}
    whole = load_file(tmp_path / "out" / "model.safetensors")
    # Stopped in the middle of the first epoch, when one process had no batch left.
    for name in ("model.safetensors", "eval_results.json"):
        (tmp_path / "out" / name).unlink()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    state = [json.loads((checkpoint / f"process_state_{rank}.json").read_text()) for rank in range(2)]
    assert sorted(place["finished"] for place in state) == [False, True]
    resume = ("--resume_from_checkpoint", checkpoint)
    Ranks([*common, *resume], tmp_path / "log", tmp_path / "resumed").finish()
    assert seen_by(tmp_path / "resumed") == seen_by(tmp_path / "whole", after=3)
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_stopped_pair_of_processes_leaves_a_checkpoint_and_goes_on(flags, tmp_path):
    # A schedule with which a resumed run may have another length; patches, of which a teacher has none.
    common = [*without(flags, "--teacher_name_or_path"), "--distill_weight", "0", "--memory", "patches"]
    common += ["--per_device_train_batch_size", "3", "--checkpointing_steps", "100000"]
    common += ["--lr_scheduler_type", "constant_with_warmup"]
    both = Ranks([*common, "--max_train_steps", "100000"], tmp_path / "log")
    log = tmp_path / "out" / "metrics.jsonl"
    for _ in range(6000):
        if log.exists() and log.stat().st_size:
            break
        time.sleep(0.02)
    # One of them: both must agree on the step after which they stop.
    both.ranks[1].terminate()
    assert [rank.wait() for rank in both.ranks] == [143, 143], both.log.read_text()[-4000:]
    checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert len(checkpoints) == 1 and not list((tmp_path / "out").glob(".checkpoint-*"))
    step = int(checkpoints[0].name.split("-")[1])
    resume = ("--resume_from_checkpoint", "latest", "--max_train_steps", str(step + 2))
    Ranks([*common, *resume], tmp_path / "log").finish()
    assert [row["step"] for row in log_rows(tmp_path / "out") if "loss" in row] == list(range(1, step + 3))
