# SPDX-License-Identifier: Apache-2.0
"""ORIGIN_COMPLETE: that no cached block has what the origin has not, and what follows after a crash."""

import msgspec
import pytest

from nbdtarget_metadata.cache.content import read_cache_content
from nbdtarget_metadata.cache.metadata import FLUSH_ORIGIN
from nbdtarget_metadata.cache.superblock import ORIGIN_COMPLETE, CacheSuperblock
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN, superblock_block
from nbdtarget_metadata.tools.cache_dump import render_cache
from nbdtarget_metadata.tools.cache_dump_parser import parse_cache
from nbdtarget_metadata.tools.cache_salvage import salvage_cache
from nbdtarget_metadata.tools.cache_xml import render_xml
from tests.support.metadata.small_cache import (
    SIZE,
    commit,
    dirty,
    finish,
    format_on,
    mapped,
    open_on,
)
from tests.support.metadata.store import Store, drive


@pytest.mark.parametrize("dirty_log", [False, True])
def test_crash_of_a_cache_that_does_not_write_back_leaves_nothing_dirty(
    dirty_log: bool,
) -> None:
    store = Store(SIZE)
    metadata = format_on(store)
    drive(store, metadata.start(dirty_log=dirty_log, writes_back=False))
    assert not metadata.may_change
    commit(store, metadata)
    assert metadata.is_recorded_complete
    metadata.insert(3, 7, dirty=False)
    metadata.insert(4, 8, dirty=False)
    metadata.log_dirty(3)
    commit(store, metadata)
    opened = open_on(store)
    assert opened.gives_up_mappings
    assert dirty(opened) == set()
    assert mapped(opened) == {3: 7, 4: 8}
    with pytest.raises(AssertionError, match="drop_clean comes first"):
        drive(store, opened.start(dirty_log=False))
    drive(store, opened.drop_clean())
    drive(store, opened.start(dirty_log=dirty_log, writes_back=False))
    commit(store, opened)
    assert mapped(open_on(store)) == {}


def test_a_commit_before_the_mappings_are_dropped_keeps_it() -> None:
    """The first resume of an opening rewrites a superblock slot before anything else."""
    store = used_store()
    opened = open_on(store)
    transaction = opened.pre_commit()
    assert transaction is not None
    finish(store, transaction)
    again = open_on(store)
    assert again.generation == opened.generation
    assert again.gives_up_mappings
    assert dirty(again) == set()


def test_an_older_version_counts_all_as_dirty_as_before() -> None:
    """An older version does not know the flag, and each of its commits leaves it out."""
    store = Store(SIZE)
    metadata = format_on(store)
    drive(store, metadata.start(dirty_log=False, writes_back=False))
    commit(store, metadata)
    assert metadata._superblock.flags == ORIGIN_COMPLETE
    assert CLEAN_SHUTDOWN | 2 == 3, "the flags that it knows"
    assert metadata._superblock.incompat == 0


def test_writeback_takes_it_back_before_the_first_change_is_admitted() -> None:
    store = Store(SIZE)
    metadata = format_on(store)
    drive(store, metadata.start(dirty_log=False, writes_back=False))
    commit(store, metadata)
    opened = open_on(store)
    drive(store, opened.drop_clean())
    drive(store, opened.start(dirty_log=False, writes_back=True))
    assert not opened.may_change, "a crash would give up what is dirty"
    commit(store, opened)
    assert opened.may_change
    assert not open_on(store).gives_up_mappings


def test_it_is_said_once_the_last_dirty_block_is_home_and_flushed() -> None:
    store = Store(SIZE)
    metadata = format_on(store)
    drive(store, metadata.start(dirty_log=False))
    commit(store, metadata)
    metadata.insert(3, 7, dirty=True)
    commit(store, metadata)
    commit(store, metadata, clean=True)
    drive(store, metadata.start(dirty_log=False, writes_back=False))
    commit(store, metadata)
    assert not metadata.is_recorded_complete
    assert not metadata.changed
    assert dirty(open_on(store)) == {3}
    metadata.set_clean(3)
    assert metadata.changed
    transaction = metadata.pre_commit()
    assert transaction is not None
    assert transaction.taken.flushes & FLUSH_ORIGIN
    finish(store, transaction)
    assert not metadata.changed
    assert open_on(store).gives_up_mappings


