# SPDX-License-Identifier: Apache-2.0
"""Wire fuzzing of a whole server: a hostile client and a quiet one, over sockets, in one event loop.

With TLS the hostile client does one of these, to a listener of one of the `MODES`:

    plain         speaks plain text, and does not ask for TLS, or asks with a payload, which is refused
    ahead         sends plain text behind STARTTLS, without waiting: none of it may be taken
    handshake     damages or cuts off its first message of TLS
    encrypted     speaks in TLS; in half of the cases the conversation inside is damaged
    records       damages the encrypted bytes, or stops in the middle of them: it says so, or is silent

The quiet client must be answered soon, however loaded the machine is. So no wall clock is asked: its reply must be there within
LATE_TURNS turns of the event loop, and within LATE_CPU_S of CPU time of this process.
"""

import asyncio
import contextlib
import functools
import logging
import os
import random
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from nbdtarget.bio import Bio
from nbdtarget.common.tls_context import client_context
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener
from nbdtarget.server.tls import NO_TLS, ListenerTls, TlsOptions
from nbdtarget_protocol import consts as c
from nbdtarget_protocol.options import encode_option
from nbdtarget_protocol.transmission import simple_reply
from tests.support.certificates import authority
from tests.support.patience import PATIENCE_S
from tests.support.peer import Directory, Disk
from tests.support.wire_conversation import (
    KIB,
    PAYLOAD_MAX,
    RANGE_SLICE,
    READ_SLICE,
    SIZE,
    Conversation,
    Received,
    check_answers,
)
from tests.support.wire_damage import Ended, damaged, pieces

__all__ = ["fuzz_server", "fuzz_server_with_tls"]

NR_OPTIONS: Final = 2  # of a conversation with a whole server, at least
QUIET_AT: Final = 8 * KIB  # where another client reads
LATE_TURNS: Final = 200  # 7 in all cases of a long run
LATE_CPU_S: Final = 2.0  # a hundredth in all cases of a long run
TIMEOUT_S: Final = 300.0  # for one conversation; it takes a second, on a machine that has nothing else to do
GREETING_BYTES: Final = 18
# The mode of the listener, and whether it verifies certificates. Only the first one serves clients without TLS.
MODES: Final = {
    "on": ("on", False),
    "on and verified": ("on", True),
    "require": ("require", False),
    "require and verified": ("require", True),
}
KINDS: Final = ("plain", "ahead", "handshake", "encrypted", "encrypted", "records")

T = TypeVar("T")
Hostile = Callable[[socket.socket], Coroutine[Any, Any, bytes]]


class LateDisk(Disk):
    """Ends its bios in a later turn of the loop, in the order in which they came."""

    def submit(self, bio: Bio) -> None:
        bio.own()
        asyncio.get_running_loop().call_soon(self.carry_out, bio)


async def _receive_all(sock: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    received = b""
    while True:
        try:
            piece = await loop.sock_recv(sock, 1 << 20)
        except ConnectionError:
            return received
        if not piece:
            return received
        received += piece


async def _send_all(
    sock: socket.socket, stream: Sequence[bytes], *, ends: bool = True
) -> None:
    loop = asyncio.get_running_loop()
    for piece in stream:
        try:
            await loop.sock_sendall(sock, piece)
        except ConnectionError:
            return
        await asyncio.sleep(0)
    if ends:
        with contextlib.suppress(OSError):  # the server was faster
            sock.shutdown(socket.SHUT_WR)


async def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, str(path))
    return sock


def _transmission_of(sent: bytes) -> bytes:
    """Return the bytes that a server sent behind the last answer to an option; empty if it did not get so far."""
    at = 18
    while sent[at : at + 8] == c.OPTION_REPLY_MAGIC.to_bytes(8):
        _, code, kind, length = c.OPTION_REPLY.unpack_from(sent, at)
        at += c.OPTION_REPLY.size + length
        if (code, kind) == (c.OPT_GO, c.REP_ACK):
            return sent[at:]
    return b""


async def _exchange(sock: socket.socket, stream: Sequence[bytes]) -> bytes:
    """Send all of `stream`, and return what the server sent meanwhile and later."""
    sending = asyncio.create_task(_send_all(sock, stream))
    received = await _receive_all(sock)
    await sending
    return received


