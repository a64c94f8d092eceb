# SPDX-License-Identifier: Apache-2.0
"""The file of a trace: which parts of an image clients read, in order. It is text, so that people can make one, too:

    nbdtarget-trace 1
    0 65536
    1048576 131072

Each line is an offset and a length in bytes. It belongs to an image, not to a disk: any clone of the image may use it.
"""

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import Final

from nbdtarget.common.clock import monotonic_ns
from nbdtarget.common.errors import ResolveError
from nbdtarget.common.turns import to_the_end
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget.targets.clone.trace import RANGES_MAX, Trace

__all__ = [
    "TraceRecorder",
    "check_writable",
    "maybe_clone",
    "read_trace",
    "write_trace",
]

log = logging.getLogger(__name__)

HEAD: Final = "nbdtarget-trace 1"
FILE_BYTES_MAX: Final = 4 << 20
SAVE_S: Final = 10.0


def read_trace(path: str) -> list[tuple[int, int]]:
    """Return the ranges, begin and end half-open. Raises: ResolveError."""
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ResolveError(path, error.strerror or "cannot be read") from error
    lines = data.decode("utf-8", "replace").splitlines()
    if len(data) > FILE_BYTES_MAX or not lines or lines[0] != HEAD:
        raise ResolveError(path, f"is no trace: it does not begin with `{HEAD}'")
    ranges = []
    for nr, line in enumerate(lines[1:], 2):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or not all(
            word.isdecimal() and len(word) < 20 for word in words
        ):
            raise ResolveError(
                path, f"line {nr} is not an offset and a length in bytes"
            )
        offset, length = map(int, words)
        ranges.append((offset, offset + length))
    return ranges[:RANGES_MAX]


def check_writable(path: str) -> None:
    """Refuse a path where no trace can be written. Raises: ResolveError."""
    directory = Path(path).absolute().parent
    if not os.access(directory, os.W_OK):
        raise ResolveError(path, f"the directory {directory} cannot be written to")


def write_trace(path: str, ranges: list[tuple[int, int]]) -> None:
    """Write the file anew; it has its old content or all of the new one.

    Raises: OSError. Durable: nothing; a trace that is lost costs a slow boot.
    """
    lines = [HEAD, *(f"{begin} {end - begin}" for begin, end in ranges), ""]
    new = f"{path}.new"
    try:
        Path(new).write_text("\n".join(lines))
        os.replace(new, path)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            os.unlink(new)
        raise


def maybe_clone(device: MappedDevice) -> CloneTarget | None:
    """Return the clone that the device is, or will be when it is resumed for the first time, or None."""
    table = device.active or device.inactive
    if table is None or len(table.targets) != 1:
        return None
    target = table.targets[0]
    return target if isinstance(target, CloneTarget) else None


class TraceRecorder:
    """Saves a trace as it grows. A file that cannot be written costs the trace, and is told once.

    Attributes:
        trace: what is saved; may be replaced.
    """

    def __init__(self, path: str) -> None:
        self.trace = Trace(0, 0)
        self._path = path
        self._saved: tuple[int, tuple[int, int]] | None = None
        self._due_ns = 0
        self._has_failed = False

    async def save_now_and_then(self) -> None:
        """Save what is new, if some seconds have passed since the last time."""
        if monotonic_ns() >= self._due_ns:
            await self.save()
            self._due_ns = monotonic_ns() + int(SAVE_S * 1e9)

    async def save(self) -> None:
        """Save what is new. It goes on if the caller is cancelled: two threads must not write the same file."""
        await to_the_end(self._save())

    async def _save(self) -> None:
        ranges = self.trace.ranges
        # The last range grows when a client reads on.
        now = len(ranges), ranges[-1] if ranges else (0, 0)
        if now == self._saved or self._has_failed:
            return
        try:
            # A disk may take its time, and a long trace some tens of milliseconds.
            await asyncio.to_thread(write_trace, self._path, ranges.copy())
            self._saved = now
        except OSError as error:
            self._has_failed = True
            log.error("%s: the trace cannot be written: %s", self._path, error.strerror)
