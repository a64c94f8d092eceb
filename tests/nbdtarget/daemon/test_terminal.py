# SPDX-License-Identifier: Apache-2.0
"""SIGHUP without a configuration file: certificates are read again, unless it says that the terminal is closed."""

import asyncio
import logging
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nbdtarget.daemon import daemon as module
from nbdtarget.daemon.daemon import Daemon
from nbdtarget.daemon.security import Security, SecurityOptions
from nbdtarget.server.tls import TlsOptions
from tests.support.certificates import authority, needs_openssl
from tests.support.patience import PATIENCE_S, wait_until

LOOK = """
import signal, sys
from nbdtarget.daemon.terminal import has_terminal
signal.signal(signal.SIGHUP, lambda *_: (open(sys.argv[1], "w").write(str(has_terminal())), sys.exit(0)))
print(has_terminal(), flush=True)
signal.pause()
"""


async def hang_up(server: Daemon) -> None:
    os.kill(os.getpid(), signal.SIGHUP)
    came = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, came.set)
    os.kill(os.getpid(), signal.SIGUSR1)
    async with asyncio.timeout(PATIENCE_S):
        await came.wait()
    loop.remove_signal_handler(signal.SIGUSR1)


@needs_openssl
@pytest.mark.parametrize(
    ("before", "after", "stops"),
    [(False, False, False), (True, True, False), (True, False, True)],
    ids=["no terminal", "terminal stays", "terminal closed"],
)
async def test_sighup_has_certificates_read_again_unless_the_terminal_is_closed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: bool,
    after: bool,
    stops: bool,
) -> None:
    directory = Path(shutil.copytree(authority()[1], tmp_path / "pki"))
    server = Daemon(
        security=Security(SecurityOptions(TlsOptions("on", str(directory))))
    )
    terminal = [before]
    monkeypatch.setattr(module, "has_terminal", lambda: terminal[0])
    server.catch_signals()
    terminal[0] = after
    old = server.security.tls.context
    try:
        await hang_up(server)
        assert server.stop.is_set() == stops
        assert (server.security.tls.context is old) == stops
    finally:
        server.release_signals()
        await server.close()


@needs_openssl
async def test_sighup_says_that_certificates_were_read_only_if_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    directory = Path(shutil.copytree(authority()[1], tmp_path / "pki"))
    options = SecurityOptions(TlsOptions("on", str(directory)))
    server = Daemon(security=Security(options))
    server.catch_signals()
    try:
        await hang_up(server)
        assert "the certificates were read again" in caplog.text
        caplog.clear()
        (directory / "server-cert.pem").write_text("")
        await hang_up(server)
        assert "certificates not reloaded" in caplog.text
        assert "were read again" not in caplog.text
        assert not server.stop.is_set()
    finally:
        server.release_signals()
        await server.close()


async def test_sighup_stops_a_server_without_certificates() -> None:
    server = Daemon()
    server.catch_signals()
    try:
        await hang_up(server)
        assert server.stop.is_set()
    finally:
        server.release_signals()
        await server.close()


def test_terminal_that_is_closed_is_gone_when_sighup_comes(
    tmp_path: Path,
) -> None:
    master, slave = pty.openpty()
    said = tmp_path / "said"
    process = subprocess.Popen(
        [sys.executable, "-c", LOOK, str(said)],
        stdin=slave,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: os.close(
            os.open(os.ttyname(0), os.O_RDWR)
        ),  # it becomes the terminal
    )
    os.close(slave)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    os.close(master)
    wait_until(lambda: said.exists() and said.read_text() != "")
    assert said.read_text() == "False"
    process.wait(PATIENCE_S)
    process.stdout.close()
