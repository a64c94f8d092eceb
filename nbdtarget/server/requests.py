# SPDX-License-Identifier: Apache-2.0
"""The requests of one connection: taken from the receive buffer, answered into the output.

Theory of operation. `receive` puts bytes where they belong: in the receive buffer, in the buffer
of a large WRITE whose payload is on its way, or nowhere, if they are the payload of a refused
one. `serve` takes the requests in the receive buffer, by one of two paths:

*Fast* (`serve`, the hot loop): READ to `arena_read_max`, and WRITE that lies whole in the receive
buffer, with nothing wrong. One Bio is used again and again as long as bios end inside
`submit`; READ data goes straight into the reply arena, WRITE data is used where it lies.
A bio that does not end inside `submit` keeps its object (and by the rule of `bio.py` owns
its bytes by then); the loop takes a new one, and the arena's end is simply not advanced.

*Slow* (`_take` and below): everything else, each with a `Request` as its account. Large READs
and WRITEs have a pooled buffer of their own, which the device may keep until the bio ends;
a large WRITE is received straight into it.

What a READ or WRITE of 4 KiB costs on the fast path, at depth 32, where 4 to 10 requests come
at once (perf stat, Python 3.11, a file in the page cache behind a hydrated clone):

    system calls    1 of the device's; 0.1 to 0.25 each of recv, send, epoll_wait
    allocations     2 memoryviews, the numbers of the header; no bio, no reply, no future
    Python calls    4: submit of two devices and the target's map, end; endio and 3 into C
    CPU             0.75 us here, 1 to 1.5 us in the device, 5.5 to 6 us all in: the rest is
                    the kernel's socket

Bounds. What is served in one turn of the loop is bounded in bytes and in time (`turns.py`); the clock is
looked at after each slow request, and each TURN_LOOK received bytes of fast ones. `is_full` is asked before each slow request (before one that is answered without I/O only
whether the client takes its answers), and after each bio that stays in flight. When
it says yes the connection pauses: requests that were received lie in the buffer until
something was given back.

Ends. Bios in flight when the connection closes end into `_ended`, which drops them; the last
one tells the connection that it may release the device.
"""

import asyncio
import errno as errnos
import logging
import os
import socket
from collections.abc import Callable, Iterator
from mmap import mmap
from typing import Final

