# SPDX-License-Identifier: Apache-2.0
"""The `served` fixture: a listener on a unix socket, and clients that say anything."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.devices.file import device as file_device
from tests.support.peer import Served


@pytest.fixture(autouse=True)
def no_write_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine any WRITE may take long, and the next ones would take another path than the test wants."""
    monkeypatch.setattr(file_device, "WRITE_SLOW_NS", 1 << 62)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """`served.limits` and `served.directory` may be changed before the first `attach`."""
    it = Served(tmp_path)
    yield it
    await it.close()


@pytest.fixture(params=["simple", "structured"])
def structured(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "structured")


@pytest.fixture(params=["inline", "held"])
def held(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "held")
