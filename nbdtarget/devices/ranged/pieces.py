# SPDX-License-Identifier: Apache-2.0
"""`Pieces`: reads that a client waits for. A miss brings an aligned piece, and a sequence of misses is read ahead of.

Theory of operation. The image is cut into *cells* of `CELL_BYTES`. A read waits for the cells that it touches, and for no more of them
than it needs: it ends as soon as its own bytes have arrived. A 4 KiB read costs one request for a cell, because a request to a
distant server takes as long, and costs as much money, for a few bytes as for many; what lies beside the bytes is likely wanted next.

*Reading ahead.* A read that begins in the cell where an earlier one ended, or in the next one, continues a *stream*. From its second
cell on, a stream has what follows fetched: twice as much as it has read, up to `AHEAD_CELLS_MAX`, in requests of `RUN_CELLS_MAX`.
A read at random continues no stream, so nothing is read ahead for it.

*Bounds.* `CELLS_MAX` cells are kept, those used last. A cell that is being fetched stays until it has come, so there may be
more: as many as the requests of clients touch. Reading ahead is bounded by `CELLS_MAX` alone.

*Failures.* A fetch that fails ends the reads that wait for its cells with EIO, and the cells are forgotten: the next read asks again.
"""

import errno as errnos
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from nbdtarget.bio import Bio
from nbdtarget.common.errors import DeviceError
from nbdtarget.common.turns import Tasks
from nbdtarget.devices.ranged.fetcher import Fetcher
from nbdtarget.devices.ranged.slots import Slots

__all__ = ["CELL_BYTES", "Pieces"]

CELL_BYTES: Final = 256 << 10
CELLS_MAX: Final = 128
RUN_CELLS_MAX: Final = 4
AHEAD_CELLS_MAX: Final = 32
STREAMS_MAX: Final = 16
SLOTS: Final = 8


def new_buffer(length: int) -> memoryview:
    return memoryview(bytearray(length))


