# SPDX-License-Identifier: Apache-2.0
"""One client: its socket, its handshake, and the way of its requests.

Theory of operation. States:

    state         reads                       ends by
    HANDSHAKE     options                     GO: TRANSMISSION; ABORT, error, time: CLOSED
    TRANSMISSION  requests, unless paused     DISC, EOF: DRAINING; garbage, lost peer: CLOSED
    DRAINING      nothing, or to drop it      the last bio has ended and its reply has left
    CLOSED        -                           released when the last bio has ended

The socket is non-blocking and read with `recv_into` when the loop says that it is readable:
no transport stands between, so every buffer, bound and wake-up is ours to decide. Both ways
there are two paths for a request:

*Fast* (`_serve`, the hot loop): READ to `arena_read_max`, WRITE that lies whole in the receive
buffer, nothing wrong with them. One Bio is used again and again as long as bios end inside
`submit`; READ data goes straight into the reply arena, WRITE data is used where it lies.
A bio that does not end inside `submit` keeps its object (and by the rule of `bio.py` owns
its bytes by then); the loop takes a new one, and the arena position is simply not advanced.

*Slow* (`_take` and below): everything else, with an accounted `_Request` each. Large READs
and WRITEs have a pooled buffer of their own, which the device may keep until the bio ends;
a large WRITE is received straight into it.

Pausing. A connection that met a bound (replies unsent, its own in-flight, the shared budget)
stops reading; requests that it has received lie in the buffer. Whatever shrinks what was
full calls `_maybe_resume`.

Polling. At depth 1 a request costs two wake-ups, and they cost more than the request. So
after an answer the connection looks at its socket for `poll_us` before it goes back to the
loop: only if it is alone, nothing is in flight, and polling has been paying off: each miss
doubles the number of wake-ups that go unpolled (to POLL_SKIP_MAX), one hit ends that.
It yields the processor at every look, and the loop gets its turn after BATCHES_MAX batches.

Ends. DISC and EOF let everything in flight finish and its replies leave. A peer that is gone
costs nothing but its own connection: bios still in flight end into `_ended`, which drops
them, and only then is the device released.

Shutdown. What was received before is carried out, what comes after is answered with
ESHUTDOWN, and when nothing is in flight our half of the connection is closed.
"""

import asyncio
import errno as errnos
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Final, NamedTuple

from nbdtarget.bio import (
    FAST_ZERO,
    FUA,
    NO_UNMAP,
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    PENDING,
    Bio,
)
from nbdtarget.clock import Clock, Timer
from nbdtarget.devices.base import Device
from nbdtarget.errors import DeviceError
from nbdtarget.server.export import DirectoryExports, ExportDirectory
from nbdtarget.server.limits import Budget, Limits
from nbdtarget.server.output import HEADER_ROOM, BufferPool, Output, is_gone
from protocol.consts import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EINVAL,
    ESHUTDOWN,
    OFFSET_DATA,
    REPLY_FLAG_DONE,
    REPLY_TYPE_OFFSET_DATA,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
)
from protocol.errors import RequestError
from protocol.handshake import Negotiated, ServerHandshake
from protocol.transmission import (
    PAYLOAD_ACCEPT,
    PAYLOAD_DISCONNECT,
    ServerTransmission,
    block_status,
    clip_extents,
    error_chunk,
    none_chunk,
    offset_hole,
    pack_offset_data_into,
    pack_simple_reply_into,
    simple_reply,
    wire_errno,
)

__all__ = ["Connection", "Shared"]

logger = logging.getLogger(__name__)

HANDSHAKE: Final = 0
TRANSMISSION: Final = 1
DRAINING: Final = 2
CLOSED: Final = 3

BATCHES_MAX: Final = 64  # read and served in one turn of the loop
POLL_STREAK: Final = 4  # wake-ups in a row of this connection alone before it polls
POLL_SKIP_MAX: Final = 64
HANDSHAKE_READ: Final = 64 << 10

COMPACT_MAX: Final = 4 << 10  # so much is moved to the front of the buffer at once

