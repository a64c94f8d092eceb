# SPDX-License-Identifier: Apache-2.0
"""Requests over a real socket: every command, refusals, bounds, and the memory rule.

Tests whose name ends in `_trap_N` are the live side of a rule that servers often get wrong.
"""

import asyncio
import errno as errnos
from dataclasses import replace

import pytest

from nbdtarget.bio import (
    FAST_ZERO,
    FUA,
    NO_UNMAP,
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.devices.base import EXTENT_HOLE, EXTENT_ZERO, Extent
from nbdtarget_protocol import consts as c
from tests.support.peer import MIB, Disk, LaterDisk, Reply, Served

PATTERN = bytes(range(1, 251)) * 300  # 75000 bytes without a zero
LENGTHS = [1, 512, 4096, 65536, 65537, 70000]


@pytest.mark.parametrize("length", LENGTHS)
async def test_read_returns_data(
    served: Served, structured: bool, held: bool, length: int
) -> None:
    served.directory.devices["disk"] = disk = LaterDisk() if held else Disk()
    disk.data[1000 : 1000 + length] = PATTERN[:length]
    peer = await served.attach(structured=structured)
    reply = await peer.ask(c.CMD_READ, 1000, length)
    assert (reply.error, reply.data) == (0, PATTERN[:length])


class MovedDisk(Disk):
    """Lies below a table that does not begin at 0: it moves each bio on its way down."""

    def submit(self, bio: Bio) -> None:
        bio.offset += 4096
        super().submit(bio)


class MovedLaterDisk(LaterDisk):
    def submit(self, bio: Bio) -> None:
        bio.offset += 4096
        super().submit(bio)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("content", [b"", PATTERN], ids=["zeroes", "data"])
async def test_read_says_where_the_client_asked(
    served: Served, held: bool, length: int, content: bytes
) -> None:
    served.directory.devices["disk"] = disk = MovedLaterDisk() if held else MovedDisk()
    disk.data[5096 : 5096 + len(content)] = content
    peer = await served.attach(structured=True)
    reply = await peer.ask(c.CMD_READ, 1000, length)  # `peer` checks the offset
    assert (reply.error, reply.data) == (0, bytes(disk.data[5096 : 5096 + length]))


@pytest.mark.parametrize("length", [*LENGTHS, 600_000])
async def test_write_reaches_device(
    served: Served, structured: bool, held: bool, length: int
) -> None:
    served.directory.devices["disk"] = disk = LaterDisk() if held else Disk()
    peer = await served.attach(structured=structured)
    data = (PATTERN * 10)[:length]
    assert (await peer.ask(c.CMD_WRITE, 1000, payload=data)).error == 0
    assert disk.data[1000 : 1000 + length] == data
    assert disk.bios == [(OP_WRITE, 1000, length, 0)]


async def test_requests_of_one_batch_are_all_answered(
    served: Served, structured: bool, held: bool
) -> None:
    served.directory.devices["disk"] = disk = LaterDisk() if held else Disk()
    peer = await served.attach(structured=structured)
    batch = b""
    for at in range(0, 100 * 4096, 4096):
        batch += peer.request(c.CMD_WRITE, at, payload=bytes([at // 4096 + 1]) * 4096)
    peer.writer.write(batch)
    replies = [await peer.reply() for _ in range(100)]
    assert sorted(reply.cookie for reply in replies) == list(range(1, 101))
    peer.writer.write(
        b"".join(peer.request(c.CMD_READ, at * 4096, 4096) for at in range(100))
    )
    for _ in range(100):
        reply = await peer.reply()
        assert reply.data == bytes([reply.cookie - 100]) * 4096
    assert len(disk.bios) == 200


async def test_requests_byte_by_byte(served: Served) -> None:
    peer = await served.attach()
    stream = peer.request(c.CMD_WRITE, 5, payload=b"hello")
    stream += peer.request(c.CMD_READ, 5, 5)
    for byte in stream:
        peer.writer.write(bytes([byte]))
        await asyncio.sleep(0)
    assert (await peer.reply()).error == 0
    assert (await peer.reply()).data == b"hello"


async def test_large_write_in_pieces_with_requests_behind_it(served: Served) -> None:
    peer = await served.attach()
    data = PATTERN[:70_000]
    stream = peer.request(c.CMD_WRITE, 0, payload=data)
    stream += peer.request(c.CMD_READ, 0, 70_000)
    for at in range(0, len(stream), 9_999):
        peer.writer.write(stream[at : at + 9_999])
        await asyncio.sleep(0.001)
    assert (await peer.reply()).error == 0
    assert (await peer.reply()).data == data


@pytest.mark.slow
async def test_payload_of_64_mib(served: Served, structured: bool) -> None:
    served.directory.devices["disk"] = disk = Disk(65 * MIB)
    peer = await served.attach(structured=structured)
    data = PATTERN[:65_536] * 1024
    assert (await peer.ask(c.CMD_WRITE, 1, payload=data)).error == 0
    reply = await peer.ask(c.CMD_READ, 1, len(data))
    assert reply.data == data
    assert disk.data[1 : len(data) + 1] == data


@pytest.mark.parametrize("command", [0, 1, 3, 4, 5, 6])  # DISC, 2, has no reply
async def test_length_0_does_not_disconnect_trap_20(
    served: Served, structured: bool, command: int
) -> None:
    peer = await served.attach(structured=structured)
    assert (await peer.ask(command, 4096, 0)).error == 0
    assert (await peer.ask(c.CMD_READ, 0, 1)).data == b"\0"


REFUSED_WRITES = [
    (MIB - 4096, 8192, 0, c.ENOSPC),
    (1 << 63, 8192, 0, c.ENOSPC),
    ((1 << 64) - 4096, 8192, 0, c.ENOSPC),
    (0, 8192, c.CMD_FLAG_DF, c.EINVAL),
    (MIB - 4096, 600_000, 0, c.ENOSPC),
]


@pytest.mark.parametrize(("offset", "length", "flags", "error"), REFUSED_WRITES)
@pytest.mark.parametrize("step", [1 << 20, 5000])
async def test_payload_of_refused_write_is_consumed_trap_17(
    served: Served, step: int, offset: int, length: int, flags: int, error: int
) -> None:
    peer = await served.attach(structured=True)
    # The payload consists of requests, which the server must not carry out.
    trap = (peer.request(c.CMD_WRITE, 0, payload=b"!") * length)[:length]
    stream = peer.request(c.CMD_WRITE, offset, payload=trap, flags=flags)
    for at in range(0, len(stream), step):
        peer.writer.write(stream[at : at + step])
        await asyncio.sleep(0)
    assert (await peer.reply()).error == error
    assert (await peer.ask(c.CMD_READ, 0, 3)).data == b"\0\0\0"
    assert [bio[0] for bio in served.disk.bios] == [OP_READ]


@pytest.mark.parametrize("length", [100, 100_000])
async def test_write_to_read_only_export_is_eperm_trap_17(
    served: Served, length: int
) -> None:
    served.directory.devices["disk"] = Disk(read_only=True)
    peer = await served.attach()
    assert peer.flags & c.FLAG_READ_ONLY
    assert (await peer.ask(c.CMD_WRITE, payload=bytes(length))).error == c.EPERM
    assert (await peer.ask(c.CMD_READ, 0, 1)).data == b"\0"


async def test_write_over_the_limit_is_drained_trap_15(served: Served) -> None:
    served.limits = replace(served.limits, payload_max=16 * MIB)
    served.directory.devices["disk"] = Disk(40 * MIB)
    peer = await served.attach()
    assert (await peer.ask(c.CMD_WRITE, payload=bytes(20 * MIB))).error == c.EINVAL
    assert (await peer.ask(c.CMD_READ, 0, 1)).data == b"\0"


async def test_write_far_over_the_limit_disconnects_trap_15(served: Served) -> None:
    peer = await served.attach()
    peer.send(c.CMD_WRITE, 0, 0xFFFFFFFF)
    assert await peer.at_end()


PAST_THE_END = [
    (c.CMD_READ, c.EINVAL),
    (c.CMD_TRIM, c.EINVAL),
    (c.CMD_CACHE, c.EINVAL),
    (c.CMD_BLOCK_STATUS, c.EINVAL),
    (c.CMD_WRITE_ZEROES, c.ENOSPC),
]


@pytest.mark.parametrize(("command", "error"), PAST_THE_END)
@pytest.mark.parametrize("offset", [MIB - 1, MIB, MIB + 1, (1 << 64) - 1])
async def test_past_the_end_trap_18(
    served: Served, structured: bool, command: int, error: int, offset: int
) -> None:
    peer = await served.attach(structured=structured, contexts=structured)
    reply = await peer.ask(command, offset, 2)
    assert reply.error == error
    assert served.disk.bios == []


@pytest.mark.parametrize("command", [8, 9, 0xFFFF])
async def test_unknown_command_is_einval_trap_19(served: Served, command: int) -> None:
    peer = await served.attach()
    assert (await peer.ask(command, 0, 1)).error == c.EINVAL
    assert (await peer.ask(c.CMD_READ, 0, 1)).error == 0


async def test_bad_request_magic_disconnects_trap_19(served: Served) -> None:
    peer = await served.attach()
    peer.send(c.CMD_READ, 0, 1, magic=0x25609514)
    assert await peer.at_end()


COMMANDS_WITH_FUA = [
    (c.CMD_READ, (OP_READ, 0, 512, 0)),
    (c.CMD_FLUSH, (OP_FLUSH, 0, 0, 0)),
    (c.CMD_CACHE, (OP_CACHE, 0, 512, 0)),
    (c.CMD_TRIM, (OP_DISCARD, 0, 512, FUA)),
    (c.CMD_WRITE_ZEROES, (OP_WRITE_ZEROES, 0, 512, FUA)),
]


@pytest.mark.parametrize(("command", "bio"), COMMANDS_WITH_FUA)
async def test_fua_on_any_command_trap_21(
    served: Served, command: int, bio: tuple[int, int, int, int]
) -> None:
    peer = await served.attach()
    reply = await peer.ask(command, 0, 512, flags=c.CMD_FLAG_FUA)
    assert reply.error == 0
    assert served.disk.bios == [bio]


@pytest.mark.parametrize("length", [512, 100_000, 600_000])
async def test_fua_of_write_reaches_device(served: Served, length: int) -> None:
    peer = await served.attach()
    payload = b"x" * length
    reply = await peer.ask(c.CMD_WRITE, payload=payload, flags=c.CMD_FLAG_FUA)
    assert reply.error == 0
    assert served.disk.bios == [(OP_WRITE, 0, length, FUA)]


async def test_flush_with_offset_and_length_trap_22(served: Served) -> None:
    peer = await served.attach()
    assert (await peer.ask(c.CMD_FLUSH, 1 << 60, 77)).error == 0
    assert served.disk.bios == [(OP_FLUSH, 0, 0, 0)]


async def test_flush_covers_writes_of_other_connections_trap_23(served: Served) -> None:
    writer, flusher = await served.attach(), await served.attach()
    assert writer.flags & c.FLAG_CAN_MULTI_CONN
    assert (await writer.ask(c.CMD_WRITE, payload=b"x" * 100_000)).error == 0
    # Acknowledged on one: on the device, and visible on the other, before its FLUSH.
    assert (await flusher.ask(c.CMD_READ, 0, 1)).data == b"x"
    assert (await flusher.ask(c.CMD_FLUSH)).error == 0
    assert [bio[0] for bio in served.disk.bios] == [OP_WRITE, OP_READ, OP_FLUSH]


async def test_same_cookie_again_trap_26(served: Served) -> None:
    peer = await served.attach()
    for _ in range(2):
        peer.cookie = (7 << 32) - 1
        assert (await peer.ask(c.CMD_READ, 0, 1)).cookie == 7 << 32


async def test_refused_read_is_structured_with_a_message_trap_28(
    served: Served,
) -> None:
    peer = await served.attach(structured=True)
    reply = await peer.ask(c.CMD_READ, MIB, 1)
    assert reply.chunks == (c.REPLY_TYPE_ERROR,)
    assert "past the end" in reply.message


@pytest.mark.parametrize("length", [32 << 10, 64 << 10, 100_000])
async def test_read_of_zeroes_is_a_hole(
    served: Served, held: bool, length: int
) -> None:
    served.directory.devices["disk"] = disk = LaterDisk() if held else Disk()
    peer = await served.attach(structured=True)
    reply = await peer.ask(c.CMD_READ, 4096, length)
    assert reply.chunks == (c.REPLY_TYPE_OFFSET_HOLE,)
    assert reply.data == bytes(length)
    disk.data[4096 + length // 2] = 1
    reply = await peer.ask(c.CMD_READ, 4096, length)
    assert reply.chunks == (c.REPLY_TYPE_OFFSET_DATA,)
    assert reply.data == disk.data[4096 : 4096 + length]


@pytest.mark.parametrize("length", [4096, 64 << 10, 100_000])
async def test_read_of_zeroes_with_df_is_data_trap_30(
    served: Served, length: int
) -> None:
    peer = await served.attach(structured=True)
    assert peer.flags & c.FLAG_SEND_DF
    reply = await peer.ask(c.CMD_READ, 0, length, flags=c.CMD_FLAG_DF)
    assert reply == Reply(1, 0, bytes(length), (c.REPLY_TYPE_OFFSET_DATA,))


async def test_trim_of_4_gib_does_not_disconnect_trap_16(served: Served) -> None:
    class Huge(Disk):
        def carry_out(self, bio: Bio) -> None:
            bio.end(0)

    huge = Huge(1)
    huge.size = 1 << 40
    served.directory.devices["disk"] = huge
    peer = await served.attach(structured=True, contexts=True)
    assert (await peer.ask(c.CMD_TRIM, 0, 0xFFFFFFFF)).error == 0
    assert (await peer.ask(c.CMD_WRITE_ZEROES, 0, 0xFFFFFFFF)).error == 0
    assert (await peer.ask(c.CMD_CACHE, 0, 0xFFFFFFFF)).error == 0
    reply = await peer.ask(c.CMD_BLOCK_STATUS, 0, 0xFFFFFFFF)
    assert reply.extents == ((0xFFFFFFFF, 0),)


async def test_write_zeroes_flags_reach_device_trap_34(served: Served) -> None:
    peer = await served.attach()
    flags = c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FUA
    assert (await peer.ask(c.CMD_WRITE_ZEROES, 0, 512, flags=flags)).error == 0
    assert served.disk.bios == [(OP_WRITE_ZEROES, 0, 512, NO_UNMAP | FUA)]


async def test_fast_zero_unadvertised_is_einval_trap_34(served: Served) -> None:
    peer = await served.attach()
    reply = await peer.ask(c.CMD_WRITE_ZEROES, 0, 512, flags=c.CMD_FLAG_FAST_ZERO)
    assert reply.error == c.EINVAL


async def test_fast_zero_that_is_not_fast_is_enotsup_trap_34(served: Served) -> None:
    served.disk.can_fast_zero = True
    served.disk.fail = errnos.EOPNOTSUPP
    peer = await served.attach()
    reply = await peer.ask(c.CMD_WRITE_ZEROES, 0, 512, flags=c.CMD_FLAG_FAST_ZERO)
    assert reply.error == c.ENOTSUP
    assert served.disk.bios == [(OP_WRITE_ZEROES, 0, 512, FAST_ZERO)]


EXTENTS = [Extent(4096, 0), Extent(4096, EXTENT_HOLE | EXTENT_ZERO), Extent(9999, 0)]


async def test_block_status(served: Served) -> None:
    served.disk.extent_list = EXTENTS
    peer = await served.attach(structured=True, contexts=True)
    reply = await peer.ask(c.CMD_BLOCK_STATUS, 0, 10_000)
    assert reply.chunks == (c.REPLY_TYPE_BLOCK_STATUS,)
    assert reply.extents == ((4096, 0), (4096, 3), (1808, 0))
    reply = await peer.ask(c.CMD_BLOCK_STATUS, 0, 10_000, flags=c.CMD_FLAG_REQ_ONE)
    assert reply.extents == ((4096, 0),)


async def test_block_status_without_context_is_einval_trap_32(served: Served) -> None:
    peer = await served.attach(structured=True)
    assert (await peer.ask(c.CMD_BLOCK_STATUS, 0, 10)).error == c.EINVAL


# ---- bounds ----


async def test_requests_in_flight_are_bounded(served: Served) -> None:
    served.limits = replace(served.limits, requests_in_flight_max=4)
    served.disk.hold = True
    peer = await served.attach()
    for at in range(50):
        peer.send(c.CMD_READ, at * 512, 512)
    await served.disk.until_held(4)
    await asyncio.sleep(0.02)
    assert len(served.disk.held) == 4
    served.disk.let_go(2)
    await served.disk.until_held(4)
    served.disk.hold = False
    served.disk.let_go()
    assert len({(await peer.reply()).cookie for _ in range(50)}) == 50


async def test_bytes_in_flight_are_bounded(served: Served) -> None:
    served.limits = replace(served.limits, bytes_in_flight_max=300_000)
    served.disk.hold = True
    peer = await served.attach()
    for _ in range(10):
        peer.send(c.CMD_WRITE, payload=b"x" * 100_000)
    await served.disk.until_held(2)
    await asyncio.sleep(0.02)
    assert len(served.disk.held) <= 4  # three, and one over
    served.disk.hold = False
    served.disk.let_go()
    assert len({(await peer.reply()).cookie for _ in range(10)}) == 10


async def test_total_in_flight_is_bounded_and_no_connection_starves(
    served: Served,
) -> None:
    served.limits = replace(
        served.limits, requests_total_max=5, requests_in_flight_max=5
    )
    served.disk.hold = True
    peers = [await served.attach() for _ in range(3)]
    for peer in peers:
        for _ in range(20):
            peer.send(c.CMD_READ, 0, 512)
    await served.disk.until_held(5)
    await asyncio.sleep(0.02)
    assert len(served.disk.held) <= 5 + len(peers)
    served.disk.hold = False
    served.disk.let_go()
    for peer in peers:
        assert len({(await peer.reply()).cookie for _ in range(20)}) == 20


@pytest.mark.parametrize("length", [4096, 65536, 200_000])
async def test_client_that_does_not_read_stops_being_served(
    served: Served, length: int
) -> None:
    served.limits = replace(
        served.limits, send_buffer_max=256 << 10, socket_buffer=64 << 10
    )
    served.disk.data[:] = b"\1" * MIB
    peer = await served.attach()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a read transport
    nr = 6 * MIB // length
    peer.writer.write(b"".join(peer.request(c.CMD_READ, 0, length) for _ in range(nr)))
    await asyncio.sleep(0.05)
    served_first = len(served.disk.bios)
    assert served_first * length < 3 * MIB
    peer.writer.transport.resume_reading()  # type: ignore[attr-defined]  # the same
    for _ in range(nr):
        assert (await peer.reply()).data == b"\1" * length
    assert len(served.disk.bios) == nr


ANSWERED_AT_ONCE = [
    (77, 0, b""),
    (c.CMD_READ, MIB, b""),
    (c.CMD_WRITE, 0, b""),
    (c.CMD_WRITE, MIB, b"past the end"),
    (c.CMD_FLUSH, 0, b""),
]


@pytest.mark.parametrize(("command", "offset", "payload"), ANSWERED_AT_ONCE)
async def test_replies_without_i_o_are_bounded_when_the_client_does_not_read(
    served: Served, command: int, offset: int, payload: bytes
) -> None:
    served.limits = replace(served.limits, socket_buffer=64 << 10, send_queue_max=1000)
    listener = await served.start()
    peer = await served.attach(structured=True)
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a read transport
    nr = 30_000
    stream = b"".join(peer.request(command, offset, payload=payload) for _ in range(nr))
    peer.writer.write(stream)
    await asyncio.sleep(0.1)
    (connection,) = listener._connections
    # As many as lie in one receive buffer may have come before the socket was found full.
    in_buffer = served.limits.receive_buffer // (c.REQUEST.size + len(payload))
    assert connection._output.nr_pieces <= 1000 + in_buffer
    peer.writer.transport.resume_reading()  # type: ignore[attr-defined]  # the same
    assert {(await peer.reply()).cookie for _ in range(nr)} == set(range(1, nr + 1))


async def test_slow_export_does_not_hold_up_another(served: Served) -> None:
    slow = Disk()
    slow.hold = True
    served.directory.devices["slow"] = slow
    served.directory.nr_open["slow"] = 0
    stuck, quick = await served.attach("slow"), await served.attach("disk")
    for _ in range(300):
        stuck.send(c.CMD_READ, 0, 4096)
    await slow.until_held(256)
    assert (await quick.ask(c.CMD_READ, 0, 4096)).error == 0


# ---- the memory rule ----


class KeepsPayload(Disk):
    """Breaks the rule in a way that cannot be seen at once: it uses the payload after it has ended the bio."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[memoryview] = []

    def submit(self, bio: Bio) -> None:
        assert bio.payload is not None
        self.kept.append(bio.payload)
        bio.end(0)


@pytest.mark.parametrize("command", [c.CMD_READ, c.CMD_WRITE])
async def test_borrowed_memory_is_poisoned_after_use(
    served: Served, command: int
) -> None:
    served.directory.devices["disk"] = disk = KeepsPayload()
    peer = await served.attach()
    payload = b"x" * 512 if command == c.CMD_WRITE else b""
    assert (await peer.ask(command, 0, 512, payload=payload)).error == 0
    await peer.ask(c.CMD_READ, 0, 0)
    assert disk.kept[0] == b"\xdb" * 512


async def test_replies_are_sent_once_when_a_bound_is_met_right_after_sending(
    served: Served,
) -> None:
    class HoldsLarge(Disk):
        def submit(self, bio: Bio) -> None:
            self.hold = bio.length > 65_536
            super().submit(bio)

    served.limits = replace(served.limits, requests_in_flight_max=1, flush_at=1)
    served.directory.devices["disk"] = disk = HoldsLarge()
    peer = await served.attach()
    lengths = (70_000, 512, 512)
    peer.writer.write(b"".join(peer.request(c.CMD_READ, 0, it) for it in lengths))
    assert (await peer.reply()).cookie == 2
    await disk.until_held(1)
    disk.let_go()
    assert {(await peer.reply()).cookie for _ in range(2)} == {1, 3}
    assert (await peer.ask(c.CMD_FLUSH)).error == 0
