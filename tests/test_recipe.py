"""Recipes: several stages in one command."""

import sys
from pathlib import Path

import pytest

from tinycap import REPOSITORY, train_distill, train_teacher
from tinycap.commands import run_command
from tinycap.training import efficientnet_lite, recipe, soup, text_encoder


RECIPE = REPOSITORY / "configs" / "flickr8k.yaml"
VARIABLES = ["dataset=photos", "unlabelled=more", "text_model=encoder"]


@pytest.fixture
def launched(monkeypatch) -> list[list[str]]:
    """Records the stages' commands, which aren't run, and writes their results."""
    commands = []

    def run(name, command):
        commands.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir(parents=True)
        for name in recipe.RESULTS.values():
            (folder / name).write_text("{}")

    monkeypatch.setattr(recipe, "run_stage", run)
    return commands


def flags_of(command: list[str], run: str) -> list[str]:
    return command[command.index(run) + 1 :]


def test_the_released_recipe_runs_each_stage_once_with_flags_that_parse(launched, tmp_path):
    for _ in range(2):
        recipe.main([str(RECIPE), "--output_dir", str(tmp_path), *VARIABLES])
    assert len(launched) == 16, "a second call repeats nothing"
    assert all(command[0] == sys.executable for command in launched)
    assert flags_of(launched[0], efficientnet_lite.__name__) == ["--output_dir", str(tmp_path / "efficientnet_lite0")]
    teacher = train_teacher.parse_args(flags_of(launched[2], str(REPOSITORY / "train_teacher.py")))
    towers = [str(tmp_path / f"efficientnet_lite{variant}") for variant in (0, 2)]
    assert teacher.image_model_name_or_path == towers and teacher.freeze_image_model
    script = str(REPOSITORY / "train_distill.py")
    stages = [train_distill.parse_args(flags_of(command, script)) for command in launched[3:9]]
    assert [args.image_size for args in stages] == [112, 112, 224, 224, 224, 224]
    assert [args.mixup for args in stages] == [0, 0.5, 0.5, 0, 0, 0]
    assert [args.optimizer for args in stages] == [*["muon"] * 4, "adamw", "adamw"]
    assert [args.objective for args in stages] == [*["cross_entropy"] * 4, "scst", "scst"]
    assert [args.freeze_vision_model for args in stages] == [False, False, False, True, True, True]
    folders = [args.output_dir for args in stages]
    assert [args.model_name_or_path for args in stages[1:]] == [*folders[:4], folders[3]]
    assert all(args.dataset_name == "photos" for args in stages)
    mean = soup.parse_args(flags_of(launched[9], soup.__name__))
    assert mean.models == [folders[4], folders[5], folders[3]] and mean.weights == [1, 1, 1]
    assert [args.cross_entropy_weight for args in stages] == [0, 0, 0, 0, 0.03, 0.04]
    assert stages[-3].teacher_cache_dir == stages[-1].teacher_cache_dir == str(tmp_path / "student_cache")
    student, unlabelled = (train_distill.parse_args(flags_of(launched[index], script)) for index in (10, 12))
    second_mean, last_mean = (soup.parse_args(flags_of(launched[index], soup.__name__)) for index in (11, 13))
    assert (student.objective, unlabelled.objective) == ("scst", "cross_entropy")
    assert not student.freeze_vision_model and student.distill_weight == 2 and student.horizontal_flip
    assert student.model_name_or_path == mean.output_dir
    assert second_mean.models == [student.output_dir, mean.output_dir]
    assert unlabelled.model_name_or_path == second_mean.output_dir and unlabelled.unlabelled_dataset_name == "more"
    assert last_mean.models == [unlabelled.output_dir, student.output_dir, mean.output_dir]
    assert last_mean.output_dir == str(tmp_path / "flickr8k")
    texts = train_teacher.parse_args(flags_of(launched[14], str(REPOSITORY / "train_teacher.py")))
    assert texts.image_model_name_or_path == [last_mean.output_dir] and texts.freeze_image_model
    search = text_encoder.parse_args(flags_of(launched[15], text_encoder.__name__))
    assert search.model_name_or_path == last_mean.output_dir and search.teacher_name_or_path == texts.output_dir


def test_an_interrupted_stage_goes_on_from_its_newest_checkpoint(launched, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "complete_checkpoints", lambda folder: [folder / "checkpoint-7"])
    recipe.main([str(RECIPE), "--output_dir", str(tmp_path), *VARIABLES])
    assert launched[2][-2:] == ["--resume_from_checkpoint", "latest"]


def test_a_stage_that_fails_is_1_and_its_messages_stay(tmp_path, monkeypatch, capfd):
    (tmp_path / "recipe.yaml").write_text("stages: {one: {run: train_distill.py}}")
    failing = [sys.executable, "-c", "import sys; sys.exit('no split')"]
    monkeypatch.setattr(recipe, "stage_command", lambda stage, folder: failing)
    assert run_command("recipe", lambda: recipe.main([str(tmp_path / "recipe.yaml")])) == 1
    messages = "no split\nrecipe: error: stage one failed with exit status 1; see its messages above\n"
    assert capfd.readouterr().err == messages


@pytest.mark.parametrize(
    "text, words",
    [
        ("stages: {a: {run: train_distill.py, dataset_name: '{photos}'}}", ["stage a", "no value for 'photos'"]),
        ("stages: {a: {run: rm}}", ["stage a", "expected one of train_teacher.py", "got rm"]),
        ("stages: {a: {run: train_distill.py, from: b}}", ["stage a", "expected a stage before it, got b"]),
        ("learning_rate: 3", ["expected a recipe with `stages`"]),
        ("stages: [a", ["expected a recipe with `stages`"]),
    ],
)
def test_a_bad_recipe_is_an_error_before_anything_runs(text, words, launched, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        recipe.main([str(path), "--output_dir", str(tmp_path / "out")])
    assert all(word in str(error.value) for word in [str(path), *words])
    assert not launched and not (tmp_path / "out").exists()
