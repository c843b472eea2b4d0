"""The index of image embeddings: whole whenever a run is killed, exact in what it finds."""

import os
import sqlite3
import time

import numpy as np
import pytest

from tinycap.commands import OutputError
from tinycap.deploy.captioners import ImageResult
from tinycap.deploy.index import ImageIndex


WIDTH = 13


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for number in range(7):
        (folder / f"{number}.jpg").write_bytes(b"x" * (number + 1))
    return folder


def vectors(number: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((number, WIDTH)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def open_index(tmp_path, model="m") -> ImageIndex:
    return ImageIndex(tmp_path / "index", model, tmp_path / "photos")


def paths_of(folder) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*.jpg"))


def fill(index: ImageIndex, folder, seed: int = 0) -> np.ndarray:
    paths, embeddings = paths_of(folder), vectors(len(paths_of(folder)), seed)
    pending, gone = index.changes(paths)
    index.remove(gone)
    index.add((ImageResult(path, embedding=embeddings[paths.index(path)]) for path in pending), pending)
    return embeddings


def test_the_nearest_images_come_first_with_their_cosines(tmp_path, photos):
    index = open_index(tmp_path)
    embeddings = fill(index, photos)
    query = vectors(1, seed=9)[0]
    matches = index.search(query, 3)
    expected = np.argsort(-(embeddings @ query))[:3]
    assert [match.path for match in matches] == [paths_of(photos)[row] for row in expected]
    assert [match.score for match in matches] == pytest.approx(sorted(embeddings @ query)[::-1][:3], abs=1e-6)
    assert len(index.search(query, 50)) == 7


def test_only_new_and_changed_files_are_pending_and_lost_ones_leave(tmp_path, photos):
    index = open_index(tmp_path)
    fill(index, photos)
    assert index.changes(paths_of(photos)) == ({}, [])
    (photos / "3.jpg").write_bytes(b"other content")
    (photos / "4.jpg").unlink()
    (photos / "trip/new.jpg").write_bytes(b"new")
    pending, gone = index.changes(paths_of(photos))
    assert sorted(pending) == [str(photos / "3.jpg"), str(photos / "trip/new.jpg")]
    assert gone == [str(photos / "4.jpg")]


def test_a_file_touched_without_a_new_size_is_pending(tmp_path, photos):
    index = open_index(tmp_path)
    fill(index, photos)
    os.utime(photos / "2.jpg", ns=(time.time_ns(), time.time_ns() + 5))
    assert list(index.changes(paths_of(photos))[0]) == [str(photos / "2.jpg")]


def test_what_left_or_changed_is_not_found_by_its_old_embedding(tmp_path, photos):
    index = open_index(tmp_path)
    old = fill(index, photos)
    (photos / "0.jpg").unlink()
    (photos / "1.jpg").write_bytes(b"changed")
    fill(index, photos, seed=5)
    assert str(photos / "0.jpg") not in [match.path for match in index.search(old[0], 7)]
    changed = [match for match in index.search(old[1], 7) if match.path == str(photos / "1.jpg")]
    assert len(changed) == 1 and changed[0].score < 0.99
    assert len(index) == 6


def test_an_unreadable_image_is_remembered_until_it_changes(tmp_path, photos):
    index, path = open_index(tmp_path), str(photos / "1.jpg")
    pending, _ = index.changes([path])
    index.add([ImageResult(path, error="broken")], pending)
    assert index.changes([path]) == ({}, []) and len(index) == 0
    assert index.search(vectors(1)[0], 3) == []


def test_an_index_killed_between_its_two_writes_is_whole(tmp_path, photos, monkeypatch):
    index = open_index(tmp_path)
    embeddings = fill(index, photos)
    (photos / "late.jpg").write_bytes(b"late")
    pending, _ = index.changes(paths_of(photos))
    with monkeypatch.context() as patch:
        patch.setattr(ImageIndex, "_transaction", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            index.add([ImageResult(str(photos / "late.jpg"), embedding=vectors(1, 3)[0])], pending)
    again = open_index(tmp_path)
    assert [match.path for match in again.search(embeddings[2], 1)] == [str(photos / "2.jpg")]
    assert list(again.changes(paths_of(photos))[0]) == [str(photos / "late.jpg")]
    fill(again, photos)
    assert len(again) == 8


def test_rows_of_lost_images_are_given_back(tmp_path, photos):
    index = open_index(tmp_path)
    embeddings, paths = fill(index, photos), paths_of(photos)
    for name in ("0.jpg", "1.jpg", "5.jpg"):
        (photos / name).unlink()
    index.remove(index.changes(paths_of(photos))[1])
    index.compact()
    for opened in (index, open_index(tmp_path)):
        assert opened.matrix().shape == (4, WIDTH)
        for number in (2, 3, 4, 6):
            assert opened.search(embeddings[number], 1)[0].path == paths[number]
    assert [path.name for path in (tmp_path / "index").glob("*.f32")] == ["embeddings-1.f32"]


def test_a_large_index_finds_the_same_by_its_principal_components(tmp_path, photos, monkeypatch):
    limits = {"MANY_ROWS": 40, "NEW_ROWS": 10, "COMPONENTS": 4, "SHORTLIST": 12}
    for name, value in limits.items():
        monkeypatch.setattr(f"tinycap.deploy.index.{name}", value)
    # Nearly of rank 4, as real embeddings are of a low one.
    drawn = np.random.default_rng(1).standard_normal((60, 4)) @ np.random.default_rng(2).standard_normal((4, WIDTH))
    drawn += 0.01 * np.random.default_rng(3).standard_normal(drawn.shape)
    embeddings = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    names = [str(photos / f"many-{row:02}.jpg") for row in range(60)]
    index = open_index(tmp_path)
    for part in (slice(0, 50), slice(50, 55), slice(55, 60)):
        facts = {name: (1, 1) for name in names[part]}
        index.add((ImageResult(name, embedding=row) for name, row in zip(names[part], embeddings[part])), facts)
        index.summarize()
        count = len(index)
        assert len(index._coarse()[1]) == (60 if count == 60 else 50)
        for row in range(0, count, 7):
            expected = np.argsort(-(embeddings[:count] @ embeddings[row]))[:3]
            matches = open_index(tmp_path).search(embeddings[row], 3)
            assert [match.path for match in matches] == [names[other] for other in expected]
    index.remove(names[:20])
    index.compact()
    assert not list((tmp_path / "index").glob("*.coarse.npy"))


def test_folder_and_index_move_together(tmp_path, photos):
    embeddings = fill(open_index(tmp_path), photos)
    (tmp_path / "elsewhere").mkdir()
    for name in ("photos", "index"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    index = open_index(tmp_path / "elsewhere")
    assert index.changes(paths_of(tmp_path / "elsewhere/photos")) == ({}, [])
    assert index.search(embeddings[6], 1)[0].path == str(tmp_path / "elsewhere/photos/6.jpg")


def test_names_that_are_no_utf_8_and_images_outside_the_root_are_kept(tmp_path, photos):
    names = [os.fsdecode(bytes(photos) + b"/\xff\xfe.jpg"), str(tmp_path / "outside.jpg")]
    for name in names:
        with open(name, "wb") as file:
            file.write(b"image")
    index = open_index(tmp_path)
    pending, _ = index.changes(names)
    index.add((ImageResult(name, embedding=vector) for name, vector in zip(names, vectors(2))), pending)
    assert [index.search(vector, 1)[0].path for vector in vectors(2)] == names


def test_the_query_itself_is_left_out_of_what_is_like_it(tmp_path, photos):
    index = open_index(tmp_path)
    embeddings = fill(index, photos)
    path = str(photos / "2.jpg")
    matches = index.search(embeddings[2], 6, without=path)
    assert len(matches) == 6 and path not in [match.path for match in matches]


def test_duplicates_are_grouped_the_largest_group_first(tmp_path, photos):
    index, embeddings, paths = open_index(tmp_path), vectors(7), paths_of(photos)
    embeddings[3] = embeddings[1]
    embeddings[6] = embeddings[1] + 0.01 * embeddings[0]
    embeddings[5] = embeddings[4]
    pending, _ = index.changes(paths)
    index.add((ImageResult(path, embedding=vector) for path, vector in zip(paths, embeddings)), pending)
    assert index.duplicates(0.99) == [[paths[1], paths[3], paths[6]], [paths[4], paths[5]]]


def test_captions_are_kept_until_their_image_changes(tmp_path, photos):
    index = open_index(tmp_path)
    fill(index, photos)
    index.add_captions({str(photos / "2.jpg"): "a dog", str(photos / "3.jpg"): "a cat"})
    (photos / "3.jpg").write_bytes(b"no cat any more")
    fill(index, photos)
    assert open_index(tmp_path).captions(paths_of(photos)) == {str(photos / "2.jpg"): "a dog"}


def test_an_index_of_another_checkpoint_is_refused(tmp_path, photos):
    fill(open_index(tmp_path), photos)
    with pytest.raises(ValueError, match="expected model other, got m; delete it or name another --index"):
        open_index(tmp_path, model="other")


@pytest.mark.parametrize("harm", ["no database", "cut database", "cut embeddings", "no embeddings"])
def test_a_damaged_index_is_refused_with_what_to_do(tmp_path, photos, harm):
    fill(open_index(tmp_path), photos)
    database, embeddings = tmp_path / "index/index.sqlite", tmp_path / "index/embeddings-0.f32"
    if harm == "no database":
        database.write_bytes(b"this is no database, but long enough for a header of one hundred bytes" * 3)
    elif harm == "cut database":
        database.write_bytes(database.read_bytes()[:4500])
    elif harm == "cut embeddings":
        embeddings.write_bytes(embeddings.read_bytes()[:-4])
    else:
        embeddings.unlink()
    with pytest.raises(ValueError, match="index .*damaged .*delete it"):
        index = open_index(tmp_path)
        index.search(vectors(1)[0], 3)


def test_an_index_that_another_process_writes_to_is_no_damage(tmp_path, photos, monkeypatch):
    index = open_index(tmp_path)
    index.table.execute("PRAGMA busy_timeout = 10")
    other = sqlite3.connect(tmp_path / "index/index.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(OutputError, match="locked"):
        index.remove(["a.jpg"])
    other.execute("ROLLBACK")
    fill(index, photos)
