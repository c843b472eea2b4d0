"""The page of `tinycap export --web` in headless Chromium, with a tiny model: its captions equal `OnnxCaptioner`'s."""

import csv
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import ENCODER, draw_picture, tiny_model

from benchmarks import browser as drive
from tinycap.confidence_tinycap import ConfidenceCalibration
from tinycap.deploy.captioners import CaptionOptions, OnnxRuntimeCaptioner
from tinycap.deploy.onnx_captioner import OnnxCaptioner
from tinycap.deploy.web_export import PACKAGES, SEARCH_FILES, export_web
from tinycap.training.repository import create_generation_config, create_image_processor, save_repository


NPM = os.environ.get("TINYCAP_NPM", "")
HAS_BROWSER = drive.CHROMIUM is not None and importlib.util.find_spec("playwright") is not None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_BROWSER, reason="needs Chromium on the path and `pip install playwright`"),
    pytest.mark.skipif(not NPM, reason=f"needs TINYCAP_NPM, a folder where npm installed {' and '.join(PACKAGES)}"),
]
CALIBRATION = {"num_beams": 1, "intercept": 2.0, "coefficients": {"mean_log_prob": 0.7, "num_tokens": -0.1}}


@pytest.fixture(scope="module")
def site(tokenizer, tmp_path_factory) -> Path:
    """With a confidence, and a text encoder for which image embeddings are projected."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, **ids}
    encoder = {**ENCODER, "num_hidden_layers": 1, "projection_dim": 10}
    model = tiny_model(vision_config={"num_hidden_layers": 1}, text_config=text, text_encoder_config=encoder)
    model.generation_config = create_generation_config(tokenizer, max_new_tokens=9)
    source = tmp_path_factory.mktemp("calibrated") / "tiny"
    save_repository(source, model, tokenizer, create_image_processor(24))
    (source / "confidence.json").write_text(json.dumps({"calibrations": [CALIBRATION]}))
    config = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**config, "num_beams": 3, "length_penalty": 1.5}))
    folder = tmp_path_factory.mktemp("site")
    files = export_web(source, folder, NPM)
    assert all(path.is_file() for path in files)
    assert {folder / "index.html", *(folder / "model" / name for name in SEARCH_FILES)} <= set(files)
    return folder


@pytest.fixture(scope="module")
def captioner(site) -> OnnxCaptioner:
    return OnnxCaptioner.from_pretrained(site / "model", quantized=True, num_threads=1)


@pytest.fixture(scope="module")
def chromium():
    # A camera that shows a test pattern, without a question to the user.
    with drive.chromium("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream") as browser:
        yield browser


@pytest.fixture(scope="module")
def server(site):
    with drive.serving(site) as server:
        yield server


@pytest.fixture
def page(chromium, server):
    context = chromium.new_context(permissions=["clipboard-read", "clipboard-write"])
    errors = []
    context.on("weberror", lambda error: errors.append(str(error.error)))
    yield drive.open_page(context, server.url)
    context.close()
    assert not errors


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Images without loss, smaller and larger than the model's, so that both decode to the same bytes."""
    folder, sizes = tmp_path_factory.mktemp("images"), [(24, 24), (37, 29), (29, 37), (200, 90), (640, 481), (9, 7)]
    paths = [folder / f"{index} <b>&amp; 'x'.png" for index in range(len(sizes))]
    for seed, (path, size) in enumerate(zip(paths, sizes)):
        draw_picture(seed, size).save(path)
    return paths


@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_and_confidences_are_pythons(page, captioner, files, num_beams):
    page.select_option("#beams", str(num_beams))
    drive.show_all(page)
    worker = page.workers[0]
    worker.evaluate("""() => {
        const post = self.postMessage.bind(self);
        self.partials = [];
        self.postMessage = (message) => {
            if ("partial" in message) self.partials.push(message.partial);
            post(message);
        };
    }""")
    rows = drive.caption_files(page, files)
    partials = worker.evaluate("self.partials")
    assert len(partials) > 2 * len(files), "word by word"
    assert num_beams > 1 or all(any(row["caption"].startswith(part) for row in rows) for part in partials)
    expected = [row[0] for row in captioner([str(path) for path in files], num_beams=num_beams)]
    assert [row["file"] for row in rows] == [path.name for path in files]
    assert [row["caption"] for row in rows] == [caption.text for caption in expected]
    calibration = ConfidenceCalibration({"calibrations": [CALIBRATION]})
    confidences = [calibration(caption.score, caption.num_tokens, num_beams) for caption in expected]
    assert [row["confidence"] for row in rows] == pytest.approx(confidences, abs=0.01)
    assert page.locator("#rows h2").all_text_contents() == [path.name for path in files], "names are text"


