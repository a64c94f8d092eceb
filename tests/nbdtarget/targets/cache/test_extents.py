# SPDX-License-Identifier: Apache-2.0
"""Where zeroes are and what is cached, block by block."""

import errno as errnos

import pytest

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import (
    EXTENT_DATA,
    EXTENT_HOLE,
    EXTENT_ZERO,
    Extent,
)
from nbdtarget.targets.cache.blocks import Blocks
from nbdtarget.targets.cache.extents import (
    CACHE_CACHED,
    CACHE_DIRTY,
    base_extents,
    cache_extents,
)
from tests.support.cache_parts import BLOCK, Bench, Table

THIN = EXTENT_HOLE | EXTENT_ZERO
DIRTY = CACHE_CACHED | CACHE_DIRTY
TAIL = 5 * 512
EXTENTS = "nbdtarget.targets.cache.extents"


async def table_of(words: str = "0 smq 0", nr_oblocks: int = 8) -> Table:
    """oblocks 2 and 5 are cached and clean, 3 is dirty; the origin is empty."""
    bench = Bench(nr_oblocks=nr_oblocks, tail=TAIL)
    table = await bench.resumed(
        words, mapped=[(4, 2), (1, 3), (0, 5)], dirty=[] if "pass" in words else [1]
    )
    return table


def size_of(blocks: Blocks) -> int:
    return blocks.nr_oblocks * BLOCK + TAIL


# ---- what is cached ----


async def test_cached_and_dirty_blocks_are_told() -> None:
    blocks = (await table_of()).blocks()
    assert cache_extents(blocks, 0, size_of(blocks)) == [
        (2 * BLOCK, 0),
        (BLOCK, CACHE_CACHED),
        (BLOCK, DIRTY),
        (BLOCK, 0),
        (BLOCK, CACHE_CACHED),
        (2 * BLOCK + TAIL, 0),
    ]


@pytest.mark.parametrize(
    ("offset", "length", "runs"),
    [
        (2 * BLOCK + 512, 512, [(512, CACHE_CACHED)]),
        (
            3 * BLOCK - 512,
            1024,
            [(512, CACHE_CACHED), (512, DIRTY)],
        ),
        (BLOCK - 512, BLOCK, [(BLOCK, 0)]),
        (6 * BLOCK - 512, 1024, [(512, CACHE_CACHED), (512, 0)]),
        (8 * BLOCK, TAIL, [(TAIL, 0)]),
        (8 * BLOCK + 512, 512, [(512, 0)]),
        (8 * BLOCK - 512, TAIL, [(TAIL, 0)]),
    ],
)
async def test_ranges_need_not_be_blocks(
    offset: int, length: int, runs: list[Extent]
) -> None:
    blocks = (await table_of()).blocks()
    assert cache_extents(blocks, offset, length) == runs


async def test_live_state_is_told() -> None:
    table = await table_of()
    blocks = table.blocks()
    blocks.set_clean(1)
    blocks.set_dirty(0)
    assert cache_extents(blocks, 3 * BLOCK, 3 * BLOCK) == [
        (BLOCK, CACHE_CACHED),
        (BLOCK, 0),
        (BLOCK, DIRTY),
    ]


async def test_in_passthrough_blocks_are_cached_still() -> None:
    blocks = (await table_of("1 passthrough smq 0")).blocks()
    assert cache_extents(blocks, 2 * BLOCK, 2 * BLOCK) == [(2 * BLOCK, CACHE_CACHED)]


async def test_empty_cache_is_one_run_however_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"{EXTENTS}.LOOKUPS_MAX", 2)
    blocks = (await Bench().resumed()).blocks()
    assert cache_extents(blocks, 512, 20 * BLOCK) == [(20 * BLOCK, 0)]


