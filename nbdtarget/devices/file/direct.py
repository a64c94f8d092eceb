# SPDX-License-Identifier: Apache-2.0
"""`DirectDevice`: a regular file or a block device without the page cache (O_DIRECT).

Theory of operation. Everything goes through one descriptor that was opened with O_DIRECT, and nothing through the page cache.
So there is no second copy of any byte that would have to agree with the first. (What other programs
have cached of the file is the kernel's affair: it writes dirty pages back before a direct read, and drops them after a direct
write. `open.py` has dropped all of them before.)

    READ          through io_uring, or by a worker, into an aligned buffer; from there into the payload
    WRITE         by a worker, out of an aligned buffer
    FLUSH, FUA    as of a `FileDevice`. A direct write is in the disk by then, but perhaps only in the disk's cache, and the
                  file system may have to write down where it is
    the rest      as of a `FileDevice`

*Alignment.* Memory, offset and length of each system call are multiples of the `unit`, which the kernel tells. A client is
told to send such requests (`logical_block_size`). Others are cut out of the units around them when they are read. When they
are written, the unit at either end is read, changed and written back. Meanwhile no other write runs: it could be
to another part of the same unit, and would be undone. So they are correct, and slow.

*Errors.* A direct write tells its own error. It latches the device as one through the page cache does (`sync.py`).
"""

import errno as errnos
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from nbdtarget.bio import Bio
from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.bulk_streams import BulkStream
from nbdtarget.devices.file.buffers import ALIGNED_BUFFERS
from nbdtarget.devices.file.bulk import FileWriter
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.devices.file.pieces import WRITE_PIECE
from nbdtarget.devices.file.ring import maybe_reader
from nbdtarget.devices.file.space import Space
from nbdtarget.devices.file.syscalls import direct_unit
from nbdtarget.devices.identity import identify_fd
from nbdtarget.fast.compiled import FastFile
from nbdtarget_metadata.disks import Evidence

__all__ = ["PREFIX", "THREADS_MAX", "DirectDevice"]

PREFIX: Final = "direct:"  # of the name
PIECE: Final = 1 << 20  # bytes of one system call; more is done in several
THREADS_MAX: Final = 16  # they wait for the disk, and for nothing else
RING_READ_MAX: Final = 1 << 20


