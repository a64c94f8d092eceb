# SPDX-License-Identifier: Apache-2.0
"""TLS on a socket: two ends in one thread, which take turns. Each test runs over Python's records and over the compiled ones."""

import contextlib
import select
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.common import tls_socket
from nbdtarget.common.tls_context import client_context, server_context
from nbdtarget.common.tls_socket import TlsError, TlsSocket
from nbdtarget.fast import compiled
from tests.support.certificates import authority, needs_openssl
from tests.support.patience import PATIENCE_S

pytestmark = needs_openssl

Ends = tuple[TlsSocket, TlsSocket]


@pytest.fixture(autouse=True, params=["python", "compiled"])
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two carries the records."""
    name: str = request.param
    if name == "python":
        monkeypatch.setattr(tls_socket, "_take_over", lambda *_: None)
    elif compiled.describe_tls():
        pytest.skip(compiled.describe_tls())
    return name


def pair() -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair()
    one.setblocking(False)
    other.setblocking(False)
    return one, other


def contexts(
    *, verify_peer: bool = True, directory: Path | None = None
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    pki = str(authority()[1])
    serving = server_context(pki, verify_peer=verify_peer)
    return serving, client_context(str(directory) if directory else pki)


def shake(serving: TlsSocket, asking: TlsSocket) -> None:
    done = False
    while not done:
        done = asking.handshake() & serving.handshake()


@pytest.fixture
def ends() -> Iterator[Ends]:
    one, other = pair()
    of_server, of_client = contexts()
    serving = TlsSocket(one, of_server, server_side=True)
    asking = TlsSocket(other, of_client, server_side=False, server_hostname="localhost")
    shake(serving, asking)
    yield serving, asking
    serving.close()
    asking.close()


def receive(end: TlsSocket, size: int) -> bytes:
    room = memoryview(bytearray(size))
    return bytes(room[: end.recv_into(room)])


def receive_soon(end: TlsSocket, size: int) -> bytes:
    """As `receive`, of a peer in another process."""
    while True:
        try:
            return receive(end, size)
        except BlockingIOError:
            assert select.select([end], [], [], PATIENCE_S)[0]


def put_unsent(end: TlsSocket, data: bytes) -> None:
    """Let `data` wait for the socket, as if OpenSSL had written it."""
    if end.records is None:
        end._outgoing.write(data)
    else:
        end.records.put_unsent(data)


def seal(end: TlsSocket, data: bytes) -> bytes:
    """Return the records of `data`, which are not sent."""
    end._ssl.write(data)
    return end._outgoing.read() if end.records is None else end.records.take_unsent()


def test_both_ends_talk(ends: Ends, twin: str) -> None:
    serving, asking = ends
    assert [each.records is not None for each in ends] == [twin == "compiled"] * 2
    assert asking.send(b"question") == 8
    assert receive(serving, 100) == b"question"
    assert serving.sendmsg([b"an", b"", b"swer"]) == 6
    assert receive(asking, 100) == b"answer"
    with pytest.raises(BlockingIOError):
        receive(asking, 100)
    assert serving.version in ("TLSv1.2", "TLSv1.3")


def test_names_are_those_of_a_verified_certificate(ends: Ends) -> None:
    serving, asking = ends
    assert serving.peer_names() == ("alice", "alice.example", "alice@example")
    assert "localhost" in asking.peer_names()


def test_certificate_that_is_not_asked_for_has_no_names() -> None:
    one, other = pair()
    of_server, of_client = contexts(verify_peer=False)
    with one, other:
        serving = TlsSocket(one, of_server, server_side=True)
        asking = TlsSocket(
            other, of_client, server_side=False, server_hostname="localhost"
        )
        shake(serving, asking)
        assert serving.peer_names() == ()


def test_bytes_that_tls_has_received_are_pending(ends: Ends) -> None:
    serving, asking = ends
    for _ in range(3):
        asking.send(bytes(1000))
    assert not serving.has_pending
    assert len(receive(serving, 400)) == 400
    assert serving.has_pending
    assert len(receive(serving, 600)) == 600
    assert serving.has_pending
    assert len(receive(serving, 4000)) == 2000
    assert not serving.has_pending


def test_many_records_come_with_one_call(ends: Ends) -> None:
    serving, asking = ends
    data = bytes(range(256)) * 400
    assert asking.send(data) == len(data)
    assert receive(serving, len(data) + 1) == data


@pytest.mark.parametrize("size", [1 << 10, 40_000, 1 << 20, 3 << 20])
def test_what_the_socket_does_not_take_is_sent_by_the_next_calls(
    ends: Ends, size: int
) -> None:
    serving, asking = ends
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    pieces = [memoryview(data)[at : at + 50_000] for at in range(0, size, 50_000)]
    pieces.insert(0, memoryview(b"header"))
    left, came = pieces[:], bytearray()
    while left or len(came) < size + 6:
        try:
            sent = asking.sendmsg(left) if left else 0
        except BlockingIOError:
            assert asking.sealed
            sent = 0
        while sent:
            if sent < len(left[0]):
                left[0] = left[0][sent:]
                break
            sent -= len(left.pop(0))
        try:
            came += receive(serving, 100_000)
        except BlockingIOError:
            assert left
    assert bytes(came) == b"header" + data
    assert not asking.sealed


def test_peek_takes_nothing(ends: Ends) -> None:
    serving, asking = ends
    with pytest.raises(BlockingIOError):
        serving.recv(100, socket.MSG_PEEK)
    asking.send(b"question")
    assert serving.recv(4, socket.MSG_PEEK) == b"ques"
    assert serving.has_pending
    assert serving.recv(100, socket.MSG_PEEK) == b"question"
    assert serving.recv(3) == b"que"
    assert serving.recv(100) == b"stion"
    assert not serving.has_pending


def test_close_notify_is_the_end(ends: Ends) -> None:
    serving, asking = ends
    asking.send(b"last words")
    asking.shutdown(socket.SHUT_WR)
    assert receive(serving, 4) == b"last"
    assert receive(serving, 100) == b" words"
    assert receive(serving, 100) == b""
    # Only one half has ended.
    serving.send(b"answer")
    assert receive(asking, 100) == b"answer"


def test_close_notify_behind_data_is_told_although_the_socket_stays_open(
    ends: Ends,
) -> None:
    serving, asking = ends
    asking.send(b"last words")
    asking._say_goodbye()
    assert receive(serving, 100) == b"last words"
    assert serving.has_pending
    assert receive(serving, 100) == b""


def test_truncation_without_close_notify_is_the_end(ends: Ends) -> None:
    serving, asking = ends
    asking.send(b"half a reque")
    asking._sock.shutdown(socket.SHUT_RDWR)
    assert receive(serving, 100) == b"half a reque"
    assert receive(serving, 100) == b""
    assert receive(serving, 100) == b""


def test_record_that_was_changed_on_the_wire_is_an_error(ends: Ends) -> None:
    serving, asking = ends
    asking._sock.send(b"\x17\x03\x03\0\x20" + bytes(32))
    with pytest.raises(TlsError, match=r"^TLS: "):
        receive(serving, 100)


def test_plaintext_in_place_of_the_handshake_is_an_error() -> None:
    one, other = pair()
    with one, other:
        serving = TlsSocket(one, contexts()[0], server_side=True)
        assert not serving.handshake()
        other.send(b"IHAVEOPT" + bytes(40))
        with pytest.raises(TlsError, match="what came is not TLS"):
            serving.handshake()


def test_end_during_the_handshake_is_an_error() -> None:
    one, other = pair()
    with one:
        serving = TlsSocket(one, contexts()[0], server_side=True)
        other.close()
        with pytest.raises(TlsError, match="hung up"):
            serving.handshake()


def test_handshake_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_socket, "HANDSHAKE_BYTES_MAX", 100)
    one, other = pair()
    of_server, of_client = contexts()
    with one, other:
        serving = TlsSocket(one, of_server, server_side=True)
        asking = TlsSocket(
            other, of_client, server_side=False, server_hostname="localhost"
        )
        asking.handshake()
        with pytest.raises(TlsError, match="more than 100 bytes of handshake"):
            serving.handshake()


def test_what_says_nothing_is_bounded(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of a record says nothing. So do records of TLS itself, of which each takes time."""
    monkeypatch.setattr(tls_socket, "SILENT_MAX", 1000)
    serving, asking = ends
    if serving.records is not None:
        serving.records.bound(1000, tls_socket.ANSWERS_MAX)
    room = memoryview(bytearray(20_000))
    for _ in range(5):  # what says something is not counted
        asking.send(bytes(900))
        assert len(receive(serving, 1000)) == 900
    record = seal(asking, bytes(10_000))
    asking._sock.send(record[:600])
    with pytest.raises(BlockingIOError):
        serving.recv_into(room)
    asking._sock.send(record[600:1200])
    with pytest.raises(TlsError, match="says nothing"):
        serving.recv_into(room)


