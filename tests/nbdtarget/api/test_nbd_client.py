# SPDX-License-Identifier: Apache-2.0
"""The small blocking NBD client against our server, and against servers that are gone or lie."""

import errno as errnos
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdtarget.api.blocking import BlockingServer
from nbdtarget.api.nbd_client import NbdClient, NbdError
from nbdtarget.common.errors import NbdTargetError

KIB = 1024


@pytest.fixture(scope="module")
def server() -> Iterator[BlockingServer]:
    with BlockingServer() as server:
        server.create("d", "linear", size="64M")
        yield server


@pytest.fixture
def client(server: BlockingServer) -> Iterator[NbdClient]:
    with server.disk("d").connect() as client:
        yield client


def test_what_was_written_is_read(client: NbdClient) -> None:
    client.write(4 * KIB, b"w" * KIB)
    client.write(5 * KIB, b"f" * KIB, fua=True)
    client.flush()
    assert client.read(4 * KIB, 2 * KIB) == b"w" * KIB + b"f" * KIB
    client.write_zeroes(4 * KIB, KIB)
    client.trim(64 * KIB, 64 * KIB)
    assert client.read(4 * KIB, KIB) == bytes(KIB)
    assert client.size == 64 << 20
    assert client.read(0, 0) == b""


def test_more_than_a_request_may_hold_is_cut_up(client: NbdClient) -> None:
    data = bytes(range(256)) * 4 * KIB * 40  # 40 MiB
    client.write(0, data)
    assert client.read(0, len(data)) == data


Ask = Callable[[NbdClient], object]
NOWHERE: dict[str, Ask] = {
    "read before the disk": lambda it: it.read(-1, 512),
    "read of less than nothing": lambda it: it.read(0, -512),
    "read behind all disks": lambda it: it.read(1 << 64, 512),
    "write before the disk": lambda it: it.write(-512, b"x"),
    "write behind all disks": lambda it: it.write(1 << 70, b"x"),
    "trim before the disk": lambda it: it.trim(-4096, 4096),
    "trim of less than nothing": lambda it: it.trim(0, -4096),
    "trim of more than all disks": lambda it: it.trim(0, 1 << 64),
    "zeroes before the disk": lambda it: it.write_zeroes(-1, 1),
    "zeroes of more than all disks": lambda it: it.write_zeroes(0, 1 << 64),
}


@pytest.mark.parametrize("name", NOWHERE)
def test_range_that_no_disk_has_is_an_error_and_the_connection_goes_on(
    client: NbdClient, name: str
) -> None:
    client.write(0, b"stays")
    with pytest.raises(NbdError, match=r" of .* bytes at ") as caught:
        NOWHERE[name](client)
    assert caught.value.errno == errnos.EINVAL
    assert client.read(0, 5) == b"stays"


def test_tcp_and_an_error_of_the_server() -> None:
    with BlockingServer(listen=["tcp:127.0.0.1:0"]) as server:
        disk = server.create("e", "error", size="1M")
        assert disk.uri.startswith("nbd://127.0.0.1:")
        with disk.connect() as client:
            with pytest.raises(NbdError, match="READ of 512 bytes at 1024") as caught:
                client.read(1024, 512)
            assert caught.value.errno == errnos.EIO
            with pytest.raises(NbdError):  # the connection goes on
                client.read(0, 512)


def test_missing_export_and_server_are_said_so(
    server: BlockingServer, tmp_path: Path
) -> None:
    with pytest.raises(NbdError, match="no export 'nothing'"):
        server.disk("nothing").connect()
    with pytest.raises(NbdError, match="No such file"):
        NbdClient(f"nbd+unix:///d?socket={tmp_path}/none")
    with pytest.raises(NbdTargetError, match="no TLS"):
        NbdClient("nbds://127.0.0.1/d")


def test_closed_client_refuses_requests(server: BlockingServer) -> None:
    client = server.disk("d").connect()
    client.close()
    client.close()
    with pytest.raises(NbdError, match="the connection has ended"):
        client.read(0, 512)


def bad_server(path: Path, answer: Callable[[socket.socket], None]) -> threading.Thread:
    """A server that answers one connection and closes it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener:
            connection, _ = listener.accept()
            with connection:
                answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_server_that_is_none_is_said_so(tmp_path: Path, greeting: bytes) -> None:
    path = tmp_path / "sock"
    thread = bad_server(path, lambda connection: connection.sendall(greeting))
    with pytest.raises(NbdError, match=str(path)) as caught:
        NbdClient(f"nbd+unix:///d?socket={path}")
    assert caught.value.errno == errnos.EIO
    thread.join()


def test_lost_connection_ends_the_client() -> None:
    with BlockingServer() as server:
        client = server.create("d", "linear", size="1M").connect()
        client.write(0, b"x" * 512)
    with pytest.raises(NbdError, match=r"closed the connection|Broken pipe|reset"):
        client.read(0, 512)
    with pytest.raises(NbdError, match="the connection has ended"):
        client.flush()
