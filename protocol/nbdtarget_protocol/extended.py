# SPDX-License-Identifier: Apache-2.0
"""Extended headers: how requests and replies look when EXTENDED_HEADERS was negotiated.

Every header has 32 bytes, and lengths have 64 bits. What differs from compact headers:

- A request that carries a payload says so by PAYLOAD_LEN: a WRITE always should, and a BLOCK_STATUS may. The length in
  its header is then that of the payload. The payload of a BLOCK_STATUS has the length that is asked about, and the ids
  of the metadata contexts that are to answer.
- Every reply is made of chunks, also to a WRITE or a FLUSH, and each chunk has the offset of its request.
- BLOCK_STATUS is answered with descriptors of 64 bits, however short the request is.

The encoders have the names of those for structured replies in `transmission.py`. Each takes `at`, the offset of
the request, behind the cookie.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from struct import Struct
from typing import Final

from nbdtarget_protocol.consts import (
    EINVAL,
    EXTENDED_CHUNK,
    EXTENDED_OFFSET_DATA,
    EXTENDED_OFFSET_HOLE,
    EXTENDED_REPLY_MAGIC,
    EXTENTS_MAX,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS_EXT,
    REPLY_TYPE_ERROR,
    REPLY_TYPE_ERROR_OFFSET,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    STRING_MAX,
    U64,
)
from nbdtarget_protocol.errors import RequestError

__all__ = [
    "block_status",
    "decode_status_payload",
    "encode_status_payload",
    "error_chunk",
    "none_chunk",
    "offset_data_header",
    "offset_hole",
]

_ERROR: Final = Struct(">IHHQQQIH")  # EXTENDED_CHUNK, error, message length


def none_chunk(cookie: int, at: int) -> bytes:
    """Encode a NONE chunk: the end of a reply, successful unless an error chunk came."""
    return EXTENDED_CHUNK.pack(
        EXTENDED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_TYPE_NONE, cookie, at, 0
    )


def offset_data_header(
    cookie: int, at: int, offset: int, length: int, done: bool
) -> bytes:
    """Encode the 40 bytes before the `length` > 0 bytes of data of an OFFSET_DATA chunk."""
    return EXTENDED_OFFSET_DATA.pack(
        EXTENDED_REPLY_MAGIC,
        REPLY_FLAG_DONE if done else 0,
        REPLY_TYPE_OFFSET_DATA,
        cookie,
        at,
        length + 8,
        offset,
    )


def offset_hole(cookie: int, at: int, offset: int, length: int, done: bool) -> bytes:
    """Encode an OFFSET_HOLE chunk: `length` > 0 bytes read as zeroes."""
    assert length
    return EXTENDED_OFFSET_HOLE.pack(
        EXTENDED_REPLY_MAGIC,
        REPLY_FLAG_DONE if done else 0,
        REPLY_TYPE_OFFSET_HOLE,
        cookie,
        at,
        12,
        offset,
        length,
    )


def error_chunk(
    cookie: int,
    at: int,
    error: int,
    message: bytes = b"",
    offset: int | None = None,
    done: bool = True,
) -> bytes:
    """Encode an ERROR chunk, or ERROR_OFFSET if `offset` is given (it lies in the request).

    Args:
        error: one of the wire's eight.
        message: UTF-8, for people; cut at 4096 bytes.
    """
    assert error
    if len(message) > STRING_MAX:
        message = message[:STRING_MAX].decode("utf-8", "ignore").encode()
    tail = b"" if offset is None else U64.pack(offset)
    head = _ERROR.pack(
        EXTENDED_REPLY_MAGIC,
        REPLY_FLAG_DONE if done else 0,
        REPLY_TYPE_ERROR if offset is None else REPLY_TYPE_ERROR_OFFSET,
        cookie,
        at,
        6 + len(message) + len(tail),
        error,
        len(message),
    )
    return head + message + tail


def block_status(
    cookie: int,
    at: int,
    context_id: int,
    extents: Iterable[tuple[int, int]],
    done: bool,
) -> bytes:
    """Encode a BLOCK_STATUS_EXT chunk: what one metadata context says.

    Args: extents: (length in bytes, flags), as `clip_extents` returns them: at least one.
    """
    numbers = list(chain.from_iterable(extents))
    assert 2 <= len(numbers) <= 2 * EXTENTS_MAX
    return Struct(f">IHHQQQII{len(numbers)}Q").pack(
        EXTENDED_REPLY_MAGIC,
        REPLY_FLAG_DONE if done else 0,
        REPLY_TYPE_BLOCK_STATUS_EXT,
        cookie,
        at,
        8 + 8 * len(numbers),
        context_id,
        len(numbers) // 2,
        *numbers,
    )


def encode_status_payload(length: int, context_ids: Sequence[int]) -> bytes:
    """Encode the payload of a BLOCK_STATUS that only these contexts are to answer."""
    return Struct(f">Q{len(context_ids)}I").pack(length, *context_ids)


def decode_status_payload(
    payload: bytes | bytearray | memoryview, contexts: Sequence[tuple[int, str]]
) -> tuple[int, tuple[tuple[int, str], ...]]:
    """Decode such a payload: the length that is asked about, and the contexts that are to answer.

    proto.md does not say what a payload without ids means. It is refused, as BLOCK_STATUS without contexts is.

    Args: contexts: (id, name) of those that were negotiated. The answer has the same order.
    Raises: RequestError: EINVAL: of another form, or an id that was not negotiated, is given twice or is missing.
    """
    nr_ids, rest = divmod(len(payload) - 8, 4)
    if nr_ids < 1 or rest:
        reason = f"BLOCK_STATUS with a payload of {len(payload)} bytes"
        raise RequestError(EINVAL, reason)
    if nr_ids > len(contexts):
        # Not unpacked: one of them must be unknown, or given twice.
        raise RequestError(EINVAL, f"BLOCK_STATUS of {nr_ids} metadata contexts")
    length, *ids = Struct(f">Q{nr_ids}I").unpack(payload)
    selected = tuple(context for context in contexts if context[0] in ids)
    if len(selected) != nr_ids:
        reason = "BLOCK_STATUS of a metadata context that is unknown, or given twice"
        raise RequestError(EINVAL, reason)
    return length, selected
