# SPDX-License-Identifier: Apache-2.0
"""Background hydration: copies regions that no client has written to, read or asked for.

Theory of operation. One task looks for work, from a remembered offset on and around the end;
each job it finds runs as a task of its own:

    data   a run of unhydrated, unlocked regions, up to `batch_size` and the room that is left
           under `threshold`: data is copied, zeroes inside are written as zeroes
    zeroes a run of regions that are a hole in the source, of any length up to a window: one
           `write_zeroes` for all of them, no copy. Counts as one region

    job:   lock the run -> fill it on the destination -> set its bits -> unlock

Nothing else writes to a run while it is locked and unhydrated, and bits are set only when
all writes of the job have ended. A crash or an error before that costs only the work.

Threshold, as the kernel counts: all regions that are being hydrated, those of clients' own writes
included, plus the ones that a new batch would add, do not exceed it. Threshold 0 stops the
background. A batch is not cut short while another job runs that will make more room.

Regions that clients have read go first, if `hydrate_on_read` is set: `ReadQueue`. Those regions are
copied also when the background is not enabled, and then nothing else is.

A source that can only be read forward (`Device.is_forward_only`) is copied in order, and nothing goes first.

Regions that an earlier boot has read (`hydrate_first`) go next, in its order. Clients are likely to want them soon, so they do not give
way to clients.

Rate. The bytes that jobs copy are charged to a `Rate`, zeroes only where the destination cannot but
write them.

Clients first. While client I/O arrives (something came in the last `QUIET_S`), only one
job runs at a time, of `BUSY_BYTES_MAX` at most, with a rest of three times its duration after
it: clients keep three quarters of the time, yet hydration goes on under any load. After `QUIET_S`
of silence it is at full speed again. (The kernel stops altogether while any I/O is in flight, and
may take a second to go on: a busy disk is never hydrated, a quiet one late.) A source that keeps clients' reads apart
(`Device.has_lanes`: a distant one) is copied at full speed all the time: it is slow because it is far away, and not because it is busy.

Errors. A range that fails is left alone for a while (`Hydrator`, `Failures`). When job after job fails
altogether (a dead device), the whole hydration slows down too.

A source that was replaced (`Device.changed`) ends the hydration for good: what has been copied is of the right image, and
nothing of another one may be added. Loading the table anew opens the source again, and compares it with what is recorded.

The end. When the last bit is set a commit is started at once; the target sees the committed bits
full and raises the event. Here the task just ends; `wake` starts another if need be.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Final

from nbdtarget.common.clock import Clock, Timer
from nbdtarget.common.turns import Tasks
from nbdtarget.targets.clone.holes import WINDOW_BYTES_MIN, Holes, Piece
from nbdtarget.targets.clone.hydrator import Hydrator
from nbdtarget.targets.clone.read_queue import ReadQueue
from nbdtarget.targets.clone.regions import Regions
from nbdtarget.targets.clone.table import Options
from nbdtarget.targets.prison import Cell
from nbdtarget.targets.rate import Rate

__all__ = ["Hydration"]

QUIET_S: Final = 0.010
# Of one job while clients are active: what they want of a slow source comes after it.
BUSY_BYTES_MAX: Final = 1 << 20
REST_FACTOR: Final = 3
REST_S_MAX: Final = 0.100
SCAN_REGIONS_MAX: Final = 1 << 25  # bits looked through between two turns of the loop
SCAN_RUNS_MAX: Final = 256  # that wait, or that are locked: a millisecond or so
ZERO_REGIONS_MAX: Final = 1 << 25
ZERO_BYTES_SLOW_MAX: Final = 4 << 20  # where the destination must write its zeroes
FAILED_JOBS_FREE: Final = 8  # failed in a row before hydration slows down
SLOW_S_MIN: Final = 0.1
SLOW_S_MAX: Final = 10.0
_NS: Final = 1_000_000_000


class Hydration:
    """The background hydration of one clone. See the module head.

    Attributes:
        enabled, threshold, batch_size, rate: as the messages set them; call `wake` after a
            change.
        hydrate_on_read: whether `note_read` should be called.
        slow_until_ns: when the next job may start at the soonest, after many have failed.
    """

    def __init__(
        self, regions: Regions, hydrator: Hydrator, clock: Clock, options: Options
    ) -> None:
        self.regions = regions
        self.hydrator = hydrator
        self.clock = clock
        self.enabled = options.hydration
        self.hydrate_on_read = options.hydrate_on_read
        self.threshold = options.hydration_threshold
        self.batch_size = options.hydration_batch_size
        self.rate = Rate(clock, options.hydration_rate)
        self._failures = hydrator.failures
        self._holes = Holes(
            regions.source, length=regions.length, region_size=regions.region_size
        )
        self._reads = ReadQueue()
        # Reads jump about: a look at a gigabyte of extents for each would cost more than it.
        self._read_holes = Holes(
            regions.source,
            length=regions.length,
            region_size=regions.region_size,
            window_bytes_max=WINDOW_BYTES_MIN,
        )
        self._is_resumed = False
        self._offset = 0
        self._first: deque[tuple[int, int]] = deque()  # regions, in the order wanted
        self._search = Tasks(failed=regions.broken, ended=self.wake)  # one at most
        self._jobs = Tasks(failed=regions.broken, ended=self._job_ended)
        self._woken = asyncio.Event()
        self._bios_seen = 0
        self._busy_until_ns = 0
        self._rest_until_ns = 0
        self.slow_until_ns = 0
        self._nr_failed_jobs = 0
        regions.wake = self.wake

    @property
    def nr_jobs(self) -> int:
        return len(self._jobs)

    def resume(self) -> None:
        """Start, if there is anything to do."""
        self._is_resumed = True
        self.wake()

    def presuspend(self) -> None:
        """Start no more jobs; those under way go on."""
        self._is_resumed = False
        self._woken.set()

    async def quiesce(self) -> None:
        """Wait until no job is under way. After `presuspend`."""
        assert not self._is_resumed
        await self._search.wait()  # first, as it starts the jobs
        await self._jobs.wait()
        self._rest()
        await self.regions.background.quiesce()

    def wake(self) -> None:
        """Something has changed that may let a job start."""
        if self._search:
            self._woken.set()
        elif self._may_run():
            self._search.start(self._run())

    def note_read(self, begin: int, end: int) -> None:
        """Regions `begin` to `end`, not all of them hydrated, are being read."""
        if self.regions.source.is_forward_only:
            return
        was_idle = not self._reads
        self._reads.push(begin, end)
        if was_idle:
            self.wake()

    def hydrate_first(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Hydrate these regions, begin and end half-open, before the others, in this order."""
        if self.regions.source.is_forward_only:
            return
        nr_regions = self.regions.nr_regions
        self._first.extend(
            (begin, min(end, nr_regions)) for begin, end in ranges if begin < nr_regions
        )
        self.wake()

    def forget_reads(self) -> None:
        """`hydrate_on_read` is over: what has been read has no precedence any more."""
        self._reads.clear()

    def _may_run(self) -> bool:
        regions = self.regions
        return (
            self._is_resumed
            and (self.enabled or bool(self._reads))
            and self.threshold > 0
            and regions.is_writable
            and not regions.source.changed
            and regions.metadata.nr_hydrated < regions.nr_regions
        )

    async def _run(self) -> None:
        try:
            while self._may_run():
                self._woken.clear()
                delay_ns = self._delay_ns()
                if delay_ns == 0:
                    looked_ns = self.clock.now_ns()
                    if await self._start_job():
                        await asyncio.sleep(0)
                        continue
                    delay_ns = self._retry_delay_ns(looked_ns)
                if self._may_run():
                    await self._wait(delay_ns)
        except asyncio.CancelledError:
            self._is_resumed = False  # the loop is being torn down: start nothing more
            raise

    async def _wait(self, delay_ns: int | None) -> None:
        """Wait for `wake`, or until the delay is over; None: there is none."""
        timer: Timer | None = None
        if delay_ns is not None:
            timer = self.clock.call_later(delay_ns / _NS, self._woken.set)
        try:
            await self._woken.wait()
        finally:
            if timer is not None:
                timer.cancel()

    def _delay_ns(self) -> int | None:
        """Return 0 if a job may start now; else for how long none may, None: until woken."""
        now_ns = self.clock.now_ns()
        room = self.threshold - self.regions.nr_hydrating
        if room <= 0:
            return None
        if self._jobs and room < min(max(self.batch_size, 1), self.threshold):
            return None
        until_ns = max(self.slow_until_ns, self.rate.ready_ns)
        if self.regions.nr_bios != self._bios_seen:
            self._bios_seen = self.regions.nr_bios
            self._busy_until_ns = now_ns + int(QUIET_S * _NS)
        if now_ns < self._busy_until_ns and self._gives_way:
            # With a job under way, until clients are quiet: it may take its time.
            rest_ns = self._busy_until_ns if self._jobs else self._rest_until_ns
            until_ns = max(until_ns, rest_ns)
        return max(0, until_ns - now_ns)

    @property
    def _gives_way(self) -> bool:
        """Whether the next job takes its time while clients are active."""
        return not self._first and not self.regions.source.has_lanes

    def _retry_delay_ns(self, looked_ns: int) -> int | None:
        """Return for how long nothing will be due that was not when we looked."""
        if not self.enabled:
            return None
        retry_ns = self._failures.maybe_retry_ns(looked_ns)
        return None if retry_ns is None else max(0, retry_ns - self.clock.now_ns())

    async def _start_job(self) -> bool:
        """Find the next run of regions and start a job for it; False if there is none."""
        run = self._maybe_read_run()
        if run is not None:
            return await self._start_read_job(*run)
        if not self.enabled:
            return False
        run = self._maybe_first_run()
        if run is not None:
            return await self._start_read_job(*run, is_wanted=False)
        return await self._start_next_job()

    def _maybe_first_run(self) -> tuple[int, int] | None:
        """Return the next of the regions that are to be hydrated first, or None."""
        while self._first:
            run = self._maybe_run(*self._first[0])
            if run is not None:
                return run
            # It is hydrated or locked, or it has failed a moment ago: then it comes in its turn.
            self._first.popleft()
        return None

    def _maybe_read_run(self) -> tuple[int, int] | None:
        """Return what should be hydrated of that which was read last, or None."""
        while self._reads:
            begin, end = self._reads.front()
            run = self._maybe_run(begin, end)
            if run is not None:
                return run
            # It is hydrated or locked, or it has failed a moment ago.
            self._reads.drop(begin)
        return None

    async def _start_read_job(
        self, begin: int, end: int, *, is_wanted: bool = True
    ) -> bool:
        holes = self._read_holes
        await holes.look(self.regions.span(begin, end)[0])
        run = self._maybe_run(begin, end)  # things may have moved on meanwhile
        if not self._may_run() or self.regions.nr_hydrating >= self.threshold:
            return False
        if run is not None:
            self._start(*run, holes, is_wanted=is_wanted)
        return True

    async def _start_next_job(self) -> bool:
        regions = self.regions
        begin_at = self._offset
        for first, last in ((begin_at, regions.nr_regions), (0, begin_at)):
            while first < last:
                stop = min(first + SCAN_REGIONS_MAX, last)
                run, stop = self._look_for_run(first, stop)
                if run is None:
                    first = stop
                    await asyncio.sleep(0)
                    continue
                at, _ = regions.span(*run)
                if not self._holes.covers(at):
                    await self._holes.look(at)
                    continue  # look again: the regions have moved on meanwhile
                if not self._may_run() or regions.nr_hydrating >= self.threshold:
                    return False
                end = self._start(*run, self._holes)
                self._offset = end % regions.nr_regions
                return True
        return False

    def _maybe_run(self, begin: int, end: int) -> tuple[int, int] | None:
        """Return the first run of regions that a job may take, or None."""
        while begin < end:
            run, begin = self._look_for_run(begin, end)
            if run is not None:
                return run
        return None

    def _look_for_run(self, begin: int, end: int) -> tuple[tuple[int, int] | None, int]:
        """As `_maybe_run`, but look at a bounded number of runs; and where it has stopped."""
        regions = self.regions
        if not regions.is_writable:
            return None, end
        now_ns = self.clock.now_ns()
        for _ in range(SCAN_RUNS_MAX):
            if begin >= end:
                break
            unhydrated = regions.metadata.maybe_next_unhydrated(begin, end)
            if unhydrated is None:
                return None, end
            stop = min(unhydrated + ZERO_REGIONS_MAX, end)
            _, stop, _ = next(regions.metadata.runs(unhydrated, stop))
            run = regions.prison.maybe_clear_run(unhydrated, stop)
            if run is not None:
                run = self._failures.maybe_clear_run(*run, now_ns)
            if run is not None:
                return run, begin
            begin = stop
        return None, begin

    def _start(
        self, begin: int, end: int, holes: Holes, *, is_wanted: bool = False
    ) -> int:
        """Start a job for the run, or for its beginning; return where that ends."""
        regions = self.regions
        zero_end = min(end, self._zero_regions_end(begin, holes))
        if zero_end > begin:
            end, weight = zero_end, 1
        else:
            room = self.threshold - regions.nr_hydrating
            end = min(end, begin + max(1, min(self.batch_size, room)))
            if self.clock.now_ns() < self._busy_until_ns and self._gives_way:
                end = min(end, begin + max(1, BUSY_BYTES_MAX >> regions.shift))
            if (bytes_max := self.rate.job_bytes_max) is not None:
                end = min(end, begin + max(1, bytes_max >> regions.shift))
            weight = end - begin
        # No await since `_look_for_run`: what it has found still holds.
        cell = regions.prison.maybe_lock(begin, end)
        assert cell is not None, "it was clear a moment ago"
        assert regions.metadata.none_hydrated(begin, end)
        pieces = holes.pieces(*regions.span(begin, end))
        self.rate.charge(self._cost(pieces))
        regions.nr_hydrating += weight
        self._jobs.start(self._job(cell, weight, pieces, is_wanted=is_wanted))
        return end

    def _cost(self, pieces: list[Piece]) -> int:
        """Return the bytes that have to be moved."""
        is_free = self.regions.destination.can_write_zeroes
        return sum(end - begin for begin, end, zero in pieces if not (zero and is_free))

    def _zero_regions_end(self, begin: int, holes: Holes) -> int:
        """Return where the whole regions of zeroes that begin at `begin` end."""
        regions = self.regions
        at, _ = regions.span(begin, begin + 1)
        zero_end = holes.zero_until(at)
        if not regions.destination.can_write_zeroes:
            bound = ZERO_BYTES_SLOW_MAX
            if (bytes_max := self.rate.job_bytes_max) is not None:
                bound = min(bound, bytes_max)
            zero_end = min(zero_end, at + max(bound, regions.region_size))
        if zero_end >= regions.length:
            return regions.nr_regions
        return zero_end >> regions.shift

    async def _job(
        self, cell: Cell, weight: int, pieces: list[Piece], *, is_wanted: bool
    ) -> None:
        regions = self.regions
        begun_ns = self.clock.now_ns()
        assert cell.held, "the hydrator writes to what is locked only"
        hydrated = regions.metadata.nr_hydrated
        try:
            errors = await self.hydrator.hydrate(
                cell.begin, cell.end, pieces, is_wanted=is_wanted
            )
        finally:
            regions.nr_hydrating -= weight
            regions.prison.release(cell)
            assert regions.nr_hydrating >= 0
        now_ns = self.clock.now_ns()
        rest_ns = min(REST_FACTOR * (now_ns - begun_ns), int(REST_S_MAX * _NS))
        self._rest_until_ns = now_ns + rest_ns
        if not errors or regions.metadata.nr_hydrated > hydrated:
            self._nr_failed_jobs = 0  # some of it was copied: the devices are alive
            return
        self._nr_failed_jobs += 1
        doublings = self._nr_failed_jobs - FAILED_JOBS_FREE
        if doublings >= 0:
            slow_s = min(SLOW_S_MIN * 2 ** min(doublings, 16), SLOW_S_MAX)
            self.slow_until_ns = now_ns + int(slow_s * _NS)

    def _job_ended(self) -> None:
        if not self._jobs and not self._may_run():
            self._rest()
        self.wake()

    def _rest(self) -> None:
        self.regions.copier.drop_buffers()
        self.regions.background.rest()
