# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget top` shows the figures, clients and events of a server."""

import subprocess
from pathlib import Path

from nbdtarget.control import messages as m
from nbdtarget.control.client import ControlClient
from tests.support.clients import refused
from tests.support.patience import PATIENCE_S
from tests.support.plain_client import PlainClient
from tests.support.processes import NBDTARGET, ServerProcess


def test_devices_clients_and_events(tmp_path: Path) -> None:
    path, control = tmp_path / "nbd.sock", tmp_path / "control.sock"
    argv = [NBDTARGET, "serve", "--listen", f"unix:{path}", "--control", str(control)]
    server = ServerProcess(argv, sockets=[path], log=tmp_path / "log")
    create = m.Create("web", "0 2048 linear memory:1M 0")
    ControlClient(control).ask("create", create, m.Done)
    top = [NBDTARGET, "top", "-n", "2", "-d", "0.2", "--control", str(control)]
    with PlainClient(path, "web") as client:
        client.read(0, 4096)
        done = subprocess.run(
            top, capture_output=True, text=True, check=True, timeout=PATIENCE_S
        )
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert any(line.startswith("web 1.0 MiB active linear") for line in lines)
    assert "1 clients" in lines
    assert any(" on web (uid:" in line for line in lines)
    assert any(line.endswith("info web: resumed") for line in lines)
    assert server.terminate() == 0


def test_without_a_server(tmp_path: Path) -> None:
    said = refused([NBDTARGET, "top", "--control", str(tmp_path / "none.sock")])
    assert "no server on" in said
