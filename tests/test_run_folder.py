"""The output folder: what is an error, what is deleted, and what a resumed run may change."""

import json
from argparse import Namespace

import pytest
from accelerate import Accelerator

from tinycap import train_distill
from tinycap.training.run_folder import RunFolder, check_output_dir, compare_args, stopped_in_teacher


def run_of(folder, **changes) -> Namespace:
    values = {"dataset_name": "photos", "teacher_name_or_path": None, "model_name_or_path": None}
    flags = {"overwrite_output_dir": False, "resume_from_checkpoint": None, "on_bad_row": "skip", **values, **changes}
    return Namespace(output_dir=str(folder), **flags)


def start_in(folder, **changes) -> None:
    """What a run does to its folder before its first step."""
    RunFolder(run_of(folder, **changes), Accelerator(cpu=True), "tinycap").open()


def leave_a_run(folder, **changes) -> None:
    """Writes the files of a run on scenes, its teacher included."""
    folder.mkdir(exist_ok=True)
    for place in (folder, folder / "teacher"):
        place.mkdir(exist_ok=True)
        values = {"output_dir": str(place), "dataset_name": None, "teacher_name_or_path": None, **changes}
        (place / "train_args.json").write_text(json.dumps(values))
        (place / "metrics.jsonl").write_text("{}")
        (place / "model.safetensors").write_bytes(b"")
        for checkpoint in ("checkpoint-3", ".checkpoint-4"):
            (place / checkpoint).mkdir()
            for name in ("trainer_state.json", "model.safetensors", "optimizer.bin", "random_states_0.pkl"):
                (place / checkpoint / name).write_text("{}")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_with_anything_in_it_is_refused_and_stays_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        check_output_dir(run_of(tmp_path))
    check_output_dir(run_of(tmp_path, resume_from_checkpoint="latest"))
    assert names(tmp_path) == ["notes.txt"]


def test_resuming_clears_a_half_written_checkpoint_but_no_folder_of_others(tmp_path):
    leave_a_run(tmp_path)
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(json.dumps({"files": {}}))
    (tmp_path / ".checkpoint-7").mkdir()
    (tmp_path / ".checkpoint-7" / "thesis.txt").write_text("mine")
    (tmp_path / ".checkpoint-8").symlink_to(tmp_path / "teacher")
    start_in(tmp_path, dataset_name=None, resume_from_checkpoint="latest")
    assert not (tmp_path / ".checkpoint-4").exists()
    assert (tmp_path / ".checkpoint-7" / "thesis.txt").is_file() and (tmp_path / ".checkpoint-8").is_symlink()


def test_what_a_start_without_a_step_left_is_no_obstacle(tmp_path):
    (tmp_path / "skipped.jsonl").write_text("{}")
    (tmp_path / "train_args.json").write_text(json.dumps({"output_dir": "x"}))
    start_in(tmp_path, learning_rate=3)
    assert names(tmp_path) == ["train_args.json"]
    assert json.loads((tmp_path / "train_args.json").read_text())["learning_rate"] == 3


def test_overwriting_clears_a_run_and_leaves_other_files_alone(tmp_path):
    leave_a_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    start_in(tmp_path, overwrite_output_dir=True)
    assert names(tmp_path) == ["model.safetensors", "notes.txt", "train_args.json"]


@pytest.mark.parametrize(
    "name",
    ["checkpoint-3", "checkpoint-3/thesis.txt", "checkpoint-best/pytorch_model.bin", "teacher", "metrics.jsonl/a"],
)
@pytest.mark.parametrize("earlier_run", [True, False])
def test_overwriting_refuses_what_no_run_has_written(name, earlier_run, tmp_path):
    if earlier_run:
        (tmp_path / "train_args.json").write_text(json.dumps({"output_dir": "x", "dataset_name": None}))
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=f"--overwrite_output_dir: .*{name.split('/')[0]}, which none has written"):
        check_output_dir(run_of(tmp_path, overwrite_output_dir=True))
    assert path.read_text() == "mine"


