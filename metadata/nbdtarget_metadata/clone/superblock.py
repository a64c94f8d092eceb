# SPDX-License-Identifier: Apache-2.0
"""The superblock of a clone, and how its metadata device is laid out.

block 0            4         4 + A     4 + 2 A
      | superblocks | arena 0 | arena 1 | unused |

A = 2 S + J (layout.py explains why): S is the longest snapshot of the bitmap, J the smallest journal.
"""

from typing import Final

import msgspec

from nbdtarget_metadata.clone.records import snapshot_blocks_max
from nbdtarget_metadata.errors import CorruptMetadata, MetadataTooSmall
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, blocks_for
from nbdtarget_metadata.log.layout import (
    JOURNAL_BLOCKS_MIN,
    JOURNAL_BLOCKS_PREFERRED,
    NR_ARENAS,
)
from nbdtarget_metadata.log.superblock import (
    CLEAN_SHUTDOWN,
    SUPERBLOCK_BLOCKS,
    Superblock,
    SuperblockType,
    check_ranges,
)

__all__ = [
    "CLONE",
    "NR_REGIONS_MAX",
    "CloneSuperblock",
    "arena_blocks_for",
    "check_device_size",
    "device_size_with",
    "first_superblock",
]

NR_REGIONS_MAX: Final = 1 << 31  # the kernel's: "Too many regions"

# Feature bits that this version knows. Unknown ones are refused.
INCOMPAT_KNOWN: Final = 0


class CloneSuperblock(
    Superblock, array_like=True, frozen=True, gc=False, kw_only=True, tag="clone"
):
    """The superblock of a clone. New fields go to the end and have defaults."""

    region_size: int
    target_size: int
    nr_hydrated: int
    disks: bytes = b""

    @property
    def nr_regions(self) -> int:
        """Regions of `region_size` bytes in the target; the last may be short."""
        return -(-self.target_size // self.region_size)


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


def check_device_size(superblock: CloneSuperblock, device_size: int) -> None:
    """Raise MetadataTooSmall if the arenas go on behind the device's end: it has shrunk."""
    nr_blocks = SUPERBLOCK_BLOCKS + NR_ARENAS * superblock.arena_blocks
    if device_size < nr_blocks * BLOCK_SIZE:
        raise MetadataTooSmall(needed=nr_blocks * BLOCK_SIZE, given=device_size)


def first_superblock(
    uuid: bytes, *, region_size: int, target_size: int, arena_blocks: int
) -> CloneSuperblock:
    """Return the superblock of generation 0, in which no region is hydrated."""
    return CloneSuperblock(
        generation=0,
        uuid=uuid,
        flags=CLEAN_SHUTDOWN,
        compat=0,
        ro_compat=0,
        incompat=0,
        nr_commits=0,
        nr_compactions=0,
        arena_blocks=arena_blocks,
        arena=0,
        snapshot_block=SUPERBLOCK_BLOCKS,
        snapshot_blocks=0,
        # The first record names the uuid as its predecessor, so an empty chain ends with it.
        snapshot_digest=uuid,
        journal_blocks=0,
        journal_digest=uuid,
        region_size=region_size,
        target_size=target_size,
        nr_hydrated=0,
    )


def _check_clone(superblock: CloneSuperblock) -> None:
    rules = {
        "region_size": superblock.region_size > 0,
        "target_size": superblock.target_size > 0,
    }
    check_ranges(superblock, rules)
    # An arena has room for the whole bitmap: so the device bounds the memory that it takes.
    bitmap_blocks = blocks_for(-(-superblock.nr_regions // 8))
    if superblock.arena_blocks < bitmap_blocks:
        raise CorruptMetadata(
            f"arena_blocks of superblock generation {superblock.generation}",
            f"at least {bitmap_blocks}",
            superblock.arena_blocks,
        )
    if not 0 <= superblock.nr_hydrated <= superblock.nr_regions:
        raise CorruptMetadata(
            f"nr_hydrated of superblock generation {superblock.generation}",
            f"at most {superblock.nr_regions}",
            superblock.nr_hydrated,
        )


CLONE: Final = SuperblockType(
    tag="clone",
    decoder=msgspec.msgpack.Decoder(CloneSuperblock),
    fixed=("uuid", "region_size", "target_size", "arena_blocks"),
    incompat_known=INCOMPAT_KNOWN,
    check=_check_clone,
)
