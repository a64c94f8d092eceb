# SPDX-License-Identifier: Apache-2.0
"""`History`: what the clients of each device have asked for over the last minutes, so that charts do not begin when a page is opened.

Theory of operation. Each PERIOD_S it reads the numbers that connections keep anyway (`nbdtarget.server.traffic`), and keeps the last MOMENTS_MAX of
them: integers, in one array for each device that clients have been attached to. With many devices that is done in steps, and between two the loop serves
everything else. At most DEVICES_MAX devices are kept: 6 KiB each. A device that was removed is forgotten.

Nothing is done while requests are served, and a server without clients is woken for nothing but a look at the time.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol
from weakref import WeakKeyDictionary

from nbdtarget.common.clock import Clock, Timer, wall_clock_s
from nbdtarget.control.figures import (
    HistoryAnswer,
    Moment,
    OperationFigures,
)
from nbdtarget.devices.base import Device
from nbdtarget.monitor.minutes import KEPT_OPERATIONS
from nbdtarget.server.traffic import OPERATIONS, Account

__all__ = ["DEVICES_MAX", "MOMENTS_MAX", "PERIOD_S", "History"]

PERIOD_S: Final = 5.0
MOMENTS_MAX: Final = 60  # five minutes
DEVICES_MAX: Final = 1024
DEVICES_AT_ONCE: Final = 16
STEP_S: Final = 0.005  # between two steps of one moment
_COMMANDS: Final = tuple(
    command for command, name in OPERATIONS.items() if name in KEPT_OPERATIONS
)
_NUMBERS: Final = 3  # of each operation: how many, their bytes, their time in ns
_NOTHING: Final = [0] * _NUMBERS
_WIDTH: Final = _NUMBERS * len(_COMMANDS)


class Accounts(Protocol):
    """The requests of clients, by device."""

    def of(self, device: Device) -> Account | None: ...


class _Kept:
    """The numbers of one device. Attributes: begin: the first moment that it has."""

    __slots__ = ("begin", "numbers")

    def __init__(self, begin: int) -> None:
        self.begin = begin
        self.numbers = array("Q", bytes(8 * _WIDTH * MOMENTS_MAX))


class History:
    """See the module head.

    Args: devices: returns those that there are now.
    """

    def __init__(
        self,
        clock: Clock,
        devices: Callable[[], list[Device]],
        accounts: Accounts,
    ) -> None:
        self._clock = clock
        self._devices = devices
        self._accounts = accounts
        self._kept: WeakKeyDictionary[Device, _Kept] = WeakKeyDictionary()
        self._times: deque[float] = deque(maxlen=MOMENTS_MAX)
        self._nr = 0  # moments so far; the newest is `_nr - 1`
        self._left: list[Device] = []  # whose numbers are not taken yet, at this moment
        self._timer: Timer | None = None

    def start(self) -> None:
        """Begin, unless it has begun."""
        if self._timer is None:
            self._timer = self._clock.call_later(PERIOD_S, self._look)

    def stop(self) -> None:
        """End; what was kept stays."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def of(self, device: Device) -> HistoryAnswer:
        """Return the moments of a device, the oldest first; none: no client was attached to it."""
        kept = self._kept.get(device)
        if kept is None:
            return HistoryAnswer(PERIOD_S, ())
        return HistoryAnswer(PERIOD_S, tuple(self._moments(kept)))

    def _moments(self, kept: _Kept) -> Iterator[Moment]:
        oldest = self._nr - len(self._times)
        for nr in range(max(oldest, kept.begin), self._nr):
            at = nr % MOMENTS_MAX * _WIDTH
            numbers = kept.numbers[at : at + _WIDTH]
            operations = {}
            for place, command in enumerate(_COMMANDS):
                many, nr_bytes, taken_ns = numbers[place * _NUMBERS :][:_NUMBERS]
                if many:
                    operations[OPERATIONS[command]] = OperationFigures(
                        many, nr_bytes, taken_ns / 1e9
                    )
            yield Moment(self._times[nr - oldest], operations)

    def _look(self) -> None:
        """Begin a new moment."""
        self._times.append(wall_clock_s())
        self._nr += 1
        self._left = self._devices()
        self._step()

    def _step(self) -> None:
        for device in self._left[-DEVICES_AT_ONCE:]:
            self._take(device)
        del self._left[-DEVICES_AT_ONCE:]
        if self._left:
            self._timer = self._clock.call_later(STEP_S, self._step)
        else:
            self._timer = self._clock.call_later(PERIOD_S, self._look)

    def _take(self, device: Device) -> None:
        account = self._accounts.of(device)
        if account is None:
            return
        kept = self._kept.get(device)
        if kept is None:
            if len(self._kept) >= DEVICES_MAX:
                return
            kept = self._kept[device] = _Kept(self._nr - 1)
        counts = account.counts()
        numbers: list[int] = []
        for command in _COMMANDS:
            numbers += counts.get(command, _NOTHING)[:_NUMBERS]
        at = (self._nr - 1) % MOMENTS_MAX * _WIDTH
        kept.numbers[at : at + _WIDTH] = array("Q", numbers)
