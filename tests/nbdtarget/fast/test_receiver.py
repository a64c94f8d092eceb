# SPDX-License-Identifier: Apache-2.0
"""The compiled `Receiver`: what it does without Python, and when it asks Python again."""

import itertools
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbdtarget.fast import compiled
from nbdtarget.server.poller import LATE_SKIP_MIN, Lateness

pytestmark = pytest.mark.skipif(
    not compiled.IS_COMPILED, reason=f"{compiled.describe()}"
)
if compiled.IS_COMPILED:
    from nbdtarget_fast import BLOCKED, CLOSED, SLOW, FastFile, Plane, Receiver, Route

SIZE = 1 << 16
READ, WRITE, FLUSH = 0, 1, 3
STREAK, SKIP_MAX, REST = 4, 8, 2
NEVER_NS = 1 << 62


class Rig:
    """A Receiver whose connection notes what it is asked and told."""

    late_ns = NEVER_NS

    def __init__(
        self, path: Path, *, poison: bool = False, is_durable: bool = False
    ) -> None:
        self.content = os.urandom(SIZE)
        path.write_bytes(self.content)
        self.fd = os.open(path, os.O_RDWR)
        file = FastFile(self.fd, 10**9, lambda: None, lambda *_: None)
        file.size = file.read_max = file.write_max = SIZE
        self.file = file
        self.route: Route | None = self.new_route()
        self.ours, self.peer = socket.socketpair()
        self.ours.setblocking(False)
        self.peer.setblocking(False)
        self.told: list[str] = []
        self.late = Lateness(self.late_ns)
        self.plain = True
        self.received = SimpleNamespace(begin=0, end=0, served=self.served)
        self.output = SimpleNamespace(base=0, end=0, sent_to=self.sent_to)
        self.polling = SimpleNamespace(last=None)
        self.plane = Plane(
            self.ours.fileno(),
            bytearray(1 << 14),
            bytearray(1 << 16),
            structured=False,
            can_write=True,
            size=SIZE,
            zero_min=1 << 20,
            length_max=SIZE,
            turn_ns=10**9,
            flush_at=1 << 16,
            poison=poison,
            ring_reads=self if is_durable else None,  # type: ignore[arg-type]  # it is only asked for room
            flush_for=self.flush_for if is_durable else None,
        )
        self.flushed: list[tuple[list[int], list[int], bool]] = []
        self.ends_well = True
        self.sends_another = 0  # so many requests come while others are being answered
        self.receiver = Receiver(
            self.plane,
            maybe_route=self.maybe_route,
            is_plain=self.is_plain,
            received=self.received,
            output=self.output,
            polling=self.polling,
            may_poll=self.may_poll,
            poll_ns=1000,
            poll_streak=STREAK,
            poll_skip_max=SKIP_MAX,
            poll_rest=REST,
            late=self.late,
            readable=lambda: self.told.append("readable"),
            stopped=lambda stop: self.told.append(f"stopped {stop}"),
            ended=lambda: self.told.append("ended"),
            failed=lambda error: self.told.append(f"failed: {error}"),
        )

    def room(self) -> tuple[int, int]:
        return 100, 0

    def flush_for(self, writes: list[int], flushes: list[int], is_alone: bool) -> bool:
        self.flushed.append((writes, flushes, is_alone))
        if self.sends_another:
            self.sends_another -= 1
            self.peer.send(request(FLUSH, 0, 0))
        return is_alone and self.ends_well

    def new_route(self) -> Route:
        route = Route.flat(self.file, 0, SIZE)
        route.can_read = route.can_write = True
        return route

    def maybe_route(self) -> Route | None:
        self.told.append("route?")
        return self.route

    def is_plain(self) -> bool:
        self.told.append("plain?")
        return self.plain

    def may_poll(self) -> bool:
        self.told.append("poll?")
        return True

    def served(self, begin: int, end: int) -> None:
        self.received.begin, self.received.end = begin, end
        self.told.append(f"served {begin} {end}")

    def sent_to(self, base: int, end: int) -> None:
        self.output.base, self.output.end = base, end
        self.told.append(f"sent {base} {end}")

    def call(self, *requests: bytes) -> list[str]:
        """Send, call the Receiver as the loop would, and return what it asked and told."""
        self.peer.sendall(b"".join(requests))
        self.told.clear()
        self.receiver()
        return self.told[:]

    def replies(self) -> bytes:
        try:
            return self.peer.recv(1 << 16)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.receiver.close()
        self.plane.release()
        self.ours.close()
        self.peer.close()
        os.close(self.fd)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "disk")
    yield made
    made.close()