from nbdtarget.bio import FUA, OP_FLUSH, OP_READ, OP_WRITE, PENDING, Bio
from nbdtarget.common.clock import perf_counter_ns
from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import Device
from nbdtarget.devices.losses import ConnectionObserver
from nbdtarget.server.block_status import describe
from nbdtarget.server.buffers import HEADER_ROOM, Buffer
from nbdtarget.server.commands import OPS, bio_flags_of
from nbdtarget.server.large_write import LargeWrite
from nbdtarget.server.output import Output
from nbdtarget.server.replies import encode_error, pack_read, push_read
from nbdtarget.server.request import WRITING, Request, Violation
from nbdtarget.server.shared import Host, Shared
from nbdtarget_protocol.consts import (
    CMD_BLOCK_STATUS,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FUA,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_WRITE,
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
from nbdtarget_protocol.errors import RequestError
from nbdtarget_protocol.handshake import Negotiated
from nbdtarget_protocol.transmission import (
    PAYLOAD_ACCEPT,
    PAYLOAD_DISCONNECT,
    ServerTransmission,
    none_chunk,
    simple_reply,
    wire_errno,
)

__all__ = ["Requests", "Violation"]

log = logging.getLogger(__name__)

TURN_LOOK: Final = 32 << 10  # received bytes between two looks at the clock
COMPACT_MAX: Final = 4 << 10  # so much is moved to the front of the buffer at once

_HEADER: Final = REQUEST.size
# For the hot loop: a module global costs less than an attribute of one.
_unpack: Final = REQUEST.unpack_from
_pack_simple: Final = SIMPLE_REPLY.pack_into
_pack_data: Final = OFFSET_DATA.pack_into
_CHUNK: Final = STRUCTURED_REPLY_MAGIC

# What the hot loop writes as plain numbers.
assert CMD_FLAG_FUA == FUA
assert REPLY_FLAG_DONE == REPLY_TYPE_OFFSET_DATA == 1
assert SIMPLE_REPLY.size == 16


class Requests:
    """See the module head.

    Args:
        host: the connection.
        sock: non-blocking.
        device: acquired; every bio goes to it.

    Attributes:
        nr_requests: bios, and other answers, in flight.
        is_paused: a bound was met: nothing is received or served.
        is_in_line: it is paused until something is given back to the budget: nothing else resumes it.
        is_yielding: it is only that others have their turn.
    """

    def __init__(
        self,
        host: Host,
        sock: socket.socket,
        shared: Shared,
        output: Output,
        device: Device,
        negotiated: Negotiated,
    ) -> None:
        limits = shared.limits
        transmission = ServerTransmission(negotiated, payload_max=limits.payload_max)
        assert not transmission.align_mask, "the fast path checks no alignment"
        self.nr_requests = 0
        self.is_paused = self.is_yielding = self.is_in_line = False
        self._nr_bytes = 0
        self._host, self._sock, self._shared = host, sock, shared
        self._limits, self._budget = limits, shared.budget
        self._output, self._device = output, device
        self._gate = shared.gates.of(device)
        self._submit: Callable[[Bio], None] = device.submit  # or the gate's
        self._in_flight: set[Bio] = set()
        self._observer = ConnectionObserver(device)
        self._transmission = transmission
        self._is_shutting_down = False
        # The bio of the fast path.
        self._bio = Bio(OP_READ, 0, 0, None, 0, self._ended)
        # Up to which length a READ, a WRITE may take the fast path, -1: none; and from which
        # length a READ is looked through for zeroes.
        self._read_max = limits.arena_read_max
        writable = transmission.flags_allowed.get(CMD_WRITE) == CMD_FLAG_FUA
        self._write_max = limits.receive_buffer if writable else -1
        self._structured = transmission.structured
        self._header = (OFFSET_DATA if transmission.structured else SIMPLE_REPLY).size
        # What is left of this turn of the loop, and when (ns) it ends, if it has been looked at.
        self._turn_left = limits.turn_bytes_max
        self._turn_end = 0
        self._turn_is_counted = False
        self._zero_min = limits.zero_check_min if transmission.structured else 1 << 62
        # [_begin, _end) is received and not yet served.
        self._buffer = bytearray(limits.receive_buffer)
        self._view = memoryview(self._buffer)
        self._begin = 0
        self._end = 0
        self._large: LargeWrite | None = None  # its payload is being received
        # Payload of a refused WRITE, to be dropped, and what to answer then.
        self._skip = 0
        self._skip_reply = b""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_receiving_large(self) -> bool:
        """Whether memory is held for a payload, and the client is who does not go on."""
        return self._large is not None and not self.is_paused

    @property
    def is_batch(self) -> bool:
        """Whether more than one request lies in the receive buffer."""
        begin, left = self._begin, self._end - self._begin - _HEADER
        if left <= 0:
            return False
        _, _, command, _, _, length = _unpack(self._buffer, begin)
        return bool(command != CMD_WRITE or left > length)

    def put(self, data: bytes) -> None:
        """Take what came behind the handshake."""
        self._end = len(data)
        self._view[: self._end] = data

    def refuse(self) -> None:
        """From now on answer every request with ESHUTDOWN."""
        self._is_shutting_down = True
        self._read_max = self._write_max = -1

    def route(self, submit: Callable[[Bio], None]) -> None:
        """Submit bios this way from now on."""
        self._submit = submit

    def writes_in_flight(self) -> Iterator[tuple[Bio, int, int]]:
        """Each with the offset and length that the client asked for."""
        for bio in self._in_flight:
            request = bio.private
            assert isinstance(request, Request)
            if request.command in WRITING:
                yield bio, request.offset, bio.length

    def drop(self) -> None:
        """The connection is closed: forget the WRITE that was being received, and what is held."""
        self._observer.close()
        self._gate.drop(tuple(self._in_flight))
        large, self._large = self._large, None
        if large is not None:
            large.leave()
            self.reply_left(large.charge, large.buffer)

    def release(self) -> None:
        """Nothing is in flight any more: give the memory back now, not at the next full collection."""
        self._bio.payload = None
        self._buffer = bytearray()
        self._view = memoryview(self._buffer)

    # ---- bounds ----

    def is_full(self, length: int) -> bool:
        """Whether a request that takes `length` bytes has to wait. Pauses, if so."""
        limits = self._limits
        if (
            self._output.is_full
            or self.nr_requests >= limits.requests_in_flight_max
            or (self._nr_bytes and self._nr_bytes + length > limits.bytes_in_flight_max)
        ):
            self._pause()
            return True
        budget = self._budget
        favoured = budget.favoured
        if budget.is_full(length) and (favoured is None or favoured is not self._large):
            self._wait_for_budget()
            return True
        return False

    def _wait_for_budget(self) -> None:
        if not self.is_in_line:
            self.is_in_line = True
            self._budget.wait(self._budget_shrank)
        self._shared.starved()
        self._pause()

    def _budget_shrank(self) -> None:
        self.is_in_line = False
        self._host.maybe_resume()

    def _pause(self) -> None:
        self.is_paused = True
        self._host.pause()

    def reply_left(self, charge: int, buffer: Buffer | None) -> None:
        """A large reply has left, or never will."""
        self._nr_bytes -= charge
        if buffer is not None:
            self._shared.pool.give_back(buffer)
        self._budget.give_back(0, charge)

    # ---- receiving ----

    def receive(self) -> int:
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

    # hot: a few of them for each large WRITE
    def _receive_large(self, large: LargeWrite) -> int:
        """Receive more of a large WRITE's payload, and what follows it if it is there."""
        payload, filled, length = large.payload, large.filled, large.length
        if filled == large.charge:
            more = large.grow()
            if more < 0:
                self._wait_for_budget()
                raise BlockingIOError
            self._nr_bytes += more
        if large.charge == length:
            # Only a little of what follows: if it is another large WRITE, the rest of its payload
            # goes straight into its own buffer, and is not copied there.
            behind = self._view[:COMPACT_MAX]
            received = self._sock.recvmsg_into([payload[filled:], behind])[0]
        else:
            received = self._sock.recv_into(payload[filled : large.charge])
        filled += received
        if filled >= large.progress_at:
            large.progress_at = filled + self._limits.progress_bytes
            self._host.moved()
        if filled < length:
            large.filled = filled
            return received
        self._end = filled - length
        self._large = None
        self._start_large(large)
        return received

    def _start_large(self, large: LargeWrite) -> None:
        if large.grown:
            large.leave()
            request = large.bio.private
            assert isinstance(request, Request)
            large.bio.private = request._replace(charge=large.charge)
        self._start(large.bio)

    # ---- the fast path ----

    # hot: see the figures in the module head
    def serve(self) -> None:
        """Serve the requests in the receive buffer, replies into the arena."""
        buffer, view, position, end = self._buffer, self._view, self._begin, self._end
        output = self._output
        arena, replies, out = output.arena, output.view, output.end
        submit, bio, size = self._submit, self._bio, self._transmission.size
        read_max, write_max, zero_min = self._read_max, self._write_max, self._zero_min
        structured, header = self._structured, self._header
        flush_at = self._flush_at()
        last = end - _HEADER  # where the last request may begin
        look_at = last if last <= position + TURN_LOOK else position + TURN_LOOK
        while position <= last:
            if position > look_at and (look_at := self._look_at(position, last)) < 0:
                break
            if out >= flush_at:
                flush_at, out = self._flush_early(out)
                if not flush_at:
                    break
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
                position, out, look_at = stop, output.end, -1  # it took any time
                continue
            bio.offset, bio.length, bio.flags = offset, length, flags
            bio.payload, bio.borrowed, bio.status = payload, True, PENDING
            submit(bio)
            position = stop
            if bio.status:
                bio = self._not_inline(bio, command, cookie, offset)
                if self.is_paused:
                    break
            elif command == CMD_WRITE:
                _pack_simple(arena, out, SIMPLE_REPLY_MAGIC, 0, cookie)
                out += 16
            elif length >= zero_min or bio.payload is not payload:
                out += pack_read(
                    output, bio, payload, out, (cookie, offset, structured, zero_min)
                )
            else:
                if structured:
                    _pack_data(arena, out, _CHUNK, 1, 1, cookie, length + 8, offset)
                else:
                    _pack_simple(arena, out, SIMPLE_REPLY_MAGIC, 0, cookie)
                out += header + length
        output.end = out
        self._consume(position)

    def _look_at(self, position: int, last: int) -> int:
        """Return up to where in the buffer to serve without a look at the clock.

        -1: not at all any more in this turn of the loop.
        """
        turn_us = self._limits.turn_us
        now_ns = perf_counter_ns() if turn_us else 0
        self._turn_is_counted = True
        self._turn_end = self._turn_end or now_ns + turn_us * 1000 + 1
        if self._turn_left > 0 and now_ns <= self._turn_end:
            return min(last, position + TURN_LOOK)
        self.is_yielding = True
        self._pause()
        self._shared.turns.ask(self._host.resume)
        return -1

    def _consume(self, position: int) -> None:
        """The receive buffer has been served up to `position`: make room behind `_end`."""
        view, end = self._view, self._end
        left = end - position
        if self._turn_is_counted:
            self._turn_is_counted = False
            self._turn_left, self._turn_end = self._limits.turn_bytes_max, 0
        if self._limits.poison_borrowed:
            view[:position] = b"\xdb" * position
        if not left:
            self._begin = self._end = 0
        elif left <= COMPACT_MAX or (end > len(view) // 2 and not self.is_paused):
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

    def _flush_early(self, out: int) -> tuple[int, int]:
        """Let the client begin to work on what is there, up to `out` in the arena.

        Returns where to send next, 0 if we paused; and where the next reply goes.
        """
        output = self._output
        output.end = out
        if not output.is_blocked:
            self._host.flush()
        return (0 if self.is_full(0) else self._flush_at()), output.end

    def _not_inline(self, bio: Bio, command: int, cookie: int, offset: int) -> Bio:
        """The bio failed, or goes on: it needs an account. Returns the next bio to use."""
        if bio.status > 0:
            self._reply_error(cookie, command, bio.flags, bio.status)
            return bio
        bio.private = Request(cookie, command, 0, offset, bio.length, None)
        self.nr_requests += 1
        self._nr_bytes += bio.length
        self._budget.nr_requests += 1
        self._budget.nr_bytes += bio.length
        self._bio = Bio(OP_READ, 0, 0, None, 0, self._ended)
        if bio.borrowed:
            raise AssertionError(f"{self._device.name} kept a borrowed payload: {bio}")
        self._in_flight.add(bio)
        self.is_full(0)
        return self._bio

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
        self._turn_is_counted = True
        self._turn_left -= length
        if magic != REQUEST_MAGIC:
            raise Violation(f"bad request magic {magic:#x}")
        if command == CMD_DISC:
            self._host.disc()
            return -1
        if self._output.is_full:
            # Also before what is answered without I/O: each answer takes memory.
            self._pause()
            return -1
        if command == CMD_WRITE:
            return self._take_write(flags, cookie, offset, length)
        refusal = self._refusal(command, flags, offset, length)
        if refusal is not None:
            self._reply_refusal(cookie, command, refusal)
        elif not length and command != CMD_FLUSH:
            self._reply_done(cookie, command)
        elif self.is_full(length if command == CMD_READ else 0):
            return -1
        elif command == CMD_READ:
            request, payload = self._take_memory(cookie, command, flags, offset, length)
            self._start(Bio(OP_READ, offset, length, payload, 0, self._ended, request))
        elif command == CMD_BLOCK_STATUS:
            self._start_block_status(flags, cookie, offset, length)
        else:
            request = Request(cookie, command, flags, offset, 0, None)
            self._start(self._make_bio(request, length))
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
            raise Violation(f"WRITE of {length} bytes")
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
        if length < self._limits.own_payload_min:
            return -1
        here = self._view[payload_at : min(stop, self._end)]
        charge = max(len(here), min(length, self._limits.payload_step))
        if self.is_full(charge):
            return -1
        buffer = self._shared.pool.take_untouched(length)
        payload = memoryview(buffer)[:length]
        request = Request(cookie, CMD_WRITE, flags, offset, charge, buffer)
        bio = Bio(OP_WRITE, offset, length, payload, flags & FUA, self._ended, request)
        payload[: len(here)] = here
        self._nr_bytes += charge
        self._budget.nr_bytes += charge
        if len(here) == length:
            self._start(bio)
            return stop
        self._large = LargeWrite(bio, buffer, charge, len(here), self._budget)
        return self._end

    def _take_memory(
        self, cookie: int, command: int, flags: int, offset: int, length: int
    ) -> tuple[Request, memoryview]:
        """Take a buffer for `length` bytes of payload, and put it on the account."""
        buffer = self._shared.pool.take(length)
        self._nr_bytes += len(buffer)
        self._budget.nr_bytes += len(buffer)
        request = Request(cookie, command, flags, offset, len(buffer), buffer)
        return request, memoryview(buffer)[HEADER_ROOM : HEADER_ROOM + length]

    def _give_back(self, request: Request) -> None:
        self.reply_left(request.charge, request.buffer)

    def _start(self, bio: Bio) -> None:
        self.nr_requests += 1
        self._budget.nr_requests += 1
        self._in_flight.add(bio)
        self._submit(bio)
        output = self._output
        if output.nr_queued >= self._limits.flush_at and not output.is_blocked:
            self._host.flush()  # a large reply: let the client begin with it

    def _make_bio(self, request: Request, length: int) -> Bio:
        """Make a bio without payload; a FLUSH also tells what the device has lost meanwhile."""
        _, command, flags, offset, _, _ = request
        if command != CMD_FLUSH:
            op, bio_flags = OPS[command], bio_flags_of(command, flags)
            return Bio(op, offset, length, None, bio_flags, self._ended, request)
        mark = self._observer.mark()

        def ended(bio: Bio) -> None:
            bio.status = self._observer.end(mark, bio.status)
            self._ended(bio)

        return Bio(OP_FLUSH, 0, 0, None, 0, ended, request)

    def _start_block_status(
        self, flags: int, cookie: int, offset: int, length: int
    ) -> None:
        self.nr_requests += 1
        self._budget.nr_requests += 1
        task = self._shared.loop.create_task(
            self._block_status(flags, cookie, offset, length)
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _block_status(
        self, flags: int, cookie: int, offset: int, length: int
    ) -> None:
        device, contexts = self._device, self._transmission.contexts
        status = 0
        reply = b""
        try:
            await self._shared.turns.wait()
            await self._gate.passed(offset, length)
            req_one = bool(flags & CMD_FLAG_REQ_ONE)
            reply = await describe(
                device, contexts, cookie, offset, length, req_one=req_one
            )
        except DeviceError as error:
            status = error.errno
        except Exception:
            log.exception("%s: %s: block status", self._host.peer, device.name)
            status = errnos.EIO
        self.nr_requests -= 1
        if not self._host.is_closed:
            if status:
                self._reply_error(cookie, CMD_BLOCK_STATUS, flags, status)
            else:
                self._output.push(reply)
            self._host.flush_soon()
        else:
            self._host.maybe_release()
        self._budget.give_back(1, 0)

    def _ended(self, bio: Bio) -> None:
        """A bio with an account has ended; one without is still in `serve`'s hands."""
        request = bio.private
        if request is None:
            return
        assert isinstance(request, Request)
        self.nr_requests -= 1
        self._in_flight.discard(bio)  # not in it, if its device broke the rules
        if self._host.is_closed:
            self._give_back(request)
            self._host.maybe_release()
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
            self._host.flush_soon()
        if self._gate.elders:
            self._gate.ended(bio)
        self._budget.give_back(1, 0)

    # ---- replies ----

    def _reply_done(self, cookie: int, command: int) -> None:
        """Answer a request that returns nothing."""
        if command == CMD_READ and self._transmission.structured:
            self._output.push(none_chunk(cookie))
        else:
            self._output.push(simple_reply(0, cookie))

    def _reply_refusal(self, cookie: int, command: int, refusal: RequestError) -> None:
        log.debug("%s: %s", self._host.peer, refusal)
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
        structured = self._transmission.structured
        return encode_error(cookie, error, message, structured=structured)

    def _reply_read(self, bio: Bio, request: Request) -> None:
        """Answer a READ from its own buffer."""
        cookie, _, flags, offset, charge, buffer = request
        assert not isinstance(buffer, mmap)
        zero_min = self._zero_min if not flags & CMD_FLAG_DF else 1 << 62
        how = cookie, offset, self._transmission.structured, zero_min
        if push_read(self._output, bio, how, (charge, buffer)):
            self._give_back(request)
