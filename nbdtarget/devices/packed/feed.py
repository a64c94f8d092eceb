# SPDX-License-Identifier: Apache-2.0
"""`Feed`: the bytes of a packed file in order, read ahead of the decompressor so that a distant server does not slow it down."""

import asyncio
import errno as errnos
from collections import deque
from typing import Final

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.devices.base import Device

__all__ = ["Feed", "UnreadableError"]

CHUNK_BYTES: Final = 1 << 20
CHUNKS_AHEAD: Final = 16


class UnreadableError(Exception):
    """The packed file cannot be read now. `str` follows its name in a sentence."""


class Feed:
    """Reads `device` from its beginning, `CHUNKS_AHEAD` chunks at a time."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._at = 0
        self._reads: deque[asyncio.Future[Bio]] = deque()

    async def next(self) -> bytes | None:
        """Return the next bytes; None: there are no more. Raises: UnreadableError."""
        end = self._device.exact_size
        while self._at < end and len(self._reads) < CHUNKS_AHEAD:
            self._begin(min(CHUNK_BYTES, end - self._at))
        if not self._reads:
            return None
        bio = await self._reads.popleft()
        if bio.status:
            raise UnreadableError(
                f"cannot be read at {bio.offset} ({errnos.errorcode.get(bio.status, bio.status)})"
            )
        assert bio.payload is not None
        return bytes(bio.payload)

    async def close(self) -> None:
        """Forget what is being read; the device ends it."""
        self._reads.clear()

    def _begin(self, length: int) -> None:
        done: asyncio.Future[Bio] = asyncio.get_running_loop().create_future()

        def ended(bio: Bio) -> None:
            if not done.done():
                done.set_result(bio)

        buffer = memoryview(bytearray(length))
        bio = Bio(OP_READ, self._at, length, buffer, 0, ended)
        self._at += length
        self._reads.append(done)
        self._device.submit_ahead(bio)
