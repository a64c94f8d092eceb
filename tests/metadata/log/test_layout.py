# SPDX-License-Identifier: Apache-2.0
"""Sizes of the metadata device, foreign content, and rot in every sector."""

from functools import cache

import pytest

from nbdtarget_metadata.clone import encoding, records
from nbdtarget_metadata.clone.load import load_bitmap, new_bitmap
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.clone.superblock import (
    NR_REGIONS_MAX,
    CloneSuperblock,
    arena_blocks_for,
    device_size_with,
)
from nbdtarget_metadata.errors import CorruptMetadata, MetadataTooSmall, NotOurs
from nbdtarget_metadata.log.chain import Chain
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, HEADER_SIZE, peek_blocks
from nbdtarget_metadata.log.layout import JOURNAL_BLOCKS_MIN
from nbdtarget_metadata.log.superblock import SUPERBLOCK_BLOCKS
from tests.support.metadata.clone_workload import (
    NR_REGIONS,
    REGION_SIZE,
    TARGET_SIZE,
    UUID,
    CloneWorkload,
    open_image,
    rotten,
)
from tests.support.metadata.store import SECTOR, Store, drive, read_image
from tests.support.metadata.superblocks import make_superblock

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.mark.parametrize("nr_regions", [1, 2048, 4097])
def test_arena_holds_two_snapshots_and_a_journal(nr_regions: int) -> None:
    size = device_size_with(nr_regions, JOURNAL_BLOCKS_MIN)
    blocks = arena_blocks_for(nr_regions, size)
    longest = records.snapshot_blocks_max(nr_regions)
    assert blocks == 2 * longest + JOURNAL_BLOCKS_MIN
    with pytest.raises(MetadataTooSmall) as caught:
        arena_blocks_for(nr_regions, size - 1)
    assert (caught.value.needed, caught.value.given) == (size, size - 1)


def test_larger_device_is_not_used_in_full() -> None:
    right = CloneMetadata.device_size_for(NR_REGIONS)
    blocks = arena_blocks_for(NR_REGIONS, right)
    assert arena_blocks_for(NR_REGIONS, 1 << 40) == blocks
    assert arena_blocks_for(NR_REGIONS, right - BLOCK_SIZE) == blocks - 1


def test_new_bitmap_is_made_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdtarget_metadata.clone.load.STEP_REGIONS", 64)
    steps = new_bitmap(150)
    assert [next(steps) for _ in range(3)] == [(), (), ()]
    with pytest.raises(StopIteration) as stop:
        next(steps)
    assert (len(stop.value.value), stop.value.value.count()) == (150, 0)


def foreign_places() -> list[int]:
    size = 1 << 20
    second_arena = (4 + arena_blocks_for(NR_REGIONS, size)) * BLOCK_SIZE
    return [
        4 * BLOCK_SIZE,
        64 * 1024,
        256 * 1024 - 1,
        second_arena,
        size - 256 * 1024,
        size - 1,
    ]


@pytest.mark.parametrize("place", range(6))
def test_foreign_content_behind_the_superblocks_is_not_overwritten(place: int) -> None:
    at = foreign_places()[place]
    store = Store(1 << 20)
    store.durable[at] = 7
    steps = CloneMetadata.format(
        device_size=store.size,
        region_size=REGION_SIZE,
        target_size=TARGET_SIZE,
        uuid=UUID,
    )
    with pytest.raises(NotOurs, match=f"byte {at} holds 07"):
        drive(store, steps)
    assert store.pending == []


def test_shrunk_device_is_refused() -> None:
    superblock = make_superblock(1)
    with pytest.raises(MetadataTooSmall):
        drive(Store(8192), load_bitmap(superblock, 8192))


def test_more_regions_than_there_may_be_are_refused() -> None:
    superblock = make_superblock(1, target_size=(NR_REGIONS_MAX + 1) * 4096)
    with pytest.raises(CorruptMetadata, match="nr_regions"):
        drive(Store(1 << 20), load_bitmap(superblock, 1 << 20))


