import base64
import io
import json
from functools import partial
from html.parser import HTMLParser

import datasets
import pytest
import torch
from PIL import Image
from tiny import draw_picture, png_bytes

from tinycap.evaluation import ood_images
from tinycap.evaluation.__main__ import main
from tinycap.evaluation.html_report import encode_map, write_report


EVIL = "</script><script>alert(1)</script><!-- <b>bold</b> & \"quoted\" 'words' \u2028 日本"


class Page(HTMLParser):
    """The elements of a page and the text of each script."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.scripts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script" and self.scripts:
            self.scripts[-1] += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


# Those of a whole evaluation, which captions drawings too: five of each kind, for the usual 20.
whole = pytest.mark.slow


@pytest.fixture(scope="module")
def evaluated(repository, tmp_path_factory):
    """The output folder for five images with hostile captions and a corrupt one."""
    folder = tmp_path_factory.mktemp("evaluation")
    files = [png_bytes(draw_picture(index, size=(60, 40))) for index in range(6)]
    files[4] = b"no picture"
    images = [{"bytes": file, "path": None} for file in files]
    captions = [[EVIL, "A brown dog runs."], *[["Two men walk.", f"Number {index}."] for index in range(1, 6)]]
    rows = {"image": images, "captions": captions, "image_id": [f"<i>{index}</i>" for index in range(6)]}
    (folder / "data").mkdir()
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(
        folder / "data" / "validation.parquet"
    )
    flags = ["--model_name_or_path", str(repository), "--dataset_name", str(folder / "data"), "--num_beams", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ood_images, "draw_ood_images", partial(ood_images.draw_ood_images, per_kind=5))
        main([*flags, "--baselines", "--failures", "--output_dir", str(folder / "out")])
    return folder / "out"


@pytest.fixture(scope="module")
def page(evaluated) -> Page:
    return Page((evaluated / "report.html").read_text(encoding="utf-8"))


@whole
def test_the_report_holds_every_photo_with_its_captions_and_scores(page, evaluated):
    lines = [json.loads(line) for line in (evaluated / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    photos = {photo["id"]: photo for photo in page.data["photos"]}
    assert len(photos) == 5 and len(lines) == 6
    for line in lines[:-1]:
        photo = photos[line["image_id"]]
        for name in ("caption", "references", "cider", "failures", "categories"):
            assert photo[name] == line[name]
        assert "".join(text for text, _, _ in photo["tokens"]).removesuffix(" (end)").strip() == line["caption"]
        assert (
            all(0 < probability <= 1 for _, probability, _ in photo["tokens"])
            and 0 < photo["mean_token_probability"] <= 1
        )
        assert photo["map"]["rows"] == photo["map"]["columns"] == 3
        assert len(base64.b64decode(photo["map"]["values"])) == 9
        image = Image.open(io.BytesIO(base64.b64decode(photo["image"])))
        assert image.format == "WEBP" and image.size == (224, 224)
    assert [identity for identity, _ in page.data["skipped"]] == ["<i>4</i>"]
    titles = [table["title"] for table in page.data["tables"]]
    assert titles == ["Scores", "Failures", "Categories", "Gender", "Images that aren't photos"]
    assert len(page.data["unlike_photos"]) == 20


@whole
def test_captions_are_text_and_never_markup(page, evaluated):
    text = (evaluated / "report.html").read_text(encoding="utf-8")
    assert "alert(1)" in text and EVIL not in text
    assert page.tags.count("script") == 2 and "b" not in page.tags and "i" not in page.tags
    assert any(
        " ".join(EVIL.split()) in reference for photo in page.data["photos"] for reference in photo["references"]
    )
    # The page's script inserts values as text.
    assert all(word not in page.scripts[1] for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval("))


@whole
def test_the_report_fetches_nothing(page):
    assert not [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert "http" not in page.scripts[1]


@whole
def test_fewer_photos_are_drawn_by_seed_and_none_means_no_report(repository, evaluated, tmp_path):
    data = str(evaluated.parent / "data")
    flags = ["--model_name_or_path", str(repository), "--dataset_name", data, "--num_beams", "1"]
    main([*flags, "--report_photos", "2", "--output_dir", str(tmp_path / "two")])
    found = Page((tmp_path / "two" / "report.html").read_text(encoding="utf-8")).data
    assert len(found["photos"]) == 2 and "2 of them are shown" in found["about"]
    assert [table["title"] for table in found["tables"]] == ["Scores"] and "failures" not in found["photos"][0]
    main([*flags, "--report_photos", "0", "--output_dir", str(tmp_path / "none")])
    assert not (tmp_path / "none" / "report.html").exists()
    assert not (tmp_path / "none" / "failures.json").exists()


@whole
def test_failures_json_holds_the_tables(evaluated):
    found = json.loads((evaluated / "failures.json").read_text(encoding="utf-8"))
    assert {"failures", "gender", "categories", "token_probability", "unlike_photos"} == set(found)
    assert set(found["failures"]) == {"model", "human", "other_photos"}
    assert [row["kind"] for row in found["unlike_photos"]] == [
        *("blank", "noise", "page of text", "bar chart", "drawn scene")
    ]
    assert all(row["pictures"] == len(row["captions"]) == 5 for row in found["unlike_photos"])
    assert Image.open(evaluated / "unlike_photos.png").width > 600


def test_a_map_keeps_its_signs_and_its_peak():
    encoded = encode_map(torch.tensor([[0.5, -1.0, 0.0], [0.25, 0.1, 0.004]]))
    values = [byte - 256 if byte > 127 else byte for byte in base64.b64decode(encoded["values"])]
    assert values == [64, -127, 0, 32, 13, 1] and encoded["peak"] == 0.5
    assert (encoded["rows"], encoded["columns"]) == (2, 3)


def test_a_figure_that_is_no_number_is_an_error_and_not_a_broken_page(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path / "report.html", {"photos": [{"cider": float("nan")}]})
    assert not (tmp_path / "report.html").exists()
