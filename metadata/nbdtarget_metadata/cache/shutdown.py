# SPDX-License-Identifier: Apache-2.0
"""The record of a clean shutdown of a cache, beside the mappings, in a sync area.

Two superblocks that may both be opened after a crash never vouch for the same sync area, so the
records of the one are not overwritten while the other is being written (`other_area`).
"""

from typing import Any, Final, NamedTuple

import msgspec
from bitarray import bitarray

from nbdtarget_metadata.cache.load import Discarded
from nbdtarget_metadata.cache.records import (
    DirtyBits,
    Discards,
    Hints,
    Words,
    pack_words,
    sync_blocks_max,
)
from nbdtarget_metadata.cache.superblock import (
    NO_POLICY,
    NR_SYNC_AREAS,
    CacheSuperblock,
    PolicyIdentity,
)
from nbdtarget_metadata.log.chain import CHUNK_BYTES, Chain
from nbdtarget_metadata.operations import Steps

__all__ = [
    "NOTHING_RECORDED",
    "Shutdown",
    "other_area",
    "shutdown_fields",
    "write_shutdown",
]


class Shutdown(NamedTuple):
    """The facts that a clean shutdown records besides the dirty bits."""

    policy: PolicyIdentity = NO_POLICY
    hints: Words | None = None
    discarded: Discarded | None = None


NOTHING_RECORDED: Final = Shutdown()


def other_area(area: int) -> int:
    """Return the sync area that the superblock which names `area` does not vouch for."""
    return (area + 1) % NR_SYNC_AREAS


def shutdown_fields(shutdown: Shutdown, *, nr_dirty: int) -> dict[str, Any]:
    """Return what a superblock says of `shutdown`, except for the place of its records."""
    # A policy without hints left none to be believed.
    policy = shutdown.policy if shutdown.hints is not None else NO_POLICY
    discarded = shutdown.discarded
    return {
        "nr_dirty": nr_dirty,
        "policy_name": policy.name,
        "policy_version": policy.version,
        "hint_size": policy.hint_size,
        "discard_block_size": discarded.block_size if discarded is not None else 0,
        "nr_dblocks": len(discarded.bits) if discarded is not None else 0,
    }


def write_shutdown(
    superblock: CacheSuperblock, shutdown: Shutdown, dirty: bitarray
) -> Steps[CacheSuperblock]:
    """Write the records of a clean shutdown into the sync area that `superblock` names.

    Returns the superblock that vouches for them. Durable: as `Chain.append`.
    """
    begin = superblock.sync_begin
    end = begin + sync_blocks_max(superblock.nr_cblocks_max)
    chain = Chain(block=begin, end=end, digest=superblock.uuid)
    yield from _write_records(chain, superblock.generation, dirty, shutdown)
    return msgspec.structs.replace(
        superblock,
        sync_blocks=chain.block - begin,
        sync_digest=chain.digest,
        **shutdown_fields(shutdown, nr_dirty=dirty.count()),
    )


def _write_records(
    chain: Chain, generation: int, dirty: bitarray, shutdown: Shutdown
) -> Steps[None]:
    step = 8 * CHUNK_BYTES
    for at in range(0, len(dirty), step):
        piece = dirty[at : at + step]
        if piece.any():
            yield chain.append(
                DirtyBits(
                    generation=generation,
                    previous=chain.digest,
                    begin=at,
                    bits=piece.tobytes(),
                )
            )
    hints = shutdown.hints
    step = CHUNK_BYTES // 4
    for at in range(0, len(hints) if hints is not None else 0, step):
        assert hints is not None
        yield chain.append(
            Hints(
                generation=generation,
                previous=chain.digest,
                begin=at,
                hints=pack_words(hints[at : at + step]),
            )
        )
    if shutdown.discarded is not None:
        yield chain.append(
            Discards(
                generation=generation,
                previous=chain.digest,
                bits=shutdown.discarded.bits.tobytes(),
            )
        )
