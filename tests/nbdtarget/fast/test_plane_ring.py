# SPDX-License-Identifier: Apache-2.0
"""READs of the compiled fast path that io_uring carries out: a socket pair, a ring, and a pipe in place of a slow disk."""

import os
import select
import socket
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from nbdtarget.fast import compiled
from nbdtarget.server.poller import Lateness
from tests.support.patience import PATIENCE_S

pytestmark = pytest.mark.skipif(
    not compiled.is_available(), reason="io_uring is not built, or not allowed"
)
if compiled.IS_COMPILED:
    from nbdtarget_fast import DONE, POLLED, SLOW, FastFile, Plane, Receiver, Route
    from nbdtarget_ring import Ring

SIZE = 1 << 20
POLL_NS = 50_000  # with it, a READ that is alone is waited for


class Bench:
    """A plane whose file is a pipe: what is written to it is what the disk answers, one READ after the other.

    Attributes:
        told: what the plane has told of its reads.
        room_left: how many may begin.
        alone: whether nothing else is in flight.
    """

    def __init__(
        self,
        *,
        structured: bool = True,
        extended: bool = False,
        nr_reads_max: int = 16,
        received: int = 1 << 16,
    ) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.extended = extended
        self.room_left = 100
        self.sends = True
        self.alone = True
        self.reading, self.disk = os.pipe()
        self.ring = Ring(nr_reads_max)
        self.file = FastFile(
            self.reading,
            10**9,
            lambda: None,
            lambda *_: None,
            lambda nr: self.told.append(("file", nr)),
        )
        self.file.size = self.file.ring_max = SIZE
        self.file.read_max = 0  # the page cache has nothing
        self.file.ring = self.ring
        self.ours, self.peer = socket.socketpair()
        self.ours.setblocking(False)
        self.peer.setblocking(False)
        self.arena = bytearray(1 << 18)
        self.plane = Plane(
            self.ours.fileno(),
            bytearray(received),
            self.arena,
            structured=structured,
            can_write=True,
            size=SIZE,
            zero_min=8192,
            length_max=200_000,
            turn_ns=10**9,
            flush_at=1 << 17,
            poison=True,
            ring_reads=self,
            alone_max=1 << 16,
            extended=extended,
        )
        self.route = Route.flat(self.file, 0, SIZE)
        self.route.can_read = True
        self.route.in_flight = (self,)

    # The methods of a connection and of a mapped device

    def room(self) -> tuple[int, int]:
        return self.room_left, 1 << 30

    def is_alone(self) -> bool:
        return self.alone

    def begun(self, nr: int, nr_bytes: int) -> None:
        self.told.append(("begun", nr, nr_bytes))

    def may_send(self) -> bool:
        return self.sends

    def ended(self, nr: int, nr_bytes: int) -> None:
        self.told.append(("ended", nr, nr_bytes))

    def push(self, data: bytes, charge: int) -> None:
        self.told.append(("push", data, charge))

    def read_again(self, cookie: int, offset: int, length: int) -> None:
        self.told.append(("again", cookie, offset, length))

    def begin_reads(self, nr: int) -> None:
        self.told.append(("device", nr))

    def end_reads(self, nr: int) -> None:
        self.told.append(("device", -nr))

    # The methods for tests

    def receiver(self, *, poll_streak: int) -> "Receiver":
        """Return what the loop would call; it polls once, and then never again."""
        received = SimpleNamespace(begin=0, end=0)
        output = SimpleNamespace(base=0, end=0)

        def served(begin: int, end: int) -> None:
            received.begin, received.end = begin, end

        def sent_to(base: int, end: int) -> None:
            output.base, output.end = base, end

        received.served, output.sent_to = served, sent_to
        return Receiver(
            self.plane,
            maybe_route=lambda: self.route,
            is_plain=lambda: True,
            received=received,
            output=output,
            polling=SimpleNamespace(last=None),
            may_poll=lambda: True,
            has_no_losses=lambda: True,
            poll_ns=1000,
            poll_streak=poll_streak,
            poll_skip_max=1000,
            poll_rest=1000,
            late=Lateness(),
            readable=lambda: self.told.append(("readable",)),
            stopped=lambda stop: self.told.append(("stopped", stop)),
            ended=lambda: None,
            failed=lambda error: self.told.append(("failed", error)),
        )

    def read(self, *lengths: int, poll_ns: int = 0) -> int:
        """Ask for READs, of cookies 0, 1 ... and offsets 0, 512 ..., and have a turn."""
        for nr, length in enumerate(lengths):
            layout, magic = (
                (">IHHQQQ", 0x21E41C71) if self.extended else (">IHHQQI", 0x25609513)
            )
            head = struct.pack(layout, magic, 0, 0, nr, 512 * nr, length)
            self.peer.send(head)
        plane = self.plane
        return plane.turn(
            self.route, poll_ns, False, plane.begin, plane.end, plane.base, plane.out
        )

    def answer(self, *pieces: bytes) -> None:
        """Let the disk answer, and the loop hear of it."""
        for piece in pieces or [b""]:
            if piece:
                os.write(self.disk, piece)
            found: list[object] = []
            while (
                not found and select.select([self.ring.event_fd], [], [], PATIENCE_S)[0]
            ):
                for done, result in self.ring.reap():
                    found.append(done)
                    done(result)

    def replies(self) -> bytes:
        found = b""
        while True:
            try:
                found += self.peer.recv(1 << 20)
            except BlockingIOError:
                return found

    def take_told(self) -> list[tuple[Any, ...]]:
        told, self.told = self.told, []
        return told

    def close(self) -> None:
        self.plane.release()
        for fd in (self.reading, self.disk):
            os.close(fd)
        self.ours.close()
        self.peer.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def chunk(cookie: int, data: bytes) -> bytes:
    head = struct.pack(">IHHQI", 0x668E33EF, 1, 1, cookie, len(data) + 8)
    return head + struct.pack(">Q", 512 * cookie) + data


