# SPDX-License-Identifier: Apache-2.0
"""CacheMetadata whose cache or origin grows and shrinks."""

import pytest

from nbdtarget_metadata.cache import blocks as cache_blocks
from nbdtarget_metadata.cache.metadata import FLUSH_ORIGIN, CacheMetadata
from nbdtarget_metadata.errors import CannotShrink, MetadataTooSmall, ReadOnlyMetadata
from tests.support.metadata.small_cache import (
    BLOCK_SIZE,
    NR_CBLOCKS,
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


def roomy(nr_cblocks: int) -> Store:
    return Store(CacheMetadata.device_size_for(nr_cblocks))


def test_cache_grows_and_keeps_its_mappings() -> None:
    store = roomy(400)
    metadata = format_on(store)
    start(store, metadata)
    metadata.insert(39, 9, dirty=True)
    shut_down(store, metadata)
    opened = open_on(store)
    drive(store, opened.resize_cache(400))
    start(store, opened)
    opened.insert(399, 8, dirty=False)
    commit(store, opened)
    assert list(opened.mappings(SMQ)) == [(39, 9, True, 139), (399, 8, False, 0)]
    again = open_on(store)
    assert (again.nr_cblocks, mapped(again)) == (400, {39: 9, 399: 8})
    shut_down(store, opened)
    assert dirty(open_on(store)) == {39}


def test_growth_that_was_abandoned_is_done_again() -> None:
    store = roomy(400)
    metadata = format_on(store)
    for nr_steps in range(3):
        growth = metadata.resize_cache(400)
        for _ in range(nr_steps):
            assert next(growth) == ()
        growth.close()
        assert metadata.nr_cblocks == NR_CBLOCKS
    drive(store, metadata.resize_cache(400))
    assert metadata._by_oblock.has_room_for(400)
    start(store, metadata)
    for cblock in range(100):
        metadata.insert(4 * cblock, cblock, dirty=True)
    commit(store, metadata)
    assert mapped(open_on(store)) == {4 * nr: nr for nr in range(100)}


def test_cache_does_not_outgrow_its_metadata(
    store: Store, metadata: CacheMetadata
) -> None:
    with pytest.raises(MetadataTooSmall):
        drive(store, metadata.resize_cache(metadata.nr_cblocks_max + 1))


def test_cache_shrinks_to_a_prefix_for_good(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(19, 9, dirty=True)
    metadata.insert(20, 8, dirty=False)
    commit(store, metadata)
    drive(store, metadata.resize_cache(20))
    transaction = metadata.pre_commit()
    assert transaction is not None
    assert transaction.taken.flushes == FLUSH_ORIGIN
    finish(store, transaction)
    opened = open_on(store)
    assert (opened.nr_cblocks, mapped(opened)) == (20, {19: 9})
    drive(store, opened.resize_cache(NR_CBLOCKS))
    commit(store, opened)
    assert mapped(open_on(store)) == {19: 9}
    shut_down(store, metadata)
    assert dirty(open_on(store)) == {19}


def test_cache_does_not_shrink_over_a_dirty_block(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(20, 8, dirty=True)
    with pytest.raises(CannotShrink, match="unable to shrink cache; cache block 20"):
        drive(store, metadata.resize_cache(20))
    assert metadata.nr_cblocks == NR_CBLOCKS


def test_origin_shrinks_and_drops_what_lies_beyond(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(3, 9, dirty=True)
    metadata.insert(4, 10, dirty=False)
    commit(store, metadata)
    drive(store, metadata.resize_origin(11 * BLOCK_SIZE - 1))
    commit(store, metadata)
    opened = open_on(store)
    assert (opened.nr_oblocks, mapped(opened)) == (10, {3: 9})
    assert opened.maybe_cblock(10) is None


def test_origin_does_not_shrink_over_a_dirty_block(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(4, 10, dirty=True)
    with pytest.raises(CannotShrink, match="unable to shrink origin; cache block 4"):
        drive(store, metadata.resize_origin(10 * BLOCK_SIZE))
    assert metadata.origin_size == ORIGIN_SIZE


@pytest.mark.parametrize("resize", ["resize_cache", "resize_origin"])
def test_resize_ends_where_a_failed_compaction_aborts(
    store: Store,
    metadata: CacheMetadata,
    resize: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_blocks, "STEP_CBLOCKS", 4)
    for cblock in range(NR_CBLOCKS):
        metadata.insert(cblock, cblock, dirty=False)
    commit(store, metadata)
    resizing = getattr(metadata, resize)(BLOCK_SIZE if "origin" in resize else 1)
    while metadata.nr_mapped > NR_CBLOCKS - 2:
        next(resizing)
    metadata.abort()
    before = mapped(metadata)
    with pytest.raises(ReadOnlyMetadata):
        next(resizing)
    assert mapped(metadata) == before
    assert len(mapped(open_on(store))) == NR_CBLOCKS


def test_after_an_unclean_shutdown_nothing_is_shrunk_away(
    store: Store, metadata: CacheMetadata
) -> None:
    metadata.insert(20, 8, dirty=False)
    commit(store, metadata)
    opened = open_on(store)
    with pytest.raises(CannotShrink):
        drive(store, opened.resize_cache(20))
