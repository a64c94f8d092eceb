# SPDX-License-Identifier: Apache-2.0
"""Mutants of the server: what a client is told, and when."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["SERVER"]

REQUESTS: Final = (
    "tests/nbdtarget/server/test_requests.py",
    "tests/nbdtarget/server/test_in_flight.py",
    "tests/nbdtarget/server/test_connection.py",
)

GATE: Final = ("tests/nbdtarget/server/test_gate.py",)

UNIX_SOCKET: Final = ("tests/nbdtarget/common/test_unix_socket.py",)
STOP: Final = ("tests/nbdtarget/daemon/test_stop.py",)
REST: Final = ("tests/nbdtarget/server/test_rest.py",)
HANDOVER: Final = ("tests/nbdtarget/dm/test_handover.py",)
TRAFFIC: Final = ("tests/nbdtarget/server/test_traffic.py",)

SERVER: Final = (
    Mutant(
        "writes-of-a-batch-not-counted",
        "Metrics show no writes while a client writes and reads.",
        "nbdtarget.server.requests:Requests._note",
        (
            (
                "                if both:",
                "                if both and command == CMD_READ:",
            ),
        ),
        TRAFFIC,
    ),
    Mutant(
        "numbers-of-the-compiled-path-forgotten",
        "Metrics show only what Python has answered.",
        "nbdtarget.server.traffic:Traffic.counts",
        (("if self.compiled is None:", "if True:"),),
        TRAFFIC,
    ),
    Mutant(
        "reset-in-a-payload-not-noticed",
        "A client that resets in the middle of a WRITE keeps its connection, and the device, for ever.",
        "nbdtarget.server.reception:Reception._receive_usual",
        (
            (
                '                goes_on = True  # see "Errors"',
                '                pass  # see "Errors"',
            ),
        ),
        ("tests/nbdtarget/server/test_dead_peers.py",),
    ),
    Mutant(
        "replies-lost-by-a-hand-over",
        "A client that had not taken its replies when the server was replaced never gets them.",
        "nbdtarget.server.output:Output.unsent",
        (
            (
                "        pieces = [view for view, _, _ in self._queue]\n",
                "        pieces = []\n",
            ),
        ),
        ("tests/nbdtarget/server/test_moving.py",),
    ),
    Mutant(
        "silent-clients-hold-an-upgrade-up",
        "Anybody who reaches the port, and says nothing, makes all clients wait for ten seconds in each hand-over.",
        "nbdtarget.server.rest:_Waiting._has_to_wait",
        (("HANDSHAKE_REST_S * 1e9", "1e99"),),
        REST,
    ),
    Mutant(
        "handshakes-go-on-while-devices-have-no-tables",
        "A client that connects while the server hands over, and fails to, is told that its disk has no size.",
        "nbdtarget.server.connection:Connection.hold",
        (("            watch.stop()  #", "            pass  #"),),
        REST,
    ),
    Mutant(
        "ranges-forgotten-by-a-hand-over",
        "A client whose TRIM was stopped between two slices never gets its reply.",
        "nbdtarget.server.listener:Listener.go_on",
        (("            connection.go_on_with(ranges)\n", "            pass\n"),),
        ("tests/nbdtarget/server/test_sliced_range.py",),
        hangs=True,
    ),
    Mutant(
        "an-elder-goes-on-elsewhere",
        "A client that has connected again, and has written, is overtaken by a WRITE_ZEROES of its old connection.",
        "nbdtarget.server.in_flight:InFlight._stand_still",
        ((" and ranges.bio not in self._gate.elders", ""),),
        ("tests/nbdtarget/server/test_sliced_range.py",),
        hangs=True,
    ),
    Mutant(
        "ranges-ended-early-by-a-hand-over",
        "A WRITE_ZEROES that was stopped between two slices is answered, and the slice after them was never zeroed.",
        "nbdtarget.server.sliced_range:SlicedRange.done",
        (
            (
                "self._at - self._bio.offset",
                "self._at - self._bio.offset + self._pace.length",
            ),
        ),
        ("tests/nbdtarget/server/test_sliced_range.py",),
    ),
    Mutant(
        "clients-disconnected-by-a-hand-over-that-fails",
        "A client with TLS loses its connection although the old process goes on.",
        "nbdtarget.server.listener:Listener.moved_state",
        (
            (
                "            if moved is not None:\n",
                "            if moved is None:\n                connection.shutdown()\n            else:\n",
            ),
        ),
        ("tests/nbdtarget/server/test_tls.py",),
        hangs=True,
    ),
    Mutant(
        "hand-over-cancelled-after-go",
        "The old process goes on although the new one does: two processes write the same disks.",
        "nbdtarget.daemon.handover.giver:_give",
        (("        channel.send_now(", "        await channel.send("),),
        ("tests/nbdtarget/daemon/handover/test_giver.py",),
    ),
    Mutant(
        "another-disk-opened-after-a-hand-over-failed",
        "A file was renamed, and another one made in its place: clients go on with the other one, without a word.",
        "nbdtarget.dm.handover:Parking._check_names",
        (
            (
                "            if opener.identity(name) != self._disks[name]:\n",
                "            if False:\n",
            ),
        ),
        HANDOVER,
    ),
    Mutant(
        "devices-lost-by-a-hand-over-hang",
        "A device that could not be opened again keeps its clients waiting for ever.",
        "nbdtarget.dm.mapped_device:MappedDevice.fail_without_table",
        (("            self._path.let_go()\n", ""),),
        HANDOVER,
        hangs=True,
    ),
    Mutant(
        "devices-lost-by-a-hand-over-not-tried-again",
        "A device that could not be opened again stays closed when its server is back.",
        "nbdtarget.dm.handover:Parking._undo",
        (
            (
                "                self._registry.reopenings.start(device, attempt)\n",
                "                pass\n",
            ),
        ),
        HANDOVER,
        hangs=True,
    ),
    Mutant(
        "a-disk-that-has-gone-is-closed-for-a-hand-over",
        "An upgrade that can be known to fail takes the disk from its clients.",
        "nbdtarget.daemon.handover.giver:_give",
        (("    await parking.check()\n", ""),),
        ("tests/nbdtarget/daemon/handover/test_giver.py",),
    ),
    Mutant(
        "a-hung-export-uses-all-of-the-budget-up",
        "The clients of an export that is suspended keep those of all others waiting.",
        "nbdtarget.server.shares:Share.is_full",
        (
            (
                "        if writer is None and self._is_used_up(nr_bytes):\n",
                "        if False:\n",
            ),
        ),
        ("tests/nbdtarget/server/test_shares.py",),
    ),
    Mutant(
        "clients-that-stall-hold-a-short-request-up",
        "Others that take no replies use the budget up, and a client that reads 4 KiB waits until they are disconnected.",
        "nbdtarget.server.flow:Flow.bound_met",
        (("or nr_bytes > limits.guaranteed_bytes:", "or True:"),),
        ("tests/nbdtarget/server/test_flow.py",),
    ),
    Mutant(
        "half-a-short-request-never-ends",
        "A client that stops in the middle of a request keeps its connection for ever.",
        "nbdtarget.server.stalls:is_in_the_middle",
        (
            (
                "return is_part or not received.is_plain",
                "return not received.is_plain",
            ),
        ),
        ("tests/nbdtarget/server/test_stalls.py",),
    ),
    Mutant(
        "silent-client-counts-as-stalled",
        "A client that was looked for while it was busy, and is silent now, is disconnected.",
        "nbdtarget.server.stalls:is_in_the_middle",
        (
            (
                "watch.is_noticing and received.begin < received.end",
                "watch.is_noticing",
            ),
        ),
        ("tests/nbdtarget/server/test_stalls.py",),
    ),
    Mutant(
        "next-bytes-not-noticed",
        "A client that goes on slowly is taken for one that stalls, and loses its connection.",
        "nbdtarget.server.connection:Connection._more_came",
        (
            ("        self._flow.moved()\n", ""),
            (
                "        self._start_reading()\n",
                "        self._watch.notice(self._more_came)\n",
            ),
        ),
        ("tests/nbdtarget/server/test_stalls.py",),
    ),
    Mutant(
        "lock-of-a-socket-not-taken",
        "Of two servers that start at once, one takes the other's socket away.",
        "nbdtarget.common.unix_socket:_lock",
        (("            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", ""),),
        UNIX_SOCKET,
    ),
    Mutant(
        "socket-open-before-its-mode",
        "For a moment every user whom the umask lets in may connect.",
        "nbdtarget.common.unix_socket:_bind",
        (("        os.fchmod(sock.fileno(), PRIVATE_MODE)\n", ""),),
        UNIX_SOCKET,
    ),
    Mutant(
        "reads-of-a-source-waited-for-at-the-end",
        "A clone whose source hangs does not end in order: its clients get no answer.",
        "nbdtarget.daemon.daemon:Daemon._give_up_reads",
        (
            (
                "            self.registry.give_up_reads()\n            await sleep(",
                "            await sleep(",
            ),
        ),
        STOP,
    ),
    Mutant(
        "end-says-all-is-committed",
        "A disk could not be committed, and the exit status says that it was.",
        "nbdtarget.daemon.daemon:Daemon._say_uncommitted",
        (("        self.is_committed = not names\n", ""),),
        STOP,
    ),
    Mutant(
        "fua-of-a-small-write-dropped",
        "The hot loop forgets FUA: an acknowledged FUA write is lost.",
        "nbdtarget.server.requests:Requests.serve",
        (
            (
                "bio.offset, bio.length, bio.flags = offset, length, flags",
                "bio.offset, bio.length, bio.flags = offset, length, 0",
            ),
        ),
        REQUESTS,
    ),
    Mutant(
        "fua-of-a-large-write-dropped",
        "A WRITE with a buffer of its own loses its FUA.",
        "nbdtarget.server.requests:Requests._take_large_write",
        (
            (
                "length, payload, flags & FUA, ended",
                "length, payload, 0, ended",
            ),
        ),
        REQUESTS,
    ),
    Mutant(
        "fua-of-zeroes-dropped",
        "WRITE_ZEROES and TRIM lose their FUA.",
        "nbdtarget.server.commands:bio_flags_of",
        (("    bio_flags = flags & FUA\n", "    bio_flags = 0\n"),),
        REQUESTS,
    ),
    Mutant(
        "flush-replied-without-a-flush",
        "A FLUSH carries no bytes, so there is nothing to do: it is answered at once.",
        "nbdtarget.server.requests:Requests._take",
        (
            (
                "        elif not length and command != CMD_FLUSH:",
                "        elif not length:",
            ),
        ),
        REQUESTS,
    ),
    Mutant(
        "flush-replied-before-it-ends",
        "A FLUSH is answered when the device has it, not when the device has ended it.",
        "nbdtarget.server.in_flight:InFlight",
        (
            (
                "        self.submit(bio)\n        output = self._output\n",
                "        self.submit(bio)\n        output = self._output\n"
                "        if bio.op == OP_FLUSH:\n"
                "            request = bio.private\n"
                "            assert isinstance(request, Request)\n"
                "            at = request.cookie, request.offset\n"
                "            self._answers.done(at, request.command)\n",
            ),
            (
                "                self._answers.done(at, request.command)\n",
                "                if bio.op != OP_FLUSH:\n"
                "                    self._answers.done(at, request.command)\n",
            ),
        ),
        REQUESTS,
    ),
    Mutant(
        "write-replied-before-it-ends",
        "A WRITE that the device still works on is answered: the next FLUSH may miss it.",
        "nbdtarget.server.in_flight:InFlight",
        (
            (
                "        self._bios.add(bio)\n\n    def writes",
                "        self._bios.add(bio)\n"
                "        if command == 1:\n"
                "            self._answers.done((cookie, offset), command)\n"
                "\n    def writes",
            ),
            (
                "                self._answers.done(at, request.command)\n",
                "                if request.command != 1 or request.buffer:\n"
                "                    self._answers.done(at, request.command)\n",
            ),
        ),
        REQUESTS,
    ),
    Mutant(
        "late-error-answered-as-success",
        "A request that fails after a while is answered with success.",
        "nbdtarget.server.in_flight:InFlight.ended",
        (
            (
                "            if bio.status:\n                self._give_back(request)\n",
                "            if bio.status < 0:\n                self._give_back(request)\n",
            ),
        ),
        REQUESTS,
    ),
    Mutant(
        "inline-error-answered-as-success",
        "A request that fails at once is answered with success.",
        "nbdtarget.server.requests:Requests._not_inline",
        (
            (
                "        if bio.status > 0:\n",
                "        if bio.status > 0 and command == CMD_WRITE:\n"
                "            self._answers.done((cookie, offset), command)\n"
                "            return bio\n"
                "        if bio.status > 0:\n",
            ),
        ),
        REQUESTS,
    ),
    Mutant(
        "borrowed-payload-not-checked",
        "A device that keeps a borrowed payload goes unnoticed, and writes garbage later.",
        "nbdtarget.server.in_flight:InFlight.adopt",
        (
            (
                "        if bio.borrowed:\n",
                "        if bio.borrowed and bio.status > 0:\n",
            ),
        ),
        REQUESTS,
    ),
    Mutant(
        "device-released-under-bios",
        "A client hangs up, and the device is let go while its writes are under way.",
        "nbdtarget.server.connection:Connection.maybe_release",
        (
            (
                "                self._sock.close()\n            return\n",
                "                self._sock.close()\n",
            ),
        ),
        REQUESTS,
    ),
    Mutant(
        "closed-connection-keeps-its-memory",
        "200 clients that come and go cost the server a gigabyte, until the garbage collector runs.",
        "nbdtarget.server.flow:Flow.close",
        (("        self._pause = self._resume = _nothing\n", ""),),
        ("tests/nbdtarget/server/test_memory_of_the_closed.py",),
    ),
    Mutant(
        "pause-forgets-the-line",
        "A connection that waits for the budget is never woken again.",
        "nbdtarget.server.flow:Flow.pause",
        (
            (
                "                self._budget.wait(self._budget_shrank)\n",
                "                pass\n",
            ),
        ),
        ("tests/nbdtarget/server/test_flow.py",),
    ),
    Mutant(
        "budget-not-given-back",
        "Each late reply costs a piece of the budget, until the server stands still.",
        "nbdtarget.server.flow:Flow.end_request",
        (("        self._budget.give_back(1, 0)\n", "        pass\n"),),
        REQUESTS,
        hangs=True,
    ),
    Mutant(
        "gate-forgotten-while-a-client-attaches",
        "The last old connection takes the gate with it: writes of the new one overtake and undo others.",
        "nbdtarget.server.gate:Gate.join",
        (
            (
                "        self._members.append(member)\n        for each in older:\n"
                "            each.settle()\n",
                "        for each in older:\n"
                "            each.settle()\n        self._members.append(member)\n",
            ),
        ),
        ("tests/nbdtarget/server/test_gate.py",),
    ),
    Mutant(
        "younger-write-does-not-wait",
        "A write overtakes one of a connection that has gone: an acknowledged write is undone.",
        "nbdtarget.server.gate:Gate.submit",
        (
            (
                "elders = [] if op in (OP_FLUSH, OP_CACHE) else self._overlapped(bio)",
                "elders = []",
            ),
        ),
        GATE,
    ),
    Mutant(
        "disc-forgets-writes-in-flight",
        "What is in flight when a client says DISC, or closes, is not waited for.",
        "nbdtarget.server.connection:Connection.disc",
        (
            (
                "        if self._requests is not None:\n            self._gate().leave(self)\n        if not self._is_sh",
                "        if not self._is_sh",
            ),
        ),
        GATE,
    ),
    Mutant(
        "socket-closed-before-its-writes-end",
        "A client sees EOF, connects again, and its old write comes after its new one.",
        "nbdtarget.server.connection:Connection.maybe_release",
        (("if any(self.writes_in_flight()):", "if False:"),),
        GATE,
    ),
)
