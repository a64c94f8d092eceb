# SPDX-License-Identifier: Apache-2.0
"""The `scratch` target: a throw-away writable copy of an image, which a message resets.

    <golden dev> <offset> <store dev> [<#feature args> [max_sectors <sectors>]]

The kernel has no such target. Many of them stand on one golden device, which is only read. Written data goes to the
store, at the same place, and nowhere else.

**Nothing here is durable, and nothing is meant to be.** FLUSH and FUA end at once, and no sync is made. Written data
is there until the table goes: a table that is constructed anew begins as the golden device is, and not with what the store holds. So
that no disk is taken for a store by mistake, a store that holds data is refused, unless the command allows to overwrite it.

Theory of operation. A bitmap in memory (`nbdtarget.targets.scratch.sector_map`) says which sectors were written.

    READ               runs of written sectors come from the store, all others from the golden device
    WRITE              goes to the store. Its sectors count as written when it has ended: until then a read sees the
                       golden device, never what the store held before
    part of a sector   alone (below): the sector is read, changed and written
    FLUSH, DISCARD     end, and do nothing
    max_sectors        a write of more new sectors than are left ends with ENOSPC

message `reset`: alone, the bitmap is emptied, and the store is discarded, so that its space comes back. Every bio that came before
has ended by then, or sees what it was; every bio that comes later sees the golden device.

*Alone* means: new bios are held back, and those that are at the store end first. A suspend waits for all that, because a
held bio is one in flight.

A client that keeps what it has read (a mounted file system) does not notice a reset: NBD has no way to say it. Reset a
disk when its file system is not mounted.
"""

import asyncio
import errno as errnos
from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import MappingProxyType
from typing import Final

from nbdtarget.bio import FUA, OP_CACHE, OP_DISCARD, OP_FLUSH, OP_READ, Bio, split_bio
from nbdtarget.common.errors import ConstructorError, DeviceError, TableError
from nbdtarget.common.permissions import OVERWRITE
from nbdtarget.common.turns import Tasks
from nbdtarget.common.units import SECTOR
from nbdtarget.common.words import quote_word
from nbdtarget.devices.base import (
    EXTENT_DATA,
    EXTENTS_MAX,
    Device,
    Extent,
    append_extent,
)
from nbdtarget.devices.content import maybe_content
from nbdtarget.targets.arguments import (
    SECTORS_MAX,
    Run,
    Runs,
    close_all,
    parse_sectors,
    read_argument,
)
from nbdtarget.targets.base import (
    REMAPPED,
    SUBMITTED,
    StatusFields,
    Target,
    TargetContext,
)
from nbdtarget.targets.scratch.sector_map import SectorMap

__all__ = ["ScratchTarget"]

SHARED_KEY: Final = "scratch"
FEATURE_WORDS_MAX: Final = 2


