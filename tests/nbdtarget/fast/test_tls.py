# SPDX-License-Identifier: Apache-2.0
"""The compiled records of TLS against those of Python, and the ways in which they can be refused.

What both have to do is tested in `tests/nbdtarget/common/test_tls_socket.py`.
"""

import contextlib
import errno
import os
import random
import select
import socket
import ssl
import subprocess
from types import SimpleNamespace

import pytest

from nbdtarget.common import tls_socket
from nbdtarget.common.tls_context import server_context
from nbdtarget.common.tls_socket import TlsError, TlsSocket
from nbdtarget.fast import compiled
from tests.support.certificates import authority, needs_openssl
from tests.support.patience import PATIENCE_S
from tests.support.tls_ends import encrypted, ends_before_the_handshake

pytestmark = [
    needs_openssl,
    pytest.mark.skipif(bool(compiled.describe_tls()), reason=compiled.describe_tls()),
]

SEAL_MAX = 65024  # SEAL_BYTES of the compiled records
LOOPBACK_PACKET = (
    65464  # bytes of TCP: an MTU of 65536, less IPv6 and TCP with timestamps
)


def receive(end: TlsSocket, size: int = 100) -> bytes:
    """Receive up to `size` bytes of a peer in another process."""
    room = memoryview(bytearray(size))
    while True:
        try:
            return bytes(room[: end.recv_into(room)])
        except BlockingIOError:
            assert select.select([end], [], [], PATIENCE_S)[0]


class Half:
    """One direction of a random conversation."""

    def __init__(
        self, pick: random.Random, sender: TlsSocket, taker: TlsSocket
    ) -> None:
        self.pick, self.sender, self.taker = pick, sender, taker
        self.sent, self.taken = bytearray(), bytearray()
        self.queue: list[memoryview] = []

    def say(self) -> None:
        for _ in range(self.pick.choice((1, 2, 9, 90))):
            size = self.pick.choice((0, 1, 28, 4096, 16384, 16385, 70_000, 300_000))
            data = self.pick.randbytes(size)
            self.sent += data
            self.queue.append(memoryview(data))

    def step(self) -> None:
        pick = self.pick
        if self.queue and pick.random() < 0.6:
            try:
                nr = self.sender.sendmsg(
                    self.queue[: pick.choice((1, 3, 64))]
                    if not self.sender.sealed
                    else self.queue[:64]
                )
            except BlockingIOError:
                nr = 0
            while self.queue and nr >= len(self.queue[0]):
                nr -= len(self.queue.pop(0))
            if nr:
                self.queue[0] = self.queue[0][nr:]
        if pick.random() < 0.6:
            try:
                if pick.random() < 0.1:
                    peeked = self.taker.recv(
                        pick.choice((1, 50, 40_000)), socket.MSG_PEEK
                    )
                    assert self.sent.startswith(peeked, len(self.taken))
                room = memoryview(
                    bytearray(pick.choice((1, 100, 4096, 100_000, 1 << 20)))
                )
                self.taken += room[: self.taker.recv_into(room)]
            except BlockingIOError:
                assert not self.taker.has_pending

    @property
    def is_over(self) -> bool:
        return not self.queue and len(self.taken) == len(self.sent)


@pytest.mark.parametrize("server", [False, True], ids=["python", "compiled"])
@pytest.mark.parametrize("client", [False, True], ids=["python", "compiled"])
@pytest.mark.parametrize(
    "version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"]
)
@pytest.mark.parametrize("seed", range(3))
def test_twins_talk_to_each_other(
    *,
    server: bool,
    client: bool,
    version: ssl.TLSVersion,
    seed: int,
) -> None:
    serving, asking = encrypted(
        *socket.socketpair(), server=server, client=client, version=version
    )
    pick = random.Random(seed)
    halves = Half(pick, serving, asking), Half(pick, asking, serving)
    for each in halves:
        each.say()
    while not all(each.is_over for each in halves):
        for each in halves:
            each.step()
    for each in halves:
        assert each.taken == each.sent
    serving.close()
    assert receive(asking) == b""
    asking.close()


