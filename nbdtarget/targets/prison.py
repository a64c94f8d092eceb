# SPDX-License-Identifier: Apache-2.0
"""Range locks: who may work on which regions (or blocks) now, and who is next.

Theory of operation. A `Cell` asks for one half-open range of numbers, exclusively. It is
granted at once if it overlaps no cell that was asked for earlier and not yet released;
otherwise it waits, and is granted when the last of those is released. A cell therefore waits only
for older ones, which gives:

- *no starvation*: cells are granted in the order they came, per range; nothing overtakes;
- *no deadlock*, as long as **whoever holds or waits for a cell asks for no second one**.
  An operation on several ranges takes one cell around them all.

    state     held   blockers   leaves it by
    waiting   False  > 0        the last older overlapping cell is released -> `granted(cell)`;
                                `cancel`
    held      True   0          `release`
    released  False  0          -

Cost. A cell is a pair of numbers, however long its range: a discard of 2^28 regions is one
cell. Held cells never overlap, so they lie sorted and a new one finds its neighbours by
bisection; waiting ones are scanned, and there are few: every one is a client's request that
met another request's region. What is released counts down the cells that it blocks, so
nothing is ever scanned to find out who is next.

`granted` runs inside `lock` or inside the `release` that makes room, one at a time: a
callback that releases its cell at once does not recurse into the next one's callback, or a
thousand writes to one region would overflow the stack.

Nothing here survives a crash or needs to.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from operator import attrgetter

__all__ = ["Cell", "Prison"]

_begin_of = attrgetter("begin")


class Cell:
    """One range, asked for or held. Made by `Prison.lock` only.

    Attributes:
        begin, end: half-open.
        held: the range is ours now.
    """

    __slots__ = ("begin", "blocked", "blockers", "end", "granted", "held")

    def __init__(self, begin: int, end: int, granted: Callable[["Cell"], None]) -> None:
        self.begin = begin
        self.end = end
        self.granted = granted
        self.held = False
        self.blockers = 0
        self.blocked: list[Cell] = []

    def __repr__(self) -> str:
        state = "held" if self.held else f"waits for {self.blockers}"
        return f"<Cell {self.begin}-{self.end} {state}>"


class Prison:
    """The cells of one target."""

    def __init__(self) -> None:
        self._held: list[Cell] = []  # sorted by begin; disjoint, so sorted by end too
        self._waiting: dict[Cell, None] = {}  # in the order they came
        self._granting: deque[Cell] = deque()
        self._is_granting = False

    @property
    def nr_held(self) -> int:
        return len(self._held)

    @property
    def nr_waiting(self) -> int:
        return len(self._waiting)

    def is_clear(self, begin: int, end: int) -> bool:
        """Whether nobody holds or waits for any of the range."""
        return not self._held_overlapping(begin, end) and not any(
            cell.begin < end and begin < cell.end for cell in self._waiting
        )

    def held(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The parts of the range that somebody holds now, in order."""
        cells = self._held_overlapping(begin, end)
        return [(max(cell.begin, begin), min(cell.end, end)) for cell in cells]

    def maybe_clear_run(self, begin: int, end: int) -> tuple[int, int] | None:
        """Return the first part of the range that nobody holds or waits for, or None."""
        busy = [(c.begin, c.end) for c in self._held_overlapping(begin, end)]
        busy += [
            (c.begin, c.end) for c in self._waiting if c.begin < end and begin < c.end
        ]
        for busy_begin, busy_end in sorted(busy):
            if busy_begin > begin:
                return begin, busy_begin
            begin = max(begin, busy_end)
        return (begin, end) if begin < end else None

    def maybe_lock(self, begin: int, end: int) -> Cell | None:
        """Hold the range now, or return None. Never waits."""
        if not self.is_clear(begin, end):
            return None
        return self.lock(begin, end, _nothing)

    def lock(self, begin: int, end: int, granted: Callable[[Cell], None]) -> Cell:
        """Ask for the range; `granted(cell)` is called once, now or later."""
        assert begin < end
        cell = Cell(begin, end, granted)
        for older in self._held_overlapping(begin, end):
            older.blocked.append(cell)
            cell.blockers += 1
        for older in self._waiting:
            if older.begin < end and begin < older.end:
                older.blocked.append(cell)
                cell.blockers += 1
        if cell.blockers:
            self._waiting[cell] = None
        else:
            self._hold(cell)
            granted(cell)
        return cell

    def release(self, cell: Cell) -> None:
        """Let the range go, and grant it to who waited only for this."""
        assert cell.held, "only a held cell is released, and once"
        cell.held = False
        index = bisect_left(self._held, cell.begin, key=_begin_of)
        assert self._held[index] is cell
        del self._held[index]
        self._unblock(cell)

    def cancel(self, cell: Cell) -> None:
        """Ask no more for a range that is not held yet; `granted` will not be called."""
        assert not cell.held
        del self._waiting[cell]
        for older in (*self._held, *self._waiting):
            if cell in older.blocked:
                older.blocked.remove(cell)
        self._unblock(cell)

    def _unblock(self, cell: Cell) -> None:
        blocked, cell.blocked = cell.blocked, []
        for waiter in blocked:
            waiter.blockers -= 1
            if not waiter.blockers:
                # Held from here on, so that nothing slips in before its callback runs.
                del self._waiting[waiter]
                self._hold(waiter)
                self._granting.append(waiter)
        self._grant()

    def _grant(self) -> None:
        if self._is_granting:
            return
        self._is_granting = True
        try:
            while self._granting:
                waiter = self._granting.popleft()
                waiter.granted(waiter)
        finally:
            self._is_granting = False

    def _hold(self, cell: Cell) -> None:
        cell.held = True
        insort(self._held, cell, key=_begin_of)

    def _held_overlapping(self, begin: int, end: int) -> list[Cell]:
        held = self._held
        if not held:
            return held
        low = bisect_left(held, begin, key=_begin_of)
        if low and held[low - 1].end > begin:
            low -= 1
        return held[low : bisect_left(held, end, low, key=_begin_of)]


def _nothing(_: Cell) -> None:
    """A cell that was clear when it was asked for needs no call."""
