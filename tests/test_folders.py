"""Common layouts of captioned images are read; skipped entries are counted and named."""

import csv
import json
import os

import pytest
from tiny import draw_picture, png_bytes

from tinycap.training.data import NoSplitError, SkippedRows, decode_dataset, load_split, load_splits, resolve_columns


def images(folder, names):
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(draw_picture(index)))
    return folder


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def read(folder, split="train", skipped=None):
    """The captions by image id."""
    rows = load_split(str(folder), split)
    decoded = decode_dataset(rows, resolve_columns(rows), 24, skipped or SkippedRows(), split)
    found = {}
    for row in decoded:
        found.setdefault(row["image_id"], []).extend(row["captions"])
    return found


NAMES = [f"{index:03}.png" for index in range(4)]
TEXTS = {name: [f"a dog, number {index}.", f"an animal of kind {index}"] for index, name in enumerate(NAMES)}
PAIRS = [(name, text) for name in NAMES for text in TEXTS[name]]


def table(names, rows, delimiter=","):
    return "\n".join(delimiter.join(row) for row in ([names] if names else []) + [list(row) for row in rows])


def quoted(rows):
    return [(name, f'"{text}"') for name, text in rows]


COCO = {
    "images": [{"id": 10 + index, "file_name": name} for index, name in enumerate(NAMES)],
    "annotations": [{"image_id": 10 + NAMES.index(name), "caption": text} for name, text in PAIRS],
}
KARPATHY = {
    "images": [
        {"filename": name, "split": "restval", "sentences": [{"raw": text} for text in TEXTS[name]]} for name in NAMES
    ]
}

