# SPDX-License-Identifier: Apache-2.0
"""Commits: what is durable when, healing, and moving between the arenas."""

from collections.abc import Callable

import pytest

from nbdtarget_metadata.clone.metadata import CloneMetadata, CloneTransaction
from nbdtarget_metadata.clone.records import snapshot_blocks_max
from nbdtarget_metadata.clone.superblock import device_size_with
from nbdtarget_metadata.errors import FailedMetadata, MetadataError, ReadOnlyMetadata
from nbdtarget_metadata.log.layout import JOURNAL_BLOCKS_MIN
from nbdtarget_metadata.operations import Flush, Write
from tests.support.metadata.clone_workload import rotten
from tests.support.metadata.small_clone import (
    CATCH_UP_RUNS,
    NR_REGIONS,
    REGION_SIZE,
    SIZE,
    commit,
    fill_journal,
    finish,
    format_on,
    open_on,
)
from tests.support.metadata.store import Store, drive

# Committing


def test_committed_bits_are_there_when_opened_again(
    store: Store, metadata: CloneMetadata
) -> None:
    metadata.set_hydrated(3, 7)
    metadata.set_hydrated(5, 9)
    commit(store, metadata)
    metadata.set_hydrated(50, 51)  # not committed
    opened = open_on(store)
    assert list(opened.runs(0, NR_REGIONS))[1] == (3, 9, True)
    assert opened.nr_hydrated == 6
    assert opened.generation == 2


def test_nothing_to_commit_is_no_transaction(metadata: CloneMetadata) -> None:
    assert metadata.pre_commit() is None
    metadata.set_hydrated(0, 1)
    assert metadata.changed


def test_setting_hydrated_regions_again_changes_nothing(
    store: Store, metadata: CloneMetadata
) -> None:
    metadata.set_hydrated(0, 5)
    commit(store, metadata)
    metadata.set_hydrated(1, 4)
    assert not metadata.changed


def test_changed_until_the_transaction_is_done(
    store: Store, metadata: CloneMetadata
) -> None:
    metadata.set_hydrated(0, 1)
    transaction = metadata.pre_commit()
    assert transaction is not None
    drive(store, transaction.journal())
    assert metadata.changed
    drive(store, transaction.superblock())
    assert metadata.changed
    transaction.done()
    assert not metadata.changed


def test_changes_after_pre_commit_ride_on_the_next(
    store: Store, metadata: CloneMetadata
) -> None:
    metadata.set_hydrated(0, 1)
    transaction = metadata.pre_commit()
    metadata.set_hydrated(1, 2)
    finish(store, transaction)
    assert metadata.changed
    assert open_on(store).nr_hydrated == 1
    commit(store, metadata)
    assert open_on(store).nr_hydrated == 2


def test_commit_is_one_write_a_flush_and_two_fua_writes(
    store: Store, metadata: CloneMetadata
) -> None:
    metadata.set_hydrated(7, 9)
    store.log.clear()
    commit(store, metadata)
    record, flush, *copies = store.log
    assert isinstance(record, Write)
    assert (record.offset, len(record.data), record.fua) == (4 * 4096, 4096, False)
    assert isinstance(flush, Flush)
    assert [each.fua for each in copies if isinstance(each, Write)] == [True, True]
    assert metadata.used_blocks == 5


def test_hydration_is_done_when_it_is_committed(
    store: Store, metadata: CloneMetadata
) -> None:
    # Weakness 16 of the kernel's: it looks at bits of the next transaction, too.
    metadata.set_hydrated(0, NR_REGIONS - 1)
    transaction = metadata.pre_commit()
    metadata.set_hydrated(NR_REGIONS - 1, NR_REGIONS)
    finish(store, transaction)
    assert metadata.nr_hydrated == NR_REGIONS
    assert not metadata.hydration_done
    commit(store, metadata)
    assert metadata.hydration_done


def test_one_transaction_at_a_time(metadata: CloneMetadata) -> None:
    metadata.set_hydrated(0, 1)
    metadata.pre_commit()
    with pytest.raises(AssertionError, match="one transaction"):
        metadata.pre_commit()


