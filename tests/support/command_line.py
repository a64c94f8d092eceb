# SPDX-License-Identifier: Apache-2.0
"""Running commands in the process of the tests."""

import contextlib
import io
from typing import NamedTuple

import pytest

from nbdtarget.cli.app import run
from nbdtarget.control.messages import InfoLine

__all__ = ["CommandLine", "Ended", "in_process", "line"]


class Ended(NamedTuple):
    """How a command ended, named as those of `subprocess.run`."""

    returncode: int
    stdout: str
    stderr: str


def in_process(*argv: str) -> Ended:
    """Run a command that asks a server, in this process, with its environment and folder.

    A process of its own takes longer to start than the command takes.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(list(argv))
    return Ended(status, out.getvalue(), err.getvalue())


class CommandLine:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *argv: str, status: int = 0) -> str:
        """Run a command that must end with `status`. Returns stdout, or stderr if it fails."""
        assert run(list(argv)) == status
        out, err = self._capsys.readouterr()
        if status:
            assert out == ""
            assert err.count("\n") == 1
            assert err.startswith("nbdtarget: ")
            return err
        assert err == ""
        return out


def line(name: str, minor: int, **more: object) -> InfoLine:
    facts: dict[str, object] = {
        "uuid": "",
        "state": "ACTIVE",
        "read_only": False,
        "failed": False,
        "live": True,
        "inactive": False,
        "open_count": 0,
        "event_nr": 0,
        "major": 253,
        "nr_targets": 1,
        "size": 2048 * 512,
    }
    return InfoLine(name=name, minor=minor, **{**facts, **more})  # type: ignore[arg-type]
