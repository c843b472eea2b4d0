"""Runs tests/test_versions.py with each supported release of transformers and torch, in separate virtual environments.

    nox                                                                             every session, then docs/versions.md
    nox -s "matrix(transformers='5.17.0', torch='2.13.0', torchvision=True)"        one of them

`--default-venv-backend uv` is quicker, where uv is installed.
"""

import platform
import re
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import nox


# The first and last release of each range with the same behaviour where TinyCap depends on it; 5.24.0 is the newest.
TRANSFORMERS = ("4.57.1", "4.57.6", "5.0.0", "5.2.0", "5.3.0", "5.4.0", "5.10.4", "5.16.1", "5.17.0", "5.24.0")
# torchvision by torch.
TORCHVISION = {"2.13.0": "0.28.0", "2.14.1": "0.29.1"}
# Each with and without torchvision; the oldest and the newest torch with the newest transformers.
VERSIONS = [(transformers, "2.13.0", torchvision) for transformers in TRANSFORMERS for torchvision in (False, True)]
VERSIONS += [(TRANSFORMERS[-1], "2.6.0", False), (TRANSFORMERS[-1], "2.14.1", True)]
TESTS = ("tests/test_golden_captions.py", "tests/test_versions.py")
RESULTS = Path(".nox", "results")
DECLARE_OPERATORS = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


@nox.session
@nox.parametrize("transformers, torch, torchvision", VERSIONS)
def matrix(session: nox.Session, transformers: str, torch: str, torchvision: bool) -> None:
    """Installs the releases and runs `TESTS`, leaving a JUnit file in `RESULTS`."""
    session.install(f"torch=={torch}", f"transformers=={transformers}", "pillow", "scikit-learn", "pytest")
    if torchvision:
        session.install("--no-deps", f"torchvision=={TORCHVISION[torch]}")
        import_torchvision(session)
    report = RESULTS / f"{transformers} {torch} {TORCHVISION[torch] if torchvision else 'none'}.xml"
    env = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(session.create_tmp()).resolve()), "OMP_NUM_THREADS": "1"}
    session.run(
        *("python", "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"),
        *(f"--junitxml={report.resolve()}", *TESTS),
        env=env,
    )


def import_torchvision(session: nox.Session) -> None:
    """Makes torchvision importable with a CPU build of torch.

    PyPI's build is for CUDA: its library doesn't load there, and the import fails because two operators are missing.
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
    """Writes the date and the table of docs/versions.md from the JUnit files in `RESULTS`."""
    rows = []
    for path in RESULTS.glob("*.xml"):
        transformers, torch, torchvision = path.stem.split()
        suite = next(ElementTree.parse(path).iter("testsuite"))
        cases = list(suite.iter("testcase"))
        failed = [case.get("name") for case in cases if {part.tag for part in case} & {"failure", "error"}]
        recorded = {part.get("name"): part.get("value") for part in suite.iter("property")}
        differences = [f"{float(recorded.get(name, 'nan')):.2g}" for name in ("max_difference", "mean_difference")]
        outcome = ", ".join([f"{len(cases) - len(failed)} passed", *(f"**{name}** failed" for name in failed)])
        order = (*map(int, torch.split(".")), *map(int, transformers.split(".")), torchvision)
        columns = [transformers, torch, torchvision, outcome, recorded.get("image_processor", ""), *differences]
        rows.append((order, f"| {' | '.join(columns)} |\n"))
    page = Path("docs", "versions.md")
    head, separator, _ = page.read_text(encoding="utf-8").partition("|---|---|---|---|---|---|---|\n")
    run = f"on {date.today()} with Python {platform.python_version()} on {platform.platform()}"
    head = re.sub(r"on \d{4}-.*", f"{run}.", head, count=1)
    page.write_text(head + separator + "".join(row for _, row in sorted(rows)), encoding="utf-8")
