# SPDX-License-Identifier: Apache-2.0
"""`SpareMemory`: memory that clients have needed goes back to the system when they have ended, or need it no more.

Theory of operation. It stays resident in two places: in the `BufferPool`, whose buffers are kept for reuse, and in the heap of the C
library, which keeps free pages between used ones. So for as long as the pool keeps something, and once after connections have ended,
this class looks each LOOK_S seconds:

    the pool   drops each buffer that has not been needed since the last look
    the heap   is trimmed, if the pool has dropped something or a connection has ended

While the heap is trimmed, the event loop may wait for it (`heap.py`). So it is trimmed only if no request came for QUIET_S. If one came, the next look
tries again.

A server that serves nothing has no timer.
"""

from collections.abc import Callable
from typing import Final

from nbdtarget.common.activity import all_batches
from nbdtarget.common.clock import Clock, Timer
from nbdtarget.server.buffers import BufferPool

__all__ = ["LOOK_S", "QUIET_S", "SpareMemory"]

LOOK_S: Final = 10.0
QUIET_S: Final = 0.25


class SpareMemory:
    """See the module head.

    Args:
        trim: gives free pages of the heap back.
        nr_batches: how many batches of requests have been received; the number only grows.
    """

    def __init__(
        self,
        clock: Clock,
        pool: BufferPool,
        trim: Callable[[], None],
        nr_batches: Callable[[], int] = all_batches,
    ) -> None:
        self._clock, self._pool, self._trim = clock, pool, trim
        self._nr_batches = nr_batches
        self._nr_before = 0  # batches, when we began to look whether it is quiet
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
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self) -> None:
        if self._timer is None:
            self._timer = self._clock.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._timer = None
        nr_dropped = self._pool.drop_spare()
        if nr_dropped or self._has_ended:
            self._has_ended = False
            self._is_trim_wanted = True
        if self._is_trim_wanted:
            self._nr_before = self._nr_batches()
            self._timer = self._clock.call_later(QUIET_S, self._trim_if_quiet)
        elif self._pool.nr_kept_bytes:
            self._look_later()

    def _trim_if_quiet(self) -> None:
        self._timer = None
        is_quiet = self._nr_batches() == self._nr_before
        self._is_trim_wanted = not is_quiet
        if self._is_trim_wanted or self._has_ended or self._pool.nr_kept_bytes:
            self._look_later()
        if is_quiet:
            self._trim()


def _nothing() -> None:
    """What is kept stays."""
