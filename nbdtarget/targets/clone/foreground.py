# SPDX-License-Identifier: Apache-2.0
"""Writes and discards that reach regions which are not hydrated yet.

Theory of operation. One `RegionWrite` takes one WRITE or WRITE_ZEROES through these steps:

    lock      all regions that it touches, in one cell; waits for older work on any of them
    look      again: the older work may have hydrated them all. Then this is a plain write
    gaps      at a ragged edge, the rest of an unhydrated region must come from the source;
              at most one gap before and one behind the write. No gaps: nothing is read
    write     gaps and payload to the destination; the regions stay "not hydrated" meanwhile,
              so all reads go to the source, and a crash or an error loses nothing
    bits      set when the write has ended, never before; then the lock is released, then the bio ends,
              with FUA only after a commit. That commit flushes the destination, so the write
              itself needs no FUA

Only gaps are read from the source, never what is about to be overwritten: a bad sector there
does not matter if the write covers it. A small write is read into place and written in
one piece together with its gaps; one that is too large for that has its gaps copied by the `Copier`
first. All steps are callbacks, so that on devices that answer at once they are
all taken inside `map`, with no task and no future. Those would cost more than the I/O.

Bounds: `deferred_bios_max` writes hold locks and buffers at a time; more wait their turn here,
first come first served, and hold only their payload. That, and how many bios wait here or for
a commit in all, is bounded by the server's limits on what a connection has in flight.

A write that waits for its turn or for a lock has not begun, and can be taken back (`push_back`). A write that waits
for a commit cannot: the commit is under way, and the write ends with it.

A discard locks its whole regions, sets their bits without copying anything, and goes on to
the destination if passdown is on. Because it takes the lock, no copy is under way that could overtake
a write which follows the discard.
"""

import asyncio
import errno as errnos
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from nbdtarget.bio import FAST_ZERO, FUA, OP_DISCARD, OP_NAMES, OP_READ, OP_WRITE, Bio
from nbdtarget.common.errors import DeviceError
from nbdtarget.common.turns import Pump, Tasks
from nbdtarget.devices.base import Device
from nbdtarget.targets.clone.regions import Regions
from nbdtarget.targets.copier import CopyError
from nbdtarget.targets.prison import Cell
from nbdtarget_metadata.errors import MetadataError

__all__ = ["DEFERRED_BIOS_MAX", "Foreground"]

DEFERRED_BIOS_MAX: Final = 256
CHILDREN_AT_ONCE_MAX: Final = 64
REGIONS_AT_ONCE_MAX: Final = 8192  # bits set between two turns of the loop: a few ms
MERGE_BYTES_MAX: Final = 256 << 10  # gaps and payload in one buffer up to here

Gap = tuple[int, int]  # bytes, half-open


