# SPDX-License-Identifier: Apache-2.0
"""The client side of transmission: requests out, replies in, READ data in its place.

Theory of operation. `request` encodes a request and keeps a `Completion` for it, under its
cookie, until the reply is complete. The caller receives into `get_buffer()` and tells
`buffer_updated(n)` how many bytes were received, which returns the requests that completed:

    what comes next           get_buffer() is             afterwards
    a header                  the scratch                 all complete replies are taken,
                                                          small data copied to its buffer
    >= DIRECT_MIN of data     a slice of the caller's     nothing is copied
                              own buffer
    < DIRECT_MIN of data      the scratch                 copied: one receive then brings the
                                                          next headers as well

While replies carry much data each, only HEADER_OFFER bytes of scratch are offered, so that
the data behind a header is not in the scratch already when the header is understood.

With extended headers a request and a chunk have headers of their own (`extended.py`), and everything is answered with
chunks. The rest is the same.

Checks. The server is not trusted: unknown cookie, wrong magic, a simple reply to a READ where
structured replies were negotiated, or to anything with extended headers, a chunk that names another offset than its
request, a chunk that lies outside its request, overlaps an
earlier one or leaves a gap, an impossible length, metadata contexts that are missing, given
twice or not negotiated: each raises `ReplyError`. From then on nothing is parsed any more; the
caller calls `fail_all` and closes. Requests that completed in the same batch before the error are the
first that `fail_all` returns.

Bounds. Chunks with text or descriptors are collected in a buffer of their own, whose size the
protocol limits (16 MiB + 8); a READ in pieces keeps at most SPANS_MAX disjoint spans.

Giving up. `abandon` ends requests without waiting for the server: they are returned as failed, and their
buffers belong to the caller again. Their replies may still come. They are parsed as always, READ
data is dropped, and their completions have `private` None.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from struct import Struct
from typing import Final

from nbdtarget_protocol.client_handshake import ClientNegotiated
from nbdtarget_protocol.completion import Completion, add_span, check_extents
from nbdtarget_protocol.consts import (
    CHUNK,
    CMD_BLOCK_STATUS,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_READ,
    CMD_WRITE,
    EINVAL,
    ERROR_NAMES,
    ESHUTDOWN,
    EXTENDED_CHUNK,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    EXTENTS_MAX,
    FLAG_BLOCK_STATUS_PAYLOAD,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_BLOCK_STATUS_EXT,
    REPLY_TYPE_ERROR_OFFSET,
    REPLY_TYPE_FLAG_ERROR,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRING_MAX,
    STRUCTURED_REPLY_MAGIC,
    U32,
    U64,
)
from nbdtarget_protocol.errors import ReplyError, RequestError
from nbdtarget_protocol.extended import encode_status_payload
from nbdtarget_protocol.options import printable

__all__ = ["ClientTransmission", "Completion"]

SCRATCH_SIZE: Final = 64 << 10
HEADER_OFFER: Final = 4 << 10
DIRECT_MIN: Final = 16 << 10
LARGE_PAYLOAD_MIN: Final = 64 << 10  # from here on a copy costs more than a receive
ERROR_CHUNK_MAX: Final = 6 + STRING_MAX + 256  # leaves room for fields yet unknown

_ZEROES: Final = memoryview(bytes(256 << 10))
_ERROR_HEAD: Final = Struct(">IH")  # error, message length
_HOLE: Final = Struct(">QI")  # offset, hole size
_STATUS_EXT_HEAD: Final = Struct(">II")  # metadata context id, descriptor count
_NO_VIEW: Final = memoryview(b"")


class ClientTransmission:
    """One connection in transmission; see the module head.

    Args:
        extents_max: descriptors of one BLOCK_STATUS chunk that are taken, at least 2. What
            comes behind them is dropped unread, as if the server had told less.

    Attributes:
        in_flight: cookie -> the request that waits for its reply.
        error: set once a ReplyError was raised, or `fail_all` called: no more requests.
        shutting_down: the server said ESHUTDOWN: send DISC when all is answered, and close.
    """

    def __init__(
        self, negotiated: ClientNegotiated, *, extents_max: int = EXTENTS_MAX
    ) -> None:
        assert extents_max >= 2, "REQ_ONE could not be checked"
        self.negotiated = negotiated
        self.extents_max = extents_max
        self.structured = negotiated.structured
        self.extended = negotiated.extended
        self._chunk = EXTENDED_CHUNK if self.extended else CHUNK
        self.context_ids = tuple(context_id for context_id, _ in negotiated.contexts)
        self.in_flight: dict[int, Completion] = {}
        self.error: ReplyError | None = None
        self.shutting_down = False
        self._scratch = bytearray(SCRATCH_SIZE)
        self._scratch_view = memoryview(self._scratch)
        self._end = 0  # of what came into the scratch
        self._offer = SCRATCH_SIZE
        self._direct = False  # get_buffer() gave a slice of _payload away
        # The payload under way: where it goes, and what to call when it is whole.
        self._payload = _NO_VIEW
        self._at = 0
        self._left = 0
        self._payload_request: Completion | None = None
        # A function, and not a bound method: that would be a circle of references.
        self._payload_end: _PayloadEnd = ClientTransmission._payload_simple
        self._payload_done = False  # the chunk has the DONE flag
        self._payload_type = 0
        self._completed: list[Completion] = []

    # Requests.

    def request(
        self,
        command: int,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        buffer: memoryview | None = None,
        private: object = None,
    ) -> bytes:
        """Encode a request; a WRITE's payload is for the caller to send after it.

        Args:
            cookie: not in flight (DISC, which has no reply: any).
            buffer: READ: a writable memoryview (format B) of `length` bytes.
        Raises: RequestError: there is no place for such numbers in a request; nothing was begun.
        """
        assert self.error is None
        length_bits = 64 if self.extended else 32
        if offset < 0 or length < 0 or offset >> 64 or length >> length_bits:
            # In place of struct.error, which says nothing of the request.
            raise RequestError(EINVAL, "there is no such range on any disk")
        assert command == CMD_DISC or cookie not in self.in_flight
        assert buffer is None or len(buffer) == length
        if command != CMD_DISC:  # which has no reply
            request = Completion(
                command, flags, cookie, offset, length, buffer, private
            )
            request.asked_ids = self.context_ids
            self.in_flight[cookie] = request
        if not self.extended:
            return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
        if command == CMD_WRITE:
            flags |= CMD_FLAG_PAYLOAD_LEN
        magic = EXTENDED_REQUEST_MAGIC
        return EXTENDED_REQUEST.pack(magic, flags, command, cookie, offset, length)

    def request_status_of(
        self,
        context_ids: Sequence[int],
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        private: object = None,
    ) -> bytes:
        """Encode a BLOCK_STATUS that only some metadata contexts are to answer, with its payload.

        Args: context_ids: some of those that were negotiated, each once. The server has to offer
            BLOCK_STATUS_PAYLOAD.
        """
        assert self.extended
        assert self.negotiated.flags & FLAG_BLOCK_STATUS_PAYLOAD
        self.request(CMD_BLOCK_STATUS, flags, cookie, offset, length, None, private)
        ids = tuple(each for each in self.context_ids if each in context_ids)
        assert len(ids) == len(context_ids) > 0
        self.in_flight[cookie].asked_ids = ids
        payload = encode_status_payload(length, context_ids)
        header = EXTENDED_REQUEST.pack(
            EXTENDED_REQUEST_MAGIC,
            flags | CMD_FLAG_PAYLOAD_LEN,
            CMD_BLOCK_STATUS,
            cookie,
            offset,
            len(payload),
        )
        return header + payload

    def abandon(
        self, error: int, which: Callable[[Completion], bool]
    ) -> list[Completion]:
        """Return the requests in flight that `which` chooses, with `error`; see *Giving up*."""
        given_up = [request for request in self.in_flight.values() if which(request)]
        reads = [each.length for each in given_up if each.command == CMD_READ]
        sink = memoryview(bytearray(max(reads, default=0)))
        for request in given_up:
            twin = copy(request)
            twin.private = None
            if request.command == CMD_READ:
                twin.buffer = sink[: request.length]
            # In the same place: the order is that of sending.
            self.in_flight[request.cookie] = twin
            if self._payload_request is request:
                self._payload_request = twin
                if request.command == CMD_READ and not self._is_collecting:
                    self._payload = sink[: len(self._payload)]
            request.error = error
        return given_up

    @property
    def _is_collecting(self) -> bool:
        """Whether the payload under way is not READ data, but is looked at when it is whole."""
        return self._payload_end in (
            ClientTransmission._payload_error,
            ClientTransmission._payload_block_status,
        )

    def forget(self, cookies: Iterable[int]) -> None:
        """Forget requests that the server will never answer, because they were not, or not completely, sent."""
        for cookie in cookies:
            del self.in_flight[cookie]

    def fail_all(self, error: int) -> list[Completion]:
        """End the connection: return all requests that were not returned yet, the unanswered ones with `error`."""
        completed = self._completed
        self._completed = []
        for request in self.in_flight.values():
            request.error = error
            completed.append(request)
        self.in_flight.clear()
        if self.error is None:
            self.error = ReplyError("connection was given up")
        self._left = self._end = 0
        self._payload = _NO_VIEW
        self._payload_request = None
        return completed

    # Replies.

    # hot: 0.2 us
    def get_buffer(self) -> memoryview:
        """Return where the next bytes must be received to; never empty."""
        if self._left >= DIRECT_MIN:
            self._direct = True
            return self._payload[self._at :]
        self._direct = False
        # The rest of a small payload comes first: the offer is for what is behind it.
        return self._scratch_view[self._end : self._end + self._left + self._offer]

    @property
    def wants_all(self) -> bool:
        """Whether all bytes of the last `get_buffer()` will come, so that a receiver may block until they have."""
        return self._direct

    # hot: 1.5 us for each small reply
    def buffer_updated(self, n: int) -> list[Completion]:
        """Take `n` bytes that were received into `get_buffer()`; return what completed.

        Raises: ReplyError.
        """
        if self.error is not None:
            raise self.error
        try:
            if self._direct:
                self._at += n
                self._left -= n
                if not self._left:
                    self._end_payload()
            else:
                self._end += n
                self._parse()
        except ReplyError as error:
            self.error = error
            self._left = self._end = 0
            raise
        completed = self._completed
        if completed:
            self._completed = []
        return completed

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[Completion]:
        """Take bytes that were received elsewhere, as behind the handshake.

        Raises: ReplyError.
        """
        view = memoryview(data)
        completed: list[Completion] = []
        while len(view):
            buffer = self.get_buffer()
            n = min(len(buffer), len(view))
            buffer[:n] = view[:n]
            try:
                completed += self.buffer_updated(n)
            except ReplyError:
                self._completed[:0] = completed  # for `fail_all`
                raise
            view = view[n:]
        return completed

    def _parse(self) -> None:
        """Take whole replies from the scratch, and the beginning of one payload."""
        scratch = self._scratch
        end = self._end
        pos = 0
        while True:
            if self._left:
                taken = min(self._left, end - pos)
                self._payload[self._at : self._at + taken] = self._scratch_view[
                    pos : pos + taken
                ]
                pos += taken
                self._at += taken
                self._left -= taken
                if self._left:
                    break
                self._end_payload()
            if end - pos < SIMPLE_REPLY.size:
                break
            magic, error, cookie = SIMPLE_REPLY.unpack_from(scratch, pos)
            if self.extended:
                if magic != EXTENDED_REPLY_MAGIC:
                    raise ReplyError(f"bad reply magic {magic:#x}")
                taken = self._take_chunk(pos, end)
                if not taken:
                    break
                pos += taken
            elif magic == SIMPLE_REPLY_MAGIC:
                self._take_simple(error, cookie)
                pos += SIMPLE_REPLY.size
            elif magic == STRUCTURED_REPLY_MAGIC and self.structured:
                taken = self._take_chunk(pos, end)
                if not taken:
                    break
                pos += taken
            else:
                raise ReplyError(f"bad reply magic {magic:#x}")
        # The rest is less than a header: moving it to the front costs nothing.
        rest = end - pos
        if rest:
            scratch[:rest] = scratch[pos:end]
        self._end = rest

    def _find(self, cookie: int) -> Completion:
        request = self.in_flight.get(cookie)
        if request is None:
            raise ReplyError(f"reply with unknown cookie {cookie:#x}")
        return request

    def _take_simple(self, error: int, cookie: int) -> None:
        request = self._find(cookie)
        if request.command == CMD_READ:
            if self.structured:
                raise ReplyError(f"simple reply to {request!r}")
            if not error and request.length:
                self._begin_payload(
                    request, 0, request.length, ClientTransmission._payload_simple, True
                )
                return
        elif not error and request.command == CMD_BLOCK_STATUS:
            raise ReplyError(f"simple reply to {request!r}")
        if request.error or request.contexts:
            raise ReplyError(f"simple reply after chunks to {request!r}")
        if error:
            self._set_error(request, error, "")
        del self.in_flight[cookie]
        self._completed.append(request)

    def _take_chunk(self, pos: int, end: int) -> int:
        """Take a chunk's header; return its length, or 0 if it has not all come."""
        head = self._chunk.size
        if end - pos < head:
            return 0
        _, flags, kind, cookie, *at, length = self._chunk.unpack_from(
            self._scratch, pos
        )
        request = self._find(cookie)
        if at and at[0] != request.offset:
            raise ReplyError(f"chunk for offset {at[0]} in reply to {request!r}")
        done = bool(flags & REPLY_FLAG_DONE)
        body = pos + head
        if kind == REPLY_TYPE_OFFSET_DATA:
            if length < 9:
                raise ReplyError(f"OFFSET_DATA chunk of {length} bytes")
            if end - body < U64.size:
                return 0
            offset = U64.unpack_from(self._scratch, body)[0]
            begin = self._cover(request, offset, length - 8)
            self._begin_payload(
                request, begin, length - 8, ClientTransmission._payload_data, done
            )
            return head + U64.size
        if kind == REPLY_TYPE_OFFSET_HOLE:
            if length != _HOLE.size:
                raise ReplyError(f"OFFSET_HOLE chunk of {length} bytes")
            if end - body < _HOLE.size:
                return 0
            offset, length = _HOLE.unpack_from(self._scratch, body)
            self._take_hole(request, offset, length)
            if done:
                self._finish(request)
            return head + _HOLE.size
        if kind == REPLY_TYPE_NONE:
            if length or not done:
                raise ReplyError("NONE chunk with a payload, or without DONE")
            self._finish(request)
        else:
            self._take_collected(request, kind, length, done)
        return head

    def _take_collected(
        self, request: Completion, kind: int, length: int, done: bool
    ) -> None:
        """Begin a chunk that is looked at only when its payload is whole."""
        status = (
            REPLY_TYPE_BLOCK_STATUS_EXT if self.extended else REPLY_TYPE_BLOCK_STATUS
        )
        if kind == status:
            head, each = (8, 16) if self.extended else (4, 8)
            nr_extents, rest = divmod(length - head, each)
            if rest or not 1 <= nr_extents <= EXTENTS_MAX:
                raise ReplyError(f"BLOCK_STATUS chunk of {length} bytes")
            if request.command != CMD_BLOCK_STATUS:
                raise ReplyError(f"BLOCK_STATUS chunk in reply to {request!r}")
            payload_end = ClientTransmission._payload_block_status
        elif kind & REPLY_TYPE_FLAG_ERROR:
            least = 14 if kind == REPLY_TYPE_ERROR_OFFSET else 6
            if not least <= length <= ERROR_CHUNK_MAX:
                raise ReplyError(f"error chunk of {length} bytes")
            payload_end = ClientTransmission._payload_error
        else:
            raise ReplyError(f"unknown chunk type {kind}")
        self._payload = memoryview(bytearray(length))
        self._at = 0
        self._left = length
        self._payload_request = request
        self._payload_end = payload_end
        self._payload_done = done
        self._payload_type = kind

    # Payloads.

    def _begin_payload(
        self,
        request: Completion,
        at: int,
        length: int,
        payload_end: "_PayloadEnd",
        done: bool,
    ) -> None:
        buffer = request.buffer
        assert buffer is not None, "READ without a buffer"
        if at or length != request.length:
            buffer = buffer[at : at + length]
        self._payload = buffer
        self._at = 0
        self._left = length
        self._payload_request = request
        self._payload_end = payload_end
        self._payload_done = done
        self._offer = HEADER_OFFER if length >= LARGE_PAYLOAD_MIN else SCRATCH_SIZE

    def _end_payload(self) -> None:
        request = self._payload_request
        assert request is not None
        self._payload_request = None
        self._payload_end(self, request)
        self._payload = _NO_VIEW

    def _payload_simple(self, request: Completion) -> None:
        del self.in_flight[request.cookie]
        self._completed.append(request)

    def _payload_data(self, request: Completion) -> None:
        if self._payload_done:
            self._finish(request)

    def _payload_error(self, request: Completion) -> None:
        payload = self._payload
        error, message_length = _ERROR_HEAD.unpack_from(payload)
        tail = 8 if self._payload_type == REPLY_TYPE_ERROR_OFFSET else 0
        if not error:
            raise ReplyError("error chunk with error 0")
        if message_length > len(payload) - 6 - tail:
            raise ReplyError("error message is longer than its chunk")
        if tail:
            offset = U64.unpack_from(payload, 6 + message_length)[0]
            # An empty request has no byte that an error could be at: this is not checked.
            if not 0 <= offset - request.offset <= max(request.length - 1, 0):
                raise ReplyError(f"error at {offset}, outside of {request!r}")
        self._set_error(
            request, error, printable(bytes(payload[6 : 6 + message_length]))
        )
        if self._payload_done:
            self._finish(request)

    def _payload_block_status(self, request: Completion) -> None:
        payload = self._payload
        if self.extended:
            context_id, count = _STATUS_EXT_HEAD.unpack_from(payload)
            if count != len(payload) // 16:
                raise ReplyError(f"BLOCK_STATUS chunk with a count of {count}")
            layout, begin = "Q", _STATUS_EXT_HEAD.size
        else:
            context_id = U32.unpack_from(payload)[0]
            count, layout, begin = len(payload) // 8, "I", U32.size
        if request.contexts is None:
            request.contexts = set()
        if context_id not in request.asked_ids or context_id in request.contexts:
            raise ReplyError(f"metadata context {context_id} unknown or given twice")
        request.contexts.add(context_id)
        nr_numbers = 2 * min(count, self.extents_max)
        numbers = Struct(f">{nr_numbers}{layout}").unpack_from(payload, begin)
        extents = list(zip(numbers[::2], numbers[1::2], strict=True))
        check_extents(request, extents)
        self._described(request, context_id, extents)
        if self._payload_done:
            self._finish(request)

    def _described(
        self, request: Completion, context_id: int, extents: list[tuple[int, int]]
    ) -> None:
        """Keep the answer of the first context that was asked for. The simulation keeps those of all contexts."""
        if context_id == request.asked_ids[0]:
            request.extents = extents

    # Ends.

    def _set_error(self, request: Completion, error: int, message: str) -> None:
        if error == ESHUTDOWN:
            self.shutting_down = True
        if not request.error:  # the first one is the cause
            # proto.md: an unexpected value counts as EINVAL.
            request.error = error if error in ERROR_NAMES else EINVAL
            request.message = message

    def _finish(self, request: Completion) -> None:
        """Take the chunk with DONE."""
        if not request.error:
            if request.command == CMD_READ and request.covered != request.length:
                raise ReplyError(
                    f"only {request.covered} bytes in reply to {request!r}"
                )
            if request.command == CMD_BLOCK_STATUS and (
                request.contexts is None
                or len(request.contexts) != len(request.asked_ids)
            ):
                raise ReplyError(f"metadata context missing in reply to {request!r}")
        else:
            request.extents = None
        del self.in_flight[request.cookie]
        self._completed.append(request)

    def _take_hole(self, request: Completion, offset: int, length: int) -> None:
        if not length:
            raise ReplyError("OFFSET_HOLE chunk of no bytes")
        at = self._cover(request, offset, length)
        buffer = request.buffer
        assert buffer is not None, "READ without a buffer"
        end = at + length
        while at < end:
            n = min(end - at, len(_ZEROES))
            buffer[at : at + n] = _ZEROES[:n]
            at += n

    def _cover(self, request: Completion, offset: int, length: int) -> int:
        """Note that content came for a range; return where it begins in the buffer."""
        begin = offset - request.offset
        end = begin + length
        if request.command != CMD_READ or begin < 0 or end > request.length:
            raise ReplyError(f"chunk {offset}+{length} outside of {request!r}")
        if not request.covered:
            if length != request.length:
                request.spans = [begin, end]
        else:
            if request.flags & CMD_FLAG_DF:
                raise ReplyError(f"second content chunk in reply to {request!r}")
            add_span(request, begin, end)
        request.covered += length
        return begin


_PayloadEnd = Callable[[ClientTransmission, Completion], None]
