# SPDX-License-Identifier: Apache-2.0
"""`Requests`: takes the requests of one connection from the receive buffer, and answers or begins each of them.

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
share of the turn, and whether the connection is paused. `InFlight` has what has begun and not ended.

Bounds. `_admit` is called before each slow request, and after each bio that stays in flight; if a bound is met,
it pauses the connection, and the requests that were received stay in the buffer. Before a request
that is answered without I/O only the output is looked at. The work in one turn of the loop is bounded, too:
`Flow.may_serve_on` is asked after each slow request, and for each TURN_LOOK received bytes of fast ones.
"""

import logging
from collections.abc import Callable
from typing import Final

from nbdtarget.bio import FUA, OP_READ, OP_WRITE, PENDING, Bio
from nbdtarget.common.clock import perf_counter_ns
from nbdtarget.devices.base import Device
from nbdtarget.server.flow import FULL, Flow
from nbdtarget.server.in_flight import InFlight
from nbdtarget.server.input import Input
from nbdtarget.server.large_write import LargeWrite
from nbdtarget.server.output import Output
from nbdtarget.server.replies import Answers
from nbdtarget.server.request import Violation
from nbdtarget.server.shared import Host, Shared
from nbdtarget.server.shared_flush import SharedFlushes
from nbdtarget.server.traffic import new_request
from nbdtarget_protocol.consts import (
    CMD_BLOCK_STATUS,
    CMD_DISC,
    CMD_FLAG_FUA,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLUSH,
    CMD_NAMES,
    CMD_READ,
    CMD_WRITE,
    EINVAL,
    ESHUTDOWN,
    OFFSET_DATA,
    REPLY_FLAG_DONE,
    REPLY_TYPE_OFFSET_DATA,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
)
from nbdtarget_protocol.errors import RequestError
from nbdtarget_protocol.extended import decode_status_payload
from nbdtarget_protocol.handshake import CONTEXTS_MAX, Negotiated
from nbdtarget_protocol.replies import replies_of
from nbdtarget_protocol.transmission import (
    PAYLOAD_ACCEPT,
    PAYLOAD_DISCONNECT,
    ServerTransmission,
)

__all__ = ["Requests", "Violation"]

log = logging.getLogger(__name__)

# Longer is no payload of a BLOCK_STATUS: there are not so many metadata contexts.
STATUS_PAYLOAD_MAX: Final = 8 + 4 * CONTEXTS_MAX
TURN_LOOK: Final = 32 << 10  # received bytes between two looks at the clock

# For the hot loop: a module global costs less than an attribute of one.
_pack_simple: Final = SIMPLE_REPLY.pack_into
_pack_data: Final = OFFSET_DATA.pack_into
_CHUNK: Final = STRUCTURED_REPLY_MAGIC

# The hot loop counts requests and their bytes in one number: as many requests as this goes into it, and the rest are bytes.
ONE_REQUEST: Final = 1 << 40

