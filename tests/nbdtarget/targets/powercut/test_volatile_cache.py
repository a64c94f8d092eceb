# SPDX-License-Identifier: Apache-2.0
"""The volatile write cache: what it reads, what a flush covers, what a power cut leaves."""

import random

import pytest

from nbdtarget.common.units import SECTOR
from nbdtarget.targets.powercut.volatile_cache import (
    Fate,
    PendingWrite,
    Sectors,
    VolatileCache,
    covering,
    possibilities,
    split_sectors,
    survivors,
)

A, B, C = (bytes([letter]) * SECTOR for letter in b"ABC")
ZERO = bytes(SECTOR)
SEEDS = range(200)


def read(cache: VolatileCache, medium: bytes, offset: int, length: int) -> bytes:
    buffer = bytearray(medium[offset : offset + length])
    cache.overlay(offset, buffer)
    return bytes(buffer)


def outcomes(cache: VolatileCache, fate: Fate, border: int = SECTOR) -> set[bytes]:
    """The letters of the first sectors, `.` where nothing arrived."""
    nrs = range(max(nr for write in cache.pending for nr in write.sectors) + 1)
    return {
        b"".join(chosen.get(nr, b".")[:1] for nr in nrs)
        for seed in SEEDS
        for chosen in [survivors(cache.pending, fate, seed, border=border)]
    }


def test_pending_values_are_read_over_the_medium() -> None:
    cache = VolatileCache()
    cache.write({1: A, 2: A})
    cache.write({2: B})
    medium = C * 4
    assert read(cache, medium, 0, 4 * SECTOR) == C + A + B + C
    assert read(cache, medium, 2 * SECTOR - 1, 2) == b"AB"
    assert read(cache, medium, 3 * SECTOR, 5) == b"CCCCC"


def test_overlay_of_an_empty_cache_changes_nothing() -> None:
    assert read(VolatileCache(), C, 0, SECTOR) == C


def test_flush_covers_what_was_there_when_it_was_submitted() -> None:
    cache = VolatileCache()
    cache.write({0: A, 1: A})
    cache.write({1: B})
    mark = cache.mark
    cache.write({0: C})
    assert cache.covered(mark) == {0: A, 1: B}
    assert len(cache.pending) == 3, "at risk until it is durable"
    cache.forget(mark)
    assert [write.sectors for write in cache.pending] == [{0: C}]
    assert read(cache, A + B, 0, 2 * SECTOR) == C + B


def test_second_flush_of_the_same_mark_covers_nothing() -> None:
    cache = VolatileCache()
    cache.write({0: A})
    mark = cache.mark
    cache.forget(mark)
    assert cache.covered(mark) == {}
    cache.forget(mark)
    assert cache.pending == []


def test_superseded_values_never_come_back() -> None:
    cache = VolatileCache()
    cache.write({0: A, 1: A})
    cache.write({1: B})
    cache.supersede(range(1, 2))
    assert outcomes(cache, Fate.MIXED) == {b"A", b"."}
    assert read(cache, C * 2, 0, 2 * SECTOR) == A + C
    assert cache.nr_sectors == 1


def test_superseding_what_is_not_pending_changes_nothing() -> None:
    cache = VolatileCache()
    write = cache.write({0: A})
    cache.supersede(range(5, 900))
    assert cache.pending == [write]


def test_power_cut_empties_the_cache() -> None:
    cache = VolatileCache()
    cache.write({0: A})
    mark = cache.mark
    cache.clear()
    assert (cache.pending, cache.nr_sectors, cache.mark) == ([], 0, mark)
    assert read(cache, C, 0, SECTOR) == C


def test_fates_keep_and_drop() -> None:
    cache = VolatileCache()
    cache.write({0: A, 1: A})
    cache.write({1: B})
    assert survivors(cache.pending, Fate.KEEP) == {0: A, 1: B}
    assert survivors(cache.pending, Fate.DROP) == {}


def test_torn_write_leaves_any_of_its_sectors() -> None:
    cache = VolatileCache()
    cache.write({0: A, 1: A})
    assert outcomes(cache, Fate.TEAR) == {b"..", b"A.", b".A", b"AA"}


def test_write_does_not_tear_inside_a_border() -> None:
    cache = VolatileCache()
    cache.write(split_sectors(0, A * 16))
    whole, nothing = b"A" * 8, b"." * 8
    assert outcomes(cache, Fate.TEAR, 4096) == {
        one + other for one in (whole, nothing) for other in (whole, nothing)
    }


