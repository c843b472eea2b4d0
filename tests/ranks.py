"""Ranks of a training script on this machine, as started by torchrun, but forked from a server that has already
imported the libraries: imports take longer than a test's training."""

import json
import multiprocessing
import os
import socket
from pathlib import Path

from tinycap import train_distill, train_teacher


def run_rank(
    rank: int, number: int, port: int, argv: list[str], log: Path, witness: Path | None, teacher: bool
) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if number > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number), LOCAL_WORLD_SIZE=str(number))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    # As in a process of torchrun: the loaders' workers are forked and import nothing.
    multiprocessing.set_start_method("fork", force=True)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if witness is not None:
        step_before = train_distill.train_step

        def step_seen(*args):
            step = args[-1]
            ids = [name for batch in step.batches for name in batch["image_ids"] if name]
            with open(f"{witness}-{rank}", "a") as file:
                file.write(json.dumps({"step": step.number, "ids": ids}) + "\n")
            return step_before(*args)

        train_distill.train_step = step_seen
    (train_teacher if teacher else train_distill).main(argv)


class Ranks:
    """A started training.

    Args:
        argv: of `train_distill.py`, or of `train_teacher.py` for a `teacher`.
        log: file for the output of all ranks.
        witness: prefix of files, to which each rank writes the ids of the images of every step.
        number: of ranks.
    """

    def __init__(self, argv: list, log: Path, witness: Path | None = None, number: int = 2, teacher: bool = False):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tinycap.train_distill"])
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.log = log
        common = (number, port, list(map(str, argv)), log, witness, teacher)
        self.ranks = [context.Process(target=run_rank, args=(rank, *common)) for rank in range(number)]
        for process in self.ranks:
            process.start()

    def finish(self, timeout: float = 240) -> None:
        for process in self.ranks:
            process.join(timeout)
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
        assert codes == [0] * len(codes), self.log.read_text()[-4000:]