@pytest.mark.parametrize(
    ("field", "value", "where"),
    [
        ("snapshot_digest", bytes(16), "digest of the snapshot"),
        ("journal_digest", bytes(16), "digest of the journal"),
        ("nr_hydrated", 1, "number of hydrated regions"),
    ],
)
def test_superblock_that_vouches_for_something_else_is_refused(
    field: str, value: object, where: str
) -> None:
    superblock = make_superblock(1, **{field: value})
    with pytest.raises(CorruptMetadata, match=where):
        drive(Store(1 << 20), load_bitmap(superblock, 1 << 20))


# Rot


@cache
def used_image() -> tuple[bytes, CloneSuperblock]:
    """Return an image with a snapshot of several records and a journal, and its superblock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK_BYTES", 64)
        patch.setattr(encoding, "CHUNK_REGIONS", 512)
        world = CloneWorkload(0)
        world.run(100)
        while True:
            world._event()
            live = world.metadata._superblock
            if live.snapshot_blocks > 3 and live.journal_blocks > 4:
                break
        image = bytes(world.store.durable)
    return image, open_image(image)._superblock


def vouched_sectors(image: bytes, superblock: CloneSuperblock) -> set[int]:
    """Return the sectors of snapshot and journal that hold more than padding."""
    sectors: set[int] = set()
    block = superblock.snapshot_block
    while block < superblock.journal_end:
        at = block * BLOCK_SIZE
        length = int.from_bytes(image[at + 12 : at + 16], "little")
        last = (at + HEADER_SIZE + length - 1) // SECTOR
        sectors.update(range(at // SECTOR, last + 1))
        block += peek_blocks(memoryview(image)[at:])
    return sectors


def zeroed(image: bytes, sector: int) -> bytes:
    at = sector * SECTOR
    return image[:at] + bytes(SECTOR) + image[at + SECTOR :]


@pytest.mark.parametrize("damage", [rotten, zeroed], ids=["flipped", "zeroed"])
def test_rot_in_the_superblock_area_changes_nothing(damage: object) -> None:
    assert callable(damage)
    image, superblock = used_image()
    bits = open_image(image).hydrated
    for sector in range(SUPERBLOCK_BLOCKS * BLOCK_SIZE // SECTOR):
        metadata = open_image(damage(image, sector))
        assert metadata._superblock == superblock
        assert metadata.hydrated == bits


@pytest.mark.parametrize("damage", [rotten, zeroed], ids=["flipped", "zeroed"])
def test_rot_in_an_arena_is_refused_by_name_if_it_is_vouched_for(
    damage: object,
) -> None:
    assert callable(damage)
    image, superblock = used_image()
    bits = open_image(image).hydrated
    vouched = vouched_sectors(image, superblock)
    assert len(vouched) > 8
    begin = SUPERBLOCK_BLOCKS * BLOCK_SIZE // SECTOR
    for sector in range(begin, len(image) // SECTOR):
        if sector in vouched:
            with pytest.raises(CorruptMetadata, match="record at block"):
                open_image(damage(image, sector))
        else:
            assert open_image(damage(image, sector)).hydrated == bits


def test_swapped_journal_blocks_are_refused() -> None:
    image, superblock = used_image()
    first = superblock.journal_block * BLOCK_SIZE
    second = first + BLOCK_SIZE
    third = second + BLOCK_SIZE
    swapped = image[:first] + image[second:third] + image[first:second] + image[third:]
    with pytest.raises(CorruptMetadata):
        open_image(swapped)


def test_older_journal_block_in_its_place_is_refused() -> None:
    # After a lost write the block is intact, but it belongs to an earlier use of the arena.
    image, superblock = used_image()
    block = superblock.journal_end - 1
    chain = Chain(block=block, end=block + 1, digest=UUID)
    runs = records.new_runs()
    records.append_runs(runs, 0, 1)
    write = records.append_content(chain, 1, runs)
    stale = (
        image[: write.offset] + bytes(write.data) + image[write.offset + BLOCK_SIZE :]
    )
    with pytest.raises(CorruptMetadata):
        read_image(stale, load_bitmap(superblock, len(image)))
