# SPDX-License-Identifier: Apache-2.0
"""The order in which dirty blocks go home: the origin's, so that a disk need not seek.

Theory of operation. A sweep goes once through the blocks that were dirty when it began, by their place
on the origin, from where the last one stopped. What has been cleaned or moved since is passed over;
what became dirty since is for the next one. `clean_now` has one sweep follow another until a moment
comes at which nothing is dirty.

Gathering a million blocks takes time: it is done in steps of milliseconds, as is their sorting,
in runs that are merged when they are asked for. A sweep takes 16 bytes for each dirty block, while
it lasts.

Pure, but for giving other tasks their turn.
"""

from collections.abc import Iterator
from heapq import merge
from itertools import islice
from typing import Final

from nbdtarget.clock import sleep
from nbdtarget.targets.cache.blocks import Blocks

__all__ = ["Sweep"]

STEP_CBLOCKS: Final = 4096


class Sweep:
    """See the module head.

    Attributes:
        is_asked_for: until nothing is dirty, whatever else goes on.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._is_asked_for = False
        self._order: Iterator[tuple[int, int]] = iter(())

    @property
    def is_asked_for(self) -> bool:
        if self._is_asked_for and not self._blocks.metadata.nr_dirty:
            self._is_asked_for = False
        return self._is_asked_for

    def start(self) -> None:
        """Sweep until nothing is dirty."""
        self._is_asked_for = True

    def maybe_next(self) -> int | None:
        """Return the next cblock to write back; None: this sweep has ended, `gather` another."""
        metadata = self._blocks.metadata
        for oblock, cblock in self._order:
            if metadata.dirty[cblock] and metadata.maybe_oblock(cblock) == oblock:
                return cblock
        return None

    async def gather(self) -> None:
        """Look for what is dirty now."""
        metadata = self._blocks.metadata
        runs = []
        dirty = metadata.dirty.search(1)
        while some := list(islice(dirty, STEP_CBLOCKS)):
            run = []
            for cblock in some:
                oblock = metadata.maybe_oblock(cblock)
                if oblock is not None:
                    run.append((oblock, cblock))
            run.sort()
            runs.append(run)
            await sleep(0)
        self._order = merge(*runs)
