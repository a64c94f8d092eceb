# SPDX-License-Identifier: Apache-2.0
"""The server side of transmission: which requests are refused, and how replies look.

Theory of operation. There is no parser object here: a request is 28 bytes (with extended headers 32) that the server
decodes in its receive buffer, with `REQUEST.unpack_from`, because an object for each request costs more
than everything else that is done for it. This module has the rest:

- `ServerTransmission` knows the limits of one connection. `validate` answers 0 or the errno
  for the wire; `refusal` says the same with a sentence, for the error chunk and the log. The
  server may inline the common case: `flags_allowed` has, for each command that this
  connection may use freely, the flags it may carry; a command or flag that is not in it, and
  any range that ends behind `size`, goes through `validate`.
- `payload_rule` decides about a request's payload before it was received: the payload of a refused request
  has to be received and dropped before anything else, or the next request would
  be looked for inside it.
- encoders for simple and structured replies (`extended.py` has those with extended headers, `replies.py` chooses). With
  structured replies, READ is never answered by `simple_reply`, not even with an error.
- `wire_errno` maps any errno to one of the eight errors of the wire; `clip_extents` turns any list of extents
  into descriptors that every client accepts.

Questions that proto.md leaves open are decided as follows. A length of 0 succeeds, except for BLOCK_STATUS, which must
return at least one descriptor of at least one byte. FLUSH and DISC ignore offset and length.
A READ that is longer than `payload_max` fails with EINVAL (with DF or extended headers: EOVERFLOW). No chunk has more data than was
advertised as the maximum payload, `chunk_max`: a longer READ is answered in several, so with DF it fails with EOVERFLOW. A write-type command
on a read-only export fails with EPERM, even if something else is wrong with it, too. With extended headers, a WRITE
carries its payload also without PAYLOAD_LEN, which proto.md demands and QEMU's client (10.0) leaves out: QEMU's server
takes it so, too. How long the payload of any command may be is decided as for a WRITE.
"""

import errno as errnos
from collections.abc import Iterable
from itertools import chain
from struct import Struct
from typing import Final

from nbdtarget_protocol.consts import (
    CHUNK,
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NAMES,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_NAMES,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EINVAL,
    EIO,
    ENOSPC,
    ENOTSUP,
    EOVERFLOW,
    EPERM,
    ESHUTDOWN,
    EXTENTS_MAX,
    FLAG_BLOCK_STATUS_PAYLOAD,
    FLAG_READ_ONLY,
    FLAG_SEND_CACHE,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    OFFSET_DATA,
    OFFSET_HOLE,
    PAYLOAD_MAX_DEFAULT,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_ERROR,
    REPLY_TYPE_ERROR_OFFSET,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRING_MAX,
    STRUCTURED_REPLY_MAGIC,
    U64,
)
from nbdtarget_protocol.errors import RequestError
from nbdtarget_protocol.handshake import Negotiated

__all__ = [
    "FLAGS_ALLOWED",
    "PAYLOAD_ACCEPT",
    "PAYLOAD_DISCONNECT",
    "PAYLOAD_DRAIN",
    "PAYLOAD_MAX",
    "ServerTransmission",
    "block_status",
    "clip_extents",
    "error_chunk",
    "none_chunk",
    "offset_data_header",
    "offset_hole",
    "pack_offset_data_into",
    "pack_simple_reply_into",
    "simple_reply",
    "wire_errno",
]

PAYLOAD_MAX: Final = 64 << 20  # accepted; twice what is advertised

# The ways to treat the payload of a request.
PAYLOAD_ACCEPT: Final = 0
PAYLOAD_DRAIN: Final = 1  # read and drop it, then answer EINVAL
PAYLOAD_DISCONNECT: Final = 2

# The flags that each command may carry, where everything was negotiated.
FLAGS_ALLOWED: Final = {
    CMD_READ: CMD_FLAG_FUA | CMD_FLAG_DF,
    CMD_WRITE: CMD_FLAG_FUA,
    CMD_FLUSH: CMD_FLAG_FUA,
    CMD_TRIM: CMD_FLAG_FUA,
    CMD_CACHE: CMD_FLAG_FUA,
    CMD_WRITE_ZEROES: CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
    CMD_BLOCK_STATUS: CMD_FLAG_FUA | CMD_FLAG_REQ_ONE,
}

