# SPDX-License-Identifier: Apache-2.0
"""The server that the tests look at."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget_protocol import consts as c
from tests.support.served import Served
from tests.support.site import SIZE


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path)
    await served.start()
    await served.peer.ask(c.CMD_READ, 0, 4096)
    await served.peer.ask(c.CMD_WRITE, 0, payload=bytes(65536))
    await served.peer.ask(c.CMD_READ, SIZE, 512)
    yield served
    await served.close()
