# SPDX-License-Identifier: Apache-2.0
"""`Fetcher`: brings a range of a remote image, however often it has to be asked for.

Theory of operation. `fetch` sends one request for a range. When it breaks off, what has arrived is good, and the next request asks for
the rest. The next step depends on the kind of error (`nbdtarget.devices.ranged.store`):

    away, unfit   wait, with full jitter (`retry`), at least for what Retry-After said. All fetches wait for that
                  one. An overload halves the number of requests at a time (`slots`)
    denied        get new credentials or a new URL, once for all fetches, and ask again. If that does not help: as away
    changed       give up for good: `changed` is called, and this and every later fetch fails

A fetch that makes no progress for `source_timeout` fails with EIO. Until then those who asked for it wait, as they
would wait for a slow disk: a file system that gets an error becomes read-only, and one that waits goes on.

*Time limits.* A request has `ANSWER_S_MAX`, and more for its length: one that is slower than `RATE_MIN` has come to a stop,
although a byte may come now and then. The store limits connecting and the time between two arrivals.

*What is told.* After `FAILURES_QUIET` failures in a row of one fetch the source counts as away: a line in the log, `health.last_error`, an
event. The first success after that is told as well.
"""

import asyncio
import errno as errnos
import logging
import random
from collections.abc import Callable
from typing import Final

from nbdtarget.common.clock import loop_time_s, sleep, timeout
from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.health import Health
from nbdtarget.devices.ranged.pin import Pin
from nbdtarget.devices.ranged.retry import delay_s
from nbdtarget.devices.ranged.slots import Slots
from nbdtarget.devices.ranged.store import (
    SourceAway,
    SourceChanged,
    SourceDenied,
    SourceError,
    Store,
    Take,
)
from nbdtarget.devices.ranged.traffic import Traffic

__all__ = ["Fetcher"]

log = logging.getLogger(__name__)

ANSWER_S_MAX: Final = 60.0
RATE_MIN: Final = 4096  # bytes a second
FAILURES_QUIET: Final = 3
RENEW_S_MIN: Final = 5.0  # between two renewals, if the first has not helped


