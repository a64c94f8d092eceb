# SPDX-License-Identifier: Apache-2.0
"""Messages to the service manager: systemd's `sd_notify` protocol, over one datagram socket.

    READY=1                       clients may come; also when a reload has ended
    RELOADING=1, MONOTONIC_USEC   a reload begins
    STOPPING=1                    the end has begun
    STATUS=…                      one line for `systemctl status`
    MAINPID=…                     another process serves from now on
    EXTEND_TIMEOUT_USEC=…         we are alive: for so long from now, do not call it a timeout
    WATCHDOG=1                    we are alive, told again and again (`nbdtarget.daemon.service_reports`)

Without $NOTIFY_SOCKET nothing is sent. That a message cannot be sent is logged once in a row: disks are served in any case. A message about the state
(READY, RELOADING, STOPPING, MAINPID) is kept then, and sent in front of the next message, or by `retry`: a manager that was busy for a moment would wait for
READY until it ends the service. Of signs of life and of status lines, only the next one matters.

Signs of life are wanted if there is $WATCHDOG_USEC, the time after which the manager takes a silent process for dead. $WATCHDOG_PID
names the process that is meant. A process that takes over from it (`nbdtarget.daemon.handover`) is started without that variable, so it is
meant as well.

Source: sd_notify(3), sd_watchdog_enabled(3), systemd.service(5), `Type=notify` and `Type=notify-reload`.
"""

import logging
import os
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from nbdtarget.common.clock import monotonic_ns
from nbdtarget.common.numbers import maybe_number

__all__ = ["UNSENT_MAX", "WATCHDOG_PID", "Notifier"]

log = logging.getLogger(__name__)

VARIABLE: Final = "NOTIFY_SOCKET"
WATCHDOG_USEC: Final = "WATCHDOG_USEC"
WATCHDOG_PID: Final = "WATCHDOG_PID"
USEC_MAX: Final = (1 << 63) - 1
UNSENT_MAX: Final = 8  # messages; the oldest are forgotten


class Notifier:
    """Tells the service manager. Never blocks, never raises for a manager that is not there.

    Attributes: watchdog_s: the manager takes the process for dead after so many seconds without `watchdog`; None: never.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = _address(environment.get(VARIABLE, ""))
        self.watchdog_s = _watchdog_s(environment)
        self._was_lost = False
        self._unsent: deque[bytes] = deque(maxlen=UNSENT_MAX)

    @property
    def is_behind(self) -> bool:
        """Whether the manager has not been told of a change yet."""
        return bool(self._unsent)

    @property
    def has_manager(self) -> bool:
        """Whether messages are sent anywhere."""
        return self._address is not None

    def ready(self, status: str) -> None:
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self, status: str = "reloading") -> None:
        """Until the next `ready` or `main_process` the manager lets jobs wait that need this service."""
        usec = monotonic_ns() // 1000
        self._tell("RELOADING=1", f"MONOTONIC_USEC={usec}", f"STATUS={status}")

    def stopping(self) -> None:
        self._tell("STOPPING=1", "STATUS=committing")

    def main_process(self, pid: int) -> None:
        """Another process serves from now on, and a hand-over that `reloading` began has ended."""
        # In one message: what the other process sends before this one has arrived is not believed.
        self._tell(f"MAINPID={pid}", "READY=1")

    def watchdog(self) -> None:
        self._send("WATCHDOG=1")

    def status(self, status: str) -> None:
        self._send(f"STATUS={status}")

    def extend(self, seconds: float) -> None:
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def retry(self) -> None:
        """Send what could not be sent."""
        while self._unsent and self._is_sent(self._unsent[0]):
            self._unsent.popleft()

    def _tell(self, *lines: str) -> None:
        """Send what must not be lost."""
        if self._address is not None:
            self._unsent.append(_message(lines))
            self.retry()

    def _send(self, *lines: str) -> None:
        """Send what is worth nothing later."""
        if self._address is not None:
            self.retry()
            if not self._unsent:
                self._is_sent(_message(lines))

    def _is_sent(self, message: bytes) -> bool:
        assert self._address is not None
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
            ) as sock:
                sock.setblocking(False)
                sock.sendto(message, self._address)
        except OSError as error:
            if not self._was_lost:
                log.warning("$%s: %s", VARIABLE, error.strerror or error)
            self._was_lost = True
            return False
        self._was_lost = False
        return True


def _message(lines: Sequence[str]) -> bytes:
    # A line break would begin another assignment.
    text = "\n".join(" ".join(line.splitlines()) for line in lines)
    return text.encode(errors="replace")


def _address(text: str) -> bytes | None:
    if not text:
        return None
    if text[0] not in "/@":
        log.warning("$%s: neither a path nor an abstract socket: %s", VARIABLE, text)
        return None
    name = os.fsencode(text)
    return b"\0" + name[1:] if text[0] == "@" else name


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    usec = environment.get(WATCHDOG_USEC, "")
    pid = environment.get(WATCHDOG_PID, "")
    if not usec or (pid and pid != str(os.getpid())):
        return None
    number = maybe_number(usec, USEC_MAX)
    if not number:
        log.warning("$%s: not a number of microseconds: %s", WATCHDOG_USEC, usec)
        return None
    return number / 1e6
