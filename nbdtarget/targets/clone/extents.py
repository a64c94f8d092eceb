# SPDX-License-Identifier: Apache-2.0
"""The block status of a clone: where zeroes are, and where hydration stands.

*Extents* (on the wire `base:allocation`). Hydrated regions are described by the destination. For
the others, the source says whether they read as zeroes, and the destination says whether a write may find no
room. A HOLE is reported only together with ZERO: widely used clients
take "hole, but not zero" for "nothing there" and skip the data.

*Hydration* (on the wire `x-nbdtarget:hydration`). Two bits, so three values:

    0  hydrated: the destination is read; so is every range that is not part of a clone
    1  HYDRATION_SOURCE: the source is read
    3  HYDRATION_SOURCE | HYDRATION_ACTIVE: the source is read, and the region is being copied
       or overwritten now

0 is the state in which nothing is left to do. So it stays true after a table without a clone has taken the
clone's place: clients that go on asking are told that the disk is hydrated. The live
bitmap is reported, with changes that are not committed: what a read would return,
and not what a power cut would leave.

Bounds. One answer describes at most `RUNS_MAX` runs of regions, which takes a few milliseconds. If there are more, the
answer is about less than was asked for.
"""

import errno as errnos
from collections.abc import Sequence
from typing import Final

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import (
    EXTENT_DATA,
    EXTENT_HOLE,
    EXTENT_ZERO,
    Extent,
    append_extent,
)
from nbdtarget.targets.clone.regions import Regions

__all__ = [
    "HYDRATION",
    "HYDRATION_ACTIVE",
    "HYDRATION_SOURCE",
    "RUNS_MAX",
    "clone_extents",
    "hydration_extents",
]

HYDRATION: Final = "hydration"  # the name of the metadata context
HYDRATION_SOURCE: Final = 1
HYDRATION_ACTIVE: Final = 2

RUNS_MAX: Final = 1024  # runs of regions in one state that one answer describes

Run = tuple[int, bool]  # bytes, hydrated


async def clone_extents(regions: Regions, offset: int, length: int) -> list[Extent]:
    """Describe a range, offset relative to the target, or its beginning.

    Raises: DeviceError.
    """
    if regions.has_failed:
        return [Extent(length, EXTENT_DATA)]
    runs = _runs(regions, offset, offset + length)
    described = sum(run_length for run_length, _ in runs)
    below = await regions.destination.extents(offset, described)
    above: Sequence[Extent] = [Extent(described, EXTENT_DATA)]
    if not all(hydrated for _, hydrated in runs):
        above = await regions.source.extents(offset, described)
    return _combined(runs, _Cursor(above), _Cursor(below))


def hydration_extents(regions: Regions, offset: int, length: int) -> list[Extent]:
    """Describe how far a range is hydrated, or its beginning; offset as above.

    Raises: DeviceError: the metadata has failed, so this is not known.
    """
    if regions.has_failed:
        name = regions.committer.name
        raise DeviceError(errnos.EIO, name, HYDRATION, offset, length)
    shift, end = regions.shift, offset + length
    found: list[Extent] = []

    def describe(until: int, flags: int) -> None:
        nonlocal offset
        stop = min(until << shift, end)
        append_extent(found, stop - offset, flags)
        offset = stop

    last = ((end - 1) >> shift) + 1
    for at, run_end, hydrated in regions.metadata.runs(offset >> shift, last):
        if hydrated:
            describe(run_end, 0)
            continue
        for begin, stop in regions.prison.held(at, run_end):
            if begin > at:
                describe(begin, HYDRATION_SOURCE)
            describe(stop, HYDRATION_SOURCE | HYDRATION_ACTIVE)
            at = stop
        if at < run_end:
            describe(run_end, HYDRATION_SOURCE)
        if len(found) >= RUNS_MAX:
            break
    return found


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
        left: bytes to the end of the extent that we are in; 0: the description has ended.
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
    """Return the runs, as far as both descriptions go."""
    extents: list[Extent] = []
    for left, hydrated in runs:
        while left:
            length = min(left, source.left, destination.left)
            if not length:
                return extents
            flags = destination.flags
            if not hydrated:
                zero = source.flags & EXTENT_ZERO
                flags = zero | flags & EXTENT_HOLE if zero else EXTENT_DATA
            append_extent(extents, length, flags)
            source.advance(length)
            destination.advance(length)
            left -= length
    return extents
