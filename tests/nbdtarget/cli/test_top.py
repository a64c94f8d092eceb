# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget top` shows the figures, clients and events of a server."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from nbdtarget.cli import top
from nbdtarget.cli.top import sparkline
from nbdtarget.control import messages as m
from nbdtarget.control.client import ControlClient
from nbdtarget.control.figures import (
    History,
    HistoryAnswer,
    Moment,
    OperationFigures,
)
from tests.support.clients import refused
from tests.support.figures import figures_of
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
    assert "Requests a second, the last 5 minutes" in lines
    assert "1 clients" in lines
    assert any(" on web (uid:" in line for line in lines)
    assert any(line.endswith("info web: resumed") for line in lines)
    assert server.terminate() == 0


SHOW_CURSOR = b"\x1b[?25h"
LEAVE_SCREEN = b"\x1b[?1049l"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_terminal_is_given_back(tmp_path: Path, number: signal.Signals) -> None:
    control = tmp_path / "control.sock"
    argv = [NBDTARGET, "serve", "--listen", f"unix:{tmp_path}/nbd.sock"]
    server = ServerProcess(
        [*argv, "--control", str(control)], sockets=[control], log=tmp_path / "log"
    )
    ours, its = os.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    top = subprocess.Popen(
        [NBDTARGET, "top", "-d", "60", "--control", str(control)],
        stdin=its,
        stdout=its,
        stderr=its,
        env=environment,
        start_new_session=True,
    )
    os.close(its)
    shown = b""
    while b"clients" not in shown:  # if the command ends first, the read fails (EIO)
        shown += os.read(ours, 65536)
    assert SHOW_CURSOR not in shown
    top.send_signal(number)
    with contextlib.suppress(OSError):  # EIO: nothing has it open any more
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    assert top.wait() == (0 if number == signal.SIGINT else 128 + number)
    assert SHOW_CURSOR in shown
    assert LEAVE_SCREEN in shown
    assert server.terminate() == 0


def test_without_a_server(tmp_path: Path) -> None:
    said = refused([NBDTARGET, "top", "--control", str(tmp_path / "none.sock")])
    assert "no server on" in said


def test_the_first_screen_has_what_the_server_has_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = figures_of()
    now.time_s = 1_000_000.0
    now.devices[0].operations["read"] = OperationFigures(2500, 2500 * 4096, 2.5)
    moments = (
        Moment(now.time_s - 10, {}),
        Moment(now.time_s - 5, {"read": OperationFigures(500, 500 * 4096, 0.5)}),
    )
    answers = {"figures": now, "history": HistoryAnswer(5.0, moments)}
    asked = []

    def ask(_: str | None, verb: str, request: object, __: type) -> object:
        asked.append((verb, request))
        return answers[verb]

    monkeypatch.setattr(top, "ask", ask)
    monkeypatch.setattr(top, "addresses", lambda _: [Path("/none.sock")])
    monkeypatch.setattr(top, "_last_events", lambda _: [])
    top.top(count=1)
    assert asked[1:] == [("history", History("d"))]
    printed = capsys.readouterr().out
    assert "400/s 1.6 MiB/s" in " ".join(printed.split())
    (line,) = [each for each in printed.splitlines() if "at most" in each]
    cells = line.removeprefix("d ")[:60]
    assert cells.strip() in (".#", "▃█", "▂█")
    assert line.endswith("at most 400/s")


def test_a_sparkline_is_as_high_as_its_largest_number() -> None:
    assert sparkline([None, 0, 1, 4, 8, 7.9], "12345678") == "  2588"
    assert sparkline([None, 0.0], "12345678") == "  "
