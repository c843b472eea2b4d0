"""`tinycap search`: the index follows the folder, and the answer has every form."""

import csv
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from tiny import draw_picture

from tinycap.commands import BAD_IMAGES, BAD_OUTPUT, DONE
from tinycap.deploy.captioners import CaptionOptions, TorchCaptioner
from tinycap.deploy.cli import main
from tinycap.deploy.outputs import lock


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for number in range(5):
        draw_picture(number).save(folder / f"{number}.png")
    draw_picture(9).save(folder / "trip/nine.png")
    return folder


def search(capsys, model, *words) -> tuple[list[dict], str]:
    """The rows that a search prints as JSON, and what it says on standard error."""
    assert main(["search", *map(str, words), "--model", str(model), "--format", "json"]) == DONE
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_a_query_finds_images_by_their_cosine_with_its_embedding(text_repository, photos, capsys):
    rows, _ = search(capsys, text_repository, "a dog on the grass", photos, "--number", 4)
    captioner = TorchCaptioner(CaptionOptions(str(text_repository)))
    query = captioner.embed_texts(["a dog on the grass"])[0]
    expected = {result.image: float(result.embedding @ query) for result in captioner.embed(paths_of(photos))}
    best = sorted(expected, key=expected.get, reverse=True)[:4]
    assert [row["image"] for row in rows] == best
    assert [row["score"] for row in rows] == pytest.approx([expected[path] for path in best], abs=1e-3)
    assert [row["caption"] for row in rows] == [result.captions[0] for result in captioner(best)]


def test_capitals_dont_matter(text_repository, photos, capsys):
    lower, mixed = (search(capsys, text_repository, words, photos)[0] for words in ("a red dog", "A RED Dog"))
    assert lower == mixed and lower


def test_words_that_captions_hardly_have_are_counted(text_repository, photos, capsys):
    _, said = search(capsys, text_repository, "A, in zxqv!", photos, "--no-captions")
    assert "1 of 3 words are hardly known, so that scores mean little: zxqv" in said
    _, said = search(capsys, text_repository, "in a", photos, "--no-captions")
    assert "hardly known" not in said


def test_a_query_that_is_too_long_is_an_error_before_images_are_embedded(text_repository, photos, capsys):
    words = ["search", "a dog " * 60, str(photos), "--model", str(text_repository)]
    assert main(words) == 2
    assert re.search(r"query: expected fewer than 17 tokens, got \d+", capsys.readouterr().err)
    assert not (photos.parent / "photos.tinycap-index").exists()


def paths_of(folder) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*.png"))


def test_paths_are_shown_as_the_folder_was_given(text_repository, photos, capsys, monkeypatch):
    monkeypatch.chdir(photos.parent)
    rows, _ = search(capsys, text_repository, "--like", "photos/2.png", "photos/")
    assert sorted(row["image"] for row in rows) == [
        f"photos/{name}" for name in ("0.png", "1.png", "3.png", "4.png", "trip/nine.png")
    ]
    monkeypatch.chdir(photos)
    rows, said = search(capsys, text_repository, "--like", "2.png", ".", "--number", 1)
    assert rows[0]["image"] in ("0.png", "1.png", "3.png", "4.png", "trip/nine.png") and said == ""


def test_only_what_changed_is_embedded_again(text_repository, photos, capsys, monkeypatch):
    search(capsys, text_repository, "a dog", photos)
    embedded = []
    embed = TorchCaptioner.embed
    monkeypatch.setattr(TorchCaptioner, "embed", lambda self, images: embedded.extend(images) or embed(self, images))
    search(capsys, text_repository, "a street", photos)
    assert embedded == []
    draw_picture(11).save(photos / "new.png")
    (photos / "3.png").unlink()
    rows, said = search(capsys, text_repository, "a street", photos)
    assert embedded == [str(photos / "new.png")]
    assert "1 images added, 1 left, 6 in all" in said
    assert str(photos / "3.png") not in [row["image"] for row in rows]
    search(capsys, text_repository, "a street", photos, "--overwrite")
    assert len(embedded) == 7


def test_an_index_is_used_as_it_is_without_refresh(text_repository, photos, capsys):
    search(capsys, text_repository, "a dog", photos)
    draw_picture(12).save(photos / "new.png")
    rows, _ = search(capsys, text_repository, "a dog", photos, "--no-refresh", "--no-captions")
    assert len(rows) == 6 and set(rows[0]) == {"score", "image"}


def test_two_processes_dont_write_one_index(text_repository, photos, capsys):
    folder = photos.parent / "photos.tinycap-index"
    search(capsys, text_repository, "a dog", photos)
    held = lock(folder / "index.sqlite")
    assert main(["search", "a dog", str(photos), "--model", str(text_repository)]) == BAD_OUTPUT
    assert "another process is writing" in capsys.readouterr().err
    assert len(search(capsys, text_repository, "a dog", photos, "--no-refresh")[0]) == 6
    held.close()


