# SPDX-License-Identifier: Apache-2.0
"""Dump, restore, dump is identical; a restore that is cut short is no metadata at all; a record of
what was written back is there or not.
"""

import random
from collections.abc import Iterator

import pytest
from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.cache.content import CacheContent
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.cache.superblock import DIRTY_LOG
from nbdtarget_metadata.errors import (
    CorruptMetadata,
    MetadataError,
    MetadataTooSmall,
    NotOurs,
    UnsupportedFormat,
)
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN
from nbdtarget_metadata.operations import Answer, Flush, Read, Steps, Write
from nbdtarget_metadata.tools.cache_check import CACHE_CHECKS
from nbdtarget_metadata.tools.cache_restore import record_written_back, restore_cache
from nbdtarget_metadata.tools.check import examine
from tests.support.metadata.cache_contents import (
    LIVES,
    content_of,
    lives,
    superblock_of,
)
from tests.support.metadata.cache_dumps import CONTENTS, parsed, text_of
from tests.support.metadata.small_cache import NR_CBLOCKS, SIZE, commit, start
from tests.support.metadata.small_cache import open_on as cache_open
from tests.support.metadata.store import Store, drive

NAMES = sorted(LIVES)


@pytest.mark.parametrize("size", [SIZE, SIZE + 4096, 4 << 20])
@pytest.mark.parametrize("age", NAMES)
def test_dump_restore_dump_is_identical(age: str, size: int) -> None:
    text = text_of(lives()[age].content)
    store = Store(size)
    drive(store, restore_cache(parsed(text), device_size=size))
    assert text_of(content_of(bytes(store.durable))) == text


@pytest.mark.parametrize("generation", [1, 2, 3, 1 << 62])
@pytest.mark.parametrize("name", ["small", "plain", "unclean", "empty", "logged"])
@pytest.mark.usefixtures("small_cache_chunks")
def test_any_content_restores(name: str, generation: int) -> None:
    content = CONTENTS[name]._replace(generation=generation)
    size = 1 << 20
    store = Store(size)
    drive(store, restore_cache(content, device_size=size))
    assert content_of(bytes(store.durable)) == content


@pytest.mark.parametrize("age", NAMES)
def test_restored_metadata_is_in_order_and_can_be_committed_to(age: str) -> None:
    content = lives()[age].content
    store = Store(SIZE)
    drive(store, restore_cache(content, device_size=SIZE))
    findings = drive(store, examine(CACHE_CHECKS, SIZE))
    assert (findings.damage, findings.unhealed, findings.complete) == ((), (), True)
    metadata = cache_open(store)
    while metadata.needs_rewrite:
        commit(store, metadata)
    assert not metadata.changed
    start(store, metadata, dirty_log=metadata.dirty_log)
    metadata.insert(39, 0, dirty=True)
    commit(store, metadata)
    assert content_of(bytes(store.durable)).values[39] >> 16 == 0
    assert metadata.generation > content.generation


def test_restored_metadata_may_grow_with_its_device() -> None:
    size = CacheMetadata.device_size_for(5000)
    store = Store(size)
    drive(store, restore_cache(lives()["clean"].content, device_size=size))
    assert cache_open(store).nr_cblocks_max >= 5000


@pytest.mark.parametrize("at", [0, 4096 * 3 + 9, 4096 * 4, SIZE - 1])
def test_foreign_output_is_refused_untouched(at: int) -> None:
    store = Store(SIZE)
    store.durable[at] = 7
    before = bytes(store.durable)
    with pytest.raises(NotOurs):
        drive(store, restore_cache(lives()["clean"].content, device_size=SIZE))
    assert bytes(store.current()) == before


def test_metadata_as_output_is_refused_and_overwritten_when_told() -> None:
    image = lives()["logged"].image
    store = Store(len(image), image)
    content = lives()["clean"].content
    with pytest.raises(NotOurs, match="generation"):
        drive(store, restore_cache(content, device_size=store.size))
    assert bytes(store.current()) == image
    steps = restore_cache(content, device_size=store.size, overwrite=True)
    drive(store, steps)
    assert content_of(bytes(store.durable)) == content


def test_small_output_is_refused_untouched() -> None:
    store = Store(SIZE - 4096)
    steps = restore_cache(lives()["clean"].content, device_size=store.size)
    with pytest.raises(MetadataTooSmall):
        drive(store, steps)
    assert not any(store.current())


@pytest.mark.parametrize("fields", [{"ro_compat": 4}, {"incompat": 4 | DIRTY_LOG}])
def test_features_that_this_version_does_not_know_are_refused(
    fields: dict[str, int],
) -> None:
    content = CONTENTS["plain"]._replace(**fields)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedFormat, match="0x4"):
        drive(Store(SIZE), restore_cache(content, device_size=SIZE))


