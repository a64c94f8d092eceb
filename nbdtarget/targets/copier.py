# SPDX-License-Identifier: Apache-2.0
"""Copies between two devices: bounded, with buffers that are used again.

Theory of operation. A copy is cut into chunks; a chunk borrows a buffer, is read, written, and
gives the buffer back. There are `copy_bytes_max / chunk_bytes` buffers, and that is the whole
bound: whoever finds none waits for one, first come first served. Several copies at once overlap
each other's reads and writes; a long one overlaps its own chunks, `chunks_in_flight_max` at a
time, so that it can not take every buffer from the others for good.

The event loop is not held for longer than a chunk: after one that never had to wait (both
devices answered at once, from memory), the others get their turn.

A copy orders nothing and flushes nothing: who called it owns the range on the
destination (`prison`), and has the destination flushed before anything vouches for the copy.
"""

import asyncio
from collections import deque
from collections.abc import Generator
from typing import Final

from nbdtarget.devices.base import Device
from nbdtarget.errors import DeviceError

__all__ = ["CHUNK_BYTES", "COPY_BYTES_MAX", "Copier", "CopyError"]

COPY_BYTES_MAX: Final = 32 << 20
CHUNK_BYTES: Final = 256 << 10
CHUNKS_IN_FLIGHT_MAX: Final = 8

Chunks = Generator[tuple[int, int], None, None]


class CopyError(Exception):
    """A copy failed, on the side that `error` names.

    Attributes:
        error: the device's own.
        is_read: the source could not be read; else the destination could not be written.
    """

    def __init__(self, error: DeviceError, *, is_read: bool) -> None:
        super().__init__(error, is_read)
        self.error = error
        self.is_read = is_read

    def __str__(self) -> str:
        return str(self.error)


class Copier:
    """Copies ranges from `source` to the same place on `destination`.

    Context: the event loop.
    """

    def __init__(
        self,
        source: Device,
        destination: Device,
        *,
        copy_bytes_max: int = COPY_BYTES_MAX,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        assert 0 < chunk_bytes <= copy_bytes_max
        self.source = source
        self.destination = destination
        self.chunk_bytes = chunk_bytes
        self._buffers_unmade = copy_bytes_max // chunk_bytes
        self._buffers: list[memoryview] = []
        self._waiters: deque[asyncio.Future[memoryview]] = deque()

    async def copy(self, offset: int, length: int) -> None:
        """Copy `length` bytes at `offset`. After a failure any part may have been copied.

        Raises: CopyError: the first failure; no I/O of this copy is in flight any more.
        Durable: nothing before a flush of the destination.
        """
        chunks = self._chunks(offset, length)
        if length <= self.chunk_bytes:
            await self._copy_chunks(chunks)
            return
        nr = min(CHUNKS_IN_FLIGHT_MAX, -(-length // self.chunk_bytes))
        results = await asyncio.gather(
            *(self._copy_chunks(chunks) for _ in range(nr)), return_exceptions=True
        )
        for result in results:
            if result is not None:
                raise result

    def drop_buffers(self) -> None:
        """Give the memory of idle buffers back; they are made again on demand."""
        self._buffers_unmade += len(self._buffers)
        self._buffers.clear()

    def _chunks(self, offset: int, length: int) -> Chunks:
        end = offset + length
        for at in range(offset, end, self.chunk_bytes):
            yield at, min(self.chunk_bytes, end - at)

    async def _copy_chunks(self, chunks: Chunks) -> None:
        # Several of these share one iterator: each takes the next chunk when it is free.
        for offset, length in chunks:
            buffer = await self._borrow()
            try:
                await self._copy_chunk(offset, buffer[:length])
            except CopyError:
                chunks.close()  # the others stop after the chunk that they are at
                raise
            finally:
                self._give_back(buffer)

    async def _copy_chunk(self, offset: int, buffer: memoryview) -> None:
        try:
            await self.source.readinto(offset, buffer)
        except DeviceError as error:
            raise CopyError(error, is_read=True) from error
        # Two devices in memory never suspend, and the loop would stand still.
        await asyncio.sleep(0)
        try:
            await self.destination.write(offset, buffer)
        except DeviceError as error:
            raise CopyError(error, is_read=False) from error

    async def _borrow(self) -> memoryview:
        if self._buffers:
            return self._buffers.pop()
        if self._buffers_unmade:
            self._buffers_unmade -= 1
            return memoryview(bytearray(self.chunk_bytes))
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[memoryview] = loop.create_future()
        self._waiters.append(waiter)
        return await waiter

    def _give_back(self, buffer: memoryview) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(buffer)
                return
        self._buffers.append(buffer)
