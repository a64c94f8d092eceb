# SPDX-License-Identifier: Apache-2.0
"""Unix sockets to listen on: one server has the path, with the mode that was asked for."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.unix_socket import (
    SocketAccess,
    SocketInUseError,
    SocketOptions,
    remove_if_stale,
    take_unix_socket,
)
from tests.support.patience import PATIENCE_S

PROCESSES = 20
# Takes the socket as soon as it is told to, says how that went, and keeps it until it is told to end.
RACER = """
import sys
from nbdtarget.common.unix_socket import SocketInUseError, take_unix_socket
print("up", flush=True)
sys.stdin.readline()
try:
    taken = take_unix_socket(sys.argv[1])
    taken.socket.listen()
except SocketInUseError:
    print("lost", flush=True)
    sys.exit()
print("won", flush=True)
sys.stdin.readline()
taken.socket.close()
taken.release()
"""


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("is_stale", [False, True])
def test_of_twenty_servers_that_start_at_once_exactly_one_has_the_socket(
    tmp_path: Path, is_stale: bool
) -> None:
    path = tmp_path / "s"
    if is_stale:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    said = []
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "up\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("\n")
            racer.stdin.flush()
        for racer in racers:
            assert racer.stdout is not None
            said.append(racer.stdout.readline())
        assert sorted(said) == ["lost\n"] * (PROCESSES - 1) + ["won\n"]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))  # the losers have not taken it from the winner
    finally:
        for racer in racers:
            racer.communicate("\n", timeout=PATIENCE_S)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_listen_yet_keeps_its_socket(tmp_path: Path) -> None:
    """A connection to it is refused, as to a dead one: only the lock tells them apart."""
    path = tmp_path / "s"
    taken = take_unix_socket(str(path))
    with pytest.raises(SocketInUseError, match="another server is listening"):
        take_unix_socket(str(path))
    remove_if_stale(str(path))
    taken.socket.listen()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    taken.socket.close()
    taken.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0, 0o077])
def test_the_mode_is_what_was_asked_for_whatever_the_umask_is(
    tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    before = []
    chmod = os.chmod

    def watched(name: str, mode: int) -> None:
        before.append(mode_of(path))
        chmod(name, mode)

    monkeypatch.setattr(os, "chmod", watched)
    old = os.umask(umask)
    try:
        taken = take_unix_socket(str(path), SocketAccess(0o660))
    finally:
        os.umask(old)
    assert mode_of(path) == 0o660
    assert before == [0o600], "it has never been open to more"
    taken.socket.close()
    taken.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_group_and_the_owner_are_what_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "s"
    options = SocketOptions(socket_owner="daemon", socket_group="12345")
    taken = take_unix_socket(str(path), options.listen)
    status = path.stat()
    assert (status.st_uid, status.st_gid) == (1, 12345)
    assert mode_of(path) == 0o600
    taken.socket.close()
    taken.release()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (SocketOptions(socket_mode="rw"), "rw: is not a mode"),
        (SocketOptions(socket_mode="0888"), "0888: is not a mode"),
        (SocketOptions(socket_mode="4777"), "4777: is not a mode of a socket"),
        (SocketOptions(socket_owner="nosuch"), "nosuch: there is no such owner"),
        (SocketOptions(socket_group="nosuch"), "nosuch: there is no such group"),
    ],
)
def test_access_that_is_none_is_refused(options: SocketOptions, reason: str) -> None:
    with pytest.raises(NbdTargetError, match=reason):
        _ = options.listen


def test_one_who_cannot_give_the_socket_its_group_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(PermissionError):
        take_unix_socket(str(tmp_path / "s"), SocketAccess(group="0"))
    assert list(tmp_path.iterdir()) == []


def test_a_socket_of_a_server_that_knows_no_lock_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(SocketInUseError, match="another server is listening"):
            take_unix_socket(str(path))
        remove_if_stale(str(path))
        assert path.is_socket()
    remove_if_stale(str(path))
    assert list(tmp_path.iterdir()) == []


def test_what_took_the_place_of_our_socket_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    taken = take_unix_socket(str(path))
    path.unlink()
    path.write_text("precious")
    taken.socket.close()
    taken.release()
    assert path.read_text() == "precious"
