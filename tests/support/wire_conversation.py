# SPDX-License-Identifier: Apache-2.0
"""The conversations of the wire fuzzer with a whole server, and a small model of the right answers.

A conversation is right but for requests that a client should not send. Each of these is answered with an error. The model
is written from the standard, and not from the code.
"""

import hashlib
import random
import struct
from collections import Counter
from typing import Final

from nbdtarget_protocol import consts as c
from nbdtarget_protocol import extended as ext
from nbdtarget_protocol.options import encode_option

__all__ = [
    "ASKS_FOR",
    "HOW",
    "KIB",
    "PAYLOAD_MAX",
    "RANGE_SLICE",
    "READ_SLICE",
    "SIZE",
    "Conversation",
    "Received",
    "allocation_of",
    "check_answers",
]

KIB: Final = 1 << 10
SIZE: Final = 256 * KIB
PAYLOAD_MAX: Final = 96 * KIB
READ_SLICE: Final = 32 * KIB
RANGE_SLICE: Final = 64 * KIB
# A client negotiates simple replies, structured ones, or extended headers.
HOW: Final = ("simple", "structured", "extended")
ASKS_FOR: Final = {
    "simple": b"",
    "structured": encode_option(c.OPT_STRUCTURED_REPLY),
    "extended": encode_option(c.OPT_EXTENDED_HEADERS),
}
COMMANDS: Final = (
    *(c.CMD_READ, c.CMD_WRITE) * 4,
    *(c.CMD_FLUSH, c.CMD_TRIM, c.CMD_CACHE, c.CMD_WRITE_ZEROES, c.CMD_BLOCK_STATUS),
)


def allocation_of(name: str) -> bytes:
    """SET_META_CONTEXT for base:allocation of an export."""
    query = c.BASE_ALLOCATION.encode()
    head = struct.pack(">I", len(name)) + name.encode() + struct.pack(">I", 1)
    return head + struct.pack(">I", len(query)) + query


class Asked:
    """A request as it is sent, and what a model of a disk says must come of it."""

    def __init__(self, cookie: int, command: int, offset: int) -> None:
        self.cookie = cookie
        self.command = command
        self.offset = offset
        self.is_error = False
        self.data = b""


