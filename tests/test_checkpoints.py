import json
import os
import pickle
from argparse import Namespace
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_model
from torch import nn

from tinycap.commands import OutputError
from tinycap.training.checkpoints import (
    checksum,
    complete_checkpoints,
    load_checkpoint,
    resolve_resume,
    save_checkpoint,
    seed_step,
)
from tinycap.training.logs import RunLog, write_json
from tinycap.training.optimization import create_optimizer, parameter_groups
from tinycap.training.run_folder import RunFolder, check_best


@pytest.fixture
def prepared():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return accelerator, *accelerator.prepare(model, optimizer)


def step_once(model, optimizer) -> None:
    model(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_checkpoint_brings_weights_and_optimizer_back_to_the_bit(prepared, tmp_path):
    accelerator, model, optimizer = prepared
    step_once(model, optimizer)
    path = save_checkpoint(accelerator, tmp_path, {"step": 1, "epoch": 0, "batch": 1})
    step_once(model, optimizer)
    expected = model.weight.detach().clone()
    assert load_checkpoint(accelerator, path) == ({"step": 1, "epoch": 0, "batch": 1}, None)
    assert not torch.equal(model.weight, expected)
    step_once(model, optimizer)
    assert torch.equal(model.weight, expected)


def test_what_differs_between_processes_comes_back_to_each(prepared, tmp_path):
    accelerator = prepared[0]
    own = {"finished": False, "loader": {"block": 3}}
    path = save_checkpoint(accelerator, tmp_path, {"step": 1}, rank_state=own)
    (path / "process_state_1.json").write_text(json.dumps({"finished": True}))
    assert load_checkpoint(accelerator, path)[1] == own


def test_only_the_newest_checkpoints_are_kept_and_10_is_newer_than_9(prepared, tmp_path):
    accelerator = prepared[0]
    for step in (8, 9, 10):
        save_checkpoint(accelerator, tmp_path, {"step": step}, keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert resolve_resume(tmp_path, "latest").name == "checkpoint-10"


def test_a_checkpoint_that_was_never_finished_is_neither_taken_nor_kept(prepared, tmp_path):
    accelerator = prepared[0]
    save_checkpoint(accelerator, tmp_path, {"step": 1})
    (tmp_path / ".checkpoint-2").mkdir()
    (tmp_path / "checkpoint-3").mkdir()
    assert resolve_resume(tmp_path, "latest").name == "checkpoint-1"
    save_checkpoint(accelerator, tmp_path, {"step": 4})
    assert not (tmp_path / ".checkpoint-2").exists()


FILES = ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "trainer_state.json", "process_state_0.json"]
DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "endless": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", DAMAGE)
def test_latest_is_the_newest_checkpoint_without_damage(prepared, tmp_path, caplog, name, how):
    for step in (1, 2):
        path = save_checkpoint(prepared[0], tmp_path, {"step": step}, rank_state={"finished": True})
    DAMAGE[how](path / name)
    assert resolve_resume(tmp_path, "latest").name == "checkpoint-1"
    hidden = how in ("missing", "a pipe", "endless") and name == "trainer_state.json"
    assert hidden or ("checkpoint-2 is left out" in caplog.text and (name in caplog.text))
    with pytest.raises(ValueError, match="expected a complete checkpoint in .*checkpoint-2, got"):
        resolve_resume(tmp_path, str(path))
    DAMAGE[how](tmp_path / "checkpoint-1" / name)
    with pytest.raises(ValueError, match="--resume_from_checkpoint: expected a complete checkpoint"):
        resolve_resume(tmp_path, "latest")


class Evil:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("by", ["pickle", "torch"])
def test_a_pickle_in_a_checkpoint_runs_no_code(prepared, tmp_path, name, by):
    """Checksums don't help against somebody who can write them too."""
    path, harm = save_checkpoint(prepared[0], tmp_path, {"step": 1}), tmp_path / "harm"
    if by == "pickle":
        (path / name).write_bytes(pickle.dumps(Evil(harm), protocol=2))
    else:
        torch.save({"state": Evil(harm)}, path / name)
    state = json.loads((path / "trainer_state.json").read_text())
    state["files"][name] = checksum(path / name)
    (path / "trainer_state.json").write_text(json.dumps(state))
    # accelerate goes on without random states that it can't read.
    expected = pytest.raises(Exception, match="[Ww]eights.only") if name == "optimizer.bin" else nullcontext()
    with expected:
        load_checkpoint(prepared[0], resolve_resume(tmp_path, "latest"))
    assert not harm.exists()
    # The same file, loaded as it mustn't be, does the harm.
    with suppress(RuntimeError):
        torch.load(path / name, weights_only=False)
    assert harm.exists()


def test_a_damaged_later_checkpoint_displaces_no_good_one(prepared, tmp_path):
    for step in (4, 8):
        path = save_checkpoint(prepared[0], tmp_path, {"step": step})
    (path / "model.safetensors").write_bytes(b"")
    load_checkpoint(prepared[0], resolve_resume(tmp_path, "latest"))
    save_checkpoint(prepared[0], tmp_path, {"step": 6}, keep=1)
    assert resolve_resume(tmp_path, "latest").name == "checkpoint-6"


@pytest.mark.parametrize("how", DAMAGE)
def test_the_best_weights_are_checked_when_a_run_is_resumed(prepared, tmp_path, how):
    like = save_checkpoint(prepared[0], tmp_path, {"step": 1}) / "model.safetensors"
    best = tmp_path / "best_model.safetensors"
    best.write_bytes(like.read_bytes())
    check_best(best, like)
    DAMAGE[how](best)
    with pytest.raises(ValueError, match="best_model.safetensors: expected the best weights so far"):
        check_best(best, like)


def test_a_failure_while_saving_leaves_the_newest_checkpoint_intact(prepared, tmp_path, monkeypatch):
    accelerator = prepared[0]
    save_checkpoint(accelerator, tmp_path, {"step": 1})

    def fail(folder):
        (tmp_path / ".checkpoint-2").mkdir(exist_ok=True)
        (tmp_path / ".checkpoint-2" / "half").write_bytes(b"x")
        raise OSError("no space left on device")

    monkeypatch.setattr(accelerator, "save_state", fail)
    with pytest.raises(OutputError, match=r"checkpoint-2: .*[\d,.]+ MB are free.*no space"):
        save_checkpoint(accelerator, tmp_path, {"step": 2}, keep=1)
    assert resolve_resume(tmp_path, "latest").name == "checkpoint-1"


def test_nothing_to_resume_from_is_an_error(tmp_path):
    assert resolve_resume(tmp_path, None) is None
    for value in ("latest", str(tmp_path)):
        with pytest.raises(ValueError, match=f"--resume_from_checkpoint: expected a complete checkpoint in {tmp_path}"):
            resolve_resume(tmp_path, value)


def test_another_number_of_processes_is_an_error_that_names_both(prepared, tmp_path):
    accelerator = prepared[0]
    path = save_checkpoint(accelerator, tmp_path, {"step": 1})
    state = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps({**state, "num_processes": 3}))
    with pytest.raises(ValueError, match="expected 3 processes.*got 1"):
        load_checkpoint(accelerator, path)


