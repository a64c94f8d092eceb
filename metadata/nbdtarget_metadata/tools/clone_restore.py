# SPDX-License-Identifier: Apache-2.0
"""Write complete clone metadata from its content.

The order makes a half-written result impossible to mistake for a whole one:

    1. over old content: zero the superblock blocks, flush
    2. the snapshot into arena 0, flush
    3. the superblock, generation G - 1 then G, each in its slot, both copies, with FUA

A crash before 3 leaves records without a superblock: `format` refuses that as foreign, so no
clone starts anew over it by mistake; in the middle of 3, a slot without a valid copy, which
opening refuses. Generation G - 1 is written for the rule that each slot has two valid copies;
it says the same as G.
"""

from typing import Final

import msgspec

from nbdtarget_metadata.clone.content import CloneContent
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.clone.superblock import CLONE, CloneSuperblock, arena_blocks_for
from nbdtarget_metadata.errors import UnsupportedFormat
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, FORMAT_VERSION
from nbdtarget_metadata.log.layout import new_chain, refuse_content
from nbdtarget_metadata.log.superblock import (
    RO_COMPAT_KNOWN,
    SUPERBLOCK_BLOCKS,
    write_superblock,
)
from nbdtarget_metadata.operations import Flush, Steps, Write

__all__ = ["restore"]

GENERATION_MIN: Final = 1  # of formatted metadata


def restore(
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
    unknown = content.ro_compat & ~RO_COMPAT_KNOWN
    if unknown:  # what these features keep is not in the content
        raise UnsupportedFormat(FORMAT_VERSION, unknown)
    nr_regions = len(content.hydrated)
    arena_blocks = arena_blocks_for(nr_regions, device_size)
    if overwrite:
        yield Write(0, bytes(SUPERBLOCK_BLOCKS * BLOCK_SIZE), fua=True)
        yield Flush()
    else:
        yield from refuse_content(CLONE, device_size, arena_blocks)
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
    yield Flush()
    superblock = msgspec.structs.replace(
        superblock,
        snapshot_blocks=chain.block - superblock.snapshot_block,
        snapshot_digest=chain.digest,
        journal_digest=chain.digest,
    )
    for generation in (content.generation - 1, content.generation):
        superblock = msgspec.structs.replace(superblock, generation=generation)
        yield from write_superblock(superblock)
        yield Flush()
    return superblock
