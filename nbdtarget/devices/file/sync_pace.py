# SPDX-License-Identifier: Apache-2.0
"""`SyncPace`: whether the syncs of a file are so quick that the event loop waits for the next one, or makes it itself.

Theory of operation. Handing a sync to another thread, going back to the event loop, and hearing of its end from there takes as long as the sync itself, on a
fast disk. So the loop waits for the thread right away, for QUICK_NS at most. It serves no other client meanwhile, so it does so only if all of this is true:

    asked for       the bio says ALONE: one client is busy, and asks for one thing at a time
    nothing else    no other sync of this file is under way
    recent          the last sync has ended less than RECENT_NS ago: there was no time to write much since, for this program or another one
    quick           each of the last STREAK syncs has taken at most QUICK_NS

A sync that was waited for and was not quick ends that: the next ones are not waited for, at first STREAK of them, after each further disappointment twice as
many, up to SKIP_MAX. QUICK_NS is what a client may wait for one READ of a slow disk anyway.

By the same rules the loop makes the sync itself, without any other thread, if the user asks for it (`Limits.inline_syncs` of the server, a key of the
configuration file): a disk that was quick, and hangs from one moment to the next, then stops the whole server in the middle of one sync, until the disk answers
or fails. Signals wait, too.
"""

from typing import Final

from nbdtarget.common.clock import perf_counter_ns

__all__ = ["QUICK_NS", "RECENT_NS", "SKIP_MAX", "STREAK", "SyncPace"]

QUICK_NS: Final = 500_000
RECENT_NS: Final = 1_000_000
STREAK: Final = 8
SKIP_MAX: Final = 1024


class SyncPace:
    """See the module head. Context: the loop."""

    __slots__ = ("_begun_ns", "_ended_ns", "_is_ours", "_left", "_skip")

    def __init__(self) -> None:
        self._left = (
            STREAK  # so many syncs are to be quick before the loop waits for one
        )
        self._skip = STREAK
        self._begun_ns = self._ended_ns = 0
        self._is_ours = False

    def begin(self, *, may_be_ours: bool) -> bool:
        """A sync begins. Returns whether the loop waits for it, or makes it; `ended` must follow in any case."""
        self._begun_ns = perf_counter_ns()
        self._is_ours = (
            may_be_ours
            and not self._left
            and self._begun_ns - self._ended_ns < RECENT_NS
        )
        return self._is_ours

    def ended(self) -> None:
        """The sync has ended."""
        self._ended_ns = perf_counter_ns()
        if self._ended_ns - self._begun_ns <= QUICK_NS:
            self._left = max(self._left - 1, 0)
        elif self._is_ours:
            self._skip = min(2 * self._skip, SKIP_MAX)
            self._left = self._skip
        else:
            self._left = max(self._left, STREAK)
