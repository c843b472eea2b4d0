"""A run of train_distill.py from the user's view: errors, log, resuming, upload and final output."""

import json
import logging
import re
import signal
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from fresh import run_fresh
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from tiny import log_rows

from tinycap import train_distill, train_teacher
from tinycap.training import arguments, loading, loop
from tinycap.training.data import SkippedRows
from tinycap.training.model_card import base_model_name
from tinycap.training.optimization import plan_steps, warn_of_few_steps


def without(flags: list[str], *dropped: str) -> list[str]:
    return [word for flag in zip(flags[::2], flags[1::2]) if flag[0] not in dropped for word in flag]


def recorded(folder: Path) -> dict:
    return json.loads((folder / "train_args.json").read_text())


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resuming_with_other_flags_is_refused_and_recorded_nowhere(flags, tmp_path):
    out = tmp_path / "out"
    train_distill.main([*flags, "--max_train_steps", "2"])
    before = recorded(out)
    other = ["--per_device_train_batch_size", "5", "--learning_rate", "0.5", "--dropout", "0.2"]
    with pytest.raises(ValueError, match="written with") as refused:
        train_distill.main([*flags, "--max_train_steps", "2", *other, "--resume_from_checkpoint", "latest"])
    for name, old, new in (("per_device_train_batch_size", 7, 5), ("learning_rate", 0.001, 0.5), ("dropout", 0.1, 0.2)):
        assert f"--{name}: expected {old}, got {new}" in str(refused.value)
    assert recorded(out) == before
    with pytest.raises(ValueError, match="--max_train_steps: expected 2, got 6"):
        train_distill.main([*flags, "--resume_from_checkpoint", "latest"])
    free = ["--logging_steps", "3", "--checkpointing_steps", "1", "--per_device_eval_batch_size", "3"]
    train_distill.main([*flags, "--max_train_steps", "2", *free, "--resume_from_checkpoint", "latest"])
    assert recorded(out)["logging_steps"] == 3


@pytest.mark.slow
def test_a_run_with_a_constant_rate_is_made_longer(flags, tmp_path):
    flags = [*without(flags, "--num_warmup_steps"), "--lr_scheduler_type", "constant_with_warmup"]
    train_distill.main([*flags, "--max_train_steps", "20", "--checkpointing_steps", "20"])
    train_distill.main([*flags, "--max_train_steps", "21", "--resume_from_checkpoint", "latest"])
    assert recorded(tmp_path / "out")["num_warmup_steps"] == 2, "as it began"
    assert log_rows(tmp_path / "out")[-1]["step"] == 21


@pytest.mark.slow
def test_a_teacher_resumes_with_its_own_flags_only(photos, tmp_path):
    sizes = ["--image_size", "16", "--patch_size", "8", "--hidden_size", "8", "--num_hidden_layers", "1"]
    sizes += ["--text_hidden_size", "8", "--text_num_hidden_layers", "1", "--vocab_size", "300"]
    flags = ["--dataset_name", photos, "--output_dir", str(tmp_path / "out"), *sizes, "--dataloader_num_workers", "0"]
    flags += ["--per_device_train_batch_size", "8", "--max_train_steps", "1"]
    train_teacher.main(flags)
    with pytest.raises(ValueError, match="--weight_decay: expected 0.1, got 0.3"):
        train_teacher.main([*flags, "--weight_decay", "0.3", "--resume_from_checkpoint", "latest"])


# --- flags that aren't given keep the configuration -------------------------------------------------------------------

CONFIGURED = {"distill_weight": 3.0, "label_smoothing": 0.2, "memory_noise": 0.3}


