# SPDX-License-Identifier: Apache-2.0
"""`MemoryDevice`: a sparse disk in memory, gone when it is closed.

Theory of operation. The disk is a dictionary of chunks, made when first written to; a missing
chunk reads as zeroes and is reported as a hole. So `memory:1T` opens at once and costs what is
written to it. Everything ends inside `submit`, but for a clearing of more than CLEARED_MAX chunks: that takes
some of them in each turn of the loop, so that others are served meanwhile. Nothing survives a power cut, and
no later server could ask for it, so FLUSH and FUA always succeed.

DISCARD drops whole chunks; WRITE_ZEROES does the same and clears the edges. NO_UNMAP clears the
chunks that are there instead, and cannot promise room for the others: memory is overcommitted
anyway. A chunk for which there is no memory ends the bio with ENOMEM.
"""

import errno as errnos
from functools import partial
from typing import Final
from uuid import uuid4

from nbdtarget.bio import (
    NO_UNMAP,
    OP_DISCARD,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.common.turns import Turns
from nbdtarget.devices.base import (
    EXTENT_DATA,
    EXTENT_HOLE,
    EXTENT_ZERO,
    Device,
    Extent,
)
from nbdtarget.devices.identity import MEMORY
from nbdtarget_metadata.disks import Evidence

__all__ = ["CHUNK_SIZE", "MemoryDevice"]

CHUNK_SHIFT: Final = 16
CHUNK_SIZE: Final = 1 << CHUNK_SHIFT
_CHUNK_MASK: Final = CHUNK_SIZE - 1
_ZEROES: Final = memoryview(bytes(CHUNK_SIZE))
CLEARED_MAX: Final = 256  # chunks that are cleared in one turn of the loop
LOOKED_AT_MAX: Final = 1 << 16  # chunks that one `extents` looks at


class MemoryDevice(Device):
    """A disk of `size` zero bytes."""

    can_discard = True
    can_write_zeroes = True
    can_fast_zero = True
    volatile_state = "its contents, which are in memory,"

    def __init__(
        self, size: int, *, name: str | None = None, read_only: bool = False
    ) -> None:
        assert size > 0
        super().__init__(name or f"memory:{size}", size, read_only=read_only)
        self._chunks: dict[int, memoryview] = {}
        self._id = ""
        self._turns = Turns()

    async def identify(self, role: str) -> Evidence:
        self._id = self._id or uuid4().hex
        return Evidence(MEMORY, self.name, self.size, (f"disk={self._id}",))

    # hot: 4 KiB: read 0.6 us, write 1.2 us (scripts/bench_devices.py)
    def submit(self, bio: Bio) -> None:
        offset = bio.offset
        if bio.op == OP_READ and offset + bio.length <= self.size:
            begin = offset & _CHUNK_MASK
            end = begin + bio.length
            if end <= CHUNK_SIZE:
                payload = bio.payload
                assert payload is not None
                chunk = self._chunks.get(offset >> CHUNK_SHIFT, _ZEROES)
                payload[:] = chunk[begin:end]
                bio.end(0)
                return
        status = self.check_bounds(bio)
        if not status:
            op = bio.op
            try:
                if op == OP_READ:
                    self._read(bio)
                elif op == OP_WRITE:
                    self._write(bio)
                elif op in (OP_WRITE_ZEROES, OP_DISCARD):
                    self._clear(bio)
                    return
            except MemoryError:
                status = errnos.ENOMEM
        bio.end(status)

    async def close(self) -> None:
        self._chunks.clear()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        found: list[Extent] = []
        first = offset >> CHUNK_SHIFT
        # Present chunks are walked, not all of them: a hole may be terabytes. Where many are, less is described.
        if len(self._chunks) > LOOKED_AT_MAX:
            length = min(length, ((first + LOOKED_AT_MAX) << CHUNK_SHIFT) - offset)
        end = offset + length
        last = (end - 1) >> CHUNK_SHIFT
        if last - first < 4 * len(self._chunks):
            present = [nr for nr in range(first, last + 1) if nr in self._chunks]
        else:
            present = sorted(nr for nr in self._chunks if first <= nr <= last)
        at = offset
        for nr in present:
            begin = max(nr << CHUNK_SHIFT, offset)
            if begin > at:
                found.append(Extent(begin - at, EXTENT_HOLE | EXTENT_ZERO))
            at = min((nr + 1) << CHUNK_SHIFT, end)
            if found and found[-1].flags == EXTENT_DATA:
                found[-1] = Extent(found[-1].length + at - begin, EXTENT_DATA)
            else:
                found.append(Extent(at - begin, EXTENT_DATA))
        if at < end:
            found.append(Extent(end - at, EXTENT_HOLE | EXTENT_ZERO))
        return found or [Extent(length, EXTENT_DATA)]

    @property
    def nr_chunks(self) -> int:
        """How many chunks hold memory."""
        return len(self._chunks)

    def _read(self, bio: Bio) -> None:
        payload = bio.payload
        assert payload is not None
        offset, length, at = bio.offset, bio.length, 0
        while at < length:
            begin = (offset + at) & _CHUNK_MASK
            piece = min(CHUNK_SIZE - begin, length - at)
            chunk = self._chunks.get((offset + at) >> CHUNK_SHIFT, _ZEROES)
            payload[at : at + piece] = chunk[begin : begin + piece]
            at += piece

    def _write(self, bio: Bio) -> None:
        payload = bio.payload
        assert payload is not None
        offset, length, at = bio.offset, bio.length, 0
        while at < length:
            begin = (offset + at) & _CHUNK_MASK
            piece = min(CHUNK_SIZE - begin, length - at)
            nr = (offset + at) >> CHUNK_SHIFT
            chunk = self._chunks.get(nr)
            if chunk is None:
                chunk = self._chunks[nr] = memoryview(bytearray(CHUNK_SIZE))
            chunk[begin : begin + piece] = payload[at : at + piece]
            at += piece

    def _clear(self, bio: Bio) -> None:
        begin, end = bio.offset, bio.offset + bio.length
        first, last = begin >> CHUNK_SHIFT, (end - 1) >> CHUNK_SHIFT
        if last - first < len(self._chunks):
            present = [nr for nr in range(first, last + 1) if nr in self._chunks]
        else:
            present = [nr for nr in self._chunks if first <= nr <= last]
        self._clear_chunks(bio, present)

    def _clear_chunks(self, bio: Bio, present: list[int]) -> None:
        """Clear some of the chunks that lie in `bio`, the others in later turns of the loop; then end it."""
        begin, end = bio.offset, bio.offset + bio.length
        drop = not bio.flags & NO_UNMAP
        now = present[-CLEARED_MAX:]
        del present[-CLEARED_MAX:]
        for nr in now:
            chunk = self._chunks.get(nr)
            if chunk is None:
                continue  # another bio has dropped it meanwhile
            low = max(begin - (nr << CHUNK_SHIFT), 0)
            high = min(end - (nr << CHUNK_SHIFT), CHUNK_SIZE)
            # The last chunk may be cut off by the end of the disk.
            room = min(CHUNK_SIZE, self.size - (nr << CHUNK_SHIFT))
            if drop and low == 0 and high == room:
                del self._chunks[nr]
            else:
                chunk[low:high] = _ZEROES[: high - low]
        if not present:
            bio.end(0)
            return
        self._turns.ask(partial(self._clear_chunks, bio, present))