@pytest.mark.parametrize(
    ("size", "sent"),
    [
        (SEAL_MAX, [SEAL_MAX]),
        ((256 << 10) + 28, [SEAL_MAX, SEAL_MAX, SEAL_MAX, 67100]),
        (SEAL_MAX + 16384, [SEAL_MAX + 16384]),
        (SEAL_MAX + 16385, [SEAL_MAX, 16385]),
    ],
)
@pytest.mark.parametrize("cuts", [1, 3])
def test_short_rest_of_a_reply_needs_no_system_call_of_its_own(
    size: int, sent: list[int], cuts: int
) -> None:
    # Such a socket shows what each system call has sent.
    kind = socket.AF_UNIX, socket.SOCK_SEQPACKET
    serving, asking = encrypted(*socket.socketpair(*kind), server=True, client=False)
    reply = memoryview(bytes(size))
    pieces = [
        reply[at : at + size // cuts + 1] for at in range(0, size, size // cuts + 1)
    ]
    encrypted_lengths = []
    while pieces:
        nr = serving.sendmsg(pieces)
        while pieces and nr >= len(pieces[0]):
            nr -= len(pieces.pop(0))
        if nr:
            pieces[0] = pieces[0][nr:]
        with contextlib.suppress(BlockingIOError):
            while True:
                encrypted_lengths.append(len(asking._sock.recv(1 << 20)))
    overhead = [got - plain for got, plain in zip(encrypted_lengths, sent, strict=True)]
    assert all(22 <= each <= 22 * 8 for each in overhead)
    # All but the last leave in one packet each.
    assert all(got <= LOOPBACK_PACKET for got in encrypted_lengths[:-1])
    serving.close()
    asking.close()


def test_connection_keeps_no_memory_of_what_it_needed_once() -> None:
    serving, asking = encrypted(*socket.socketpair(), server=True, client=False)
    records = serving.records
    assert records is not None
    asking.send(bytes(100_000))
    ahead = len(serving.recv(1 << 20, socket.MSG_PEEK))
    assert len(serving.recv(100)) == 100
    records.put_unsent(bytes(3 << 20))
    assert records.nr_spare_bytes >= 4 << 20
    while not records.drain():
        asking._sock.recv(1 << 20)
    assert len(serving.recv(ahead)) == ahead - 100
    assert records.nr_spare_bytes == 0
    serving.close()
    asking.close()


def test_what_came_behind_the_handshake_is_received() -> None:
    serving, asking = ends_before_the_handshake(*socket.socketpair())
    while not asking.handshake():
        serving.handshake()
    asking.send(b"at once")
    assert serving.handshake()
    assert serving.records is not None
    assert serving.has_pending
    assert receive(serving) == b"at once"
    assert not serving.has_pending
    serving.close()
    asking.close()


def test_new_keys_are_taken_and_answered() -> None:
    """With TLS 1.3 a peer may ask for new keys at any time."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        argv = ["openssl", "s_client", "-tls1_3", "-connect", address]
        pipe = subprocess.PIPE
        client = subprocess.Popen(
            argv, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
        )
        sock, _ = listening.accept()
    sock.setblocking(False)
    context = server_context(str(authority()[1]))
    serving = TlsSocket(sock, context, server_side=True)
    while not serving.handshake():
        assert select.select([serving], [], [], PATIENCE_S)[0]
    assert serving.records is not None
    assert client.stdin is not None
    assert client.stdout is not None
    for nr in range(3):
        for words in (b"K\n", b"hello %d\n" % nr):
            client.stdin.write(words)
            client.stdin.flush()
            if words == b"K\n":
                # It has to be a read of its own: the client looks at the first letter of what it reads.
                assert select.select([serving], [], [], PATIENCE_S)[0]
                with pytest.raises(BlockingIOError):
                    serving.recv_into(memoryview(bytearray(1)))
        assert receive(serving) == b"hello %d\n" % nr
        serving.send(b"answer %d\n" % nr)
    serving.close()
    said, _ = client.communicate(timeout=PATIENCE_S)
    for nr in range(3):
        assert b"answer %d\n" % nr in said


def test_closed_records_are_used_no_more() -> None:
    serving, asking = encrypted(*socket.socketpair())
    records = serving.records
    assert records is not None
    asking.send(b"too late")
    serving.close()
    for call in (
        lambda: records.recv_into(memoryview(bytearray(1))),
        lambda: records.sendmsg([b"x"]),
        lambda: records.peek(1),
    ):
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            call()
    assert records.drain()
    assert not records.has_pending
    records.close()
    # Python's object still has the SSL, whose BIO leads nowhere now.
    with pytest.raises(ssl.SSLError):
        serving._ssl.write(b"x")
    asking.close()


def test_peek_that_finds_nothing_keeps_no_memory() -> None:
    serving, asking = encrypted(*socket.socketpair())
    records = serving.records
    assert records is not None
    before = records.nr_spare_bytes
    with pytest.raises(BlockingIOError):
        records.peek(100_000)
    assert records.nr_spare_bytes == before
    asking.send(b"question")
    assert records.peek(100_000) == b"question"
    serving._sock.close()
    asking.close()


def test_python_s_object_may_be_gone() -> None:
    serving, asking = encrypted(*socket.socketpair())
    records = serving.records
    assert records is not None
    del serving._ssl
    asking.send(b"question")
    room = memoryview(bytearray(100))
    assert records.recv_into(room) == 8
    assert records.sendmsg([b"answer"]) == 6
    assert receive(asking) == b"answer"
    serving._sock.close()
    asking.close()


def test_object_that_is_not_known_is_left_alone() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    known = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="x")
    other = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for sslobj, of in (
        (object(), context),
        (None, context),
        (ssl.MemoryBIO(), context),
        (known._sslobj, other),  # type: ignore[attr-defined]
        (known._sslobj, object()),  # type: ignore[attr-defined]
        (bytearray(100), context),
    ):
        stranger = SimpleNamespace(_sslobj=sslobj, context=of)
        assert compiled.take_over(stranger, -1, TlsError, 0, 0) is None  # type: ignore[arg-type]


def test_reason_is_shown_where_python_carries_the_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import nbdtarget_tls

    assert compiled.describe() == "fast path: compiled"
    monkeypatch.setattr(nbdtarget_tls, "why_not", lambda: "hidden")
    assert compiled.describe() == "fast path: compiled, TLS in Python (hidden)"


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("tlsv1 alert unknown ca", "does not know the authority"),
        ("ssl/tls alert bad certificate", "does not accept our certificate"),
        ("tlsv13 alert certificate required", "requires a certificate"),
        ("bad record type", "bad record type"),
    ],
)
def test_reasons_become_the_sentences_of_python(reason: str, said: str) -> None:
    assert said in str(tls_socket._error_of(reason))