def test_answers_that_the_peer_does_not_read_are_bounded(ends: Ends) -> None:
    serving, asking = ends
    with contextlib.suppress(BlockingIOError):
        while True:
            serving.send(bytes(64 << 10))
    # OpenSSL answers, for example, to a renegotiation.
    put_unsent(serving, bytes(3 * tls_socket.SEAL_MAX))
    asking.send(b"again")
    with pytest.raises(TlsError, match="does not read them"):
        receive(serving, 100)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("localhost", ""), ("other.example", "Hostname mismatch")],
)
def test_client_checks_the_name(name: str, reason: str) -> None:
    one, other = pair()
    of_server, of_client = contexts()
    with one, other:
        serving = TlsSocket(one, of_server, server_side=True)
        asking = TlsSocket(other, of_client, server_side=False, server_hostname=name)
        if reason:
            with pytest.raises(TlsError, match=reason):
                shake(serving, asking)
            with pytest.raises(TlsError):
                serving.handshake()
        else:
            shake(serving, asking)


def test_client_without_a_certificate_is_refused_if_one_is_required(
    tmp_path: Path,
) -> None:
    pki = authority()[1]
    (tmp_path / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
    one, other = pair()
    of_server, of_client = contexts(directory=tmp_path)
    with one, other:
        serving = TlsSocket(one, of_server, server_side=True)
        asking = TlsSocket(
            other, of_client, server_side=False, server_hostname="localhost"
        )
        with pytest.raises(TlsError, match="showed no certificate"):
            shake(serving, asking)


def test_renegotiation_is_refused() -> None:
    """With TLS 1.2; version 1.3 has none."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    client = subprocess.Popen(
        ["openssl", "s_client", "-tls1_2", "-connect", f"127.0.0.1:{port}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    sock, _ = listening.accept()
    listening.close()
    sock.settimeout(0)
    serving = TlsSocket(sock, contexts(verify_peer=False)[0], server_side=True)
    while not serving.handshake():
        assert select.select([serving], [], [], PATIENCE_S)[0]
    assert client.stdin is not None
    assert client.stderr is not None
    client.stdin.write(b"hello\n")
    client.stdin.flush()
    assert receive_soon(serving, 100) == b"hello\n"
    client.stdin.write(b"R\n")
    client.stdin.flush()
    # The client is told, and gives up.
    with pytest.raises(TlsError):
        receive_soon(serving, 100)
    serving.close()
    client.stdin.close()
    assert b"no renegotiation" in client.stderr.read()
    client.stderr.close()
    client.wait(PATIENCE_S)
