# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of the command line."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.control.api import ControlServer
from nbdtarget.control.verbs import Verbs
from nbdtarget.dm.registry import Registry
from tests.support.command_line import CommandLine
from tests.support.dm import make_registry
from tests.support.metadata_tool import Tool


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Tool:
    return Tool(capsys, tmp_path)


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> CommandLine:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("NBDTARGET_CONTROL", raising=False)
    return CommandLine(capsys)


@pytest.fixture
def registry(cli: CommandLine, tmp_path: Path) -> Iterator[Registry]:
    """A server in a thread, over RAM devices /a, /b and /c of 32 MiB."""
    registry, _ = make_registry(a=32 << 20, b=32 << 20, c=32 << 20)
    loop = asyncio.new_event_loop()
    server = ControlServer(Verbs(registry), tmp_path / "nbdtarget" / "control.sock")
    loop.run_until_complete(server.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield registry
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(server.close())
    loop.run_until_complete(registry.close())
    loop.close()
