# SPDX-License-Identifier: Apache-2.0
"""Mutants of `metadata/`: what is on disk, and what is believed of it."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["METADATA"]

# The images that a power cut leaves: these tests must notice a bug without looking into the code.
CUTS: Final = (
    "tests/metadata/clone/test_crash.py::test_every_crash_image_opens_at_an_acknowledged_state",
)
FORMATTING: Final = (
    "tests/metadata/clone/test_crash.py::test_crash_while_formatting_leaves_it_formatted_or_formattable",
)
COPIES: Final = ("tests/metadata/log/test_unreadable_copies.py",)
SUPERBLOCK: Final = (
    "tests/metadata/log/test_superblock.py",
    "tests/metadata/clone/test_metadata.py",
    "tests/metadata/log/test_commit.py",
    *CUTS,
)
TRANSACTION: Final = (
    "tests/metadata/log/test_commit.py",
    "tests/metadata/clone/test_model.py",
    *CUTS,
)
RECORDS: Final = (
    "tests/metadata/log/test_envelope.py",
    "tests/metadata/clone/test_records.py",
    "tests/metadata/log/test_layout.py",
    "tests/metadata/clone/test_rot.py",
)
BITS: Final = (
    "tests/metadata/clone/test_metadata.py",
    "tests/metadata/log/test_commit.py",
    "tests/metadata/clone/test_model.py",
    *CUTS,
)

METADATA: Final = (
    # ---- the superblock ----
    Mutant(
        "one-superblock-copy-written",
        "The second copy is never written: one rotten sector loses an acknowledged commit.",
        "nbdtarget_metadata.log.superblock:superblock_writes",
        (
            (
                "return _write(slot, 0, body, record), _write(slot, 1, body, record)",
                "return _write(slot, 0, body, record), _write(slot, 0, body, record)",
            ),
        ),
        CUTS,
    ),
    Mutant(
        "superblock-without-fua",
        "The superblock may still lie in the disk's cache: an acknowledged FLUSH is lost.",
        "nbdtarget_metadata.log.superblock:_write",
        (
            (
                "return Write(block * BLOCK_SIZE, sealed, fua=True)",
                "return Write(block * BLOCK_SIZE, sealed, fua=False)",
            ),
        ),
        CUTS,
    ),
    Mutant(
        "every-generation-in-one-slot",
        "Each commit overwrites the one before: a torn write leaves none of the two.",
        "nbdtarget_metadata.log.superblock:superblock_writes",
        (
            (
                "    slot = superblock.generation % NR_SLOTS\n    return",
                "    slot = superblock.generation * 0\n    return",
            ),
        ),
        CUTS,
    ),
    Mutant(
        "opened-without-a-flush",
        "After a kill, what is read may still be lost: it is acknowledged all the same.",
        "nbdtarget_metadata.log.superblock:read_area",
        (
            (
                "    yield Flush()\n    if device_size < area_size:",
                "    if device_size < area_size:",
            ),
        ),
        ("tests/metadata/log/test_superblock.py",),
    ),
    Mutant(
        "slot-1-formatted-first",
        "A crash while formatting leaves a device that neither opens nor is formatted.",
        "nbdtarget_metadata.log.superblock:format_superblocks",
        (("for generation in range(NR_SLOTS):", "for generation in (1, 0, 1):"),),
        FORMATTING,
    ),
    Mutant(
        "formatted-in-one-go",
        "Both generations are written at once: a crash leaves the second without the first.",
        "nbdtarget_metadata.log.superblock:format_superblocks",
        (
            (
                "        yield from write_superblock(superblock)\n",
                "        if generation:\n"
                "            first = msgspec.structs.replace(superblock, generation=0)\n"
                "            yield (*superblock_writes(first), *superblock_writes(superblock))\n",
            ),
        ),
        FORMATTING,
    ),
    Mutant(
        "older-generation-believed",
        "The older slot is opened: the last acknowledged commit is rolled back.",
        "nbdtarget_metadata.log.superblock:choose_superblock",
        (("newest = max(valid", "newest = min(valid"),),
        SUPERBLOCK,
    ),
    Mutant(
        "both-copies-written-at-once",
        "A power cut spoils both sectors that are being written: no copy is left, and all is refused.",
        "nbdtarget_metadata.log.superblock:write_superblock",
        (
            (
                "    yield from superblock_writes(superblock)\n",
                "    yield superblock_writes(superblock)\n",
            ),
        ),
        COPIES,
    ),
    Mutant(
        "unreadable-copy-refuses-the-disk",
        "One bad sector under one of four copies, and nothing is served any more.",
        "nbdtarget_metadata.log.superblock:read_area",
        (("BLOCK_SIZE, BLOCK_SIZE, TryRead)", "BLOCK_SIZE, BLOCK_SIZE)"),),
        COPIES,
    ),
    Mutant(
        "what-was-read-at-open-believed",
        "A superblock that is in a page cache only vouches for an acknowledged FLUSH.",
        "nbdtarget_metadata.clone.metadata:CloneMetadata.open",
        (
            (
                "            unhealed=ALL_SLOTS,\n",
                "            unhealed=found.unhealed,\n",
            ),
        ),
        ("tests/metadata/clone/test_metadata.py", "tests/crash/test_page_cache.py"),
    ),
    Mutant(
        "what-was-read-of-a-cache-believed",
        "A superblock that is in a page cache only vouches for an acknowledged FLUSH.",
        "nbdtarget_metadata.cache.metadata:CacheMetadata.open",
        (
            (
                "            unhealed=ALL_SLOTS,\n",
                "            unhealed=found.unhealed,\n",
            ),
        ),
        ("tests/metadata/cache/test_metadata.py",),
    ),
    Mutant(
        "rotten-slot-rolled-back",
        "Two rotten copies of the newest generation silently open the one before.",
        "nbdtarget_metadata.log.superblock:choose_superblock",
        (
            (
                "if admit_lost_slot and not any(copy.superblock",
                "if not any(copy.superblock",
            ),
        ),
        SUPERBLOCK,
    ),
    Mutant(
        "rotten-copy-not-told-of",
        "`metadata check` finds nothing to heal: the next rot loses acknowledged commits.",
        "nbdtarget_metadata.log.superblock:choose_superblock",
        (("            unhealed.add(slot)\n", ""),),
        SUPERBLOCK,
    ),
    Mutant(
        "healed-after-one-slot",
        "The commit that heals one slot takes the other for healed as well.",
        "nbdtarget_metadata.log.commit:JournaledMetadata.committed",
        (
            (
                "self._unhealed -= {superblock.generation % NR_SLOTS}",
                "self._unhealed = frozenset()",
            ),
        ),
        TRANSACTION,
    ),
    Mutant(
        "contradicting-copies-believed",
        "Two disks mixed up, or a bug of ours: whichever copy comes first is served.",
        "nbdtarget_metadata.log.superblock:_check_slot",
        (("if first.generation == last.generation and first != last:", "if False:"),),
        SUPERBLOCK,
    ),
    Mutant(
        "used-device-taken-for-an-unfinished-format",
        "Rot in slot 1 makes a used clone be formatted: everything is hydrated again.",
        "nbdtarget_metadata.log.superblock:_refuse_unfinished",
        (
            (
                "elif superblock.generation != 0:",
                "elif superblock.generation % 2 != 0:",
            ),
        ),
        SUPERBLOCK,
    ),
    Mutant(
        "foreign-content-formatted",
        "A file system without our superblock is overwritten by metadata.",
        "nbdtarget_metadata.log.layout:refuse_foreign",
        (
            (
                "        if bytes(data) != bytes(len(data)):\n            at = next(",
                "        if not data:\n            at = next(",
            ),
        ),
        ("tests/metadata/log/test_layout.py",),
    ),
    # ---- envelopes and records ----
    Mutant(
        "digest-not-checked",
        "Rotten bytes are believed: regions that were never copied read as garbage.",
        "nbdtarget_metadata.log.envelope:open_envelope",
        (("    if digest != expected:", "    if not expected:"),),
        RECORDS,
    ),
    Mutant(
        "misplaced-block-believed",
        "A block that the disk wrote to the wrong place is taken for the right one.",
        "nbdtarget_metadata.log.envelope:_digest",
        (
            (
                "_DIGESTED.pack(magic, version, length, block)",
                "_DIGESTED.pack(magic, version, length, block * 0)",
            ),
        ),
        RECORDS,
    ),
    Mutant(
        "record-length-believed",
        "A rotten length is read past the end of what was read.",
        "nbdtarget_metadata.log.envelope:open_envelope",
        (("    if length > len(data) - HEADER_SIZE:", "    if length < 0:"),),
        RECORDS,
    ),
    Mutant(
        "predecessor-not-checked",
        "Records of two lives of an arena are read as one journal.",
        "nbdtarget_metadata.log.chain:read_chain",
        (("if record.previous != digest:", "if not record.previous:"),),
        RECORDS,
    ),
    Mutant(
        "record-generation-not-checked",
        "A record that is newer than its superblock is applied: bits before their data.",
        "nbdtarget_metadata.log.chain:read_chain",
        (
            (
                "if not generation <= record.generation <= generation_max:",
                "if record.generation < 0:",
            ),
        ),
        RECORDS,
    ),
    Mutant(
        "journal-digest-not-checked",
        "The journal's last records may be others than the superblock vouched for.",
        "nbdtarget_metadata.clone.load:load_bitmap",
        (
            (
                '    _expect("digest of the journal", superblock.journal_digest, digest)\n',
                "",
            ),
        ),
        RECORDS,
    ),
    Mutant(
        "number-of-bits-not-checked",
        "A bitmap with other bits than were committed is served.",
        "nbdtarget_metadata.clone.load:load_bitmap",
        (("if nr_hydrated != superblock.nr_hydrated:", "if nr_hydrated < 0:"),),
        RECORDS,
    ),
    Mutant(
        "run-past-the-end-applied",
        "A lying record makes the bitmap longer than the disk.",
        "nbdtarget_metadata.clone.records:_apply_runs",
        (("if not 0 < count <= nr_regions - begin:", "if not 0 < count:"),),
        RECORDS,
    ),
    # ---- a commit's own half ----
    Mutant(
        "journal-not-flushed",
        "The superblock vouches for a journal that the disk's cache may still lose.",
        "nbdtarget_metadata.log.commit:Transaction.journal",
        (
            (
                "        if has_written or self.moves:\n            yield Flush()",
                "        if self.moves:\n            yield Flush()",
            ),
        ),
        CUTS,
    ),
    Mutant(
        "snapshot-of-a-commit-not-flushed",
        "A commit that writes a whole snapshot vouches for it while it may still be lost.",
        "nbdtarget_metadata.log.commit:Transaction.journal",
        (
            (
                "        if has_written or self.moves:\n            yield Flush()",
                "        if has_written:\n            yield Flush()",
            ),
        ),
        CUTS,
    ),
    Mutant(
        "superblock-before-journal",
        "The superblock is written first: a crash between the two finds no journal.",
        "nbdtarget_metadata.log.commit:Transaction",
        (
            (
                "            has_written = True\n            yield operation\n",
                "            has_written = True\n"
                "            self._late = [*getattr(self, '_late', []), operation]\n",
            ),
            (
                "        yield from write_superblock(self._superblock)\n",
                "        yield from write_superblock(self._superblock)\n"
                "        for late in getattr(self, '_late', []):\n"
                "            yield late\n"
                "        yield Flush()\n",
            ),
        ),
        CUTS,
    ),
    Mutant(
        "generation-not-advanced",
        "Every commit has one number: it overwrites the slot that is live.",
        "nbdtarget_metadata.log.commit:JournaledMetadata._begin",
        (
            (
                "generation=live.generation + 1,",
                "generation=live.generation,",
            ),
        ),
        TRANSACTION,
    ),
    Mutant(
        "record-merged-into-an-acknowledged-block",
        "To save space, a record is rewritten with the next one's changes: torn, both go.",
        "nbdtarget_metadata.clone.metadata:CloneMetadata.pre_commit",
        (
            (
                "        transaction = self._begin(taken, fields, nothing_more)\n",
                "        transaction = self._begin(taken, fields, nothing_more)\n"
                "        place = transaction._place\n"
                "        block, digest, before, generation = getattr(\n"
                "            self, '_last_record', (0, b'', new_runs(), -1)\n"
                "        )\n"
                "        at = place.chain.block, place.chain.digest\n"
                "        is_next = generation == self.generation\n"
                "        if not transaction.moves and is_next and block == at[0] - 1:\n"
                "            at = place.chain.block, place.chain.digest = block, digest\n"
                "            place.to_journal = before + runs\n"
                "        self._last_record = *at, place.to_journal[:], transaction.generation\n",
            ),
        ),
        CUTS,
    ),
    Mutant(
        "late-change-rides-on-the-commit-under-way",
        "A region that is hydrated after the destination's flush is committed with it.",
        "nbdtarget_metadata.clone.metadata:CloneMetadata.set_hydrated",
        (
            (
                "            append_runs(self._active, first, last - first)\n",
                "            taken = self._transaction\n"
                "            if taken is None or taken._is_journaled:\n"
                "                append_runs(self._active, first, last - first)\n"
                "            else:\n"
                "                append_runs(taken.taken.changes, first, last - first)\n"
                "                taken._superblock = __import__('msgspec').structs.replace(\n"
                "                    taken._superblock, nr_hydrated=self.nr_hydrated + last - first\n"
                "                )\n",
            ),
        ),
        CUTS,
    ),
    Mutant(
        "clean-shutdown-never-cleared",
        "After a crash the metadata still say that the shutdown was clean.",
        "nbdtarget_metadata.clone.metadata:CloneMetadata.pre_commit",
        (
            (
                "flags = 0 if has_changed else self._superblock.flags & CLEAN_SHUTDOWN",
                "flags = self._superblock.flags & CLEAN_SHUTDOWN",
            ),
        ),
        TRANSACTION,
    ),
    # ---- compaction ----
    Mutant(
        "compaction-drops-a-delta",
        "The switch journals its own changes only: what others committed since is gone.",
        "nbdtarget_metadata.log.commit:JournaledMetadata._place_for",
        (
            (
                "to_journal=compaction.since,",
                "to_journal=changes,",
            ),
        ),
        CUTS,
    ),
    Mutant(
        "compaction-misses-earlier-commits",
        "What was committed while the snapshot was written is missing in the new arena.",
        "nbdtarget_metadata.log.commit:JournaledMetadata._place_for",
        (
            (
                "            compaction.note(changes)\n",
                "            if compaction.is_ready:\n"
                "                compaction.note(changes)\n",
            ),
        ),
        CUTS,
    ),
    Mutant(
        "catch-up-forgets-what-does-not-fit",
        "A compaction that runs out of room drops the commits that it has not journaled yet.",
        "nbdtarget_metadata.log.commit:Compaction.catch_up",
        (("                self.since = encoding.union(left, self.since)\n", ""),),
        CUTS,
    ),
    Mutant(
        "switch-before-the-snapshot-is-whole",
        "A commit switches to a snapshot of which only the first chunks are written.",
        "nbdtarget_metadata.log.commit:JournaledMetadata.compact",
        (
            (
                "        self._compaction = self._compacting = compaction\n",
                "        self._compaction = self._compacting = compaction\n"
                "        compaction.is_ready = True\n",
            ),
        ),
        TRANSACTION,
    ),
    Mutant(
        "late-compaction-overwrites-a-commit",
        "A write that an abandoned compaction had under way lands on the live snapshot.",
        "nbdtarget_metadata.log.commit:JournaledMetadata._place_for",
        (
            (
                "late is not None and late.arena == arena:",
                "late is not None and late.arena != arena:",
            ),
        ),
        CUTS,
    ),
    Mutant(
        "changing-chunks-not-saved",
        "A commit's own snapshot holds bits of the next one, whose data is not flushed.",
        "nbdtarget_metadata.clone.metadata:CloneMetadata.set_hydrated",
        (
            (
                "            if self._saved is not None:\n"
                "                self._saved.save(first, last)\n",
                "",
            ),
        ),
        CUTS,
    ),
    Mutant(
        "compaction-while-one-copy-is-rotten",
        "The arena that the older slot names is overwritten while only it may be left.",
        "nbdtarget_metadata.log.commit:JournaledMetadata._may_compact",
        (("            and not self._unhealed\n", ""),),
        TRANSACTION,
    ),
    # ---- the bits in core ----
    Mutant(
        "bits-kept-after-abort",
        "Regions whose data a failed flush may have lost are still read from there.",
        "nbdtarget_metadata.clone.metadata:CloneMetadata.abort",
        (("            self.hydrated[begin : begin + count] = False\n", ""),),
        BITS,
    ),
    Mutant(
        "taken-changes-kept-after-abort",
        "Only the changes after pre_commit are reverted, not those that failed.",
        "nbdtarget_metadata.clone.metadata:CloneMetadata.abort",
        (("            runs = taken.changes + runs\n", "            pass\n"),),
        BITS,
    ),
    Mutant(
        "changed-forgotten-after-abort",
        "After a failed commit the metadata says that nothing is left to commit.",
        "nbdtarget_metadata.clone.metadata:CloneMetadata.changed",
        (("            or self._aborted\n", ""),),
        BITS,
    ),
    Mutant(
        "writable-after-abort",
        "Commits continue after one has failed, although the content of the disk is unknown then.",
        "nbdtarget_metadata.log.commit:JournaledMetadata._give_up",
        (
            (
                "        self.mode = Mode.RO\n        self._aborted = True",
                "        self._aborted = True",
            ),
        ),
        BITS,
    ),
    Mutant(
        "transaction-under-way-is-no-change",
        "While a commit runs there is nothing to wait for: FLUSH ends too early.",
        "nbdtarget_metadata.clone.metadata:CloneMetadata.changed",
        (("            or self._transaction is not None\n", ""),),
        BITS,
    ),
    Mutant(
        "hydrated-before-it-is-committed",
        "The clone steps aside while its last bits are only in memory: FLUSH loses them.",
        "nbdtarget_metadata.clone.metadata:CloneMetadata.hydration_done",
        (
            (
                "return self._superblock.nr_hydrated == self.nr_regions",
                "return self.nr_hydrated == self.nr_regions",
            ),
        ),
        BITS,
    ),
)