def test_reads_are_told_of_in_batches(bench: Bench) -> None:
    assert bench.read(512, 512, 1024) == DONE
    assert bench.take_told() == [("device", 3), ("file", 3), ("begun", 3, 2048)]
    assert bench.ring.nr_reads == 3
    assert bench.replies() == b""
    bench.answer(b"a" * 2048)
    while bench.ring.nr_reads:
        bench.answer()
    # A pipe gives its bytes to any of those who wait.
    lengths = (512, 512, 1024)
    whole = [chunk(nr, b"a" * length) for nr, length in enumerate(lengths)]
    assert len(bench.replies()) == len(b"".join(whole))
    ended = [told for told in bench.take_told() if told[0] == "ended"]
    assert [sum(column) for column in zip(*[t[1:] for t in ended], strict=True)] == [
        3,
        2048,
    ]


def test_simple_replies() -> None:
    bench = Bench(structured=False)
    bench.read(512)
    bench.answer(b"a" * 512)
    assert bench.replies() == struct.pack(">IIQ", 0x67446698, 0, 0) + b"a" * 512
    bench.close()


@pytest.mark.parametrize("poll_ns", [0, POLL_NS])
def test_replies_with_extended_headers(poll_ns: int) -> None:
    bench = Bench(extended=True)
    for data in (b"a" * 8192, bytes(8192)):
        if poll_ns:
            os.write(bench.disk, data)
        bench.read(8192, poll_ns=poll_ns)
        if not poll_ns:
            bench.answer(data)
        head = struct.pack(">IHHQQ", 0x6E8A278C, 1, 1 if data[0] else 2, 0, 0)
        if data[0]:
            rest = struct.pack(">QQ", 8200, 0) + data
        else:
            rest = struct.pack(">QQI", 12, 0, 8192)
        assert bench.replies() == head + rest
    bench.close()


@pytest.mark.parametrize("poll_ns", [0, POLL_NS])
def test_zeroes_become_a_hole(bench: Bench, poll_ns: int) -> None:
    if poll_ns:
        os.write(bench.disk, bytes(8192))
    bench.read(8192, poll_ns=poll_ns)
    if not poll_ns:
        bench.answer(bytes(8192))
    head = struct.pack(">IHHQI", 0x668E33EF, 1, 2, 0, 12)
    assert bench.replies() == head + struct.pack(">QI", 0, 8192)


def test_read_that_is_alone_is_waited_for(bench: Bench) -> None:
    """The plane reports no read in flight, because no Python code runs before the read has ended."""
    os.write(bench.disk, b"a" * 512)
    bench.read(512, poll_ns=POLL_NS)
    assert bench.replies() == chunk(0, b"a" * 512)
    assert bench.told == []
    assert bench.ring.nr_reads == 0
    assert not select.select([bench.ring.event_fd], [], [], 0)[0]


