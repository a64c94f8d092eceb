# SPDX-License-Identifier: Apache-2.0
"""`BulkReads`: reads of a background copy, joined into few large requests.

Theory of operation. A copy submits chunks of a megabyte or less, many of them in one turn of the loop. Chunks that follow each other become
one request for `RANGE_BYTES_MIN` to `RANGE_BYTES_MAX`, so that the time to the first byte is paid for once in several megabytes. A chunk ends
as soon as its own bytes have arrived, and is written while the rest of the range comes.

*Adapting.* At first `REQUESTS_MIN` requests are under way at a time, and one more after each round of successes, as long as chunks
are waiting; half as many when the source is overloaded. With more requests each of them is for less, because what a copy has in
flight is bounded (`nbdtarget.targets.copier`).

*Order.* Chunks are asked for in the order in which they were submitted.
"""

import errno as errnos
from collections import deque
from functools import partial
from typing import Final

from nbdtarget.bio import Bio
from nbdtarget.common.errors import DeviceError
from nbdtarget.common.turns import Soon, Tasks
from nbdtarget.devices.ranged.fetcher import Fetcher
from nbdtarget.devices.ranged.options import REMOTE_IN_FLIGHT_BYTES
from nbdtarget.devices.ranged.slots import Slots

__all__ = ["RANGE_BYTES_MAX", "RANGE_BYTES_MIN", "REQUESTS_MIN", "BulkReads"]

RANGE_BYTES_MIN: Final = 1 << 20
RANGE_BYTES_MAX: Final = 8 << 20
REQUESTS_MIN: Final = 8


class BulkReads:
    """See the module head. Args: size: bytes of the image, without what rounds it up."""

    def __init__(
        self, fetcher: Fetcher, size: int, tasks: Tasks, *, connections: int
    ) -> None:
        self._fetcher = fetcher
        self._size = size
        self._tasks = tasks
        self._queue: deque[Bio] = deque()
        self._nr_running = 0
        self.slots = Slots(min(REQUESTS_MIN, connections), width_max=connections)
        self._start_soon = Soon(self._start)

    @property
    def nr_queued(self) -> int:
        return len(self._queue)

    @property
    def range_bytes(self) -> int:
        """How much one request asks for at most."""
        share = REMOTE_IN_FLIGHT_BYTES // self.slots.width
        return max(RANGE_BYTES_MIN, min(share, RANGE_BYTES_MAX))

    def take(self, bio: Bio) -> None:
        """Take a READ inside the device; ends it later."""
        bio.own()
        self._queue.append(bio)
        # In the next turn, when the chunks behind it are here, too.
        self._start_soon.ask()

    def give_up(self) -> None:
        """End what has not begun with EIO."""
        queue, self._queue = self._queue, deque()
        for bio in queue:
            bio.end(errnos.EIO)

    def _start(self) -> None:
        if not self._queue or self._nr_running >= self.slots.width:
            return
        run = _Run(self._next_run(), self._size)
        self._nr_running += 1
        task = self._tasks.start(self._fetch(run))
        # Not in the coroutine: one that is cancelled before its first step runs none of it.
        task.add_done_callback(partial(self._ended, run))
        # One a turn: to begin a request takes a millisecond, and a read that a client waits for is not to wait for eight of them.
        self._start_soon.ask()

    def _next_run(self) -> list[Bio]:
        run = [self._queue.popleft()]
        length = run[0].length
        while self._queue:
            bio = self._queue[0]
            if bio.offset != run[-1].offset + run[-1].length:
                break
            length += bio.length
            if length > self.range_bytes:
                break
            run.append(self._queue.popleft())
        return run

    async def _fetch(self, run: "_Run") -> None:
        begin, end = run.begin, run.end
        try:
            await self._fetcher.fetch(begin, end, run.take, self.slots, is_urgent=False)
        except DeviceError:
            return  # `_ended` ends what is left

    def _ended(self, run: "_Run", _: object) -> None:
        self._nr_running -= 1
        run.end_rest()
        if self._queue:
            self._start_soon.ask()


class _Run:
    """Chunks that follow each other, filled from the front."""

    def __init__(self, bios: list[Bio], size: int) -> None:
        self._left = deque(bios)
        self._filled = 0  # of the first one that is left
        self.begin = bios[0].offset
        self.end = min(bios[-1].offset + bios[-1].length, size)

    def take(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        while view:
            bio = self._left[0]
            payload = bio.payload
            assert payload is not None
            done = min(bio.length - self._filled, len(view))
            payload[self._filled : self._filled + done] = view[:done]
            self._filled += done
            view = view[done:]
            if self._filled == bio.length:
                self._left.popleft()
                self._filled = 0
                bio.end(0)
        self.begin += len(data)

    def end_rest(self) -> None:
        """Nothing more comes: what is not full ends with EIO, but for zeroes behind the end of the image."""
        is_all_here = self.begin == self.end
        while self._left:
            bio = self._left.popleft()
            if is_all_here:
                payload = bio.payload
                assert payload is not None
                payload[self._filled :] = bytes(bio.length - self._filled)
            self._filled = 0
            bio.end(0 if is_all_here else errnos.EIO)