async def _soon(work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns. It must end soon; see the module head."""
    begun_s = time.process_time()
    task = asyncio.ensure_future(work)
    try:
        for _ in range(LATE_TURNS):
            if task.done():
                break
            await asyncio.sleep(0)
        assert task.done(), "another client's reply is late, in turns of the loop"
    finally:
        task.cancel()
    taken_s = time.process_time() - begun_s
    assert taken_s < LATE_CPU_S, "another client's reply is late, in CPU time"
    return task.result()


async def _talk(
    rng: random.Random,
    hostile_talk: Callable[[], Hostile],
    disk: Disk,
    tls: ListenerTls = NO_TLS,
    *,
    quiet_encrypts: bool = False,
    is_served: bool = True,
) -> bytes:
    """Let a server of its own serve a hostile client and a quiet one; return what the hostile one received.

    Args: is_served: all that the hostile client asks for has been carried out when it ends.
    """
    limits = Limits(
        poison_borrowed=True,
        handshake_timeout_s=TIMEOUT_S,  # of the quiet client, while the hostile one talks
        payload_max=PAYLOAD_MAX,
        read_slice=READ_SLICE,
        range_slice=RANGE_SLICE,
        turn_bytes_max=64 * KIB,
        flush_at=rng.choice((100, 128 * KIB)),
    )
    directory = Directory({"disk": disk})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        listener = Listener(directory, limits=limits, tls=tls)
        await listener.start(f"unix:{path}")
        quiet = await _connect(path)
        hostile = await _connect(path)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                client = _Client(quiet)
                if quiet_encrypts:
                    # Before the hostile one: when a client attaches, what others that have shut their sending half
                    # down have sent is taken, as far as bounds allow, and they are closed.
                    await _attach_in_tls(client)
                talking = asyncio.create_task(hostile_talk()(hostile))
                if not quiet_encrypts:
                    await _attach(client)
                content = await _check_quiet(client, talking)
                assert not is_served or content == disk.data[QUIET_AT:][:4096]
                received = await talking
        finally:
            quiet.close()
            hostile.close()
            await listener.close(grace_s=PATIENCE_S)
        assert listener.nr_connections == 0
        budget = listener.budget
        assert budget is not None
        assert (budget.nr_requests, budget.nr_bytes, budget.nr_waiters) == (0, 0, 0)
    assert directory.nr_open == {"disk": 0}
    return received


class _Client:
    """One end of a connection, in plain text at first."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._tls: ssl.SSLObject | None = None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._left = b""

    @property
    def encrypts(self) -> bool:
        return self._tls is not None

    async def send(self, data: bytes) -> None:
        data = data if self._tls is None else self.encrypt(data)
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self, length: int) -> bytes:
        """Return just so many bytes; the server must not close the connection before."""
        while len(self._left) < length:
            piece = await self._piece()
            assert piece, "the server has closed a client that did nothing wrong"
            self._left += piece if self._tls is None else self.decrypt(piece)
        received, self._left = self._left[:length], self._left[length:]
        return received

    async def _piece(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.sock, 1 << 20)

    async def ask_for_tls(self) -> bytes:
        """Return the first message of TLS, which is not sent yet."""
        await self.send(c.CLIENT_FLAGS.pack(3) + encode_option(c.OPT_STARTTLS))
        await self.receive(GREETING_BYTES + c.OPTION_REPLY.size)
        context = client_context(str(authority()[1]))
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_hostname="localhost"
        )
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        return self._outgoing.read()

    async def start_tls(self) -> None:
        """Do as a client does that means well."""
        first, loop = await self.ask_for_tls(), asyncio.get_running_loop()
        assert self._tls is not None
        await loop.sock_sendall(self.sock, first)
        is_over = False
        while not is_over:
            piece = await self._piece()
            assert piece, "the server has refused a handshake of TLS that is right"
            self._incoming.write(piece)
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.do_handshake()
                is_over = True
            if self._outgoing.pending:
                await loop.sock_sendall(self.sock, self._outgoing.read())

    def encrypt(self, data: bytes) -> bytes:
        assert self._tls is not None
        written = self._tls.write(data)
        assert written == len(data)
        return self._outgoing.read()

    def end(self) -> bytes:
        """The bytes that say in TLS that no more comes."""
        assert self._tls is not None
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        return self._outgoing.read()

    def decrypt(self, data: bytes) -> bytes:
        """Return what is in these bytes, up to the end or the first record that is damaged."""
        assert self._tls is not None
        self._incoming.write(data)
        received = b""
        with contextlib.suppress(ssl.SSLError):  # also: more has to come
            while piece := self._tls.read(1 << 20):
                received += piece
        return received


