# SPDX-License-Identifier: Apache-2.0
"""Mutants of what stands around the compiled fast path: when it may be taken, and what it leaves behind."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["FAST"]

TURNS: Final = ("tests/nbdtarget/server/test_fast_turn.py",)

FAST: Final = (
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
)
