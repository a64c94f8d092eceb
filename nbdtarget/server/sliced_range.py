# SPDX-License-Identifier: Apache-2.0
"""`SlicedRange`: a TRIM, WRITE_ZEROES or CACHE of a long range, carried out slice by slice; `Pace`: how long slices are.

One request may be about a whole disk of 16 TiB. The device's work takes time in proportion: a clone sets bits, a
file system frees space, a disk that cannot zero is written to for hours. So a range that is longer than
`Limits.range_slice` is sent to the device in slices, the next one when the one before has ended and the connection has
its turn (`Turns`). Between two slices

    other requests are served, and a suspend or a swap of tables waits for no more than one slice
    the request is given up if its client has gone, or the server stops. It ends with ESHUTDOWN then
    the first error ends the request
    it stands still while its connection is frozen for a hand-over to another process, which goes on with the next slice;
        or it goes on here, if the hand-over fails

The first slice has `Limits.range_slice` bytes, but a CACHE begins with SLICE_MIN: it reads all of its range, perhaps from a distant source, and
a whole GiB of it would hold up what waits for a slice.

How long a slice is depends on how long the one before took. While slices end quickly, each is twice as long as the one
before, so that 16 TiB of nothing are 15 slices. Slices that take long become shorter.

A slice ends at a multiple of the device's discard granularity. A clone or a cache, for example, does nothing about a part
of a block that is discarded, so a block that was cut in two would be left out. It ends at the border of a sector in any
case: the halves of a sector that was cut in two could be torn apart by a power cut, which no disk does.
"""

from collections.abc import Callable
from math import lcm
from typing import Final, NamedTuple

from nbdtarget.bio import OP_CACHE, Bio
from nbdtarget.common.clock import Clock, perf_counter_ns
from nbdtarget.common.turns import Turns
from nbdtarget.devices.base import Device
from nbdtarget.server.limits import Limits

__all__ = ["Pace", "SlicedRange", "Slicing", "first_slice"]

SLICE_MIN: Final = 16 << 20  # bytes; a slice does not become shorter than this
QUICK_NS: Final = (
    50_000_000  # after a slice that took less than this, a longer one follows
)
SLOW_NS: Final = 200_000_000  # after a slice that took more, a shorter one follows


class Pace:
    """How long the next slice is.

    Args:
        growth: how many times longer a slice is than a quick one before it.

    Attributes:
        length: bytes of the next slice.
    """

    __slots__ = ("_begun_ns", "_clock", "_growth", "_held_ns", "_turn_us", "length")

    def __init__(
        self, clock: Clock, limits: Limits, length: int, *, growth: int = 2
    ) -> None:
        self.length = length
        self._clock = clock
        self._turn_us = limits.turn_us
        self._growth = growth
        self._begun_ns = 0
        self._held_ns = 0

    def begin(self) -> None:
        """Note that a slice begins."""
        self._begun_ns = self._clock.now_ns()
        self._held_ns = 0

    def submit(self, device: Device, piece: Bio) -> None:
        """Submit the slice, and note how long that holds up the loop."""
        before_ns = perf_counter_ns() if self._turn_us else 0
        device.submit(piece)
        if self._turn_us:
            self._held_ns = perf_counter_ns() - before_ns

    def end(self) -> None:
        """The slice has ended."""
        took_ns = self._clock.now_ns() - self._begun_ns
        holds = self._held_ns > self._turn_us * 1000
        if took_ns > SLOW_NS or holds:
            self.length = max(self.length // 2, SLICE_MIN)
        elif took_ns < QUICK_NS:
            self.length *= self._growth


class Slicing(NamedTuple):
    """The things that work in slices needs.

    Attributes:
        reason_to_stop: returns the errno with which to end, if it is not worth going on; else 0.
        is_frozen: returns whether the connection is handed over to another process.
    """

    clock: Clock
    limits: Limits
    turns: Turns
    reason_to_stop: Callable[[], int]
    is_frozen: Callable[[], bool] = lambda: False


def first_slice(op: int, limits: Limits) -> int:
    """Return the length of the first slice of a range; what is not longer is no range in slices."""
    length = limits.range_slice
    return min(length, SLICE_MIN) if op == OP_CACHE else length


class SlicedRange:
    """See the module head.

    Args:
        bio: all of the range; it is not submitted itself, and ends with the last slice.
        stand_still: called before each slice; True: `go_on` is called again later.
        done: so many bytes at its beginning have been carried out by another process.
    """

    __slots__ = (
        "_at",
        "_bio",
        "_device",
        "_end",
        "_is_submitting",
        "_pace",
        "_reason_to_stop",
        "_stand_still",
        "_turns",
    )

    def __init__(
        self,
        bio: Bio,
        device: Device,
        slicing: Slicing,
        stand_still: Callable[["SlicedRange"], bool] = lambda _: False,
        done: int = 0,
    ) -> None:
        self._bio = bio
        self._stand_still = stand_still
        self._at = bio.offset + done
        self._end = bio.offset + bio.length
        self._device = device
        clock, limits, self._turns, self._reason_to_stop, _ = slicing
        self._pace = Pace(clock, limits, first_slice(bio.op, limits))
        self._is_submitting = False

    @property
    def bio(self) -> Bio:
        return self._bio

    @property
    def done(self) -> int:
        """The bytes that have been carried out, between two slices."""
        return self._at - self._bio.offset

    def go_on(self) -> None:
        """Submit the next slice."""
        if self._stand_still(self):
            return
        bio, at, stop = self._bio, self._at, self._stop()
        pace = self._pace
        pace.begin()
        self._is_submitting = True
        piece = Bio(bio.op, at, stop - at, None, bio.flags, self._ended)
        pace.submit(self._device, piece)
        self._is_submitting = False
        if piece.status >= 0:
            self._next(piece)

    def _stop(self) -> int:
        """Where the next slice ends."""
        stop = self._at + self._pace.length
        limits = self._device.limits
        unit = lcm(max(limits.discard_granularity, 1), limits.logical_block_size)
        stop -= stop % unit
        if stop <= self._at:
            stop = (self._at // unit + 1) * unit
        return min(stop, self._end)

    def _ended(self, piece: Bio) -> None:
        if not self._is_submitting:
            self._next(piece)

    def _next(self, piece: Bio) -> None:
        """A slice has ended: go on in the next turn, or end the range."""
        self._pace.end()
        self._at += piece.length
        status = piece.status
        if not status and self._at < self._end:
            status = self._reason_to_stop()
            if not status:
                self._turns.ask(self.go_on)
                return
        self._bio.end(status)
