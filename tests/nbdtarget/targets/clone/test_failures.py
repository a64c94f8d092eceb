# SPDX-License-Identifier: Apache-2.0
"""Failed ranges: back-off, merging, bounds."""

from hypothesis import given
from hypothesis import strategies as st

from nbdtarget.targets.clone.failures import RETRY_S_MAX, Failures

S = 1_000_000_000


def test_failed_range_waits_and_waits_longer_each_time() -> None:
    failures = Failures()
    assert failures.note_failure(4, 8, 0)
    assert failures.maybe_clear_run(4, 8, 0) is None
    assert failures.maybe_clear_run(0, 20, 0) == (0, 4)
    assert failures.maybe_clear_run(5, 20, 0) == (8, 20)
    assert failures.maybe_clear_run(4, 20, S) == (4, 8)
    assert not failures.note_failure(4, 8, S)
    assert failures.maybe_clear_run(4, 8, 2 * S) is None
    assert failures.maybe_clear_run(4, 8, 3 * S) == (4, 8)
    for _ in range(20):
        failures.note_failure(4, 8, 0)
    assert failures.maybe_retry_ns(0) == int(RETRY_S_MAX * S)


def test_success_forgets_only_what_succeeded() -> None:
    failures = Failures()
    failures.note_failure(0, 10, 0)
    failures.note_success(4, 6)
    assert failures.maybe_clear_run(0, 10, 0) == (4, 6)
    failures.note_success(0, 4)
    failures.note_success(6, 10)
    assert len(failures) == 0
    assert failures.maybe_retry_ns(0) is None
    assert failures.nr_errors == 1


def test_source_that_is_all_dead_costs_one_range() -> None:
    failures = Failures()
    for nr in range(10_000):
        failures.note_failure(nr, nr + 1, nr)
    assert len(failures) == 1


def test_ranges_are_bounded() -> None:
    failures = Failures(ranges_max=8)
    for nr in range(1000, 0, -1):
        failures.note_failure(2 * nr, 2 * nr + 1, 0)
        assert len(failures) <= 8
    assert all(
        failures.maybe_clear_run(2 * nr, 2 * nr + 1, 0) is None for nr in range(1, 1001)
    )


SPANS = st.tuples(st.integers(0, 30), st.integers(1, 8), st.booleans())


@given(st.lists(SPANS, max_size=40))
def test_what_failed_last_is_not_tried_again_at_once(
    steps: list[tuple[int, int, bool]],
) -> None:
    failures = Failures()
    failed: set[int] = set()
    for begin, length, ok in steps:
        span = set(range(begin, begin + length))
        if ok:
            failures.note_success(begin, begin + length)
            failed -= span
        else:
            failures.note_failure(begin, begin + length, 0)
            failed |= span
        for nr in range(40):
            clear = failures.maybe_clear_run(nr, nr + 1, 0) is not None
            assert clear == (nr not in failed)
