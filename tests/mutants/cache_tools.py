# SPDX-License-Identifier: Apache-2.0
"""Mutants of the offline tools of a cache: what goes home, what is believed, what is recorded."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["CACHE_TOOLS"]

WRITEBACK_TESTS: Final = ("tests/nbdtarget/tools/test_writeback.py",)
RESTORE_TESTS: Final = ("tests/metadata/tools/test_cache_restore.py",)
SALVAGE_TESTS: Final = ("tests/metadata/tools/test_cache_salvage.py",)


def _mutant(
    name: str, forgets: str, where: str, old: str, new: str, tests: tuple[str, ...]
) -> Mutant:
    return Mutant(f"cache-tools-{name}", forgets, where, ((old, new),), tests)


CACHE_TOOLS: Final = (
    _mutant(
        "dirty-bits-cleared-before-the-origin-is-flushed",
        "A power cut after a writeback: what was dirty is in neither place for good.",
        "nbdtarget.tools.writeback:_Copy._copy_leg",
        "                await self._origin.flush()\n",
        "                pass\n",
        WRITEBACK_TESTS,
    ),
    _mutant(
        "dirty-bits-cleared-before-the-cache-is-flushed",
        "A killed server's page cache went home, and the disk under it is older: a clean block differs.",
        "nbdtarget.tools.writeback:write_back",
        "            await cache.flush()\n",
        "",
        WRITEBACK_TESTS,
    ),
    _mutant(
        "failed-block-recorded-clean",
        "A block that could not be read is never tried again, and its data are gone.",
        "nbdtarget.tools.writeback:_Copy._copy_leg",
        "good = [block for block in rest if block not in failures]",
        "good = rest",
        WRITEBACK_TESTS,
    ),
    _mutant(
        "flush-that-failed-believed",
        "The origin has said that it has lost something, and the dirty bits are cleared.",
        "nbdtarget.tools.writeback:_Copy._copy_leg",
        "self.failures.update((block, str(error)) for block in good)",
        "self.copied[[block.cblock for block in good]] = 1",
        WRITEBACK_TESTS,
    ),
    _mutant(
        "latched-origin-not-opened-again",
        "One bad sector of the origin, and nothing at all goes home.",
        "nbdtarget.tools.writeback:_Copy._copy_leg",
        "                await self._origin.reopen()\n",
        "",
        WRITEBACK_TESTS,
    ),
    _mutant(
        "rest-of-a-latched-leg-not-written-again",
        "What was written before the origin latched may be lost, and is recorded clean.",
        "nbdtarget.tools.writeback:_Copy._copy_leg",
        "rest = [block for block in leg if block not in failures]",
        "rest = [] if failures else leg",
        WRITEBACK_TESTS,
    ),
    _mutant(
        "needs-check-ignored-by-the-writeback",
        "Metadata that a failed commit has marked are believed without a look.",
        "nbdtarget.tools.writeback:_read",
        "    if findings.needs_check:\n",
        "    if findings.needs_check and findings.unhealed:\n",
        WRITEBACK_TESTS,
    ),
    _mutant(
        "blocks-copied-in-the-order-of-the-cache",
        "A disk seeks for each block: hours instead of minutes.",
        "nbdtarget.tools.writeback:_Copy.__init__",
        "        self.blocks = sorted(\n",
        "        self.blocks = list(\n",
        WRITEBACK_TESTS,
    ),
    _mutant(
        "offset-of-the-origin-forgotten",
        "The blocks land beside their places.",
        "nbdtarget.tools.writeback:_Copy._copy_block",
        "self._job.origin_offset + block.oblock * size",
        "block.oblock * size",
        WRITEBACK_TESTS,
    ),
    _mutant(
        "written-back-recorded-over-the-live-sync-area",
        "A power cut while the result is recorded leaves metadata that cannot be opened any more.",
        "nbdtarget_metadata.tools.cache_restore:record_written_back",
        "        area = other_area(area)\n",
        "        pass\n",
        RESTORE_TESTS,
    ),
    _mutant(
        "superblock-of-a-writeback-before-its-records",
        "A power cut leaves a superblock that vouches for records that never came.",
        "nbdtarget_metadata.tools.cache_restore:record_written_back",
        "    yield Flush()\n    yield from write_superblock(after)\n",
        "    yield from write_superblock(after)\n",
        RESTORE_TESTS,
    ),
    _mutant(
        "blocks-that-were-dirty-else-recorded-clean",
        "What was not written back is clean on record, and lost with its next demotion.",
        "nbdtarget_metadata.tools.cache_restore:record_written_back",
        "loaded.dirty & ~written_back,",
        "loaded.dirty & written_back,",
        RESTORE_TESTS,
    ),
    _mutant(
        "restore-without-a-flush",
        "A power cut after a restore: the superblock stands, what it vouches for does not.",
        "nbdtarget_metadata.tools.restore:write_generations",
        """\
    yield Flush()
    for each in (generation - 1, generation):
        superblock = msgspec.structs.replace(superblock, generation=each)
        yield from write_superblock(superblock)
        yield Flush()
""",
        """\
    for each in (generation - 1, generation):
        superblock = msgspec.structs.replace(superblock, generation=each)
        yield from write_superblock(superblock)
""",
        RESTORE_TESTS,
    ),
    _mutant(
        "stale-mappings-believed-behind-a-broken-record",
        "A block that was moved since is written back to the place of another.",
        "nbdtarget_metadata.tools.cache_salvage:_Arena._gap",
        "            self.known.setall(0)\n",
        "            pass\n",
        SALVAGE_TESTS,
    ),
    _mutant(
        "salvage-believes-records-of-no-chain",
        "What a crash or an older life left behind becomes part of the cache.",
        "nbdtarget_metadata.tools.cache_salvage:_Arena._apply",
        "if placed.block not in self._believed:",
        "if not self._believed:",
        SALVAGE_TESTS,
    ),
    _mutant(
        "salvage-trusts-dirty-bits-older-than-a-lost-superblock",
        "What was dirtied after the last clean shutdown counts as clean.",
        "nbdtarget_metadata.tools.cache_salvage:salvage_cache",
        "if superblock.flags & CLEAN_SHUTDOWN and not found.lost:",
        "if superblock.flags & CLEAN_SHUTDOWN:",
        SALVAGE_TESTS,
    ),
    _mutant(
        "salvage-prefers-the-stale-mapping",
        "Of two blocks with one origin block the one is kept that is out of date.",
        "nbdtarget_metadata.tools.cache_salvage:_Arena.settle",
        "loser = min(cblock, other, key=self._rank)",
        "loser = max(cblock, other, key=self._rank)",
        SALVAGE_TESTS,
    ),
    _mutant(
        "salvage-loses-dirty-blocks-without-a-word",
        "A repair says that nothing is lost.",
        "nbdtarget_metadata.tools.cache_salvage:_dirty_after",
        "nr_lost = (sync.dirty & ~mapped).count()",
        "nr_lost = 0",
        SALVAGE_TESTS,
    ),
)
