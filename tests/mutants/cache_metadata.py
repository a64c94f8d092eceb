# SPDX-License-Identifier: Apache-2.0
"""Mutants of a cache's metadata: what may be believed after a crash, and what must be flushed first."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["CACHE_METADATA"]

CUTS: Final = (
    "tests/metadata/cache/test_crash.py::test_every_crash_image_opens_at_an_acknowledged_state",
)
CACHE: Final = ("tests/metadata/cache/test_metadata.py",)
CYCLES: Final = ("tests/metadata/cache/test_cycles.py",)
RESIZE: Final = ("tests/metadata/cache/test_resize.py",)
COMPLETE: Final = (
    "tests/metadata/cache/test_origin_complete.py",
    "tests/nbdtarget/targets/cache/test_origin_complete.py",
)
SWITCHES: Final = ("tests/crash/test_cache_machine.py",)
LOAD: Final = ("tests/metadata/cache/test_load.py",)


def _mutant(
    name: str, forgets: str, where: str, old: str, new: str, tests: tuple[str, ...]
) -> Mutant:
    return Mutant(f"cache-{name}", forgets, where, ((old, new),), tests)


CACHE_METADATA: Final = (
    _mutant(
        "clean-shutdown-not-cleared",
        "A crash looks like a clean shutdown: blocks that are dirty count as clean.",
        "nbdtarget_metadata.cache.metadata:CacheMetadata._fields_after",
        "flags = CLEAN_SHUTDOWN if shutdown is not None else 0\n",
        "flags = CLEAN_SHUTDOWN if shutdown is not None else live.flags\n",
        CUTS,
    ),
    _mutant(
        "changes-admitted-before-the-clean-shutdown-is-cleared",
        "A write dirties a block while the disk still says that all is exact.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks.start",
        "            self.is_recorded_clean\n            or dirty_log != was_logged\n",
        "            dirty_log != was_logged\n",
        CUTS,
    ),
    _mutant(
        "changes-admitted-over-a-single-copy",
        "A crash, then rot in the one copy that says so: blocks that are dirty count as clean.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks.start",
        "            or bool(self._unhealed)\n        )\n        self.may_change",
        "        )\n        self.may_change",
        (*CYCLES, *CUTS),
    ),
    _mutant(
        "dirty-bits-trusted-after-an-unclean-shutdown",
        "What was dirty at a crash counts as clean, and is dropped with the next demotion.",
        "nbdtarget_metadata.cache.load:load",
        "dirty = (logged if superblock.incompat & DIRTY_LOG else mapped).copy()",
        "dirty = logged.copy()",
        CUTS,
    ),
    _mutant(
        "removal-without-origin-flush",
        "A mapping is gone, and what was written back to the origin is lost in its cache.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks._remove",
        "        self._flushes |= FLUSH_ORIGIN\n",
        "",
        CUTS,
    ),
    _mutant(
        "insertion-without-cache-flush",
        "A committed mapping points at what the cache block held before: another block's data.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks.insert",
        "FLUSH_CACHE if dirty else FLUSH_CACHE | FLUSH_ORIGIN",
        "0 if dirty else FLUSH_ORIGIN",
        CUTS,
    ),
    _mutant(
        "clean-insertion-without-origin-flush",
        "A block that was copied before the origin was durable is clean, but newer than that.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks.insert",
        "FLUSH_CACHE if dirty else FLUSH_CACHE | FLUSH_ORIGIN",
        "FLUSH_CACHE",
        (*CACHE, *CUTS),
    ),
    _mutant(
        "recorded-clean-without-cache-flush",
        "The origin has what was written back, the cache block something older, and it is clean.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks._take_back_log",
        "self._flushes |= FLUSH_CACHE | FLUSH_ORIGIN",
        "self._flushes |= FLUSH_ORIGIN",
        CUTS,
    ),
    _mutant(
        "recorded-clean-without-origin-flush",
        "The dirty log says clean before what was written back is durable.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks._take_back_log",
        "self._flushes |= FLUSH_CACHE | FLUSH_ORIGIN",
        "self._flushes |= FLUSH_CACHE",
        (*CACHE, *CUTS),
    ),
    _mutant(
        "dirty-log-record-after-the-write",
        "A write is sent before the log says so durably: a crash leaves the block clean.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks.may_dirty",
        "bool(self._admitted[cblock])",
        "bool(self._logged[cblock])",
        CUTS,
    ),
    _mutant(
        "taken-back-record-still-believed",
        "A block is dirtied again on the strength of a record that was taken back.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks._take_back_log",
        "            self._admitted &= keep\n",
        "",
        CUTS,
    ),
    _mutant(
        "dirty-log-switched-on-without-what-is-dirty",
        "Blocks that were dirty before the log was kept are clean after the next crash.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks.start",
        "enumerate(missing.search(1))",
        "enumerate(missing.search(1, 0, 0))",
        CUTS,
    ),
    _mutant(
        "block-reused-before-its-removal-is-committed",
        "A crash brings the old mapping back over another block's data.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks._is_uncommitted",
        "            self._changed[cblock]\n            or (",
        "            (",
        CUTS,
    ),
    _mutant(
        "block-reused-while-its-removal-is-committed",
        "A crash in the middle of that commit brings the old mapping back over other data.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks._is_uncommitted",
        "transaction.taken.changes[cblock])",
        "False)",
        CUTS,
    ),
    _mutant(
        "transaction-writes-what-changed-later",
        "A commit journals what blocks became after its flushes had begun.",
        "nbdtarget_metadata.cache.encoding:CacheEncoding.records",
        "entry_records(cblocks, self._values, self._before)",
        "entry_records(cblocks, self._values)",
        CUTS,
    ),
    _mutant(
        "snapshot-of-what-changed-later",
        "The snapshot of a commit holds what blocks became after its flushes had begun.",
        "nbdtarget_metadata.cache.encoding:CacheEncoding.snapshot",
        "in before.items():",
        "in ():",
        CUTS,
    ),
    _mutant(
        "compaction-drops-a-transaction",
        "What was committed while a snapshot was written is gone with the switch.",
        "nbdtarget_metadata.log.commit:Compaction.note",
        "self.since = self._encoding.union(self.since, changes)",
        "pass",
        CUTS,
    ),
    _mutant(
        "failed-commit-vouched-for",
        "Read only, a write goes to a mapping that no opening will find.",
        "nbdtarget_metadata.cache.metadata:CacheMetadata.abort",
        "            self._changed |= taken.changes\n",
        "            self._changed = taken.changes ^ taken.changes\n",
        (*CYCLES, *CUTS),
    ),
    _mutant(
        "healing-commit-forgets-the-full-sync",
        "One rotten copy, healed before the first change, and every block is dirty.",
        "nbdtarget_metadata.cache.metadata:CacheMetadata.pre_commit",
        "        if not taken.only_rewrites:\n",
        "        if not (taken.only_rewrites and taken.changes.any()):\n",
        CYCLES,
    ),
    _mutant(
        "stale-discards-believed",
        "After a reload what was written since the last full sync counts as discarded.",
        "nbdtarget_metadata.cache.metadata:CacheMetadata.discarded",
        "return self._discarded if self.is_recorded_clean else None",
        "return self._discarded",
        CYCLES,
    ),
    _mutant(
        "hint-of-the-block-before-believed",
        "A block starts at the level of what its place held before.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks.insert",
        "            self._hints[cblock] = 0  # it was another block's\n",
        "            pass\n",
        CYCLES,
    ),
    _mutant(
        "needs-check-in-the-failed-generation",
        "A crash leaves two superblocks of one generation that contradict each other.",
        "nbdtarget_metadata.cache.metadata:CacheMetadata.record_needs_check",
        "generation=self._superblock.generation + 2,",
        "generation=self._superblock.generation + 1,",
        CUTS,
    ),
    _mutant(
        "needs-check-not-recorded",
        "After a failed commit the metadata opens as if nothing had been.",
        "nbdtarget_metadata.cache.metadata:CacheMetadata.record_needs_check",
        "flags=self._superblock.flags | NEEDS_CHECK,",
        "flags=self._superblock.flags,",
        (*CACHE, *CUTS),
    ),
    _mutant(
        "live-sync-area-overwritten",
        "A crash in a full sync destroys the dirty bits that the superblock vouches for.",
        "nbdtarget_metadata.cache.metadata:CacheMetadata._fields_after",
        "area = live.sync_area if shutdown is None else other_area(live.sync_area)",
        "area = live.sync_area",
        CACHE,
    ),
    _mutant(
        "hints-of-another-policy-believed",
        "Levels of one policy are taken for those of another.",
        "nbdtarget_metadata.cache.superblock:PolicyIdentity.understands",
        "            and self.name == stored.name\n",
        "",
        CACHE,
    ),
    _mutant(
        "origin-block-held-twice",
        "Two cache blocks hold one origin block: which of them is read is chance.",
        "nbdtarget_metadata.cache.load:_index_values",
        "        if other is not None:\n            raise",
        "        if other == -1:\n            raise",
        LOAD,
    ),
    _mutant(
        "dirty-bit-of-an-unmapped-block-believed",
        "Garbage is written back over the origin.",
        "nbdtarget_metadata.cache.load:load",
        '    _refuse_any(sync.dirty & ~mapped, "unmapped")\n',
        "",
        LOAD,
    ),
    _mutant(
        "shrunk-over-a-dirty-block",
        "The only copy of acknowledged data is cut off.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks.resize_origin",
        'if dirty >= 0:\n            raise CannotShrink("origin", dirty)',
        'if dirty < -1:\n            raise CannotShrink("origin", dirty)',
        RESIZE,
    ),
    # ---- the origin has everything ----
    _mutant(
        "origin-complete-said-over-dirty-blocks",
        "Writethrough takes over from writeback, and a crash gives up what only the cache has.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks.is_complete",
        "return self.gives_up_mappings or not (self.writes_back or self.nr_dirty)",
        "return self.gives_up_mappings or not self.writes_back",
        (*COMPLETE, *SWITCHES),
    ),
    _mutant(
        "origin-complete-not-taken-back-by-writeback",
        "A crash gives up the blocks that a writeback cache has just promised.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks.is_complete",
        "return self.gives_up_mappings or not (self.writes_back or self.nr_dirty)",
        "return not self.nr_dirty",
        (*COMPLETE, *SWITCHES),
    ),
    _mutant(
        "origin-complete-forgotten-by-a-commit-before-the-mappings-are-dropped",
        "A crash in the start after a crash: old blocks are dirty, and written over the origin.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks.is_complete",
        "return self.gives_up_mappings or not (self.writes_back or self.nr_dirty)",
        "return not (self.writes_back or self.nr_dirty)",
        COMPLETE,
    ),
    _mutant(
        "changes-admitted-before-origin-complete-is-taken-back",
        "Writeback after a crash in writethrough: the first writes are given up by the next one.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks.start",
        "            or self.is_recorded_complete != self.is_complete\n",
        "",
        COMPLETE,
    ),
    _mutant(
        "origin-complete-stays-when-a-write-through-has-failed",
        "The origin did not take it; after a FLUSH a crash forgets what clients have read.",
        "nbdtarget_metadata.cache.metadata:CacheMetadata.changed",
        "            or (self.may_change and self.is_complete != self.is_recorded_complete)\n",
        "",
        COMPLETE,
    ),
    _mutant(
        "fua-to-a-block-that-a-crash-gives-up",
        "It is durable in the cache, and the mapping does not count after a crash.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks.mapping_survives",
        "            and not self.is_recorded_complete\n",
        "",
        COMPLETE,
    ),
    _mutant(
        "origin-complete-before-the-origin-is-flushed",
        "The last block was written back, and is lost in the origin's cache.",
        "nbdtarget_metadata.cache.metadata:CacheMetadata._take",
        "flushes |= FLUSH_ORIGIN  # what was written back",
        "pass",
        COMPLETE,
    ),
    _mutant(
        "all-dirty-after-a-crash-in-writethrough",
        "Old blocks are written back over an origin that was used alone.",
        "nbdtarget_metadata.cache.load:load",
        "if superblock.gives_up_mappings:",
        "if superblock.gives_up_mappings and not superblock.nr_mapped:",
        COMPLETE,
    ),
    _mutant(
        "origin-complete-believed-with-a-slot-lost",
        "A repair drops dirty blocks: the newest superblock is gone, and said something else.",
        "nbdtarget_metadata.tools.cache_salvage:_content",
        "        flags &= ~ORIGIN_COMPLETE  # the lost slot may have said otherwise\n",
        "        pass\n",
        COMPLETE,
    ),
    _mutant(
        "blocks-recorded-clean-after-a-crash-in-writethrough",
        "Offline writeback calls blocks clean that differ from the origin: old data is read.",
        "nbdtarget.tools.writeback:write_back",
        "if content.gives_up_mappings:",
        "if content.gives_up_mappings and content.nr_lost:",
        ("tests/nbdtarget/tools/test_writeback.py",),
    ),
)
