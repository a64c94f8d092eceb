# SPDX-License-Identifier: Apache-2.0
"""`Requests`: the requests of one connection, from the receive buffer to the device, and their replies.

Theory of operation. `Connection` receives into `Input` and then calls `serve`, which takes the requests
that lie there, by one of two paths:

*Fast* (`serve`, the hot loop): a READ of at most `arena_read_max` bytes, or a WRITE that lies whole in the receive
buffer, with nothing wrong. One Bio is used again and again as long as bios end inside
`submit`. READ data goes straight into the reply arena, and WRITE data is used where it lies.
A bio that does not end inside `submit` keeps its object (and by the rule of `bio.py` owns
its bytes by then). The loop takes a new bio, and the end of the arena is simply not advanced.

*Slow* (`_take` and below): everything else. Each such request has a `Request`, which says what it holds. Large READs
and WRITEs have a pooled buffer of their own, which the device may keep until the bio ends;
a large WRITE is received straight into it.

What a READ or WRITE of 4 KiB costs on the fast path, at depth 32, where 4 to 10 requests come
at once (perf stat, Python 3.11, a file in the page cache behind a hydrated clone):

    system calls    1 of the device's; 0.1 to 0.25 each of recv, send, epoll_wait
    allocations     2 memoryviews, the numbers of the header; no bio, no reply, no future
    Python calls    4: submit of two devices and the target's map, end; endio and 3 into C
    CPU             0.75 us here, 1 to 1.5 us in the device, 5.5 to 6 us all in: the rest is
                    the kernel's socket

Who writes what. `Input` has the received bytes, `Output` the replies, and `Flow` the numbers of what is in flight, the
share of the turn, and whether the connection is paused. This class has the bios.

Bounds. `_admit` is called before each slow request, and after each bio that stays in flight; if a bound is met,
it pauses the connection, and the requests that were received stay in the buffer. Before a request
that is answered without I/O only the output is looked at. What is served in one turn of the loop is bounded, too:
`Flow.may_serve_on` is asked after each slow request, and for each TURN_LOOK received bytes of fast ones.

Ends. Bios that are in flight when the connection closes end into `_ended`, which drops them. The last
one tells the connection that it may release the device.
"""

import errno as errnos
import logging
import os
from collections.abc import Callable, Iterator
from typing import Final

from nbdtarget.bio import FUA, OP_FLUSH, OP_READ, OP_WRITE, PENDING, Bio
from nbdtarget.common.errors import DeviceError
from nbdtarget.common.turns import Tasks
from nbdtarget.devices.base import Device
from nbdtarget.devices.losses import ConnectionObserver
from nbdtarget.server.block_status import describe
from nbdtarget.server.buffers import HEADER_ROOM
from nbdtarget.server.commands import OPS, bio_flags_of
from nbdtarget.server.flow import FULL, Flow
from nbdtarget.server.input import Input
from nbdtarget.server.large_write import LargeWrite
from nbdtarget.server.output import Output
from nbdtarget.server.replies import encode_error, pack_read, push_read
from nbdtarget.server.request import WRITING, Request, Violation
from nbdtarget.server.shared import Host, Shared
from nbdtarget.server.sliced_read import SlicedRead
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
    offset_hole,
    simple_reply,
    wire_errno,
)

__all__ = ["Requests", "Violation"]

log = logging.getLogger(__name__)

