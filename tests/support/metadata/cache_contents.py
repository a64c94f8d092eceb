# SPDX-License-Identifier: Apache-2.0
"""The metadata of one small cache at various ages, with their content, for tests of the offline tools."""

from array import array
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import msgspec
from bitarray import bitarray

from nbdtarget_metadata.cache.content import CacheContent, read_cache_content
from nbdtarget_metadata.cache.load import Discarded
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.cache.superblock import CACHE, CacheSuperblock, PolicyIdentity
from nbdtarget_metadata.log.superblock import (
    NEEDS_CHECK,
    choose_superblock,
    superblock_writes,
)
from tests.support.metadata.small_cache import (
    NR_CBLOCKS,
    SIZE,
    commit,
    format_on,
    start,
)
from tests.support.metadata.store import Store, drive, read_image

__all__ = [
    "LIVES",
    "CacheLife",
    "Lived",
    "content_of",
    "journal_blocks",
    "live_blocks",
    "lives",
    "needing_check",
    "superblock_of",
]

SMQ = PolicyIdentity("smq", (2, 0, 0))


class CacheLife:
    """A cache and what happens to it."""

    def __init__(self, *, dirty_log: bool = False, start_it: bool = True) -> None:
        self.store = Store(SIZE)
        self.metadata: CacheMetadata = format_on(self.store)
        if start_it:
            start(self.store, self.metadata, dirty_log=dirty_log)

    def insert(self, cblock: int, oblock: int, *, dirty: bool = False) -> None:
        self.metadata.insert(cblock, oblock, dirty=dirty)

    def move(self, cblock: int, oblock: int, *, dirty: bool = False) -> None:
        """Let a mapped block hold another origin block, in two commits."""
        self.metadata.set_clean(cblock)
        self.metadata.remove(cblock)
        self.commit()
        self.insert(cblock, oblock, dirty=dirty)
        self.commit()

    def commit(self) -> None:
        commit(self.store, self.metadata)

    def shut_down(self, *, hints: bool = True, discards: bool = True) -> None:
        words = array("I", range(NR_CBLOCKS)) if hints else None
        discarded = None
        if discards:
            discarded = Discarded(1 << 20, bitarray("0110001", "little"))
        self.metadata.prepare_shutdown(policy=SMQ, hints=words, discarded=discarded)
        commit(self.store, self.metadata, clean=True)

    def compact(self) -> None:
        drive(self.store, self.metadata.compact())

    def image(self) -> bytes:
        return bytes(self.store.current())


class Lived(NamedTuple):
    """An image; `content` is what it says."""

    image: bytes
    content: CacheContent


def fresh() -> CacheLife:
    return CacheLife(start_it=False)


def journal(*, dirty_log: bool = False) -> CacheLife:
    """Several commits; one block has moved since, one was unmapped. Not shut down."""
    life = CacheLife(dirty_log=dirty_log)
    for cblock in range(12):
        life.insert(cblock, 99 - 2 * cblock, dirty=cblock % 3 == 0)
        if cblock % 4 == 3:
            life.commit()
    life.metadata.statistics.read_hits = 5
    life.move(2, 50, dirty=True)
    life.metadata.remove(4)
    life.commit()
    return life


def logged() -> CacheLife:
    return journal(dirty_log=True)


def clean() -> CacheLife:
    life = journal()
    life.shut_down()
    return life


def logged_clean() -> CacheLife:
    """With dirty blocks, and cleaned ones that are LOGGED still."""
    life = journal(dirty_log=True)
    life.metadata.set_clean(0)
    life.shut_down(discards=False)
    return life


def plain_clean() -> CacheLife:
    """Without hints and discards; all clean."""
    life = journal()
    for cblock in range(12):
        if life.metadata.maybe_oblock(cblock) is not None:
            life.metadata.set_clean(cblock)
    life.shut_down(hints=False, discards=False)
    return life


def compacted() -> CacheLife:
    """A snapshot in the second arena, the commit before it whole in the first."""
    life = journal()
    life.compact()
    life.insert(20, 1)
    life.commit()
    return life


def compacted_clean() -> CacheLife:
    life = compacted()
    life.insert(21, 3, dirty=True)
    life.commit()
    life.shut_down()
    return life


def full() -> CacheLife:
    """A snapshot of values, not of entries, and a little behind it."""
    life = CacheLife()
    for cblock in range(1, NR_CBLOCKS - 1):
        life.insert(cblock, 2 * cblock, dirty=cblock % 7 == 0)
    life.commit()
    life.compact()
    life.move(3, 1, dirty=True)
    life.shut_down()
    return life


LIVES: dict[str, Callable[[], CacheLife]] = {
    each.__name__: each
    for each in (
        fresh,
        journal,
        logged,
        clean,
        logged_clean,
        plain_clean,
        compacted,
        compacted_clean,
        full,
    )
}


@cache
def lives() -> dict[str, Lived]:
    """Return all of them by name."""
    found = {}
    for name, make in LIVES.items():
        image = make().image()
        found[name] = Lived(image, content_of(image))
    return found


def content_of(image: bytes) -> CacheContent:
    return read_image(image, read_cache_content(len(image)))


def superblock_of(image: bytes) -> CacheSuperblock:
    area = memoryview(image)[: 4 * 4096]
    return choose_superblock(CACHE, area, admit_needs_check=True).superblock


def journal_blocks(name: str) -> list[int]:
    superblock = superblock_of(lives()[name].image)
    return list(range(superblock.journal_block, superblock.journal_end))


def live_blocks(name: str) -> list[int]:
    superblock = superblock_of(lives()[name].image)
    sync = superblock.sync_begin
    return [
        *range(superblock.snapshot_block, superblock.journal_end),
        *range(sync, sync + superblock.sync_blocks),
    ]


def needing_check(name: str, *, clean: bool = True) -> bytes:
    """The image with the flag, in an otherwise equal next generation."""
    aged = lives()[name]
    store = Store(len(aged.image), aged.image)
    superblock = superblock_of(aged.image)
    marked = msgspec.structs.replace(
        superblock,
        flags=superblock.flags | NEEDS_CHECK,
        generation=superblock.generation + 1,
    )
    for write in superblock_writes(marked):
        store.do(write)
    return bytes(store.durable)
