# SPDX-License-Identifier: Apache-2.0
"""A long READ is carried out slice by slice, one slice in each turn of the loop."""

import asyncio
import errno as errnos
import os
from dataclasses import replace

import pytest

from nbdtarget.bio import OP_READ, Bio
from nbdtarget_protocol import consts as c
from tests.support.patience import until
from tests.support.peer import MIB, Disk, Served

SLICE = 128 << 10


class Noting(Disk):
    """Notes in which turn of the loop each bio comes, and fails READs of `bad`."""

    def __init__(self) -> None:
        super().__init__(4 * MIB)
        self.data[:] = os.urandom(len(self.data))
        self.turns: list[int] = []
        self.bad = -1
        self._turn = 0

    def submit(self, bio: Bio) -> None:
        if not self.turns:
            asyncio.get_running_loop().call_soon(self._next)
        self.turns.append(self._turn)
        if bio.op == OP_READ and bio.offset <= self.bad < bio.offset + bio.length:
            self.bios.append((bio.op, bio.offset, bio.length, bio.flags))
            bio.end(errnos.EIO)
        else:
            super().submit(bio)

    def _next(self) -> None:
        self._turn += 1
        if self._turn < 1000:
            asyncio.get_running_loop().call_soon(self._next)


@pytest.fixture
def disk(served: Served) -> Noting:
    served.limits = replace(served.limits, read_slice=SLICE)
    served.directory.devices["disk"] = it = Noting()
    return it


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("length", [SLICE, SLICE + 1, 3 * SLICE, MIB - 7])
async def test_each_slice_has_a_turn_of_its_own(
    served: Served, disk: Noting, length: int, structured: bool
) -> None:
    peer = await served.attach(structured=structured)
    reply = await peer.ask(c.CMD_READ, 5, length)
    assert reply.data == disk.data[5 : 5 + length]
    assert len(disk.turns) == -(-length // SLICE)
    assert len(set(disk.turns)) == len(disk.turns)
    assert max(bio[2] for bio in disk.bios) <= SLICE


async def test_slices_of_a_slow_disk_follow_each_other(
    served: Served, disk: Noting
) -> None:
    disk.hold = True
    peer = await served.attach()
    peer.send(c.CMD_READ, 0, 3 * SLICE)
    for _ in range(3):
        await disk.until_held(1)
        assert len(disk.held) == 1
        disk.let_go()
    assert (await peer.reply()).data == disk.data[: 3 * SLICE]


async def test_the_first_error_ends_it(served: Served, disk: Noting) -> None:
    disk.bad = 2 * SLICE
    peer = await served.attach(structured=True)
    reply = await peer.ask(c.CMD_READ, 0, MIB)
    assert (reply.error, reply.data) == (c.EIO, b"")
    assert len(disk.bios) == 3


@pytest.mark.parametrize("flags", [0, c.CMD_FLAG_DF])
@pytest.mark.parametrize("last", [0, 1])
async def test_zeroes_are_a_hole_only_if_all_slices_are(
    served: Served, disk: Noting, flags: int, last: int
) -> None:
    disk.data[: 3 * SLICE] = bytes(3 * SLICE - 1) + bytes([last])
    peer = await served.attach(structured=True)
    reply = await peer.ask(c.CMD_READ, 0, 3 * SLICE, flags=flags)
    assert reply.data == disk.data[: 3 * SLICE]
    is_hole = not last and not flags
    hole, data = c.REPLY_TYPE_OFFSET_HOLE, c.REPLY_TYPE_OFFSET_DATA
    assert reply.chunks == ((hole,) if is_hole else (data,))


async def test_nothing_more_is_read_for_a_connection_that_was_closed(
    served: Served, disk: Noting
) -> None:
    disk.hold = True
    peer = await served.attach()
    peer.send(c.CMD_READ, 0, 10 * SLICE)
    await disk.until_held(1)
    peer.writer.write(b"\xff" * 28)
    assert await peer.at_end()
    disk.hold = False
    disk.let_go()
    await served.until_connections(0)
    assert len(disk.bios) == 1


async def test_others_are_served_between_slices(served: Served, disk: Noting) -> None:
    large, small = await served.attach(), await served.attach()
    for _ in range(8):
        large.send(c.CMD_READ, 0, 4 * MIB)
    await until(lambda: len(disk.bios) > 2)
    assert (await small.ask(c.CMD_READ, 0, 512)).error == 0
    assert len(disk.bios) < 8 * 4 * MIB // SLICE
    for _ in range(8):
        assert (await large.reply()).data == disk.data


@pytest.mark.parametrize("extended", [False, True])
async def test_no_chunk_has_more_data_than_was_advertised(
    served: Served, extended: bool
) -> None:
    """The server takes READs of 64 MiB, and tells clients of 32, which all of them may send."""
    told = c.PAYLOAD_MAX_DEFAULT
    served.directory.devices["disk"] = disk = Disk(told + 3 * MIB)
    disk.data[::4096] = b"x" * len(disk.data[::4096])
    peer = await served.attach(structured=True, extended=extended)
    data = c.REPLY_TYPE_OFFSET_DATA
    for length, chunks in ((told, (data,)), (told + 2 * MIB, (data, data))):
        reply = await peer.ask(c.CMD_READ, 512, length)
        assert reply.chunks == chunks
        assert reply.data == disk.data[512 : 512 + length]
    reply = await peer.ask(c.CMD_READ, 0, told + 1, flags=c.CMD_FLAG_DF)
    assert (reply.error, reply.chunks) == (c.EOVERFLOW, (c.REPLY_TYPE_ERROR,))
    assert "READ with DF of more than 33554432 bytes" in reply.message
