# SPDX-License-Identifier: Apache-2.0
"""Requests that have begun: none is answered before it has ended, and each is answered with what has become of it."""

import asyncio
import errno as errnos
import logging

import pytest

from nbdtarget.bio import (
    Bio,
)
from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import Extent
from nbdtarget_protocol import consts as c
from tests.support.patience import PATIENCE_S
from tests.support.peer import Disk, LaterDisk, Served


async def test_replies_out_of_order_trap_27(served: Served, structured: bool) -> None:
    served.disk.hold = True
    peer = await served.attach(structured=structured)
    first = peer.send(c.CMD_READ, 0, 4096)
    await served.disk.until_held(1)
    served.disk.hold = False
    second = peer.send(c.CMD_READ, 4096, 4096)
    assert (await peer.reply()).cookie == second
    served.disk.let_go()
    assert (await peer.reply()).cookie == first


CHANGES = [
    (c.CMD_FLUSH, b""),
    (c.CMD_WRITE, b"x" * 512),
    (c.CMD_WRITE, b"x" * 600_000),
    (c.CMD_TRIM, b""),
    (c.CMD_WRITE_ZEROES, b""),
]


@pytest.mark.parametrize(("command", "payload"), CHANGES)
async def test_nothing_is_answered_before_it_has_ended(
    served: Served, structured: bool, command: int, payload: bytes
) -> None:
    served.disk.hold = True
    peer = await served.attach(structured=structured)
    first = peer.send(command, 0, len(payload) or 512, payload=payload)
    await served.disk.until_held(1)
    served.disk.hold = False
    second = peer.send(c.CMD_READ, 4096, 4096)
    assert (await peer.reply()).cookie == second
    served.disk.let_go()
    assert (await peer.reply()).cookie == first


@pytest.mark.parametrize(("command", "payload"), CHANGES)
async def test_failed_change_is_an_error(
    served: Served, structured: bool, held: bool, command: int, payload: bytes
) -> None:
    served.directory.devices["disk"] = disk = LaterDisk() if held else Disk()
    peer = await served.attach(structured=structured)
    disk.fail = errnos.EIO
    reply = await peer.ask(command, 0, len(payload) or 512, payload=payload)
    assert reply.error == c.EIO
    disk.fail = 0
    assert (await peer.ask(command, 0, len(payload) or 512, payload=payload)).error == 0


@pytest.mark.parametrize("length", [4096, 100_000])
async def test_failed_read_is_an_error_and_no_data_trap_27(
    served: Served, structured: bool, held: bool, length: int
) -> None:
    served.directory.devices["disk"] = disk = LaterDisk() if held else Disk()
    peer = await served.attach(structured=structured)
    disk.fail = errnos.ENOMEDIUM
    reply = await peer.ask(c.CMD_READ, 0, length)
    assert (reply.error, reply.data) == (c.EIO, b"")
    disk.fail = 0
    assert (await peer.ask(c.CMD_READ, 0, 4096)).error == 0


@pytest.mark.parametrize(
    "failure",
    [DeviceError(errnos.ENOLINK, "disk", "extents", 0, 1), RuntimeError("bug")],
)
async def test_block_status_that_fails_is_eio(
    served: Served, failure: Exception
) -> None:
    class Broken(Disk):
        async def extents(self, offset: int, length: int) -> list[Extent]:
            raise failure

    served.directory.devices["disk"] = Broken()
    peer = await served.attach(structured=True, contexts=True)
    assert (await peer.ask(c.CMD_BLOCK_STATUS, 0, 10)).error == c.EIO
    assert (await peer.ask(c.CMD_READ, 0, 1)).error == 0


class KeepsBorrowed(Disk):
    """Breaks the rule: keeps a bio without owning it."""

    def submit(self, bio: Bio) -> None:
        self.held.append(bio)


@pytest.mark.parametrize("command", [c.CMD_READ, c.CMD_WRITE])
async def test_device_that_keeps_a_borrowed_bio_is_caught(
    served: Served, command: int, caplog: pytest.LogCaptureFixture
) -> None:
    served.directory.devices["disk"] = disk = KeepsBorrowed()
    peer = await served.attach()
    payload = b"x" * 512 if command == c.CMD_WRITE else b""
    peer.send(command, 0, 512, payload=payload)
    async with asyncio.timeout(PATIENCE_S):
        assert await peer.at_end()
    assert "kept a borrowed payload" in caplog.text
    assert served.directory.nr_open == {"disk": 1}  # its bio is still in flight
    disk.let_go()
    await served.until_connections(0)


async def test_late_bio_gets_its_own_data_while_buffers_are_reused(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.disk.hold = True
    peer = await served.attach()
    peer.send(c.CMD_WRITE, 0, payload=b"A" * 4096)
    await served.disk.until_held(1)
    peer.send(c.CMD_WRITE, 4096, payload=b"B" * 4096)
    await served.disk.until_held(2)
    served.disk.let_go()
    assert {(await peer.reply()).error for _ in range(2)} == {0}
    assert served.disk.data[:8192] == b"A" * 4096 + b"B" * 4096
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


class OwnsAndEnds(Disk):
    """Owns a bio and ends it inside `submit` all the same."""

    def submit(self, bio: Bio) -> None:
        bio.own()
        super().submit(bio)


async def test_bio_that_is_owned_and_ends_inline(
    served: Served, structured: bool
) -> None:
    served.directory.devices["disk"] = disk = OwnsAndEnds()
    disk.data[:4096] = b"z" * 4096
    peer = await served.attach(structured=structured)
    peer.writer.write(
        peer.request(c.CMD_READ, 0, 4096) + peer.request(c.CMD_READ, 0, 512)
    )
    assert (await peer.reply()).data == b"z" * 4096
    assert (await peer.reply()).data == b"z" * 512
