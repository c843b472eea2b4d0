"""One writer of an output at a time: how its lock, and the files beside it, may be broken."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinycap.commands import OutputError, replacing
from tinycap.deploy import outputs
from tinycap.deploy.captioners import ImageResult
from tinycap.deploy.embeddings import EmbeddingFile
from tinycap.deploy.outputs import CaptionRows, RowFile, lock


posix = pytest.mark.skipif(os.name == "nt", reason="needs fork, links and pipes")


@posix
@pytest.mark.slow
def test_a_fork_of_a_killed_writer_does_not_keep_its_lock(tmp_path):
    """As data loader workers, which notice only after seconds that their parent is gone."""
    code = """
import os, signal, sys, time
from pathlib import Path
from tinycap.deploy.outputs import lock

held = lock(Path(sys.argv[1]))
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "c.csv")], **pipes)
    fork = int(process.stdout.readline())
    try:
        with pytest.raises(OutputError, match="another process is writing to it"):
            lock(tmp_path / "c.csv")
        process.kill()
        process.wait()
        lock(tmp_path / "c.csv").close()
    finally:
        os.kill(fork, signal.SIGKILL)
        process.communicate()


@posix
def test_what_lies_in_the_place_of_a_lock_is_not_written_to(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("as it was")
    (tmp_path / ".a.csv.lock").symlink_to(tmp_path / "precious")
    with RowFile(tmp_path / "a.csv", CaptionRows()) as output:
        output.start([], False)
    assert (tmp_path / "precious").read_text() == "as it was"
    (tmp_path / ".b.csv.lock").mkdir()
    with pytest.raises(OutputError, match="b.csv, its lock .b.csv.lock: Is a directory"):
        lock(tmp_path / "b.csv")
    # Another user's, who was killed.
    (tmp_path / ".c.csv.lock").touch()
    monkeypatch.setattr(outputs.os, "access", lambda path, mode: False)
    first = lock(tmp_path / "c.csv")
    with pytest.raises(OutputError, match="another process"):
        lock(tmp_path / "c.csv")
    first.close()


@posix
def test_a_file_system_without_locks_can_be_written_to(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(outputs.fcntl, "flock", flock)
    with RowFile(tmp_path / "c.jsonl", CaptionRows()) as output:
        assert output.start(["a"], False) == set()
        assert output.append([ImageResult("a", ["a dog"])]) == []
    assert "a dog" in (tmp_path / "c.jsonl").read_text()


@posix
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_or_a_pipe_is_no_output(tmp_path, overwrite):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.npy").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("folder.csv", "pipe.jsonl"):
        with (
            pytest.raises(OutputError, match=f"{name}: expected a file"),
            RowFile(tmp_path / name, CaptionRows()) as rows,
        ):
            rows.start([], overwrite)
    with pytest.raises(OutputError, match="folder.npy: expected a file"):
        EmbeddingFile(tmp_path / "folder.npy", "model", overwrite)
    assert (tmp_path / "pipe.jsonl").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.csv", "folder.npy", "pipe.jsonl"]


def test_machines_with_the_same_process_ids_share_no_file_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with replacing(tmp_path / "a.txt") as first, replacing(tmp_path / "b.txt") as second:
        first.write_text("a")
        second.write_text("b")
    assert (tmp_path / "a.txt").read_text() == "a" and (tmp_path / "b.txt").read_text() == "b"


def test_collected_embeddings_are_removed_while_they_are_locked(tmp_path, monkeypatch):
    """Otherwise those of a second run, which may begin at once, would be."""
    there, unlink = [], os.unlink
    partial = tmp_path / "e.npy.partial.jsonl"

    def unlink_lock(path):
        there.append(partial.exists())
        unlink(path)

    with EmbeddingFile(tmp_path / "e.npy", "model", False) as output:
        output.start(["a"], False)
        output.append([ImageResult("a", embedding=np.ones(3))])
        monkeypatch.setattr(outputs.os, "unlink", unlink_lock)
        assert partial.exists()
    assert there[-1] is False and not partial.exists() and Path(tmp_path / "e.npy").is_file()