TURN_LOOK: Final = 32 << 10  # received bytes between two looks at the clock

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
        received: where the requests come from.
        output: where the replies go.
        flow: counts what is in flight.
        device: acquired; every bio goes to it.

    Attributes:
        structured, can_write, size: what was negotiated.
        is_plain: requests are neither refused nor held back, so that they need not be seen here.
    """

    def __init__(
        self,
        host: Host,
        shared: Shared,
        received: Input,
        output: Output,
        flow: Flow,
        device: Device,
        negotiated: Negotiated,
    ) -> None:
        limits = shared.limits
        transmission = ServerTransmission(negotiated, payload_max=limits.payload_max)
        assert not transmission.align_mask, "the fast path checks no alignment"
        self._host, self._shared, self._limits = host, shared, limits
        self._input, self._output, self._flow = received, output, flow
        self._device = device
        self._gate = shared.gates.of(device)
        self._submit: Callable[[Bio], None] = device.submit  # or the gate's
        self._in_flight: set[Bio] = set()
        self._observer = ConnectionObserver(device)
        self._transmission = transmission
        self._is_shutting_down = False
        # The bio of the fast path.
        self._bio = Bio(OP_READ, 0, 0, None, 0, self._ended)
        self._structured = transmission.structured
        self._zero_min = limits.zero_check_min if transmission.structured else 1 << 62
        # What the fast path takes: up to which length a READ and a WRITE, -1: none; the size of the export; from
        # which length a READ is looked through for zeroes; and how READs are answered.
        writable = transmission.flags_allowed.get(CMD_WRITE) == CMD_FLAG_FUA
        self._fast = (
            limits.arena_read_max,
            min(limits.receive_buffer, limits.payload_max) if writable else -1,
            transmission.size,
            self._zero_min,
            transmission.structured,
            (OFFSET_DATA if transmission.structured else SIMPLE_REPLY).size,
        )
        self._tasks = Tasks()
        # For the compiled fast path.
        self.structured, self.can_write = transmission.structured, writable
        self.size = transmission.size
        self.is_plain = True

    def refuse(self) -> None:
        """From now on answer every request with ESHUTDOWN."""
        self._is_shutting_down = True
        self.is_plain = False
        self._fast = (-1, -1, *self._fast[2:])

    def route(self, submit: Callable[[Bio], None]) -> None:
        """Submit bios this way from now on."""
        self._submit = submit
        self.is_plain = submit == self._device.submit and not self._is_shutting_down

    def writes_in_flight(self) -> Iterator[tuple[Bio, int, int]]:
        """Each with the offset and length that the client asked for."""
        for bio in self._in_flight:
            request = bio.private
            assert isinstance(request, Request)
            if request.command in WRITING:
                yield bio, request.offset, bio.length

    def drop(self) -> None:
        """The connection is closed: forget the WRITE that was being received, and what the gate holds."""
        self._observer.close()
        self._gate.drop(tuple(self._in_flight))
        large = self._input.close()
        if large is not None:
            large.leave()
            self._flow.give_back(large.charge, large.buffer)

    def release(self) -> None:
        """Nothing is in flight any more: give the memory back now, and not at the next garbage collection."""
        self._input.release()
        self._bio.payload = None
        self._bio.endio = _not_a_request  # it refers to this object

    def _admit(self, nr_bytes: int) -> bool:
        """Whether a request that takes `nr_bytes` may begin. If not, the connection is paused until it may."""
        flow, large = self._flow, self._input.large
        nr_written = 0 if large is None else large.charge
        bound = (
            FULL
            if self._output.is_full
            else flow.bound_met(nr_bytes, large, nr_written)
        )
        if bound:
            flow.pause(bound)
        return not bound

    def may_go_on(self) -> bool:
        """Whether the connection, which is paused, may go on. If not, it waits for what is in its way now."""
        return self._admit(0)

    def look_at_bounds(self) -> None:
        """More has begun to be in flight: pause the connection if a bound is met now."""
        self._admit(0)

    def read_again(self, cookie: int, offset: int, length: int) -> None:
        """Serve a READ that was admitted before."""
        self._start_read(cookie, 0, offset, length)

    def start_large(self, large: LargeWrite) -> None:
        """The payload of a large WRITE is complete."""
        if large.grown:
            large.leave()
            request = large.bio.private
            assert isinstance(request, Request)
            large.bio.private = request._replace(charge=large.charge)
        self._start(large.bio)

    # ---- the fast path ----

    # hot: see the figures in the module head
    def serve(self, *, only_first: bool = False) -> None:
        """Serve the requests that were received, or the first one. Local variables are used, because reading one costs a third of reading an attribute."""
        source, output = self._input, self._output
        buffer, view = source.buffer, source.view
        position, end = source.begin, source.end
        arena, replies, out = output.arena, output.view, output.end
        submit, bio = self._submit, self._bio
        read_max, write_max, size, zero_min, structured, header = self._fast
        # Where in the arena to send, and where in the buffer the last request to serve may begin.
        flush_at, last = self._scope(only_first)
        look_at = last if last <= position + TURN_LOOK else position + TURN_LOOK
        while position <= last:
            # Other connections have their turn, too. A batch that is short is served without a look at the clock.
            if position > look_at and (look_at := self._look_at(position, last)) < 0:
                break
            if out >= flush_at:  # many replies are packed: send them first
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
                bio.op = OP_READ  # into the arena, behind the place of the header
                payload = replies[out + header : out + header + length]
            elif (
                command == CMD_WRITE
                and 0 < length <= write_max
                and stop + length <= end  # all of the payload was received
                and offset + length <= size
                and flags <= FUA
                and magic == REQUEST_MAGIC
            ):
                bio.op = OP_WRITE  # from the receive buffer
                payload = view[stop : stop + length]
                stop += length
            else:
                if (stop := self._take(position, out)) < 0:
                    break
                # It may have sent the arena, and may have taken long: look at the clock.
                position, out, look_at = stop, output.end, -1
                continue
            bio.offset, bio.length, bio.flags = offset, length, flags
            bio.payload, bio.borrowed, bio.status = payload, True, PENDING
            submit(bio)
            position = stop
            if bio.status:  # it failed, or has not ended: then a reply comes later
                bio = self._not_inline(bio, command, cookie, offset)
                if self._flow.is_paused:
                    break
            elif command == CMD_WRITE:
                _pack_simple(arena, out, SIMPLE_REPLY_MAGIC, 0, cookie)
                out += 16
            elif length >= zero_min or bio.payload is not payload:
                # The data may be zeroes (then a hole is sent), or lies elsewhere, because the bio was owned.
                how = cookie, offset, structured, zero_min
                out += pack_read(output, bio, payload, out, how)
            else:
                if structured:  # the data is in its place: only the header is missing
                    _pack_data(arena, out, _CHUNK, 1, 1, cookie, length + 8, offset)
                else:
                    _pack_simple(arena, out, SIMPLE_REPLY_MAGIC, 0, cookie)
                out += header + length
        output.packed_to(out)
        source.consume(position, moves=not only_first)

    def _scope(self, only_first: bool) -> tuple[int, int]:
        """Return where in the arena to send, and where in the buffer the last request to serve may begin."""
        begin, last = self._input.begin, self._input.end - _HEADER
        if only_first:
            # The compiled fast path has left room for its reply, and nothing may come between the two.
            return len(self._output.arena), min(begin, last)
        return self._flush_at(), last

    def _look_at(self, position: int, last: int) -> int:
        """Return up to where in the buffer to serve without another look at the clock.

        -1: nothing more is served in this turn of the loop.
        """
        if self._flow.may_serve_on():
            return min(last, position + TURN_LOOK)
        return -1

    def _flush_at(self) -> int:
        """Where in the arena to send: behind it there is room for one more reply."""
        output = self._output
        if output.is_blocked:
            return output.end_max
        return min(output.end + self._limits.flush_at, output.end_max)

    def _flush_early(self, out: int) -> tuple[int, int]:
        """Send what is packed, up to `out` in the arena, so that the client can begin to work on it.

        Returns where in the arena to send next (0: the connection is paused), and where the next reply goes.
        """
        output = self._output
        output.packed_to(out)
        if not output.is_blocked:
            self._host.flush()
        return (self._flush_at() if self._admit(0) else 0), output.end

    def _not_inline(self, bio: Bio, command: int, cookie: int, offset: int) -> Bio:
        """The bio failed, or has not ended yet: then it is counted. Return the next bio to use."""
        if bio.status > 0:
            self._reply_error(cookie, command, bio.flags, bio.status)
            return bio
        bio.private = Request(cookie, command, 0, offset, bio.length, None)
        self._flow.begin_request(bio.length)
        self._bio = Bio(OP_READ, 0, 0, None, 0, self._ended)
        # The receive buffer and the arena are used again: a device that keeps the payload must have copied it.
        if bio.borrowed:
            raise AssertionError(f"{self._device.name} kept a borrowed payload: {bio}")
        self._in_flight.add(bio)
        self._admit(0)
        return self._bio

    # ---- the slow path ----

    def _take(self, begin: int, out: int) -> int:
        """Take any request, which begins at `begin` in the buffer. Return where the next one begins.

        -1: nothing more can be served now. The request stays in the buffer.

        Args:
            out: up to where the arena is packed.
        """
        self._output.packed_to(out)
        buffer = self._input.buffer
        magic, flags, command, cookie, offset, length = _unpack(buffer, begin)
        self._flow.spend(length)
        if magic != REQUEST_MAGIC:
            raise Violation(f"bad request magic {magic:#x}")
        if command == CMD_DISC:
            self._host.disc()
            return -1
        if self._output.is_full:
            # Also before what is answered without I/O, because each answer takes memory.
            self._flow.pause(FULL)
            return -1
        if command == CMD_WRITE:
            return self._take_write(begin, flags, cookie, offset, length)
        refusal = self._refusal(command, flags, offset, length)
        if refusal is not None:
            self._reply_refusal(cookie, refusal)
        elif not length and command != CMD_FLUSH:
            self._reply_done(cookie, command)
        elif not self._admit(length if command == CMD_READ else 0):
            return -1
        elif command == CMD_READ:
            self._start_read(cookie, flags, offset, length)
        elif command == CMD_BLOCK_STATUS:
            self._flow.begin_request(0)
            self._tasks.start(self._block_status(flags, cookie, offset, length))
        else:
            request = Request(cookie, command, flags, offset, 0, None)
            self._start(self._make_bio(request, length))
        return begin + _HEADER

    def _refusal(
        self, command: int, flags: int, offset: int, length: int
    ) -> RequestError | None:
        if self._is_shutting_down:
            return RequestError(ESHUTDOWN, "server is shutting down")
        return self._transmission.refusal(command, flags, offset, length)

    def _take_write(
        self, begin: int, flags: int, cookie: int, offset: int, length: int
    ) -> int:
        """As `_take`, for a WRITE whose payload was not all received, or that is refused."""
        source = self._input
        payload_at = begin + _HEADER
        stop = payload_at + length
        rule = self._transmission.payload_rule(length)
        if rule == PAYLOAD_DISCONNECT:
            raise Violation(f"WRITE of {length} bytes")
        if rule == PAYLOAD_ACCEPT:
            refusal = self._refusal(CMD_WRITE, flags, offset, length)
        else:
            refusal = RequestError(EINVAL, f"WRITE of {length} bytes is too long")
        if refusal is not None:
            if stop <= source.end:
                self._reply_refusal(cookie, refusal)
                return stop
            # The payload has to be received and dropped first, or a request would be looked for inside it.
            reply = self._encode_error(cookie, refusal.errno, refusal.message)
            source.skip(stop - source.end, reply)
            return source.end
        if not length:
            self._reply_done(cookie, CMD_WRITE)
            return stop
        if length < self._limits.own_payload_min:
            return -1  # it is received into the receive buffer, and served there
        here = source.view[payload_at : min(stop, source.end)]
        step = self._limits.payload_step
        charge = max(len(here), min(length, step))
        if not self._admit(charge):
            return -1
        buffer = self._shared.pool.take_untouched(length)
        payload = memoryview(buffer)[:length]
        request = Request(cookie, CMD_WRITE, flags, offset, charge, buffer)
        bio = Bio(OP_WRITE, offset, length, payload, flags & FUA, self._ended, request)
        payload[: len(here)] = here
        self._flow.take(charge)
        if len(here) == length:
            self._start(bio)
            return stop
        source.expect(LargeWrite(bio, buffer, charge, len(here), self._flow, step))
        return source.end

    def _start_read(self, cookie: int, flags: int, offset: int, length: int) -> None:
        """Start a READ that has a buffer of its own."""
        pool, slice_max = self._shared.pool, self._limits.read_slice
        # A new bytearray is filled with zeroes at once: 64 MiB of them take 90 ms.
        take = pool.take if length <= slice_max else pool.take_untouched
        buffer = take(length)
        self._flow.take(len(buffer))
        request = Request(cookie, CMD_READ, flags, offset, len(buffer), buffer)
        payload = memoryview(buffer)[HEADER_ROOM : HEADER_ROOM + length]
        bio = Bio(OP_READ, offset, length, payload, 0, self._ended, request)
        if length <= slice_max:
            self._start(bio)
            return
        self._flow.begin_request(0)
        looks = length >= self._zero_min and not flags & CMD_FLAG_DF
        SlicedRead(bio, slice_max, self, self._shared.turns, looks=looks).go_on()

    def submit_slice(self, bio: Bio) -> None:
        self._in_flight.add(bio)
        self._submit(bio)

    def slice_ended(self, bio: Bio) -> int:
        self._in_flight.discard(bio)
        return bio.status or (errnos.ESHUTDOWN if self._host.is_closed else 0)

    def _give_back(self, request: Request) -> None:
        self._flow.give_back(request.charge, request.buffer)

    def _start(self, bio: Bio) -> None:
        self._flow.begin_request(0)
        self._in_flight.add(bio)
        self._submit(bio)
        output = self._output
        if output.nr_queued >= self._limits.flush_at and not output.is_blocked:
            self._host.flush()  # a large reply: the client can begin with it

    def _make_bio(self, request: Request, length: int) -> Bio:
        """Make a bio without payload; a FLUSH also tells what the device has lost meanwhile."""
        command, flags, offset = request.command, request.flags, request.offset
        if command != CMD_FLUSH:
            op, bio_flags = OPS[command], bio_flags_of(command, flags)
            return Bio(op, offset, length, None, bio_flags, self._ended, request)
        mark = self._observer.mark()

        def ended(bio: Bio) -> None:
            bio.status = self._observer.end(mark, bio.status)
            self._ended(bio)

        return Bio(OP_FLUSH, 0, 0, None, 0, ended, request)

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
        self._flow.end_request()
        if not self._host.is_closed:
            if status:
                self._reply_error(cookie, CMD_BLOCK_STATUS, flags, status)
            else:
                self._output.push(reply)
            self._host.flush_soon()
        else:
            self._host.maybe_release()

    def _ended(self, bio: Bio) -> None:
        """A bio has ended."""
        request = bio.private
        if request is None:
            return  # inside `submit`: `serve` goes on with it
        assert isinstance(request, Request)
        self._flow.end_request()
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

    # ---- replies ----

    def _reply_done(self, cookie: int, command: int) -> None:
        """Answer a request that returns nothing."""
        if command == CMD_READ and self._transmission.structured:
            self._output.push(none_chunk(cookie))
        else:
            self._output.push(simple_reply(0, cookie))

    def _reply_refusal(self, cookie: int, refusal: RequestError) -> None:
        log.debug("%s: %s", self._host.peer, refusal)
        self._output.push(self._encode_error(cookie, refusal.errno, refusal.message))

    def _reply_error(self, cookie: int, command: int, flags: int, errno: int) -> None:
        error = wire_errno(errno, command, flags)
        self._output.push(self._encode_error(cookie, error, os.strerror(errno)))

    def _encode_error(self, cookie: int, error: int, message: str) -> bytes:
        return encode_error(cookie, error, message, structured=self._structured)

    def _reply_read(self, bio: Bio, request: Request) -> None:
        """Answer a READ from its own buffer."""
        cookie, _, flags, offset, charge, buffer, zeroes = request
        if zeroes:
            self._output.push(offset_hole(cookie, offset, bio.length, done=True))
            self._give_back(request)
            return
        looks = zeroes is None and not flags & CMD_FLAG_DF
        zero_min = self._zero_min if looks else 1 << 62
        how = cookie, offset, self._structured, zero_min
        if push_read(self._output, bio, how, (charge, buffer)):
            self._give_back(request)


def _not_a_request(_: Bio) -> None:
    """The connection is closed, and nothing uses this bio any more."""
