# SPDX-License-Identifier: Apache-2.0
"""A command that runs while the server serves, and whose end is the server's end."""

import asyncio
import signal
from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.daemon import client_command
from nbdtarget.daemon.client_command import ClientCommand, attach_variables


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (
            "nbd+unix:///d?socket=/run/a%20b.sock",
            {"unixsocket": "/run/a b.sock", "port": "", "exportname": "d"},
        ),
        (
            "nbd://127.0.0.1:10810/d",
            {"unixsocket": "", "port": "10810", "exportname": "d"},
        ),
        (
            "nbds+vsock://2:4000000000/d",
            {"unixsocket": "", "port": "4000000000", "exportname": "d"},
        ),
        (
            "nbd+vsock://2:4294967294/d",
            {"unixsocket": "", "port": "4294967294", "exportname": "d"},
        ),
    ],
)
def test_variables_say_how_to_attach(uri: str, expected: dict[str, str]) -> None:
    assert attach_variables(uri, "d") == {"uri": uri, **expected}


class Running:
    """A command, and an event that its end sets."""

    def __init__(self, line: str) -> None:
        self.has_ended = asyncio.Event()
        self.command = ClientCommand(line, self.has_ended.set)

    async def start(self) -> ClientCommand:
        await self.command.start("nbd://localhost:1/d", "d")
        return self.command


@pytest.mark.parametrize(
    ("line", "status"),
    [("exit 7", 7), ("true", 0), ("kill -KILL $$", 128 + signal.SIGKILL)],
)
async def test_its_exit_status_is_a_shells(line: str, status: int) -> None:
    running = Running(line)
    command = await running.start()
    await running.has_ended.wait()
    assert command.status == status
    await command.end()


async def test_it_finds_the_export_and_not_what_is_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    out = tmp_path / "out"
    running = Running(
        f'echo "$uri $exportname $port [$LISTEN_FDS$NOTIFY_SOCKET]" >{out}'
    )
    await running.start()
    await running.has_ended.wait()
    assert out.read_text() == "nbd://localhost:1/d d 1 []\n"


async def test_end_is_told_to_it_first_by_sigterm() -> None:
    running = Running("trap 'exit 3' TERM; while :; do sleep 0.01; done")
    command = await running.start()
    await asyncio.sleep(0.05)  # until the shell has set its trap
    assert command.status is None
    await command.end()
    assert running.has_ended.is_set()
    assert command.status in (3, 128 + signal.SIGTERM)


async def test_one_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_command, "END_S_MAX", 0.05)
    running = Running("trap '' TERM; while :; do sleep 0.01; done")
    command = await running.start()
    await asyncio.sleep(0.05)
    while command.status is None:
        await command.end()
    # The signal may have come before the trap.
    assert command.status in (128 + signal.SIGKILL, 128 + signal.SIGTERM)


async def test_end_without_a_start_does_nothing() -> None:
    running = Running("true")
    await running.command.end()
    assert running.command.status is None


async def test_without_a_shell_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_command, "SHELL", "/nonexistent/sh")
    with pytest.raises(NbdTargetError, match="--run: /nonexistent/sh: No such file"):
        await Running("true").start()
