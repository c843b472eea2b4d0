"""Data sets of strangers: their rows open no URL and no file outside the folder, unless the user allows it."""

import base64
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import datasets
import hub_stub
import pyarrow.parquet
import pytest
from PIL import Image
from tiny import draw_picture, png_bytes
from transformers import AutoModel, AutoProcessor

from tinycap import REPOSITORY, processing_tinycap
from tinycap.evaluation.captioning import caption_dataset
from tinycap.processing_tinycap import MAX_REDIRECTS, load_image
from tinycap.training.augmentation import Augmentation
from tinycap.training.data import decode_dataset, load_images, load_split, load_splits, resolve_columns
from tinycap.training.skipped_rows import SkippedRows
from tinycap.training.streaming import StreamingCaptionDataset


PICTURE = png_bytes(Image.new("LA", (60, 50), (0, 0)))


class Handler(BaseHTTPRequestHandler):
    """`/photo.png`; `/to?URL` redirects, `/loop` to itself; `/drip` and `/drip-head` send a byte every 0.2 s."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith(("/to?", "/loop")):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2] or self.path)
            self.end_headers()
        elif self.path == "/drip-head":
            self.drip(b"HTTP/1.1 200 OK\r\nX: ")
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(PICTURE)))
            self.end_headers()
            self.wfile.write(b"") if self.path == "/drip" else self.wfile.write(PICTURE)
            if self.path == "/drip":
                self.drip(PICTURE)

    def drip(self, data: bytes) -> None:
        self.wfile.write(data[:20])
        for _ in range(40):
            time.sleep(0.2)
            try:
                self.wfile.write(b"a")
            except OSError:
                return

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.asked = True, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def elsewhere(tmp_path, server, monkeypatch):
    """What a stranger's rows may name, by kind; the data set's own folder is tmp_path / "photos"."""
    server.asked.clear()
    # Not .png, which would make a plain folder of a folder of CSV.
    secret = tmp_path / "private" / "secret.bin"
    secret.parent.mkdir()
    secret.write_bytes(PICTURE)
    monkeypatch.chdir(secret.parent)
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "link.bin").symlink_to(secret)
    (folder / "linked").symlink_to(secret.parent)
    return {
        "url": f"{server.url}/photo.png",
        "redirect": f"{server.url}/to?{server.url}/photo.png",
        "long url": f"{server.url}/photo.png?{'a' * 5000}",
        "absolute": str(secret),
        "parent": "../private/secret.bin",
        "parent of the folder": str(folder / ".." / "private" / "secret.bin"),
        "working directory": "secret.bin",
        "link": "link.bin",
        "linked folder": "linked/secret.bin",
        "file url": f"file://{secret}",
        "chain": f"zip://a.png::{server.url}/a.zip",
        "fsspec": f"simplecache::{server.url}/photo.png",
    }


@pytest.fixture(scope="module")
def tinycap(repository):
    model = AutoModel.from_pretrained(repository, trust_remote_code=True)
    return model, AutoProcessor.from_pretrained(repository, trust_remote_code=True)


def write_shards(folder, form: str, images: list[str]) -> None:
    """Ten good rows, each an image below the folder, and one for each of `images`."""
    for number in range(10):
        (folder / f"{number}.bin").write_bytes(png_bytes(draw_picture(number + 20)))
    images = [f"{number}.bin" for number in range(10)] + images
    captions = [f"a dog number {number}" for number in range(len(images))]
    rows = datasets.Dataset.from_dict({"image": images, "caption": captions})
    if form == "parquet of Image":
        rows = rows.cast_column("image", datasets.Image())
    elif form == "parquet of structs":
        rows = rows.map(lambda row: {"image": {"bytes": None, "path": row["image"]}})
    if form.startswith("parquet"):
        # `to_parquet` would open the files, and store them.
        pyarrow.parquet.write_table(rows.data.table, folder / "train.parquet")
    else:
        {"json": rows.to_json, "csv": rows.to_csv}[form](folder / f"train.{form}")


FORMS = ["parquet", "parquet of Image", "parquet of structs", "json", "csv"]


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_name_urls_or_files_elsewhere_are_skipped(form, elsewhere, server, tmp_path, tinycap):
    folder = tmp_path / "photos"
    write_shards(folder, form, list(elsewhere.values()))
    rows, columns = load_images(str(folder), "train")
    assert len(rows) == 10 + len(elsewhere)
    skipped = SkippedRows(max_share=1.0)
    assert len(decode_dataset(rows, columns, 24, skipped, "train")) == 10
    for name, reason in zip(elsewhere.values(), skipped.reasons["train"], strict=True):
        assert "expected bytes or a file below" in reason and name[:300] in reason and "--allow_remote_images" in reason
    found = caption_dataset(*tinycap, rows, columns=columns)
    assert len(found.rows) == 10 and "--allow_remote_images" in found.skipped[0][1]
    assert not server.asked


def test_what_the_user_allows_is_opened(elsewhere, server, tmp_path):
    folder = tmp_path / "photos"
    allowed = {kind: name for kind, name in elsewhere.items() if kind not in ("file url", "chain", "fsspec")}
    write_shards(folder, "parquet of Image", list(allowed.values()))
    rows, columns = load_images(str(folder), "train", allow_remote_images=True)
    skipped = SkippedRows()
    decode_dataset(rows, columns, 24, skipped, "train")
    assert not skipped.count
    assert server.asked


def test_a_table_of_nothing_but_paths_is_refused_before_it_is_decoded(elsewhere, server, tmp_path):
    """As `Dataset.to_parquet` leaves one whose image files lie elsewhere."""
    folder, skipped = tmp_path / "photos", SkippedRows(tmp_path / "skipped.jsonl")
    names = [elsewhere["absolute"], elsewhere["url"]] * 60
    rows = {"image": [{"bytes": None, "path": name} for name in names], "caption": list(map(str, range(120)))}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    pyarrow.parquet.write_table(datasets.Dataset.from_dict(rows, features=features).data.table, folder / "a.parquet")
    with pytest.raises(ValueError, match=r"in 120 of the first 120 rows \(of 120\); --allow_remote_images opens them"):
        load_images(str(folder), "train")
    rows, columns = load_images(str(folder), "train", allow_remote_images=True)
    assert len(rows) == 2 and len(decode_dataset(rows, columns, 24, skipped, "train")) == 2
    assert not skipped.count


def test_a_bad_row_is_an_error_where_it_is_to_be_one(elsewhere, server, tmp_path):
    write_shards(tmp_path / "photos", "parquet", [elsewhere["url"]])
    rows, columns = load_images(str(tmp_path / "photos"), "train")
    with pytest.raises(ValueError, match="row 10, .*--allow_remote_images., got .*photo.png"):
        decode_dataset(rows, columns, 24, SkippedRows(on_bad_row="error"), "train")
    assert not server.asked


@pytest.mark.parametrize("form", ["parquet of Image", "json"])
def test_a_stream_opens_nothing_elsewhere(form, elsewhere, server, tmp_path):
    folder = tmp_path / "photos"
    write_shards(folder, form, list(elsewhere.values()))
    os.rename(folder / f"train.{form.split()[0]}", folder / f"data.{form.split()[0]}")
    stream, validation = load_splits(str(folder), validation_split="train", streaming=True)
    skipped = SkippedRows(max_share=1.0)
    columns = resolve_columns(stream, root=str(folder))
    assert len(decode_dataset(validation, columns, 24, skipped, "train")) == 10
    rows = StreamingCaptionDataset(stream, 24, Augmentation(), columns=columns, skipped=skipped, split="train")
    assert len(list(rows)) == 10 and skipped.count == 2 * len(elsewhere)
    assert not server.asked


def test_other_columns_of_images_are_not_opened(elsewhere, server, tmp_path):
    good = {"bytes": PICTURE, "path": None}
    bad = {"bytes": None, "path": elsewhere["url"]}
    rows = {"image": [good] * 4, "caption": list("abcd"), "id": [bad] * 4, "pages": [[bad]] * 4}
    kinds = {"id": datasets.Image(), "pages": datasets.List(datasets.Image())}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string"), **kinds})
    table = datasets.Dataset.from_dict(rows, features=features).data.table
    pyarrow.parquet.write_table(table, tmp_path / "photos" / "train.parquet")
    for streaming in (False, True):
        assert next(iter(load_split(str(tmp_path / "photos"), "train", streaming=streaming)))["pages"] == [bad]
    assert not server.asked


def test_base64_in_a_column_is_still_an_image(tmp_path):
    text = base64.b64encode(PICTURE).decode()
    rows = datasets.Dataset.from_dict({"image": [text, f"data:image/png;base64,{text}"], "caption": ["a", "b"]})
    rows.to_parquet(tmp_path / "train.parquet")
    rows = load_split(str(tmp_path), "train")
    columns = resolve_columns(rows, root=str(tmp_path))
    assert len(decode_dataset(rows, columns, 24, SkippedRows(), "train")) == 2


def test_a_table_of_a_plain_folder_opens_nothing_elsewhere(elsewhere, server, tmp_path):
    folder = tmp_path / "photos"
    os.rename(elsewhere["absolute"], tmp_path / "private" / "secret.png")
    elsewhere = {kind: name.replace(".bin", ".png") for kind, name in elsewhere.items()}
    (folder / "linked").unlink()
    kinds = ("url", "absolute", "parent", "file url")
    lines = [json.dumps({"file_name": elsewhere[kind], "text": f"a dog {kind}"}) for kind in kinds]
    for number in range(10):
        (folder / f"{number}.png").write_bytes(png_bytes(draw_picture(number + 20)))
        # A path of another machine, or of this one, ends in the folder's own file.
        name = [str(folder / f"{number}.png"), f"/home/nobody/{number}.png", f"{number}.png"][number % 3]
        lines.append(json.dumps({"file_name": name, "text": f"a cat {number}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    rows, columns = load_images(str(folder), "train")
    skipped = SkippedRows(max_share=1.0)
    decoded = decode_dataset(rows, columns, 24, skipped, "train")
    assert len(decoded) == 10 and len(skipped.reasons["train"]) == len(kinds), skipped.reasons
    assert not server.asked


@pytest.mark.parametrize("path", ["/drip", "/drip-head"])
def test_a_url_that_drips_ends_with_its_time(path, server):
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"{path}: expected an answer within 0.6 s"):
        load_image(server.url + path, timeout=0.6)
    assert time.monotonic() - start < 2


def test_a_url_is_read_like_a_file_up_to_a_size(server, monkeypatch):
    assert load_image(f"{server.url}/photo.png").getpixel((3, 3)) == (255, 255, 255)
    monkeypatch.setattr(processing_tinycap, "MAX_DOWNLOAD", 50)
    with pytest.raises(ValueError, match="photo.png: expected an answer of at most 50 bytes"):
        load_image(f"{server.url}/photo.png", timeout=3)


def test_redirects_are_bounded_and_never_lead_to_a_file(server, tmp_path):
    server.asked.clear()
    assert load_image(f"{server.url}/to?{server.url}/photo.png").size == (60, 50)
    with pytest.raises(ValueError, match="redirect"):
        load_image(f"{server.url}/loop")
    assert server.asked.count("/loop") == MAX_REDIRECTS + 1
    (tmp_path / "photo.png").write_bytes(PICTURE)
    for url in (f"file://{tmp_path}/photo.png", "ftp://127.0.0.1/photo.png"):
        with pytest.raises(ValueError, match="cannot read image"):
            load_image(f"{server.url}/to?{url}")


@pytest.mark.skipif(os.name != "posix", reason="names of other systems are Unicode")
def test_a_file_name_that_is_not_utf8_is_a_skipped_row(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(png_bytes(draw_picture(number)))
        (tmp_path / f"{number}.txt").write_text(f"a dog {number}")
    for ending, content in ((b".png", PICTURE), (b".txt", b"a cat")):
        with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9" + ending), "wb") as file:
            file.write(content)
    rows, columns = load_images(str(tmp_path), "train")
    skipped = SkippedRows()
    assert len(decode_dataset(rows, columns, 24, skipped, "train")) == 10
    assert skipped.count == 1 and r"caf\udce9.png" in skipped.reasons["train"][0]


@pytest.mark.parametrize("kind", ["url", "absolute", "parent", "chain"])
def test_a_card_that_names_data_files_elsewhere_is_an_error(kind, elsewhere, server, tmp_path):
    card = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": elsewhere[kind]}]}]}
    (tmp_path / "photos" / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="README.md: expected data files below this folder"):
            load_split(str(tmp_path / "photos"), "train", streaming=streaming)
    assert not server.asked


def test_a_card_on_the_hub_may_not_name_a_file_of_this_machine(monkeypatch):
    """A data set's author must not choose which of the user's files become captions; `datasets` 5.0 opens them."""
    for path in ("/etc/passwd", "https://example.org/a.csv", "hf://datasets/other/name@main/a.csv"):
        own = "hf://datasets/some/name@main/a.csv"
        config = SimpleNamespace(data_files={"train": [own], "test": [path]})
        builder = SimpleNamespace(
            repo_id=None,
            config=config,
            as_streaming_dataset=lambda split: datasets.IterableDataset.from_generator(list),
        )
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *names, builder=builder: builder)
        with pytest.raises(ValueError, match=f"the card of some/name: expected data files in its own .*, got {path}"):
            load_split("some/name", "train", streaming=True)
        load_split("some/name", "train", streaming=True, allow_remote=True)


@pytest.mark.slow
def test_a_local_file_in_a_hub_card_is_not_read(tmp_path):
    """By real requests to a Hub on this machine."""
    secret, repository, shown = tmp_path / "secret.jsonl", tmp_path / "photos", []
    repository.mkdir()
    secret.write_text('{"image": "a.png", "caption": "private"}\n')
    (repository / "train.jsonl").write_text('{"image": "a.png", "caption": "public"}\n')
    code = "from tinycap.training.data import load_split; print(load_split('some/name', 'train')['caption'][:])"
    for path in ("train.jsonl", str(secret)):
        card = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": path}]}]}
        (repository / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
        with hub_stub.serve(repository) as hub:
            variables = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / path[-9:])}
            options = {"cwd": REPOSITORY, "env": {**os.environ, **variables}, "text": True, "timeout": 60}
            shown.append(subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, **options))
    assert shown[0].stdout.strip() == "['public']", shown[0].stderr
    assert not shown[1].stdout and "ValueError: dataset some/name, split train: cannot be read" in shown[1].stderr
