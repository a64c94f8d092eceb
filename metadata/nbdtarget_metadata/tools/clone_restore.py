# SPDX-License-Identifier: Apache-2.0
"""Write complete clone metadata from its content, in the order of restore.py."""

import msgspec

from nbdtarget_metadata.clone.content import CloneContent
from nbdtarget_metadata.clone.encoding import CloneEncoding
from nbdtarget_metadata.clone.superblock import (
    CLONE,
    CloneSuperblock,
    arena_blocks_for,
    first_superblock,
)
from nbdtarget_metadata.log.layout import new_chain
from nbdtarget_metadata.log.superblock import (
    RO_COMPAT_KNOWN,
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

    Args: overwrite: the content of the device may be lost.

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
    first = first_superblock(
        content.uuid,
        region_size=content.region_size,
        target_size=content.target_size,
        arena_blocks=arena_blocks,
    )
    superblock = msgspec.structs.replace(
        first,
        # Of the records: G - 1 vouches for them as well.
        generation=content.generation - 1,
        flags=content.flags,
        compat=content.compat,
        ro_compat=content.ro_compat,
        nr_commits=content.nr_commits,
        nr_compactions=content.nr_compactions,
        nr_hydrated=content.hydrated.count(),
        disks=content.disks,
    )
    assert superblock.nr_regions == nr_regions
    chain = new_chain(superblock, 0, 0)
    yield from CloneEncoding(content.hydrated).snapshot(chain, superblock.generation)
    superblock = with_snapshot(superblock, chain)
    return (yield from write_generations(superblock, content.generation))
