# SPDX-License-Identifier: Apache-2.0
"""Options that each command that serves has, with real servers."""

import http.client
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE_S
from tests.support.processes import NBDTARGET, ServerProcess

MIB = 1 << 20
TOKENS = {"full": "correct-horse-battery", "look": "only-a-quick-look-please"}
# By command: what stands behind it.
COMMANDS = {
    "serve": (),
    "export": ("disk.img",),
    "clone": ("disk.img", "new.img", "--no-hydration"),
    "cache": ("disk.img", "cache.img", "--cache-size", "1M"),
    "scratch": ("disk.img", "--store", "memory"),
}


QUICK = ("serve", "export")  # the others are among the long tests


@contextmanager
def serving(folder: Path, command: str, *options: str) -> Iterator[Path]:
    """Start a server whose disks are in `folder`. Yields the path of its metrics' socket."""
    (folder / "disk.img").write_bytes(os.urandom(MIB))
    disks = [
        str(folder / word) if word.endswith(".img") else word
        for word in COMMANDS[command]
    ]
    nbd, control, metrics = folder / "nbd", folder / "control", folder / "metrics"
    sockets = ["--listen", f"unix:{nbd}", "--control", str(control)]
    server = ServerProcess(
        [NBDTARGET, command, *disks, *sockets, "--metrics", str(metrics), *options],
        sockets=[nbd, control, metrics],
        log=folder / "log",
    )
    yield metrics
    assert server.terminate() == 0, server.log.read_text()
    assert not metrics.exists()


def get(path: Path, url: str, token: str | None = None) -> tuple[int, str]:
    """Returns the status and the body."""
    connection = http.client.HTTPConnection("localhost", timeout=PATIENCE_S)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    connection.request("GET", url, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


@pytest.mark.parametrize(
    "command",
    [
        *QUICK,
        *(
            pytest.param(each, marks=pytest.mark.long)
            for each in COMMANDS
            if each not in QUICK
        ),
    ],
)
def test_metrics_have_an_address_of_their_own(tmp_path: Path, command: str) -> None:
    with serving(tmp_path, command, "--limit", "connections_max=7") as metrics:
        status, text = get(metrics, "/metrics")
        assert status == 200
        nr = 0 if command == "serve" else 1
        assert f"\nnbdtarget_devices {nr}\n" in text
        assert '\nnbdtarget_limit{bound="connections_max"} 7\n' in text
        assert ("\nnbdtarget_device_size_bytes{" in text) == (nr == 1)
        for url in ("/", "/v1/info", "/v1/version"):
            assert get(metrics, url)[0] == 404


@pytest.mark.parametrize(
    "command", ["export", pytest.param("scratch", marks=pytest.mark.long)]
)
def test_metrics_may_leave_out_devices(tmp_path: Path, command: str) -> None:
    with serving(tmp_path, command, "--no-metrics-devices") as metrics:
        for path in (metrics, tmp_path / "control"):
            text = get(path, "/metrics")[1]
            assert "\nnbdtarget_devices 1\n" in text
            assert "nbdtarget_device_size_bytes" not in text


def test_two_tokens_from_files(tmp_path: Path) -> None:
    options = []
    for option, kind in (("control-token", "full"), ("control-read-token", "look")):
        (tmp_path / kind).write_text(TOKENS[kind])
        options += [f"--{option}-file", str(tmp_path / kind)]
    with serving(tmp_path, "serve", *options):
        control = tmp_path / "control"
        assert get(control, "/v1/info")[0] == 401
        for token in TOKENS.values():
            assert get(control, "/v1/info", token)[0] == 200
