# SPDX-License-Identifier: Apache-2.0
"""Reads a clone's metadata as the server does, without knowing its table line."""

from typing import NamedTuple

from nbdtarget_metadata.clone.load import load_bitmap
from nbdtarget_metadata.clone.superblock import CLONE
from nbdtarget_metadata.log.superblock import (
    CLEAN_SHUTDOWN,
    SUPERBLOCK_BLOCKS,
    read_superblock,
)
from nbdtarget_metadata.operations import Steps

__all__ = ["Report", "check"]


class Report(NamedTuple):
    """Metadata that `CloneMetadata.open` would accept.

    Attributes:
        region_size, target_size: bytes.
        clean_shutdown: the flag as it stands on disk.
        used_blocks: 4 KiB blocks: superblocks, the live snapshot and its journal.
        warnings: what is not as it should be, but does not hinder opening.
    """

    uuid: bytes
    generation: int
    region_size: int
    target_size: int
    nr_regions: int
    nr_hydrated: int
    clean_shutdown: bool
    nr_commits: int
    nr_compactions: int
    used_blocks: int
    warnings: tuple[str, ...]


def check(device_size: int) -> Steps[Report]:
    """Read everything that is vouched for and check it. Writes nothing.

    Raises: what `CloneMetadata.open` does, except GeometryMismatch.
    """
    found = yield from read_superblock(CLONE, device_size)
    superblock = found.superblock
    yield from load_bitmap(superblock, device_size)
    return Report(
        uuid=superblock.uuid,
        generation=superblock.generation,
        region_size=superblock.region_size,
        target_size=superblock.target_size,
        nr_regions=superblock.nr_regions,
        nr_hydrated=superblock.nr_hydrated,
        clean_shutdown=bool(superblock.flags & CLEAN_SHUTDOWN),
        nr_commits=superblock.nr_commits,
        nr_compactions=superblock.nr_compactions,
        used_blocks=superblock.journal_end
        - superblock.snapshot_block
        + SUPERBLOCK_BLOCKS,
        warnings=found.notes,
    )
