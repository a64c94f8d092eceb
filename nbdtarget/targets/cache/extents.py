# SPDX-License-Identifier: Apache-2.0
"""The block status of a cache: where zeroes are, and what is cached.

*Extents* (on the wire `base:allocation`). A range that is not cached is described by the origin. A cached block is
reported as data. The origin is not asked about it, not even if it is clean, because a DISCARD that
was passed down leaves the cached copy as it is. The cache device is not asked, either: block by block that would
cost more than it saves, since what is read often is seldom zeroes. In passthrough mode all is read from
the origin. A HOLE is reported only together with ZERO: widely used clients take "hole, but not
zero" for "nothing there" and skip the data.

The cached blocks are looked up first, and the origin is asked after that. In the other order, a
dirty block could be written back and demoted in between, and would then be reported as the zeroes that the
origin had there before.

*Cache* (on the wire `x-nbdtarget:cache`). Two bits, so three values:

    0  not cached: the origin is read; so is every range that is not part of a cache
    1  CACHE_CACHED
    3  CACHE_CACHED | CACHE_DIRTY: the origin may not have what was written

A plain disk reports 0 everywhere, so 0 stays true when `uncache` has put a plain disk in the cache's place.
The live state is reported, and not what a power cut would leave.

Bounds. One answer looks at `LOOKUPS_MAX` blocks at most, and describes at most `RUNS_MAX` runs of
them, which takes a few milliseconds. If there is more, the answer is about less than was asked for.
"""

import errno as errnos
from typing import Final

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import EXTENT_DATA, EXTENT_ZERO, Extent, append_extent
from nbdtarget.targets.cache.blocks import Blocks

__all__ = [
    "CACHE",
    "CACHE_CACHED",
    "CACHE_DIRTY",
    "LOOKUPS_MAX",
    "RUNS_MAX",
    "base_extents",
    "cache_extents",
]

CACHE: Final = "cache"  # the name of the metadata context
CACHE_CACHED: Final = 1
CACHE_DIRTY: Final = 2

RUNS_MAX: Final = 1024  # runs of blocks in one state that one answer describes
LOOKUPS_MAX: Final = 8192  # blocks that one answer looks at


async def base_extents(blocks: Blocks, offset: int, length: int) -> list[Extent]:
    """Describe a range, offset relative to the target, or its beginning.

    Raises: DeviceError.
    """
    if blocks.has_failed:
        return [Extent(length, EXTENT_DATA)]
    runs = [Extent(length, 0)]
    if not blocks.is_passthrough:
        runs = _runs(blocks, offset, offset + length)
    found: list[Extent] = []
    if all(flags for _, flags in runs):
        append_extent(found, sum(run_length for run_length, _ in runs), EXTENT_DATA)
        return found
    described = sum(run_length for run_length, _ in runs)
    below = iter(await blocks.origin.extents(offset, described))
    left, below_flags = next(below)
    for run_length, cached in runs:
        while run_length:
            piece = min(run_length, left)
            if not piece:
                return found  # the origin's answer is shorter
            is_zero = not cached and below_flags & EXTENT_ZERO
            append_extent(found, piece, below_flags if is_zero else EXTENT_DATA)
            run_length -= piece
            left -= piece
            if not left:
                left, below_flags = next(below, (0, EXTENT_DATA))
    return found


def cache_extents(blocks: Blocks, offset: int, length: int) -> list[Extent]:
    """Describe what of a range is cached and dirty, or of its beginning; offset as above.

    Raises: DeviceError: the metadata has failed, so this is not known.
    """
    if blocks.has_failed:
        raise DeviceError(errnos.EIO, blocks.name, CACHE, offset, length)
    return _runs(blocks, offset, offset + length)


def _runs(blocks: Blocks, offset: int, end: int) -> list[Extent]:
    """The runs of blocks in one state, with CACHE_* flags."""
    metadata, size = blocks.metadata, blocks.block_size
    dirty, maybe_cblock = metadata.dirty, metadata.maybe_cblock
    found: list[Extent] = []
    state = 0
    if metadata.nr_mapped:
        first = offset // size
        last = min(-(-end // size), blocks.nr_oblocks, first + LOOKUPS_MAX)
        for oblock in range(first, last):
            cblock = maybe_cblock(oblock)
            flags = 0
            if cblock is not None:
                flags = CACHE_CACHED | CACHE_DIRTY if dirty[cblock] else CACHE_CACHED
            if flags != state:
                begin = max(oblock * size, offset)
                if begin > offset:
                    found.append(Extent(begin - offset, state))
                    if len(found) == RUNS_MAX:
                        return found
                    offset = begin
                state = flags
        stop = min(last * size, end)
        if first < last:
            found.append(Extent(stop - offset, state))
            offset = stop
        if last < blocks.nr_oblocks:
            return found
    if offset < end:
        append_extent(found, end - offset, 0)  # the tail, or all
    return found