@pytest.mark.parametrize("poll_ns", [0, POLL_NS], ids=["loop", "waited"])
def test_read_is_timed_though_its_batch_was_not_to_be(
    bench: Bench, poll_ns: int
) -> None:
    plane, usual_ns = bench.plane, 10**15
    plane.leave_untimed(100, usual_ns)
    if poll_ns:
        os.write(bench.disk, bytes(512))
    bench.read(512, poll_ns=poll_ns)
    if not poll_ns:
        bench.answer(bytes(512))
    nr, nr_bytes, taken_ns, _ = plane.counted()[0]
    assert (nr, nr_bytes) == (1, 512)
    assert 0 < taken_ns < usual_ns
    # It stands for no other.
    bench.file.read_max = SIZE
    with open("/dev/zero") as zeroes:
        os.dup2(zeroes.fileno(), bench.reading)
    plane.leave_untimed(100)
    bench.read(512)
    assert plane.counted()[0][2] == taken_ns + usual_ns


def test_several_are_waited_for_one_after_the_other_in_a_turn_that_polls() -> None:
    bench = Bench(received=28)  # one request is received at a time
    os.write(bench.disk, b"a" * 512 + b"b" * 512 + b"c" * 512)
    assert bench.read(512, 512, 512, poll_ns=POLL_NS) in (DONE, POLLED)
    expected = [chunk(nr, letter * 512) for nr, letter in enumerate((b"a", b"b", b"c"))]
    assert bench.replies() == b"".join(expected)
    assert bench.told == []
    bench.close()


def test_read_that_is_not_alone_is_not_waited_for(bench: Bench) -> None:
    bench.alone = False
    os.write(bench.disk, b"a" * 512)
    bench.read(512, poll_ns=POLL_NS)
    assert ("begun", 1, 512) in bench.told
    bench.answer()
    assert bench.replies() == chunk(0, b"a" * 512)


def test_long_read_is_asked_for_room_before_it_begins(bench: Bench) -> None:
    """It may meet a bound, which a short one of a connection with nothing in flight never does."""
    bench.room_left = 0
    assert bench.read(100_000, poll_ns=POLL_NS) == SLOW
    assert bench.ring.nr_reads == 0


def test_client_that_sends_one_at_a_time_is_waited_for_though_nothing_is_polled(
    bench: Bench,
) -> None:
    receiver = bench.receiver(poll_streak=3)
    was_told = []
    for nr in range(8):
        os.write(bench.disk, bytes([nr]) * 512)
        head = struct.pack(">IHHQQI", 0x25609513, 0, 0, nr, 512 * nr, 512)
        bench.peer.send(head)
        receiver()
        told = bench.take_told()
        was_told.append(("begun", 1, 512) in told)
        if was_told[-1]:
            bench.answer()
            receiver.python_ran()
        assert bench.replies() == chunk(nr, bytes([nr]) * 512)
    # A streak first; after that none, though only the first of them is polled.
    assert was_told == [True] * 3 + [False] * 5
    receiver.close()


def test_batch_is_not_waited_for(bench: Bench) -> None:
    receiver = bench.receiver(poll_streak=0)
    os.write(bench.disk, b"ab" * 512)
    for nr in range(2):
        bench.peer.send(struct.pack(">IHHQQI", 0x25609513, 0, 0, nr, 512 * nr, 512))
    receiver()
    assert ("begun", 2, 1024) in bench.take_told()
    while bench.ring.nr_reads:
        bench.answer()
    receiver.close()


def test_read_that_does_not_end_in_time_is_left_to_the_loop(bench: Bench) -> None:
    for nr in range(5):  # the first one is waited for, the next one is not ...
        assert bench.read(512, poll_ns=POLL_NS) in (DONE, POLLED)
        assert bench.replies() == b""
        assert ("begun", 1, 512) in bench.take_told()
        bench.answer(bytes([nr + 1]) * 512)
        assert bench.replies() == chunk(0, bytes([nr + 1]) * 512)


def test_disk_that_is_slow_is_not_waited_for_again_and_again(bench: Bench) -> None:
    bench.read(512, poll_ns=POLL_NS)
    bench.answer(b"a" * 512)
    os.write(bench.disk, b"b" * 512)
    bench.told.clear()
    bench.read(512, poll_ns=POLL_NS)
    assert ("begun", 1, 512) in bench.told
    bench.answer()
    for _ in range(2):  # one was left out: the next one is tried again
        os.write(bench.disk, b"c" * 512)
        bench.told.clear()
        bench.read(512, poll_ns=POLL_NS)
        assert bench.told == []


