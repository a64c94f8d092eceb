# SPDX-License-Identifier: Apache-2.0
"""The content of a cache's metadata, without its layout: a dump shows it, and a restore writes it."""

from typing import NamedTuple

from bitarray import bitarray

from nbdtarget_metadata.cache.load import Discarded, load
from nbdtarget_metadata.cache.records import Words
from nbdtarget_metadata.cache.superblock import (
    CACHE,
    NO_POLICY,
    ORIGIN_COMPLETE,
    CacheSuperblock,
    PolicyIdentity,
)
from nbdtarget_metadata.log.superblock import (
    CLEAN_SHUTDOWN,
    choose_superblock,
    read_area,
)
from nbdtarget_metadata.operations import Steps

__all__ = ["CacheContent", "cache_content_of", "read_cache_content"]


class CacheContent(NamedTuple):
    """One cache's metadata.

    Attributes:
        block_size, origin_size: bytes.
        values: of the cache blocks, as an arena has them (records.py).
        dirty: what counts as dirty: recorded if `flags` say CLEAN_SHUTDOWN, else it follows from
            `values` and `incompat`.
        policy, hints, discarded: only with CLEAN_SHUTDOWN; of unmapped blocks hints are 0.
        read_hits, read_misses, write_hits, write_misses: since formatting.
        nr_lost: mapped blocks (dirty ones, where it is known which are) that are missing in
            `values`, as nothing intact vouches for them any more; 0 but after a repair. None: it is not known
            how many.
        doubtful: blocks in `values` that may hold something else by now: a later change of some
            blocks is lost. None but after a repair.
        disks: the record of which disks belong to it (disks.py).
    """

    uuid: bytes
    generation: int
    flags: int
    compat: int
    ro_compat: int
    incompat: int
    nr_commits: int
    nr_compactions: int
    block_size: int
    origin_size: int
    values: Words
    dirty: bitarray
    policy: PolicyIdentity
    hints: Words | None
    discarded: Discarded | None
    read_hits: int
    read_misses: int
    write_hits: int
    write_misses: int
    nr_lost: int | None = 0
    doubtful: bitarray | None = None
    disks: bytes = b""

    @property
    def nr_cblocks(self) -> int:
        return len(self.values)

    @property
    def gives_up_mappings(self) -> bool:
        """Only the origin counts: see `CacheSuperblock.gives_up_mappings`."""
        return self.flags & (CLEAN_SHUTDOWN | ORIGIN_COMPLETE) == ORIGIN_COMPLETE

    @property
    def nr_mapped(self) -> int:
        return len(self.values) - self.values.count(0)

    @property
    def nr_doubtful(self) -> int:
        return self.doubtful.count() if self.doubtful is not None else 0


def cache_content_of(
    superblock: CacheSuperblock,
    *,
    values: Words,
    dirty: bitarray,
    hints: Words | None,
    discarded: Discarded | None,
) -> CacheContent:
    """Take from `superblock` what does not depend on the layout."""
    if hints is not None:
        for cblock, value in enumerate(values):
            if not value:
                hints[cblock] = 0
    return CacheContent(
        uuid=superblock.uuid,
        generation=superblock.generation,
        flags=superblock.flags,
        compat=superblock.compat,
        ro_compat=superblock.ro_compat,
        incompat=superblock.incompat,
        nr_commits=superblock.nr_commits,
        nr_compactions=superblock.nr_compactions,
        block_size=superblock.block_size,
        origin_size=superblock.origin_size,
        values=values,
        dirty=dirty,
        policy=superblock.policy if hints is not None else NO_POLICY,
        hints=hints,
        discarded=discarded,
        read_hits=superblock.read_hits,
        read_misses=superblock.read_misses,
        write_hits=superblock.write_hits,
        write_misses=superblock.write_misses,
        disks=superblock.disks,
    )


def read_cache_content(device_size: int) -> Steps[CacheContent]:
    """Read intact metadata; `needs_check` does not hinder.

    Raises: NotFormatted, NotOurs, CorruptMetadata, UnsupportedFormat, MetadataTooSmall.
    """
    area = yield from read_area(device_size)
    superblock = choose_superblock(CACHE, area, admit_needs_check=True).superblock
    loaded = yield from load(superblock, device_size)
    return cache_content_of(
        superblock,
        values=loaded.values,
        dirty=loaded.dirty,
        hints=loaded.hints,
        discarded=loaded.discarded,
    )
