# SPDX-License-Identifier: Apache-2.0
"""A connection with extended headers: every command, what is refused, and payloads where none belong."""

import struct

import pytest

from nbdtarget.devices.base import Extent
from nbdtarget_protocol import consts as c
from tests.support.peer import MIB, Disk, Peer, Served

KIB, TIB = 1 << 10, 1 << 40
PAYLOAD = c.CMD_FLAG_PAYLOAD_LEN
DATA = bytes(range(256)) * 16
HOLE, NONE = (c.REPLY_TYPE_OFFSET_HOLE,), (c.REPLY_TYPE_NONE,)
ERROR = (c.REPLY_TYPE_ERROR,)


async def still_in_step(peer: Peer) -> bool:
    return not (await peer.ask(c.CMD_FLUSH)).error


async def test_each_command_is_answered_with_chunks(served: Served) -> None:
    peer = await served.attach(extended=True)
    assert (await peer.ask(c.CMD_WRITE, 512, payload=DATA)).chunks == NONE
    reply = await peer.ask(c.CMD_READ, 512, len(DATA))
    assert (reply.data, reply.chunks) == (DATA, (c.REPLY_TYPE_OFFSET_DATA,))
    for command in (c.CMD_FLUSH, c.CMD_TRIM, c.CMD_CACHE, c.CMD_WRITE_ZEROES):
        reply = await peer.ask(command, 512, 4096)
        assert (reply.error, reply.chunks) == (0, NONE)
    reply = await peer.ask(c.CMD_WRITE, 0, payload=DATA, flags=c.CMD_FLAG_FUA)
    assert (reply.error, reply.chunks) == (0, NONE)
    assert served.disk.bios[-1][3] == 1
    peer.send(c.CMD_DISC)
    assert await peer.at_end()


@pytest.mark.parametrize("length", [1, 4096, 64 * KIB, 64 * KIB + 1, 300 * KIB, MIB])
async def test_reads_and_writes_of_all_sizes(served: Served, length: int) -> None:
    peer = await served.attach(extended=True)
    data = (DATA * 256)[:length]
    assert not (await peer.ask(c.CMD_WRITE, 0, payload=data)).error
    reply = await peer.ask(c.CMD_READ, 0, length)
    assert (reply.error, reply.data) == (0, data)
    served.disk.hold = True
    later = peer.send(c.CMD_READ, 0, length)
    await served.disk.until_held(1)
    served.disk.let_go()
    reply = await peer.reply()
    assert (reply.cookie, reply.data) == (later, data)


@pytest.mark.parametrize("length", [32 * KIB, 64 * KIB, MIB])
async def test_zeroes_are_a_hole(served: Served, length: int) -> None:
    peer = await served.attach(extended=True)
    reply = await peer.ask(c.CMD_READ, 0, length)
    assert (reply.data, reply.chunks) == (bytes(length), HOLE)


async def test_errors_name_the_offset(served: Served) -> None:
    peer = await served.attach(extended=True)
    served.disk.fail = 28
    reply = await peer.ask(c.CMD_WRITE, 4096, payload=DATA)
    assert (reply.error, reply.chunks) == (c.ENOSPC, ERROR)
    reply = await peer.ask(c.CMD_READ, 4096, 100)
    assert (reply.error, reply.chunks) == (c.ENOSPC, ERROR)


@pytest.mark.parametrize(
    ("command", "offset", "length", "error"),
    [
        (c.CMD_READ, 0, 1 << 32, c.EINVAL),  # past the end of this disk
        (c.CMD_TRIM, 0, 1 << 63, c.EINVAL),
        (c.CMD_WRITE_ZEROES, 1, (1 << 64) - 1, c.ENOSPC),
        (c.CMD_CACHE, (1 << 64) - 1, (1 << 64) - 1, c.EINVAL),
        (c.CMD_BLOCK_STATUS, 0, (1 << 32) + 1, c.EINVAL),
        (c.CMD_BLOCK_STATUS, 0, 0, c.EINVAL),
        (99, 0, 1 << 40, c.EINVAL),
    ],
)
async def test_long_requests_past_the_end(
    served: Served, command: int, offset: int, length: int, error: int
) -> None:
    peer = await served.attach(extended=True, contexts=True)
    reply = await peer.ask(command, offset, length)
    assert (reply.error, reply.chunks) == (error, ERROR)
    assert served.disk.bios == []
    assert await still_in_step(peer)