def test_waited_read_that_comes_short_is_for_python(bench: Bench) -> None:
    os.write(bench.disk, b"a" * 100)
    assert bench.read(512, poll_ns=POLL_NS) in (DONE, POLLED)
    assert ("again", 0, 0, 512) in bench.told
    assert bench.told[-1] == ("ended", 1, 512)
    assert bench.replies() == b""


def test_read_that_comes_short_is_for_python_and_others_are_answered(
    bench: Bench,
) -> None:
    bench.read(512, 512, 512)
    bench.take_told()
    os.write(bench.disk, b"a" * 1124)
    while bench.ring.nr_reads:
        bench.answer()
    (again,) = [told for told in bench.told if told[0] == "again"]
    whole = [chunk(nr, b"a" * 512) for nr in range(3) if nr != again[1]]
    replies = bench.replies()
    assert replies in (whole[0] + whole[1], whole[1] + whole[0])


def test_nothing_is_sent_past_what_waits(bench: Bench) -> None:
    bench.sends = False
    bench.read(512)
    bench.take_told()
    bench.answer(b"a" * 512)
    assert bench.replies() == b""
    assert bench.told[0] == ("push", chunk(0, b"a" * 512), 512)
    assert bench.told[-1] == (
        "ended",
        1,
        0,
    )  # its bytes are given back when it has left


def test_what_the_socket_does_not_take_is_queued(bench: Bench) -> None:
    bench.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    bench.read(*[4096] * 12)
    bench.take_told()
    for nr in range(12):
        os.write(bench.disk, bytes([nr + 1]) * 4096)
    while bench.ring.nr_reads:
        bench.answer()
    sent = bench.replies()
    pushed = [told for told in bench.told if told[0] == "push"]
    assert pushed
    sent += b"".join(told[1] for told in pushed)
    found = sorted(
        (sent[at : at + 4124] for at in range(0, len(sent), 4124)),
        key=lambda reply: reply[8:16],
    )
    assert len(found) == 12
    for nr, reply in enumerate(found):
        assert reply[28:] == bytes([reply[28]]) * 4096
        assert reply[8:16] == struct.pack(">Q", nr)


def test_full_ring_and_no_room_leave_reads_to_python() -> None:
    bench = Bench(nr_reads_max=2)
    assert bench.read(512, 512, 512) == SLOW
    assert bench.ring.nr_reads == 2
    bench.answer(b"a" * 512, b"b" * 512)
    bench.close()
    bench = Bench()
    bench.room_left = 0
    assert bench.read(512) == SLOW
    assert bench.ring.nr_reads == 0
    bench.close()


def test_odd_offsets_and_lengths_are_not_for_direct_io(bench: Bench) -> None:
    bench.file.align = 512
    assert bench.read(512, 100) == SLOW
    assert bench.ring.nr_reads == 1
    with pytest.raises(ValueError, match="power of two"):
        bench.file.align = 768
    bench.answer(b"a" * 512)


def test_plane_that_is_released_sends_nothing_more(bench: Bench) -> None:
    bench.read(512, 512)
    bench.take_told()
    bench.plane.release()
    bench.answer(b"a" * 512, b"b" * 512)
    assert bench.replies() == b""
    assert ("ended", 1, 512) in bench.told
    assert ("device", -1) in bench.told


def test_callback_that_raises_keeps_nobody_waiting(bench: Bench) -> None:
    class Bad:
        def begin_reads(self, nr: int) -> None:
            pass

        def end_reads(self, nr: int) -> None:
            raise RuntimeError("planted")

    bench.route.in_flight = (Bad(), bench)
    bench.read(512)
    with pytest.raises(RuntimeError, match="planted"):
        bench.answer(b"a" * 512)
    assert bench.told[-3:] == [("device", -1), ("file", -1), ("ended", 1, 512)]


def test_buffers_are_kept_for_the_next_reads_but_not_all() -> None:
    bench = Bench(nr_reads_max=64)
    bench.read(*[4096] * 8)
    bench.answer(*[b"a" * 4096] * 8)
    assert bench.ring.kept_bytes == 8 * 4096
    bench.read(*[4096] * 8)
    assert bench.ring.kept_bytes == 0
    bench.answer(*[b"a" * 4096] * 8)
    bench.replies()
    bench.read(*[65536] * 20)
    for _ in range(20):
        bench.answer(b"a" * 65536)
        bench.replies()
    assert bench.ring.kept_bytes <= 1 << 20
    bench.close()
