"""What every data loader's worker process does when it starts."""

import multiprocessing.queues
import os
import sys
from typing import Any

from tinycap.pipeline_tinycap import SHARED_MEMORY


def start_worker(worker: int = 0) -> None:
    """A data loader's `worker_init_fn`: a worker that can't hand over a batch ends, which the loader reports; Python
    would print the error and leave the loader waiting for ever."""

    def end(error: Exception, batch: Any) -> None:
        print(
            f"data loader worker {worker}: expected to hand over a batch in shared memory ({SHARED_MEMORY}), got: "
            f"{error}; a run without workers needs none",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)
