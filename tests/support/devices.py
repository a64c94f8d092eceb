# SPDX-License-Identifier: Apache-2.0
"""Devices that lose power, fail, and dawdle: what the crash suites stand targets on.

Theory of operation of `CrashDevice`. Under it is *stable* storage, and on that a
`VolatileCache` (`nbdtarget.targets.powercut.volatile_cache`) with the **pending** writes, sector by sector: so
whatever a power cut leaves of them, a sector holds its stable value or the value that it
had after one of the writes, never a mixture.

    WRITE, WRITE_ZEROES, DISCARD   carried out: visible, pending
    FLUSH                          everything that had *ended when it was submitted* becomes
                                   stable; a write that ended later stays pending
    WRITE + FUA                    its sectors become stable as they are; an older pending
                                   value of them is superseded and can no longer come back
    power cut                      each pending write, and each one still under way, is kept,
                                   dropped, or torn at a `border`, in any order

A DISCARD may leave anything: by seed the old bytes, zeroes, or a pattern. Bios are carried
out at once, or later on the loop in an order drawn from the seed, by `inline_chance`; a
deferred bio is owned first, as the contract says. After `cut_power` nothing takes effect any
more: bios end with EIO. `reopen` is the machine coming up again.

It can also lie, in one way at a time (`lie`): `FailFlush`, `FailAfter`, `BadRange`, `Slow`. A
failed bio has changed nothing, unless `happens` says how often it **takes effect all the same**: a
write wholly or in part, a flush for any of the sectors that it covered. One that should have
been durable latches, as the contract of `Device` says, until the device is reopened.

`tests.support.openings` opens such a disk more than once in one boot, and takes it away.
"""

