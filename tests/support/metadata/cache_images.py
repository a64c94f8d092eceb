# SPDX-License-Identifier: Apache-2.0
"""Images of a cache's metadata of every age, made by the real code; see clone_images.py for the clone's.

60 cache blocks, 62 blocks of metadata. Snapshots, transactions and clean shutdowns have several
records all the same, as they are made small while an image is built; a reader knows nothing of that.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Final

import msgspec
import pytest
from bitarray import bitarray

from nbdtarget_metadata.cache import encoding as cache_encoding
from nbdtarget_metadata.cache import records as cache_records
from nbdtarget_metadata.cache import shutdown
from nbdtarget_metadata.cache.load import Discarded
from nbdtarget_metadata.cache.metadata import CacheMetadata, Statistics
from nbdtarget_metadata.cache.superblock import (
    CacheSuperblock,
    PolicyIdentity,
    device_size_with,
)
from nbdtarget_metadata.operations import Steps, Write
from tests.support.metadata.cache_reader import Held, live_ranges
from tests.support.metadata.clone_images import run_bounded
from tests.support.metadata.small_cache import BLOCK_SIZE, UUID, commit, start
from tests.support.metadata.store import Store, drive

__all__ = ["SMQ", "CacheAged", "cache_ages", "held_by", "open_cache", "opening"]

NR_CBLOCKS: Final = 60
NR_OBLOCKS: Final = 200
ORIGIN_SIZE: Final = NR_OBLOCKS * BLOCK_SIZE + 512
SIZE: Final = device_size_with(NR_CBLOCKS, 24)
SMQ: Final = PolicyIdentity("smq", (2, 0, 0))


@dataclass(frozen=True)
class CacheAged:
    """One image.

    Attributes:
        states: what each generation holds that a superblock was ever written for.
        acknowledged: the generation that must never be rolled back.
    """

    name: str
    image: bytes
    states: dict[int, Held]
    acknowledged: int

    def superblock(self) -> CacheSuperblock:
        return open_cache(self.image)._superblock

    def live_blocks(self) -> list[int]:
        """Blocks of the records that the superblock vouches for."""
        ranges = live_ranges(msgspec.to_builtins(self.superblock()))
        return [block for blocks in ranges for block in blocks]


def held_by(metadata: CacheMetadata) -> Held:
    """Return what was opened, in the words of cache_reader.py."""
    values = {at: value for at, value in enumerate(metadata._values) if value}
    discarded = metadata.discarded
    return Held(
        values,
        frozenset(metadata.dirty.search(1)),
        None if metadata._hints is None else tuple(metadata._hints),
        None if discarded is None else discarded.bits.to01(),
    )


class Life:
    """A cache that is led through the ages."""

    def __init__(self) -> None:
        self.store = Store(SIZE)
        steps = CacheMetadata.format(
            device_size=SIZE,
            block_size=BLOCK_SIZE,
            origin_size=ORIGIN_SIZE,
            nr_cblocks=NR_CBLOCKS,
            uuid=UUID,
        )
        self.metadata = drive(self.store, steps)
        self.states = {nr: held_by(self.metadata) for nr in range(2)}
        self.turn = 0

    def start(self, *, dirty_log: bool = False) -> None:
        start(self.store, self.metadata, dirty_log=dirty_log)
        self.note()

    def change(self, count: int = 1) -> None:
        """Map, clean or unmap a block, another one each time."""
        metadata = self.metadata
        for _ in range(count):
            self.turn += 1
            cblock = 7 * self.turn % metadata.nr_cblocks
            oblock = 11 * self.turn % metadata.nr_oblocks
            if metadata.maybe_oblock(cblock) is not None:
                metadata.set_clean(cblock)
                metadata.remove(cblock)
            elif metadata.may_insert(cblock) and metadata.maybe_cblock(oblock) is None:
                metadata.insert(cblock, oblock, dirty=self.turn % 3 == 0)

    def commit(self) -> None:
        while not self.metadata.changed:
            self.change()
        commit(self.store, self.metadata)
        self.note()

    def note(self) -> None:
        """Note the content that an opening must find from now on, without a clean shutdown."""
        metadata = self.metadata
        values = {at: value for at, value in enumerate(metadata._values) if value}
        flagged = 2 if metadata.dirty_log else 1
        dirty = frozenset(at for at, value in values.items() if value & flagged)
        self.states[metadata.generation] = Held(values, dirty, None, None)

    def shut_down(self) -> None:
        nr_cblocks = self.metadata.nr_cblocks
        self.metadata.statistics = Statistics(17, 4, 300, 70_000)
        self.metadata.prepare_shutdown(
            policy=SMQ,
            hints=array("I", range(300, 300 + nr_cblocks)),
            discarded=Discarded(BLOCK_SIZE, bitarray("0110" * 50, endian="little")),
        )
        commit(self.store, self.metadata, clean=True)
        self.states[self.metadata.generation] = held_by(self.metadata)

    def fill(self) -> None:
        while not self.metadata.needs_compaction:
            self.commit()

    def compact(self) -> None:
        drive(self.store, self.metadata.compact())

    def interrupt_compaction(self) -> None:
        """As a crash would: one record of the snapshot is written, no more."""
        for operation in self.metadata.compact():
            if isinstance(operation, Write):
                self.store.do(operation)
                return

    def interrupt_commit(self, *, copies: int) -> None:
        """Journal a transaction, then write only so many copies of its superblock."""
        transaction = self.metadata.pre_commit()
        assert transaction is not None
        drive(self.store, transaction.journal())
        for write in islice(transaction.superblock(), copies):
            assert isinstance(write, Write)
            self.store.do(write)
        if copies:
            acknowledged = self.metadata._superblock
            self.metadata._superblock = transaction._superblock
            self.note()
            self.metadata._superblock = acknowledged

    def overtake(self) -> None:
        """Commit until a commit writes a snapshot of its own."""
        arena = self.metadata._superblock.arena
        while self.metadata._superblock.arena == arena:
            self.commit()

    def aged(self, name: str) -> CacheAged:
        image = bytes(self.store.current())
        return CacheAged(name, image, dict(self.states), self.metadata.generation)


def _fresh(life: Life) -> None:
    """Formatted, and nothing else."""


def _commits(life: Life) -> None:
    life.start()
    for _ in range(3):
        life.change(20)
        life.commit()


def _mid_journal(life: Life) -> None:
    _commits(life)
    life.change(5)
    life.interrupt_commit(copies=0)


def _torn_commit(life: Life) -> None:
    _commits(life)
    life.change(5)
    life.interrupt_commit(copies=1)


def _compacted(life: Life) -> None:
    life.start(dirty_log=True)
    life.change(30)
    life.fill()
    life.compact()
    life.commit()
    life.commit()


def _compaction_interrupted(life: Life) -> None:
    _compacted(life)
    life.fill()
    life.interrupt_compaction()
    life.commit()


def _overtaken(life: Life) -> None:
    _compacted(life)
    life.overtake()
    life.commit()


def _shut_down(life: Life) -> None:
    """With dirty_log: dirty blocks, one clean but LOGGED, hints, discards; a snapshot, a journal."""
    _compacted(life)
    life.metadata.set_clean(life.metadata.dirty.find(1))
    life.shut_down()


def _shut_down_again(life: Life) -> None:
    """The other sync area, as the cache has been resized while it was shut down."""
    _commits(life)
    life.shut_down()
    drive(life.store, life.metadata.resize_origin(ORIGIN_SIZE + 3 * BLOCK_SIZE))
    life.shut_down()


def _torn_start(life: Life) -> None:
    _commits(life)
    life.shut_down()
    drive(life.store, life.metadata.start(dirty_log=True))
    life.interrupt_commit(copies=1)


def _shrunk(life: Life) -> None:
    _commits(life)
    for cblock in list(life.metadata.dirty.search(1)):
        life.metadata.set_clean(cblock)
    drive(life.store, life.metadata.resize_cache(NR_CBLOCKS // 2 + 1))
    drive(life.store, life.metadata.resize_origin(ORIGIN_SIZE // 2))
    life.commit()
    life.change(9)
    life.commit()


_AGES: Final[tuple[Callable[[Life], None], ...]] = (
    _fresh,
    _commits,
    _mid_journal,
    _torn_commit,
    _compacted,
    _compaction_interrupted,
    _overtaken,
    _shut_down,
    _shut_down_again,
    _torn_start,
    _shrunk,
)


@cache
def cache_ages() -> dict[str, CacheAged]:
    """Every age by its name."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_records, "ENTRIES_PER_RECORD_MAX", 10)
        patch.setattr(cache_encoding, "CHUNK_CBLOCKS", 16)
        patch.setattr(shutdown, "CHUNK_BYTES", 128)
        for live in _AGES:
            life = Life()
            live(life)
            name = live.__name__[1:]
            found[name] = life.aged(name)
    return found


def opening(size: int) -> Steps[CacheMetadata]:
    return CacheMetadata.open(device_size=size, block_size=BLOCK_SIZE)


def open_cache(image: bytes | bytearray) -> CacheMetadata:
    return run_bounded(image, opening(len(image)))
