# SPDX-License-Identifier: Apache-2.0
"""Logging of a server process, through an `Outlet` to stderr.

A line is `nbdtarget: MESSAGE`. If stderr is the journal (systemd says so in $JOURNAL_STREAM), the priority stands before each line, so that
`journalctl -p err` finds errors. With `--log-format json` a line is an object with `time`, `level`, `logger` and `message`.

Logging never raises an exception into the code that logs, and never waits for the reader of the log. Lines that
clients cause are bounded: CLIENT_LINES_BURST may come at once, and CLIENT_LINES_PER_S in the long run.
The next line says how many were left out. The secrets of URLs are left out of every line.
"""

import logging
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, NamedTuple, TextIO, TypeVar

import msgspec
import typer

from nbdtarget.cli.common import Verbose
from nbdtarget.cli.option_group import takes_group
from nbdtarget.cli.outlet import Outlet, process_stderr
from nbdtarget.common.clock import monotonic_ns
from nbdtarget.common.passed_stderr import stderr_to_be
from nbdtarget.common.redaction import redacted
from nbdtarget.common.words import printable

__all__ = ["NO_LOG", "Log", "LogHandler", "is_journal", "takes_log"]

C = TypeVar("C", bound=Callable[..., Any])

LogFormat = Annotated[
    str,
    typer.Option(
        "--log-format",
        metavar="text|json",
        help="Lines of the log on stderr: text, or an object of JSON each.",
    ),
]
_OPTIONS: Final[dict[str, tuple[Any, Any]]] = {
    "verbose": (Verbose, False),
    "log_format": (LogFormat, "text"),
}
_FORMATS: Final = ("text", "json")
_LOST: Final = "{} lines of the log were lost, because they were not read in time"
# systemd's priorities (sd-daemon(3)) of what is at least so bad.
_PRIORITIES: Final = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (0, 7),
)
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
        style: "Plain | None" = None,
    ) -> None:
        super().__init__()
        self._style = style = style or Plain()
        self._outlet = outlet or Outlet(
            process_stderr, lambda nr: style.line(_LOST.format(nr))
        )
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
            line = self._style.format(record)
        except Exception as error:  # a bug in a log line is no reason to fail
            line = self._style.line(
                f"{record.name}:{record.lineno}: log line: {error!r}"
            )
        if self._nr_left_out:
            nr, self._nr_left_out = self._nr_left_out, 0
            self._outlet.write_line(
                self._style.line(f"{nr} lines about clients were left out")
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


class Plain(logging.Formatter):
    """Formats lines for people."""

    def __init__(self) -> None:
        super().__init__("nbdtarget: %(message)s")

    def line(self, message: str) -> str:
        """Return a line that no record stands for: a warning."""
        return f"nbdtarget: {message}"


class Journal(Plain):
    """The same with systemd's priorities, before each line of a traceback, too."""

    def format(self, record: logging.LogRecord) -> str:
        return self._prefixed(super().format(record), record.levelno)

    def line(self, message: str) -> str:
        return self._prefixed(super().line(message), logging.WARNING)

    def _prefixed(self, text: str, level: int) -> str:
        priority = next(nr for least, nr in _PRIORITIES if level >= least)
        return "\n".join(f"<{priority}>{line}" for line in text.splitlines())


class Json(Plain):
    """One object a line, for programs that collect logs."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()

    def line(self, message: str) -> str:
        record = logging.makeLogRecord(
            {"name": __name__, "levelname": "WARNING", "msg": message}
        )
        return self.format(record)


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def is_journal(stream: TextIO | None, environment: Mapping[str, str]) -> bool:
    """Whether what is written there goes to systemd's journal."""
    said = environment.get("JOURNAL_STREAM", "")
    if stream is None or not said:
        return False
    fd = stderr_to_be(environment)
    try:
        there = os.fstat(stream.fileno() if fd is None else fd)
    except (OSError, ValueError):
        return False  # closed, or no file at all
    return said == f"{there.st_dev}:{there.st_ino}"


class Log(NamedTuple):
    """The values of the options about the log."""

    verbose: bool = False
    log_format: str = "text"

    def start(self) -> None:
        """Log warnings and errors, and with `verbose` also what happens to devices.

        Raises: BadParameter: there is no such format.
        """
        if self.log_format not in _FORMATS:
            raise typer.BadParameter(
                f"--log-format: not a format: {self.log_format!r} (text or json)"
            )
        style = Json() if self.log_format == "json" else Plain()
        if self.log_format == "text" and is_journal(process_stderr(), os.environ):
            style = Journal()
        handler = LogHandler(style=style)
        # Events of devices are kept for `nbdtarget events` in any case, by a handler of their own.
        handler.setLevel(logging.INFO if self.verbose else logging.WARNING)
        logging.basicConfig(level=logging.INFO, handlers=[handler])


NO_LOG: Final = Log()


def takes_log(command: C) -> C:
    """Give a command the options about the log, in the place of its parameter `log`."""
    return takes_group(command, "log", _OPTIONS, Log)
