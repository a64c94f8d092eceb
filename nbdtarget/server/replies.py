# SPDX-License-Identifier: Apache-2.0
"""Replies that need a closer look: a READ that may be a hole, and an error."""

from nbdtarget.bio import Bio
from nbdtarget.server.output import Output
from nbdtarget.server.zeroes import is_zero
from protocol.consts import (
    OFFSET_DATA,
    SIMPLE_REPLY,
)
from protocol.transmission import (
    error_chunk,
    offset_hole,
    pack_offset_data_into,
    pack_simple_reply_into,
    simple_reply,
)

__all__ = ["encode_error", "pack_read"]


def pack_read(
    output: Output,
    bio: Bio,
    payload: memoryview,
    out: int,
    request: tuple[int, int],
    *,
    structured: bool,
    zero_min: int,
) -> int:
    """Pack the reply to a READ that is long, or was owned on its way and ended inline.

    Args:
        payload: the place in the arena of `output` where the data belongs.
        out: where in the arena the reply begins.
        request: cookie and offset.
        zero_min: data this long is looked through for zeroes.

    Returns how long the reply is.
    """
    arena, length = output.arena, bio.length
    cookie, offset = request
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


def encode_error(cookie: int, error: int, message: str, *, structured: bool) -> bytes:
    """Return the reply that says `error`, one of the wire's."""
    if structured:
        return error_chunk(cookie, error, message.encode())
    return simple_reply(error, cookie)
