import io
import json
import shutil
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin
from PIL import Image
from ranks import Ranks
from safetensors.torch import load_file
from tiny import CAPTIONS, draw_picture, log_rows, png_bytes, tiny_model, tiny_repository_model
from transformers import pipeline

from tinycap import train_distill
from tinycap.training.arguments import flags_of
from tinycap.training.flags import SCENE_DEFAULTS
from tinycap.training.loop import NonFiniteLossError
from tinycap.training.repository import create_image_processor, save_repository
from tinycap.training.student import SCENE_CONFIG


def test_a_run_leaves_a_complete_repository_and_its_reports(flags, tmp_path, monkeypatch):
    monkeypatch.undo()  # `undrawn_figures`
    out = tmp_path / "out"
    more = ["--evaluation_steps", "4", "--report_to", "tensorboard", "--length_penalty", "0.75"]
    metrics = train_distill.main([*flags, *more])
    monkeypatch.chdir(tmp_path)
    captioner = pipeline("image-to-text", model=str(out), trust_remote_code=True)
    assert captioner(draw_picture(3))[0]["generated_text"] is not None
    assert captioner.model.config.text_config.vocab_size == len(captioner.tokenizer)
    assert captioner.model.config.vision_config.projection_dim == 18
    decoding = captioner.model.generation_config
    assert (decoding.num_beams, decoding.length_penalty) == (2, 0.75)

    assert json.loads((out / "eval_results.json").read_text()) == metrics
    for name in ("cider", "bleu_4", "caption_loss", "cosine_distance", "constant_cosine_distance", "recall_at_1"):
        assert name in metrics
    assert json.loads((out / "train_args.json").read_text())["patch_dropout"] == 0.3
    steps = [row for row in log_rows(out) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for row in steps:
        assert {"caption_loss", "distill_loss", "learning_rate", "images_per_second", "grad_norm"} <= set(row)
        assert row["elapsed_seconds"] > 0
        assert row["loss"] == pytest.approx(row["caption_loss"] + row["distill_loss"], rel=1e-5)
    assert [row["step"] for row in log_rows(out) if "eval_cider" in row] == [4, 6]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert "photo-5" in (out / "skipped.jsonl").read_text()
    assert Image.open(out / "curves.png").width > 100 and Image.open(out / "samples.png").width > 100
    card = (out / "README.md").read_text()
    assert f"| CIDEr | {metrics['cider']:.4g} |" in card and "23 images" in card
    assert list(out.glob("**/events.out.tfevents*")), "the tracker heard of it"


@pytest.mark.slow
def test_a_run_by_configuration_file_records_the_resolved_arguments(flags, photos, tmp_path):
    pairs = dict(zip(flags[::2], flags[1::2]))
    path, out = tmp_path / "recipe.yaml", pairs.pop("--output_dir")
    path.write_text("".join(f"{flag[2:]}: {value}\n" for flag, value in pairs.items()))
    train_distill.main(["--config_file", str(path), "--max_train_steps", "1", "--output_dir", out])
    recorded = json.loads((tmp_path / "out" / "train_args.json").read_text())
    assert recorded["config_file"] == str(path) and recorded["dataset_name"] == photos
    assert recorded["max_train_steps"] == 1 and recorded["captions_per_image"] == 2 and recorded["dropout"] == 0.1
    assert [row["step"] for row in log_rows(tmp_path / "out") if "loss" in row] == [1]


class KilledError(BaseException):
    pass


def die_in_step(monkeypatch, flags: list[str], dead_in_step: int) -> None:
    """Starts a run and lets it die in a step of the student, before it changes anything."""
    train_step = train_distill.train_step

    def dies(*args):
        if args[-1].number == dead_in_step:
            raise KilledError
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_distill, "train_step", dies)
        with pytest.raises(KilledError):
            train_distill.main(flags)


