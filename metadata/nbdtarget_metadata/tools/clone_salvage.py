# SPDX-License-Identifier: Apache-2.0
"""Read what is left of damaged clone metadata. Writes nothing; `restore` can write it elsewhere.

What may be believed
====================

A bit that is wrongly set makes the clone read a destination that was never written; one that is
wrongly missing makes it read the source for a region that a client has written, and hydration
copies the source over that. Neither is harmless. So a bit is set only if something intact vouches
for it, and the number of missing bits is reported.

Bits of a clone are only ever set. So everything that *any* valid superblock vouches for is still true,
also if a newer superblock has replaced it. Of the newest superblock's live range, records are believed
that it leads to `backward` or `forward` (salvage.py).

An older superblock's range may have been written over by a compaction since, whose first record
names the uuid as well. So there, and if a slot is lost everywhere, only `backward` is used. A record
outside of these ranges (an orphan) proves nothing: a commit may have ended before its data was durable.

How much is missing is known: the superblock says how many regions are hydrated. If as many were
found, nothing is missing, although something is broken. If it says that all regions are hydrated, they are.

A slot without any valid copy may have held the newest superblock. The content of the other slot is then
the best there is, but it is not known how much is missing.
"""

from bitarray import bitarray

from nbdtarget_metadata.clone.content import (
    CloneContent,
    clone_content_of,
    read_clone_content,
)
from nbdtarget_metadata.clone.load import new_bitmap
from nbdtarget_metadata.clone.records import Record, apply_record, decode_record
from nbdtarget_metadata.clone.superblock import CLONE, NR_REGIONS_MAX, CloneSuperblock
from nbdtarget_metadata.errors import CorruptMetadata, MetadataTooSmall
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.scan import Placed, pass_over, scan
from nbdtarget_metadata.log.superblock import (
    CLEAN_SHUTDOWN,
    NEEDS_CHECK,
    choose_superblock,
    open_copies,
    read_area,
)
from nbdtarget_metadata.operations import Steps
from nbdtarget_metadata.tools.salvage import Link, Salvaged, backward, forward

__all__ = ["salvage_clone"]


def salvage_clone(device_size: int) -> Steps[Salvaged[CloneContent]]:
    """Read all that can be believed.

    Raises:
        NotFormatted, NotOurs, UnsupportedFormat: as for intact metadata.
        MetadataTooSmall: not even the superblocks are there.
        CorruptMetadata: no superblock is valid, or valid ones contradict each other.
    """
    try:
        content = yield from read_clone_content(device_size)
    except (CorruptMetadata, MetadataTooSmall) as error:
        damage = str(error)
    else:
        flags = content.flags & ~NEEDS_CHECK
        return Salvaged(content._replace(flags=flags), ())
    area = yield from read_area(device_size)
    found = choose_superblock(CLONE, area, admit_needs_check=True, admit_lost_slot=True)
    newest = found.superblock
    if newest.nr_regions > NR_REGIONS_MAX:
        raise CorruptMetadata("nr_regions", NR_REGIONS_MAX, newest.nr_regions)
    superblocks = {
        copy.superblock.generation: copy.superblock
        for slot in open_copies(CLONE, area)
        for copy in slot
        if copy.superblock is not None
    }
    hydrated = yield from new_bitmap(newest.nr_regions)
    for superblock in superblocks.values():
        onward = superblock.generation == newest.generation and not found.lost
        hydrated |= yield from _vouched(superblock, device_size, onward=onward)
    if newest.nr_hydrated == newest.nr_regions:
        hydrated.setall(1)
    nr_lost: int | None = newest.nr_hydrated - hydrated.count()
    if nr_lost is not None and nr_lost < 0:
        raise CorruptMetadata(
            "number of hydrated regions",
            f"at most {newest.nr_hydrated}",
            hydrated.count(),
        )
    if found.lost and newest.nr_hydrated < newest.nr_regions:
        nr_lost = None
    flags = newest.flags & ~NEEDS_CHECK
    if nr_lost != 0:
        flags &= ~CLEAN_SHUTDOWN
    content = clone_content_of(newest, hydrated)._replace(flags=flags, nr_lost=nr_lost)
    return Salvaged(content, (damage,))


def _vouched(
    superblock: CloneSuperblock, device_size: int, *, onward: bool
) -> Steps[bitarray]:
    """Return the bits of the records that `superblock` vouches for."""
    begin = superblock.snapshot_block
    end = min(superblock.journal_end, device_size // BLOCK_SIZE)
    links: list[Link] = []

    def note(placed: Placed[Record]) -> None:
        if placed.record.generation <= superblock.generation:
            links.append(
                Link(placed.block, placed.end, placed.digest, placed.record.previous)
            )

    yield from scan(begin, end, decode=decode_record, intact=note, other=pass_over)
    believed = backward(links, superblock)
    if onward:
        believed |= forward(links, believed, superblock)
    hydrated = yield from new_bitmap(superblock.nr_regions)
    bits_begin_min: int | None = 0

    def apply(placed: Placed[Record]) -> None:
        nonlocal bits_begin_min
        if placed.block not in believed:
            return
        if placed.block >= superblock.journal_block:
            bits_begin_min = None
        bits_begin_min = apply_record(
            hydrated,
            placed.record,
            f"record at block {placed.block}",
            bits_begin_min=bits_begin_min,
        )

    yield from scan(begin, end, decode=decode_record, intact=apply, other=pass_over)
    return hydrated
