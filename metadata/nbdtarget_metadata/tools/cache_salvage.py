# SPDX-License-Identifier: Apache-2.0
"""Read what is left of damaged cache metadata. Writes nothing; `restore` can write it elsewhere.

What may be believed
====================

A record is believed if the newest superblock leads to it by digests, as a clone's (salvage.py). But it
says what blocks **are**, and a later one that is broken may have said something else: the block was
unmapped since, or holds another origin block. To serve or write back such a **doubtful** mapping
puts the data of one origin block in the place of another; to drop it loses them, if they were
dirty. So:

    known      no broken journal record stands behind the last one that names the block. Kept
    doubtful   one does. Dropped if it is clean for sure (the origin has it), or if a known
               mapping, or one that was stated later, holds the same origin block: then it is not true any more.
               Else it is kept, as dirty, and reported: a dump marks it, so that a person can decide
    lost       missing altogether: a broken record of the snapshot named it, or that of its insertion

If the superblock says that the origin has everything, and there was no clean shutdown, the next start would give
all mappings up, so none is looked for. That holds only while both slots can be read: else the newest superblock,
which is lost, may have said something else.

A broken snapshot is no loss while the commit before it stands whole in the other arena.

Dirty bits that cannot be read are dirty bits that are set: of each mapped block, or with `dirty_log` of
each that is LOGGED. Hints and discards are not worth a guess. If nothing is lost or doubtful and the
records of the clean shutdown are intact, it was a clean shutdown still.

How much is lost: after a clean shutdown the dirty bits show it; else the superblock says how many
blocks are mapped. A slot without any valid copy may have held the newest superblock:
then it is not known, and what is recorded clean may be dirty since.
"""

from array import array
from typing import NamedTuple

import msgspec
from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.cache.content import (
    CacheContent,
    cache_content_of,
    read_cache_content,
)
from nbdtarget_metadata.cache.index import OblockIndex
from nbdtarget_metadata.cache.load import Sync, load_values
from nbdtarget_metadata.cache.records import (
    LOGGED,
    VALID,
    ArenaRecord,
    Words,
    decode_arena_record,
)
from nbdtarget_metadata.cache.superblock import (
    CACHE,
    DIRTY_LOG,
    ORIGIN_COMPLETE,
    CacheSuperblock,
)
from nbdtarget_metadata.errors import (
    CorruptMetadata,
    MetadataTooSmall,
    UnsupportedFormat,
)
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.scan import Placed, pass_over, scan
from nbdtarget_metadata.log.superblock import (
    CLEAN_SHUTDOWN,
    NEEDS_CHECK,
    Found,
    choose_superblock,
    open_copies,
    read_area,
)
from nbdtarget_metadata.operations import Steps
from nbdtarget_metadata.tools.cache_values import flagged, statements, value_fault
from nbdtarget_metadata.tools.salvage import (
    Link,
    Salvaged,
    backward,
    forward,
)

__all__ = ["salvage_cache"]

STEP_CBLOCKS = 4096


def salvage_cache(device_size: int) -> Steps[Salvaged[CacheContent]]:
    """Read all that can be believed.

    Raises:
        NotFormatted, NotOurs, UnsupportedFormat: as for intact metadata.
        MetadataTooSmall: not even the superblocks are there.
        CorruptMetadata: no superblock is valid, or valid ones contradict each other.
    """
    try:
        content = yield from read_cache_content(device_size)
    except (CorruptMetadata, MetadataTooSmall) as error:
        damage = [str(error)]
    else:
        flags = content.flags & ~NEEDS_CHECK
        return Salvaged(content._replace(flags=flags), ())
    area = yield from read_area(device_size)
    found = choose_superblock(CACHE, area, admit_needs_check=True, admit_lost_slot=True)
    superblock = found.superblock
    if superblock.gives_up_mappings and not found.lost:
        return Salvaged(_empty(superblock), tuple(damage))
    base = yield from _maybe_base(found, area, device_size)
    arena = _Arena(superblock, base)
    yield from arena.read(device_size, onward=not found.lost)
    damage += yield from arena.settle()
    sync = None
    if superblock.flags & CLEAN_SHUTDOWN and not found.lost:
        try:
            sync = yield from _read_sync(superblock, device_size)
        except CorruptMetadata as error:
            damage += [line for line in (str(error),) if line not in damage]
    content = _content(superblock, arena, sync, is_slot_lost=bool(found.lost))
    if found.lost:
        content = content._replace(nr_lost=None)
    return Salvaged(content, tuple(damage))


