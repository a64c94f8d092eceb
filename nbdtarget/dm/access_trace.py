# SPDX-License-Identifier: Apache-2.0
"""`AccessTrace`: which ranges of a device are read and written, recorded for `nbdtarget advise`.

    @trace_start [NUMBER]           record from now on, at most so many requests (ACCESSES); what was recorded before is dropped
    @trace_stop                     record no more; what was recorded stays
    @trace_print [FIRST [NUMBER]]   lines `R,OFFSET,LENGTH` or `W,OFFSET,LENGTH`, in bytes; at most LINES_MAX of them
    @trace_clear                    record no more, and drop what was recorded

Cost. While it records, the device's fast path is off, as with statistics. A request takes 12 bytes of memory. When the number
is reached, recording ends by itself, and requests take the fast path again.

It records what comes to the device, in order, before a target cuts or moves it: READ and WRITE, and nothing else.
"""

from array import array
from collections.abc import Callable, Sequence
from typing import Final

from nbdtarget.bio import OP_READ, OP_WRITE, Bio
from nbdtarget.common.errors import TableError

__all__ = ["ACCESSES", "ACCESSES_MAX", "AccessTrace"]

ACCESSES_MAX: Final = 4 << 20
ACCESSES: Final = 1 << 20  # unless another number is said
LINES_MAX: Final = 1 << 16
_IS_WRITE: Final = 1 << 63  # in an offset


class AccessTrace:
    """See the module head.

    Args: changed: called when recording has begun or ended.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._offsets = array("Q")
        self._lengths = array("I")
        self._nr_max = 0

    @property
    def is_recording(self) -> bool:
        return self._nr_max > 0

    def note(self, bio: Bio) -> None:
        """Record a bio that is about to be mapped."""
        if not self._nr_max or bio.op not in (OP_READ, OP_WRITE) or not bio.length:
            return
        flag = _IS_WRITE if bio.op == OP_WRITE else 0
        self._offsets.append(bio.offset | flag)
        self._lengths.append(bio.length)
        if len(self._offsets) >= self._nr_max:
            self._stop()

    def message(self, words: Sequence[str]) -> str | None:
        """Carry out a message; the answer to print. Raises: TableError."""
        match [words[0].lower(), *words[1:]]:
            case ["@trace_start", *number] if len(number) < 2:
                nr_max = _number(number[0]) if number else ACCESSES
                if not 0 < nr_max <= ACCESSES_MAX:
                    raise TableError(f"Invalid argument: 1 to {ACCESSES_MAX} requests")
                self._clear()
                self._nr_max = nr_max
                self._changed()
            case ["@trace_stop"]:
                self._stop()
            case ["@trace_clear"]:
                self._stop()
                self._clear()
            case ["@trace_print", *numbers] if len(numbers) < 3:
                first = _number(numbers[0]) if numbers else 0
                nr = _number(numbers[1]) if len(numbers) > 1 else LINES_MAX
                return self._lines(first, min(nr, LINES_MAX))
            case _:
                raise TableError(
                    f"Invalid parameters for message {words[0]}: there are @trace_start,"
                    " @trace_stop, @trace_print and @trace_clear"
                )
        return None

    def _stop(self) -> None:
        if self._nr_max:
            self._nr_max = 0
            self._changed()

    def _clear(self) -> None:
        self._offsets, self._lengths = array("Q"), array("I")

    def _lines(self, first: int, nr: int) -> str | None:
        lines = []
        for at in range(first, min(first + nr, len(self._offsets))):
            offset = self._offsets[at]
            way = "W" if offset & _IS_WRITE else "R"
            lines.append(f"{way},{offset & ~_IS_WRITE},{self._lengths[at]}")
        return "\n".join(lines) or None


def _number(word: str) -> int:
    if not (word.isascii() and word.isdecimal() and len(word) <= 18):
        raise TableError(f"Invalid argument: {word!r} is not a number")
    return int(word)
