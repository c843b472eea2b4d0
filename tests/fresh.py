"""Python processes that start in a moment: forked from a server that has imported the libraries, and nothing of this
project. Importing them takes longer than what most tests do.

They are real in all else: ids, streams, limits, signals, the end of an interpreter. On other systems than Linux, where
a fork with these libraries isn't safe, they are new interpreters.
"""

import atexit
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest


CAN_FORK = sys.platform == "linux"
LIBRARIES = [
    *("torch", "transformers", "transformers.pipelines", "transformers.generation.utils", "transformers.trainer_utils"),
    *("transformers.models.clip.modeling_clip", "transformers.models.git.processing_git", "PIL.Image", "sklearn"),
    *("datasets", "datasets.distributed", "accelerate", "evaluate", "requests", "matplotlib.pyplot", "torchdata"),
    *("torchdata.stateful_dataloader", "torch.distributed", "tqdm.auto", "yaml"),
]
# Forbids the network; all that is on the path of `run_fresh`.
GUARD = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(Path(__file__).with_name("no_network"))}


@cache
def server() -> socket.socket:
    """A connection to the server that all processes of this test run share; the first of them starts it."""
    import fcntl  # Windows has none.

    path = os.environ["TINYCAP_FORK_SERVER"]
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            ours.connect(path)
        except OSError:
            start_server(path)
            ours.connect(path)
    atexit.register(ours.close)
    return ours


def start_server(path: str) -> None:
    Path(path).unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": GUARD["PYTHONPATH"], "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONSAFEPATH", None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        command = [sys.executable, Path(__file__).with_name("fork_server.py"), str(listener.fileno()), *LIBRARIES]
        # Standard output as in a process whose output is a file, which is not written line by line.
        options = {"pass_fds": [listener.fileno()], "start_new_session": True, "stdout": subprocess.DEVNULL}
        subprocess.Popen(command, env=environment, **options)


class Process:
    """A started `python WORDS...`, with the methods of `subprocess.Popen`.

    Args:
        words: of the command line: `-c CODE`, `-m MODULE` or a script, and its arguments.
        cwd: working folder; this process's by default.
        path: folders in front of its `sys.path`.
        stdout, stderr: files; temporary ones by default, which `output()` and `errors()` read.
        closed: names of the streams that are closed when it starts.
        file_limit: the size in bytes that its files may have, like a disk with so much room.
        new_session: whether it leads a session and a process group.
        variables: of its environment; `None` for one to leave out. Of those that libraries read at their import, only
            HF_DATASETS_CACHE has an effect.
    """

    def __init__(
        self,
        *words: object,
        cwd: Path | str | None = None,
        path: tuple = (),
        stdout=None,
        stderr=None,
        closed: tuple[str, ...] = (),
        file_limit: int | None = None,
        new_session: bool = False,
        **variables: str | None,
    ):
        self.returncode, self.report, self.interpreter = None, None, None
        self.files = [stdout or tempfile.TemporaryFile(), stderr or tempfile.TemporaryFile()]
        variables = {**os.environ, "PYTHONUNBUFFERED": None, **variables}
        environment = {name: value for name, value in variables.items() if value is not None}
        words, path, cwd = [str(word) for word in words], [str(folder) for folder in path], str(cwd or Path.cwd())
        if CAN_FORK:
            request = {"words": words, "cwd": cwd, "path": path, "environment": environment}
            request |= {"closed": closed, "file_limit": file_limit, "new_session": new_session}
            self.report, theirs = os.pipe()
            with open(os.devnull) as nothing:
                files = [nothing.fileno(), *(file.fileno() for file in self.files), theirs]
                socket.send_fds(server(), [json.dumps(request).encode()], files)
            os.close(theirs)
            self.pid = self._read_report()
            return
        if closed or file_limit is not None:
            pytest.skip("needs Linux")
        environment["PYTHONPATH"] = os.pathsep.join([*path, environment.get("PYTHONPATH", "")])
        streams = {"stdin": subprocess.DEVNULL, "stdout": self.files[0], "stderr": self.files[1]}
        self.interpreter = subprocess.Popen(
            [sys.executable, *words], cwd=cwd, env=environment, start_new_session=new_session, **streams
        )
        self.pid = self.interpreter.pid

    def _read_report(self) -> int:
        content = os.read(self.report, 4)
        assert content, "the server of forked processes ended"
        return struct.unpack("i", content)[0]

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float = 120) -> int:
        """Its exit status. Raises `subprocess.TimeoutExpired`."""
        if self.interpreter is not None:
            self.returncode = self.interpreter.wait(timeout)
        if self.returncode is None:
            if not select.select([self.report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("python", timeout)
            self.returncode = self._read_report()
            os.close(self.report)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def output(self) -> str:
        return self._read(self.files[0])

    def errors(self) -> str:
        return self._read(self.files[1])

    @staticmethod
    def _read(file) -> str:
        """What is in a file so far; the process that writes it shares its position."""
        size = os.fstat(file.fileno()).st_size
        return os.pread(file.fileno(), size, 0).decode(errors="replace") if size else ""


def run_fresh(
    code: str, *argv: object, folder: Path, path: tuple = (), expected_status: int = 0, **variables: str | None
) -> str:
    """What `code` prints in a new process; if it is expected to fail, its errors.

    Args:
        argv: its `sys.argv`.
        folder: its working folder.
        expected_status: its exit status.
        path, variables: see `Process`; its path has none of this project's folders.
    """
    process = Process("-c", code, *argv, cwd=folder, path=path, **{**GUARD, **variables})
    assert process.wait() == expected_status, process.errors()
    return process.errors() if expected_status else process.output()
