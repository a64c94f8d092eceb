# SPDX-License-Identifier: Apache-2.0
"""One client: its socket, its handshake, when it is read from, and how it ends.

Theory of operation. States:

    state         reads                       ends by
    HANDSHAKE     options                     GO: TRANSMISSION; ABORT, error, time: CLOSED
    TRANSMISSION  requests, unless paused     DISC, EOF: DRAINING; garbage, lost peer: CLOSED
    DRAINING      nothing, or to drop it      the last bio has ended and its reply has left
    CLOSED        -                           the last bio has ended: socket closed, device released

The socket is non-blocking and read with `recv_into` when the loop says that it is readable:
no transport stands between, so every buffer, bound and wake-up is ours to decide. What is
done with the bytes stands in `requests.py`, how replies leave in `output.py`.

Pausing. A connection that met a bound (replies unsent, its own in-flight, the shared budget)
stops reading; requests that it has received lie in the buffer. Whatever shrinks what was
full calls `maybe_resume`.

Polling. At depth 1 a request costs two wake-ups, and they cost more than the request. So
after an answer the connection looks at its socket for `poll_us` before it goes back to the
loop: only if it is alone, has sent one request at a time POLL_STREAK times in a row (at
greater depths polling would only make the batches smaller), nothing is in flight, and polling
has been paying off: each miss doubles the number of wake-ups that go unpolled (to
POLL_SKIP_MAX), one hit ends that.
It yields the processor at every look, takes it for a miss when that gave the processor
away, and the loop gets its turn after BATCHES_MAX batches.

Errors. uvloop calls a reader once after an error at the socket, and then never again, neither for bytes
that lie there nor for the error. Sending fails when the peer is gone, too. So each call of a reader either
sends something, or leaves something that will be sent (a request in flight, a writer that is
watched), or receives until there is nothing, the error, or the end. After BATCHES_MAX receives
the loop gets a turn.

Ends. DISC and EOF let everything in flight finish and its replies leave. A peer that is gone
costs nothing but its own connection: bios still in flight are dropped when they end, and
only then is the device released. While writes are among them the socket is not closed either, whatever
ended the connection: a client takes EOF for the end of its writes, connects again, and writes what
none of them may overtake. How the old writes are kept in front of the new ones: `gate.py`.

Shutdown. What was received before is carried out, what comes after is answered with
ESHUTDOWN, and when nothing is in flight our half of the connection is closed.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from typing import Final

from nbdtarget.bio import Bio
from nbdtarget.common.clock import Timer, perf_counter_ns
from nbdtarget.devices.base import Device
from nbdtarget.server.buffers import Buffer
from nbdtarget.server.export import DirectoryExports
from nbdtarget.server.gate import Gate
from nbdtarget.server.output import Output, is_gone
from nbdtarget.server.peer import HUNG_UP
from nbdtarget.server.requests import Requests, Violation
from nbdtarget.server.shared import Shared
from nbdtarget_protocol.consts import REQUEST
from nbdtarget_protocol.handshake import Negotiated, ServerHandshake

__all__ = ["Connection"]

log = logging.getLogger(__name__)

HANDSHAKE: Final = 0
TRANSMISSION: Final = 1
DRAINING: Final = 2
CLOSED: Final = 3

BATCHES_MAX: Final = 16  # read and served in one turn of the loop
POLL_STREAK: Final = (
    16  # single requests in a row, of this connection alone, before it polls
)
POLL_SKIP_MAX: Final = 64
POLL_GAP_NS: Final = 20_000  # between two looks: others want the processor
HANDSHAKE_READ: Final = 4 << 10  # few options, for each answer may be long
SETTLE_RECEIVES_MAX: Final = 4096  # of what a client that has gone left in its socket


_sched_yield: Final = os.sched_yield


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
        self.progress_ns = self._began_ns = shared.clock.now_ns()
        self._nr_options = 0  # of the handshake, at the last look
        self._shared = shared
        self._limits = limits
        self._sock = sock
        self._fd = sock.fileno()
        self._output = Output(sock, limits, self._reply_left)
        self._handshake = ServerHandshake(
            DirectoryExports(shared.directory, payload_max=limits.payload_max),
            output_max=limits.handshake_output_max,
        )
        self._requests: Requests | None = None  # from TRANSMISSION on
        self._device: Device | None = None
        self._timer: Timer | None = None
        self._is_shutting_down = False
        self._is_reading = False
        self._is_writing = False
        self._is_resuming = False
        self._is_flushing = False  # a flush is scheduled
        self._is_finishing = False  # the end of a shutdown is scheduled
        self._poll_skip = 0
        self._poll_penalty = 0

    @property
    def is_closed(self) -> bool:
        return self.state == CLOSED

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
            assert self._requests is not None
            self._requests.refuse()
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
        self._output.drop()
        if self._requests is not None:
            self._gate().leave(self)
            self._requests.drop()
        self.maybe_release()

    def is_stalled(self, now_ns: int) -> bool:
        """Whether the client holds memory and has not moved for `stall_timeout_s`."""
        requests = self._requests
        holds = self._output.is_blocked or (
            requests is not None and requests.is_receiving_large
        )
        return holds and now_ns - self.progress_ns > self._limits.stall_timeout_s * 1e9

    def maybe_release(self) -> None:
        """Release everything, unless bios are in flight: the last one calls again."""
        if self._requests is not None and self._requests.nr_requests:
            if any(self.writes_in_flight()):
                # The client takes the end of the connection for the end of its writes.
                with contextlib.suppress(OSError):  # it has gone
                    self._sock.shutdown(socket.SHUT_RD)
            else:
                self._sock.close()
            return
        self._sock.close()
        if self._requests is not None:
            self._requests.release()
        device, self._device = self._device, None
        if device is not None:
            self._shared.directory.release(device)
            self._shared.gates.forget_idle(device)
        self._shared.closed(self)

    def settle(self) -> None:
        """If the client has gone, take what it has sent before, and notice that it has gone.

        What cannot be taken now, because a bound is met, never is: nobody waits for it.
        """
        if not self._hang_up_events():
            return
        for _ in range(SETTLE_RECEIVES_MAX):
            if self.state != TRANSMISSION or self._is_paused:
                break
            self._guard(self._receive_transmission)
        if self.state == TRANSMISSION:
            log.info("%s: has gone with requests unread: dropped", self.peer)
            self.abort()

    @property
    def _is_paused(self) -> bool:
        return self._requests is not None and self._requests.is_paused

    def _hang_up_events(self) -> int:
        return self._shared.hang_up_events(self._sock)

    def _gate(self) -> Gate:
        assert self._device is not None
        return self._shared.gates.of(self._device)

    def _handshake_timed_out(self) -> None:
        """Time is up, unless options came since the last look, and not for too long in all."""
        limits, clock = self._limits, self._shared.clock
        nr_options, before = self._handshake.nr_options, self._nr_options
        total_s = (clock.now_ns() - self._began_ns) / 1e9
        if nr_options > before and total_s < limits.handshake_total_s:
            self._nr_options = nr_options
            self._timer = clock.call_later(
                limits.handshake_timeout_s, self._handshake_timed_out
            )
            return
        log.info("%s: no handshake in time", self.peer)
        self.abort()

    def _linger(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._shared.clock.call_later(self._limits.linger_s, self.abort)

    def disc(self) -> None:
        """Read nothing more; close when everything in flight has been answered."""
        self.state = DRAINING
        self._stop_reading()
        if self._requests is not None:
            self._gate().leave(self)
        if not self._is_shutting_down:
            self.moved()
            self._drain_timed_out()

    def _drain_timed_out(self) -> None:
        """Close if the client does not take its replies; if nothing was due to it, look again later."""
        waited_ns = self._shared.clock.now_ns() - self.progress_ns
        left_s = self._limits.stall_timeout_s - waited_ns / 1e9
        if left_s <= 0 and self._output.is_blocked:
            log.info("%s: has left and does not take its replies", self.peer)
            self.abort()
            return
        if self._timer is not None:
            self._timer.cancel()
        left_s = left_s if left_s > 0 else self._limits.stall_timeout_s
        self._timer = self._shared.clock.call_later(left_s, self._drain_timed_out)

    def _maybe_finish(self) -> None:
        """Close, if that is all that is left to do."""
        requests = self._requests
        if not self._output.is_empty or (requests is not None and requests.nr_requests):
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
        requests = self._requests
        if self.state != TRANSMISSION or requests is None:
            return
        if requests.is_paused or requests.nr_requests:
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
        except Violation as error:
            log.info("%s: %s: disconnected", self.peer, error)
            self.abort()
        except BlockingIOError:
            pass  # woken for nothing: the loop will call again
        except OSError as error:
            level = logging.DEBUG if is_gone(error) else logging.INFO
            log.log(level, "%s: %s", self.peer, error)
            self.abort()
        except Exception:
            log.exception("%s: connection failed", self.peer)
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
        self.moved()
        self._guard(self.flush)

    def flush(self) -> None:
        """Send what can be sent; then go on with what waited for that."""
        all_left = self._output.flush()
        if not all_left and not self._is_writing:
            self.moved()
            self._shared.loop.add_writer(self._fd, self._writable)
            self._is_writing = True
        elif all_left:
            if self._is_writing:
                self._shared.loop.remove_writer(self._fd)
                self._is_writing = False
            if self.state == DRAINING or self._is_shutting_down:
                self._maybe_finish()
            elif self.state == HANDSHAKE:
                self._start_reading()
        if self._requests is not None and self._requests.is_paused:
            self.maybe_resume()

    def route(self, submit: Callable[[Bio], None]) -> None:
        assert self._requests is not None
        self._requests.route(submit)

    def writes_in_flight(self) -> Iterator[tuple[Bio, int, int]]:
        assert self._requests is not None
        return self._requests.writes_in_flight()

    def flush_soon(self) -> None:
        """Flush once in this turn of the loop, however many bios end in it."""
        if not self._is_flushing:
            self._is_flushing = True
            self._shared.loop.call_soon(self._flush_scheduled)

    def _flush_scheduled(self) -> None:
        self._is_flushing = False
        if self.state != CLOSED:
            self._guard(self.flush)

    def _reply_left(self, charge: int, buffer: Buffer | None) -> None:
        """A large reply has left, or never will."""
        assert self._requests is not None
        self._requests.reply_left(charge, buffer)

    def _receive_nothing(self) -> None:
        for _ in range(BATCHES_MAX):
            if not self._sock.recv(HANDSHAKE_READ):
                self.abort()
                return
        self._shared.loop.call_soon(self._read_on)

    def _receive_handshake(self) -> None:
        for _ in range(BATCHES_MAX):
            data = self._sock.recv(HANDSHAKE_READ)
            if not data:
                self.abort()
                return
            self._handshake.receive_data(data)
            self._answer_handshake()
            if self.state != HANDSHAKE:
                return
            if self._output.is_blocked:
                self._stop_reading()  # until it has taken its answers
                return
        self._shared.loop.call_soon(self._read_on)

    def _answer_handshake(self) -> None:
        handshake = self._handshake
        for data in handshake.data_to_send():
            self._output.push(data)
        if handshake.closed:
            if handshake.error is not None:
                log.info("%s: %s", self.peer, handshake.error)
            self.disc()
        elif handshake.negotiated is not None:
            self._begin_transmission(handshake.negotiated)
        self.flush()
        if self.state == DRAINING:
            self._maybe_finish()

    def _begin_transmission(self, negotiated: Negotiated) -> None:
        try:
            device = self._shared.directory.acquire(negotiated.export.name)
        except KeyError:
            log.info("%s: %s is gone", self.peer, negotiated.export.name)
            self.disc()
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.state = TRANSMISSION
        self._output.open_arena()
        self._device = device
        self._requests = Requests(
            self, self._sock, self._shared, self._output, device, negotiated
        )
        if self._is_shutting_down:
            self._requests.refuse()
        self._gate().join(self)
        self._requests.put(self._handshake.trailing_data())
        log.info("%s: attached %s", self.peer, negotiated.export.name)
        self._requests.serve()

    # hot: one system call and 0.6 us a batch, besides `Requests.serve`
    def _receive_transmission(self) -> None:
        """Read and serve batch after batch, as long as there is one, or soon will be."""
        requests = self._requests
        assert requests is not None
        budget = self._shared.budget
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
        began_ns = looked_ns = 0
        batches_left = BATCHES_MAX
        while True:
            try:
                received = requests.receive()
            except BlockingIOError:
                if not poll_ns or budget.nr_requests or self._output.is_blocked:
                    return
                now_ns = perf_counter_ns()
                if not began_ns:
                    began_ns = now_ns
                elif now_ns - began_ns > poll_ns or now_ns - looked_ns > POLL_GAP_NS:
                    self._poll_missed()
                    return
                _sched_yield()
                looked_ns = now_ns
                continue
            if began_ns:
                began_ns = 0
                self._poll_penalty = 0
            if received:
                if received > REQUEST.size and requests.is_batch:
                    budget.hot_streak = poll_ns = 0
                requests.serve()
            else:
                self.disc()
            output = self._output
            goes_on = bool(poll_ns)
            if not output.is_empty and not output.is_blocked:
                self.flush()
            elif self.state == DRAINING:
                self._maybe_finish()
            elif output.is_empty and not requests.nr_requests:
                goes_on = True  # see "Errors" in the module head
            if not goes_on or not self._is_reading:
                return
            batches_left -= 1
            if not batches_left:
                self._shared.loop.call_soon(self._read_on)
                return

    def _read_on(self) -> None:
        """The loop had its turn: go on reading."""
        if self._is_reading:
            self._readable()

    def _poll_missed(self) -> None:
        self._poll_penalty = min(2 * self._poll_penalty + 1, POLL_SKIP_MAX)
        self._poll_skip = self._poll_penalty

    # ---- pausing ----

    def pause(self) -> None:
        self._stop_reading()

    def maybe_resume(self) -> None:
        """Something was given back: look, in a turn of its own, whether it is enough."""
        requests = self._requests
        if (
            requests is not None
            and requests.is_paused
            and not requests.is_in_line
            and not self._is_resuming
        ):
            self._is_resuming = True
            self._shared.loop.call_soon(self._resume_woken)

    def _resume_woken(self) -> None:
        self._is_resuming = False
        requests = self._requests
        if requests is not None and requests.is_paused and not requests.is_yielding:
            self.resume()

    def resume(self) -> None:
        """Serve what was received, if no bound is met any more."""
        requests = self._requests
        assert requests is not None
        was_yielding, requests.is_yielding = requests.is_yielding, False
        if self.state != TRANSMISSION or requests.is_full(0):
            return
        if not was_yielding and self._hang_up_events() & HUNG_UP:
            self.abort()  # and what it has left unread is dropped: nobody waits for it
            return
        requests.is_paused = False
        self._start_reading()
        self._guard(self._serve_received)

    def _serve_received(self) -> None:
        assert self._requests is not None
        self._requests.serve()
        self.flush()

    def moved(self) -> None:
        self.progress_ns = self._shared.clock.now_ns()
