# SPDX-License-Identifier: Apache-2.0
"""How a cache's changes are written: a change is a cache block, and a record says what it is.

So a transaction must write its changed blocks as they were at its pre_commit, not as they are by now:
until it is durable, a block that changes is noted as it was (`CacheEncoding`'s `before`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from bitarray import bitarray

from nbdtarget_metadata.cache.records import (
    CHUNK_CBLOCKS,
    NONE_BEFORE,
    SetEntries,
    SetValues,
    Words,
    blocks_for_entries,
    chunk_record,
    entry_records,
    snapshot_blocks_max,
)
from nbdtarget_metadata.cache.shutdown import Shutdown
from nbdtarget_metadata.log.chain import Chain
from nbdtarget_metadata.log.commit import Taken
from nbdtarget_metadata.operations import Operation, Steps

__all__ = ["FLUSH_CACHE", "FLUSH_ORIGIN", "CacheEncoding", "CacheTaken"]

# The disks to flush before the superblock is written.
FLUSH_CACHE: Final = 1  # mappings were inserted, or blocks recorded clean
FLUSH_ORIGIN: Final = 2  # removed, inserted clean, or recorded clean


@dataclass(slots=True)
class CacheTaken(Taken[bitarray]):
    """The changes that one commit of a cache makes durable. Its `changes` are a bitmap of cache blocks.

    Attributes:
        logged: those of `changes` that become LOGGED.
        removed: the origin blocks that were unmapped; some of them may be mapped again.
        flushes: FLUSH_CACHE and FLUSH_ORIGIN: which devices must be flushed before `superblock`.
        starts: after it the cache `may_change`.
        only_rewrites: nothing is new but the superblock copies.
        says_complete: its superblock says that the origin has everything.
        shutdown: it is a clean shutdown, which records that.
    """

    logged: bitarray
    removed: set[int]
    flushes: int
    starts: bool
    only_rewrites: bool
    says_complete: bool
    shutdown: Shutdown | None


class CacheEncoding:
    """See `Encoding`.

    Args:
        values: of the cache blocks, in core. They may become more, and none less.
        nr_cblocks_max: to how many cache blocks the cache may grow.
        before: values that stand for those in `values`: what has changed since a pre_commit.
    """

    def __init__(
        self,
        values: Words,
        nr_cblocks_max: int,
        before: Mapping[int, int] = NONE_BEFORE,
    ) -> None:
        self._values = values
        self._nr_cblocks_max = nr_cblocks_max
        self._before = before

    @property
    def snapshot_blocks_max(self) -> int:
        return snapshot_blocks_max(self._nr_cblocks_max)

    def nothing(self) -> bitarray:
        return bitarray(endian="little")

    def union(self, first: bitarray, second: bitarray) -> bitarray:
        # The cache may have grown between them.
        if len(first) < len(second):
            first, second = second, first
        union = first.copy()
        union[: len(second)] |= second
        return union

    def count(self, changes: bitarray) -> int:
        return changes.count()

    def blocks_for(self, changes: bitarray) -> int:
        return blocks_for_entries(changes.count())

    def snapshot(self, chain: Chain, generation: int) -> Steps[None]:
        values, before = self._values, self._before
        # The range is not fixed: there may be more values meanwhile.
        begin = 0
        while begin < len(values):
            chunk = values[begin : begin + CHUNK_CBLOCKS]
            for cblock, value in before.items():
                if begin <= cblock < begin + CHUNK_CBLOCKS:
                    chunk[cblock - begin] = value
            content = chunk_record(begin, chunk)
            if isinstance(content, tuple):
                yield chain.append(
                    SetValues(
                        generation=generation,
                        previous=chain.digest,
                        begin=content[0],
                        values=content[1],
                    )
                )
            elif content is not None:
                yield _append_entries(chain, generation, content)
            else:
                yield ()
            begin += CHUNK_CBLOCKS

    def records(self, chain: Chain, generation: int, changes: bitarray) -> Steps[None]:
        cblocks = changes.search(1)
        for entries in entry_records(cblocks, self._values, self._before):
            yield _append_entries(chain, generation, entries)

    def records_before(
        self, end: int, chain: Chain, generation: int, changes: bitarray
    ) -> Steps[bitarray]:
        # Blocks are written as they are by now: what no transaction holds yet, a later one
        # will journal again.
        if chain.block + self.blocks_for(changes) > end:
            return changes
        yield from self.records(chain, generation, changes)
        return self.nothing()


def _append_entries(chain: Chain, generation: int, entries: bytes) -> Operation:
    return chain.append(
        SetEntries(generation=generation, previous=chain.digest, entries=entries)
    )
