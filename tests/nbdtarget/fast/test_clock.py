# SPDX-License-Identifier: Apache-2.0
"""The processor's counter tells the time as the clock does, where the kernel trusts it, and nowhere else."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.fast import compiled

pytestmark = pytest.mark.skipif(not compiled.IS_COMPILED, reason=compiled.describe())
if compiled.IS_COMPILED:
    from nbdtarget_fast import choose_clock, clock_ns, ns_of_ticks

DAY_NS = 24 * 3600 * 10**9
FIRST = 50_000_000, 7_000, 0
# 2.1 GHz: 21 ticks in 10 ns.
LAST = 50_000_000 + 42_000_000, 7_000 + 20_000_000, 0


@pytest.fixture
def _clock_again() -> Iterator[None]:
    yield
    choose_clock()


@pytest.mark.parametrize(
    ("ticks", "ns"),
    [
        (LAST[0], LAST[1]),
        (LAST[0] + 21, LAST[1] + 10),
        (LAST[0] + 2_100_000_000, LAST[1] + 1_000_000_000),
        (LAST[0] - 2_100, LAST[1] - 1_000),  # on another processor, a moment earlier
        (LAST[0] + 2100 * 1_000_000 * 3600 * 24 * 3650, LAST[1] + 3650 * DAY_NS),
    ],
    ids=["at-once", "some-ticks", "a-second", "before", "ten-years"],
)
def test_ticks_are_nanoseconds(ticks: int, ns: int) -> None:
    found = ns_of_ticks(FIRST, LAST, ticks)
    assert found is not None
    # A rate is kept in parts of 2^-32.
    assert abs(found - ns) <= 1 + abs(ns - LAST[1]) / 10**9


@pytest.mark.parametrize(
    "last",
    [
        (FIRST[0] + 2_100_000, FIRST[1] + 1_000_000, 0),
        (FIRST[0], LAST[1], 0),
        (FIRST[0] - 42_000_000, LAST[1], 0),
        (LAST[0], LAST[1], 2_000_000),
        (LAST[0], LAST[1], -2_000_000),
    ],
    ids=["near", "stands", "backwards", "slept", "clock-set-back"],
)
def test_moments_that_tell_no_rate(last: tuple[int, int, int]) -> None:
    assert ns_of_ticks(FIRST, last, LAST[0]) is None


@pytest.mark.usefixtures("_clock_again")
@pytest.mark.parametrize("name", ["hpet\n", "kvm-clock\n", "", None])
def test_another_clocksource_means_the_clock(tmp_path: Path, name: str | None) -> None:
    file = tmp_path / "current_clocksource"
    if name is not None:
        file.write_text(name)
    assert not choose_clock(str(file))
    before = time.monotonic_ns()
    now = clock_ns()
    assert before <= now <= time.monotonic_ns()


def looks() -> tuple[int, int, int]:
    return time.monotonic_ns(), clock_ns(), time.monotonic_ns()


def test_the_counter_is_as_fast_as_the_clock() -> None:
    time.sleep(0.02)  # since the import: 10 ms are enough to find the rate
    if not choose_clock():
        pytest.skip("the kernel does not take its time from the processor's counter")
    before, first, after = looks()
    time.sleep(0.05)
    before_second, second, after_second = looks()
    least, most = before_second - after, after_second - before
    # The kernel corrects its clock by up to 500 millionths.
    slack = 1_000 + most // 1000
    assert least - slack <= second - first <= most + slack


@pytest.mark.usefixtures("_clock_again")
def test_the_time_goes_on_where_it_was(tmp_path: Path) -> None:
    if not choose_clock():
        pytest.skip("the kernel does not take its time from the processor's counter")
    counter = clock_ns()
    (tmp_path / "other").write_text("hpet\n")
    assert not choose_clock(str(tmp_path / "other"))
    # A thousandth of what has passed since the rate was found: at most an hour.
    assert abs(clock_ns() - counter) < 3600 * 10**6
