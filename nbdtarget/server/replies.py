# SPDX-License-Identifier: Apache-2.0
"""`Answers`: the replies of one connection that go to the queue; and the packing of those READs that take more than a header.

`at` is the cookie and the offset of a request.
"""

import logging
import os
from typing import Final

from nbdtarget.bio import OP_WRITE, Bio
from nbdtarget.server.buffers import HEADER_ROOM, Buffer
from nbdtarget.server.flow import Flow
from nbdtarget.server.limits import Limits
from nbdtarget.server.output import Output
from nbdtarget.server.request import Request
from nbdtarget.server.shared import Host
from nbdtarget.server.traffic import Traffic
from nbdtarget.server.zeroes import is_zero
from nbdtarget_protocol.consts import (
    CMD_FLAG_DF,
    EXTENDED_CHUNK,
    EXTENDED_OFFSET_DATA,
    EXTENDED_REPLY_MAGIC,
    REPLY_FLAG_DONE,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
)
from nbdtarget_protocol.errors import RequestError
from nbdtarget_protocol.replies import Replies
from nbdtarget_protocol.transmission import wire_errno

__all__ = ["Answers"]

_pack_extended: Final = EXTENDED_CHUNK.pack_into
_pack_extended_data: Final = EXTENDED_OFFSET_DATA.pack_into

# These values are packed as plain numbers.
assert REPLY_FLAG_DONE == REPLY_TYPE_OFFSET_DATA == 1
assert REPLY_TYPE_NONE == 0

log = logging.getLogger(__name__)

_At = tuple[int, int]


class Answers:
    """See the module head.

    Args:
        chunk_max: bytes of data in one chunk.

    Attributes:
        zero_min: a READ of at least this length is looked through for zeroes.
    """

    def __init__(
        self,
        host: Host,
        output: Output,
        flow: Flow,
        replies: Replies,
        limits: Limits,
        traffic: Traffic,
        chunk_max: int,
    ) -> None:
        self._chunk_max = chunk_max if replies.structured else 1 << 62
        self._host, self._output, self._flow = host, output, flow
        self._replies, self._traffic = replies, traffic
        self.zero_min = limits.zero_check_min if replies.structured else 1 << 62

    def done(self, at: _At, command: int) -> None:
        """Answer a request that returns nothing."""
        self._output.push(self._replies.done(command, *at))

    def refuse(self, at: _At, command: int, refusal: RequestError) -> None:
        self._traffic.note_failed(command)
        log.debug("%s: %s", self._host.peer, refusal)
        self._output.push(self._replies.error(*at, refusal.errno, refusal.message))

    def fail(self, at: _At, command: int, flags: int, errno: int) -> None:
        """A request has ended with an errno, which may be any."""
        self._traffic.note_failed(command)
        error = wire_errno(errno, command, flags)
        self._output.push(self._replies.error(*at, error, os.strerror(errno)))

    def pack(
        self, bio: Bio, payload: memoryview, out: int, cookie: int, offset: int
    ) -> int:
        """Pack the reply to a READ or WRITE that ended inline into the arena, and return its length.

        Args:
            payload: the place in the arena where the data of a READ belongs.
            out: where in the arena the reply begins.
        """
        output, length = self._output, bio.length
        if bio.op == OP_WRITE:
            at = cookie, offset, 0
            # The fields of a chunk, by the names in the standard: magic, flags (DONE), type (NONE).
            _pack_extended(output.arena, out, EXTENDED_REPLY_MAGIC, 1, 0, *at)
            return EXTENDED_CHUNK.size
        if length >= self.zero_min or bio.payload is not payload:
            how = cookie, offset, self._replies, self.zero_min
            return _pack_read(output, bio, payload, out, how)
        at_data = cookie, offset, length + 8, offset
        _pack_extended_data(output.arena, out, EXTENDED_REPLY_MAGIC, 1, 1, *at_data)
        return EXTENDED_OFFSET_DATA.size + length

    def read(self, bio: Bio, request: Request) -> None:
        """Answer a READ from its own buffer."""
        cookie, _, flags, offset, charge, buffer, zeroes, _ = request
        if zeroes:
            self._output.push(self._replies.hole(cookie, offset, bio.length))
            self._flow.give_back(charge, buffer)
            return
        looks = zeroes is None and not flags & CMD_FLAG_DF
        how = cookie, offset, self._replies, self.zero_min if looks else 1 << 62
        if _push_read(self._output, bio, how, (charge, buffer), self._chunk_max):
            self._flow.give_back(charge, buffer)


def _pack_read(
    output: Output,
    bio: Bio,
    payload: memoryview,
    out: int,
    request: tuple[int, int, Replies, int],
) -> int:
    """Pack the reply to a READ that is long, or whose bio was owned on its way and ended inline.

    Args:
        payload: the place in the arena of `output` where the data belongs.
        out: where in the arena the reply begins.
        request: cookie, offset, how the connection is answered, and how long data must be to be looked
            through for zeroes.

    Returns the length of the reply.
    """
    arena, length = output.arena, bio.length
    cookie, offset, replies, zero_min = request
    if bio.payload is not payload:
        assert bio.payload is not None
        payload[:] = bio.payload
    data_at = out + replies.read_header
    if replies.structured and length >= zero_min and is_zero(arena, data_at, length):
        hole = replies.hole(cookie, offset, length)
        arena[out : out + len(hole)] = hole
        return len(hole)
    arena[out:data_at] = replies.data(cookie, offset, length)
    return replies.read_header + length


def _push_read(
    output: Output,
    bio: Bio,
    request: tuple[int, int, Replies, int],
    account: tuple[int, Buffer | None],
    chunk_max: int,
) -> bool:
    """Queue the reply to a READ that has a buffer of its own.

    Args:
        request: as for `pack_read`.
        account: given back when the data has left: charge, and the buffer.

    Returns whether the reply is a hole: then the buffer is free already.
    """
    cookie, offset, replies, zero_min = request
    charge, buffer = account
    payload, length = bio.payload, bio.length
    assert payload is not None
    in_buffer = buffer is not None and payload.obj is buffer
    if (
        length >= zero_min
        and (in_buffer or memoryview(payload.obj).nbytes == length)  # from `own`
        and is_zero(payload.obj, HEADER_ROOM if in_buffer else 0, length)
    ):
        output.push(replies.hole(cookie, offset, length))
        return True
    if length > chunk_max:
        _push_parts(output, payload, request, account, chunk_max)
        return False
    header = replies.data(cookie, offset, length)
    if in_buffer and buffer is not None:
        begin = HEADER_ROOM - len(header)
        buffer[begin:HEADER_ROOM] = header
        reply = memoryview(buffer)[begin : HEADER_ROOM + length]
        output.push(reply, charge, buffer)
    else:
        output.push(header)
        output.push(payload, charge, buffer)
    return False


def _push_parts(
    output: Output,
    payload: memoryview,
    request: tuple[int, int, Replies, int],
    account: tuple[int, Buffer | None],
    chunk_max: int,
) -> None:
    """As `_push_read`, in several chunks of at most `chunk_max` bytes."""
    cookie, at, replies, _ = request
    length = len(payload)
    for begin in range(0, length, chunk_max):
        part = payload[begin : begin + chunk_max]
        is_last = begin + len(part) == length
        where = cookie, at, at + begin, len(part)
        output.push(replies.part(*where, done=is_last))
        output.push(part, *(account if is_last else (0, None)))
