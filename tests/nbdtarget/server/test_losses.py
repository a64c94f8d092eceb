# SPDX-License-Identifier: Apache-2.0
"""The loss of a device is reported in answer to a FLUSH, once to each connection."""

import pytest

from nbdtarget_protocol import consts as c
from tests.support.peer import Disk, Served


@pytest.mark.parametrize("structured", [False, True])
async def test_each_connection_learns_of_a_loss_once(
    served: Served, structured: bool
) -> None:
    served.directory.devices["disk"] = disk = Disk()
    peers = [await served.attach(structured=structured) for _ in range(2)]
    for peer in peers:
        assert (await peer.ask(c.CMD_WRITE, 0, 4, payload=b"data")).error == 0
    disk.health.note_loss()
    for peer in peers:
        assert (await peer.ask(c.CMD_FLUSH)).error == c.EIO
        assert (await peer.ask(c.CMD_FLUSH)).error == 0


async def test_each_flush_in_flight_fails_when_there_is_a_loss(served: Served) -> None:
    served.directory.devices["disk"] = disk = Disk()
    peer = await served.attach()
    disk.hold = True
    for _ in range(3):
        peer.send(c.CMD_FLUSH)
    await disk.until_held(3)
    disk.health.note_loss()
    disk.let_go()
    assert [(await peer.reply()).error for _ in range(3)] == [c.EIO] * 3
    disk.hold = False
    assert (await peer.ask(c.CMD_FLUSH)).error == 0


async def test_write_with_fua_promises_only_its_own_data(served: Served) -> None:
    served.directory.devices["disk"] = disk = Disk()
    peer = await served.attach()
    disk.health.note_loss()
    reply = await peer.ask(c.CMD_WRITE, 0, 4, payload=b"data", flags=c.CMD_FLAG_FUA)
    assert reply.error == 0
    assert (await peer.ask(c.CMD_FLUSH)).error == c.EIO


async def test_client_that_reconnects_after_a_loss_is_told(served: Served) -> None:
    served.directory.devices["disk"] = disk = Disk()
    peer = await served.attach()
    await peer.ask(c.CMD_WRITE, 0, 4, payload=b"data")
    peer.close()
    await served.until_connections(0)
    disk.health.note_loss()
    peer = await served.attach()
    assert (await peer.ask(c.CMD_FLUSH)).error == c.EIO
    assert (await peer.ask(c.CMD_FLUSH)).error == 0