def request(
    command: int, offset: int, length: int = 512, payload: bytes = b""
) -> bytes:
    head = struct.pack(">IHHQQI", 0x25609513, 0, command, 7, offset, length)
    return head + payload


LOOKS = ["route?", "plain?"]


def test_plain_requests_are_served_without_asking_python(rig: Rig) -> None:
    assert rig.call(request(READ, 512)) == [*LOOKS, "ended"]
    for at in range(0, SIZE, 4096):
        rig.replies()
        assert rig.call(request(READ, at), request(WRITE, at, 3, b"abc")) == []
        assert rig.replies()[16 : 16 + 512] == rig.content[at : at + 512]
    assert os.pread(rig.fd, 3, 4096) == b"abc"


def test_what_it_receives_is_seen_as_activity(rig: Rig) -> None:
    before = compiled.batches_received()
    rig.call(request(READ, 0))
    rig.call(request(READ, 0), request(READ, 512))
    assert compiled.batches_received() == before + 2


def test_it_looks_anew_after_python_ran(rig: Rig) -> None:
    rig.call(request(READ, 0))
    rig.receiver.python_ran()
    assert rig.call(request(READ, 0)) == [*LOOKS, "ended"]
    assert rig.call(request(READ, 0)) == []


def test_what_is_not_plain_is_left_to_python(rig: Rig) -> None:
    rig.call(request(READ, 0))
    rig.plain = False
    rig.receiver.python_ran()
    assert rig.call(request(READ, 0)) == [*LOOKS, "readable"]
    rig.replies()
    rig.plain = True
    assert rig.call() == [
        *LOOKS,
        "ended",
    ]  # it looks each time, and finds what lies there
    assert len(rig.replies()) == 16 + 512


def test_closed_route_is_not_used(rig: Rig) -> None:
    rig.call(request(READ, 0))
    assert rig.route is not None
    rig.route.close()
    rig.route = None
    assert rig.call(request(READ, 0)) == ["route?", "readable"]
    rig.route = rig.new_route()
    assert rig.call() == [*LOOKS, "ended"]


def test_stop_is_told_after_the_places(rig: Rig) -> None:
    rig.call(request(READ, 0))
    told = rig.call(request(READ, 0), request(FLUSH, 0, 0))
    assert told == ["served 28 56", "sent 0 528", f"stopped {SLOW}"]
    # Python has served it now; nothing is taken for sure.
    rig.received.begin = rig.received.end = rig.output.base = rig.output.end = 0
    assert rig.call(request(READ, 0)) == [*LOOKS, "ended"]


def test_request_in_parts_goes_on_where_it_was(rig: Rig) -> None:
    rig.call(request(READ, 0))
    wire = request(WRITE, 0, 600, b"w" * 600)
    assert rig.call(wire[:100]) == ["served 0 100"]
    assert rig.call(wire[100:]) == ["served 0 0"]
    assert os.pread(rig.fd, 600, 0) == b"w" * 600


def test_end_of_the_client_is_told(rig: Rig) -> None:
    rig.call(request(READ, 0))
    rig.peer.shutdown(socket.SHUT_WR)
    rig.told.clear()
    rig.receiver()
    assert rig.told == [f"stopped {CLOSED}"]


def test_exception_goes_to_the_connection(rig: Rig) -> None:
    def broken() -> bool:
        raise RuntimeError("planted")

    rig.is_plain = broken  # type: ignore[method-assign]
    receiver = Receiver(
        rig.plane,
        maybe_route=rig.maybe_route,
        is_plain=broken,
        received=rig.received,
        output=rig.output,
        polling=rig.polling,
        may_poll=rig.may_poll,
        poll_ns=0,
        poll_streak=STREAK,
        poll_skip_max=SKIP_MAX,
        poll_rest=REST,
        late=Lateness(),
        readable=lambda: None,
        stopped=lambda _: None,
        ended=lambda: None,
        failed=lambda error: rig.told.append(f"failed: {error}"),
    )
    receiver()
    assert rig.told == ["route?", "failed: planted"]
    receiver.close()


def test_closed_receiver_does_nothing(rig: Rig) -> None:
    rig.call(request(READ, 0))
    rig.receiver.close()
    assert rig.call(request(READ, 0)) == []
    assert rig.polling.last is None


@pytest.mark.parametrize("forgotten", ["plain", "received", "output", "route"])
def test_poison_finds_out_who_forgot_to_say_that_python_ran(
    tmp_path: Path, forgotten: str
) -> None:
    rig = Rig(tmp_path / "disk", poison=True)
    rig.call(request(READ, 0))
    if forgotten == "plain":
        rig.plain = False
    elif forgotten == "received":
        rig.received.end = 28
    elif forgotten == "output":
        rig.output.end = 16
    else:
        rig.route = rig.new_route()
    assert rig.call(request(READ, 0))[-1].startswith("failed: ")
    rig.close()


