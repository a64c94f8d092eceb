# SPDX-License-Identifier: Apache-2.0
"""Replies that take more than a header: a READ that may be answered with a hole, and errors."""

from nbdtarget.bio import Bio
from nbdtarget.server.buffers import HEADER_ROOM, Buffer
from nbdtarget.server.output import Output
from nbdtarget.server.zeroes import is_zero
from nbdtarget_protocol.consts import OFFSET_DATA, SIMPLE_REPLY
from nbdtarget_protocol.transmission import (
    error_chunk,
    offset_hole,
    pack_offset_data_into,
    pack_simple_reply_into,
    simple_reply,
)

__all__ = ["encode_error", "pack_read", "push_read"]


def pack_read(
    output: Output,
    bio: Bio,
    payload: memoryview,
    out: int,
    request: tuple[int, int, bool, int],
) -> int:
    """Pack the reply to a READ that is long, or whose bio was owned on its way and ended inline.

    Args:
        payload: the place in the arena of `output` where the data belongs.
        out: where in the arena the reply begins.
        request: cookie, offset, whether replies are structured, and how long data must be to be looked
            through for zeroes.

    Returns the length of the reply.
    """
    arena, length = output.arena, bio.length
    cookie, offset, structured, zero_min = request
    if bio.payload is not payload:
        assert bio.payload is not None
        payload[:] = bio.payload
    if not structured:
        pack_simple_reply_into(arena, out, 0, cookie)
        return SIMPLE_REPLY.size + length
    data_at = out + OFFSET_DATA.size
    if length >= zero_min and is_zero(arena, data_at, length):
        hole = offset_hole(cookie, offset, length, done=True)
        arena[out : out + len(hole)] = hole
        return len(hole)
    pack_offset_data_into(arena, out, cookie, offset, length, done=True)
    return OFFSET_DATA.size + length


def push_read(
    output: Output,
    bio: Bio,
    request: tuple[int, int, bool, int],
    account: tuple[int, Buffer | None],
) -> bool:
    """Queue the reply to a READ that has a buffer of its own.

    Args:
        request: as for `pack_read`.
        account: given back when the data has left: charge, and the buffer.

    Returns whether the reply is a hole: then the buffer is free already.
    """
    cookie, offset, structured, zero_min = request
    charge, buffer = account
    payload, length = bio.payload, bio.length
    assert payload is not None
    in_buffer = buffer is not None and payload.obj is buffer
    if (
        length >= zero_min
        and (in_buffer or memoryview(payload.obj).nbytes == length)  # from `own`
        and is_zero(payload.obj, HEADER_ROOM if in_buffer else 0, length)
    ):
        output.push(offset_hole(cookie, offset, length, done=True))
        return True
    header = bytearray(OFFSET_DATA.size if structured else SIMPLE_REPLY.size)
    if structured:
        pack_offset_data_into(header, 0, cookie, offset, length, done=True)
    else:
        pack_simple_reply_into(header, 0, 0, cookie)
    if in_buffer and buffer is not None:
        begin = HEADER_ROOM - len(header)
        buffer[begin:HEADER_ROOM] = header
        reply = memoryview(buffer)[begin : HEADER_ROOM + length]
        output.push(reply, charge, buffer)
    else:
        output.push(header)
        output.push(payload, charge, buffer)
    return False


def encode_error(cookie: int, error: int, message: str, *, structured: bool) -> bytes:
    """Return the reply that reports `error`, which is one of the wire's eight."""
    if structured:
        return error_chunk(cookie, error, message.encode())
    return simple_reply(error, cookie)
