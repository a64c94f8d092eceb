# SPDX-License-Identifier: Apache-2.0
"""`Completion`: a request of the client, and what has come of it; which parts of its READ have come.

A READ that is answered in pieces keeps at most SPANS_MAX disjoint spans.
"""

from bisect import bisect_right
from typing import Final

from nbdtarget_protocol.consts import CMD_FLAG_REQ_ONE, CMD_NAMES
from nbdtarget_protocol.errors import ReplyError

__all__ = ["Completion", "add_span", "check_extents"]

SPANS_MAX: Final = 1 << 16


class Completion:
    """A request in flight; when it has completed, also its result.

    Attributes:
        cookie, command, flags, offset, length: of the request.
        buffer: READ: where the data is.
        error: 0 or one of the wire's eight.
        message: what the server said about the error, or "".
        extents: BLOCK_STATUS without error: (length in bytes, flags) from `offset` on, none
            longer than the request, perhaps less than all of it. Of the first metadata
            context that was negotiated, and asked; at most `extents_max` of them.
        private: the caller's own.
    """

    __slots__ = (
        "asked_ids",
        "buffer",
        "command",
        "contexts",
        "cookie",
        "covered",
        "error",
        "extents",
        "flags",
        "length",
        "message",
        "offset",
        "private",
        "spans",
    )

    def __init__(
        self,
        command: int,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        buffer: memoryview | None,
        private: object,
    ) -> None:
        self.command = command
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.private = private
        self.error = 0
        self.message = ""
        self.extents: list[tuple[int, int]] | None = None
        self.covered = 0  # bytes of a structured READ that came
        # The borders of what came, begin, end, begin, end, ...; None: nothing or all.
        self.spans: list[int] | None = None
        self.contexts: set[int] | None = None  # those that were answered
        self.asked_ids: tuple[int, ...] = ()  # those that must be

    def __repr__(self) -> str:
        name = CMD_NAMES.get(self.command, str(self.command))
        return (
            f"<{name} {self.offset}+{self.length} cookie={self.cookie:#x}"
            f" error={self.error}>"
        )


def add_span(request: Completion, begin: int, end: int) -> None:
    """Add a range to those that came already. Raises: ReplyError if they overlap."""
    spans = request.spans
    if spans is None:
        raise ReplyError(f"overlapping chunks in reply to {request!r}")
    i = bisect_right(spans, begin)
    if i % 2 or (i < len(spans) and spans[i] < end):
        raise ReplyError(f"overlapping chunks in reply to {request!r}")
    # Ranges that touch become one: the border that both share is removed.
    first, last = i, i
    borders = []
    if i and spans[i - 1] == begin:
        first -= 1
    else:
        borders.append(begin)
    if i < len(spans) and spans[i] == end:
        last += 1
    else:
        borders.append(end)
    spans[first:last] = borders
    if len(spans) > 2 * SPANS_MAX:
        raise ReplyError(f"too many scattered chunks in reply to {request!r}")


def check_extents(request: Completion, extents: list[tuple[int, int]]) -> None:
    """Check descriptors, and cut the last at the request's end. Raises: ReplyError."""
    total = 0
    for length, _ in extents:
        if not length:
            raise ReplyError("BLOCK_STATUS descriptor of no bytes")
        if total >= request.length:
            raise ReplyError(f"descriptors past the end of {request!r}")
        total += length
    if request.flags & CMD_FLAG_REQ_ONE and (
        len(extents) != 1 or total > request.length
    ):
        raise ReplyError(f"REQ_ONE was ignored in reply to {request!r}")
    if total > request.length:
        length, flags = extents[-1]
        extents[-1] = (length - (total - request.length), flags)
