# SPDX-License-Identifier: Apache-2.0
"""`EventLog`: what has happened in this server lately, for `nbdtarget events` and the page.

Theory of operation. An event is a line of the log: what is worth a line there is worth one here. The last EVENTS_MAX are kept in memory,
and numbered from 1; clients can cause lines, so those about clients are kept apart (CLIENT_EVENTS_MAX) and push out no others. A reader says which
number it knows, and waits for the next one; what it has missed because it is not kept any more, it is told as a number.

Lines are written by threads, too. The loop alone wakes the readers.
"""

import asyncio
import logging
import re
from collections import deque
from threading import Lock
from typing import Final

from nbdtarget.common.clock import Clock, sleep, timeout, wall_clock_s
from nbdtarget.common.redaction import redacted
from nbdtarget.common.words import printable
from nbdtarget.control.figures import Event, EventsAnswer

__all__ = ["EventLog"]

EVENTS_MAX: Final = 500
CLIENT_EVENTS_MAX: Final = 200
TEXT_LENGTH_MAX: Final = 1000  # characters
WAIT_S_MAX: Final = 25.0  # a request to the control socket should not last longer
_ABOUT_CLIENTS: Final = ("nbdtarget.server.", "nbdtarget.control.")
_DEVICE: Final = re.compile(r"/dev/mapper/([^/:]+): ")


class EventLog(logging.Handler):
    """See the module head."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(logging.INFO)
        self._clock = clock
        self._events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self._about_clients: deque[Event] = deque(maxlen=CLIENT_EVENTS_MAX)
        self._nr = 0
        self._lock = Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._came: asyncio.Event = asyncio.Event()

    def start(self) -> None:
        """Keep events from now on. Must be called on the loop."""
        self._loop = asyncio.get_running_loop()
        logging.getLogger("nbdtarget").addHandler(self)

    def stop(self) -> None:
        """Keep no more. Those that wait get what there is."""
        logging.getLogger("nbdtarget").removeHandler(self)
        self._loop = None
        self._came.set()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = printable(redacted(record.getMessage()), TEXT_LENGTH_MAX)
        except Exception as error:  # a bug in a log line is no reason to fail
            text = f"{record.name}:{record.lineno}: log line: {error!r}"
        match = _DEVICE.match(text)
        device = match[1] if match else ""
        if match:
            text = text[match.end() :]
        is_about_client = record.name.startswith(_ABOUT_CLIENTS)
        kept = self._about_clients if is_about_client else self._events
        with self._lock:
            self._nr += 1
            level = record.levelname.lower()
            kept.append(Event(self._nr, wall_clock_s(), level, device, text))
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(self._came.set)
            except RuntimeError:
                self._loop = None  # the loop is closed: nothing waits any more

    async def after(self, since: int | None, wait_s: float) -> EventsAnswer:
        """Return the events after number `since`; if there are none, wait for one, but not longer than `wait_s`.

        Args: since: None: the present one.
        """
        if since is None:
            since = self._nr
        # A number that is larger than ours is of a server before this one: that reader has missed all that there is.
        if self._nr == since and wait_s > 0 and self._loop is not None:
            try:
                async with timeout(min(wait_s, WAIT_S_MAX)):
                    while self._nr == since and self._loop is not None:
                        self._came.clear()
                        await self._came.wait()
            except TimeoutError:
                await sleep(0)  # nothing has happened: the answer is empty
        with self._lock:
            kept = sorted((*self._events, *self._about_clients), key=lambda it: it.nr)
            last = self._nr
        # A server that was started anew counts from 1 again.
        events = [each for each in kept if each.nr > since or since > last]
        lost = max(0, last - since - len(events)) if since <= last else 0
        return EventsAnswer(tuple(events), last, lost)
