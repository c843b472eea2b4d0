"""`tinycap caption` and `tinycap embed` as called by a user, on the tiny repository."""

import copy
import csv
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh import Process
from safetensors import safe_open
from tiny import draw_picture
from transformers import pipeline

from tinycap import REPOSITORY
from tinycap.deploy import captioners, cli
from tinycap.deploy.captioners import CaptionOptions, ImageResult
from tinycap.deploy.inputs import list_images, read_ahead
from tinycap.deploy.outputs import CaptionRows, RowFile, Sidecars, alt_attribute
from tinycap.training.repository import load_repository


NAMES = ["a.png", "b.png", "c.png", "deep/d.png", "deep/e.png"]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of five images, the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        draw_picture(seed).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.md").write_text("no picture")
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def expected(repository):
    """The pipeline's captions of the images."""
    captioner = pipeline("image-to-text", model=str(repository), trust_remote_code=True)
    captions = [captioner(draw_picture(seed))[0]["generated_text"] for seed in range(len(NAMES))]
    assert len(set(captions)) > 1
    return {f"photos/{name}": caption for name, caption in zip(NAMES, captions)}


@pytest.fixture(scope="module")
def loaded(repository):
    """Model, tokenizer, image processor and the model's own generation settings."""
    parts = load_repository(str(repository))
    return *parts, copy.deepcopy(parts[0].generation_config)


@pytest.fixture
def run(repository, loaded, monkeypatch):
    """The command line on the tiny repository, which is read from disk only once."""
    model, tokenizer, image_processor, config = loaded

    def load(*_):
        # All that a pipeline changes.
        model.generation_config = copy.deepcopy(config)
        return model, tokenizer, image_processor

    monkeypatch.setattr("tinycap.training.repository.load_repository", load)

    def run(*arguments) -> int:
        return cli.main([*map(str, arguments), "--model", str(repository)])

    return run


def read_rows(path) -> list[dict]:
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    return [json.loads(line) for line in text.splitlines()]


def test_a_photo_gives_its_caption_and_nothing_else(run, photos, expected, capsys):
    assert run("caption", "photos/b.png") == 0
    assert capsys.readouterr().out == expected["photos/b.png"] + "\n"


def test_several_photos_give_lines_of_name_and_caption_in_order(run, photos, expected, capsys, monkeypatch):
    lines = "".join(f"{image}\t{caption}\n" for image, caption in expected.items())
    assert run("caption", "photos", "--batch-size", "2", "--quiet") == 0
    assert capsys.readouterr().out == lines
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(expected) + "\n\n"))
    assert run("caption", "-", "photos/a.png", "--quiet") == 0
    assert capsys.readouterr().out == lines, "each once"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_bad_files_are_named_and_the_others_get_their_captions(run, photos, expected, tmp_path, capsys, kind):
    (photos / "bad.jpg").write_bytes(b"\xff\xd8 no picture")
    output = tmp_path / f"captions.{kind}"
    assert run("caption", "photos", "photos/nowhere.png", "--output", output, "--batch-size", "3") == 1
    rows = {row["image"]: row for row in read_rows(output)}
    assert {image: row["caption"] for image, row in rows.items() if not row.get("error")} == expected
    errors = capsys.readouterr().err
    for image in ("photos/bad.jpg", "photos/nowhere.png"):
        assert image in errors and image in rows[image]["error"] and not rows[image]["caption"]
    assert "5 of 7 images done, 2 could not be read" in errors


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_stopped_run_goes_on_after_the_last_whole_row(run, photos, expected, tmp_path, kind):
    (photos / "b.png").rename(tmp_path / "later.png")
    (photos / "b.png").write_bytes(b"not yet copied")
    output = tmp_path / f"captions.{kind}"
    assert run("caption", "photos", "--output", output) == 1
    whole = output.read_text()
    kept = whole[: whole.index("photos/deep/e.png")].rsplit("\n", 1)[0] + "\n"
    # A file as after a kill, with a caption that shows that its row wasn't written again.
    kept = kept.replace(expected["photos/a.png"], "as it was", 1)
    output.write_text(kept + whole[len(kept) : len(kept) + 9])
    (tmp_path / "later.png").rename(photos / "b.png")
    assert run("caption", "photos", "--output", output) == 0
    rows = {row["image"]: row["caption"] for row in read_rows(output)}
    assert rows == expected | {"photos/a.png": "as it was"}
    assert len(read_rows(output)) == len(expected)
    before = output.read_bytes()
    assert run("caption", "photos", "--output", output) == 0
    assert output.read_bytes() == before
    assert run("caption", "photos", "--output", output, "--overwrite") == 0
    assert {row["image"]: row["caption"] for row in read_rows(output)} == expected