def test_a_block_that_turns_dirty_all_the_same_takes_it_back() -> None:
    """The origin did not take a write through. Data flushed after that is in the cache."""
    store = Store(SIZE)
    metadata = format_on(store)
    drive(store, metadata.start(dirty_log=False, writes_back=False))
    commit(store, metadata)
    metadata.insert(3, 7, dirty=False)
    commit(store, metadata)
    assert not metadata.mapping_survives(3), (
        "a crash would not find what FUA has written"
    )
    metadata.set_dirty(3)
    assert metadata.changed
    commit(store, metadata)
    assert metadata.mapping_survives(3)
    assert dirty(open_on(store)) == {3}
    metadata.set_clean(3)
    transaction = metadata.pre_commit()
    assert transaction is not None
    assert transaction.taken.says_complete
    assert not metadata.mapping_survives(3), "it is about to say so"
    finish(store, transaction)


def test_dirty_after_a_commit_began_is_for_the_next_one() -> None:
    store = Store(SIZE)
    metadata = format_on(store)
    drive(store, metadata.start(dirty_log=False, writes_back=False))
    commit(store, metadata)
    metadata.insert(3, 7, dirty=False)
    transaction = metadata.pre_commit()
    metadata.set_dirty(3)
    finish(store, transaction)
    assert metadata.is_recorded_complete
    assert metadata.changed
    commit(store, metadata)
    assert not metadata.is_recorded_complete


def used_store(*, dirty_log: bool = False) -> Store:
    store = Store(SIZE)
    metadata = format_on(store)
    drive(store, metadata.start(dirty_log=dirty_log, writes_back=False))
    commit(store, metadata)
    metadata.insert(3, 7, dirty=False)
    metadata.log_dirty(3)
    commit(store, metadata)
    return store


@pytest.mark.parametrize("dirty_log", [False, True])
def test_a_dump_shows_it_and_a_restore_keeps_it(dirty_log: bool) -> None:
    content = drive(
        Store(SIZE, bytes(used_store(dirty_log=dirty_log).durable)),
        read_cache_content(SIZE),
    )
    assert content.gives_up_mappings
    text = "".join(render_cache(content))
    assert '"flags": ["origin_complete"]' in text
    assert '"nr_dirty": 0' in text
    again = parse_cache([text.encode()])
    assert again.flags == content.flags
    assert not again.dirty.any()


def test_the_kernels_xml_leaves_out_what_the_next_start_gives_up() -> None:
    content = drive(used_store(), read_cache_content(SIZE))
    assert "<mapping " not in "".join(render_xml(content))


def test_a_repair_believes_it_while_both_slots_can_be_read() -> None:
    store = used_store()
    salvaged = drive(store, salvage_cache(SIZE))
    assert salvaged.content.gives_up_mappings
    assert not salvaged.damage
    first = drive(store, read_cache_content(SIZE))
    assert first.nr_mapped == 1
    newest = open_on(store)._superblock
    assert isinstance(newest, CacheSuperblock)
    at = newest.journal_block * 4096 + 40  # a record of the journal is rotten
    store.durable[at] ^= 1
    salvaged = drive(store, salvage_cache(SIZE))
    assert salvaged.damage
    assert salvaged.content.gives_up_mappings
    assert salvaged.content.nr_mapped == 0


def test_a_repair_does_not_believe_it_when_the_newest_slot_is_lost() -> None:
    """The lost slot may have held the first commit of a cache that writes back."""
    store = used_store()
    newest = open_on(store).generation
    for copy in range(2):
        at = superblock_block(newest % 2, copy) * 4096
        store.durable[at : at + 4096] = b"\xee" * 4096
    content = drive(store, salvage_cache(SIZE)).content
    assert not content.flags & ORIGIN_COMPLETE
    assert not content.gives_up_mappings
    assert content.dirty.count() == content.nr_mapped


def test_flags_are_what_a_superblock_says() -> None:
    store = used_store()
    superblock = open_on(store)._superblock
    assert superblock.gives_up_mappings
    clean = msgspec.structs.replace(superblock, flags=ORIGIN_COMPLETE | CLEAN_SHUTDOWN)
    assert not clean.gives_up_mappings


def test_writeback_start_revokes_origin_complete_first() -> None:
    """Another table uses the same metadata, whose clean shutdown could not be recorded."""
    store = Store(SIZE)
    metadata = format_on(store)
    drive(store, metadata.start(dirty_log=False, writes_back=False))
    commit(store, metadata)
    assert metadata.is_recorded_complete
    assert not metadata.is_recorded_clean
    drive(store, metadata.start(dirty_log=False, writes_back=True))
    assert not metadata.may_change
    commit(store, metadata)
    assert metadata.may_change
    assert not metadata.is_recorded_complete
