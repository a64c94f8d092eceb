# SPDX-License-Identifier: Apache-2.0
"""The output of a connection: the arena of small replies, and the queue behind it.

Theory of operation. Small replies are packed one after another into the *arena*, READ data
included: the device reads straight into the place that is sent. One `send` carries a whole
batch, and no object is made for any reply in it.

    arena   0 ... base ............ end ............ size
            |sent or |packed,       |free
            |queued  |not yet sent  |

`flush` sends [base, end) when nothing waits before it. The part that the socket does not take goes
to the *queue* (`base` moves to `end`), in front of later replies; the arena starts again at 0
when the queue is empty. Replies that do not come from the arena (late ones, large ones) are
`push`ed to the queue at once. The order of replies is free, but a reply that has begun
is never interrupted.

A client that reads as fast as we send could keep `flush` busy for 64 MiB. So one call sends FLUSH_MAX bytes of the
queue, or a little more; then the output counts as blocked, and goes on when the loop says that the socket is writable.

Large READs have a buffer of their own from the `BufferPool`, with room for the header in
front of the data, so that each is one piece. A buffer goes back to the pool when it has left.
"""

import errno as errnos
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final, Protocol

from nbdtarget.server.buffers import HEADER_ROOM, Buffer, untouched
from nbdtarget.server.limits import Limits

__all__ = ["Output", "is_gone"]

FLUSH_MAX: Final = 4 << 20  # bytes of the queue that one `flush` sends
GATHER_MAX: Final = 64  # pieces of one sendmsg; the kernel allows 1024


class Sender(Protocol):
    """A socket, or what stands in for one."""

    def send(self, data: memoryview, /) -> int: ...

    def sendmsg(self, pieces: Iterable[memoryview], /) -> int: ...


