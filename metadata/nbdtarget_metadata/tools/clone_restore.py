# SPDX-License-Identifier: Apache-2.0
"""Write complete clone metadata from its content, in the order of restore.py."""

from nbdtarget_metadata.clone.content import CloneContent
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.clone.superblock import CLONE, CloneSuperblock, arena_blocks_for
from nbdtarget_metadata.log.layout import new_chain
from nbdtarget_metadata.log.superblock import (
    RO_COMPAT_KNOWN,
    SUPERBLOCK_BLOCKS,
)
from nbdtarget_metadata.operations import Steps
from nbdtarget_metadata.tools.restore import (
    GENERATION_MIN,
    make_room,
    refuse_features,
    with_snapshot,
    write_generations,
)

__all__ = ["restore_clone"]


def restore_clone(
    content: CloneContent, *, device_size: int, overwrite: bool = False
) -> Steps[CloneSuperblock]:
    """Write `content`; the layout follows from `device_size`. Returns the new superblock.

    Args: overwrite: whatever the device holds may go.

    Raises:
        MetadataTooSmall, UnsupportedFormat: nothing was written.
        NotOurs: the device is not all zero, and `overwrite` is not set. Nothing was written.
    Durable: the metadata, when this returns.
    """
    assert content.generation >= GENERATION_MIN
    refuse_features(content.ro_compat & ~RO_COMPAT_KNOWN)
    nr_regions = len(content.hydrated)
    arena_blocks = arena_blocks_for(nr_regions, device_size)
    yield from make_room(CLONE, device_size, arena_blocks, overwrite=overwrite)
    superblock = CloneSuperblock(
        generation=content.generation - 1,
        uuid=content.uuid,
        flags=content.flags,
        compat=content.compat,
        ro_compat=content.ro_compat,
        incompat=0,
        nr_commits=content.nr_commits,
        nr_compactions=content.nr_compactions,
        arena_blocks=arena_blocks,
        arena=0,
        snapshot_block=SUPERBLOCK_BLOCKS,
        snapshot_blocks=0,
        snapshot_digest=content.uuid,
        journal_blocks=0,
        journal_digest=content.uuid,
        region_size=content.region_size,
        target_size=content.target_size,
        nr_hydrated=content.hydrated.count(),
        disks=content.disks,
    )
    assert superblock.nr_regions == nr_regions
    metadata = CloneMetadata(
        superblock=superblock,
        hydrated=content.hydrated,
        device_size=device_size,
        unhealed=frozenset(),
        notes=(),
    )
    chain = new_chain(superblock, 0, 0)
    yield from metadata._write_snapshot(
        chain, superblock.generation, metadata._live_chunk
    )
    superblock = with_snapshot(superblock, chain)
    return (yield from write_generations(superblock, content.generation))
