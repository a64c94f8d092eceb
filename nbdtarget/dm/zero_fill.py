# SPDX-License-Identifier: Apache-2.0
"""A WRITE_ZEROES to a target that cannot: carried out as writes of zeroes, some at a time."""

from collections.abc import Callable
from typing import Final

from nbdtarget.bio import FUA, OP_WRITE, Bio
from nbdtarget.common.turns import Pump, Turns
from nbdtarget.targets.base import Target

__all__ = ["ZERO_BYTES_MAX", "ZERO_WRITES_MAX", "ZeroFill"]

ZERO_BYTES_MAX: Final = 1 << 20  # of one write
ZERO_WRITES_MAX: Final = 4  # at a time

_ZEROES: Final = memoryview(bytes(ZERO_BYTES_MAX))


class ZeroFill:
    """One WRITE_ZEROES on its way.

    Args:
        map_to: sends a bio to a target of the live table.
        requeue: queues the whole bio again, when one of the writes was pushed back.
        turns: the device's, so that not all of its fills go on in each turn of the loop.
    """

    __slots__ = (
        "_end",
        "_error",
        "_is_pushed_back",
        "_left",
        "_map_to",
        "_next",
        "_parent",
        "_pump",
        "_requeue",
        "_target",
        "_turns",
    )

    def __init__(
        self,
        map_to: Callable[[Target, Bio], None],
        requeue: Callable[[Bio], None],
        target: Target,
        bio: Bio,
        turns: Turns,
    ) -> None:
        self._turns = turns
        self._map_to = map_to
        self._requeue = requeue
        self._target = target
        self._parent = bio
        self._next = bio.offset
        self._end = bio.offset + bio.length
        self._left = 0
        self._error = 0
        self._is_pushed_back = False
        self._pump = Pump(self._start_writes)

    def pump(self) -> None:
        """Start writes until enough are in flight; end the bio when all have ended."""
        # A write that ends inline asks again, while the loop of `_start_writes` is running.
        self._pump.run()

    def _start_writes(self) -> None:
        turn_bytes = ZERO_WRITES_MAX * ZERO_BYTES_MAX
        while (
            self._next < self._end
            and not self._error
            and not self._is_pushed_back
            and turn_bytes
            and self._left < ZERO_WRITES_MAX
        ):
            length = min(self._end - self._next, ZERO_BYTES_MAX, turn_bytes)
            turn_bytes -= length
            self._left += 1
            child = Bio(
                OP_WRITE,
                self._next,
                length,
                _ZEROES[:length],
                self._parent.flags & FUA,
                self._child_ended,
                self,
            )
            self._next += length
            self._map_to(self._target, child)
        if self._left:
            return
        if self._error:
            self._parent.end(self._error)
        elif self._is_pushed_back:
            self._requeue(self._parent)
        elif self._next == self._end:
            self._parent.end(0)
        else:
            # All of them ended inline. 4 GiB of that would hold up every other client.
            self._turns.ask(self.pump)

    def pushed_back(self) -> None:
        """One of the writes is not going to end: a target held it and has given it back."""
        self._is_pushed_back = True
        self._left -= 1
        self.pump()

    def _child_ended(self, child: Bio) -> None:
        self._error = self._error or child.status
        self._left -= 1
        self.pump()
