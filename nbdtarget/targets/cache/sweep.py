# SPDX-License-Identifier: Apache-2.0
"""The order in which dirty blocks are written back: the origin's, so that a disk need not seek.

Theory of operation. A sweep goes once through the blocks that were dirty when it began, by their place
on the origin. Blocks that have been cleaned or moved since, or are locked, are passed over; blocks that became dirty
since are for the next one. `clean_now` has one sweep follow another until a moment
comes at which nothing is dirty.

Gathering a million blocks takes time: it is done in steps of milliseconds, as is their sorting,
in runs that are merged when they are asked for; and passing over many in one step, too. A sweep takes
8 bytes for each dirty block, while it lasts.

Pure, but for giving other tasks their turn.
"""

from array import array
from collections.abc import Iterator
from heapq import merge
from itertools import islice
from typing import Final

from nbdtarget.common.clock import sleep
from nbdtarget.targets.cache.blocks import Blocks

__all__ = ["STEP_CBLOCKS", "Sweep"]

STEP_CBLOCKS: Final = 4096  # looked at between two turns of the loop: some milliseconds


class Sweep:
    """See the module head.

    Attributes:
        is_asked_for: `start` was called, and some block is still dirty.
        has_ended: there is no more to write back in this sweep; `gather` begins another one.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._is_asked_for = False
        self.has_ended = True
        self._order: Iterator[int] = iter(())  # oblocks

    @property
    def is_asked_for(self) -> bool:
        if self._is_asked_for and not self._blocks.metadata.nr_dirty:
            self._is_asked_for = False
        return self._is_asked_for

    def start(self) -> None:
        """Sweep until nothing is dirty."""
        self._is_asked_for = True

    def maybe_next(self) -> tuple[int, int] | None:
        """Return the next (oblock, cblock) to write back.

        None: this sweep has ended; or so many had been cleaned that others should have their turn.
        """
        metadata = self._blocks.metadata
        nr_passed_over = 0
        for oblock in islice(self._order, STEP_CBLOCKS):
            cblock = metadata.maybe_cblock(oblock)
            if cblock is not None and metadata.dirty[cblock]:
                return oblock, cblock
            nr_passed_over += 1
        self.has_ended = nr_passed_over < STEP_CBLOCKS
        return None

    async def gather(self) -> None:
        """Look for what is dirty now."""
        metadata = self._blocks.metadata
        runs = []
        dirty = metadata.dirty.search(1)
        while some := list(islice(dirty, STEP_CBLOCKS)):
            if not self._blocks.is_writable:
                return
            oblocks = map(metadata.maybe_oblock, some)
            runs.append(array("Q", sorted(nr for nr in oblocks if nr is not None)))
            await sleep(0)
        self._order = merge(*runs)
        self.has_ended = False
