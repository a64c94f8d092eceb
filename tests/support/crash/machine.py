# SPDX-License-Identifier: Apache-2.0
"""One state machine that drives any target and cuts its power.

Theory of operation. A `Rig` is a disk under test on crash devices. The machine submits bios
to it, lets the event loop turn a few times, submits more, and so reaches every interleaving
that the seed can name: bios in flight overlap with commits, hydrations, flushes, suspends.
`DiskModel` says what each read must return and what each power cut may leave. Payloads are
borrowed and scribbled over as soon as `submit` returns, so a layer that keeps one without
owning it writes garbage here, and is caught.

A power cut happens wherever the loop stands: what was not flushed on each device is kept,
dropped or torn by seed, everything in memory is gone, and the rig is started again on what
is left.

What else must hold of the target, its `Invariants` assert all the while.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol, TypeVar

from nbdtarget.bio import (
    FUA,
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.devices.base import Device
from nbdtarget.devices.losses import FlushObserver
from nbdtarget.targets.powercut.volatile_cache import Fate
from tests.support.clock import SimClock
from tests.support.crash.invariants import Invariants
from tests.support.devices import CrashDevice
from tests.support.model import SECTOR, DiskModel

__all__ = ["Driver", "Rig"]

T = TypeVar("T")

RUN_S_MAX = 100.0  # real seconds that a verb may take, on a busy machine, before we call it stuck
TURNS_MAX = 100_000  # turns of the loop that a bio may take before we call it lost
STEP_TURNS_MAX = 200  # turns, 10 ms each, that a background job may take


class Rig(Protocol):
    """A disk under test. Everything that survives a power cut is on its crash devices."""

    clock: SimClock
    disk: Device

    @property
    def content(self) -> bytes:
        """The bytes of the disk before the first write."""
        ...

    @property
    def discards_last(self) -> bool:
        """See `DiskModel`."""
        ...

    @property
    def messages(self) -> tuple[tuple[str, ...], ...]:
        """The messages that a walk may send."""
        ...

    @property
    def at_risk(self) -> tuple[CrashDevice, ...]:
        """The devices that a power cut may change."""
        ...

    @property
    def invariants(self) -> Invariants: ...

    @property
    def is_settled(self) -> bool:
        """Whether no background work is left."""
        ...

    async def start(self) -> None:
        """Construct and resume the disk from what is on the devices."""
        ...

    async def suspend(self) -> None: ...

    async def resume(self) -> None: ...

    async def load(self) -> None:
        """Load the same table again, into the inactive slot; `resume` swaps to it."""
        ...

    async def message(self, *words: str) -> None: ...

    async def set_background(self, *, on: bool) -> None:
        """Let work go on that no client asks for, or stop it."""
        ...

    async def status(self) -> str: ...

    async def stop(self) -> None:
        """Remove the disk as a clean shutdown does."""
        ...

    def reboot(self, seed: int, images: tuple[bytes, ...]) -> "Rig":
        """The rig that the next boot finds: `images` are what `at_risk` hold by then."""
        ...

    async def check(self) -> None:
        """Hold the metadata on the devices against its own rules; the source against its
        first content."""
        ...

    def check_survivors(self, model: DiskModel, promised: object) -> None:
        """Hold what lies on the devices after a power cut, before `start`, against the model
        and what the invariants had `promised` when it was cut."""
        ...


class Driver:
    """Submits bios to a rig and holds every answer against the model.

    Attributes:
        model_type: the oracle.
    """

    model_type: type[DiskModel] = DiskModel

    def __init__(self, rig: Rig) -> None:
        self.escaped: list[BaseException] = []
        self.loop = self._new_loop()
        self.rig = rig
        self.model = self.model_type(rig.content, discards_last=rig.discards_last)
        self.in_flight: dict[Bio, tuple[int, int]] = {}
        self.stamp = 0
        self.suspended = False
        self.background: asyncio.Task[None] | None = None
        self._observed: tuple[Device, FlushObserver] | None = None
        self.run(rig.start())
        assert self._observer

    def run(self, steps: Coroutine[Any, Any, T]) -> T:
        """Run one coroutine of the rig, with everything else that is due."""
        self.rig.invariants.verb_begins()
        answer = self.loop.run_until_complete(asyncio.wait_for(steps, RUN_S_MAX))
        self._raise_escaped()
        return answer

    def _new_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()

        def escaped(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            self.escaped.append(
                context.get("exception") or AssertionError(context["message"])
            )

        loop.set_exception_handler(escaped)
        return loop

    def _turn_loop(self, steps: Coroutine[Any, Any, None]) -> None:
        """Run, and raise what a callback of the loop raised meanwhile."""
        self.loop.run_until_complete(steps)
        self._raise_escaped()

    def _raise_escaped(self) -> None:
        """An invariant first: it is the cause of what else went wrong."""
        self.rig.invariants.look()
        if self.escaped:
            raise self.escaped.pop(0)

    # ---- bios ----

    def overlaps(self, offset: int, length: int) -> bool:
        return any(
            offset < begin + size and begin < offset + length
            for begin, size in _sectors(self.in_flight.values())
        )

    def write(self, offset: int, length: int, *, fua: bool) -> None:
        if self.overlaps(*_aligned(offset, length)):
            self.drain()
        self.stamp += 1
        data = bytearray(_stamped(self.stamp, offset, length))
        label = f"write#{self.stamp}"
        started = self.model.start_write(offset, bytes(data), length, label)

        def ended(bio: Bio) -> None:
            if self.in_flight.pop(bio, None) is None:
                return  # of a life that has ended
            self.model.end_write(started, ok=bio.status == 0, fua=fua)

        bio = Bio(
            OP_WRITE,
            offset,
            length,
            memoryview(data),
            FUA if fua else 0,
            ended,
            borrowed=True,
        )
        self._submit(bio, offset, length)
        data[:] = b"\xee" * length  # the receive buffer is reused

    def zero(self, offset: int, length: int, *, fua: bool) -> None:
        self._changed(OP_WRITE_ZEROES, offset, length, bytes(length), fua)

    def discard(self, offset: int, length: int) -> None:
        self._changed(OP_DISCARD, offset, length, None, False)

    @property
    def _observer(self) -> FlushObserver:
        """The observer of the only client, which remembers the losses that this client was told of in this life."""
        if self._observed is None or self._observed[0] is not self.rig.disk:
            self._observed = self.rig.disk, FlushObserver(self.rig.disk)
        return self._observed[1]

    def flush(self) -> None:
        promised = self.model.start_flush()
        observer = self._observer
        mark = observer.mark()
        invariants = self.rig.invariants
        begun = None if self.suspended else invariants.flush_submitted()

        def ended(bio: Bio) -> None:
            if self.in_flight.pop(bio, None) is None:
                return  # of a life that has ended
            status = observer.end(mark, bio.status)
            self.model.end_flush(promised, ok=status == 0)
            if status == 0:
                invariants.flush_ended(begun)

        self._submit(Bio(OP_FLUSH, 0, 0, None, 0, ended), -1, 0)

    def read(self, offset: int, length: int) -> None:
        """Read beside what is in flight; what overlaps it is waited for first."""
        if self.overlaps(*_aligned(offset, length)):
            self.drain()
        scratch = bytearray(b"\xdd" * length)

        def ended(bio: Bio) -> None:
            if self.in_flight.pop(bio, None) is None:
                return  # of a life that has ended
            assert bio.status == 0, f"read failed: {bio}"
            assert bio.payload is not None
            self.model.check_read(offset, bio.payload)

        bio = Bio(OP_READ, offset, length, memoryview(scratch), 0, ended, borrowed=True)
        self._submit(bio, offset, length)
        scratch[:] = b"\xdd" * length

    def cache(self, offset: int, length: int) -> None:
        """Say that the range will be read soon."""

        def ended(bio: Bio) -> None:
            self.in_flight.pop(bio, None)

        self._submit(Bio(OP_CACHE, offset, length, None, 0, ended), offset, length)

    def _changed(
        self, op: int, offset: int, length: int, data: bytes | None, fua: bool
    ) -> None:
        if self.overlaps(*_aligned(offset, length)):
            self.drain()
        self.stamp += 1
        label = f"{'zero' if data is not None else 'discard'}#{self.stamp}"
        started = self.model.start_write(offset, data, length, label)

        def ended(bio: Bio) -> None:
            if self.in_flight.pop(bio, None) is None:
                return  # of a life that has ended
            self.model.end_write(started, ok=bio.status == 0, fua=fua)

        self._submit(
            Bio(op, offset, length, None, FUA if fua else 0, ended), offset, length
        )

    def _submit(self, bio: Bio, offset: int, length: int) -> None:
        self.in_flight[bio] = (offset, length)
        # A deferred bio is carried out after the caller has overwritten the payload.
        self.call_inside(lambda: self.rig.disk.submit(bio))

    def call_inside(self, call: Callable[[], None]) -> None:
        """Call inside the loop, but without a turn of it."""
        asyncio._set_running_loop(self.loop)
        try:
            call()
        finally:
            asyncio._set_running_loop(None)

    # ---- time ----

    def turn(self, turns: int) -> None:
        """Let the loop turn: in-flight I/O gets on a little."""
        self._turn_loop(_turn(turns))

    def advance(self, seconds: float) -> None:
        """Let simulated time pass: timers fire, what they start has only begun."""
        self._turn_loop(_advance(self.rig.clock, seconds))

    def drain(self) -> None:
        """Wait until no bio is in flight; timers go on meanwhile."""
        if self.suspended:
            self.resume()
        for _ in range(TURNS_MAX):
            if not self.in_flight:
                return
            self.turn(1)
            if not self.in_flight:
                return
            self.advance(0.01)
        raise AssertionError(f"bios lost: {list(self.in_flight)}")

    # ---- life ----

    def suspend(self) -> None:
        self.run(self.rig.suspend())
        self.suspended = True

    def resume(self) -> None:
        self.suspended = False
        self.run(self.rig.resume())

    def load(self) -> None:
        """Load a table into the inactive slot: the next resume swaps to it."""
        self.run(self.rig.load())

    def reload(self) -> None:
        """Load and swap, with I/O in flight."""
        self.load()
        self.resume()

    def hydrate_a_step(self) -> bool:
        """Let background work get on until one more job has ended; False if none was left."""
        invariants = self.rig.invariants
        nr_jobs_done = invariants.nr_jobs_done
        self.run(self.rig.set_background(on=True))
        for _ in range(STEP_TURNS_MAX):
            if self.rig.is_settled or invariants.nr_jobs_done > nr_jobs_done:
                break
            self.turn(1)
            self.advance(0.01)
        self.run(self.rig.set_background(on=False))
        return invariants.nr_jobs_done > nr_jobs_done

    def verify(self) -> None:
        """Read everything and hold it against the model."""
        self.drain()
        for offset in range(0, self.model.size, 16 * SECTOR):
            self.read(offset, min(16 * SECTOR, self.model.size - offset))
        self.drain()

    def restart(self) -> None:
        """Shut down cleanly and start again: no write may be missing then."""
        self.drain()
        self.run(self.rig.stop())
        self.run(self.rig.check())
        self.run(self.rig.start())
        assert self._observer

    def cut_power(self, seed: int, fate: Fate = Fate.MIXED) -> None:
        """Cut the power here and now, and boot from what is left."""
        self.boot(seed, self.crash_images(seed, fate))

    def crash_images(self, seed: int, fate: Fate) -> tuple[bytes, ...]:
        """Return the images that a power cut now leaves on the devices at risk, chosen by `seed`."""
        at_risk = self.rig.at_risk
        return tuple(each.crash(seed + nr, fate) for nr, each in enumerate(at_risk))

    def boot(self, seed: int, images: tuple[bytes, ...]) -> None:
        """Boot after a power cut, from `images`."""
        promised = self.rig.invariants.promised()
        rig = self.rig.reboot(seed, images)
        for device in self.rig.at_risk:
            device.cut_power()
        self.discard_loop()
        self.suspended = False
        self.loop = self._new_loop()
        self.rig = rig
        rig.check_survivors(self.model, promised)
        self.run(rig.check())
        self.run(rig.start())
        content = self.run(rig.disk.read(0, self.model.size))
        self.model.check_survivor(content)
        self.model.settle(content)

    def discard_loop(self) -> None:
        """End this life: whatever was under way is forgotten."""
        self.in_flight.clear()
        # A task that is cancelled may have started another one while it ended.
        while tasks := asyncio.all_tasks(self.loop):
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()
        # These exceptions come from tasks that were cancelled here. On a real machine they would not run any more.
        self.escaped.clear()


def _sectors(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    return [_aligned(begin, size) for begin, size in ranges if size]


def _aligned(offset: int, length: int) -> tuple[int, int]:
    begin = offset // SECTOR * SECTOR
    return begin, -(-(offset + length) // SECTOR) * SECTOR - begin


def _stamped(stamp: int, offset: int, length: int) -> bytes:
    """Bytes that no other write and no other place can have."""
    return random.Random(stamp << 40 | offset).randbytes(length)


async def _turn(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


async def _advance(clock: SimClock, seconds: float) -> None:
    clock.advance(seconds)
