# SPDX-License-Identifier: Apache-2.0
"""Mutants of the clone target, and of the locks and copies that it stands on."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["CLONE"]

WALKS: Final = ("tests/crash/test_directed.py", "tests/crash/test_machine.py")
TARGET: Final = (
    "tests/nbdtarget/targets/clone/test_target.py",
    "tests/nbdtarget/targets/clone/test_faults.py",
)
HYDRATION: Final = ("tests/nbdtarget/targets/clone/test_hydration.py",)
FAULTS: Final = (
    "tests/nbdtarget/targets/clone/test_faults.py",
    "tests/crash/test_faults.py",
)
COPIER: Final = ("tests/nbdtarget/targets/test_copier.py",)

CLONE: Final = (
    # ---- the first resume ----
    Mutant(
        "no-commit-before-a-resumed-clone-serves",
        "What was read of superblocks, perhaps in a page cache only, is acted upon for a second.",
        "nbdtarget.targets.clone.target:CloneTarget._get_ready",
        (
            (
                "if self._metadata.needs_rewrite and not await self._committer.commit():",
                "if not self._regions.is_writable:",
            ),
        ),
        ("tests/crash/test_page_cache.py",),
    ),
    # ---- FLUSH and FUA ----
    Mutant(
        "flush-passed-down-uncommitted",
        "FLUSH flushes the destination and commits nothing: the bits are lost.",
        "nbdtarget.targets.clone.target:CloneTarget._map_flush",
        (
            (
                "        committer = self._committer\n        if committer.is_clean:",
                "        committer = self._committer\n        if not committer.has_failed:",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "fua-without-commit",
        "FUA to a region whose bit is not committed goes straight down: a crash reverts it.",
        "nbdtarget.targets.clone.foreground:Foreground.write_hydrated",
        (
            (
                "if not bio.flags & FUA or regions.committer.is_clean:",
                "if not bio.flags & FUA or regions.committer.name:",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "fua-mapped-without-commit",
        "The quick way through `map` forgets that a FUA write may have to wait for a bit.",
        "nbdtarget.targets.clone.target:CloneTarget.map",
        (
            (
                "if bio.flags & FUA and op not in _READS and not self._committer.is_clean:",
                "if bio.flags & FUA and op in _READS and not self._committer.is_clean:",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "fua-completed-before-its-commit",
        "A FUA write that hydrates its region ends when it is written, not when it is durable.",
        "nbdtarget.targets.clone.foreground:RegionWrite._leave",
        (
            (
                "            self.regions.committer.after_commit(self.bio.end)\n",
                "            self.bio.end(0)\n",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "fua-discard-completed-before-its-commit",
        "A FUA discard ends before its bits are durable: the source shines through again.",
        "nbdtarget.targets.clone.foreground:Foreground.discard",
        (
            (
                "                regions.committer.after_commit(bio.end)\n",
                "                bio.end(0)\n",
            ),
        ),
        TARGET,
    ),
    Mutant(
        "lost-writes-forgotten-at-reload",
        "A table whose commit failed is swapped away, and the next FLUSH says that all is well.",
        "nbdtarget.targets.mapping:MappingTarget.has_lost_writes",
        (
            (
                "    def has_lost_writes(self) -> bool:\n        return self._committer.has_failed",
                "    def has_lost_writes(self) -> bool:\n        return False",
            ),
        ),
        FAULTS,
    ),
    Mutant(
        "suspend-without-commit",
        "A clean shutdown does not commit: what was hydrated is hydrated again.",
        "nbdtarget.targets.clone.target:CloneTarget._record_stop",
        (
            (
                "            await self._committer.commit(clean_shutdown=True)\n",
                "            pass\n",
            ),
        ),
        TARGET,
    ),
    # ---- writes and discards ----
    Mutant(
        "bit-set-before-the-overwrite-has-ended",
        "A region counts as hydrated while its write is under way: a crash tears it.",
        "nbdtarget.targets.clone.foreground:RegionWrite._write_payload",
        (
            (
                "        bio = self.bio\n        self.has_payload_left = True\n",
                "        bio = self.bio\n"
                "        self.regions.set_hydrated(self.first, self.last)\n"
                "        self.has_payload_left = True\n",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "gaps-not-copied",
        "Every write is taken for one of whole regions: the rest of them reads as garbage.",
        "nbdtarget.targets.clone.foreground:RegionWrite._granted",
        (("        gaps = self.gaps()\n", "        gaps: list[Gap] = []\n"),),
        WALKS,
    ),
    Mutant(
        "short-tail-region-taken-for-an-overwrite",
        "A write to a part of the short last region is taken for all of it.",
        "nbdtarget.targets.clone.foreground:RegionWrite.gaps",
        (
            (
                "        if self.end < region_end and not",
                "        is_last = self.last == regions.nr_regions\n"
                "        if self.end < region_end and not is_last and not",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "gap-in-front-forgotten",
        "What stands before a write in its first region is not brought from the source.",
        "nbdtarget.targets.clone.foreground:RegionWrite.gaps",
        (
            (
                "            gaps.append((region_begin, self.begin))\n",
                "            pass\n",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "unreadable-gap-ignored",
        "The source can not be read, and zeroes become the rest of the region.",
        "nbdtarget.targets.clone.foreground:RegionWrite._gap_read",
        (
            (
                "        if child.status:\n            self.error = DeviceError(",
                "        if False:\n            self.error = DeviceError(",
            ),
        ),
        TARGET,
    ),
    Mutant(
        "failed-overwrite-hydrates",
        "A write fails, and its region counts as hydrated: garbage instead of the source.",
        "nbdtarget.targets.clone.foreground:RegionWrite._written",
        (
            (
                "        if child.status:\n",
                "        if child.status < 0:\n",
            ),
        ),
        TARGET,
    ),
    Mutant(
        "deferred-payload-not-owned",
        "A write that waits keeps the receive buffer, which the next request overwrites.",
        "nbdtarget.targets.clone.foreground:Foreground.write",
        (
            (
                "        if not write.has_payload_left:\n            bio.own()",
                "        if not write.has_payload_left:\n            bio.borrowed = False",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "discard-overtakes-a-copy",
        "A discard does not wait for the copy of its region: that lands on later writes.",
        "nbdtarget.targets.clone.foreground:Foreground",
        (
            (
                "granted)\n\n    def set_hydrated(self, begin",
                "granted) if begin > end else granted(Cell(begin, end, granted))\n\n"
                "    def set_hydrated(self, begin",
            ),
            (
                "after the discard.\n            regions.prison.release(cell)\n",
                "after the discard.\n",
            ),
        ),
        TARGET,
    ),
    Mutant(
        "discard-rounded-outwards",
        "A discard of a part of a region drops all of it.",
        "nbdtarget.targets.clone.target:CloneTarget._map_discard",
        (("first = -(-bio.offset // size)", "first = bio.offset // size"),),
        TARGET,
    ),
    Mutant(
        "unhydrated-read-from-the-destination",
        "A region that was never copied reads as what the destination happens to hold.",
        "nbdtarget.targets.clone.target:CloneTarget._map_unhydrated_read",
        (("bio.device = self._source", "bio.device = self._destination"),),
        WALKS,
    ),
    # ---- background hydration ----
    Mutant(
        "bit-set-before-the-copy-is-written",
        "A region counts as hydrated when its copy begins: reads find garbage.",
        "nbdtarget.targets.clone.hydrator:Hydrator.hydrate",
        (
            (
                "        try:\n            await self._fill(",
                "        if self.regions.is_writable:\n"
                "            self.regions.set_hydrated(begin, end)\n"
                "        try:\n            await self._fill(",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "failed-copy-hydrates",
        "A bad sector of the source becomes whatever the destination holds, for good.",
        "nbdtarget.targets.clone.hydrator:Hydrator.hydrate",
        (
            (
                "                self._note_failure(begin, end, error)\n",
                "                self._note_failure(begin, end, error)\n"
                "                self.regions.set_hydrated(begin, end)\n",
            ),
        ),
        HYDRATION,
    ),
    Mutant(
        "holes-not-zeroed",
        "A hole of the source is what the destination held before.",
        "nbdtarget.targets.clone.hydrator:Hydrator._fill",
        (
            (
                "                await self.regions.destination.write_zeroes(at, stop - at)\n",
                "                pass\n",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "copy-lock-released-early",
        "A region's lock goes when its copy begins: a client's write is overwritten by it.",
        "nbdtarget.targets.clone.hydration:Hydration._job",
        (
            (
                "        try:\n            errors = await self.hydrator.hydrate(\n",
                "        regions.prison.release(cell)\n"
                "        try:\n            errors = await self.hydrator.hydrate(\n",
            ),
            (
                "            regions.nr_hydrating -= weight\n"
                "            regions.prison.release(cell)\n",
                "            regions.nr_hydrating -= weight\n",
            ),
        ),
        (*HYDRATION, *WALKS),
    ),
    Mutant(
        "suspend-does-not-wait-for-copies",
        "Copies go on after a suspend, into a destination that may be another's by then.",
        "nbdtarget.targets.clone.hydration:Hydration.quiesce",
        (
            (
                "        await self._jobs.wait()\n",
                "",
            ),
        ),
        TARGET,
    ),
    Mutant(
        "cache-copies-without-the-lock",
        "CACHE copies a region that a client writes to: the newer write is overwritten.",
        "nbdtarget.targets.clone.prefetch:CacheRequests._hydrate_step",
        (
            ("        cell = await self._locked(begin, end)\n", ""),
            ("            regions.prison.release(cell)\n", ""),
        ),
        ("tests/nbdtarget/targets/clone/test_prefetch.py",),
    ),
    # ---- copies ----
    Mutant(
        "failed-copy-write-swallowed",
        "The destination refuses a chunk, and the copy says that it is whole.",
        "nbdtarget.targets.copier:_Copy._chunk_ended",
        (
            (
                "        if bio.status and self._error is None:",
                "        if bio.op == OP_READ and bio.status and self._error is None:",
            ),
        ),
        COPIER,
    ),
    Mutant(
        "failed-copy-read-swallowed",
        "The source can not be read, and a buffer's old content is written instead.",
        "nbdtarget.targets.copier:_Copy._read_ended",
        (
            (
                "        if bio.status or self._error is not None:",
                "        if self._error is not None:",
            ),
        ),
        COPIER,
    ),
    Mutant(
        "copy-ends-before-its-last-write",
        "A copy ends when its last chunk is on its way: bits before data.",
        "nbdtarget.targets.copier:_Copy._maybe_end",
        (
            (
                "if self._in_flight or self._next < self._end or self.ended.done():",
                "if self._next < self._end or self.ended.done():",
            ),
        ),
        (*COPIER, *WALKS),
    ),
    Mutant(
        "copy-buffer-lent-twice",
        "A chunk's buffer is given back while it is being written: regions get mixed up.",
        "nbdtarget.targets.copier:_Copy",
        (
            (
                "            self._submit(OP_WRITE, bio.private, self._chunk_ended)\n",
                "            self._copier.give_back(bio.private.buffer)\n"
                "            self._submit(OP_WRITE, bio.private, self._chunk_ended)\n",
            ),
            (
                "        copier.give_back(chunk.buffer)\n",
                "        if bio.op == OP_READ:\n"
                "            copier.give_back(chunk.buffer)\n",
            ),
        ),
        (*COPIER, *WALKS),
        hangs=True,
    ),
    Mutant(
        "chunk-with-zeroes-ends-with-its-first-part",
        "The data of a chunk that holds zeroes is still being written, and its regions count as hydrated.",
        "nbdtarget.targets.copier:_Copy._write_runs",
        (("            if not left:\n", "            if left == len(runs) - 1:\n"),),
        COPIER,
    ),
    Mutant(
        "failed-part-of-a-chunk-swallowed",
        "The disk refuses the first part of a chunk, the last one succeeds, and the copy says that it is whole.",
        "nbdtarget.targets.copier:_Copy._write_runs",
        (("self._chunk_ended(failed or bio)", "self._chunk_ended(bio)"),),
        COPIER,
    ),
    Mutant(
        "zeroes-of-the-source-left-out",
        "Zeroes are not written, so what an older disk has left there shows through.",
        "nbdtarget.targets.copier:_Copy._send",
        (
            (
                "        copier = self._copier\n",
                "        copier = self._copier\n"
                "        if bio.op > OP_WRITE:\n"
                "            bio.end(0)\n"
                "            return\n",
            ),
        ),
        COPIER,
    ),
    # ---- locks ----
    Mutant(
        "no-locks",
        "Everybody works on a region at the same time: copies overwrite newer writes.",
        "nbdtarget.targets.prison:Prison",
        (
            (
                "        begins = self._begins\n        if not begins:\n",
                "        begins: list[int] = []\n        if not begins:\n",
            ),
            (
                "        index = bisect_left(self._held, cell.begin, key=_begin_of)\n",
                "        index = self._held.index(cell)\n",
            ),
            (
                "        nr = bisect_left(self._begins, cell.begin)\n",
                "        nr = self._last.index(cell)\n",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "later-lock-overtakes",
        "A newcomer takes a range for which somebody waits: older writes land on newer ones.",
        "nbdtarget.targets.prison:Prison._ask",
        (
            (
                "        for older in dict.fromkeys(before):\n",
                "        for older in dict.fromkeys(each for each in before if each.held):\n",
            ),
        ),
        ("tests/nbdtarget/targets/test_prison.py",),
    ),
    # ---- new metadata ----
    Mutant(
        "new-metadata-whatever-the-destination-holds",
        "The metadata's file system is not mounted: the source is copied over what clients wrote.",
        "nbdtarget.targets.opening:Opening.create_metadata_device",
        (
            (
                '        await self._refuse_content(role, disk, name, "is missing")\n',
                "",
            ),
        ),
        ("tests/nbdtarget/dm/test_missing_metadata.py",),
    ),
    # ---- without a source ----
    Mutant(
        "source-left-out-before-all-is-copied",
        "The last region is read as an error though the source has it.",
        "nbdtarget.targets.clone.constructor:_open_source",
        (("    if not nr_left:\n        log", "    if nr_left < 4:\n        log"),),
        ("tests/nbdtarget/targets/clone/test_without_source.py",),
    ),
    Mutant(
        "source-that-is-not-needed-is-opened",
        "A hydrated clone does not start when its source's server has gone.",
        "nbdtarget.targets.clone.constructor:_open_source",
        (("    if not nr_left:\n        log", "    if nr_left < 0:\n        log"),),
        ("tests/nbdtarget/targets/clone/test_without_source.py",),
    ),
    Mutant(
        "read-only-clone-writes-while-its-stop-stays-recorded",
        "The next start is refused: it finds a half-copied destination that changed after the recorded stop.",
        "nbdtarget.targets.clone.target:CloneTarget.map",
        (
            (
                "        if self._is_sealed and op not in _READS:\n",
                "        if False:\n",
            ),
        ),
        ("tests/crash/test_comebacks.py",),
    ),
    Mutant(
        "stop-that-failed-taken-for-none",
        "The superblock of a stop was written, and only the news was lost: it stays recorded.",
        "nbdtarget_metadata.log.commit:JournaledMetadata.is_sealed",
        (
            (
                "(is_stopped or self._is_stop_begun)",
                "is_stopped",
            ),
        ),
        ("tests/metadata/log/test_sealed.py",),
    ),
)
