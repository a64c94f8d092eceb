# SPDX-License-Identifier: Apache-2.0
"""Salvage believes what intact digests vouch for, no bit more, and counts what is missing."""

import contextlib
import random

import pytest
from bitarray import bitarray

from nbdtarget_metadata.clone.content import CloneContent, read_clone_content
from nbdtarget_metadata.clone.records import append_content, append_runs, new_runs
from nbdtarget_metadata.clone.superblock import CloneSuperblock
from nbdtarget_metadata.errors import (
    CorruptMetadata,
    MetadataError,
    MetadataTooSmall,
    NotFormatted,
    NotOurs,
)
from nbdtarget_metadata.log.chain import Chain
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN, NEEDS_CHECK
from nbdtarget_metadata.operations import Write
from nbdtarget_metadata.tools.clone_restore import restore_clone
from nbdtarget_metadata.tools.clone_salvage import salvage_clone
from nbdtarget_metadata.tools.salvage import Salvaged
from tests.support.metadata.clone_images import (
    NR_REGIONS,
    Life,
    _compacted,
    ages,
    live_blocks,
)
from tests.support.metadata.damage import rot
from tests.support.metadata.small_clone import commit
from tests.support.metadata.store import Store, drive, read_image
from tests.support.metadata.superblocks import make_superblock, put_all
from tests.support.places import FIXTURES

AGES = sorted(ages())


def salvaged(image: bytes) -> Salvaged[CloneContent]:
    return read_image(image, salvage_clone(len(image)))


def content_of(image: bytes) -> CloneContent:
    return read_image(image, read_clone_content(len(image)))


def commit_without_changes(life: Life) -> None:
    commit(life.store, life.metadata, clean=True)


@pytest.mark.parametrize("age", AGES)
def test_intact_metadata_is_taken_as_it_is(age: str) -> None:
    image = ages()[age].image
    assert salvaged(image) == (content_of(image), ())


