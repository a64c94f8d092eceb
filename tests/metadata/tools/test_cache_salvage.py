# SPDX-License-Identifier: Apache-2.0
"""Salvage of a cache: what is told as known is true, what is dirty stays dirty, what is lost is told."""

import contextlib
import random

import msgspec
import pytest
from bitarray import bitarray

from nbdtarget_metadata.cache.content import CacheContent
from nbdtarget_metadata.cache.records import LOGGED, SetEntries, decode_arena_record
from nbdtarget_metadata.cache.superblock import DIRTY_LOG
from nbdtarget_metadata.errors import (
    CorruptMetadata,
    MetadataError,
    MetadataTooSmall,
    NotFormatted,
    NotOurs,
)
from nbdtarget_metadata.log.chain import Chain
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.superblock import (
    CLEAN_SHUTDOWN,
    NEEDS_CHECK,
    superblock_writes,
)
from nbdtarget_metadata.tools.cache_check import CACHE_CHECKS
from nbdtarget_metadata.tools.cache_restore import restore_cache
from nbdtarget_metadata.tools.cache_salvage import _Arena, salvage_cache
from nbdtarget_metadata.tools.check import Findings, examine, mend
from nbdtarget_metadata.tools.salvage import Salvaged
from tests.support.metadata.cache_contents import (
    LIVES,
    CacheLife,
    content_of,
    journal_blocks,
    live_blocks,
    lives,
    needing_check,
    superblock_of,
)
from tests.support.metadata.cache_dumps import value
from tests.support.metadata.damage import rot
from tests.support.metadata.store import Store, drive, read_image

NAMES = sorted(LIVES)


def salvaged(image: bytes) -> Salvaged[CacheContent]:
    return read_image(image, salvage_cache(len(image)))


def examined(image: bytes, **options: bool) -> Findings:
    return read_image(image, examine(CACHE_CHECKS, len(image), **options))


def mappings(content: CacheContent) -> dict[int, int]:
    return {cblock: each >> 16 for cblock, each in enumerate(content.values) if each}


def check_found(found: CacheContent, truth: CacheContent) -> None:
    """Check that each mapping not called doubtful is true, and that each dirty block is there or counted as lost."""
    assert found.generation == truth.generation
    true = mappings(truth)
    doubtful = found.doubtful or bitarray(len(found.values))
    for cblock, oblock in mappings(found).items():
        if not doubtful[cblock]:
            assert true.get(cblock) == oblock
            assert found.dirty[cblock] >= truth.dirty[cblock]
        else:
            assert found.dirty[cblock]
    oblocks = list(mappings(found).values())
    assert len(oblocks) == len(set(oblocks))
    missing = [
        cblock
        for cblock in truth.dirty.search(1)
        if mappings(found).get(cblock) != true[cblock]
    ]
    assert found.nr_lost is not None
    if truth.flags & CLEAN_SHUTDOWN and found.flags & CLEAN_SHUTDOWN:
        assert not missing
    if not found.nr_lost and not found.nr_doubtful:
        assert not missing
    else:
        assert not found.flags & CLEAN_SHUTDOWN


@pytest.mark.parametrize("age", NAMES)
def test_intact_metadata_is_taken_as_it_is(age: str) -> None:
    aged = lives()[age]
    assert salvaged(aged.image) == (aged.content, ())


