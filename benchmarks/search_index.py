"""Size of an index of N images, and milliseconds of a query, on random embeddings.

    python -m benchmarks.search_index --sizes 1000 100000 1000000

A query is timed from the embedding to the ten best paths, on an index that stays open (the median of 20), and once more
with the index opened anew.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.results import benchmark_parser, markdown_table, save_results
from tinycap.deploy.captioners import ImageResult
from tinycap.deploy.index import ImageIndex


BATCH, WIDTH, REPEATS = 10_000, 768, 20


def random_rows(rng: np.random.Generator, number: int) -> np.ndarray:
    rows = rng.standard_normal((number, WIDTH), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def milliseconds(run, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(size: int, folder: Path) -> dict:
    rng, index = np.random.default_rng(size), ImageIndex(folder, "random", folder)
    started = time.perf_counter()
    for first in range(0, size, BATCH):
        rows = random_rows(rng, min(BATCH, size - first))
        results = [ImageResult(f"{folder}/{first + row:07}.jpg", embedding=vector) for row, vector in enumerate(rows)]
        index.add(results, {result.image: (0, 0) for result in results})
    index.summarize()
    built = time.perf_counter() - started
    query = random_rows(rng, 1)[0]
    found = milliseconds(lambda: index.search(query, 10), REPEATS)
    index.close()

    def open_and_search() -> None:
        opened = ImageIndex(folder, "random", folder)
        opened.search(query, 10)
        opened.close()

    opened = milliseconds(open_and_search, 3)
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    return {"images": size, "megabytes": megabytes, "seconds": built, "query_ms": found, "open_and_query_ms": opened}


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, "search_index")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 100_000, 1_000_000], help="images")
    parser.add_argument("--folder", help="where the indexes are made, temporarily; the system's choice if not given")
    args = parser.parse_args(argv)
    results = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            results.append(measure(size, Path(folder)))
    rows = [[f"{row['images']:,}", *(f"{row[name]:,.1f}" for name in list(row)[1:])] for row in results]
    header = ["images", "MB", "seconds to add them", "ms a query", "ms to open and query"]
    save_results(args.output_dir, "search_index", {"sizes": results}, markdown_table(header, rows))


if __name__ == "__main__":
    main()