def configured(folder: Path) -> str:
    config = {
        "vision_config": {"image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.15, "patch_dropout": 0.25},
        "text_config": {"hidden_dropout_prob": 0.4, "vocab_size": 300, "max_position_embeddings": 19},
        **CONFIGURED,
    }
    (folder / "c.json").write_text(json.dumps(config))
    return str(folder / "c.json")


@pytest.mark.parametrize("source", ["a data set", "scenes"])
def test_defaults_do_not_overrule_a_configuration_file(source, tmp_path):
    flags = ["--config_name", configured(tmp_path)]
    if source == "a data set":
        flags += ["--dataset_name", "x", "--teacher_name_or_path", "y"]
    args = train_distill.parse_args(flags)
    config = train_distill.build_config(args)
    assert config.text_config.hidden_dropout_prob == args.dropout == 0.4
    assert config.vision_config.patch_dropout == args.patch_dropout == 0.25
    assert config.vision_config.hidden_dropout_prob == 0.15
    assert {name: getattr(config, name) for name in CONFIGURED} == CONFIGURED
    assert {name: getattr(args, name) for name in CONFIGURED} == CONFIGURED
    assert (args.image_size, args.vocab_size, args.max_caption_length) == (32, 300, 19)


def test_flags_that_are_given_overrule_a_configuration_file(tmp_path):
    given = ["--dropout", "0.1", "--patch_dropout", "0", "--distill_weight", "1", "--label_smoothing", "0"]
    args = train_distill.parse_args(["--config_name", configured(tmp_path), *given, "--memory_noise", "0.5"])
    config = train_distill.build_config(args)
    assert config.text_config.hidden_dropout_prob == 0.1 and config.vision_config.patch_dropout == 0
    assert (config.distill_weight, config.label_smoothing, config.memory_noise) == (1, 0, 0.5)


def test_a_configuration_file_without_a_teacher_needs_none(tmp_path):
    (tmp_path / "c.json").write_text('{"distill_weight": 0}')
    flags = ["--config_name", str(tmp_path / "c.json"), "--dataset_name", "x"]
    assert train_distill.build_config(train_distill.parse_args(flags)).distill_weight == 0
    with pytest.raises(ValueError, match="--teacher_name_or_path: contradicts --distill_weight 0"):
        train_distill.build_config(train_distill.parse_args([*flags, "--teacher_name_or_path", "t"]))
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(ValueError, match="--teacher_name_or_path: needed with --dataset_name"):
        train_distill.build_config(train_distill.parse_args(flags))


def test_a_checkpoint_keeps_its_dropout_and_its_way_of_decoding(repository, tmp_path):
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in repository.iterdir():
        if path.is_file():
            (changed / path.name).write_bytes(path.read_bytes())
    config = json.loads((changed / "config.json").read_text())
    config["text_config"]["hidden_dropout_prob"], config["vision_config"]["patch_dropout"] = 0.35, 0.5
    (changed / "config.json").write_text(json.dumps(config))
    decoding = {**json.loads((changed / "generation_config.json").read_text()), "num_beams": 4, "length_penalty": 0.7}
    (changed / "generation_config.json").write_text(json.dumps(decoding))
    flags = ["--model_name_or_path", str(changed), "--dataset_name", "x", "--distill_weight", "0"]
    args = train_distill.parse_args(flags)
    config = train_distill.build_config(args)
    assert config.text_config.hidden_dropout_prob == args.dropout == 0.35
    assert (args.num_beams, args.length_penalty, args.max_caption_length) == (4, 0.7, 9)
    frozen = train_distill.parse_args([*flags, "--freeze_vision_model", "--num_beams", "1"])
    assert train_distill.build_config(frozen).vision_config.patch_dropout == frozen.patch_dropout == 0
    assert (frozen.num_beams, frozen.length_penalty) == (1, 1.0)


# --- errors before anything is written --------------------------------------------------------------------------------


def flags_with(flags: list[str], name: str, value: str) -> list[str]:
    return [*without(flags, name), name, value]


@pytest.mark.parametrize(
    "name, value",
    [
        ("--max_caption_length", "20"),
        ("--teacher_name_or_path", "no_such_teacher"),
        ("--dataset_name", "./no_such_photos"),
        ("--caption_column", "no_such_column"),
        ("--on_bad_row", "error"),
        ("--vocab_size", "12"),
        ("--train_split", "no_such_split"),
    ],
)
def test_a_failed_start_leaves_nothing_in_the_way_of_the_next(flags, tmp_path, name, value):
    with pytest.raises(ValueError):
        train_distill.main(flags_with(flags, name, value))
    assert not (tmp_path / "out").exists()


def test_the_codes_own_folder_is_refused_before_anything_is_loaded(flags, monkeypatch):
    monkeypatch.setattr(train_distill, "load_data", lambda *args: pytest.fail("loaded"))
    root = str(Path(train_distill.__file__).parent)
    for more in ([], ["--overwrite_output_dir"]):
        with pytest.raises(ValueError, match="--output_dir: expected a folder other than the code's own"):
            train_distill.main([*flags, "--output_dir", root, *more])


@pytest.mark.parametrize("flag", ["dataset_name", "model_name_or_path", "teacher_name_or_path", "tokenizer_name"])
@pytest.mark.parametrize("name", ["./missing", "/missing/x", "a/b/missing", "missing/", "missing", "a/missing", "~/x"])
def test_a_folder_that_is_not_there_is_said_to_be_missing(flag, name):
    with pytest.raises(ValueError, match=f"--{flag}: no such folder: {name}"):
        arguments.check_sources(Namespace(**{flag: name}))


def test_a_name_that_may_be_on_the_hub_is_left_to_it(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    arguments.check_sources(Namespace(dataset_name="owner/photos", model_name_or_path="captioner"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--owner--captioner").mkdir()
    arguments.check_sources(Namespace(model_name_or_path="owner/captioner"))


@pytest.mark.parametrize("script", [train_distill, train_teacher])
@pytest.mark.parametrize("flags", [["--lerning_rate", "1"], ["--seed", "x"], ["--report_to", "wandb"], ["--seed"]])
def test_a_wrong_flag_ends_in_two_lines(script, flags, capsys, monkeypatch):
    monkeypatch.setattr(arguments, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(flags)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and len(message.splitlines()) == 2 and flags[0] in message and "--help" in message


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "no_such_tracker"])
def test_a_tracker_that_is_not_installed_is_an_error_at_the_start(name, capsys, monkeypatch):
    monkeypatch.setattr(arguments, "get_available_trackers", lambda: [])
    with pytest.raises(SystemExit):
        train_distill.parse_args(["--report_to", name])
    message = capsys.readouterr().err
    assert "--report_to" in message and name in message
    assert ("pip install" in message) == (name != "no_such_tracker")


def test_help_shows_the_defaults_of_own_images_and_the_scenes_beside_them(capsys):
    for script, shown in ((train_distill, "(default: 5)"), (train_teacher, "(default: 224)")):
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        text = capsys.readouterr().out
        assert shown in text and "(default: 12000)" not in text and "(default: None)" not in text
        assert "--max_train_samples 12000" in " ".join(text.split())


# --- the run ----------------------------------------------------------------------------------------------------------


def test_images_are_decoded_by_as_many_processes_as_asked_for(flags, monkeypatch):
    asked = []
    decode = loading.decode_dataset

    def spy(dataset, columns, image_size, skipped, split, num_proc=None):
        asked.append(num_proc)
        return decode(dataset, columns, image_size, skipped, split)

    monkeypatch.setattr(loading, "decode_dataset", spy)
    args = train_distill.parse_args([*flags, "--preprocessing_num_workers", "3"])
    loading.load_data(args, Accelerator(), 24, 24, SkippedRows())
    assert asked == [3, 3]


@pytest.mark.parametrize(
    "steps, more, expected",
    [(60, [], 6), (100_000, [], 200), (60, ["--num_warmup_steps", "40"], 40), (5, [], 0), (1504, ["scenes"], 100)],
)
def test_a_warm_up_is_a_tenth_of_a_short_run_unless_given(steps, more, expected):
    own = [] if more == ["scenes"] else ["--dataset_name", "x", "--distill_weight", "0", *more]
    args = train_distill.parse_args([*own, "--max_train_steps", str(steps)])
    plan_steps(args, None, None)
    assert args.num_warmup_steps == expected
    plan_steps(args, None, {"num_warmup_steps": 17})
    assert args.num_warmup_steps == (40 if "40" in more else 17), "a resumed run's"


@pytest.mark.parametrize("steps, model, warned", [(60, None, True), (5000, None, False), (8, "m", False)])
def test_a_run_too_short_for_fresh_weights_is_warned_of(steps, model, warned, caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_few_steps(Namespace(max_train_steps=steps, model_name_or_path=model))
    assert ("too few" in caplog.text) == warned


class Interrupts:
    """Sends the process Ctrl-C in the given steps, once or more."""

    def __init__(self, monkeypatch, step: int, times: int):
        check_finite = loop.check_finite

        def interrupted(losses, number, image_ids):
            if number == step:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            check_finite(losses, number, image_ids)

        monkeypatch.setattr(loop, "check_finite", interrupted)


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_and_says_the_command_that_goes_on(flags, tmp_path, monkeypatch, caplog):
    train_distill.main([*flags, "--output_dir", str(tmp_path / "whole")])
    monkeypatch.setattr(sys, "argv", ["train_distill.py", *flags, "--overwrite_output_dir"])
    with monkeypatch.context() as patch:
        Interrupts(patch, step=3, times=1)
        with pytest.raises(SystemExit) as stopped, caplog.at_level(logging.WARNING):
            train_distill.main([*flags, "--dataloader_num_workers", "1"])
    assert stopped.value.code == 130
    # One step later: all processes agree on a stop before they take a step.
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
    command = caplog.text.splitlines()[-1].split()
    assert command[-2:] == ["--resume_from_checkpoint", "latest"] and "--overwrite_output_dir" not in command
    train_distill.main(command[command.index("train_distill.py") + 1 :])
    whole, out = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], out[name]) for name in whole)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(flags, tmp_path, monkeypatch):
    Interrupts(monkeypatch, step=3, times=2)
    with pytest.raises(KeyboardInterrupt):
        train_distill.main(flags)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.slow
def test_a_scenes_run_stopped_while_its_teacher_learns_goes_on_by_latest(tmp_path, monkeypatch, undrawn_figures):
    flags = ["--output_dir", str(tmp_path / "out"), "--max_train_samples", "40", "--max_eval_samples", "5"]
    flags += ["--per_device_train_batch_size", "20", "--max_train_steps", "1", "--dataloader_num_workers", "0"]
    parse_args = train_teacher.parse_args
    few_steps = ["--max_train_steps", "3", "--per_device_train_batch_size", "20"]
    monkeypatch.setattr(train_teacher, "parse_args", lambda argv: parse_args([*argv, *few_steps]))
    with monkeypatch.context() as patch:
        Interrupts(patch, step=1, times=1)
        with pytest.raises(SystemExit) as stopped:
            train_distill.main(flags)
    assert stopped.value.code == 130 and (tmp_path / "out" / "teacher" / "checkpoint-2").is_dir()
    train_distill.main([*flags, "--resume_from_checkpoint", "latest"])
    assert (tmp_path / "out" / "model.safetensors").exists()


# --- output files -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_cards_code_runs_from_another_folder_and_names_the_base_model(
    flags, repository, tmp_path, capsys, monkeypatch
):
    # Figures are drawn, because one of them is captioned.
    monkeypatch.undo()
    drop = ("--config_name", "--vocab_size", "--teacher_name_or_path", "--patch_dropout", "--dropout")
    adapted = [*without(flags, *drop), "--model_name_or_path", str(repository), "--distill_weight", "0"]
    train_distill.main([*adapted, "--max_train_steps", "1"])
    shown = capsys.readouterr().out
    assert "CIDEr" in shown and f"tinycap caption IMAGE --model {tmp_path / 'out'}" in shown and "{" not in shown
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == repository.name and front["pipeline_tag"] == "image-to-text"
    assert f"Started from: `{repository.name}`" in card
    code = re.search("```python\n(.*?)```", card, re.S)[1]
    run_fresh(code, folder=tmp_path)