@pytest.mark.parametrize(
    ("dead_in_steps", "more"),
    [([4, 6], []), ([4], ["--optimizer", "muon", "--mixup", "0.9", "--cutmix", "0.4"])],
)
@pytest.mark.slow
def test_a_run_that_was_killed_resumes_to_the_same_weights(flags, tmp_path, monkeypatch, dead_in_steps, more):
    flags = [*flags, *more]
    train_distill.main([*flags, "--output_dir", str(tmp_path / "whole")])
    resume = []
    for step in dead_in_steps:
        die_in_step(monkeypatch, [*flags, *resume], step)
        assert not (tmp_path / "out" / "model.safetensors").exists()
        resume = ["--resume_from_checkpoint", "latest"]
    train_distill.main([*flags, *resume])
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    times = [row["elapsed_seconds"] for row in log_rows(tmp_path / "out")]
    assert times == sorted(times), "the clock goes on where it stopped"
    losses = [[(row["step"], row["loss"]) for row in log_rows(tmp_path / n) if "loss" in row] for n in ("whole", "out")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_run_that_accelerate_compiles_is_the_plain_one_also_resumed(flags, config_name, tmp_path, monkeypatch):
    # One layer: each takes a second to trace.
    config = json.loads(Path(config_name).read_text())
    config = {part: {**values, "num_hidden_layers": 1} for part, values in config.items()}
    (tmp_path / "one-layer.json").write_text(json.dumps(config))
    flags = [*flags, "--config_name", str(tmp_path / "one-layer.json"), "--max_train_samples", "21", "--mixup", "0.5"]
    flags += ["--dropout", "0", "--patch_dropout", "0", "--max_train_steps", "13", "--num_beams", "1"]
    flags += ["--checkpointing_steps", "12"]
    train_distill.main([*flags, "--output_dir", str(tmp_path / "plain")])
    # As `accelerate launch --dynamo_backend` does; this backend runs the graphs without compiling them.
    plugin = TorchDynamoPlugin(backend="eager", dynamic=False)
    torch._dynamo.reset()
    # PyTorch allows eight, enough for a short run.
    limit = torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True)
    with monkeypatch.context() as patch, limit:
        patch.setitem(AcceleratorState._shared_state, "dynamo_plugin", plugin)
        die_in_step(monkeypatch, flags, 13)
    train_distill.main([*flags, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-12")])
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in load_file(tmp_path / "plain" / "model.safetensors").items():
        torch.testing.assert_close(resumed[name], value, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_best_validation_is_what_is_saved_also_after_a_kill(flags, tmp_path, monkeypatch):
    # A learning rate so large that steps also increase the loss.
    flags = [*flags, "--evaluation_steps", "1", "--load_best_model_at_end", "--seed", "3"]
    flags += ["--learning_rate", "0.5", "--lr_scheduler_type", "constant", "--max_grad_norm", "0"]
    found = {"whole": train_distill.main([*flags, "--output_dir", str(tmp_path / "whole")])}
    die_in_step(monkeypatch, flags, 4)
    found["out"] = train_distill.main([*flags, "--resume_from_checkpoint", "latest"])
    for name, metrics in found.items():
        rows = [row for row in log_rows(tmp_path / name) if "eval_cider" in row]
        scores = {row["step"]: row["eval_cider"] for row in rows}
        step = max(scores, key=scores.get)
        assert len(set(scores.values())) > 1, "validations that are all alike prove nothing"
        assert metrics["cider"] == pytest.approx(scores[step], abs=1e-6)
        state = json.loads((tmp_path / name / "checkpoint-6" / "trainer_state.json").read_text())
        earlier = max((other for other in scores if other < 6), key=scores.get)
        # The checkpoint of the last step is saved before the last validation.
        assert state["best"] == {"name": "cider", "value": scores[earlier], "step": earlier}
    whole, out = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], out[name]) for name in whole)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_photos_than_it_began_with(flags, photos, tmp_path):
    train_distill.main([*flags, "--max_train_steps", "2"])
    changed = tmp_path / "changed"
    shutil.copytree(photos, changed)
    rows = datasets.Dataset.from_parquet(str(changed / "train.parquet"), cache_dir=str(tmp_path / "rows"))
    rows.select(range(1, len(rows))).to_parquet(changed / "train.parquet")
    with pytest.raises(ValueError, match="expected the training images that it was written with"):
        train_distill.main([*flags, "--dataset_name", str(changed), "--resume_from_checkpoint", "latest"])


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(flags, tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"step \d.*photo-"):
        train_distill.main([*flags, "--learning_rate", "1e30", "--max_grad_norm", "0", "--checkpointing_steps", "1"])
    checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert checkpoints and (checkpoints[-1] / "trainer_state.json").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_accumulated_batches_make_one_step(flags, tmp_path):
    train_distill.main([*flags, "--gradient_accumulation_steps", "2", "--max_train_steps", "3"])
    assert [row["step"] for row in log_rows(tmp_path / "out") if "loss" in row] == [1, 2, 3]


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint_with_its_tokenizer_and_config(flags, tmp_path, repository):
    without = [flag for pair in zip(flags[::2], flags[1::2]) for flag in pair if pair[0] != "--config_name"]
    without = [flag for pair in zip(without[::2], without[1::2]) for flag in pair if "teacher" not in pair[0]]
    start = load_file(repository / "model.safetensors")
    train_distill.main(
        [*without, "--model_name_or_path", str(repository), "--distill_weight", "0", "--learning_rate", "1e-9"]
    )
    trained = load_file(tmp_path / "out" / "model.safetensors")
    assert start.keys() == trained.keys()
    assert all(torch.allclose(start[name], trained[name], atol=1e-5) for name in start)
    tokenizers = [(folder / "tokenizer.json").read_text() for folder in (repository, tmp_path / "out")]
    assert tokenizers[0] == tokenizers[1]
    assert "cosine_distance" not in json.loads((tmp_path / "out" / "eval_results.json").read_text())


