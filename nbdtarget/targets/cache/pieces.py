# SPDX-License-Identifier: Apache-2.0
"""A bio that spans more blocks than the loop should be held for: its pieces, some at a time.

Theory of operation. A piece costs some 20 us, and 3 us for each 32 KiB that are copied at once; a WRITE_ZEROES
of 4 GiB has 131072 of them, each with its own objects. So a turn of the loop starts `PIECES_AT_ONCE` of a bio, or
`BYTES_AT_ONCE`, and `PIECES_MAX` are in flight. The first ones start at once; what fits into one turn
never comes here. After a piece that failed no other is started.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from nbdtarget.bio import OP_READ, OP_WRITE, Bio

__all__ = ["BYTES_AT_ONCE", "PIECES_AT_ONCE", "PIECES_MAX", "Pieces"]

PIECES_AT_ONCE: Final = 32
BYTES_AT_ONCE: Final = 1 << 20
PIECES_MAX: Final = 256


class Pieces:
    """One such bio on its way; ends it after the last piece, with the first error.

    Args:
        piece_size: bytes; pieces end at its multiples.
        private: of each piece.
        take: takes a piece, and ends it now or later.
    """

    __slots__ = (
        "_at",
        "_end",
        "_error",
        "_in_flight",
        "_is_due",
        "_is_pumping",
        "_parent",
        "_payload",
        "_piece_size",
        "_private",
        "_take",
    )

    def __init__(
        self, bio: Bio, piece_size: int, private: object, take: Callable[[Bio], None]
    ) -> None:
        bio.own()
        self._parent = bio
        self._payload = bio.payload
        if bio.op != OP_READ:
            bio.give_away()
        self._piece_size = piece_size
        self._private = private
        self._take = take
        self._at = bio.offset
        self._end = bio.offset + bio.length
        self._in_flight = 0
        self._error = 0
        # Not `Soon` and `Pump`: their callbacks would make each of these objects a cycle of references, and
        # the payload of a READ would stay in memory until the garbage collector comes.
        self._is_due = False
        self._is_pumping = False

    def pump(self) -> None:
        """Start what one turn of the loop should."""
        self._is_due = False
        self._is_pumping = True
        nr_left, bytes_left = PIECES_AT_ONCE, BYTES_AT_ONCE
        while nr_left and bytes_left > 0 and self._may_start:
            piece = self._next_piece()
            nr_left -= 1
            if piece.payload is not None:
                bytes_left -= piece.length
            self._in_flight += 1
            self._take(piece)
        self._is_pumping = False
        self._go_on()

    @property
    def _may_start(self) -> bool:
        return self._at < self._end and not self._error and self._in_flight < PIECES_MAX

    def _next_piece(self) -> Bio:
        bio, at = self._parent, self._at
        stop = min((at // self._piece_size + 1) * self._piece_size, self._end)
        payload = None
        if bio.op in (OP_READ, OP_WRITE):
            assert self._payload is not None
            begin = at - self._end + bio.length
            payload = self._payload[begin : begin + stop - at]
        self._at = stop
        return Bio(
            bio.op, at, stop - at, payload, bio.flags, self._ended, self._private
        )

    def _ended(self, piece: Bio) -> None:
        self._in_flight -= 1
        self._error = self._error or piece.status
        if not self._is_pumping:
            self._go_on()

    def _go_on(self) -> None:
        """Come back in the next turn, if there is more to start; end the bio after the last."""
        if self._is_due:
            return
        if self._may_start:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self.pump)
        elif not self._in_flight:
            self._payload = None
            self._parent.end(self._error)
