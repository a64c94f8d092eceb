# SPDX-License-Identifier: Apache-2.0
"""`SyncPace`: whether the syncs of a file are so quick that the event loop waits for the next one.

Theory of operation. Handing a sync to another thread, going back to the event loop, and hearing of its end from there takes as long as the sync itself, on a
fast disk. So the compiled path (`Plane._sync_alone`) waits for the thread right away, for QUICK_NS at most. The loop serves no other client meanwhile, so this
is done only if all of this is true:

    asked for       one client is busy, and asks for one thing at a time; the compiled path knows
    nothing else    no other sync of this file is under way; `Syncs` knows
    quick           each of the last STREAK syncs has taken at most QUICK_NS

The thread then goes on in the place of the loop, which waits on: it takes the next requests of that client, too, until anything else comes that the loop waits for, and for two
milliseconds at most (`Plane._serve_on`). Each of these syncs is waited for like the first one. So a disk that hangs from one moment to the next holds up the loop for QUICK_NS, and no sync of a file is
ever made by the thread of the loop.

A sync that was waited for in vain ends that: so many of the next ones are not waited for, at first STREAK of them, after each further disappointment twice as
many, up to SKIP_MAX. If FORGIVEN syncs have been worth the wait since the last disappointment, it is STREAK again. QUICK_NS is what a client may wait for one
READ of a slow disk anyway.
"""

from typing import Final

from nbdtarget.common.clock import perf_counter_ns

__all__ = ["FORGIVEN", "QUICK_NS", "SKIP_MAX", "STREAK", "SyncPace"]

QUICK_NS: Final = 500_000
STREAK: Final = 8
SKIP_MAX: Final = 1024
FORGIVEN: Final = 64


class SyncPace:
    """See the module head. Context: the loop."""

    __slots__ = ("_begun_ns", "_left", "_skip")

    def __init__(self) -> None:
        self._left = STREAK  # so many syncs are to be quick before one is waited for
        self._skip = STREAK
        self._begun_ns = 0

    @property
    def is_quick(self) -> bool:
        """Whether the next sync is worth waiting for."""
        return not self._left

    def begin(self) -> None:
        """A sync begins in the background, and the loop does not wait for it. The caller calls `ended` when it is over."""
        self._begun_ns = perf_counter_ns()

    def ended(self) -> None:
        """That sync has ended."""
        if perf_counter_ns() - self._begun_ns <= QUICK_NS:
            self._left = max(self._left - 1, 0)
        else:
            self._left = max(self._left, STREAK)

    def waited_in_vain(self, nr_worth: int) -> None:
        """A sync was waited for, and was not quick.

        Args: nr_worth: how many were, since the last one that was not.
        """
        if nr_worth >= FORGIVEN:
            self._skip = STREAK
        else:
            self._skip = min(2 * self._skip, SKIP_MAX)
        self._left = self._skip
