# SPDX-License-Identifier: Apache-2.0
"""Where arenas lie on the metadata device, and how a whole one is read.

block 0            4                       4 + A                  4 + 2 A
      | superblocks | arena 0               | arena 1              | unused |

A = 2 S + J: S is the longest snapshot, twice, because a commit may have to put its own
behind one that it has overtaken (clone.py); J is what a journal has at least.
"""

from typing import Final

from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.errors import (
    CorruptMetadata,
    MetadataTooSmall,
    NotFormatted,
    NotOurs,
)
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.records import (
    Chain,
    Record,
    apply_record,
    read_chain,
    snapshot_blocks_max,
)
from nbdtarget_metadata.log.superblock import (
    CLONE,
    SUPERBLOCK_BLOCKS,
    CloneSuperblock,
    S,
    Superblock,
    SuperblockType,
    read_superblock_of,
)
from nbdtarget_metadata.operations import Steps, read

__all__ = [
    "JOURNAL_BLOCKS_MIN",
    "JOURNAL_BLOCKS_PREFERRED",
    "NR_ARENAS",
    "NR_REGIONS_MAX",
    "arena_blocks_for",
    "check_device_size",
    "device_size_with",
    "load_bitmap",
    "new_bitmap",
    "new_chain",
    "refuse_content",
    "refuse_content_of",
    "refuse_foreign",
]

NR_REGIONS_MAX: Final = 1 << 31  # the kernel's: "Too many regions"
NR_ARENAS: Final = 2
# The room that a journal has in the worst place, behind two snapshots.
JOURNAL_BLOCKS_MIN: Final = 16
JOURNAL_BLOCKS_PREFERRED: Final = 256
# What is looked at before a device counts as all zero, besides the arenas' heads: the first
# and last bytes, where partition tables, RAID members, LVM, ZFS and file systems show (btrfs
# keeps its superblock at 64 KiB).
FOREIGN_PROBE_SIZE: Final = 256 * 1024
# Touching a megabyte of bits for the first time takes a millisecond, counting four less.
STEP_REGIONS: Final = 1 << 23


def device_size_with(nr_regions: int, journal_blocks: int) -> int:
    """Return the bytes of a metadata device whose journals have `journal_blocks` at least."""
    arena_blocks = 2 * snapshot_blocks_max(nr_regions) + journal_blocks
    return (SUPERBLOCK_BLOCKS + NR_ARENAS * arena_blocks) * BLOCK_SIZE