def test_superblock_before_the_journal_is_refused(
    store: Store, metadata: CloneMetadata
) -> None:
    metadata.set_hydrated(0, 1)
    transaction = metadata.pre_commit()
    assert transaction is not None
    with pytest.raises(AssertionError, match="vouches"):
        drive(store, transaction.superblock())
    with pytest.raises(AssertionError):
        transaction.done()


# The clean_shutdown flag


def test_clean_shutdown_is_committed_without_any_change(
    store: Store, metadata: CloneMetadata
) -> None:
    metadata.set_hydrated(0, 1)
    commit(store, metadata)
    assert not open_on(store).clean_shutdown
    store.log.clear()
    commit(store, metadata, clean=True)
    assert len(store.log) == 2, "both copies of the superblock, and nothing else"
    assert open_on(store).clean_shutdown


def test_clean_shutdown_that_is_on_disk_is_not_committed_again(
    store: Store, metadata: CloneMetadata
) -> None:
    assert metadata.pre_commit(clean_shutdown=True) is None


def test_next_commit_clears_clean_shutdown(
    store: Store, metadata: CloneMetadata
) -> None:
    opened = open_on(store)
    assert opened.clean_shutdown
    opened.set_hydrated(0, 1)
    assert open_on(store).clean_shutdown, "nothing is recorded yet"
    commit(store, opened)
    assert opened.clean_shutdown, "as found"
    assert not open_on(store).clean_shutdown


# Healing


@pytest.mark.parametrize("block", range(4))
def test_rotten_copy_is_healed_by_commits(block: int) -> None:
    store = Store(SIZE)
    metadata = format_on(store)
    metadata.set_hydrated(0, 3)
    commit(store, metadata)
    store = Store(SIZE, rotten(bytes(store.durable), block * 8))
    opened = open_on(store)
    assert opened.nr_hydrated == 3
    assert opened.changed, "one more fault would lose it"
    assert len(opened.notes) == 1
    assert f"(block {block})" in opened.notes[0]
    while opened.changed:
        commit(store, opened)
    healed = open_on(store)
    assert healed.notes == ()
    assert healed.nr_hydrated == 3


def test_interrupted_format_is_healed_by_a_commit() -> None:
    store = Store(SIZE)
    metadata = format_on(store)
    store.durable[3 * 4096 : 4 * 4096] = bytes(4096)
    opened = open_on(store)
    assert opened.generation == metadata.generation
    assert opened.changed


def test_no_compaction_while_a_superblock_has_one_good_copy(
    store: Store, metadata: CloneMetadata
) -> None:
    fill_journal(store, metadata)
    store.durable[:] = rotten(bytes(store.durable), 0)
    opened = open_on(store)
    assert not opened.needs_compaction
    assert list(opened.compact()) == []
    while opened.changed:
        commit(store, opened)
    assert opened.needs_compaction


# Ends


STEPS: list[Callable[[Store, CloneTransaction], None]] = [
    lambda store, transaction: drive(store, transaction.journal()),
    lambda store, transaction: drive(store, transaction.superblock()),
    lambda store, transaction: transaction.done(),
]


@pytest.mark.parametrize("at", range(3), ids=["journal", "superblock", "done"])
@pytest.mark.parametrize(
    ("end", "error"),
    [
        (CloneMetadata.abort, ReadOnlyMetadata),
        (CloneMetadata.fail, FailedMetadata),
    ],
    ids=["abort", "fail"],
)
def test_transaction_ends_with_the_mode(
    store: Store,
    metadata: CloneMetadata,
    at: int,
    end: Callable[[CloneMetadata], None],
    error: type[MetadataError],
) -> None:
    metadata.set_hydrated(0, 1)
    transaction = metadata.pre_commit()
    assert transaction is not None
    for step in STEPS[:at]:
        step(store, transaction)
    end(metadata)
    with pytest.raises(error):
        STEPS[at](store, transaction)


def test_abort_while_the_journal_is_written_ends_it(
    store: Store, metadata: CloneMetadata
) -> None:
    metadata.set_hydrated(0, 1)
    transaction = metadata.pre_commit()
    assert transaction is not None
    journal = transaction.journal()
    next(journal)
    metadata.abort()
    with pytest.raises(ReadOnlyMetadata):
        next(journal)


