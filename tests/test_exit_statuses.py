"""Exit statuses of the commands as real processes: full disks, closed outputs, signals; see docs/command_line.md."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from fresh import Process
from safetensors.numpy import load_file
from tiny import draw_picture

from tinycap import REPOSITORY


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux"),
]
TINYCAP, EVALUATION = ("-m", "tinycap.deploy"), ("-m", "tinycap.evaluation")


def start(*words: object, **options) -> Process:
    return Process(*words, path=(REPOSITORY,), **options)


def end(process: Process) -> tuple[int, str]:
    """Its exit status and the last line of its standard error, where no traceback is."""
    status, errors = process.wait(), process.errors()
    assert "Traceback" not in errors and "Exception ignored" not in errors, errors
    return status, (errors.strip().splitlines() or [""])[-1]


def wait_for(is_there, process: Process) -> None:
    for _ in range(6000):
        if is_there():
            return
        assert process.poll() is None, process.errors()
        time.sleep(0.01)
    raise AssertionError("it never came")


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(4):
        draw_picture(number).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def training(photos, config_name) -> list[str]:
    return [
        *(REPOSITORY / "train_distill.py", "--dataset_name", photos, "--config_name", config_name),
        *("--distill_weight", "0", "--vocab_size", "300", "--max_caption_length", "12", "--num_beams", "1"),
        *("--per_device_train_batch_size", "7", "--max_train_steps", "2", "--logging_steps", "1"),
        *("--dataloader_num_workers", "0", "--checkpointing_steps", "100000"),
    ]


@pytest.mark.parametrize(
    "status, kind, more, text",
    [
        (1, "caption", [], "4 of 5 images done, 1 could not be read"),
        (2, "caption", ["--model", "/no/where"], "/no/where: no such folder"),
        (2, "export", ["--model", "images"], "expected model_type tinycap, got"),
        (2, "evaluation", ["--split", "no"], "no split 'no'"),
        (2, "evaluation", ["--beams", "2"], "lists all flags"),
        (2, "training", ["--train_split", "no"], "no split 'no'"),
        (2, "training", ["--nonsense"], "lists all flags"),
        (2, "recipe", [], "got rm"),
    ],
)
def test_bad_images_are_1_and_bad_arguments_2(repository, images, photos, training, tmp_path, status, kind, more, text):
    (images / "bad.png").write_bytes(b"no image")
    (tmp_path / "recipe.yaml").write_text("stages: {a: {run: rm}}")
    words = {
        "caption": (*TINYCAP, "caption", images, "--model", repository),
        "export": (*TINYCAP, "export", "--output", tmp_path / "x"),
        "evaluation": (*EVALUATION, "--model_name_or_path", repository, "--dataset_name", photos),
        "training": (*training, "--output_dir", tmp_path / "out"),
        "recipe": ("-m", "tinycap.training.recipe", tmp_path / "recipe.yaml", "a=b"),
    }[kind]
    found, line = end(start(*words, *more, cwd=tmp_path))
    assert found == status and text in line


@pytest.mark.parametrize("command", ["caption", "embed", "trim-vocab"])
def test_a_full_disk_behind_the_outputs_of_tinycap_is_3(repository, images, tmp_path, command):
    output = {"caption": "c.csv", "embed": "e.npy", "trim-vocab": "small"}[command]
    words = (*TINYCAP, command, images, "--model", repository, "--output", tmp_path / output)
    status, line = end(start(*words, file_limit=300))
    assert status == 3 and f"tinycap {command}: error: cannot write {tmp_path / output}" in line
    left = {path.name for path in tmp_path.rglob("*") if path.suffix not in (".png", ".jsonl", ".csv")}
    assert left <= {"images", "small"}, "nothing half written"
    assert end(start(*words))[0] == 0, "the same command goes on"


@pytest.mark.parametrize("command", ["caption", "trim-vocab", "evaluation"])
def test_a_standard_output_that_cannot_be_written_is_3(repository, images, photos, tmp_path, command):
    words = {
        "caption": (*TINYCAP, command, images, "--model", repository),
        "trim-vocab": (*TINYCAP, command, images, "--model", repository, "--output", tmp_path / "small"),
        "evaluation": (*EVALUATION, "--model_name_or_path", repository, "--dataset_name", photos),
    }[command]
    words += ("--output_dir", tmp_path / "out") if command == "evaluation" else ()
    with open("/dev/full", "w") as full:
        status, line = end(start(*words, stdout=full))
    assert status == 3 and "No space left on device" in line
    left = {"trim-vocab": tmp_path / "small" / "model.safetensors", "evaluation": tmp_path / "out" / "report.html"}
    assert command == "caption" or left[command].is_file(), "what it writes besides"


def test_a_standard_output_that_was_closed_before_python_began_is_3(repository, images):
    process = start(*TINYCAP, "caption", images, "--model", repository, closed=("stdout",))
    assert end(process) == (3, "tinycap caption: error: cannot write to the standard output: it is closed")


def test_captions_that_nobody_reads_on_are_0(repository, images):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        words = (*TINYCAP, "caption", images, "--model", repository, "--batch-size", "1", "--quiet")
        assert end(start(*words, stdout=nobody)) == (0, "")


def test_a_full_disk_behind_a_report_keeps_what_is_written(repository, photos, tmp_path):
    words = (*EVALUATION, "--model_name_or_path", repository, "--dataset_name", photos, "--overwrite_output_dir")
    words += ("--report_photos", "0", "--output_dir", tmp_path)
    assert end(start(*words))[0] == 0
    sheet = (tmp_path / "samples.png").read_bytes()
    status, line = end(start(*words, file_limit=5_000))
    assert status == 3 and f"cannot write {tmp_path / 'samples.png'}: File too large" in line
    assert (tmp_path / "samples.png").read_bytes() == sheet and json.loads((tmp_path / "eval_results.json").read_text())
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_behind_a_training_is_3(training, tmp_path, monkeypatch):
    output = ("--output_dir", tmp_path / "out", "--overwrite_output_dir")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    status, line = end(start(*training, *output, file_limit=10_000))
    assert status == 3 and f"probably the cache in HF_DATASETS_CACHE ({tmp_path / 'cache'})" in line, line
    with open("/dev/full", "w") as full:
        status, line = end(start(*training, *output, stdout=full))
    assert status == 3 and "No space left on device" in line
    assert load_file(tmp_path / "out" / "model.safetensors") and (tmp_path / "out" / "README.md").is_file()


def test_a_process_with_workers_ends():
    """Those of `init_worker` ignore SIGTERM, by which `multiprocessing` ends what is left of them, and waits."""
    code = """
