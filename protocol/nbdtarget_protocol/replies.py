# SPDX-License-Identifier: Apache-2.0
"""`Replies`: how one connection is answered, which was decided in its handshake.

    SimpleReplies       16 bytes for each reply; READ data follows, and where it ends is not said
    StructuredReplies   READ and BLOCK_STATUS are answered with chunks of 20 bytes and more, the others with simple replies
    ExtendedReplies     everything is answered with chunks of 32 bytes and more

Each method encodes one whole reply, except that the data of a READ, and further contexts of a BLOCK_STATUS, follow, and that `part` is
one of several chunks. `at` is the offset of the request. `error` is one of the wire's eight.
"""

from collections.abc import Iterable
from typing import ClassVar

from nbdtarget_protocol import extended, transmission
from nbdtarget_protocol.consts import (
    CMD_READ,
    EXTENDED_OFFSET_DATA,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    OFFSET_DATA,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
)
from nbdtarget_protocol.handshake import Negotiated
from nbdtarget_protocol.transmission import simple_reply

__all__ = [
    "ExtendedReplies",
    "Replies",
    "SimpleReplies",
    "StructuredReplies",
    "replies_of",
]


class SimpleReplies:
    """See the module head.

    Attributes:
        request: the layout of a request: magic, flags, command, cookie, offset, length.
        request_magic: what a request begins with.
        read_header: bytes in front of the data of a READ.
        structured, extended: as negotiated. With `structured` a READ may be answered with a hole.
    """

    request: ClassVar = REQUEST
    request_magic: ClassVar[int] = REQUEST_MAGIC
    read_header: ClassVar[int] = SIMPLE_REPLY.size
    structured: ClassVar[bool] = False
    extended: ClassVar[bool] = False

    def done(self, command: int, cookie: int, at: int) -> bytes:
        """Success, of a request that returns nothing."""
        return simple_reply(0, cookie)

    def error(self, cookie: int, at: int, error: int, message: str) -> bytes:
        return simple_reply(error, cookie)

    def data(self, cookie: int, at: int, length: int) -> bytes:
        """Return the head of a chunk with `length` > 0 bytes of data, which are all that the READ asked for."""
        return simple_reply(0, cookie)

    def part(
        self, cookie: int, at: int, offset: int, length: int, *, done: bool
    ) -> bytes:
        """Return the head of a chunk with `length` > 0 bytes of data, some of those that the READ asked for; `done` with the last ones."""
        raise AssertionError("a simple reply has no parts")

    def hole(self, cookie: int, at: int, length: int) -> bytes:
        """All that a READ of `length` > 0 bytes asked for is zeroes."""
        raise AssertionError("a simple reply has no holes")

    def block_status(
        self,
        cookie: int,
        at: int,
        context_id: int,
        extents: Iterable[tuple[int, int]],
        *,
        done: bool,
    ) -> bytes:
        """Return the chunk of one context; `done` in the last one only. They need not describe equally many bytes."""
        raise AssertionError("BLOCK_STATUS is not answered with a simple reply")


class StructuredReplies(SimpleReplies):
    """See the module head."""

    read_header = OFFSET_DATA.size
    structured = True

    def done(self, command: int, cookie: int, at: int) -> bytes:
        if command == CMD_READ:
            return transmission.none_chunk(cookie)
        return simple_reply(0, cookie)

    def error(self, cookie: int, at: int, error: int, message: str) -> bytes:
        return transmission.error_chunk(cookie, error, message.encode())

    def data(self, cookie: int, at: int, length: int) -> bytes:
        return transmission.offset_data_header(cookie, at, length, done=True)

    def part(
        self, cookie: int, at: int, offset: int, length: int, *, done: bool
    ) -> bytes:
        return transmission.offset_data_header(cookie, offset, length, done)

    def hole(self, cookie: int, at: int, length: int) -> bytes:
        return transmission.offset_hole(cookie, at, length, done=True)

    def block_status(
        self,
        cookie: int,
        at: int,
        context_id: int,
        extents: Iterable[tuple[int, int]],
        *,
        done: bool,
    ) -> bytes:
        return transmission.block_status(cookie, context_id, extents, done)


class ExtendedReplies(StructuredReplies):
    """See the module head."""

    request = EXTENDED_REQUEST
    request_magic = EXTENDED_REQUEST_MAGIC
    read_header = EXTENDED_OFFSET_DATA.size
    extended = True

    def done(self, command: int, cookie: int, at: int) -> bytes:
        return extended.none_chunk(cookie, at)

    def error(self, cookie: int, at: int, error: int, message: str) -> bytes:
        return extended.error_chunk(cookie, at, error, message.encode())

    def data(self, cookie: int, at: int, length: int) -> bytes:
        return extended.offset_data_header(cookie, at, at, length, done=True)

    def part(
        self, cookie: int, at: int, offset: int, length: int, *, done: bool
    ) -> bytes:
        return extended.offset_data_header(cookie, at, offset, length, done)

    def hole(self, cookie: int, at: int, length: int) -> bytes:
        return extended.offset_hole(cookie, at, at, length, done=True)

    def block_status(
        self,
        cookie: int,
        at: int,
        context_id: int,
        extents: Iterable[tuple[int, int]],
        *,
        done: bool,
    ) -> bytes:
        return extended.block_status(cookie, at, context_id, extents, done)


Replies = SimpleReplies


def replies_of(negotiated: Negotiated) -> Replies:
    """Return how a connection is answered that has negotiated this."""
    if negotiated.extended:
        return ExtendedReplies()
    return StructuredReplies() if negotiated.structured else SimpleReplies()