# Compaction


def test_commit_after_compaction_switches_arenas(
    store: Store, metadata: CloneMetadata
) -> None:
    fill_journal(store, metadata)
    used = metadata.used_blocks
    drive(store, metadata.compact())
    assert not metadata.needs_compaction, "the next commit does it"
    assert metadata.used_blocks == used
    metadata.set_hydrated(99, 100)
    commit(store, metadata)
    assert metadata.used_blocks == 4 + 1 + 1
    opened = open_on(store)
    assert opened.hydrated == metadata.hydrated
    assert opened._superblock.nr_compactions == 1


def test_clean_shutdown_alone_switches_arenas(
    store: Store, metadata: CloneMetadata
) -> None:
    fill_journal(store, metadata)
    drive(store, metadata.compact())
    commit(store, metadata, clean=True)
    assert open_on(store).used_blocks == 4 + 1


def test_commits_during_a_compaction_are_in_the_new_arena(
    store: Store, metadata: CloneMetadata
) -> None:
    fill_journal(store, metadata)
    compaction = metadata.compact()
    assert next(compaction) == ()  # the only chunk has been copied
    operation = next(compaction)
    metadata.set_hydrated(91, 92)
    commit(store, metadata)
    assert isinstance(operation, Write)
    store.do(operation)
    for operation in compaction:
        assert isinstance(operation, Flush)
        store.do(operation)
    metadata.set_hydrated(93, 94)
    commit(store, metadata)
    opened = open_on(store)
    assert opened._superblock.nr_compactions == 1
    assert opened.hydrated == metadata.hydrated


def test_compaction_catches_up_with_what_is_committed_meanwhile(
    small_chunks: None,
) -> None:
    nr_regions = 2048
    target_size = nr_regions * REGION_SIZE
    store = Store(CloneMetadata.device_size_for(nr_regions))
    metadata = format_on(store, target_size=target_size)
    for region_nr in range(0, nr_regions, 3):
        metadata.set_hydrated(region_nr, region_nr + 1)
    commit(store, metadata)
    compaction = metadata.compact()
    changes = iter(range(1, nr_regions, 3))
    journaled = 0
    for operation in compaction:
        if isinstance(operation, Write | Flush):
            store.do(operation)
            journaled += isinstance(operation, Write)
            if journaled <= 20:
                region_nr = next(changes)
                metadata.set_hydrated(region_nr, region_nr + 1)
                commit(store, metadata)
    assert journaled > snapshot_blocks_max(nr_regions), "more than the snapshot"
    region_nr = next(changes)
    metadata.set_hydrated(region_nr, region_nr + 1)
    transaction = metadata.pre_commit()
    assert transaction is not None
    assert transaction.moves
    assert len(transaction._place.to_journal) <= 2 * (CATCH_UP_RUNS + 1)
    finish(store, transaction)
    assert open_on(store, target_size=target_size).hydrated == metadata.hydrated


def test_snapshot_of_a_commit_lies_behind_what_a_compaction_still_journals(
    small_chunks: None,
) -> None:
    nr_regions = 2048
    target_size = nr_regions * REGION_SIZE
    store = Store(device_size_with(nr_regions, JOURNAL_BLOCKS_MIN + 8))
    metadata = format_on(store, target_size=target_size)
    for region_nr in range(0, nr_regions, 3):
        metadata.set_hydrated(region_nr, region_nr + 1)
    commit(store, metadata)
    compaction = metadata.compact()
    changes = iter(range(1, nr_regions, 3))
    begin = 4 + metadata._superblock.arena_blocks
    late = None
    for operation in compaction:
        if isinstance(operation, Write):
            if operation.offset >= (begin + snapshot_blocks_max(nr_regions)) * 4096:
                late = operation  # under way, for as long as it likes
                break
            store.do(operation)
            region_nr = next(changes)
            metadata.set_hydrated(region_nr, region_nr + 1)
            commit(store, metadata)
    assert late is not None
    moves = False
    for region_nr in changes:
        metadata.set_hydrated(region_nr, region_nr + 1)
        transaction = metadata.pre_commit()
        assert transaction is not None
        moves |= transaction.moves
        finish(store, transaction)
        if moves:
            break
    assert moves
    assert metadata._superblock.snapshot_block * 4096 >= late.offset + len(late.data)
    store.do(late)
    assert [each for each in compaction if isinstance(each, Write)] == []
    assert open_on(store, target_size=target_size).hydrated == metadata.hydrated


