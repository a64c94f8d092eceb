# SPDX-License-Identifier: Apache-2.0
"""The lab, closed in the end, with the metadata checked: whatever a test has done."""

from collections.abc import AsyncIterator

import pytest

from tests.support.cache import CacheLab


@pytest.fixture
async def lab() -> AsyncIterator[CacheLab]:
    lab = CacheLab(nr_cblocks=32, nr_oblocks=128)
    yield lab
    await lab.close()
    await lab.check()
