"""Rules of the house that a reader relies on."""

import ast
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import tinycap
from tinycap import train_distill


ROOT = Path(tinycap.__file__).resolve().parent
MODEL_FILES = ("configuration_tinycap.py", "modeling_tinycap.py", "processing_tinycap.py", "pipeline_tinycap.py")


def imports_of(path: Path) -> set[str]:
    """First names of everything a file imports; relative imports by their file's name, with a dot."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(f".{node.module}" if node.level else node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", MODEL_FILES)
def test_what_trust_remote_code_runs_imports_the_standard_library_torch_and_transformers_only(name):
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers"} | {f".{file[:-3]}" for file in MODEL_FILES}
    assert imports_of(ROOT / name) <= allowed


@pytest.mark.parametrize(
    "folder, forbidden",
    [
        ("evaluation", "tinycap.train_"),
        ("training", "tinycap.evaluation"),
        ("training", "tinycap.train_"),
        ("training", "tinycap.deploy"),
    ],
)
def test_arrows_go_one_way(folder, forbidden):
    for path in (ROOT / folder).rglob("*.py"):
        assert forbidden not in path.read_text(encoding="utf-8"), path


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
    home = str(Path.home())
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("*/*.py"), *ROOT.glob("*.json")]:
        assert home not in path.read_text(encoding="utf-8"), path


def test_the_upload_leaves_out_checkpoints_and_the_teacher(monkeypatch, tmp_path):
    calls = []

    class Api:
        def create_repo(self, repo_id, exist_ok):
            calls.append(repo_id)
            return Namespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, **kwargs):
            calls.append(kwargs)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    args = train_distill.parse_args(["--push_to_hub", "--output_dir", str(tmp_path / "my-captioner")])
    assert train_distill.push_to_hub(args) == "me/my-captioner"
    assert calls[0] == "my-captioner" and calls[1]["folder_path"] == str(tmp_path / "my-captioner")
    assert {"checkpoint-*", "teacher/*"} <= set(calls[1]["ignore_patterns"])
