# SPDX-License-Identifier: Apache-2.0
"""Rot: whatever bit of an image flips, opening repairs it or refuses it by name.

One rotten copy of a superblock costs nothing. A rotten record is refused if a superblock vouches for it, and does not
matter otherwise. Neither an older state is ever served, nor one that never existed.

Every seventh bit of every envelope is flipped; `make test-long` flips every one, and `make rot` (ROT_DEEP=1) those of
the padding, too.
"""

import random
from itertools import combinations

import pytest

from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.errors import CorruptMetadata, MetadataError
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.superblock import NR_SLOTS, SUPERBLOCK_BLOCKS
from tests.support.metadata.clone_images import (
    Aged,
    ages,
    open_image,
    opening,
    record_blocks,
    run_bounded,
    vouched_bits,
)
from tests.support.metadata.damage import (
    DEEP,
    assert_named,
    bits_to_flip,
    each_age_and_step,
    flip,
    spoiled,
    superblock_lengths,
)
from tests.support.metadata.report import check
from tests.support.metadata.small_clone import commit
from tests.support.metadata.store import Store, drive

pytestmark = pytest.mark.slow

each_age = pytest.mark.parametrize("name", ages())
each_age_and_bit = each_age_and_step(ages(), every_bit=ages())


def assert_right(aged: Aged, metadata: CloneMetadata) -> None:
    assert metadata.generation >= aged.acknowledged, "rolled back"
    assert metadata.hydrated.tobytes() == aged.states[metadata.generation]
    assert metadata.nr_hydrated == metadata.hydrated.count()


@each_age
def test_image_opens_as_it_is_and_holds_what_its_records_say(name: str) -> None:
    aged = ages()[name]
    metadata = open_image(aged.image)
    assert_right(aged, metadata)
    held = vouched_bits(aged.image, metadata._superblock)
    assert metadata.hydrated.tobytes() == held
    assert metadata.generation == max(aged.states)


@each_age_and_bit
def test_rot_in_the_superblock_area_is_repaired(name: str, step: int) -> None:
    aged = ages()[name]
    image = bytearray(aged.image)
    for block, length in superblock_lengths(aged.image):
        for bit in bits_to_flip(block, length, step):
            flip(image, bit)
            assert_right(aged, open_image(image))
            flip(image, bit)


@each_age_and_bit
def test_rot_in_a_vouched_record_is_refused_by_name(name: str, step: int) -> None:
    aged = ages()[name]
    image = bytearray(aged.image)
    for block, length in record_blocks(aged.image, aged.superblock()):
        for bit in bits_to_flip(block, length, step):
            flip(image, bit)
            is_padding = bit >= 8 * (block * BLOCK_SIZE + length)
            try:
                metadata = open_image(image)
            except MetadataError as error:
                assert not is_padding
                assert_named(error, block)
            else:
                assert is_padding
                assert_right(aged, metadata)
            flip(image, bit)


@each_age
def test_rot_anywhere_else_changes_nothing(name: str) -> None:
    aged = ages()[name]
    superblock = aged.superblock()
    live = range(superblock.snapshot_block, superblock.journal_end)
    rng = random.Random(name)
    image = bytearray(aged.image)
    for _ in range(2000 if DEEP else 200):
        bit = rng.randrange(8 * BLOCK_SIZE * SUPERBLOCK_BLOCKS, 8 * len(image))
        if bit // 8 // BLOCK_SIZE not in live:
            flip(image, bit)
            assert_right(aged, open_image(image))  # and it stays rotten


@each_age
def test_two_rotten_superblock_copies_are_repaired_or_refused_by_name(
    name: str,
) -> None:
    aged = ages()[name]
    for first, second in combinations(range(SUPERBLOCK_BLOCKS), 2):
        image = spoiled(aged.image, first, second)
        if first % NR_SLOTS != second % NR_SLOTS:
            assert_right(aged, open_image(image))
            continue
        with pytest.raises(CorruptMetadata, match="a valid copy") as caught:
            open_image(image)
        assert_named(caught.value)


@each_age
def test_rotten_record_is_refused_beside_a_rotten_copy_too(name: str) -> None:
    aged = ages()[name]
    superblock = aged.superblock()
    newest = superblock.generation % NR_SLOTS
    for block, _ in record_blocks(aged.image, superblock):
        for copy in range(SUPERBLOCK_BLOCKS):
            image = spoiled(aged.image, block, copy)
            if name == "torn_commit" and copy == newest:
                # The only copy of a generation that was never acknowledged: if the record belongs
                # to that generation alone, all acknowledged data is whole.
                assert_right_or_named(aged, image)
                continue
            with pytest.raises(CorruptMetadata) as caught:
                open_image(image)
            assert_named(caught.value)


def assert_right_or_named(aged: Aged, image: bytearray) -> None:
    try:
        metadata = open_image(image)
    except MetadataError as error:
        assert_named(error)
    else:
        assert_right(aged, metadata)


@each_age
@pytest.mark.parametrize("block", range(SUPERBLOCK_BLOCKS))
def test_commits_after_a_repair_heal_every_copy(name: str, block: int) -> None:
    image = spoiled(ages()[name].image, block)
    store = Store(len(image), bytes(image))
    metadata = drive(store, opening(store.size))
    assert metadata.changed, "one good copy is not enough to acknowledge anything"
    assert any(f"block {block}" in note for note in metadata.notes)
    for region in range(2):
        metadata.set_hydrated(region, region + 1)
        if metadata.changed:
            commit(store, metadata)
    healed = bytes(store.durable)
    assert run_bounded(healed, check(len(healed))).warnings == ()
    assert open_image(healed).notes == ()