_HEADER: Final = REQUEST.size
# For the hot loop: a module global costs less than an attribute of one.
_unpack: Final = REQUEST.unpack_from
_pack_simple: Final = SIMPLE_REPLY.pack_into
_pack_data: Final = OFFSET_DATA.pack_into
_CHUNK: Final = STRUCTURED_REPLY_MAGIC
_sched_yield: Final = os.sched_yield
_ZEROES: Final = memoryview(bytes(1 << 20))

# What the hot loop writes as plain numbers.
assert CMD_FLAG_FUA == FUA
assert REPLY_FLAG_DONE == REPLY_TYPE_OFFSET_DATA == 1
assert SIMPLE_REPLY.size == 16

_OPS: Final = {
    CMD_FLUSH: OP_FLUSH,
    CMD_TRIM: OP_DISCARD,
    CMD_CACHE: OP_CACHE,
    CMD_WRITE_ZEROES: OP_WRITE_ZEROES,
}


class _Violation(Exception):
    """The client broke a rule that leaves nothing to answer with."""


class _Request(NamedTuple):
    """What is needed to answer a bio that did not take the fast path (`bio.private`)."""

    cookie: int
    command: int
    flags: int
    charge: int  # bytes of budget
    buffer: bytearray | None  # pooled, holds the bio's payload


@dataclass(slots=True)
class Shared:
    """What the connections of one listener have in common."""

    loop: asyncio.AbstractEventLoop
    clock: Clock
    limits: Limits
    budget: Budget
    pool: BufferPool
    directory: ExportDirectory
    starved: Callable[[], None]  # a connection waits for the budget
    closed: Callable[["Connection"], None]  # a connection has released everything


