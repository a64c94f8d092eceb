# SPDX-License-Identifier: Apache-2.0
"""What the service manager is told: systemd's `sd_notify` protocol, over one datagram socket.

    READY=1                       clients may come; also when a reload has ended
    RELOADING=1, MONOTONIC_USEC   a reload begins
    STOPPING=1                    the end has begun
    STATUS=…                      one line for `systemctl status`
    MAINPID=…                     another process serves from now on
    EXTEND_TIMEOUT_USEC=…         we are alive: for so long from now, do not call it a timeout

Without $NOTIFY_SOCKET nothing is sent. A message that cannot be sent is logged once, and nothing else comes of
it: disks are served in any case.

Source: sd_notify(3), systemd.service(5), `Type=notify` and `Type=notify-reload`.
"""

import logging
import os
import socket
from collections.abc import Mapping
from typing import Final

from nbdtarget.common.clock import monotonic_ns

__all__ = ["Notifier"]

log = logging.getLogger(__name__)

VARIABLE: Final = "NOTIFY_SOCKET"


class Notifier:
    """Tells the service manager. Never blocks, never raises for a manager that is not there."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = _address(environment.get(VARIABLE, ""))

    def ready(self, status: str) -> None:
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        usec = monotonic_ns() // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={usec}", "STATUS=reloading")

    def stopping(self) -> None:
        self._send("STOPPING=1", "STATUS=committing")

    def main_process(self, pid: int) -> None:
        self._send(f"MAINPID={pid}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={status}")

    def extend(self, seconds: float) -> None:
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        # A line break would begin another assignment.
        text = "\n".join(" ".join(line.splitlines()) for line in lines)
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
            ) as sock:
                sock.setblocking(False)
                sock.sendto(text.encode(errors="replace"), self._address)
        except OSError as error:
            log.warning("$%s: %s", VARIABLE, error.strerror or error)
            self._address = None


def _address(text: str) -> bytes | None:
    if not text:
        return None
    if text[0] not in "/@":
        log.warning("$%s: neither a path nor an abstract socket: %s", VARIABLE, text)
        return None
    name = os.fsencode(text)
    return b"\0" + name[1:] if text[0] == "@" else name
