# SPDX-License-Identifier: Apache-2.0
"""Rot in a cache's image: whatever bit flips, opening repairs it or refuses it by name.

The clone's is test_rot.py, which see; ROT_DEEP=1 (`make rot`) flips the padding, too. The long tests
flip every bit of each envelope in three ages.
"""

import random
from itertools import combinations

import msgspec
import pytest

from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.errors import CorruptMetadata, MetadataError
from nbdtarget_metadata.log.superblock import NR_SLOTS, SUPERBLOCK_BLOCKS
from tests.support.metadata.cache_images import (
    CacheAged,
    cache_ages,
    held_by,
    open_cache,
)
from tests.support.metadata.cache_reader import held_in, live_ranges, read_records
from tests.support.metadata.damage import (
    DEEP,
    assert_named,
    bits_to_flip,
    each_age_and_step,
    flip,
    spoiled,
    superblock_lengths,
)

pytestmark = pytest.mark.slow

EVERY_BIT = ("shut_down", "torn_start", "shrunk")

each_age = pytest.mark.parametrize("name", cache_ages())
each_age_and_bit = each_age_and_step(cache_ages(), EVERY_BIT)


def assert_right(aged: CacheAged, metadata: CacheMetadata) -> None:
    assert metadata.generation >= aged.acknowledged, "rolled back"
    held = held_by(metadata)
    assert held == aged.states[metadata.generation]
    assert (metadata.nr_mapped, metadata.nr_dirty) == (
        len(held.values),
        len(held.dirty),
    )


def live_records(aged: CacheAged) -> list[tuple[int, int]]:
    """Return (block, bytes of header and body) of what the superblock vouches for."""
    ranges = live_ranges(msgspec.to_builtins(aged.superblock()))
    return [
        (block, length)
        for blocks in ranges
        for block, length, _ in read_records(aged.image, blocks)
    ]


@each_age
def test_image_opens_as_it_is_and_holds_what_its_records_say(name: str) -> None:
    aged = cache_ages()[name]
    metadata = open_cache(aged.image)
    assert_right(aged, metadata)
    fields = msgspec.to_builtins(metadata._superblock)
    assert held_by(metadata) == held_in(aged.image, fields)
    assert metadata.generation == max(aged.states)


def test_ages_hold_what_can_rot() -> None:
    fields = [msgspec.to_builtins(aged.superblock()) for aged in cache_ages().values()]
    kinds = {
        record[0]
        for aged, each in zip(cache_ages().values(), fields, strict=True)
        for blocks in live_ranges(each)
        for _, _, record in read_records(aged.image, blocks)
    }
    assert kinds == {"entries", "values", "dirty", "hints", "discards"}
    assert {each[23] for each in fields} == {0, 1}, "both sync areas"
    assert {each[10] for each in fields} == {0, 1}, "both arenas"


@each_age_and_bit
def test_rot_in_the_superblock_area_is_repaired(name: str, step: int) -> None:
    aged = cache_ages()[name]
    image = bytearray(aged.image)
    for block, length in superblock_lengths(aged.image):
        for bit in bits_to_flip(block, length, step):
            flip(image, bit)
            assert_right(aged, open_cache(image))
            flip(image, bit)


@each_age_and_bit
def test_rot_in_a_vouched_record_is_refused_by_name(name: str, step: int) -> None:
    aged = cache_ages()[name]
    image = bytearray(aged.image)
    for block, length in live_records(aged):
        for bit in bits_to_flip(block, length, step):
            flip(image, bit)
            is_padding = bit >= 8 * (block * 4096 + length)
            try:
                metadata = open_cache(image)
            except MetadataError as error:
                assert not is_padding
                assert_named(error, block)
            else:
                assert is_padding
                assert_right(aged, metadata)
            flip(image, bit)


@each_age
def test_rot_anywhere_else_changes_nothing(name: str) -> None:
    aged = cache_ages()[name]
    live = aged.live_blocks()
    rng = random.Random(name)
    image = bytearray(aged.image)
    for _ in range(2000 if DEEP else 100):
        bit = rng.randrange(8 * 4096 * SUPERBLOCK_BLOCKS, 8 * len(image))
        if bit // 8 // 4096 not in live:
            flip(image, bit)
            assert_right(aged, open_cache(image))  # and it stays rotten


@each_age
def test_two_rotten_superblock_copies_are_repaired_or_refused_by_name(
    name: str,
) -> None:
    aged = cache_ages()[name]
    for first, second in combinations(range(SUPERBLOCK_BLOCKS), 2):
        image = spoiled(aged.image, first, second)
        if first % NR_SLOTS != second % NR_SLOTS:
            assert_right(aged, open_cache(image))
            continue
        with pytest.raises(CorruptMetadata, match="a valid copy") as caught:
            open_cache(image)
        assert_named(caught.value)
