# SPDX-License-Identifier: Apache-2.0
"""The things that `examine` and `mend` (check.py) must know of a clone's metadata."""

from typing import Final

from nbdtarget_metadata.clone.load import load_bitmap
from nbdtarget_metadata.clone.records import decode_record
from nbdtarget_metadata.clone.superblock import (
    CLONE,
    CloneSuperblock,
    check_device_size,
)
from nbdtarget_metadata.log.layout import NR_ARENAS
from nbdtarget_metadata.log.superblock import SUPERBLOCK_BLOCKS
from nbdtarget_metadata.operations import Steps
from nbdtarget_metadata.tools.check import KindChecks

__all__ = ["CLONE_CHECKS"]


def _live(superblock: CloneSuperblock) -> list[tuple[int, int]]:
    return [(superblock.snapshot_block, superblock.journal_end)]


def _end(superblock: CloneSuperblock) -> int:
    return SUPERBLOCK_BLOCKS + NR_ARENAS * superblock.arena_blocks


def _faults(superblock: CloneSuperblock) -> Steps[list[str]]:
    """Return no faults: the bits of a clone have none that `load` does not find."""
    yield ()
    return []


CLONE_CHECKS: Final = KindChecks(
    kind=CLONE,
    check_size=check_device_size,
    load=load_bitmap,
    live=_live,
    end=_end,
    decode=decode_record,
    faults=_faults,
)
