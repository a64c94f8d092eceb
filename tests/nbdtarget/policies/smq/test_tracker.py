# SPDX-License-Identifier: Apache-2.0
import pytest

from nbdtarget.policies.base import DEMOTE, PROMOTE, WRITEBACK, Work
from nbdtarget.policies.smq.tracker import BackgroundTracker


def test_newest_is_issued_first() -> None:
    tracker = BackgroundTracker()
    works = [Work(PROMOTE, oblock, oblock) for oblock in range(3)]
    assert all(tracker.queue(work) for work in works)
    assert [tracker.issue() for _ in range(4)] == [*reversed(works), None]


def test_one_for_each_oblock_until_it_is_complete() -> None:
    tracker = BackgroundTracker()
    first = Work(PROMOTE, 7, 0)
    assert tracker.queue(first)
    assert not tracker.queue(Work(WRITEBACK, 7, 0))
    assert tracker.issue() is first
    assert not tracker.start(Work(PROMOTE, 7, 1))
    tracker.complete(first)
    assert tracker.start(Work(PROMOTE, 7, 1))


def test_bound_counts_queued_and_issued_work_together() -> None:
    tracker = BackgroundTracker(pending_max=2)
    first = Work(PROMOTE, 1, 1)
    assert tracker.start(first)
    assert tracker.queue(Work(DEMOTE, 2, 2))
    assert not tracker.queue(Work(DEMOTE, 3, 3))
    assert (len(tracker), tracker.nr_demotions) == (2, 1)
    tracker.complete(first)
    assert tracker.queue(Work(DEMOTE, 3, 3))


def test_demotions_count_until_they_are_complete() -> None:
    tracker = BackgroundTracker()
    work = Work(DEMOTE, 1, 1)
    tracker.queue(work)
    tracker.issue()
    assert tracker.nr_demotions == 1
    tracker.complete(work)
    assert tracker.nr_demotions == 0


def test_only_queued_work_can_be_cancelled() -> None:
    tracker = BackgroundTracker()
    queued, issued = Work(DEMOTE, 1, 1), Work(DEMOTE, 2, 2)
    assert tracker.queue(queued)
    assert tracker.start(issued)
    assert tracker.cancel(1) is queued
    assert tracker.cancel(2) is None
    assert tracker.cancel(3) is None
    assert tracker.issue() is None
    assert 1 not in tracker
    assert 2 in tracker


def test_only_a_queued_demotion_is_cancelled_as_such() -> None:
    tracker = BackgroundTracker()
    writeback, queued = Work(WRITEBACK, 1, 1), Work(DEMOTE, 2, 2)
    for work in (writeback, queued):
        assert tracker.queue(work)
    assert tracker.start(Work(DEMOTE, 3, 3))
    cancelled = [tracker.cancel_demotion(oblock) for oblock in range(5)]
    assert cancelled == [False, False, True, False, False]
    assert tracker.nr_demotions == 1
    assert [tracker.issue(), tracker.issue()] == [writeback, None]


def test_work_is_compared_by_identity() -> None:
    tracker = BackgroundTracker()
    tracker.start(Work(PROMOTE, 1, 1))
    with pytest.raises(AssertionError, match="is not under way"):
        tracker.complete(Work(PROMOTE, 1, 1))
