# SPDX-License-Identifier: Apache-2.0
"""Sockets that the process was started with, and what each of them is for."""

import os
import socket
from collections.abc import Iterator

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.daemon import activation
from nbdtarget.daemon.activation import PassedSockets, passed_sockets

ME = str(os.getpid())


@pytest.fixture
def first_fd(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Three sockets with descriptors in a row, as a service manager passes them."""
    sockets = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    base = 200
    for nr, sock in enumerate(sockets):
        os.dup2(sock.fileno(), base + nr)
        sock.close()
    monkeypatch.setattr(activation, "FIRST_FD", base)
    yield base
    for nr in range(len(sockets)):
        os.close(base + nr)


def _environment(count: str, names: str | None = None, pid: str = ME) -> dict[str, str]:
    found = {"LISTEN_PID": pid, "LISTEN_FDS": count}
    return found if names is None else found | {"LISTEN_FDNAMES": names}


@pytest.mark.parametrize(
    ("pid", "count"),
    [("", "2"), ("1", "2"), ("me", "x"), ("me", ""), ("me", "2000")],
)
def test_sockets_of_another_process_or_no_number_are_none(pid: str, count: str) -> None:
    # The number of this process must not stand in the name of a test: workers compare the names.
    pid = pid.replace("me", ME)
    assert passed_sockets(_environment(count, pid=pid)) == PassedSockets()


@pytest.mark.parametrize(
    ("names", "nbd", "control", "metrics"),
    [
        (None, [0, 1, 2], None, None),
        ("nbd:nbd:nbd", [0, 1, 2], None, None),
        ("nbd:control:nbd", [0, 2], 1, None),
        ("unknown:disks.socket:", [0, 1, 2], None, None),
        ("control:x:metrics", [1], 0, 2),
    ],
)
def test_names_say_what_a_socket_is_for(
    first_fd: int,
    names: str | None,
    nbd: list[int],
    control: int | None,
    metrics: int | None,
) -> None:
    expected = PassedSockets(
        tuple(first_fd + nr for nr in nbd),
        None if control is None else first_fd + control,
        None if metrics is None else first_fd + metrics,
    )
    assert passed_sockets(_environment("3", names)) == expected


def test_children_do_not_inherit_them(first_fd: int) -> None:
    assert os.get_inheritable(first_fd)
    passed_sockets(_environment("1"))
    assert not os.get_inheritable(first_fd)


@pytest.mark.parametrize(
    ("count", "names", "reason"),
    [
        ("2", "nbd", r"LISTEN_FDNAMES has 1 names \(nbd\) for 2 sockets"),
        ("2", "control:control", "only one socket can be called control"),
        ("2", "metrics:metrics", "only one socket can be called metrics"),
    ],
)
def test_names_that_cannot_be_right_are_refused(
    first_fd: int, count: str, names: str, reason: str
) -> None:
    with pytest.raises(NbdTargetError, match=reason):
        passed_sockets(_environment(count, names))


def test_a_descriptor_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(activation, "FIRST_FD", 777)
    with pytest.raises(NbdTargetError, match="descriptor 777 is a socket: Bad file"):
        passed_sockets(_environment("1"))
