"""Rules of the repository: what its code imports, calls and uploads."""

import ast
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import huggingface_hub
import pytest
from transformers.dynamic_module_utils import get_imports

import tinycap
from tinycap import train_distill


ROOT = tinycap.REPOSITORY
MODEL_FILES = (
    *("configuration_tinycap.py", "modeling_tinycap.py", "processing_tinycap.py", "pipeline_tinycap.py"),
    *("checks_tinycap.py", "confidence_tinycap.py", "vision_tinycap.py"),
    *("layers_tinycap.py", "text_tinycap.py", "zero_shot_tinycap.py"),
)


def imports_of(path: Path) -> set[str]:
    """Top-level names of a file's imports; relative imports by their module, with a dot."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(f".{node.module}" if node.level else node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", MODEL_FILES)
def test_remote_code_imports_only_its_declared_packages(name):
    # pillow_heif is optional: transformers' check ignores imports in a `try`.
    packages = {"torch", "transformers", "safetensors", "PIL", "pillow_heif"}
    allowed = set(sys.stdlib_module_names) | packages | {f".{file[:-3]}" for file in MODEL_FILES}
    assert imports_of(ROOT / name) <= allowed
    assert "pillow_heif" not in get_imports(ROOT / name)


def test_no_file_imports_auto_image_processor_from_the_top_of_transformers():
    """From there, 5.4 to 5.16 require torchvision for it."""
    texts = {path: path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}
    assert sum("AutoImageProcessor" in text for text in texts.values()) > 3
    for path in (path for path, text in texts.items() if "AutoImageProcessor" in text):
        for node in ast.walk(ast.parse(texts[path])):
            names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            assert "AutoImageProcessor" not in names or node.module != "transformers", path


# Modules that open sockets, start programs, run code from files, or call native code.
REACHING = {
    *("asyncio", "ctypes", "ftplib", "http", "imaplib", "marshal", "multiprocessing", "pickle", "poplib", "pty"),
    *("runpy", "selectors", "shelve", "shutil", "smtplib", "socket", "socketserver", "ssl", "subprocess", "telnetlib"),
    *("tempfile", "urllib", "webbrowser", "xmlrpc"),
}
# Calls, by the last part of their name, that write files, run code or unpickle. `save_pretrained` is allowed.
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "import_module", "system", "popen", "spawn", "fork", "execv"),
    *("write_text", "write_bytes", "mkdir", "makedirs", "touch", "remove", "unlink", "rmdir", "rename", "symlink_to"),
    *("save", "save_file", "tofile", "dump", "torch.load", "loads_pickle", "hardlink_to", "chmod", "truncate"),
}


def calls_of(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def forbidden_calls(path: Path) -> list[str]:
    """Calls that write files, run code or unpickle; `open` may only read."""
    found = []
    for call in calls_of(path):
        name = ast.unparse(call.func)
        if name.rpartition(".")[2] in FORBIDDEN_CALLS or name in FORBIDDEN_CALLS:
            found.append(name)
        if name == "open":
            modes = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
            if any(not isinstance(mode, ast.Constant) or set(mode.value) - set("rbt") for mode in modes):
                found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize("name", MODEL_FILES)
def test_remote_code_opens_no_socket_runs_no_program_writes_no_file(name):
    assert not imports_of(ROOT / name) & REACHING
    assert not forbidden_calls(ROOT / name)


def test_the_rule_above_finds_what_it_forbids(tmp_path):
    path = tmp_path / "evil.py"
    path.write_text(
        "import socket\nopen('x', 'w')\nopen('x', mode=how)\ntorch.load(p)\nP('x').write_text('')\nopen('x')"
    )
    assert imports_of(path) & REACHING == {"socket"}
    assert forbidden_calls(path) == ["open('x', 'w')", "open('x', mode=how)", "torch.load", "P('x').write_text"]


REACH = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=0.1)"


def test_the_network_is_forbidden_to_tests_and_their_processes():
    # Checked first: without the guard, the calls below would reach the network.
    assert socket._network_is_forbidden
    with pytest.raises(AssertionError, match="expected no network in a test, got a connection to 192.0.2.1"):
        exec(REACH)
    with pytest.raises(AssertionError, match="example.org"):
        socket.getaddrinfo("example.org", 80)
    started = subprocess.run([sys.executable, "-c", REACH], capture_output=True, text=True)
    assert started.returncode != 0 and "NetworkForbiddenError" in started.stderr
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_the_hub_is_not_asked_where_it_is_said_to_be_offline(tmp_path):
    """Each loader raises its own error without trying a connection, which would be another error."""
    from transformers import AutoModel

    from tinycap.training.data import load_split
    from tinycap.training.teacher import Teacher
    from tinycap.training.tokenizer import load_tokenizer

    assert huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(OSError):
        AutoModel.from_pretrained("nobody/no-such-model", trust_remote_code=True)
    with pytest.raises(ValueError, match="nobody/no-such-teacher"):
        Teacher.from_pretrained("nobody/no-such-teacher")
    with pytest.raises(ValueError, match="nobody/no-such-tokenizer"):
        load_tokenizer("nobody/no-such-tokenizer")
    with pytest.raises(ValueError, match="nobody/no-such-photos"):
        load_split("nobody/no-such-photos", "train")
    with pytest.raises(ValueError, match="nobody/no-such-captioner"):
        train_distill.main(["--model_name_or_path", "nobody/no-such-captioner", "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "folder, forbidden",
    [
        *(("evaluation", "tinycap.train_"), ("training", "tinycap.evaluation"), ("training", "tinycap.train_")),
        *(("evaluation", "tinycap.deploy"), ("training", "tinycap.deploy"), ("deploy", "tinycap.train_")),
    ],
)
def test_arrows_go_one_way(folder, forbidden):
    for path in (ROOT / "tinycap" / folder).rglob("*.py"):
        # The metrics import nothing else of the package, and the CIDEr reward uses them.
        text = path.read_text(encoding="utf-8").replace("tinycap.evaluation.caption_metrics", "")
        assert forbidden not in text, path


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
    home = str(Path.home())
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.rglob("*.py"), *ROOT.glob("*.json")]:
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
