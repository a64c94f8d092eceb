# SPDX-License-Identifier: Apache-2.0
"""The `powercut` target: a disk with a volatile write cache, whose power can be cut by message.

    <dev> <offset> [<#feature args> [volatile_cache_max <sectors>] [tear_size 512|4096]]

The kernel has no such target. It is for testing a file system, a database, or any other client
against a power failure, over plain NBD.

Theory of operation. A write without FUA goes to the cache in memory (`nbdtarget.targets.powercut.volatile_cache`)
and ends at once; reads see it. The device below is the medium:

    FLUSH          what had been written when it came goes to the medium, which is flushed
    WRITE + FUA    goes to the medium with FUA, before it ends; nothing else does
    cache full     the oldest half goes to the medium early, as drives do; new writes wait for it
    DISCARD        ends, and does nothing; a zeroing is a write of zeroes

    message                            the power goes, and of the writes in the cache
    cut keep                           all reach the medium
    cut drop                           none
    cut tear [SEED]                    of each some part, between borders of tear_size, in any order
    cut mixed [SEED]                   each is kept, dropped or torn by itself, in any order
    on                                 the power is back
    cycle keep|drop|tear|mixed [SEED]  cut and on in one

From a cut to `on` every bio ends with EIO, as with a machine that is off; those in flight do
too, and what they would have promised is not kept. Without a SEED one is drawn, and told in the
answer: the same seed with the same writes in the cache leaves the same disk.

Data on the medium is safe from these cuts, flushed or not; from a real one it is as safe
as the device below makes it: FLUSH and FUA are passed on to it. A suspend brings the whole cache
to the medium, so that nothing is lost by a reload or a removal without a cut.

A cut is not reported to other targets. A user of this disk that keeps a state of its own in memory (a
clone, a mounted file system) must start anew after it, as after a real one.

Everything but reads and writes of whole sectors runs one at a time, in the order in which it came. A
bio that waits there was not promised anything yet.
"""

import asyncio
import errno as errnos
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import MappingProxyType
from typing import Final

from nbdtarget.bio import FUA, OP_CACHE, OP_FLUSH, OP_READ, Bio
from nbdtarget.common.errors import ConstructorError, DeviceError, TableError
from nbdtarget.common.turns import Tasks
from nbdtarget.common.units import SECTOR
from nbdtarget.devices.base import EXTENT_DATA, Device, Extent
from nbdtarget.targets.arguments import (
    UINT32_MAX,
    Run,
    Runs,
    parse_sectors,
    parse_uint,
    read_argument,
)
from nbdtarget.targets.base import (
    KILL,
    REMAPPED,
    SUBMITTED,
    StatusFields,
    Target,
    TargetContext,
)
from nbdtarget.targets.powercut.volatile_cache import (
    BORDERS,
    Fate,
    Sectors,
    VolatileCache,
    covering,
    lay_over,
    split_sectors,
    survivors,
)

__all__ = ["PowercutTarget"]

VOLATILE_CACHE_SECTORS: Final = 131072  # 64 MiB, by default
WRITE_BYTES_MAX: Final = 1 << 20  # to the medium, in one go
FEATURE_WORDS_MAX: Final = 4
_SEED_MAX: Final = (1 << 64) - 1

log = logging.getLogger(__name__)


class _PowerIsOff(Exception):
    """The power was cut while this bio was under way."""


