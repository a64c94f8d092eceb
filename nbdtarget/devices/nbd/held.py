# SPDX-License-Identifier: Apache-2.0
"""`HeldReads`: reads that wait while their device is lost, instead of ending with an error.

A device that is only read may do so, because a read can be sent again as often as it takes. They wait in the order in which they came, each for a bounded time.
"""

import errno as errnos
from collections import deque
from collections.abc import Callable

from nbdtarget.bio import Bio
from nbdtarget.common.clock import loop_time_s

__all__ = ["HeldReads"]


class HeldReads:
    """See the module head.

    Attributes:
        is_on: reads may be held now.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._bios: deque[tuple[float, Bio]] = deque()

    def __len__(self) -> int:
        return len(self._bios)

    def hold(self, bio: Bio, s_max: float) -> None:
        """Keep a READ. Args: s_max: seconds; 0: for ever."""
        bio.own()
        limit_s = loop_time_s() + s_max if s_max else float("inf")
        self._bios.append((limit_s, bio))

    def resume(self, submit: Callable[[Bio], None]) -> None:
        """Submit all of them again."""
        bios, self._bios = self._bios, deque()
        for _, bio in bios:
            submit(bio)

    def expire(self) -> None:
        """End those that have waited long enough with EIO."""
        now_s = loop_time_s()
        while self._bios and self._bios[0][0] <= now_s:
            self._bios.popleft()[1].end(errnos.EIO)

    def give_up(self) -> None:
        """End all of them with EIO, and hold no more."""
        self.is_on = False
        bios, self._bios = self._bios, deque()
        for _, bio in bios:
            bio.end(errnos.EIO)