async def test_read_above_the_maximum_payload(served: Served) -> None:
    served.disk.size = 16 * TIB
    peer = await served.attach(extended=True)
    for length in (64 * MIB + 1, 1 << 32, TIB):
        reply = await peer.ask(c.CMD_READ, 0, length)
        assert (reply.error, reply.chunks) == (c.EOVERFLOW, ERROR)
    assert await still_in_step(peer)


@pytest.mark.parametrize("length", [512, 300 * KIB])
@pytest.mark.parametrize("flags", [0, c.CMD_FLAG_FUA])
async def test_write_without_payload_len_is_a_write(
    served: Served, length: int, flags: int
) -> None:
    """QEMU's client leaves the flag out."""
    peer = await served.attach(extended=True)
    header = c.EXTENDED_REQUEST.pack(
        c.EXTENDED_REQUEST_MAGIC, flags, c.CMD_WRITE, 7, 0, length
    )
    peer.offsets[7] = 0
    peer.writer.write(header + b"x" * length)
    reply = await peer.reply()
    assert (reply.error, reply.chunks) == (0, NONE)
    assert served.disk.bios == [(1, 0, length, flags)]
    assert served.disk.data[: length + 1] == b"x" * length + b"\0"
    assert await still_in_step(peer)


@pytest.mark.parametrize(
    "command",
    [c.CMD_READ, c.CMD_FLUSH, c.CMD_TRIM, c.CMD_WRITE_ZEROES, c.CMD_BLOCK_STATUS, 99],
)
@pytest.mark.parametrize("length", [12, 4096, 600 * KIB])
async def test_payload_that_does_not_belong_is_dropped(
    served: Served, command: int, length: int
) -> None:
    peer = await served.attach(extended=True)  # without contexts
    reply = await peer.ask(command, 0, payload=bytes(length))
    assert (reply.error, reply.chunks) == (c.EINVAL, ERROR)
    assert served.disk.bios == []
    assert await still_in_step(peer)


@pytest.mark.parametrize("command", [c.CMD_WRITE, c.CMD_TRIM, c.CMD_BLOCK_STATUS])
async def test_payload_that_is_too_long_ends_the_connection(
    served: Served, command: int
) -> None:
    peer = await served.attach(extended=True, contexts=True)
    peer.send(command, 0, (1 << 32) + 4096, flags=PAYLOAD)
    assert await peer.at_end()


async def test_long_payload_of_a_read_only_export_is_dropped(served: Served) -> None:
    served.directory.devices["disk"] = Disk(read_only=True)
    peer = await served.attach(extended=True)
    assert (await peer.ask(c.CMD_WRITE, 0, payload=DATA)).error == c.EPERM
    assert (await peer.ask(c.CMD_WRITE, 0, payload=bytes(MIB))).error == c.EPERM
    assert await still_in_step(peer)


async def test_compact_request_is_no_request(served: Served) -> None:
    peer = await served.attach(extended=True)
    peer.send(c.CMD_READ, 0, 1, magic=c.REQUEST_MAGIC)
    assert await peer.at_end()


async def test_payload_len_means_nothing_with_compact_headers(served: Served) -> None:
    peer = await served.attach(structured=True)
    assert (await peer.ask(c.CMD_FLUSH, flags=PAYLOAD)).error == c.EINVAL
    reply = await peer.ask(c.CMD_WRITE, 0, payload=DATA, flags=PAYLOAD)
    assert reply.error == c.EINVAL
    assert await still_in_step(peer)


