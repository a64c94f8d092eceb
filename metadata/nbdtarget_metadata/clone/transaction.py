# SPDX-License-Identifier: Apache-2.0
"""One commit of a clone's metadata, and the compaction that it may switch to.

Theory of operation stands at the head of clone.py, and of journaled.py what is the same for all
kinds. This module is the clone's own: a change is a run of regions.
"""

from typing import TYPE_CHECKING, Final

import msgspec

from nbdtarget_metadata.clone.records import (
    RUNS_PER_RECORD_MAX,
    Runs,
    append_content,
    blocks_for_runs,
    new_runs,
)
from nbdtarget_metadata.log.chain import Chain
from nbdtarget_metadata.log.commit import Compaction, JournaledTransaction
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN
from nbdtarget_metadata.operations import Steps

if TYPE_CHECKING:
    from nbdtarget_metadata.clone.metadata import CloneMetadata

__all__ = ["CloneCompaction", "Transaction"]

# What a commit that switches arenas may have to journal besides its own changes: 32 KiB.
CATCH_UP_RUNS_MAX: Final = 4096
# Then it takes what is left all the same: commits outrun the compaction.
CATCH_UP_ROUNDS_MAX: Final = 16


class CloneCompaction(Compaction[Runs]):
    """Its `since` is the runs of each transaction, one after the other."""

    def __init__(self, metadata: "CloneMetadata") -> None:
        super().__init__(
            metadata._superblock,
            longest=metadata._snapshot_blocks_max(),
            nothing=new_runs(),
        )
        self._metadata = metadata

    def note(self, changes: Runs) -> None:
        self.since.extend(changes)

    def snapshot(self) -> Steps[None]:
        metadata = self._metadata
        yield from metadata._write_snapshot(
            self.chain, metadata.generation, metadata._live_chunk
        )

    def catch_up(self) -> Steps[None]:
        # The transaction under way may be among it: the one that switches comes after that,
        # or never.
        for _ in range(CATCH_UP_ROUNDS_MAX):
            if len(self.since) <= 2 * CATCH_UP_RUNS_MAX:
                return
            runs, self.since = self.since, new_runs()
            step = 2 * RUNS_PER_RECORD_MAX
            for at in range(0, len(runs), step):
                piece = runs[at : at + step]
                blocks = blocks_for_runs(len(piece) // 2)
                if self.chain.block + blocks > self.catch_up_end:
                    self.since = runs[at:] + self.since
                    return
                yield append_content(self.chain, self._metadata.generation, piece)


class Transaction(JournaledTransaction[Runs]):
    """One commit. Made by `CloneMetadata.pre_commit`, whose docstring gives the order.

    Attributes: those of `JournaledTransaction`, and
        runs: the regions that it makes durable.
    """

    _metadata: "CloneMetadata"

    def __init__(
        self, metadata: "CloneMetadata", runs: Runs, *, clean_shutdown: bool
    ) -> None:
        self.runs = runs
        # A commit that only heals superblock copies leaves standing what they say.
        has_changed = bool(runs) or metadata._has_new_disks
        flags = 0 if has_changed else metadata._superblock.flags & CLEAN_SHUTDOWN
        if clean_shutdown:
            flags = CLEAN_SHUTDOWN
        superblock = msgspec.structs.replace(
            metadata._superblock,
            flags=flags,
            # Between transactions, what is in core is what is committed and what this one takes.
            nr_hydrated=metadata.nr_hydrated,
        )
        super().__init__(metadata, runs, superblock)

    def _fits(self, chain: Chain, changes: Runs) -> bool:
        return chain.block + blocks_for_runs(len(changes) // 2) <= chain.end

    def _take_all(self) -> None:
        self._to_journal = new_runs()
        self._metadata._saved = {}
        self._metadata._save_from = 0

    def _snapshot(self) -> Steps[None]:
        metadata = self._metadata
        yield from metadata._write_snapshot(
            self._chain, self.generation, metadata._saved_chunk
        )
        metadata._saved = None

    def _records(self) -> Steps[None]:
        chain, runs = self._chain, self._to_journal
        step = 2 * RUNS_PER_RECORD_MAX
        for at in range(0, len(runs), step):
            yield append_content(chain, self.generation, runs[at : at + step])
