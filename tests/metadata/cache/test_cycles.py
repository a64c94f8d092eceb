# SPDX-License-Identifier: Apache-2.0
"""CacheMetadata as one object that is suspended, reloaded and resumed, in whatever mode."""

from array import array
from itertools import islice

import pytest
from bitarray import bitarray

from nbdtarget_metadata.cache.load import Discarded
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.cache.superblock import PolicyIdentity
from nbdtarget_metadata.errors import CorruptMetadata, FailedMetadata, ReadOnlyMetadata
from nbdtarget_metadata.mode import Mode
from nbdtarget_metadata.operations import Write
from tests.support.metadata.clone_workload import rotten
from tests.support.metadata.small_cache import (
    NR_CBLOCKS,
    SIZE,
    commit,
    dirty,
    finish,
    format_on,
    mapped,
    open_on,
    start,
)
from tests.support.metadata.store import Store, drive

SMQ = PolicyIdentity("smq", (2, 0, 0))


@pytest.fixture
def store() -> Store:
    return Store(SIZE)


@pytest.fixture
def metadata(store: Store) -> CacheMetadata:
    """Started; block 3 is mapped, dirty and committed."""
    metadata = format_on(store)
    start(store, metadata)
    metadata.insert(3, 9, dirty=True)
    commit(store, metadata)
    return metadata


def prepare(metadata: CacheMetadata, first_hint: int = 100) -> None:
    hints = array("I", range(first_hint, first_hint + metadata.nr_cblocks))
    discarded = Discarded(4096, bitarray(f"{first_hint:08b}", endian="little"))
    metadata.prepare_shutdown(policy=SMQ, hints=hints, discarded=discarded)


def hints_of(metadata: CacheMetadata) -> dict[int, int | None]:
    return {each.cblock: each.hint for each in metadata.mappings(SMQ)}


def discarded_in(metadata: CacheMetadata) -> str | None:
    return None if metadata.discarded is None else metadata.discarded.bits.to01()


# Suspending and resuming


def test_suspended_and_resumed_over_and_over(
    store: Store, metadata: CacheMetadata
) -> None:
    for cycle in range(5):
        prepare(metadata, cycle)
        commit(store, metadata, clean=True)
        # A reload over this object, and one that opens it anew, see the same.
        for each in (metadata, open_on(store)):
            assert each.is_recorded_clean
            assert hints_of(each)[3] == cycle + 3
            assert discarded_in(each) == f"{cycle:08b}"
            assert dirty(each) == ({3} if cycle == 0 else {3, 10 + cycle})
        start(store, metadata, dirty_log=bool(cycle % 2))
        assert not metadata.is_recorded_clean
        assert not open_on(store).is_recorded_clean
        if cycle:
            metadata.set_clean(10 + cycle)
        metadata.insert(11 + cycle, 20 + cycle, dirty=True)


def test_suspended_again_without_a_resume_commits_nothing(
    store: Store, metadata: CacheMetadata
) -> None:
    prepare(metadata)
    commit(store, metadata, clean=True)
    prepare(metadata)
    assert metadata.pre_commit(clean_shutdown=True) is None
    assert metadata.pre_commit() is None
    start(store, metadata)
    assert metadata.may_change


def test_uncommitted_shutdown_is_not_recorded_by_a_later_sync(
    store: Store, metadata: CacheMetadata
) -> None:
    commit(store, metadata, clean=True)
    prepare(metadata)
    start(store, metadata)
    commit(store, metadata, clean=True)
    assert discarded_in(open_on(store)) is None


