# SPDX-License-Identifier: Apache-2.0
"""What people want to be cached, whatever the policy thinks of it: warm, pin, unpin.

Theory of operation. A wish is a range of oblocks. Those that are not cached are promoted one after
another, at the pace of the migrations; a full cache makes room by demoting what is coldest. A range
that is pinned has its blocks pinned as they come: the policy never demotes them. Blocks that
cannot be promoted are left out: somebody works on them, or there has been no room for `PATIENCE_TICKS`
(everything is pinned, or nothing can be written back).

A client's CACHE request is a wish, too. Wishes beyond `WISHES_MAX` are not taken: a client's is only
advice, a message is refused.

What a crash leaves: pins are kept by a clean shutdown, with the policy's hints, and forgotten by a crash.
Wishes that are not fulfilled are forgotten by a suspend of the table that got them only if it is replaced.
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

__all__ = ["PATIENCE_TICKS", "WISHES_MAX", "Wishes"]

WISHES_MAX: Final = 1024
PATIENCE_TICKS: Final = 10
STEP_OBLOCKS: Final = 4096  # looked at between two turns of the loop

log = logging.getLogger(__name__)


class Wishes:
    """See the module head."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._wishes: deque[list[int]] = deque()  # [next oblock, end, pin]
        self._to_pin: set[int] = set()  # oblocks that are being promoted
        self._ticks_without_room = 0
        self._lacks_room = False  # seen since the last tick

    @property
    def is_empty(self) -> bool:
        return not self._wishes

    def advise(self, begin: int, end: int) -> None:
        """A client says that it will read these oblocks soon."""
        if len(self._wishes) < WISHES_MAX and self._may_promote():
            self._wishes.append([begin, min(end, self._blocks.nr_oblocks), False])
            self._blocks.wake()

    def add(self, ranges: Iterable[tuple[int, int]], *, pin: bool) -> None:
        """Have these oblocks cached. Raises: TableError."""
        for begin, end in ranges:
            if len(self._wishes) >= WISHES_MAX:
                raise TableError("too many ranges wait to be cached", errnos.EBUSY)
            if not self._may_promote():
                raise TableError("this cache promotes nothing", errnos.EPERM)
            self._wishes.append([begin, end, pin])
        self._blocks.wake()

    async def unpin(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Let these oblocks be demoted again, and forget that they should be pinned.

        Raises: TableError.
        """
        blocks = self._blocks
        for begin, end in ranges:
            self._unpin_wishes(begin, end)
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

    def _unpin_wishes(self, begin: int, end: int) -> None:
        """Of what is not cached yet: these oblocks are still wished for, but not pinned then."""
        wishes: deque[list[int]] = deque()
        for first, last, pin in self._wishes:
            cuts = sorted(
                {first, last, *(nr for nr in (begin, end) if first < nr < last)}
            )
            for at, stop in pairwise(cuts):
                wishes.append([at, stop, pin and not begin <= at < end])
        if len(wishes) > max(WISHES_MAX, len(self._wishes)):
            raise TableError("too many ranges wait to be cached", errnos.EBUSY)
        self._wishes = wishes

    def maybe_next(self, nr_demoting: int) -> Work | None:
        """Return the next promotion that is wished for and possible now.

        Args: nr_demoting: demotions under way. No more room is made than there are blocks to come.
        """
        looked_at = 0
        while self._wishes:
            wish = self._wishes[0]
            oblock, end, pin = wish
            if oblock >= end or not self._may_promote():
                self._wishes.popleft()
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
            wish[0] += 1
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
        """A promotion has not taken place: whoever promotes the block later pins it for nobody."""
        self._to_pin.discard(work.oblock)

    def tick(self, *, is_migrating: bool) -> None:
        """A second has passed. While anything is migrated there may be room soon."""
        lacks_room, self._lacks_room = self._lacks_room, False
        if self._wishes and lacks_room and not is_migrating:
            self._ticks_without_room += 1
            if self._ticks_without_room > PATIENCE_TICKS:
                oblock, end, _ = self._wishes.popleft()
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
        for begin, end, _ in self._wishes:
            nr_oblocks -= end - begin
            if nr_oblocks < 0:
                return True
        return False