LAYOUTS = {
    "text beside": ("", {name.replace("png", "txt"): "\n".join(texts) for name, texts in TEXTS.items()}),
    "text beside, in capitals": ("", {name.replace("png", "TXT"): "\n".join(TEXTS[name]) for name in NAMES}),
    "text beside, whole name": ("deep/er", {f"deep/er/{name}.txt": "\n".join(TEXTS[name]) for name in NAMES}),
    "texts in their own folder": ("images", {f"labels/{name[:-4]}.txt": "\r\n".join(TEXTS[name]) for name in NAMES}),
    "CSV": ("images", {"captions.csv": table(["file_name", "caption"], quoted(PAIRS))}),
    "CSV, unquoted commas": ("Images", {"captions.txt": table(["image", "caption"], PAIRS)}),
    "CSV of a spreadsheet": ("images", {"x.csv": "\ufeff" + table(["Image", "Caption"], PAIRS, ";")}),
    "CSV with folders": ("images", {"c.csv": table(["path", "text"], quoted((f"images/{n}", t) for n, t in PAIRS))}),
    "CSV with backslashes": ("images", {"c.csv": table(["path", "text"], [(f"images\\{n}", t) for n, t in PAIRS])}),
    "CSV without endings": ("images", {"c.csv": table(["key", "text"], quoted((n[:-4], t) for n, t in PAIRS))}),
    "CSV without header": ("images", {"captions.txt": table(None, PAIRS)}),
    "TSV": ("images", {"captions.tsv": table(["filename", "caption"], PAIRS, "\t")}),
    "Flickr8k": ("Images", {"Flickr8k.token.txt": table(None, [(f"{n}#0", t) for n, t in PAIRS], "\t")}),
    "Flickr30k": ("img", {"results.csv": table(["image_name", " comment_number", " comment"],
                                               [(n, " 0", " " + t) for n, t in PAIRS], "|")}),
    "JSON lines": ("images", {"c.jsonl": "\n".join(json.dumps({"img": n, "captions": TEXTS[n]}) for n in NAMES)}),
    "imagefolder": ("", {"metadata.jsonl": "\n".join(json.dumps({"file_name": n, "text": TEXTS[n]}) for n in NAMES)}),
    "JSON list": ("images", {"c.json": [{"file": n, "sentences": [{"raw": t} for t in TEXTS[n]]} for n in NAMES]}),
    "JSON list by key": ("i", {"c.json": {"info": "x", "data": [{"image": n, "captions": TEXTS[n]} for n in NAMES]}}),
    "JSON by name": ("images", {"captions.json": TEXTS}),
    "COCO": ("train2017", {"annotations/captions_train2017.json": COCO,
                           "annotations/instances_train2017.json": {**COCO, "annotations": [{"image_id": 10}]}}),
    "Karpathy": ("val2014", {"dataset_coco.json": KARPATHY}),
    "numbered columns": ("", {"metadata.jsonl": "\n".join(
        json.dumps({"file_name": n, "caption_0": TEXTS[n][0], "caption_1": TEXTS[n][1]}) for n in NAMES)}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_usual_layout_is_read(layout, tmp_path):
    where, files = LAYOUTS[layout]
    images(tmp_path / where, NAMES)
    write(tmp_path, "readme.txt", "Images, and their captions.\nBy nobody.")
    for name, content in files.items():
        write(tmp_path, name, content)
    found = read(tmp_path)
    prefix = f"{where}/" if where else ""
    expected = {f"{prefix}{name}": texts for name, texts in TEXTS.items()}
    if layout == "COCO":
        expected = {str(10 + index): TEXTS[name] for index, name in enumerate(NAMES)}
    assert found == expected
    assert [len(rows) for rows in load_splits(str(tmp_path))] == [3, 1], "rows of an image are one image"


@pytest.mark.parametrize("validation", ["validation", "val", "dev", "val2017", "Flickr8k_valid"])
def test_folders_named_after_splits_are_splits(validation, tmp_path):
    for split in ("train", validation):
        images(tmp_path / split / "deep", NAMES)
        for name in NAMES:
            write(tmp_path, f"{split}/deep/{name[:-4]}.txt", f"{split} {name}")
    for split, folder in (("train", "train"), ("validation", validation)):
        assert read(tmp_path, split) == {f"{folder}/deep/{name}": [f"{folder} {name}"] for name in NAMES}
    assert len(load_split(str(tmp_path), "train[:3]")) == 3
    assert len(load_split(str(tmp_path), "train+validation[50%:]")) == 6
    with pytest.raises(NoSplitError, match="testing"):
        load_split(str(tmp_path), "testing")


def test_tables_lists_and_columns_named_after_splits_are_splits(tmp_path):
    tables = images(tmp_path / "tables", [f"images/{name}" for name in NAMES])
    write(tables, "train.csv", table(["image", "caption"], PAIRS[:6]))
    write(tables, "captions_val.csv", table(["image", "caption"], PAIRS[6:]))
    lists = images(tmp_path / "lists", [f"Flicker8k_Dataset/{name}" for name in NAMES])
    write(lists, "text/Flickr8k.token.txt", table(None, [(f"{n}#1", t) for n, t in PAIRS], "\t"))
    write(lists, "text/Flickr8k.lemma.token.txt", table(None, [(f"{n}#1", "a dog be") for n, _ in PAIRS], "\t"))
    write(lists, "text/ExpertAnnotations.txt", f"{NAMES[0]}\t{NAMES[1]}#2\t1\t1\t1\n")
    write(lists, "text/Flickr_8k.trainImages.txt", "\n".join(NAMES[:3]) + "\n")
    write(lists, "text/Flickr_8k.devImages.txt", NAMES[3] + "\n")
    column = images(tmp_path / "column", [f"img/{name}" for name in NAMES])
    write(column, "all.csv", table(["filename", "raw", "split"], [(n, f'"{t}"', "val" if n == NAMES[3] else "train")
                                                                 for n, t in PAIRS]))  # fmt: skip
    for folder in (tables, lists, column):
        assert list(read(folder).values()) == [TEXTS[name] for name in NAMES[:3]]
        assert list(read(folder, "validation").values()) == [TEXTS[NAMES[3]]]


def test_captions_without_image_and_images_without_caption_are_named(tmp_path, caplog):
    names = [f"{index:03}.png" for index in range(20)]
    images(tmp_path / "images", names)
    rows = [(name, "a dog") for name in names[1:]] + [("lost.png", "a cat")]
    write(tmp_path, "captions.csv", table(["file_name", "caption"], rows))
    skipped = SkippedRows(tmp_path / ".skipped.jsonl")
    assert set(read(tmp_path, skipped=skipped)) == {f"images/{name}" for name in names[1:]}
    lines = [json.loads(line) for line in skipped.path.read_text().splitlines()]
    assert [line["image_id"] for line in lines] == ["lost.png", "images/000.png"]
    assert "no such image file" in lines[0]["reason"] and "images/000.png" in lines[1]["reason"]
    assert "1 images have no captions: images/000.png" in caplog.text


def test_a_folder_captioned_in_part_is_read_and_the_rest_named(tmp_path, caplog):
    images(tmp_path, [*NAMES, "unused/a.png"])
    write(tmp_path, "000.txt", "a dog")
    assert read(tmp_path) == {"000.png": ["a dog"]}
    assert "4 images have no captions: 001.png, 002.png, 003.png" in caplog.text


def test_images_without_any_caption_are_an_error(tmp_path):
    images(tmp_path, NAMES)
    write(tmp_path, "captions.csv", table(["file_name", "caption"], [("other.png", "a dog")]))
    with pytest.raises(ValueError, match="captions for 4 images: a text file .* table .*captions.csv"):
        load_split(str(tmp_path), "train")


@pytest.mark.parametrize("ending", ["HEIC", "heif", "avif", "WebP", "JPG", "jfif"])
def test_every_usual_ending_is_an_image(ending, tmp_path):
    images(tmp_path, [f"a.{ending}", "b.png"])
    write(tmp_path, "a.txt", "a dog")
    write(tmp_path, "b.txt", "a cat")
    assert load_split(str(tmp_path), "train")["file_name"][:] == [f"a.{ending}", "b.png"]


@pytest.mark.parametrize("name", ["captions.csv", "000.txt"])
def test_a_named_pipe_for_a_text_file_is_an_error(name, tmp_path):
    images(tmp_path, NAMES)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: expected a text file in UTF-8: not a regular file"):
        load_split(str(tmp_path), "train")


def test_unusual_file_names_keep_their_own_text_files(tmp_path):
    names = ["a.png", "a .png", " a.png", "a #1.png", "a.b#2.png", "1.png"]
    images(tmp_path, names)
    for index, name in enumerate(names):
        write(tmp_path, f"{name[:-4]}.txt", f"number {index}")
    assert read(tmp_path) == {name: [f"number {index}"] for index, name in enumerate(names)}


def test_text_files_belong_to_the_split_of_the_folder_of_their_name(tmp_path):
    images(tmp_path, [f"images/{split}/{name}" for split in ("train", "val") for name in NAMES])
    for split in ("train", "val"):
        for name in NAMES:
            write(tmp_path, f"labels/{split}/{name[:-4]}.txt", f"{split} {name}")
    assert read(tmp_path, "validation") == {f"images/val/{name}": [f"val {name}"] for name in NAMES}


def test_a_linked_folder_is_read_and_a_circle_of_links_ends(tmp_path):
    images(tmp_path / "elsewhere", NAMES)
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    write(folder, "captions.csv", table(["file_name", "caption"], PAIRS))
    assert list(read(folder)) == [f"images/{name}" for name in NAMES]


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("captions.json", "{", "captions.json: not JSON"),
        ("captions.csv", 'file_name,caption\n000.png,"a dog\n', "captions.csv: line 2"),
        ("000.txt", b"caf\xe9", "000.txt: expected a text file in UTF-8"),
    ],
)
def test_a_text_that_cannot_be_read_is_an_error_that_names_it(name, content, named, tmp_path):
    images(tmp_path, NAMES)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=named):
        load_split(str(tmp_path), "train")


def test_an_image_that_was_replaced_is_decoded_anew(tmp_path):
    images(tmp_path, NAMES)
    write(tmp_path, "metadata.csv", table(["file_name", "text"], quoted(PAIRS)))

    def pixels():
        rows = load_split(str(tmp_path), "train")
        return decode_dataset(rows, resolve_columns(rows), 24, SkippedRows(), "train")[0]["pixels"]

    before = pixels()
    (tmp_path / NAMES[0]).write_bytes(png_bytes(draw_picture(99, (50, 50))))
    assert pixels() != before


def test_a_stream_of_a_plain_folder_has_the_same_rows(tmp_path):
    images(tmp_path, NAMES)
    write(tmp_path, "metadata.csv", table(["file_name", "text"], quoted(PAIRS)))
    stream = load_split(str(tmp_path), "train", streaming=True)
    assert [row["text"] for row in stream] == [text for _, text in PAIRS]
    with open(tmp_path / "metadata.csv") as file:
        assert len(list(csv.reader(file))) == 9