class Output:
    """The sending half of a connection; see the module head.

    Attributes:
        arena, view: where small replies are packed. The bytes are the hot loop's to write.
        base, end: see the module head; only this class writes them, and `packed_to` says what was packed.
        nr_queued: bytes in the queue.
        end_max: above, the arena has no room for one more reply.
        pushed: is called when something was queued.
        is_blocked: the socket took less than it was given, or enough was sent; call `flush` when it is writable.
    """

    __slots__ = (
        "_arena_size",
        "_on_left",
        "_queue",
        "_queue_max",
        "_send",
        "_sendmsg",
        "_waiting_max",
        "arena",
        "base",
        "end",
        "end_max",
        "is_blocked",
        "nr_queued",
        "poison",
        "pushed",
        "view",
    )

    def __init__(
        self,
        sock: "Sender",
        limits: Limits,
        on_left: Callable[[int, Buffer | None], None],
    ) -> None:
        self.arena: Buffer = bytearray()
        self.view = memoryview(self.arena)
        self.base = 0
        self.end = 0
        self.end_max = limits.arena - HEADER_ROOM - limits.arena_read_max
        self._arena_size = limits.arena
        self.nr_queued = 0
        self.is_blocked = False
        self.pushed: Callable[[], None] = _nothing
        self.poison = limits.poison_borrowed
        self._waiting_max = limits.send_buffer_max
        self._queue_max = limits.send_queue_max
        self._send = sock.send
        self._sendmsg = sock.sendmsg
        self._queue: deque[tuple[memoryview, int, Buffer | None]] = deque()
        self._on_left = on_left

    def open_arena(self) -> None:
        """Take the memory of the arena. Only a client that is attached needs it."""
        self.arena = untouched(self._arena_size)
        self.view = memoryview(self.arena)

    def use(self, sock: "Sender") -> None:
        """Send through `sock` from now on. Nothing may be queued."""
        assert self.is_empty
        self._send = sock.send
        self._sendmsg = sock.sendmsg

    def push(
        self,
        data: bytes | bytearray | memoryview,
        charge: int = 0,
        buffer: Buffer | None = None,
    ) -> None:
        """Queue `data`, which must not change until it has left.

        Args:
            charge, buffer: given to `on_left` when `data` has left.
        """
        view = memoryview(data)
        self._queue.append((view, charge, buffer))
        self.nr_queued += len(view)
        self.pushed()

    def packed_to(self, end: int) -> None:
        """Replies were packed into the arena, up to `end`."""
        self.end = end

    def sent_to(self, base: int, end: int) -> None:
        """The compiled fast path has packed replies up to `end`, and sent them up to `base`.

        If the socket took only a part, the rest goes in front of all that is pushed from now on.
        """
        self.base, self.end = base, end
        if base:
            self._queue.append((self.view[base:end], 0, None))
            self.nr_queued += end - base
            self.base = end
            self.is_blocked = True

    @property
    def is_plain(self) -> bool:
        """Whether what is packed next may be sent next."""
        return not (self._queue or self.is_blocked)

    @property
    def is_empty(self) -> bool:
        return self.base == self.end and not self._queue

    @property
    def nr_pieces(self) -> int:
        return len(self._queue)

    @property
    def nr_waiting(self) -> int:
        """Bytes of replies that have not left."""
        return self.nr_queued + self.end - self.base

    @property
    def is_full(self) -> bool:
        """Whether no further request should be started before the client has read some replies."""
        return self.is_blocked and (
            self.nr_queued + self.end - self.base > self._waiting_max
            or len(self._queue) > self._queue_max
            or self.end >= self.end_max
        )

    def flush(self) -> bool:
        """Send what the socket takes; return whether everything has left.

        Raises: OSError: the peer is gone.
        """
        base, end = self.base, self.end
        if base < end:
            sent = 0
            if not self._queue and not self.is_blocked:
                try:
                    sent = self._send(self.view[base:end])
                except BlockingIOError:
                    sent = 0
                if sent == end - base:
                    self._arena_left(end)
                    return True
                self.is_blocked = True
            self._queue.append((self.view[base + sent : end], 0, None))
            self.nr_queued += end - base - sent
            self.base = end
            if self.is_blocked and sent:
                return False
        return self._flush_queue()

    def _flush_queue(self) -> bool:
        queue = self._queue
        left = FLUSH_MAX
        while queue:
            if left <= 0:
                self.is_blocked = True
                return False
            try:
                sent = self._sendmsg([entry[0] for entry in islice(queue, GATHER_MAX)])
            except BlockingIOError:
                self.is_blocked = True
                return False
            self.nr_queued -= sent
            left -= sent
            while queue:
                view, charge, buffer = queue[0]
                if sent < len(view):
                    break
                sent -= len(view)
                queue.popleft()
                if charge or buffer is not None:
                    self._on_left(charge, buffer)
            if sent:
                view, charge, buffer = queue[0]
                queue[0] = (view[sent:], charge, buffer)
        self.is_blocked = False
        self._arena_left(self.end)
        return True

    def _arena_left(self, end: int) -> None:
        if self.poison:
            self.view[:end] = b"\xdb" * end
        self.base = self.end = 0

    def unsent(self) -> bytes:
        """Return the replies that have not left, in their order."""
        pieces = [view for view, _, _ in self._queue]
        return b"".join([*pieces, self.view[self.base : self.end]])

    def drop(self) -> None:
        """The connection is closed: forget all replies, and give the arena back."""
        self.arena = bytearray()
        self.view = memoryview(self.arena)
        queue, self._queue = self._queue, deque()
        self.nr_queued = 0
        self.base = self.end = 0
        self.pushed = _nothing
        for _, charge, buffer in queue:
            if charge or buffer is not None:
                self._on_left(charge, buffer)


def _nothing() -> None:
    """Do nothing: no caller has asked to be told of queued replies."""


def is_gone(error: OSError) -> bool:
    """Whether `error` only says that the peer closed its end, as it may do after a DISC."""
    return error.errno in (errnos.EPIPE, errnos.ECONNRESET, errnos.ENOTCONN)
