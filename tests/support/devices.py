# SPDX-License-Identifier: Apache-2.0
"""Devices that lose power, fail, and dawdle: what the crash suites stand targets on.

Theory of operation of `CrashDevice`. It keeps, besides what a read returns, what is on
*stable* storage, and between the two the **pending** writes, oldest first. A pending write is
kept as whole 512-byte sectors with the value that each had after it, as a disk would write
them: so whatever subset of them a power cut leaves, a sector holds its stable value or the
value that it had after one of the writes, never a mixture.

    WRITE, WRITE_ZEROES, DISCARD   carried out: visible, pending
    FLUSH                          everything that had *ended when it was submitted* becomes
                                   stable; a write that ended later stays pending
    WRITE + FUA                    its sectors become stable as they are; an older pending
                                   value of them is superseded and can no longer come back
    power cut                      each pending write, and each one still under way, is kept,
                                   dropped, or torn: any subset of its sectors

A DISCARD may leave anything: by seed the old bytes, zeroes, or a pattern. Bios are carried
out at once, or later on the loop in an order drawn from the seed, by `inline_chance`; a
deferred bio is owned first, as the contract says. After `cut_power` nothing takes effect any
more: bios end with EIO. `reopen` is the machine coming up again.
"""

import asyncio
import errno as errnos
import random
from collections.abc import Callable, Iterator
from typing import Final

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
from nbdtarget.clock import Clock
from nbdtarget.devices.base import Device, Extent

__all__ = ["CrashDevice", "FaultDevice", "SlowDevice", "Trace"]

SECTOR: Final = 512
SUBSETS_MAX: Final = 8  # pending writes up to which `crash_images` tries every subset
SAMPLES_DEFAULT: Final = 200  # images by seed above that

Trace = tuple[str, int, int, int]  # operation, offset, length, flags


class _Pending:
    """Sectors that a write changed, and that no flush has covered yet."""

    __slots__ = ("sectors", "seq")

    def __init__(self, seq: int, sectors: dict[int, bytes]) -> None:
        self.seq = seq
        self.sectors = sectors


