# SPDX-License-Identifier: Apache-2.0
"""Mutants of the commit: who waits for what, and what is promised when."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["COMMIT"]

WALKS: Final = ("tests/crash/test_directed.py", "tests/crash/test_machine.py")
COMMITTER: Final = ("tests/nbdtarget/targets/test_committer.py",)
METADATA_IO: Final = ("tests/nbdtarget/targets/test_metadata_io.py",)
COMEBACKS: Final = ("tests/crash/test_comebacks.py",)
FAULTS: Final = (
    "tests/nbdtarget/targets/test_committer.py",
    "tests/crash/test_faults.py",
)

_TOGETHER: Final = """\
        await _all(
            *(self._flush(device, transaction) for device in self.backing),
            self._run_steps(transaction.journal()),
        )
        if self.has_failed:
            # A device has reported a loss meanwhile, and the metadata was aborted: no superblock for it.
            raise DeviceError(errnos.EIO, self.name, "flush", 0, 0)
        # Step 3. If this fails, the transaction may be on the disk or not; both are complete states.
        await self._run_steps(transaction.superblock())
        # Step 4. Only now does the metadata object take the transaction for recorded.
        transaction.done()
"""

COMMIT: Final = (
    Mutant(
        "refused-resume-leaves-its-commit",
        "A table is refused, and a commit of it goes on beside the table that runs, or to a closed device.",
        "nbdtarget.targets.mapping:MappingTarget.preresume",
        (("            await self._committer.quiesce()\n", ""),),
        ("tests/nbdtarget/targets/test_mapping.py",),
    ),
    Mutant(
        "commit-before-flush",
        "The destination is flushed when the superblock is out: a crash finds bits without data.",
        "nbdtarget.targets.committer:Committer._commit_transaction",
        (
            (
                _TOGETHER,
                "        await self._run_steps(transaction.journal())\n"
                "        await self._run_steps(transaction.superblock())\n"
                "        transaction.done()\n"
                "        await _all(*(self._flush(device, transaction) for device in self.backing))\n",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "commit-without-destination-flush",
        "The destination is not flushed at all: acknowledged data is lost, garbage is read.",
        "nbdtarget.targets.committer:Committer._commit_transaction",
        (
            (
                _TOGETHER,
                "        await self._run_steps(transaction.journal())\n"
                "        await self._run_steps(transaction.superblock())\n"
                "        transaction.done()\n",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "superblock-beside-the-flush",
        "The superblock does not wait for the destination's flush, only for the journal.",
        "nbdtarget.targets.committer:Committer._commit_transaction",
        (
            (
                _TOGETHER,
                "        async def write() -> None:\n"
                "            await self._run_steps(transaction.journal())\n"
                "            await self._run_steps(transaction.superblock())\n"
                "\n"
                "        await _all(*(self._flush(device, transaction) for device in self.backing), write())\n"
                "        transaction.done()\n",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "flush-rides-on-the-running-commit",
        "A FLUSH that comes while a commit runs ends with it: its writes were not flushed.",
        "nbdtarget.targets.committer:Committer._commit_transaction",
        (
            (
                "        transaction.done()\n",
                "        transaction.done()\n        _tell(self._flush_waiters, 0)\n",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "second-flush-elided-when-nothing-was-committed",
        "A FLUSH whose changes the commit before has taken ends without any flush.",
        "nbdtarget.targets.committer:Committer._commit_or_flush",
        (("return await self._flush_only()", "return 0"),),
        WALKS,
    ),
    Mutant(
        "running-commit-taken-for-clean",
        "While a commit runs, FLUSH and FUA are passed down as if it had ended well.",
        "nbdtarget.targets.committer:Committer.is_clean",
        (
            (
                "return not (self.metadata.changed or self._is_running or self.has_failed)",
                "return self._is_running or not (\n"
                "            self.metadata.changed or self.has_failed\n"
                "        )",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "flush-told-before-the-commit",
        "Who waits is told when the commit begins: an acknowledged FLUSH is lost.",
        "nbdtarget.targets.committer:Committer._run_round",
        (
            (
                "        errno = errnos.EIO\n        try:\n            if not self.has_failed:",
                "        errno = errnos.EIO\n        _tell(flushes, 0)\n        try:\n"
                "            if not self.has_failed:",
            ),
        ),
        WALKS,
    ),
    Mutant(
        "failed-commit-acknowledged",
        "A commit fails, and those who wait are told that it went well.",
        "nbdtarget.targets.committer:Committer._commit_or_flush",
        (
            (
                "            await self._abort(error, blames_metadata=False)\n"
                "            return errnos.EIO\n        if transaction",
                "            await self._abort(error, blames_metadata=False)\n"
                "            return 0\n        if transaction",
            ),
        ),
        FAULTS,
    ),
    Mutant(
        "revert-forgotten-after-a-failed-commit",
        "Bits that were not committed stay: later reads and commits build on lost data.",
        "nbdtarget.targets.committer:Committer._abort",
        (
            (
                "        with contextlib.suppress(FailedMetadata):\n"
                "            self.metadata.abort()\n"
                "        is_worse",
                "        is_worse",
            ),
        ),
        FAULTS,
    ),
    Mutant(
        "flush-goes-on-after-a-failed-commit",
        "The commit after a failed one succeeds, and hides what was lost.",
        "nbdtarget.targets.committer:Committer",
        (
            (
                "        # Before the first await: while the device is probed, nothing may build on what is reverted.\n"
                "        self.has_failed = True\n",
                "",
            ),
            (
                '        """`is_worse`: it had been aborted before perhaps, and now it has failed."""\n'
                "        self.has_failed = True\n",
                '        """`is_worse`: it had been aborted before perhaps, and now it has failed."""\n',
            ),
        ),
        FAULTS,
    ),
    Mutant(
        "flush-error-swallowed",
        "The destination's flush fails, and the superblock is written all the same.",
        "nbdtarget.targets.committer:_all",
        (("        if result is not None:\n            raise result", "        pass"),),
        FAULTS,
    ),
    Mutant(
        "failed-flush-without-changes-acknowledged",
        "With nothing to commit, a failed flush of the destination is a success.",
        "nbdtarget.targets.committer:Committer._flush_only",
        (
            (
                "            return error.errno\n        return 0",
                "            return 0\n        return 0",
            ),
        ),
        FAULTS,
    ),
    Mutant(
        "loss-of-a-backing-device-not-looked-at",
        "A backing device has lost what was written to it, and a commit vouches for that.",
        "nbdtarget.targets.committer:Committer._flush_needed",
        (
            (
                "            await device.flush()\n            self._check_losses(device)\n"
                "            return\n",
                "            await device.flush()\n            return\n",
            ),
        ),
        COMMITTER,
    ),
    Mutant(
        "loss-of-the-metadata-device-not-looked-at",
        "The metadata device has lost journal records, and a superblock vouches for them.",
        "nbdtarget.targets.committer:Committer._run_steps",
        (("            self._check_losses(self.device)\n", ""),),
        COMMITTER,
    ),
    Mutant(
        "failed-flush-of-what-was-written-forgiven",
        "A device fails its flush, though something was written to it: FLUSH is acknowledged.",
        "nbdtarget.targets.committer:Committer._flush_needed",
        (("            if had_any:\n                raise\n", ""),),
        ("tests/nbdtarget/targets/cache/test_spec_3_2.py",),
    ),
    Mutant(
        "commit-never-due",
        "Nothing is committed until somebody flushes: a crash repeats hours of hydration.",
        "nbdtarget.targets.committer:Committer.note_change",
        (
            (
                "        if self._timer is None and not self.has_failed:",
                "        if self._timer is not None and not self.has_failed:",
            ),
        ),
        COMMITTER,
    ),
    Mutant(
        "quiesce-leaves-a-compaction-behind",
        "A compaction writes on into a device that has been closed, or is another's.",
        "nbdtarget.targets.committer:Committer.quiesce",
        (
            (
                "        await self._tasks.wait()\n",
                "        while self._is_running:\n            await asyncio.sleep(0)\n",
            ),
        ),
        COMMITTER,
    ),
    Mutant(
        "metadata-fua-dropped",
        "The driver drops the FUA of the superblock: it may be lost when it is relied on.",
        "nbdtarget.targets.metadata_io:_carry_out",
        (("operation.data, fua=operation.fua)", "operation.data)"),),
        WALKS,
    ),
    Mutant(
        "metadata-flush-dropped",
        "The driver drops the journal's flush.",
        "nbdtarget.targets.metadata_io:_carry_out",
        (("        await device.flush()\n", "        pass\n"),),
        WALKS,
    ),
    Mutant(
        "late-write-not-waited-for",
        "A cancelled operation leaves its write under way: it lands on what comes next.",
        "nbdtarget.targets.metadata_io:_carry_out_all",
        (("            cancelled = error\n", "            raise\n"),),
        METADATA_IO,
    ),
    Mutant(
        "offline-fua-dropped",
        "An offline tool says that it is done while the superblock may still be lost.",
        "nbdtarget.targets.metadata_io:_carry_out_fd",
        (
            (
                "            if operation.fua:\n                os.fdatasync(fd)\n",
                "",
            ),
        ),
        METADATA_IO,
    ),
    Mutant(
        "loss-below-not-heard-of",
        "A destination has lost regions that are hydrated in core alone: garbage is read from it.",
        "nbdtarget.targets.committer:Committer.watch",
        (
            (
                "                device.health.watchers.append(self._look_for_losses)\n",
                "                pass\n",
            ),
        ),
        COMEBACKS,
    ),
    Mutant(
        "lost-block-is-read-from-the-cache",
        "A block that is mapped in core alone is read from a cache device that has lost it.",
        "nbdtarget.targets.cache.target:CacheTarget._rests_on_unflushed",
        (
            (
                "            self._metadata.fail()\n        return True\n",
                "            pass\n        return True\n",
            ),
        ),
        COMEBACKS,
    ),
    Mutant(
        "superblock-over-what-was-lost-meanwhile",
        "A destination loses data of an unacknowledged flush, and the commit under way vouches for that data.",
        "nbdtarget.targets.committer:Committer._commit_transaction",
        (
            (
                '            raise DeviceError(errnos.EIO, self.name, "flush", 0, 0)\n',
                "            pass\n",
            ),
        ),
        COMMITTER,
    ),
)
