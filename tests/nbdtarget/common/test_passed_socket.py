# SPDX-License-Identifier: Apache-2.0
"""A socket that another process made and passed to this one."""

import os
import socket

import pytest

from nbdtarget.common.errors import ListenError
from nbdtarget.common.passed_socket import passed_socket


def test_a_listening_socket_is_owned() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with passed_socket(os.dup(listening.fileno())) as passed:
            assert passed.getsockname() == listening.getsockname()
            assert not passed.getblocking()


def test_everything_else_is_refused_and_stays_open() -> None:
    with (
        socket.socket() as idle,
        socket.socket(type=socket.SOCK_DGRAM) as datagrams,
        open(os.devnull) as file,
    ):
        for other in (idle, datagrams):
            with pytest.raises(ListenError, match="is not a listening stream socket"):
                passed_socket(other.fileno())
            assert other.getsockname()
        with pytest.raises(ListenError, match=r"fd \d+: Socket operation on non-"):
            passed_socket(file.fileno())