def test_second_compaction_beside_the_first_does_nothing(
    store: Store, metadata: CloneMetadata
) -> None:
    compaction = metadata.compact()
    next(compaction)
    assert list(metadata.compact()) == []
    compaction.close()
    assert list(metadata.compact()) != []


def test_abandoned_compaction_leaves_no_trace(
    store: Store, metadata: CloneMetadata
) -> None:
    fill_journal(store, metadata)
    compaction = metadata.compact()
    next(compaction)
    compaction.close()
    assert metadata.needs_compaction
    metadata.set_hydrated(99, 100)
    commit(store, metadata)
    assert open_on(store)._superblock.nr_compactions == 0


def test_compaction_ends_when_the_mode_changes(
    store: Store, metadata: CloneMetadata
) -> None:
    fill_journal(store, metadata)
    compaction = metadata.compact()
    next(compaction)
    metadata.abort()
    assert list(compaction) == []


def test_full_journal_is_compacted_by_the_commit_itself(
    store: Store, metadata: CloneMetadata
) -> None:
    for region_nr in range(NR_REGIONS):
        metadata.set_hydrated(region_nr, region_nr + 1)
        commit(store, metadata)
        assert open_on(store).hydrated == metadata.hydrated
    assert metadata._superblock.nr_compactions > 3


def test_no_compaction_while_a_commit_moves(
    store: Store, metadata: CloneMetadata
) -> None:
    transaction = None
    for region_nr in range(NR_REGIONS):
        metadata.set_hydrated(region_nr, region_nr + 1)
        transaction = metadata.pre_commit()
        assert transaction is not None
        if transaction.moves:
            break
        finish(store, transaction)
    assert list(metadata.compact()) == []
    finish(store, transaction)
    assert open_on(store).hydrated == metadata.hydrated


def test_switch_that_would_not_fit_stays_in_the_old_arena() -> None:
    # More has changed since the compaction began than the new journal holds.
    nr_regions = 1 << 16
    store = Store(CloneMetadata.device_size_min(nr_regions))
    target_size = nr_regions * REGION_SIZE
    metadata = format_on(store, target_size=target_size)
    drive(store, metadata.compact())
    for region_nr in range(0, nr_regions, 2):
        metadata.set_hydrated(region_nr, region_nr + 1)
    transaction = metadata.pre_commit()
    assert transaction is not None
    assert transaction.writes_snapshot
    finish(store, transaction)
    opened = open_on(store, target_size=target_size)
    assert opened.hydrated == metadata.hydrated
    assert opened.nr_hydrated == nr_regions // 2


def test_large_transaction_is_several_records() -> None:
    nr_regions = 1 << 17
    store = Store(CloneMetadata.device_size_for(nr_regions))
    target_size = nr_regions * REGION_SIZE
    metadata = format_on(store, target_size=target_size)
    for region_nr in range(0, 40_000, 2):
        metadata.set_hydrated(region_nr, region_nr + 1)
    commit(store, metadata)
    assert metadata._superblock.nr_compactions == 0
    opened = open_on(store, target_size=target_size)
    assert opened.nr_hydrated == 20_000


def test_abort_during_a_snapshot_of_a_commit_ends_it(small_chunks: None) -> None:
    nr_regions = 2048
    store = Store(CloneMetadata.device_size_min(nr_regions))
    metadata = format_on(store, target_size=nr_regions * REGION_SIZE)
    transaction = None
    for region_nr in range(0, nr_regions, 2):
        metadata.set_hydrated(region_nr, region_nr + 1)
        transaction = metadata.pre_commit()
        assert transaction is not None
        if transaction.moves:
            break
        finish(store, transaction)
    assert transaction is not None
    journal = transaction.journal()
    next(journal)
    metadata.abort()
    with pytest.raises(ReadOnlyMetadata):
        next(journal)
