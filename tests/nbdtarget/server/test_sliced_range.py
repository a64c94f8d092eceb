# SPDX-License-Identifier: Apache-2.0
"""A TRIM, WRITE_ZEROES or CACHE of a long range goes to the device in slices, and can be given up between two of them."""

import asyncio
import errno as errnos
import os
from dataclasses import replace

import pytest

from nbdtarget.bio import FUA, OP_CACHE, OP_DISCARD, OP_READ, OP_WRITE_ZEROES, Bio
from nbdtarget.devices.base import Device
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener
from nbdtarget.server.sliced_range import QUICK_NS, SLICE_MIN, SLOW_NS, Pace
from nbdtarget_protocol import consts as c
from tests.support.clock import SimClock
from tests.support.patience import PATIENCE_S, until
from tests.support.peer import MIB, Peer, Served

GIB = 1 << 30
TIB = 1 << 40
SIZE = 16 * TIB


class Huge(Device):
    """16 TiB that hold nothing. Notes each bio; keeps those of `holds` in `held`, and fails the one that begins at `bad`."""

    can_discard = True
    can_write_zeroes = True

    def __init__(self) -> None:
        super().__init__("huge", SIZE)
        self.bios: list[tuple[int, int, int, int]] = []
        self.held: list[Bio] = []
        self.holds = False
        self.bad = -1

    def submit(self, bio: Bio) -> None:
        self.bios.append((bio.op, bio.offset, bio.length, bio.flags))
        if bio.op == OP_READ:
            assert bio.payload is not None
            bio.payload[:] = bytes(bio.length)
        elif self.holds:
            bio.own()
            self.held.append(bio)
            return
        bio.end(errnos.EIO if bio.offset == self.bad else 0)

    def let_go(self) -> None:
        held, self.held = self.held, []
        for bio in held:
            bio.end(0)

    async def close(self) -> None:
        pass


@pytest.fixture
def huge(served: Served) -> Huge:
    served.directory.devices["disk"] = it = Huge()
    return it


def covers(huge: Huge, offset: int, end: int) -> None:
    at = offset
    for _, begin, length, _ in huge.bios:
        assert begin == at
        at += length
    assert at == end


@pytest.mark.parametrize(
    ("command", "op"),
    [
        (c.CMD_TRIM, OP_DISCARD),
        (c.CMD_WRITE_ZEROES, OP_WRITE_ZEROES),
        (c.CMD_CACHE, OP_CACHE),
    ],
)
async def test_a_whole_disk_is_one_request_and_a_few_slices(
    served: Served, huge: Huge, command: int, op: int
) -> None:
    peer = await served.attach(extended=True)
    flags = 0 if command == c.CMD_CACHE else c.CMD_FLAG_FUA
    reply = await peer.ask(command, 0, SIZE, flags=flags)
    assert (reply.error, reply.chunks) == (0, (c.REPLY_TYPE_NONE,))
    covers(huge, 0, SIZE)
    assert {bio[0] for bio in huge.bios} == {op}
    assert {bio[3] for bio in huge.bios} == {FUA if flags else 0}
    assert len(huge.bios) < 200
    first = SLICE_MIN if command == c.CMD_CACHE else served.limits.range_slice
    assert huge.bios[0][2] == first


async def test_slices_end_where_the_device_can_discard(
    served: Served, huge: Huge
) -> None:
    huge.discard_granularity = 3 * MIB
    peer = await served.attach(extended=True)
    assert not (await peer.ask(c.CMD_TRIM, 512, 5 * GIB)).error
    covers(huge, 512, 512 + 5 * GIB)
    assert len(huge.bios) > 2
    assert {offset % (3 * MIB) for _, offset, _, _ in huge.bios[1:]} == {0}


async def test_slices_end_at_borders_of_sectors(served: Served, huge: Huge) -> None:
    huge.logical_block_size = 4096
    peer = await served.attach(extended=True)
    assert not (await peer.ask(c.CMD_WRITE_ZEROES, 7, 5 * GIB)).error
    covers(huge, 7, 7 + 5 * GIB)
    assert {offset % 4096 for _, offset, _, _ in huge.bios[1:]} == {0}


async def test_granularity_may_be_longer_than_a_slice(
    served: Served, huge: Huge
) -> None:
    served.limits = replace(served.limits, range_slice=MIB)
    huge.discard_granularity = 3 * GIB
    peer = await served.attach(extended=True)
    assert not (await peer.ask(c.CMD_TRIM, 1, 7 * GIB)).error
    covers(huge, 1, 1 + 7 * GIB)
    assert [offset for _, offset, _, _ in huge.bios] == [1, 3 * GIB, 6 * GIB]


async def test_compact_requests_are_sliced_as_well(served: Served, huge: Huge) -> None:
    peer = await served.attach()
    assert not (await peer.ask(c.CMD_TRIM, 0, (1 << 32) - 512)).error
    covers(huge, 0, (1 << 32) - 512)
    assert len(huge.bios) > 1


