# SPDX-License-Identifier: Apache-2.0
"""Range locks: which work may go on in which regions (or blocks) now, and which is next.

Theory of operation. A `Cell` asks for one half-open range of numbers, exclusively. It is
granted at once if it overlaps no cell that was asked for earlier and not yet released;
otherwise it waits, and is granted when the last of those is released. A cell therefore waits only
for older ones, which gives:

- *no starvation*: cells are granted in the order they came, per range; nothing overtakes;
- *no deadlock*, as long as **an operation that holds or waits for a cell asks for no second one**.
  An operation on several ranges takes one cell around them all.

    state     held   blockers   leaves it by
    waiting   False  > 0        the last older overlapping cell is released -> `granted(cell)`;
                                `cancel`
    held      True   0          `release`
    released  False  0          -

Which cell waits for which. For each number it is known which cell asked for it last (`_begins`, `_ends` and `_last`:
disjoint pieces, sorted). A new cell waits for these only. Each of them waits in its turn for the older ones, so
when it is released they have been released. For example, a thousand cells on one range are a chain, and
neither asking, nor releasing, nor cancelling all of them looks at each pair.

Cost. A cell is a pair of numbers, however long its range: a discard of 2^28 regions is one
cell. The cells that a new one overlaps are found by bisection. A cell that is released counts down the cells that it
blocks, so nothing is ever scanned to find out which cell is next.

`granted` runs inside `lock` or inside the `release` that makes room, one at a time: a
callback that releases its cell at once does not recurse into the next one's callback, or a
thousand writes to one region would overflow the stack.

Nothing here survives a crash or needs to.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable
from operator import attrgetter

from nbdtarget.common.turns import Pump

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
        # Disjoint pieces of what is held or waited for, sorted, and which cell asked for each last.
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._last: list[Cell] = []
        self._granting: deque[Cell] = deque()
        self._pump = Pump(self._grant)

    @property
    def nr_held(self) -> int:
        return len(self._held)

    @property
    def nr_waiting(self) -> int:
        return len(self._waiting)

    def is_clear(self, begin: int, end: int) -> bool:
        """Whether no cell holds or waits for any of the range."""
        low, high = self._overlapping(begin, end)
        return low == high

    def held(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The parts of the range that are held now, in order."""
        held = self._held
        low = bisect_left(held, begin, key=_begin_of)
        if low and held[low - 1].end > begin:
            low -= 1
        cells = held[low : bisect_left(held, end, low, key=_begin_of)]
        return [(max(cell.begin, begin), min(cell.end, end)) for cell in cells]

    def maybe_clear_run(self, begin: int, end: int) -> tuple[int, int] | None:
        """Return the first part of the range that no cell holds or waits for, or None."""
        low, high = self._overlapping(begin, end)
        for nr in range(low, high):
            if self._begins[nr] > begin:
                return begin, self._begins[nr]
            begin = self._ends[nr]
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
        self._ask(cell)
        if cell.blockers:
            self._waiting[cell] = None
        else:
            self._hold(cell)
            granted(cell)
        return cell

    def release(self, cell: Cell) -> None:
        """Let the range go, and grant what waited only for this."""
        assert cell.held, "only a held cell is released, and once"
        cell.held = False
        index = bisect_left(self._held, cell.begin, key=_begin_of)
        assert self._held[index] is cell
        del self._held[index]
        self._forget(cell)
        self._unblock(cell)

    def cancel(self, cells: Iterable[Cell]) -> None:
        """Ask no more for ranges that are not held yet; `granted` will not be called for them.

        Costs as much as asking again for all that is left.
        """
        cancelled = set(cells)
        assert not any(cell.held for cell in cancelled), "a held cell is released"
        # Forget which cell asked for what, then ask again for all that is left, in the same order: a cell that waited
        # for a cancelled one waits for those before it now, or for none.
        waiting = [cell for cell in self._waiting if cell not in cancelled]
        self._waiting.clear()
        self._begins.clear()
        self._ends.clear()
        self._last.clear()
        for cell in self._held:
            cell.blocked = []
            self._ask(cell)
        for cell in waiting:
            cell.blocked = []
            cell.blockers = 0
            self._ask(cell)
            if cell.blockers:
                self._waiting[cell] = None
            else:
                self._hold(cell)
                self._granting.append(cell)
        self._pump.run()

    def _ask(self, cell: Cell) -> None:
        """Note that `cell` asks for its range, after all others; count the cells that it waits for."""
        begin, end = cell.begin, cell.end
        low, high = self._overlapping(begin, end)
        if low == high:
            self._begins.insert(low, begin)
            self._ends.insert(low, end)
            self._last.insert(low, cell)
            return
        # One piece may overlap at both ends, and one cell may have several pieces: it is waited for once.
        before = self._last[low:high]
        for older in dict.fromkeys(before):
            older.blocked.append(cell)
            cell.blockers += 1
        # The part that sticks out on either side stays with the cell that asked for it; all between is this cell's.
        begins, ends, last = [begin], [end], [cell]
        if self._begins[low] < begin:
            begins.insert(0, self._begins[low])
            ends.insert(0, begin)
            last.insert(0, before[0])
        if self._ends[high - 1] > end:
            begins.append(end)
            ends.append(self._ends[high - 1])
            last.append(before[-1])
        self._begins[low:high] = begins
        self._ends[low:high] = ends
        self._last[low:high] = last

    def _forget(self, cell: Cell) -> None:
        """No cell asks any more for what `cell` was the last to ask for."""
        nr = bisect_left(self._begins, cell.begin)
        if nr == len(self._begins):
            return
        if self._last[nr] is cell and self._ends[nr] == cell.end:
            # hot: no other cell has asked for any of it since.
            del self._begins[nr], self._ends[nr], self._last[nr]
            return
        low, high = self._overlapping(cell.begin, cell.end)
        left = [nr for nr in range(low, high) if self._last[nr] is not cell]
        self._begins[low:high] = [self._begins[nr] for nr in left]
        self._ends[low:high] = [self._ends[nr] for nr in left]
        self._last[low:high] = [self._last[nr] for nr in left]

    def _overlapping(self, begin: int, end: int) -> tuple[int, int]:
        """Which pieces overlap the range, half-open."""
        begins = self._begins
        if not begins:
            return 0, 0
        low = bisect_right(begins, begin)
        if low and self._ends[low - 1] > begin:
            low -= 1
        return low, bisect_left(begins, end, low)

    def _unblock(self, cell: Cell) -> None:
        if not cell.blocked:
            return  # hot: mostly no other cell waits
        blocked, cell.blocked = cell.blocked, []
        for waiter in blocked:
            waiter.blockers -= 1
            if not waiter.blockers:
                # Held from here on, so that nothing slips in before its callback runs.
                del self._waiting[waiter]
                self._hold(waiter)
                self._granting.append(waiter)
        self._pump.run()

    def _grant(self) -> None:
        while self._granting:
            waiter = self._granting.popleft()
            waiter.granted(waiter)

    def _hold(self, cell: Cell) -> None:
        assert not cell.blockers, "an older cell has not been released"
        cell.held = True
        insort(self._held, cell, key=_begin_of)


def _nothing(_: Cell) -> None:
    """A cell that was clear when it was asked for needs no call."""