class Conversation:
    """The bytes that one client sends: a right handshake, and requests that are mostly right.

    Attributes:
        stream: all of it.
        asked: the requests that must be answered, in order, if nothing is damaged.
        ends: why nothing is served behind them: "DISC", "garbage", "too long" or "EOF".
        disk: what the disk holds afterwards.
        in_slices: ranges that are carried out in pieces. No later request touches one of them.
    """

    def __init__(self, rng: random.Random, disk: bytes) -> None:
        self.how = rng.choice(HOW)
        self.structured = self.how != "simple"
        self.extended = self.how == "extended"
        self.disk = bytearray(disk)
        self.asked: list[Asked] = []
        self.ends = "EOF"
        self._rng = rng
        self.in_slices: list[range] = []
        head = c.CLIENT_FLAGS.pack(3)
        if self.structured:
            head += ASKS_FOR[self.how]
            head += encode_option(c.OPT_SET_META_CONTEXT, allocation_of("disk"))
        go = struct.pack(">I4sH", 4, b"disk", 0)
        self.stream = head + encode_option(c.OPT_GO, go)
        for _ in range(rng.randint(0, 30)):
            self.stream += self._request()
            if self.ends != "EOF":
                break

    def _request(self) -> bytes:
        rng = self._rng
        if rng.random() < 0.03:
            return self._end()
        command = rng.choice(COMMANDS)
        offset = rng.choice((0, 1, 4096, SIZE // 2, SIZE - 1, SIZE - 4096, SIZE))
        length = rng.choice((0, 1, 512, 4096, 40 * KIB, PAYLOAD_MAX))
        if rng.random() < 0.05:
            offset = rng.choice((SIZE + 1, 1 << 40, (1 << 64) - 1))
        if rng.random() < 0.03:
            length = rng.choice((PAYLOAD_MAX + 1, 2 * PAYLOAD_MAX))
        touched = range(offset, offset + length)
        if any(_overlap(touched, slow) for slow in self.in_slices):
            length = 0
        flags = rng.choice((0, 0, 0, 0, c.CMD_FLAG_FUA, c.CMD_FLAG_DF, 1 << 9))
        asked = Asked(len(self.asked) + 1, command, offset)
        self.asked.append(asked)
        has_payload = command == c.CMD_WRITE
        if self.extended:
            # Sometimes a WRITE does not say that it has a payload, and something else has one.
            says_so = has_payload ^ (rng.random() < 0.05)
            flags |= c.CMD_FLAG_PAYLOAD_LEN if says_so else 0
            has_payload |= says_so
            if not has_payload and rng.random() < 0.05:
                length = rng.choice((1 << 32, 1 << 40, (1 << 64) - 1))
        payload = rng.randbytes(length) if has_payload else b""
        if has_payload and command == c.CMD_BLOCK_STATUS:
            payload = self._status_payload(length)
        self._model(asked, flags, offset, length, payload)
        if has_payload:
            length = len(payload)
        return self._header(flags, command, asked.cookie, offset, length) + payload

    def _header(self, *fields: int) -> bytes:
        if self.extended:
            return c.EXTENDED_REQUEST.pack(c.EXTENDED_REQUEST_MAGIC, *fields)
        return c.REQUEST.pack(c.REQUEST_MAGIC, *fields)

    def _status_payload(self, length: int) -> bytes:
        ids = self._rng.choice(((1,), (1,), (), (2,), (1, 1), (1, 2), (0, 1, 2)))
        return ext.encode_status_payload(length, ids)

    def _end(self) -> bytes:
        self.ends = self._rng.choice(("DISC", "garbage", "too long"))
        if self.ends == "garbage":
            return self._rng.randbytes(c.EXTENDED_REQUEST.size)
        flags, command, length = 0, c.CMD_DISC, 0
        if self.ends == "too long":
            command, length = c.CMD_WRITE, 1 << 31
            if self.extended:
                flags = c.CMD_FLAG_PAYLOAD_LEN
                command = self._rng.choice((c.CMD_WRITE, c.CMD_TRIM, 77))
        return self._header(flags, command, 0, 0, length) + bytes(100)

    def _model(
        self, asked: Asked, flags: int, offset: int, length: int, payload: bytes
    ) -> None:
        """Say what must come of a request. Written from the standard, and not from the code."""
        command = asked.command
        allowed = c.CMD_FLAG_FUA
        if command == c.CMD_READ and self.structured:
            allowed |= c.CMD_FLAG_DF
        if self.extended and command in (c.CMD_WRITE, c.CMD_BLOCK_STATUS):
            allowed |= c.CMD_FLAG_PAYLOAD_LEN
        is_plain = command in (c.CMD_READ, c.CMD_WRITE)
        is_status = command == c.CMD_BLOCK_STATUS
        asked.is_error = bool(flags & ~allowed) or (is_status and not self.structured)
        if self.extended and is_status and flags & c.CMD_FLAG_PAYLOAD_LEN:
            asked.is_error |= payload[8:] != b"\0\0\0\1"  # the only context
        if command != c.CMD_FLUSH:
            asked.is_error |= offset + length > SIZE
            asked.is_error |= is_plain and length > PAYLOAD_MAX
            asked.is_error |= is_status and length == 0
        if asked.is_error:
            return
        if command == c.CMD_READ:
            asked.data = bytes(self.disk[offset : offset + length])
        elif command == c.CMD_WRITE:
            self.disk[offset : offset + length] = payload
        elif command in (c.CMD_WRITE_ZEROES, c.CMD_TRIM):
            self.disk[offset : offset + length] = bytes(length)
            if length > RANGE_SLICE:
                # The server carries it out in pieces, and what is sent meanwhile may come before a piece: no answer was waited for.
                self.in_slices.append(range(offset, offset + length))

    def expects(self, disk: bytearray) -> bool:
        """Whether this is what the disk may hold afterwards."""
        expected = self.disk
        if self.ends in ("garbage", "too long"):
            # The connection was closed, and a range that was carried out in pieces may have ended between two of them.
            expected = bytearray(expected)
            for cut in self.in_slices:
                expected[cut.start : cut.stop] = disk[cut.start : cut.stop]
        return disk == expected


def _overlap(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


class Received:
    """The replies that the server sent in transmission, taken apart.

    Attributes:
        answers: (cookie, is an error, data) of each reply that is whole.
    """

    def __init__(self, data: bytes, conversation: Conversation) -> None:
        self.answers: list[tuple[int, bool, bytes]] = []
        self._data = data
        self._at = 0
        self._by_cookie = {each.cookie: each for each in conversation.asked}
        while self._at < len(data):
            (magic,) = struct.unpack_from(">I", data, self._at)
            if conversation.extended:
                assert magic == c.EXTENDED_REPLY_MAGIC
                self._take_chunks(c.EXTENDED_CHUNK)
            elif magic == c.SIMPLE_REPLY_MAGIC:
                self._take_simple(structured=conversation.structured)
            else:
                assert magic == c.STRUCTURED_REPLY_MAGIC
                assert conversation.structured
                self._take_chunks(c.CHUNK)

    def _take(self, length: int) -> bytes:
        taken = self._data[self._at : self._at + length]
        assert len(taken) == length, "a reply is cut off"
        self._at += length
        return taken

    def _take_simple(self, *, structured: bool) -> None:
        _, error, cookie = c.SIMPLE_REPLY.unpack(self._take(16))
        asked = self._by_cookie[cookie]
        is_read = asked.command == c.CMD_READ
        assert not (is_read and structured), "a simple reply to a structured READ"
        data = self._take(len(asked.data)) if is_read and not error else b""
        self.answers.append((cookie, bool(error), data))

    def _take_chunks(self, layout: struct.Struct) -> None:
        data, is_error = b"", False
        while True:
            head = self._take(layout.size)
            _, flags, kind, cookie, *at, length = layout.unpack(head)
            assert at in ([], [self._by_cookie[cookie].offset])
            body = self._take(length)
            if kind == c.REPLY_TYPE_OFFSET_DATA:
                data += body[8:]
            elif kind == c.REPLY_TYPE_OFFSET_HOLE:
                data += bytes(struct.unpack(">QI", body)[1])
            is_error |= bool(kind & 1 << 15)
            if flags & c.REPLY_FLAG_DONE:
                self.answers.append((cookie, is_error, data))
                return


def check_answers(conversation: Conversation, received: Received) -> None:
    """Without damage: everything is answered once, and as the model says."""
    expected = Counter(
        (each.cookie, each.is_error, _digest(each.data)) for each in conversation.asked
    )
    answers = Counter(
        (cookie, is_error, _digest(data)) for cookie, is_error, data in received.answers
    )
    surplus, missing = answers - expected, expected - answers
    assert not surplus, surplus
    # After garbage the connection is closed at once, with what was not sent yet.
    assert not missing or conversation.ends in ("garbage", "too long"), missing


def _digest(data: bytes) -> tuple[int, str]:
    """Length and content, to compare and to print.

    Only the length of a READ that is carried out in slices: between them later requests are carried out, which the
    standard allows.
    """
    if len(data) > READ_SLICE:
        return len(data), "in slices"
    return len(data), hashlib.sha256(data).hexdigest()[:8]