# The transmission flag without which a command does not exist.
_COMMAND_NEEDS: Final = {
    CMD_FLUSH: FLAG_SEND_FLUSH,
    CMD_TRIM: FLAG_SEND_TRIM,
    CMD_CACHE: FLAG_SEND_CACHE,
    CMD_WRITE_ZEROES: FLAG_SEND_WRITE_ZEROES,
}
_WRITES: Final = frozenset({CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES})
_ENOSPC_PAST_END: Final = frozenset({CMD_WRITE, CMD_WRITE_ZEROES})
_PAYLOAD_FREE: Final = frozenset(
    {CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE, CMD_BLOCK_STATUS}
)


class ServerTransmission:
    """The limits of one connection in transmission; see the module head.

    Attributes:
        flags_allowed: command -> the flags it may carry here; missing if it may not come.
        size: bytes of the export.
        align_mask: minimum block size - 1: bits that offset and length must not have.
        payload_max: bytes of one READ or WRITE.
        chunk_max: bytes of data in one chunk.
        structured: READ is answered with structured replies only.
        extended: requests have extended headers. `flags_allowed` has PAYLOAD_LEN for WRITE, and for BLOCK_STATUS if it
            may have a payload.
        contexts: (id, name) of the metadata contexts; BLOCK_STATUS is answered with one chunk
            for each.
    """

    def __init__(
        self, negotiated: Negotiated, *, payload_max: int = PAYLOAD_MAX
    ) -> None:
        flags = negotiated.flags
        self.size = negotiated.export.size
        self.read_only = bool(flags & FLAG_READ_ONLY)
        self.structured = negotiated.structured
        self.extended = negotiated.extended
        self.contexts = negotiated.contexts
        self.payload_max = payload_max
        self.chunk_max = min(payload_max, negotiated.export.payload_max)
        self.align_mask = negotiated.export.block_size_min - 1
        self.flags_allowed = self._flags_allowed(flags)

    def _flags_allowed(self, flags: int) -> dict[int, int]:
        removed = 0
        if not flags & FLAG_SEND_FUA:
            removed |= CMD_FLAG_FUA
        if not flags & FLAG_SEND_FAST_ZERO:
            removed |= CMD_FLAG_FAST_ZERO
        if not self.structured:
            removed |= CMD_FLAG_DF
        allowed = {}
        for command, command_flags in FLAGS_ALLOWED.items():
            needs = _COMMAND_NEEDS.get(command, 0)
            if flags & needs != needs:
                continue
            if command in _WRITES and self.read_only:
                continue
            if command == CMD_BLOCK_STATUS and not self.contexts:
                continue
            allowed[command] = command_flags & ~removed
        if self.extended:
            for command in allowed.keys() & self._with_payload(flags):
                allowed[command] |= CMD_FLAG_PAYLOAD_LEN
        return allowed

    def _with_payload(self, flags: int) -> set[int]:
        """The commands that may carry a payload, with extended headers."""
        status = {CMD_BLOCK_STATUS} if flags & FLAG_BLOCK_STATUS_PAYLOAD else set()
        return {CMD_WRITE, *status}

    # hot: 0.25 us when nothing is wrong
    def validate(self, command: int, flags: int, offset: int, length: int) -> int:
        """Return 0 if the request may be carried out, else the errno for the wire.

        A refused WRITE's payload has to be read all the same; see `payload_rule`.
        """
        allowed = self.flags_allowed.get(command)
        if (
            allowed is not None
            and not flags & ~allowed
            and 0 < length <= self.chunk_max
            and offset + length <= self.size
            and not (offset | length) & self.align_mask
        ):
            return 0
        refusal = self.refusal(command, flags, offset, length)
        return 0 if refusal is None else refusal.errno

    def refusal(
        self, command: int, flags: int, offset: int, length: int
    ) -> RequestError | None:
        """As `validate`, but with a reason in words; None if the request may be carried out."""
        if command == CMD_DISC:
            return None  # nothing in it matters
        if command in _WRITES and self.read_only:
            return RequestError(EPERM, "export is read-only")
        allowed = self.flags_allowed.get(command)
        if allowed is None:
            return self._refuse_command(command)
        if flags & ~allowed:
            return RequestError(
                EINVAL,
                f"{CMD_NAMES[command]} with flags {_flag_names(flags & ~allowed)}",
            )
        if command == CMD_FLUSH:
            return None  # offset and length are reserved
        if offset > self.size or length > self.size - offset:
            return RequestError(
                ENOSPC if command in _ENOSPC_PAST_END else EINVAL,
                f"{CMD_NAMES[command]} {offset}+{length} past the end at {self.size}",
            )
        if (offset | length) & self.align_mask:
            return RequestError(
                EINVAL,
                f"{offset}+{length} is not a multiple of {self.align_mask + 1}",
            )
        if length == 0 and command == CMD_BLOCK_STATUS:
            return RequestError(EINVAL, "BLOCK_STATUS of no bytes")
        if length > self.payload_max and command in (CMD_READ, CMD_WRITE):
            is_read = command == CMD_READ
            overflows = is_read and (self.extended or flags & CMD_FLAG_DF)
            return RequestError(
                EOVERFLOW if overflows else EINVAL,
                f"{CMD_NAMES[command]} of more than {self.payload_max} bytes",
            )
        if command == CMD_READ and flags & CMD_FLAG_DF and length > self.chunk_max:
            reason = f"READ with DF of more than {self.chunk_max} bytes"
            return RequestError(EOVERFLOW, reason)
        return None

    def _refuse_command(self, command: int) -> RequestError:
        if command == CMD_BLOCK_STATUS:
            return RequestError(EINVAL, "no metadata context was negotiated")
        if command in FLAGS_ALLOWED:
            return RequestError(EINVAL, f"{CMD_NAMES[command]} was not advertised")
        return RequestError(EINVAL, f"unknown command {command}")

    def payload_rule(self, length: int) -> int:
        """Decide what to do with the `length` bytes that follow a request, which is nearly always a WRITE.

        PAYLOAD_ACCEPT: read it; if `validate` refuses the request, drop it and answer.
        PAYLOAD_DRAIN: read it without keeping it, then answer EINVAL. Up to 32 MiB no payload
        is an attack, and up to twice our limit it is cheaper to stay in sync.
        PAYLOAD_DISCONNECT: no client has a reason to send so much; the connection is closed.
        """
        if length <= self.payload_max:
            return PAYLOAD_ACCEPT
        if length <= max(2 * self.payload_max, PAYLOAD_MAX_DEFAULT):
            return PAYLOAD_DRAIN
        return PAYLOAD_DISCONNECT


