"""Ranks of a training script on this machine, as started by torchrun, but as forks that import no libraries: imports
take longer than a test's training.

    python ranks.py SCRIPT WITNESS ARGUMENTS...

is one of them, of a module of `tinycap` with a `main`. `train_distill` writes the ids of the images of every step to
the file WITNESS, unless that is "".
"""

import importlib
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

from fresh import Process

from tinycap import REPOSITORY


class Ranks:
    """A started training.

    Args:
        argv: of the `script`, a module of `tinycap`.
        log: file for the output of all ranks.
        witness: prefix of files, to which each rank writes the ids of the images of every step.
        number: of ranks.
    """

    def __init__(self, argv: list, log: Path, witness: Path | None = None, number: int = 2, script="train_distill"):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.log, self.ranks = log, []
        for rank in range(number):
            variables = rank_variables(rank, number, port) if number > 1 else {"ACCELERATE_USE_CPU": "true"}
            words = (__file__, script, f"{witness}-{rank}" if witness else "", *argv)
            with open(log, "a") as file:
                streams = {"stdout": file, "stderr": file}
                self.ranks.append(Process(*words, path=(REPOSITORY,), **streams, **variables))

    def finish(self, timeout: float = 240) -> None:
        try:
            codes = [process.wait(timeout) for process in self.ranks]
        finally:
            for process in self.ranks:
                process.kill()
        assert codes == [0] * len(codes), self.log.read_text()[-4000:]


def rank_variables(rank: int, number: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives a rank."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_PORT": port}
    values |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
    return {name: str(value) for name, value in values.items()}


def main(script: str, witness: str, *argv: str) -> None:
    from tinycap import train_distill

    # As in a process of torchrun: the loaders' workers are forked and import nothing.
    multiprocessing.set_start_method("fork", force=True)
    step_before = train_distill.train_step

    def step_seen(*args):
        step = args[-1]
        ids = [name for batch in step.batches for name in batch["image_ids"] if name]
        with open(witness, "a") as file:
            file.write(json.dumps({"step": step.number, "ids": ids}) + "\n")
        return step_before(*args)

    # As in `shared_fixtures.py`.
    os.fsync = lambda descriptor: None
    train_distill.contact_sheet = lambda images, captions, path, **options: Path(path).touch()
    train_distill.plot_curves = lambda metrics, path: Path(path).touch()
    if witness:
        train_distill.train_step = step_seen
    importlib.import_module(f"tinycap.{script}").main(list(argv))


if __name__ == "__main__":
    main(*sys.argv[1:])
