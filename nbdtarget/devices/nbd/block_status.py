# SPDX-License-Identifier: Apache-2.0
"""`BlockStatus`: what another NBD server says of its blocks (base:allocation), as extents of a device."""

from collections.abc import Awaitable, Callable
from typing import Final

from nbdtarget.devices.base import (
    EXTENT_HOLE,
    EXTENT_ZERO,
    EXTENTS_MAX,
    Extent,
    append_extent,
)

__all__ = ["STATUS_RANGE_MIN", "BlockStatus", "Runs"]

# Bytes that are asked for at least, where a server tells of more extents than are taken.
STATUS_RANGE_MIN: Final = 1 << 20
# base:allocation has the same two bits.
_EXTENT_FLAGS: Final = EXTENT_HOLE | EXTENT_ZERO

# Bytes and flags, one after the other.
Runs = list[tuple[int, int]]


class BlockStatus:
    """Asks one server for ranges that are as long as it can describe.

    Args:
        block: the server's minimum block size, in bytes.
        ask: sends a BLOCK_STATUS of an offset and a length; None: the server does not tell.
    """

    def __init__(
        self, block: int, ask: Callable[[int, int], Awaitable[Runs | None]]
    ) -> None:
        self._block = block
        self._ask = ask
        self._range_max = 0
        self._range = 0

    def may_ask(self, range_max: int) -> None:
        """One BLOCK_STATUS may be of so many bytes: the server has just been connected to."""
        self._range = self._range_max = range_max

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Return extents from `offset` on: at least one, or none if the server does not tell.

        They may end before `length` bytes. Raises: DeviceError: the server was lost.
        """
        found: list[Extent] = []
        at, end = offset, offset + length
        while at < end and len(found) < EXTENTS_MAX:
            begin = at // self._block * self._block
            asked = -(-end // self._block) * self._block - begin
            runs = await self._runs(begin, min(asked, self._range))
            # Not even to `at`: the server cuts its own blocks, and would do so for ever.
            if not runs or sum(run for run, _ in runs) <= at - begin:
                break
            for run, flags in runs:
                begin += run
                if begin > at:
                    append_extent(found, min(begin, end) - at, flags & _EXTENT_FLAGS)
                    at = min(begin, end)
                if len(found) > EXTENTS_MAX:
                    break
        return found

    async def _runs(self, offset: int, length: int) -> Runs | None:
        runs = await self._ask(offset, length)
        if runs is None:
            return None
        # Extents that are cut off were sent for nothing: where blocks are small, ask for less.
        if len(runs) >= EXTENTS_MAX:
            self._range = max(length // 16, STATUS_RANGE_MIN)
        else:
            self._range = min(self._range * 2, self._range_max)
        return runs