def test_border_is_aligned_to_the_disk_not_to_the_write() -> None:
    cache = VolatileCache()
    cache.write(dict.fromkeys(range(7, 9), A))
    assert outcomes(cache, Fate.TEAR, 4096) == {
        b"." * 7 + end for end in (b"..", b"A.", b".A", b"AA")
    }


def test_other_borders_are_refused() -> None:
    with pytest.raises(AssertionError):
        survivors([], border=1024)


def test_writes_are_kept_dropped_torn_and_reordered() -> None:
    cache = VolatileCache()
    cache.write({0: A})
    cache.write({0: B, 1: B})
    cache.write({1: C})
    # A after B, although C came after it: only a reordered B does that.
    assert outcomes(cache, Fate.MIXED) == {
        one + other for one in (b".", b"A", b"B") for other in (b".", b"B", b"C")
    }


def test_same_seed_gives_the_same_survivors() -> None:
    cache = VolatileCache()
    for nr in range(20):
        cache.write({nr: A, nr + 1: B})
    chosen = survivors(cache.pending, Fate.MIXED, 7)
    assert survivors(cache.pending, Fate.MIXED, 7) == chosen
    assert survivors(cache.pending, Fate.MIXED, 8) != chosen


def test_possibilities_are_every_subset() -> None:
    cache = VolatileCache()
    for nr in range(8):
        cache.write({nr: A})
    found = {tuple(sectors) for sectors in possibilities(cache.pending)}
    assert len(found) == 256


def test_possibilities_of_many_writes_are_prefixes_and_samples() -> None:
    cache = VolatileCache()
    for nr in range(9):
        cache.write({nr: A})
    found = [set(sectors) for sectors in possibilities(cache.pending, samples=5)]
    assert len(found) == 10 + 5
    assert all(set(range(end)) in found for end in range(10))


def test_possibilities_of_nothing() -> None:
    assert list(possibilities([])) == [{}, {}, {}]


@pytest.mark.parametrize("seed", range(10))
def test_cache_agrees_with_a_disk_that_is_written_through(seed: int) -> None:
    rng = random.Random(seed)
    cache, medium, disk = (
        VolatileCache(),
        bytearray(16 * SECTOR),
        bytearray(16 * SECTOR),
    )
    for stamp in range(1, 120):
        first = rng.randrange(16)
        data = bytes([stamp]) * (SECTOR * rng.randrange(1, 17 - first))
        disk[first * SECTOR : first * SECTOR + len(data)] = data
        if rng.random() < 0.2:
            medium[first * SECTOR : first * SECTOR + len(data)] = data
            cache.supersede(range(first, first + len(data) // SECTOR))
        else:
            cache.write(split_sectors(first, data))
        if rng.random() < 0.2:
            mark = rng.choice(cache.pending).seq if cache.pending else cache.mark
            put(medium, cache.covered(mark))
            cache.forget(mark)
        assert read(cache, bytes(medium), 0, len(disk)) == disk
        assert cache.nr_sectors == sum(len(w.sectors) for w in cache.pending)


def put(medium: bytearray, sectors: Sectors) -> None:
    for nr, value in sectors.items():
        medium[nr * SECTOR : (nr + 1) * SECTOR] = value


def test_sectors_of_ragged_bytes() -> None:
    assert covering(511, 2) == range(2)
    assert covering(512, 512) == range(1, 2)


def test_split_sectors_copies() -> None:
    data = bytearray(A + ZERO)
    sectors = split_sectors(3, data)
    data[:] = bytes(len(data))
    assert sectors == {3: A, 4: ZERO}


def test_pending_write_says_what_it_is() -> None:
    assert repr(PendingWrite(4, {2: A, 1: A})) == "<PendingWrite 4: sectors [1, 2]>"


def test_superseding_up_to_a_mark_leaves_what_was_written_since() -> None:
    cache = VolatileCache()
    cache.write({1: b"a" * SECTOR, 2: b"a" * SECTOR})
    mark = cache.mark
    cache.write({2: b"b" * SECTOR, 3: b"b" * SECTOR})
    cache.supersede(range(4), mark)
    assert cache.newest(range(4)) == {2: b"b" * SECTOR, 3: b"b" * SECTOR}
    assert (len(cache.pending), cache.nr_sectors) == (1, 2)
    assert cache.covered(mark) == {}
