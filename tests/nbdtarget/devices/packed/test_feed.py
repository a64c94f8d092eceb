# SPDX-License-Identifier: Apache-2.0
"""The packed file is read in order and ahead; what cannot be read is an error."""

import pytest

from nbdtarget.devices.absent import AbsentDevice
from nbdtarget.devices.packed import feed as module
from nbdtarget.devices.packed.feed import Feed, UnreadableError
from tests.support.dm import RamDevice


async def test_all_of_it_comes_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(module, "CHUNKS_AHEAD", 3)
    device = RamDevice("d", 10_240)
    device.data[:] = bytes(range(256)) * 40
    feed = Feed(device)
    found = bytearray(await feed.next() or b"")
    assert len(device.log) == 3  # two more than were asked for
    while data := await feed.next():
        found += data
    assert found == device.data
    await feed.close()


async def test_what_cannot_be_read_is_named() -> None:
    feed = Feed(AbsentDevice("d", 8192))
    with pytest.raises(UnreadableError, match=r"cannot be read at 0 \(ENXIO\)"):
        await feed.next()
