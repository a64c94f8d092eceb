# SPDX-License-Identifier: Apache-2.0
"""What holds for the whole suite."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEASURED = ("protocol", "metadata")  # folders whose quick tests measure coverage


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test` runs under coverage, and not with the rest of the suite."""
    root = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(root).parts[0]
        if folder in MEASURED and item.get_closest_marker("slow") is None:
            item.add_marker("measured")


def pytest_collection_finish() -> None:
    """Leave thousands of modules, tests and parameters out of each garbage collection: a tenth faster."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


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