def _flag_names(flags: int) -> str:
    names = [name for bit, name in CMD_FLAG_NAMES.items() if flags & bit]
    unknown = flags & ~sum(CMD_FLAG_NAMES)
    if unknown:
        names.append(f"{unknown:#x}")
    return "|".join(names)


# Replies.


# hot: 0.15 us
def simple_reply(error: int, cookie: int) -> bytes:
    """Encode a simple reply. The data of a READ follows it if `error` is 0."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


# hot: 0.15 us
def pack_simple_reply_into(
    buffer: bytearray | memoryview, pos: int, error: int, cookie: int
) -> None:
    """As `simple_reply`: 16 bytes at `pos`."""
    SIMPLE_REPLY.pack_into(buffer, pos, SIMPLE_REPLY_MAGIC, error, cookie)


# hot: 0.2 us
def offset_data_header(cookie: int, offset: int, length: int, done: bool) -> bytes:
    """Encode the 28 bytes before the `length` > 0 bytes of data of an OFFSET_DATA chunk.

    `done` only if the data is there already: a failure can no longer be told afterwards.
    """
    return OFFSET_DATA.pack(
        STRUCTURED_REPLY_MAGIC,
        REPLY_FLAG_DONE if done else 0,
        REPLY_TYPE_OFFSET_DATA,
        cookie,
        length + 8,
        offset,
    )


# hot: 0.2 us
def pack_offset_data_into(
    buffer: bytearray | memoryview,
    pos: int,
    cookie: int,
    offset: int,
    length: int,
    done: bool,
) -> None:
    """As `offset_data_header`: 28 bytes at `pos`."""
    OFFSET_DATA.pack_into(
        buffer,
        pos,
        STRUCTURED_REPLY_MAGIC,
        REPLY_FLAG_DONE if done else 0,
        REPLY_TYPE_OFFSET_DATA,
        cookie,
        length + 8,
        offset,
    )


def offset_hole(cookie: int, offset: int, length: int, done: bool) -> bytes:
    """Encode an OFFSET_HOLE chunk: `length` > 0 bytes read as zeroes."""
    assert length
    return OFFSET_HOLE.pack(
        STRUCTURED_REPLY_MAGIC,
        REPLY_FLAG_DONE if done else 0,
        REPLY_TYPE_OFFSET_HOLE,
        cookie,
        12,
        offset,
        length,
    )


def none_chunk(cookie: int) -> bytes:
    """Encode a NONE chunk: the end of a reply, successful unless an error chunk came."""
    return CHUNK.pack(
        STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_TYPE_NONE, cookie, 0
    )


_ERROR: Final = Struct(">IHHQIIH")  # CHUNK, error, message length


def error_chunk(
    cookie: int,
    error: int,
    message: bytes = b"",
    offset: int | None = None,
    done: bool = True,
) -> bytes:
    """Encode an ERROR chunk, or ERROR_OFFSET if `offset` is given (it lies in the request).

    Args:
        error: one of the wire's eight; see `wire_errno`.
        message: UTF-8, for people; cut at 4096 bytes.
    """
    assert error
    if len(message) > STRING_MAX:
        message = message[:STRING_MAX].decode("utf-8", "ignore").encode()
    tail = b"" if offset is None else U64.pack(offset)
    return (
        _ERROR.pack(
            STRUCTURED_REPLY_MAGIC,
            REPLY_FLAG_DONE if done else 0,
            REPLY_TYPE_ERROR if offset is None else REPLY_TYPE_ERROR_OFFSET,
            cookie,
            6 + len(message) + len(tail),
            error,
            len(message),
        )
        + message
        + tail
    )


def block_status(
    cookie: int, context_id: int, extents: Iterable[tuple[int, int]], done: bool
) -> bytes:
    """Encode a BLOCK_STATUS chunk: what one metadata context says.

    A reply has exactly one for each context that was negotiated, in any order, and `done` in
    the last one only. They need not describe equally many bytes. If one context cannot be
    told, the reply is an error chunk alone.

    Args:
        extents: (length in bytes, flags), as `clip_extents` returns them: at least one.
    """
    numbers = list(chain.from_iterable(extents))
    assert 2 <= len(numbers) <= 2 * EXTENTS_MAX
    return Struct(f">IHHQII{len(numbers)}I").pack(
        STRUCTURED_REPLY_MAGIC,
        REPLY_FLAG_DONE if done else 0,
        REPLY_TYPE_BLOCK_STATUS,
        cookie,
        4 + 4 * len(numbers),
        context_id,
        *numbers,
    )


_WIRE_ERRNO: Final = {
    errnos.EPERM: EPERM,
    errnos.EACCES: EPERM,
    errnos.EROFS: EPERM,
    errnos.EINVAL: EINVAL,
    errnos.ENOSPC: ENOSPC,
    errnos.EDQUOT: ENOSPC,
    errnos.EFBIG: ENOSPC,
    errnos.ESHUTDOWN: ESHUTDOWN,
}


def wire_errno(errno: int, command: int, flags: int) -> int:
    """Map any nonzero errno to the one of the wire's eight that `command` may answer.

    ENOTSUP is for WRITE_ZEROES with FAST_ZERO alone. EOVERFLOW is for a READ with DF, and for
    commands without payload (but not for FAST_ZERO). ENOMEM should never be answered: EIO.
    """
    assert errno
    mapped = _WIRE_ERRNO.get(errno)
    if mapped is not None:
        return mapped
    fast_zero = command == CMD_WRITE_ZEROES and flags & CMD_FLAG_FAST_ZERO
    if errno == errnos.EOPNOTSUPP:
        return ENOTSUP if fast_zero else EINVAL
    if errno == errnos.EOVERFLOW:
        if command == CMD_READ and flags & CMD_FLAG_DF:
            return EOVERFLOW
        return EOVERFLOW if command in _PAYLOAD_FREE and not fast_zero else EINVAL
    return EIO


def clip_extents(
    extents: Iterable[tuple[int, int]], length: int, *, req_one: bool
) -> list[tuple[int, int]]:
    """Make the descriptors of a BLOCK_STATUS for `length` > 0 bytes out of extents.

    Equal neighbours are merged, empty ones dropped, and the last is cut at `length`, so no length exceeds 32 bits, unless
    that of the request does. At most 2**20 are returned (`req_one`: one), and at least one: if
    `extents` has none, the whole range is data, which is always a safe answer. `extents` is
    iterated no further than needed, and may describe less than the range: so does the answer.
    """
    assert length > 0
    extents_max = 1 if req_one else EXTENTS_MAX
    clipped: list[tuple[int, int]] = []
    left = length  # bytes of the request behind the run under way
    run_length = run_flags = 0
    for extent_length, flags in extents:
        taken = min(extent_length, left)
        if not taken:
            continue
        if run_length and flags != run_flags:
            clipped.append((run_length, run_flags))
            if len(clipped) == extents_max:
                return clipped
            run_length = 0
        run_flags = flags
        run_length += taken
        left -= taken
        if not left:
            break
    if run_length:
        clipped.append((run_length, run_flags))
    return clipped or [(length, 0)]
