# SPDX-License-Identifier: Apache-2.0
"""`Input`: what a client has sent in transmission and the server has not served yet.

Theory of operation. `receive` makes one system call and puts the bytes where they belong:

    a request, a small payload   the receive buffer
    the payload of a large       the buffer of that WRITE (`LargeWrite`); when the payload is complete, `complete` is set
    WRITE
    the payload of a refused     nowhere; when it has passed, the refusal is queued as a reply
    WRITE

    buffer   0 ... begin ............ end ............ size
                   |received, not     |free
                   |yet served

Requests are decoded where they lie, and a small payload is used where it lies. `consume` is told how far the
buffer has been served, and makes room behind `end`. Only this class writes `begin` and `end`.
"""

import socket
from typing import Final

from nbdtarget.common.activity import ACTIVITY
from nbdtarget.common.tls_socket import TlsSocket
from nbdtarget.server.buffers import Buffer, untouched
from nbdtarget.server.flow import IN_LINE, Flow
from nbdtarget.server.large_write import LargeWrite
from nbdtarget.server.limits import Limits
from nbdtarget.server.output import Output
from nbdtarget_protocol.consts import CMD_DISC, CMD_WRITE
from nbdtarget_protocol.replies import Replies, SimpleReplies

__all__ = ["Input"]

COMPACT_MAX: Final = 4 << 10  # so much is moved to the front of the buffer at once
PEEK_MAX: Final = 16 << 20  # more than a socket holds


