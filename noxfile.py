"""Runs tests/test_versions.py with each served release of transformers and torch, in a virtual environment of its own.

    nox                                                              every session, then docs/versions.md
    nox -s "matrix(transformers='5.17.0', torchvision=True)"         one of them

`--default-venv-backend uv` is quicker, where uv is installed.
"""

import platform
import xml.etree.ElementTree
from datetime import date
from pathlib import Path

import nox


# The first and the last release of each stretch in which transformers changed what TinyCap relies on; 5.24.0 is the
# newest. Those left out of pyproject.toml are not served.
TRANSFORMERS = ("4.57.1", "4.57.6", "5.0.0", "5.2.0", "5.3.0", "5.4.0", "5.10.4", "5.16.1", "5.17.0", "5.24.0")
# torch and the torchvision that belongs to it.
TORCHVISION = {"2.13.0": "0.28.0", "2.14.1": "0.29.1"}
TESTS = ("tests/test_golden_captions.py", "tests/test_versions.py")
RESULTS = Path(".nox", "results")
DECLARE_OPERATORS = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


@nox.session
@nox.parametrize("torchvision", [False, True])
@nox.parametrize("transformers", TRANSFORMERS)
def matrix(session: nox.Session, transformers: str, torchvision: bool) -> None:
    """A release of transformers, with torchvision or without."""
    check(session, transformers, "2.13.0", torchvision)


@nox.session
@nox.parametrize("torch, torchvision", [("2.6.0", False), ("2.14.1", True)])
def torch_bounds(session: nox.Session, torch: str, torchvision: bool) -> None:
    """The oldest and the newest torch with the newest transformers."""
    check(session, TRANSFORMERS[-1], torch, torchvision)


def check(session: nox.Session, transformers: str, torch: str, torchvision: bool) -> None:
    """Installs the releases and runs `TESTS`, leaving a JUnit file in `RESULTS`."""
    session.install(f"torch=={torch}", f"transformers=={transformers}", "pillow", "scikit-learn", "pytest")
    if torchvision:
        session.install("--no-deps", f"torchvision=={TORCHVISION[torch]}")
        import_torchvision(session)
    report = RESULTS / f"{transformers} {torch} {TORCHVISION[torch] if torchvision else 'none'}.xml"
    env = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": session.create_tmp(), "OMP_NUM_THREADS": "1"}
    session.run(
        *("python", "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"),
        *(f"--junitxml={report.resolve()}", *TESTS),
        env=env,
    )


def import_torchvision(session: nox.Session) -> None:
    """Makes torchvision importable beside a CPU build of torch.

    PyPI's is built for CUDA: there, its library doesn't load, and importing it fails for want of two operators.
    """
    try:
        session.run("python", "-c", "import torchvision", silent=True)
    except nox.command.CommandFailed:
        where = session.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True)
        Path(where.strip(), "declare_operators.py").write_text(DECLARE_OPERATORS, encoding="utf-8")
        Path(where.strip(), "declare_operators.pth").write_text("import declare_operators\n", encoding="utf-8")
        session.run("python", "-c", "import torchvision")


@nox.session(venv_backend="none")
def table(session: nox.Session) -> None:
    """Writes docs/versions.md from what the sessions left in `RESULTS`."""
    rows = []
    for path in RESULTS.glob("*.xml"):
        transformers, torch, torchvision = path.stem.split()
        suite = next(xml.etree.ElementTree.parse(path).iter("testsuite"))
        failed = [
            case.get("name") for case in suite.iter("testcase") if set(part.tag for part in case) & {"failure", "error"}
        ]
        found = {part.get("name"): part.get("value") for part in suite.iter("property")}
        pixels = [
            f"{float(found[name]):.2g}" if name in found else "" for name in ("max_difference", "mean_difference")
        ]
        passed = int(suite.get("tests")) - len(failed)
        outcome = ", ".join([f"{passed} passed", *(f"**{name}** failed" for name in failed)])
        order = (*map(int, torch.split(".")), *map(int, transformers.split(".")), torchvision)
        rows.append((order, [transformers, torch, torchvision, outcome, found.get("image_processor", ""), *pixels]))
    lines = ["| " + " | ".join(row) + " |" for _, row in sorted(rows)]
    Path("docs", "versions.md").write_text(
        TABLE.format(
            date=date.today(), machine=platform.platform(), python=platform.python_version(), rows="\n".join(lines)
        ),
        encoding="utf-8",
    )


TABLE = """# Versions

Written by `nox -s table` on {date}, from the sessions of `noxfile.py` on {machine}, Python {python}.

Each session loads the released checkpoint through every door, from an unrelated directory, runs the pipeline, greedy
and beam search, a prompt, a static cache, `save_pretrained` and reloading, and two steps of training; the captions of
twenty images, greedy and with three beams, must be those of `tests/golden_captions.json`.

Where torchvision is installed, transformers 5 resizes with it. The last columns say by how much the pixel values
(normalised, a grey level is about 0.015) of those images differ from those of Pillow, at most and on average.

| transformers | torch | torchvision | outcome | image processor | max | mean |
|---|---|---|---|---|---|---|
{rows}
"""