async def test_first_error_ends_the_request(served: Served, huge: Huge) -> None:
    huge.bad = GIB
    peer = await served.attach(extended=True)
    assert (await peer.ask(c.CMD_WRITE_ZEROES, 0, SIZE)).error == c.EIO
    assert len(huge.bios) == 2


async def test_others_are_served_between_two_slices(served: Served, huge: Huge) -> None:
    huge.holds = True
    peer = await served.attach(extended=True)
    trim = peer.send(c.CMD_TRIM, 0, SIZE)
    await until(lambda: len(huge.held) == 1)
    assert len((await peer.ask(c.CMD_READ, 0, 4096)).data) == 4096
    huge.let_go()
    await until(lambda: len(huge.held) == 1)
    assert len((await peer.ask(c.CMD_READ, 0, 4096)).data) == 4096
    huge.holds = False
    huge.let_go()
    assert (await peer.reply()).cookie == trim


async def test_client_that_goes_ends_its_request(served: Served, huge: Huge) -> None:
    huge.holds = True
    peer = await served.attach(extended=True)
    peer.send(c.CMD_WRITE_ZEROES, 0, SIZE)
    await until(lambda: len(huge.held) == 1)
    peer.close()
    await peer.writer.wait_closed()
    await asyncio.sleep(0)
    huge.let_go()
    await served.until_connections(0)
    assert len(huge.bios) == 1
    assert served.directory.nr_open == {"disk": 0}


async def test_half_closed_client_is_answered(served: Served, huge: Huge) -> None:
    """It has sent all that it wants to, and waits for the reply."""
    huge.holds = True
    peer = await served.attach(extended=True)
    peer.send(c.CMD_TRIM, 0, 4 * GIB)
    await until(lambda: len(huge.held) == 1)
    peer.writer.write_eof()
    huge.holds = False
    huge.let_go()
    assert not (await peer.reply()).error
    covers(huge, 0, 4 * GIB)


async def test_server_that_stops_ends_the_request(served: Served, huge: Huge) -> None:
    huge.holds = True
    peer = await served.attach(extended=True)
    peer.send(c.CMD_WRITE_ZEROES, 0, SIZE)
    await until(lambda: len(huge.held) == 1)
    listener = await served.start()
    closing = asyncio.create_task(listener.close(grace_s=PATIENCE_S))
    await asyncio.sleep(0)
    huge.let_go()
    assert (await peer.reply()).error == c.ESHUTDOWN
    peer.close()
    await closing
    assert len(huge.bios) == 1


async def test_range_of_a_client_that_left_is_waited_for_as_a_whole(
    served: Served, huge: Huge
) -> None:
    """A younger write lies in a slice that is still to come: it must not be overwritten by it."""
    huge.holds = True
    old = await served.attach(extended=True)
    old.send(c.CMD_WRITE_ZEROES, 0, 4 * GIB)
    await until(lambda: len(huge.held) == 1)
    new = await served.attach(extended=True)  # from here on the zeroing is older
    write = new.send(c.CMD_WRITE, 3 * GIB, payload=bytes(512))
    assert not (await new.ask(c.CMD_READ, 8 * GIB, 512)).error  # it was looked at
    huge.holds = False
    huge.let_go()
    assert not (await old.reply()).error
    assert (await new.reply()).cookie == write
    assert huge.bios[-1][:2] == (1, 3 * GIB)


async def test_range_waits_for_older_writes(served: Served, huge: Huge) -> None:
    huge.holds = True
    old = await served.attach(extended=True)
    old.send(c.CMD_WRITE, 3 * GIB, payload=bytes(512))
    await until(lambda: len(huge.held) == 1)
    new = await served.attach(extended=True)
    new.send(c.CMD_WRITE_ZEROES, 0, 4 * GIB)
    # A CACHE changes nothing, so it does not wait.
    cache = new.send(c.CMD_CACHE, 0, 4 * GIB)
    await until(lambda: len(huge.held) == 2)
    assert [bio.op for bio in huge.held] == [1, OP_CACHE]
    huge.holds = False
    huge.let_go()
    replies = [await new.reply() for _ in range(2)]
    assert {reply.error for reply in replies} == {0}
    assert cache in {reply.cookie for reply in replies}
    assert not (await old.reply()).error


async def test_range_that_waits_is_dropped_with_its_connection(
    served: Served, huge: Huge
) -> None:
    huge.holds = True
    old = await served.attach(extended=True)
    old.send(c.CMD_WRITE, 3 * GIB, payload=bytes(512))
    await until(lambda: len(huge.held) == 1)
    new = await served.attach(extended=True)
    new.send(c.CMD_WRITE_ZEROES, 0, 4 * GIB)
    new.writer.write(b"this is no request, and is as long as one")
    assert await new.at_end()
    await served.until_connections(1)
    huge.holds = False
    huge.let_go()
    assert not (await old.reply()).error
    assert len(huge.bios) == 1