def test_what_was_found_before_an_interruption_is_kept(run, photos, expected, tmp_path, monkeypatch, capsys):
    class Interrupted:
        def __init__(self, options):
            pass

        def __call__(self, images):
            yield from (ImageResult(image, [expected[image]]) for image in images[:3])
            raise KeyboardInterrupt

    output = tmp_path / "captions.jsonl"
    with monkeypatch.context() as patch:
        patch.setitem(cli.BACKENDS, "torch", Interrupted)
        assert run("caption", "photos", "--output", output, "--batch-size", "2") == 130
    assert len(read_rows(output)) == 3 and "goes on from here" in capsys.readouterr().err
    assert run("caption", "photos", "--output", output) == 0
    assert {row["image"]: row["caption"] for row in read_rows(output)} == expected


def test_another_programs_file_is_left_as_it_is(run, photos, tmp_path, capsys):
    for name, content, words in (
        ("mine.jsonl", '{"picture": "x"}\n{"image": "y"}\n', "line 1"),
        ("mine.jsonl", '{"image": ["x"]}\n', "line 1"),
        ("mine.csv", "name,text\nx,y\n", "columns"),
    ):
        (tmp_path / name).write_text(content)
        assert run("caption", "photos", "--output", tmp_path / name) == 2
        assert words in capsys.readouterr().err and (tmp_path / name).read_text() == content
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_two_shards_together_hold_each_image_once(run, photos, expected, tmp_path, kind):
    (photos / "bad.jpg").write_bytes(b"no picture")
    for shard in ("1/2", "2/2"):
        run("caption", "photos", "--output", tmp_path / f"captions.{kind}", "--shard", shard)
    paths = [tmp_path / f"captions.{number}-of-2.{kind}" for number in (1, 2)]
    rows = [row for path in paths for row in read_rows(path)]
    assert sorted(row["image"] for row in rows) == sorted([*expected, "photos/bad.jpg"])
    assert {row["image"]: row["caption"] for row in rows if not row.get("error")} == expected
    assert all(read_rows(path) for path in paths)
    assert sorted(tmp_path.glob(f"*.{kind}")) == paths
    joined = {"jsonl": "cat captions.*-of-2.jsonl", "csv": "awk 'FNR > 1 || NR == 1' captions.*-of-2.csv"}[kind]
    text = (cli.REPOSITORY / "docs" / "command_line.md").read_text(encoding="utf-8")
    assert joined.replace("-of-2", "-of-8") in text
    (tmp_path / f"all.{kind}").write_bytes(subprocess.check_output(joined, shell=True))
    assert read_rows(tmp_path / f"all.{kind}") == rows


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_shard_resumes_and_takes_its_share_of_new_images(run, photos, expected, tmp_path, kind):
    flags = ("--output", tmp_path / f"captions.{kind}", "--shard")
    whole = {shard: tmp_path / f"captions.{shard[0]}-of-2.{kind}" for shard in ("1/2", "2/2")}
    for shard, path in whole.items():
        assert run("caption", "photos", *flags, shard) == 0
        # As after a kill.
        path.write_bytes(path.read_bytes()[:-3])
    for name in "fghijk":
        draw_picture(0).save(photos / f"{name}.png")
    for shard in whole:
        assert run("caption", "photos", *flags, shard) == 0
    names = sorted(row["image"] for path in whole.values() for row in read_rows(path))
    assert names == sorted([*expected, *(f"photos/{name}.png" for name in "fghijk")])


