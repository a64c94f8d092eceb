# SPDX-License-Identifier: Apache-2.0
"""stderr of a process that takes over from another one."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from nbdtarget.cli.logs import is_journal
from nbdtarget.cli.progress.common import is_terminal
from nbdtarget.common.passed_stderr import (
    STDERR_VARIABLE,
    restore_stderr,
    stderr_to_be,
)

CHILD = """
import os
from nbdtarget.common.passed_stderr import keep_from_children, restore_stderr
keep_from_children()
os.write(2, b"before\\n")
restore_stderr()
os.write(2, b"after\\n")
os.execvp("sh", ["sh", "-c", "echo $NBDTARGET_HANDOVER_STDERR; ls /proc/self/fd | wc -w"])
"""


def test_stderr_is_a_pipe_first_and_then_what_it_is_to_be(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as log:
        ended = subprocess.run(
            [sys.executable, "-c", CHILD],
            capture_output=True,
            check=True,
            pass_fds=(log.fileno(),),
            env={**os.environ, STDERR_VARIABLE: str(log.fileno())},
        )
    assert ended.stderr == b"before\n"
    assert (tmp_path / "log").read_text() == "after\n"
    # 0, 1, 2, and the directory itself.
    assert ended.stdout == b"\n4\n"


def test_without_another_process_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STDERR_VARIABLE, raising=False)
    before = os.fstat(2)
    restore_stderr()
    assert stderr_to_be() is None
    assert os.fstat(2).st_ino == before.st_ino


def test_lines_suit_the_stderr_that_is_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with open(tmp_path / "journal", "w") as journal, open(tmp_path / "2", "w") as pipe:
        there = os.fstat(journal.fileno())
        environment = {"JOURNAL_STREAM": f"{there.st_dev}:{there.st_ino}"}
        assert not is_journal(pipe, environment)
        environment[STDERR_VARIABLE] = str(journal.fileno())
        assert is_journal(pipe, environment)
        monkeypatch.setenv(STDERR_VARIABLE, str(journal.fileno()))
        assert not is_terminal()
    ours, theirs = pty.openpty()
    monkeypatch.setenv(STDERR_VARIABLE, str(theirs))
    assert is_terminal()
    os.close(ours)
    os.close(theirs)
