# SPDX-License-Identifier: Apache-2.0
"""The log of one log device: what waits for a flush, what waits to be written, and the writer.

Theory of operation. A `Block` is one write on its way into the log:

    in flight   the bio is under way; the block has a copy of its data
    unflushed   the bio has ended, and no flush since: `unflushed`, in order of completion
    queued      to be written to the log, in this order: `append`
    logged      on the log device

One task writes the queue, as much as fits into BATCH_BYTES_MAX at a time, and ends when it is
empty: entries are written one after another, each batch before the next, so what the log
holds is always a beginning of what was done. Then comes the superblock, with the number of
entries, after each batch with a FUA write, a flush or a mark in it. (The kernel leaves out
flushes.) The first thing written is a superblock of no entries: an older log under this one is
never taken for its continuation.

The live and the inactive table of a mapped device share one `Log`: loading a new table goes
on with the log.

Memory is bounded, which the kernel's is not: `is_full` when blocks hold BYTES_HELD_MAX. Writes then wait
(`wait_for_room`) until some have been logged.

Logging ends for good (`disable`) when the log device is full or fails, as in the kernel: what is
queued is dropped, what is unflushed too; I/O to the disk itself goes on.

A crash leaves the log as far as the log device had it; it is flushed when it is closed.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from nbdtarget.common.errors import DeviceError
from nbdtarget.common.units import SECTOR
from nbdtarget.devices.base import Device
from nbdtarget.targets.log_writes.format import (
    DISCARD,
    END_MARK,
    FLUSH,
    FUA,
    MARK,
    Entry,
    pack_entry,
    pack_super,
)

__all__ = [
    "Block",
    "Log",
    "data_entry",
    "maybe_discard_entry",
]

BYTES_HELD_MAX: Final = 64 << 20
UNFLUSHED_BYTES_MAX: Final = 32 << 20
BATCH_BYTES_MAX: Final = 1 << 20

log = logging.getLogger(__name__)


class Block:
    """One entry to be, with the data that follows it.

    Attributes:
        cost: bytes that it counts for.
        logged: called once with whether it was logged, when that is known.
    """

    __slots__ = ("cost", "data", "entry", "logged")

    def __init__(
        self,
        entry: Entry,
        data: bytes | memoryview = b"",
        logged: Callable[[bool], None] | None = None,
    ) -> None:
        self.entry = entry
        self.data = data
        self.cost = SECTOR + len(data)
        self.logged = logged


class Log:
    """See the module head.

    Attributes:
        enabled: False once the log is full or has failed.
        nr_users: targets that hold it.
        started: I/O has been let go to it: closing it ends it with a mark.
        unflushed: blocks that wait for a flush, in order of completion.
        unflushed_bytes: that they count for.
        nr_logged: entries.
        next_sector: of 512 bytes; where the next entry goes.
    """

    def __init__(self, device: Device, sector_size: int, name: str) -> None:
        """Args: sector_size: bytes. name: of the mapped device, for messages."""
        self.device = device
        self.sector_size = sector_size
        self.enabled = True
        self.nr_users = 0
        self.started = False
        self.unflushed: list[Block] = []
        self.unflushed_bytes = 0
        self.nr_logged = 0
        self.next_sector = sector_size // SECTOR
        self._name = name
        self._end_sector = device.size // SECTOR
        self._queue: deque[Block] = deque()
        self._task: asyncio.Task[None] | None = None
        self._has_super = False
        self._bytes_held = 0
        self._waiting: deque[Callable[[], None]] = deque()

    @property
    def is_full(self) -> bool:
        """Whether a new write has to wait."""
        return bool(self._waiting) or self._bytes_held >= BYTES_HELD_MAX

    @property
    def is_flush_due(self) -> bool:
        """Whether too much waits for a flush, and no FLUSH has come."""
        return self.unflushed_bytes >= UNFLUSHED_BYTES_MAX

    def wait_for_room(self, ready: Callable[[], None]) -> None:
        """Call `ready` when there is room, or when logging has ended."""
        self._waiting.append(ready)

    def hold(self, block: Block) -> None:
        """Count a block whose bio is about to be sent."""
        self._bytes_held += block.cost

    def drop(self, blocks: Iterable[Block]) -> None:
        """Forget blocks that were held."""
        for block in blocks:
            self._settle(block, logged=False)
        self._let_wait_end()

    def completed(self, block: Block) -> None:
        """The block's bio has ended well; it is logged when a flush has covered it."""
        if not self.enabled:
            self.drop([block])
            return
        self.unflushed.append(block)
        self.unflushed_bytes += block.cost

    def take_unflushed(self) -> list[Block]:
        """Take the writes that a FLUSH submitted now covers."""
        taken, self.unflushed = self.unflushed, []
        self.unflushed_bytes = 0
        return taken

    def put_back_unflushed(self, taken: list[Block]) -> None:
        """That FLUSH has failed."""
        if not self.enabled:
            self.drop(taken)
            return
        self.unflushed[:0] = taken
        self.unflushed_bytes += sum(block.cost for block in taken)

    def append(self, blocks: Iterable[Block]) -> None:
        """Log blocks that are held, in this order, behind those appended before."""
        if not self.enabled:
            self.drop(blocks)
            return
        self._queue.extend(blocks)
        if self._queue and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._write_queue())

    def disable(self, reason: str) -> None:
        """Log nothing any more."""
        log.error("%s: %s: %s: logging disabled", self._name, self.device.name, reason)
        self.enabled = False
        dropped = [*self._queue, *self.take_unflushed()]
        self._queue.clear()
        self.drop(dropped)

    async def mark(self, text: bytes) -> bool:
        """Log a mark; returns whether it is in the log, superblock and all."""
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def logged(answer: bool) -> None:
            if not done.done():
                done.set_result(answer)

        block = Block(Entry(0, 0, MARK, text), logged=logged)
        self.hold(block)
        self.append([block])
        return await done

    async def idle(self) -> None:
        """Wait until all that was appended is logged, or dropped."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def end(self) -> None:
        """Log what no flush has covered, then the last mark. Durable: the log."""
        if self.started:
            self.append(self.take_unflushed())
            await self.mark(END_MARK.encode())
        await self.idle()
        if self.started and self.enabled:
            await self.device.flush()

    async def _write_queue(self) -> None:
        try:
            if not self._has_super:
                await self._write_super()
                self._has_super = True
            while self._queue:
                await self._write_batch()
        except DeviceError as error:
            self.disable(f"Error writing log: {error}")
        except Exception as error:
            # A bug of ours. The log must end here: it would have a gap.
            log.exception("%s: %s", self._name, self.device.name)
            self.disable(f"Error writing log: {error!r}")
        finally:
            self._task = None

    async def _write_batch(self) -> None:
        """Write the head of the queue, and the superblock if it asks for one."""
        unit = self.sector_size // SECTOR
        batch: list[Block] = []
        buffer = bytearray()
        end = self.next_sector
        has_room = True
        while self._queue and len(buffer) < BATCH_BYTES_MAX:
            entry = self._queue[0].entry
            end += (1 + entry.nr_data_sectors) * unit
            has_room = end < self._end_sector
            if not has_room:
                break
            block = self._queue.popleft()
            buffer += pack_entry(entry, self.sector_size)
            buffer += block.data
            batch.append(block)
        try:
            if buffer:
                await self.device.write(self.next_sector * SECTOR, buffer)
                self.next_sector += len(buffer) // SECTOR
                self.nr_logged += len(batch)
            if not has_room or any(
                block.entry.flags & (FUA | FLUSH | MARK) for block in batch
            ):
                await self._write_super()
        except BaseException:
            self.drop(batch)
            raise
        for block in batch:
            self._settle(block, logged=True)
        if not has_room:
            self.disable("Ran out of space on the logdev")
        self._let_wait_end()

    async def _write_super(self) -> None:
        await self.device.write(0, pack_super(self.nr_logged, self.sector_size))

    def _settle(self, block: Block, *, logged: bool) -> None:
        self._bytes_held -= block.cost
        assert self._bytes_held >= 0
        if block.logged is not None:
            block.logged(logged)

    def _let_wait_end(self) -> None:
        while self._waiting and (self._bytes_held < BYTES_HELD_MAX or not self.enabled):
            self._waiting.popleft()()


def data_entry(offset: int, length: int, flags: int, sector_size: int) -> Entry:
    """An entry about whole sectors; `offset` and `length` are bytes."""
    assert offset % sector_size == length % sector_size == 0
    assert not flags & MARK
    return Entry(offset // sector_size, length // sector_size, flags)


def maybe_discard_entry(offset: int, length: int, sector_size: int) -> Entry | None:
    """An entry about the whole sectors in a range; None if there are none."""
    begin = -(-offset // sector_size)
    end = (offset + length) // sector_size
    return Entry(begin, end - begin, DISCARD) if begin < end else None
