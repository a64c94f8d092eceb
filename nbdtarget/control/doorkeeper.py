# SPDX-License-Identifier: Apache-2.0
"""`Doorkeeper`: bounds on the connections of the control socket, which every client can open if it is on TCP.

    connections   CONNECTIONS_MAX; further ones are closed at once
    header        HEADER_S after connecting, and IDLE_S after the answer before; otherwise the connection is closed
    body          BODY_S, if the token was right: see `http.py`

It stands between the transport and the HTTP library, which does not limit how long a header may take.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from nbdtarget.common.clock import LoopClock, Timer
from nbdtarget.common.say_rarely import SayRarely

__all__ = ["BODY_S", "CONNECTIONS_MAX", "HEADER_S", "IDLE_S", "Doorkeeper"]

log = logging.getLogger(__name__)

CONNECTIONS_MAX: Final = 128
HEADER_S: Final = 10.0
BODY_S: Final = 30.0
IDLE_S: Final = 300.0

_clock: Final = LoopClock()


class Doorkeeper:
    """Makes the protocols of a listening socket.

    Args:
        make: makes the protocol of the HTTP library.
    """

    def __init__(self, make: Callable[[], asyncio.Protocol]) -> None:
        self._make = make
        self._open: dict[asyncio.BaseTransport, _Watched] = {}
        self._refused = SayRarely(_clock)

    def __call__(self) -> asyncio.Protocol:
        if len(self._open) >= CONNECTIONS_MAX:
            if nr := self._refused.count():
                log.warning(
                    "control socket: clients refused: %d: there are %d connections",
                    nr,
                    CONNECTIONS_MAX,
                )
            return _TurnedAway()
        return _Watched(self._make(), self._open)

    def request_begins(self, transport: asyncio.BaseTransport | None) -> None:
        """A header was received: no timer runs until the answer."""
        if transport in self._open:
            self._open[transport].wait(None)

    def request_ends(self, transport: asyncio.BaseTransport | None) -> None:
        """The request is answered: the next header may take IDLE_S."""
        if transport in self._open:
            self._open[transport].wait(IDLE_S)


class _TurnedAway(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class _Watched(asyncio.Protocol):
    """Passes everything on to the library's protocol, and closes a connection that takes too long."""

    def __init__(
        self,
        inner: asyncio.Protocol,
        opened: "dict[asyncio.BaseTransport, _Watched]",
    ) -> None:
        self._inner = inner
        self._open = opened
        self._transport: asyncio.BaseTransport | None = None
        self._timer: Timer | None = None

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._open[transport] = self
        self.wait(HEADER_S)
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.wait(None)
        if self._transport is not None:
            self._open.pop(self._transport, None)
        self._inner.connection_lost(exc)

    def wait(self, seconds: float | None) -> None:
        """Close unless a request begins within `seconds`. None: stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if seconds is not None:
            self._timer = _clock.call_later(seconds, self._too_late)

    def _too_late(self) -> None:
        log.info("control socket: no request in time: closed")
        if isinstance(self._transport, asyncio.WriteTransport):
            self._transport.abort()
