# SPDX-License-Identifier: Apache-2.0
"""HeldReads: their order, their time, and that nothing is lost. With a real device: tests/nbdtarget/devices/helper/test_device.py."""

import pytest

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.devices.nbd import held
from nbdtarget.devices.nbd.held import HeldReads

EIO = 5


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [100.0]
    monkeypatch.setattr(held, "loop_time_s", lambda: clock[0])
    return clock


def a_read(ended: list[int], nr: int) -> Bio:
    return Bio(OP_READ, nr, 1, memoryview(bytearray(1)), 0, lambda b: ended.append(nr))


def test_they_are_submitted_again_in_their_order(now: list[float]) -> None:
    ended: list[int] = []
    reads = HeldReads()
    bios = [a_read(ended, nr) for nr in range(3)]
    for bio in bios:
        reads.hold(bio, 10.0)
    assert len(reads) == 3
    again: list[Bio] = []
    reads.resume(again.append)
    assert again == bios
    assert len(reads) == 0
    assert ended == []


def test_what_is_held_while_others_are_resumed_waits_for_the_next_time(
    now: list[float],
) -> None:
    reads = HeldReads()
    for nr in range(2):
        reads.hold(a_read([], nr), 10.0)
    reads.resume(lambda bio: reads.hold(bio, 10.0))  # it was lost again at once
    assert len(reads) == 2


def test_they_end_when_their_time_is_over(now: list[float]) -> None:
    ended: list[int] = []
    reads = HeldReads()
    bios = [a_read(ended, nr) for nr in range(3)]
    reads.hold(bios[0], 10.0)
    now[0] += 5
    reads.hold(bios[1], 10.0)
    reads.hold(bios[2], 0)
    now[0] += 5
    reads.expire()
    assert (ended, bios[0].status) == ([0], EIO)
    now[0] += 1e9
    reads.expire()
    assert ended == [0, 1]  # 0 seconds is for ever
    assert len(reads) == 1


def test_given_up(now: list[float]) -> None:
    ended: list[int] = []
    reads = HeldReads()
    reads.is_on = True
    reads.hold(a_read(ended, 1), 0)
    reads.give_up()
    assert (ended, reads.is_on, len(reads)) == ([1], False, 0)


def test_payload_that_is_borrowed_is_kept(now: list[float]) -> None:
    reads = HeldReads()
    lent = memoryview(bytearray(4))
    bio = Bio(OP_READ, 0, 4, lent, 0, lambda bio: None, borrowed=True)
    reads.hold(bio, 0)
    assert bio.payload is not lent