@pytest.mark.parametrize("age", AGES)
def test_any_rotten_block_loses_at_most_its_own_record(age: str) -> None:
    image = ages()[age].image
    truth = content_of(image).hydrated
    live = live_blocks(age)
    for block in range(4, len(image) // BLOCK_SIZE):
        found = salvaged(rot(image, block))
        hydrated = found.content.hydrated
        assert not (hydrated & ~truth).any()
        assert found.content.nr_lost == truth.count() - hydrated.count()
        assert bool(found.damage) == (block in live)
        if block not in live:
            assert hydrated == truth


@pytest.mark.parametrize("age", AGES)
def test_any_damage_gives_true_bits_and_an_exact_count_or_is_refused(age: str) -> None:
    aged = ages()[age]
    rng = random.Random(age)
    for _ in range(60):
        blocks = rng.sample(range(len(aged.image) // BLOCK_SIZE), rng.randint(2, 6))
        try:
            found = salvaged(rot(aged.image, *blocks)).content
        except CorruptMetadata:
            continue
        truth = bitarray(endian="little")
        truth.frombytes(aged.states[found.generation])
        del truth[NR_REGIONS:]
        assert not (found.hydrated & ~truth).any()
        if found.nr_lost is not None:
            assert found.nr_lost == truth.count() - found.hydrated.count()


def test_hole_in_the_journal_is_told_with_its_number() -> None:
    image = ages()["commits"].image
    found = salvaged(rot(image, live_blocks("commits")[1]))
    assert found.content.nr_lost == 21
    assert found.content.hydrated.count() == 42
    assert "journal record at block 5" in found.damage[0]


@pytest.mark.parametrize("nr", [0, -1])
def test_end_of_the_chain_is_no_end_of_the_salvage(nr: int) -> None:
    image = ages()["compacted"].image
    block = live_blocks("compacted")[nr]
    assert salvaged(rot(image, block)).content.hydrated.count() > 0


def test_record_without_which_nothing_is_missing_is_no_loss() -> None:
    # The other arena, of which an older superblock still knows, says the same.
    life = Life()
    life.change(300)
    life.commit()
    life.compact()
    commit_without_changes(life)
    image = bytes(life.store.current())
    found = salvaged(rot(image, life.metadata._superblock.snapshot_block))
    assert found.damage
    assert found.content.nr_lost == 0
    assert found.content.hydrated == life.metadata.hydrated


def test_full_bitmap_needs_no_record() -> None:
    life = Life()
    life.metadata.set_hydrated(0, NR_REGIONS)
    commit(life.store, life.metadata)
    image = bytes(life.store.current())
    found = salvaged(rot(image, 4))
    assert found.damage
    assert found.content.hydrated.all()
    assert found.content.nr_lost == 0


def test_flags_after_a_repair() -> None:
    image = ages()["clean_shutdown"].image
    live = live_blocks("clean_shutdown")
    assert salvaged(image).content.flags == CLEAN_SHUTDOWN
    found = salvaged(rot(image, live[0]))
    assert found.content.nr_lost
    assert found.content.flags == 0


def test_needs_check_is_taken_back() -> None:
    area = put_all(
        make_superblock(10, flags=NEEDS_CHECK | CLEAN_SHUTDOWN), make_superblock(9)
    )
    image = bytes(area).ljust(64 * BLOCK_SIZE, b"\0")
    assert salvaged(image).content.flags == CLEAN_SHUTDOWN


def test_lost_slot_falls_back_and_says_that_it_may_be_too_old() -> None:
    aged = ages()["commits"]  # generation 4 in slot 0
    found = salvaged(rot(aged.image, 0, 2))
    generation = aged.acknowledged - 1
    assert (found.content.generation, found.content.nr_lost) == (generation, None)
    assert found.content.hydrated.tobytes() == aged.states[generation]
    assert found.damage


def test_orphans_prove_nothing() -> None:
    # The journal holds an intact transaction whose superblock never came.
    aged = ages()["mid_journal"]
    truth = content_of(aged.image).hydrated
    live = live_blocks("mid_journal")
    for blocks in ([live[-1]], [0, 2], [1, 3]):
        assert not (salvaged(rot(aged.image, *blocks)).content.hydrated & ~truth).any()


def test_unfinished_snapshot_in_the_older_arena_is_ignored() -> None:
    """An unfinished snapshot begins with the uuid, too, and holds bits that no commit vouched for."""
    life = Life()
    _compacted(life)
    life.fill()
    life.compact()
    life.commit()  # switches: the older superblock names the other arena
    newest = life.metadata._superblock
    truth = bitarray(life.metadata.hydrated)
    life.metadata.set_hydrated(100, 200)
    for operation in life.metadata.compact():
        if isinstance(operation, Write):
            life.store.do(operation)
    image = bytes(life.store.current())
    found = salvaged(rot(image, newest.snapshot_block))
    assert found.content.nr_lost == truth.count() - found.content.hydrated.count()
    assert not (found.content.hydrated & ~truth).any()


def test_older_superblock_still_vouches_for_what_the_newest_lost() -> None:
    life = Life()
    _compacted(life)
    life.fill()
    life.compact()
    life.commit()
    newest = life.metadata._superblock
    image = bytes(life.store.current())
    found = salvaged(rot(image, newest.snapshot_block))
    # All bits, except for those that the switching commit itself may have added.
    assert found.content.nr_lost is not None
    assert found.content.nr_lost <= 1


def test_shrunk_device_gives_what_is_left() -> None:
    image = ages()["commits"].image
    found = salvaged(image[: 6 * BLOCK_SIZE])
    assert found.content.hydrated.count() == 42
    assert found.content.nr_lost == 21
    assert "the device has 24576" in found.damage[0]
    with pytest.raises((MetadataTooSmall, NotOurs)):
        salvaged(image[: 3 * BLOCK_SIZE])


def test_nothing_to_salvage_is_refused() -> None:
    image = ages()["commits"].image
    with pytest.raises(NotOurs):
        salvaged(rot(image, 0, 1, 2, 3))
    bytes_at = bytearray(image)
    for block in range(4):
        bytes_at[block * BLOCK_SIZE + 60] ^= 1
    with pytest.raises(CorruptMetadata, match="all superblocks"):
        salvaged(bytes(bytes_at))
    with pytest.raises(NotFormatted):
        salvaged(bytes(len(image)))
    with pytest.raises(NotOurs):
        salvaged(b"x" * len(image))


def test_contradicting_superblocks_are_refused() -> None:
    area = put_all(make_superblock(10), make_superblock(9, uuid=bytes(16)))
    with pytest.raises(CorruptMetadata, match="uuid"):
        salvaged(bytes(area).ljust(64 * BLOCK_SIZE, b"\0"))


@pytest.mark.parametrize("age", AGES)
def test_what_was_salvaged_restores(age: str) -> None:
    image = ages()[age].image
    content = salvaged(rot(image, 4, 8, 20)).content
    store = Store(len(image))
    drive(store, restore_clone(content, device_size=store.size))
    assert content_of(bytes(store.durable)) == content._replace(nr_lost=0)


def test_no_bytes_do_more_than_be_refused() -> None:
    rng = random.Random(2)
    image = (FIXTURES / "clone-v1-overtaken.img").read_bytes()
    for _ in range(100):
        changed = bytearray(image)
        for _ in range(rng.randint(1, 40)):
            changed[rng.randrange(len(image))] ^= 1 << rng.randrange(8)
        with contextlib.suppress(MetadataError):
            salvaged(bytes(changed))


# Chains that no crash leaves and only a disk that loses writes can make


def record(block: int, generation: int, previous: bytes, region_nr: int) -> Write:
    """A record that says that one region is hydrated."""
    runs = new_runs()
    append_runs(runs, region_nr, 1)
    chain = Chain(block=block, end=64, digest=previous)
    return append_content(chain, generation, runs)


def image_of(
    superblock: CloneSuperblock, older: CloneSuperblock, *writes: Write
) -> bytes:
    image = bytearray(64 * BLOCK_SIZE)
    area = put_all(superblock, older)
    image[: len(area)] = area
    for write in writes:
        image[write.offset : write.offset + len(write.data)] = write.data
    return bytes(image)


BROKEN = bytes([1]) * 16  # a digest that nothing has
UUID = bytes(range(16))


def test_older_superblock_vouches_by_digest_alone() -> None:
    newest = make_superblock(
        10,
        arena=1,
        snapshot_block=28,
        journal_blocks=2,
        journal_digest=BROKEN,
        nr_hydrated=3,
    )
    older = make_superblock(9, journal_blocks=1, journal_digest=BROKEN)
    image = image_of(newest, older, record(4, 9, UUID, 7), record(28, 10, UUID, 8))
    assert list(salvaged(image).content.hydrated.search(1)) == [8]


def test_record_of_a_later_generation_is_not_believed() -> None:
    newest = make_superblock(10, journal_blocks=1, journal_digest=BROKEN, nr_hydrated=1)
    image = image_of(newest, make_superblock(9), record(4, 11, UUID, 7))
    assert salvaged(image).content.nr_lost == 1


def test_record_that_no_chain_leads_to_is_not_believed() -> None:
    newest = make_superblock(10, journal_blocks=3, journal_digest=BROKEN, nr_hydrated=3)
    image = image_of(
        newest, make_superblock(9), record(4, 9, UUID, 7), record(6, 10, BROKEN, 8)
    )
    assert list(salvaged(image).content.hydrated.search(1)) == [7]


def test_record_that_its_successor_does_not_name_is_not_believed() -> None:
    last = record(5, 10, BROKEN, 8)
    newest = make_superblock(
        10, journal_blocks=2, journal_digest=bytes(last.data[16:32]), nr_hydrated=2
    )
    image = image_of(newest, make_superblock(9), record(4, 9, UUID, 7), last)
    assert list(salvaged(image).content.hydrated.search(1)) == [8]