# The hot loop uses these values as plain numbers.
assert CMD_FLAG_FUA == FUA == 1
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
        traffic: counts the requests.
        in_flight: those that have begun and not ended.
        structured, extended, can_write, can_flush, size: what was negotiated.
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
        self._transmission = transmission
        self._replies = replies = replies_of(negotiated)
        self.traffic = shared.accounts.open(device)
        bounds = limits, self.traffic, transmission.chunk_max
        self._answers = Answers(host, output, flow, replies, *bounds)
        self.in_flight = InFlight(
            host, shared, output, flow, device, replies, self._answers, self.traffic
        )
        # The bio of the fast path.
        self._bio = Bio(OP_READ, 0, 0, None, 0, self.in_flight.ended)
        # The limits of the fast path: up to which length a READ and a WRITE, -1: none; the size of the export; from
        # which length a READ is looked through for zeroes; how replies look (1: structured, 2: extended); and how many
        # bytes stand in front of the data of a READ.
        writable = bool(transmission.flags_allowed.get(CMD_WRITE, 0) & CMD_FLAG_FUA)
        self._fast = (
            limits.arena_read_max,
            min(limits.receive_buffer, limits.payload_max) if writable else -1,
            transmission.size,
            self._answers.zero_min,
            replies.structured + replies.extended,
            replies.read_header,
        )
        # How requests look: the layout and length of a header, the magic, and the flags that no plain WRITE has.
        self._header = replies.request.size
        self._unpack = replies.request.unpack_from
        self._wire = (
            self._unpack,
            self._header,
            replies.request_magic,
            ~(FUA | CMD_FLAG_PAYLOAD_LEN) if replies.extended else ~FUA,
        )
        self._begun_ns = 0
        # For the compiled fast path.
        self.structured, self.extended = replies.structured, replies.extended
        self.can_write, self.size = writable, transmission.size
        self.can_flush = writable and CMD_FLUSH in transmission.flags_allowed
        counted = self.in_flight.observer, self._answers, self.traffic
        self._shared_flushes = SharedFlushes(host, flow, device, *counted)
        self.is_plain = True

    def refuse(self) -> None:
        """From now on answer every request with ESHUTDOWN."""
        self.in_flight.is_shutting_down = True
        self.is_plain = False
        self._fast = (-1, -1, *self._fast[2:])

    def route(self, submit: Callable[[Bio], None]) -> None:
        """Submit bios this way from now on."""
        self.in_flight.submit = submit
        self.is_plain = (
            submit == self._device.submit and not self.in_flight.is_shutting_down
        )

    def drop(self) -> None:
        """The connection is closed: forget the WRITE that was being received, and what the gate holds."""
        self.in_flight.drop()
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
        if self._output.is_full:
            flow.pause(FULL, "send_buffer_max")
            return False
        why = flow.bound_met(nr_bytes, large, nr_written)
        if why:
            flow.pause(why, flow.bound)
        return not why

    def may_go_on(self) -> bool:
        """Whether the connection, which is paused, may go on. If not, it waits for what is in its way now."""
        return self._admit(0)

    def look_at_bounds(self) -> None:
        """More has begun to be in flight: pause the connection if a bound is met now."""
        self._admit(0)

    def flush_for(self, writes: list[int], flushes: list[int]) -> None:
        self._shared_flushes.submit(writes, flushes)
        self._admit(0)

    def read_again(self, cookie: int, offset: int, length: int) -> None:
        """Serve a READ that was admitted before."""
        self.in_flight.start_read(cookie, 0, offset, length)

    # ---- the fast path ----

    # hot: see the figures in the module head
    def serve(self, *, only_first: bool = False) -> None:
        """Serve the requests that were received, or the first one. Local variables are used, because reading one costs a third of reading an attribute."""
        self._begun_ns, read, written = perf_counter_ns(), 0, 0
        source, output, bio = self._input, self._output, self._bio
        submit = self.in_flight.submit
        buffer, view, position = source.buffer, source.view, source.begin
        arena, replies, out, end = output.arena, output.view, output.end, source.end
        read_max, write_max, size, zero_min, style, header = self._fast
        unpack, request_size, request_magic, not_plain = self._wire
        # Where in the arena to send, and where in the buffer the last request to serve may begin.
        flush_at, last, look_at = self._scope(only_first)
        while position <= last:
            # Other connections have their turn, too. A batch that is short is served without a look at the clock.
            if position > look_at and (look_at := self._look_at(position, last)) < 0:
                break
            if out >= flush_at:  # many replies are packed: send them first
                flush_at, out = self._flush_early(out)
                if not flush_at:
                    break
            magic, flags, command, cookie, offset, length = unpack(buffer, position)
            stop = position + request_size
            if (
                command == CMD_READ
                and 0 < length <= read_max
                and offset + length <= size
                and not flags
                and magic == request_magic
            ):
                bio.op = OP_READ  # into the arena, behind the place of the header
                payload = replies[out + header : out + header + length]
            elif (
                command == CMD_WRITE
                and 0 < length <= write_max
                and stop + length <= end  # all of the payload was received
                and offset + length <= size
                and not flags & not_plain
                and magic == request_magic
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
            bio.offset, bio.length, bio.flags = offset, length, flags & 1
            bio.payload, bio.borrowed, bio.status = payload, True, PENDING
            submit(bio)
            position = stop
            if bio.status:  # it failed, or has not ended: then a reply comes later
                bio = self._not_inline(bio, command, cookie, offset)
                if self._flow.is_paused:
                    break
            elif command == CMD_WRITE and style < 2:
                _pack_simple(arena, out, SIMPLE_REPLY_MAGIC, 0, cookie)
                out, written = out + 16, written + ONE_REQUEST + length
            elif style == 2 or length >= zero_min or bio.payload is not payload:
                # The data may be zeroes (then a hole is sent), or lies elsewhere, because the bio was owned.
                out += self._pack_other(bio, payload, out, cookie, offset)
            else:
                if style:  # the data is in its place: only the header is missing
                    _pack_data(arena, out, _CHUNK, 1, 1, cookie, length + 8, offset)
                else:
                    _pack_simple(arena, out, SIMPLE_REPLY_MAGIC, 0, cookie)
                out, read = out + header + length, read + ONE_REQUEST + length
        self._note(read, written)
        output.packed_to(out)
        source.consume(position, moves=not only_first)

    def _note(self, read: int, written: int) -> None:
        """Count READs and WRITEs that have ended inline: each is ONE_REQUEST and its length."""
        if read or written:
            taken_ns = perf_counter_ns() - self._begun_ns
            for command, both in ((CMD_READ, read), (CMD_WRITE, written)):
                if both:
                    self.traffic.note(command, *divmod(both, ONE_REQUEST), taken_ns)

    def _pack_other(
        self, bio: Bio, payload: memoryview, out: int, cookie: int, offset: int
    ) -> int:
        """Pack the reply to a READ or WRITE that ended inline, where it takes more than two lines; return its length."""
        counted = ONE_REQUEST + bio.length
        self._note(*((0, counted) if bio.op == OP_WRITE else (counted, 0)))
        return self._answers.pack(bio, payload, out, cookie, offset)

    def _scope(self, only_first: bool) -> tuple[int, int, int]:
        """Return where in the arena to send; and where in the buffer the last request to serve may begin, and where to look at the clock."""
        begin, last = self._input.begin, self._input.end - self._header
        if only_first:
            # The compiled fast path has left room for its reply, and nothing may come between the two.
            last = min(begin, last)
            return len(self._output.arena), last, last
        return self._flush_at(), last, min(last, begin + TURN_LOOK)

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
            self.traffic.note(command, 1, 0, perf_counter_ns() - self._begun_ns)
            self._answers.fail((cookie, offset), command, bio.flags, bio.status)
            return bio
        self._bio = Bio(OP_READ, 0, 0, None, 0, self.in_flight.ended)
        self.in_flight.adopt(bio, command, cookie, offset)
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
        request = self._unpack(self._input.buffer, begin)
        magic, flags, command, cookie, offset, length = request
        self._flow.spend(length)
        if magic != self._replies.request_magic:
            raise Violation(f"bad request magic {magic:#x}")
        if command == CMD_DISC:
            self._host.disc()
            return -1
        if self._output.is_full:
            # Also before what is answered without I/O, because each answer takes memory.
            self._flow.pause(FULL, "send_buffer_max")
            return -1
        if self._has_payload(command, flags):
            return self._take_payload(begin, command, flags, cookie, offset, length)
        at = cookie, offset
        refusal = self._refusal(command, flags, offset, length)
        if refusal is not None:
            if command == CMD_READ and length > self._limits.payload_max:
                self._flow.met("payload_max")
            self._answers.refuse(at, command, refusal)
        elif not length and command != CMD_FLUSH:
            self._answers.done(at, command)
        elif not self._admit(length if command == CMD_READ else 0):
            return -1
        elif command == CMD_READ:
            self.in_flight.start_read(cookie, flags, offset, length)
        elif command == CMD_BLOCK_STATUS:
            contexts = self._transmission.contexts
            self.in_flight.start_status(flags, cookie, offset, length, contexts)
        else:
            self.in_flight.start_range(
                new_request(cookie, command, flags, offset, 0, None), length
            )
        return begin + self._header

    def _has_payload(self, command: int, flags: int) -> bool:
        # PAYLOAD_LEN is left out of WRITEs by QEMU: see `nbdtarget_protocol.transmission`.
        return command == CMD_WRITE or bool(
            self._replies.extended and flags & CMD_FLAG_PAYLOAD_LEN
        )

    def _refusal(
        self, command: int, flags: int, offset: int, length: int
    ) -> RequestError | None:
        if self.in_flight.is_shutting_down:
            return RequestError(ESHUTDOWN, "server is shutting down")
        return self._transmission.refusal(command, flags, offset, length)

    def _take_payload(
        self,
        begin: int,
        command: int,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
    ) -> int:
        """As `_take`, for a request that carries `length` bytes. Mostly a WRITE, which is refused, or has not all come."""
        payload_at = begin + self._header
        stop = payload_at + length
        rule = self._transmission.payload_rule(length)
        if rule != PAYLOAD_ACCEPT:
            self._flow.met("payload_max")
        if rule == PAYLOAD_DISCONNECT:
            raise Violation(f"{CMD_NAMES.get(command, command)} of {length} bytes")
        if rule != PAYLOAD_ACCEPT:
            refusal: RequestError | None = RequestError(
                EINVAL, f"a payload of {length} bytes is too long"
            )
        elif command == CMD_WRITE:
            refusal = self._refusal(command, flags, offset, length)
        elif command == CMD_BLOCK_STATUS and length <= STATUS_PAYLOAD_MAX:
            if stop > self._input.end:
                return -1  # it is received into the receive buffer
            return self._take_status(payload_at, stop, flags, cookie, offset)
        else:
            # Its flags are not allowed, or its payload is too long.
            refusal = self._refusal(command, flags, offset, 1)
            reason = f"{CMD_NAMES.get(command, command)} with a payload"
            refusal = refusal or RequestError(EINVAL, reason)
        if refusal is not None:
            return self._refuse_payload(stop, (cookie, offset), command, refusal)
        if not length:
            self._answers.done((cookie, offset), CMD_WRITE)
            return stop
        if length < self._limits.own_payload_min:
            return -1  # it is received into the receive buffer, and served there
        return self._take_large_write(payload_at, flags, cookie, offset, length)

    def _refuse_payload(
        self, stop: int, at: tuple[int, int], command: int, refusal: RequestError
    ) -> int:
        """Refuse a request whose payload ends at `stop` in the buffer, or would if it was that large."""
        source = self._input
        if stop <= source.end:
            self._answers.refuse(at, command, refusal)
            return stop
        self.traffic.note_failed(command)
        # The payload has to be received and dropped first, or a request would be looked for inside it.
        reply = self._replies.error(*at, refusal.errno, refusal.message)
        source.skip(stop - source.end, reply)
        return source.end

    def _take_status(
        self, payload_at: int, stop: int, flags: int, cookie: int, offset: int
    ) -> int:
        """Take a BLOCK_STATUS with a payload, which has been received."""
        transmission = self._transmission
        payload = self._input.view[payload_at:stop]
        length, contexts = 1, transmission.contexts
        # First whether it may have a payload at all, and then what is in it.
        refusal = self._refusal(CMD_BLOCK_STATUS, flags, 0, length)
        try:
            if refusal is None:
                length, contexts = decode_status_payload(payload, contexts)
                refusal = self._refusal(CMD_BLOCK_STATUS, flags, offset, length)
        except RequestError as error:
            refusal = error
        if refusal is not None:
            self._answers.refuse((cookie, offset), CMD_BLOCK_STATUS, refusal)
        elif self._admit(0):
            self.in_flight.start_status(flags, cookie, offset, length, contexts)
        else:
            return -1
        return stop

    def _take_large_write(
        self, payload_at: int, flags: int, cookie: int, offset: int, length: int
    ) -> int:
        """Take a WRITE whose payload was not all received, and is too long for the receive buffer."""
        source = self._input
        stop = payload_at + length
        here = source.view[payload_at : min(stop, source.end)]
        step = self._limits.payload_step
        charge = max(len(here), min(length, step))
        if not self._admit(charge):
            return -1
        buffer = self._shared.pool.take_untouched(length)
        payload = memoryview(buffer)[:length]
        request = new_request(cookie, CMD_WRITE, flags, offset, charge, buffer)
        ended = self.in_flight.ended
        bio = Bio(OP_WRITE, offset, length, payload, flags & FUA, ended, request)
        payload[: len(here)] = here
        self._flow.take(charge)
        if len(here) == length:
            self.in_flight.start(bio)
            return stop
        source.expect(LargeWrite(bio, buffer, charge, len(here), self._flow, step))
        return source.end


def _not_a_request(_: Bio) -> None:
    """The connection is closed, and nothing uses this bio any more."""
