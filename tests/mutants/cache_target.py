# SPDX-License-Identifier: Apache-2.0
"""Mutants of the cache target: locks, orders and marks that a flush, or a read, stands on."""

from typing import Final

from tests.mutants.mutant import Edit, Mutant

__all__ = ["CACHE_TARGET"]


UNIT: Final = "tests/nbdtarget/targets/cache/"
MATRIX: Final = ("tests/crash/test_cache_exhaustive.py",)
WALKS: Final = ("tests/crash/test_cache_machine.py",)
CRASH: Final = (*MATRIX, *WALKS)
LOCK_TESTS: Final = (UNIT + "test_locks.py",)
FOREGROUND_TESTS: Final = (UNIT + "test_cached_writes.py", UNIT + "test_foreground.py")
BAD_BLOCK_TESTS: Final = (UNIT + "test_bad_blocks.py",)
DISTRUST_TESTS: Final = (UNIT + "test_distrust.py",)
MIGRATION_TESTS: Final = (UNIT + "test_migrations.py",)


def _mutant(
    name: str, forgets: str, where: str, edit: Edit, tests: tuple[str, ...]
) -> Mutant:
    return Mutant(f"cache-target-{name}", forgets, where, (edit,), tests)


CACHE_TARGET: Final = (
    # ---- the first resume ----
    _mutant(
        "no-commit-before-a-resumed-cache-changes",
        "The first commit overwrites records that a copy, unreadable today, vouches for tomorrow.",
        "nbdtarget.targets.cache.activation:Activation.preresume",
        (
            "            if metadata.needs_rewrite:\n                await self._commit()\n",
            "",
        ),
        ("tests/crash/test_page_cache.py",),
    ),
    # ---- what a commit stands on ----
    _mutant(
        "cache-not-flushed-by-a-commit",
        "Mappings are committed whose data the cache device may still lose.",
        "nbdtarget.targets.cache.target:CacheTarget.__init__",
        (
            "backing=(parts.cache, parts.origin),",
            "backing=(parts.origin,),",
        ),
        MATRIX,
    ),
    _mutant(
        "origin-not-flushed-by-a-commit",
        "A removal is committed, and what was written back is lost in the origin's write cache.",
        "nbdtarget.targets.cache.target:CacheTarget.__init__",
        (
            "backing=(parts.cache, parts.origin),",
            "backing=(parts.cache,),",
        ),
        MATRIX,
    ),
    _mutant(
        "needs-check-written-after-a-failed-flush",
        "An origin that is away for a second leaves a cache that no restart gets past.",
        "nbdtarget.targets.committer:Committer._abort",
        (
            "            await self.device.read(0, PROBE_BYTES)\n",
            "            await self.device.read(0, PROBE_BYTES)\n"
            "            mark = getattr(self.metadata, 'record_needs_check', None)\n"
            "            if mark is not None:\n"
            "                await metadata_io.run(self.device, mark())\n",
        ),
        (UNIT + "test_spec_3_2.py",),
    ),
    _mutant(
        "write-to-the-origin-not-counted",
        "A miss is written to the origin, whose flush fails, and FLUSH is acknowledged.",
        "nbdtarget.targets.cache.foreground:Foreground.miss",
        (
            "            blocks.discards.clear(oblock)\n"
            "            blocks.origin_writes.nr_sent += 1\n"
            "        blocks.submit_held(blocks.origin, bio, oblock)\n",
            "            blocks.discards.clear(oblock)\n"
            "        blocks.submit_held(blocks.origin, bio, oblock)\n",
        ),
        (UNIT + "test_spec_3_2.py",),
    ),
    _mutant(
        "write-back-not-counted",
        "A block is written back, the origin's flush fails, and the removal is committed.",
        "nbdtarget.targets.cache.migrations:Migrations._write_back",
        ("            blocks.origin_writes.nr_sent += 1\n", ""),
        (UNIT + "test_spec_3_2.py",),
    ),
    _mutant(
        "flush-covers-writes-under-way",
        "A flush that began while a write was under way counts as its flush.",
        "nbdtarget.targets.cache.unflushed:OriginWrites.begin_flush",
        ("if self._is_quiet() else self._nr_covered", ""),
        (UNIT + "test_spec_3_2.py",),
    ),
    _mutant(
        "lost-writes-forgotten-at-reload",
        "A table whose commit failed is swapped away, and the next FLUSH says that all is well.",
        "nbdtarget.targets.mapping:MappingTarget.has_lost_writes",
        (
            "    def has_lost_writes(self) -> bool:\n        return self._committer.has_failed",
            "    def has_lost_writes(self) -> bool:\n        return False",
        ),
        ("tests/crash/test_cache_faults.py",),
    ),
    _mutant(
        "table-after-a-failed-commit-promises-fua",
        "The table that was loaded before another one's commit failed acknowledges FUA.",
        "nbdtarget.targets.cache.target:CacheTarget.resume",
        (
            "            self._committer.has_failed = True\n        super().resume()",
            "            pass\n        super().resume()",
        ),
        (UNIT + "test_attack_durability.py",),
    ),
    _mutant(
        "full-sync-beside-migrations",
        "A suspend records what is dirty while migrations still change it.",
        "nbdtarget.targets.cache.target:CacheTarget.quiesce",
        ("        await self._migrations.quiesce()\n", "        pass\n"),
        (UNIT + "test_spec_4_2.py", *WALKS),
    ),
    # ---- FUA ----
    _mutant(
        "fua-overwrite-ends-before-its-commit",
        "A whole block written with FUA is acknowledged, and a crash forgets where it is.",
        "nbdtarget.targets.cache.foreground:Foreground._overwritten",
        ("if errno == 0 and bio.flags & FUA:", "if errno and bio.flags & FUA:"),
        MATRIX,
    ),
    _mutant(
        "fua-hit-without-a-committed-mapping",
        "FUA to a block whose mapping is not committed: a crash reads the origin again.",
        "nbdtarget.targets.cache.cached_writes:CachedWrites._advance",
        (
            "bio.flags & FUA and not metadata.mapping_survives(cblock):",
            "bio.flags & FUA and blocks.has_failed:",
        ),
        MATRIX,
    ),
    # ---- removals ----
    _mutant(
        "demotion-does-not-wait-for-its-commit",
        "A block is written to the origin while a crash would bring its old copy back.",
        "nbdtarget.targets.cache.migrations:Migrations._demote",
        (
            "        if not await blocks.committer.commit():\n            return False\n",
            "        blocks.committer.note_change()\n",
        ),
        CRASH,
    ),
    _mutant(
        "cblock-reused-while-it-is-read",
        "A read that began before a demotion returns another block's data.",
        "nbdtarget.targets.cache.migrations:Migrations._demote",
        (
            "blocks.locks.raise_level(lock, unread.set_result)",
            "unread.set_result(lock)",
        ),
        MIGRATION_TESTS,
    ),
    _mutant(
        "invalidation-writes-before-its-commit",
        "Passthrough writes to the origin, and a crash brings the old copy back.",
        "nbdtarget.targets.cache.cached_writes:CachedWrites._invalidate",
        (
            "                return\n            blocks.committer.after_commit("
            "lambda errno: removed(lock, errno))",
            "                return\n            blocks.committer.note_change()\n"
            "            removed(lock, 0)",
        ),
        MATRIX,
    ),
    # ---- dirty and clean ----
    _mutant(
        "dirty-when-the-write-has-ended",
        "While a write is under way its block counts as clean, and may be given up.",
        "nbdtarget.targets.cache.cached_writes:CachedWrites._advance",
        (
            "            blocks.set_dirty(cblock)\n            bio.offset +=",
            "            bio.on_end(lambda _: blocks.set_dirty(cblock))\n"
            "            bio.offset +=",
        ),
        (*MIGRATION_TESTS, *WALKS),
    ),
    _mutant(
        "clean-before-the-copy-has-ended",
        "A writeback that fails leaves a block that counts as clean, and is dropped.",
        "nbdtarget.targets.cache.migrations:Migrations._write_back",
        (
            "        if not blocks.discards.is_discarded(oblock):\n"
            "            await self._demoter.copy(",
            "        blocks.set_clean(cblock)\n"
            "        if not blocks.discards.is_discarded(oblock):\n"
            "            await self._demoter.copy(",
        ),
        MIGRATION_TESTS,
    ),
    _mutant(
        "no-event-when-all-is-clean",
        "A caller that waits for the last dirty block to become clean waits for ever.",
        "nbdtarget.targets.cache.blocks:Blocks.set_clean",
        ("                self.event()\n", "                self.wake()\n"),
        MATRIX,
    ),
    _mutant(
        "dirty-log-taken-back-under-a-write-through",
        "A crash between the two halves of a write leaves two copies that differ, and are clean.",
        "nbdtarget.targets.cache.cached_writes:CachedWrites._write_through",
        ("        self._blocks.metadata.begin_write_through(cblock)\n", ""),
        FOREGROUND_TESTS,
    ),
    # ---- locks ----
    _mutant(
        "lock-granted-beside-a-write",
        "A block is copied while it is being written: the copy has half of it.",
        "nbdtarget.targets.cache.locks:BlockLocks.maybe_lock",
        (
            "        lock.nr_awaited = self._writers.get(oblock, 0)\n",
            "        lock.nr_awaited = 0\n",
        ),
        LOCK_TESTS,
    ),
    _mutant(
        "reads-pass-a-raised-lock",
        "A read finds its cache block while that becomes another one's.",
        "nbdtarget.targets.cache.locks:BlockLocks.maybe_blocking",
        ("and (is_write or lock.level) else None", "and is_write else None"),
        LOCK_TESTS,
    ),
    _mutant(
        "range-does-not-wait-for-older-locks",
        "A discard marks a block that a migration is copying.",
        "nbdtarget.targets.cache.locks:BlockLocks.lock_range",
        (
            "other.begin < end and begin < other.end for other in self.locked.values()",
            "other.begin < end < other.begin for other in self.locked.values()",
        ),
        LOCK_TESTS,
    ),
    _mutant(
        "write-in-flight-holds-nothing",
        "A promotion copies a block from under a write to the origin, and lacks it.",
        "nbdtarget.targets.cache.blocks:Blocks.submit_held",
        (
            "        if bio.status < 0:\n"
            "            self.locks.hold(oblock, bio, is_write=bio.op != OP_READ)",
            "        if bio.status < 0 and bio.op == OP_READ:\n"
            "            self.locks.hold(oblock, bio, is_write=False)",
        ),
        MIGRATION_TESTS,
    ),
    _mutant(
        "quick-write-in-flight-holds-as-a-read",
        "A writeback copies a block from under a write to it, and calls it clean.",
        "nbdtarget.targets.cache.target:CacheTarget.map",
        (
            "self._locks.hold(oblock, bio, is_write=True)",
            "self._locks.hold(oblock, bio, is_write=False)",
        ),
        MIGRATION_TESTS,
    ),
    _mutant(
        "quick-way-does-not-look-at-locks",
        "A write hits a block that is being copied.",
        "nbdtarget.targets.cache.target:CacheTarget.map",
        (
            "or (self._locked and self._locks.is_locked(oblock))",
            "or (self._locked and self._is_suspended)",
        ),
        MIGRATION_TESTS,
    ),
    _mutant(
        "parked-bios-kept-over-a-suspend",
        "A suspend without flush keeps bios in a table that may be gone when they run.",
        "nbdtarget.targets.cache.foreground:Foreground.push_back",
        (
            "return self._locks.take_parked(lambda bio: bio.private is not _PIECE)",
            "return self._locks.take_parked(lambda bio: bio.private is _PIECE)",
        ),
        FOREGROUND_TESTS,
    ),
    # ---- writes through ----
    _mutant(
        "origin-that-failed-a-write-through-counts",
        "The cache has a write that the origin has not, and drops it as clean.",
        "nbdtarget.targets.cache.cached_writes:CachedWrites._written_through",
        (
            "                if self._has_whole_copy(oblock):\n",
            "                if False:\n",
        ),
        FOREGROUND_TESTS,
    ),
    _mutant(
        "cache-that-failed-a-write-through-is-read",
        "The origin has a write that the cache has not, and what is read is the old data.",
        "nbdtarget.targets.cache.cached_writes:CachedWrites._written_through",
        (
            "            self._bad_blocks.drop(oblock, cblock, bio.end)\n",
            "            bio.end(0)\n",
        ),
        FOREGROUND_TESTS,
    ),
    _mutant(
        "refused-write-acknowledged-before-its-block-is-given-up",
        "A write that only the origin took ends, and a crash brings its old copy back.",
        "nbdtarget.targets.cache.cached_writes:CachedWrites._written_through",
        (
            "            self._bad_blocks.drop(oblock, cblock, bio.end)\n",
            "            bio.end(0)\n"
            "            self._bad_blocks.drop(oblock, cblock, _ignore)\n",
        ),
        BAD_BLOCK_TESTS,
    ),
    _mutant(
        "clean-read-error-not-tried-at-the-origin",
        "The cache device cannot read a clean block, and the client is told so.",
        "nbdtarget.targets.cache.bad_blocks:BadBlocks.rescue_read",
        (
            "metadata.dirty[cblock]:\n            return False",
            "metadata.nr_mapped:\n            return False",
        ),
        BAD_BLOCK_TESTS,
    ),
    _mutant(
        "dirty-block-read-from-the-origin",
        "The cache device cannot read a dirty block, and the origin's old data are read.",
        "nbdtarget.targets.cache.bad_blocks:BadBlocks.rescue_read",
        ("if blocks.has_failed or metadata.dirty[cblock]:", "if blocks.has_failed:"),
        BAD_BLOCK_TESTS,
    ),
    _mutant(
        "block-that-the-origin-may-have-lost-read-from-it",
        "A block was written back, the origin lost that, and its old data are read when the cache device cannot be read.",
        "nbdtarget.targets.cache.blocks:Blocks.has_origin_the_clean",
        ("is_in_doubt = not self.is_writable and", "is_in_doubt = False and"),
        BAD_BLOCK_TESTS,
    ),
    _mutant(
        "clean-shutdown-over-a-failed-flush",
        "The cache device fails the last flush, and its copies are recorded as clean.",
        "nbdtarget.targets.cache.distrust:Distrust.maybe_let_go",
        (
            "not _says_complete(transaction)",
            "device.read_only",
        ),
        DISTRUST_TESTS,
    ),
    _mutant(
        "flush-forgiven-although-a-crash-keeps-the-mappings",
        "The cache device fails its flush, FLUSH is acknowledged, and a crash reads old copies.",
        "nbdtarget.targets.cache.distrust:Distrust._is_origin_complete",
        (
            "return metadata.is_recorded_complete and not metadata.nr_dirty",
            "return not metadata.nr_dirty",
        ),
        DISTRUST_TESTS,
    ),
    _mutant(
        "distrusted-copies-recorded-as-clean",
        "A cache device has failed its flush, and the end records its copies as clean.",
        "nbdtarget.targets.cache.target:CacheTarget._record_stop",
        (
            "is_sound = self._is_active and not self._blocks.distrusts_cache",
            "is_sound = self._is_active",
        ),
        DISTRUST_TESTS,
    ),
    _mutant(
        "distrusted-copy-read",
        "A page that could not be written is read as it was before.",
        "nbdtarget.targets.cache.foreground:Foreground._submit_block",
        (
            "blocks.distrusts_cache and not blocks.metadata.dirty[cblock]",
            "blocks.distrusts_cache and not blocks.metadata.nr_mapped",
        ),
        DISTRUST_TESTS,
    ),
    _mutant(
        "distrusted-copies-passed-on",
        "The next table takes over copies that the one before did not trust.",
        "nbdtarget.targets.cache.distrust:Distrust._distrust",
        ("        blocks.metadata.is_distrusted = True\n", ""),
        DISTRUST_TESTS,
    ),
    _mutant(
        "distrusted-copy-made-to-count",
        "The origin fails a write, and an old copy is read, and written back over flushed data.",
        "nbdtarget.targets.cache.cached_writes:CachedWrites._has_whole_copy",
        ("            self._blocks.distrusts_cache or self", "            self"),
        DISTRUST_TESTS,
    ),
    _mutant(
        "copy-that-is-given-up-made-to-count",
        "The origin fails a write to a block whose copy lacks another one: that one is lost.",
        "nbdtarget.targets.cache.cached_writes:CachedWrites._has_whole_copy",
        (" or self._bad_blocks.is_dropping(oblock)", ""),
        BAD_BLOCK_TESTS,
    ),
    _mutant(
        "flush-forgiven-although-a-block-became-dirty",
        "FLUSH is acknowledged although the cache device, which counts now, failed its own.",
        "nbdtarget.targets.cache.distrust:Distrust._flush_failed",
        ("            raise error\n", "            pass\n"),
        DISTRUST_TESTS,
    ),
    _mutant(
        "write-under-a-mapping-that-comes-back",
        "A removal could not be committed; a write goes to the origin, and a restart reads the old copy.",
        "nbdtarget.targets.cache.foreground:Foreground._may_come_back",
        (
            "blocks.is_writable and blocks.metadata.may_come_back(oblock)",
            "blocks.nr_oblocks",
        ),
        BAD_BLOCK_TESTS,
    ),
    _mutant(
        "removals-of-a-failed-commit-forgotten",
        "As above, for the removals that were in the commit that failed.",
        "nbdtarget_metadata.cache.metadata:CacheMetadata.abort",
        ("            self._removed |= taken.removed\n", ""),
        BAD_BLOCK_TESTS,
    ),
    _mutant(
        "block-given-up-in-core-only",
        "A block is given up without a commit: a crash brings its old copy back.",
        "nbdtarget.targets.cache.bad_blocks:BadBlocks._is_settled",
        ("            if await blocks.committer.commit():\n", "            if True:\n"),
        BAD_BLOCK_TESTS,
    ),
    _mutant(
        "writes-through-overtake-each-other",
        "Two writes to the same bytes end in different orders on the two devices.",
        "nbdtarget.targets.cache.cached_writes:CachedWrites._maybe_overlapping",
        (
            "if other.begin < bio.offset + bio.length and bio.offset < other.end:",
            "if other.begin == bio.offset and other.end < bio.offset:",
        ),
        FOREGROUND_TESTS,
    ),
    # ---- discards ----
    _mutant(
        "discard-unlocked-before-it-has-ended",
        "A write that came after a discard was acknowledged, and the origin discards it.",
        "nbdtarget.targets.cache.foreground:Foreground._discard",
        (
            "                child.on_end(lambda _: blocks.unlock(lock))\n",
            "                blocks.unlock(lock)\n",
        ),
        (UNIT + "test_spec_14.py", UNIT + "test_spec_2_2.py"),
    ),
    _mutant(
        "discard-bit-survives-a-write",
        "A block that was written after a discard is filled with zeroes when it is cached.",
        "nbdtarget.targets.cache.foreground:Foreground.miss",
        (
            "            blocks.metadata.statistics.write_misses += 1\n"
            "            blocks.discards.clear(oblock)\n"
            "            blocks.origin_writes.nr_sent += 1\n"
            "        blocks.submit_held",
            "            blocks.metadata.statistics.write_misses += 1\n"
            "            blocks.origin_writes.nr_sent += 1\n"
            "        blocks.submit_held",
        ),
        (UNIT + "test_spec_2_2.py", *CRASH),
    ),
    _mutant(
        "no-zeroes-around-a-write-to-a-discarded-block",
        "The rest of a discarded block shows what the memory, or the cache, held before.",
        "nbdtarget.targets.cache.foreground:Foreground._overwrite_locked",
        (
            "whole = memoryview(bytearray(blocks.block_size))",
            'whole = memoryview(bytearray(b"?" * blocks.block_size))',
        ),
        (UNIT + "test_spec_2_2.py",),
    ),
    _mutant(
        "discarded-block-promoted-as-it-is",
        "A promotion of a discarded block shows what the cache block held before.",
        "nbdtarget.targets.cache.migrations:Migrations._promote",
        (
            "await blocks.cache.write_zeroes(work.cblock * size, size)",
            "await blocks.cache.flush()",
        ),
        (UNIT + "test_spec_14.py",),
    ),
    # ---- mode RO, and failures ----
    _mutant(
        "read-only-cache-takes-a-write-to-a-clean-block",
        "In mode RO a clean block is written, and nothing can record that it is dirty.",
        "nbdtarget.targets.cache.cached_writes:CachedWrites._is_all_recorded",
        ("            and bool(metadata.dirty[cblock])\n", ""),
        (UNIT + "test_spec_3_2.py",),
    ),
    _mutant(
        "read-only-cache-writes-while-its-stop-stays-recorded",
        "The next start is refused: it finds dirty blocks, and disks that changed after the recorded stop.",
        "nbdtarget.targets.cache.target:CacheTarget._map_slow",
        (
            "        if self._is_sealed and bio.op not in (OP_READ, OP_CACHE):\n",
            "        if False:\n",
        ),
        (UNIT + "test_target_faults.py",),
    ),
    _mutant(
        "failed-writebacks-spin",
        "An origin that cannot be written is tried again at once, and again.",
        "nbdtarget.targets.cache.migrations:Migrations._note_failure",
        ("            self._retry_ns = now_ns + ", "            self._retry_ns = 0 * "),
        MIGRATION_TESTS,
    ),
)
