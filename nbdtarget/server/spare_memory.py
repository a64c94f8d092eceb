# SPDX-License-Identifier: Apache-2.0
"""`SpareMemory`: memory that clients have needed goes back to the system when they have ended, or need it no more.

Theory of operation. It stays resident in three places: in the `BufferPool`, whose buffers are kept for reuse; in the buffers that devices keep
for reuse; and in the heap of the C library, which keeps free pages between used ones. So for as long as buffers are kept, and once after
connections have ended, this class looks each LOOK_S seconds:

    buffers    that have not been needed since the last look are dropped
    the heap   is trimmed, if buffers were dropped or a connection has ended

A busy server, too, drops the buffers of devices and trims the heap of the event loop. It does so in short steps, and serves clients for STEP_S
between two steps (`heap.py`). The heaps of other threads can be trimmed only as a whole, and a thread that allocates may wait
meanwhile. So the server trims those only if no request came for QUIET_S. If one came, the next look tries again.

Memory of Python's own allocator stays. It gives 1 MiB back when no object is left in that MiB, and a few of the objects that were made while many
clients were there live on, for example in lists of objects for the next use.

A server that serves nothing has no timer.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

from nbdtarget.common.activity import all_batches
from nbdtarget.common.clock import Clock, Timer
from nbdtarget.common.heap import Heap
from nbdtarget.server.buffers import BufferPool

__all__ = ["LOOK_S", "QUIET_S", "STEP_S", "SpareMemory"]

LOOK_S: Final = 10.0
STEP_S: Final = 0.01
QUIET_S: Final = 0.25
STEP_BUFFERS: Final = 16  # of devices, that are dropped in one step


class Keeping(Protocol):
    """Buffers that devices keep for reuse, such as `AlignedBuffers`."""

    nr_kept_bytes: int

    def take_spare(self) -> list[memoryview]:
        """Return the buffers that nothing has needed since the last call; they are kept no longer."""
        ...


class SpareMemory:
    """See the module head.

    Args:
        heap: what is trimmed.
        kept: by devices.
        nr_batches: how many batches of requests have been received; the number only grows.
    """

    def __init__(
        self,
        clock: Clock,
        pool: BufferPool,
        heap: Heap,
        kept: Sequence[Keeping] = (),
        nr_batches: Callable[[], int] = all_batches,
    ) -> None:
        self._clock, self._pool, self._heap = clock, pool, heap
        self._kept = kept
        self._nr_batches = nr_batches
        self._nr_before = 0  # batches, when we began to look whether it is quiet
        self._steps: Iterator[None] = iter(())
        self._is_trim_wanted = False
        self._has_ended = False  # a connection, since the last look
        self._timer: Timer | None = None
        pool.begins_to_keep = self._look_later

    def connection_ended(self) -> None:
        self._has_ended = True
        self._look_later()

    def close(self) -> None:
        """The listener is closed: the process ends, or gets its memory back by itself."""
        self._pool.begins_to_keep = _nothing
        self._steps = iter(())  # what it held is freed
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self) -> None:
        if self._timer is None:
            self._timer = self._clock.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._timer = None
        nr_dropped = self._pool.drop_spare()
        spare = [buffer for each in self._kept for buffer in each.take_spare()]
        if nr_dropped or spare or self._has_ended:
            self._has_ended = False
            self._is_trim_wanted = True
            self._steps = self._give_back(spare)
            self._step()
        elif self._is_trim_wanted:
            self._await_quiet()
        elif self._keeps:
            self._look_later()

    @property
    def _keeps(self) -> bool:
        """Whether buffers are kept for reuse."""
        of_devices = any(each.nr_kept_bytes for each in self._kept)
        return of_devices or self._pool.nr_kept_bytes > 0

    def _give_back(self, spare: list[memoryview]) -> Iterator[None]:
        while spare:
            del spare[-STEP_BUFFERS:]
            yield
        yield from self._heap.steps()

    def _step(self) -> None:
        for _ in self._steps:
            self._timer = self._clock.call_later(STEP_S, self._step)
            return
        self._await_quiet()

    def _await_quiet(self) -> None:
        self._nr_before = self._nr_batches()
        self._timer = self._clock.call_later(QUIET_S, self._trim_if_quiet)

    def _trim_if_quiet(self) -> None:
        self._timer = None
        is_quiet = self._nr_batches() == self._nr_before
        self._is_trim_wanted = not is_quiet
        if self._is_trim_wanted or self._has_ended or self._keeps:
            self._look_later()
        if is_quiet:
            self._heap.trim()


def _nothing() -> None:
    """Do nothing: the listener is closed."""
