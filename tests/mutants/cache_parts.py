# SPDX-License-Identifier: Apache-2.0
"""Mutants of how a cache is constructed and resumed, and of what it says of its blocks."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["CACHE_PARTS"]

MISSING: Final = ("tests/nbdtarget/dm/test_missing_metadata.py",)
TESTS: Final = "tests/nbdtarget/targets/cache/"
ACTIVATION: Final = (f"{TESTS}test_activation.py",)
DISKS_DM: Final = ("tests/nbdtarget/dm/test_disks.py",)
CONSTRUCTOR: Final = (f"{TESTS}test_constructor.py",)
DISCARDS: Final = (f"{TESTS}test_discards.py",)
EXTENTS: Final = (f"{TESTS}test_extents.py",)


def _mutant(
    name: str, forgets: str, where: str, old: str, new: str, tests: tuple[str, ...]
) -> Mutant:
    return Mutant(f"cache-{name}", forgets, where, ((old, new),), tests)


CACHE_PARTS: Final = (
    # ---- resumes ----
    _mutant(
        "passthrough-over-dirty-blocks",
        "Reads come from the origin, which has not got what was written.",
        "nbdtarget.targets.cache.activation:Activation._check",
        "if enters_passthrough and metadata.nr_dirty:",
        "if enters_passthrough and metadata.nr_dirty < 0:",
        ACTIVATION,
    ),
    _mutant(
        "passthrough-after-a-crash",
        "What is dirty is not known, but passthrough is entered.",
        "nbdtarget.targets.cache.activation:Activation._check",
        "            metadata.is_recorded_clean\n",
        "            metadata.is_recorded_clean or not metadata.nr_dirty\n",
        ACTIVATION,
    ),
    _mutant(
        "clean-when-opened-is-latched",
        "After a crash passthrough is refused for ever, whatever was cleaned since.",
        "nbdtarget.targets.cache.activation:Activation._check",
        "            metadata.is_recorded_clean\n",
        "            metadata.clean_when_opened\n",
        ACTIVATION,
    ),
    _mutant(
        "clean-shutdown-left-set-by-a-plain-resume",
        "Suspend, resume, write, crash: the dirty bits of the suspend are believed.",
        "nbdtarget.targets.cache.activation:Activation.preresume",
        "if metadata.mode is Mode.RW:\n                await self._start()",
        "if metadata.mode is Mode.RW and not self._is_loaded:\n"
        "                await self._start()",
        ACTIVATION,
    ),
    _mutant(
        "stale-blocks-served-where-nothing-can-be-recorded",
        "The metadata cannot be written, and blocks that only a crash has left are read.",
        "nbdtarget.targets.cache.activation:Activation._check_read_only",
        "if self._parts.stale or metadata.gives_up_mappings:",
        "if self._parts.stale and metadata.gives_up_mappings:",
        ("tests/nbdtarget/targets/cache/test_read_only_metadata.py",),
    ),
    _mutant(
        "policy-keeps-blocks-that-are-cut-off",
        "A hit is read behind the end of a cache device that has shrunk.",
        "nbdtarget.targets.cache.activation:Activation.preresume",
        "if not self._is_loaded or nr_cblocks != self._nr_cblocks:",
        "if not self._is_loaded:",
        ACTIVATION,
    ),
    _mutant(
        "extended-without-a-reload",
        "The policy is too small for what the metadata may hold.",
        "nbdtarget.targets.cache.activation:Activation._checked_size",
        "if nr_cblocks > self._nr_cblocks:",
        "if nr_cblocks > metadata.nr_cblocks_max:",
        ACTIVATION,
    ),
    _mutant(
        "half-resumed-table-is-resumed-again",
        "A table that was refused half-way gets its mappings after all.",
        "nbdtarget.targets.cache.activation:Activation._check",
        "if self._is_sized and not self._is_loaded:",
        "if self._is_sized and self._committer.has_failed:",
        ACTIVATION,
    ),
    _mutant(
        "discards-not-loaded",
        "Promotions copy discarded blocks, for as long as the cache lives.",
        "nbdtarget.targets.cache.activation:Activation.preresume",
        "self._parts.discards.load(discarded)",
        "self._parts.discards.load(None)",
        ACTIVATION,
    ),
    _mutant(
        "mappings-kept-after-a-crash-in-writethrough",
        "Clients read what the cache had, over an origin that was used alone meanwhile.",
        "nbdtarget.targets.cache.activation:Activation._give_up",
        "await metadata_io.run(self._parts.metadata_device, dropping)",
        "metadata.gives_up_mappings = bool(dropping.close())",
        ("tests/nbdtarget/targets/cache/test_origin_complete.py",),
    ),
    # ---- one metadata object ----
    _mutant(
        "each-table-has-metadata-of-its-own",
        "The next table starts with what was on disk when it was loaded.",
        "nbdtarget.targets.opening:Opening._shared_or_read",
        "    shared[self._target] = metadata",
        "    shared[self._target.upper()] = metadata",
        (*CONSTRUCTOR, *ACTIVATION),
    ),
    _mutant(
        "failed-metadata-are-taken-over",
        "A table is loaded over metadata that need a check, as if nothing had happened.",
        "nbdtarget.targets.opening:Opening._shared_or_read",
        "if live is not None and live.mode is Mode.RW:\n            check(live)",
        "if live is not None:\n            check(live)",
        CONSTRUCTOR,
    ),
    # ---- what was written to the origin alone ----
    _mutant(
        "discards-believed-over-a-changed-origin",
        "The origin was written to alone where the cache had discarded: zeroes are written over it.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks.drop_clean",
        "        self._discarded = None\n        self.gives_up_mappings",
        "        self.gives_up_mappings",
        ("tests/metadata/cache/test_metadata.py",),
    ),
    _mutant(
        "origin-not-looked-at-again-before-the-resume",
        "What another table writes between load and resume is hidden by blocks that the cache has.",
        "nbdtarget.targets.cache.activation:Activation._look_again",
        "() if parts.stale else await parts.disks.look((ORIGIN_ROLE,))",
        "()",
        DISKS_DM,
    ),
    _mutant(
        "commit-due-while-mappings-are-loaded",
        "A large cache is refused: the commit of its second slot meets the start of its metadata.",
        "nbdtarget.targets.cache.activation:Activation.preresume",
        "            await self._committer.quiesce()\n",
        "",
        ACTIVATION,
    ),
    # ---- new metadata ----
    _mutant(
        "new-metadata-whatever-the-cache-holds",
        "The metadata's file system is not mounted: what was in the cache only is lost.",
        "nbdtarget.targets.opening:Opening.create_metadata_device",
        'await self._refuse_content(role, disk, name, "is missing")',
        "pass",
        MISSING,
    ),
    _mutant(
        "blank-metadata-whatever-the-cache-holds",
        "A wiped metadata device is formatted: what was in the cache only is lost.",
        "nbdtarget.targets.opening:Opening.metadata",
        'await self._refuse_content(role, disk, device.name, "is blank")',
        "pass",
        MISSING,
    ),
    _mutant(
        "any-permission-overwrites",
        "A user who says that a disk has moved loses the data on it.",
        "nbdtarget.targets.opening:Opening._refuse_content",
        "if OVERWRITE in self._ctx.permissions:",
        "if self._ctx.permissions:",
        MISSING,
    ),
    # ---- discards ----
    _mutant(
        "discard-marks-what-it-covers-in-part",
        "A promotion fills with zeroes what was never discarded.",
        "nbdtarget.targets.cache.discards:DiscardBits.set_range",
        "begin = -(-offset // self.dblock_size)",
        "begin = offset // self.dblock_size",
        DISCARDS,
    ),
    _mutant(
        "discard-marks-the-short-tail",
        "The origin grows, and what it grows by counts as discarded.",
        "nbdtarget.targets.cache.discards:DiscardBits.set_range",
        "end = (offset + length) // self.dblock_size",
        "end = -(-(offset + length) // self.dblock_size)",
        DISCARDS,
    ),
    # ---- extents ----
    _mutant(
        "cached-blocks-are-zeroes-if-the-origin-s-are",
        "A backup leaves out what was written, and is dirty still.",
        "nbdtarget.targets.cache.extents:base_extents",
        "is_zero = not cached and below_flags & EXTENT_ZERO",
        "is_zero = below_flags & EXTENT_ZERO",
        EXTENTS,
    ),
    _mutant(
        "clean-blocks-are-what-the-origin-says",
        "A discard empties the origin: reads say what the cache has, extents say zeroes.",
        "nbdtarget.targets.cache.extents:base_extents",
        "is_zero = not cached and below_flags & EXTENT_ZERO",
        "is_zero = cached < CACHE_DIRTY and below_flags & EXTENT_ZERO",
        EXTENTS,
    ),
)
