import ast
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from tinycap import REPOSITORY
from tinycap.training import loop
from tinycap.training.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    "launched, asked, device, processes, expected",
    [
        (True, "1", "cpu", 1, 5),
        (True, "3", "cpu", 1, 2),
        (False, "1", "cpu", 1, 2),
        (True, "1", "cpu", 4, 2),
        (True, "1", "cuda", 1, 2),
    ],
)
def test_a_launcher_that_knows_of_no_cpu_leaves_no_core_idle(launched, asked, device, processes, expected, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(loop.os, "sched_getaffinity", lambda pid: range(5), raising=False)
    monkeypatch.setattr(loop, "CGROUP_QUOTA", Path("no such file"))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        loop.set_cpu_threads(SimpleNamespace(device=torch.device(device), num_processes=processes))
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "quota, expected", [("250000 100000\n", 2), ("max 100000\n", 5), ("50000 100000\n", 1), ("900000 100000\n", 5)]
)
def test_a_container_gets_no_more_threads_than_its_quota(quota, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(loop.os, "sched_getaffinity", lambda pid: range(5), raising=False)
    monkeypatch.setattr(loop, "CGROUP_QUOTA", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text(quota)
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    loop.set_cpu_threads(SimpleNamespace(device=torch.device("cpu"), num_processes=1))
    assert given == [expected]


@pytest.mark.parametrize("script", ["train_distill.py", "train_teacher.py"])
def test_threads_are_told_to_wait_passively_before_torch_is_imported(script):
    body = ast.parse((REPOSITORY / script).read_text()).body
    policy = next(i for i, node in enumerate(body) if "OMP_WAIT_POLICY" in ast.unparse(node))
    third_party = ("torch", "datasets", "accelerate", "transformers", "tinycap")
    imports = [i for i, node in enumerate(body) if ast.unparse(node).split()[1].startswith(third_party)]
    assert policy < min(imports)


def test_a_checkpoints_tokenizer_is_loaded_without_a_warning(repository):
    records, handler = [], logging.Handler()
    handler.emit = records.append
    library = logging.getLogger("transformers.configuration_utils")
    loop.set_up_logging(Accelerator())
    library.addHandler(handler)
    try:
        load_tokenizer(str(repository))
    finally:
        library.removeHandler(handler)
    assert records == []


def test_a_loss_that_is_not_finite_changes_no_weight_and_is_found_in_any_batch():
    accelerator = Accelerator()
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    args = SimpleNamespace(seed=0, gradient_accumulation_steps=2, max_grad_norm=1.0)

    def losses_of(batch: dict) -> dict:
        return {"loss": batch["scale"] * model(torch.ones(3)).sum(), "reward": torch.tensor(batch["scale"])}

    def take(*scales: float) -> dict:
        batches = [{"image_ids": [f"image-{place}"], "scale": scale} for place, scale in enumerate(scales)]
        step = loop.Step(batches, [0.5, 0.5], [0.5, 0.5], 2, 0, 0.0, 0.0, number=7)
        return loop.train_step(args, accelerator, model, optimizer, schedule, losses_of, step)

    before = model.weight.detach().clone()
    with pytest.raises(loop.NonFiniteLossError, match="step 7: .*'reward': inf}.* the ids image-1;"):
        take(1.0, float("inf"))
    assert torch.equal(model.weight, before)
    optimizer.zero_grad()
    assert take(1.0, 3.0)["reward"] == 2.0 and not torch.equal(model.weight, before)
