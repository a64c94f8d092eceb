# SPDX-License-Identifier: Apache-2.0
"""Options and fixtures of the whole suite."""

import gc
import importlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.processes import tell_output

FROM_TESTPATHS = pytest.Config.ArgsSource.TESTPATHS  # no tests were chosen by path
# Inputs are fixed, so that a failure happens again by itself. How long one takes says nothing: the machine may be busy.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")
MEASURED = ("protocol", "metadata")  # folders whose quick tests measure coverage


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Import a share of the test modules before the rest, a different one in each worker.

    All workers import all modules in the same order. In a fresh clone each of them would thus compile
    every module (15 s). This way they find most of them compiled by one another.
    """
    workers = getattr(session.config, "workerinput", None)
    if workers is None or session.config.args_source is not FROM_TESTPATHS:
        return
    nr, count = int(workers["workerid"].removeprefix("gw")), workers["workercount"]
    root = Path(__file__).parent
    modules = sorted(root.rglob("test_*.py"))
    for path in modules[len(modules) * nr // count : len(modules) * (nr + 1) // count]:
        name = path.relative_to(root.parent).with_suffix("")
        importlib.import_module(".".join(name.parts))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test` runs under coverage, and not with the rest of the suite."""
    root = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(root).parts[0]
        is_quick = not (
            item.get_closest_marker("slow") or item.get_closest_marker("long")
        )
        if folder in MEASURED and is_quick:
            item.add_marker("measured")


def pytest_collection_finish() -> None:
    """Leave thousands of modules, tests and parameters out of each garbage collection: a tenth faster."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    """Where a program that must succeed has failed, the report of the failure has what it said."""
    try:
        yield
    except subprocess.CalledProcessError as error:
        tell_output(error)
        raise


@pytest.fixture(autouse=True, scope="session")
def runtime_directory() -> Iterator[None]:
    """Servers of this process of the suite find only each other, and not those of the machine.

    Its path is short: a unix socket's has room for 107 bytes.
    """
    directory = tempfile.mkdtemp(prefix="nbdt")
    os.environ["XDG_RUNTIME_DIR"] = directory
    for name in ("RUNTIME_DIRECTORY", "NBDTARGET_CONTROL"):
        os.environ.pop(name, None)
    yield
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own. Its path is short, unlike `tmp_path`."""
    directory = Path(tempfile.mkdtemp(prefix="nbdt"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)
