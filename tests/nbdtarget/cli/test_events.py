# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget events`: past events, and new ones as they come."""

import json
import subprocess
from pathlib import Path

import pytest

from nbdtarget.control import messages as m
from nbdtarget.control.client import ControlClient
from tests.support.clients import refused
from tests.support.patience import PATIENCE_S
from tests.support.processes import NBDTARGET, ServerProcess


@pytest.mark.long
def test_events_are_printed_and_followed(tmp_path: Path) -> None:
    path, control = tmp_path / "nbd.sock", tmp_path / "control.sock"
    argv = [NBDTARGET, "serve", "--listen", f"unix:{path}", "--control", str(control)]
    server = ServerProcess(argv, sockets=[path], log=tmp_path / "log")
    client = ControlClient(control)
    client.ask("create", m.Create("web", "0 8 zero"), m.Done)
    client.ask("create", m.Create("db", "0 8 zero"), m.Done)
    client.ask("suspend", m.Suspend("db"), m.Done)
    events = [NBDTARGET, "events", "--control", str(control)]

    def printed(*words: str) -> list[str]:
        done = subprocess.run(
            [*events, *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE_S,
        )
        return done.stdout.splitlines()

    (line,) = printed("db", "--last", "1")
    assert line.endswith("info     db: suspended")
    found = [json.loads(line) for line in printed("--json")]
    assert [each["nr"] for each in found] == sorted(each["nr"] for each in found)
    assert {"web", "db"} <= {each["device"] for each in found}

    follower = subprocess.Popen(
        [*events, "--follow", "--last", "1", "--json", "db"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follower.stdout is not None
    assert json.loads(follower.stdout.readline())["text"] == "suspended"
    client.ask("suspend", m.Suspend("web"), m.Done)
    client.ask("resume", m.Resume("db"), m.Done)
    following = json.loads(follower.stdout.readline())
    assert (following["device"], following["text"]) == ("db", "resumed")
    assert server.terminate() == 0
    _, said = follower.communicate(timeout=PATIENCE_S)
    assert follower.returncode == 1
    assert "the server went away" in said or "no server on" in said
    # The log has none of these events: without --verbose it has warnings only.
    assert (tmp_path / "log").read_text().count("suspended") == 0


def test_without_a_server(tmp_path: Path) -> None:
    said = refused([NBDTARGET, "events", "--control", str(tmp_path / "none.sock")])
    assert "no server on" in said
