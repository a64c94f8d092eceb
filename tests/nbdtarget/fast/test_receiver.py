# SPDX-License-Identifier: Apache-2.0
"""The compiled `Receiver`: what it does without Python, and when it asks Python again."""

import errno
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.fast import compiled
from nbdtarget.server.poller import LATE_SKIP_MIN, Lateness
from tests.support.receiver_rig import (
    ANSWER,
    FLUSH,
    FUA,
    READ,
    REST,
    SIZE,
    SKIP_MAX,
    SLOW_NS,
    STREAK,
    WRITE,
    Durable,
    Rig,
    request,
    write,
)

pytestmark = pytest.mark.skipif(
    not compiled.IS_COMPILED, reason=f"{compiled.describe()}"
)
if compiled.IS_COMPILED:
    from nbdtarget_fast import BLOCKED, CLOSED, SLOW, FastFile, Receiver
    from nbdtarget_sync import Syncer


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "disk")
    yield made
    made.close()


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
        )  # the client sends no more: a miss
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


@pytest.fixture(params=[False, True], ids=["alone", "stays"])
def durable(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Durable]:
    made = Durable(tmp_path / "disk", stays=request.param)
    yield made
    made.close()


@pytest.fixture
def unsyncable(tmp_path: Path) -> Iterator[Durable]:
    """A Durable whose syncs fail, because a pipe takes the place of its file."""
    reading, writing = os.pipe()
    made = Durable(tmp_path / "disk", fd=reading)
    yield made
    made.close()
    os.close(reading)
    os.close(writing)


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
