# SPDX-License-Identifier: Apache-2.0
"""The fixture `lab`. After each test the lab is closed, and waits until all work has ended."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.targets import metadata_io
from tests.support.clone_battery import Lab
from tests.support.metadata.report import check


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    for name, spy in lab.spies.items():
        lab.fail(name)
        spy.let_go()
    await lab.registry.close()
    meta = tmp_path / "meta"
    if meta.exists() and any(meta.read_bytes()[:4096]):
        metadata_io.run_file(meta, check(meta.stat().st_size), read_only=True)
