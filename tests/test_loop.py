from types import SimpleNamespace

import pytest
import torch

from tinycap.training import loop


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
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        loop.use_all_cores(SimpleNamespace(device=torch.device(device), num_processes=processes))
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
