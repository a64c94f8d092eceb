# SPDX-License-Identifier: Apache-2.0
"""The compiled `Receiver`: what it does without Python, and when it asks Python again."""

import errno
import itertools
import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import pytest

from nbdtarget.fast import compiled
from nbdtarget.server.poller import LATE_SKIP_MIN, Lateness
from tests.support.patience import PATIENCE_S

pytestmark = pytest.mark.skipif(
    not compiled.IS_COMPILED, reason=f"{compiled.describe()}"
)
if compiled.IS_COMPILED:
    from nbdtarget_fast import BLOCKED, CLOSED, SLOW, FastFile, Plane, Receiver, Route
    from nbdtarget_sync import Syncer

SIZE = 1 << 16
READ, WRITE, FLUSH = 0, 1, 3
FUA: Final = 1
STREAK, SKIP_MAX, REST = 4, 8, 2
NEVER_NS = 1 << 62


class Rig:
    """A Receiver whose connection notes what it is asked and told."""

    late_ns = NEVER_NS

    def __init__(
        self,
        path: Path,
        *,
        poison: bool = False,
        is_durable: bool = False,
        inline_syncs: bool = False,
    ) -> None:
        self.content = os.urandom(SIZE)
        path.write_bytes(self.content)
        self.fd = os.open(path, os.O_RDWR)
        file = FastFile(
            self.fd,
            10**9,
            lambda: None,
            lambda *_: None,
            None,
            lambda: self.told.append("sync left"),
            lambda status: self.told.append(f"kick: {status}"),
        )
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
            inline_syncs=inline_syncs,
        )
        self.flushed: list[tuple[list[int], list[int]]] = []
        self.may = True
        self.losses = False
        self.receiver = Receiver(
            self.plane,
            maybe_route=self.maybe_route,
            is_plain=self.is_plain,
            received=self.received,
            output=self.output,
            polling=self.polling,
            may_poll=self.may_poll,
            has_no_losses=lambda: not self.losses,
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

    def flush_for(self, writes: list[int], flushes: list[int]) -> None:
        self.flushed.append((writes, flushes))

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
        return self.may

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
    command: int, offset: int, length: int = 512, payload: bytes = b"", flags: int = 0
) -> bytes:
    head = struct.pack(">IHHQQI", 0x25609513, flags, command, 7, offset, length)
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
        has_no_losses=lambda: True,
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

ANSWER = struct.pack(">IIQ", 0x67446698, 0, 7)
LONG_NS: Final = int(PATIENCE_S * 10**9)
SLOW_NS: Final = 20 * 10**6


class Durable(Rig):
    """A Rig whose file has lent its thread."""

    def __init__(
        self, path: Path, *, inline_syncs: bool = False, fd: int | None = None
    ) -> None:
        """Args: fd: what is synced instead of the file."""
        super().__init__(path, poison=True, is_durable=True, inline_syncs=inline_syncs)
        self.syncer = Syncer(self.fd if fd is None else fd)
        self.syncer.begin()
        self.end_of_sync()
        self.file.syncer = self.syncer
        self.file.sync_wait_ns = LONG_NS
        assert self.route is not None
        self.route.may_sync = lambda: self.may

    def end_of_sync(self) -> int:
        """Wait for the end of a sync that runs."""
        assert select.select([self.syncer.event_fd], [], [], PATIENCE_S)[0]
        return self.syncer.take()

    def until_alone(self) -> None:
        """Until the next durable request is expected, of a client that is alone."""
        for _ in range(STREAK):
            self.call(request(FLUSH, 0, 0))
        assert len(self.flushed) == STREAK
        self.flushed.clear()

    def close(self) -> None:
        self.file.syncer = None
        self.syncer.close()
        super().close()


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[Durable]:
    made = Durable(tmp_path / "disk")
    yield made
    made.close()


@pytest.fixture
def unsyncable(tmp_path: Path) -> Iterator[Durable]:
    """What is to be synced is a pipe, which cannot be."""
    reading, writing = os.pipe()
    made = Durable(tmp_path / "disk", fd=reading)
    yield made
    made.close()
    os.close(reading)
    os.close(writing)


def write(nr: int, flags: int = 0) -> bytes:
    return request(WRITE, nr * 4096, 512, bytes([nr]) * 512, flags)


@pytest.mark.parametrize(
    "wire", [request(FLUSH, 0, 0), write(1, FUA)], ids=["flush", "fua"]
)
def test_durable_request_of_a_client_that_is_alone_needs_no_python(
    durable: Durable, wire: bytes
) -> None:
    durable.until_alone()
    for nr in range(1, 4):
        durable.call(wire)
        assert durable.replies() == ANSWER
        assert durable.file.nr_synced == nr
    assert not durable.flushed
    assert (durable.output.base, durable.output.end) == (0, 0)
    reads, writes, flushes = durable.plane.counted()
    is_flush = wire == request(FLUSH, 0, 0)
    assert (writes[:2], flushes[:2]) == (
        ((0, 0), (3, 0)) if is_flush else ((3, 1536), (0, 0))
    )
    assert sum(flushes[3] if is_flush else writes[3]) == 3
    assert reads[0] == 0


@pytest.mark.parametrize(
    "wire", [request(FLUSH, 0, 0), write(1, FUA)], ids=["flush", "fua"]
)
def test_durable_request_is_timed_though_its_batch_was_not_to_be(
    durable: Durable, wire: bytes
) -> None:
    durable.until_alone()
    plane, usual_ns = durable.plane, 10**15
    plane.leave_untimed(100, usual_ns)
    durable.call(wire)
    _, writes, flushes = plane.counted()
    assert 0 < writes[2] + flushes[2] < usual_ns
    plane.leave_untimed(100)
    durable.call(wire)
    _, writes, flushes = plane.counted()
    assert writes[0] + flushes[0] == 2
    assert 0 < writes[2] + flushes[2] < usual_ns


def test_flush_that_follows_each_write_needs_no_python(durable: Durable) -> None:
    durable.until_alone()
    for nr in range(12):  # after eight, writing back begins before the FLUSH
        durable.call(write(nr % 4))
        durable.call(request(FLUSH, 0, 0))
        assert durable.replies() == ANSWER * 2
    assert not durable.flushed
    assert durable.file.nr_synced == 12


def test_durable_requests_that_nobody_expects_are_left_to_python(
    durable: Durable,
) -> None:
    durable.until_alone()
    for _ in range(5):
        durable.call(request(READ, 0))
    durable.replies()
    durable.call(request(FLUSH, 0, 0))
    assert durable.flushed == [([], [7])]
    assert durable.file.nr_synced == 0


def test_one_of_several_requests_is_not_alone(durable: Durable) -> None:
    durable.until_alone()
    durable.call(request(FLUSH, 0, 0), request(FLUSH, 0, 0))
    assert durable.flushed == [([], [7, 7])]
    durable.flushed.clear()
    durable.call(request(FLUSH, 0, 0))  # that was no request of its own
    assert durable.flushed == [([], [7])]
    assert durable.file.nr_synced == 0


def test_others_that_have_received_make_it_not_alone(durable: Durable) -> None:
    durable.until_alone()
    durable.polling.last = object()
    durable.call(request(FLUSH, 0, 0))
    assert durable.flushed == [([], [7])]


def test_what_is_in_flight_makes_it_not_alone_and_a_commit_is_pythons(
    durable: Durable,
) -> None:
    """In the rig, one answer stands for both."""
    durable.until_alone()
    durable.may = False
    durable.call(request(FLUSH, 0, 0))
    durable.call(write(0, FUA))
    assert durable.flushed == [([], [7]), ([7], [])]
    assert durable.file.nr_synced == 0


