"""Eight processes that load the same repository and decode the same data set at once, all caches empty.

    python cold_start.py REPOSITORY DATASET HOME

Prints a JSON list: for each process what it captioned and decoded, or its error. Run by `test_concurrency.py`: in a
process of its own, so that it forks before torch has threads, and imports are paid for once.
"""

import hashlib
import json
import multiprocessing
import os
import sys


os.environ.update(
    HF_HOME=sys.argv[3],
    HF_MODULES_CACHE=os.path.join(sys.argv[3], "modules"),
    HF_DATASETS_CACHE=os.path.join(sys.argv[3], "datasets"),
    OMP_NUM_THREADS="1",
)

import datasets
import torch
import transformers
import transformers.pipelines
from PIL import Image

from tinycap.training.data import SkippedRows, decode_dataset, load_split, resolve_columns


PROCESSES = 8


def load(barrier, results) -> None:
    barrier.wait()
    try:
        captioner = transformers.pipeline("image-to-text", model=sys.argv[1], trust_remote_code=True)
        caption = captioner(Image.new("RGB", (40, 30), "red"))[0]["generated_text"]
        barrier.wait()
        rows = load_split(sys.argv[2], "train")
        rows = decode_dataset(rows, resolve_columns(rows), 24, SkippedRows(), "train")
        digest = hashlib.sha256()
        for row in rows:
            digest.update(row["pixels"] + repr(row["captions"]).encode())
        results.put([caption, len(rows), digest.hexdigest()])
    except Exception as error:
        barrier.abort()
        results.put([f"{type(error).__name__}: {error}"])


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(PROCESSES), context.Queue()
    processes = [context.Process(target=load, args=(barrier, results)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    found = [results.get(timeout=200) for _ in processes]
    for process in processes:
        process.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