def _maybe_base(
    found: Found[CacheSuperblock], area: memoryview, device_size: int
) -> Steps[Words | None]:
    """Return the values one commit before the newest, if they stand whole in the other arena."""
    newest = found.superblock
    if found.lost or newest.flags & NEEDS_CHECK:
        return None  # the other slot may hold a commit that failed
    for slot in open_copies(CACHE, area):
        for copy in slot:
            older = copy.superblock
            if (
                older is not None
                and older.generation == newest.generation - 1
                and older.arena != newest.arena
                and older.arena_end * BLOCK_SIZE <= device_size
            ):
                try:
                    return (yield from load_values(older))
                except (CorruptMetadata, UnsupportedFormat):
                    return None
    return None


def _read_sync(superblock: CacheSuperblock, device_size: int) -> Steps[Sync]:
    end = superblock.sync_begin + superblock.sync_blocks
    if end * BLOCK_SIZE > device_size:
        raise CorruptMetadata("the clean shutdown's records", end, "the device's end")
    sync = Sync(superblock)
    yield from sync.read()
    sync.discarded()
    return sync


class _Arena:
    """The content of the live arena, record by record.

    Attributes:
        values: the last that is believed; `known` as in the module head.
    """

    def __init__(self, superblock: CacheSuperblock, base: Words | None) -> None:
        nr_cblocks_max = superblock.nr_cblocks_max
        self.values: Words = base if base is not None else array("Q")
        self.values.frombytes(bytes(8 * (nr_cblocks_max - len(self.values))))
        self.known = zeros(nr_cblocks_max, "little")
        self._superblock = superblock
        self._has_base = base is not None
        self._stated: Words = array("I", bytes(4 * nr_cblocks_max))
        self._nr_records = 0
        self._is_snapshot_whole = True
        self._is_in_journal = False
        self._believed: set[int] = set()

    def read(self, device_size: int, *, onward: bool) -> Steps[None]:
        """Read what is there, in order. `onward`: records that only their predecessors vouch for, too."""
        superblock = self._superblock
        begin, last = superblock.snapshot_block, superblock.journal_end
        end = min(last, device_size // BLOCK_SIZE)
        links: list[Link] = []

        def note(placed: Placed[ArenaRecord]) -> None:
            record = placed.record
            if record.generation <= superblock.generation:
                links.append(
                    Link(placed.block, placed.end, placed.digest, record.previous)
                )

        yield from scan(
            begin, end, decode=decode_arena_record, intact=note, other=pass_over
        )
        self._believed = backward(links, superblock)
        if onward:
            self._believed |= forward(links, self._believed, superblock)
        yield from scan(
            begin, end, decode=decode_arena_record, intact=self._apply, other=self._gap
        )
        if end < last:
            self._gap(max(begin, end), False)
            self._gap(last - 1, False)
        self._enter(superblock.journal_block)
        nr_cblocks = superblock.nr_cblocks
        del self.values[nr_cblocks:], self.known[nr_cblocks:]

    def settle(self) -> Steps[list[str]]:
        """Unmap impossible blocks: see "doubtful" in the module head. Returns the faults that only a bug can leave."""
        lines = []
        values = self.values
        index = yield from OblockIndex.new(values)
        for cblock, value in enumerate(values):
            if cblock % STEP_CBLOCKS == 0:
                yield ()
            if not value:
                continue
            error = value_fault(self._superblock, cblock, value)
            if error is not None:
                lines.append(str(error))
                values[cblock] = 0
                continue
            other = index.add(cblock)
            if other is None:
                continue
            loser = min(cblock, other, key=self._rank)
            if loser == other:
                index.remove(other)
            values[loser] = 0
            if loser == other:
                index.add(cblock)
        return lines

    def _rank(self, cblock: int) -> tuple[int, int]:
        return self.known[cblock], self._stated[cblock]

    def _enter(self, block: int) -> None:
        """Take the next block of the snapshot or the journal."""
        if not self._is_in_journal and block >= self._superblock.journal_block:
            self._is_in_journal = True
            # A block that stands in no record of a whole snapshot is unmapped.
            if self._is_snapshot_whole or self._has_base:
                self.known.setall(1)

    def _gap(self, block: int, is_zero: bool) -> None:
        self._enter(block)
        if self._is_in_journal:
            self.known.setall(0)
        else:
            self._is_snapshot_whole = False

    def _apply(self, placed: Placed[ArenaRecord]) -> None:
        if placed.block not in self._believed:
            self._gap(placed.block, False)
            self._gap(placed.end - 1, False)
            return
        self._enter(placed.block)
        self._nr_records += 1
        for cblock, value in statements(placed.record):
            if cblock < len(self.values):
                self.values[cblock] = value
                self.known[cblock] = 1
                self._stated[cblock] = self._nr_records


def _empty(superblock: CacheSuperblock) -> CacheContent:
    """Return the content that a start would make of it anyway: the origin has everything."""
    return cache_content_of(
        msgspec.structs.replace(superblock, flags=superblock.flags & ~NEEDS_CHECK),
        values=array("Q", bytes(8 * superblock.nr_cblocks)),
        dirty=zeros(superblock.nr_cblocks, "little"),
        hints=None,
        discarded=None,
    )


class _Dirty(NamedTuple):
    """Which blocks are dirty, and how many are lost."""

    dirty: bitarray
    nr_lost: int


def _content(
    superblock: CacheSuperblock,
    arena: _Arena,
    sync: Sync | None,
    *,
    is_slot_lost: bool,
) -> CacheContent:
    values = arena.values
    doubtful = flagged(values, VALID) & ~arena.known
    if sync is not None:
        for cblock in (doubtful & ~sync.dirty).search(1):
            values[cblock] = 0
        doubtful &= sync.dirty
    # Blocks that a lost commit may have LOGGED may be dirty.
    unlogged = flagged(values, VALID) if is_slot_lost else doubtful
    found = _dirty_after(superblock, values, unlogged, sync)
    is_whole = sync is not None and not found.nr_lost and not doubtful.any()
    flags = superblock.flags & ~NEEDS_CHECK
    if is_slot_lost:
        flags &= ~ORIGIN_COMPLETE  # the lost slot may have said otherwise
    if not is_whole:
        flags &= ~CLEAN_SHUTDOWN
    content = cache_content_of(
        msgspec.structs.replace(superblock, flags=flags),
        values=values,
        dirty=found.dirty,
        hints=sync.hints if sync is not None and is_whole else None,
        discarded=sync.discarded() if sync is not None and is_whole else None,
    )
    return content._replace(
        nr_lost=found.nr_lost, doubtful=doubtful if doubtful.any() else None
    )


def _dirty_after(
    superblock: CacheSuperblock,
    values: Words,
    unlogged: bitarray,
    sync: Sync | None,
) -> _Dirty:
    """Tell what is dirty; with `dirty_log` LOGGED is made to say so, too.

    Args: unlogged: blocks that may be dirty though they are not LOGGED.
    """
    mapped = flagged(values, VALID)
    has_log = bool(superblock.incompat & DIRTY_LOG)
    if sync is not None:
        dirty = sync.dirty & mapped
        nr_lost = (sync.dirty & ~mapped).count()
    else:
        nr_lost = max(0, superblock.nr_mapped - mapped.count())
        dirty = flagged(values, LOGGED) | unlogged if has_log else mapped
    if has_log:
        for cblock in (dirty | unlogged).search(1):
            values[cblock] |= LOGGED
    if sync is not None and (nr_lost or unlogged.any()):
        # No clean shutdown any more.
        dirty = flagged(values, LOGGED) if has_log else mapped
    return _Dirty(dirty, nr_lost)