def cut(store: Store, steps: Steps[object], seed: int = 1) -> Iterator[bytes]:
    """Run `steps`; at each operation yield what a power cut may leave."""
    rng = random.Random(seed)
    answer: Answer | tuple[Answer, ...] = None
    while True:
        try:
            operation = steps.send(answer)
        except StopIteration:
            break
        single = isinstance(operation, Read | Write | Flush)
        operations = (operation,) if single else operation
        tickets = [store.submit(each) for each in operations]  # type: ignore[arg-type]
        yield from store.crash_images(rng)
        answers = tuple(store.end(ticket) for ticket in tickets)
        answer = answers[0] if single else answers
    yield from store.crash_images(rng)


def maybe_content(image: bytes) -> CacheContent | None:
    try:
        return content_of(image)
    except MetadataError:
        return None


@pytest.mark.parametrize("old", ["", "logged_clean"])
def test_power_cut_leaves_all_of_it_or_nothing_that_opens(old: str) -> None:
    content = lives()["compacted_clean"].content
    before = lives()[old].image if old else bytes(SIZE)
    store = Store(len(before), before)
    steps = restore_cache(content, device_size=store.size, overwrite=bool(old))
    outcomes = set()
    allowed = [None, content, *([lives()[old].content] if old else [])]
    for image in cut(store, steps):
        found = maybe_content(image)
        outcomes.add(allowed.index(found))
    assert outcomes == set(range(len(allowed)))
    assert content_of(bytes(store.durable)) == content


# Blocks that were written back


def written_back(*cblocks: int) -> bitarray:
    bits = zeros(NR_CBLOCKS, "little")
    bits[list(cblocks)] = 1
    return bits


@pytest.mark.parametrize("age", NAMES)
def test_what_was_written_back_is_clean_and_the_rest_as_it_was(age: str) -> None:
    aged = lives()[age]
    store = Store(len(aged.image), aged.image)
    dirty = list(aged.content.dirty.search(1))
    done = dirty[::2]
    drive(store, record_written_back(store.size, written_back(*done), disks=b""))
    found = content_of(bytes(store.durable))
    assert list(found.dirty.search(1)) == dirty[1::2]
    assert found == aged.content._replace(
        dirty=found.dirty,
        flags=CLEAN_SHUTDOWN,
        generation=aged.content.generation + 1,
        nr_commits=aged.content.nr_commits + 1,
    )
    assert drive(store, examine(CACHE_CHECKS, store.size)).damage == ()


@pytest.mark.parametrize("age", NAMES)
def test_cache_that_was_written_back_goes_on(age: str) -> None:
    aged = lives()[age]
    store = Store(len(aged.image), aged.image)
    drive(store, record_written_back(store.size, aged.content.dirty, disks=b""))
    metadata = cache_open(store)
    assert (metadata.nr_dirty, metadata.clean_when_opened) == (0, True)
    start(store, metadata, dirty_log=metadata.dirty_log)
    metadata.insert(39, 0, dirty=True)
    commit(store, metadata)
    reopened = cache_open(store)
    mapped = reopened.nr_mapped
    # A block that is still LOGGED counts as dirty after a crash, until a later commit records that it is clean.
    assert reopened.nr_dirty <= mapped
    assert reopened.is_dirty(39)


@pytest.mark.parametrize("age", NAMES)
def test_power_cut_leaves_the_old_dirty_bits_or_the_new_ones(age: str) -> None:
    aged = lives()[age]
    store = Store(len(aged.image), aged.image)
    found = {
        str(content_of(image).dirty)
        for image in cut(
            store, record_written_back(store.size, aged.content.dirty, disks=b"")
        )
    }
    after = zeros(NR_CBLOCKS, "little")
    assert found == {str(aged.content.dirty), str(after)}


def test_damage_is_not_written_over() -> None:
    image = bytearray(lives()["clean"].image)
    image[4096 * superblock_of(bytes(image)).snapshot_block + 100] ^= 1
    store = Store(len(image), bytes(image))
    with pytest.raises(CorruptMetadata):
        drive(store, record_written_back(store.size, written_back(), disks=b""))
    assert store.current() == image


@pytest.mark.parametrize("block", range(4))
def test_a_bad_copy_is_rewritten_before_the_sync_area_that_it_may_vouch_for(
    block: int,
) -> None:
    image = bytearray(lives()["clean"].image)
    at = 4096 * block
    image[at : at + 512] = bytes(512)
    store = Store(len(image), bytes(image))
    begun = len(store.log)
    drive(
        store,
        record_written_back(store.size, lives()["clean"].content.dirty, disks=b""),
    )
    writes = [
        each.offset // 4096 for each in store.log[begun:] if isinstance(each, Write)
    ]
    # Both slots are written anew, and one of them before anything else.
    assert set(writes[:2]) in ({0, 2}, {1, 3}), writes
    assert {0, 1, 2, 3} <= set(writes)
    assert drive(store, examine(CACHE_CHECKS, store.size)).unhealed == ()
