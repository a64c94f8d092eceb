# SPDX-License-Identifier: Apache-2.0
"""The content of a clone's metadata, without its layout: a dump shows it, and a restore writes it."""

from typing import NamedTuple

from bitarray import bitarray

from nbdtarget_metadata.clone.load import load_bitmap
from nbdtarget_metadata.clone.superblock import CLONE, CloneSuperblock
from nbdtarget_metadata.log.superblock import choose_superblock, read_area
from nbdtarget_metadata.operations import Steps

__all__ = ["CloneContent", "clone_content_of", "read_clone_content"]


class CloneContent(NamedTuple):
    """One clone's metadata.

    Attributes:
        region_size, target_size: bytes.
        nr_lost: hydrated regions that are missing in `hydrated`, as nothing intact vouches for
            them any more; 0 but after a repair. None: it is not known how many.
        disks: the record of which disks belong to it (disks.py).
    """

    uuid: bytes
    generation: int
    flags: int
    compat: int
    ro_compat: int
    nr_commits: int
    nr_compactions: int
    region_size: int
    target_size: int
    hydrated: bitarray
    nr_lost: int | None = 0
    disks: bytes = b""


def clone_content_of(superblock: CloneSuperblock, hydrated: bitarray) -> CloneContent:
    """Take from `superblock` what does not depend on the layout."""
    return CloneContent(
        uuid=superblock.uuid,
        generation=superblock.generation,
        flags=superblock.flags,
        compat=superblock.compat,
        ro_compat=superblock.ro_compat,
        nr_commits=superblock.nr_commits,
        nr_compactions=superblock.nr_compactions,
        region_size=superblock.region_size,
        target_size=superblock.target_size,
        hydrated=hydrated,
        disks=superblock.disks,
    )


def read_clone_content(device_size: int) -> Steps[CloneContent]:
    """Read intact metadata; `needs_check` does not hinder.

    Raises: NotFormatted, NotOurs, CorruptMetadata, UnsupportedFormat, MetadataTooSmall.
    """
    area = yield from read_area(device_size)
    superblock = choose_superblock(CLONE, area, admit_needs_check=True).superblock
    hydrated = yield from load_bitmap(superblock, device_size)
    return clone_content_of(superblock, hydrated)
