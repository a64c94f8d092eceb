# SPDX-License-Identifier: Apache-2.0
"""Shared by the restoring of all kinds.

The order makes a half-written result impossible to mistake for a whole one:

    1. over old content: zero the superblock blocks, flush
    2. the snapshot into arena 0, and what a clean shutdown of a cache records; flush
    3. the superblock, generation G - 1 then G, each in its slot, both copies, with FUA

A crash before 3 leaves records without a superblock: `format` refuses that as foreign, so no
clone or cache starts anew over it by mistake; in the middle of 3, a slot without a valid copy, which
opening refuses. Generation G - 1 is written for the rule that each slot has two valid copies;
it says the same as G.
"""

from typing import Final

import msgspec

from nbdtarget_metadata.errors import UnsupportedFormat
from nbdtarget_metadata.log.chain import Chain
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, FORMAT_VERSION
from nbdtarget_metadata.log.layout import refuse_content
from nbdtarget_metadata.log.superblock import (
    SUPERBLOCK_BLOCKS,
    S,
    SuperblockType,
    write_superblock,
)
from nbdtarget_metadata.operations import Flush, Steps, Write

__all__ = [
    "GENERATION_MIN",
    "make_room",
    "refuse_features",
    "with_snapshot",
    "write_generations",
]

GENERATION_MIN: Final = 1  # of formatted metadata


def refuse_features(unknown: int) -> None:
    """Raise UnsupportedFormat for feature bits whose content a dump does not have."""
    if unknown:
        raise UnsupportedFormat(FORMAT_VERSION, unknown)


def make_room(
    kind: SuperblockType[S], device_size: int, arena_blocks: int, *, overwrite: bool
) -> Steps[None]:
    """Step 1; without `overwrite` the device must be all zero. Raises: NotOurs."""
    if overwrite:
        yield Write(0, bytes(SUPERBLOCK_BLOCKS * BLOCK_SIZE), fua=True)
        yield Flush()
    else:
        yield from refuse_content(kind, device_size, arena_blocks)


def with_snapshot(superblock: S, chain: Chain) -> S:
    """Return `superblock` with the snapshot that `chain` ends, and no journal behind it."""
    return msgspec.structs.replace(
        superblock,
        snapshot_blocks=chain.block - superblock.snapshot_block,
        snapshot_digest=chain.digest,
        journal_digest=chain.digest,
    )


def write_generations(superblock: S, generation: int) -> Steps[S]:
    """Flush what was written so far; then step 3. Returns the newest superblock.

    Durable: the metadata, when this returns.
    """
    assert generation >= GENERATION_MIN
    # The superblock vouches for the records, so they must be durable before it is written.
    yield Flush()
    for each in (generation - 1, generation):
        superblock = msgspec.structs.replace(superblock, generation=each)
        yield from write_superblock(superblock)
        yield Flush()
    return superblock
