"""Data loader workers, ranks and launchers that end, or never come: an error, or no process left, and never a hang."""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections import namedtuple

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from tinycap import pipeline_tinycap
from tinycap.pipeline_tinycap import usable_workers
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


SMALL = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'


@linux
@pytest.mark.slow
def test_captions_need_no_more_shared_memory_than_docker_gives(repository, tmp_path):
    alone = ["unshare", "-m", "sh", "-c", SMALL, "sh"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount")
    for number in range(300):
        Image.new("RGB", (30, 30), (number % 256, 0, 0)).save(tmp_path / f"{number}.png")
    command = [sys.executable, "-m", "tinycap.deploy", "caption", str(tmp_path), "--model", str(repository)]
    command += ["--num-workers", "4", "--batch-size", "64"]
    done = subprocess.run([*alone, *command], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 300, done.stderr
    assert done.stderr.count("/dev/shm: expected room") == 1


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


def start_rank(rank: int, port: int, *seconds: int) -> subprocess.Popen:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    ranks |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
    environment = {**os.environ, **{name: str(value) for name, value in ranks.items()}}
    command = [sys.executable, "-c", START, *map(str, seconds)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes_is_an_error(rank, free_port):
    output, _ = start_rank(rank, free_port, 2, 0).communicate(timeout=100)
    assert f"error: process {rank} of 2: expected all of them at 127.0.0.1:{free_port} within 0:00:02" in output


@pytest.mark.slow
def test_decoding_may_take_longer_than_other_work(free_port):
    ranks = [start_rank(rank, free_port, 6, 9) for rank in range(2)]
    for rank in ranks:
        output, _ = rank.communicate(timeout=100)
        assert rank.returncode == 0 and "all here" in output, output


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


RANK = """
import os, time
from tinycap.training import loop
loop.stop_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""


@linux
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate.commands.launch", "torch.distributed.run"])
def test_ranks_end_soon_after_their_launcher_was_killed(launcher, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    number, flags = (1, ["--cpu"]) if "accelerate" in launcher else (2, ["--standalone", "--nproc_per_node", "2"])
    command = [sys.executable, "-m", launcher, *flags, str(tmp_path / "rank.py")]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    ranks = [int(started.stdout.readline()) for _ in range(number)]
    started.kill()
    started.wait()

    def going_on() -> list[int]:
        there = [rank for rank in ranks if os.path.exists(f"/proc/{rank}")]
        return [rank for rank in there if open(f"/proc/{rank}/stat").read().split()[2] != "Z"]

    for _ in range(50):
        if not going_on():
            return
        time.sleep(0.1)
    left = going_on()
    for rank in left:
        os.kill(rank, signal.SIGKILL)
    assert not left, "ranks went on"
