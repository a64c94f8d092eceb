# SPDX-License-Identifier: Apache-2.0
"""The `log-writes` target: a disk, and a log of all that was done to it, for replay.

    <dev> <log dev>        message: mark <text>

Theory of operation. I/O goes to the device unchanged. Its changes are logged in order of
*completion*, once it can no longer be lost:

    READ, CACHE     not logged
    WRITE + FUA     logged when it has ended
    WRITE, DISCARD  wait, once ended, for a flush
    FLUSH           takes along what had ended when it was *submitted*; when it has ended,
                    these are logged, then the flush itself. Writes that end meanwhile wait for
                    the next one
    mark            logged at once, before what still waits for a flush
    destruction     what waits is logged, then the mark `dm-log-writes-end`

No bio waits for the log, except that with 64 MiB of blocks in memory new writes wait for room
(and, at half of that, the device is flushed without being asked, so that there will be room: what
this covers is logged, without a flush entry). The kernel has no such bound.

The flush that a suspend of ours sends (`UNASKED`), and the kernel's does not, is passed on and leaves the log as
it is: the log is the same as the kernel's for the same requests. The flushes that a `clone` or `cache` above
needs for its commits are logged, for it is a user of the disk.

A bio that failed is not logged, and a FLUSH that failed takes nothing along; the kernel logs
both. A zeroing is logged as a write of zeroes. A write of part of a sector is logged as the whole
sector, so it reads that first; such writes go one after another.

Sectors in the log are as large as the device's logical blocks.
"""

import asyncio
import errno as errnos
from collections.abc import Callable, Coroutine, Iterable, Sequence
from types import MappingProxyType
from typing import Final

from nbdtarget.bio import (
    FUA,
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    UNASKED,
    Bio,
)
from nbdtarget.common.errors import ConstructorError, DeviceError, TableError
from nbdtarget.common.turns import Tasks
from nbdtarget.common.words import quote_word
from nbdtarget.devices.base import Device, Extent
from nbdtarget.targets.arguments import Runs, close_all
from nbdtarget.targets.base import (
    REMAPPED,
    SUBMITTED,
    StatusFields,
    Target,
    TargetContext,
)
from nbdtarget.targets.log_writes import format as log_format
from nbdtarget.targets.log_writes.log import (
    Block,
    Log,
    data_entry,
    maybe_discard_entry,
)

__all__ = ["LogWritesTarget"]

SHARED_KEY: Final = "log-writes"


