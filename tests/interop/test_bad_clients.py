# SPDX-License-Identifier: Apache-2.0
"""A client that misbehaves costs its own connection and nothing else."""

import contextlib
import random
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.support.clients import CloneUnderTest
from tests.support.patience import PATIENCE_S
from tests.support.plain_client import CMD_READ, CMD_WRITE, REQUEST, PlainClient

pytestmark = pytest.mark.interop

Misbehave = Callable[[PlainClient], None]


def send_unwelcome(client: PlainClient, data: bytes) -> None:
    """Send what the server may hang up on before it has come to its end."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.sock.sendall(data)


def garbage_request(client: PlainClient) -> None:
    send_unwelcome(client, random.Random(1).randbytes(64 * 1024))


def half_a_header(client: PlainClient) -> None:
    client.sock.sendall(REQUEST.pack(0x25609513, 0, CMD_READ, 1, 0, 4096)[:13])


def half_a_payload(client: PlainClient) -> None:
    header = REQUEST.pack(0x25609513, 0, CMD_WRITE, 1, 0, 1 << 20)
    client.sock.sendall(header + b"x" * 100_000)


def payload_without_end(client: PlainClient) -> None:
    header = REQUEST.pack(0x25609513, 0, CMD_WRITE, 1, 0, 0xFFFFFFFF)
    send_unwelcome(client, header + b"x" * 100_000)


def many_reads_never_received(client: PlainClient) -> None:
    client.sock.setblocking(False)
    try:
        for _ in range(10_000):
            client.send(CMD_READ, 0, 1 << 20)
    except BlockingIOError:
        pass  # the server stopped reading from us, as it should
    client.sock.setblocking(True)


MISBEHAVIOUR = [
    garbage_request,
    half_a_header,
    half_a_payload,
    payload_without_end,
    many_reads_never_received,
]


@pytest.fixture
def good(shared: CloneUnderTest) -> Iterator[PlainClient]:
    with PlainClient(shared.socket, shared.name, timeout_s=PATIENCE_S) as client:
        yield client


@pytest.mark.parametrize("misbehave", MISBEHAVIOUR, ids=lambda f: f.__name__)
def test_others_are_served_while_a_client_misbehaves(
    shared: CloneUnderTest, good: PlainClient, misbehave: Misbehave
) -> None:
    with PlainClient(shared.socket, shared.name) as bad:
        misbehave(bad)
        assert good.read(4096, 4096) == shared.content[4096:8192]
        with PlainClient(shared.socket, shared.name, timeout_s=PATIENCE_S) as newcomer:
            assert newcomer.read(0, 512) == shared.content[:512]


@pytest.mark.parametrize("misbehave", MISBEHAVIOUR, ids=lambda f: f.__name__)
def test_others_are_served_after_a_client_vanished(
    shared: CloneUnderTest, good: PlainClient, misbehave: Misbehave
) -> None:
    bad = PlainClient(shared.socket, shared.name)
    misbehave(bad)
    # A reset, not an orderly close.
    bad.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    bad.sock.close()
    assert good.read(4096, 4096) == shared.content[4096:8192]


def test_half_a_write_changes_nothing(
    shared: CloneUnderTest, good: PlainClient
) -> None:
    bad = PlainClient(shared.socket, shared.name)
    half_a_payload(bad)
    bad.sock.close()
    assert good.read(0, 1 << 20) == shared.content[: 1 << 20]


@pytest.mark.parametrize(
    "noise",
    [b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"\xff" * 4096],
    ids=["http", "0", "f"],
)
def test_others_are_served_after_noise_instead_of_a_handshake(
    shared: CloneUnderTest, good: PlainClient, noise: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as bad:
        bad.connect(str(shared.socket))
        bad.sendall(noise)
        assert good.read(0, 512) == shared.content[:512]