class Input:
    """See the module head.

    Args:
        sock: non-blocking.
        output: where the reply to a refused WRITE goes.
        replies: how the connection is answered, and how requests look.

    Attributes:
        buffer, view: the receive buffer.
        begin, end: see the module head.
        large: the WRITE whose payload is being received.
        complete: a WRITE whose payload has just been received; see `take_complete`.
    """

    __slots__ = (
        "_flow",
        "_header",
        "_magic",
        "_output",
        "_poison",
        "_progress_bytes",
        "_skip",
        "_skip_reply",
        "_sock",
        "_unpack",
        "begin",
        "buffer",
        "complete",
        "end",
        "large",
        "view",
    )

    def __init__(
        self,
        sock: socket.socket | TlsSocket,
        limits: Limits,
        flow: Flow,
        output: Output,
        replies: Replies | None = None,
    ) -> None:
        replies = replies or SimpleReplies()
        self._header, self._magic = replies.request.size, replies.request_magic
        self._unpack = replies.request.unpack_from
        self.buffer: Buffer = untouched(limits.receive_buffer)
        self.view = memoryview(self.buffer)
        self.begin = 0
        self.end = 0
        self.large: LargeWrite | None = None
        self.complete: LargeWrite | None = None
        self._skip = 0  # bytes of a refused payload that are still to come
        self._skip_reply = b""
        self._sock = sock
        self._flow = flow
        self._output = output
        self._poison = limits.poison_borrowed
        self._progress_bytes = limits.progress_bytes

    @property
    def is_batch(self) -> bool:
        """Whether more than one request lies in the receive buffer."""
        begin, left = self.begin, self.end - self.begin - self._header
        if left <= 0:
            return False
        _, _, command, _, _, length = self._unpack(self.buffer, begin)
        return bool(command != CMD_WRITE or left > length)

    def put(self, data: bytes) -> None:
        """Take the bytes that came behind the handshake."""
        self.end = len(data)
        self.view[: self.end] = data

    # hot: once for each batch
    def receive(self) -> int:
        """Receive once. Return how many bytes came; 0: the client has closed its half.

        Raises: BlockingIOError: nothing can be received now.
        """
        ACTIVITY.nr_batches += 1
        if self.large is None and not self._skip:
            end = self.end
            received = self._sock.recv_into(self.view[end:] if end else self.view)
            self.end = end + received
            return received
        if self.large is not None:
            return self._receive_large(self.large)
        received = self._sock.recv_into(self.view)
        skipped = min(received, self._skip)
        self._skip -= skipped
        self._flow.moved()
        self.begin = skipped
        self.end = received
        if not self._skip:
            self._output.push(self._skip_reply)
        return received

    def consume(self, position: int, *, moves: bool = True) -> None:
        """The buffer has been served up to `position`: make room behind `end`.

        Args: moves: False: the compiled fast path goes on from there. It makes room by itself, and not for each request.
        """
        view, end = self.view, self.end
        left = end - position
        if self._poison:
            # In tests: a device that still uses a payload from here is found out.
            view[:position] = b"\xdb" * position
        if not left:
            self.begin = self.end = 0
        # Half a request is moved to the front, so that there is room for the rest of it. While the connection is
        # paused nothing is received, and moving could be repeated for nothing.
        elif moves and (
            left <= COMPACT_MAX or (end > len(view) // 2 and not self._flow.is_paused)
        ):
            view[:left] = view[position:end]
            self.begin, self.end = 0, left
        else:
            self.begin = position

    @property
    def is_plain(self) -> bool:
        """Whether what comes next is a request, into the receive buffer."""
        return self.large is None and not self._skip

    @property
    def payload_left(self) -> int:
        """The bytes that are to come of a payload that is being received."""
        large = self.large
        return self._skip if large is None else large.length - large.filled

    def served(self, begin: int, end: int) -> None:
        """The compiled fast path has received up to `end`, and served up to `begin`. It makes room by itself."""
        if self._poison:
            self.view[:begin] = b"\xdb" * begin
        # An empty buffer begins at 0: `receive` takes no bytes for the end of the connection.
        self.begin, self.end = (begin, end) if begin < end else (0, 0)

    def unserved(self) -> bytes:
        """Return what was received and not served."""
        return bytes(self.view[self.begin : self.end])

    def expect(self, large: LargeWrite) -> None:
        """Expect the rest of the payload of `large` next."""
        self.large = large
        self._flow.moved()

    def take_complete(self) -> LargeWrite:
        """Return the WRITE whose payload has just been received, and forget it."""
        large, self.complete = self.complete, None
        assert large is not None
        return large

    def skip(self, nr_bytes: int, reply: bytes) -> None:
        """Drop the next `nr_bytes`, the rest of the payload of a refused WRITE; then send `reply`."""
        self._skip = nr_bytes
        self._skip_reply = reply
        self._flow.moved()

    def ends_with_disc(self) -> bool:
        """Whether the last thing that the client has sent is a DISC, as far as it can be seen from here.

        Requests may lie in front of it, here and in the socket, that a bound keeps from being served.
        """
        try:
            unread = self._sock.recv(PEEK_MAX, socket.MSG_PEEK)
        except BlockingIOError:
            unread = b""
        here = self.view[self.begin : self.end]
        last = (bytes(here[-self._header :]) + unread)[-self._header :]
        if len(last) < self._header:
            return False
        magic, _, command, _, _, _ = self._unpack(last)
        return bool(magic == self._magic and command == CMD_DISC)

    def close(self) -> LargeWrite | None:
        """Stop receiving. Return the WRITE whose payload was being received, if there is one."""
        large, self.large = self.large, None
        return large

    def release(self) -> None:
        """Give the memory of the buffer back, when nothing is in flight any more."""
        self.buffer = bytearray()
        self.view = memoryview(self.buffer)

    # hot: a few times for each large WRITE
    def _receive_large(self, large: LargeWrite) -> int:
        """Receive more of a large WRITE's payload, and what follows it if it is there."""
        payload, filled, length = large.payload, large.filled, large.length
        if filled == large.charge and not large.grow():
            self._flow.pause(IN_LINE, "bytes_total_max")
            raise BlockingIOError
        if large.charge == length:
            # Only a little of what follows: if it is another large WRITE, the rest of its payload
            # goes straight into its own buffer, and is not copied there.
            behind = self.view[:COMPACT_MAX]
            received = self._sock.recvmsg_into([payload[filled:], behind])[0]
        else:
            received = self._sock.recv_into(payload[filled : large.charge])
        filled += received
        if filled >= large.progress_at:
            large.progress_at = filled + self._progress_bytes
            self._flow.moved()
        if filled < length:
            large.filled = filled
            return received
        self.end = filled - length
        self.large = None
        self.complete = large
        return received
