# SPDX-License-Identifier: Apache-2.0
"""CacheMetadata: making, opening, the clean shutdown and its lies, modes, resizing."""

from collections.abc import Callable

import msgspec
import pytest

from nbdtarget_metadata.cache import blocks as cache_blocks
from nbdtarget_metadata.cache.metadata import FLUSH_CACHE, FLUSH_ORIGIN, CacheMetadata
from nbdtarget_metadata.cache.superblock import PolicyIdentity
from nbdtarget_metadata.errors import (
    BlockSizeMismatch,
    CorruptMetadata,
    FailedMetadata,
    MetadataTooSmall,
    NotFormatted,
    NotOurs,
    ReadOnlyMetadata,
)
from nbdtarget_metadata.log.superblock import NR_SLOTS, superblock_writes
from nbdtarget_metadata.mode import Mode
from nbdtarget_metadata.operations import Flush, Write
from tests.support.metadata import small_clone as small
from tests.support.metadata.clone_workload import rotten
from tests.support.metadata.small_cache import (
    BLOCK_SIZE,
    NR_CBLOCKS,
    NR_OBLOCKS,
    ORIGIN_SIZE,
    SIZE,
    SMQ,
    commit,
    dirty,
    finish,
    format_on,
    mapped,
    open_on,
    shut_down,
    start,
)
from tests.support.metadata.store import Store, drive


@pytest.fixture
def store() -> Store:
    return Store(SIZE)


@pytest.fixture
def metadata(store: Store) -> CacheMetadata:
    """Started, without dirty_log."""
    metadata = format_on(store)
    start(store, metadata)
    return metadata


# Making and opening