def arena_blocks_for(nr_regions: int, device_size: int) -> int:
    """Return A for a device of `device_size` bytes.

    Raises: MetadataTooSmall.
    """
    needed = device_size_with(nr_regions, JOURNAL_BLOCKS_MIN)
    if device_size < needed:
        raise MetadataTooSmall(needed=needed, given=device_size)
    size = min(device_size, device_size_with(nr_regions, JOURNAL_BLOCKS_PREFERRED))
    return (size // BLOCK_SIZE - SUPERBLOCK_BLOCKS) // NR_ARENAS


def new_chain(superblock: Superblock, arena: int, skip: int) -> Chain:
    """Return an empty chain in `arena`, `skip` blocks from its beginning."""
    begin = SUPERBLOCK_BLOCKS + arena * superblock.arena_blocks
    end = begin + superblock.arena_blocks
    return Chain(block=begin + skip, end=end, digest=superblock.uuid)


def refuse_content(device_size: int, arena_blocks: int) -> Steps[None]:
    """Raise NotOurs unless there is room for a clone's metadata; see `refuse_content_of`."""
    yield from refuse_content_of(CLONE, device_size, arena_blocks)


def refuse_content_of(
    kind: SuperblockType[S], device_size: int, arena_blocks: int
) -> Steps[None]:
    """Raise NotOurs unless the device looks all zero, or has an interrupted format.

    Raises: also what `read_superblock` does, but for NotFormatted.
    """
    try:
        found = yield from read_superblock_of(kind, device_size)
    except NotFormatted:
        yield from refuse_foreign(device_size, arena_blocks)
    else:
        raise NotOurs(
            "the superblock area",
            f"{kind.tag} metadata, generation {found.superblock.generation}",
        )


def refuse_foreign(device_size: int, arena_blocks: int) -> Steps[None]:
    """Raise NotOurs unless the rest of the device looks all zero: head, tail, arenas' heads.

    The superblock area itself is `read_superblock`'s business.
    """
    begin = SUPERBLOCK_BLOCKS * BLOCK_SIZE
    second_arena = begin + arena_blocks * BLOCK_SIZE
    tail = max(begin, device_size - FOREIGN_PROBE_SIZE)
    probes = [
        (begin, min(FOREIGN_PROBE_SIZE, device_size)),
        (second_arena, second_arena + BLOCK_SIZE),
        (tail, device_size),
    ]
    for first, last in probes:
        data = yield from read(first, last - first)
        if any(data):
            at = next(at for at, byte in enumerate(data) if byte)
            raise NotOurs(f"byte {first + at}", bytes(data[at : at + 8]).hex())


def new_bitmap(nr_regions: int) -> Steps[bitarray]:
    """Return a bitmap of zeroes. In steps, as touching 32 MiB for the first time takes 20 ms."""
    bitmap = bitarray(endian="little")
    while len(bitmap) < nr_regions:
        bitmap.extend(zeros(min(STEP_REGIONS, nr_regions - len(bitmap)), "little"))
        yield ()
    return bitmap


def check_device_size(superblock: CloneSuperblock, device_size: int) -> None:
    """Raise MetadataTooSmall if the arenas go on behind the device's end: it has shrunk."""
    nr_blocks = SUPERBLOCK_BLOCKS + NR_ARENAS * superblock.arena_blocks
    if device_size < nr_blocks * BLOCK_SIZE:
        raise MetadataTooSmall(needed=nr_blocks * BLOCK_SIZE, given=device_size)


def load_bitmap(superblock: CloneSuperblock, device_size: int) -> Steps[bitarray]:
    """Read and check everything that `superblock` vouches for; return the bitmap.

    Raises: CorruptMetadata, UnsupportedFormat; MetadataTooSmall: the device has shrunk.
    """
    check_device_size(superblock, device_size)
    if superblock.nr_regions > NR_REGIONS_MAX:
        raise CorruptMetadata("nr_regions", NR_REGIONS_MAX, superblock.nr_regions)
    hydrated = yield from new_bitmap(superblock.nr_regions)
    bits_begin_min: int | None = 0

    def apply(record: Record, where: str) -> None:
        nonlocal bits_begin_min
        bits_begin_min = apply_record(
            hydrated, record, where, bits_begin_min=bits_begin_min
        )

    digest = yield from read_chain(
        kind="snapshot",
        begin=superblock.snapshot_block,
        end=superblock.journal_block,
        digest=superblock.uuid,
        generation_max=superblock.generation,
        apply=apply,
    )
    _expect("digest of the snapshot", superblock.snapshot_digest, digest)
    bits_begin_min = None
    digest = yield from read_chain(
        kind="journal",
        begin=superblock.journal_block,
        end=superblock.journal_end,
        digest=digest,
        generation_max=superblock.generation,
        apply=apply,
    )
    _expect("digest of the journal", superblock.journal_digest, digest)
    nr_hydrated = 0
    for begin in range(0, superblock.nr_regions, STEP_REGIONS):
        end = min(begin + STEP_REGIONS, superblock.nr_regions)
        nr_hydrated += hydrated.count(1, begin, end)
        yield ()
    if nr_hydrated != superblock.nr_hydrated:
        raise CorruptMetadata(
            "number of hydrated regions", superblock.nr_hydrated, nr_hydrated
        )
    return hydrated


def _expect(where: str, expected: bytes, found: bytes) -> None:
    if expected != found:
        raise CorruptMetadata(where, expected.hex(), found.hex())
