# SPDX-License-Identifier: Apache-2.0
"""Copies between two devices: bounded, with buffers that are used again.

Theory of operation. A copy is cut into chunks; a chunk borrows a buffer, is read, written, and
gives the buffer back. All buffers together have `copy_bytes_max` bytes, and that is the whole
bound: a copy that finds none waits for one, first come first served. Several copies at once
overlap each other's reads and writes; a long one overlaps its own chunks, CHUNKS_IN_FLIGHT_MAX
at a time, so that it cannot keep all buffers from the others.

Two sizes. The cost of a chunk besides its bytes (Python, and a hand-over to a file's writer) is
the same for a large one, so long copies use buffers of `chunk_bytes`. Copies of a region or so
use small ones, so that many of them can run at once. A copy takes the other size rather than wait, and its
chunk is then as long as its buffer.

A chunk is two bios, and the second is submitted where the first ends: no task, no future, and the
data is still in the processor's cache. One future a copy is all that its caller waits for.
The event loop is not held for longer than a chunk: after one that ended inside `submit`
(both devices answered at once), the others get their turn.

A buffer is lent to a bio until the bio ends, also if the copy was cancelled.

Zeroes. Of a source that cannot tell where it has zeroes (`Device.hides_zeroes`), what was read is looked through (`zeroes.py`), and
whole pieces of zeroes become a WRITE_ZEROES, if the destination can do that without writing them. A chunk has ended when all its bios have.

After each `writeback_bytes` that were copied, the destination begins to write back. Copying is
bound by the processor, writing back by the disk; left to the next flush, they would take turns.

A copy orders nothing and flushes nothing: the caller owns the range on the
destination (`prison`), and has the destination flushed before anything vouches for the copy.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from mmap import mmap
from typing import Final, NamedTuple

from nbdtarget.bio import OP_NAMES, OP_READ, OP_WRITE, OP_WRITE_ZEROES, Bio
from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import Device
from nbdtarget.targets.zeroes import maybe_zero_runs

__all__ = ["CHUNK_BYTES", "COPY_BYTES_MAX", "Copier", "CopyError"]

COPY_BYTES_MAX: Final = 32 << 20
CHUNK_BYTES: Final = 1 << 20
SMALL_BYTES: Final = 256 << 10
INLINE_BYTES_MAX: Final = 64 << 10  # of a chunk in the background
CHUNKS_IN_FLIGHT_MAX: Final = 8
WRITEBACK_BYTES: Final = 16 << 20


def new_buffer(length: int) -> memoryview:
    # A new bytearray is filled with zeroes at once: for 32 buffers of a MiB that takes 17 ms of the loop, at the beginning of a
    # copy, when the first client attaches.
    return memoryview(mmap(-1, length))


class CopyError(Exception):
    """A copy failed, on the side that `error` names.

    Attributes:
        error: the device's own.
        is_read: the source could not be read; otherwise the destination could not be written.
    """

    def __init__(self, error: DeviceError, *, is_read: bool) -> None:
        super().__init__(error, is_read)
        self.error = error
        self.is_read = is_read

    def __str__(self) -> str:
        return str(self.error)


class Copier:
    """Copies ranges from `source` to `destination`.

    Args:
        background: chunks that would hold the loop up go to `Device.submit_background`. Small
            ones do not: two changes of thread delay other bios for longer than they do (measured
            with 64 KiB, as the latency of other clients' reads).
        behind: no client waits for it: it is read with `Device.submit_ahead`, and what is copied goes to
            `Device.write_behind` next. The caller sees to that, and nothing else has it written back.

    Context: the event loop.
    """

    def __init__(
        self,
        source: Device,
        destination: Device,
        *,
        copy_bytes_max: int = COPY_BYTES_MAX,
        chunk_bytes: int = CHUNK_BYTES,
        background: bool = False,
        behind: bool = False,
    ) -> None:
        assert 0 < chunk_bytes <= copy_bytes_max
        self.source = source
        self.destination = destination
        self.chunk_bytes = chunk_bytes
        self.background = background
        self.behind = behind
        self._small_bytes = min(SMALL_BYTES, chunk_bytes)
        self._bytes_unmade = copy_bytes_max
        self._large: list[memoryview] = []  # idle buffers
        self._small: list[memoryview] = []
        self._waiting: deque[_Copy] = deque()
        self._nr_dirty = 0

    async def copy(self, offset: int, length: int, to: int | None = None) -> None:
        """Copy `length` bytes at `offset` to the same place, or to offset `to`.

        After a failure any part may have been copied.

        Raises: CopyError: the first failure; no I/O of this copy is in flight any more.
        Durable: nothing before a flush of the destination.
        """
        copy = _Copy(self, offset, length, 0 if to is None else to - offset)
        copy.pump()
        await copy.ended

    @property
    def looks_for_zeroes(self) -> bool:
        return self.source.hides_zeroes and self.destination.can_write_zeroes

    def drop_buffers(self) -> None:
        """Give the memory of idle buffers back; they are made again on demand."""
        for buffers in (self._large, self._small):
            self._bytes_unmade += sum(map(len, buffers))
            buffers.clear()

    def maybe_borrow(self, copy: "_Copy", wanted: int) -> memoryview | None:
        """Lend a buffer, of `wanted` bytes if there is one; None: `copy` is pumped in its turn."""
        first, other, size = self._small, self._large, self._small_bytes
        if wanted > size and self.chunk_bytes > size:
            first, other, size = other, first, self.chunk_bytes
        if first:
            return first.pop()
        if self._bytes_unmade >= size:
            return self._made(size)
        if other:
            return other.pop()
        if self._bytes_unmade >= self._small_bytes:
            return self._made(self._small_bytes)
        if copy not in self._waiting:
            self._waiting.append(copy)
        return None

    def _made(self, size: int) -> memoryview:
        self._bytes_unmade -= size
        return new_buffer(size)

    def give_back(self, buffer: memoryview) -> None:
        is_small = len(buffer) == self._small_bytes
        (self._small if is_small else self._large).append(buffer)
        self.wake_next()

    def note_written(self, length: int) -> None:
        if self.behind:
            return
        self._nr_dirty += length
        if self._nr_dirty >= WRITEBACK_BYTES:
            self._nr_dirty = 0
            self.destination.start_writeback()

    def wake_next(self) -> None:
        """Give the next copy that waits its turn, if there is a buffer for it."""
        while self._waiting and (self._small or self._large):
            copy = self._waiting.popleft()
            if copy.wants_more:
                copy.pump_soon()
                return


class _Copy:
    """One copy on its way.

    Attributes:
        ended: its result; set when nothing is in flight any more.
    """

    __slots__ = (
        "_copier",
        "_delta",
        "_end",
        "_error",
        "_in_flight",
        "_is_pumping",
        "_loop",
        "_next",
        "_pump_is_due",
        "ended",
    )

    def __init__(self, copier: Copier, offset: int, length: int, delta: int) -> None:
        self._copier = copier
        self._delta = delta  # from an offset on the source to that on the destination
        self._next = offset
        self._end = offset + length
        self._in_flight = 0
        # Not `Pump` and `Soon`: their callbacks would make each copy a cycle of references, for the collector.
        self._is_pumping = False
        self._pump_is_due = False
        self._error: CopyError | None = None
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def pump_soon(self) -> None:
        if not self._pump_is_due:
            self._pump_is_due = True
            self._loop.call_soon(self._pump_due)

    def _pump_due(self) -> None:
        self._pump_is_due = False
        self.pump()
        # It may have found another buffer meanwhile: then this one is for another copy.
        self._copier.wake_next()

    @property
    def wants_more(self) -> bool:
        """Whether another buffer could be used now."""
        return self._in_flight < CHUNKS_IN_FLIGHT_MAX and self._next < self._end

    def pump(self) -> None:
        """Start what may be started: chunks until one ends at once, or none is left."""
        if self._is_pumping:
            return  # a chunk has ended inside `submit`: the loop below sees to it
        self._is_pumping = True
        try:
            while self.wants_more:
                wanted = self._end - self._next
                buffer = self._copier.maybe_borrow(self, wanted)
                if buffer is None:
                    break
                before = self._in_flight
                self._start_chunk(buffer)
                if self._in_flight == before:
                    self.pump_soon()
                    break
        finally:
            self._is_pumping = False
        self._maybe_end()

    def _maybe_end(self) -> None:
        if self._in_flight or self._next < self._end or self.ended.done():
            return
        if self._error is not None:
            self.ended.set_exception(self._error)
        else:
            self.ended.set_result(None)

    def _start_chunk(self, buffer: memoryview) -> None:
        length = min(len(buffer), self._end - self._next)
        chunk = _Chunk(self._next, length, buffer)
        self._next += length
        self._in_flight += 1
        self._submit(OP_READ, chunk, self._read_ended)

    def _read_ended(self, bio: Bio) -> None:
        if bio.status or self._error is not None:
            self._chunk_ended(bio)
            return
        assert isinstance(bio.private, _Chunk)
        if not self._copier.looks_for_zeroes or not self._write_runs(bio.private):
            self._submit(OP_WRITE, bio.private, self._chunk_ended)

    def _write_runs(self, chunk: "_Chunk") -> bool:
        """Write the data and the zeroes of a chunk, each for itself; return False, and do nothing, if it has no zeroes."""
        whole = chunk.buffer.obj
        assert isinstance(whole, mmap), "as `Copier` makes them"
        runs = maybe_zero_runs(whole, chunk.length)
        if runs is None:
            return False
        left = len(runs)
        failed: Bio | None = None

        def ended(bio: Bio) -> None:
            nonlocal left, failed
            left -= 1
            if bio.status and failed is None:
                failed = bio
            if not left:
                self._chunk_ended(failed or bio)

        for begin, end, is_zero in runs:
            self._write_run(chunk, begin, end, ended, is_zero=is_zero)
        return True

    def _write_run(
        self,
        chunk: "_Chunk",
        begin: int,
        end: int,
        endio: Callable[[Bio], None],
        *,
        is_zero: bool,
    ) -> None:
        """Write a part of a chunk, which is no chunk of its own."""
        offset = chunk.offset + self._delta + begin
        payload = None if is_zero else chunk.buffer[begin:end]
        op = OP_WRITE_ZEROES if is_zero else OP_WRITE
        self._send(Bio(op, offset, end - begin, payload, 0, endio, chunk))

    def _submit(self, op: int, chunk: "_Chunk", endio: Callable[[Bio], None]) -> None:
        offset, length, buffer = chunk
        if op == OP_WRITE:
            offset += self._delta
        self._send(Bio(op, offset, length, buffer[:length], 0, endio, chunk))

    def _send(self, bio: Bio) -> None:
        """Submit a READ to the source, or a WRITE or WRITE_ZEROES to the destination."""
        copier = self._copier
        device = copier.source if bio.op == OP_READ else copier.destination
        if copier.behind and bio.op == OP_WRITE:
            device.submit_behind(bio)
        elif copier.behind and bio.op == OP_READ:
            device.submit_ahead(bio)
        elif copier.background and bio.length > INLINE_BYTES_MAX:
            device.submit_background(bio)
        else:
            device.submit(bio)

    def _chunk_ended(self, bio: Bio) -> None:
        chunk = bio.private
        assert isinstance(chunk, _Chunk)
        copier = self._copier
        if bio.status and self._error is None:
            is_read = bio.op == OP_READ
            device = copier.source if is_read else copier.destination
            offset = chunk.offset if is_read else chunk.offset + self._delta
            error = DeviceError(
                bio.status, device.name, OP_NAMES[bio.op], offset, chunk.length
            )
            self._error = CopyError(error, is_read=is_read)
            self._next = self._end  # start nothing more
        elif bio.op == OP_WRITE:
            copier.note_written(chunk.length)
        self._in_flight -= 1
        copier.give_back(chunk.buffer)
        self.pump()


class _Chunk(NamedTuple):
    """The place that a bio of a chunk copies: a mapped device below changes the offset in the bio itself.

    Attributes: offset: on the source.
    """

    offset: int
    length: int
    buffer: memoryview
