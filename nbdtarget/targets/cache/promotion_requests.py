# SPDX-License-Identifier: Apache-2.0
"""Blocks that are to be cached whatever the policy thinks of it: the messages warm, pin and unpin, and CACHE.

Theory of operation. A request is a range of oblocks. Those that are not cached are promoted one after
another, as fast as migrations go; a full cache makes room by demoting what is coldest. A range
that is pinned has its blocks pinned as they come: the policy never demotes them. Blocks that
cannot be promoted are left out: for example because they are locked, or because there has been no room for
`PATIENCE_TICKS` (everything is pinned, or nothing can be written back).

An NBD command CACHE is a request, too. At most `RANGES_MAX` ranges wait. Beyond that a CACHE, which is only advice, is
ignored, and a message is refused.

What a crash leaves: pins are kept by a clean shutdown, with the policy's hints, and forgotten by a crash.
Requests that wait survive a suspend and resume of the same table. They are dropped when another table replaces it.
"""

import errno as errnos
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Final

from nbdtarget.common.clock import sleep
from nbdtarget.common.errors import TableError
from nbdtarget.policies.base import Work
from nbdtarget.targets.cache.blocks import Blocks

__all__ = ["PATIENCE_TICKS", "RANGES_MAX", "PromotionRequests"]

RANGES_MAX: Final = 1024
PATIENCE_TICKS: Final = 10
STEP_OBLOCKS: Final = 4096  # looked at between two turns of the loop

log = logging.getLogger(__name__)


class PromotionRequests:
    """See the module head."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._ranges: deque[list[int]] = deque()  # [next oblock, end, pin]
        self._to_pin: set[int] = set()  # oblocks that are being promoted
        self._ticks_without_room = 0
        self._lacks_room = False  # seen since the last tick

    @property
    def is_empty(self) -> bool:
        return not self._ranges

    def advise(self, begin: int, end: int) -> None:
        """A client says that it will read these oblocks soon."""
        if len(self._ranges) < RANGES_MAX and self._may_promote():
            self._ranges.append([begin, min(end, self._blocks.nr_oblocks), False])
            self._blocks.wake()

    def add(self, ranges: Iterable[tuple[int, int]], *, pin: bool) -> None:
        """Have these oblocks cached. Raises: TableError."""
        for begin, end in ranges:
            if len(self._ranges) >= RANGES_MAX:
                raise TableError("too many ranges wait to be cached", errnos.EBUSY)
            if not self._may_promote():
                raise TableError(
                    "this cache caches nothing new: it is in passthrough mode, or read-only",
                    errnos.EPERM,
                )
            self._ranges.append([begin, end, pin])
        self._blocks.wake()

    async def unpin(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Let these oblocks be demoted again, and forget that they should be pinned.

        Raises: TableError.
        """
        blocks = self._blocks
        for begin, end in ranges:
            self._unpin_ranges(begin, end)
            self._to_pin = {
                oblock for oblock in self._to_pin if not begin <= oblock < end
            }
            for nr, cblock in enumerate(self._cached_in(begin, end)):
                if cblock is not None and blocks.policy.is_pinned(cblock):
                    blocks.policy.unpin(cblock)
                if nr % STEP_OBLOCKS == 0:
                    await sleep(0)

    def _cached_in(self, begin: int, end: int) -> Iterator[int | None]:
        """Yield the cblocks of these oblocks, the shorter way round; None: nothing in this step."""
        metadata = self._blocks.metadata
        if end - begin < metadata.nr_cblocks:
            for oblock in range(begin, end):
                yield metadata.maybe_cblock(oblock)
            return
        for cblock in range(metadata.nr_cblocks):
            held = metadata.maybe_oblock(cblock)
            yield cblock if held is not None and begin <= held < end else None

    def _unpin_ranges(self, begin: int, end: int) -> None:
        """Change requests for blocks that are not cached yet: these oblocks are still requested, but will not be pinned."""
        ranges: deque[list[int]] = deque()
        for first, last, pin in self._ranges:
            cuts = sorted(
                {first, last, *(nr for nr in (begin, end) if first < nr < last)}
            )
            for at, stop in pairwise(cuts):
                ranges.append([at, stop, pin and not begin <= at < end])
        if len(ranges) > max(RANGES_MAX, len(self._ranges)):
            raise TableError("too many ranges wait to be cached", errnos.EBUSY)
        self._ranges = ranges

    def maybe_next(self, nr_demoting: int) -> Work | None:
        """Return the next promotion that is requested and possible now.

        Args: nr_demoting: demotions under way. No more room is made than there are blocks to come.
        """
        looked_at = 0
        while self._ranges:
            first = self._ranges[0]
            oblock, end, pin = first
            if oblock >= end or not self._may_promote():
                self._ranges.popleft()
                continue
            looked_at += 1
            if looked_at > STEP_OBLOCKS:
                self._blocks.wake()
                return None
            wants_room = self._wants_room(oblock)
            if wants_room and not self._wants_more_than(nr_demoting):
                return None
            work = self._maybe_promote(oblock, pin=bool(pin))
            if work is None and wants_room:
                self._lacks_room = True
                return None
            first[0] += 1
            self._ticks_without_room = 0
            if work is not None:
                return work
        return None

    def promoted(self, work: Work) -> None:
        """A promotion has ended well."""
        if work.oblock in self._to_pin:
            self._to_pin.discard(work.oblock)
            self._blocks.policy.pin(work.cblock)

    def failed(self, work: Work) -> None:
        """A promotion has not taken place. If the block is promoted later for another reason, it is not pinned."""
        self._to_pin.discard(work.oblock)

    def tick(self, *, is_migrating: bool) -> None:
        """A second has passed. While anything is migrated there may be room soon."""
        lacks_room, self._lacks_room = self._lacks_room, False
        if self._ranges and lacks_room and not is_migrating:
            self._ticks_without_room += 1
            if self._ticks_without_room > PATIENCE_TICKS:
                oblock, end, _ = self._ranges.popleft()
                self._ticks_without_room = 0
                log.warning(
                    "%s: no room to cache origin blocks %d-%d",
                    self._blocks.name,
                    oblock,
                    end,
                )

    def _may_promote(self) -> bool:
        blocks = self._blocks
        return blocks.is_writable and not blocks.is_passthrough

    def _maybe_promote(self, oblock: int, *, pin: bool) -> Work | None:
        blocks = self._blocks
        cblock = blocks.metadata.maybe_cblock(oblock)
        if cblock is not None:
            if pin:
                blocks.policy.pin(cblock)
            return None
        work = blocks.policy.maybe_promote(oblock)
        if work is not None and pin:
            self._to_pin.add(oblock)
        return work

    def _wants_room(self, oblock: int) -> bool:
        blocks = self._blocks
        is_full = blocks.policy.residency >= blocks.metadata.nr_cblocks
        return is_full and blocks.metadata.maybe_cblock(oblock) is None

    def _wants_more_than(self, nr_oblocks: int) -> bool:
        for begin, end, _ in self._ranges:
            nr_oblocks -= end - begin
            if nr_oblocks < 0:
                return True
        return False
