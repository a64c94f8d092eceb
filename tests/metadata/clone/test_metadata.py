# SPDX-License-Identifier: Apache-2.0
"""CloneMetadata: making, opening, looking up, modes."""

from collections.abc import Callable

import msgspec
import pytest

from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.errors import (
    FailedMetadata,
    GeometryMismatch,
    MetadataError,
    MetadataTooSmall,
    NotFormatted,
    NotOurs,
    ReadOnlyMetadata,
)
from nbdtarget_metadata.log.superblock import (
    NR_SLOTS,
    format_superblocks,
    superblock_writes,
)
from nbdtarget_metadata.mode import Mode
from nbdtarget_metadata.operations import Flush, Write
from tests.support.metadata.clone_workload import rotten
from tests.support.metadata.small_clone import (
    NR_REGIONS,
    SIZE,
    TARGET_SIZE,
    UUID,
    commit,
    format_on,
    open_on,
)
from tests.support.metadata.store import Store

# Making and opening


def test_fresh_metadata_has_nothing_hydrated(metadata: CloneMetadata) -> None:
    assert (metadata.nr_regions, metadata.nr_hydrated) == (NR_REGIONS, 0)
    assert metadata.mode is Mode.RW
    assert not metadata.changed
    assert metadata.clean_shutdown
    assert (metadata.used_blocks, metadata.total_blocks) == (4, SIZE // 4096)


def test_formatting_writes_only_superblocks(store: Store) -> None:
    format_on(store)
    writes = [each for each in store.log if isinstance(each, Write)]
    assert [each.offset // 4096 for each in writes] == [0, 2, 1, 3]


def test_all_zero_device_is_not_formatted(store: Store) -> None:
    with pytest.raises(NotFormatted):
        open_on(store)


def test_metadata_is_not_formatted_again(store: Store, metadata: CloneMetadata) -> None:
    with pytest.raises(NotOurs, match="generation 1"):
        format_on(store)


def test_rotten_metadata_is_not_formatted_again(store: Store) -> None:
    format_on(store)
    for slot in (0, 8, 16, 24):
        store.durable[:] = rotten(bytes(store.durable), slot)
    with pytest.raises(MetadataError):
        format_on(store)


def test_device_that_is_too_small_stays_untouched() -> None:
    store = Store(SIZE - 4096)
    with pytest.raises(MetadataTooSmall):
        format_on(store)
    assert store.log == []


def test_recommended_size_is_larger_than_the_smallest() -> None:
    recommended = CloneMetadata.device_size_for(NR_REGIONS)
    assert recommended > CloneMetadata.device_size_min(NR_REGIONS)


def test_size_for_the_largest_clone_is_known() -> None:
    # 1 TiB of 4 KiB regions: 1 bit in 32768 and its three copies.
    assert CloneMetadata.device_size_for(1 << 28) < 132 << 20


@pytest.mark.parametrize(
    ("geometry", "field"),
    [
        ({"region_size": 8192}, "region_size"),
        ({"target_size": TARGET_SIZE + 512}, "target_size"),
    ],
)
def test_changed_geometry_is_refused(
    store: Store, metadata: CloneMetadata, geometry: dict[str, int], field: str
) -> None:
    with pytest.raises(GeometryMismatch) as caught:
        open_on(store, **geometry)
    assert caught.value.field == field


def test_opening_writes_nothing_and_flushes_before_it_reads(
    store: Store, metadata: CloneMetadata
) -> None:
    store.log.clear()
    opened = open_on(store)
    assert isinstance(store.log[0], Flush)
    assert not any(isinstance(each, Write) for each in store.log)
    assert opened.uuid == UUID
    assert opened.needs_rewrite, "what was read may be in a page cache only"


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
        opened.set_hydrated(0, 1)


# Looking up


def test_ranges_are_told_by_their_state(metadata: CloneMetadata) -> None:
    metadata.set_hydrated(10, 20)
    assert metadata.all_hydrated(10, 20)
    assert not metadata.all_hydrated(9, 20)
    assert not metadata.all_hydrated(10, 21)
    assert metadata.none_hydrated(0, 10)
    assert not metadata.none_hydrated(0, 11)


def test_runs_cut_a_range_by_state(metadata: CloneMetadata) -> None:
    metadata.set_hydrated(10, 20)
    metadata.set_hydrated(25, 26)
    assert list(metadata.runs(15, 30)) == [
        (15, 20, True),
        (20, 25, False),
        (25, 26, True),
        (26, 30, False),
    ]
    assert list(metadata.runs(5, 5)) == []


def test_next_unhydrated_is_found(metadata: CloneMetadata) -> None:
    metadata.set_hydrated(0, 20)
    assert metadata.maybe_next_unhydrated(0, NR_REGIONS) == 20
    assert metadata.maybe_next_unhydrated(3, 20) is None


# Abort and modes


def test_abort_reverts_what_was_not_committed(
    store: Store, metadata: CloneMetadata
) -> None:
    metadata.set_hydrated(0, 10)
    commit(store, metadata)
    metadata.set_hydrated(5, 15)
    metadata.pre_commit()
    metadata.set_hydrated(20, 22)
    metadata.abort()
    assert list(metadata.runs(0, 30)) == [(0, 10, True), (10, 30, False)]
    assert metadata.nr_hydrated == 10
    assert metadata.mode is Mode.RO


def test_after_abort_nothing_changes_and_flushes_go_on_failing(
    metadata: CloneMetadata,
) -> None:
    metadata.set_hydrated(5, 15)
    metadata.abort()
    assert metadata.changed
    with pytest.raises(ReadOnlyMetadata):
        metadata.pre_commit()
    with pytest.raises(ReadOnlyMetadata):
        metadata.set_hydrated(0, 1)
    assert not metadata.needs_compaction
    assert list(metadata.compact()) == []


CALLS: dict[str, Callable[[CloneMetadata], object]] = {
    "all_hydrated": lambda metadata: metadata.all_hydrated(0, 1),
    "none_hydrated": lambda metadata: metadata.none_hydrated(0, 1),
    "runs": lambda metadata: list(metadata.runs(0, 1)),
    "next": lambda metadata: metadata.maybe_next_unhydrated(0, 1),
    "set_hydrated": lambda metadata: metadata.set_hydrated(0, 1),
    "pre_commit": lambda metadata: metadata.pre_commit(),
    "abort": lambda metadata: metadata.abort(),
    "compact": lambda metadata: list(metadata.compact()),
}


@pytest.mark.parametrize("name", CALLS)
def test_failed_metadata_answers_nothing(name: str, metadata: CloneMetadata) -> None:
    metadata.fail()
    assert metadata.mode is Mode.FAIL
    with pytest.raises(FailedMetadata):
        CALLS[name](metadata)


def test_format_is_the_only_way_to_generation_0(metadata: CloneMetadata) -> None:
    with pytest.raises(AssertionError):
        next(format_superblocks(metadata._superblock))


def test_commits_after_opening_rewrite_both_slots_and_say_what_they_said(
    store: Store, metadata: CloneMetadata
) -> None:
    metadata.set_hydrated(0, 3)
    commit(store, metadata, clean=True)
    opened = open_on(store)
    before = opened.generation
    for nr in range(NR_SLOTS):
        assert opened.changed
        assert opened.needs_rewrite
        log = len(store.log)
        commit(store, opened)
        written = [each for each in store.log[log:] if isinstance(each, Write)]
        assert len(written) == 2, "both copies, and no record"
        assert opened.generation == before + nr + 1
        again = open_on(store)
        assert (again.nr_hydrated, again.clean_shutdown) == (3, True)
    assert not opened.changed
    opened.set_hydrated(3, 4)
    commit(store, opened)
    assert not open_on(store).clean_shutdown
