"""Eight processes load the same repository and decode the same data set concurrently, with empty caches.

    python cold_start.py REPOSITORY DATASET

Prints JSON: for each process its captions and decoded rows, or its error. `test_concurrency.py` runs it in a new
process, which forks before torch has threads and has imported the libraries only once.
"""

import hashlib
import json
import multiprocessing
import sys

import datasets
import torch
import transformers
import transformers.pipelines
from PIL import Image

from tinycap.training.data import SkippedRows, decode_dataset, load_split, resolve_columns


PROCESSES = 8


def caption() -> str:
    captioner = transformers.pipeline("image-to-text", model=sys.argv[1], trust_remote_code=True)
    return captioner(Image.new("RGB", (40, 30), "red"))[0]["generated_text"]


def decode() -> str:
    rows = load_split(sys.argv[2], "train")
    rows = decode_dataset(rows, resolve_columns(rows), 24, SkippedRows(), "train")
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row["pixels"] + repr(row["captions"]).encode())
    return f"{len(rows)} rows, {digest.hexdigest()}"


def run(function, barrier, results) -> None:
    barrier.wait()
    try:
        results.put({"found": function()})
    except Exception as error:
        results.put({"error": f"{type(error).__name__}: {error}"})


def at_once(function, number: int) -> list[dict]:
    """The results of `number` new processes that start `function` at the same moment."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(number), context.Queue()
    processes = [context.Process(target=run, args=(function, barrier, results)) for _ in range(number)]
    for process in processes:
        process.start()
    found = [results.get(timeout=200) for _ in processes]
    for process in processes:
        process.join()
    return found


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    found = {"captions": at_once(caption, PROCESSES), "captions_later": at_once(caption, 2)}
    found["rows"] = at_once(decode, PROCESSES)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
