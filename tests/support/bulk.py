# SPDX-License-Identifier: Apache-2.0
"""A source that lends streams, and a writer, in memory: what bulk copies are tested with."""

import asyncio
import os
import threading

from nbdtarget.bio import Bio
from nbdtarget.devices.bulk_streams import BulkStream, Chunk, StreamLostError
from nbdtarget.devices.memory import MemoryDevice
from tests.support.peer import Disk

__all__ = ["LendingDisk", "MemoryFileDisk", "Stream", "WritableDisk", "Writer"]


class LendingDisk(MemoryDevice):
    """Reads `content`; lends `nr_streams` streams.

    Attributes:
        gate: cleared, streams hold their chunks back.
        errors: offset of a chunk -> errno.
        breaks_at: offset of a chunk at which the stream that has it breaks; `breaks`: each does.
        came_back: the reasons with which streams were given back.
    """

    def __init__(self, content: bytes, nr_streams: int = 3) -> None:
        super().__init__(len(content), name="source", read_only=True)
        self.content = content
        self.nr_to_lend = nr_streams
        self.gate = threading.Event()
        self.gate.set()
        self.errors: dict[int, int] = {}
        self.breaks_at = -1
        self.breaks = False
        self.came_back: list[str] = []
        self.errors_of_bios = 0

    def submit(self, bio: Bio) -> None:
        if self.errors_of_bios:
            bio.end(self.errors_of_bios)
            return
        super().submit(bio)

    async def write_content(self) -> None:
        """Have bios read the content, too."""
        self.read_only = False
        await self.write(0, self.content)

    def lend_streams(self) -> list[BulkStream]:
        streams: list[BulkStream] = [Stream(self) for _ in range(self.nr_to_lend)]
        self.nr_to_lend = 0
        return streams


class Stream:
    is_broken = False
    is_near = False

    def __init__(self, disk: LendingDisk) -> None:
        self.disk = disk
        self.asked: list[Chunk] = []

    def can_read(self, offset: int, length: int) -> bool:
        return (offset | length) % 512 == 0

    def start(self, chunks: list[Chunk]) -> None:
        self.asked += chunks

    def wait(self) -> list[Chunk]:
        self.disk.gate.wait()
        chunk = self.asked.pop()  # the last comes first: answers have no order
        if self.disk.breaks or chunk.offset == self.disk.breaks_at:
            raise StreamLostError("the server hung up")
        chunk.status = self.disk.errors.get(chunk.offset, 0)
        chunk.buffer[:] = self.disk.content[chunk.offset :][: chunk.length]
        return [chunk]

    def maybe_compiled(self) -> None:
        return None

    def lost_reason(self, sentence: str, error: int) -> str:
        raise AssertionError("there is no compiled half")

    def read_failed(self, status: int) -> int:
        return status

    def give_back(self, reason: str) -> None:
        self.disk.came_back.append(reason)
        self.disk.nr_to_lend += not reason


class WritableDisk(Disk):
    """Memory that threads write to, and bios.

    Attributes:
        errors: offset of a thread's write -> errno.
        nr_writes: of threads, that were tried.
        failed: the errnos that the device was told of.
        behind: what `write_behind` was asked for.
        behind_gate: cleared, `write_behind` waits.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.name = "destination"
        self.errors: dict[int, int] = {}
        self.nr_writes = 0
        self.failed: list[int] = []
        self.behind: list[list[tuple[int, int]]] = []
        self.behind_gate = asyncio.Event()
        self.behind_gate.set()

    def maybe_bulk_writer(self) -> "Writer":
        return Writer(self)

    def maybe_fd(self) -> int | None:
        """Return the file that compiled threads write to."""
        return None

    def content(self) -> bytes:
        return bytes(self.data)

    async def write_behind(self, ranges: list[tuple[int, int]]) -> None:
        self.behind.append(ranges)
        await self.behind_gate.wait()


class MemoryFileDisk(WritableDisk):
    """The same for compiled threads, which write to a file in memory."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.fd = os.memfd_create("destination")
        os.ftruncate(self.fd, size)

    def maybe_fd(self) -> int | None:
        return self.fd

    def content(self) -> bytes:
        return os.pread(self.fd, self.size, 0)

    async def close(self) -> None:
        os.close(self.fd)


class Writer:
    def __init__(self, disk: WritableDisk) -> None:
        self.disk = disk

    def write(self, data: memoryview, offset: int) -> int:
        self.disk.nr_writes += 1
        if (error := self.disk.errors.get(offset, 0)) == 0:
            self.disk.data[offset : offset + len(data)] = data
        return error

    def maybe_fd(self) -> int | None:
        return self.disk.maybe_fd()

    def write_failed(self, status: int) -> None:
        self.disk.failed.append(status)
