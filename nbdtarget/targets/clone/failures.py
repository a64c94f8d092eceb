# SPDX-License-Identifier: Apache-2.0
"""Regions whose copy has failed, and when each may be tried again.

Theory of operation. A failed range is left alone for a while that doubles each time it fails
again, from `RETRY_S_MIN` to `RETRY_S_MAX`. A range that has succeeded is forgotten. Ranges
are kept sorted and disjoint; neighbours that have failed equally often are one range, so a source that is
dead from one end to the other costs one entry. Beyond `ranges_max` entries a new failure is added
to its neighbour, good regions between them included: these then wait longer than they need to.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

__all__ = ["RANGES_MAX", "RETRY_S_MAX", "RETRY_S_MIN", "FailedRange", "Failures"]

RETRY_S_MIN: Final = 1.0
RETRY_S_MAX: Final = 300.0
RANGES_MAX: Final = 4096

_begin_of = attrgetter("begin")


@dataclass(slots=True)
class FailedRange:
    """Regions `begin` to `end`: not before `retry_ns` (Clock.now_ns)."""

    begin: int
    end: int
    delay_s: float
    retry_ns: int


class Failures:
    """The failed ranges of one clone.

    Attributes:
        nr_errors: failures ever noted; also of ranges that have been copied since.
        last_error: what the last of them says, in one line; None: there was none.
    """

    def __init__(self, *, ranges_max: int = RANGES_MAX) -> None:
        self.ranges_max = ranges_max
        self.nr_errors = 0
        self.last_error: str | None = None
        self._ranges: list[FailedRange] = []

    def __len__(self) -> int:
        return len(self._ranges)

    def ranges(self) -> Iterator[FailedRange]:
        """Return the regions that wait, in order; clients may have hydrated some of them meanwhile."""
        return iter(self._ranges)

    def note_failure(self, begin: int, end: int, now_ns: int) -> bool:
        """Regions `begin` to `end` could not be copied; tell whether that is news."""
        self.nr_errors += 1
        known = [r.delay_s for r in self._overlapping(begin, end)]
        delay_s = min(2 * max(known), RETRY_S_MAX) if known else RETRY_S_MIN
        self.note_success(begin, end)
        new = FailedRange(begin, end, delay_s, now_ns + int(delay_s * 1e9))
        at = bisect_left(self._ranges, begin, key=_begin_of)
        self._ranges.insert(at, new)
        self._merge(at, is_forced=len(self._ranges) > self.ranges_max)
        return not known

    def note_success(self, begin: int, end: int) -> None:
        """Regions `begin` to `end` are hydrated."""
        for failed in self._overlapping(begin, end):
            at = bisect_left(self._ranges, failed.begin, key=_begin_of)
            rest = []
            if failed.begin < begin:
                rest.append(
                    FailedRange(failed.begin, begin, failed.delay_s, failed.retry_ns)
                )
            if end < failed.end:
                rest.append(
                    FailedRange(end, failed.end, failed.delay_s, failed.retry_ns)
                )
            self._ranges[at : at + 1] = rest

    def maybe_clear_run(
        self, begin: int, end: int, now_ns: int
    ) -> tuple[int, int] | None:
        """Return the first part of the range that may be tried now, or None.

        A part that failed before and may be tried again comes alone, not with neighbours.
        """
        for failed in self._overlapping(begin, end):
            if begin < failed.begin:
                return begin, failed.begin
            if failed.retry_ns <= now_ns:
                return begin, min(failed.end, end)
            begin = failed.end
        return (begin, end) if begin < end else None

    def maybe_retry_ns(self, after_ns: int) -> int | None:
        """Return when the next range falls due after `after_ns`, or None.

        A range that is due already and was not tried is hydrated, or locked, and its unlocking
        wakes hydration: its time is in the past, so it is no time to wait for.
        """
        due = (failed.retry_ns for failed in self._ranges)
        return min((at_ns for at_ns in due if at_ns > after_ns), default=None)

    def _overlapping(self, begin: int, end: int) -> list[FailedRange]:
        ranges = self._ranges
        if not ranges:
            return []
        low = bisect_left(ranges, begin, key=_begin_of)
        if low and ranges[low - 1].end > begin:
            low -= 1
        return ranges[low : bisect_left(ranges, end, low, key=_begin_of)]

    def _merge(self, at: int, *, is_forced: bool) -> None:
        """Join the range at `at` with the one before it, if they are alike or must be."""
        if at == 0:
            if is_forced and len(self._ranges) > 1:
                self._join(0)
            return
        before, new = self._ranges[at - 1], self._ranges[at]
        if is_forced or (before.end == new.begin and before.delay_s == new.delay_s):
            self._join(at - 1)

    def _join(self, at: int) -> None:
        first, second = self._ranges[at : at + 2]
        self._ranges[at : at + 2] = [
            FailedRange(
                first.begin,
                second.end,
                max(first.delay_s, second.delay_s),
                max(first.retry_ns, second.retry_ns),
            )
        ]
