# SPDX-License-Identifier: Apache-2.0
"""A client that is alone, and stays with the thread that syncs: `serve_on` in `stays.pxi`.

The sockets keep the borders of messages, so that each request is received by itself although all of them are there from the beginning.
"""

import contextlib
import errno
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from nbdtarget.fast import compiled
from tests.support.patience import PATIENCE_S
from tests.support.receiver_rig import (
    ANSWER,
    FLUSH,
    FUA,
    LONG_NS,
    READ,
    SLOW_NS,
    STREAK,
    Durable,
    request,
    write,
)

pytestmark = pytest.mark.skipif(
    not compiled.IS_COMPILED, reason=f"{compiled.describe()}"
)
if compiled.IS_COMPILED:
    from nbdtarget_fast import BLOCKED, CLOSED, choose_clock, skew_clock

# Syncs after the loop had something else to do: the client does not stay.
ALONE: Final = 16


class Staying(Durable):
    """A Durable whose client stays until it sends something that the thread does not serve."""

    def __init__(self, path: Path, *, fd: int | None = None) -> None:
        super().__init__(path, fd=fd, stays=True, kind=socket.SOCK_SEQPACKET)
        self.loop.unregister(self.ours)  # what it has not received yet is nothing else
        self.plane.stay_ns = self.plane.stay_idle_ns = LONG_NS
        self.until_alone()

    def until_alone(self) -> None:
        for _ in range(STREAK):
            self.turn(request(FLUSH, 0, 0))
        assert len(self.flushed) == STREAK
        self.flushed.clear()

    def turn(self, *requests: bytes) -> list[str]:
        """Send, and call the Receiver once, as the loop would; return what it asked and told."""
        for each in requests:
            self.peer.send(each)
        self.told.clear()
        self.receiver()
        return self.told[:]

    def answers(self) -> list[bytes]:
        found = []
        while reply := self.replies():
            found.append(reply)
        return found

    def after_an_answer(self, step: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            assert select.select([self.peer], [], [], PATIENCE_S)[0]
            assert self.replies() == ANSWER
            step()

        thread = threading.Thread(target=run)
        thread.start()
        return thread


@pytest.fixture
def staying(tmp_path: Path) -> Iterator[Staying]:
    made = Staying(tmp_path / "disk")
    yield made
    made.close()


READ_ONE: Final = request(READ, 4096)


def test_all_durable_requests_are_served_in_one_turn(staying: Staying) -> None:
    wire = [write(nr, FUA) for nr in range(1, 6)]
    staying.turn(*wire, request(FLUSH, 0, 0), READ_ONE)
    assert staying.answers() == [*[ANSWER] * 6, ANSWER + bytes([1]) * 512]
    assert staying.file.nr_synced == 6
    assert not staying.flushed
    assert os.pread(staying.fd, 512, 5 * 4096) == bytes([5]) * 512
    reads, writes, flushes = staying.plane.counted()
    assert [each[:2] for each in (reads, writes, flushes)] == [
        (1, 512),
        (5, 5 * 512),
        (1, 0),
    ]
    assert [sum(each[3]) for each in (reads, writes, flushes)] == [1, 5, 1]
    assert (staying.received.begin, staying.received.end) == (0, 0)


def test_write_without_fua_is_answered_before_the_flush_that_follows(
    staying: Staying,
) -> None:
    wire = [request(FLUSH, 0, 0)]
    for nr in range(12):  # after eight, writing back begins before the FLUSH
        wire += [write(nr % 5), request(FLUSH, 0, 0)]
    staying.turn(*wire, READ_ONE)
    assert staying.answers()[:-1] == [ANSWER] * 25
    assert staying.file.nr_synced == 13
    assert not staying.flushed


def test_flush_after_a_loss_is_pythons(staying: Staying) -> None:
    """It must fail, though it comes while a WRITE with FUA has the client stay."""
    staying.losses = True
    staying.turn(write(1, FUA), request(FLUSH, 0, 0), READ_ONE)
    assert staying.flushed == [([], [7])]
    assert staying.file.nr_synced == 1
    assert staying.answers()[:1] == [ANSWER]


def test_several_requests_at_once_are_for_the_loop(staying: Staying) -> None:
    staying.turn(write(4, FUA), write(1, FUA), write(2, FUA) + write(3, FUA))
    assert staying.answers() == [ANSWER, ANSWER]
    assert staying.flushed == [([7, 7], [])]
    staying.flushed.clear()
    staying.turn(write(1, FUA))  # it is not alone any more
    assert staying.flushed == [([7], [])]


def test_half_a_request_is_for_the_loop(staying: Staying) -> None:
    whole = write(1, FUA)
    staying.turn(write(2, FUA), whole[:100])
    assert staying.answers() == [ANSWER]
    staying.turn(whole[100:], READ_ONE)
    assert staying.answers() == [ANSWER, ANSWER + bytes([1]) * 512]


def test_what_else_the_loop_has_to_do_ends_the_stay(staying: Staying) -> None:
    other = os.eventfd(1)
    staying.loop.register(other)
    staying.turn(write(2, FUA))
    assert staying.file.nr_synced == 1
    os.close(other)  # it is served, and more may follow
    for nr in range(ALONE):
        staying.peer.send(write(3, FUA))
        staying.plane.stay_ns = 0
        staying.turn()
        assert staying.file.nr_synced == nr + 2
    staying.plane.stay_ns = LONG_NS
    staying.turn(write(2, FUA), write(1, FUA), READ_ONE)
    assert staying.file.nr_synced == ALONE + 3
    assert not staying.flushed


@pytest.mark.parametrize("sleeps", [False, True], ids=["spins", "sleeps"])
def test_what_else_the_loop_has_to_do_is_seen_between_two_requests(
    staying: Staying, sleeps: bool
) -> None:
    if sleeps:
        # The thread looks for the next request in vain, and so it does not do that the next time.
        staying.plane.stay_idle_ns = 1
        staying.turn(write(2, FUA))
        assert staying.answers() == [ANSWER]
        staying.plane.stay_idle_ns = LONG_NS
    nr_before = staying.file.nr_synced
    other = os.eventfd(1)
    staying.loop.register(other)
    staying.turn(write(2, FUA), write(1, FUA), write(3, FUA))
    # The second one had come already.
    assert staying.file.nr_synced == nr_before + 2
    assert staying.answers() == [ANSWER] * 2
    os.close(other)


def test_timers_are_waited_for(staying: Staying) -> None:
    staying.plane.stay_ns = 1
    staying.turn(write(2, FUA), write(1, FUA))
    assert staying.file.nr_synced == 1
    staying.turn()
    assert staying.file.nr_synced == 2


def test_client_that_asks_for_nothing_is_not_waited_for_long(staying: Staying) -> None:
    staying.plane.stay_idle_ns = 1
    staying.turn(write(2, FUA))  # else this takes as long as the stay
    assert staying.answers() == [ANSWER]
    assert staying.file.nr_synced == 1
    staying.turn(write(1, FUA))
    assert staying.file.nr_synced == 2


def test_client_that_leaves_is_told(staying: Staying) -> None:
    staying.peer.send(write(1, FUA))
    staying.peer.shutdown(socket.SHUT_WR)
    assert staying.turn()[-1] == f"stopped {CLOSED}"
    assert staying.answers() == [ANSWER]


def test_socket_that_takes_no_answer_is_told(staying: Staying) -> None:
    staying.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with contextlib.suppress(BlockingIOError):
        while True:
            staying.ours.send(bytes(16))
    told = staying.turn(write(1, FUA), write(2, FUA))
    assert told[-2:] == ["sent 0 16", f"stopped {BLOCKED}"]
    assert staying.file.nr_synced == 1


def test_second_sync_that_fails_is_pythons(tmp_path: Path) -> None:
    """The descriptor that is synced becomes one of a pipe, which cannot be synced."""
    reading, writing = os.pipe()
    file = os.open(tmp_path, os.O_RDONLY)
    staying = Staying(tmp_path / "disk", fd=file)

    def fail() -> None:
        os.dup2(reading, file)
        staying.peer.send(write(1, FUA))

    client = staying.after_an_answer(fail)
    told = staying.turn(write(2, FUA))
    client.join()
    assert "sync left" in told
    assert staying.syncer.take() == errno.EINVAL
    assert staying.flushed == [([7], [])]
    assert staying.file.nr_synced == 1
    assert staying.answers() == []
    staying.close()
    for fd in (reading, writing, file):
        os.close(fd)


def _second_sync_left(staying: Staying) -> bool:
    """Have the second sync take long. Returns whether it was the second one that the loop did not wait for."""

    def become_slow() -> None:
        staying.syncer.fake_ns = 10 * SLOW_NS
        staying.peer.send(write(1, FUA))
        # If the second sync is waited for, this ends the stay.
        staying.peer.send(READ_ONE)

    staying.file.sync_wait_ns = SLOW_NS
    client = staying.after_an_answer(become_slow)
    assert "sync left" in staying.turn(write(2, FUA))
    is_second = staying.file.nr_synced == 1
    if not is_second:
        staying.ours.send(ANSWER)  # this machine is busy
    client.join()
    return is_second


@pytest.mark.parametrize("is_skewed", [False, True], ids=["clock", "skewed"])
def test_second_sync_that_takes_long_is_pythons(
    tmp_path: Path, is_skewed: bool
) -> None:
    """The thread touches nothing of the connection any more when it ends.

    Requests may be timed by the processor's counter, which goes away from the clock over the months.
    """
    for nr in range(50):
        staying = Staying(tmp_path / f"disk{nr}")
        if is_skewed and not skew_clock(LONG_NS):
            staying.close()
            pytest.skip("this processor has no counter that tells the time")
        try:
            is_second = _second_sync_left(staying)
        finally:
            choose_clock()
        if is_second:
            assert staying.flushed == [([7], [])]
            staying.plane.release()  # as if the connection had ended meanwhile
        assert staying.end_of_sync() == 0
        assert staying.file.nr_synced == is_second
        assert staying.answers() == []
        staying.close()
        if is_second:
            return
    pytest.fail("the first sync took long each time")


def test_nothing_is_kicked_beside_a_sync(tmp_path: Path) -> None:
    """The kick could be told of an error, and the sync not, whose thread answers."""
    synced = os.open(tmp_path, os.O_RDONLY)
    durable = Durable(tmp_path / "disk", fd=synced)
    durable.until_alone()
    durable.replies()
    with open("/dev/null", "r+b", buffering=0) as null:
        os.dup2(null.fileno(), durable.fd)  # writing back of it cannot begin
    told = durable.call(write(1, FUA))
    assert not [each for each in told if each.startswith("kick")]
    assert durable.replies() == ANSWER
    assert durable.file.nr_synced == 1
    durable.close()
    os.close(synced)


@pytest.mark.parametrize("stays", [True, False], ids=["stays", "polled"])
def test_flush_after_writing_back_has_failed_to_begin_is_pythons(
    tmp_path: Path, stays: bool
) -> None:
    """Perhaps the sync that follows is told nothing of the error."""
    synced = os.open(tmp_path, os.O_RDONLY)
    staying = Staying(tmp_path / "disk", fd=synced)
    wire = [request(FLUSH, 0, 0)]
    for _ in range(8):
        wire += [write(1), request(FLUSH, 0, 0)]
    staying.turn(*wire, READ_ONE)
    assert staying.file.nr_synced == 9
    if not stays:
        staying.plane.loop_fd = -1
    with open("/dev/null", "r+b", buffering=0) as null:
        os.dup2(null.fileno(), staying.fd)  # writing back of it cannot begin
    first = [request(FLUSH, 0, 0)] if stays else []
    told = staying.turn(*first, write(1), request(FLUSH, 0, 0))
    assert f"kick: {errno.ESPIPE}" in told
    assert staying.file.nr_synced == 9 + len(first)
    assert staying.flushed == ([] if stays else [([], [7])])
    staying.close()
    os.close(synced)
