# SPDX-License-Identifier: Apache-2.0
"""The background tracker: which migrations are queued or under way.

    queue -> queued -> issue -> issued -> complete
                \\-> cancel

There is at most one migration for each oblock, and at most `pending_max` in all, queued and issued together.
The newest one is issued first, because the access that asked for it is the one most likely to be repeated.
"""

from typing import Final

from nbdtarget.policies.base import DEMOTE, Work

__all__ = ["PENDING_MAX", "BackgroundTracker"]

PENDING_MAX: Final = 4096


class BackgroundTracker:
    """The migrations of one policy.

    Attributes:
        nr_demotions: demotions that are queued or issued.
    """

    def __init__(self, pending_max: int = PENDING_MAX) -> None:
        self.pending_max = pending_max
        self.nr_demotions = 0
        self._pending: dict[int, Work] = {}
        self._queued: list[Work] = []

    def __len__(self) -> int:
        """How many migrations are queued or issued."""
        return len(self._pending)

    def __contains__(self, oblock: int) -> bool:
        return oblock in self._pending

    def start(self, work: Work) -> bool:
        """Take `work` as issued. Returns False, and does nothing, if there would be too many."""
        if work.oblock in self._pending or len(self._pending) >= self.pending_max:
            return False
        self._pending[work.oblock] = work
        if work.op == DEMOTE:
            self.nr_demotions += 1
        return True

    def queue(self, work: Work) -> bool:
        """Queue `work`. Returns False, and does nothing, if there would be too many."""
        if not self.start(work):
            return False
        self._queued.append(work)
        return True

    def issue(self) -> Work | None:
        """Issue the newest queued work, if there is any."""
        return self._queued.pop() if self._queued else None

    def complete(self, work: Work) -> None:
        """Issued `work` has ended, with success or without."""
        assert self._pending.get(work.oblock) is work, f"{work!r} is not under way"
        del self._pending[work.oblock]
        if work.op == DEMOTE:
            self.nr_demotions -= 1

    def cancel(self, oblock: int) -> Work | None:
        """Drop the queued work of `oblock` and return it. None: it has none, or it is issued already."""
        work = self._pending.get(oblock)
        if work is None or work not in self._queued:
            return None
        self._queued.remove(work)
        self.complete(work)
        return work

    def cancel_demotion(self, oblock: int) -> bool:
        """Drop the queued work of `oblock` if it is a demotion. Returns whether it was dropped."""
        work = self._pending.get(oblock)
        return (
            work is not None and work.op == DEMOTE and self.cancel(oblock) is not None
        )
