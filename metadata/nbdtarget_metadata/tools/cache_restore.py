# SPDX-License-Identifier: Apache-2.0
"""Write complete cache metadata from its content; record that a cache was written back, offline.

The order of a restore is that of restore.py.

`record_written_back` is one commit without a change of mappings, and always a clean shutdown: after it
the dirty bits are exact, also if they were not before. It goes to the sync area that the superblock does not
vouch for, so a crash leaves either state. LOGGED blocks may stay so: they are a superset of the dirty blocks.
"""

import msgspec
from bitarray import bitarray

from nbdtarget_metadata.cache.content import CacheContent
from nbdtarget_metadata.cache.encoding import CacheEncoding
from nbdtarget_metadata.cache.load import load
from nbdtarget_metadata.cache.records import LOGGED
from nbdtarget_metadata.cache.shutdown import Shutdown, other_area, write_shutdown
from nbdtarget_metadata.cache.superblock import (
    CACHE,
    DIRTY_LOG,
    CacheSuperblock,
    first_superblock,
    layout_for,
)
from nbdtarget_metadata.log.layout import new_chain
from nbdtarget_metadata.log.superblock import (
    CLEAN_SHUTDOWN,
    RO_COMPAT_KNOWN,
    read_superblock,
    write_superblock,
)
from nbdtarget_metadata.operations import Flush, Steps
from nbdtarget_metadata.tools.restore import (
    GENERATION_MIN,
    make_room,
    refuse_features,
    with_snapshot,
    write_generations,
)

__all__ = ["record_written_back", "restore_cache"]


def restore_cache(
    content: CacheContent, *, device_size: int, overwrite: bool = False
) -> Steps[CacheSuperblock]:
    """Write `content`; the layout follows from `device_size`. Returns the new superblock.

    Args: overwrite: the content of the device may be lost.

    Raises:
        MetadataTooSmall, UnsupportedFormat: nothing was written.
        NotOurs: the device is not all zero, and `overwrite` is not set. Nothing was written.
    Durable: the metadata, when this returns.
    """
    assert content.generation >= GENERATION_MIN
    refuse_features(
        content.ro_compat & ~RO_COMPAT_KNOWN | content.incompat & ~DIRTY_LOG
    )
    layout = layout_for(content.nr_cblocks, device_size)
    yield from make_room(CACHE, device_size, layout.arena_blocks, overwrite=overwrite)
    superblock = _superblock_of(
        content, arena_blocks=layout.arena_blocks, nr_cblocks_max=layout.nr_cblocks_max
    )
    chain = new_chain(superblock, 0, 0)
    encoding = CacheEncoding(content.values, superblock.nr_cblocks_max)
    yield from encoding.snapshot(chain, superblock.generation)
    superblock = with_snapshot(superblock, chain)
    if content.flags & CLEAN_SHUTDOWN:
        shutdown = Shutdown(content.policy, content.hints, content.discarded)
        superblock = yield from write_shutdown(superblock, shutdown, content.dirty)
    return (yield from write_generations(superblock, content.generation))


def record_written_back(
    device_size: int, written_back: bitarray, *, disks: bytes
) -> Steps[CacheSuperblock]:
    """Record that these cache blocks are the same as the origin's; other dirty blocks stay dirty.

    Args: disks: the record of which disks belong to it (disks.py), as they are now.

    Call it only after both devices were flushed: neither copy may turn out older than the other. The
    metadata must not be open elsewhere.

    Raises: what `load` does. Nothing was written.
    Durable: a clean shutdown, when this returns. A crash leaves what was recorded before, or that.
    """
    found = yield from read_superblock(CACHE, device_size)
    superblock = found.superblock
    assert not superblock.gives_up_mappings, "its blocks may differ from the origin's"
    loaded = yield from load(superblock, device_size)
    if found.unhealed:
        # A copy that cannot be read now, and can be after a power cut, must not vouch for
        # a sync area that is about to be written over.
        superblock = msgspec.structs.replace(
            superblock, generation=superblock.generation + 1
        )
        yield from write_superblock(superblock)
        yield Flush()
    area = superblock.sync_area
    if superblock.flags & CLEAN_SHUTDOWN:
        area = other_area(area)
    after = yield from write_shutdown(
        msgspec.structs.replace(
            superblock,
            generation=superblock.generation + 1,
            nr_commits=superblock.nr_commits + 1,
            flags=superblock.flags | CLEAN_SHUTDOWN,
            sync_area=area,
            disks=disks,
        ),
        Shutdown(superblock.policy, loaded.hints, loaded.discarded),
        loaded.dirty & ~written_back,
    )
    # The superblock vouches for these records, so they must be durable before it is written.
    yield Flush()
    yield from write_superblock(after)
    yield Flush()
    return after


def _superblock_of(
    content: CacheContent, *, arena_blocks: int, nr_cblocks_max: int
) -> CacheSuperblock:
    """Return the superblock, except for the fields that are known only after writing."""
    first = first_superblock(
        content.uuid,
        block_size=content.block_size,
        origin_size=content.origin_size,
        nr_cblocks=content.nr_cblocks,
        nr_cblocks_max=nr_cblocks_max,
        arena_blocks=arena_blocks,
    )
    return msgspec.structs.replace(
        first,
        # Of the records: G - 1 vouches for them as well.
        generation=content.generation - 1,
        flags=content.flags,
        compat=content.compat,
        ro_compat=content.ro_compat,
        incompat=content.incompat,
        nr_commits=content.nr_commits,
        nr_compactions=content.nr_compactions,
        nr_mapped=content.nr_mapped,
        nr_logged=sum(1 for value in content.values if value & LOGGED),
        read_hits=content.read_hits,
        read_misses=content.read_misses,
        write_hits=content.write_hits,
        write_misses=content.write_misses,
        disks=content.disks,
    )
