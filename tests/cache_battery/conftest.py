# SPDX-License-Identifier: Apache-2.0
"""The fixture `lab`. After each test the lab is closed and its metadata is checked."""

from collections.abc import AsyncIterator

import pytest

from tests.support.cache import CacheLab


@pytest.fixture
async def lab() -> AsyncIterator[CacheLab]:
    lab = CacheLab(nr_cblocks=32, nr_oblocks=128)
    yield lab
    await lab.close()
    await lab.check()
