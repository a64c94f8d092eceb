# SPDX-License-Identifier: Apache-2.0
"""`SlicedRead`: a long READ, carried out slice by slice, so that no turn of the loop serves all of it.

A device that has the data in memory fills the buffer of a READ inside `submit`: 64 MiB take 20 ms and more, in
which nothing else is served. So a READ that is longer than `Limits.read_slice` is sent to the device in slices. The next
slice follows when the one before has ended and the connection has its next turn (`Turns`). The first error ends
the READ. Each slice is looked through for zeroes when it is there, for the same reason.
"""

from typing import Protocol

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.common.turns import Turns
from nbdtarget.server.buffers import HEADER_ROOM
from nbdtarget.server.request import Request
from nbdtarget.server.zeroes import is_zero

__all__ = ["SlicedRead", "Slicing"]


class Slicing(Protocol):
    """The methods of a connection's requests that a sliced READ calls."""

    def submit_slice(self, bio: Bio) -> None:
        """Send one slice to the device."""

    def slice_ended(self, bio: Bio) -> int:
        """A slice has ended. Return 0 if the READ goes on, else the errno that it ends with."""


class SlicedRead:
    """See the module head.

    Args:
        bio: the whole READ, which is not submitted itself. Its payload is memory of its own, and its `private` is
            the `Request`. It ends with the last slice; `Request.zeroes` tells then what is known of the data.
        looks: whether to look for zeroes.
    """

    __slots__ = ("_at", "_bio", "_looks", "_requests", "_slice_max", "_turns")

    def __init__(
        self, bio: Bio, slice_max: int, requests: Slicing, turns: Turns, *, looks: bool
    ) -> None:
        assert not bio.borrowed
        self._bio = bio
        self._slice_max = slice_max
        self._requests = requests
        self._turns = turns
        self._looks = looks  # False, too, when something else than zeroes was found
        self._at = 0

    def go_on(self) -> None:
        """Submit the next slice."""
        bio, at = self._bio, self._at
        assert bio.payload is not None
        length = min(self._slice_max, bio.length - at)
        payload = bio.payload[at : at + length]
        offset = bio.offset + at
        self._requests.submit_slice(
            Bio(OP_READ, offset, length, payload, 0, self._ended, bio.private)
        )

    def _ended(self, piece: Bio) -> None:
        whole = self._bio
        errno = self._requests.slice_ended(piece)
        if errno:
            whole.end(errno)
            return
        self._look(piece)
        self._at += piece.length
        if self._at < whole.length:
            self._turns.ask(self.go_on)
            return
        request = whole.private
        assert isinstance(request, Request)
        whole.private = request._replace(zeroes=self._looks)
        whole.end(0)

    def _look(self, piece: Bio) -> None:
        payload = piece.payload
        assert payload is not None
        if self._looks:
            at = self._at + HEADER_ROOM
            self._looks = is_zero(payload.obj, at, piece.length)
