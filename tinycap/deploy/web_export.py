"""Writes the web page that captions photos in the browser: a folder of static files, for any host.

    web/      the page itself, as in the repository
    model/    graphs with int8 weights, configs and tokenizer, as `export_onnx` writes them
    vendor/   onnxruntime-web and @huggingface/tokenizers, from npm

All lie in one folder, `web/` at its top. Its service worker stores every file at the first visit, those that only the
search needs last.
"""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tinycap import REPOSITORY
from tinycap.checks_tinycap import read_json
from tinycap.confidence_tinycap import CONFIDENCE_NAME
from tinycap.deploy.captioners import VISUAL_PROJECTION
from tinycap.deploy.export import COMPANIONS, export_onnx
from tinycap.deploy.onnx_captioner import DECODER, ENCODER, TEXT_MODEL, OnnxCaptioner
from tinycap.deploy.outputs import filling


# Files of npm packages, by their name on the page; the releases that the page is tested with.
PACKAGES = {"onnxruntime-web": "1.30.0", "@huggingface/tokenizers": "0.2.0"}
VENDOR = {
    "ort.js": "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
    "ort.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "tokenizers.js": "@huggingface/tokenizers/dist/tokenizers.min.mjs",
}
# In `model/`: what only the search needs, where the checkpoint has a text encoder.
SEARCH_FILES = (f"onnx/{TEXT_MODEL}_quantized.onnx", f"onnx/{VISUAL_PROJECTION}")
INSTALL = ("install", *(f"{name}@{version}" for name, version in PACKAGES.items()))


def export_web(model_name_or_path: str | Path, output_dir: str | Path, npm_dir: str | Path | None = None) -> list[Path]:
    """Writes the page with a checkpoint.

    Args:
        model_name_or_path: a TinyCap repository, local or on the Hub.
        output_dir: the page's folder.
        npm_dir: a folder where `PACKAGES` are installed; without it, npm installs them in a temporary one.

    Returns:
        The files, `index.html` among them.

    Raises:
        ValueError: the checkpoint isn't a TinyCap's or has settings that the page can't have; a package is missing.
        ImportError: see `export_onnx`.
        OSError: npm is missing or fails.
    """
    output_dir = Path(output_dir)
    with filling(output_dir) as aside, tempfile.TemporaryDirectory() as temporary:
        copy_vendor(aside / "vendor", Path(npm_dir) if npm_dir is not None else install_packages(Path(temporary)))
        graphs = Path(temporary) / "graphs"
        export_onnx(model_name_or_path, graphs, float_activations=True)
        # Refuses generation settings that its search, and the page's, don't have.
        OnnxCaptioner(graphs, quantized=True)
        resample = read_json(graphs / "preprocessor_config.json").get("resample", 3)
        if resample != 3:
            raise ValueError(f"preprocessor_config.json: expected resample 3 (bicubic) for the page, got {resample}")
        quantized = [f"onnx/{name}_quantized.onnx" for name in (ENCODER, DECODER)]
        for name in (*COMPANIONS, CONFIDENCE_NAME, *quantized, *SEARCH_FILES):
            if (graphs / name).exists():
                (aside / "model" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(graphs / name, aside / "model" / name)
            else:
                # An earlier checkpoint's calibration or text encoder.
                (output_dir / "model" / name).unlink(missing_ok=True)
        shutil.copytree(REPOSITORY / "web", aside, dirs_exist_ok=True)
        names = sorted(path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file())
        _complete_service_worker(aside, [name for name in names if name not in ("README.md", "service_worker.js")])
    return [output_dir / name for name in names]


def install_packages(folder: Path) -> Path:
    """Installs `PACKAGES` with npm, without running their scripts; `OSError` if it can't."""
    npm = shutil.which("npm")
    command = f"`npm {' '.join(INSTALL)}`"
    if npm is None:
        raise FileNotFoundError(f"--web: expected npm on the path, or --npm with a folder where {command} was run")
    options = ("--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund")
    done = subprocess.run([npm, *INSTALL, *options], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"--web: {command} failed: {done.stderr.strip()[-500:]}")
    return folder


def copy_vendor(target: Path, npm_dir: Path) -> None:
    target.mkdir()
    for name, source in VENDOR.items():
        path = npm_dir / "node_modules" / source
        if not path.is_file():
            raise ValueError(f"--npm {npm_dir}: expected {path}, which `npm {' '.join(INSTALL)}` installs")
        shutil.copyfile(path, target / name)


def _complete_service_worker(folder: Path, names: list[str]) -> None:
    """Writes what the service worker stores into its script, which then differs for every change of a file."""
    digests = {name: hashlib.sha256((folder / name).read_bytes()).digest() for name in names}
    # Not of other files: hosts may add to HTML, and recode scripts.
    later = {
        name: f"sha256-{base64.b64encode(digests.pop(name)).decode('ascii')}"
        for name in (f"model/{file}" for file in SEARCH_FILES)
        if name in digests
    }
    page = (folder / "index.html").read_text(encoding="utf-8")
    constants = {
        "VERSION": hashlib.sha256(b"".join([*digests.values(), json.dumps(later).encode()])).hexdigest(),
        # Hosts may redirect index.html to the folder, and a redirected answer can't be stored for it.
        "FILES": ["./" if name == "index.html" else name for name in digests],
        "LATER": later,
        "POLICY": re.search(r'content="(default-src .+)"', page)[1],
    }
    lines = [f"const {name} = {json.dumps(value)};\n" for name, value in constants.items()]
    path = folder / "service_worker.js"
    path.write_text("".join(lines) + path.read_text(encoding="utf-8"), encoding="utf-8")
