import json
import shutil

import pytest

from tinycap.evaluation import release


SCORES = {"cider": 21.456, "bleu_1": 50.0, "bleu_4": 12.0, "rouge_l": 40.0, "distinct_captions": 321}
FIDELITY = {
    **{"cosine_distance": 0.2, "constant_cosine_distance": 0.4, "centered_cosine": 0.5},
    **{"recall_at_1": 7.0, "recall_at_5": 21.0},
}


@pytest.fixture
def folders(repository, tmp_path, monkeypatch):
    """The folders that a release is made of, and a root to put it in."""
    (tmp_path / "root" / "docs").mkdir(parents=True)
    shutil.copy(release.ROOT / "docs" / "model_card_template.md", tmp_path / "root" / "docs")
    monkeypatch.setattr(release, "ROOT", tmp_path / "root")
    evaluation = {
        **SCORES,
        "num_images": 1000,
        "decoding": {"num_beams": 3},
        "fidelity": FIDELITY,
        "baselines": {
            name: {**SCORES, "cider": cider} for name, cider in (("constant", 9.5), ("shuffled", 4.0), ("human", 78.9))
        },
    }
    recalls = {f"{way}_recall_at_{k}": 3.0 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    contents = {
        "evaluation/eval_results.json": json.dumps(evaluation),
        "teacher/eval_results.json": json.dumps(recalls),
        "teacher/metrics.jsonl": '{"step": 9, "elapsed_seconds": 3600.0}\n',
        "first/metrics.jsonl": '{"step": 1, "elapsed_seconds": 5.0}\n{"step": 9, "elapsed_seconds": 5400.0}\n',
        "agreement/tokenizer_agreement.json": '{"largest_move": 0.125}',
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    shutil.copytree(repository, tmp_path / "model")
    (tmp_path / "model" / "metrics.jsonl").write_text('{"step": 9, "elapsed_seconds": 1800.0}\n')
    return tmp_path


def flags(folders) -> list[str]:
    return [
        *("--model_name_or_path", str(folders / "model"), "--evaluation", str(folders / "evaluation")),
        *("--teacher", str(folders / "teacher"), "--agreement", str(folders / "agreement")),
        *("--earlier_stages", str(folders / "first")),
    ]


def test_a_release_puts_model_and_card_at_the_root(folders):
    release.main(flags(folders))
    root = folders / "root"
    for name in release.RELEASED:
        assert (root / name).read_bytes() == (folders / "model" / name).read_bytes()
    card = (root / "model_card.md").read_text()
    assert "value: 21.46" in card and "| **TinyCap** | 21.5 | 50.0 | 12.0 | 40.0 | 321 |" in card
    assert "| one constant caption | 9.5 |" in card and "| a human | 78.9 |" in card
    assert "student 2.0 hours" in card, "both stages of it"
    assert "$" not in card.split("```bash")[0] and "@" not in card


@pytest.mark.parametrize(
    "name, words", [("teacher/metrics.jsonl", "log of a run"), ("agreement/tokenizer_agreement.json", "no such file")]
)
def test_a_missing_figure_leaves_the_root_as_it_was(folders, name, words):
    (folders / name).unlink()
    with pytest.raises(ValueError, match=words):
        release.main(flags(folders))
    assert [path.name for path in (folders / "root").iterdir()] == ["docs"]


def test_an_evaluation_without_baselines_is_an_error(folders):
    path = folders / "evaluation" / "eval_results.json"
    content = json.loads(path.read_text())
    del content["baselines"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected an evaluation with baselines"):
        release.main(flags(folders))
