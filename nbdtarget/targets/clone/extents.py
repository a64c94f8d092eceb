# SPDX-License-Identifier: Apache-2.0
"""What a clone says about its own extents.

Hydrated regions are what the destination says. For the others, whether they read as zeroes is up to
the source, and whether a write may find no room is up to the destination. A HOLE is reported
only together with ZERO: widely used clients take "hole, but not zero" for "nothing there" and skip
the data.
"""

from typing import Final

from nbdtarget.devices.base import EXTENT_DATA, EXTENT_HOLE, EXTENT_ZERO, Extent
from nbdtarget.targets.clone.regions import Regions

__all__ = ["RUNS_MAX", "clone_extents"]

RUNS_MAX: Final = 256  # runs of regions described one by one; what follows is data


async def clone_extents(regions: Regions, offset: int, length: int) -> list[Extent]:
    """Describe a range, offset relative to the target. Raises: DeviceError."""
    end = offset + length
    shift = regions.shift
    runs = []
    at = offset
    for _, run_end, hydrated in regions.metadata.runs(
        offset >> shift, ((end - 1) >> shift) + 1
    ):
        stop = min(run_end << shift, end)
        runs.append((at, stop - at, hydrated))
        at = stop
        if len(runs) == RUNS_MAX:
            break
    extents: list[Extent] = []
    for run_offset, run_length, hydrated in runs:
        below = await regions.destination.extents(run_offset, run_length)
        if not hydrated:
            above = await regions.source.extents(run_offset, run_length)
            below = _unhydrated(above, below)
        extents.extend(below)
    if at < end:
        extents.append(Extent(end - at, EXTENT_DATA))
    return _joined(extents)


def _unhydrated(source: list[Extent], destination: list[Extent]) -> list[Extent]:
    """Combine two descriptions of one range: ZERO from the source, HOLE from the destination."""
    combined = []
    below = iter(destination)
    length_left, flags = next(below)
    for length, source_flags in source:
        while length:
            if not length_left:
                length_left, flags = next(below)
            step = min(length, length_left)
            zero = source_flags & EXTENT_ZERO
            combined.append(Extent(step, zero | flags & EXTENT_HOLE if zero else 0))
            length -= step
            length_left -= step
    return combined


def _joined(extents: list[Extent]) -> list[Extent]:
    joined: list[Extent] = []
    for extent in extents:
        if joined and joined[-1].flags == extent.flags:
            joined[-1] = Extent(joined[-1].length + extent.length, extent.flags)
        else:
            joined.append(extent)
    return joined