def test_below_the_threshold_it_is_not_sure_until_asked_or_edited(page, files):
    drive.show_all(page)
    guess = drive.caption_files(page, files[0])[0]["caption"]
    page.locator("#threshold").evaluate("input => { input.value = 90; input.dispatchEvent(new Event('input')); }")
    text, state = page.locator("#rows textarea"), page.locator("#rows .state")
    assert text.input_value() == "" and state.text_content().startswith("Not sure: ")
    assert drive.download_rows(page)[0]["caption"] == ""
    page.click(".guess")
    assert text.input_value() == guess
    text.fill('He said "no" & left')
    page.click(".copy-alt")
    page.locator("#status", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == 'alt="He said &quot;no&quot; &amp; left"'
    with page.expect_download() as download:
        page.click("#csv")
    content = Path(download.value.path()).read_text(encoding="utf-8")
    (row,) = csv.DictReader(io.StringIO(content, newline=""))
    assert row["file"] == files[0].name and row["caption"] == 'He said "no" & left' and row["edited"] == "true"


def test_files_come_from_folders_drops_the_clipboard_and_the_camera(page, files, tmp_path):
    nested = tmp_path / "album" / "day"
    nested.mkdir(parents=True)
    for path in files[:3]:
        shutil.copy(path, nested / path.name)
    (nested / "notes.txt").write_text("no image")
    rows = drive.caption_files(page, tmp_path / "album", "#folder")
    assert sorted(row["file"] for row in rows) == [f"album/day/{path.name}" for path in files[:3]]
    assert "1 files left out: not images" in page.locator("#status").text_content()
    page.evaluate("""async () => {
        const canvas = Object.assign(document.createElement("canvas"), { width: 30, height: 30 });
        const blob = await new Promise((resolve) => canvas.toBlob(resolve));
        for (const [kind, Type, key] of [
            ["paste", ClipboardEvent, "clipboardData"],
            ["drop", DragEvent, "dataTransfer"],
        ]) {
            const data = new DataTransfer();
            data.items.add(new File([blob], `${kind}.png`, { type: "image/png" }));
            document.dispatchEvent(new Type(kind, { [key]: data, bubbles: true, cancelable: true }));
        }
    }""")
    page.click("#camera")
    page.locator("#video").evaluate(
        "video => new Promise(done => { if (video.videoWidth) done(); video.onplaying = done; })"
    )
    page.click("#shoot")
    page.locator("#rows li").nth(5).wait_for()
    drive.wait_until_done(page)
    names = [row["file"] for row in drive.download_rows(page)[3:]]
    assert names[:2] == ["paste.png", "drop.png"] and re.fullmatch(r"camera-[\dTZ-]+\.png", names[2])
    assert not any(row["error"] for row in drive.download_rows(page))


def test_unreadable_files_fail_alone_and_special_ones_look_as_in_python(page, captioner, files, tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "broken.png").write_bytes(files[0].read_bytes()[:40])
    Image.new("1", (60_000, 60_000)).save(tmp_path / "huge.png")
    failing = sorted(tmp_path.iterdir())
    # An animation's first frame, transparency over white, a rotation by EXIF.
    frames = [draw_picture(seed, (24, 24)) for seed in (11, 12)]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:], duration=100)
    clear = draw_picture(13, (24, 24)).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((24, 24)).point(lambda value: 255 * (value > 99)))
    clear.save(tmp_path / "transparent.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    draw_picture(14, (24, 48)).save(tmp_path / "rotated.png", exif=exif)
    special = [tmp_path / name for name in ("animated.gif", "transparent.png", "rotated.png")]
    page.select_option("#beams", "1")
    drive.show_all(page)
    rows = drive.caption_files(page, [*failing, *special, files[1]])
    assert [row["error"] for row in rows[: len(failing)]] == ["not an image that this browser can read"] * 4
    expected = [row[0].text for row in captioner([str(path) for path in (*special, files[1])], num_beams=1)]
    assert [row["caption"] for row in rows[len(failing) :]] == expected


def test_it_works_offline_and_with_threads_after_the_first_visit(site, chromium, captioner, files):
    context = chromium.new_context()
    with drive.serving(site) as server:
        page = drive.open_page(context, server.url)
        assert not page.evaluate("crossOriginIsolated")
        sizes = {path: path.stat().st_size for path in site.rglob("*") if path.is_file() and path.name != "README.md"}
        search = sum(sizes.pop(site / "model" / name) for name in SEARCH_FILES)
        once = sum(sizes.values())
        assert once <= server.num_bytes < 1.1 * once + 20_000, "files are sent once"
        before = server.num_bytes
        drive.caption_files(page, files[0])
        page.wait_for_function(STORED, arg=list(SEARCH_FILES))
        assert server.num_bytes == before + search, "the search's are sent after the first captions"
    # The server is gone.
    page.reload()
    page.locator("#beams").wait_for()
    assert page.evaluate("crossOriginIsolated")
    page.select_option("#beams", "1")
    drive.show_all(page)
    (row,) = drive.caption_files(page, files[1])
    assert row["caption"] == captioner(str(files[1]), num_beams=1)[0][0].text
    assert search_words(page, "a dog") == "1 photo, most similar to “a dog” first."
    context.close()


# Whether the service worker has stored these of the model's files.
STORED = """async (names) => {
    const found = await Promise.all(names.map((name) => caches.match(`model/${name}`)));
    return found.every(Boolean);
}"""


def search_words(page, query: str) -> str:
    """Types a query as a user does; returns what screen readers are told."""
    page.locator("#found").evaluate("found => { found.textContent = ''; }")
    page.get_by_label("Find photos by words").press_sequentially(query)
    page.locator("#found", has_text=re.compile("photo|failed")).wait_for()
    return page.locator("#found").text_content()


def test_words_sort_the_photos_by_pythons_similarity(page, site, files, tmp_path):
    names = [path.name for path in files]
    assert search_words(page, "dog") == "No photos to search yet."
    # They are sorted as they come, the unreadable one last.
    (tmp_path / "bad.png").touch()
    drive.caption_files(page, [tmp_path / "bad.png", *files])
    python = OnnxRuntimeCaptioner(CaptionOptions(str(site / "model"), quantized=True, num_threads=1))
    images = np.stack([found.embedding for found in python.embed_for_texts([str(path) for path in files])])
    orders = []
    for query in ("dog", "a woman reading", "two men"):
        page.fill("#query", "")
        assert search_words(page, query) == f"{len(files)} photos, most similar to “{query}” first."
        scores = images @ python.embed_texts([query])[0]
        order = [names[index] for index in (-scores).argsort()]
        assert page.locator("#rows h2").all_text_contents() == [*order, "bad.png"]
        shown = [text.partition("Similarity: ")[2] for text in page.locator("#rows .state").all_text_contents()]
        assert list(map(float, shown[:-1])) == pytest.approx(sorted(scores, reverse=True), abs=2e-3)
        orders.append(tuple(order))
    assert len(set(orders)) > 1, "the words matter"
    page.fill("#query", "  ")
    page.locator("#found", has_text=re.compile("^$")).wait_for(state="attached")
    assert page.locator("#rows h2").all_text_contents() == ["bad.png", *names]
    assert [row["file"] for row in drive.download_rows(page)] == ["bad.png", *names]


# The similarities of texts to images of given embeddings, by a worker of its own.
SIMILARITIES = """async ([texts, images]) => {
    const worker = new Worker("captioner.js", { type: "module" });
    const embeddings = images.map((image) => Float32Array.from(image));
    return Promise.all(texts.map((query) => new Promise((resolve) => {
        const { port1, port2 } = new MessageChannel();
        port1.onmessage = ({ data }) => resolve(data.scores ?? data.error);
        worker.postMessage({ query, embeddings }, [port2]);
    })));
}"""


def test_texts_are_embedded_as_in_python_whatever_is_typed(page, captioner):
    texts = [
        "a dog",
        "A Dog!",
        " ",
        "",
        "zyxwv qqq",
        "two men " * 40,
        "<s> </s> <unk>",
        "Hündchen 狗 🐕‍🦺 e\u0301 \u0000 \ufeff",
    ]
    # Where images are the axes, the cosines are the embedding.
    found = np.array(page.evaluate(SIMILARITIES, [texts, np.eye(10).tolist()]))
    expected = captioner.get_text_features(texts)
    assert expected.shape == (len(texts), 10) and (found * expected).sum(axis=1) == pytest.approx(1, abs=1e-4)
    projection = captioner.visual_projection
    images = np.random.default_rng(4).normal(size=(5, 14))
    found = np.array(page.evaluate(SIMILARITIES, [texts, images.tolist()]))
    projected = images @ projection.T
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    assert found == pytest.approx(expected @ projected.T, abs=1e-3)


def test_another_exports_text_encoder_isnt_used_and_none_shows_no_search(chromium, site, files, tmp_path):
    other = Path(shutil.copytree(site, tmp_path / "site"))
    (other / "model" / SEARCH_FILES[0]).write_bytes(b"another")
    with drive.serving(other) as server:
        page = drive.open_page(chromium.new_context(), server.url)
        drive.caption_files(page, files[0])
        assert search_words(page, "a dog").startswith("The search failed: ")
        page.context.close()
    config = json.loads((other / "model/config.json").read_text())
    del config["text_encoder_config"]
    (other / "model/config.json").write_text(json.dumps(config))
    with drive.serving(other) as server:
        page = drive.open_page(chromium.new_context(), server.url)
        drive.caption_files(page, files[0])
        assert not page.locator("#query").is_visible()
        page.context.close()


def test_the_page_and_its_workers_connect_to_no_other_host(page, site):
    policy = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    headers = page.evaluate("fetch('captioner.js').then((found) => Object.fromEntries(found.headers))")
    assert headers["content-security-policy"] == policy
    with drive.serving(site) as other:
        for place in (other.url, other.url.replace("127.0.0.1", "localhost")):
            assert (
                page.evaluate("place => fetch(place, { mode: 'no-cors' }).then(() => 'sent', () => 'blocked')", place)
                == "blocked"
            )
            worker = page.workers[0]
            assert (
                worker.evaluate("place => fetch(place, { mode: 'no-cors' }).then(() => 'sent', () => 'blocked')", place)
                == "blocked"
            )
        assert other.num_bytes == 0


def test_a_stopped_list_goes_on_and_memory_stays_flat(chromium, page, tmp_path):
    draw_picture(3, (1200, 900)).save(tmp_path / "photo.jpg")
    names = [tmp_path / f"{index:03}.jpg" for index in range(200)]
    for name in names:
        os.link(tmp_path / "photo.jpg", name)
    page.select_option("#beams", "1")
    drive.caption_files(page, names[:40])
    before = renderer_memory_mb(chromium)
    page.set_input_files("#files", names[40:])
    page.click("#stop")
    page.locator("#status", has_text="stopped").wait_for()
    page.locator("#rows li[aria-busy=true]").wait_for(state="detached")
    done = page.locator("#status").text_content()
    page.wait_for_timeout(300)
    assert page.locator("#status").text_content() == done and "200 of 200" not in done
    page.click("#stop")
    drive.wait_until_done(page)
    assert "200 of 200 photos captioned." == page.locator("#status").text_content()
    # Keeping the pixels of each would add 160 times 4 MB.
    assert renderer_memory_mb(chromium) - before < 150


def renderer_memory_mb(chromium) -> float:
    found = chromium.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    pids = [str(process["id"]) for process in found if process["type"] == "renderer"]
    return sum(map(int, subprocess.check_output(["ps", "-o", "rss=", "-p", ",".join(pids)], text=True).split())) / 1024


def test_every_control_has_a_name_and_takes_the_keyboard(page, files):
    drive.caption_files(page, files[:2])
    assert page.get_by_role("search").get_by_role("status").count() == 1
    unnamed = page.evaluate("""() => {
        const controls = [...document.querySelectorAll("button, input, select, textarea, img, progress")];
        const named = (each) => each.ariaLabel || each.textContent.trim() || each.labels?.length || each.alt;
        return controls.filter((each) => each.checkVisibility() && !named(each)).map((each) => each.outerHTML);
    }""")
    assert unnamed == []
    page.focus("#files")
    reached = []
    for _ in range(12):
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    assert reached[:9] == ["files", "folder", "camera", "beams", "threshold", "query", "csv", "json", "clear"]
    assert "TEXTAREA" in reached
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") == 360, "fits a phone"
