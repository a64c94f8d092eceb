# SPDX-License-Identifier: Apache-2.0
"""Running commands in the process of the tests."""

import pytest

from nbdtarget.cli.app import run

__all__ = ["CommandLine"]


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
