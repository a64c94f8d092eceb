# SPDX-License-Identifier: Apache-2.0
"""Feeding the four parsers: whole, byte by byte, and with garbage behind."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nbdtarget_protocol.client import (
    ClientHandshake,
    ClientNegotiated,
    ClientTransmission,
    Completion,
)
from nbdtarget_protocol.consts import (
    CMD_READ,
    FLAG_CAN_MULTI_CONN,
    FLAG_HAS_FLAGS,
    FLAG_SEND_CACHE,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    U32,
)
from nbdtarget_protocol.errors import ReplyError
from nbdtarget_protocol.handshake import ExportInfo, Negotiated, ServerHandshake
from nbdtarget_protocol.options import encode_option

GARBAGE = bytes(range(256)) * 2
KIB = 1 << 10
MIB = 1 << 20

ALL_FLAGS = (
    FLAG_HAS_FLAGS
    | FLAG_SEND_FLUSH
    | FLAG_SEND_FUA
    | FLAG_SEND_TRIM
    | FLAG_SEND_WRITE_ZEROES
    | FLAG_SEND_FAST_ZERO
    | FLAG_SEND_CACHE
    | FLAG_CAN_MULTI_CONN
)

DISK = ExportInfo("disk", MIB, ALL_FLAGS, "a disk")
NEW_CLIENT = U32.pack(3)  # client flags: fixed newstyle, no zeroes


@dataclass
class OneExport:
    """Exports with one name; the empty one is it as well."""

    export: ExportInfo = DISK
    listed: list[tuple[str, str]] = field(default_factory=lambda: [("disk", "a disk")])

    def lookup(self, name: str) -> ExportInfo | None:
        return self.export if name in ("", self.export.name) else None

    def names(self) -> Iterable[tuple[str, str]]:
        return iter(self.listed)


def server(export: ExportInfo = DISK, /, **kwargs: Any) -> ServerHandshake:
    """Return a server that has sent its greeting."""
    handshake = ServerHandshake(OneExport(export), **kwargs)
    handshake.data_to_send()
    return handshake


def feed_server(
    data: bytes, export: ExportInfo = DISK, /, **kwargs: Any
) -> tuple[ServerHandshake, bytes]:
    """Feed client flags and `data` in all three ways; return the server and what it sent."""
    stream = NEW_CLIENT + data
    whole = server(export, **kwargs)
    whole.receive_data(stream)
    sent = b"".join(whole.data_to_send())

    slow = server(export, **kwargs)
    slow_sent = b""
    for i in range(len(stream)):
        slow.receive_data(stream[i : i + 1])
        slow_sent += b"".join(slow.data_to_send())
    assert slow_sent == sent
    assert slow.negotiated == whole.negotiated
    assert slow.closed == whole.closed
    assert str(slow.error) == str(whole.error)

    trailed = server(export, **kwargs)
    trailed.receive_data(memoryview(stream + GARBAGE))
    assert b"".join(trailed.data_to_send()).startswith(sent)
    assert trailed.negotiated == whole.negotiated
    assert trailed.trailing_data() == (GARBAGE if whole.negotiated else b"")
    return whole, sent


def replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """Take option replies apart: (option, reply type, payload)."""
    taken = []
    while data:
        magic, option, rep, length = OPTION_REPLY.unpack_from(data)
        assert magic == OPTION_REPLY_MAGIC
        end = OPTION_REPLY.size + length
        assert len(data) >= end
        taken.append((option, rep, data[OPTION_REPLY.size : end]))
        data = data[end:]
    return taken


def ask(*options: bytes, **kwargs: Any) -> list[tuple[int, int]]:
    """Send options in all three ways; return (option, reply type) of what came back."""
    _, sent = feed_server(b"".join(options), **kwargs)
    return [(option, rep) for option, rep, _ in replies(sent)]


def answer(option: int, data: bytes = b"", *before: bytes) -> int:
    """Return the type of the last reply to `option`."""
    return ask(*before, encode_option(option, data))[-1][1]


def feed_client(data: bytes, **kwargs: Any) -> tuple[ClientHandshake, bytes]:
    """Feed a client that wants "disk" in all three ways; return it and what it sent.

    It asks for extended headers only if it is told to.
    """
    kwargs.setdefault("want_extended", False)
    whole = ClientHandshake("disk", **kwargs)
    whole.receive_data(data)
    sent = b"".join(whole.data_to_send())

    slow = ClientHandshake("disk", **kwargs)
    for i in range(len(data)):
        slow.receive_data(data[i : i + 1])
    slow_sent = b"".join(slow.data_to_send())
    assert slow.negotiated == whole.negotiated
    assert str(slow.error) == str(whole.error)
    assert slow_sent == sent

    trailed = ClientHandshake("disk", **kwargs)
    trailed.receive_data(data + GARBAGE)
    assert b"".join(trailed.data_to_send()).startswith(sent)
    if whole.negotiated:
        assert trailed.negotiated == whole.negotiated
        assert trailed.trailing_data() == GARBAGE
    if whole.error:
        assert str(trailed.error) == str(whole.error)
    return whole, sent


# Transmission.

CONTEXTS = ((1, "base:allocation"),)
STRUCTURED = ClientNegotiated("disk", MIB, ALL_FLAGS, True, CONTEXTS)
SIMPLE = ClientNegotiated("disk", MIB, ALL_FLAGS, False)

EXTENDED = ClientNegotiated("disk", MIB, ALL_FLAGS, True, CONTEXTS, extended=True)

SERVED = Negotiated(DISK, True, CONTEXTS)
SERVED_EXTENDED = Negotiated(DISK, True, CONTEXTS, extended=True)
SERVED_SIMPLE = Negotiated(DISK, False)

# command, flags, cookie, offset, length
Request = tuple[int, int, int, int, int]


def client(
    negotiated: ClientNegotiated, requests: Iterable[Request]
) -> ClientTransmission:
    """Return a client with the requests in flight; READs have buffers full of 0xEE."""
    transmission = ClientTransmission(negotiated)
    for command, flags, cookie, offset, length in requests:
        buffer = None
        if command == CMD_READ:
            buffer = memoryview(bytearray(b"\xee" * length))
        transmission.request(command, flags, cookie, offset, length, buffer)
    return transmission


def data_of(completion: Completion) -> bytes:
    """Return what a READ read."""
    assert completion.buffer is not None
    return bytes(completion.buffer)


def _describe(completions: list[Completion]) -> list[tuple[object, ...]]:
    return [
        (
            c.cookie,
            c.error,
            c.message,
            c.extents,
            None if c.buffer is None else bytes(c.buffer),
        )
        for c in completions
    ]


def _pour(
    transmission: ClientTransmission, data: bytes, step: int
) -> tuple[list[Completion], str]:
    completed: list[Completion] = []
    try:
        for i in range(0, len(data), step):
            completed += transmission.receive_data(data[i : i + step])
    except ReplyError as error:
        return completed + transmission.fail_all(1000), str(error)
    return completed, ""


def feed_replies(
    data: bytes, *requests: Request, negotiated: ClientNegotiated = STRUCTURED
) -> list[Completion]:
    """Feed replies in all three ways; return what completed.

    Raises: ReplyError, after it was raised in all three ways.
    """
    whole = client(negotiated, requests)
    completed, error = _pour(whole, data, len(data))
    slow, slow_error = _pour(client(negotiated, requests), data, 1)
    assert slow_error == error
    described = _describe(completed)
    assert _describe(slow) == described
    trailed, trailed_error = _pour(
        client(negotiated, requests), data + GARBAGE, len(data) + len(GARBAGE)
    )
    assert trailed_error == (error or "bad reply magic 0x10203")
    assert _describe(trailed)[: len(described)] == described
    if error:
        raise ReplyError(error)
    return completed
