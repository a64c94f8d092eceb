# SPDX-License-Identifier: Apache-2.0
"""Range locks: exclusion, order, and every waiter is granted its range."""

from time import thread_time_ns

from hypothesis import given
from hypothesis import strategies as st

from nbdtarget.targets.prison import Cell, Prison


class Queue:
    """Asks for ranges and notes who is granted, in order."""

    def __init__(self) -> None:
        self.prison = Prison()
        self.granted: list[Cell] = []

    def lock(self, begin: int, end: int) -> Cell:
        return self.prison.lock(begin, end, self.granted.append)


def test_free_range_is_granted_at_once() -> None:
    queue = Queue()
    cells = [queue.lock(4, 8), queue.lock(0, 4), queue.lock(8, 9)]
    assert queue.granted == cells
    assert all(cell.held for cell in cells)


def test_range_of_2_to_the_28_regions_is_one_cell() -> None:
    queue = Queue()
    all_of_it = queue.lock(0, 1 << 28)
    waiter = queue.lock(1 << 27, (1 << 27) + 1)
    assert not waiter.held
    queue.prison.release(all_of_it)
    assert queue.granted == [all_of_it, waiter]


def test_waiter_is_granted_when_the_last_one_before_it_goes() -> None:
    queue = Queue()
    first, second = queue.lock(0, 4), queue.lock(4, 8)
    both = queue.lock(2, 6)
    queue.prison.release(first)
    assert not both.held
    queue.prison.release(second)
    assert both.held


def test_later_one_does_not_overtake_a_waiter() -> None:
    queue = Queue()
    held = queue.lock(0, 4)
    wide = queue.lock(0, 100)
    narrow = queue.lock(50, 51)  # free, but the wide one came first
    assert not narrow.held
    queue.prison.release(held)
    assert (wide.held, narrow.held) == (True, False)
    queue.prison.release(wide)
    assert narrow.held


def test_maybe_lock_never_waits() -> None:
    queue = Queue()
    held = queue.lock(0, 4)
    queue.lock(2, 6)
    assert queue.prison.maybe_lock(5, 7) is None
    assert queue.prison.maybe_lock(6, 8) is not None
    queue.prison.release(held)


def test_clear_run_skips_what_is_held_and_what_waits() -> None:
    queue = Queue()
    queue.lock(2, 4)
    queue.lock(3, 6)
    queue.lock(8, 9)
    clear = queue.prison.maybe_clear_run
    assert clear(0, 20) == (0, 2)
    assert clear(2, 20) == (6, 8)
    assert clear(3, 5) is None
    assert clear(8, 20) == (9, 20)
    assert clear(6, 7) == (6, 7)


def test_release_in_the_callback_does_not_recurse() -> None:
    prison = Prison()
    granted = 0

    def at_once(cell: Cell) -> None:
        nonlocal granted
        granted += 1
        prison.release(cell)

    first = prison.lock(0, 1, lambda _: None)
    for _ in range(2000):
        prison.lock(0, 1, at_once)
    prison.release(first)
    assert granted == 2000
    assert prison.nr_held == prison.nr_waiting == 0


def test_thousands_that_wait_for_one_range_are_cancelled_in_milliseconds() -> None:
    """Of processor time: how busy the machine is does not matter."""
    prison = Prison()
    held = prison.lock(0, 1 << 28, lambda _: None)
    began_ns = thread_time_ns()
    waiting = [
        prison.lock(at % 7, (1 << 28) - at % 5, lambda _: None) for at in range(4096)
    ]
    asked_ns = thread_time_ns()
    prison.cancel(waiting)
    # 10 and 2 ms here; each pair was looked at once, and there are eight million of them.
    assert asked_ns - began_ns < 400e6
    assert thread_time_ns() - asked_ns < 100e6
    assert (prison.nr_held, prison.nr_waiting) == (1, 0)
    prison.release(held)
    assert prison.is_clear(0, 1 << 28)


RANGES = st.tuples(st.integers(0, 12), st.integers(1, 6))


STEPS = st.one_of(RANGES, st.integers(0, 30), st.sets(st.integers(0, 9), min_size=1))


@given(st.lists(STEPS, max_size=60))
def test_any_order_of_locks_releases_and_cancels(
    steps: list[tuple[int, int] | int | set[int]],
) -> None:
    """Locks are pairs, releases numbers, and what is cancelled sets of numbers."""
    queue = Queue()
    cells: list[Cell] = []  # asked for and not released, oldest first
    for step in steps:
        if isinstance(step, tuple):
            cells.append(queue.lock(step[0], step[0] + step[1]))
        elif isinstance(step, set):
            waiting = [cell for cell in cells if not cell.held]
            chosen = [cell for nr, cell in enumerate(waiting) if nr in step]
            queue.prison.cancel(chosen)
            cells = [cell for cell in cells if cell not in chosen]
        elif held := [cell for cell in cells if cell.held]:
            cell = held[step % len(held)]
            cells.remove(cell)
            queue.prison.release(cell)
        for at, cell in enumerate(cells):
            older = [c for c in cells[:at] if c.begin < cell.end and cell.begin < c.end]
            assert cell.held == (not older)
        assert queue.prison.nr_held == sum(cell.held for cell in cells)
        assert queue.prison.nr_waiting == len(cells) - queue.prison.nr_held
        for at in range(20):
            is_clear = not any(cell.begin <= at < cell.end for cell in cells)
            assert queue.prison.is_clear(at, at + 1) == is_clear
    assert len(queue.granted) == len(set(queue.granted))


def test_held_is_what_is_held_not_what_waits() -> None:
    queue = Queue()
    queue.lock(8, 12)
    queue.lock(2, 6)
    queue.lock(5, 9)
    assert queue.prison.held(0, 20) == [(2, 6), (8, 12)]
    assert queue.prison.held(3, 9) == [(3, 6), (8, 9)]
    assert queue.prison.held(6, 8) == []


def test_cancelled_cell_is_never_granted_and_lets_the_next_one_through() -> None:
    prison = Prison()
    held = prison.lock(0, 4, lambda _: None)
    granted: list[Cell] = []
    first = prison.lock(2, 8, granted.append)
    second = prison.lock(6, 9, granted.append)
    third = prison.lock(0, 7, granted.append)
    prison.cancel([first])
    assert granted == [second]
    prison.release(second)
    assert granted == [second]
    prison.release(held)
    assert granted == [second, third]
    prison.release(third)
    assert (prison.nr_held, prison.nr_waiting) == (0, 0)