@pytest.mark.slow
def test_a_captioner_goes_on_by_the_cider_of_its_own_samples_also_resumed(flags, tmp_path, repository):
    drop, out = ("--config_name", "--vocab_size", "--teacher_name_or_path", "--max_train_steps"), tmp_path / "out"
    flags = [word for flag in zip(flags[::2], flags[1::2]) if flag[0] not in drop for word in flag]
    flags += ["--model_name_or_path", str(repository), "--distill_weight", "0", "--max_train_steps", "3"]
    flags += ["--objective", "scst", "--scst_samples", "3", "--cross_entropy_weight", "0.1"]
    train_distill.main(flags)
    steps = [row for row in log_rows(out) if "loss" in row]
    assert len(steps) == 3 and all({"scst_loss", "reward", "cross_entropy"} <= set(row) for row in steps)
    before, after = (load_file(folder / "model.safetensors") for folder in (repository, out))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    train_distill.main([*flags, "--resume_from_checkpoint", str(out / "checkpoint-2")])
    resumed = load_file(out / "model.safetensors")
    assert all(torch.equal(after[name], resumed[name]) for name in after)


@pytest.mark.slow
def test_a_cached_teacher_gives_the_losses_of_one_that_is_asked(flags, tmp_path):
    # The teacher's input size, at which both get the same pixels; with a cache, a teacher with larger inputs gets more.
    flags = [*flags, "--image_size", "32"]
    online = train_distill.main(flags)
    # Two epochs of three steps: as many views as epochs, so that both runs have the same crops.
    cached_flags = [*flags, "--output_dir", str(tmp_path / "cached"), "--teacher_cache_dir", str(tmp_path / "cache")]
    cached = train_distill.main([*cached_flags, "--teacher_views", "2"])
    for first, second in zip(log_rows(tmp_path / "out"), log_rows(tmp_path / "cached")):
        for name in {"loss", "caption_loss", "distill_loss"} & set(first):
            assert first[name] == pytest.approx(second[name], abs=1e-5)
    assert cached["caption_loss"] == pytest.approx(online["caption_loss"], abs=1e-4)


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_larger_images_and_resampled_positions(flags, tmp_path, tokenizer):
    repository = tmp_path / "repository"
    save_repository(repository, tiny_repository_model(tokenizer), tokenizer, create_image_processor(24, [0.4] * 3))
    drop = ("--config_name", "--vocab_size", "--teacher_name_or_path")
    without = [word for flag in zip(flags[::2], flags[1::2]) if flag[0] not in drop for word in flag]
    train_distill.main(
        [
            *(*without, "--model_name_or_path", str(repository), "--distill_weight", "0"),
            *("--image_size", "40", "--learning_rate", "1e-12", "--weight_decay", "0"),
        ]
    )
    small, large = (load_file(folder / "model.safetensors") for folder in (repository, tmp_path / "out"))
    name = "vision_model.embeddings.position_embeddings"
    assert small[name].shape == (1, 1 + 9, 12) and large[name].shape == (1, 1 + 25, 12)
    torch.testing.assert_close(large[name][:, 0], small[name][:, 0])
    # Corners stay corners: the table is resampled, not initialised.
    corners = [(0, 0), (2, 4), (6, 20), (8, 24)]
    for before, after in corners:
        assert F.cosine_similarity(small[name][0, 1 + before], large[name][0, 1 + after], dim=0) > 0.9
    assert all(torch.allclose(small[key], large[key], atol=1e-5) for key in small if key != name)
    captioner = pipeline("image-to-text", model=str(tmp_path / "out"), trust_remote_code=True)
    assert captioner.model.config.vision_config.image_size == 40 and captioner(draw_picture(3))
    assert captioner.image_processor.crop_size["height"] == 40
    assert list(captioner.image_processor.image_mean) == [0.4] * 3, "the checkpoint's own"


