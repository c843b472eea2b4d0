"""Data loader workers, ranks and launchers that end, or never come: an error, or no process left, and never a hang."""

import inspect
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import namedtuple

import pytest
from fresh import Process
from PIL import Image
from ranks import rank_variables
from torch.utils.data import DataLoader

from tinycap import REPOSITORY, pipeline_tinycap
from tinycap.pipeline_tinycap import usable_workers
from tinycap.training import loop
from tinycap.workers import start_worker


MEGABYTE = 2**20
Volume = namedtuple("Volume", "f_frsize f_blocks f_bavail")
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limit")


@linux
@pytest.mark.parametrize("free, batch, in_use, expected", [(64, 1, 1, 4), (64, 5, 1, 2), (64, 5, 4, 1), (64, 40, 1, 0)])
def test_there_are_as_many_workers_as_shared_memory_has_room_for(monkeypatch, free, batch, in_use, expected):
    monkeypatch.setattr(os, "statvfs", lambda path: Volume(MEGABYTE, 64, free))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert {usable_workers(4, batch * MEGABYTE, in_use) for _ in range(3)} == {expected}
    assert len(caught) == (expected < 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    with pytest.warns(UserWarning, match="/dev/shm: expected room for .* 4 data loader workers, got 64 MB"):
        assert usable_workers(4, MEGABYTE) == 0


@linux
def test_without_shared_memory_there_are_no_workers(monkeypatch):
    monkeypatch.setattr(pipeline_tinycap, "SHARED_MEMORY", "/dev/missing")
    with pytest.warns(UserWarning, match="/dev/missing"):
        assert usable_workers(2, 1) == 0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert usable_workers(2, 1) == 2


def what_no_process_can_hand_over(samples: list):
    return lambda: samples


@pytest.mark.slow
def test_a_worker_that_cannot_hand_over_a_batch_is_an_error(capfd):
    options = {"num_workers": 1, "collate_fn": what_no_process_can_hand_over, "worker_init_fn": start_worker}
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(DataLoader(range(3), multiprocessing_context="fork", **options))
    assert "data loader worker 0: expected to hand over a batch in shared memory" in capfd.readouterr().err


SMALL = "mount --make-rprivate / && mount -t tmpfs -o size=1m tmpfs /dev/shm"
# A command in a mount namespace of its own, as by `unshare -m`.
IN_SMALL = f"""
import ctypes, runpy, subprocess
assert ctypes.CDLL(None).unshare(0x20000) == 0
subprocess.run({SMALL!r}, shell=True, check=True)
runpy.run_module("tinycap.deploy", run_name="__main__", alter_sys=True)
"""


@linux
@pytest.mark.slow
def test_captions_need_no_more_shared_memory_than_docker_gives(repository, tmp_path):
    if subprocess.run(["unshare", "-m", "sh", "-c", SMALL], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount")
    for number in range(300):
        Image.new("RGB", (30, 30), (number % 256, 0, 0)).save(tmp_path / f"{number}.png")
    words = ("caption", tmp_path, "--model", repository, "--num-workers", "4", "--batch-size", "64")
    process = Process("-c", IN_SMALL, *words, path=(REPOSITORY,))
    assert process.wait() == 0 and len(process.output().splitlines()) == 300, process.errors()
    assert process.errors().count("/dev/shm: expected room") == 1


# --- processes --------------------------------------------------------------------------------------------------------

START = """
import sys, time
from argparse import Namespace
from datetime import timedelta
from tinycap.training import loop
loop.PROCESS_TIMEOUT = timedelta(seconds=int(sys.argv[1]))
def main():
    flags = Namespace(mixed_precision="no", report_to="none", output_dir=".")
    accelerator = loop.create_accelerator(flags)
    with loop.main_process_first(accelerator):
        time.sleep(int(sys.argv[2]) if accelerator.is_main_process else 0)
    print("all here")
loop.run_script(main)
"""


def start_rank(rank: int, port: int, *seconds: int) -> Process:
    return Process("-c", START, *seconds, path=(REPOSITORY,), **rank_variables(rank, 2, port))


@pytest.mark.slow
def test_a_process_that_never_comes_is_an_error():
    ports = free_port(), free_port()
    for rank, process in enumerate([start_rank(rank, port, 1, 0) for rank, port in enumerate(ports)]):
        assert process.wait() == 2
        expected = f"error: process {rank} of 2: expected all of them at 127.0.0.1:{ports[rank]} within 0:00:01"
        assert expected in process.errors()


@pytest.mark.slow
def test_decoding_may_take_longer_than_other_work():
    port = free_port()
    ranks = [start_rank(rank, port, 2, 3) for rank in range(2)]
    for rank in ranks:
        assert rank.wait() == 0 and "all here" in rank.output(), rank.errors()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# By its source, since the imports of its module take longer than all else here.
RANK = f"""
import os, signal, threading, time
STOP_TIMEOUT = {loop.STOP_TIMEOUT}
{inspect.getsource(loop.stop_with_launcher)}
stop_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""


@linux
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate.commands.launch", "torch.distributed.run"])
def test_ranks_end_soon_after_their_launcher_was_killed(launcher, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    number, flags = (1, ["--cpu"]) if "accelerate" in launcher else (2, ["--standalone", "--nproc_per_node", "2"])
    started = Process("-m", launcher, *flags, tmp_path / "rank.py")
    while started.output().count("\n") < number:
        assert started.poll() is None, started.errors()
        time.sleep(0.01)
    ranks = [int(line) for line in started.output().splitlines()]
    started.kill()
    assert started.wait() == -signal.SIGKILL

    def going_on() -> list[int]:
        there = [rank for rank in ranks if os.path.exists(f"/proc/{rank}")]
        return [rank for rank in there if open(f"/proc/{rank}/stat").read().split()[2] != "Z"]

    for _ in range(500):
        if not going_on():
            return
        time.sleep(0.01)
    left = going_on()
    for rank in left:
        os.kill(rank, signal.SIGKILL)
    assert not left, "ranks went on"