class Connection:
    """One client; see the module head.

    Attributes:
        state: HANDSHAKE, ….
        progress_ns: when the client last took or gave something; see `is_stalled`.
    """

    def __init__(self, sock: socket.socket, peer: str, shared: Shared) -> None:
        limits = shared.limits
        self.state = HANDSHAKE
        self.peer = peer
        self.progress_ns = shared.clock.now_ns()
        self._shared = shared
        self._limits = limits
        self._budget = shared.budget
        self._sock = sock
        self._fd = sock.fileno()
        self._output = Output(sock, limits, self._reply_left)
        self._handshake = ServerHandshake(DirectoryExports(shared.directory))
        self._timer: Timer | None = None
        self._device: Device | None = None
        # The receive buffer: [_begin, _end) is received and not yet served.
        self._buffer = bytearray(limits.receive_buffer)
        self._view = memoryview(self._buffer)
        self._begin = 0
        self._end = 0
        # A large WRITE whose payload is being received, and how much of it is there.
        self._large: memoryview | None = None
        self._large_filled = 0
        self._large_bio: Bio | None = None
        # Payload of a refused WRITE, to be dropped, and what to answer then.
        self._skip = 0
        self._skip_reply = b""
        self._nr_requests = 0
        self._nr_bytes = 0
        self._is_shutting_down = False
        self._is_paused = False
        self._is_reading = False
        self._is_writing = False
        self._is_resuming = False
        self._is_flushing = False  # a flush is scheduled
        self._is_finishing = False  # the end of a shutdown is scheduled
        self._poll_skip = 0
        self._poll_penalty = 0
        self._tasks: set[asyncio.Task[None]] = set()
        # Set by _begin_transmission.
        self._transmission: ServerTransmission
        self._submit: Callable[[Bio], None]
        self._bio: Bio
        self._read_max = -1
        self._write_max = -1
        self._zero_min = 1 << 62

    # ---- life ----

    def start(self) -> None:
        """Greet the client."""
        self._timer = self._shared.clock.call_later(
            self._limits.handshake_timeout_s, self._handshake_timed_out
        )
        self._start_reading()
        self._guard(self._answer_handshake)

    def shutdown(self) -> None:
        """Finish what is in flight, refuse what comes later, and close."""
        if self.state == CLOSED or self._is_shutting_down:
            return
        self._is_shutting_down = True
        if self.state == HANDSHAKE:
            self._handshake.shutdown()
            self._linger()
        elif self.state == TRANSMISSION:
            self._read_max = self._write_max = -1
            self._guard(self._maybe_finish)

    def abort(self) -> None:
        """Close now; replies that have not left never will."""
        if self.state == CLOSED:
            return
        self.state = CLOSED
        self._stop_reading()
        if self._is_writing:
            self._shared.loop.remove_writer(self._fd)
            self._is_writing = False
        if self._timer is not None:
            self._timer.cancel()
        self._sock.close()
        self._output.drop()
        if self._large_bio is not None:
            request = self._large_bio.private
            assert isinstance(request, _Request)
            self._large = self._large_bio = None
            self._give_back(request)
        self._maybe_release()

    def is_stalled(self, now_ns: int) -> bool:
        """Whether the client holds memory and has not moved for `stall_timeout_s`."""
        return (self._large is not None or self._output.is_blocked) and (
            now_ns - self.progress_ns > self._limits.stall_timeout_s * 1e9
        )

    def _maybe_release(self) -> None:
        if self._nr_requests:
            return
        device, self._device = self._device, None
        if device is not None:
            self._shared.directory.release(device)
        self._shared.closed(self)

    def _handshake_timed_out(self) -> None:
        logger.info("%s: no handshake in time", self.peer)
        self.abort()

    def _linger(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._shared.clock.call_later(self._limits.linger_s, self.abort)

    def _begin_drain(self) -> None:
        """Read nothing more; close when everything in flight has been answered."""
        self.state = DRAINING
        self._stop_reading()

    def _maybe_finish(self) -> None:
        """Close, if that is all that is left to do."""
        if self._nr_requests or not self._output.is_empty:
            return
        if self.state == DRAINING:
            self.abort()
        elif self.state == TRANSMISSION and not self._is_finishing:
            self._is_finishing = True
            self._shared.loop.call_soon(self._guard, self._finish_shutdown)

    def _finish_shutdown(self) -> None:
        """Nothing is in flight: refuse what came meanwhile, and close our half if nothing did.

        The client has a moment to close its own half, lest a reset overtakes our replies.
        """
        self._is_finishing = False
        if self.state != TRANSMISSION or self._is_paused or self._nr_requests:
            return
        self._receive_transmission()
        if (
            self.state == TRANSMISSION
            and self._output.is_empty
            and not self._is_finishing  # something came and was answered: once more
        ):
            self.state = DRAINING
            self._sock.shutdown(socket.SHUT_WR)
            self._linger()

    def _guard(self, call: Callable[[], None]) -> None:
        """Run `call`; whatever it raises ends this connection and no other."""
        try:
            call()
        except _Violation as error:
            logger.info("%s: %s: disconnected", self.peer, error)
            self.abort()
        except OSError as error:
            level = logging.DEBUG if is_gone(error) else logging.INFO
            logger.log(level, "%s: %s", self.peer, error)
            self.abort()
        except Exception:
            logger.exception("%s: connection failed", self.peer)
            self.abort()

    # ---- the socket ----

    def _start_reading(self) -> None:
        if not self._is_reading:
            self._shared.loop.add_reader(self._fd, self._readable)
            self._is_reading = True

    def _stop_reading(self) -> None:
        if self._is_reading:
            self._shared.loop.remove_reader(self._fd)
            self._is_reading = False

    def _readable(self) -> None:
        if self.state == TRANSMISSION:
            self._guard(self._receive_transmission)
        elif self.state == HANDSHAKE:
            self._guard(self._receive_handshake)
        else:
            self._guard(self._receive_nothing)

    def _writable(self) -> None:
        self.progress_ns = self._shared.clock.now_ns()
        self._guard(self._flush)

    def _flush(self) -> None:
        """Send what can be sent; then go on with what waited for that."""
        all_left = self._output.flush()
        if not all_left and not self._is_writing:
            self.progress_ns = self._shared.clock.now_ns()
            self._shared.loop.add_writer(self._fd, self._writable)
            self._is_writing = True
        elif all_left:
            if self._is_writing:
                self._shared.loop.remove_writer(self._fd)
                self._is_writing = False
            if self.state == DRAINING or self._is_shutting_down:
                self._maybe_finish()
        if self._is_paused:
            self._maybe_resume()

    def _schedule_flush(self) -> None:
        """Flush once in this turn of the loop, however many bios end in it."""
        if not self._is_flushing:
            self._is_flushing = True
            self._shared.loop.call_soon(self._flush_scheduled)

    def _flush_scheduled(self) -> None:
        self._is_flushing = False
        if self.state != CLOSED:
            self._guard(self._flush)

    def _reply_left(self, charge: int, buffer: bytearray | None) -> None:
        """A large reply has left, or never will."""
        self._nr_bytes -= charge
        if buffer is not None:
            self._shared.pool.give_back(buffer)
        self._budget.give_back(0, charge)

    def _receive_nothing(self) -> None:
        if not self._sock.recv_into(self._view):
            self.abort()

    def _receive_handshake(self) -> None:
        received = self._sock.recv_into(self._view[:HANDSHAKE_READ])
        if not received:
            self.abort()
            return
        self._handshake.receive_data(self._view[:received])
        self._answer_handshake()

    def _answer_handshake(self) -> None:
        handshake = self._handshake
        for data in handshake.data_to_send():
            self._output.push(data)
        if handshake.closed:
            if handshake.error is not None:
                logger.info("%s: %s", self.peer, handshake.error)
            self._begin_drain()
        elif handshake.negotiated is not None:
            self._begin_transmission(handshake.negotiated)
        self._flush()
        if self.state == DRAINING:
            self._maybe_finish()

    def _begin_transmission(self, negotiated: Negotiated) -> None:
        limits = self._limits
        try:
            device = self._shared.directory.acquire(negotiated.export.name)
        except KeyError:
            logger.info("%s: %s is gone", self.peer, negotiated.export.name)
            self._begin_drain()
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.state = TRANSMISSION
        self._device = device
        self._submit = device.submit
        self._bio = Bio(OP_READ, 0, 0, None, 0, self._ended)
        transmission = ServerTransmission(negotiated, payload_max=limits.payload_max)
        self._transmission = transmission
        assert not transmission.align_mask, "the fast path checks no alignment"
        if not self._is_shutting_down:
            self._read_max = limits.arena_read_max
            if transmission.flags_allowed.get(CMD_WRITE) == CMD_FLAG_FUA:
                self._write_max = limits.receive_buffer
        if transmission.structured:
            self._zero_min = limits.zero_check_min
        trailing = self._handshake.trailing_data()
        self._view[: len(trailing)] = trailing
        self._end = len(trailing)
        logger.info("%s: attached %s", self.peer, negotiated.export.name)
        self._serve()

    # hot: one system call and 0.6 us a batch, besides `_serve`
    def _receive_transmission(self) -> None:
        """Read and serve batch after batch, as long as there is one, or soon will be."""
        budget = self._budget
        if budget.hot is self:
            budget.hot_streak += 1
        else:
            budget.hot = self
            budget.hot_streak = 0
        poll_ns = 0
        if self._poll_skip:
            self._poll_skip -= 1
        elif budget.hot_streak >= POLL_STREAK:
            poll_ns = self._limits.poll_us * 1000
        deadline_ns = 0
        batches_left = BATCHES_MAX
        while True:
            try:
                received = self._receive()
            except BlockingIOError:
                if not poll_ns or budget.nr_requests or self._output.is_blocked:
                    return
                now_ns = perf_counter_ns()
                if not deadline_ns:
                    deadline_ns = now_ns + poll_ns
                elif now_ns > deadline_ns:
                    self._poll_penalty = min(2 * self._poll_penalty + 1, POLL_SKIP_MAX)
                    self._poll_skip = self._poll_penalty
                    return
                _sched_yield()
                continue
            if deadline_ns:
                deadline_ns = 0
                self._poll_penalty = 0
            if received:
                self._serve()
            else:
                self._begin_drain()
            output = self._output
            if not output.is_empty and not output.is_blocked:
                self._flush()
            elif self.state == DRAINING:
                self._maybe_finish()
            batches_left -= 1
            if not poll_ns or not batches_left or not self._is_reading:
                return

    def _receive(self) -> int:
        """Receive once, wherever the bytes belong. Returns how many came; 0 at the end.

        Raises: BlockingIOError: nothing is there.
        """
        if self._large is None and not self._skip:
            end = self._end
            received = self._sock.recv_into(self._view[end:] if end else self._view)
            self._end = end + received
            return received
        if self._large is not None:
            return self._receive_large(self._large)
        received = self._sock.recv_into(self._view)
        skipped = min(received, self._skip)
        self._skip -= skipped
        self._begin = skipped
        self._end = received
        if not self._skip:
            self._output.push(self._skip_reply)
        return received

    def _receive_large(self, payload: memoryview) -> int:
        """Receive the rest of a large WRITE's payload, and what follows it if it is there."""
        filled = self._large_filled
        received = self._sock.recvmsg_into([payload[filled:], self._view])[0]
        filled += received
        self.progress_ns = self._shared.clock.now_ns()
        if filled < len(payload):
            self._large_filled = filled
            return received
        self._end = filled - len(payload)
        bio = self._large_bio
        assert bio is not None
        self._large = self._large_bio = None
        self._start(bio)
        return received

    # ---- pausing ----

    def _is_full(self, length: int) -> bool:
        """Whether a request that takes `length` bytes has to wait. Pauses, if so."""
        limits = self._limits
        if (
            self._output.is_full
            or self._nr_requests >= limits.requests_in_flight_max
            or (self._nr_bytes and self._nr_bytes + length > limits.bytes_in_flight_max)
        ):
            self._pause()
            return True
        if self._budget.is_full(length):
            self._budget.wait(self._maybe_resume)
            self._shared.starved()
            self._pause()
            return True
        return False

    def _pause(self) -> None:
        self._is_paused = True
        self._stop_reading()

    def _maybe_resume(self) -> None:
        """Something was given back: look, in a turn of its own, whether it is enough."""
        if self._is_paused and not self._is_resuming:
            self._is_resuming = True
            self._shared.loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._is_resuming = False
        if self.state != TRANSMISSION or self._is_full(0):
            return
        self._is_paused = False
        self._start_reading()
        self._guard(self._serve_buffered)

    def _serve_buffered(self) -> None:
        self._serve()
        self._flush()

    # ---- the fast path ----

    # hot: see the figures in the module head
    def _serve(self) -> None:
        """Serve the requests in the receive buffer, replies into the arena."""
        buffer, view, position, end = self._buffer, self._view, self._begin, self._end
        output = self._output
        arena, replies, out = output.arena, output.view, output.end
        submit, bio, size = self._submit, self._bio, self._transmission.size
        read_max, write_max, zero_min = self._read_max, self._write_max, self._zero_min
        structured = self._transmission.structured
        header = OFFSET_DATA.size if structured else SIMPLE_REPLY.size
        flush_at = self._flush_at()
        while end - position >= _HEADER:
            if out >= flush_at:
                output.end = out
                if self._flush_early():
                    break
                out = output.end
                flush_at = self._flush_at()
            magic, flags, command, cookie, offset, length = _unpack(buffer, position)
            stop = position + _HEADER
            if (
                command == CMD_READ
                and 0 < length <= read_max
                and offset + length <= size
                and not flags
                and magic == REQUEST_MAGIC
            ):
                bio.op = OP_READ
                payload = replies[out + header : out + header + length]
            elif (
                command == CMD_WRITE
                and 0 < length <= write_max
                and stop + length <= end
                and offset + length <= size
                and flags <= FUA
                and magic == REQUEST_MAGIC
            ):
                bio.op = OP_WRITE
                payload = view[stop : stop + length]
                stop += length
            else:
                self._begin, output.end = position, out
                stop = self._take(magic, flags, command, cookie, offset, length)
                if stop < 0:
                    break
                position, out = stop, output.end
                continue
            bio.offset, bio.length, bio.flags = offset, length, flags
            bio.payload, bio.borrowed, bio.status = payload, True, PENDING
            submit(bio)
            position = stop
            if bio.status:
                bio = self._not_inline(bio, command, cookie)
                if self._is_paused:
                    break
            elif command == CMD_WRITE:
                _pack_simple(arena, out, SIMPLE_REPLY_MAGIC, 0, cookie)
                out += 16
            elif length >= zero_min or bio.payload is not payload:
                out += self._pack_read(bio, payload, out, cookie)
            else:
                if structured:
                    _pack_data(arena, out, _CHUNK, 1, 1, cookie, length + 8, offset)
                else:
                    _pack_simple(arena, out, SIMPLE_REPLY_MAGIC, 0, cookie)
                out += header + length
        output.end = out
        self._consume(position)

    def _consume(self, position: int) -> None:
        """The receive buffer has been served up to `position`: make room behind `_end`."""
        view, end = self._view, self._end
        left = end - position
        if self._limits.poison_borrowed:
            view[:position] = b"\xdb" * position
        if not left:
            self._begin = self._end = 0
        elif left <= COMPACT_MAX or position > len(view) - self._limits.own_payload_min:
            view[:left] = view[position:end]
            self._begin, self._end = 0, left
        else:
            self._begin = position

    def _flush_at(self) -> int:
        """Where in the arena to send: behind it there is room for one more reply."""
        output = self._output
        if output.is_blocked:
            return output.end_max
        return min(output.end + self._limits.flush_at, output.end_max)

    def _flush_early(self) -> bool:
        """Let the client begin to work on what is there. Returns whether we paused."""
        if not self._output.is_blocked:
            self._flush()
        return self._is_full(0)

    def _not_inline(self, bio: Bio, command: int, cookie: int) -> Bio:
        """The bio failed, or goes on: it needs an account. Returns the next bio to use."""
        if bio.status > 0:
            self._reply_error(cookie, command, bio.flags, bio.status)
            return bio
        bio.private = _Request(cookie, command, 0, bio.length, None)
        self._nr_requests += 1
        self._nr_bytes += bio.length
        self._budget.nr_requests += 1
        self._budget.nr_bytes += bio.length
        self._bio = Bio(OP_READ, 0, 0, None, 0, self._ended)
        self._check_owned(bio)
        self._is_full(0)
        return self._bio

    def _check_owned(self, bio: Bio) -> None:
        if bio.borrowed:
            assert self._device is not None
            raise AssertionError(f"{self._device.name} kept a borrowed payload: {bio}")

    def _pack_read(self, bio: Bio, payload: memoryview, out: int, cookie: int) -> int:
        """Pack the reply to a READ that is long, or was owned on its way and ended inline.

        Returns how long the reply is.
        """
        arena, length = self._output.arena, bio.length
        if bio.payload is not payload:
            assert bio.payload is not None
            payload[:] = bio.payload
        if not self._transmission.structured:
            pack_simple_reply_into(arena, out, 0, cookie)
            return SIMPLE_REPLY.size + length
        if length >= self._zero_min and arena.startswith(
            _ZEROES[:length], out + OFFSET_DATA.size
        ):
            hole = offset_hole(cookie, bio.offset, length, done=True)
            arena[out : out + len(hole)] = hole
            return len(hole)
        pack_offset_data_into(arena, out, cookie, bio.offset, length, done=True)
        return OFFSET_DATA.size + length

    # ---- the slow path ----

    def _take(
        self,
        magic: int,
        flags: int,
        command: int,
        cookie: int,
        offset: int,
        length: int,
    ) -> int:
        """Take any request at `_begin`. Returns where the next one begins.

        -1: nothing more can be served now.
        """
        if magic != REQUEST_MAGIC:
            raise _Violation(f"bad request magic {magic:#x}")
        if command == CMD_WRITE:
            return self._take_write(flags, cookie, offset, length)
        if command == CMD_DISC:
            self._begin_drain()
            return -1
        refusal = self._refusal(command, flags, offset, length)
        if refusal is not None:
            self._reply_refusal(cookie, command, refusal)
        elif not length and command != CMD_FLUSH:
            self._reply_done(cookie, command)
        elif self._is_full(length if command == CMD_READ else 0):
            return -1
        elif command == CMD_READ:
            request, payload = self._take_memory(cookie, command, flags, length)
            self._start(Bio(OP_READ, offset, length, payload, 0, self._ended, request))
        elif command == CMD_BLOCK_STATUS:
            self._start_block_status(flags, cookie, offset, length)
        else:
            request = _Request(cookie, command, flags, 0, None)
            if command == CMD_FLUSH:
                offset = length = 0
            self._start(
                Bio(
                    _OPS[command],
                    offset,
                    length,
                    None,
                    _bio_flags(command, flags),
                    self._ended,
                    request,
                )
            )
        return self._begin + _HEADER

    def _refusal(
        self, command: int, flags: int, offset: int, length: int
    ) -> RequestError | None:
        if self._is_shutting_down:
            return RequestError(ESHUTDOWN, "server is shutting down")
        return self._transmission.refusal(command, flags, offset, length)

    def _take_write(self, flags: int, cookie: int, offset: int, length: int) -> int:
        """As `_take`, for a WRITE whose payload is not all there, or that is refused."""
        payload_at = self._begin + _HEADER
        stop = payload_at + length
        rule = self._transmission.payload_rule(length)
        if rule == PAYLOAD_DISCONNECT:
            raise _Violation(f"WRITE of {length} bytes")
        if rule == PAYLOAD_ACCEPT:
            refusal = self._refusal(CMD_WRITE, flags, offset, length)
        else:
            refusal = RequestError(EINVAL, f"WRITE of {length} bytes is too long")
        if refusal is not None:
            if stop <= self._end:
                self._reply_refusal(cookie, CMD_WRITE, refusal)
                return stop
            self._skip = stop - self._end
            self._skip_reply = self._encode_error(
                cookie, CMD_WRITE, refusal.errno, refusal.message
            )
            return self._end
        if not length:
            self._reply_done(cookie, CMD_WRITE)
            return stop
        if length < self._limits.own_payload_min or self._is_full(length):
            return -1
        request, payload = self._take_memory(cookie, CMD_WRITE, flags, length)
        here = self._view[payload_at : min(stop, self._end)]
        payload[: len(here)] = here
        bio = Bio(OP_WRITE, offset, length, payload, flags & FUA, self._ended, request)
        if len(here) == length:
            self._start(bio)
            return stop
        self._large, self._large_filled, self._large_bio = payload, len(here), bio
        return self._end

    def _take_memory(
        self, cookie: int, command: int, flags: int, length: int
    ) -> tuple[_Request, memoryview]:
        """Take a buffer for `length` bytes of payload, and put it on the account."""
        buffer = self._shared.pool.take(length)
        self._nr_bytes += len(buffer)
        self._budget.nr_bytes += len(buffer)
        request = _Request(cookie, command, flags, len(buffer), buffer)
        return request, memoryview(buffer)[HEADER_ROOM : HEADER_ROOM + length]

    def _give_back(self, request: _Request) -> None:
        self._reply_left(request.charge, request.buffer)

    def _start(self, bio: Bio) -> None:
        self._nr_requests += 1
        self._budget.nr_requests += 1
        self._submit(bio)

    def _start_block_status(
        self, flags: int, cookie: int, offset: int, length: int
    ) -> None:
        self._nr_requests += 1
        self._budget.nr_requests += 1
        task = self._shared.loop.create_task(
            self._block_status(flags, cookie, offset, length)
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _block_status(
        self, flags: int, cookie: int, offset: int, length: int
    ) -> None:
        device, context_id = self._device, self._transmission.context_id
        assert device is not None
        assert context_id is not None
        status = 0
        extents = []
        try:
            found = await device.extents(offset, length)
            req_one = bool(flags & CMD_FLAG_REQ_ONE)
            extents = clip_extents(found, length, req_one=req_one)
        except DeviceError as error:
            status = error.errno
        except Exception:
            logger.exception("%s: %s: extents failed", self.peer, device.name)
            status = errnos.EIO
        self._nr_requests -= 1
        if self.state != CLOSED:
            if status:
                self._reply_error(cookie, CMD_BLOCK_STATUS, flags, status)
            else:
                self._output.push(block_status(cookie, context_id, extents, done=True))
            self._schedule_flush()
        else:
            self._maybe_release()
        self._budget.give_back(1, 0)

    def _ended(self, bio: Bio) -> None:
        """A bio with an account has ended; one without is still in `_serve`'s hands."""
        request = bio.private
        if request is None:
            return
        assert isinstance(request, _Request)
        self._nr_requests -= 1
        if self.state == CLOSED:
            self._give_back(request)
            self._maybe_release()
        else:
            if bio.status:
                self._give_back(request)
                self._reply_error(
                    request.cookie, request.command, request.flags, bio.status
                )
            elif request.command == CMD_READ:
                self._reply_read(bio, request)
            else:
                self._give_back(request)
                self._reply_done(request.cookie, request.command)
            self._schedule_flush()
        self._budget.give_back(1, 0)

    # ---- replies ----

    def _reply_done(self, cookie: int, command: int) -> None:
        """Answer a request that returns nothing."""
        if command == CMD_READ and self._transmission.structured:
            self._output.push(none_chunk(cookie))
        else:
            self._output.push(simple_reply(0, cookie))

    def _reply_refusal(self, cookie: int, command: int, refusal: RequestError) -> None:
        logger.debug("%s: %s", self.peer, refusal)
        self._output.push(
            self._encode_error(cookie, command, refusal.errno, refusal.message)
        )

    def _reply_error(self, cookie: int, command: int, flags: int, errno: int) -> None:
        error = wire_errno(errno, command, flags)
        self._output.push(
            self._encode_error(cookie, command, error, os.strerror(errno))
        )

    def _encode_error(
        self, cookie: int, command: int, error: int, message: str
    ) -> bytes:
        if self._transmission.structured:
            return error_chunk(cookie, error, message.encode())
        return simple_reply(error, cookie)

    def _reply_read(self, bio: Bio, request: _Request) -> None:
        """Answer a READ from its own buffer."""
        cookie, _, flags, charge, buffer = request
        payload, length = bio.payload, bio.length
        assert payload is not None
        structured = self._transmission.structured
        if (
            length >= self._zero_min
            and not flags & CMD_FLAG_DF
            and _is_zero(payload, buffer)
        ):
            self._give_back(request)
            self._output.push(offset_hole(cookie, bio.offset, length, done=True))
            return
        header = bytearray(OFFSET_DATA.size if structured else SIMPLE_REPLY.size)
        if structured:
            pack_offset_data_into(header, 0, cookie, bio.offset, length, done=True)
        else:
            pack_simple_reply_into(header, 0, 0, cookie)
        if buffer is not None and payload.obj is buffer:
            begin = HEADER_ROOM - len(header)
            buffer[begin:HEADER_ROOM] = header
            reply = memoryview(buffer)[begin : HEADER_ROOM + length]
            self._output.push(reply, charge, buffer)
        else:
            self._output.push(header)
            self._output.push(payload, charge, buffer)


def _bio_flags(command: int, flags: int) -> int:
    """FUA means nothing to a FLUSH or a CACHE, and those bios do not carry it."""
    if command in (CMD_FLUSH, CMD_CACHE):
        return 0
    bio_flags = flags & FUA
    if flags & CMD_FLAG_NO_HOLE:
        bio_flags |= NO_UNMAP
    if flags & CMD_FLAG_FAST_ZERO:
        bio_flags |= FAST_ZERO
    return bio_flags


def _is_zero(payload: memoryview, buffer: bytearray | None) -> bool:
    """Whether a READ's payload is known to be all zeroes; a memcmp, with an early end."""
    memory, length = payload.obj, len(payload)
    if not isinstance(memory, bytearray):
        return False
    if memory is buffer:
        at = HEADER_ROOM
    elif len(memory) == length:  # from Bio.own
        at = 0
    else:
        return False
    end = at + length
    while at < end:
        step = min(end - at, len(_ZEROES))
        if not memory.startswith(_ZEROES[:step], at):
            return False
        at += step
    return True
