# SPDX-License-Identifier: Apache-2.0
"""The NBD command CACHE: hydrates its range, and ends when that is done.

Theory of operation. A CACHE is cut into steps of `STEP_BYTES` (one region at least). Requests
take turns: the one in front makes one step and goes to the back, `STEPS_AT_ONCE_MAX` of them at a
time, so a client that asks for all of the disk does not keep another waiting for its
megabyte. A step locks its regions as a write does, waiting for older work on them, and then hydrates
what still is not.

It was asked for, so it does not depend on what the background may do: not on
`no_hydration`, threshold, rate or the back-off of regions that have failed. It counts as client
I/O, to which the background yields, and against the threshold as clients' writes do.

How a CACHE ends:

    0           its range is hydrated, and the destination was told that it will be read soon
    errno       of the first region that could not be hydrated; the others are, unless there were
                `ERRORS_PER_JOB_MAX` failures
    EIO         the metadata went read-only meanwhile

A suspend does not wait for more than the steps that are under way. A CACHE that is not done by then is given back to the mapped
device, and begins again when that is resumed: a client sees a pause, and no error.

Bounds: what waits here is bounded by the server's limits on requests in flight.
"""

import asyncio
import errno as errnos
from collections import deque
from collections.abc import Callable
from typing import Final

from nbdtarget.bio import OP_CACHE, Bio
from nbdtarget.common.turns import Tasks
from nbdtarget.targets.clone.holes import Holes
from nbdtarget.targets.clone.hydrator import ERRORS_PER_JOB_MAX, Hydrator
from nbdtarget.targets.clone.regions import Regions
from nbdtarget.targets.prison import Cell

__all__ = ["STEPS_AT_ONCE_MAX", "STEP_BYTES", "CacheRequests"]

STEP_BYTES: Final = 1 << 20
STEPS_AT_ONCE_MAX: Final = 4


class CacheRequests:
    """The CACHE bios of one clone. See the module head."""

    def __init__(
        self,
        regions: Regions,
        hydrator: Hydrator,
        *,
        give_back: Callable[[Bio], None],
        steps_at_once_max: int = STEPS_AT_ONCE_MAX,
    ) -> None:
        """Args: give_back: takes a bio, its offset relative to the target, that a suspend leaves undone."""
        assert steps_at_once_max > 0
        self.regions = regions
        self.hydrator = hydrator
        self._give_back = give_back
        self.steps_at_once_max = steps_at_once_max
        self._step_regions = max(1, STEP_BYTES >> regions.shift)
        self._queue: deque[_Request] = deque()
        self._steps = Tasks(failed=regions.broken, ended=self._step_ended)
        self._is_resumed = False

    def resume(self) -> None:
        self._is_resumed = True

    def push_back(self) -> list[Bio]:
        """Forget, and return, what waits for a turn."""
        queue, self._queue = self._queue, deque()
        return [request.bio for request in queue]

    def presuspend(self) -> None:
        """Give back what waits; what makes a step now follows when that has ended."""
        self._is_resumed = False
        queue, self._queue = self._queue, deque()
        for request in queue:
            self._next(request)

    async def quiesce(self) -> None:
        """Wait until no step is under way. After `presuspend`."""
        assert not self._is_resumed
        await self._steps.wait()

    def take(self, bio: Bio) -> None:
        """Take a CACHE whose offset is relative to the target; ends it."""
        assert bio.op == OP_CACHE
        self._queue.append(_Request(self.regions, bio))
        self._start_steps()

    def _start_steps(self) -> None:
        while self._queue and len(self._steps) < self.steps_at_once_max:
            self._steps.start(self._step(self._queue.popleft()))

    def _step_ended(self) -> None:
        self._start_steps()
        if not self._steps:
            self.regions.copier.drop_buffers()

    async def _step(self, request: "_Request") -> None:
        is_sound = False
        try:
            await self._hydrate_step(request)
            is_sound = True
        finally:
            if is_sound:
                self._next(request)
            else:
                request.bio.end(errnos.EIO)

    async def _hydrate_step(self, request: "_Request") -> None:
        """Hydrate the next regions of `request` that are not."""
        begin = request.maybe_next()
        if begin is None:
            return
        regions, holes = self.regions, request.holes
        end = min(begin + self._step_regions, request.end)
        await holes.look(regions.span(begin, end)[0])
        cell = await self._locked(begin, end)
        regions.nr_bios += 1
        regions.nr_hydrating += end - begin
        try:
            at: int | None = begin
            while regions.is_writable and at is not None and at < end:
                at = regions.metadata.maybe_next_unhydrated(at, end)
                if at is None:
                    break
                _, stop, _ = next(regions.metadata.runs(at, end))
                pieces = holes.pieces(*regions.span(at, stop))
                errors = await self.hydrator.hydrate(at, stop, pieces)
                request.note_errors(errors)
                at = stop
        finally:
            regions.nr_hydrating -= end - begin
            regions.prison.release(cell)
            regions.wake()
        request.at = end

    async def _locked(self, begin: int, end: int) -> Cell:
        waiting: asyncio.Future[Cell]
        waiting = asyncio.get_running_loop().create_future()

        def granted(cell: Cell) -> None:
            if waiting.done():  # it is, if this coroutine was cancelled
                self.regions.prison.release(cell)
            else:
                waiting.set_result(cell)

        self.regions.prison.lock(begin, end, granted)
        return await waiting

    def _next(self, request: "_Request") -> None:
        """End the request, or let it wait for its next turn."""
        bio = request.bio
        if request.errno and request.nr_errors >= ERRORS_PER_JOB_MAX:
            bio.end(request.errno)
        elif not self.regions.is_writable:
            bio.end(errnos.EIO)
        elif request.maybe_next() is None:
            if request.errno:
                bio.end(request.errno)
            else:
                self.regions.destination.submit(bio)
        elif self._is_resumed:
            self._queue.append(request)
        else:
            self._give_back(bio)


class _Request:
    """One CACHE on its way.

    Attributes:
        at, end: the regions that are still to be looked at.
        holes: of the source around there.
        errno, nr_errors: of the first failure, and how many there were.
    """

    __slots__ = ("at", "bio", "end", "errno", "holes", "nr_errors", "regions")

    def __init__(self, regions: Regions, bio: Bio) -> None:
        self.regions = regions
        self.bio = bio
        self.at = bio.offset >> regions.shift
        self.end = ((bio.offset + bio.length - 1) >> regions.shift) + 1
        self.holes = Holes(
            regions.source,
            length=regions.span(self.at, self.end)[1],
            region_size=regions.region_size,
        )
        self.errno = 0
        self.nr_errors = 0

    def maybe_next(self) -> int | None:
        """The first region that is not hydrated yet, if there is one."""
        if self.at >= self.end or not self.regions.is_writable:
            return None
        return self.regions.metadata.maybe_next_unhydrated(self.at, self.end)

    def note_errors(self, errors: list[int]) -> None:
        self.nr_errors += len(errors)
        if errors and not self.errno:
            self.errno = errors[0]
