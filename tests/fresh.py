"""Runs code as in a fresh interpreter that has imported torch and transformers, and nothing of this project.

A server imports both once, with nothing but the network's guard on its path, and forks for each run: importing takes
longer than what most tests do.
"""

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path


SERVER = """
import importlib, json, os, sys, traceback

for name in ("torch", "transformers", "transformers.pipelines", "transformers.generation", "PIL.Image"):
    importlib.import_module(name)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(job["cwd"])
            os.environ.clear()
            os.environ.update(job["environment"])
            sys.path[:0] = job["path"]
            sys.argv = ["-c", *job["argv"]]
            for number, file in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
            exec(compile(job["code"], "<fresh>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def environment() -> dict[str, str]:
    """This process's, with a path that holds nothing but what forbids the network."""
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(Path(__file__).with_name("no_network"))}


@cache
def server() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SERVER], env=environment(), **pipes)
    atexit.register(process.kill)
    assert process.stdout.readline() == "ready\n"
    return process


def run_fresh(
    code: str, *argv: object, folder: Path, path: tuple = (), expected_status: int = 0, **variables: str | None
) -> str:
    """What `code` prints; if it is expected to fail, its errors.

    Args:
        argv: its `sys.argv`.
        folder: where it runs, and where its output is kept.
        path: folders in front of its `sys.path`.
        expected_status: its exit status.
        variables: of its environment; `None` for one to leave out.
    """
    shown, errors = folder / "fresh.stdout", folder / "fresh.stderr"
    values = {name: value for name, value in {**environment(), **variables}.items() if value is not None}
    job = {"code": code, "argv": list(map(str, argv)), "cwd": str(folder), "path": list(map(str, path))}
    job |= {"stdout": str(shown), "stderr": str(errors), "environment": values}
    process = server()
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    status = process.stdout.readline().strip()
    assert status == str(expected_status), (status, errors.read_text())
    found = (errors if expected_status else shown).read_text()
    shown.unlink()
    errors.unlink()
    return found