async def _attach(client: _Client) -> None:
    attach = encode_option(c.OPT_EXPORT_NAME, b"disk")
    await client.send(c.CLIENT_FLAGS.pack(3) + attach)
    await _soon(client.receive(GREETING_BYTES + 10))


async def _attach_in_tls(client: _Client) -> None:
    await _soon(client.start_tls())
    await client.send(encode_option(c.OPT_EXPORT_NAME, b"disk"))
    await _soon(client.receive(10))


async def _check_quiet(client: _Client, hostile: asyncio.Task[bytes]) -> bytes:
    """Another client, which has attached, reads as long as the hostile one is served, and once more.

    Returns: what it has read last.
    """
    cookie, is_last = 0, False
    while not is_last:
        is_last = hostile.done()
        cookie += 1
        read = c.REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_READ, cookie, QUIET_AT, 4096)
        await client.send(read)
        received = await _soon(client.receive(16 + 4096))
        assert received[:16] == simple_reply(0, cookie)
    await client.send(c.REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_DISC, 7, 0, 0))
    rest = await _receive_all(client.sock)
    assert (client.decrypt(rest) if client.encrypts else rest) == b""
    return received[16:]


class _Errors(logging.Handler):
    """Keeps what the server logs as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def _carry_out(talk: Callable[[], Coroutine[Any, Any, bytes]]) -> bytes:
    """Return what the hostile client received. Nothing may stay open, and no error may be logged."""
    nr_open = len(os.listdir("/proc/self/fd"))
    errors = _Errors()
    logger = logging.getLogger("nbdtarget")
    logger.addHandler(errors)
    try:
        sent = asyncio.run(talk())
    finally:
        logger.removeHandler(errors)
    assert not errors.records, errors.records[0].getMessage()
    assert len(os.listdir("/proc/self/fd")) == nr_open, "a descriptor stays open"
    return sent


def _make_disk(rng: random.Random) -> tuple[Disk, bool]:
    """Return a disk, and whether it is late."""
    is_late = rng.random() < 0.4
    disk = LateDisk(SIZE) if is_late else Disk(SIZE)
    disk.data[:] = rng.randbytes(SIZE)
    disk.data[: 64 * KIB] = bytes(64 * KIB)  # holes
    return disk, is_late


def _check(conversation: Conversation, sent: bytes, disk: Disk) -> None:
    check_answers(conversation, Received(_transmission_of(sent), conversation))
    assert conversation.expects(disk.data), "the disk does not hold what was written"


def fuzz_server(rng: random.Random) -> Ended:
    disk, is_late = _make_disk(rng)
    conversation = Conversation(rng, bytes(disk.data))
    stream = conversation.stream
    if is_damaged := rng.random() < 0.5:
        stream = damaged(rng, stream)
    nr_messages = NR_OPTIONS + len(conversation.asked)

    def hostile() -> Hostile:
        parts = list(pieces(rng, stream))
        return lambda sock: _exchange(sock, parts)

    sent = _carry_out(lambda: _talk(rng, hostile, disk))
    if is_damaged:
        end = "attached" if _transmission_of(sent) else "not attached"
        return Ended(f"damaged: {end}", nr_messages)
    _check(conversation, sent, disk)
    when = "late" if is_late else "at once"
    end = f"ended by {conversation.ends}, {conversation.how} replies {when}"
    return Ended(end, nr_messages)


# ---- with TLS ----


@functools.cache
def _listener_tls(mode: str) -> ListenerTls:
    of_listener, verify_peer = MODES[mode]
    return ListenerTls(TlsOptions(of_listener, str(authority()[1]), verify_peer))


def _answers(sent: bytes) -> list[tuple[int, int]]:
    """Return the code and the kind of each answer to an option that stands in plain text."""
    found, at = [], GREETING_BYTES
    while sent[at : at + 8] == c.OPTION_REPLY_MAGIC.to_bytes(8):
        if len(sent) < at + c.OPTION_REPLY.size:
            break
        _, code, kind, length = c.OPTION_REPLY.unpack_from(sent, at)
        at += c.OPTION_REPLY.size + length
        found.append((code, kind))
    return found


def _check_plain(mode: str, sent: bytes, *, is_refused: bool) -> None:
    """Look at what came of plain text."""
    assert not (is_refused and _transmission_of(sent)), "plain text is served"
    if "require" in mode:
        for code, answer in _answers(sent):
            is_error = bool(answer & c.REP_FLAG_ERROR)
            assert is_error or code in (c.OPT_STARTTLS, c.OPT_ABORT)


def fuzz_server_with_tls(rng: random.Random) -> Ended:
    disk, _ = _make_disk(rng)
    conversation = Conversation(rng, bytes(disk.data))
    mode, kind = rng.choice(tuple(MODES)), rng.choice(KINDS)
    stream, is_damaged = conversation.stream, rng.random() < 0.5
    head, options = stream[: c.CLIENT_FLAGS.size], stream[c.CLIENT_FLAGS.size :]
    if kind == "plain" and rng.random() < 0.5:
        payload = rng.randbytes(rng.randint(1, 30))
        stream = head + encode_option(c.OPT_STARTTLS, payload) + options
    elif kind == "ahead":
        stream = head + encode_option(c.OPT_STARTTLS) + options
    elif kind != "plain":
        stream = options
    if is_damaged and kind in ("plain", "ahead", "encrypted"):
        stream = damaged(rng, stream)

    async def send_a_part(client: _Client, data: bytes) -> bytes:
        part = damaged(rng, data) if is_damaged else data[: rng.randrange(len(data))]
        if not is_damaged and is_silent:
            await _send_all(client.sock, [*pieces(rng, part)], ends=False)
            return b""
        return client.decrypt(await _exchange(client.sock, [*pieces(rng, part)]))

    async def in_tls(sock: socket.socket) -> bytes:
        client = _Client(sock)
        if kind == "handshake":
            first = await client.ask_for_tls()
            return await send_a_part(client, first)
        await client.start_tls()
        records = b"".join(client.encrypt(piece) for piece in pieces(rng, stream))
        records += client.end()
        if kind == "records":
            return await send_a_part(client, records)
        return client.decrypt(await _exchange(sock, [*pieces(rng, records)]))

    def hostile() -> Hostile:
        if kind not in ("plain", "ahead"):
            return in_tls
        parts = list(pieces(rng, stream))
        return lambda sock: _exchange(sock, parts)

    is_silent = rng.random() < 0.5
    is_part = kind in ("handshake", "records") and not is_damaged
    quiet_encrypts = mode != "on" or rng.random() < 0.5
    sent = _carry_out(
        lambda: _talk(
            rng,
            hostile,
            disk,
            _listener_tls(mode),
            quiet_encrypts=quiet_encrypts,
            is_served=not (is_part and is_silent),
        )
    )
    what = f"{mode}: {kind}{', damaged' if is_damaged else ''}"
    if is_part:
        what += ", silent" if is_silent else ", cut off"
    if kind in ("plain", "ahead"):
        is_ahead = kind == "ahead" and not is_damaged
        _check_plain(mode, sent, is_refused=mode != "on" or is_ahead)
        if not is_damaged and kind == "plain" and mode == "on":
            _check(conversation, sent, disk)
    elif kind == "encrypted":
        sent = bytes(GREETING_BYTES) + sent
        if not is_damaged:
            _check(conversation, sent, disk)
            what += f", ended by {conversation.ends}, {conversation.how} replies"
    return Ended(what, NR_OPTIONS + len(conversation.asked))
