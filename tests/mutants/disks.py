# SPDX-License-Identifier: Apache-2.0
"""Mutants of what tells which disks belong together: each takes one check, or one order, away."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["DISKS"]

TABLE: Final = ("tests/metadata/test_disks.py",)
SITE: Final = ("tests/nbdtarget/dm/test_disks.py",)
PICTURES: Final = ("tests/nbdtarget/dm/test_disks_crash.py",)

DISKS: Final = (
    Mutant(
        "disks-forgotten-by-a-torn-commit",
        "The power goes during a commit, and the next start does not know which disks belong together.",
        "nbdtarget_metadata.log.superblock:choose_superblock",
        (("first.superblock == newest and first.note", "False"),),
        TABLE,
    ),
    Mutant(
        "disks-complete-commit-given-up-for-its-record",
        "A commit whose two copies have rotted a little is not opened, and what it acknowledged is lost.",
        "nbdtarget_metadata.log.superblock:choose_superblock",
        (
            (
                "if is_torn and second.superblock and second.superblock != newest:",
                "if is_torn:",
            ),
        ),
        TABLE,
    ),
    Mutant(
        "disks-sample-of-what-was-not-flushed",
        "A stop records what a power cut takes back, and the next start refuses the disk.",
        "nbdtarget.targets.cache.target:CacheTarget._samples",
        (("if self._parts.origin in self._committer.unflushable:", "if False:"),),
        ("tests/nbdtarget/targets/cache/test_target_faults.py",),
    ),
    Mutant(
        "disks-metadata-of-an-old-backup-accepted",
        "A disk that is newer than the metadata is taken: old bits over new data.",
        "nbdtarget_metadata.disks:_compare_mark",
        (("if mark.generation > generation:", "if False:"),),
        SITE,
    ),
    Mutant(
        "disks-disk-of-an-old-backup-accepted",
        "A disk that is older than the metadata is taken: new bits over old data.",
        "nbdtarget_metadata.disks:_compare_mark",
        (("if mark.generation < recorded.mark_generation:", "if False:"),),
        SITE,
    ),
    Mutant(
        "disks-mark-of-other-metadata-accepted",
        "The disk of another clone is taken.",
        "nbdtarget_metadata.disks:_compare_mark",
        (("if mark.uuid != uuid:", "if False:"),),
        SITE,
    ),
    Mutant(
        "disks-file-in-the-same-place-needs-no-mark",
        "A new file that got the inode of the old one is taken for it.",
        "nbdtarget_metadata.disks:_compare_files",
        (("if recorded.mark_generation != NOT_MARKED:", "if False:"),),
        TABLE,
    ),
    Mutant(
        "disks-content-not-compared",
        "A blank file is taken for the disk when it is said that it has moved.",
        "nbdtarget_metadata.disks:compare",
        (("Verdict.MOVED and is_sample_equal is False:", "Verdict.MOVED and False:"),),
        SITE,
    ),
    Mutant(
        "disks-last-change-not-compared",
        "An origin that was written to without its cache goes on: old blocks hide new data.",
        "nbdtarget_metadata.disks:changed_since",
        (("recorded.mtime_ns != found.mtime_ns:", "False:"),),
        SITE,
    ),
    Mutant(
        "disks-origin-not-sampled",
        "A block device that was mounted without its cache goes on: old blocks hide new data.",
        "nbdtarget.targets.disks:cache_samples",
        (("        ORIGIN_ROLE: spread_offsets(origin.size, NR_SPREAD),\n", ""),),
        SITE,
    ),
    Mutant(
        "disks-torn-record-believed",
        "Whatever stands behind a superblock counts as its record.",
        "nbdtarget_metadata.log.superblock:_with_disks",
        (("if _reference(candidate) == reference:", "if candidate:"),),
        TABLE,
    ),
    Mutant(
        "disks-marked-with-a-generation-that-is-not-durable",
        "A crash leaves a mark that the metadata never reach: a good disk is refused.",
        "nbdtarget.targets.disks:DiskRecords._mark",
        (
            (
                "Mark(self._metadata.uuid, self._metadata.generation)",
                "Mark(self._metadata.uuid, self._metadata.generation + 1)",
            ),
        ),
        (*PICTURES, *SITE),
    ),
    Mutant(
        "disks-stop-not-taken-back-at-the-start",
        "After a crash our own writes count as changes by others: a good disk is refused.",
        "nbdtarget.targets.disks:DiskRecords.prepare",
        (
            (
                "is_stopped=bool(role.sample_at_start),",
                "is_stopped=bool(role.sample_at_start or (old and old.is_stopped)),",
            ),
            (
                "mtime_ns=disk.mtime_ns if role.sample_at_start else 0,",
                "mtime_ns=old.mtime_ns if old else 0,",
            ),
        ),
        PICTURES,
    ),
    Mutant(
        "disks-time-recorded-that-is-not-durable",
        "After a power cut the file has an older time: a good disk is refused.",
        "nbdtarget.targets.disks:DiskRecords._note_stop",
        (("mtime_ns=found.mtime_ns if is_synced else 0,", "mtime_ns=found.mtime_ns,"),),
        SITE,
    ),
    Mutant(
        "disks-source-not-compared",
        "An interrupted clone goes on with another source: two disks are mixed.",
        "nbdtarget.targets.clone.constructor:_check_disks",
        (
            (
                "(DESTINATION_ROLE, SOURCE_ROLE) if is_partly_copied",
                "(DESTINATION_ROLE,) if is_partly_copied",
            ),
        ),
        SITE,
    ),
    Mutant(
        "disks-stale-blocks-kept",
        "Blocks that may be old are served although it was seen.",
        "nbdtarget_metadata.cache.blocks:CacheBlocks.drop_clean",
        (("if self._values[cblock] and not self.dirty[cblock]:", "if False:"),),
        SITE,
    ),
    Mutant(
        "disks-lost-cache-replaced-by-a-disk-with-data",
        "A wrong name for the cache overwrites the disk that it names.",
        "nbdtarget.targets.cache.constructor:_check_disks",
        (("and await maybe_content(cache) is None", "and True"),),
        SITE,
    ),
    Mutant(
        "disks-lost-cache-replaced-although-blocks-are-dirty",
        "A blank cache is taken for one that holds the only copy of a block.",
        "nbdtarget.targets.cache.constructor:_check_disks",
        (("            and not nr_dirty\n", ""),),
        SITE,
    ),
    Mutant(
        "disks-not-compared-before-an-offline-writeback",
        "Dirty blocks are written over another disk of the same size.",
        "nbdtarget.tools.writeback:_check_disks",
        (("if not finding.is_allowed(job.permissions):", "if False:"),),
        SITE,
    ),
    Mutant(
        "disks-offline-writeback-not-recorded",
        "What the tool wrote itself counts as a change by others.",
        "nbdtarget.tools.writeback:write_back",
        (("disks=record_of_disks.disks", "disks=content.disks"),),
        SITE,
    ),
)
