"""The web page's modules under Node: pixels, searches and rows equal Python's; what its export needs."""

import base64
import csv
import html
import io
import itertools
import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tiny import draw_picture

from tinycap import REPOSITORY
from tinycap.deploy.cli import main
from tinycap.deploy.export import store_as_int8
from tinycap.deploy.image_preprocessing import ImagePreprocessor
from tinycap.deploy.outputs import alt_attribute
from tinycap.deploy.token_search import beam_search
from tinycap.deploy.web_export import VENDOR, export_web


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node, which isn't installed")

SCRIPT = Path(__file__).with_name("slow") / "browser_modules.mjs"


def run_module(task: str, inputs: list[dict]) -> list:
    """The module's results for each input."""
    command = ["node", str(SCRIPT), str(REPOSITORY / "web"), task]
    done = subprocess.run(command, input=json.dumps(inputs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_pixels_are_pythons_to_the_last_bit():
    config = json.loads((REPOSITORY / "preprocessor_config.json").read_text())
    config |= {"size": {"shortest_edge": 26}, "crop_size": {"height": 24, "width": 22}}
    sizes = [(26, 26), (37, 29), (29, 37), (640, 481), (25, 99), (7, 5), (1, 1), (3, 500)]
    noise = np.random.default_rng(1).integers(0, 256, (120, 90, 3), dtype=np.uint8)
    images = [*(draw_picture(5, size) for size in sizes), Image.fromarray(noise)]
    inputs = [
        {"rgba": base64.b64encode(image.convert("RGBA").tobytes()).decode(), "config": config}
        | {"width": image.width, "height": image.height}
        for image in images
    ]
    for image, found in zip(images, run_module("pixels", inputs), strict=True):
        expected = ImagePreprocessor(config)([image])
        assert np.array_equal(np.float32(found), expected.flatten()), image.size


def table_step(table: np.ndarray):
    """As in the script: logits that depend on all tokens of a row."""
    histories = []

    def step(tokens: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
        before = [[] for _ in tokens] if not histories else histories
        before = before if rows is None else [before[row] for row in rows]
        histories[:] = [[*row, *new.tolist()] for row, new in zip(before, tokens)]
        places = [sum(token * (index + 1) for index, token in enumerate(row)) for row in histories]
        return table[np.array(places) % len(table)]

    return step


@needs_node
def test_searches_find_pythons_captions():
    draw = np.random.default_rng(2)
    cases, expected, lengths = [], [], set()
    kinds = itertools.product((1, 2, 3, 5), (False, True, "never"), (-1.0, 0.0, 1.5), (0.0, 2.5, 4.0))
    for beams, early_stopping, length_penalty, bias in kinds:
        table = draw.normal(size=(13, 17)).astype(np.float32) * 2
        eos, suppress = random.Random(len(cases)).choice([([2], []), ([2, 5], [3, 4]), ([], [])])
        table[:, eos] += bias
        settings = {"start": 1, "eos": eos, "limit": 7, "suppress": suppress}
        names = {"numBeams": beams, "lengthPenalty": length_penalty, "earlyStopping": early_stopping}
        cases.append({"table": table.tolist(), "settings": settings | names})
        search = {"length_penalty": length_penalty, "early_stopping": early_stopping, "suppress_tokens": suppress}
        prompt = np.ones((1, 1), np.int64)
        [[tokens]], [[log_prob]] = beam_search(table_step(table), prompt, eos, 7, beams, **search)
        expected.append((tokens, log_prob))
        lengths.add(len(tokens))
    for found, (tokens, log_prob) in zip(run_module("search", cases), expected, strict=True):
        assert found["tokens"] == tokens
        assert found["logProb"] == pytest.approx(log_prob, abs=1e-4)
    assert len(lengths) > 4, "captions of many lengths were compared"


@needs_node
def test_hostile_names_stay_text_in_csv_json_and_alt():
    names = ['a,"b".jpg', "=1+1.jpg", "-x.jpg", "line\nbreak.jpg", "<img src=x onerror=alert(1)>.jpg", "it's & co.jpg"]
    results = [{"file": name, "caption": name, "confidence": 0.5, "edited": False, "error": None} for name in names]
    found = run_module("rows", [{"results": results, "caption": name} for name in names])
    assert [row["alt"] for row in found] == [alt_attribute(name) for name in names]
    assert [html.unescape(row["alt"]) for row in found] == [f'alt="{name}"' for name in names]
    assert json.loads(found[0]["json"]) == results
    rows = list(csv.DictReader(io.StringIO(found[0]["csv"], newline="")))
    formulas = [f"'{name}" if name[0] in "=-" else name for name in names]
    assert [row["file"] for row in rows] == formulas and [row["caption"] for row in rows] == formulas
    assert {row["confidence"] for row in rows} == {"0.5"} and {row["error"] for row in rows} == {""}


def test_weights_in_int8_have_a_scale_for_each_block_and_compute_in_float():
    draw = np.random.default_rng(3)
    # Three blocks, the first of large weights, with a column of zeros; and a table that has no whole blocks.
    first, second = draw.normal(size=(96, 5)), draw.normal(size=(5, 7))
    first[:32] *= 100
    first[:, 2] = 0
    tables = {"first": first, "second": second}
    nodes = [helper.make_node("MatMul", ["x", "first"], ["h"]), helper.make_node("MatMul", ["h", "second"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", 96), ("y", 7))]
    constants = [numpy_helper.from_array(table.astype(np.float32), name) for name, table in tables.items()]
    graph = helper.make_graph(nodes, "linear", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    store_as_int8(model, 32)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert stored["first.int8"].nbytes == first.size and stored["second.int8"].nbytes == second.size
    assert not tables.keys() & stored.keys()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for start in (0, 32):
        x = draw.normal(size=(9, 96)).astype(np.float32)
        x[:, :start] = 0
        expected = x @ first @ second
        error = np.abs(session.run(None, {"x": x})[0] - expected).max() / np.abs(expected).max()
        assert 0 < error < 0.02


@pytest.mark.parametrize("missing", VENDOR.values())
def test_a_missing_package_is_an_error_before_the_export(repository, tmp_path, missing):
    for source in set(VENDOR.values()) - {missing}:
        path = tmp_path / "node_modules" / source
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(ValueError, match=f"--npm .*{Path(missing).name}, which `npm install onnxruntime-web@"):
        export_web(repository, tmp_path / "site", tmp_path)
    assert not list((tmp_path / "site").iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--output", "graphs", "--npm", "packages"], "--npm: expected --web with it"),
        (["--web", "site", "--no-quantize"], "--no-quantize: the page of --web has the int8 files only"),
    ],
)
def test_flags_that_contradict_the_page_are_errors(capsys, words, message):
    assert main(["export", *words]) == 2
    assert message in capsys.readouterr().err