def test_a_steps_random_choices_follow_from_seed_step_and_process():
    def draw(*key):
        seed_step(*key)
        return torch.rand(3).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*key)) for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))}) == 4


# --- the output folder and its log ------------------------------------------------------------------------------------


def test_rows_after_the_checkpoint_are_dropped_when_resuming(tmp_path):
    rows = [{"step": step, "loss": 1.0} for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    log = RunLog(tmp_path, Accelerator(cpu=True), total_steps=9, start_step=2)
    log.write(3, 0, {"loss": 0.5})
    log.write(3, 0, {"eval_cider": 7.0})
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == [1, 2, 3, 3]
    assert found[2]["loss"] == 0.5 and found[3]["eval_cider"] == 7.0


@pytest.mark.parametrize("share, expected", [(1.0, "0:50:00"), (0.25, "3:30:00")])
def test_the_time_left_is_said_after_the_first_steps(tmp_path, monkeypatch, caplog, share, expected):
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr("tinycap.training.logs.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr("tinycap.training.logs.ESTIMATE_EVERY", 10**6)
    log = RunLog(tmp_path, Accelerator(cpu=True), total_steps=320, share=share)
    with caplog.at_level("INFO"):
        for step in range(1, 60):
            log.advance(step)
    assert [record.getMessage() for record in caplog.records] == [f"Step 20 of 320: about {expected} left."]


def test_without_a_terminal_the_time_left_is_said_each_minute(tmp_path, monkeypatch, caplog):
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr("tinycap.training.logs.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    log = RunLog(tmp_path, Accelerator(cpu=True), total_steps=400)
    with caplog.at_level("INFO"):
        for step in range(1, 15):
            log.advance(step)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["Step 7 of 400", "Step 14 of 400"]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        recursive = {}
        recursive["self"] = recursive
        write_json(tmp_path / "a.json", recursive)
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


# --- the optimizer ----------------------------------------------------------------------------------------------------


def test_only_matrices_decay_and_each_parameter_is_in_one_group():
    model = tiny_model()
    decayed, others = (group["params"] for group in parameter_groups(model, 0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(names) == sorted(map(id, decayed + others))
    assert all(parameter.dim() >= 2 for parameter in decayed)
    kept = {names[id(parameter)] for parameter in others if parameter.dim() >= 2}
    assert kept == {
        "decoder.embed_tokens.weight",
        "decoder.embed_positions.weight",
        "vision_model.embeddings.cls_token",
        "vision_model.embeddings.position_embeddings",
    }
    assert [group["weight_decay"] for group in create_optimizer(model, 1e-3, 0.1).param_groups] == [0.1, 0.0]


def test_muon_has_the_matrices_and_adamw_the_rest():
    model = tiny_model()
    optimizer = create_optimizer(model, 1e-3, 0.1, "muon")
    muon, adamw = optimizer.optimizers
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    decayed, _ = (group["params"] for group in parameter_groups(model, 0.1))
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(p) for p in decayed if p.dim() == 2}
    everything = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(map(id, model.parameters()))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters()))
    # The update has the norm of AdamW's, so that both can share a learning rate.
    taken = muon.param_groups[0]["params"][0]
    old = before[[id(p) for p in model.parameters()].index(id(taken))]
    assert 0.1e-3 < (taken - old * (1 - 1e-4)).square().mean().sqrt() < 0.4e-3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_patch_embedding_may_learn_slower_than_the_rest(name):
    model = tiny_model()
    optimizer = create_optimizer(model, 1e-3, 0.1, name, kernel_scale=0.1)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert rates.pop(id(model.vision_model.embeddings.patch_embedding.weight)) == pytest.approx((1e-4, 0.1))
    assert len(rates) == len(list(model.parameters())) - 1 and {rate for rate, _ in rates.values()} == {1e-3}


def test_an_optimizer_that_is_not_there_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="expected one of adamw, muon, got 'sgd'"):
        create_optimizer(tiny_model(), 1e-3, 0.1, "sgd")
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="optimizer muon: expected torch 2.9"):
        create_optimizer(tiny_model(), 1e-3, 0.1, "muon")


# --- the best so far --------------------------------------------------------------------------------------------------


def test_the_best_weights_are_kept_and_come_back(tmp_path):
    model, accelerator = nn.Linear(3, 2), Accelerator(cpu=True)
    flags = {"resume_from_checkpoint": None, "overwrite_output_dir": False, "dataset_name": "photos"}
    args = Namespace(output_dir=str(tmp_path), on_bad_row="skip", load_best_model_at_end=True, **flags)
    run = RunFolder(args, accelerator, "tinycap")
    run.state, run.log = {"epoch": 0}, RunLog(tmp_path, accelerator, total_steps=4)
    for step, value in enumerate((3, 7, 7, 5), start=1):
        nn.init.constant_(model.weight, step)
        run.state["step"] = step
        run.log_validation({"cider": value}, model)
    assert run.state["best"]["step"] == 2
    run.load_best(model)
    assert (model.weight == 2).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best_model.safetensors", "metrics.jsonl"]
