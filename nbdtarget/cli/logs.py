# SPDX-License-Identifier: Apache-2.0
"""Logging of a server process, through an `Outlet` to stderr.

Logging never raises an exception into the code that logs, and never waits for the reader of the log. Lines that
clients cause are bounded: CLIENT_LINES_BURST may come at once, and CLIENT_LINES_PER_S in the long run.
The next line says how many were left out. The secrets of URLs are left out of every line.
"""

import logging
from collections.abc import Callable
from typing import Final

from nbdtarget.cli.outlet import Outlet, process_stderr
from nbdtarget.common.clock import monotonic_ns
from nbdtarget.common.redaction import redacted
from nbdtarget.common.words import printable

__all__ = ["LogHandler", "start_logging"]

LINE_LENGTH_MAX: Final = 4000  # characters, without a traceback
CLIENT_LINES_BURST: Final = 200
CLIENT_LINES_PER_S: Final = 10
# The loggers whose lines a client can cause as often as it likes.
_ABOUT_CLIENTS: Final = ("nbdtarget.server.", "nbdtarget.control.")


class LogHandler(logging.Handler):
    """See the module head."""

    def __init__(
        self,
        outlet: Outlet | None = None,
        now_ns: Callable[[], int] = monotonic_ns,
    ) -> None:
        super().__init__()
        self._outlet = outlet or Outlet(process_stderr, _tell_lost)
        self._now_ns = now_ns
        self._tokens = float(CLIENT_LINES_BURST)
        self._counted_ns = now_ns()
        self._nr_left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(_ABOUT_CLIENTS) and not self._may_tell():
            self._nr_left_out += 1
            return
        try:
            message = redacted(record.getMessage())
            # A name in a message must neither look like another line nor move the cursor.
            record.msg, record.args = printable(message, LINE_LENGTH_MAX), None
            line = self.format(record)
        except Exception as error:  # a bug in a log line is no reason to fail
            line = f"nbdtarget: {record.name}:{record.lineno}: log line: {error!r}"
        if self._nr_left_out:
            nr, self._nr_left_out = self._nr_left_out, 0
            self._outlet.write_line(
                f"nbdtarget: {nr} lines about clients were left out"
            )
        self._outlet.write_line(line)

    def _may_tell(self) -> bool:
        now_ns = self._now_ns()
        gained = (now_ns - self._counted_ns) * CLIENT_LINES_PER_S / 1e9
        self._counted_ns = now_ns
        self._tokens = min(self._tokens + gained, CLIENT_LINES_BURST)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def _tell_lost(nr: int) -> str:
    return f"nbdtarget: {nr} lines of the log were lost, because they were not read in time"


def start_logging(*, verbose: bool) -> None:
    """Log warnings and errors, and with `verbose` also what happens to devices."""
    handler = LogHandler()
    handler.setFormatter(logging.Formatter("nbdtarget: %(message)s"))
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, handlers=[handler]
    )
