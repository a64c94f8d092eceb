# SPDX-License-Identifier: Apache-2.0
"""A small cache on a `Store`, and how to commit it."""

from array import array

from bitarray import bitarray

from nbdtarget_metadata.cache.load import Discarded
from nbdtarget_metadata.cache.metadata import CacheMetadata, CacheTransaction
from nbdtarget_metadata.cache.superblock import PolicyIdentity
from tests.support.metadata.store import Store, drive

# Neither is a power of two.
BLOCK_SIZE = 3 * 32768
NR_CBLOCKS = 40
NR_OBLOCKS = 100
ORIGIN_SIZE = NR_OBLOCKS * BLOCK_SIZE + 512
SIZE = CacheMetadata.device_size_min(NR_CBLOCKS)
UUID = bytes(range(16))


def format_on(store: Store, *, nr_cblocks: int = NR_CBLOCKS) -> CacheMetadata:
    steps = CacheMetadata.format(
        device_size=store.size,
        block_size=BLOCK_SIZE,
        origin_size=ORIGIN_SIZE,
        nr_cblocks=nr_cblocks,
        uuid=UUID,
    )
    return drive(store, steps)


def open_on(store: Store, *, block_size: int = BLOCK_SIZE) -> CacheMetadata:
    steps = CacheMetadata.open(device_size=store.size, block_size=block_size)
    return drive(store, steps)


def finish(store: Store, transaction: CacheTransaction | None) -> None:
    assert transaction is not None
    drive(store, transaction.journal())
    drive(store, transaction.superblock())
    transaction.done()


def commit(store: Store, metadata: CacheMetadata, *, clean: bool = False) -> None:
    finish(store, metadata.pre_commit(clean_shutdown=clean))


def start(
    store: Store,
    metadata: CacheMetadata,
    *,
    dirty_log: bool = False,
    writes_back: bool = True,
) -> None:
    """Start, and commit that if need be."""
    drive(store, metadata.start(dirty_log=dirty_log, writes_back=writes_back))
    if not metadata.may_change:
        commit(store, metadata)


def mapped(metadata: CacheMetadata) -> dict[int, int]:
    """Return oblocks by cblock."""
    return {
        cblock: oblock
        for cblock in range(metadata.nr_cblocks)
        if (oblock := metadata.maybe_oblock(cblock)) is not None
    }


def dirty(metadata: CacheMetadata) -> set[int]:
    return set(metadata.dirty.search(1))


SMQ = PolicyIdentity("smq", (2, 0, 0))


def shut_down(
    store: Store, metadata: CacheMetadata, policy: PolicyIdentity = SMQ
) -> None:
    hints = array("I", range(100, 100 + metadata.nr_cblocks))
    discarded = Discarded(2 * BLOCK_SIZE, bitarray("0110" * 12, endian="little"))
    metadata.prepare_shutdown(policy=policy, hints=hints, discarded=discarded)
    commit(store, metadata, clean=True)
