import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from scripts import release
from tinycap.evaluation.failures import analyse


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the curves as an empty file."""
    monkeypatch.setattr(release, "plot_curves", lambda metrics, path: Path(path).touch())


undrawn_curves = pytest.mark.usefixtures("undrawn")

SCORES = {"cider": 21.456, "bleu_1": 50.0, "bleu_4": 12.0, "rouge_l": 40.0, "distinct_captions": 321}
FIDELITY = {
    **{"cosine_distance": 0.2, "constant_cosine_distance": 0.4, "centered_cosine": 0.5},
    **{"recall_at_1": 7.0, "recall_at_5": 21.0},
}


def _turn(milliseconds: float, ratio: float) -> dict:
    return {"cpu": {"milliseconds": milliseconds, "ratio_to_floor": ratio}, "wall": {}}


def _system(parameters: int, size: int, seconds: float, memory: float) -> dict:
    return {"parameters": parameters, "bytes_on_disk": size, "cpu_seconds": seconds, "peak_memory_mb": memory}


LATENCY = {
    **{"num_tokens": 16, "machine": "x86_64, 2 cores", "date": "2026-11-25"},
    "batches": {"1": {"TinyCap, pipeline, from a file": _turn(24.6, 1.236), "vit-gpt2": _turn(1066.4, 43.72)}},
    "systems": {
        "TinyCap, pipeline": _system(6_372_672, 25_500_000, 3.97, 435.9),
        "reference implementation": {"parameters": 18_200_000},
        "vit-gpt2": _system(239_200_000, 956_800_000, 4.94, 1336.2),
    },
}


@pytest.fixture
def folders(repository, tmp_path, monkeypatch):
    """The input folders of a release, and a root for its output."""
    (tmp_path / "root" / "docs").mkdir(parents=True)
    shutil.copy(release.ROOT / "docs" / "model_card_template.md", tmp_path / "root" / "docs")
    (tmp_path / "root" / "README.md").write_text("---\nlicense: old\n---\n\n# The readme\n\n---\n\nText.\n")
    monkeypatch.setattr(release, "ROOT", tmp_path / "root")
    evaluation = {
        **SCORES,
        "vocabulary_used": 4.25,
        "num_images": 1000,
        "decoding": {"num_beams": 3, "length_penalty": 0.8},
        "fidelity": FIDELITY,
        "baselines": {
            name: {**SCORES, "cider": cider, "caption": "A dog runs.", "chosen_from": "training captions"}
            for name, cider in (("constant", 9.5), ("shuffled", 4.0), ("human", 78.9), ("model_leave_one_out", 20.0))
        },
    }
    captions = ["A black dog runs on snow.", "Two women sit on a sled.", "A boy | with a $5 ball."]
    references = [
        ["A brown dog runs on sand.", "A tan dog on a beach."],
        ["A man on a bench."] * 2,
        ["A boy with a kite.", "A kid with a toy."],
    ]
    failures = analyse(captions, references, [11.0, 22.0, 33.0], seed=0)
    photos = failures.pop("photos")
    failures["token_probability"] = 0.387
    failures["unlike_photos"] = [
        {
            **{"kind": "noise", "distinct": 3, "pictures": 20, "names_person_or_dog": 100.0},
            **{"token_probability": 0.431, "commonest": "A dog runs."},
        }
    ]
    lines = [
        {"image_id": f"photo-{index}", "caption": caption, "references": group, "cider": 11.0 * (index + 1), **photo}
        for index, (caption, group, photo) in enumerate(zip(captions, references, photos))
    ]
    lines.append({"image_id": "photo-9", "caption": None, "error": "broken"})
    contents = {
        "evaluation/eval_results.json": json.dumps(evaluation),
        "evaluation/failures.json": json.dumps(failures),
        "evaluation/captions.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        "first/metrics.jsonl": '{"step": 1, "loss": 9.0}\n{"step": 9, "elapsed_seconds": 5400.0}\n',
        "agreement/tokenizer_agreement.json": '{"largest_move": 0.125}',
        "latency/caption_latency.json": json.dumps(LATENCY),
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    Image.new("RGB", (90, 70), "red").save(tmp_path / "evaluation" / "unlike_photos.png")
    shutil.copytree(repository, tmp_path / "model")
    (tmp_path / "model" / "metrics.jsonl").write_text('{"step": 9, "elapsed_seconds": 1800.0, "loss": 2.0}\n')
    return tmp_path


def flags(folders) -> list[str]:
    return [
        *("--model_name_or_path", str(folders / "model"), "--evaluation", str(folders / "evaluation")),
        *("--agreement", str(folders / "agreement"), "--latency", str(folders / "latency")),
        *("--stages", str(folders / "first"), str(folders / "model")),
    ]


def read_card(folders) -> str:
    """The card without line breaks, which depend on the template."""
    return " ".join((folders / "root" / "model_card.md").read_text().split())


def test_a_release_puts_model_and_card_at_the_root(folders):
    release.main(flags(folders))
    root = folders / "root"
    for name in release.RELEASED:
        assert (root / name).read_bytes() == (folders / "model" / name).read_bytes()
    card = read_card(folders)
    assert "value: 21.46" in card and "| **TinyCap** | 21.5 | 50.0 | 12.0 | 40.0 | 321 |" in card
    assert "| one constant caption | 9.5 |" in card and "| a human, against the others | 78.9 |" in card
    assert "beam search with 3 beams, length penalty 0.8" in card
    assert "took 2.0 hours" in card, "both stages"
    assert "R@1 7.0 % and R@5 21.0 %" in card and "--teacher_name_or_path" in card
    assert "| TinyCap, pipeline | 25, 1.24 | 6.4 M | 25.5 | 4.0 | 436 |" in card
    assert "| vit-gpt2 | 1066, 43.72 | 239.2 M | 956.8 | 4.9 | 1,336 |" in card and "16 tokens" in card
    assert "{{" not in card and "{%" not in card and "## Search" not in card
    assert Image.open(root / "docs" / "curves.png").width > 300
    assert Image.open(root / "docs" / "unlike_photos.png").size == (90, 70)


@undrawn_curves
def test_a_text_encoder_comes_with_what_it_finds(folders, text_repository):
    shutil.copytree(text_repository, folders / "model", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="--retrieval: expected with a text encoder"):
        release.main(flags(folders))
    names = [f"{way}_recall_at_{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    row = {"category": "dogs", "images": 321, "share": 32.1, "average_precision": 65.4}
    row |= {"named_in": 310, "caption_precision": 81.0, "precision": 72.0}
    other = {**row, "category": "snow", "named_in": 0, "caption_precision": None, "precision": None}
    found = {
        **{"num_images": 1000, "captions_per_image": 5},
        "recall": {"student": dict(zip(names, range(11, 17))), "teachers_texts": dict(zip(names, range(21, 27)))},
        "reranking": {
            **{"num_candidates": 100, "num_training_images": 500, "weight": 0.02},
            **{
                name: {f"recall_at_{k}": k * each for k in (1, 5, 10)}
                for name, each in (("cosine", 1), ("reranked", 2))
            },
        },
        "zero_shot": {"top_1": 60.0, "chance": 20.0, "num_images": 990, "categories": [row, other]},
    }
    (folders / "found").mkdir()
    (folders / "found" / "retrieval.json").write_text(json.dumps(found))
    release.main([*flags(folders), "--retrieval", str(folders / "found")])
    card = read_card(folders)
    assert "| **images and texts of this model** | 11.0 | 12.0 | 13.0 | 14.0 | 15.0 | 16.0 |" in card
    assert "| its images, texts of the head it learned | 21.0 | 22.0 |" in card and "images of the fitted" not in card
    assert "the cosine finds 1.0 / 5.0 / 10.0 %" in card and "sorts them again, 2.0 / 10.0 / 20.0 %" in card
    assert "| dogs | 321 | 32 | 65 | 310 | 81 | 72 |" in card and "| snow | 321 | 32 | 65 | 0 | - | - |" in card
    assert "{{" not in card and "{%" not in card
    lines = (folders / "root" / "model_card.md").read_text().splitlines()
    table = next(index for index, line in enumerate(lines) if line.startswith("| **images and texts"))
    assert lines[table + 1].startswith("| its images") and lines[table + 2] == ""


@undrawn_curves
def test_a_release_has_the_calibration_of_its_own_weights_or_none(folders):
    old, new = folders / "root" / "confidence.json", folders / "model" / "confidence.json"
    old.write_text("old")
    release.main(flags(folders))
    assert not old.exists()
    new.write_text("new")
    release.main(flags(folders))
    assert old.read_text() == "new"


@undrawn_curves
def test_a_length_penalty_that_no_config_names_is_the_default(folders):
    path = folders / "evaluation" / "eval_results.json"
    evaluation = json.loads(path.read_text())
    path.write_text(json.dumps({**evaluation, "decoding": {"num_beams": 3, "length_penalty": None}}))
    release.main(flags(folders))
    assert "beam search with 3 beams, length penalty 1.0" in read_card(folders)


@undrawn_curves
def test_a_release_without_latency_keeps_the_section_of_the_card(folders):
    without = flags(folders)
    del without[(start := without.index("--latency")) : start + 2]
    with pytest.raises(ValueError, match="--latency is needed"):
        release.main(without)
    release.main(flags(folders))
    card = folders / "root" / "model_card.md"
    before = card.read_text()
    card.write_text(before.replace("| vit-gpt2 | 1066,", "| vit-gpt2 | 1077,"))
    release.main(without)
    assert card.read_text() == before.replace("| vit-gpt2 | 1066,", "| vit-gpt2 | 1077,")


@undrawn_curves
def test_an_evaluation_without_a_teacher_has_the_fidelity_of_the_log(folders):
    path = folders / "evaluation" / "eval_results.json"
    evaluation = json.loads(path.read_text())
    del evaluation["fidelity"]
    path.write_text(json.dumps(evaluation))
    release.main(flags(folders))
    card = read_card(folders)
    assert "student's for 56.0 %" in card and "--teacher_name_or_path" not in card


@undrawn_curves
def test_the_card_shows_what_is_wrong_with_evidence(folders):
    release.main(flags(folders))
    card = read_card(folders)
    assert "| wrong object | 33.3 | 0.0 | " in card and "| wrong count | 33.3 | 0.0 | " in card
    assert "- wrong object: “A boy \\| with a \\$5 ball.”: ball (humans: toy)" in card
    assert "- wrong count: “Two women sit on a sled.”: person: 2 (humans: 1)" in card
    assert "- wrong colour: “A black dog runs on snow.”: black dog (humans: brown)" in card
    assert "| photo-2 | A boy \\| with a \\$5 ball. | A boy with a kite. | 33 |" in card and "photo-9" not in card
    assert "| dogs | 1 | 11.0 | 100 | 100 | 0 | 0 |" in card
    assert "67 % of the captions name a person's gender" in card
    assert "| noise | 3 of 20 | 100 | 0.43 | A dog runs. |" in card and "is 0.39 on validation images" in card


@undrawn_curves
def test_the_hub_finds_the_results_in_card_and_readme(folders):
    release.main(flags(folders))
    for name in ("model_card.md", "README.md"):
        data = ModelCard.load(folders / "root" / name).data
        assert data.license == "other" and data.pipeline_tag == "image-to-text"
        results = {result.metric_name: result for result in data.eval_results}
        assert results["CIDEr"].metric_value == 21.46 and results["CIDEr"].metric_args == {"num_beams": 3}
        assert results["BLEU-4"].dataset_split == "validation"
    readme = (folders / "root" / "README.md").read_text()
    assert readme.endswith("---\n\n# The readme\n\n---\n\nText.\n") and "old" not in readme
    release.main(flags(folders))
    assert (folders / "root" / "README.md").read_text() == readme, "a second release changes nothing"


@pytest.mark.parametrize(
    "name, words",
    [
        ("first/metrics.jsonl", "log of a run"),
        ("agreement/tokenizer_agreement.json", "no such file"),
        ("latency/caption_latency.json", "no such file"),
        ("evaluation/failures.json", "no such file"),
        ("evaluation/unlike_photos.png", "--failures"),
    ],
)
def test_a_missing_file_leaves_the_root_unchanged(folders, name, words):
    (folders / name).unlink()
    with pytest.raises(ValueError, match=words):
        release.main(flags(folders))
    assert sorted(path.name for path in (folders / "root").iterdir()) == ["README.md", "docs"]
    assert [path.name for path in (folders / "root" / "docs").iterdir()] == ["model_card_template.md"]


def test_an_evaluation_without_failures_is_an_error(folders):
    path = folders / "evaluation" / "captions.jsonl"
    lines = [{**json.loads(line), "failures": {}} for line in path.read_text().splitlines()]
    del lines[0]["failures"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="--failures"):
        release.main(flags(folders))


def test_an_evaluation_without_baselines_is_an_error(folders):
    path = folders / "evaluation" / "eval_results.json"
    content = json.loads(path.read_text())
    del content["baselines"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="baselines.*was the evaluation run with"):
        release.main(flags(folders))
