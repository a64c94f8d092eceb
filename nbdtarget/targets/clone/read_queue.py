# SPDX-License-Identifier: Apache-2.0
"""Regions that clients have read from the source, and will likely read again."""

from typing import Final

__all__ = ["READ_RANGES_MAX", "ReadQueue"]

READ_RANGES_MAX: Final = 1024


class ReadQueue:
    """Ranges of regions, the one that was read last first.

    Two ranges are the same if they begin at the same region: a range that is read again moves to the front. When
    there are more than `ranges_max`, the one that was read longest ago is forgotten.
    """

    def __init__(self, *, ranges_max: int = READ_RANGES_MAX) -> None:
        assert ranges_max > 0
        self.ranges_max = ranges_max
        self._ends: dict[int, int] = {}  # by begin; the last one is the front

    def __len__(self) -> int:
        return len(self._ends)

    def push(self, begin: int, end: int) -> None:
        """Regions `begin` to `end` were read just now."""
        ends = self._ends
        ends[begin] = max(ends.pop(begin, end), end)
        if len(ends) > self.ranges_max:
            del ends[next(iter(ends))]

    def front(self) -> tuple[int, int]:
        """The range that was read last."""
        begin = next(reversed(self._ends))
        return begin, self._ends[begin]

    def drop(self, begin: int) -> None:
        """Forget the range that begins there."""
        del self._ends[begin]

    def clear(self) -> None:
        self._ends.clear()
