"""Captions images in headless Chromium with the page of `tinycap export --web`: agreement with Python, bytes, times.

    tinycap export --web site
    python benchmarks/browser.py --site site --dataset_name my_images --split validation --max_samples 50

Needs `chromium` (or Chrome) on the path and `pip install playwright`. Captions are compared with `OnnxCaptioner`'s
on the same int8 graphs, greedily and with the beams of the generation config. Writes JSON and a Markdown table.
"""

import collections
import contextlib
import functools
import http.server
import json
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.results import benchmark_parser, markdown_table, save_results
from tinycap.deploy.web_export import SEARCH_FILES


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT_MS = 120_000


class FileHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files as any static host does, and counts the bytes."""

    def copyfile(self, source, outputfile) -> None:
        super().copyfile(source, outputfile)
        self.server.sent[self.path] += source.tell()

    def log_message(self, *args) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """A folder on this machine, at `url`; `sent` has the bytes sent so far, by path, `num_bytes` their sum."""

    def __init__(self, folder: str | Path):
        self.sent = collections.Counter()
        super().__init__(("127.0.0.1", 0), functools.partial(FileHandler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}/"

    @property
    def num_bytes(self) -> int:
        return self.sent.total()


@contextlib.contextmanager
def serving(folder: str | Path) -> Iterator[Server]:
    server = Server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def chromium(*arguments: str):
    """A headless Chromium, by Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The sandbox needs rights that containers rarely have; only this machine's files are opened.
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox", *arguments]}
        with contextlib.closing(playwright.chromium.launch(**options)) as browser:
            yield browser


def open_page(context, url: str, num_beams: int | None = None):
    """A page of a browser or context, with the model loaded."""
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(url)
    page.locator("#beams").wait_for()
    if num_beams is not None:
        page.select_option("#beams", str(num_beams))
    return page


def caption_files(page, files: Sequence[str | Path | dict], selector: str = "#files") -> list[dict]:
    """Adds files as a user does, waits for all captions, and returns the page's rows, as downloaded."""
    page.set_input_files(selector, files if isinstance(files, (str, Path)) else list(files))
    wait_until_done(page)
    return download_rows(page)


def wait_until_done(page) -> None:
    pattern = re.compile(r"(\d+) of (\d+) photos captioned(?:, (\d+) failed)?")
    end = time.monotonic() + TIMEOUT_MS / 1000
    while time.monotonic() < end:
        found = pattern.match(page.locator("#status").text_content())
        if found and int(found[1]) + int(found[3] or 0) == int(found[2]) > 0:
            return
        page.wait_for_timeout(20)
    raise TimeoutError(f"the page: {page.locator('#status').text_content()}")


def download_rows(page) -> list[dict]:
    with page.expect_download() as download:
        page.click("#json")
    return json.loads(Path(download.value.path()).read_text(encoding="utf-8"))


def show_all(page) -> None:
    """Sets the confidence below which captions aren't shown to 0."""
    page.locator("#threshold").evaluate("input => { input.value = 0; input.dispatchEvent(new Event('input')); }")


def measure(site: Path, files: list[Path], beam_counts: Sequence[int]) -> tuple[dict, dict]:
    """Figures of the page, and its captions by number of beams."""
    figures, captions = {"ms_per_caption": {}}, {}
    with chromium() as browser, serving(site) as server:
        context = browser.new_context()
        for visit in ("first", "second"):
            # Counted from the address to the caption, with a file chosen as soon as the page is there.
            start, before, page = time.perf_counter(), server.sent.copy(), context.new_page()
            page.set_default_timeout(TIMEOUT_MS)
            page.goto(server.url)
            page.set_input_files("#files", files[0])
            wait_until_done(page)
            seconds, sent = time.perf_counter() - start, server.sent - before
            # Sent after the first caption.
            num_bytes = sum(size for path, size in sent.items() if not path.endswith(SEARCH_FILES))
            # onnxruntime-web's choice.
            threads = page.evaluate(
                "crossOriginIsolated ? Math.min(4, Math.ceil(navigator.hardwareConcurrency / 2)) : 1"
            )
            figures[visit] = {"seconds": seconds, "bytes": num_bytes, "threads": threads}
            # The second visit may have several threads; otherwise it is as fast as the first.
            for num_beams in beam_counts if visit == "first" or threads > 1 else ():
                page.select_option("#beams", str(num_beams))
                page.click("#clear")
                if page.locator("#threshold-label").is_visible():
                    show_all(page)
                start = time.perf_counter()
                page.set_input_files("#files", files)
                wait_until_done(page)
                elapsed = time.perf_counter() - start
                figures["ms_per_caption"][f"{num_beams} beams, {threads} threads"] = 1000 * elapsed / len(files)
                captions[num_beams] = [row["caption"] for row in download_rows(page)]
            if visit == "first" and page.locator("#query").is_visible():
                figures["search_seconds"] = {}
                for name, query in (("first", "a dog on the grass"), ("second", "two men")):
                    start = time.perf_counter()
                    page.fill("#query", query)
                    page.locator("#found", has_text=query).wait_for()
                    figures["search_seconds"][name] = time.perf_counter() - start
            page.close()
        figures["browser"] = browser.version
    return figures, captions


def save_images(dataset_name: str, split: str, max_samples: int | None, folder: Path) -> list[Path]:
    """The files of a data set's images, unchanged."""
    from tinycap.training.data import load_split, resolve_columns

    dataset = load_split(dataset_name, split)
    column = resolve_columns(dataset, root=dataset_name).image
    paths = []
    for index in range(min(max_samples or len(dataset), len(dataset))):
        paths.append(folder / f"{index:05}.jpg")
        paths[-1].write_bytes(dataset[index][column]["bytes"])
    return paths


def main() -> None:
    parser = benchmark_parser(__doc__, "browser")
    parser.add_argument("--site", type=Path, required=True, help="folder that `tinycap export --web` wrote")
    parser.add_argument("--dataset_name", required=True, help="data set of images")
    parser.add_argument("--split", default="validation", help="its split")
    parser.add_argument("--max_samples", type=int, default=50, help="use only the first so many images")
    args = parser.parse_args()
    from tinycap.deploy.onnx_captioner import OnnxCaptioner

    captioner = OnnxCaptioner.from_pretrained(args.site / "model", quantized=True, num_threads=1)
    beam_counts = sorted({1, captioner.generation_config.get("num_beams") or 1})
    with tempfile.TemporaryDirectory() as folder:
        files = save_images(args.dataset_name, args.split, args.max_samples, Path(folder))
        results, captions = measure(args.site, files, beam_counts)
        results["num_images"], results["differing"] = len(files), {}
        for num_beams in beam_counts:
            expected = [found[0].text for found in captioner(files, num_beams=num_beams)]
            pairs = zip(expected, captions[num_beams], strict=True)
            results["differing"][num_beams] = [pair for pair in pairs if pair[0] != pair[1]]
    sizes = {path: path.stat().st_size for path in args.site.rglob("*") if path.is_file()}
    search_bytes = sum(size for path, size in sizes.items() if path.as_posix().endswith(SEARCH_FILES))
    results["model_bytes"] = sum(size for path, size in sizes.items() if "model" in path.parts) - search_bytes
    rows = [
        *(
            (f"MB to the first caption, {visit} visit", f"{results[visit]['bytes'] / 1e6:.1f}")
            for visit in ("first", "second")
        ),
        ("of it the model with its tokenizer, MB", f"{results['model_bytes'] / 1e6:.1f}"),
        *(
            (f"s from opening to the first caption, {visit} visit", f"{results[visit]['seconds']:.1f}")
            for visit in ("first", "second")
        ),
        *([("MB of the text encoder, after the first caption", f"{search_bytes / 1e6:.1f}")] if search_bytes else []),
        *(
            (f"s from words to {len(files)} sorted photos, {name} query", f"{seconds:.1f}")
            for name, seconds in results.get("search_seconds", {}).items()
        ),
        *((f"ms a caption, {name}", f"{value:.0f}") for name, value in results["ms_per_caption"].items()),
        *(
            (f"captions equal to Python's, {beams} beams", f"{len(files) - len(found)} of {len(files)}")
            for beams, found in results["differing"].items()
        ),
    ]
    save_results(args.output_dir, "browser", results, markdown_table(["figure", "value"], rows))


if __name__ == "__main__":
    main()
