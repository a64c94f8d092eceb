# SPDX-License-Identifier: Apache-2.0
"""How a clone's changes are written: a change is a run of regions, and only ever sets bits."""

from collections.abc import Callable

from bitarray import bitarray

from nbdtarget_metadata.clone.records import (
    CHUNK_REGIONS,
    RUNS_PER_RECORD_MAX,
    Runs,
    append_content,
    blocks_for_runs,
    encode_chunk,
    new_runs,
    snapshot_blocks_max,
)
from nbdtarget_metadata.log.chain import Chain
from nbdtarget_metadata.operations import Steps

__all__ = ["CloneEncoding", "SavedChunks"]


class SavedChunks:
    """The bitmap as it was at a pre_commit, for a commit that writes all of it.

    Bits are set while that goes on. So a chunk is saved before the first bit in it changes, unless
    its turn has come already.
    """

    def __init__(self, hydrated: bitarray) -> None:
        self._hydrated = hydrated
        self._chunks: dict[int, bitarray] = {}
        # Chunks before this one have been taken: they may change.
        self._first = 0

    def save(self, begin: int, end: int) -> None:
        """Keep the chunks of the regions [begin, end), which are about to change."""
        for chunk_nr in range(begin // CHUNK_REGIONS, -(-end // CHUNK_REGIONS)):
            if chunk_nr >= self._first and chunk_nr not in self._chunks:
                first = chunk_nr * CHUNK_REGIONS
                self._chunks[chunk_nr] = self._hydrated[first : first + CHUNK_REGIONS]

    def take(self, begin: int, end: int) -> bitarray:
        """Return the chunk of the regions [begin, end); from here on it may change."""
        chunk_nr = begin // CHUNK_REGIONS
        assert chunk_nr >= self._first, "chunks are taken in order"
        self._first = chunk_nr + 1
        saved = self._chunks.pop(chunk_nr, None)
        return self._hydrated[begin:end] if saved is None else saved


class CloneEncoding:
    """See `Encoding`. Changes are pairs (begin, count) of regions, flat.

    Args:
        hydrated: the bitmap in core.
        take: returns the regions [begin, end) of a chunk for a snapshot; as they are now, if it
            is not given.
    """

    def __init__(
        self,
        hydrated: bitarray,
        take: Callable[[int, int], bitarray] | None = None,
    ) -> None:
        self._hydrated = hydrated
        self._take = take if take is not None else self._live

    @property
    def snapshot_blocks_max(self) -> int:
        return snapshot_blocks_max(len(self._hydrated))

    def nothing(self) -> Runs:
        return new_runs()

    def union(self, first: Runs, second: Runs) -> Runs:
        # The order does not matter, and no harm is done by a region that stands twice.
        first.extend(second)
        return first

    def count(self, changes: Runs) -> int:
        return len(changes) // 2

    def blocks_for(self, changes: Runs) -> int:
        return blocks_for_runs(len(changes) // 2)

    def snapshot(self, chain: Chain, generation: int) -> Steps[None]:
        """Append a snapshot of the bitmap, at most half a chunk's work at a step."""
        nr_regions = len(self._hydrated)
        for begin in range(0, nr_regions, CHUNK_REGIONS):
            chunk = self._take(begin, min(begin + CHUNK_REGIONS, nr_regions))
            content = encode_chunk(begin, chunk)
            if content is None or isinstance(content, tuple):
                yield ()  # to look through half a megabyte was one step, to hash it is another
            if content is not None:
                yield append_content(chain, generation, content)

    def records(self, chain: Chain, generation: int, changes: Runs) -> Steps[None]:
        step = 2 * RUNS_PER_RECORD_MAX
        for at in range(0, len(changes), step):
            yield append_content(chain, generation, changes[at : at + step])

    def records_before(
        self, end: int, chain: Chain, generation: int, changes: Runs
    ) -> Steps[Runs]:
        step = 2 * RUNS_PER_RECORD_MAX
        for at in range(0, len(changes), step):
            piece = changes[at : at + step]
            if chain.block + self.blocks_for(piece) > end:
                return changes[at:]
            yield append_content(chain, generation, piece)
        return self.nothing()

    def _live(self, begin: int, end: int) -> bitarray:
        return self._hydrated[begin:end]