class DirectDevice(FileDevice):
    """See the module head. Made in `open.py`."""

    open_flags = os.O_DIRECT
    threads_max = THREADS_MAX
    _unit: int

    # ---- set-up ----

    def _probe(self) -> Space:
        """As of `FileDevice`. Raises: ResolveError: not for direct I/O."""
        space = super()._probe()
        unit = direct_unit(self._fd)
        if unit == 0:
            raise ResolveError(
                self.name, "its file system has no direct I/O: leave out direct:"
            )
        if self.size % unit:
            raise ResolveError(
                self.name, f"direct I/O needs a size that is a multiple of {unit} bytes"
            )
        self._unit = unit
        self.logical_block_size = max(unit, self.logical_block_size)
        self._behind = None
        self._read_inline_max = -1
        self._is_quick = False
        self._is_alone = False  # a write that is not aligned runs
        self._nr_writing = 0
        self._held: deque[tuple[bool, Callable[[], None]]] = deque()
        return Space(
            self._fd,
            unit=unit,
            is_block_device=self._is_block_device,
            can_zero_range=space.can_zero_range,
            write=self._put,
        )

    def _set_quick(self) -> None:
        """No write is ever made inline: it waits for the disk."""

    def maybe_fast_file(self) -> FastFile | None:
        return None

    def lend_streams(self) -> list[BulkStream]:
        return []  # the ends of a read are not always where the disk wants them

    def maybe_bulk_writer(self) -> FileWriter | None:
        return None  # its threads write through the page cache

    def start_writeback(self) -> None:
        """Nothing waits for that."""

    def _advise(self, offset: int, length: int) -> int:
        return 0  # there is no cache to fill

    async def identify(self, role: str) -> Evidence:
        path = self.bare_name.removeprefix(PREFIX)
        look = partial(identify_fd, path, self._fd, self.size, role)
        return await self._pool.ask(look, Evidence("", path, self.size))

    # ---- reads ----

    def _read_later(self, bio: Bio, got: int) -> None:
        bio.own()
        payload = bio.payload
        assert payload is not None
        begin, end = self._around(bio.offset, bio.length)
        reader = maybe_reader() if end - begin <= RING_READ_MAX else None
        if reader is not None:
            buffer = ALIGNED_BUFFERS.take(end - begin)
            done = partial(self._direct_read_done, bio, buffer, bio.offset - begin)
            if reader.read(self._fd, buffer[: end - begin], begin, done):
                self._note_ring_reads(1)
                return
            ALIGNED_BUFFERS.give(buffer)
        job = partial(self._get, payload, bio.offset)
        self._pool.submit(job, partial(self._read_done, bio))

    def _direct_read_done(
        self, bio: Bio, buffer: memoryview, skip: int, result: int
    ) -> None:
        self._note_ring_reads(-1)
        payload = bio.payload
        assert payload is not None
        if result >= skip + len(payload):
            payload[:] = buffer[skip : skip + len(payload)]
            ALIGNED_BUFFERS.give(buffer)
            bio.end(0)
            return
        ALIGNED_BUFFERS.give(buffer)
        # It came short, or failed: a worker meets the reason again, and tells it.
        job = partial(self._get, payload, bio.offset)
        self._pool.submit(job, partial(self._read_done, bio))

    def _get(self, payload: memoryview, offset: int) -> int:
        """Fill `payload` from `offset`. Context: a worker."""
        first, last = self._around(offset, len(payload))
        buffer = ALIGNED_BUFFERS.take(min(PIECE, last - first))
        try:
            got = 0
            while got < len(payload):
                begin, end = self._around(offset + got, len(payload) - got)
                end = min(end, begin + len(buffer))
                have = os.preadv(self._fd, (buffer[: end - begin],), begin)
                skip = offset + got - begin
                more = min(have - skip, len(payload) - got)
                if more <= 0:
                    return errnos.EIO  # the file has been truncated under us
                payload[got : got + more] = buffer[skip : skip + more]
                got += more
        finally:
            ALIGNED_BUFFERS.give(buffer)
        return 0

    # ---- writes ----

    def _write_later(self, bio: Bio, put: int, *, piece: int = WRITE_PIECE) -> None:
        bio.own()
        payload = bio.payload
        assert payload is not None
        job = partial(self._put, payload, bio.offset)
        self._start_write(bio, job, partial(self._write_done, bio))

    def _space_job(self, bio: Bio, job: Callable[[], int]) -> None:
        self._start_write(bio, job, partial(self._write_done, bio))

    def _start_write(
        self, bio: Bio, job: Callable[[], int], done: Callable[[int], None]
    ) -> None:
        """Run a job that changes the range of `bio`, in its turn: see *Alignment* in the module head."""
        is_alone = (bio.offset | bio.length) % self._unit != 0

        def ended(status: int) -> None:
            self._nr_writing -= 1
            self._is_alone = False
            self._start_held()
            done(status)

        self._held.append((is_alone, partial(self._pool.submit, job, ended)))
        self._start_held()

    def _start_held(self) -> None:
        """Start the writes that may run now, in the order in which they came."""
        while self._held and not self._is_alone:
            is_alone, start = self._held[0]
            if is_alone and self._nr_writing:
                return
            self._held.popleft()
            self._is_alone = is_alone
            self._nr_writing += 1
            start()

    @property
    def nr_in_flight(self) -> int:
        return super().nr_in_flight + len(self._held)

    def _put(self, payload: memoryview, offset: int) -> int:
        """Write `payload` at `offset`, with what lies around it in its units. Context: a worker."""
        unit = self._unit
        first, last = self._around(offset, len(payload))
        buffer = ALIGNED_BUFFERS.take(min(PIECE, last - first))
        try:
            for begin in range(first, last, len(buffer)):
                end = min(begin + len(buffer), last)
                piece = buffer[: end - begin]
                status = 0
                if begin < offset:
                    status = self._get(piece[:unit], begin)
                if end > offset + len(payload):
                    status = status or self._get(piece[-unit:], end - unit)
                if status:
                    return status
                here, there = max(begin, offset), min(end, offset + len(payload))
                piece[here - begin : there - begin] = payload[
                    here - offset : there - offset
                ]
                put = 0
                while put < len(piece):
                    more = os.pwritev(self._fd, (piece[put:],), begin + put)
                    if more == 0:
                        return errnos.EIO
                    put += more
        finally:
            ALIGNED_BUFFERS.give(buffer)
        return 0

    def _around(self, offset: int, length: int) -> tuple[int, int]:
        """The begin and end of the units that the range touches."""
        unit = self._unit
        return offset // unit * unit, -(-(offset + length) // unit) * unit
