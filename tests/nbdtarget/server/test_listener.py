# SPDX-License-Identifier: Apache-2.0
"""Addresses, sockets that are in the way, limits on connections."""

import asyncio
import errno as errnos
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.common.errors import ListenError, ResolveError
from nbdtarget.devices.nbd.connection import connect
from nbdtarget.devices.nbd.uri import parse_nbd_uri
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener, export_uri
from nbdtarget_protocol import consts as c
from tests.support.peer import Directory, Disk, Peer, Served


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    it = Listener(Directory({"disk": Disk()}), limits=Limits())
    yield it
    await it.close()


async def _read_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    peer = Peer(reader, writer)
    await peer.attach()
    assert (await peer.ask(c.CMD_READ, 0, 512)).data == bytes(512)
    peer.close()


async def test_unix_uri(listener: Listener, tmp_path: Path) -> None:
    path = tmp_path / "a b?&{name}"
    (pattern,) = await listener.start(f"unix:{path}")
    assert export_uri(pattern, "x/y z") == (
        f"nbd+unix:///x%2Fy%20z?socket={tmp_path}/a%20b%3F%26%7Bname%7D"
    )
    await _read_one(*await asyncio.open_unix_connection(str(path)))


async def test_unix_socket_goes_with_the_listener(tmp_path: Path) -> None:
    listener = Listener(Directory({}))
    await listener.start(f"unix:{tmp_path}/s")
    await listener.close()
    assert not (tmp_path / "s").exists()


async def test_unix_socket_of_another_stays(listener: Listener, tmp_path: Path) -> None:
    await listener.start(f"unix:{tmp_path}/s")
    (tmp_path / "s").unlink()
    (tmp_path / "s").touch()
    await listener.close()
    assert (tmp_path / "s").exists()


async def test_stale_unix_socket_is_replaced(
    listener: Listener, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    await listener.start(f"unix:{tmp_path}/s")
    await _read_one(*await asyncio.open_unix_connection(str(tmp_path / "s")))


async def test_live_unix_socket_is_refused(listener: Listener, tmp_path: Path) -> None:
    await listener.start(f"unix:{tmp_path}/s")
    other = Listener(Directory({}))
    with pytest.raises(ListenError, match="another server is listening"):
        await other.start(f"unix:{tmp_path}/s")
    await other.close()
    await _read_one(*await asyncio.open_unix_connection(str(tmp_path / "s")))


async def test_file_in_the_way_is_refused_and_stays(
    listener: Listener, tmp_path: Path
) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(ListenError, match="is not a socket"):
        await listener.start(f"unix:{tmp_path}/s")
    assert (tmp_path / "s").read_text() == "precious"


async def test_missing_directory_is_refused(listener: Listener, tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="No such file"):
        await listener.start(f"unix:{tmp_path}/none/s")


BAD_ADDRESSES = ["", "unix:", "tcp:", "tcp:10809", "tcp:h:x", "tcp:h:65536", "udp:h:1"]
# Invalid host names: an empty label, one that is too long, bytes that were no UTF-8.
BAD_HOSTS = ["tcp:a..b:0", f"tcp:{'a' * 64}:0", "tcp:\udcff:0"]


@pytest.mark.parametrize("address", [*BAD_ADDRESSES, *BAD_HOSTS, "unix:" + "x" * 108])
async def test_bad_address_is_refused(listener: Listener, address: str) -> None:
    with pytest.raises(ListenError):
        await listener.start(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_tcp_with_a_free_port(listener: Listener, host: str) -> None:
    patterns = await listener.start(f"tcp:{host}:0")
    assert all(pattern.startswith("nbd://") for pattern in patterns)
    port = int(patterns[0].removesuffix("/{name}").rpartition(":")[2])
    await _read_one(*await asyncio.open_connection(host, port))


def _vsock_port() -> int:
    """A free one. Skips the test where there is no vsock."""
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
            port: int = sock.getsockname()[1]
    except OSError as error:
        pytest.skip(f"no vsock here: {error}")
    return port


async def test_vsock_is_listened_on_under_a_uri_for_guests(listener: Listener) -> None:
    port = _vsock_port()
    (pattern,) = await listener.start(f"vsock:any:{port}")
    assert export_uri(pattern, "disk") == f"nbd+vsock://2:{port}/disk"
    with pytest.raises(ListenError, match="in use"):
        await listener.start(f"vsock:any:{port}")


@pytest.mark.long
async def test_vsock_serves_a_client_of_this_machine(listener: Listener) -> None:
    """In `make vm-test`, there is a loopback of vsock in any case."""
    port = _vsock_port()
    await listener.start(f"vsock:any:{port}")
    uri = f"nbd+vsock://1:{port}/disk"
    try:
        client = await connect(uri, parse_nbd_uri(uri))
    except ResolveError as error:
        pytest.skip(f"no loopback of vsock here: {error}")
    assert [str(peer) for peer in listener._connections.values()] == ["vsock:1"]
    assert [str(each.identity) for each in listener.clients()] == ["vsock:1"]
    client.close()


async def test_neither_end_waits_for_more_to_send(listener: Listener) -> None:
    """Nagle's algorithm is off (TCP_NODELAY), as the standard asks of both ends."""
    pattern, *_ = await listener.start("tcp:127.0.0.1:0")
    uri = export_uri(pattern, "disk")
    client = await connect(uri, parse_nbd_uri(uri))
    [server] = listener._connections
    for fd in client._sock.fileno(), server.fileno:
        with socket.socket(fileno=os.dup(fd)) as sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    client.close()


async def test_tcp_port_in_use_is_refused(listener: Listener) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ListenError, match="in use"):
            await listener.start(f"tcp:127.0.0.1:{port}")


async def test_passed_socket(listener: Listener, tmp_path: Path) -> None:
    passed = socket.socket(socket.AF_UNIX)
    passed.bind(str(tmp_path / "s"))
    passed.listen()
    patterns = await listener.start_fd(passed.detach())
    assert patterns == [f"nbd+unix:///{{name}}?socket={tmp_path}/s"]
    await _read_one(*await asyncio.open_unix_connection(str(tmp_path / "s")))


async def test_passed_socket_that_does_not_listen_is_refused(
    listener: Listener,
) -> None:
    with socket.socket(socket.AF_UNIX) as passed:
        with pytest.raises(ListenError, match="not a listening"):
            await listener.start_fd(passed.fileno())
        assert passed.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)  # still theirs


async def test_passed_file_is_refused(listener: Listener, tmp_path: Path) -> None:
    with (tmp_path / "f").open("w") as file, pytest.raises(ListenError):
        await listener.start_fd(file.fileno())


async def test_out_of_descriptors_pauses_accepting(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = await served.start()
    real = socket.socket.accept
    failures = iter([OSError(errnos.EMFILE, "Too many open files")])

    def accept(sock: socket.socket) -> tuple[socket.socket, object]:
        for failure in failures:
            raise failure
        return real(sock)

    monkeypatch.setattr(socket.socket, "accept", accept)
    monkeypatch.setattr("nbdtarget.server.listener.ACCEPT_PAUSE_S", 0.01)
    peer = await served.attach()
    assert (await peer.ask(c.CMD_READ, 0, 1)).error == 0
    assert listener.nr_connections == 1


async def test_many_clients_at_once(served: Served) -> None:
    peers = await asyncio.gather(*(served.attach() for _ in range(50)))
    replies = await asyncio.gather(*(peer.ask(c.CMD_READ, 0, 512) for peer in peers))
    assert {reply.error for reply in replies} == {0}
    assert served.directory.nr_open == {"disk": 50}
