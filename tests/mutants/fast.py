# SPDX-License-Identifier: Apache-2.0
"""Mutants of what stands around the compiled fast path: when it may be taken, and what it leaves behind."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["FAST"]

TURNS: Final = ("tests/nbdtarget/server/test_fast_turn.py",)
RING_READS: Final = ("tests/nbdtarget/server/test_ring_reads.py",)
RING_BOUNDS: Final = ("tests/nbdtarget/server/test_ring_bounds.py",)
WINDOWS: Final = ("tests/nbdtarget/devices/file/test_windows.py",)
DURABLE: Final = ("tests/nbdtarget/server/test_shared_flush.py",)

EPOLL: Final = ("tests/nbdtarget/server/test_loop_epoll.py",)

FAST: Final = (
    Mutant(
        "lone-client-stays-though-the-loop-has-something-to-do",
        "The thread that syncs looks at another epoll instance: other clients wait for milliseconds.",
        "nbdtarget.server.loop_epoll:maybe_epoll_of",
        ((" and int(words[1]) == fd", ""),),
        EPOLL,
    ),
    Mutant(
        "flush-of-extended-headers-shared",
        "The reply to a FLUSH has not the offset of its request: a client that compares it disconnects.",
        "nbdtarget.server.fast_turn:FastTurn.__init__",
        (("requests.can_flush and not requests.extended", "requests.can_flush"),),
        TURNS,
    ),
    Mutant(
        "route-of-a-suspended-device-stays-open",
        "A write of a suspended device reaches its disk: a snapshot that is taken meanwhile is torn.",
        "nbdtarget.dm.fast_path:FastPath._set_route",
        (
            (
                "            self.route.close()\n            self.route = None\n",
                "            return\n",
            ),
        ),
        TURNS,
    ),
    Mutant(
        "route-of-a-read-only-device-takes-writes",
        "A client writes to a device whose table is read-only.",
        "nbdtarget.dm.fast_path:FastPath._set_route",
        (
            (
                "self.route.is_read_only = self.op_max < OP_WRITE",
                "self.route.is_read_only = False",
            ),
        ),
        TURNS,
    ),
    Mutant(
        "route-of-a-failed-clone-stays-open",
        "A clone whose metadata is in doubt still reads, and the client takes it for data.",
        "nbdtarget.targets.clone.target:CloneTarget._open_route",
        (
            (
                "self._route.can_read = not self._has_failed",
                "self._route.can_read = True",
            ),
        ),
        TURNS,
    ),
    Mutant(
        "reads-that-hydrate-go-unnoticed",
        "With hydrate_on_read what clients read is not copied first.",
        "nbdtarget.targets.clone.target:CloneTarget._open_route",
        (
            (
                "self._route.can_read_other = not self._hydration.hydrate_on_read",
                "self._route.can_read_other = True",
            ),
        ),
        TURNS,
    ),
    Mutant(
        "hydration-does-not-notice-clients",
        "A clone copies at full speed while clients read from it on the compiled path.",
        "nbdtarget.targets.clone.target:CloneTarget._open_route",
        (("self._was_served if is_told else None", "None"),),
        TURNS,
    ),
    Mutant(
        "half-sent-reply-is-overtaken",
        "A late reply goes out in the middle of another one: the client reads garbage.",
        "nbdtarget.server.output:Output.sent_to",
        (("        if base:\n", "        if False:\n"),),
        ("tests/nbdtarget/server/test_output.py",),
    ),
    Mutant(
        "refused-write-is-tried-again",
        "The kernel tells the loss of a page once; the second try succeeds, and the loss is never told.",
        "nbdtarget.devices.file.device:FileDevice._write_slow",
        (("                if status:\n", "                if False:\n"),),
        TURNS,
    ),
    Mutant(
        "part-of-a-write-is-written-twice",
        "A write that was begun is begun again, over what another client wrote there meanwhile.",
        "nbdtarget.devices.file.device:FileDevice._write_slow",
        (
            (
                "                    self._write_later(bio, put)\n",
                "                    self._write_later(bio, 0)\n",
            ),
        ),
        TURNS,
    ),
    Mutant(
        "writes-beside-a-discard",
        "A write waits in the event loop for the lock of an inode that a discard holds: all clients stand still.",
        "nbdtarget.devices.file.device:FileDevice._set_quick",
        (
            (
                "may_write = self._is_quick and not self.read_only",
                "may_write = not self.read_only",
            ),
        ),
        TURNS,
    ),
    Mutant(
        "suspend-overtakes-reads-in-the-ring",
        "A table is swapped while the disk writes into the reply of a client: the reply has bytes of the old disk.",
        "nbdtarget.dm.fast_path:FastPath._set_route",
        (
            (
                "self.route.in_flight = (self._in_flight, *self._through)",
                "self.route.in_flight = ()",
            ),
        ),
        RING_READS,
    ),
    Mutant(
        "suspend-of-a-lower-device-overtakes-reads-in-the-ring",
        "Only the uppermost device of a stack waits: the disk of a lower one is closed and given away.",
        "nbdtarget.dm.fast_path:FastPath._set_route",
        (
            (
                "self.route.in_flight = (self._in_flight, *self._through)",
                "self.route.in_flight = (self._in_flight,)",
            ),
        ),
        RING_READS,
    ),
    Mutant(
        "cache-block-moves-while-the-ring-reads-it",
        "The cache block is used for another block, whose bytes the client gets.",
        "nbdtarget.targets.cache.target:CacheTarget.maybe_route",
        (
            (
                "        self._route.hold = self._locks.hold_read\n"
                "        self._route.let_go = self._locks.end_read\n",
                "        pass\n",
            ),
        ),
        RING_READS,
    ),
    Mutant(
        "file-is-closed-while-the-ring-reads-it",
        "The number of the descriptor is used for another file, and a read that is offered again reads that one.",
        "nbdtarget.devices.file.device:FileDevice.close",
        (("        if self._nr_ring_reads:\n", "        if False:\n"),),
        ("tests/nbdtarget/devices/file/test_ring.py",),
    ),
    Mutant(
        "windows-of-a-closed-file-stay",
        "The file is still open and locked: no other program, and no later table, may use it.",
        "nbdtarget.devices.file.device:FileDevice.close",
        (("            await give_back(fast)\n", "            pass\n"),),
        WINDOWS,
    ),
    Mutant(
        "windows-stay-while-the-file-is-opened-anew",
        "After a failed write its pages stay in the page cache, and show what the disk does not have.",
        "nbdtarget.devices.file.device:FileDevice.reopened",
        (("            await give_back(self._fast)\n", "            pass\n"),),
        WINDOWS,
    ),
    Mutant(
        "windows-of-a-file-on-a-server",
        "The server of one NFS mount goes away, and the whole process waits for it in mmap.",
        "nbdtarget.devices.file.device:FileDevice._lend_windows",
        (("if not (self._can_map and self._may_map):", "if not self._may_map:"),),
        WINDOWS,
    ),
    Mutant(
        "windows-are-kept-for-ever",
        "An idle server keeps a GiB of pages mapped, which the kernel then counts as its memory.",
        "nbdtarget.devices.file.windows:FileWindows._sweep",
        (("        elif self.windows.nr_mapped:\n            self._watch()\n", ""),),
        WINDOWS,
    ),
    Mutant(
        "reads-in-the-ring-have-no-bound",
        "One client has the server hold as much memory as it likes.",
        "nbdtarget.server.ring_reads:RingReads.room",
        (("self._flow.room()", "1 << 30, 1 << 40"),),
        RING_READS,
    ),
    Mutant(
        "bound-met-by-reads-in-the-ring-is-seen-late",
        "A client goes on though its bound is met: it takes what is there for the others.",
        "nbdtarget.server.ring_reads:RingReads.begun",
        (("flow.nr_requests == nr\n", "False\n"),),
        RING_BOUNDS,
    ),
    Mutant(
        "read-that-came-short-is-not-read-again",
        "The client waits for ever.",
        "nbdtarget.server.ring_reads:RingReads.read_again",
        (("        if not self._host.is_closed:\n", "        if False:\n"),),
        RING_READS,
    ),
    Mutant(
        "late-reply-overtakes-half-a-reply",
        "A reply goes out in the middle of another one: the client reads garbage.",
        "nbdtarget.server.ring_reads:RingReads.may_send",
        (("return output.is_empty and not output.is_blocked", "return True"),),
        RING_READS,
    ),
    Mutant(
        "hits-of-the-compiled-path-go-unnoticed",
        "What clients read most is demoted first.",
        "nbdtarget.targets.cache.target:CacheTarget._note_hit",
        (("        self._lookup(oblock, False)\n", "        pass\n"),),
        TURNS,
    ),
    Mutant(
        "late-reply-goes-unnoticed",
        "The compiled path sends into the middle of a reply that has left in part: the client reads garbage.",
        "nbdtarget.server.output:Output.push",
        (("        self.pushed()\n", ""),),
        ("tests/nbdtarget/server/test_output.py",),
    ),
    Mutant(
        "compiled-path-passes-by-the-gate",
        "A write overtakes one of the same client's older connection, and is then overwritten by it.",
        "nbdtarget.server.connection:Connection.route",
        (("        self._python_has_run()\n", ""),),
        TURNS,
    ),
    Mutant(
        "compiled-path-serves-after-the-shutdown",
        "A request that came after the shutdown is carried out while the devices are closed.",
        "nbdtarget.server.connection:Connection.shutdown",
        (("            self._python_has_run()\n", ""),),
        TURNS,
    ),
    Mutant(
        "fast-fua-answered-without-its-flush",
        "The FLUSH for a batch of FUA writes fails, and they are answered as durable.",
        "nbdtarget.server.shared_flush:SharedFlushes._submit",
        (("            status = answer(bio.status)\n", "            status = 0\n"),),
        DURABLE,
    ),
    Mutant(
        "fast-flush-of-a-clone-without-its-commit",
        "The compiled path answers a FLUSH that a commit belongs to.",
        "nbdtarget.targets.clone.target:CloneTarget._may_sync",
        (("        return self._committer.is_clean\n", "        return True\n"),),
        DURABLE,
    ),
    Mutant(
        "fast-flush-for-a-client-that-is-alone-hides-a-loss",
        "The device has lost writes, and the compiled path answers a FLUSH without Python, which would have told.",
        "nbdtarget.devices.losses:ConnectionObserver.has_none",
        (("self._device.losses == self._told", "True"),),
        DURABLE,
    ),
    Mutant(
        "fast-flush-hides-a-loss",
        "The device has lost writes, and a FLUSH of the compiled path does not tell.",
        "nbdtarget.server.shared_flush:SharedFlushes.submit",
        (
            (
                "lambda status: observer.end(mark, status)",
                "lambda status: status",
            ),
        ),
        DURABLE,
    ),
)
