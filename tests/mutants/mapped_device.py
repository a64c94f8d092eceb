# SPDX-License-Identifier: Apache-2.0
"""Mutants of the device-mapper core: what a table owes those who stand on it."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["MAPPED_DEVICE"]

TESTS: Final = (
    "tests/nbdtarget/test_bio.py",
    "tests/nbdtarget/dm/test_mapped_device.py",
    "tests/nbdtarget/dm/test_zero_fill.py",
    "tests/crash/test_machine.py",
    "tests/crash/test_faults.py",
)

LOSSES: Final = (
    "tests/nbdtarget/dm/test_losses.py",
    "tests/nbdtarget/devices/test_losses.py",
    "tests/nbdtarget/server/test_losses.py",
)
STATISTICS: Final = ("tests/nbdtarget/dm/test_statistics.py",)
CANCELLED: Final = ("tests/nbdtarget/dm/test_cancelled.py",)
NOFLUSH: Final = ("tests/nbdtarget/dm/test_noflush.py",)

MAPPED_DEVICE: Final = (
    Mutant(
        "flush-to-one-target-only",
        "Of a table of several lines only the first is flushed.",
        "nbdtarget.dm.bio_path:BioPath._submit_flush",
        (
            (
                "            target for target in table.targets for _ in",
                "            target for target in table.targets[:1] for _ in",
            ),
        ),
        TESTS,
    ),
    Mutant(
        "flush-error-of-one-target-lost",
        "One line's disk could not flush, another could: FLUSH says that all is well.",
        "nbdtarget.dm.bio_path:BioPath._submit_flush",
        (
            (
                "first_error = first_error or child.status",
                "first_error = child.status",
            ),
        ),
        TESTS,
    ),
    Mutant(
        "flush-ends-with-the-first-target",
        "FLUSH ends when the quickest disk has flushed.",
        "nbdtarget.dm.bio_path:BioPath._submit_flush",
        (
            (
                "                left -= 1\n                if left == 0:",
                "                left -= 1\n                if bio.status < 0:",
            ),
        ),
        TESTS,
    ),
    Mutant(
        "owed-flush-error-forgotten",
        "Writes were lost with a table that is gone, and no FLUSH ever says so.",
        "nbdtarget.dm.mapped_device:MappedDevice._resume_inactive",
        (
            (
                "        if old is not None:\n            self._note_losses(old, new)\n",
                "",
            ),
        ),
        TESTS,
    ),
    Mutant(
        "refused-table-leaves-the-device-suspended",
        "A new table refuses to resume, and clients wait for ever, although the old one could serve.",
        "nbdtarget.dm.mapped_device:MappedDevice._resume_inactive",
        (
            (
                "            await to_the_end(self._take_back(old, new, error, runs=ran))\n",
                "",
            ),
        ),
        TESTS,
    ),
    Mutant(
        "cancelled-start-is-left-half-done",
        "A server that stops while it follows its file goes on with the metadata of a half of a start.",
        "nbdtarget.dm.table:Table.preresume",
        (
            (
                "            await to_the_end(self._preresume(ready))\n",
                "            await self._preresume(ready)\n",
            ),
        ),
        CANCELLED,
    ),
    Mutant(
        "cancelled-start-is-not-stopped",
        "A target that was ready when the start was cancelled is destroyed while it works.",
        "nbdtarget.dm.table:Table.preresume",
        (
            (
                "            await to_the_end(self.stop(ready, name, clock))\n",
                "",
            ),
        ),
        CANCELLED,
    ),
    Mutant(
        "cancelled-removal-forgets-the-device",
        "A server that stops while it removes a device ends without having flushed it.",
        "nbdtarget.dm.registry:Registry._remove",
        (("except (TableError, asyncio.CancelledError)", "except TableError"),),
        CANCELLED,
    ),
    Mutant(
        "device-closed-under-a-table-that-works-on",
        "What has not stopped in time writes to a descriptor that may be another file's.",
        "nbdtarget.dm.table:Table._postsuspend_failed",
        (("            self.has_stopped = False\n", ""),),
        CANCELLED,
    ),
    Mutant(
        "closed-under-the-flush-of-the-bound",
        "A disk that answers late is closed while the end flushes it a second time: a commit is reported as lost.",
        "nbdtarget.dm.mapped_device:MappedDevice.commit_ended",
        (("with table.use():", "if True:"),),
        ("tests/nbdtarget/dm/test_hanging.py",),
    ),
    Mutant(
        "suspend-does-not-wait",
        "A table is swapped while its writes are under way: they miss the commit.",
        "nbdtarget.dm.mapped_device:MappedDevice._settle",
        (("        await self._path.drain(table)\n", ""),),
        TESTS,
    ),
    Mutant(
        "suspend-does-not-flush",
        "Writes to a table that is swapped away are beyond the reach of every later FLUSH.",
        "nbdtarget.dm.mapped_device:MappedDevice._settle",
        (
            (
                "table.read_only):\n            await self._path.flush(table)\n",
                "table.read_only):\n            pass\n",
            ),
        ),
        TESTS,
    ),
    Mutant(
        "suspend-given-up-stays-suspended",
        "After a suspend that a device made take too long, clients' I/O waits for ever.",
        "nbdtarget.dm.mapped_device:MappedDevice._suspend",
        (
            (
                "            self._undo_suspend(table)\n            raise TableError(",
                "            raise TableError(",
            ),
        ),
        ("tests/nbdtarget/dm/test_hanging.py",),
    ),
    Mutant(
        "end-commits-nothing-of-what-hangs",
        "What a client wrote to a clone whose source hangs is forgotten at the end.",
        "nbdtarget.dm.mapped_device:MappedDevice.commit_ended",
        (
            (
                "        await self._path.flush(table)\n        return self.is_flushed\n",
                "        return True\n",
            ),
        ),
        ("tests/nbdtarget/dm/test_hanging.py",),
    ),
    Mutant(
        "abandoned-flush-not-in-flight",
        "A table is destroyed while one of its flushes, whose caller has given up, is still under way.",
        "nbdtarget.dm.bio_path:BioPath.flush",
        (("        self.in_flight.enter(flush)\n", ""),),
        ("tests/nbdtarget/dm/test_hanging.py",),
    ),
    Mutant(
        "failed-flush-of-a-suspend-forgotten",
        "A suspend could not flush, and the next FLUSH asks the new table only.",
        "nbdtarget.dm.bio_path:BioPath.flush",
        (
            (
                "        if errno:\n            self._device.health.note_loss()\n",
                "        if errno:\n",
            ),
        ),
        TESTS,
    ),
    Mutant(
        "loss-told-to-one-connection-only",
        "One client's FLUSH tells of a loss; another one, whose write is gone too, hears that all is well.",
        "nbdtarget.server.in_flight:InFlight.__init__",
        (
            (
                "        self.observer = ConnectionObserver(device)\n",
                "        self.observer = vars(device).setdefault(\n"
                '            "observer", ConnectionObserver(device)\n'
                "        )\n",
            ),
        ),
        LOSSES,
    ),
    Mutant(
        "loss-not-seen-through-a-stack",
        "A disk loses writes, and the FLUSH of a device two tables above it says that all is well.",
        "nbdtarget.dm.mapped_device:MappedDevice.losses",
        (
            (
                "        return self.health.losses + self._below.losses\n",
                "        return self.health.losses\n",
            ),
        ),
        LOSSES,
    ),
    Mutant(
        "table-swap-hides-a-loss",
        "The table under which a disk lost writes is swapped away, and the loss with it.",
        "nbdtarget.dm.below:Below.adopt",
        (("        self._health.losses += self.losses\n", ""),),
        LOSSES,
    ),
    Mutant(
        "client-that-comes-back-is-not-told",
        "A client's connection ends, its writes are lost, and over a new one its FLUSH succeeds.",
        "nbdtarget.devices.losses:ConnectionObserver.close",
        (("        health.bequest = Bequest(told)\n", "        assert told >= 0\n"),),
        LOSSES,
    ),
    Mutant(
        "writeback-believes-a-flush-after-a-loss",
        "The origin's server was restarted: what it had not flushed is recorded as clean.",
        "nbdtarget.tools.writeback:_Origin.flush",
        (
            (
                "        await self._observer.flush()\n",
                "        await self.device.flush()\n",
            ),
        ),
        ("tests/nbdtarget/tools/test_writeback.py",),
    ),
    Mutant(
        "metadata-believe-a-flush-after-a-loss",
        "A superblock is written over a journal that the device has lost meanwhile.",
        "nbdtarget.targets.metadata_io:run",
        (
            (
                "isinstance(operation, Flush) and device.losses != losses:\n",
                "isinstance(operation, Flush) and device.losses < losses:\n",
            ),
        ),
        ("tests/nbdtarget/targets/test_metadata_io.py",),
    ),
    Mutant(
        "flush-to-one-stripe-only",
        "FLUSH reaches the first disk of a stripe set.",
        "nbdtarget.targets.striped:StripedTarget.map",
        (
            (
                "[(device, 0, 0) for device in self._devices]",
                "[(device, 0, 0) for device in self._devices[:1]]",
            ),
        ),
        ("tests/nbdtarget/targets/test_striped.py",),
    ),
    Mutant(
        "fast-path-survives-a-suspend",
        "Writes still reach a table that is suspended, behind its last commit.",
        "nbdtarget.dm.bio_path:BioPath.stop",
        (
            (
                "        self.running.clear()\n        self.fast_path.update()\n",
                "        self.running.clear()\n",
            ),
        ),
        TESTS,
    ),
    Mutant(
        "chain-survives-a-suspend-below",
        "What stands on a suspended device goes through it, in one step, all the same.",
        "nbdtarget.dm.fast_path:FastPath.update",
        (
            (
                "        for upper in tuple(self._uppers):\n"
                "            upper.update()\n",
                "",
            ),
        ),
        ("tests/nbdtarget/dm/test_chains.py",),
    ),
    Mutant(
        "chain-not-in-flight-below",
        "A device in the middle of a stack is suspended while a write goes through it.",
        "nbdtarget.dm.fast_path:_Chain.submit",
        (
            (
                "            for in_flight in self._through:\n"
                "                in_flight.enter(bio)\n",
                "            pass\n",
            ),
        ),
        ("tests/nbdtarget/dm/test_chains.py",),
    ),
    Mutant(
        "chain-beyond-a-shrunken-device",
        "A write through a device that has become smaller lands behind its end.",
        "nbdtarget.dm.fast_path:FastPath._shorten",
        ((" or lower.end < self.end + delta\n", "\n"),),
        ("tests/nbdtarget/dm/test_chains.py",),
    ),
    Mutant(
        "queued-payload-not-owned",
        "A write that waits for a resume keeps the receive buffer of somebody else.",
        "nbdtarget.dm.bio_path:BioPath._submit_slow",
        (
            (
                "            bio.own()\n            self._queue.append(bio)",
                "            bio.borrowed = False\n            self._queue.append(bio)",
            ),
        ),
        TESTS,
    ),
    Mutant(
        "pushed-back-bio-forgotten",
        "A write that a target held back is neither done nor failed: its client waits for ever.",
        "nbdtarget.dm.bio_path:BioPath._requeue",
        (("        self._queue.insert(self._nr_pushed_back, bio)\n", ""),),
        NOFLUSH,
    ),
    Mutant(
        "part-of-a-bio-not-counted-in-flight",
        "A suspend does not wait for the parts of a request across a border.",
        "nbdtarget.dm.bio_path:BioPath._submit_slow",
        (("                    self.in_flight.enter(child)\n", ""),),
        NOFLUSH,
    ),
    Mutant(
        "device-of-a-clone-shared-with-a-linear",
        "Somebody writes to a clone's destination behind its back, or to its source.",
        "nbdtarget.dm.open_devices:_Open.add",
        (
            (
                "if not (each.tolerates(use) and use.tolerates(each))",
                "if not (each.tolerates(use) or use.tolerates(each))",
            ),
        ),
        ("tests/nbdtarget/dm/test_registry.py",),
    ),
    Mutant(
        "written-zeroes-without-fua",
        "A FUA WRITE_ZEROES that has to be written out is not durable when it ends.",
        "nbdtarget.dm.zero_fill:ZeroFill._start_writes",
        (("                self._parent.flags & FUA,\n", "                0,\n"),),
        TESTS,
    ),
    Mutant(
        "written-zeroes-error-lost",
        "A WRITE_ZEROES that has to be written out succeeds though a write failed.",
        "nbdtarget.dm.zero_fill:ZeroFill._child_ended",
        (
            (
                "        self._error = self._error or child.status\n",
                "        self._error = self._error or 0\n",
            ),
        ),
        TESTS,
    ),
    Mutant(
        "error-of-a-part-lost",
        "A write that was cut in two succeeds though one half failed.",
        "nbdtarget.bio:_Split.child_ended",
        (
            (
                "        if child.status and not self.error:",
                "        if child.status < 0 and not self.error:",
            ),
        ),
        TESTS,
    ),
    Mutant(
        "own-copies-nothing",
        "A bio that owns its payload still shares it with the receive buffer.",
        "nbdtarget.bio:Bio.own",
        (
            (
                "self.payload = memoryview(bytes(self.payload))",
                "self.payload = self.payload[:]",
            ),
        ),
        TESTS,
    ),
    Mutant(
        "loaded-table-gets-the-latched-device",
        "A table loaded to cure a latched disk gets the latched device once more.",
        "nbdtarget.dm.open_devices:OpenDevices.open_path",
        (("elif not opened.device.health.is_usable or (", "elif ("),),
        ("tests/nbdtarget/dm/test_reopening.py",),
    ),
    Mutant(
        "new-table-shares-metadata-of-a-lost-cause",
        "A table over a disk opened again takes the metadata of the table that could not commit.",
        "nbdtarget.targets.opening:Opening._shared_or_read",
        (("if not self._ctx.replaces_unusable:", "if True:"),),
        ("tests/nbdtarget/dm/test_reopening.py",),
    ),
    Mutant(
        "stale-metadata-take-over",
        "A table that read its metadata before the live one committed again is resumed all the same.",
        "nbdtarget.targets.opening:refuse_stale",
        (("if other.generation != generation:", "if False:"),),
        ("tests/nbdtarget/dm/test_reopening.py",),
    ),
    Mutant(
        "flush-of-a-suspend-is-logged",
        "A log-writes log has a flush entry that no client asked for.",
        "nbdtarget.targets.log_writes.target:LogWritesTarget.map",
        (("        if bio.flags & UNASKED:\n", "        if False:\n"),),
        ("tests/nbdtarget/targets/log_writes/test_target.py",),
    ),
    Mutant(
        "log-with-a-gap",
        "A log goes on after entries that it could not write: what is replayed of it never was on the disk.",
        "nbdtarget.targets.log_writes.log:Log._write_queue",
        (
            (
                '            self.disable(f"Error writing log: {error!r}")\n',
                "",
            ),
        ),
        ("tests/nbdtarget/targets/log_writes/test_target.py",),
    ),
    Mutant(
        "flush-of-a-suspend-stays-in-the-log",
        "A suspend over log-writes ends its flush without the disk below.",
        "nbdtarget.targets.log_writes.target:LogWritesTarget.map",
        (
            (
                "        if bio.flags & UNASKED:\n            return REMAPPED\n",
                "        if bio.flags & UNASKED:\n            bio.end(0)\n"
                "            return SUBMITTED\n",
            ),
        ),
        ("tests/nbdtarget/targets/log_writes/test_target.py",),
    ),
    Mutant(
        "counting-leaves-the-fast-path-on",
        "Reads and writes of a device with one target are not counted.",
        "nbdtarget.dm.bio_path:BioPath._table_of_fast_path",
        (("            and not self._is_counting\n", ""),),
        STATISTICS,
    ),
    Mutant(
        "what-is-given-back-counts-twice",
        "A bio that a suspend with noflush gives back counts each time that it is mapped.",
        "nbdtarget.dm.bio_path:BioPath._requeue",
        (
            (
                "        if self._is_counting:\n            self.statistics.pass_over(bio)\n",
                "",
            ),
        ),
        STATISTICS,
    ),
    Mutant(
        "failed-before-it-is-counted-off",
        "A request that ends leaves the number of those in flight as it was.",
        "nbdtarget.dm.statistics:_Counted.__call__",
        (("            area.in_flight[way] -= 1\n", ""),),
        STATISTICS,
    ),
)