def test_fresh_metadata_is_empty_and_clean(store: Store) -> None:
    metadata = format_on(store)
    assert (metadata.nr_cblocks, metadata.nr_oblocks) == (NR_CBLOCKS, NR_OBLOCKS)
    assert (metadata.nr_mapped, metadata.nr_dirty) == (0, 0)
    assert metadata.mode is Mode.RW
    assert metadata.clean_when_opened
    assert not metadata.changed
    assert (metadata.used_blocks, metadata.total_blocks) == (4, SIZE // 4096)


def test_formatting_writes_only_superblocks(store: Store) -> None:
    format_on(store)
    writes = [each for each in store.log if isinstance(each, Write)]
    assert [each.offset // 4096 for each in writes] == [0, 2, 1, 3]


def test_opening_writes_nothing_and_flushes_before_it_reads(store: Store) -> None:
    format_on(store)
    store.log.clear()
    open_on(store)
    assert isinstance(store.log[0], Flush)
    assert not any(isinstance(each, Write) for each in store.log)


def test_all_zero_device_is_not_formatted(store: Store) -> None:
    with pytest.raises(NotFormatted):
        open_on(store)


def test_metadata_is_not_formatted_again(store: Store, metadata: CacheMetadata) -> None:
    with pytest.raises(NotOurs, match="cache metadata, generation 2"):
        format_on(store)


def test_kinds_do_not_take_each_other(store: Store) -> None:
    format_on(store)
    with pytest.raises(NotOurs, match="metadata of a cache"):
        small.open_on(store)
    clones = Store(small.SIZE)
    small.format_on(clones)
    with pytest.raises(NotOurs, match="metadata of a clone"):
        open_on(clones)


def test_device_that_is_too_small_stays_untouched() -> None:
    store = Store(SIZE - 4096)
    with pytest.raises(MetadataTooSmall):
        format_on(store)
    assert store.log == []


def test_changed_block_size_is_refused(store: Store, metadata: CacheMetadata) -> None:
    with pytest.raises(BlockSizeMismatch, match="data block size"):
        open_on(store, block_size=2 * BLOCK_SIZE)


def test_size_for_a_million_blocks_is_known() -> None:
    assert CacheMetadata.device_size_for(1 << 20) < 57 << 20


# Mappings


def test_committed_mappings_survive(store: Store, metadata: CacheMetadata) -> None:
    metadata.insert(3, 99, dirty=False)
    metadata.insert(7, 0, dirty=True)
    commit(store, metadata)
    metadata.insert(8, 50, dirty=False)
    opened = open_on(store)
    assert mapped(opened) == {3: 99, 7: 0}
    assert opened.maybe_cblock(99) == 3
    assert opened.maybe_cblock(50) is None
    assert metadata.maybe_oblock(8) == 50


@pytest.mark.parametrize(
    ("is_dirty", "flushes"), [(True, FLUSH_CACHE), (False, FLUSH_CACHE | FLUSH_ORIGIN)]
)
def test_insertion_is_committed_after_the_flushes_it_needs(
    metadata: CacheMetadata, is_dirty: bool, flushes: int
) -> None:
    metadata.insert(3, 9, dirty=is_dirty)
    transaction = metadata.pre_commit()
    assert transaction is not None
    assert transaction.taken.flushes == flushes


def test_removal_needs_the_origin_flushed(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(3, 9, dirty=False)
    commit(store, metadata)
    metadata.remove(3)
    second = metadata.pre_commit()
    assert second is not None
    assert second.taken.flushes == FLUSH_ORIGIN


def test_cache_block_is_not_reused_before_its_removal_is_committed(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(3, 9, dirty=False)
    commit(store, metadata)
    metadata.remove(3)
    assert not metadata.may_insert(3)
    transaction = metadata.pre_commit()
    assert not metadata.may_insert(3)
    with pytest.raises(AssertionError):
        metadata.insert(3, 10, dirty=False)
    finish(store, transaction)
    metadata.insert(3, 10, dirty=False)


def test_origin_block_is_not_held_twice(metadata: CacheMetadata) -> None:
    metadata.insert(3, 9, dirty=False)
    with pytest.raises(AssertionError, match="cache block 3 holds origin block 9"):
        metadata.insert(4, 9, dirty=False)
    assert mapped(metadata) == {3: 9}


def test_dirty_block_is_not_removed(metadata: CacheMetadata) -> None:
    metadata.insert(3, 9, dirty=True)
    with pytest.raises(AssertionError):
        metadata.remove(3)


def test_idle_cache_commits_nothing(store: Store, metadata: CacheMetadata) -> None:
    metadata.insert(3, 9, dirty=False)
    commit(store, metadata)
    metadata.set_dirty(3)
    assert not metadata.changed
    assert metadata.pre_commit() is None


# Clean and unclean shutdown


def test_clean_shutdown_records_everything(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(3, 9, dirty=False)
    metadata.insert(4, 8, dirty=True)
    metadata.statistics.read_hits = 5
    metadata.statistics.write_misses = 6
    shut_down(store, metadata)
    opened = open_on(store)
    assert opened.clean_when_opened
    assert list(opened.mappings(SMQ)) == [(3, 9, False, 103), (4, 8, True, 104)]
    assert opened.discarded is not None
    assert opened.discarded.block_size == 2 * BLOCK_SIZE
    assert opened.discarded.bits.to01() == "0110" * 12
    assert (opened.statistics.read_hits, opened.statistics.write_misses) == (5, 6)


def test_clean_shutdown_needs_both_devices_flushed(metadata: CacheMetadata) -> None:
    transaction = metadata.pre_commit(clean_shutdown=True)
    assert transaction is not None
    assert transaction.taken.flushes == FLUSH_CACHE | FLUSH_ORIGIN


@pytest.mark.parametrize(
    ("policy", "believed"),
    [
        (PolicyIdentity("smq", (2, 7, 1)), True),
        (PolicyIdentity("smq", (3, 0, 0)), False),
        (PolicyIdentity("mq", (2, 0, 0)), False),
        (PolicyIdentity("smq", (2, 0, 0), 8), False),
        (PolicyIdentity("", (0, 0, 0)), False),
    ],
)
def test_hints_are_believed_by_the_policy_that_gave_them(
    store: Store, metadata: CacheMetadata, policy: PolicyIdentity, believed: bool
) -> None:
    metadata.insert(3, 9, dirty=False)
    shut_down(store, metadata)
    (mapping,) = open_on(store).mappings(policy)
    assert mapping.hint == (103 if believed else None)


def test_after_an_unclean_shutdown_all_is_dirty_and_nothing_else_believed(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(3, 9, dirty=False)
    metadata.statistics.read_hits = 5
    shut_down(store, metadata)
    again = open_on(store)
    start(store, again)
    opened = open_on(store)
    assert not opened.clean_when_opened
    assert list(opened.mappings(SMQ)) == [(3, 9, True, None)]
    assert opened.nr_dirty == 1
    assert opened.discarded is None
    assert opened.statistics.read_hits == 5


def test_discards_are_forgotten_with_the_clean_blocks(
    store: Store, metadata: CacheMetadata
) -> None:
    shut_down(store, metadata)
    opened = open_on(store)
    assert opened.discarded is not None
    # The origin was changed, so what was discarded then may have been written since.
    drive(store, opened.drop_clean())
    assert opened.discarded is None


def test_nothing_changes_before_the_clean_shutdown_is_cleared(store: Store) -> None:
    metadata = format_on(store)
    with pytest.raises(AssertionError, match="clean_shutdown"):
        metadata.insert(3, 9, dirty=False)
    drive(store, metadata.start(dirty_log=False))
    transaction = metadata.pre_commit()
    with pytest.raises(AssertionError, match="clean_shutdown"):
        metadata.insert(3, 9, dirty=False)
    finish(store, transaction)
    metadata.insert(3, 9, dirty=False)


def test_nothing_changes_after_a_full_sync_has_begun(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(3, 9, dirty=False)
    transaction = metadata.pre_commit(clean_shutdown=True)
    with pytest.raises(AssertionError, match="clean_shutdown"):
        metadata.set_dirty(3)
    finish(store, transaction)
    with pytest.raises(AssertionError, match="clean_shutdown"):
        metadata.set_dirty(3)
    assert metadata.pre_commit(clean_shutdown=True) is None
    start(store, metadata)
    metadata.set_dirty(3)


def test_start_after_an_unclean_shutdown_needs_no_commit_of_its_own(
    store: Store, metadata: CacheMetadata
) -> None:
    opened = open_on(store)
    for _ in range(NR_SLOTS):
        assert opened.needs_rewrite
        commit(store, opened)
    drive(store, opened.start(dirty_log=False))
    assert opened.may_change
    assert not opened.changed


def test_shutdown_of_a_cache_that_changed_unstarted_keeps_the_sync_area(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(3, 9, dirty=True)
    shut_down(store, metadata)
    opened = open_on(store)
    area = opened._superblock.sync_area
    drive(store, opened.resize_origin(ORIGIN_SIZE + BLOCK_SIZE))
    shut_down(store, opened, PolicyIdentity("mq", (2, 0, 0)))
    assert opened._superblock.sync_area == 1 - area
    assert dirty(open_on(store)) == {3}


def test_clean_shutdown_of_dirty_blocks_writes_no_mappings(
    store: Store, metadata: CacheMetadata
) -> None:
    for cblock in range(NR_CBLOCKS):
        metadata.insert(cblock, cblock, dirty=True)
    commit(store, metadata)
    store.log.clear()
    shut_down(store, metadata)
    sync_begin = metadata._superblock.sync_begin
    writes = [each.offset // 4096 for each in store.log if isinstance(each, Write)]
    assert all(block < 4 or block >= sync_begin for block in writes)


def test_transaction_holds_what_blocks_were_at_its_pre_commit(
    store: Store, metadata: CacheMetadata
) -> None:
    for cblock in range(4):
        metadata.insert(cblock, cblock, dirty=False)
    transaction = metadata.pre_commit()
    metadata.remove(0)
    metadata.insert(9, 0, dirty=False)
    finish(store, transaction)
    assert mapped(open_on(store)) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert metadata._before is None, "no transaction needs the old values"
    metadata.remove(1)
    commit(store, metadata)
    assert mapped(open_on(store)) == {2: 2, 3: 3, 9: 0}


def test_commit_costs_what_changed() -> None:
    store = Store(CacheMetadata.device_size_for(50_000))
    metadata = format_on(store, nr_cblocks=50_000)
    start(store, metadata)
    for oblock in range(NR_OBLOCKS):
        metadata.insert(7 * oblock, oblock, dirty=False)
    store.log.clear()
    commit(store, metadata)
    lengths = [len(each.data) for each in store.log if isinstance(each, Write)]
    assert lengths == [4096, 4096, 4096]  # journal, superblock twice


@pytest.mark.parametrize("block", range(4))
def test_rotten_superblock_copy_is_healed_by_commits(
    store: Store, metadata: CacheMetadata, block: int
) -> None:
    metadata.insert(3, 9, dirty=False)
    commit(store, metadata)
    opened = open_on(Store(SIZE, rotten(bytes(store.durable), 8 * block)))
    assert opened.notes
    assert mapped(opened) == {3: 9}
    assert opened.changed
    healed = Store(SIZE, rotten(bytes(store.durable), 8 * block))
    again = open_on(healed)
    while again.changed:
        commit(healed, again)
    assert open_on(healed).notes == ()


def test_unknown_ro_compat_feature_opens_read_only(store: Store) -> None:
    metadata = format_on(store)
    for generation in (2, 3):
        superblock = msgspec.structs.replace(
            metadata._superblock, generation=generation, ro_compat=1
        )
        for write in superblock_writes(superblock):
            store.do(write)
    opened = open_on(store)
    assert opened.mode is Mode.RO
    assert opened.pre_commit(clean_shutdown=True) is None
    with pytest.raises(ReadOnlyMetadata):
        drive(store, opened.start(dirty_log=False))


# Modes


def test_abort_keeps_what_is_in_core_and_refuses_changes(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(3, 9, dirty=True)
    metadata.pre_commit()
    metadata.abort()
    assert metadata.mode is Mode.RO
    assert metadata.maybe_oblock(3) == 9
    assert metadata.changed
    with pytest.raises(ReadOnlyMetadata):
        metadata.set_dirty(3)
    with pytest.raises(ReadOnlyMetadata):
        metadata.pre_commit()
    assert not metadata.needs_compaction
    assert list(metadata.compact()) == []


def test_needs_check_is_durable_and_refuses_opening(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(3, 9, dirty=True)
    metadata.pre_commit()
    metadata.abort()
    store.log.clear()
    drive(store, metadata.record_needs_check())
    assert isinstance(store.log[-1], Flush)
    image = bytes(store.durable)
    with pytest.raises(CorruptMetadata, match="needs_check"):
        open_on(Store(SIZE, image))


CALLS: dict[str, Callable[[CacheMetadata], object]] = {
    "mappings": lambda metadata: list(metadata.mappings(SMQ)),
    "maybe_oblock": lambda metadata: metadata.maybe_oblock(0),
    "maybe_cblock": lambda metadata: metadata.maybe_cblock(0),
    "is_dirty": lambda metadata: metadata.is_dirty(0),
    "mapping_survives": lambda metadata: metadata.mapping_survives(0),
    "may_insert": lambda metadata: metadata.may_insert(0),
    "may_dirty": lambda metadata: metadata.may_dirty(0),
    "start": lambda metadata: list(metadata.start(dirty_log=False)),
    "insert": lambda metadata: metadata.insert(0, 0, dirty=False),
    "remove": lambda metadata: metadata.remove(0),
    "log_dirty": lambda metadata: metadata.log_dirty(0),
    "set_dirty": lambda metadata: metadata.set_dirty(0),
    "set_clean": lambda metadata: metadata.set_clean(0),
    "begin_write_through": lambda metadata: metadata.begin_write_through(0),
    "end_write_through": lambda metadata: metadata.end_write_through(0),
    "clear_log": lambda metadata: metadata.clear_log(),
    "resize_cache": lambda metadata: list(metadata.resize_cache(1)),
    "resize_origin": lambda metadata: list(metadata.resize_origin(1)),
    "prepare_shutdown": lambda metadata: metadata.prepare_shutdown(),
    "pre_commit": lambda metadata: metadata.pre_commit(),
    "abort": lambda metadata: metadata.abort(),
    "record_needs_check": lambda metadata: list(metadata.record_needs_check()),
    "compact": lambda metadata: list(metadata.compact()),
}


@pytest.mark.parametrize("name", CALLS)
def test_failed_metadata_answers_nothing(name: str, metadata: CacheMetadata) -> None:
    metadata.insert(0, 5, dirty=False)
    metadata.fail()
    assert metadata.mode is Mode.FAIL
    with pytest.raises(FailedMetadata):
        CALLS[name](metadata)


# dirty_log


@pytest.fixture
def logged(store: Store) -> CacheMetadata:
    """Started with dirty_log; blocks 0 to 9 are mapped, clean and committed."""
    metadata = format_on(store)
    start(store, metadata, dirty_log=True)
    for cblock in range(10):
        metadata.insert(cblock, cblock, dirty=False)
    commit(store, metadata)
    return metadata


def test_block_turns_dirty_only_after_that_is_durable(
    store: Store, logged: CacheMetadata
) -> None:
    assert not logged.may_dirty(3)
    with pytest.raises(AssertionError):
        logged.set_dirty(3)
    logged.log_dirty(3)
    logged.log_dirty(4)
    transaction = logged.pre_commit()
    assert transaction is not None
    assert transaction.taken.flushes == 0
    assert not logged.may_dirty(3)
    finish(store, transaction)
    assert logged.may_dirty(3)
    logged.set_dirty(3)
    assert dirty(open_on(store)) == {3, 4}


def test_block_inserted_dirty_need_not_wait(
    store: Store, logged: CacheMetadata
) -> None:
    logged.insert(20, 20, dirty=True)
    commit(store, logged)
    assert dirty(open_on(store)) == {20}


def test_cleaned_block_is_taken_back_by_a_commit_that_flushes_the_origin(
    store: Store, logged: CacheMetadata
) -> None:
    logged.log_dirty(3)
    commit(store, logged)
    logged.set_dirty(3)
    logged.set_clean(3)
    assert logged.may_dirty(3)
    assert not logged.changed
    assert dirty(open_on(store)) == {3}
    logged.remove(5)
    transaction = logged.pre_commit()
    assert transaction is not None
    assert transaction.taken.flushes & FLUSH_ORIGIN
    assert not logged.may_dirty(3)
    finish(store, transaction)
    assert (dirty(open_on(store)), logged.nr_logged) == (set(), 0)


def test_block_that_is_written_through_is_not_taken_back(
    store: Store, logged: CacheMetadata
) -> None:
    logged.log_dirty(3)
    commit(store, logged)
    logged.set_clean(3)
    logged.begin_write_through(3)
    logged.remove(5)
    commit(store, logged)
    assert dirty(open_on(store)) == {3}
    logged.end_write_through(3)
    logged.remove(6)
    commit(store, logged)
    assert dirty(open_on(store)) == set()
    with pytest.raises(AssertionError, match="logged first"):
        logged.begin_write_through(3)


def test_log_is_cleared_on_demand(store: Store, logged: CacheMetadata) -> None:
    logged.log_dirty(3)
    commit(store, logged)
    logged.set_clean(3)
    assert logged.nr_cleaned == 1
    logged.clear_log()
    transaction = logged.pre_commit()
    assert transaction is not None
    assert transaction.taken.flushes == FLUSH_CACHE | FLUSH_ORIGIN
    finish(store, transaction)
    assert not logged.changed
    assert dirty(open_on(store)) == set()


def test_clearing_that_a_full_sync_cuts_short_changes_nothing_behind_it(
    store: Store, logged: CacheMetadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_blocks, "TAKEN_BACK_MAX", 2)
    for cblock in range(5):
        logged.log_dirty(cblock)
    commit(store, logged)
    for cblock in range(5):
        logged.set_clean(cblock)
    logged.clear_log()
    shut_down(store, logged)
    assert not logged.changed
    assert (logged.nr_logged, dirty(open_on(store))) == (3, set())
    with pytest.raises(AssertionError, match="clean_shutdown"):
        logged.clear_log()
    start(store, logged, dirty_log=True)
    assert dirty(open_on(store)) == {2, 3, 4}
    assert logged.nr_cleaned == 3


def test_dirty_log_is_switched_on_with_what_is_dirty(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(3, 9, dirty=True)
    metadata.insert(4, 8, dirty=False)
    shut_down(store, metadata)
    opened = open_on(store)
    start(store, opened, dirty_log=True)
    assert opened.may_dirty(3)
    assert dirty(open_on(store)) == {3}


def test_dirty_log_is_switched_off_before_anything_is_dirtied(
    store: Store, logged: CacheMetadata
) -> None:
    shut_down(store, logged)
    opened = open_on(store)
    start(store, opened, dirty_log=False)
    opened.set_dirty(3)
    assert dirty(open_on(store)) == set(range(10))
