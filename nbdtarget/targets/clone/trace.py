# SPDX-License-Identifier: Apache-2.0
"""`Trace`: which parts of a clone its clients have read, each once, in the order in which they were read first.

A machine that boots from an image reads the same few per cent of it each time. The reads of one boot are recorded, and hydrated first at
the next one (`Hydration.hydrate_first`), long before the background would come to it.

A trace knows whole regions. It has a bound: what is read first after `RANGES_MAX` ranges is not recorded.
"""

from typing import Final

from bitarray import bitarray

__all__ = ["RANGES_MAX", "Trace", "grouped"]

RANGES_MAX: Final = 65536
GROUP_BYTES: Final = 8 << 20
GAP_BYTES_MAX: Final = 128 << 10


class Trace:
    """The ranges that clients have read of a disk of `length` bytes.

    Attributes:
        ranges: begin and end in bytes, half-open, in the order of first reading.
    """

    def __init__(self, length: int, region_shift: int) -> None:
        self._length = length
        self._shift = region_shift
        self._seen = bitarray(-(-length >> region_shift))
        self._seen.setall(0)
        self.ranges: list[tuple[int, int]] = []

    def note(self, offset: int, length: int) -> None:
        """A client reads a range."""
        first = offset >> self._shift
        last = ((offset + length - 1) >> self._shift) + 1
        seen = self._seen
        if seen.find(0, first, last) < 0:
            return
        while (first := seen.find(0, first, last)) >= 0:
            end = seen.find(1, first, last)
            end = last if end < 0 else end
            if len(self.ranges) == RANGES_MAX:
                return
            seen[first:end] = 1
            self._append(first << self._shift, min(end << self._shift, self._length))
            first = end

    def _append(self, begin: int, end: int) -> None:
        if self.ranges and self.ranges[-1][1] == begin:
            self.ranges[-1] = (self.ranges[-1][0], end)
        else:
            self.ranges.append((begin, end))


def grouped(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that were read at about the same time and lie close together.

    A request to a distant source takes as long for a little more. So ranges are taken in groups of some megabytes,
    sorted within their group, and small gaps are filled.
    """
    joined: list[tuple[int, int]] = []
    group: list[tuple[int, int]] = []
    nr_bytes = 0
    for begin, end in ranges:
        group.append((begin, end))
        nr_bytes += end - begin
        if nr_bytes >= GROUP_BYTES:
            joined += _without_gaps(group)
            group, nr_bytes = [], 0
    return joined + _without_gaps(group)


def _without_gaps(group: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(group):
        if joined and begin - joined[-1][1] <= GAP_BYTES_MAX:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined
