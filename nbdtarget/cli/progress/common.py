# SPDX-License-Identifier: Apache-2.0
"""The output that all long-running commands have in common.

Output that scripts read or people paste goes to stdout, progress and complaints to stderr. While a command works, a
`Display` shows how far it is: on a terminal something that is drawn over again, elsewhere a plain line now and then.
With --json there is one object a line on stdout, and nothing else.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TypeVar

import msgspec

from nbdtarget.cli.outlet import Outlet, process_stderr, process_stdout
from nbdtarget.common.clock import monotonic_ns
from nbdtarget.common.passed_stderr import stderr_to_be

__all__ = [
    "Display",
    "Lines",
    "Nowhere",
    "is_terminal",
    "make_reporter",
    "open_display",
    "print_event",
    "say",
]

LINE_PERIOD_S: Final = 10.0

# These are dumb terminals, as rich calls them: they cannot draw over what they have drawn.
_DUMB_TERMINALS: Final = ("dumb", "unknown")

_stdout: Final = Outlet(process_stdout, lambda nr: f'{{"event":"lost","lines":{nr}}}')
_stderr: Final = Outlet(process_stderr, lambda nr: f"nbdtarget: {nr} lines were lost")

Subject = TypeVar("Subject")
R = TypeVar("R")


# ---- words ----


def print_event(**fields: object) -> None:
    """Print one JSON object in a line, without ever waiting for the reader."""
    _stdout.write_line(msgspec.json.encode(fields).decode())


def say(text: str) -> None:
    """Print a line for the user on stderr, without ever waiting for the reader."""
    _stderr.write_line(f"nbdtarget: {text}")


# ---- displays ----


class Display(Protocol):
    """Shows the progress of a command."""

    def show(self, line: str, done: int = 0, total: int = 0) -> None:
        """Show the state in words and, if `total` is known, in bytes. A display takes what it can show."""
        ...

    def stop(self) -> None:
        """Show nothing any more, and leave the terminal as it was found. Idempotent."""
        ...


class Nowhere:
    """A display that shows nothing."""

    def show(self, line: str, done: int = 0, total: int = 0) -> None:
        """Show nothing."""

    def stop(self) -> None:
        """Do nothing: nothing was shown."""


class Lines:
    """Prints lines for a log file: one at once, and then one in each period in which the words have changed."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._next_s = 0.0
        self._last = ""

    def show(self, line: str, done: int = 0, total: int = 0) -> None:
        now_s = monotonic_ns() / 1e9
        if line != self._last and now_s >= self._next_s:
            self._next_s = now_s + self._period_s
            self._last = line
            say(line)

    def stop(self) -> None:
        """Do nothing: the lines stay as they are."""


def is_terminal() -> bool:
    """Whether stderr is a terminal that can draw over what it has drawn."""
    fd = stderr_to_be()
    is_one = sys.stderr.isatty() if fd is None else os.isatty(fd)
    return is_one and os.environ.get("TERM") not in _DUMB_TERMINALS


@contextmanager
def open_display(
    bar: str | None, *, period_s: float | None = LINE_PERIOD_S
) -> Iterator[Display]:
    """Show progress on stderr, as it suits where that goes.

    Args:
        bar: what a bar for bytes is called on a terminal; None: the words are shown there, too.
        period_s: from one plain line to the next where there is no terminal; None: there are no lines.
    """
    display: Display
    if is_terminal():
        from nbdtarget.cli.progress import terminal  # rich: 30 ms

        display = terminal.LiveLine() if bar is None else terminal.Bar(bar)
    else:
        display = Nowhere() if period_s is None else Lines(period_s)
    try:
        yield display
    finally:
        display.stop()


@contextmanager
def make_reporter(
    plain: Callable[[Subject, Display], R],
    as_json: Callable[[Subject], R],
    subject: Subject,
    *,
    json: bool,
    bar: str | None = None,
    period_s: float = LINE_PERIOD_S,
    is_quiet: bool = False,
) -> Iterator[R]:
    """The reporter of a command: `as_json` prints objects, `plain` words, with a display.

    Args:
        bar, period_s: as of `open_display`.
        is_quiet: progress is not shown, because another program has the terminal.
    """
    if json:
        yield as_json(subject)
        return
    if is_quiet:
        yield plain(subject, Nowhere())
        return
    with open_display(bar, period_s=period_s) as display:
        yield plain(subject, display)
