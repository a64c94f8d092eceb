# SPDX-License-Identifier: Apache-2.0
import pytest

from nbdtarget.policies.smq.hotspot import Hotspot, hotspot_geometry

MIB = 1 << 20
S = 1_000_000_000


@pytest.mark.parametrize(
    ("nr_cblocks", "origin_blocks", "expected"),
    [
        (256, 1 << 20, (1024, 16)),
        (8192, 1 << 20, (2048, 16)),
        (8192, 2048 * 16, (2048, 16)),
        (8192, 2048 * 16 - 1, (2048, 8)),
        (8192, 2048 * 2 - 1, (2048, 1)),
        (1, 1, (1024, 1)),
    ],
)
def test_geometry(
    nr_cblocks: int, origin_blocks: int, expected: tuple[int, int]
) -> None:
    geometry = hotspot_geometry(
        nr_cblocks, origin_size=origin_blocks * MIB, block_size=MIB
    )
    assert geometry == expected


def new_hotspot() -> Hotspot:
    return Hotspot(256, origin_size=1 << 50, block_size=MIB)


def test_neighbours_share_a_hotspot_block() -> None:
    hotspot = new_hotspot()
    for oblock in range(16):
        hotspot.note_miss(oblock)
    assert len(hotspot.queue) == 1
    hotspot.note_miss(16)
    assert len(hotspot.queue) == 2


@pytest.mark.parametrize(
    ("hits", "misses", "level", "jump"),
    [
        (0, 0, 48, 4),
        (15, 241, 48, 4),
        (16, 240, 32, 2),
        (31, 225, 32, 2),
        (32, 224, 0, 1),
        (1, 0, 0, 1),
    ],
)
def test_performance_decides_promote_level_and_jump(
    hits: int, misses: int, level: int, jump: int
) -> None:
    hotspot = new_hotspot()
    hotspot._hits, hotspot._misses = hits, misses
    hotspot.tick(1)
    assert (hotspot.promote_level, hotspot.level_jump) == (level, jump)


def test_level_rises_once_between_two_ticks() -> None:
    hotspot = new_hotspot()
    hotspot.note_miss(0)
    assert [hotspot.note_miss(0) for _ in range(3)] == [1, 1, 1]
    hotspot.tick(1)
    hotspot.tick(2)
    assert [hotspot.note_miss(0) for _ in range(3)] == [5, 5, 5]


def test_ticks_beyond_what_a_byte_counts_forget_nothing() -> None:
    hotspot = new_hotspot()
    hotspot.note_miss(0)
    levels = []
    for n in range(600):
        hotspot.tick(n)
        levels.append(hotspot.note_miss(0))
    assert levels[-1] == 63
    assert levels == sorted(levels)


def test_promote_level_follows_each_tick_and_the_jump_each_period() -> None:
    hotspot = new_hotspot()
    hotspot.tick(1)
    hotspot._hits = 100
    hotspot.tick(2)
    assert (hotspot.promote_level, hotspot.level_jump) == (0, 4)
    hotspot.tick(S + 1)
    assert hotspot.level_jump == 4
    hotspot.tick(S + 2)
    assert hotspot.level_jump == 1


def test_unknown_block_replaces_the_oldest_entry_of_the_lowest_level() -> None:
    hotspot = new_hotspot()
    for block in range(1024):
        hotspot.note_miss(16 * block)
        hotspot.note_miss(16 * block)
    lengths = hotspot.queue.level_lengths()
    level = next(n for n, length in enumerate(lengths) if length)
    oldest = next(hotspot.queue.entries(level))
    assert hotspot.note_miss(16 * 5000) == level
    assert hotspot.queue.level_lengths() == lengths
    assert list(hotspot.queue.entries(level))[-1] == oldest
    assert len(hotspot.queue) == 1024
    # The entry rose since the last tick because of its former block.
    assert hotspot.note_miss(16 * 5000) == level + 1
