# SPDX-License-Identifier: Apache-2.0
"""`SyncPace`: after which syncs the loop makes the next one itself, and after which it does not."""

import pytest

from nbdtarget.devices.file import sync_pace
from nbdtarget.devices.file.sync_pace import (
    QUICK_NS,
    RECENT_NS,
    SKIP_MAX,
    STREAK,
    SyncPace,
)


class Clock:
    """Attributes: now_ns: what the clock says."""

    now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sync_pace, "perf_counter_ns", clock)
    return clock


def sync(
    pace: SyncPace, clock: Clock, took_ns: int, *, after_ns: int = 0, alone: bool = True
) -> bool:
    """Make a sync; whether it was the loop's."""
    clock.now_ns += after_ns
    is_ours = pace.begin(may_be_ours=alone)
    clock.now_ns += took_ns
    pace.ended()
    return is_ours


def nr_until_ours(pace: SyncPace, clock: Clock) -> int:
    nr = 0
    while not sync(pace, clock, 1000):
        nr += 1
    return nr


def test_the_loop_syncs_after_so_many_quick_ones(clock: Clock) -> None:
    pace = SyncPace()
    assert nr_until_ours(pace, clock) == STREAK
    assert sync(pace, clock, QUICK_NS)
    assert sync(pace, clock, 1000)


def test_not_when_others_are_busy_or_the_last_sync_is_long_ago(clock: Clock) -> None:
    pace = SyncPace()
    nr_until_ours(pace, clock)
    assert not sync(pace, clock, 1000, alone=False)
    assert not sync(pace, clock, 1000, after_ns=RECENT_NS)
    assert sync(pace, clock, 1000, after_ns=RECENT_NS - 1)


def test_a_slow_disk_is_seldom_waited_for(clock: Clock) -> None:
    """Each time that the loop has waited in vain, twice as many syncs are not its own."""
    pace = SyncPace()
    assert nr_until_ours(pace, clock) == STREAK
    waited: list[int] = []
    for _ in range(10):
        assert sync(pace, clock, QUICK_NS + 1)
        waited.append(nr_until_ours(pace, clock))
    assert waited == [min(STREAK << nr, SKIP_MAX) for nr in range(1, 11)]


def test_a_slow_sync_of_the_thread_ends_a_streak(clock: Clock) -> None:
    pace = SyncPace()
    for _ in range(STREAK - 1):
        assert not sync(pace, clock, 1000)
    assert not sync(pace, clock, QUICK_NS + 1)
    assert nr_until_ours(pace, clock) == STREAK
