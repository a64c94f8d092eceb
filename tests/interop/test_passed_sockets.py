# SPDX-License-Identifier: Apache-2.0
"""Sockets that a service manager passes, by name, to each command that serves: NBD, control and metrics."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE_S
from tests.support.plain_client import PlainClient
from tests.support.processes import NBDTARGET

pytestmark = [pytest.mark.interop, pytest.mark.long]

MIB = 1 << 20
ROLES = ("metrics", "nbd", "control")  # in another order than the manual names them

# A service manager passes sockets in this way: they become descriptors 3, 4 and 5, and the process is told their names.
PASS_SOCKETS = """
import fcntl, os, sys
fds = [int(number) for number in sys.argv[1].split(",")]
for target, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in fds], 3):
    os.dup2(fd, target)
    os.close(fd)
os.environ.update(LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=sys.argv[2], LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[3], sys.argv[3:])
"""


@contextmanager
def passed_to(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A server that is started with three sockets, named after their roles, in `folder`."""
    sockets = [socket.socket(socket.AF_UNIX) for _ in ROLES]
    try:
        for each, role in zip(sockets, ROLES, strict=True):
            each.bind(str(folder / role))
            each.listen()
        fds = [each.fileno() for each in sockets]
        shown = ",".join(map(str, fds)), ":".join(ROLES)
        argv = [sys.executable, "-c", PASS_SOCKETS, *shown, NBDTARGET, *words]
        runtime = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
        with subprocess.Popen(
            argv, pass_fds=fds, env=runtime, stderr=subprocess.PIPE, text=True
        ) as server:
            try:
                yield server
            finally:
                server.kill()
    finally:
        for each in sockets:
            each.close()


def command(folder: Path, kind: str) -> tuple[str, ...]:
    for name in ("source", "dest", "fast"):
        (folder / name).write_bytes(bytes(MIB))
    table = f"0 {MIB // 512} linear {folder}/dest 0"
    config = folder / "disks.toml"
    config.write_text(f"[device.d]\ntable = {table!r}\n")
    dest, fast = str(folder / "dest"), str(folder / "fast")
    return {
        "serve": ("serve", "--config", str(config)),
        "clone": ("clone", str(folder / "source"), dest, "--name", "d"),
        "cache": ("cache", dest, fast, "--cache-size", "1M", "--name", "d"),
    }[kind]


@pytest.mark.parametrize("kind", ["serve", "clone", "cache"])
def test_each_socket_serves_what_its_name_says(tmp_path: Path, kind: str) -> None:
    with passed_to(tmp_path, *command(tmp_path, kind)) as server:
        # Connections wait in the sockets until the server takes them.
        client = PlainClient(tmp_path / "nbd", "d")
        assert client.size == MIB
        client.sock.close()
        control = str(tmp_path / "control")
        argv = [NBDTARGET, "status", "d", "--line", "--control", control]
        said = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S)
        assert said.stdout.startswith(f"0 {MIB // 512} "), said.stderr
        with socket.socket(socket.AF_UNIX) as scraper:
            scraper.settimeout(PATIENCE_S)
            scraper.connect(str(tmp_path / "metrics"))
            scraper.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert scraper.recv(15).startswith(b"HTTP/1.1 200")
        server.terminate()
        assert server.wait(PATIENCE_S) == 0
    # The sockets belong to the service manager, which passes them to the next process.
    assert all((tmp_path / role).is_socket() for role in ROLES)
