# SPDX-License-Identifier: Apache-2.0
"""Nothing hangs: random bios, verbs and messages over disks that dawdle and fail.

Each disk ends a bio inside `submit`, in a later turn of the loop, or seconds later, and fails some operations for
a while; time passes by itself. Whatever was asked for must end: bios, suspends, messages. When all has come to
rest no block is held or locked, the policy has the mappings of the metadata, and after `remove` no timer is left.
This module does not look at the data: the crash machine and the simulation do.
"""

import asyncio
import random
from collections.abc import Coroutine
from typing import Any, Final

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
from nbdtarget.common.errors import ConstructorError, DeviceError, TableError
from nbdtarget.dm.mapped_device import State
from nbdtarget.policies.base import PROMOTE
from nbdtarget.policies.smq.policy import Smq
from nbdtarget_metadata.mode import Mode
from tests.support.cache import BLOCK, CacheLab, LabSpy

__all__ = ["Liveness"]

OPS: Final = (OP_READ,) * 3 + (OP_WRITE,) * 4
RARE_OPS: Final = (OP_FLUSH, OP_DISCARD, OP_WRITE_ZEROES, OP_CACHE)
MODES: Final = ("writeback", "writethrough", "passthrough")
FEATURES: Final = ("no_discard_passdown", "dirty_log", "sorted_writeback", "metadata2")
POLICIES: Final = ("smq", "smq", "mq", "cleaner")
MESSAGES: Final = (
    "clean_now",
    "warm 0-3",
    "warm 0-1 2-3",
    "pin 0-2",
    "unpin 0-1",
    "unpin 0-999",
    "invalidate_cblocks 0-1",
    "invalidate_cblocks 0-8",
    "migration_threshold 5",
    "migration_rate 0",
    "migration_rate 50000",
    "bogus 1",
)
SLOW_S: Final = 3.0
PATIENCE_S: Final = (
    4000.0  # of simulated time: far more than all that is slow or retried
)
_NS: Final = 1_000_000_000

REFUSALS: Final = (TableError, ConstructorError, DeviceError)


class Fitful:
    """How one disk dawdles and fails; put between a spy and its disk."""

    def __init__(self, rng: random.Random, spy: LabSpy, lab: CacheLab) -> None:
        self._rng = rng
        self._device = spy.device
        self._clock = lab.clock
        self._slow = rng.choice((0, 0.1, 0.5, 0.9))
        self._soon = rng.choice((0, 0.2, 0.5))
        self.errors: dict[int, float] = {}
        spy.submit = self.submit  # type: ignore[method-assign]

    def submit(self, bio: Bio) -> None:
        fails = self._rng.random() < self.errors.get(bio.op, 0)
        fate = self._rng.random()
        if fate < self._slow:
            bio.own()
            delay_s = self._rng.random() * SLOW_S
            self._clock.call_later(delay_s, lambda: self._end(bio, fails))
        elif fate < self._slow + self._soon:
            bio.own()
            asyncio.get_running_loop().call_soon(self._end, bio, fails)
        else:
            self._end(bio, fails)

    def _end(self, bio: Bio, fails: bool) -> None:
        if fails:
            bio.end(5)
        else:
            self._device.submit(bio)