class Pieces:
    """See the module head. Args: tasks: where fetches run; size: bytes of the image, without what rounds it up."""

    def __init__(self, fetcher: Fetcher, size: int, tasks: Tasks) -> None:
        self._fetcher = fetcher
        self._size = size
        self._nr_cells = -(-size // CELL_BYTES)
        self._tasks = tasks
        self._slots = Slots(SLOTS, width_max=SLOTS, width_min=2)
        self._cells: OrderedDict[int, _Cell] = OrderedDict()
        self._streams: OrderedDict[int, int] = OrderedDict()

    @property
    def nr_waiting(self) -> int:
        """How many cells are being fetched."""
        return sum(not cell.is_whole for cell in self._cells.values())

    def seed(self, data: bytes | bytearray | memoryview) -> None:
        """Keep the image's first bytes, which came with its opening."""
        for nr in range(len(data) // CELL_BYTES or int(len(data) == self._size)):
            cell = self._new_cell(nr)
            cell.fill(0, memoryview(data)[nr * CELL_BYTES :][: cell.length])

    def has(self, begin: int, end: int) -> bool:
        """Whether a range is here, or on its way."""
        cells = self._cells
        end = min(end, self._size)
        return all(
            nr in cells for nr in range(begin // CELL_BYTES, -(-end // CELL_BYTES))
        )

    def read(self, bio: Bio) -> None:
        """Take a READ inside the device; ends it."""
        begin, end = bio.offset, min(bio.offset + bio.length, self._size)
        first, last = begin // CELL_BYTES, -(-end // CELL_BYTES)
        # New cells may drive out those that this read finds: it keeps them itself.
        here = {nr: self._used(nr) for nr in range(first, last) if nr in self._cells}
        missing = [nr for nr in range(first, last) if nr not in here]
        if missing:
            self._fetch(missing)
        cells = [here.get(nr) or self._cells[nr] for nr in range(first, last)]
        self._read_ahead(first, last - 1)
        _Read(bio, begin, end, cells)

    def _used(self, nr: int) -> "_Cell":
        self._cells.move_to_end(nr)
        return self._cells[nr]

    def _read_ahead(self, first: int, last: int) -> None:
        streams = self._streams
        nr_read = streams.pop(first, 0)
        if nr_read:
            nr_read += last - first
        else:
            nr_read = streams.pop(first - 1, 0) + last - first + 1
        streams[last] = nr_read
        if len(streams) > STREAMS_MAX:
            streams.popitem(last=False)
        if nr_read < 2:
            return
        stop = min(last + 1 + min(2 * nr_read, AHEAD_CELLS_MAX), self._nr_cells)
        missing = [nr for nr in range(last + 1, stop) if nr not in self._cells]
        # Whole requests, rather than a cell for each cell that is read.
        if len(missing) >= min(RUN_CELLS_MAX, stop - last - 1):
            self._fetch(missing)

    def _fetch(self, missing: Iterable[int]) -> None:
        """Begin to fetch cells, in ascending order, neighbours together."""
        run: list[_Cell] = []
        for nr in missing:
            if run and (nr != run[-1].nr + 1 or len(run) == RUN_CELLS_MAX):
                self._start(run)
                run = []
            run.append(self._new_cell(nr))
        if run:
            self._start(run)

    def _new_cell(self, nr: int) -> "_Cell":
        cell = _Cell(nr, min(CELL_BYTES, self._size - nr * CELL_BYTES))
        self._cells[nr] = cell
        if len(self._cells) > CELLS_MAX:
            self._evict()
        return cell

    def _evict(self) -> None:
        for nr, cell in self._cells.items():
            if cell.is_whole:
                del self._cells[nr]
                return

    def _start(self, run: list["_Cell"]) -> None:
        task = self._tasks.start(self._fetch_run(run))
        # Not in the coroutine: one that is cancelled before its first step runs none of it.
        task.add_done_callback(lambda _: self._ended(run))

    async def _fetch_run(self, run: list["_Cell"]) -> None:
        begin = run[0].nr * CELL_BYTES
        at = begin

        def take(data: bytes | bytearray | memoryview) -> None:
            nonlocal at
            view = memoryview(data)
            while view:
                cell = run[(at - begin) // CELL_BYTES]
                done = cell.fill(at % CELL_BYTES, view)
                at += done
                view = view[done:]

        end = begin + sum(cell.length for cell in run)
        try:
            await self._fetcher.fetch(begin, end, take, self._slots, is_urgent=True)
        except DeviceError:
            return  # `_ended` tells those that wait

    def _ended(self, run: list["_Cell"]) -> None:
        for cell in run:
            if not cell.is_whole:
                if self._cells.get(cell.nr) is cell:
                    del self._cells[cell.nr]
                cell.fail()


class _Cell:
    """One piece of the image.

    Attributes:
        filled: how many of its bytes have come.
        has_failed: no more will.
    """

    __slots__ = ("_waiting", "buffer", "filled", "has_failed", "length", "nr")

    def __init__(self, nr: int, length: int) -> None:
        self.nr = nr
        self.length = length
        self.buffer = new_buffer(length)
        self.filled = 0
        self.has_failed = False
        self._waiting: list[tuple[int, Callable[[], None]]] = []

    @property
    def is_whole(self) -> bool:
        return self.filled == self.length

    def fill(self, at: int, data: memoryview) -> int:
        """Take what comes next, which begins at `at`; return how much of it belongs here."""
        assert at == self.filled
        done = min(self.length - at, len(data))
        self.buffer[at : at + done] = data[:done]
        self.filled += done
        if self._waiting:
            self._wake()
        return done

    def fail(self) -> None:
        self.has_failed = True
        self._wake()

    def when_filled(self, needed: int, call: Callable[[], None]) -> None:
        """Call `call` when the first `needed` bytes are here, or never will be."""
        if self.filled >= needed or self.has_failed:
            call()
        else:
            self._waiting.append((needed, call))

    def _wake(self) -> None:
        due, self._waiting = self._waiting, []
        for needed, call in due:
            self.when_filled(needed, call)


class _Read:
    """One READ that waits for its cells."""

    __slots__ = ("_begin", "_bio", "_end", "_left", "_status")

    def __init__(self, bio: Bio, begin: int, end: int, cells: list[_Cell]) -> None:
        self._bio = bio
        self._begin = begin
        self._end = end
        self._left = len(cells)
        self._status = 0
        if any(cell.filled < self._needed(cell) for cell in cells):
            bio.own()
        payload = bio.payload
        assert payload is not None
        # The bytes that round the image up to whole sectors read as zeroes.
        payload[end - begin :] = bytes(bio.length - (end - begin))
        for cell in cells:
            self._wait(cell)

    def _needed(self, cell: _Cell) -> int:
        return min(self._end - cell.nr * CELL_BYTES, cell.length)

    def _wait(self, cell: _Cell) -> None:
        cell.when_filled(self._needed(cell), lambda: self._take(cell))

    def _take(self, cell: _Cell) -> None:
        needed = self._needed(cell)
        if cell.filled >= needed:
            start = cell.nr * CELL_BYTES
            at = max(self._begin, start)
            payload = self._bio.payload
            assert payload is not None
            payload[at - self._begin : start + needed - self._begin] = cell.buffer[
                at - start : needed
            ]
        else:
            self._status = errnos.EIO
        self._left -= 1
        if not self._left:
            self._bio.end(self._status)