def test_what_was_prepared_waits_for_the_full_sync(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(4, 8, dirty=False)
    prepare(metadata)
    commit(store, metadata)
    commit(store, metadata, clean=True)
    assert hints_of(open_on(store)) == {3: 103, 4: 104}


def test_refused_resume_leaves_the_flag_as_it_was(
    store: Store, metadata: CacheMetadata
) -> None:
    commit(store, metadata, clean=True)
    drive(store, metadata.start(dirty_log=True))
    assert metadata.is_recorded_clean
    assert open_on(store).is_recorded_clean
    drive(store, metadata.start(dirty_log=False))
    commit(store, metadata)
    metadata.set_dirty(3)


def test_sync_without_hints_leaves_none_in_core(
    store: Store, metadata: CacheMetadata
) -> None:
    prepare(metadata)
    commit(store, metadata, clean=True)
    start(store, metadata)
    commit(store, metadata, clean=True)
    assert hints_of(metadata) == {3: None}
    assert metadata.discarded is None


def test_hint_of_what_a_block_held_before_is_not_believed(
    store: Store, metadata: CacheMetadata
) -> None:
    prepare(metadata)
    commit(store, metadata, clean=True)
    start(store, metadata)
    metadata.insert(7, 30, dirty=False)
    assert hints_of(metadata) == {3: 103, 7: 0}


def test_discards_are_not_believed_once_something_may_be_written(
    store: Store, metadata: CacheMetadata
) -> None:
    prepare(metadata)
    commit(store, metadata, clean=True)
    drive(store, metadata.start(dirty_log=False))
    assert metadata.discarded is not None
    commit(store, metadata)
    assert metadata.discarded is None


@pytest.mark.parametrize("block", range(4))
def test_commit_that_heals_keeps_what_a_full_sync_recorded(
    store: Store, metadata: CacheMetadata, block: int
) -> None:
    prepare(metadata)
    commit(store, metadata, clean=True)
    healed = Store(SIZE, rotten(bytes(store.durable), 8 * block))
    opened = open_on(healed)
    while opened.changed:
        commit(healed, opened)
    for each in (opened, open_on(healed)):
        assert each.is_recorded_clean
        assert hints_of(each) == {3: 103}
        assert discarded_in(each) == f"{100:08b}"
        assert dirty(each) == {3}
    assert open_on(healed).notes == ()
    start(healed, opened)
    assert not open_on(healed).is_recorded_clean


def test_start_over_a_single_copy_waits_for_a_second_one(store: Store) -> None:
    metadata = format_on(store)
    drive(store, metadata.start(dirty_log=False))
    transaction = metadata.pre_commit()
    assert transaction is not None
    drive(store, transaction.journal())
    first, _ = transaction.superblock()
    assert isinstance(first, Write)
    store.do(first)
    opened = open_on(store)
    assert not opened.clean_when_opened
    drive(store, opened.start(dirty_log=False))
    # If that copy rots, the opening finds the generation before it, which says clean.
    assert not opened.may_change
    commit(store, opened)
    assert opened.may_change


# Read only


def test_read_only_metadata_is_suspended_and_resumed_unchanged(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.abort()
    for _ in range(3):
        prepare(metadata)
        with pytest.raises(ReadOnlyMetadata):
            metadata.pre_commit(clean_shutdown=True)
        with pytest.raises(ReadOnlyMetadata):
            drive(store, metadata.start(dirty_log=False))
        assert metadata.mode is Mode.RO
        assert not metadata.may_change
        assert not metadata.is_recorded_clean
        assert (mapped(metadata), dirty(metadata)) == ({3: 9}, {3})


def test_failed_sync_leaves_no_discards_to_believe(
    store: Store, metadata: CacheMetadata
) -> None:
    prepare(metadata)
    commit(store, metadata, clean=True)
    start(store, metadata)
    prepare(metadata)
    metadata.pre_commit(clean_shutdown=True)
    metadata.abort()
    assert metadata.discarded is None
    assert not metadata.is_recorded_clean


# mapping_survives


def test_mapping_is_vouched_for_from_its_commit_to_its_removal(
    store: Store, metadata: CacheMetadata
) -> None:
    assert metadata.mapping_survives(3)
    assert not metadata.mapping_survives(4)
    metadata.insert(4, 8, dirty=False)
    assert not metadata.mapping_survives(4)
    transaction = metadata.pre_commit()
    assert not metadata.mapping_survives(4)
    finish(store, transaction)
    assert metadata.mapping_survives(4)
    metadata.remove(4)
    assert not metadata.mapping_survives(4)
    commit(store, metadata)
    assert not metadata.mapping_survives(4)


def test_aborted_metadata_vouches_for_what_is_on_disk_and_unchanged(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(4, 8, dirty=False)
    commit(store, metadata)
    metadata.remove(4)
    metadata.insert(5, 7, dirty=True)
    transaction = metadata.pre_commit()
    assert transaction is not None
    drive(store, transaction.journal())
    metadata.insert(6, 6, dirty=True)
    metadata.abort()
    vouched = {c for c in range(NR_CBLOCKS) if metadata.mapping_survives(c)}
    assert vouched == {3}
    assert mapped(open_on(store)) == {3: 9, 4: 8}
    assert dirty(open_on(store)) == {3, 4}


def test_cleaning_and_dirtying_change_no_mapping(metadata: CacheMetadata) -> None:
    metadata.set_clean(3)
    assert metadata.mapping_survives(3)
    metadata.set_dirty(3)
    assert metadata.mapping_survives(3)


# needs_check


def test_abort_outside_a_commit_is_recorded(
    store: Store, metadata: CacheMetadata
) -> None:
    assert not metadata.needs_check
    metadata.abort()
    assert not metadata.needs_check
    drive(store, metadata.record_needs_check())
    assert metadata.needs_check
    with pytest.raises(CorruptMetadata, match="needs_check"):
        open_on(Store(SIZE, bytes(store.durable)))
    assert metadata.maybe_oblock(3) == 9


def test_abort_in_a_compaction_is_recorded(
    store: Store, metadata: CacheMetadata
) -> None:
    compaction = metadata.compact()
    next(compaction)
    metadata.abort()
    compaction.close()
    drive(store, metadata.record_needs_check())
    with pytest.raises(CorruptMetadata, match="needs_check"):
        open_on(Store(SIZE, bytes(store.durable)))


def test_abort_before_anything_was_started_is_recorded(store: Store) -> None:
    metadata = format_on(store)
    metadata.abort()
    drive(store, metadata.record_needs_check())
    with pytest.raises(CorruptMetadata, match="needs_check"):
        open_on(Store(SIZE, bytes(store.durable)))


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_abort_in_the_middle_of_superblocks_is_recorded(
    store: Store, metadata: CacheMetadata, copies: int
) -> None:
    metadata.insert(4, 8, dirty=False)
    transaction = metadata.pre_commit()
    assert transaction is not None
    drive(store, transaction.journal())
    for write in islice(transaction.superblock(), copies):
        assert isinstance(write, Write)
        store.do(write)
    metadata.abort()
    drive(store, metadata.record_needs_check())
    with pytest.raises(CorruptMetadata, match="needs_check"):
        open_on(Store(SIZE, bytes(store.durable)))


def test_needs_check_is_recorded_twice(store: Store, metadata: CacheMetadata) -> None:
    metadata.abort()
    for _ in range(2):
        drive(store, metadata.record_needs_check())
        with pytest.raises(CorruptMetadata, match="needs_check"):
            open_on(Store(SIZE, bytes(store.durable)))


def test_failed_metadata_tells_its_flags_all_the_same(metadata: CacheMetadata) -> None:
    metadata.fail()
    assert not metadata.needs_check
    assert not metadata.is_recorded_clean
    with pytest.raises(FailedMetadata):
        metadata.mapping_survives(3)