class Liveness:
    """One life of a cache, drawn from `seed`."""

    def __init__(self, seed: int, *, may_fail: bool) -> None:
        rng = self.rng = random.Random(seed)
        self.may_fail = may_fail
        self.lab = CacheLab(
            nr_cblocks=rng.choice((1, 2, 8, 8, 16)),
            nr_oblocks=rng.choice((1, 4, 32, 64)),
            tail=rng.choice((0, 512, 4096)),
        )
        self.disks = {
            name: Fitful(rng, spy, self.lab) for name, spy in self.lab.spies.items()
        }
        self.bios: list[Bio] = []
        self.asked: list[asyncio.Future[bool]] = []

    async def run(self, nr_rounds: int) -> None:
        passing = asyncio.ensure_future(self._pass_time())
        try:
            assert await self._ended(self.lab.create(self._words()))
            for _ in range(nr_rounds):
                if not await self._round():
                    break  # a resume was refused
            await self._recover()
            if self.lab.device.state is State.ACTIVE:
                await self._come_to_rest()
                self._check()
            await self._ended(self.lab.remove())
            await self._until(lambda: all(one.done() for one in self.asked), "asked")
            assert all(bio.status >= 0 for bio in self.bios)
        finally:
            passing.cancel()
        await self.lab.close()
        left = [timer for *_, timer in self.lab.clock._timers if not timer.cancelled]
        assert not left, "timers of a cache that is gone"

    # Asking

    async def _round(self) -> bool:
        """Do one thing. Returns whether the device still works."""
        rng, lab = self.rng, self.lab
        if self.may_fail and rng.random() < 0.1:
            self._let_fail()
        kind = rng.random()
        goes_on = True
        if kind < 0.80:
            self._submit_some(rng.choice((1, 3, 10, 40)))
        elif kind < 0.86:
            self._ask(lab.message(rng.choice(MESSAGES)))
        elif kind < 0.90:
            self._ask(lab.registry.suspend("c", noflush=rng.random() < 0.4))
            await self._submit_meanwhile()
            goes_on = await self._ended(lab.resume())
        elif kind < 0.94:
            if await self._ended(lab.load(self._words())):
                self._ask(lab.resume())
                await self._submit_meanwhile()
                goes_on = await self._ended(lab.resume())
        else:
            self._ask(lab.device.status(noflush=rng.random() < 0.5))
            self._ask(lab.device.extents(0, lab.length))
        for _ in range(rng.choice((0, 0, 1, 5, 50))):
            await asyncio.sleep(0)
        self.bios = [bio for bio in self.bios if bio.status < 0]
        return goes_on

    def _words(self) -> str:
        rng = self.rng
        features = [word for word in FEATURES if rng.random() < 0.4]
        features.append(rng.choice(MODES))
        core = ["migration_threshold", str(rng.choice((0, 64, 2048, 100000)))]
        if rng.random() < 0.3:
            core += ["migration_rate", str(rng.choice((0, 100000, 1000000)))]
        names = [str(len(features)), *features, rng.choice(POLICIES), str(len(core))]
        return " ".join((*names, *core))

    def _let_fail(self) -> None:
        """From now on some operations fail, of some disks; of the metadata's seldom."""
        rng = self.rng
        for name, disk in self.disks.items():
            disk.errors = {}
            if name != "m" or rng.random() < 0.15:
                chance = rng.choice((0, 0, 0.05, 0.3, 1))
                ops = (OP_READ, OP_WRITE, OP_FLUSH, OP_DISCARD, OP_WRITE_ZEROES)
                disk.errors = dict.fromkeys(rng.sample(ops, 2), chance)

    def _submit_some(self, nr_bios: int) -> None:
        rng, size = self.rng, self.lab.length
        for _ in range(nr_bios):
            op = rng.choice(OPS + RARE_OPS)
            if op == OP_FLUSH:
                self.bios.append(self.lab.flush())
                continue
            unit = rng.choice((512, BLOCK))
            offset = min(rng.randrange(max(1, size // unit)) * unit, size - 512)
            length = unit * rng.choice((1, 1, 2, 5, 65))
            if rng.random() < 0.05:
                offset, length = 0, size
            flags = FUA if op not in (OP_READ, OP_CACHE) and rng.random() < 0.2 else 0
            length = min(length, size - offset)
            self.bios.append(self.lab.submit(op, offset, length, flags))

    async def _submit_meanwhile(self) -> None:
        for _ in range(self.rng.randrange(20)):
            self._submit_some(self.rng.random() < 0.3)
            await asyncio.sleep(0)

    # Waiting

    async def _pass_time(self) -> None:
        while True:
            for _ in range(3):
                await asyncio.sleep(0)
            self.lab.clock.advance(0.05)

    def _ask(self, coroutine: Coroutine[Any, Any, object]) -> None:
        self.asked.append(asyncio.ensure_future(self._ended(coroutine)))

    async def _ended(self, coroutine: Coroutine[Any, Any, object]) -> bool:
        """Wait for an answer. Returns whether it is a success."""
        task = asyncio.ensure_future(coroutine)
        await self._until(task.done, repr(coroutine))
        error = task.exception()
        if error is not None and not isinstance(error, REFUSALS):
            raise error
        return error is None

    async def _until(self, is_true: Any, what: str) -> None:
        end_ns = self.lab.clock.now_ns() + int(PATIENCE_S * _NS)
        while not is_true():
            await asyncio.sleep(0)
            assert self.lab.clock.now_ns() < end_ns, f"hangs: {what}"

    async def _recover(self) -> None:
        """The disks work again; a device that was left suspended gets another table, if it can."""
        for disk in self.disks.values():
            disk.errors = {}
        for words in ("1 writeback smq 0", "1 writethrough smq 0"):
            if self.lab.device.state is State.ACTIVE:
                return
            if await self._ended(self.lab.load(words)):
                await self._ended(self.lab.resume())

    async def _come_to_rest(self) -> None:
        await self._until(lambda: all(bio.status >= 0 for bio in self.bios), "bios")
        target = self.lab.target
        await self._until(
            lambda: not (target._migrations._tasks or target._blocks.locks.locked),
            "migrations",
        )

    # Looking

    def _check(self) -> None:
        target = self.lab.target
        assert not target._blocks.locks.nr_holds
        assert not target._writes._through
        metadata, policy = target._metadata, target._blocks.policy
        if metadata.mode is not Mode.RW:
            return
        assert isinstance(policy, Smq)
        for cblock in range(metadata.nr_cblocks):
            oblock = metadata.maybe_oblock(cblock)
            if oblock is not None:
                assert policy._table.find(oblock) == cblock
        queued = policy.tracker._queued
        assert len(policy.tracker) == len(queued), "handed out, and never completed"
        nr_reserved = sum(work.op == PROMOTE for work in queued)
        assert policy.residency == metadata.nr_mapped + nr_reserved
