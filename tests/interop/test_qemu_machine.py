# SPDX-License-Identifier: Apache-2.0
"""QEMU's machine, without a guest, as the client: what `qemu-iotests` 094 and 119 do, whose own way needs a QEMU built with qtest."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from tests.support.clients import MIB, NAME, CloneUnderTest, needs
from tests.support.patience import PATIENCE_S

pytestmark = [
    pytest.mark.interop,
    pytest.mark.long,
    needs("qemu-system-x86_64"),
]

MACHINE = "qemu-system-x86_64 -S -machine none -display none -nodefaults -qmp stdio"


class Monitor:
    """QEMU's control connection."""

    def __init__(self, ask: IO[str], answers: IO[str]) -> None:
        self._ask, self._answers = ask, answers
        self.said: list[str] = []
        self._events: list[str] = []

    def _receive(self) -> dict[str, Any]:
        line = self._answers.readline()
        assert line, f"QEMU has ended: {self.said}"
        self.said.append(line)
        message: dict[str, Any] = json.loads(line) if line[0] == "{" else {}
        assert "error" not in message, message
        if "event" in message:
            self._events.append(message["event"])
        return message

    def until(self, event: str) -> None:
        """Wait for an event, which may have come before the answer to the command that brings it about."""
        while event not in self._events:
            self._receive()

    def execute(self, command: str, **arguments: object) -> None:
        words = {"execute": command, "arguments": arguments}
        self._ask.write(json.dumps(words) + "\n")
        while "return" not in self._receive():
            pass


@contextmanager
def machine(*drive: str) -> Iterator[Monitor]:
    """A machine with one drive, which is to end well."""
    argv = [*MACHINE.split(), "-drive", ",".join(drive)]
    with subprocess.Popen(
        argv, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            monitor = Monitor(process.stdin, process.stdout)
            monitor.execute("qmp_capabilities")
            yield monitor
            monitor.execute("quit")
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def test_drive_is_mirrored_into_an_export(
    clone: CloneUnderTest, tmp_path: Path
) -> None:
    image = tmp_path / "mirrored.img"
    content = os.urandom(MIB) + bytes(len(clone.content) - MIB)
    image.write_bytes(content)
    with (
        clone.serve("--no-hydration"),
        machine("if=none", "id=src", f"file={image}", "format=raw") as monitor,
    ):
        monitor.execute(
            "drive-mirror",
            device="src",
            target=clone.uri,
            format="nbd",
            sync="full",
            mode="existing",
        )
        monitor.until("BLOCK_JOB_READY")
        monitor.execute("block-job-complete", device="src")
        monitor.until("BLOCK_JOB_COMPLETED")
    clone.hydrate()
    assert clone.dest.read_bytes() == content


def test_export_is_opened_by_the_protocol_alone(clone: CloneUnderTest) -> None:
    uri = f"nbd+unix:///{NAME}?socket={clone.socket}"
    with (
        clone.serve("--no-hydration"),
        machine("if=none", "id=drv", f"file={uri}", "driver=nbd") as monitor,
    ):
        for line in ("write -P 5 0 64k", "flush", "read -P 5 0 64k"):
            command = f'qemu-io drv "{line}"'
            monitor.execute("human-monitor-command", **{"command-line": command})
    said = "".join(monitor.said)
    assert said.count("65536/65536 bytes at offset 0") == 2
    assert "failed" not in said
