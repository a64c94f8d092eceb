# SPDX-License-Identifier: Apache-2.0
"""`Connection`: one client, from its first byte to the end of its last request.

Theory of operation. States:

    state         receives                    ends by
    HANDSHAKE     options, a TLS handshake    GO: TRANSMISSION; ABORT, error, time: CLOSED; TLS refused: DRAINING
    TRANSMISSION  requests, unless paused     DISC, EOF: DRAINING; garbage, lost peer: CLOSED
    DRAINING      nothing, or to drop it      the last bio has ended and its reply has left
    CLOSED        -                           the last bio has ended: socket closed, device released

The socket is non-blocking and read with `recv_into` when the loop says that it is readable. No
transport stands between, so every buffer, bound and wake-up is ours to decide. This class has the
socket and the state; each other thing has a class of its own:

    Input       what was received and is not yet served
    Requests    the requests, from the received bytes to the device and to their replies
    InFlight    those that have begun, until they are answered
    Output      replies on their way to the socket
    Reception   receiving and serving, in transmission: once in each turn of the loop
    Flow        what is in flight, and whether the connection is paused
    Patience    how long it waits for the client
    Negotiation the handshake, and who the client is
    Watch       which events of the socket the loop is asked for

Ends. DISC and EOF let everything in flight finish and its replies leave. A peer that is gone costs nothing but its own connection:
bios still in flight are dropped when they end, and only then is the device released. While writes are among them the socket is
not closed either, however the connection ended: a client takes EOF for the end of its writes, connects again, and writes the same
place, and no old write may be carried out after that. How the old writes are kept in front of the new ones: `gate.py`.

Hand-over. A connection can go on in another process (`nbdtarget.server.moving`). First it is frozen: no request is begun any
more, and those that have begun end, or stand still between two slices. Only the payload of a large WRITE that has begun is still received. Then it is at rest:
what is left is what was received and not served, and replies that the client has not taken.

Shutdown. Requests that were received before are carried out, and later ones are answered with
ESHUTDOWN. When nothing is in flight our half of the connection is closed.

Memory. When a connection has released its device, no circle of references is left: what it held is
freed at once, without the garbage collector. So it lets go of everything that refers to it (`_release`).
"""

import contextlib
import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final

from nbdtarget.bio import Bio
from nbdtarget.common.access import Identity
from nbdtarget.common.tls_socket import TlsError, TlsSocket
from nbdtarget.common.turns import Soon
from nbdtarget.devices.base import Device
from nbdtarget.server.flow import NEVER, Flow
from nbdtarget.server.gate import Gate
from nbdtarget.server.input import Input
from nbdtarget.server.moving import BegunRange, ConnectionState
from nbdtarget.server.negotiation import Negotiation
from nbdtarget.server.output import Output, is_gone
from nbdtarget.server.patience import Patience
from nbdtarget.server.peer import HUNG_UP
from nbdtarget.server.reception import BATCHES_MAX, Reception
from nbdtarget.server.requests import Requests, Violation
from nbdtarget.server.shared import Shared
from nbdtarget.server.stalls import is_in_the_middle, may_notice
from nbdtarget.server.states import CLOSED, DRAINING, HANDSHAKE, TRANSMISSION
from nbdtarget.server.tls import NO_TLS, ListenerTls
from nbdtarget.server.traffic import Client
from nbdtarget.server.watch import Watch
from nbdtarget_protocol.handshake import Negotiated
from nbdtarget_protocol.replies import replies_of

__all__ = ["Connection"]

log = logging.getLogger(__name__)

HANDSHAKE_READ: Final = (
    4 << 10
)  # only a few options at a time, because each answer may be long
SETTLE_RECEIVES_MAX: Final = 4096  # from the socket of a client that has gone