@pytest.mark.parametrize("own", ["a run on scenes", "a teacher that was brought along", "somebody's notes in it"])
def test_overwriting_deletes_a_teacher_only_if_the_run_trained_it(own, tmp_path):
    brought = {"dataset_name": "photos", "teacher_name_or_path": "out/teacher"}
    leave_a_run(tmp_path, **(brought if "brought" in own else {}))
    if "notes" in own:
        (tmp_path / "teacher" / "notes.txt").write_text("mine")
    args = run_of(tmp_path, overwrite_output_dir=True)
    if own == "a run on scenes":
        check_output_dir(args)
        return
    with pytest.raises(ValueError, match="got teacher, which none has written"):
        check_output_dir(args)


def test_a_checkpoint_of_transformers_trainer_is_not_a_runs(tmp_path):
    leave_a_run(tmp_path)
    (tmp_path / "checkpoint-3" / "training_args.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="got checkpoint-3, which none has written"):
        check_output_dir(run_of(tmp_path, overwrite_output_dir=True))


@pytest.mark.parametrize("overwrite", [True, False])
def test_the_codes_own_folder_and_what_is_read_are_refused_at_once(overwrite, tmp_path):
    code = train_distill.__file__.rsplit("/", 1)[0]
    with pytest.raises(ValueError, match="--output_dir: expected a folder other than the code's own"):
        check_output_dir(run_of(code, overwrite_output_dir=overwrite))
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "train_distill.py").write_text("")
    with pytest.raises(ValueError, match="other than the code's own"):
        check_output_dir(run_of(tmp_path / "clone", overwrite_output_dir=overwrite))
    for name in ("model_name_or_path", "teacher_name_or_path", "dataset_name"):
        with pytest.raises(ValueError, match=f"other than --{name}"):
            check_output_dir(run_of(tmp_path, overwrite_output_dir=overwrite, **{name: f"{tmp_path}/clone/.."}))


def test_an_output_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="got the file"):
        check_output_dir(run_of(tmp_path / "out", overwrite_output_dir=True))


def test_a_scenes_run_that_was_stopped_in_its_teacher_goes_on(tmp_path):
    args = run_of(tmp_path, dataset_name=None, resume_from_checkpoint="latest")
    assert not stopped_in_teacher(args)
    leave_a_run(tmp_path)
    assert not stopped_in_teacher(args), "it has a checkpoint of its own"
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    assert stopped_in_teacher(args)


def test_other_arguments_are_refused_with_both_values():
    saved = {"learning_rate": 0.1, "seed": 1, "dataloader_num_workers": 1, "dataset_name": "here", "removed": 3}
    compare_args("c", saved, {**saved, "dataloader_num_workers": 4})
    with pytest.raises(ValueError, match=r"--learning_rate: expected 0.1, got 0.2; --seed: expected 1, got 2\."):
        compare_args("c", saved, {**saved, "learning_rate": 0.2, "seed": 2})
    with pytest.raises(ValueError, match="--dataset_name: expected here, got there"):
        compare_args("c", saved, {**saved, "dataset_name": "there"})
    compare_args("c", saved, {**saved, "dataset_name": "there"}, free=("dataset_name",))
    with pytest.raises(ValueError, match="--mixup: expected None, got 0.5"):
        compare_args("c", saved, {**saved, "mixup": 0.5})


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "cosine", "linear"])
def test_a_run_is_made_longer_only_with_a_schedule_that_allows_it(schedule):
    saved = {"lr_scheduler_type": schedule, "max_train_steps": 100}
    if "constant" in schedule:
        compare_args("c", saved, {**saved, "max_train_steps": 200})
    else:
        with pytest.raises(ValueError, match="--max_train_steps: expected 100, got 200"):
            compare_args("c", saved, {**saved, "max_train_steps": 200})