@pytest.mark.slow
def test_a_decoder_is_trained_beside_a_student_that_stays(flags, tmp_path, tokenizer):
    repository = tmp_path / "repository"
    save_repository(repository, tiny_repository_model(tokenizer), tokenizer, create_image_processor(24))
    drop = ("--config_name", "--vocab_size", "--teacher_name_or_path", "--patch_dropout")
    without = [word for flag in zip(flags[::2], flags[1::2]) if flag[0] not in drop for word in flag]
    kept = [*without, "--model_name_or_path", str(repository), "--distill_weight", "0", "--freeze_vision_model"]
    kept += ["--memory_noise", "0.7", "--learning_rate", "1e-2"]
    train_distill.main(kept)
    before, after = (load_file(folder / "model.safetensors") for folder in (repository, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("vision_model."))
    assert not torch.equal(before["decoder.embed_tokens.weight"], after["decoder.embed_tokens.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["memory_noise"] == 0.7 and config["distill_weight"] == 1.0, "the weight it was taught with"
    # Two epochs: as many views, so that both runs have the same crops.
    cache = ["--teacher_cache_dir", str(tmp_path / "cache"), "--teacher_views", "2"]
    train_distill.main([*kept, "--output_dir", str(tmp_path / "cached"), *cache])
    for first, second in zip(log_rows(tmp_path / "out"), log_rows(tmp_path / "cached"), strict=True):
        assert first.get("loss") == pytest.approx(second.get("loss"), abs=1e-5)
    assert "cosine_distance" not in json.loads((tmp_path / "cached" / "eval_results.json").read_text())


def test_another_memory_than_the_checkpoints_is_an_error(repository):
    flags = ["--model_name_or_path", str(repository), "--distill_weight", "0", "--memory"]
    with pytest.raises(ValueError, match="--memory: expected embedding, as --model_name_or_path has, got patches"):
        train_distill.build_config(train_distill.parse_args([*flags, "patches"]))
    assert train_distill.build_config(train_distill.parse_args([*flags, "embedding"])).memory == "embedding"


@pytest.fixture
def web_shards(tmp_path) -> str:
    """Tar shards like img2dataset's, `<key>.png` beside `<key>.txt`: two for training, one for validation."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, (name, num) in enumerate((("train-00000", 9), ("train-00001", 7), ("validation-00000", 5))):
        with tarfile.open(folder / f"{name}.tar", "w") as shard:
            for index in range(num):
                for suffix, content in (
                    ("png", png_bytes(draw_picture(10 * number + index))),
                    ("txt", CAPTIONS[index % 4].encode()),
                ):
                    entry = tarfile.TarInfo(f"{number}{index:08}.{suffix}")
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))
    return str(folder)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.slow
def test_webdataset_shards_train_and_resume_to_the_same_weights(flags, tmp_path, web_shards, streaming):
    common = [*flags, "--dataset_name", web_shards, "--streaming" if streaming else "--no-streaming"]
    common += ["--per_device_train_batch_size", "3", "--checkpointing_steps", "3", "--dataloader_num_workers", "1"]
    train_distill.main(common)
    whole = load_file(tmp_path / "out" / "model.safetensors")
    checkpoint = tmp_path / "out" / "checkpoint-3"
    train_distill.main([*common, "--resume_from_checkpoint", str(checkpoint)])
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    if streaming:
        position = json.loads((checkpoint / "process_state_0.json").read_text())
        assert position["loader"] and not position["finished"]


@pytest.mark.slow
def test_bf16_trains_and_saves_float32_weights(flags, tmp_path):
    # accelerate has one precision in a process.
    Ranks([*flags, "--mixed_precision", "bf16", "--max_train_steps", "2"], tmp_path / "log", number=1).finish()
    assert load_file(tmp_path / "out" / "model.safetensors")["decoder.embed_tokens.weight"].dtype == torch.float32


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--no_such_flag"], ["--no_such_flag"]),
        (["--learning_rate", "0"], ["--learning_rate", "positive"]),
        (["--load_best_model_at_end"], ["--load_best_model_at_end", "--evaluation_steps"]),
        (["--learning", "1"], ["--learning"]),
        (["--crop_scale", "1.5"], ["--crop_scale", "1.5"]),
        (["--dropout", "1"], ["--dropout"]),
        (["--streaming"], ["--streaming", "--dataset_name"]),
        (["--dataset_name", "x"], ["--teacher_name_or_path", "--distill_weight"]),
        (["--distill_weight", "0", "--teacher_name_or_path", "y"], ["--teacher_name_or_path", "--distill_weight 0"]),
        (["--config_name", "c", "--model_name_or_path", "m"], ["--config_name", "--model_name_or_path"]),
        (["--tokenizer_name", "c", "--model_name_or_path", "m"], ["--tokenizer_name", "--model_name_or_path"]),
        (["--objective", "scst"], ["--objective scst", "--model_name_or_path"]),
        (["--cross_entropy_weight", "0.1"], ["--cross_entropy_weight", "--objective scst"]),
        (["--scst_samples", "1"], ["--scst_samples", "at least 2"]),
        (["--teacher_cache_dir", "c", "--streaming"], ["--teacher_cache_dir", "--streaming"]),
        (["--teacher_views", "3"], ["--teacher_views", "--teacher_cache_dir"]),
        (["--overwrite_output_dir", "--resume_from_checkpoint", "latest"], ["--overwrite_output_dir", "--resume"]),
        (["--hub_model_id", "me/it"], ["--hub_model_id", "--push_to_hub"]),
        (["--caption_column", "text"], ["--caption_column", "--dataset_name"]),
        (["--length_penalty", "0.5", "--num_beams", "1"], ["--length_penalty", "--num_beams"]),
        (["--mixup", "1"], ["--mixup", "[0, 1)"]),
        (["--mixup", "0.5", "--distill_weight", "0"], ["--mixup", "--distill_weight 0"]),
        (["--cutmix", "0.5"], ["--cutmix", "needs --mixup"]),
        (["--mixup", "0.5", "--objective", "scst", "--model_name_or_path", "m"], ["--mixup", "--objective scst"]),
        (["--teacher_feature", "cls"], ["--teacher_feature", "pooled"]),
    ],
)
def test_an_unknown_or_contradictory_flag_is_an_error_that_names_it(extra, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_distill.parse_args(extra)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_help_says_what_every_flag_does_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train_distill.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "--captions_per_image" in shown and "(default: 1.0)" in shown
    assert all(flag.help for flag in flags_of("distill").values())


def run_and_expect(flags: list[str], error: str, out: Path) -> None:
    with pytest.raises(ValueError, match=error):
        train_distill.main(flags)
    assert not list(out.glob("checkpoint-*")), "before the first step"


def test_an_output_folder_that_is_not_empty_is_an_error(flags, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    run_and_expect(flags, "--overwrite_output_dir", tmp_path / "out")
    train_distill.main([*flags, "--overwrite_output_dir", "--max_train_steps", "1"])
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_a_teacher_of_another_width_is_an_error_before_the_first_step(flags, tmp_path, config_name):
    values = json.loads(Path(config_name).read_text())
    values["vision_config"]["projection_dim"] = 13
    (tmp_path / "c.json").write_text(json.dumps(values))
    run_and_expect([*flags, "--config_name", str(tmp_path / "c.json")], "expected 18.*got 13", tmp_path / "out")


def test_a_tokenizer_larger_than_the_vocabulary_is_an_error_at_the_start(flags, tmp_path, config_name):
    values = json.loads(Path(config_name).read_text())
    values["text_config"]["vocab_size"] = 270
    (tmp_path / "c.json").write_text(json.dumps(values))
    run_and_expect(
        [*flags, "--config_name", str(tmp_path / "c.json")], "vocab_size of 270 tokens, got", tmp_path / "out"
    )


def test_captions_longer_than_the_position_table_are_an_early_error(flags, tmp_path):
    run_and_expect([*flags, "--max_caption_length", "20"], "max_position_embeddings 19, got 20", tmp_path / "out")


def test_a_checkpoint_of_another_architecture_is_an_error_that_names_both(flags, tmp_path, teacher):
    without = [flag for pair in zip(flags[::2], flags[1::2]) for flag in pair if pair[0] != "--config_name"]
    run_and_expect(
        [*without, "--model_name_or_path", teacher], "model_type 'tinycap', got 'clip_vision_model'", tmp_path / "out"
    )


def test_weights_that_do_not_fit_their_config_are_an_error(flags, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    args = train_distill.parse_args(["--model_name_or_path", str(tmp_path / "model")])
    with pytest.raises(ValueError, match=r"decoder\.layers\.\*: the config expects 4 layers, got 3"):
        train_distill.build_model(args, train_distill.build_config(args))


def test_a_first_bad_row_stops_the_run_when_asked(flags, tmp_path):
    run_and_expect([*flags, "--on_bad_row", "error"], "photo-5", tmp_path / "out")


# --- the default run on scenes ----------------------------------------------------------------------------------------


@pytest.fixture
def scene_flags(tmp_path, undrawn_figures) -> list[str]:
    """A run on drawn scenes: one step for the teacher, then four for the student."""
    return [
        *("--output_dir", str(tmp_path / "out"), "--max_train_samples", "40", "--max_eval_samples", "5"),
        *("--per_device_train_batch_size", "20", "--max_train_steps", "4", "--checkpointing_steps", "2"),
        *("--dataloader_num_workers", "0", "--num_beams", "1"),
    ]


@pytest.mark.slow
def test_a_scenes_run_trains_a_teacher_first_and_resumes_bit_by_bit(scene_flags, tmp_path, caplog, capfd, monkeypatch):
    caplog.set_level("INFO")
    whole = tmp_path / "whole"
    metrics = train_distill.main([*scene_flags, "--output_dir", str(whole)])
    assert {"object_accuracy", "color_accuracy", "count_accuracy", "cider", "recall_at_1"} <= set(metrics)
    screen = caplog.text + "".join(capfd.readouterr())
    assert "left." in screen and "counts right  " in screen and f"tinycap caption IMAGE --model {tmp_path}" in screen
    for noise in ("UNEXPECTED", "Removed shared tensor", "Loading weights", "\r"):
        assert noise not in screen
    assert (whole / "teacher" / "eval_results.json").exists()
    vision = json.loads((whole / "config.json").read_text())["vision_config"]
    assert vision["image_size"] == SCENE_CONFIG["vision_config"]["image_size"]
    assert vision["projection_dim"] == SCENE_DEFAULTS["teacher"]["hidden_size"], "the teacher's pooled feature"
    # Killed, it resumes to the same weights.
    die_in_step(monkeypatch, scene_flags, 4)
    recorded = (tmp_path / "out" / "train_args.json").read_text()
    with pytest.raises(ValueError, match="--learning_rate: expected .*, got 0.5"):
        train_distill.main([*scene_flags, "--learning_rate", "0.5", "--resume_from_checkpoint", "latest"])
    assert (tmp_path / "out" / "train_args.json").read_text() == recorded
    train_distill.main([*scene_flags, "--resume_from_checkpoint", "latest"])
    weights, resumed = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "out"))
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert [path.name for path in (tmp_path / "out" / "checkpoint-2").glob("*.safetensors")] == ["model.safetensors"]