class CrashDevice(Device):
    """A disk whose power can be cut. See the module head.

    Attributes:
        inline_chance: 1.0 serves each bio inside `submit`, 0.0 none; between, by the seed.
        trace: each operation in the order it was carried out.
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
    ) -> None:
        assert size % SECTOR == 0
        super().__init__(name, size, read_only=read_only)
        self.inline_chance = inline_chance
        self.trace: list[Trace] = []
        self.is_cut = False
        self._seed = seed
        self._random = random.Random(seed)
        self._stable = bytearray(size if content is None else content)
        assert len(self._stable) == size
        self._live = bytearray(self._stable)
        self._pending: list[_Pending] = []
        self._deferred: list[tuple[Bio, int]] = []
        self._seq = 0

    @property
    def nr_pending(self) -> int:
        """How many carried out writes a power cut now could touch."""
        return len(self._pending)

    def submit(self, bio: Bio) -> None:
        status = errnos.EIO if self.is_cut else self.check_bounds(bio)
        if status:
            bio.end(status)
            return
        # What a FLUSH covers is decided here, not when it is carried out.
        if self.inline_chance >= 1.0 or self._random.random() < self.inline_chance:
            self._carry_out(bio, self._seq)
            return
        bio.own()
        self._deferred.append((bio, self._seq))
        asyncio.get_running_loop().call_soon(self._carry_out_one)

    async def close(self) -> None:
        assert not self._deferred, "closed with I/O in flight"

    def cut_power(self) -> None:
        """From now on nothing takes effect; what is under way ends with EIO or never."""
        self.is_cut = True

    def image(self) -> bytes:
        """What a read of the whole running device returns."""
        return bytes(self._live)

    def stable_image(self) -> bytes:
        """What survives whatever happens."""
        return bytes(self._stable)

    def crash(self, seed: int) -> bytes:
        """What the disk holds after a power cut now: one possibility, drawn from `seed`."""
        rng = random.Random(seed)
        chosen = []
        for pending in self._at_risk():
            fate = rng.random()
            if fate < 0.4:
                chosen.append(pending.sectors)
            elif fate < 0.6:
                chosen.append(_torn(pending.sectors, rng))
        return self._image_with(chosen)

    def crash_images(
        self, *, subsets_max: int = SUBSETS_MAX, samples: int = SAMPLES_DEFAULT
    ) -> Iterator[bytes]:
        """Each different image that a power cut now may leave, as far as can be tried.

        None, all and every prefix of the pending writes; every subset of them when there are
        at most `subsets_max`; then `samples` more, with torn writes, by the device's seed.
        """
        at_risk = [pending.sectors for pending in self._at_risk()]
        seen: set[bytes] = set()
        for image in self._images(at_risk, subsets_max, samples):
            if image not in seen:
                seen.add(image)
                yield image

    def reopen(self, image: bytes, seed: int | None = None) -> "CrashDevice":
        """The same disk after the power is back, holding `image`."""
        return CrashDevice(
            self.size,
            self._seed + 1 if seed is None else seed,
            content=image,
            name=self.name,
            inline_chance=self.inline_chance,
            read_only=self.read_only,
        )

    def _images(
        self, at_risk: list[dict[int, bytes]], subsets_max: int, samples: int
    ) -> Iterator[bytes]:
        nr = len(at_risk)
        for end in (0, nr, *range(1, nr)):
            yield self._image_with(at_risk[:end])
        if nr <= subsets_max:
            for bits in range(1 << nr):
                yield self._image_with(
                    [sectors for at, sectors in enumerate(at_risk) if bits >> at & 1]
                )
        if any(len(sectors) > 1 for sectors in at_risk) or nr > subsets_max:
            for sample in range(samples):
                yield self.crash(self._seed * 1_000_003 + sample)

    def _image_with(self, chosen: list[dict[int, bytes]]) -> bytes:
        image = bytearray(self._stable)
        for sectors in chosen:
            for nr, value in sectors.items():
                image[nr * SECTOR : (nr + 1) * SECTOR] = value
        return bytes(image)

    def _at_risk(self) -> list[_Pending]:
        """The pending writes, then those still under way as if carried out in order."""
        at_risk = list(self._pending)
        live = bytearray(self._live)
        for bio, _ in self._deferred:
            data = self._data(bio)
            if data is not None:
                live[bio.offset : bio.offset + bio.length] = data
                at_risk.append(_Pending(0, _sectors(live, bio.offset, bio.length)))
        return at_risk

    def _data(self, bio: Bio) -> bytes | memoryview | None:
        if bio.op == OP_WRITE:
            return bio.payload
        if bio.op == OP_WRITE_ZEROES:
            return bytes(bio.length)
        return None

    def _carry_out_one(self) -> None:
        at = self._random.randrange(len(self._deferred))
        bio, seq = self._deferred.pop(at)
        if self.is_cut:
            bio.end(errnos.EIO)
        else:
            self._carry_out(bio, seq)

    def _carry_out(self, bio: Bio, seq: int) -> None:
        self.trace.append((OP_NAMES[bio.op], bio.offset, bio.length, bio.flags))
        if bio.op == OP_READ:
            assert bio.payload is not None
            bio.payload[:] = self._live[bio.offset : bio.offset + bio.length]
        elif bio.op == OP_FLUSH:
            self._make_stable(seq)
        elif bio.op != OP_CACHE:
            data = self._data(bio)
            if bio.op == OP_DISCARD:
                data = self._discarded(bio)
            assert data is not None
            assert len(data) == bio.length, "the payload is as long as the bio"
            self._live[bio.offset : bio.offset + bio.length] = data
            self._note_write(bio)
        bio.end(0)

    def _discarded(self, bio: Bio) -> bytes:
        choice = self._random.randrange(3)
        if choice == 0:
            return bytes(self._live[bio.offset : bio.offset + bio.length])
        return bytes(bio.length) if choice == 1 else b"\xdb" * bio.length

    def _note_write(self, bio: Bio) -> None:
        sectors = _sectors(self._live, bio.offset, bio.length)
        if not bio.flags & FUA:
            self._seq += 1
            self._pending.append(_Pending(self._seq, sectors))
            return
        for nr, value in sectors.items():
            self._stable[nr * SECTOR : (nr + 1) * SECTOR] = value
        for pending in self._pending:
            for nr in sectors:
                pending.sectors.pop(nr, None)
        self._pending = [pending for pending in self._pending if pending.sectors]

    def _make_stable(self, seq: int) -> None:
        while self._pending and self._pending[0].seq <= seq:
            for nr, value in self._pending.pop(0).sectors.items():
                self._stable[nr * SECTOR : (nr + 1) * SECTOR] = value


def _sectors(live: bytearray, offset: int, length: int) -> dict[int, bytes]:
    return {
        nr: bytes(live[nr * SECTOR : (nr + 1) * SECTOR])
        for nr in range(offset // SECTOR, -(-(offset + length) // SECTOR))
    }


def _torn(sectors: dict[int, bytes], rng: random.Random) -> dict[int, bytes]:
    """A prefix half of the time, as disks tear; else any subset."""
    if rng.random() < 0.5:
        kept = list(sectors)[: rng.randrange(len(sectors) + 1)]
    else:
        kept = [nr for nr in sectors if rng.random() < 0.5]
    return {nr: sectors[nr] for nr in kept}


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
    after it. A failed operation never reaches the device below.

    As the contract of `Device` says, a failed FLUSH or FUA write latches: later FLUSHes and
    FUA writes fail too, unless the device is opened again (`clear`).

    Attributes:
        count: operations of `ops` seen so far; run a workload once with `fail_at` None to
            know the number of places to fail.
        failed: operations that were failed on purpose.
    """

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
            self.is_latched |= durable
            bio.end(self.errno)
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