class Connection:
    """One client; see the module head.

    Attributes:
        state: HANDSHAKE, ….
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        shared: Shared,
        tls: ListenerTls = NO_TLS,
        client: Identity | None = None,
    ) -> None:
        limits = shared.limits
        self.state = HANDSHAKE
        self.peer = peer
        self._shared = shared
        self._limits = limits
        self._sock: socket.socket | TlsSocket = sock
        self._tls: TlsSocket | None = None
        self._watch = Watch(shared.loop, sock.fileno())
        self._flow = Flow(
            self,
            limits,
            shared.budget,
            shared.pool,
            shared.clock,
            shared.turns,
            shared.starved,
        )
        self._output = Output(sock, limits, self._flow.give_back)
        self._negotiation = Negotiation(shared, self._output, peer, tls, client)
        # From TRANSMISSION until everything has been released.
        self._input: Input | None = None
        self._requests: Requests | None = None
        self._reception: Reception | None = None
        self._device: Device | None = None
        self._negotiated: Negotiated | None = None
        self._patience = Patience(
            self,
            limits,
            shared.clock,
            self._negotiation.handshake,
            self._flow,
            self._output,
        )
        self._is_shutting_down = False
        self.is_frozen = False
        # Whether it was receiving, and waiting to send, at `hold`; None: it is not held.
        self._held: tuple[bool, bool] | None = None
        self._flush_scheduled = Soon(self._flush_now)
        self._finish_scheduled = Soon(self._finish_now)

    @property
    def was_attached(self) -> bool:
        """Whether it has reached TRANSMISSION."""
        return self._negotiated is not None

    @property
    def is_closed(self) -> bool:
        return self.state == CLOSED

    # ---- life ----

    def start(self) -> None:
        """Greet the client."""
        self._patience.await_handshake()
        self._start_reading()
        self.guard(self._answer_handshake)

    def shutdown(self) -> None:
        """Finish requests in flight, refuse later ones, and close."""
        if self.state == CLOSED or self._is_shutting_down:
            return
        self._is_shutting_down = True
        if self.state == HANDSHAKE:
            self._negotiation.handshake.shutdown()
            self._patience.linger()
        elif self.state == TRANSMISSION:
            assert self._requests is not None
            self._python_has_run()
            self._requests.refuse()
            self.guard(self.maybe_finish)

    def abort(self) -> None:
        """Close now. Replies that have not left are dropped."""
        if self.state == CLOSED:
            return
        self.state = CLOSED
        self._watch.stop()
        self._patience.end()
        if self._reception is not None:
            self._reception.stop()
        self._output.drop()
        if self._requests is not None:
            self._gate().leave(self)
            self._requests.drop()
        self._flow.close()
        self.maybe_release()

    def freeze(self) -> None:
        """Begin no request any more. Requests that have begun end; see `is_at_rest`. A handshake goes on."""
        self.is_frozen = True
        if self._input is not None and self._input.is_plain:
            self._watch.stop_reading()

    def hold(self) -> None:
        """After `freeze`: neither go on with a handshake nor receive the rest of a payload, until `thaw`."""
        watch = self._watch
        self._held = watch.is_reading, watch.is_writing
        if self.state == HANDSHAKE:
            watch.stop()  # of sending, too: TLS receives when it may send
        elif self.state == TRANSMISSION:
            watch.stop_reading()

    def thaw(self) -> None:
        """Undo `freeze` and `hold`."""
        held, self._held = self._held, None
        self.is_frozen = False
        if held is not None and self.state == HANDSHAKE:
            was_reading, was_writing = held
            if was_writing:
                self._watch.write(self._writable)
            if was_reading:
                self._start_reading()
        if self._requests is not None:
            self._requests.in_flight.go_on()
        if self.state != TRANSMISSION:
            return
        if self._flow.is_paused:
            self.resume()
        else:
            self._start_reading()
            self.guard(self._receiving().serve_received)

    @property
    def may_stand_still(self) -> bool:
        is_served = self.state == TRANSMISSION and not self._is_shutting_down
        return self.is_frozen and is_served

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is under way, after `freeze`, and no payload is being received."""
        received = self._input
        return (
            self.state == TRANSMISSION
            and not self.is_busy
            and received is not None
            and received.is_plain
        )

    @property
    def is_busy(self) -> bool:
        """Whether something is under way. What stands still while the connection is frozen is not."""
        nr = self._flow.nr_requests
        if nr and self._requests is not None:
            nr -= self._requests.in_flight.nr_standing
        return nr > 0

    @property
    def asks(self) -> str:
        """Its name, and what it has in flight, for a person who asks why something waits."""
        if self._requests is None or self._device is None:
            return self.peer
        export, _ = self._shared.directory.listed(self._device)
        return f"{self.peer} ({self._requests.in_flight.kinds} of {export})"

    @property
    def payload_left(self) -> int:
        """The bytes that are to come of a payload that is being received."""
        return 0 if self._input is None else self._input.payload_left

    @property
    def client(self) -> Client:
        """Return the client, the device that it has attached, and its traffic."""
        traffic = None if self._requests is None else self._requests.traffic
        identity, nr = self._negotiation.identity, self._flow.nr_requests
        return Client(self.peer, identity, self._device, traffic, nr)

    @property
    def load(self) -> tuple[int, int, int]:
        """Return the requests and the bytes in flight, and the bytes of replies that wait for the client."""
        flow = self._flow
        return flow.nr_requests, flow.nr_bytes, self._output.nr_waiting

    def moved_state(self) -> ConnectionState | None:
        """Return what another process needs to go on with the socket; None: it cannot.

        Encryption cannot be moved, nor what has not come to rest.
        """
        if self._tls is not None or not self.is_at_rest or self._is_shutting_down:
            return None
        assert self._input is not None
        assert self._negotiated is not None
        assert self._requests is not None
        received, unsent = self._input.unserved(), self._output.unsent()
        begun = self._requests.in_flight.begun()
        return ConnectionState(self.peer, self._negotiated, received, unsent, begun)

    def leave(self) -> None:
        """Another process serves now: close. A client that could not be moved gets the replies that its socket takes at once.

        Requests of it that have not begun are not refused: it sends them again when it has connected again.
        """
        if self._tls is not None and self.is_at_rest:
            self.guard(self._flush_output)
        self.abort()

    def _flush_output(self) -> None:
        self._output.flush()

    @property
    def fileno(self) -> int:
        """Return the descriptor of the socket."""
        return self._watch.fd

    def take_over(self, moved: ConnectionState) -> None:
        """Go on where the connection was in the process that it comes from."""
        self.guard(
            partial(self._attach, moved.negotiated, moved.received, moved.unsent)
        )

    def go_on_with(self, begun: Iterable[BegunRange]) -> None:
        """Go on with requests that another process has begun, when all of its connections have been taken over.

        Not before: they would be older than the other connections, whose requests would wait for their ends (`gate.py`).
        """
        if self.state == TRANSMISSION and self._requests is not None:
            for each in begun:
                self._requests.in_flight.start_begun(each)

    def is_stalled(self, now_ns: int, within_s: float) -> bool:
        """See `Stalls`."""
        is_in = is_in_the_middle(self._output, self._input, self._flow, self._watch)
        return is_in and now_ns - self._flow.progress_ns > within_s * 1e9

    def notice_next_bytes(self) -> None:
        """See `Stalls`."""
        if may_notice(self._input, self._watch):
            self._flow.moved()
            self._watch.notice(self._more_came)

    def _more_came(self) -> None:
        self._flow.moved()
        self._watch.stop_reading()
        self._start_reading()
        self.readable()

    def maybe_release(self) -> None:
        """Release everything, unless bios are in flight: the last one calls again."""
        if self._flow.nr_requests:
            if any(self.writes_in_flight()):
                # The client takes the end of the connection for the end of its writes.
                with contextlib.suppress(OSError):  # it has gone
                    self._sock.shutdown(socket.SHUT_RD)
            else:
                self._sock.close()
            return
        self._sock.close()
        self._release()

    def _release(self) -> None:
        """Let go of the device, and of all that refers to this connection, when nothing is in flight any more."""
        traffic = None if self._requests is None else self._requests.traffic
        if self._requests is not None:
            self._requests.release()
        if self._reception is not None:
            self._reception.release()
        if self._negotiation.handshake.lacks_tls:
            who = f"{self.peer} ({self._negotiation.identity})"
            reason = "does not use TLS, which is required here"
            self._shared.refusals.note("no_tls", f"{who}: {reason}")
        self._patience.release()
        self._input = self._requests = self._reception = None
        self._flush_scheduled.cancel()
        self._finish_scheduled.cancel()
        self._flush_scheduled = self._finish_scheduled = NEVER
        device, self._device = self._device, None
        if device is not None:
            if traffic is not None:
                self._shared.accounts.close(device, traffic)
            self._shared.directory.release(device)
            self._shared.shares.leave(device)
            self._shared.gates.forget_idle(device)
        self._shared.closed(self)

    def settle(self) -> None:
        """If the client has gone, take the requests that it sent before, and notice that it has gone.

        Requests that cannot be taken now, because a bound is met, are dropped: no client waits for them.
        """
        if not self._hang_up_events():
            return
        for _ in range(SETTLE_RECEIVES_MAX):
            if self.state != TRANSMISSION or self._flow.is_paused:
                break
            self.guard(self._receiving().receive)
        if self.state == TRANSMISSION:
            log.info(
                "%s: the client has gone; its unread requests are dropped", self.peer
            )
            self.abort()

    def _hang_up_events(self) -> int:
        return self._shared.hang_up_events(self._sock)

    def has_hung_up(self) -> bool:
        return bool(self._hang_up_events() & HUNG_UP)

    def _gate(self) -> Gate:
        assert self._device is not None
        return self._shared.gates.of(self._device)

    def disc(self) -> None:
        """Read nothing more; close when everything in flight has been answered."""
        self.state = DRAINING
        self._watch.stop_reading()
        if self._requests is not None:
            self._gate().leave(self)
        if not self._is_shutting_down:
            self._flow.moved()
            self._patience.await_replies()

    def has_said_disc(self) -> bool:
        """Whether the client wants to leave. Its DISC may stand behind requests that a bound keeps from being served."""
        if self.state != TRANSMISSION:
            return self.state == DRAINING
        assert self._input is not None
        return self._input.ends_with_disc()

    def maybe_finish(self) -> None:
        """Close if nothing else is left to do."""
        if not self._output.is_empty or self._flow.nr_requests:
            return
        if self.state == DRAINING:
            self.abort()
        elif self.state == TRANSMISSION:
            self._finish_scheduled.ask()

    def _finish_now(self) -> None:
        self.guard(self._finish_shutdown)

    def _finish_shutdown(self) -> None:
        """Nothing is in flight: refuse what came meanwhile, and close our half if nothing came.

        The client has a moment to close its own half, so that no reset overtakes our replies.
        """
        if self.state != TRANSMISSION or self._flow.is_paused or self._flow.nr_requests:
            return
        self._receiving().receive()
        if (
            self.state == TRANSMISSION
            and self._output.is_empty
            and not self._finish_scheduled.is_due  # something came and was answered
        ):
            self.state = DRAINING
            self._sock.shutdown(socket.SHUT_WR)
            self._patience.linger()

    def guard(self, call: Callable[[], None]) -> None:
        """Run `call`. An exception from it ends this connection and no other."""
        try:
            call()
        except Violation as error:
            log.info("%s: %s: disconnected", self.peer, error)
            self.abort()
        except BlockingIOError:
            pass  # there was nothing to receive: the loop will call again
        except OSError as error:
            level = logging.DEBUG if is_gone(error) else logging.INFO
            log.log(level, "%s: %s", self.peer, error)
            self.abort()
        except Exception:
            log.exception("%s: connection failed", self.peer)
            self.abort()

    # ---- the socket ----

    def receive_requests(self, stop: int | None = None) -> None:
        """Go on where the compiled half has stopped; see `FastTurn.serve`."""
        self._receiving().receive(stop)

    def _receiving(self) -> Reception:
        assert self._reception is not None
        return self._reception

    def _python_has_run(self) -> None:
        if self._reception is not None:
            self._reception.python_ran()

    def _start_reading(self) -> None:
        if not self._watch.is_reading and self._held is None:
            self._python_has_run()
            reception = self._reception
            self._watch.read(self.readable if reception is None else reception.reader)
            if self._tls is not None and self._tls.has_pending:
                # The loop does not know of bytes that TLS has received already.
                self._shared.loop.call_soon(self.read_on)

    def readable(self) -> None:
        if self.state == TRANSMISSION:
            self.guard(self._receiving().receive)
        elif self.state == HANDSHAKE:
            self.guard(self._receive_handshake)
        else:
            self.guard(self._receive_nothing)

    def _writable(self) -> None:
        self._flow.moved()
        is_shaking_hands = (
            self._negotiation.handshake.starts_tls and self._tls is not None
        )
        self.guard(self._receive_handshake if is_shaking_hands else self.flush)

    def flush(self) -> None:
        """Send what the socket takes; then go on with everything that waited for that."""
        all_left = self._output.flush()
        if not all_left and not self._watch.is_writing:
            self._flow.moved()
            self._watch.write(self._writable)
            if self.state == TRANSMISSION:
                self._patience.await_replies()
        elif all_left:
            self._watch.stop_writing()
            if self.state == DRAINING or self._is_shutting_down:
                self.maybe_finish()
            elif self.state == HANDSHAKE:
                self._start_reading()
        if self._flow.is_paused:
            self._flow.ask()

    def route(self, submit: Callable[[Bio], None]) -> None:
        assert self._requests is not None
        self._python_has_run()
        self._requests.route(submit)

    def writes_in_flight(self) -> Iterator[tuple[Bio, int, int]]:
        assert self._requests is not None
        return self._requests.in_flight.writes()

    def flush_soon(self) -> None:
        """Flush once in this turn of the loop, however many bios end in it."""
        self._flush_scheduled.ask()

    def reads_ended(self) -> None:
        """Reads of the compiled fast path have ended, and their replies have left or are queued."""
        if self.state == CLOSED:
            self.maybe_release()
        elif (
            self.state == DRAINING
            or self._is_shutting_down
            or self._flow.is_paused
            or not self._output.is_empty
        ):
            self.flush_soon()

    def _flush_now(self) -> None:
        if self.state != CLOSED:
            self.guard(self.flush)

    def _receive_nothing(self) -> None:
        for _ in range(BATCHES_MAX):
            if not self._sock.recv(HANDSHAKE_READ):
                self.abort()
                return
        self._shared.loop.call_soon(self.read_on)

    def _receive_handshake(self) -> None:
        handshake = self._negotiation.handshake
        if handshake.starts_tls and not self._go_on_with_tls():
            return
        for _ in range(BATCHES_MAX):
            data = self._sock.recv(HANDSHAKE_READ)
            if not data:
                self.abort()
                return
            handshake.receive_data(data)
            self._answer_handshake()
            if self.state != HANDSHAKE:
                return
            if self._output.is_blocked:
                self._watch.stop_reading()  # until it has taken its answers
                return
            if handshake.starts_tls:
                return
        self._shared.loop.call_soon(self.read_on)

    def _go_on_with_tls(self) -> bool:
        """Go on with the handshake of TLS, after its answer has left in plaintext; whether it is over."""
        negotiation = self._negotiation
        if self._tls is None:
            if not self._output.is_empty:
                return False
            assert isinstance(self._sock, socket.socket)
            self._sock = self._tls = negotiation.begin_tls(self._sock)
        try:
            is_over = self._tls.handshake()
        except TlsError as error:
            self._end_refused_tls(self._tls, error)
            return False
        if self._tls.has_unsent:
            self._watch.write(self._writable)
        else:
            self._watch.stop_writing()
        if is_over:
            negotiation.tls_has_begun(self._tls)
        return is_over

    def _end_refused_tls(self, tls: TlsSocket, error: TlsError) -> None:
        """Close our half, and drop what still comes, until the client closes its own or `linger_s` is over.

        The alert that says why has left. In TLS 1.3 a client may send its first option before it reads that; a socket
        that is closed by then answers with a reset, and the client never learns the reason.
        """
        client = self._negotiation.identity
        self._shared.refusals.note(error.kind, f"{self.peer} ({client}): {error}")
        self._sock, self._tls = tls.give_up(), None
        self.state = DRAINING
        self._watch.stop_writing()
        self._sock.shutdown(socket.SHUT_WR)
        self._patience.linger()

    def _answer_handshake(self) -> None:
        handshake = self._negotiation.handshake
        for data in handshake.data_to_send():
            self._output.push(data)
        is_over = handshake.closed or handshake.negotiated is not None
        if is_over and handshake.has_asked_too_much:
            self._flow.met("handshake_output_max")
        if handshake.closed:
            if handshake.error is not None:
                log.info("%s: %s", self.peer, handshake.error)
            self.disc()
        elif handshake.negotiated is not None:
            self._attach(handshake.negotiated, handshake.trailing_data())
        self.flush()
        if self.state == DRAINING:
            self.maybe_finish()

    def _attach(self, negotiated: Negotiated, data: bytes, unsent: bytes = b"") -> None:
        """Serve requests from now on; `data` has been received already, `unsent` replies have to be sent first."""
        shared, limits = self._shared, self._limits
        try:
            device = shared.directory.acquire(negotiated.export.name)
        except KeyError:
            log.info("%s: %s is gone", self.peer, negotiated.export.name)
            self.disc()
            return
        self._flow.share(shared.shares.enter(device))
        self._patience.end()
        self.state = TRANSMISSION
        self._negotiated = negotiated
        self._output.open_arena()
        self._device = device
        sock, flow, output = self._sock, self._flow, self._output
        replies_like = replies_of(negotiated)
        self._input = received = Input(sock, limits, flow, output, replies_like)
        self._requests = Requests(
            self, shared, received, output, flow, device, negotiated
        )
        parts = self._requests, received, output, flow
        self._reception = Reception(self, shared, sock, self._watch, device, *parts)
        self._watch.stop_reading()  # and begin anew, with its reader
        if self._is_shutting_down:
            self._requests.refuse()
        self._gate().join(self)
        received.put(data)
        log.info("%s: attached %s", self.peer, negotiated.export.name)
        if unsent:
            self._output.push(unsent)
            self.flush()
        if self.is_frozen:
            self._watch.stop_reading()
            return
        self._start_reading()
        self._requests.serve()
        self._flow.end_turn()
        self.flush()

    def read_on(self) -> None:
        """The loop had its turn: go on receiving."""
        if self._watch.is_reading:
            self.readable()

    # ---- pausing: `Flow` calls these ----

    def pause(self) -> None:
        self._watch.stop_reading()

    def resume(self) -> None:
        """Serve what was received, if no bound is met any more."""
        requests, flow = self._requests, self._flow
        if self.state != TRANSMISSION or requests is None:
            return
        if self.is_frozen and self._input is not None and self._input.is_plain:
            return  # `thaw` calls again
        was_yielding = flow.is_yielding
        if not requests.may_go_on():
            return
        if not was_yielding and self.has_hung_up():
            # No client waits for the requests that were not served yet.
            self.abort()
            return
        flow.run()
        self._start_reading()
        self.guard(self._receiving().serve_received)