def test_an_index_that_isnt_there_is_named_without_refresh(text_repository, photos, capsys):
    assert main(["search", "a dog", str(photos), "--model", str(text_repository), "--no-refresh"]) == 2
    assert "expected an index in" in capsys.readouterr().err
    assert not (photos.parent / "photos.tinycap-index").exists()


def test_like_leaves_the_image_itself_out(text_repository, photos, capsys):
    shutil.copy(photos / "2.png", photos / "copy.png")
    rows, _ = search(capsys, text_repository, "--like", photos / "2.png", photos, "--number", 3)
    assert rows[0]["image"] == str(photos / "copy.png") and rows[0]["score"] == pytest.approx(1, abs=1e-3)
    assert str(photos / "2.png") not in [row["image"] for row in rows]


def test_duplicates_are_shown_by_group(text_repository, photos, capsys):
    rows, said = search(capsys, text_repository, "--duplicates", photos, "--threshold", "0.99999")
    assert rows == [] and "no two of 6 images have a cosine of 0.99999 or more" in said
    shutil.copy(photos / "2.png", photos / "copy.png")
    rows, _ = search(capsys, text_repository, "--duplicates", photos, "--threshold", "0.99999")
    assert rows == [{"group": 1, "image": str(photos / "2.png")}, {"group": 1, "image": str(photos / "copy.png")}]


def test_tsv_and_text_have_a_line_an_image(text_repository, photos, capsys):
    options = ["--model", str(text_repository), "--number", "2", "--quiet"]
    assert main(["search", "a dog", str(photos), *options, "--format", "tsv"]) == DONE
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out), dialect="excel-tab"))
    assert main(["search", "a dog", str(photos), *options]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [[row["score"], row["image"]] for row in rows]


def test_the_page_shows_thumbnails_and_runs_no_file_name(text_repository, photos, tmp_path):
    os.rename(photos / "1.png", photos / "<img src=x onerror=alert(1)>.png")
    os.rename(photos / "2.png", os.fsencode(photos) + b"/\xff.png")
    page = tmp_path / "found.html"
    options = ["--model", str(text_repository), "--format", "html", "--output", str(page), "--quiet"]
    assert main(["search", "<script>q", str(photos), *options]) == DONE
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r'<img src="data:image/jpeg;base64,[A-Za-z0-9+/=]{200,}"', text)) == 6
    assert "<script" not in text and "<img src=x" not in text and "default-src 'none'" in text


@pytest.mark.parametrize(
    "words, message",
    [
        (["  ", "{photos}"], "expected a query"),
        (["a dog"], "expected images"),
        (["a dog", "{photos}/0.png", "{photos}/1.png"], "expected one existing folder of images, or --index"),
        (["a dog", "{photos}/nothing-here"], "--index"),
        (["--like", "{photos}/none.png", "{photos}"], "--like"),
        (["a dog", "{photos}", "--model", "{plain}"], "text encoder"),
    ],
)
def test_what_is_missing_is_named(text_repository, repository, photos, capsys, words, message):
    words = [word.format(photos=photos, plain=repository) for word in words]
    model = [] if "--model" in words else ["--model", str(text_repository)]
    assert main(["search", *words, *model]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_without_texts_finds_likes_but_not_another_ones_index(text_repository, repository, photos, capsys):
    rows, _ = search(capsys, repository, "--like", photos / "2.png", photos)
    assert len(rows) == 5
    assert main(["search", "a dog", str(photos), "--model", str(text_repository)]) == 2
    assert "expected model torch-" in capsys.readouterr().err


def test_unreadable_images_are_named_once_and_cost_nothing_else(text_repository, photos, capsys):
    (photos / "broken.png").write_bytes(b"no image")
    command = ["search", "a dog", str(photos), "--model", str(text_repository), "--format", "json"]
    assert main(command) == BAD_IMAGES
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == 6 and "broken.png" in printed.err
    assert main(command) == DONE


@pytest.mark.slow
def test_onnx_finds_what_torch_finds_and_keeps_its_own_index(
    patches_repository, exported_patches, photos, tmp_path, capsys
):
    capsys.readouterr()
    expected, _ = search(capsys, patches_repository, "a dog", photos, "--no-captions")
    options = ["--backend", "onnx", "--index", tmp_path / "other", "--no-captions"]
    rows, _ = search(capsys, exported_patches, "a dog", photos, *options)
    assert [row["image"] for row in rows] == [row["image"] for row in expected]
    np.testing.assert_allclose([row["score"] for row in rows], [row["score"] for row in expected], atol=2e-3)
    options[3] = tmp_path / "int8"
    rows, _ = search(capsys, exported_patches, "a dog", photos, *options, "--quantized")
    scores = {row["image"]: row["score"] for row in expected}
    assert max(abs(row["score"] - scores[row["image"]]) for row in rows) < 0.1
    assert main(["search", "a dog", str(photos), "--model", str(exported_patches), "--backend", "onnx"]) == 2