def test_a_loss_is_pythons_to_tell_and_does_not_concern_fua(durable: Durable) -> None:
    durable.until_alone()
    durable.losses = True
    durable.call(request(FLUSH, 0, 0))
    assert durable.flushed == [([], [7])]
    durable.call(write(0, FUA))
    assert len(durable.flushed) == 1
    assert durable.replies() == ANSWER
    assert durable.file.nr_synced == 1


def test_without_a_thread_that_is_lent_they_are_left_to_python(
    durable: Durable,
) -> None:
    durable.until_alone()
    durable.file.syncer = None
    durable.call(request(FLUSH, 0, 0))
    assert durable.flushed == [([], [7])]


def test_a_thread_that_was_not_started_or_whose_end_nobody_takes_is_not_lent(
    durable: Durable,
) -> None:
    with pytest.raises(ValueError, match="no thread yet"):
        durable.file.syncer = Syncer(durable.fd)
    file = FastFile(durable.fd, 0, lambda: None, lambda *_: None)
    with pytest.raises(ValueError, match="no callback was given"):
        file.syncer = durable.syncer


def test_a_sync_that_takes_longer_is_left_to_python(durable: Durable) -> None:
    durable.until_alone()
    durable.syncer.fake_ns, durable.file.sync_wait_ns = SLOW_NS, 1
    told = durable.call(write(0, FUA))
    assert "sync left" in told
    assert durable.flushed == [([7], [])]
    assert durable.replies() == b""
    assert durable.end_of_sync() == 0
    assert durable.replies() == b""
    assert durable.file.nr_synced == 0


def test_a_sync_that_fails_is_answered_by_nobody_but_python(
    unsyncable: Durable,
) -> None:
    unsyncable.until_alone()
    told = unsyncable.call(write(0, FUA))
    assert "sync left" in told
    assert unsyncable.syncer.take() == errno.EINVAL
    assert unsyncable.flushed == [([7], [])]
    assert unsyncable.replies() == b""


def test_the_loop_syncs_itself_if_that_is_asked_for(tmp_path: Path) -> None:
    made = Durable(tmp_path / "disk", inline_syncs=True)
    made.until_alone()
    for _ in range(50):
        # A sync of the thread if the last one was long ago. The next one is the loop's, however long it takes.
        made.file.sync_wait_ns = LONG_NS
        made.call(write(0, FUA))
        made.syncer.fake_ns, made.file.sync_wait_ns = SLOW_NS, 1
        told = made.call(write(0, FUA))
        made.syncer.fake_ns = 0
        if "sync left" not in told:
            break
        assert made.end_of_sync() == 0  # this machine is busy
        made.file.syncer = made.syncer
    else:
        pytest.fail("the loop has never made a sync")
    assert made.replies()[-16:] == ANSWER
    made.close()


def test_a_sync_of_the_loop_that_fails_is_pythons(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    made = Durable(tmp_path / "disk", inline_syncs=True, fd=reading)
    made.until_alone()
    told = made.call(write(0, FUA))
    assert "sync left" in told
    assert made.syncer.take() == errno.EINVAL
    assert made.replies() == b""
    made.close()
    os.close(reading)
    os.close(writing)


def test_socket_that_takes_no_answer_is_told(durable: Durable) -> None:
    durable.until_alone()
    durable.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    filler = bytes(1 << 20)
    while True:
        try:
            durable.ours.send(filler)
        except BlockingIOError:
            break
    told = durable.call(request(FLUSH, 0, 0))
    assert told[-2:] == ["sent 0 16", f"stopped {BLOCKED}"]
    assert durable.file.nr_synced == 1


def test_request_that_is_not_plain_behind_a_durable_one_is_told(
    durable: Durable,
) -> None:
    durable.until_alone()
    told = durable.call(request(FLUSH, 0, 0), request(4, 0))
    assert durable.flushed == [([], [7])]
    assert told[-1] == f"stopped {SLOW}"
