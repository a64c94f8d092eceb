# SPDX-License-Identifier: Apache-2.0
"""Clients that announce large WRITEs and do not send them: what they take, and who waits for them."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from nbdtarget.server.buffers import BufferPool
from nbdtarget_protocol import consts as c
from tests.support.patience import PATIENCE_S, until
from tests.support.peer import MIB, Disk, Served


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


async def test_header_of_a_large_write_reserves_no_memory(
    served: Served,
) -> None:
    served.directory.devices["disk"] = Disk(32 * MIB)
    other = await served.attach()
    hostile = [await served.attach() for _ in range(50)]
    before = resident_bytes()
    for peer in hostile:
        peer.send(c.CMD_WRITE, 0, 32 * MIB)
    listener = await served.start()
    budget = listener.budget
    assert budget is not None
    await until(lambda: budget.nr_bytes > 10 * MIB)
    async with asyncio.timeout(PATIENCE_S):
        assert (await other.ask(c.CMD_READ, 0, 16 * MIB)).error == 0
        assert (await other.ask(c.CMD_WRITE, payload=b"x" * 16 * MIB)).error == 0
    assert budget.nr_bytes < 20 * MIB
    assert resident_bytes() - before < 200 * MIB  # the buffers of this one's own


async def test_half_sent_writes_leave_half_of_the_budget_to_others(
    served: Served,
) -> None:
    served.limits = replace(
        served.limits, payload_max=4 * MIB, bytes_total_max=16 * MIB
    )
    served.directory.devices["disk"] = Disk(4 * MIB)
    other = await served.attach()
    hostile = [await served.attach() for _ in range(10)]
    for peer in hostile:
        peer.send(c.CMD_WRITE, 0, 4 * MIB)
        peer.writer.write(bytes(3 * MIB))
    listener = await served.start()
    budget = listener.budget
    assert budget is not None
    await until(lambda: budget.nr_waiters > 3)
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(3):
            assert (await other.ask(c.CMD_READ, 0, MIB)).error == 0
            assert (await other.ask(c.CMD_WRITE, payload=b"x" * 200_000)).error == 0


async def test_all_writes_end_although_together_they_are_more_than_the_budget(
    served: Served,
) -> None:
    served.limits = replace(served.limits, payload_max=4 * MIB, bytes_total_max=4 * MIB)
    served.directory.devices["disk"] = Disk(4 * MIB)
    peers = [await served.attach() for _ in range(6)]
    for peer in peers:
        peer.send(c.CMD_WRITE, 0, 4 * MIB)
        peer.writer.write(bytes(MIB))
    await asyncio.sleep(0.05)
    for peer in peers:
        peer.writer.write(bytes(3 * MIB))
    async with asyncio.timeout(PATIENCE_S):
        for peer in peers:
            assert (await peer.reply()).error == 0


@pytest.mark.parametrize("dribbles", [False, True])
async def test_idle_sender_is_cut_off_when_others_wait_for_memory(
    served: Served, dribbles: bool
) -> None:
    served.limits = replace(
        served.limits,
        payload_max=2 * MIB,
        bytes_total_max=2 * MIB,
        stall_timeout_s=0.2,
    )
    served.directory.devices["disk"] = Disk(2 * MIB)
    stalled, other = await served.attach(), await served.attach()
    stalled.send(c.CMD_WRITE, 0, 2 * MIB)
    stalled.writer.write(bytes(MIB))
    await asyncio.sleep(0.5)
    assert not stalled.reader.at_eof()  # no other client waits for its memory yet
    async with asyncio.timeout(PATIENCE_S):
        cookie = other.send(c.CMD_READ, 0, 2 * MIB)
        answer = asyncio.create_task(other.reply())
        while dribbles and not answer.done():
            stalled.writer.write(b"x")
            await asyncio.sleep(0.02)
        assert (await answer).cookie == cookie
    await served.until_connections(1)


async def test_a_client_costs_little_before_it_is_attached(served: Served) -> None:
    await served.attach()
    before = resident_bytes()
    peers = [await served.connect() for _ in range(100)]
    for peer in peers:
        await peer.greet()
    assert resident_bytes() - before < 30 * MIB


async def test_a_client_that_does_not_take_its_answers_is_not_read_from(
    served: Served,
) -> None:
    """Otherwise a few options of 20 bytes, each answered with a long list, would take unbounded memory."""
    for nr in range(2000):
        served.directory.devices[f"{nr:030}"] = served.disk
    served.limits = replace(served.limits, socket_buffer=64 << 10)
    listener = await served.start()
    peer = await served.connect()
    await peer.greet()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a read transport
    before = resident_bytes()
    for _ in range(2000):
        peer.option(c.OPT_LIST)
    (connection,) = listener._connections
    await until(lambda: connection._output.is_blocked)
    await asyncio.sleep(0.1)
    assert connection._output.nr_queued < 5 * MIB
    assert resident_bytes() - before < 30 * MIB


@pytest.mark.parametrize("says_disc", [True, False])
async def test_a_connection_gives_its_memory_back_when_it_ends(
    served: Served, says_disc: bool
) -> None:
    """The memory must not wait for the next full garbage collection: until then 200 connections were a gigabyte."""
    listener = await served.start()
    peer = await served.attach()
    (connection,) = listener._connections
    await peer.ask(c.CMD_READ, 0, 4096)
    await peer.ask(c.CMD_WRITE, payload=b"x" * 4096)
    requests, received = connection._requests, connection._input
    assert requests is not None
    assert received is not None
    assert len(received.buffer) == served.limits.receive_buffer
    if says_disc:
        peer.send(c.CMD_DISC)
    else:
        peer.close()
    await served.until_connections(0)
    assert len(received.buffer) == len(connection._output.arena) == 0
    assert requests._bio.payload is None


def test_memory_for_a_write_is_not_taken_before_it_is_written_to() -> None:
    pool = BufferPool(1 << 20)
    before = resident_bytes()
    buffers = [pool.take_untouched(32 * MIB) for _ in range(20)]
    assert resident_bytes() - before < 10 * MIB
    for buffer in buffers:
        pool.give_back(buffer)
    small = pool.take_untouched(100_000)
    pool.give_back(small)
    assert pool.take_untouched(100_000) is small


async def test_connection_waits_once_in_line_for_memory(
    served: Served,
) -> None:
    served.limits = replace(served.limits, payload_max=2 * MIB, bytes_total_max=4 * MIB)
    disk = Disk(2 * MIB)
    disk.hold = True
    served.directory.devices["disk"] = disk
    first, second, third = [await served.attach() for _ in range(3)]
    third.send(c.CMD_READ, 0, 128 << 10)
    first.send(c.CMD_READ, 0, 2 * MIB)
    await disk.until_held(2)
    second.send(c.CMD_READ, 0, 2 * MIB)
    listener = await served.start()
    budget = listener.budget
    assert budget is not None
    await until(lambda: budget.nr_waiters == 1)
    disk.let_go(1)  # too little for it to go on
    assert (await third.reply()).error == 0
    for _ in range(100):
        await asyncio.sleep(0)
    assert (
        budget.nr_waiters == 1
    )  # each further look would have taken a place in the line
    disk.hold = False
    disk.let_go()
    async with asyncio.timeout(PATIENCE_S):
        assert (await first.reply()).error == 0
        assert (await second.reply()).error == 0
