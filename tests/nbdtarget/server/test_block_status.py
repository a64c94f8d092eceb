# SPDX-License-Identifier: Apache-2.0
"""BLOCK_STATUS on the wire, with one metadata context and with several."""

import errno as errnos
import struct
from collections.abc import Callable

import pytest

from nbdtarget.common.errors import DeviceError
from nbdtarget.common.turns import Turns
from nbdtarget.devices.base import Device, Extent
from nbdtarget.server.block_status import (
    EXTENTS_ANSWER_MAX,
    NAMESPACE,
    Asked,
    context_names,
    describe,
)
from nbdtarget.server.export import DirectoryExports
from nbdtarget.server.limits import Limits
from nbdtarget.server.sliced_range import Slicing
from nbdtarget_protocol import consts as c
from nbdtarget_protocol.client import ClientNegotiated, ClientTransmission
from nbdtarget_protocol.handshake import CONTEXTS_MAX
from nbdtarget_protocol.replies import ExtendedReplies, StructuredReplies
from tests.support.clock import SimClock
from tests.support.peer import Directory, Disk, Peer, Served

HYDRATION = f"{NAMESPACE}hydration"
CACHE = f"{NAMESPACE}cache"


class Telling(Disk):
    """Has two contexts of its own; knows less of one of them than of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.told = {
            "hydration": [Extent(512, 1), Extent(512, 3)],
            "cache": [Extent(8192, 2)],
        }
        self.extent_list = [Extent(4096, 0), Extent(4096, 3)]
        self.is_broken = False

    @property
    def contexts(self) -> tuple[str, ...]:
        return tuple(self.told)

    async def context_extents(
        self, context: str, offset: int, length: int
    ) -> list[Extent]:
        if self.is_broken and context == "cache":
            raise DeviceError(errnos.EIO, self.name, context, offset, length)
        return self.told.get(context) or [Extent(length, 0)]


Chunk = tuple[int, int, bytes]  # flags, type, payload


async def chunks_of(peer: Peer) -> list[Chunk]:
    """The chunks of the next reply."""
    chunks: list[Chunk] = []
    while not chunks or not chunks[-1][0] & c.REPLY_FLAG_DONE:
        head = await peer.reader.readexactly(c.CHUNK.size)
        magic, flags, kind, _, length = c.CHUNK.unpack(head)
        assert magic == c.STRUCTURED_REPLY_MAGIC
        chunks.append((flags, kind, await peer.reader.readexactly(length)))
    return chunks


def status(context_id: int, *extents: tuple[int, int]) -> bytes:
    packed = (struct.pack(">II", *extent) for extent in extents)
    return struct.pack(">I", context_id) + b"".join(packed)


@pytest.fixture
def telling(served: Served) -> Telling:
    disk = Telling()
    served.directory.devices["disk"] = disk
    return disk


async def test_contexts_are_offered_by_name(telling: Telling) -> None:
    info = DirectoryExports(Directory({"disk": telling})).lookup("disk")
    assert info is not None
    assert info.contexts == ("base:allocation", HYDRATION, CACHE)
    assert context_names(Disk()) == ("base:allocation",)


async def test_contexts_beyond_the_bound_are_not_offered(telling: Telling) -> None:
    telling.told = {f"{nr}": [] for nr in range(99)}
    assert len(context_names(telling)) == CONTEXTS_MAX


async def test_one_chunk_for_each_context_and_done_on_the_last(
    served: Served, telling: Telling
) -> None:
    names = [CACHE, "base:allocation", HYDRATION]
    peer = await served.attach_with(names)
    peer.send(c.CMD_BLOCK_STATUS, 0, 10_000)
    kind, done = c.REPLY_TYPE_BLOCK_STATUS, c.REPLY_FLAG_DONE
    assert await chunks_of(peer) == [
        (0, kind, status(1, (4096, 0), (4096, 3))),
        (0, kind, status(2, (512, 1), (512, 3))),
        (done, kind, status(3, (8192, 2))),
    ]
    peer.send(c.CMD_BLOCK_STATUS, 0, 100, flags=c.CMD_FLAG_REQ_ONE)
    assert await chunks_of(peer) == [
        (0, kind, status(1, (100, 0))),
        (0, kind, status(2, (100, 1))),
        (done, kind, status(3, (100, 2))),
    ]


class Looked(Disk):
    """Is of one kind up to `border`; notes what it is asked about. With `steps_s`, each look takes so long."""

    def __init__(self, border: int) -> None:
        super().__init__()
        self.border = border
        self.looks: list[tuple[int, int]] = []
        self.pieces = 1 << 62  # how long an extent is behind the border
        self.answers_max = 1 << 62  # extents in one answer
        self.clock = SimClock()
        self.step_s = 0.0

    async def extents(self, offset: int, length: int) -> list[Extent]:
        self.looks.append((offset, length))
        self.clock.advance(self.step_s)
        found: list[Extent] = []
        at, end = offset, offset + length
        while at < end and len(found) < self.answers_max:
            if at < self.border:
                stop, flags = min(self.border, end), 3
            else:
                nr = (at - self.border) // self.pieces
                stop, flags = self.border + (nr + 1) * self.pieces, nr % 2
            found.append(Extent(min(stop, end) - at, flags))
            at = min(stop, end)
        return found


GIB = 1 << 30
ALLOCATION = ((1, "base:allocation"),)


def _ask(disk: Looked, length: int, stop: Callable[[], int] = lambda: 0) -> Asked:
    slicing = Slicing(disk.clock, Limits(turn_us=0), Turns(), stop)
    return Asked(disk, slicing, 0, length)


async def _told(
    disk: Looked, length: int, *, req_one: bool = False
) -> list[tuple[int, int]]:
    asked = _ask(disk, length)
    reply = await describe(asked, ALLOCATION, ExtendedReplies(), 7, req_one=req_one)
    assert c.EXTENDED_CHUNK.unpack_from(reply)[1:5] == (1, 6, 7, 0)
    return list(struct.iter_unpack(">QQ", reply[40:]))


@pytest.mark.parametrize(
    ("extent", "looks"),
    [
        (4096, [1 << 20]),
        (1 << 20, [1 << 20, 16 << 20]),
        (20 << 20, [1 << 20, 16 << 20, 256 << 20]),
        (1 << 40, [1 << 20, 16 << 20, 256 << 20, (3 << 30) - (273 << 20)]),
    ],
)
async def test_one_extent_is_found_without_describing_all(
    extent: int, looks: list[int]
) -> None:
    disk = Looked(extent)
    assert await _told(disk, 3 << 30, req_one=True) == [(min(extent, 3 << 30), 3)]
    assert [length for _, length in disk.looks] == looks


async def test_long_range_is_described_in_growing_steps() -> None:
    disk = Looked(1 << 62)
    assert await _told(disk, 1 << 44) == [(1 << 44, 3)]
    lengths = [length for _, length in disk.looks]
    assert lengths[:3] == [GIB, 4 * GIB, 16 * GIB]
    assert sum(lengths) == 1 << 44
    assert len(lengths) == 8


async def test_answer_has_a_bounded_number_of_extents() -> None:
    disk = Looked(0)
    disk.pieces = 1 << 20
    told = await _told(disk, 1 << 44)
    assert told[:3] == [(1 << 20, 0), (1 << 20, 1), (1 << 20, 0)]
    assert EXTENTS_ANSWER_MAX < len(told) <= EXTENTS_ANSWER_MAX + (16 << 10)


async def test_answer_takes_a_bounded_time() -> None:
    disk = Looked(1 << 62)
    disk.step_s = 0.4
    [(length, _)] = await _told(disk, 1 << 44)
    assert len(disk.looks) == 3
    assert length == GIB + GIB // 2 + GIB // 4


async def test_device_that_describes_less_ends_the_answer() -> None:
    disk = Looked(0)
    disk.pieces, disk.answers_max = 4096, 10
    assert len(await _told(disk, 1 << 44)) == 10
    assert len(disk.looks) == 1


async def test_answer_that_nobody_waits_for_is_given_up() -> None:
    disk = Looked(1 << 62)
    asked = _ask(disk, 1 << 44, lambda: errnos.ESHUTDOWN)
    with pytest.raises(DeviceError, match="extents") as caught:
        await describe(asked, ALLOCATION, ExtendedReplies(), 7, req_one=False)
    assert caught.value.errno == errnos.ESHUTDOWN
    assert len(disk.looks) == 1


async def test_one_context_of_several_may_be_selected(
    served: Served, telling: Telling
) -> None:
    peer = await served.attach_with([HYDRATION, "x-nbdtarget:", "base:"])
    peer.send(c.CMD_BLOCK_STATUS, 0, 4096)
    [(flags, _, payload)] = await chunks_of(peer)
    assert flags == c.REPLY_FLAG_DONE
    assert payload == status(2, (512, 1), (512, 3))


async def test_context_that_fails_fails_the_request(
    served: Served, telling: Telling
) -> None:
    telling.is_broken = True
    peer = await served.attach_with(["base:allocation", CACHE])
    peer.send(c.CMD_BLOCK_STATUS, 0, 4096)
    [(flags, kind, payload)] = await chunks_of(peer)
    assert (flags, kind) == (c.REPLY_FLAG_DONE, c.REPLY_TYPE_ERROR)
    assert payload.startswith(struct.pack(">I", c.EIO))
    telling.is_broken = False
    peer.send(c.CMD_BLOCK_STATUS, 0, 4096)
    assert len(await chunks_of(peer)) == 2


async def test_context_stays_when_the_device_no_longer_has_it(
    served: Served, telling: Telling
) -> None:
    peer = await served.attach_with([HYDRATION])
    telling.told.clear()
    peer.send(c.CMD_BLOCK_STATUS, 512, 4096)
    [(_, _, payload)] = await chunks_of(peer)
    assert payload == status(2, (4096, 0))


async def test_reply_is_what_our_own_client_takes() -> None:
    contexts = ((1, "base:allocation"), (2, HYDRATION))
    device: Device = Telling()
    client = ClientTransmission(ClientNegotiated("d", 1 << 20, 1, True, contexts))
    client.request(c.CMD_BLOCK_STATUS, 0, 7, 0, 65536)
    slicing = Slicing(SimClock(), Limits(turn_us=0), Turns(), lambda: 0)
    asked = Asked(device, slicing, 0, 65536)
    reply = await describe(asked, contexts, StructuredReplies(), 7, req_one=False)
    [completion] = client.receive_data(reply)
    assert completion.extents == [(4096, 0), (4096, 3)]


async def test_it_is_cut_short_while_the_connection_is_handed_over() -> None:
    """What is waited for must not take long. The client asks for the rest, in the other process."""
    disk = Looked(1 << 40)
    slicing = Slicing(disk.clock, Limits(turn_us=0), Turns(), lambda: 0, lambda: True)
    asked = Asked(disk, slicing, 0, 1 << 40)
    await describe(asked, ALLOCATION, ExtendedReplies(), 7, req_one=False)
    assert len(disk.looks) == 1