import asyncio
import errno as errnos
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from nbdtarget.bio import (
    FUA,
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_NAMES,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.common.clock import Clock
from nbdtarget.common.units import SECTOR
from nbdtarget.devices.base import Device, Extent
from nbdtarget.targets.powercut.volatile_cache import (
    SAMPLES_DEFAULT,
    SUBSETS_MAX,
    Fate,
    PendingWrite,
    Sectors,
    VolatileCache,
    covering,
    possibilities,
    split_sectors,
    survivors,
)

__all__ = [
    "BadRange",
    "CrashDevice",
    "FailAfter",
    "FailFlush",
    "FaultDevice",
    "Lie",
    "Slow",
    "SlowDevice",
    "Trace",
    "Watcher",
    "part_of",
]

Trace = tuple[str, int, int, int]  # operation, offset, length, flags
ALL_OPS: Final = frozenset(range(len(OP_NAMES)))
SEED_STEP: Final = 1_000_003


@dataclass(frozen=True)
class FailFlush:
    """The flush number `nth` from now on fails (0: the next), and what it covered stays pending."""

    nth: int = 0


@dataclass(frozen=True)
class FailAfter:
    """`operations` more are served, then none."""

    operations: int


@dataclass(frozen=True)
class BadRange:
    """Operations of `ops` that touch the bytes from `begin` to `end` fail."""

    begin: int
    end: int
    ops: frozenset[int] = ALL_OPS


@dataclass(frozen=True)
class Slow:
    """Each operation is carried out `seconds` after it was submitted."""

    seconds: float
    clock: Clock


Lie = FailFlush | FailAfter | BadRange | Slow


class Watcher(Protocol):
    """Is told of every bio of the crash devices that it is put on (`CrashDevice.watchers`)."""

    def started(self, device: "CrashDevice", bio: Bio) -> None:
        """The bio was submitted; nothing has happened yet."""
        ...

    def finished(self, device: "CrashDevice", bio: Bio, errno: int) -> None:
        """The bio was carried out (0) or failed, and is about to end."""
        ...


class CrashDevice(Device):
    """A disk whose power can be cut. See the module head.

    Attributes:
        inline_chance: 1.0 serves each bio inside `submit`, 0.0 none; between, by the seed.
        border: bytes at which a write may tear: 512 or 4096.
        trace: each operation in the order it was carried out.
        watchers: see `Watcher`.
        failed: bios that were failed by the lie, or since it made the device latch.
        happens: how often a failed bio takes effect all the same, wholly or in part.
        latches: whether it latches itself; not, if its openings do (`tests.support.openings`).
    """

    can_discard = True
    can_write_zeroes = True
    can_fast_zero = True

    def __init__(
        self,
        size: int,
        seed: int = 0,
        *,
        content: bytes | bytearray | memoryview | None = None,
        name: str = "crash",
        inline_chance: float = 1.0,
        read_only: bool = False,
        border: int = SECTOR,
        lie: Lie | None = None,
    ) -> None:
        assert size % SECTOR == 0
        super().__init__(name, size, read_only=read_only)
        # Caches go a longer way with what may fail inline: by seed, both ways are gone.
        self.fails_inline = seed % 2 == 1
        self.inline_chance = inline_chance
        self.border = border
        self.trace: list[Trace] = []
        self.watchers: list[Watcher] = []
        self.is_cut = False
        self.is_latched = False
        self.failed = 0
        self.happens = 0.0
        self.latches = True
        self.lie = lie
        self._seed = seed
        self._random = random.Random(seed)
        self._stable = bytearray(size if content is None else content)
        assert len(self._stable) == size
        self._cache = VolatileCache()
        self._deferred: list[tuple[Bio, int, int]] = []  # with its mark and errno

    @property
    def lie(self) -> Lie | None:
        """How the device fails, if it does. Setting it starts its count anew."""
        return self._lie

    @lie.setter
    def lie(self, lie: Lie | None) -> None:
        self._lie = lie
        self._nr_lied_to = 0  # operations that the lie has counted

    @property
    def nr_pending(self) -> int:
        """How many carried out writes a power cut now could touch."""
        return len(self._cache.pending)

    @property
    def nr_at_risk(self) -> int:
        """As `nr_pending`, and the writes that are still under way."""
        return len(self._at_risk())

    def submit(self, bio: Bio) -> None:
        status = errnos.EIO if self.is_cut else self.check_bounds(bio)
        if status:
            bio.end(status)
            return
        errno = self._errno(bio)
        for watcher in self.watchers:
            watcher.started(self, bio)
        # A FLUSH covers the writes that have ended now, when it is submitted, and not later ones.
        mark = self._cache.mark
        if isinstance(self._lie, Slow):
            bio.own()
            self._deferred.append((bio, mark, errno))
            self._lie.clock.call_later(self._lie.seconds, self._carry_out_one)
        elif self.inline_chance >= 1.0 or self._random.random() < self.inline_chance:
            self._carry_out(bio, mark, errno)
        else:
            bio.own()
            self._deferred.append((bio, mark, errno))
            asyncio.get_running_loop().call_soon(self._carry_out_one)

    async def close(self) -> None:
        # A read that somebody has given up may still be under way.
        writes = [bio for bio, _, _ in self._deferred if bio.op != OP_READ]
        assert not writes, "closed with I/O in flight"

    def cut_power(self) -> None:
        """From now on nothing takes effect; what is under way ends with EIO or never."""
        self.is_cut = True

    def abandon(self, bios: Collection[Bio]) -> None:
        """The sender of these bios has gone: each of them that is under way is carried out now, or never."""
        under_way = [each for each in self._deferred if each[0] in bios]
        self._deferred = [each for each in self._deferred if each[0] not in bios]
        for bio, mark, errno in under_way:
            if self._random.random() < 0.5:
                self._carry_out(bio, mark, errno)

    def lose_power(self, seed: int, fate: Fate) -> None:
        """The disk alone loses its power, and is back at once: what was pending met its fate."""
        self._stable[:] = self.crash(seed, fate)
        self._cache.clear()

    def image(self) -> bytes:
        """Return the bytes that a read of the whole running device would return."""
        return bytes(self._read(0, self.size))

    def stable_image(self) -> bytes:
        """Return the bytes that every power cut leaves."""
        return bytes(self._stable)

    def crash(self, seed: int, fate: Fate = Fate.MIXED) -> bytes:
        """Return one content that the disk may have after a power cut now, drawn from `seed`."""
        return self._image_with(
            survivors(self._at_risk(), fate, seed, border=self.border)
        )

    def crash_images(
        self, *, subsets_max: int = SUBSETS_MAX, samples: int = SAMPLES_DEFAULT
    ) -> Iterator[bytes]:
        """Each different image that a power cut now may leave, as far as can be tried.

        None, all and every prefix of the pending writes; every subset of them when there are
        at most `subsets_max`; then `samples` more, reordered and torn, by the device's seed.
        """
        seen: set[bytes] = set()
        for sectors in possibilities(
            self._at_risk(),
            subsets_max=subsets_max,
            samples=samples,
            seed=self._seed * SEED_STEP,
            border=self.border,
        ):
            image = self._image_with(sectors)
            if image not in seen:
                seen.add(image)
                yield image

    def reopen(self, image: bytes, seed: int | None = None) -> "CrashDevice":
        """Return the same disk after the power is back, with `image` as its content and without a lie."""
        return CrashDevice(
            self.size,
            self._seed + 1 if seed is None else seed,
            content=image,
            name=self.name,
            inline_chance=self.inline_chance,
            read_only=self.read_only,
            border=self.border,
        )

    def _errno(self, bio: Bio) -> int:
        """Return the errno that this bio will fail with, or 0."""
        durable = bio.op == OP_FLUSH or bool(bio.flags & FUA and bio.op != OP_READ)
        fails = self._lies_to(bio)
        # A DISCARD promises nothing: one that fails has lost nothing.
        may_latch = durable and bio.op != OP_DISCARD and self.latches
        self.is_latched |= fails and may_latch
        if not (fails or (self.is_latched and durable)):
            return 0
        self.failed += 1
        return errnos.EIO

    def _lies_to(self, bio: Bio) -> bool:
        at = self._nr_lied_to
        match self._lie:
            case FailFlush(nth):
                self._nr_lied_to += bio.op == OP_FLUSH
                return bio.op == OP_FLUSH and at == nth
            case FailAfter(operations):
                self._nr_lied_to += 1
                return at >= operations
            case BadRange(begin, end, ops):
                touched = bio.offset < end and begin < bio.offset + bio.length
                return touched and bio.op in ops
        return False

    def _read(self, offset: int, length: int) -> bytearray:
        data = self._stable[offset : offset + length]
        self._cache.overlay(offset, data)
        return data

    def _image_with(self, sectors: Sectors) -> bytes:
        image = bytearray(self._stable)
        _put(image, sectors)
        return bytes(image)

    def _at_risk(self) -> list[PendingWrite]:
        """The pending writes, then those still under way as if carried out in order."""
        at_risk = list(self._cache.pending)
        under_way = [
            (bio, data)
            for bio, _, errno in self._deferred
            if not errno and (data := _written(bio)) is not None
        ]
        if under_way:
            live = self._read(0, self.size)
            for bio, data in under_way:
                live[bio.offset : bio.offset + bio.length] = data
                at_risk.append(
                    PendingWrite(0, _sectors(live, covering(bio.offset, bio.length)))
                )
        return at_risk

    def _carry_out_one(self) -> None:
        if not self._deferred:
            return  # it was abandoned
        at = self._random.randrange(len(self._deferred))
        bio, mark, errno = self._deferred.pop(at)
        if self.is_cut:
            bio.end(errnos.EIO)
        else:
            self._carry_out(bio, mark, errno)

    def _carry_out(self, bio: Bio, mark: int, errno: int) -> None:
        if not errno:
            self._take_effect(bio, mark)
        elif self.happens and self._random.random() < self.happens:
            self._happen_all_the_same(bio, mark)
        for watcher in self.watchers:
            watcher.finished(self, bio, errno)
        bio.end(errno)

    def _take_effect(self, bio: Bio, mark: int) -> None:
        self.trace.append((OP_NAMES[bio.op], bio.offset, bio.length, bio.flags))
        if bio.op == OP_READ:
            assert bio.payload is not None
            bio.payload[:] = self._read(bio.offset, bio.length)
        elif bio.op == OP_FLUSH:
            self._make_stable(mark)
        elif bio.op != OP_CACHE:
            data = self._discarded(bio) if bio.op == OP_DISCARD else _written(bio)
            assert data is not None
            assert len(data) == bio.length, "the payload is as long as the bio"
            self._take_write(bio, data)

    def _happen_all_the_same(self, bio: Bio, mark: int) -> None:
        if bio.op == OP_FLUSH:
            sectors = self._cache.covered(mark)
            kept = {nr for nr in sectors if self._random.random() < 0.5}
            _put(self._stable, {nr: sectors[nr] for nr in kept})
        elif (part := part_of(bio, self._random)) is not None:
            self._take_effect(part, mark)

    def _discarded(self, bio: Bio) -> bytes:
        choice = self._random.randrange(3)
        if choice == 0:
            return bytes(self._read(bio.offset, bio.length))
        return bytes(bio.length) if choice == 1 else b"\xdb" * bio.length

    def _take_write(self, bio: Bio, data: bytes | memoryview) -> None:
        numbers = covering(bio.offset, bio.length)
        begin = numbers.start * SECTOR
        whole = self._read(begin, len(numbers) * SECTOR)
        whole[bio.offset - begin : bio.offset - begin + bio.length] = data
        if bio.flags & FUA:
            self._stable[begin : begin + len(whole)] = whole
            self._cache.supersede(numbers)
        else:
            self._cache.write(split_sectors(numbers.start, whole))

    def _make_stable(self, mark: int) -> None:
        _put(self._stable, self._cache.covered(mark))
        self._cache.forget(mark)


def part_of(bio: Bio, rng: random.Random) -> Bio | None:
    """All of a write, or the part of it between two of its sector borders; else None."""
    if bio.op in (OP_READ, OP_CACHE, OP_FLUSH) or not bio.length:
        return None
    begin, end = bio.offset, bio.offset + bio.length
    if rng.random() < 0.5:
        borders = [begin, *(nr * SECTOR for nr in covering(begin, bio.length)[1:]), end]
        begin, end = sorted(rng.choices(borders, k=2))
    if begin == end:
        return None
    payload = bio.payload
    if payload is not None:
        payload = payload[begin - bio.offset : end - bio.offset]
    return Bio(bio.op, begin, end - begin, payload, bio.flags, _nobody_waits)


def _nobody_waits(_: Bio) -> None:
    """Do nothing: the bio that this one is a part of has failed already."""


def _written(bio: Bio) -> bytes | memoryview | None:
    """Return the bytes that the bio leaves in its range, or None. A discard that is cut short leaves a pattern."""
    if bio.op == OP_WRITE:
        return bio.payload
    if bio.op == OP_WRITE_ZEROES:
        return bytes(bio.length)
    return b"\xdb" * bio.length if bio.op == OP_DISCARD else None


def _sectors(image: bytearray, numbers: range) -> Sectors:
    begin = numbers.start * SECTOR
    return split_sectors(numbers.start, image[begin : numbers.stop * SECTOR])


def _put(image: bytearray, sectors: Sectors) -> None:
    for nr, value in sectors.items():
        image[nr * SECTOR : (nr + 1) * SECTOR] = value


class _Wrapper(Device):
    """A device in front of another one."""

    def __init__(self, device: Device) -> None:
        super().__init__(device.name, device.size, read_only=device.read_only)
        self.device = device
        self.logical_block_size = device.logical_block_size
        self.can_discard = device.can_discard
        self.can_write_zeroes = device.can_write_zeroes
        self.can_fast_zero = device.can_fast_zero

    async def close(self) -> None:
        await self.device.close()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await self.device.extents(offset, length)


class FaultDevice(_Wrapper):
    """Fails the operation number `fail_at` (from 0) of those in `ops`; `sticky`: and each one
    after it. A failed operation never reaches the device below, unless it `happens` all the same.

    As the contract of `Device` says, a failed FLUSH or FUA write latches: later FLUSHes and
    FUA writes fail too, unless the device is opened again (`clear`).

    Attributes:
        count: operations of `ops` seen so far; run a workload once with `fail_at` None to
            know the number of places to fail.
        failed: operations that were failed on purpose.
        happens: draws how often, and in what part, a failed write takes effect; None: never.
    """

    happens: random.Random | None = None

    def __init__(
        self,
        device: Device,
        fail_at: int | None = None,
        *,
        sticky: bool = True,
        ops: frozenset[int] | None = None,
        errno: int = errnos.EIO,
    ) -> None:
        super().__init__(device)
        self.fail_at = fail_at
        self.sticky = sticky
        self.ops = ops
        self.errno = errno
        self.count = 0
        self.failed = 0
        self.is_latched = False

    def submit(self, bio: Bio) -> None:
        at = self.count
        counted = self.ops is None or bio.op in self.ops
        self.count += counted
        durable = bio.op == OP_FLUSH or bool(bio.flags & FUA and bio.op != OP_READ)
        if counted and self._fails(at):
            self.failed += 1
            self.is_latched |= durable and bio.op != OP_DISCARD
            if self.happens is not None:
                bio.own()
            part = None if self.happens is None else part_of(bio, self.happens)
            if part is None:
                bio.end(self.errno)
            else:
                part.endio = lambda _: bio.end(self.errno)
                self.device.submit(part)
        elif self.is_latched and durable:
            bio.end(errnos.EIO)
        else:
            self.device.submit(bio)

    def clear(self) -> None:
        """Stop failing, as a device that was opened again."""
        self.fail_at = None
        self.is_latched = False

    def _fails(self, at: int) -> bool:
        if self.fail_at is None:
            return False
        return at >= self.fail_at if self.sticky else at == self.fail_at


class SlowDevice(_Wrapper):
    """Starts each operation `delay_s` seconds after it was submitted.

    What a FLUSH covers is then more than the contract asks for; see `CrashDevice` for less.
    """

    def __init__(
        self,
        device: Device,
        clock: Clock,
        delay_s: float,
        *,
        ops: frozenset[int] | None = None,
    ) -> None:
        super().__init__(device)
        self.delay_s = delay_s
        self.ops = ops
        self.in_flight = 0
        self._clock = clock

    def submit(self, bio: Bio) -> None:
        if self.delay_s <= 0 or (self.ops is not None and bio.op not in self.ops):
            self.device.submit(bio)
            return
        bio.own()
        self.in_flight += 1
        self._clock.call_later(self.delay_s, self._starter(bio))

    def _starter(self, bio: Bio) -> Callable[[], None]:
        def start() -> None:
            self.in_flight -= 1
            self.device.submit(bio)

        return start
