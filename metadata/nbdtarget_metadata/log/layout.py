# SPDX-License-Identifier: Apache-2.0
"""Where the arenas of any kind lie on the metadata device, and what must not be there before.

block 0            4                       4 + A                  4 + 2 A
      | superblocks | arena 0               | arena 1              | the kind's own |

A = 2 S + J: S is the longest snapshot, twice, because a commit may have to put its own
behind one that it has overtaken (commit.py); J is what a journal has at least.
"""

from typing import Final

from nbdtarget_metadata.errors import NotFormatted, NotOurs
from nbdtarget_metadata.log.chain import Chain
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.superblock import (
    SUPERBLOCK_BLOCKS,
    S,
    Superblock,
    SuperblockType,
    read_superblock,
)
from nbdtarget_metadata.operations import Steps, read

__all__ = [
    "JOURNAL_BLOCKS_MIN",
    "JOURNAL_BLOCKS_PREFERRED",
    "NR_ARENAS",
    "new_chain",
    "refuse_content",
    "refuse_foreign",
]

NR_ARENAS: Final = 2
# The room that a journal has in the worst place, behind two snapshots.
JOURNAL_BLOCKS_MIN: Final = 16
JOURNAL_BLOCKS_PREFERRED: Final = 256
# These bytes must be zero before a device counts as blank, besides the arenas' heads: the first
# and last ones, where partition tables, RAID members, LVM, ZFS and file systems show (btrfs
# keeps its superblock at 64 KiB).
FOREIGN_PROBE_SIZE: Final = 256 * 1024


def new_chain(superblock: Superblock, arena: int, skip: int) -> Chain:
    """Return an empty chain in `arena`, `skip` blocks from its beginning."""
    begin = SUPERBLOCK_BLOCKS + arena * superblock.arena_blocks
    end = begin + superblock.arena_blocks
    return Chain(block=begin + skip, end=end, digest=superblock.uuid)


def refuse_content(
    kind: SuperblockType[S], device_size: int, arena_blocks: int
) -> Steps[None]:
    """Raise NotOurs unless the device looks all zero, or has an interrupted format.

    Raises: also what `read_superblock` does, but for NotFormatted.
    """
    try:
        found = yield from read_superblock(kind, device_size)
    except NotFormatted:
        yield from refuse_foreign(device_size, arena_blocks)
    else:
        raise NotOurs(
            "the superblock area",
            f"{kind.tag} metadata, generation {found.superblock.generation}",
        )


def refuse_foreign(device_size: int, arena_blocks: int) -> Steps[None]:
    """Raise NotOurs unless the rest of the device looks all zero: head, tail, arenas' heads.

    `read_superblock` looks at the superblock area itself.
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
        # Not `any(data)`: for the two probes of a quarter of a MiB that took 50 ms of each first start.
        if bytes(data) != bytes(len(data)):
            at = next(at for at, byte in enumerate(data) if byte)
            raise NotOurs(f"byte {first + at}", bytes(data[at : at + 8]).hex())