async def all_of(blocks: Blocks) -> list[tuple[int, int]]:
    """(block, flags) of every block, from however many answers it takes."""
    found: list[int] = []
    while len(found) < blocks.nr_oblocks:
        offset = len(found) * BLOCK
        for length, flags in cache_extents(blocks, offset, size_of(blocks) - offset):
            found += [flags] * (length // BLOCK)
    return list(enumerate(found))


@pytest.mark.parametrize(("bound", "nr_max"), [("LOOKUPS_MAX", 3), ("RUNS_MAX", 2)])
async def test_answer_is_bounded_and_the_rest_can_be_asked_for(
    bound: str, nr_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = (await table_of(nr_oblocks=16)).blocks()
    whole = await all_of(blocks)
    monkeypatch.setattr(f"{EXTENTS}.{bound}", nr_max)
    answer = cache_extents(blocks, 0, size_of(blocks))
    assert sum(run.length for run in answer) == 3 * BLOCK
    assert await all_of(blocks) == whole


async def test_failed_metadata_know_nothing() -> None:
    table = await table_of()
    table.metadata.fail()
    blocks = table.blocks()
    with pytest.raises(DeviceError, match="c: cache of") as caught:
        cache_extents(blocks, 0, BLOCK)
    assert caught.value.errno == errnos.EIO
    assert await base_extents(blocks, 0, BLOCK) == [(BLOCK, EXTENT_DATA)]


# ---- where zeroes are ----


async def test_what_is_not_cached_is_what_the_origin_says() -> None:
    table = await table_of()
    blocks = table.blocks()
    await table.bench.origin.device.write(6 * BLOCK, b"x" * 2 * BLOCK)
    assert await base_extents(blocks, 0, size_of(blocks)) == [
        (2 * BLOCK, THIN),
        (2 * BLOCK, EXTENT_DATA),
        (BLOCK, THIN),
        (3 * BLOCK, EXTENT_DATA),
        (TAIL, THIN),
    ]


async def test_cached_block_is_data_though_a_discard_emptied_the_origin() -> None:
    table = await table_of()
    await table.bench.origin.device.discard(0, 8 * BLOCK)
    found = await base_extents(table.blocks(), 2 * BLOCK, BLOCK)
    assert found == [(BLOCK, EXTENT_DATA)]


async def test_in_passthrough_the_origin_is_asked_for_all() -> None:
    blocks = (await table_of("1 passthrough smq 0")).blocks()
    assert await base_extents(blocks, 0, size_of(blocks)) == [(size_of(blocks), THIN)]


async def test_origin_is_not_asked_about_what_is_cached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = await table_of()
    blocks = table.blocks()

    async def refuse(offset: int, length: int) -> list[Extent]:
        raise DeviceError(errnos.EIO, "o", "extents", offset, length)

    monkeypatch.setattr(table.bench.origin, "extents", refuse)
    found = await base_extents(blocks, 2 * BLOCK, 2 * BLOCK)
    assert found == [(2 * BLOCK, EXTENT_DATA)]
    with pytest.raises(DeviceError):
        await base_extents(blocks, 2 * BLOCK, 3 * BLOCK)


async def test_hole_that_is_not_zero_is_data(monkeypatch: pytest.MonkeyPatch) -> None:
    table = await table_of()

    async def holes(offset: int, length: int) -> list[Extent]:
        return [Extent(length // 2, EXTENT_HOLE), Extent(length // 2, EXTENT_ZERO)]

    monkeypatch.setattr(table.bench.origin, "extents", holes)
    assert await base_extents(table.blocks(), 0, 2 * BLOCK) == [
        (BLOCK, EXTENT_DATA),
        (BLOCK, EXTENT_ZERO),
    ]


@pytest.mark.parametrize(
    ("answered", "length"), [(512, 512), (4 * BLOCK + 512, 4 * BLOCK + 512)]
)
async def test_answer_is_as_short_as_the_origins(
    answered: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = await table_of()

    async def short(offset: int, length: int) -> list[Extent]:
        return [Extent(answered, THIN)]

    monkeypatch.setattr(table.bench.origin, "extents", short)
    found = await base_extents(table.blocks(), 0, 8 * BLOCK)
    assert sum(extent.length for extent in found) == length


async def test_block_that_is_demoted_while_the_origin_is_asked_is_no_zeroes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = await table_of()
    blocks = table.blocks()

    async def slow(offset: int, length: int) -> list[Extent]:
        found = [Extent(length, THIN)]  # before it was written back
        blocks.set_clean(1)
        table.metadata.remove(1)
        return found

    monkeypatch.setattr(table.bench.origin, "extents", slow)
    assert await base_extents(blocks, 3 * BLOCK, 2 * BLOCK) == [
        (BLOCK, EXTENT_DATA),
        (BLOCK, THIN),
    ]