from torch.utils.data import DataLoader
from tinycap.training.loop import init_worker
loader = DataLoader([1, 2], num_workers=1, persistent_workers=True, worker_init_fn=init_worker)
next(iter(loader))
"""
    assert end(start("-c", code, cwd=REPOSITORY))[0] == 0


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_are_130_and_143_and_lose_nothing(repository, images, photos, tmp_path, number, status):
    for copy in range(3000):
        os.link(images / "0.png", images / f"copy-{copy}.png")
    output = tmp_path / "c.jsonl"
    words = ("--model", repository, "--output", output, "--batch-size", "2", "--quiet")
    process = start(*TINYCAP, "caption", images, *words)
    wait_for(lambda: output.exists() and output.stat().st_size, process)
    process.send_signal(number)
    what = {130: "interrupted", 143: "terminated"}[status]
    assert end(process) == (status, f"tinycap caption: {what}; the same command goes on from here")
    assert all(json.loads(line)["caption"] for line in output.read_text().splitlines())
    assert not list(tmp_path.glob(".*")), "neither a lock nor half a file"
    out = tmp_path / "out"
    process = start(*EVALUATION, "--model_name_or_path", repository, "--dataset_name", photos, "--output_dir", out)
    wait_for(out.exists, process)
    process.send_signal(number)
    assert end(process) == (status, f"python -m tinycap.evaluation: {what}; start it again")


# A launcher, the training that it starts, and a data loader's worker, which the training's last step needs.
STAGE = """
import signal, subprocess, sys, time
from pathlib import Path
this, folder = sys.argv[:2]
if len(sys.argv) == 2:
    sys.exit(subprocess.run([sys.executable, "-S", this, folder, "training"]).returncode)
if sys.argv[2] == "worker":
    time.sleep(60)
worker = subprocess.Popen([sys.executable, "-S", this, folder, "worker"])
def stop(number, frame):
    time.sleep(0.2)
    if worker.poll() is None:
        Path(folder, "checkpoint").touch()
    worker.kill()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
Path(folder, "started").touch()
time.sleep(60)
"""
RECIPE = """
import sys
from tinycap.commands import run_command
from tinycap.training import recipe
recipe.stage_command = lambda stage, folder: [sys.executable, "-S", str(folder.with_name("stage.py")), str(folder)]
sys.exit(run_command("recipe", recipe.main, "the same command goes on from here"))
"""


def test_a_terminated_recipe_ends_its_stage_which_writes_a_checkpoint(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "recipe.yaml").write_text(json.dumps({"stages": {"one": {"run": "train_distill.py"}}}))
    process = start("-c", RECIPE, tmp_path / "recipe.yaml", "a=b", "--output_dir", tmp_path)
    wait_for((tmp_path / "one" / "started").exists, process)
    process.terminate()
    assert end(process) == (143, "recipe: terminated; the same command goes on from here")
    assert (tmp_path / "one" / "checkpoint").exists()
