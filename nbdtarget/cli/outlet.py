# SPDX-License-Identifier: Apache-2.0
"""`Outlet`: lines on stderr or stdout of a server process, which must not depend on the reader of these lines.

A pipe that is full would hang the server at the next line, and a closed one would raise an exception in
the code that writes. So a line is written only if the stream takes it at once, and writing never raises.
Lines that the stream did not take are counted; the count is written before the next line that it takes.
"""

import io
import os
import select
import sys
from collections.abc import Callable
from typing import Final, TextIO

__all__ = ["Outlet", "process_stderr", "process_stdout"]

# A pipe that is writable takes so many bytes without blocking (one page, PIPE_BUF).
PIECE_BYTES: Final = 4096


class Outlet:
    """See the module head.

    Args:
        stream: returns the stream of the moment, because a progress bar replaces it for a while.
        tell_lost: returns the line that says how many lines were lost.
    Attributes:
        nr_lost: lines that were lost since the last one that was written.
    """

    def __init__(
        self, stream: Callable[[], TextIO | None], tell_lost: Callable[[int], str]
    ) -> None:
        self.nr_lost = 0
        self._stream = stream
        self._tell_lost = tell_lost
        self._is_broken_off = False  # in the middle of a line

    def write_line(self, line: str) -> None:
        """Write `line`, or count it as lost. Never blocks, never raises an Exception."""
        if self.nr_lost and not self._write(self._tell_lost(self.nr_lost)):
            self.nr_lost += 1
            return
        self.nr_lost = 0 if self._write(line) else 1

    def _write(self, line: str) -> bool:
        stream = self._stream()
        if stream is None:
            return False
        try:
            if isinstance(stream, io.TextIOWrapper) and _has_descriptor(stream):
                stream.flush()
                return self._write_pieces(stream.fileno(), line, stream.encoding)
            if not _has_descriptor(stream) or _is_writable(stream.fileno()):
                stream.write(line + "\n")
                stream.flush()
                return True
        except (OSError, ValueError):
            pass  # closed, or full: counted as lost
        return False

    def _write_pieces(self, fd: int, line: str, encoding: str) -> bool:
        begin = "\n" if self._is_broken_off else ""
        data = f"{begin}{line}\n".encode(encoding, "backslashreplace")
        sent = 0
        while sent < len(data) and _is_writable(fd):
            sent += os.write(fd, data[sent : sent + PIECE_BYTES])
            self._is_broken_off = sent < len(data)
        return sent == len(data)


def _has_descriptor(stream: TextIO) -> bool:
    try:
        stream.fileno()
    except (OSError, ValueError, AttributeError):
        return False
    return True


def _is_writable(fd: int) -> bool:
    looker = select.poll()
    looker.register(fd, select.POLLOUT)
    return any(events & select.POLLOUT for _, events in looker.poll(0))


def process_stderr() -> TextIO | None:
    return sys.stderr


def process_stdout() -> TextIO | None:
    return sys.stdout