def test_polls_only_after_a_streak_and_backs_off_after_misses(rig: Rig) -> None:
    for _ in range(STREAK):
        assert "poll?" not in rig.call(request(READ, 0))
        rig.replies()
    polled = []
    for _ in range(40):
        polled.append(
            "poll?" in rig.call(request(READ, 0))
        )  # nobody sends more: a miss
        rig.replies()
    nrs = [nr for nr, it in enumerate(polled) if it]
    assert [b - a - 1 for a, b in itertools.pairwise(nrs)] == [1, 3, 7, 8, 8]


def test_batches_and_other_connections_end_a_streak(rig: Rig) -> None:
    for _ in range(STREAK):
        rig.call(request(READ, 0))
    rig.call(request(READ, 0), request(READ, 0))
    for _ in range(STREAK - 1):
        assert "poll?" not in rig.call(request(READ, 0))
    rig.polling.last = "another"
    for _ in range(STREAK):
        assert "poll?" not in rig.call(request(READ, 0))
    assert "poll?" in rig.call(request(READ, 0))


def test_a_processor_that_comes_back_very_late_ends_the_polling_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[str] = []
    monkeypatch.setattr(Rig, "late_ns", 0)  # each look is very late
    rig = Rig(tmp_path / "disk")
    for _ in range(STREAK):
        rig.call(request(READ, 0))
    assert "poll?" in rig.call(request(READ, 0))
    for nr in range(LATE_SKIP_MIN):
        rig.replies()
        if "poll?" in rig.call(request(READ, 0)):
            late.append(f"polled after {nr}")
    assert not late
    rig.close()


# ---- durable requests of a client that is alone ----

DONE = struct.pack(">IIQ", 0x67446698, 0, 7)


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "disk", poison=True, is_durable=True)
    yield made
    made.close()


def until_alone(rig: Rig) -> None:
    for _ in range(STREAK + 1):
        rig.call(request(READ, 0))
    rig.replies()
    rig.flushed.clear()


def test_durable_request_that_ended_well_is_answered_in_the_turn(durable: Rig) -> None:
    until_alone(durable)
    durable.call(request(FLUSH, 0, 0))
    assert durable.flushed == [([], [7], True)]
    assert durable.replies() == DONE
    assert (durable.output.base, durable.output.end) == (0, 0)
    durable.ends_well = False  # Python answers later
    durable.call(request(FLUSH, 0, 0))
    assert durable.replies() == b""


def test_one_of_several_requests_is_not_alone(durable: Rig) -> None:
    until_alone(durable)
    durable.call(request(FLUSH, 0, 0), request(FLUSH, 0, 0))
    assert durable.flushed == [([], [7, 7], False)]
    durable.flushed.clear()
    durable.call(request(FLUSH, 0, 0))  # that was no request of its own
    assert durable.flushed == [([], [7], False)]


def test_others_that_wait_make_it_not_alone(durable: Rig) -> None:
    until_alone(durable)
    durable.may_poll = lambda: False  # type: ignore[method-assign]
    receiver = durable.receiver
    durable.polling.last = object()  # another connection has received
    durable.call(request(FLUSH, 0, 0))
    assert durable.flushed == [([], [7], False)]
    assert receiver is durable.receiver


def test_requests_that_follow_at_once_are_answered_in_one_turn_up_to_a_bound(
    durable: Rig,
) -> None:
    # The first turn that may poll.
    for _ in range(STREAK):
        durable.call(request(READ, 0))
    durable.replies()
    durable.sends_another = 40
    durable.call(request(FLUSH, 0, 0))
    assert durable.flushed == [([], [7], True)] * 16
    assert durable.replies() == DONE * 16
    # The next one is there: it is the next turn's.
    durable.call()
    assert len(durable.flushed) == 32


def test_socket_that_takes_no_answer_is_told(durable: Rig) -> None:
    until_alone(durable)
    durable.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    filler = bytes(1 << 20)
    while True:
        try:
            durable.ours.send(filler)
        except BlockingIOError:
            break
    told = durable.call(request(FLUSH, 0, 0))
    assert told[-2:] == ["sent 0 16", f"stopped {BLOCKED}"]


def test_request_that_is_not_plain_behind_a_durable_one_is_told(durable: Rig) -> None:
    until_alone(durable)
    told = durable.call(request(FLUSH, 0, 0), request(4, 0))
    assert durable.flushed == [([], [7], False)]
    assert told[-1] == f"stopped {SLOW}"
