# SPDX-License-Identifier: Apache-2.0
"""`SyncPace`: after which syncs the loop waits for the next one, and after which it does not."""

import pytest

from nbdtarget.devices.file import sync_pace
from nbdtarget.devices.file.sync_pace import (
    FORGIVEN,
    QUICK_NS,
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


def sync(pace: SyncPace, clock: Clock, took_ns: int) -> None:
    """Make a sync in the background, for which the loop does not wait."""
    pace.begin()
    clock.now_ns += took_ns
    pace.ended()


def nr_until_quick(pace: SyncPace, clock: Clock) -> int:
    nr = 0
    while not pace.is_quick:
        sync(pace, clock, QUICK_NS)
        nr += 1
    return nr


def test_it_is_waited_for_after_so_many_quick_ones(clock: Clock) -> None:
    pace = SyncPace()
    assert nr_until_quick(pace, clock) == STREAK
    sync(pace, clock, QUICK_NS)
    assert pace.is_quick


def test_a_slow_disk_is_seldom_waited_for(clock: Clock) -> None:
    """Each time that the loop has waited in vain, twice as many syncs are not waited for."""
    pace = SyncPace()
    assert nr_until_quick(pace, clock) == STREAK
    not_waited: list[int] = []
    for _ in range(10):
        pace.waited_in_vain(FORGIVEN - 1)
        not_waited.append(nr_until_quick(pace, clock))
    assert not_waited == [min(STREAK << nr, SKIP_MAX) for nr in range(1, 11)]


def test_a_disk_that_was_worth_the_wait_is_forgiven(clock: Clock) -> None:
    pace = SyncPace()
    for _ in range(10):
        pace.waited_in_vain(0)
    pace.waited_in_vain(FORGIVEN)
    assert nr_until_quick(pace, clock) == STREAK


def test_a_slow_sync_of_the_thread_ends_a_streak(clock: Clock) -> None:
    pace = SyncPace()
    for _ in range(STREAK - 1):
        sync(pace, clock, QUICK_NS)
    sync(pace, clock, QUICK_NS + 1)
    assert nr_until_quick(pace, clock) == STREAK
    sync(pace, clock, QUICK_NS + 1)
    assert nr_until_quick(pace, clock) == STREAK