def test_pace_follows_the_time_that_slices_take() -> None:
    clock = SimClock()
    pace = Pace(clock, Limits(turn_us=0), GIB)

    def slice_of(ns: int) -> int:
        pace.begin()
        clock.advance(ns / 1e9)
        pace.end()
        return pace.length

    assert slice_of(0) == 2 * GIB
    assert slice_of(QUICK_NS - 1000) == 4 * GIB
    assert slice_of((QUICK_NS + SLOW_NS) // 2) == 4 * GIB
    assert slice_of(SLOW_NS + 1000) == 2 * GIB
    for _ in range(20):
        slice_of(10 * SLOW_NS)
    assert pace.length == SLICE_MIN


# ---- while connections are handed over to another process ----


async def frozen_between_slices(served: Served, huge: Huge, peer: Peer) -> Listener:
    """A request for a long range stands still after its first slice."""
    listener = await served.start()
    await until(lambda: len(huge.held) == 1)
    freezing = asyncio.create_task(listener.freeze(PATIENCE_S))
    await asyncio.sleep(0.01)
    assert not freezing.done()
    huge.let_go()
    assert await freezing == []
    return listener


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("command", [c.CMD_TRIM, c.CMD_WRITE_ZEROES, c.CMD_CACHE])
async def test_the_other_process_goes_on_behind_the_last_slice(
    served: Served, huge: Huge, extended: bool, command: int
) -> None:
    peer = await served.attach(extended=extended)
    huge.holds = True
    length = SIZE if extended else 3 * GIB
    cookie = peer.send(command, 512, length - 512)
    old = await frozen_between_slices(served, huge, peer)
    behind = peer.send(c.CMD_READ, 0, 512)
    huge.holds = False
    moved, fds = old.moved_state()
    fds = [os.dup(fd) for fd in fds]
    old.forget()
    assert not any(served.directory.nr_open.values())
    served.listener = new = Listener(served.directory, limits=served.limits)
    new.take_over(moved, fds)
    new.go_on()
    replies = [await peer.reply() for _ in range(2)]
    assert {reply.cookie: reply.error for reply in replies} == {cookie: 0, behind: 0}
    huge.bios = [bio for bio in huge.bios if bio[0] != OP_READ]
    covers(huge, 512, length)


async def test_ranges_go_on_when_a_hand_over_has_failed(
    served: Served, huge: Huge
) -> None:
    peer = await served.attach(extended=True)
    huge.holds = True
    peer.send(c.CMD_WRITE_ZEROES, 0, SIZE)
    listener = await frozen_between_slices(served, huge, peer)
    listener.moved_state()
    huge.holds = False
    listener.thaw()
    assert (await peer.reply()).error == 0
    covers(huge, 0, SIZE)


async def test_a_range_that_stands_still_for_a_client_that_is_aborted_lets_go(
    served: Served, huge: Huge
) -> None:
    peer = await served.attach(extended=True)
    huge.holds = True
    peer.send(c.CMD_TRIM, 0, SIZE)
    peer.send(c.CMD_TRIM, 0, SIZE)
    listener = await served.start()
    await until(lambda: len(huge.held) == 2)
    freezing = asyncio.create_task(listener.freeze(PATIENCE_S))
    await asyncio.sleep(0.01)
    huge.let_go()
    assert await freezing == []
    await listener.close(0)
    assert not any(served.directory.nr_open.values())


async def test_a_range_that_goes_on_elsewhere_holds_no_other_client_up(
    served: Served, huge: Huge
) -> None:
    """It is not older than the connections that were handed over with it."""
    peer = await served.attach(extended=True)
    other = await served.attach()
    huge.holds = True
    peer.send(c.CMD_TRIM, 0, SIZE)
    old = await frozen_between_slices(served, huge, peer)
    moved, fds = old.moved_state()
    fds = [os.dup(fd) for fd in fds]
    old.forget()
    served.listener = new = Listener(served.directory, limits=served.limits)
    new.take_over(moved, fds)
    new.go_on()
    await until(lambda: len(huge.held) == 1)
    assert (await other.ask(c.CMD_READ, 0, 512)).error == 0
    huge.holds = False
    huge.let_go()
    assert (await peer.reply()).error == 0


async def test_a_range_that_younger_connections_wait_for_is_waited_for(
    served: Served, huge: Huge
) -> None:
    """Their client may be the one that sent it, on a connection that is dead by now. It writes the same place anew."""
    peer = await served.attach(extended=True)
    huge.holds = True
    peer.send(c.CMD_WRITE_ZEROES, 0, SIZE)
    await until(lambda: len(huge.held) == 1)
    await served.attach()
    listener = await served.start()
    freezing = asyncio.create_task(listener.freeze(PATIENCE_S))
    await asyncio.sleep(0.01)
    huge.holds = False
    huge.let_go()
    assert await freezing == []
    covers(huge, 0, SIZE)
    assert listener.moved_state()[0].connections[0].state.begun == ()
    listener.thaw()
    assert (await peer.reply()).error == 0
