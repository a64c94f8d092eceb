# SPDX-License-Identifier: Apache-2.0
"""I/O that goes on while something else is done to a cache, and knows what should be read."""

import asyncio
import random

from nbdtarget.bio import OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, Bio
from tests.support.cache import CacheLab

__all__ = ["BackgroundIo"]

SECTOR = 512
LENGTHS = (512, 4096, 16384, 32768, 65536)


class BackgroundIo:
    """Random reads, writes and flushes, each sector of which says what wrote it.

    Attributes:
        want: what the device should hold.
        unknown: sectors that were discarded: anything may be read there.
        nr_done: requests that have ended well.
    """

    def __init__(self, lab: CacheLab, seed: int = 1, *, discards: bool = False) -> None:
        self.lab = lab
        self.random = random.Random(seed)
        self.want = bytearray(lab.length)
        self.unknown: set[int] = set()
        self.nr_done = 0
        self._discards = discards
        self._is_stopped = False

    async def burn(self, nr_requests: int) -> None:
        """Make so many requests, one after another."""
        for _ in range(nr_requests):
            await self._one()

    async def burn_until_stopped(self) -> None:
        while not self._is_stopped:
            await self._one()
            await asyncio.sleep(0)

    def stop(self) -> None:
        self._is_stopped = True

    async def verify(self) -> None:
        """Read everything, a block at a time."""
        size = self.lab.block_size
        for at in range(0, self.lab.length, size):
            await self._read(at, min(size, self.lab.length - at))

    async def _one(self) -> None:
        rng = self.random
        length = rng.choice(LENGTHS)
        # A few blocks are asked for much more often than the rest.
        span = self.lab.length if rng.random() < 0.3 else self.lab.length // 8
        at = rng.randrange((span - length) // SECTOR + 1) * SECTOR
        kind = rng.random()
        if kind < 0.45:
            await self._read(at, length)
        elif kind < 0.95 or not self._discards:
            await self._write(at, length)
        else:
            await self._io(Bio(OP_DISCARD, at, length, None, 0, lambda _: None))
            self.unknown.update(range(at // SECTOR, (at + length) // SECTOR))
        if rng.random() < 0.05:
            await self._io(Bio(OP_FLUSH, 0, 0, None, 0, lambda _: None))
        self.nr_done += 1

    async def _write(self, at: int, length: int) -> None:
        data = self.random.randbytes(length)
        payload = memoryview(bytearray(data))
        await self._io(Bio(OP_WRITE, at, length, payload, 0, lambda _: None))
        self.want[at : at + length] = data
        self.unknown.difference_update(range(at // SECTOR, (at + length) // SECTOR))

    async def _read(self, at: int, length: int) -> None:
        payload = memoryview(bytearray(length))
        await self._io(Bio(OP_READ, at, length, payload, 0, lambda _: None))
        for nr in range(length // SECTOR):
            begin = nr * SECTOR
            if at // SECTOR + nr not in self.unknown:
                got = payload[begin : begin + SECTOR]
                assert got == self.want[at + begin : at + begin + SECTOR], at + begin

    async def _io(self, bio: Bio) -> None:
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        bio.on_end(lambda bio: ended.set_result(bio.status))
        self.lab.device.submit(bio)
        assert await ended == 0
