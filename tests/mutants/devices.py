# SPDX-License-Identifier: Apache-2.0
"""Mutants of the devices: what is promised for a file, and for another server's export."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["DEVICES"]

FILE: Final = (
    "tests/nbdtarget/devices/file/test_device.py",
    "tests/nbdtarget/devices/file/test_sync.py",
)
FILE_HEALTH: Final = ("tests/nbdtarget/devices/file/test_health.py",)
PAGE_CACHE: Final = (
    "tests/nbdtarget/devices/file/test_page_cache.py",
    "tests/crash/test_page_cache.py",
)
BULK: Final = (
    "tests/nbdtarget/devices/test_bulk.py",
    "tests/nbdtarget/targets/clone/test_bulk_hydration.py",
)
COMPILED: Final = (
    "tests/nbdtarget/devices/test_bulk_compiled.py",
    "tests/nbdtarget/devices/nbd/test_lent.py",
)
BEHIND: Final = ("tests/nbdtarget/devices/file/test_bulk.py",)
DIRECT: Final = ("tests/nbdtarget/devices/file/test_direct.py",)
RESOLVE: Final = ("tests/nbdtarget/devices/test_resolve.py",)
NBD: Final = ("tests/nbdtarget/devices/nbd/test_device.py",)

NBD_LOSS: Final = ("tests/nbdtarget/devices/nbd/test_loss.py",)

DEVICES: Final = (
    # ---- bulk copies ----
    Mutant(
        "bulk-copy-ends-before-its-write",
        "A copy has ended, and its region counts as hydrated, while the last chunk is being written.",
        "nbdtarget.devices.bulk:BulkCopies._work",
        (
            (
                "                    under_way.remove(chunk)\n",
                "",
            ),
            (
                "                    if not chunk.status and not chunk.copy.is_over:\n",
                "                    under_way.remove(chunk)\n"
                "                    self._end(chunk)\n"
                "                    if not chunk.status and not chunk.copy.is_over:\n",
            ),
            (
                "                    buffers.append(_whole(chunk.buffer))\n"
                "                    self._end(chunk)\n",
                "                    buffers.append(_whole(chunk.buffer))\n",
            ),
        ),
        BULK,
    ),
    Mutant(
        "bulk-write-error-forgotten",
        "A thread's write fails, and its copy does not.",
        "nbdtarget.devices.bulk:BulkCopies._write",
        (("        if status:\n", "        if False:\n"),),
        BULK,
    ),
    Mutant(
        "bulk-stream-lost-and-copy-done",
        "What was asked of a connection that broke counts as copied.",
        "nbdtarget.devices.bulk:BulkCopies._work",
        (("            self._note_failure(chunk, errnos.EIO, stream)\n", ""),),
        BULK,
    ),
    Mutant(
        "compiled-copy-failure-forgotten",
        "A compiled thread could not read or write a chunk, and its copy ends well.",
        "nbdtarget.devices.bulk_compiled:CompiledCopies._reap",
        (("            if status:\n", "            if False:\n"),),
        COMPILED,
    ),
    Mutant(
        "compiled-copy-fails-before-its-device-knows",
        "A connection has broken: who tries the copy again finds a device that still counts as usable.",
        "nbdtarget.devices.bulk:BulkCopies._compiled_ended",
        (("self._told.extend(copies)", "self._told.extendleft(copies)"),),
        COMPILED,
    ),
    Mutant(
        "writeback-error-told-to-nobody",
        "The wait for pages takes an error that the next fdatasync does not tell any more, and the device does not latch.",
        "nbdtarget.devices.file.bulk:Behind._has_ended",
        (("self._syncs.done(sync, status)", "self._syncs.done(sync, 0)"),),
        BEHIND,
    ),
    Mutant(
        "writeback-error-of-the-thread-forgotten",
        "The compiled thread that waits for pages takes their error, and nothing latches.",
        "nbdtarget.devices.file.bulk:Behind._reap",
        (("ended.set_result(status)", "ended.set_result(0)"),),
        BEHIND,
    ),
    Mutant(
        "flush-overtakes-the-writeback",
        "A FLUSH that overlaps the wait for pages ends before it is known whether that was told an error.",
        "nbdtarget.devices.file.bulk:Behind.write",
        (
            ("        sync = self._syncs.begin_writeback()\n", ""),
            (
                "partial(self._has_ended, sync)",
                "lambda ended: self._has_ended(self._syncs.begin_writeback(), ended)",
            ),
        ),
        BEHIND,
    ),
    # ---- a file ----
    Mutant(
        "latch-forgotten-after-a-failed-fsync",
        "The fsync after a failed one succeeds: the kernel has dropped the pages by then.",
        "nbdtarget.devices.file.sync:Syncs.latch",
        (
            (
                "        self.is_latched = True\n",
                "        self.is_latched = False\n",
            ),
        ),
        FILE,
    ),
    Mutant(
        "fsync-result-ignored",
        "fdatasync fails, and FLUSH succeeds.",
        "nbdtarget.devices.file.sync:Syncs._flush_done",
        (("self._settle(sync, status)", "self._settle(sync, 0)"),),
        FILE,
    ),
    Mutant(
        "thread-lent-while-another-sync-runs",
        "The compiled path syncs while another sync may be told its error.",
        "nbdtarget.devices.file.sync:Syncs._lend",
        (("not (self._running or self.is_latched)", "not self.is_latched"),),
        FILE,
    ),
    Mutant(
        "latched-file-lends-its-thread",
        "After a failed sync, the compiled path makes one that succeeds, and answers that all is well.",
        "nbdtarget.devices.file.sync:Syncs._lend",
        (("not (self._running or self.is_latched)", "not self._running"),),
        FILE,
    ),
    Mutant(
        "flush-rides-on-the-sync-that-the-compiled-path-has-left",
        "A FLUSH that comes while such a sync runs ends with it, for pages it has passed.",
        "nbdtarget.devices.file.sync:Syncs.left_over",
        (('Sync([], "flush")', 'Sync(self._waiting, "flush")'),),
        FILE,
    ),
    Mutant(
        "flush-overtakes-start-writeback",
        "A FLUSH ends while the hint that a copier gives runs, which may be told an error that no sync is told.",
        "nbdtarget.devices.file.sync:Syncs.run_beside",
        (
            ("        sync = self._begin(what)\n", ""),
            ("self.done(sync, 0", "self.done(self._begin(what), 0"),
        ),
        FILE,
    ),
    Mutant(
        "flush-waits-for-a-job-until-its-caller-goes",
        "The caller of a job that may be told an error is cancelled, and FLUSHes do not wait for the job any more.",
        "nbdtarget.devices.file.sync:Syncs.run_beside",
        (
            (
                "        self._pool.submit(job, done)\n",
                "        ended.add_done_callback(lambda _: done(0))\n"
                "        self._pool.submit(job, lambda status: ended.done() or done(status))\n",
            ),
            (
                "            self.done(sync,",
                "            if sync in self._running:\n                self.done(sync,",
            ),
        ),
        FILE,
    ),
    Mutant(
        "flush-overtakes-a-write-on-nfs",
        "A worker's write is told of an earlier one that is lost, and a FLUSH ends before the loop has heard of it.",
        "nbdtarget.devices.file.sync:Syncs.count_write",
        (("        if self.refuses_before_it_takes:\n", "        if True:\n"),),
        FILE,
    ),
    Mutant(
        "flush-ends-before-a-failed-write-latches",
        "The FLUSHes that wait for a worker's write end before its error has latched the device.",
        "nbdtarget.devices.file.sync:Syncs.count_write",
        (
            (
                "                done(status)  # before the syncs that wait for it end: it may latch\n"
                "            finally:\n"
                "                self.done(sync, 0)\n",
                "                self.done(sync, 0)\n"
                "            finally:\n"
                "                done(status)\n",
            ),
        ),
        FILE,
    ),
    Mutant(
        "bulk-copy-writes-uncounted-on-nfs",
        "A thread of a bulk copy is told of an earlier write that is lost, and a FLUSH ends meanwhile.",
        "nbdtarget.devices.file.device:FileDevice.maybe_bulk_writer",
        (
            (
                "self.read_only or not self._syncs.refuses_before_it_takes",
                "self.read_only",
            ),
        ),
        BEHIND,
    ),
    Mutant(
        "error-of-the-sync-of-attributes-forgotten",
        "The disk tells the sync of a file's times that it cannot empty its cache, and a later FLUSH succeeds.",
        "nbdtarget.devices.file.device:FileDevice._sync_beside",
        (('await self._syncs.run_beside("fsync", run)', "await self._pool.run(run)"),),
        FILE,
    ),
    Mutant(
        "error-of-an-opening-beside-forgotten",
        "The sync with which a file is opened anew is told an error, and FLUSHes of the device that is in use succeed.",
        "nbdtarget.devices.file.open:_count_beside",
        (("isinstance(error, _NotWrittenError)", "False"),),
        FILE,
    ),
    Mutant(
        "fdatasync-not-called",
        "FLUSH asks nothing of the kernel: a power cut takes what it acknowledged.",
        "nbdtarget.devices.file.sync:Syncs._fdatasync",
        (("        os.fdatasync(self._fd)\n", ""),),
        FILE,
    ),
    Mutant(
        "fua-not-synced",
        "A FUA write stays in the page cache.",
        "nbdtarget.devices.file.device:FileDevice._written",
        (("if bio.flags & FUA:", "if False:"),),
        FILE,
    ),
    Mutant(
        "fua-written-inline",
        "The quick way through `submit` takes a FUA write for a plain one.",
        "nbdtarget.devices.file.device:FileDevice.submit",
        (("            elif bio.flags:\n", "            elif False:\n"),),
        FILE,
    ),
    Mutant(
        "fua-kept-borrowed",
        "A FUA write that waits for its sync keeps memory that is not its own.",
        "nbdtarget.devices.file.device:FileDevice._written",
        (("            bio.own()  # it ends later\n", ""),),
        FILE,
    ),
    Mutant(
        "latched-device-takes-fua",
        "After a failed sync, a FUA write still goes the quick way.",
        "nbdtarget.devices.file.device:FileDevice.submit",
        (("not bio.flags or not self._syncs.is_latched", "True"),),
        FILE,
    ),
    Mutant(
        "file-flush-rides-on-the-running-one",
        "A FLUSH that comes while fdatasync runs ends with it, for pages it has passed.",
        "nbdtarget.devices.file.sync:Syncs._flush_done",
        (
            (
                "        assert sync is not None\n",
                "        assert sync is not None\n"
                "        sync.bios += self._waiting\n"
                "        self._waiting = []\n",
            ),
        ),
        FILE,
    ),
    Mutant(
        "sync-begun-after-a-failed-one",
        "The sync after a failed one succeeds, and answers all that waited for it.",
        "nbdtarget.devices.file.sync:Syncs._start",
        (("        if self.is_latched:\n", "        if False:\n"),),
        FILE,
    ),
    Mutant(
        "two-syncs-at-a-time",
        "The kernel tells a lost page to one sync, and another that runs beside it succeeds.",
        "nbdtarget.devices.file.sync:Syncs.flush",
        (("        if self._flush is None:\n", "        if True:\n"),),
        FILE,
    ),
    Mutant(
        "overlapping-sync-not-waited-for",
        "The kernel tells a lost page to one sync, and another that overlaps it succeeds.",
        "nbdtarget.devices.file.sync:Syncs._settle",
        (("sync.left = len(self._running)", "sync.left = 0"),),
        FILE,
    ),
    Mutant(
        "failed-write-does-not-latch",
        "A write to the disk has failed, and a later FLUSH succeeds all the same.",
        "nbdtarget.devices.file.sync:Syncs.note_write_error",
        (
            (
                "        if not self._has_lost_nothing(status):\n"
                "            self.latch(what, status)\n",
                "",
            ),
        ),
        FILE,
    ),
    Mutant(
        "failed-discard-latches",
        "One TRIM that the disk refuses makes each later FLUSH fail.",
        "nbdtarget.devices.file.sync:Syncs.write_failed",
        (
            (
                "        if bio.op == OP_DISCARD:\n",
                "        if False:\n",
            ),
        ),
        FILE_HEALTH,
    ),
    Mutant(
        "no-room-on-nfs-taken-for-nothing-lost",
        "NFS tells of an earlier, acknowledged write that it has lost, and FLUSH succeeds.",
        "nbdtarget.devices.file.device:FileDevice._probe",
        (
            (
                "self._is_block_device or refuses_before_it_takes(self._fd)",
                "True",
            ),
        ),
        FILE_HEALTH,
    ),
    Mutant(
        "no-sync-at-open",
        "What an earlier life has left unwritten, and the news that it cannot be, stays unseen.",
        "nbdtarget.devices.file.page_cache:believe_the_disk",
        (("    os.fdatasync(fd)\n    # A block", "    # A block"),),
        PAGE_CACHE,
    ),
    Mutant(
        "clean-pages-believed-at-open",
        "Pages that never reached the disk are read as if they had, and vouch for a FLUSH.",
        "nbdtarget.devices.file.page_cache:believe_the_disk",
        (("    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)\n", ""),),
        PAGE_CACHE,
    ),
    Mutant(
        "failed-writeback-does-not-latch",
        "Pages that background writeback has lost are acknowledged by the next FLUSH.",
        "nbdtarget.devices.file.sync:Syncs.writeback_failed",
        (('            self.latch("writeback", status)\n', ""),),
        FILE,
    ),
    Mutant(
        "deferred-file-write-not-owned",
        "A worker writes what the receive buffer holds by then.",
        "nbdtarget.devices.file.device:FileDevice._write_later",
        (
            (
                "    def _write_later(self, bio: Bio, put: int, *, piece: int = WRITE_PIECE) -> None:\n        bio.own()",
                "    def _write_later(self, bio: Bio, put: int, *, piece: int = WRITE_PIECE) -> None:\n"
                "        bio.borrowed = False",
            ),
        ),
        FILE,
    ),
    Mutant(
        "short-write-taken-for-whole",
        "The kernel takes a part of a write, and the rest is never written.",
        "nbdtarget.devices.file.device:FileDevice.submit",
        (
            (
                "                self._write_later(bio, put)\n            elif bio.flags:",
                "                bio.end(0)\n            elif bio.flags:",
            ),
        ),
        FILE,
    ),
    # ---- a file by direct I/O ----
    Mutant(
        "direct-parts-of-a-unit-written-beside-each-other",
        "Two writes to parts of one unit read it, and the second one undoes the first.",
        "nbdtarget.devices.file.direct:DirectDevice._start_write",
        (("% self._unit != 0\n", "% self._unit < 0\n"),),
        DIRECT,
    ),
    Mutant(
        "direct-unit-not-read-first",
        "A write of a few bytes overwrites what lies around them.",
        "nbdtarget.devices.file.direct:DirectDevice._put",
        (("                if begin < offset:\n", "                if False:\n"),),
        DIRECT,
    ),
    Mutant(
        "direct-unit-that-cannot-be-read-overwritten",
        "The unit cannot be read, and is written all the same, with what the buffer had.",
        "nbdtarget.devices.file.direct:DirectDevice._put",
        (("                if status:\n", "                if False:\n"),),
        DIRECT,
    ),
    Mutant(
        "direct-is-another-disk-than-its-path",
        "One file is opened twice, with and without the page cache, and the two do not agree.",
        "nbdtarget.devices.file.direct_scheme:DirectScheme.identity",
        (("super().identity(_path(name))", "(name,)"),),
        ("tests/nbdtarget/devices/file/test_direct_scheme.py",),
    ),
    # ---- another server's export ----
    Mutant(
        "nbd-fua-not-sent",
        "FUA is not passed on to a server that has it.",
        "nbdtarget.devices.nbd.device:NbdDevice._start_pieces",
        (
            (
                "                flags = consts.CMD_FLAG_FUA\n",
                "                flags = 0\n",
            ),
        ),
        NBD,
    ),
    Mutant(
        "nbd-fua-without-flush",
        "On a server without FUA, a FUA write ends without the FLUSH that stands for it.",
        "nbdtarget.devices.nbd.device:NbdDevice._finish",
        (
            (
                "        elif bio.flags & FUA and not self._has_fua:",
                "        elif bio.flags < 0 and not self._has_fua:",
            ),
        ),
        NBD,
    ),
    Mutant(
        "nbd-connects-again-after-writes",
        "A server that crashed has lost writes, and the next FLUSH asks its successor.",
        "nbdtarget.devices.nbd.device:NbdDevice._connection_lost",
        (
            (
                "            self.health.note_loss()\n        self.health.lose(",
                "        self.health.lose(",
            ),
        ),
        NBD_LOSS,
    ),
    Mutant(
        "nbd-failed-discard-latches",
        "One TRIM that the server refuses makes each later FLUSH fail.",
        "nbdtarget.devices.nbd.device:NbdDevice._finish",
        (("if op != OP_DISCARD and (", "if op and ("),),
        NBD,
    ),
    Mutant(
        "nbd-latch-forgotten",
        "A FLUSH failed over there, and the next one is believed.",
        "nbdtarget.devices.nbd.device:NbdDevice._latch",
        (
            (
                "        self._is_latched = True\n",
                "        self._is_latched = False\n",
            ),
        ),
        NBD,
    ),
    Mutant(
        "nbd-flush-rides-on-the-running-one",
        "A FLUSH that comes while one is with the server ends with it.",
        "nbdtarget.devices.nbd.device:NbdDevice._flush_done",
        (
            (
                "        bios, self._flush_runs = self._flush_runs, []\n",
                "        bios = self._flush_runs + self._flush_waiting\n"
                "        self._flush_runs, self._flush_waiting = [], []\n",
            ),
        ),
        NBD,
    ),
    Mutant(
        "nbd-payload-not-owned",
        "A request that waits its turn sends what the receive buffer holds by then.",
        "nbdtarget.devices.nbd.device:NbdDevice.submit",
        (
            (
                "            bio.own()\n            self._submit_write(bio)",
                "            bio.borrowed = False\n            self._submit_write(bio)",
            ),
        ),
        NBD,
    ),
    Mutant(
        "nbd-patch-beside-other-writes",
        "Two unaligned writes to one block patch each other away.",
        "nbdtarget.devices.nbd.writes:Writes._carry_out_held",
        (
            (
                "            while self._nr_sent:\n",
                "            while self._nr_sent < 0:\n",
            ),
        ),
        NBD,
    ),
    Mutant(
        "nbd-error-of-a-piece-lost",
        "A large write succeeds though the server refused one of its pieces.",
        "nbdtarget.devices.nbd.device:NbdDevice._answer",
        (
            (
                "            whose.error = whose.error or status\n",
                "            whose.error = status\n",
            ),
        ),
        NBD,
    ),
    Mutant(
        "nbd-written-to-without-flush",
        "A server that has no FLUSH is taken for a disk to write to.",
        "nbdtarget.devices.nbd.connect:_check",
        (
            (
                "    if not negotiated.flags & consts.FLAG_SEND_FLUSH:",
                "    if negotiated.flags < 0:",
            ),
        ),
        NBD,
    ),
    Mutant(
        "nbd-reconnects-without-counting-the-loss",
        "A server forgets unflushed writes, is connected again, and the next FLUSH succeeds.",
        "nbdtarget.devices.nbd.device:NbdDevice._connection_lost",
        (("            self.health.note_loss()\n", ""),),
        NBD_LOSS,
    ),
    Mutant(
        "nbd-flush-covers-what-ended-meanwhile",
        "A write that ends while a FLUSH runs is taken for flushed.",
        "nbdtarget.devices.nbd.device:NbdDevice._flush_done",
        (
            (
                "self._nr_flushed = self._nr_flushing",
                "self._nr_flushed = self._nr_written",
            ),
        ),
        NBD_LOSS,
    ),
    Mutant(
        "nbd-takes-another-disk",
        "A server comes back with another disk, and the device goes on with it.",
        "nbdtarget.devices.nbd.device:NbdDevice._connect_once",
        (
            (
                "            check_same(self.name, self.size, before, after)\n",
                "            pass\n",
            ),
        ),
        NBD_LOSS,
    ),
    Mutant(
        "nbd-old-connection-overtakes-the-new-one",
        "The device connects again while a write of the old connection is under way at the server.",
        "nbdtarget.devices.nbd.connect:connect_all",
        (("        await wait_until_ended(name, uri)\n", "        pass\n"),),
        NBD_LOSS,
    ),
    Mutant(
        "nbd-late-reply-into-a-buffer-given-back",
        "The reply to a read that was given up is received into memory that is somebody else's by now.",
        "nbdtarget_protocol.client_transmission:ClientTransmission.abandon",
        (("twin.buffer = sink[: request.length]", "twin.buffer = request.buffer"),),
        NBD_LOSS,
    ),
    # ---- names of devices ----
    Mutant(
        "second-name-of-a-file-is-another-disk",
        "One file is opened twice, by two names: a FLUSH covers the writes of one of them only.",
        "nbdtarget.devices.file.scheme:FileScheme.identity",
        (
            (
                'return ("file", status.st_dev, status.st_ino)',
                'return ("file", os.path.abspath(name))',
            ),
        ),
        RESOLVE,
    ),
    Mutant(
        "two-exports-of-a-server-are-one-disk",
        "A second export of a server is taken for the first: a table serves another disk than it names.",
        "nbdtarget.devices.nbd.uri:NbdUri.identity",
        ((", self.server, self.export_name)", ", self.server)"),),
        ("tests/nbdtarget/devices/nbd/test_uri.py",),
    ),
    Mutant(
        "relative-socket-meant-from-the-server",
        "A relative path of a socket means the directory of the server: perhaps another disk.",
        "nbdtarget.devices.nbd.scheme:NbdScheme.absolute",
        (("lambda key: key[1] + before", "lambda key: key[1]"),),
        RESOLVE,
    ),
    Mutant(
        "memory-is-one-disk",
        "Two disks in memory of the same size are one: two tables write over each other.",
        "nbdtarget.devices.memory_scheme:MemoryScheme.identity",
        (("return (self.name, object())", "return (self.name, name)"),),
        RESOLVE,
    ),
)