class PowercutTarget(Target):
    """See the module head."""

    type_name = "powercut"
    volatile_state = "what the volatile cache holds"
    version = (1, 0, 0)
    messages = MappingProxyType(
        {
            "cut keep|drop|tear|mixed [SEED]": "Cut the power, and leave it off. Of the writes that no flush has covered, all survive (keep), none (drop), a part of each (tear), or each of them in one of these ways (mixed).",
            "cycle keep|drop|tear|mixed [SEED]": "Cut the power in the same way, and switch it on again at once.",
            "on": "Switch the power on.",
        }
    )

    def __init__(
        self, ctx: TargetContext, run: Run, sectors_max: int, tear_size: int
    ) -> None:
        """Args: sectors_max: of the cache. tear_size: bytes."""
        super().__init__(ctx)
        self._run = run
        self._medium = run.device
        self._delta = run.start - self.begin
        self._sectors_max = sectors_max
        self._tear_size = tear_size
        self._cache = VolatileCache()
        self._is_on = True
        self._nr_cuts = 0
        self._turn = asyncio.Lock()
        self._tasks = Tasks()

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "PowercutTarget":
        if len(args) < 2:
            raise _error("Invalid argument count")
        start_sectors = parse_sectors(args[1])
        if start_sectors is None:
            raise _error("Invalid device sector")
        sectors_max, tear_size = parse_features(args[2:])
        async with Runs(ctx, cls.type_name) as runs:
            # Data that is not flushed is here only: nothing else may read the device, or write to it.
            run = await runs.open(args[0], start_sectors, ctx.length, shared=False)
            return cls(ctx, run, sectors_max, tear_size)

    async def dtr(self) -> None:
        await self.ctx.close_device(self._medium)

    def map(self, bio: Bio) -> int:
        if not self._is_on:
            return KILL
        op = bio.op
        if op == OP_FLUSH:
            mark = self._cache.mark
            self._start(bio, lambda life: self._flush(mark, life))
            return SUBMITTED
        if op in (OP_READ, OP_CACHE):
            return self._map_read(bio)
        offset = bio.offset - self.begin
        assert bio.payload is not None
        if (
            bio.flags & FUA
            or offset % SECTOR
            or bio.length % SECTOR
            or self._cache.nr_sectors >= self._sectors_max
        ):
            bio.own()
            self._start(bio, lambda life: self._write(bio, offset, life))
        else:
            if bio.length:
                self._cache.write(split_sectors(offset // SECTOR, bio.payload))
            bio.end(0)
        return SUBMITTED

    def _map_read(self, bio: Bio) -> int:
        offset = bio.offset - self.begin
        bio.device = self._medium
        bio.offset += self._delta
        if bio.op == OP_READ:
            # Looked up now: a flush may bring them to the medium, and forget them, before the
            # read of the medium ends, but after it was carried out.
            sectors = self._cache.newest(covering(offset, bio.length))
            if sectors:
                bio.on_end(lambda ended: _overlay(ended, sectors, offset))
        return REMAPPED

    def _start(self, bio: Bio, work: Callable[[int], Awaitable[None]]) -> None:
        """Run `work` when it is its turn; then end `bio`."""
        self._tasks.start(self._take_turn(bio, work))

    async def _take_turn(
        self, bio: Bio, work: Callable[[int], Awaitable[None]]
    ) -> None:
        life = self._nr_cuts
        status = 0
        async with self._turn:
            try:
                self._check_power(life)
                await work(life)
            except DeviceError as error:
                status = error.errno
            except _PowerIsOff:
                status = errnos.EIO
        bio.end(status)

    def _check_power(self, life: int) -> None:
        if self._nr_cuts != life:
            raise _PowerIsOff

    async def _flush(self, mark: int, life: int) -> None:
        await self._write_back(mark, life)
        await self._medium.flush()
        self._check_power(life)

    async def _write(self, bio: Bio, offset: int, life: int) -> None:
        """A write with FUA, or of parts of sectors, or for which there is no room."""
        cache = self._cache
        if cache.nr_sectors >= self._sectors_max:
            await self._write_back(self._half_mark(), life)
        sectors = await self._whole_sectors(bio, offset)
        self._check_power(life)
        if not sectors:
            return
        mark = cache.write(sectors).seq
        if bio.flags & FUA:
            await self._write_down(sectors, life, fua=True)
            cache.supersede(range(min(sectors), max(sectors) + 1), mark)

    async def _whole_sectors(self, bio: Bio, offset: int) -> Sectors:
        """The sectors that a write touches, as they are after it."""
        assert bio.payload is not None
        numbers = covering(offset, bio.length)
        begin, end = numbers.start * SECTOR, numbers.stop * SECTOR
        data = bytearray(end - begin)
        if bio.length % SECTOR or offset % SECTOR:
            for at in {begin, end - SECTOR} if numbers else set():
                edge = await self._medium.read(self._run.start + at, SECTOR)
                data[at - begin : at - begin + SECTOR] = edge
            self._cache.overlay(begin, data)
        data[offset - begin : offset - begin + bio.length] = bio.payload
        return split_sectors(numbers.start, data)

    def _half_mark(self) -> int:
        """A mark that covers the older half of what is in the cache, or a little more."""
        nr_sectors = 0
        for write in self._cache.pending:
            nr_sectors += len(write.sectors)
            if 2 * nr_sectors >= self._cache.nr_sectors:
                return write.seq
        return self._cache.mark

    async def _write_back(self, mark: int, life: int) -> None:
        """Bring to the medium what `mark` covers. Durable: nothing, until it is flushed."""
        await self._write_down(self._cache.covered(mark), life)
        self._cache.forget(mark)

    async def _write_down(
        self, sectors: Sectors, life: int, *, fua: bool = False
    ) -> None:
        for first, data in _joined(sectors):
            await self._medium.write(self._run.start + first * SECTOR, data, fua=fua)
            self._check_power(life)

    async def postsuspend(self) -> None:
        await self._tasks.wait()
        async with self._turn:
            try:
                await self._write_back(self._cache.mark, self._nr_cuts)
            except DeviceError as error:
                log.error("%s: the cache cannot be written: %s", self.ctx.name, error)

    def has_lost_writes(self) -> bool:
        return bool(self._cache.pending)

    async def message(self, words: Sequence[str]) -> str | None:
        match [word.lower() for word in words]:
            case ["on"]:
                if self._is_on:
                    raise TableError("the power is on", errnos.EALREADY)
                self._is_on = True
                return None
            case ["cut" | "cycle" as verb, fate, *seed] if len(seed) <= 1:
                answer = await self._cut(*_parse_fate(fate, seed))
                self._is_on = verb == "cycle"
                return answer
        raise self.unknown_message(words)

    async def _cut(self, fate: Fate, seed: int) -> str:
        """The power goes. Raises: TableError: it is off, or the medium cannot be written."""
        if not self._is_on:
            raise TableError("the power is off", errnos.EALREADY)
        self._is_on = False
        self._nr_cuts += 1
        cache = self._cache
        async with self._turn:
            kept = survivors(cache.pending, fate, seed, border=self._tear_size)
            nr_writes, nr_sectors = len(cache.pending), cache.nr_sectors
            cache.clear()
            try:
                await self._write_down(kept, self._nr_cuts)
                await self._medium.flush()
            except DeviceError as error:
                raise TableError(f"after the cut: {error}", error.errno) from error
        log.info("%s: power cut: %s, seed %d", self.ctx.name, fate.value, seed)
        self.ctx.event()
        return (
            f"{fate.value} {seed}: {nr_writes} writes of {nr_sectors} sectors at risk,"
            f" {len(kept)} sectors survive"
        )

    async def status(self, *, noflush: bool = False) -> str:
        power = "on" if self._is_on else "off"
        nr_bytes = self._cache.nr_sectors * SECTOR
        return f"{power} {len(self._cache.pending)} {nr_bytes} {self._nr_cuts}"

    def status_fields(self) -> StatusFields:
        return {
            "power_is_on": self._is_on,
            "nr_writes_at_risk": len(self._cache.pending),
            "at_risk_bytes": self._cache.nr_sectors * SECTOR,
            "nr_cuts": self._nr_cuts,
        }

    def table_words(self) -> str:
        words = []
        if self._sectors_max != VOLATILE_CACHE_SECTORS:
            words += ["volatile_cache_max", str(self._sectors_max)]
        if self._tear_size != SECTOR:
            words += ["tear_size", str(self._tear_size)]
        return " ".join([self._run.words, str(len(words)), *words])

    async def extents(self, offset: int, length: int) -> list[Extent]:
        if not self._is_on:
            raise DeviceError(errnos.EIO, self._medium.name, "extents", offset, length)
        if self._cache.pending:
            return [Extent(length, EXTENT_DATA)]
        return await self._medium.extents(offset + self._delta, length)

    def iterate_devices(self) -> Iterable[Device]:
        return (self._medium,)


def _overlay(bio: Bio, sectors: Sectors, offset: int) -> None:
    if bio.status == 0:
        assert bio.payload is not None
        lay_over(sectors, offset, bio.payload)


def _joined(sectors: Sectors) -> Iterable[tuple[int, bytes]]:
    """Runs of consecutive sectors: (first, data)."""
    first, run = 0, bytearray()
    for nr in sorted(sectors):
        if run and (nr != first + len(run) // SECTOR or len(run) >= WRITE_BYTES_MAX):
            yield first, bytes(run)
            run = bytearray()
        if not run:
            first = nr
        run += sectors[nr]
    if run:
        yield first, bytes(run)


def parse_features(words: Sequence[str]) -> tuple[int, int]:
    """Parse the group of feature words: (sectors of the cache, bytes of a tear).

    Raises: ConstructorError.
    """
    sectors_max, tear_size = VOLATILE_CACHE_SECTORS, SECTOR
    if not words:
        return sectors_max, tear_size
    reason = "Invalid number of feature arguments"
    name = PowercutTarget.type_name
    count = read_argument(words[0], 0, FEATURE_WORDS_MAX, reason, name)
    if count != len(words) - 1 or count % 2:
        raise _error(reason)
    for key, value in zip(words[1::2], words[2::2], strict=True):
        match key.lower():
            case "volatile_cache_max":
                reason = "Invalid volatile_cache_max"
                sectors_max = read_argument(value, 1, UINT32_MAX, reason, name)
            case "tear_size":
                if value not in map(str, BORDERS):
                    raise _error("Invalid tear_size (512 or 4096)")
                tear_size = int(value)
            case _:
                raise _error("Invalid feature argument")
    return sectors_max, tear_size


def _parse_fate(fate: str, seed: Sequence[str]) -> tuple[Fate, int]:
    try:
        parsed = Fate(fate)
    except ValueError:
        raise TableError(
            f"Invalid argument: {fate} is not keep, drop, tear or mixed"
        ) from None
    if not seed:
        return parsed, random.randrange(1 << 32)
    number = parse_uint(seed[0], _SEED_MAX)
    if number is None:
        raise TableError(f"Invalid argument: {seed[0]} is not a seed")
    return parsed, number


def _error(reason: str) -> ConstructorError:
    return ConstructorError(reason, target=PowercutTarget.type_name)