class LogWritesTarget(Target):
    """See the module head. Source: drivers/md/dm-log-writes.c."""

    type_name = "log-writes"
    volatile_state = "the place in the log"
    version = (1, 1, 0)
    messages = MappingProxyType(
        {"mark TEXT": "Write a mark into the log, up to which replay-log can replay."}
    )
    can_discard = True

    def __init__(self, ctx: TargetContext, device: Device, log: Log) -> None:
        super().__init__(ctx)
        self._device = device
        self._log = log
        log.nr_users += 1
        self._sector_size = log.sector_size
        self._flushing = False
        # Writes of parts of sectors: one at a time, or two neighbours would undo each other.
        self._part_lock = asyncio.Lock()
        self._tasks = Tasks()

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "LogWritesTarget":
        if len(args) < 2:
            raise ConstructorError("Invalid argument count", target=cls.type_name)
        async with Runs(ctx, cls.type_name) as runs:
            device, _ = await runs.open(args[0], 0, ctx.length)
            log_device = await runs.open_alone(args[1], "Log device lookup failed")
        # The other table of this mapped device may have the log open: it goes on.
        shared = ctx.shared(log_device)
        log = shared.get(SHARED_KEY)
        if not isinstance(log, Log) or log.sector_size != device.logical_block_size:
            log = Log(log_device, device.logical_block_size, ctx.name)
            shared[SHARED_KEY] = log
        return cls(ctx, device, log)

    async def dtr(self) -> None:
        self._log.nr_users -= 1
        try:
            if self._log.nr_users == 0:
                await self._log.end()
        finally:
            await close_all(self.ctx, (self._device, self._log.device))

    def map(self, bio: Bio) -> int:
        bio.device = self._device
        op = bio.op
        if op != OP_FLUSH:
            bio.offset -= self.begin
        if op in (OP_READ, OP_CACHE) or not self._log.enabled:
            return self._pass(bio)
        if bio.flags & UNASKED:
            return REMAPPED
        if op == OP_FLUSH:
            return self._map_flush(bio)
        if not bio.length:
            return REMAPPED
        if self._log.is_full:
            bio.own()
            self._log.wait_for_room(lambda: self._map_waiting(bio))
            self._flush_unasked()
            return SUBMITTED
        return self._map_change(bio)

    def _pass(self, bio: Bio) -> int:
        """Send on what is not logged."""
        if bio.op == OP_DISCARD and not self._device.can_discard:
            bio.end(0)
            return SUBMITTED
        return REMAPPED

    def _map_waiting(self, bio: Bio) -> None:
        change = self._map_change if self._log.enabled else self._pass
        if change(bio) == REMAPPED:
            self._device.submit(bio)

    def _map_change(self, bio: Bio) -> int:
        """A WRITE or a DISCARD, for which there is room."""
        size = self._sector_size
        if bio.op == OP_DISCARD:
            entry = maybe_discard_entry(bio.offset, bio.length, size)
            if entry is not None:
                self._hold(bio, Block(entry))
            return self._pass(bio)
        assert bio.op == OP_WRITE
        if bio.offset % size or bio.length % size:
            bio.own()
            self._start(self._write_part(bio))
            return SUBMITTED
        assert bio.payload is not None
        if bio.borrowed:
            bio.own()
            data: bytes | memoryview = bio.payload
        else:
            data = bytes(bio.payload)  # whose it is may change it as soon as this ends
        flags = log_format.FUA if bio.flags & FUA else 0
        self._hold(bio, Block(data_entry(bio.offset, bio.length, flags, size), data))
        return REMAPPED

    def _hold(self, bio: Bio, block: Block) -> None:
        self._log.hold(block)

        def ended(bio: Bio) -> None:
            if bio.status:
                self._log.drop([block])
            else:
                self._changed(block)

        bio.on_end(ended)

    def _changed(self, block: Block) -> None:
        """The bio has ended with 0: what becomes of its block?"""
        if block.entry.flags & log_format.FUA:
            self._log.append([block])
            return
        self._log.completed(block)
        if self._log.is_flush_due:
            self._flush_unasked()

    async def _write_part(self, bio: Bio) -> None:
        """Write parts of sectors; log these sectors whole."""
        size = self._sector_size
        assert bio.payload is not None
        fua = bool(bio.flags & FUA)
        begin = bio.offset // size * size
        end = -(-(bio.offset + bio.length) // size) * size
        async with self._part_lock:
            try:
                data = bytearray(end - begin)
                for at in {begin, end - size}:
                    edge = await self._device.read(at, size)
                    data[at - begin : at - begin + size] = edge
                at = bio.offset - begin
                data[at : at + bio.length] = bio.payload
                await self._device.write(bio.offset, bio.payload, fua=fua)
            except DeviceError as error:
                bio.end(error.errno)
                return
            flags = log_format.FUA if fua else 0
            entry = data_entry(begin, end - begin, flags, size)
            block = Block(entry, bytes(data))
            self._log.hold(block)
            self._changed(block)
        bio.end(0)

    def _map_flush(self, bio: Bio) -> int:
        flush = Block(log_format.Entry(0, 0, log_format.FLUSH))
        self._log.hold(flush)
        bio.on_end(self._flush_ended(self._log.take_unflushed(), flush))
        return REMAPPED

    def _flush_ended(self, taken: list[Block], flush: Block) -> Callable[[Bio], None]:
        def ended(bio: Bio) -> None:
            if bio.status:
                self._log.put_back_unflushed(taken)
                self._log.drop([flush])
            else:
                self._log.append([*taken, flush])

        return ended

    def _flush_unasked(self) -> None:
        """Make room: once flushed, what waits can be logged."""
        if not self._flushing and self._log.unflushed:
            self._flushing = True
            self._start(self._flush_until_there_is_room())

    async def _flush_until_there_is_room(self) -> None:
        log = self._log
        try:
            # Writes that end while a flush is under way may be too many again.
            while log.unflushed and (log.is_full or log.is_flush_due):
                taken = log.take_unflushed()
                try:
                    await self._device.flush()
                except DeviceError as error:
                    log.drop(taken)
                    log.disable(f"cannot make room: {error}")
                    return
                log.append(taken)
        finally:
            self._flushing = False

    def _start(self, steps: Coroutine[None, None, None]) -> None:
        self._tasks.start(steps)

    def resume(self) -> None:
        self._log.started = True

    async def postsuspend(self) -> None:
        await self._tasks.wait()
        await self._log.idle()

    async def message(self, words: Sequence[str]) -> str | None:
        if len(words) != 2:
            raise self.unknown_message(
                words,
                "Invalid log-writes message arguments, expect 2 arguments,"
                f" got {len(words)}",
            )
        if words[0].lower() != "mark":
            raise self.unknown_message(
                words, f"Unrecognised log writes target message received: {words[0]}"
            )
        text = words[1].encode("utf-8", "surrogateescape")
        length_max = self._sector_size - log_format.ENTRY_SIZE - 1
        if len(text) > length_max:
            raise TableError(f"Invalid argument: a mark has {length_max} bytes at most")
        if not await self._log.mark(text):
            raise TableError("not logged: logging_disabled", errnos.EIO)
        return None

    async def status(self, *, noflush: bool = False) -> str:
        log = self._log
        disabled = "" if log.enabled else " logging_disabled"
        return f"{log.nr_logged} {log.next_sector - 1}{disabled}"

    def status_fields(self) -> StatusFields:
        return {
            "nr_logged_entries": self._log.nr_logged,
            "highest_sector": self._log.next_sector - 1,
            "logging": self._log.enabled,
        }

    def table_words(self) -> str:
        return f"{quote_word(self._device.name)} {quote_word(self._log.device.name)}"

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await self._device.extents(offset - self.begin, length)

    def iterate_devices(self) -> Iterable[Device]:
        return (self._device, self._log.device)

    def exclusive_devices(self) -> Iterable[Device]:
        return (self._log.device,)