class Foreground:
    """Carries out clients' I/O, and hydrates the regions that it needs."""

    def __init__(
        self, regions: Regions, *, deferred_bios_max: int = DEFERRED_BIOS_MAX
    ) -> None:
        self.regions = regions
        self.deferred_bios_max = deferred_bios_max
        self._nr_running = 0
        self._queue: deque[RegionWrite] = deque()
        self._waiting: dict[Cell, Bio] = {}  # for a lock, in the order they came
        # A write that ends at once asks for the next one while the loop that started it is still running.
        self._pump = Pump(self._start_queued)
        self._tasks = Tasks(failed=regions.broken)

    def write(self, bio: Bio) -> None:
        """Take a WRITE or WRITE_ZEROES whose offset is relative to the target; ends it."""
        write = RegionWrite(self, bio)
        # FAST_ZERO: fail rather than copy anything.
        if bio.flags & FAST_ZERO and write.gaps():
            bio.end(errnos.ENOTSUP)
            return
        self._queue.append(write)
        self._pump.run()
        if not write.has_payload_left:
            bio.own()  # it waits for its turn, a lock or the source, longer than the payload is lent
        elif bio.borrowed:
            bio.give_away()

    def push_back(self) -> list[Bio]:
        """Forget, and return, the bios that have not begun, in the order they came."""
        waiting, self._waiting = self._waiting, {}
        # Those that wait for a lock came before those that wait for their turn.
        bios = [*waiting.values(), *(write.bio for write in self._queue)]
        self._queue.clear()
        # A discard takes no turn.
        self._nr_running -= sum(bio.op != OP_DISCARD for bio in waiting.values())
        assert self._nr_running >= 0
        self.regions.prison.cancel(waiting)
        return bios

    def lock(
        self, begin: int, end: int, bio: Bio, granted: Callable[[Cell], None]
    ) -> None:
        """Ask for regions on behalf of `bio`, which can be pushed back until they are granted.

        `granted` calls `stop_waiting`.
        """
        cell = self.regions.prison.lock(begin, end, granted)
        if cell.blockers:
            self._waiting[cell] = bio

    def stop_waiting(self, cell: Cell) -> None:
        self._waiting.pop(cell, None)

    def write_hydrated(self, bio: Bio) -> None:
        """Send a WRITE, WRITE_ZEROES or DISCARD to the destination; its regions are hydrated.

        With FUA it waits for a commit first, if anything is not committed: otherwise it could
        be durable on a destination that a crash reverts to the source.
        """
        regions = self.regions
        if not bio.flags & FUA or regions.committer.is_clean:
            regions.destination.submit(bio)
            return
        bio.own()

        def committed(errno: int) -> None:
            if errno:
                bio.end(errno)
            else:
                regions.destination.submit(bio)

        regions.committer.after_commit(committed)

    def submit_children(self, children: Sequence[tuple[Device, Bio]]) -> None:
        """Submit a cut READ's children; when there are many, not all at once."""
        if len(children) <= CHILDREN_AT_ONCE_MAX:
            for device, child in children:
                device.submit(child)
        else:
            self.spawn(self._submit_in_turns(children))

    async def _submit_in_turns(self, children: Sequence[tuple[Device, Bio]]) -> None:
        for nr, (device, child) in enumerate(children, 1):
            device.submit(child)
            if nr % CHILDREN_AT_ONCE_MAX == 0:
                await asyncio.sleep(0)

    def discard(self, bio: Bio, begin: int, end: int, *, passdown: bool) -> None:
        """Take a DISCARD of the whole regions `begin` to `end`; ends it."""
        regions = self.regions

        def granted(cell: Cell) -> None:
            self.stop_waiting(cell)
            self.set_hydrated(begin, end, lambda errno: marked(cell, errno))

        def marked(cell: Cell, errno: int) -> None:
            # The bits count before the destination is told: what a discarded region reads is not promised.
            if errno or not passdown:
                ended(cell, errno)
                return
            at, stop = regions.span(begin, end)
            regions.destination.submit(
                Bio(
                    OP_DISCARD,
                    at,
                    stop - at,
                    None,
                    0,
                    lambda child: ended(cell, child.status),
                )
            )

        def ended(cell: Cell, errno: int) -> None:
            # Held until here, so that writes which waited for us come after the discard.
            regions.prison.release(cell)
            if errno == 0 and bio.flags & FUA:
                regions.committer.after_commit(bio.end)
            else:
                bio.end(errno)
            regions.wake()

        self.lock(begin, end, bio, granted)

    def set_hydrated(self, begin: int, end: int, done: Callable[[int], None]) -> None:
        """Set the bits of locked regions, many of them in turns; then call `done(errno)`."""
        if end - begin <= REGIONS_AT_ONCE_MAX:
            done(self._set_bits(begin, end))
        else:
            self.spawn(self._set_bits_in_turns(begin, end, done))

    async def _set_bits_in_turns(
        self, begin: int, end: int, done: Callable[[int], None]
    ) -> None:
        # Bounded by regions and not by runs: every other bit may be set already, so each costs its own work.
        at, errno = begin, 0
        try:
            while at < end and not errno:
                stop = min(at + REGIONS_AT_ONCE_MAX, end)
                errno = self._set_bits(at, stop)
                at = stop
                await asyncio.sleep(0)
        finally:
            done(errno if at == end else errno or errnos.EIO)

    def _set_bits(self, begin: int, end: int) -> int:
        try:
            self.regions.set_hydrated(begin, end)
        except MetadataError:
            return errnos.EIO
        return 0

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run what is too long for callbacks; ends before the bio that it works for does."""
        self._tasks.start(coroutine)

    def ended(self) -> None:
        """One write has left: the next may start."""
        self._nr_running -= 1
        assert self._nr_running >= 0
        self._pump.run()
        self.regions.wake()

    def _start_queued(self) -> None:
        while self._queue and self._nr_running < self.deferred_bios_max:
            self._nr_running += 1
            self._queue.popleft().start()


class RegionWrite:
    """One write on its way. See the module head.

    Attributes:
        first, last: the regions that it touches, half-open.
        has_payload_left: the bio's payload is not needed any more, or has an owner.
    """

    __slots__ = (
        "begin",
        "bio",
        "cell",
        "end",
        "error",
        "first",
        "foreground",
        "has_payload_left",
        "last",
        "merged",
        "merged_begin",
        "reads_left",
        "regions",
    )

    cell: Cell
    merged: memoryview
    merged_begin: int

    def __init__(self, foreground: Foreground, bio: Bio) -> None:
        self.foreground = foreground
        self.regions = foreground.regions
        self.bio = bio
        self.begin = bio.offset
        self.end = bio.offset + bio.length
        self.first = self.begin >> self.regions.shift
        self.last = ((self.end - 1) >> self.regions.shift) + 1
        self.has_payload_left = False
        self.reads_left = 0
        self.error: DeviceError | None = None

    def start(self) -> None:
        self.foreground.lock(self.first, self.last, self.bio, self._granted)

    def gaps(self) -> list[Gap]:
        """Return the parts of the range that must come from the source now."""
        regions = self.regions
        hydrated = regions.metadata.all_hydrated
        gaps = []
        region_begin, _ = regions.span(self.first, self.first + 1)
        if region_begin < self.begin and not hydrated(self.first, self.first + 1):
            gaps.append((region_begin, self.begin))
        _, region_end = regions.span(self.last - 1, self.last)
        if self.end < region_end and not hydrated(self.last - 1, self.last):
            gaps.append((self.end, region_end))
        return gaps

    def _granted(self, cell: Cell) -> None:
        self.foreground.stop_waiting(cell)
        self.cell = cell
        regions = self.regions
        if regions.has_failed:
            pass  # nothing may be asked of the metadata; it is refused below
        elif regions.metadata.all_hydrated(self.first, self.last):
            # A copy or another write was quicker. Only what hydrates needs the lock.
            regions.prison.release(cell)
            self.has_payload_left = True
            self.foreground.write_hydrated(self.bio)
            self.foreground.ended()
            return
        regions.nr_hydrating += self.last - self.first
        if not regions.is_writable:
            # A commit has failed while the lock was waited for: no bit can be recorded any more.
            self._leave(errnos.EIO)
            return
        # Asked with the lock held: nothing else hydrates these regions from here on.
        gaps = self.gaps()
        if not gaps:
            self._write_payload()
        elif self.bio.op == OP_WRITE and self._merged_length(gaps) <= MERGE_BYTES_MAX:
            self._read_gaps(gaps)
        else:
            self.foreground.spawn(self._copy_gaps(gaps))

    def _merged_length(self, gaps: list[Gap]) -> int:
        return self.bio.length + sum(end - begin for begin, end in gaps)

    def _read_gaps(self, gaps: list[Gap]) -> None:
        self.merged = memoryview(bytearray(self._merged_length(gaps)))
        self.merged_begin = at = min(self.begin, gaps[0][0])
        self.reads_left = len(gaps)
        for begin, end in gaps:
            view = self.merged[begin - at : end - at]
            self.regions.source.submit(
                Bio(OP_READ, begin, end - begin, view, 0, self._gap_read)
            )

    def _gap_read(self, child: Bio) -> None:
        if child.status:
            self.error = DeviceError(
                child.status,
                self.regions.source.name,
                OP_NAMES[OP_READ],
                child.offset,
                child.length,
            )
        self.reads_left -= 1
        if self.reads_left:
            return
        if self.error is not None:
            self.regions.note_error(self.first, self.last, self.error)
            self._leave(errnos.EIO)
            return
        # The payload goes over what was read into its place.
        payload = self.bio.payload
        assert payload is not None
        at = self.begin - self.merged_begin
        self.merged[at : at + len(payload)] = payload
        self.has_payload_left = True
        self.regions.destination.submit(
            Bio(
                OP_WRITE,
                self.merged_begin,
                len(self.merged),
                self.merged,
                0,
                self._written,
            )
        )

    async def _copy_gaps(self, gaps: list[Gap]) -> None:
        # EIO also stands for an unexpected exception: the bio ends, and the lock is released.
        errno = errnos.EIO
        try:
            for begin, end in gaps:
                await self.regions.copier.copy(begin, end - begin)
            errno = 0
        except CopyError as failure:
            self.regions.note_error(self.first, self.last, failure)
            if not failure.is_read:
                errno = failure.error.errno
        finally:
            if errno:
                self._leave(errno)
            else:
                self._write_payload()

    def _write_payload(self) -> None:
        bio = self.bio
        self.has_payload_left = True
        self.regions.destination.submit(
            Bio(
                bio.op,
                bio.offset,
                bio.length,
                bio.payload,
                bio.flags & ~FUA,
                self._written,
                None,
                bio.borrowed,
            )
        )

    def _written(self, child: Bio) -> None:
        if child.status:
            # The bits stay 0: the source counts, whatever has reached the destination.
            self._leave(child.status)
            return
        assert self.cell.held, "what hydrates locks"
        self.foreground.set_hydrated(self.first, self.last, self._leave)

    def _leave(self, errno: int) -> None:
        self.regions.nr_hydrating -= self.last - self.first
        assert self.regions.nr_hydrating >= 0
        self.regions.prison.release(self.cell)
        self.has_payload_left = True
        if errno == 0 and self.bio.flags & FUA:
            self.regions.committer.after_commit(self.bio.end)
        else:
            self.bio.end(errno)
        self.foreground.ended()
