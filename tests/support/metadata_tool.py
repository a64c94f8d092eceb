# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget metadata`, as the tests run it."""

from pathlib import Path

import pytest

from nbdtarget.cli.app import run

__all__ = ["Tool"]


class Tool:
    """Runs `nbdtarget metadata` in this process, in a directory of its own."""

    def __init__(self, capsys: pytest.CaptureFixture[str], directory: Path) -> None:
        self._capsys = capsys
        self.directory = directory

    def __call__(self, *argv: str, status: int = 0) -> tuple[str, str]:
        """Run a tool that must end with `status`. Returns stdout and stderr."""
        assert run(["metadata", *argv]) == status
        return self._capsys.readouterr()

    def fails(self, *argv: str) -> str:
        """Run a tool that must fail in one line and print nothing. Returns the line."""
        out, err = self(*argv, status=1)
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("nbdtarget: ")
        return err

    def reads(self, tool: str, path: str) -> list[str]:
        """The arguments with which a tool reads `path`."""
        if tool == "repair":
            return ["repair", "-i", path, "-o", str(self.directory / "repaired")]
        if tool == "restore":
            return ["restore", "-i", path, "-o", str(self.directory / "restored")]
        return [tool, path]

    def file(self, content: bytes, name: str = "meta") -> str:
        path = self.directory / name
        path.write_bytes(content)
        return str(path)