def test_a_base_model_is_named_by_its_folder_or_its_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert base_model_name(".") == tmp_path.name
    assert base_model_name("owner/captioner") == "owner/captioner"


@pytest.mark.slow
def test_an_upload_holds_the_repository_and_nothing_else(flags, tmp_path, monkeypatch):
    uploads, created = [], []

    class Api:
        def create_repo(self, repo_id, exist_ok):
            created.append(repo_id)
            return Namespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, folder_path, ignore_patterns, **kwargs):
            paths = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
            uploads.extend(filter_repo_objects(paths, ignore_patterns=ignore_patterns))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    best = ["--load_best_model_at_end", "--evaluation_steps", "1", "--report_to", "tensorboard"]
    train_distill.main([*flags, "--max_train_steps", "2", "--push_to_hub", *best])
    out = tmp_path / "out"
    assert list(out.glob("*/**/*tfevents*")) and (out / "best_model.safetensors").exists()
    wanted = {"model.safetensors", "config.json", "README.md", "modeling_tinycap.py", "tokenizer.json", "samples.png"}
    assert wanted <= set(uploads)
    assert not [name for name in uploads if "/" in name or "tfevents" in name or name == "best_model.safetensors"]
    assert 'model="me/out"' in (out / "README.md").read_text()


def test_an_upload_that_cannot_be_is_an_error_before_the_first_step(flags, tmp_path, monkeypatch):
    class Api:
        def create_repo(self, repo_id, exist_ok):
            raise OSError("no token")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(ValueError, match="--push_to_hub: .*no token"):
        train_distill.main([*flags, "--push_to_hub"])
    assert not (tmp_path / "out").exists()