@pytest.mark.parametrize("age", NAMES)
def test_any_rotten_block_is_told_and_nothing_untrue_is_believed(age: str) -> None:
    aged = lives()[age]
    live = live_blocks(age)
    for block in range(4, len(aged.image) // BLOCK_SIZE):
        found = salvaged(rot(aged.image, block))
        assert bool(found.damage) == (block in live)
        check_found(found.content, aged.content)


@pytest.mark.parametrize("age", NAMES)
def test_any_damage_is_told_or_refused(age: str) -> None:
    aged = lives()[age]
    rng = random.Random(age)
    nr_found = 0
    live = live_blocks(age) or [4]
    for _ in range(80):
        blocks = rng.sample(live, rng.randint(1, min(4, len(live))))
        blocks += rng.sample(range(len(aged.image) // BLOCK_SIZE), 1)
        try:
            found = salvaged(rot(aged.image, *blocks)).content
        except CorruptMetadata:
            continue
        if found.generation == aged.content.generation and found.nr_lost is not None:
            check_found(found, aged.content)
            nr_found += 1
    assert nr_found > 10


@pytest.mark.parametrize("age", NAMES)
def test_what_was_salvaged_restores_and_salvages_again(age: str) -> None:
    image = lives()[age].image
    content = salvaged(rot(image, *live_blocks(age)[:2])).content
    store = Store(len(image))
    drive(store, restore_cache(content, device_size=store.size))
    again = content._replace(nr_lost=0, doubtful=None)
    assert content_of(bytes(store.durable)) == again
    assert salvaged(bytes(store.durable)) == (again, ())


# Which are known


def test_block_that_a_broken_record_may_have_moved_is_doubtful_and_dirty() -> None:
    image = lives()["journal"].image
    blocks = journal_blocks("journal")
    found = salvaged(rot(image, blocks[-2])).content
    # The last record is intact, so its blocks are known: it unmapped block 4.
    assert 4 not in mappings(found)
    assert found.doubtful is not None
    assert found.nr_doubtful == found.nr_mapped
    assert found.dirty == found.doubtful
    assert mappings(found).items() <= mappings(lives()["journal"].content).items()


def test_known_mapping_wins_over_a_doubtful_one() -> None:
    life = CacheLife()
    life.insert(1, 7)
    life.commit()
    life.metadata.remove(1)
    life.commit()  # this record will be lost
    life.insert(2, 7, dirty=True)
    life.commit()
    image = life.image()
    superblock = superblock_of(image)
    found = salvaged(rot(image, superblock.journal_end - 2)).content
    assert mappings(found) == {2: 7}
    assert (found.doubtful, found.nr_lost) == (None, 0)
    assert list(found.dirty.search(1)) == [2]


@pytest.mark.parametrize(("first", "second"), [(2, 5), (5, 2)])
def test_of_two_doubtful_ones_the_later_is_kept(first: int, second: int) -> None:
    arena = _Arena(superblock_of(lives()["fresh"].image), None)
    arena.values[first] = value(7)
    arena._stated[first] = 1
    arena.values[second] = value(7)
    arena._stated[second] = 2
    assert read_image(b"", arena.settle()) == []
    assert [cblock for cblock in range(40) if arena.values[cblock]] == [second]


def test_record_that_no_chain_leads_to_is_not_believed() -> None:
    life = CacheLife()
    for cblock in range(5):
        life.insert(cblock, cblock, dirty=True)
        life.commit()
    image = life.image()
    end = superblock_of(image).journal_end
    found = salvaged(rot(image, end - 2, end - 4)).content
    assert mappings(found) == {0: 0, 4: 4}
    assert (found.nr_doubtful, found.nr_lost) == (1, 3)


def test_doubtful_block_that_is_clean_for_sure_is_dropped_and_no_loss() -> None:
    image = lives()["plain_clean"].image
    found = salvaged(rot(image, journal_blocks("plain_clean")[1]))
    assert found.damage
    assert (found.content.nr_lost, found.content.doubtful) == (0, None)
    assert found.content.flags & CLEAN_SHUTDOWN


def test_dirty_block_that_is_missing_after_a_clean_shutdown_is_counted() -> None:
    aged = lives()["clean"]
    first = journal_blocks("clean")[0]
    found = salvaged(rot(aged.image, first)).content
    assert found.nr_lost
    assert found.flags == 0
    # No record says any more which blocks are clean, either.
    assert found.dirty.count() == found.nr_mapped


def test_broken_snapshot_is_no_loss_while_the_commit_before_it_stands() -> None:
    aged = lives()["compacted"]
    superblock = superblock_of(aged.image)
    assert superblock.snapshot_blocks
    found = salvaged(rot(aged.image, superblock.snapshot_block))
    assert found.damage
    assert (found.content.nr_lost, found.content.doubtful) == (0, None)
    assert mappings(found.content) == mappings(aged.content)
    # The same, after one more commit has overwritten the superblock that knew of it.
    aged = lives()["compacted_clean"]
    found = salvaged(rot(aged.image, superblock_of(aged.image).snapshot_block))
    assert found.content.nr_lost


def test_base_is_not_believed_beside_a_failed_commit() -> None:
    life = LIVES["compacted"]()
    life.metadata.abort()
    drive(life.store, life.metadata.record_needs_check())
    image = life.image()
    superblock = superblock_of(image)
    assert superblock.flags & NEEDS_CHECK
    found = salvaged(rot(image, superblock.snapshot_block)).content
    assert found.nr_lost
    assert not found.flags & NEEDS_CHECK


# Dirty blocks


@pytest.mark.parametrize("age", ["clean", "compacted_clean"])
def test_dirty_bits_that_cannot_be_read_are_set(age: str) -> None:
    aged = lives()[age]
    superblock = superblock_of(aged.image)
    found = salvaged(rot(aged.image, *live_blocks(age)[-superblock.sync_blocks :]))
    content = found.content
    assert content.nr_lost == 0
    assert mappings(content) == mappings(aged.content)
    assert content.dirty.count() == content.nr_mapped
    assert (content.flags, content.hints, content.discarded) == (0, None, None)


def test_with_a_dirty_log_only_what_is_logged_is_dirty() -> None:
    aged = lives()["logged_clean"]
    assert superblock_of(aged.image).nr_logged < aged.content.nr_mapped
    found = salvaged(rot(aged.image, live_blocks("logged_clean")[-1])).content
    assert found.dirty.count() == superblock_of(aged.image).nr_logged
    assert found.dirty & aged.content.dirty == aged.content.dirty


def test_doubtful_blocks_are_logged() -> None:
    image = lives()["logged"].image
    found = salvaged(rot(image, journal_blocks("logged")[-1])).content
    assert found.doubtful is not None
    for cblock in found.doubtful.search(1):
        assert found.values[cblock] & LOGGED


def test_lost_slot_falls_back_and_believes_no_dirty_bits() -> None:
    life = LIVES["clean"]()
    newest = superblock_of(life.image())
    slot = newest.generation % 2
    found = salvaged(rot(life.image(), slot, slot + 2))
    assert (found.content.generation, found.content.nr_lost) == (
        newest.generation - 1,
        None,
    )
    assert found.content.dirty.count() == found.content.nr_mapped
    life = LIVES["logged_clean"]()  # the slot of the commit before the shutdown is lost
    slot = (superblock_of(life.image()).generation + 1) % 2
    found = salvaged(rot(life.image(), slot, slot + 2))
    assert found.content.nr_lost is None
    assert not found.content.flags & CLEAN_SHUTDOWN
    assert found.content.dirty.count() == found.content.nr_mapped


def test_needs_check_is_taken_back() -> None:
    image = needing_check("clean")
    assert salvaged(image).content.flags == CLEAN_SHUTDOWN


def test_shrunk_device_gives_what_is_left() -> None:
    aged = lives()["clean"]
    end = superblock_of(aged.image).journal_end
    found = salvaged(aged.image[: end * BLOCK_SIZE])
    assert mappings(found.content) == mappings(aged.content)
    assert "the device has" in found.damage[0]
    found = salvaged(aged.image[: (end - 1) * BLOCK_SIZE])
    assert found.content.nr_doubtful
    with pytest.raises((MetadataTooSmall, NotOurs)):
        salvaged(aged.image[: 3 * BLOCK_SIZE])


def test_nothing_to_salvage_is_refused() -> None:
    image = lives()["clean"].image
    with pytest.raises(NotOurs):
        salvaged(rot(image, 0, 1, 2, 3))
    with pytest.raises(NotFormatted):
        salvaged(bytes(len(image)))
    with pytest.raises(NotOurs, match="metadata of a clone"):
        salvaged(clone_image())


def clone_image() -> bytes:
    from tests.support.metadata.clone_images import ages

    return ages()["commits"].image


def test_no_bytes_do_more_than_be_refused() -> None:
    rng = random.Random(2)
    image = lives()["logged_clean"].image
    for _ in range(200):
        changed = bytearray(image)
        for _ in range(rng.randint(1, 40)):
            changed[rng.randrange(len(image))] ^= 1 << rng.randrange(8)
        with contextlib.suppress(MetadataError):
            salvaged(bytes(changed))
        with contextlib.suppress(MetadataError):
            examined(bytes(changed))


# Check


def opens(image: bytes) -> bool:
    try:
        content_of(image)
    except MetadataError:
        return False
    return True


@pytest.mark.parametrize("age", NAMES)
def test_damage_is_what_opening_refuses(age: str) -> None:
    image = lives()[age].image
    for block in range(len(image) // BLOCK_SIZE):
        changed = rot(image, block)
        assert bool(examined(changed).damage) == (not opens(changed))


@pytest.mark.parametrize("age", NAMES)
def test_healthy_metadata_has_no_damage_and_no_leaks(age: str) -> None:
    findings = examined(lives()[age].image)
    assert (findings.damage, findings.unhealed) == ((), ())
    assert (findings.leaked_blocks, findings.complete) == (0, True)


def test_gaps_name_the_blocks() -> None:
    for block in (journal_blocks("clean")[1], live_blocks("clean")[-1]):
        findings = examined(rot(lives()["clean"].image, block))
        assert findings.damage[1:] == (
            f"no intact record in blocks {block} to {block}",
        )


def test_orphans_of_the_other_arena_and_sync_area_are_told() -> None:
    life = LIVES["compacted_clean"]()
    life.shut_down() if life.metadata.changed else None
    findings = examined(life.image())
    assert findings.orphans > 0
    image = bytearray(life.image())
    image[-1] = 1
    assert examined(bytes(image)).leaked_blocks == 1


@pytest.mark.parametrize("age", ["clean", "logged", "journal"])
def test_mend_clears_needs_check_and_leaves_clean_shutdown(age: str) -> None:
    image = needing_check(age)
    store = Store(len(image), image)
    steps = mend(CACHE_CHECKS, store.size, heal=True, clear_needs_check=True)
    assert drive(store, steps) == ("needs_check is cleared",)
    assert superblock_of(bytes(store.durable)).flags == lives()[age].content.flags
    before = bytes(store.durable)
    steps = mend(CACHE_CHECKS, store.size, heal=True, clear_needs_check=True)
    assert drive(store, steps) == ()
    assert bytes(store.current()) == before


def test_mend_heals_copies_and_refuses_damage() -> None:
    image = lives()["clean"].image
    store = Store(len(image), rot(image, 0))
    assert drive(
        store,
        mend(CACHE_CHECKS, store.size, heal=True, clear_needs_check=False),
    )
    assert bytes(store.durable) == image
    damaged = rot(image, live_blocks("clean")[0])
    store = Store(len(image), damaged)
    with pytest.raises(CorruptMetadata, match="no intact record"):
        drive(
            store,
            mend(
                CACHE_CHECKS,
                store.size,
                heal=True,
                clear_needs_check=True,
            ),
        )
    assert bytes(store.current()) == damaged


# Metadata that only a bug can make


def forged(entries: list[tuple[int, int]], **fields: object) -> bytes:
    """Metadata whose digests all fit, with one more journal record, and other counts."""
    image = lives()["clean"].image
    store = Store(len(image), image)
    superblock = superblock_of(image)
    chain = Chain(
        block=superblock.journal_end,
        end=superblock.arena_end,
        digest=superblock.journal_digest,
    )
    packed = b"".join(
        cblock.to_bytes(4, "little") + each.to_bytes(8, "little")
        for cblock, each in entries
    )
    if entries:
        record = SetEntries(
            generation=superblock.generation, previous=chain.digest, entries=packed
        )
        store.do(chain.append(record))
    changed = msgspec.structs.replace(
        superblock,
        journal_blocks=chain.block - superblock.journal_block,
        journal_digest=chain.digest,
        **fields,
    )
    for write in superblock_writes(changed):
        store.do(write)
    return bytes(store.current())


FORGED = {
    "two of one origin block": (
        [(30, value(99)), (31, value(93))],
        {"nr_mapped": 13},
        ["cache blocks of origin block 99", "cache blocks of origin block 93"],
    ),
    "behind the origin": (
        [(30, value(100)), (31, value(101))],
        {"nr_mapped": 13},
        ["origin block of cache block 30: expected below 100", "cache block 31"],
    ),
    "flags": ([(30, 5 << 16 | 9)], {}, ["expected 0, or a valid one with known flags"]),
    "not valid": ([(30, 5 << 16)], {}, ["mapping"]),
    "dirty on unmapped": (
        [(0, 0), (3, 0)],
        {"nr_mapped": 9},
        ["dirty bit of cache block 0, which is unmapped", "cache block 3, which is"],
    ),
    "counts": (
        [],
        {"nr_mapped": 10, "nr_logged": 1, "nr_dirty": 1},
        ["number of mapped", "number of logged", "number of dirty"],
    ),
    "behind the cache": ([(40, value(1))], {}, ["expected below 40, found 40"]),
    "behind the smaller cache": (
        [],
        {"nr_cblocks": 9, "nr_mapped": 8},
        ["mapping of a cache block: expected below 9, found 10"],
    ),
    "not logged": (
        [],
        {"incompat": DIRTY_LOG},
        ["dirty bit of cache block 0, which is not logged", "block 3, which is not"],
    ),
    "hints of nobody": (
        [],
        {"policy_name": ""},
        ["no hints without a policy"],
    ),
    "many": (
        [(cblock, value(100 + cblock)) for cblock in range(12, 40)],
        {},
        ["cache block 12", "and 13 more faults"],
    ),
    "far behind": ([((1 << 32) - 1, value(1))], {}, ["below"]),
}


@pytest.mark.parametrize(("entries", "fields", "lines"), FORGED.values(), ids=FORGED)
def test_all_that_cannot_be_is_told_though_digests_fit(
    entries: list[tuple[int, int]], fields: dict[str, object], lines: list[str]
) -> None:
    image = forged(entries, **fields)
    assert not opens(image)
    damage = "\n".join(examined(image).damage)
    for line in lines:
        assert line in damage
    found = salvaged(image)
    assert found.damage
    for cblock, oblock in mappings(found.content).items():
        assert oblock < 100
        assert cblock < int(fields.get("nr_cblocks", 40))  # type: ignore[call-overload]
    oblocks = list(mappings(found.content).values())
    assert len(oblocks) == len(set(oblocks))


def test_forgery_is_what_is_wrong() -> None:
    """The forged metadata has no other fault. Otherwise the test above could pass for another reason."""
    image = forged([(30, value(1))], nr_mapped=12)
    assert examined(image).damage == ()
    superblock = superblock_of(image)
    block = superblock.journal_end - 1
    body = memoryview(image)[block * BLOCK_SIZE + 32 :]
    length = int.from_bytes(image[block * BLOCK_SIZE + 12 :][:4], "little")
    assert decode_arena_record(body[:length], "").generation == superblock.generation
