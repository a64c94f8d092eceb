# SPDX-License-Identifier: Apache-2.0
"""The new process of a hand-over: how it has ended, and what it said last."""

import socket
import sys

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.daemon.handover import program as module
from nbdtarget.daemon.handover.channel import EndedError
from nbdtarget.daemon.handover.program import Program
from tests.support.patience import PATIENCE_S, attempts


async def started(script: str) -> tuple[Program, socket.socket]:
    """A new process that runs `script`, and our end of the channel."""
    ours, theirs = socket.socketpair()
    with theirs:
        program = await Program.start(
            [sys.executable, "-c", f"import os, signal, sys\n{script}"], theirs
        )
    return program, ours


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("", "ended with status 0 before it was ready; it said nothing"),
        ("os.kill(os.getpid(), 9)", "ended by SIGKILL before it was ready; it said n"),
        ("os.kill(os.getpid(), 40)", "ended by signal 40 before it was ready; it sa"),
        ("sys.exit('no disk\\n\\n')", "ended with status 1 before it was ready; its l"),
    ],
)
async def test_it_says_how_it_has_ended(script: str, words: str) -> None:
    program, ours = await started(script)
    with ours:
        error = await program.end(EndedError("it has gone"))
    assert str(error).startswith(f"the new program {words}")
    assert program.process.returncode is not None


async def test_last_words_are_bounded_and_move_no_cursor() -> None:
    script = "sys.stderr.write('https://a:secret@h/ ' * 999 + '\\x1b[31m\\n\\n')"
    program, ours = await started(script)
    with ours:
        said = str(await program.end(EndedError("it has gone")))
    assert said.endswith("https://***@h/ \\x1b[31m")
    assert "secret" not in said
    assert len(said) < module.LAST_BYTES_MAX + 100


async def test_only_the_last_lines_are_said() -> None:
    program, ours = await started("[print(n, file=sys.stderr) for n in range(99)]")
    with ours:
        said = str(await program.end(EndedError("it has gone")))
    assert said.endswith("its last lines: 95 / 96 / 97 / 98")


async def test_program_that_goes_on_without_its_end_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ENDED_S_MAX", 0.01)
    program, ours = await started("signal.pause()")
    with ours:
        error = await program.end(EndedError("it has gone"))
    assert "closed its end before it was ready" in str(error)
    assert program.process.returncode == -9


async def test_another_error_stays(capfd: pytest.CaptureFixture[str]) -> None:
    program, ours = await started("signal.pause()")
    error = NbdTargetError("no disk")
    with ours:
        assert await program.end(error) is error
        assert await program.end(error) is error
    assert capfd.readouterr().err == ""


async def test_words_are_passed_on_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    program, ours = await started("os.write(2, b'hello\\n'); sys.stdin.read()")
    heard = ""
    with ours:
        async for _ in attempts():
            heard += capfd.readouterr().err
            if heard:
                break
        program.let_go()
        program.process.kill()
        program.process.wait(PATIENCE_S)
    assert heard == "hello\n"