class Fetcher:
    """See the module head.

    Args:
        name: of the source, without secrets.
        source_timeout_s: 0: no bound.
        changed: called once, with the reason.

    Attributes:
        pin: what every answer must show.
        is_over: the image has changed, or the device is closed.
        store, name: `name` has no secrets. Both may be replaced at any time.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        pin: Pin,
        health: Health,
        traffic: Traffic,
        *,
        source_timeout_s: float,
        changed: Callable[[str], None],
        jitter: random.Random | None = None,
    ) -> None:
        self.pin = pin
        self.is_over = False
        self.store = store
        self.name = name
        self._health = health
        self._traffic = traffic
        self._source_timeout_s = source_timeout_s
        self._changed = changed
        self._jitter = jitter or random.Random()
        self._not_before_s = 0.0
        self._renewing = asyncio.Lock()
        self._nr_renewals = 0
        self._renewed_s = float("-inf")
        self._renewal_helped = True

    async def fetch(
        self, begin: int, end: int, take: Take, slots: Slots, *, is_urgent: bool
    ) -> None:
        """Bring the bytes `begin` to `end`; `take` gets them in order, as they arrive.

        Raises: DeviceError: the image has changed, or there was no answer for `source_timeout`.
        """
        attempt = _Attempt(begin, take, self._traffic)
        nr_failures = 0
        since_s = loop_time_s()
        while attempt.at < end:
            if self.is_over:
                raise self._error(begin, end)
            if not await self._turn(slots, since_s):
                raise self._error(begin, end)
            began_s, began_at = loop_time_s(), attempt.at
            nr_renewals = self._nr_renewals
            try:
                await self._ask(attempt, end, is_urgent=is_urgent)
                slots.note_success()
                self._note_answer()
                continue
            except SourceError as error:
                failure = error
                if isinstance(failure, SourceAway) and failure.is_overload:
                    slots.note_overload(began_s)  # before the slot goes to the next one
            finally:
                slots.release()
            if self.is_over:
                continue  # closed, or another fetch has found the change
            if isinstance(failure, SourceChanged):
                self.change(failure.reason)
                continue
            if attempt.at > began_at:
                nr_failures, since_s = 0, loop_time_s()
            nr_failures += 1
            self._traffic.retries += 1
            if isinstance(failure, SourceDenied) and await self._renew(nr_renewals):
                continue
            await self._wait(failure, nr_failures, since_s, (begin, end))

    async def _turn(self, slots: Slots, since_s: float) -> bool:
        """Take a slot when all may ask again; return False, without a slot, if `source_timeout` is over first."""
        left_s = None
        if self._source_timeout_s:
            left_s = max(0.0, since_s + self._source_timeout_s - loop_time_s())
        try:
            async with timeout(left_s):
                while (wait_s := self._not_before_s - loop_time_s()) > 0:
                    await sleep(wait_s)
                await slots.acquire()
        except TimeoutError:
            return False
        return True

    async def _ask(self, attempt: "_Attempt", end: int, *, is_urgent: bool) -> None:
        """Send one request. Raises: SourceError."""
        self._traffic.requests += 1
        limit_s = ANSWER_S_MAX + (end - attempt.at) / RATE_MIN
        try:
            async with timeout(limit_s):
                await self.store.get(
                    attempt.at, end, self.pin, attempt.take, is_urgent=is_urgent
                )
        except TimeoutError:
            failure: SourceError = SourceAway("it does not answer, or too slowly")
        except SourceError as error:
            failure = error
        else:
            if attempt.at >= end:
                return
            failure = SourceAway("it sent less than it was asked for")
        kind = type(failure).__name__.removeprefix("Source").lower()
        self._traffic.failures[kind] += 1
        raise failure

    async def _wait(
        self,
        failure: SourceError,
        nr_failures: int,
        since_s: float,
        wanted: tuple[int, int],
    ) -> None:
        """Wait before the next attempt. Raises: DeviceError: there is none."""
        asked_s = failure.retry_after_s if isinstance(failure, SourceAway) else None
        if asked_s is not None:
            self._not_before_s = max(self._not_before_s, loop_time_s() + asked_s)
        if nr_failures >= FAILURES_QUIET:
            self._note_away(failure.reason)
        wait_s = delay_s(nr_failures, self._jitter, asked_s)
        if self._source_timeout_s:
            left_s = since_s + self._source_timeout_s - loop_time_s()
            if left_s <= 0:
                self._note_away(failure.reason)
                raise self._error(*wanted)
            wait_s = min(wait_s, left_s)
        await sleep(wait_s)

    async def _renew(self, nr_before: int) -> bool:
        """Renew credentials or the URL, unless that was done since `nr_before`; return whether to ask again at once."""
        async with self._renewing:
            if self._nr_renewals != nr_before:
                return True
            if (
                not self._renewal_helped
                and loop_time_s() < self._renewed_s + RENEW_S_MIN
            ):
                return False
            self._renewed_s = loop_time_s()
            self._renewal_helped = False  # until there is an answer
            try:
                is_new = await self.store.renew()
            except SourceError as error:
                log.warning("%s: %s", self.name, error.reason)
                return False
            if is_new:
                self._nr_renewals += 1
                self._traffic.renewals += 1
            return is_new

    def change(self, reason: str) -> None:
        """The image is another one: end everything."""
        if not self.is_over:
            self.is_over = True
            self._changed(reason)

    def _note_answer(self) -> None:
        self._renewal_helped = True
        if self._traffic.came_back():
            log.warning("%s: it answers again", self.name)
            self._health.last_error = ""
            self._health.notify()

    def _note_away(self, reason: str) -> None:
        self._health.last_error = reason
        if self._traffic.went_away():
            log.warning("%s: %s; trying again and again", self.name, reason)
            self._health.notify()

    def _error(self, begin: int, end: int) -> DeviceError:
        return DeviceError(errnos.EIO, self.name, "read", begin, end - begin)


class _Attempt:
    """How far a fetch has come."""

    __slots__ = ("_take", "_traffic", "at")

    def __init__(self, at: int, take: Take, traffic: Traffic) -> None:
        self.at = at
        self._take = take
        self._traffic = traffic

    def take(self, data: bytes | bytearray | memoryview) -> None:
        self.at += len(data)
        self._traffic.bytes_received += len(data)
        self._take(data)