class ScratchTarget(Target):
    """See the module head."""

    type_name = "scratch"
    volatile_state = "what was written since the last reset"
    version = (1, 0, 0)
    messages = MappingProxyType(
        {
            "reset": "Forget everything that was written, while clients stay attached: the disk is the golden image again."
        }
    )
    can_discard = True

    def __init__(
        self, ctx: TargetContext, golden: Run, store: Device, sectors_max: int
    ) -> None:
        super().__init__(ctx)
        self._golden = golden
        self._delta = golden.start - self.begin
        self._store = store
        self._sectors_max = sectors_max
        self._written = SectorMap()
        self._nr_reserved = 0  # sectors that writes under way may add
        self._nr_at_store = 0  # bios
        self._idle: asyncio.Future[None] | None = None
        self._held: list[Bio] | None = None
        self._turn = asyncio.Lock()
        self._tasks = Tasks()
        self._nr_resets = 0
        self._is_new = True

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "ScratchTarget":
        start_sectors, sectors_max = cls._numbers(args, ctx.length // SECTOR)
        async with Runs(ctx, cls.type_name) as runs:
            golden = await runs.open(
                args[0], start_sectors, ctx.length, read_only=True, shared=False
            )
            store = await runs.open_alone(args[2], "Store lookup failed")
            if store.size < ctx.length:
                raise _error(
                    f"store {store.name} is too small: it has {store.size} bytes, not"
                    f" {ctx.length}"
                )
            shared = ctx.shared(store)
            # The other table of this device may be using it: then what it holds is ours.
            if SHARED_KEY not in shared:
                await _refuse_content(ctx, store)
                shared[SHARED_KEY] = True
            return cls(ctx, golden, store, sectors_max)

    @classmethod
    def check_words(cls, args: Sequence[str]) -> None:
        cls._numbers(args, SECTORS_MAX)

    @classmethod
    def _numbers(cls, args: Sequence[str], nr_sectors: int) -> tuple[int, int]:
        """Return the start, and most sectors that may be written. Raises: ConstructorError."""
        if len(args) < 3:
            raise _error("Invalid argument count")
        start_sectors = parse_sectors(args[1])
        if start_sectors is None:
            raise _error("Invalid device sector")
        words = list(args[3:])
        if words in ([], ["0"]):
            return start_sectors, nr_sectors
        reason = "Invalid number of feature arguments"
        count = read_argument(words[0], 0, FEATURE_WORDS_MAX, reason, cls.type_name)
        if count != len(words) - 1 or count != FEATURE_WORDS_MAX:
            raise _error(reason)
        if words[1].lower() != "max_sectors":
            raise _error("Invalid feature argument")
        reason = "Invalid max_sectors"
        bound = read_argument(words[2], 1, SECTORS_MAX, reason, cls.type_name)
        return start_sectors, bound

    async def dtr(self) -> None:
        await close_all(self.ctx, (self._golden.device, self._store))

    async def preresume(self) -> None:
        if self._is_new and self._store.can_discard:
            # Discard the data that another table of this device has left there.
            try:
                await self._store.discard(0, self.length)
            except DeviceError as error:
                raise TableError(str(error), error.errno) from error
        self._is_new = False

    def map(self, bio: Bio) -> int:
        op = bio.op
        if op in (OP_FLUSH, OP_DISCARD):
            bio.end(0)
            return SUBMITTED
        if self._held is not None:
            bio.own()
            self._held.append(bio)
            return SUBMITTED
        if not bio.length:
            bio.end(0)
            return SUBMITTED
        if op in (OP_READ, OP_CACHE):
            return self._map_read(bio)
        offset = bio.offset - self.begin
        if offset % SECTOR or bio.length % SECTOR:
            bio.own()
            self._tasks.start(self._alone(lambda: self._write_parts(bio, offset)))
            return SUBMITTED
        return self._map_write(bio, offset // SECTOR, bio.length // SECTOR)

    def _map_read(self, bio: Bio) -> int:
        offset, length = bio.offset - self.begin, bio.length
        first = offset // SECTOR
        count = -(-(offset + length) // SECTOR) - first
        if self._written.nr_missing(first, count) == count:
            bio.device = self._golden.device
            bio.offset += self._delta
            return REMAPPED
        runs = self._written.runs(first, count, count)
        if len(runs) == 1:
            return self._to_store(bio)
        lengths = [nr * SECTOR for nr, _ in runs]
        lengths[0] -= offset - first * SECTOR
        lengths[-1] -= (first + count) * SECTOR - (offset + length)
        for piece, (_, is_written) in zip(split_bio(bio, lengths), runs, strict=True):
            if is_written:
                self._to_store(piece)
            else:
                piece.device = self._golden.device
                piece.offset += self._delta
            piece.device.submit(piece)
        return SUBMITTED

    def _map_write(self, bio: Bio, first: int, count: int) -> int:
        nr_new = self._written.nr_missing(first, count)
        used = self._written.nr_sectors + self._nr_reserved
        if nr_new and used + nr_new > self._sectors_max:
            bio.end(errnos.ENOSPC)
            return SUBMITTED
        if nr_new:
            self._nr_reserved += nr_new

            def ended(bio: Bio) -> None:
                self._nr_reserved -= nr_new
                if not bio.status:
                    self._written.add(first, count)

            bio.on_end(ended)
        if not bio.flags & FUA:
            return self._to_store(bio)
        (child,) = split_bio(bio, [bio.length])
        child.flags &= ~FUA
        self._to_store(child)
        self._store.submit(child)
        return SUBMITTED

    def _to_store(self, bio: Bio) -> int:
        self._nr_at_store += 1
        bio.on_end(self._store_ended)
        bio.device = self._store
        bio.offset -= self.begin
        return REMAPPED

    def _store_ended(self, _: Bio) -> None:
        self._nr_at_store -= 1
        if not self._nr_at_store and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
            self._idle = None

    async def _alone(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` while no bio is at the store, and none comes."""
        async with self._turn:
            self._held = []
            try:
                if self._nr_at_store:
                    self._idle = asyncio.get_running_loop().create_future()
                    await self._idle
                await work()
            finally:
                held, self._held = self._held, None
                for bio in held:
                    # One of them may have to be alone: then the others are held again.
                    if self.map(bio) == REMAPPED:
                        bio.device.submit(bio)

    async def _write_parts(self, bio: Bio, offset: int) -> None:
        """Write parts of sectors."""
        assert bio.payload is not None
        first = offset // SECTOR
        count = -(-(offset + bio.length) // SECTOR) - first
        status = 0
        nr_new = self._written.nr_missing(first, count)
        if nr_new and self._written.nr_sectors + nr_new > self._sectors_max:
            status = errnos.ENOSPC
        else:
            try:
                data = bytearray(count * SECTOR)
                for nr in {first, first + count - 1}:
                    at = (nr - first) * SECTOR
                    data[at : at + SECTOR] = await self._read_sector(nr)
                at = offset - first * SECTOR
                data[at : at + bio.length] = bio.payload
                await self._store.write(first * SECTOR, data)
                self._written.add(first, count)
            except DeviceError as error:
                status = error.errno
        bio.end(status)

    async def _read_sector(self, nr: int) -> memoryview:
        if self._written.nr_missing(nr, 1):
            golden = self._golden
            return await golden.device.read(golden.start + nr * SECTOR, SECTOR)
        return await self._store.read(nr * SECTOR, SECTOR)

    async def message(self, words: Sequence[str]) -> str | None:
        if [word.lower() for word in words] != ["reset"]:
            raise self.unknown_message(words)
        nr_sectors = 0

        async def reset() -> None:
            nonlocal nr_sectors
            nr_sectors = self._written.nr_sectors
            self._written.clear()
            self._nr_resets += 1
            if nr_sectors and self._store.can_discard:
                await self._store.discard(0, self.length)

        try:
            await self._alone(reset)
        except DeviceError as error:
            raise TableError(
                f"the disk is reset, but its space does not come back: {error}",
                error.errno,
            ) from error
        return f"{nr_sectors} sectors dropped"

    async def postsuspend(self) -> None:
        await self._tasks.wait()

    async def status(self, *, noflush: bool = False) -> str:
        return f"{self._written.nr_sectors}/{self._sectors_max} {self._nr_resets}"

    def status_fields(self) -> StatusFields:
        return {
            "written_bytes": self._written.nr_sectors * SECTOR,
            "max_bytes": self._sectors_max * SECTOR,
            "nr_resets": self._nr_resets,
        }

    def table_words(self) -> str:
        words = [self._golden.words, quote_word(self._store.name)]
        if self._sectors_max != self.length // SECTOR:
            words.append(f"2 max_sectors {self._sectors_max}")
        return " ".join(words)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        offset -= self.begin
        first = offset // SECTOR
        count = -(-(offset + length) // SECTOR) - first
        end = offset + length
        found: list[Extent] = []
        at = offset
        for nr, is_written in self._written.runs(first, count, EXTENTS_MAX):
            run_end = min(end, at - at % SECTOR + nr * SECTOR)
            if is_written:
                append_extent(found, run_end - at, EXTENT_DATA)
                at = run_end
                continue
            start = self._golden.start
            for extent in await self._golden.device.extents(start + at, run_end - at):
                append_extent(found, *extent)
                at += extent.length
            if at < run_end:
                break  # it has described less than was asked for, and so do we
        return found

    def iterate_devices(self) -> Iterable[Device]:
        return (self._golden.device, self._store)

    def exclusive_devices(self) -> Iterable[Device]:
        return (self._store,)


async def _refuse_content(ctx: TargetContext, store: Device) -> None:
    if OVERWRITE in ctx.permissions:
        return
    content = await maybe_content(store)
    if content is not None:
        raise ConstructorError(
            f"store {store.name} {content}: name an empty one, or give --overwrite if what"
            " it holds may be lost",
            errnos.EEXIST,
            ScratchTarget.type_name,
            OVERWRITE,
        )


def _error(reason: str) -> ConstructorError:
    return ConstructorError(reason, target=ScratchTarget.type_name)