def test_shards_on_the_screen_and_of_sidecars_hold_each_image_once(run, photos, expected, capsys):
    for number in (1, 2, 3):
        assert run("caption", "photos", "--quiet", "--shard", f"{number}/3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == sorted(f"{image}\t{caption}" for image, caption in expected.items())
    assert run("caption", "photos/a.png", "--output", "c.csv", "--shard", "9/12") == 0
    assert run("caption", "photos/a.png", "--output", "c.csv", "--shard", "12/12") == 0
    assert len(list(photos.parent.glob("c.??-of-12.csv"))) == 2, "names sort, also those of empty shards"
    draw_picture(0).save(photos / "a.bmp")
    assert run("caption", "photos", "--sidecar", "--shard", "1/2") == 2, "a.png may be another shard's"


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1/0", "1", "a/b", "-1/2", "1/2/3"])
def test_a_shard_that_makes_no_sense_is_an_error(run, photos, capsys, shard):
    with pytest.raises(SystemExit, match="2"):
        run("caption", "photos", f"--shard={shard}")
    assert f"expected K/N with K from 1 to N, such as 3/8, got {shard}" in capsys.readouterr().err


def test_processes_of_a_launcher_do_not_write_one_file(run, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("caption", "photos", "--output", tmp_path / "c.jsonl") == 2
    assert "--shard K/N" in capsys.readouterr().err and not list(tmp_path.glob("*.jsonl"))
    assert run("caption", "photos", "--output", tmp_path / "c.jsonl", "--shard", "1/2") == 0


def test_a_text_file_beside_each_photo_and_those_that_are_there_left_alone(run, photos, expected):
    (photos / "a.txt").write_text("somebody's own words\n")
    (photos / "bad.jpg").write_bytes(b"no picture")
    assert run("caption", "photos", "--sidecar") == 1
    assert (photos / "a.txt").read_text() == "somebody's own words\n"
    assert (photos / "deep" / "d.txt").read_text() == expected["photos/deep/d.png"] + "\n"
    assert not (photos / "bad.txt").exists()
    (photos / "bad.jpg").unlink()
    assert run("caption", "photos", "--sidecar", "--overwrite", "--format", "alt") == 0
    assert (photos / "a.txt").read_text() == alt_attribute(expected["photos/a.png"]) + "\n"


def test_photos_that_would_share_a_text_file_are_an_error_that_names_both(run, photos, capsys):
    draw_picture(0).save(photos / "a.bmp")
    assert run("caption", "photos", "--sidecar") == 2
    errors = capsys.readouterr().err
    assert "photos/a.png" in errors and "photos/a.bmp" in errors
    assert not list(photos.glob("*.txt"))
    with pytest.raises(ValueError, match="http://x/y.png"):
        Sidecars(["http://x/y.png"], "text")


def test_no_caption_is_written_over_an_image(run, photos, capsys):
    """A JPEG may be called `photo.txt`."""
    shutil.copy(photos / "a.png", photos / "photo.txt")
    shutil.copy(photos / "a.png", photos / "photo.png")
    content = (photos / "photo.txt").read_bytes()
    for images in (["photos/photo.txt"], ["photos/photo.png", photos / "photo.txt"]):
        assert run("caption", *images, "--sidecar", "--overwrite") == 2
        assert "photo.txt" in capsys.readouterr().err and (photos / "photo.txt").read_bytes() == content
    with pytest.raises(ValueError, match="would be written"):
        Sidecars(["photos/a.png", str(photos / "a.jpg")], "text")


def test_an_alt_attribute_says_the_caption_whatever_is_in_it():
    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append(attributes)

    caption = 'He said "A & B" <b>, it\'s &amp; 5" wide >'
    Reader().feed(f"<img {alt_attribute(caption)}>")
    assert seen == [[("alt", caption)]]


def test_alt_on_the_screen_and_in_rows(run, photos, expected, tmp_path, capsys):
    assert run("caption", "photos/a.png", "--format", "alt") == 0
    assert capsys.readouterr().out == alt_attribute(expected["photos/a.png"]) + "\n"
    assert run("caption", "photos", "--format", "alt", "--output", tmp_path / "c.csv") == 0
    assert {row["alt"] for row in read_rows(tmp_path / "c.csv")} == set(map(alt_attribute, expected.values()))


def test_several_captions_of_a_photo_the_best_first(run, repository, photos, tmp_path, capsys):
    captioner = pipeline("image-to-text", model=str(repository), trust_remote_code=True)
    best = [entry["generated_text"] for entry in captioner("photos/c.png", num_beams=4, num_return_sequences=3)]
    flags = ("--num-beams", 4, "--num-captions", 3)
    assert run("caption", "photos/c.png", *flags) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == best
    assert run("caption", "photos/c.png", *flags, "--format", "jsonl") == 0
    row = json.loads(capsys.readouterr().out)
    assert [row["caption"], *row["alternatives"]] == best
    assert run("caption", "photos/c.png", *flags, "--format", "csv") == 0
    row = next(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["caption"], row["caption_2"], row["caption_3"]] == best
    assert run("caption", "photos/c.png", "--num-captions", 3) == 2
    assert "--num-captions" in capsys.readouterr().err


def test_a_caption_below_the_confidence_is_no_caption(repository, photos, expected, tmp_path, capsys):
    model = shutil.copytree(repository, tmp_path / "model")
    assert cli.main(["caption", "photos", "--confidence", "--model", str(model)]) == 2
    assert "confidence.json" in capsys.readouterr().err
    # A confidence that depends on the length alone, independent of the model's probabilities.
    coefficients = {"mean_log_prob": 0.0, "num_tokens": 1.0}
    calibration = {"num_beams": 1, "intercept": -9.0, "coefficients": coefficients}
    (model / "confidence.json").write_text(json.dumps({"calibrations": [calibration]}))
    flags = ["--model", str(model), "--output", str(tmp_path / "c.jsonl")]
    assert cli.main(["caption", "photos", "--min-confidence", "0.4", *flags, "--max-new-tokens", "9"]) == 0
    rows = read_rows(tmp_path / "c.jsonl")
    assert all((row["caption"] is None) == (row["confidence"] < 0.4) for row in rows)
    # Captions of nine tokens get 0.5, shorter ones less than 0.3.
    assert {round(row["confidence"], 2) for row in rows} >= {0.5}
    capsys.readouterr()
    assert cli.main(["caption", "photos", "--min-confidence", "0.51", "--model", str(model), "--confidence"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == "photos/a.png\t0.50\t"
    number = len(rows)
    assert f"{number} of {number} images done, {number} without a caption: below --min-confidence" in shown.err


def test_embeddings_are_the_models_with_the_id_of_each(run, repository, photos, tmp_path):
    (photos / "bad.jpg").write_bytes(b"no picture")
    assert run("embed", "photos", "--output", tmp_path / "e.safetensors", "--batch-size", 2) == 1
    with safe_open(tmp_path / "e.safetensors", "np") as file:
        embeds, ids = file.get_tensor("image_embeds"), json.loads(file.metadata()["ids"])
    assert ids == [f"photos/{name}" for name in NAMES] and embeds.shape == (5, 14)
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, rtol=1e-5)
    captioner = pipeline("image-to-text", model=str(repository), trust_remote_code=True)
    pixels = captioner.preprocess(str(photos / "c.png"))["pixel_values"]
    np.testing.assert_allclose(
        embeds[2], captioner.model.get_image_features(pixels).pooler_output[0].detach().numpy(), atol=1e-5
    )
    assert run("embed", "photos/c.png", "photos/a.png", "--output", tmp_path / "e.npy") == 0
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), embeds[[2, 0]], atol=1e-5)
    assert json.loads((tmp_path / "e.ids.json").read_text()) == ["photos/c.png", "photos/a.png"]
    assert run("embed", "photos/c.png", "--output", tmp_path / "e.npy") == 2, "it is there"


class SmallDisk:
    """Limits the size of files in the block, in bytes."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *args):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_embeddings_of_a_stopped_run_are_kept(run, photos, tmp_path, monkeypatch, capsys):
    assert run("embed", "photos", "--output", "whole.npy") == 0
    embed, embedded = captioners.TorchCaptioner.embed, []

    def interrupted(self, images):
        for number, result in enumerate(embed(self, images)):
            if number == 3 and not embedded:
                raise KeyboardInterrupt
            yield result

    def counted(self, images):
        embedded.extend(images)
        return embed(self, images)

    flags = ("embed", "photos", "--output", "new/folder/e.npy", "--batch-size", 2)
    for stop, status in ((interrupted, 130), (counted, 0)):
        monkeypatch.setattr(captioners.TorchCaptioner, "embed", stop)
        assert run(*flags) == status
    assert embedded == [f"photos/{name}" for name in NAMES[3:]]
    np.testing.assert_allclose(np.load("new/folder/e.npy"), np.load("whole.npy"), atol=1e-6)
    assert sorted(path.name for path in Path("new/folder").iterdir()) == ["e.ids.json", "e.npy"]
    assert run(*flags) == 2 and "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["e.npy", "e.safetensors"])
def test_embeddings_on_a_full_disk_are_kept(run, photos, tmp_path, capsys, name):
    draw_picture(9).save(photos / "z.png")
    for size in (400, 800):
        with SmallDisk(size):
            assert run("embed", "photos", "--output", name, "--batch-size", 1) == 3
        line = capsys.readouterr().err.splitlines()[-1]
        assert "cannot write" in line and name in line and "File too large" in line
        assert not Path(name).exists()
    assert run("embed", "photos", "--output", name) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"photos", name} | (
        {"e.ids.json"} if name == "e.npy" else set()
    )


def test_embeddings_of_two_models_are_not_mixed(run, repository, photos, tmp_path, capsys):
    model = shutil.copytree(repository, tmp_path / "model")
    with SmallDisk(400):
        assert run("embed", "photos", "--output", "e.npy", "--batch-size", 1) == 3
    assert cli.main(["embed", "photos", "--output", "e.npy", "--model", str(model)]) == 2
    assert "expected rows with embeddings by" in capsys.readouterr().err
    assert cli.main(["embed", "photos", "--output", "e.npy", "--model", str(model), "--overwrite"]) == 0


def test_patterns_hidden_files_and_what_is_not_there(photos):
    (photos / ".hidden").mkdir()
    draw_picture(0).save(photos / ".hidden" / "x.png")
    draw_picture(0).save(photos / "._a.png")
    assert list_images(["photos"]) == [f"photos/{name}" for name in NAMES]
    assert list_images(["photos/**/*.png"]) == [f"photos/{name}" for name in NAMES]
    assert list_images(["photos/[ab].png", "photos/a.png", "gone.png", "https://x/y"]) == [
        *("photos/a.png", "photos/b.png", "gone.png", "https://x/y")
    ]
    draw_picture(0).save(photos / "what [is] it?.png")
    assert list_images(["photos/what [is] it?.png"]) == ["photos/what [is] it?.png"], "a file is no pattern"
    for entry in ("photos/*.gif", ".git*"):
        with pytest.raises(ValueError, match="expected images"):
            list_images([entry])


def test_what_a_folder_holds_beyond_images_is_counted_and_named(run, photos, expected, tmp_path, capsys):
    (photos / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    for name in ("film.MOV", "deep/film.mov", "deep/edit.aae", "LICENSE", ".hidden"):
        (photos / name).touch()
    draw_picture(0).save(tmp_path / "elsewhere.png")
    (photos / "link").symlink_to(tmp_path)
    output = tmp_path / "c.jsonl"
    assert run("caption", "photos", "photos/[cd]*", "--output", output) == 1, "HEIC is an image"
    errors = capsys.readouterr().err
    left_out = "left out: 5 file(s) of other kinds (.aae, .md, .mov, no ending); 1 hidden; "
    assert f"{left_out}1 linked folder(s), not followed: photos/link; 1 folder(s) that match a pattern" in errors
    assert "photos/deep" in errors and "IMG_0001.HEIC: " in errors
    rows = {row["image"]: row["caption"] for row in read_rows(output)}
    assert rows == expected | {"photos/IMG_0001.HEIC": None}
    (photos / "IMG_0001.HEIC").unlink()
    assert run("caption", "photos", "--output", output, "--overwrite", "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_read_is_named_and_a_failure(run, photos, expected, capsys, monkeypatch):
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert run("caption", "photos", "--quiet") == 1
    out, errors = capsys.readouterr()
    assert "1 folder(s) that can't be read: photos/deep (Permission denied)" in errors
    assert len(out.splitlines()) == 3
    assert run("embed", "photos", "--output", "e.npy", "--quiet") == 1
    with pytest.raises(ValueError, match=r"photos/deep: .* can't be read: photos/deep"):
        list_images(["photos/deep"])


def test_a_folder_without_images_is_an_error_that_says_what_it_holds(tmp_path):
    (tmp_path / "film.mov").touch()
    with pytest.raises(ValueError, match=r"got none; left out: 1 file\(s\) of other kinds \(.mov\)"):
        list_images([str(tmp_path)])


def test_brackets_of_names_that_exist_are_no_pattern(photos, tmp_path):
    trip = tmp_path / "trip [2020]"
    (trip / "day [1]").mkdir(parents=True)
    (tmp_path / "trip 2").mkdir()
    for name in ("a.png", "[b].png", "day [1]/c.png"):
        draw_picture(0).save(trip / name)
    draw_picture(0).save(tmp_path / "trip 2" / "a.png")
    assert list_images(["trip [2020]/*.png"]) == ["trip [2020]/[b].png", "trip [2020]/a.png"]
    assert list_images([f"{trip}/day [1]/*"]) == [f"{trip}/day [1]/c.png"]
    assert list_images(["tri*/day [1]/*.png"]) == ["trip [2020]/day [1]/c.png"]
    assert list_images(["trip [0-9]/*.png"]) == ["trip 2/a.png"], "a pattern where there is no such name"
    assert list_images(["trip [2020]/gone.png", "photos/a.png"]) == ["trip [2020]/gone.png", "photos/a.png"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_lists_are_read_as_windows_writes_them(run, photos, expected, tmp_path, encoding, monkeypatch):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    content = (mark + "photos/a.png\r\nphotos/gone [1].png\r\n \t\r\nphotos/b.png\r\nnone*.png\r\n").encode(encoding)
    (tmp_path / "list.txt").write_bytes(content)
    assert run("caption", "--input-list", "list.txt", "--output", "c.jsonl") == 1
    rows = {row["image"]: row["caption"] for row in read_rows(tmp_path / "c.jsonl")}
    missing = {"photos/gone [1].png": None, "none*.png": None}
    assert rows == {name: expected[name] for name in ("photos/a.png", "photos/b.png")} | missing
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert set(list_images(["-"])) == set(rows)


def test_a_sidecar_that_cannot_be_written_is_named_and_the_others_are(run, photos, expected, capsys):
    # Names of 255 bytes, the maximum: the first sidecar's name has as many, the second one's more.
    longest, too_long = "b" * 251 + ".png", "c" * 253 + ".x"
    shutil.copy(photos / "a.png", photos / longest)
    (photos / "a.png").rename(photos / too_long)
    (photos / "c.txt").mkdir()
    flags = ("--sidecar", "--batch-size", 3)
    assert run("caption", f"photos/{too_long}", "photos", *flags) == 1
    errors = capsys.readouterr().err
    for name, reason in ((too_long, "File name too long"), ("c.png", "Is a directory")):
        assert any(name in line and reason in line for line in errors.splitlines()), errors
    assert "4 of 6 images done, 2 could not be written" in errors
    written = {path.name for path in photos.rglob("*.txt") if path.is_file()}
    assert written == {"b.txt", "d.txt", "e.txt", "b" * 251 + ".txt"}
    assert not [path for path in photos.rglob(".*")]
    assert run("caption", f"photos/{too_long}", "photos", *flags) == 1
    assert "0 of 6 images done, 4 were there already, 2 could not be written" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_loses_no_other_sidecar(run, photos, capsys, monkeypatch):
    write = Path.write_text

    def write_text(path, *args, **kwargs):
        if path.parent.name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_text)
    assert run("caption", "photos", "--sidecar") == 1
    errors = capsys.readouterr().err
    assert errors.count("Permission denied") == 2 and "2 could not be written" in errors
    assert len(list(photos.glob("*.txt"))) == 3


def test_an_output_that_cannot_be_written_is_one_line(run, photos, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run("caption", "photos", "--output", "file/c.jsonl") == 3
    assert "cannot write" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_rows_on_a_full_disk_are_gone_on_with(run, photos, expected, tmp_path, capsys, kind):
    output = tmp_path / f"c.{kind}"
    with SmallDisk(100):
        assert run("caption", "photos", "--output", output, "--batch-size", 1) == 3
    assert f"cannot write {output}: File too large" in capsys.readouterr().err.splitlines()[-1]
    assert 0 < output.stat().st_size <= 100
    assert run("caption", "photos", "--output", output) == 0
    assert {row["image"]: row["caption"] for row in read_rows(output)} == expected


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_behind_the_standard_output_is_one_line(repository, photos):
    words = ("-m", "tinycap.deploy", "caption", "photos", "--quiet", "--model", repository)
    with open("/dev/full", "w") as full:
        process = Process(*words, path=(REPOSITORY,), stdout=full)
    assert process.wait() == 3
    assert process.errors() == "tinycap caption: error: cannot write to the standard output: No space left on device\n"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_second_writer_of_an_output_is_refused(run, photos, expected, tmp_path, capsys, monkeypatch, kind):
    """Otherwise it replaces the file, and later rows of the first one are lost."""
    output, link = tmp_path / f"c.{kind}", tmp_path / f"link.{kind}"
    link.symlink_to(output)
    # As after a kill.
    (tmp_path / f".c.{kind}.lock").touch()
    call, statuses = captioners.TorchCaptioner.__call__, []

    def meets_another(self, images):
        for number, result in enumerate(call(self, images)):
            if number > 2:
                name = output if number == 3 else link
                statuses.append(run("caption", "photos/deep/e.png", "--output", name, "--overwrite"))
            yield result

    monkeypatch.setattr(captioners.TorchCaptioner, "__call__", meets_another)
    assert run("caption", "photos", "--output", output, "--batch-size", 1) == 0
    assert {row["image"]: row["caption"] for row in read_rows(output)} == expected
    assert statuses == [3, 3] and f"c.{kind}: another process is writing to it" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*")) and link.is_symlink()
    assert run("caption", "photos/a.png", "--output", link, "--overwrite") == 0
    assert len(read_rows(output)) == 1


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("photos/b.png,", 'photos/b.png,"', "line 3"),
        ("photos/b.png,", '"photos/b.png"x,', "line 3"),
        ("photos/b.png,", "photos/b.png,one,more,", "line 3"),
        ("photos/deep/e.png,", '"photos/deep/e.png,', "line 6"),
    ],
)
def test_a_csv_file_that_cannot_be_read_is_refused_as_it_is(run, photos, tmp_path, capsys, old, new, words):
    output = tmp_path / "c.csv"
    assert run("caption", "photos", "--output", output) == 0
    content = output.read_text().replace(old, new)
    output.write_text(content)
    assert run("caption", "photos", "--output", output) == 2
    assert f"c.csv, {words}: " in capsys.readouterr().err
    assert output.read_text() == content


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_no_row_is_lost_on_resume(tmp_path, kind):
    names = ["a\rb.png", "a\r\nb.png", 'a"b\n,".png', "a,b.png", "x" * 200_000, " a.png ", "\x1f.png"]
    path = tmp_path / f"c.{kind}"
    with RowFile(path, CaptionRows()) as output:
        output.start([], False)
        output.append([*(ImageResult(name, [name]) for name in names), ImageResult("other\n.png", error="broken")])
    content = path.read_bytes()
    with RowFile(path, CaptionRows()) as output:
        assert output.start(names, False) == {*names, "other\n.png"}
    assert path.read_bytes() == content, "another command's failures are left alone too"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_run_killed_anywhere_goes_on(tmp_path, kind):
    results = [ImageResult("a.png", ["one"]), ImageResult('b\n".png', ["two, too"]), ImageResult("c.png", error="no")]
    path = tmp_path / f"c.{kind}"
    with RowFile(path, CaptionRows()) as whole:
        whole.start([], False)
        whole.append(results)
    content = path.read_bytes()
    ends = [content.index(end) + len(end) for end in (b"one", b"too")]
    for length in range(len(content)):
        path.write_bytes(content[:length])
        if kind == "csv" and content[:length].endswith(b'"b\n'):
            continue  # Could be an unclosed quote from an editor: an error.
        with RowFile(path, CaptionRows()) as output:
            done = output.start(["a.png"], False)
        assert done <= {result.image for result in results}
        # A complete row is kept.
        assert length < ends[0] + 3 or "a.png" in done
        assert length >= ends[0] or "a.png" not in done
        assert length < ends[1] + 4 or 'b\n".png' in done


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_file_saved_by_an_editor_is_gone_on_with(run, photos, tmp_path, kind):
    output = tmp_path / f"c.{kind}"
    assert run("caption", "photos", "--output", output) == 0
    words = output.read_text().replace("photos/a.png", "photos/kept.png").rstrip("\n")
    output.write_bytes(b"\xef\xbb\xbf" + words.replace("\n", "\r\n").encode())
    assert run("caption", "photos", "--output", output) == 0
    assert len(read_rows(output)) == 6 and "photos/kept.png" in output.read_text()


@pytest.mark.parametrize(
    "flags, words", [(["--confidence"], "confidence"), (["--num-beams", "2", "--num-captions", "2"], "2 captions")]
)
def test_rows_without_what_is_asked_for_now_are_refused(repository, photos, tmp_path, capsys, flags, words):
    model = shutil.copytree(repository, tmp_path / "model")
    coefficients = {"mean_log_prob": 0.0, "num_tokens": 1.0}
    calibration = {"num_beams": 1, "intercept": -9.0, "coefficients": coefficients}
    (model / "confidence.json").write_text(json.dumps({"calibrations": [calibration]}))
    command = ["caption", "photos", "--model", str(model), "--output", "c.jsonl"]
    assert cli.main(command) == 0
    content = (tmp_path / "c.jsonl").read_bytes()
    assert cli.main([*command, *flags]) == 2
    assert f"c.jsonl, line 1: expected rows with {words}" in capsys.readouterr().err
    assert (tmp_path / "c.jsonl").read_bytes() == content
    (tmp_path / "c.jsonl").write_text('{"image": "x", "caption": "y", "alternatives": 5}\n')
    assert cli.main([*command, *flags]) == 2


def test_the_version_is_said(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert re.fullmatch(r"tinycap \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_hints_say_how_to_install_here(monkeypatch, tmp_path):
    assert 'pip install -e ".[export]"' in str(captioners.extra_missing("why", "export", ImportError()))
    monkeypatch.setattr(captioners, "REPOSITORY", tmp_path)
    assert 'pip install "tinycap[export]"' in str(captioners.extra_missing("why", "export", ImportError()))


def test_num_threads_are_pytorchs_too(run, photos):
    before = torch.get_num_threads()
    try:
        for number in (3, 2):
            assert run("caption", "photos/a.png", "--num-threads", number) == 0
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_threads_wait_passively_unless_told_otherwise(photos):
    code = (
        "import os, sys; from tinycap.deploy import cli\n"
        "class Witness:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': sys.exit(os.environ.get('OMP_WAIT_POLICY', 'nothing'))\n"
        "sys.meta_path.insert(0, Witness())\n"
        "cli.main(['caption', 'photos', '--quiet'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "KMP"))}
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        process = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, **given}, check=False
        )
        assert process.stderr == f"{expected}\n"


@pytest.mark.slow
def test_inputs_are_looked_at_before_pytorch_is_imported(photos):
    code = (
        "import sys; from tinycap.deploy import cli\n"
        "for argv in (['caption', 'empty'], ['caption', 'photos', '--model', '/no/where'], ['embed', 'empty'],\n"
        "             ['trim-vocab', '--model', '/no/where', '--output', 'x'], ['export', '--model', './no']):\n"
        "    argv += ['--output', 'x.npy'] if argv[0] in ('embed', 'export') else []\n"
        "    assert cli.main(argv) == 2\n"
        "    assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)"
    )
    (photos.parent / "empty").mkdir()
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_a_file_name_that_is_no_text_goes_through(run, photos, tmp_path):
    name = os.fsdecode(b"photos/caf\xe9.png")
    shutil.copy(photos / "a.png", name)
    (tmp_path / "list.txt").write_bytes(os.fsencode(name) + b"\n")
    for kind in ("jsonl", "csv"):
        flags = ("--input-list", tmp_path / "list.txt", "--output", tmp_path / f"c.{kind}")
        assert run("caption", *flags) == run("caption", *flags) == 0
        assert [row["image"] for row in read_rows(tmp_path / f"c.{kind}")] == [name]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["caption"], "expected images"),
        (["caption", "photos", "--output", "c.xml"], ".jsonl or .csv"),
        (["caption", "photos", "--output", "c.csv", "--format", "jsonl"], "--format"),
        (["caption", "photos", "--quantized"], "--backend onnx"),
        (["caption", "photos", "--model", "nowhere"], "--model nowhere: no such folder, and"),
        (["caption", "photos", "--model", "./nowhere"], "--model ./nowhere: no such folder"),
        (["export", "--model", "/no/where", "--output", "x"], "--model /no/where: no such folder"),
        (["export", "--model", "nowhere", "--output", "x"], "--model nowhere: no such folder, and from the Hub"),
        (["trim-vocab", "--model", "nowhere", "--output", "x"], "--model nowhere: no such folder, and from the Hub"),
        (["caption", "photos", "--device", "cuda"], "--device cuda: "),
        (["caption", "photos", "--device", "toaster"], "--device toaster: "),
        (["caption", "--input-list", "nowhere.txt"], "nowhere.txt"),
        (["embed", "photos", "--output", "e.txt"], ".safetensors or .npy"),
    ],
)
def test_a_command_that_makes_no_sense_says_why_and_writes_nothing(photos, tmp_path, capsys, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(arguments) == 2
    *others, line = capsys.readouterr().err.splitlines()
    assert all("left out:" in other for other in others), "one line, no traceback"
    assert words in line and line.startswith(f"tinycap {arguments[0]}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_the_recipe_for_datasets_in_the_documentation_works(repository, photos, expected):
    """Unchanged except for the names of model and data set and the number of processes."""
    (photos / "bad.jpg").write_bytes(b"no picture")
    text = (cli.REPOSITORY / "docs" / "command_line.md").read_text(encoding="utf-8")
    code = text.split("<!-- recipe: datasets -->")[1].split("```python\n")[1].split("```")[0]
    changes = {'model="."': f'model="{repository}"', '"my_photos"': '"photos"', "num_proc=8": "num_proc=None"}
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    names: dict = {}
    exec(code, names)
    rows = [row for row in names["photos"] if not row["caption_error"]]
    assert {os.path.relpath(row["image"]["path"]): row["caption"] for row in rows} == expected
    assert len(names["photos"]) == len(expected) + 1


def test_images_are_read_ahead_in_order_and_not_without_end():
    read, asked = [], []

    def images():
        for number in range(50):
            asked.append(number)
            yield number

    for number in read_ahead(lambda number: number, images(), num_workers=3, ahead=4):
        read.append(number)
        assert len(asked) - len(read) <= 5
    assert read == list(range(50))


@pytest.mark.slow
def test_help_and_the_list_of_images_need_no_torch():
    code = (
        "import sys; from tinycap.deploy import cli, inputs, outputs\n"
        "try: cli.main(['caption', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "--min-confidence" in process.stdout


def test_options_reach_generate():
    options = CaptionOptions("model", num_beams=4, num_captions=2, max_new_tokens=7)
    assert options.generation() == {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 7}
    assert CaptionOptions("model").generation() == {"num_return_sequences": 1}


@pytest.mark.slow
def test_without_pytorch_the_same_captions_and_confidences(exported_repository, exported, photos, tmp_path):
    """What `tinycap export` wrote, by `--backend onnx` in a process that never imports PyTorch."""
    (photos / "bad.jpg").write_bytes(b"no picture")
    flags = ["caption", "photos", "--confidence", "--num-beams", "2", "--num-captions", "2", "--batch-size", "4"]
    assert cli.main([*flags, "--model", str(exported_repository), "--output", "torch.jsonl"]) == 1
    code = (
        "import sys; from tinycap.deploy import cli; status = cli.main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(status)"
    )
    onnx = ["--model", str(exported), "--backend", "onnx", "--num-threads", "1", "--num-workers", "2"]
    process = subprocess.run(
        [sys.executable, "-c", code, *flags, *onnx, "--output", "onnx.jsonl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1 and "photos/bad.jpg" in process.stderr, process.stderr
    expected, found = read_rows(tmp_path / "torch.jsonl"), read_rows(tmp_path / "onnx.jsonl")
    for row, other in zip(expected, found, strict=True):
        assert row.pop("confidence") == pytest.approx(other.pop("confidence"), abs=2e-4)
        assert row == other
    assert cli.main(["embed", "photos", "--model", str(exported_repository), "--output", "torch.npy"]) == 1
    assert cli.main(["embed", "photos", *onnx, "--output", "onnx.npy"]) == 1
    np.testing.assert_allclose(np.load("torch.npy"), np.load("onnx.npy"), atol=1e-5)
