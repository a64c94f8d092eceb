# SPDX-License-Identifier: Apache-2.0
"""`Input`: received bytes go where they belong, and room is made behind them."""

import socket
from collections.abc import Iterator

import pytest

from nbdtarget.bio import OP_WRITE, Bio
from nbdtarget.common.activity import ACTIVITY
from nbdtarget.common.clock import LoopClock
from nbdtarget.common.turns import Turns
from nbdtarget.server.buffers import BufferPool
from nbdtarget.server.flow import Flow
from nbdtarget.server.input import COMPACT_MAX, Input
from nbdtarget.server.large_write import LargeWrite
from nbdtarget.server.limits import Budget, Limits
from nbdtarget.server.output import Output
from nbdtarget_protocol import consts as c

KIB = 1 << 10


class Ends:
    """An input, and the client's end of its socket."""

    def __init__(self, limits: Limits) -> None:
        self.client, self.ours = socket.socketpair()
        self.ours.setblocking(False)
        self.budget = Budget(limits)
        pool = BufferPool(0)
        self.flow = Flow(
            self, limits, self.budget, pool, LoopClock(), Turns(), self.pause
        )
        self.output = Output(self.ours, limits, self.flow.give_back)
        self.input = Input(self.ours, limits, self.flow, self.output)

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def waiting(self) -> bytes:
        return bytes(self.input.view[self.input.begin : self.input.end])

    def large(self, length: int, step: int) -> LargeWrite:
        payload = memoryview(bytearray(length))
        bio = Bio(OP_WRITE, 0, length, payload, 0, lambda _: None)
        charge = min(length, step)
        self.flow.take(charge)
        return LargeWrite(bio, bytearray(), charge, 0, self.flow, step)


@pytest.fixture
def ends() -> Iterator[Ends]:
    it = Ends(Limits(payload_step=4 * KIB, poison_borrowed=True))
    yield it
    it.client.close()
    it.ours.close()


def test_nothing_there_and_the_end(ends: Ends) -> None:
    with pytest.raises(BlockingIOError):
        ends.input.receive()
    ends.client.close()
    assert ends.input.receive() == 0


def test_whoever_receives_is_seen_as_active(ends: Ends) -> None:
    before = ACTIVITY.nr_batches
    ends.client.sendall(b"abc")
    ends.input.receive()
    assert ACTIVITY.nr_batches == before + 1


def test_what_was_not_served_stays_in_front_of_what_comes(ends: Ends) -> None:
    ends.input.put(b"abc")
    ends.client.send(b"def")
    assert ends.input.receive() == 3
    assert ends.waiting() == b"abcdef"
    ends.input.consume(2)
    assert (ends.input.begin, ends.waiting()) == (0, b"cdef")
    ends.input.consume(4)
    assert (ends.input.begin, ends.input.end) == (0, 0)


def test_much_is_moved_only_when_the_buffer_is_half_full(ends: Ends) -> None:
    ends.input.put(bytes(10) + b"x" * (COMPACT_MAX + 1))
    ends.input.consume(10)
    assert ends.input.begin == 10
    assert ends.waiting() == b"x" * (COMPACT_MAX + 1)
    half = len(ends.input.buffer) // 2
    ends.input.put(bytes(10) + b"y" * half)
    ends.input.consume(10)
    assert (ends.input.begin, ends.waiting()) == (0, b"y" * half)


def test_a_batch_is_more_than_one_request(ends: Ends) -> None:
    read = c.REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_READ, 1, 0, 4096)
    write = c.REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_WRITE, 1, 0, 4) + b"data"
    for data, is_batch in (
        (b"", False),
        (read, False),
        (read + read[:1], True),
        (write, False),
        (write + read, True),
    ):
        ends.input.put(data)
        assert ends.input.is_batch == is_batch


@pytest.mark.parametrize("nr_received", [0, 10, 28, 56, 60, 84])
def test_a_disc_is_seen_behind_requests_that_were_not_served(
    ends: Ends, nr_received: int
) -> None:
    read = c.REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_READ, 1, 0, 4096)
    disc = c.REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_DISC, 1, 0, 0)
    stream = read + read + disc
    ends.input.put(stream[:nr_received])
    assert not ends.input.ends_with_disc() or nr_received == len(stream)
    ends.client.send(stream[nr_received:])
    assert ends.input.ends_with_disc()
    ends.client.send(read)
    assert not ends.input.ends_with_disc()


def test_the_payload_of_a_refused_write_is_dropped_and_then_answered(
    ends: Ends,
) -> None:
    ends.input.skip(5, b"reply")
    ends.client.send(b"1234")
    ends.input.receive()
    assert ends.waiting() == b""
    assert ends.output.is_empty
    ends.client.send(b"5next")
    ends.input.receive()
    assert ends.waiting() == b"next"
    ends.output.flush()
    assert ends.client.recv(100) == b"reply"


def test_large_payload_has_its_own_buffer_and_is_counted(
    ends: Ends,
) -> None:
    large = ends.large(10 * KIB, 4 * KIB)
    ends.input.expect(large)
    ends.client.send(b"p" * 10 * KIB + b"next")
    assert ends.input.receive() == 4 * KIB
    assert ends.budget.nr_bytes == 4 * KIB
    assert ends.input.receive() == 4 * KIB
    assert ends.budget.nr_bytes == 8 * KIB
    assert ends.input.complete is None
    assert ends.input.receive() == 2 * KIB + 4
    assert ends.input.take_complete() is large
    assert ends.input.complete is None
    assert ends.input.large is None
    assert bytes(large.payload) == b"p" * 10 * KIB
    assert ends.waiting() == b"next"


def test_a_payload_that_meets_the_budget_pauses_the_connection(ends: Ends) -> None:
    favoured = ends.large(8 * KIB, 4 * KIB)
    ends.budget.take(0, Limits().bytes_total_max)
    assert favoured.grow()
    large = ends.large(8 * KIB, 4 * KIB)
    ends.input.expect(large)
    ends.client.send(b"p" * 8 * KIB)
    ends.input.receive()
    with pytest.raises(BlockingIOError):
        ends.input.receive()
    assert ends.flow.is_paused
    assert ends.budget.nr_waiters == 1
    assert ends.input.close() is large
    assert ends.input.large is None


def test_what_was_served_up_to_its_end_leaves_room_for_more(ends: Ends) -> None:
    """No room would look like the end of the connection."""
    size = len(ends.input.view)
    ends.input.served(size, size)
    ends.client.send(b"more")
    assert ends.input.receive() == 4
    assert ends.waiting() == b"more"
