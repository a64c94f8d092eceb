# SPDX-License-Identifier: Apache-2.0
"""The map of written sectors against a plain set, and what it takes."""

import random

import pytest

from nbdtarget.targets.scratch.sector_map import PAGE_SECTORS, SectorMap

END = 3 * PAGE_SECTORS


def plain_runs(sectors: set[int], first: int, count: int) -> list[tuple[int, bool]]:
    found: list[tuple[int, bool]] = []
    for nr in range(first, first + count):
        is_set = nr in sectors
        length = found.pop()[0] if found and found[-1][1] == is_set else 0
        found.append((length + 1, is_set))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_map_is_a_set_of_sectors(seed: int) -> None:
    rng = random.Random(seed)
    sectors: set[int] = set()
    under_test = SectorMap()
    for _ in range(60):
        first = rng.choice((rng.randrange(END), PAGE_SECTORS - 1, PAGE_SECTORS))
        count = min(rng.choice((1, 8, 100, PAGE_SECTORS)), END - first)
        assert under_test.nr_missing(first, count) == len(
            set(range(first, first + count)) - sectors
        )
        if rng.randrange(3):
            under_test.add(first, count)
            sectors.update(range(first, first + count))
        assert under_test.nr_sectors == len(sectors)
        wanted = plain_runs(sectors, first, count)
        assert under_test.runs(first, count, END) == wanted
        assert under_test.runs(first, count, 2) == wanted[:2]


def test_only_written_pages_take_memory() -> None:
    under_test = SectorMap()
    under_test.add(10**12, 1)
    under_test.add(PAGE_SECTORS - 1, 2)
    assert under_test.nr_pages == 3
    assert under_test.runs(0, 1 << 20, 9)[-1] == ((1 << 20) - PAGE_SECTORS - 1, False)
    under_test.clear()
    assert (under_test.nr_pages, under_test.nr_sectors) == (0, 0)
    assert under_test.runs(0, 5, 9) == [(5, False)]
