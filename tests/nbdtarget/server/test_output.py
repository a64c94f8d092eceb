# SPDX-License-Identifier: Apache-2.0
"""The sending half of a connection, over a socket pair that can be full."""

import socket
from collections.abc import Iterator

import pytest

from nbdtarget.server.buffers import HEADER_ROOM, Buffer, BufferPool
from nbdtarget.server.limits import Limits
from nbdtarget.server.output import FLUSH_MAX, GATHER_MAX, Output


class Pair:
    """An `Output` and the other end of its socket."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        for sock in (self.ours, self.theirs):
            sock.setblocking(False)
        self.left: list[tuple[int, Buffer | None]] = []
        self.output = Output(self.ours, Limits(), lambda *it: self.left.append(it))
        self.output.open_arena()

    def pack(self, data: bytes) -> None:
        output = self.output
        output.arena[output.end : output.end + len(data)] = data
        output.end += len(data)

    def receive(self) -> bytes:
        data = b""
        while True:
            try:
                data += self.theirs.recv(1 << 20)
            except BlockingIOError:
                return data


@pytest.fixture
def pair() -> Iterator[Pair]:
    it = Pair()
    with it.ours, it.theirs:
        yield it


def test_arena_then_queue_leave_in_order(pair: Pair) -> None:
    pair.pack(b"one")
    pair.output.push(b"two")
    assert pair.output.flush()
    assert sorted([pair.receive()]) in ([b"onetwo"], [b"twoone"])
    assert pair.output.is_empty
    assert (pair.output.base, pair.output.end) == (0, 0)


def test_full_socket_keeps_every_byte_in_order(pair: Pair) -> None:
    output = pair.output
    sent = b""
    for at in range(40):
        piece = bytes([at]) * 20_000
        sent += piece
        pair.pack(piece)
        output.flush()
    assert output.is_blocked
    got = b""
    while len(got) < len(sent):
        got += pair.receive()
        output.flush()
    assert got == sent
    assert not output.is_blocked
    assert output.end == 0


def test_pushed_between_packed_never_interrupts_a_reply(pair: Pair) -> None:
    output = pair.output
    for _ in range(30):
        pair.pack(b"a" * 10_000)
        output.push(b"b" * 10_000)
        output.flush()
    got = b""
    while len(got) < 600_000:
        got += pair.receive()
        output.flush()
    pieces = [got[at : at + 10_000] for at in range(0, len(got), 10_000)]
    assert {bytes(piece) for piece in pieces} == {b"a" * 10_000, b"b" * 10_000}


def test_is_full_only_while_blocked(pair: Pair) -> None:
    output = pair.output
    output.push(bytes(4 << 20))
    assert not output.is_full
    output.flush()
    assert output.is_full
    got = 0
    while output.is_blocked:
        got += len(pair.receive())
        output.flush()
    assert not output.is_full


def test_charge_and_buffer_come_back_when_the_reply_has_left(pair: Pair) -> None:
    buffer = bytearray(2 << 20)
    pair.output.push(buffer, 77, buffer)
    pair.output.flush()
    assert pair.left == []
    while not pair.output.is_empty:
        pair.receive()
        pair.output.flush()
    assert pair.left == [(77, buffer)]


def test_charge_and_buffer_come_back_when_all_is_dropped(pair: Pair) -> None:
    buffer = bytearray(64)
    pair.output.push(buffer, 5, buffer)
    pair.output.drop()
    assert pair.left == [(5, buffer)]
    assert pair.output.is_empty


def test_peer_that_is_gone_raises(pair: Pair) -> None:
    pair.theirs.close()
    pair.pack(b"x")
    with pytest.raises(BrokenPipeError):
        pair.output.flush()


@pytest.mark.parametrize("length", [1, 65_536, 65_537, 1 << 20, (1 << 20) + 1])
def test_pool_reuses_a_buffer_for_a_request_of_its_size(length: int) -> None:
    pool = BufferPool(4 << 20)
    buffer = pool.take(length)
    assert len(buffer) >= HEADER_ROOM + length
    pool.give_back(buffer)
    assert pool.take(length) is buffer
    assert pool.take(length) is not buffer


def test_pool_keeps_no_more_than_its_bound() -> None:
    pool = BufferPool(200_000)
    buffers = [pool.take(65_536) for _ in range(5)]
    for buffer in buffers:
        pool.give_back(buffer)
    kept = [pool.take(65_536) for _ in range(5)]
    assert sum(any(it is buffer for buffer in buffers) for it in kept) == 3


def test_pool_does_not_round_up_what_it_would_not_keep() -> None:
    assert len(BufferPool(1 << 20).take(33 << 20)) == HEADER_ROOM + (33 << 20)


def test_one_flush_sends_a_bounded_number_of_bytes(pair: Pair) -> None:
    """The bound also holds for a client that reads as fast as we send."""
    output, piece = pair.output, bytes(64 << 10)
    nr = 3 * FLUSH_MAX // len(piece)
    for _ in range(nr):
        output.push(piece)
    sent = 0

    def sendmsg(pieces: list[memoryview]) -> int:
        nonlocal sent
        sent += (taken := sum(map(len, pieces)))
        return taken

    output._sendmsg = sendmsg  # type: ignore[assignment]  # a socket that takes everything
    assert not output.flush()
    assert output.is_blocked
    assert FLUSH_MAX <= sent <= FLUSH_MAX + GATHER_MAX * len(piece)
    while not output.flush():
        pass
    assert sent == nr * len(piece)
    assert output.is_empty
    assert not output.is_blocked


def test_rest_of_a_half_sent_reply_goes_before_what_is_pushed(pair: Pair) -> None:
    """The compiled fast path may leave a part of a reply; a late reply must not come in between."""
    pair.output.arena[:8] = b"sentrest"
    pair.output.sent_to(4, 8)
    assert not pair.output.is_plain
    pair.output.push(b"late")
    assert pair.output.flush()
    assert pair.receive() == b"restlate"
    assert pair.output.is_plain
    assert pair.output.is_empty


def test_who_packs_replies_without_python_hears_of_what_is_pushed(pair: Pair) -> None:
    """Otherwise the compiled fast path would send into the middle of a reply that was sent in part."""
    heard: list[str] = []
    pair.output.pushed = lambda: heard.append("pushed")
    pair.output.push(b"late")
    assert heard == ["pushed"]
    pair.output.drop()
    pair.output.push(b"later")
    assert heard == ["pushed"]
