"""Sets the environment of all tests and shares them among processes; the fixtures are in `shared_fixtures.py`."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path


# Set before any Hugging Face library is imported: the libraries stay offline, and any network access fails immediately,
# here and in every process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTHONPATH"] = f"{Path(__file__).with_name('no_network')}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Remote code is copied here under its folder's name, which concurrent test runs would share.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="tinycap-modules-")
if "PYTEST_XDIST_WORKER" in os.environ:
    # The others have the other cores.
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    # Of `fresh.py`, for all processes of this run.
    os.environ["TINYCAP_FORK_SERVER"] = os.path.join(tempfile.mkdtemp(prefix="tinycap-server-"), "socket")
    atexit.register(shutil.rmtree, os.path.dirname(os.environ["TINYCAP_FORK_SERVER"]), ignore_errors=True)
import no_network.sitecustomize  # noqa: F401
import pytest


atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
pytest.register_assert_rewrite("shared_fixtures")

# Each imports torch, transformers and datasets, and fills a gigabyte.
MAX_PROCESSES = 4


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config) -> None:
    """Runs whole folders of tests in a process for each core, where pytest-xdist is installed; `-n 0` is for one."""
    options = config.option
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if is_worker or getattr(options, "numprocesses", 0) is not None or options.usepdb or options.capture == "no":
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores > 1 and all(map(os.path.isdir, config.args)):
        options.numprocesses, options.dist = min(cores, MAX_PROCESSES), "worksteal"


def pytest_collection_modifyitems(items: list) -> None:
    """Puts what takes long first, so that no process waits for another's last test.

    First the users of exports, which a process makes once for all neighbours, then files of slow tests only.
    """
    exports = {"exported", "exported_patches"}

    def order(item) -> tuple[bool, bool]:
        is_slow = any(mark.name == "slow" for mark in item.parent.own_markers)
        return exports.isdisjoint(getattr(item, "fixturenames", ())), not is_slow

    items.sort(key=order)


def pytest_collection_finish(session) -> None:
    """Leaves what all tests need out of later collections."""
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_configure(config) -> None:
    # A process that only hands out tests needs no fixtures, whose imports take seconds.
    if getattr(config.option, "dist", "no") == "no":
        # Until `pytest_collection_finish`: collections take a third of the time of the imports, and free nothing.
        gc.disable()
        config.pluginmanager.import_plugin("shared_fixtures")
