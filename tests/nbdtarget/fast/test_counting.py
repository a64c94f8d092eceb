# SPDX-License-Identifier: Apache-2.0
"""Which batches the compiled path times, and with which time it counts the others.

Durable requests and READs in the ring, which are always timed, are in `test_receiver.py` and `test_plane_ring.py`.
"""

import time
from collections.abc import Iterator
from itertools import accumulate, repeat
from pathlib import Path
from typing import Final

import pytest

from nbdtarget.fast import compiled
from tests.support.plane import Bench, request

pytestmark = pytest.mark.skipif(not compiled.IS_COMPILED, reason=compiled.describe())
if compiled.IS_COMPILED:
    from nbdtarget_fast import BOUNDS_NS, DONE, chosen_batches

READ, WRITE = 0, 1
NR_EXACT: Final = 1000  # a second, and at most saved up
US: Final = 1000
SECOND: Final = 10**9
MAX_GAP: Final = 31  # batches between two that are timed
# No batch of a test takes so long.
USUAL_NS: Final = 10**15
ONE_READ: Final = request(READ, 0, 512)
ONE_WRITE: Final = request(WRITE, 4096, 512, bytes(512))


def at(each_ns: int, nr: int, begin_ns: int = SECOND) -> list[int]:
    return list(accumulate(repeat(each_ns, nr - 1), initial=begin_ns))


# ---- which batches are timed ----


def test_all_are_timed_while_the_server_is_not_busy() -> None:
    chosen = chosen_batches(at(SECOND // NR_EXACT, 100_000))
    assert all(chosen[MAX_GAP + 1 :])


def test_after_a_pause_as_many_are_timed_as_were_saved_up() -> None:
    busy, pause = at(US, 20_000), at(US, 2 * NR_EXACT, 100 * SECOND)
    chosen = chosen_batches(busy + pause)[len(busy) :]
    first = chosen.index(True)
    assert first <= MAX_GAP
    assert all(chosen[first : first + NR_EXACT + 1])
    assert not all(chosen[first + NR_EXACT + 1 :])


def test_one_of_about_sixteen_is_timed_while_the_server_is_busy() -> None:
    each_ns = 10 * US
    nr = 400_000
    chosen = chosen_batches(at(each_ns, nr))
    exact = nr * each_ns * NR_EXACT // SECOND
    sampled = (nr - exact) / 16.5
    assert 0.95 * (exact + sampled) < sum(chosen) < 1.05 * (exact + sampled)
    gaps = "".join("x" if each else "." for each in chosen).split("x")
    # After so many batches at most, the plane notices that the server is not busy any more.
    assert max(map(len, gaps)) == MAX_GAP


@pytest.mark.parametrize("period", [2, 3, 8, 16, 17, 32, 33, 64])
def test_no_batch_of_a_pattern_is_met_more_often_than_another(period: int) -> None:
    chosen = chosen_batches(at(US, 400_000))
    met = [sum(chosen[phase::period]) for phase in range(period)]
    assert min(met) > 0.75 * sum(met) / period
    assert max(met) < 1.25 * sum(met) / period


def test_a_clock_that_was_set_back_stops_nothing() -> None:
    chosen = chosen_batches(
        [*at(US, 100, 100 * SECOND), *at(SECOND // NR_EXACT, 100, SECOND)]
    )
    assert all(chosen[-60:])


# ---- what counts with which time ----


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "disk")
    yield made
    made.close()


def counts(bench: Bench, command: int) -> tuple[int, int, int, dict[int, int]]:
    """How many, their bytes, their time, and how many are in which bucket."""
    nr, nr_bytes, taken_ns, buckets = bench.plane.counted()[command]
    assert sum(buckets) == nr
    return nr, nr_bytes, taken_ns, {at: nr for at, nr in enumerate(buckets) if nr}


LAST: Final = 12  # the bucket of USUAL_NS


def test_requests_and_bytes_are_exact_though_they_are_not_timed(bench: Bench) -> None:
    bench.plane.leave_untimed(100, USUAL_NS)
    assert bench.turn(ONE_READ * 3 + ONE_WRITE) == DONE
    assert bench.turn(ONE_WRITE) == DONE
    assert counts(bench, READ) == (3, 3 * 512, 3 * USUAL_NS, {LAST: 3})
    assert counts(bench, WRITE) == (2, 2 * 512, 2 * USUAL_NS, {LAST: 2})


def test_what_is_not_timed_counts_with_the_last_time_and_not_the_next(
    bench: Bench,
) -> None:
    bench.plane.leave_untimed(1, USUAL_NS)
    assert bench.turn(ONE_READ) == DONE
    assert bench.turn(ONE_READ) == DONE  # it is timed
    nr, _, taken_ns, buckets = counts(bench, READ)
    assert (nr, buckets[LAST]) == (2, 1)
    assert USUAL_NS < taken_ns < 2 * USUAL_NS


def test_the_first_batch_of_a_connection_is_timed(bench: Bench) -> None:
    bench.plane.leave_untimed(100)
    assert bench.turn(ONE_READ) == DONE
    nr, _, first_ns, buckets = counts(bench, READ)
    assert nr == 1
    assert 0 < first_ns < USUAL_NS
    # Others count with its time, and those of an operation that it did not have, too.
    bench.plane.leave_untimed(100)
    assert bench.turn(ONE_READ) == bench.turn(ONE_WRITE * 2) == DONE
    (bucket,) = buckets
    assert counts(bench, READ) == (2, 2 * 512, 2 * first_ns, {bucket: 2})
    assert counts(bench, WRITE) == (2, 2 * 512, 2 * first_ns, {bucket: 2})


def test_a_part_of_a_request_is_no_batch_that_others_count_with(bench: Bench) -> None:
    assert bench.turn(ONE_READ[:10]) == DONE
    bench.plane.leave_untimed(100)
    assert bench.turn(ONE_READ[10:]) == DONE
    assert 0 < counts(bench, READ)[2] < USUAL_NS


def test_each_operation_has_a_time_of_its_own(bench: Bench) -> None:
    bench.plane.leave_untimed(0, USUAL_NS)
    assert bench.turn(ONE_READ) == DONE  # it is timed
    bench.plane.leave_untimed(100)
    assert bench.turn(ONE_WRITE) == DONE
    assert counts(bench, READ)[2] < USUAL_NS
    assert counts(bench, WRITE)[2] == USUAL_NS


def test_slow_write_is_timed_and_stands_for_no_other(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "disk", slow_ns=-1)  # the watchdog says so of each
    bench.plane.leave_untimed(100, USUAL_NS)
    assert bench.turn(ONE_WRITE) == DONE
    _, _, taken_ns, _ = counts(bench, WRITE)
    assert 0 < taken_ns < USUAL_NS
    bench.plane.leave_untimed(100)
    assert bench.turn(ONE_READ) == DONE
    assert counts(bench, READ)[2] == USUAL_NS
    bench.close()


def test_after_the_numbers_were_read_batches_are_timed_again(bench: Bench) -> None:
    bench.plane.leave_untimed(10**6, USUAL_NS)
    assert bench.turn(ONE_READ) == DONE
    time.sleep(2 / NR_EXACT)
    assert counts(bench, READ)[2] == USUAL_NS
    assert bench.turn(ONE_READ) == DONE
    assert USUAL_NS < counts(bench, READ)[2] < 2 * USUAL_NS


def test_buckets_have_the_bounds_of_the_reference() -> None:
    assert len(BOUNDS_NS) == LAST
