# SPDX-License-Identifier: Apache-2.0
"""Running commands in the process of the tests."""

import pytest

from nbdtarget.cli.app import run
from nbdtarget.control.messages import InfoLine

__all__ = ["CommandLine", "line"]


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