async def test_received_byte_by_byte(served: Served) -> None:
    peer = await served.attach(extended=True, contexts=True)
    stream = peer.request(c.CMD_WRITE, 0, payload=DATA[:600])
    stream += peer.request(c.CMD_BLOCK_STATUS, 0, payload=_asks(MIB, 1))
    stream += peer.request(c.CMD_READ, 0, 600)
    for at in range(len(stream)):
        peer.writer.write(stream[at : at + 1])
        await peer.writer.drain()
    replies = {reply.cookie: reply for reply in [await peer.reply() for _ in range(3)]}
    assert replies[3].data == DATA[:600]
    assert replies[2].extents == ((MIB, 0),)
    assert [replies[nr].error for nr in (1, 2, 3)] == [0, 0, 0]


# ---- BLOCK_STATUS ----


class Telling(Disk):
    """Has two contexts of its own."""

    contexts = ("hydration", "cache")

    async def context_extents(
        self, context: str, offset: int, length: int
    ) -> list[Extent]:
        return [Extent(length, 1 if context == "hydration" else 3)]


NAMES = ["base:allocation", "x-nbdtarget:hydration", "x-nbdtarget:cache"]


def _asks(length: int, *ids: int) -> bytes:
    return struct.pack(f">Q{len(ids)}I", length, *ids)


async def _telling(served: Served, names: list[str]) -> Peer:
    served.directory.devices["disk"] = telling = Telling()
    telling.size = 16 * TIB
    peer = await served.connect()
    await peer.attach("disk", extended=True, contexts=names)
    return peer


async def test_whole_disk_is_described_in_one_answer(served: Served) -> None:
    peer = await _telling(served, NAMES)
    assert peer.flags & c.FLAG_BLOCK_STATUS_PAYLOAD
    reply = await peer.ask(c.CMD_BLOCK_STATUS, 0, 16 * TIB)
    assert reply.chunks == (c.REPLY_TYPE_BLOCK_STATUS_EXT,) * 3
    assert reply.extents == ((16 * TIB, 0), (16 * TIB, 1), (16 * TIB, 3))


@pytest.mark.parametrize(("ids", "flags"), [((1,), (0,)), ((3, 2), (1, 3))])
async def test_payload_selects_contexts(
    served: Served, ids: tuple[int, ...], flags: tuple[int, ...]
) -> None:
    peer = await _telling(served, NAMES)
    reply = await peer.ask(c.CMD_BLOCK_STATUS, 512, payload=_asks(8 << 30, *ids))
    assert reply.extents == tuple((8 << 30, each) for each in flags)


@pytest.mark.parametrize(
    "payload",
    [
        _asks(4096),
        _asks(4096, 1, 1),
        _asks(4096, 4),
        _asks(4096, 1, 2, 3, 4),
        _asks(0, 1),
        _asks(17 * TIB, 1),
        _asks(4096, *range(1, 40)),
        _asks(4096, 1)[:-1],
        b"1234",
    ],
)
async def test_payload_that_selects_nothing(served: Served, payload: bytes) -> None:
    peer = await _telling(served, NAMES)
    reply = await peer.ask(c.CMD_BLOCK_STATUS, 0, payload=payload)
    assert (reply.error, reply.chunks) == (c.EINVAL, ERROR)
    assert await still_in_step(peer)


async def test_context_that_was_not_negotiated_cannot_be_selected(
    served: Served,
) -> None:
    peer = await _telling(served, NAMES[:1])
    reply = await peer.ask(c.CMD_BLOCK_STATUS, 0, payload=_asks(4096, 2))
    assert reply.error == c.EINVAL


async def test_one_extent_of_a_selected_context(served: Served) -> None:
    peer = await _telling(served, NAMES)
    one = c.CMD_FLAG_REQ_ONE
    asks = _asks(4 * TIB, 2)
    reply = await peer.ask(c.CMD_BLOCK_STATUS, 0, payload=asks, flags=one)
    assert reply.extents == ((4 * TIB, 1),)
