# SPDX-License-Identifier: Apache-2.0
"""What a clone says about its own extents.

Hydrated regions are what the destination says. For the others, whether they read as zeroes is up to
the source, and whether a write may find no room is up to the destination. A HOLE is reported
only together with ZERO: widely used clients take "hole, but not zero" for "nothing there" and skip
the data.
"""

from collections.abc import Sequence
from typing import Final

from nbdtarget.devices.base import EXTENT_DATA, EXTENT_HOLE, EXTENT_ZERO, Extent
from nbdtarget.targets.clone.regions import Regions

__all__ = ["RUNS_MAX", "clone_extents"]

RUNS_MAX: Final = 4096  # runs of regions described one by one; what follows is data

Run = tuple[int, bool]  # bytes, hydrated


async def clone_extents(regions: Regions, offset: int, length: int) -> list[Extent]:
    """Describe a range, offset relative to the target. Raises: DeviceError."""
    runs = _runs(regions, offset, offset + length)
    described = sum(run_length for run_length, _ in runs)
    below = await regions.destination.extents(offset, described)
    above: Sequence[Extent] = [Extent(described, EXTENT_DATA)]
    if not all(hydrated for _, hydrated in runs):
        above = await regions.source.extents(offset, described)
    extents = _combined(runs, _Cursor(above), _Cursor(below))
    if described < length:
        extents.append(Extent(length - described, EXTENT_DATA))
    return _joined(extents)


def _runs(regions: Regions, offset: int, end: int) -> list[Run]:
    shift = regions.shift
    runs = []
    last = ((end - 1) >> shift) + 1
    for _, run_end, hydrated in regions.metadata.runs(offset >> shift, last):
        stop = min(run_end << shift, end)
        runs.append((stop - offset, hydrated))
        offset = stop
        if len(runs) == RUNS_MAX:
            break
    return runs


class _Cursor:
    """A place in a description.

    Attributes:
        left: bytes to the end of the extent that we are in.
        flags: that extent's.
    """

    def __init__(self, extents: Sequence[Extent]) -> None:
        self._extents = iter(extents)
        self.left, self.flags = next(self._extents)

    def advance(self, length: int) -> None:
        assert length <= self.left
        self.left -= length
        if not self.left:
            self.left, self.flags = next(self._extents, (0, EXTENT_DATA))


def _combined(runs: list[Run], source: _Cursor, destination: _Cursor) -> list[Extent]:
    extents = []
    for left, hydrated in runs:
        while left:
            length = min(left, source.left, destination.left)
            flags = destination.flags
            if not hydrated:
                zero = source.flags & EXTENT_ZERO
                flags = zero | flags & EXTENT_HOLE if zero else EXTENT_DATA
            extents.append(Extent(length, flags))
            source.advance(length)
            destination.advance(length)
            left -= length
    return extents


def _joined(extents: list[Extent]) -> list[Extent]:
    joined: list[Extent] = []
    for extent in extents:
        if joined and joined[-1].flags == extent.flags:
            joined[-1] = Extent(joined[-1].length + extent.length, extent.flags)
        else:
            joined.append(extent)
    return joined
