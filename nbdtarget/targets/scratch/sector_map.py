# SPDX-License-Identifier: Apache-2.0
"""Which sectors of a scratch volume were written: a bitmap that takes memory only where something was.

The bitmap is cut into pages of PAGE_SECTORS bits, each one integer. A page without a bit is not there. So an empty map
of a disk of any size takes nothing, and a map of a written disk takes about one byte for each 4 KiB that was written in order.
"""

from typing import Final

__all__ = ["PAGE_SECTORS", "SectorMap"]

PAGE_SECTORS: Final = 2048  # 1 MiB


class SectorMap:
    """A set of sectors.

    Attributes: nr_sectors: how many there are.
    """

    def __init__(self) -> None:
        self._pages: dict[int, int] = {}
        self.nr_sectors = 0

    @property
    def nr_pages(self) -> int:
        return len(self._pages)

    def add(self, first: int, count: int) -> None:
        """Put `count` sectors from `first` on into the set."""
        for page, mask in _masks(first, count):
            old = self._pages.get(page, 0)
            self._pages[page] = old | mask
            self.nr_sectors += (mask & ~old).bit_count()

    def nr_missing(self, first: int, count: int) -> int:
        """How many of these sectors are not in the set."""
        pages = self._pages
        if not pages:
            return count
        return sum(
            (mask & ~pages.get(page, 0)).bit_count()
            for page, mask in _masks(first, count)
        )

    def runs(self, first: int, count: int, runs_max: int) -> list[tuple[int, bool]]:
        """Return the runs of sectors that are in the set and of those that are not: (sectors, in the set).

        Args: runs_max: after so many the answer ends, and is about fewer sectors.
        """
        found: list[tuple[int, bool]] = []
        end = first + count
        while first < end and len(found) <= runs_max:
            page, bit = divmod(first, PAGE_SECTORS)
            bits = self._pages.get(page, 0) >> bit
            is_set = bool(bits & 1)
            # The first bit that differs ends the run; the page ends it, too.
            differing = bits ^ ((1 << (PAGE_SECTORS - bit)) - 1) if is_set else bits
            length = (
                (differing & -differing).bit_length() - 1
                if differing
                else PAGE_SECTORS - bit
            )
            length = min(length, end - first)
            if found and found[-1][1] == is_set:
                found[-1] = (found[-1][0] + length, is_set)
            else:
                found.append((length, is_set))
            first += length
        return found[:runs_max]

    def clear(self) -> None:
        """Empty the set."""
        self._pages.clear()
        self.nr_sectors = 0


def _masks(first: int, count: int) -> list[tuple[int, int]]:
    """(page, mask) of each page that the range touches."""
    found = []
    while count:
        page, bit = divmod(first, PAGE_SECTORS)
        length = min(count, PAGE_SECTORS - bit)
        found.append((page, ((1 << length) - 1) << bit))
        first += length
        count -= length
    return found
