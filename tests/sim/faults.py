# SPDX-License-Identifier: Apache-2.0
"""A disk of a simulated machine goes bad in the middle of a life, in one of `CrashDevice`'s ways.

What may fail from then on: a request, with EIO, a verb, the boot itself. What must not: what is
read is right, no acknowledged flush is lost, a FLUSH that failed because a disk has latched fails
again until the machine is started anew, the server goes on serving, and the metadata passes its
check after the crash, on disks that work again.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from nbdtarget.bio import OP_FLUSH, OP_READ, OP_WRITE, OP_WRITE_ZEROES
from nbdtarget.common.clock import Clock
from nbdtarget.dm.registry import Registry
from tests.sim.disks import SimDisk
from tests.sim.rigs import Disk, Rig, Role
from tests.support.devices import BadRange, FailAfter, FailFlush, Lie, Slow
from tests.support.model import SECTOR

__all__ = ["Fault", "stands_on_latched"]

CHANCE: Final = 0.12  # of a life
SLOW_S: Final = 40.0
READS: Final = frozenset((OP_READ,))
WRITES: Final = frozenset((OP_WRITE, OP_WRITE_ZEROES))


@dataclass(frozen=True)
class Fault:
    """One disk's misfortune.

    Args:
        after_s: from the end of the boot on; None: from its beginning.
        lie: None: it is only slow, and nothing may fail.
    """

    disk: str
    after_s: float | None
    lie: Lie | None

    @classmethod
    def maybe_draw(cls, rng: random.Random, rig: Rig) -> "Fault | None":
        if rng.random() >= CHANCE:
            return None
        disk = rng.choice(rig.disks)
        after_s = rng.choice((None, 0.0, 0.001, 0.1, 2.0))
        return cls(disk.name, after_s, _draw_lie(rng, disk))

    def lie_with(self, clock: Clock) -> Lie:
        return Slow(SLOW_S, clock) if self.lie is None else self.lie


def _draw_lie(rng: random.Random, disk: Disk) -> Lie | None:
    kinds = ["range", "after", "slow"]
    if disk.role is not Role.SOURCE:
        kinds += ["flush", "flush"]
    kind = rng.choice(kinds)
    if kind == "flush":
        return FailFlush(rng.randrange(4))
    if kind == "after":
        return FailAfter(int(10 ** rng.uniform(0, 2)) - 1)
    if kind == "slow":
        return None
    begin = rng.randrange(disk.size // SECTOR) * SECTOR
    end = begin + rng.choice((1, 8)) * SECTOR
    ops = rng.choice((READS, WRITES, READS | WRITES | {OP_FLUSH}))
    return BadRange(begin, end, frozenset(ops))


def stands_on_latched(registry: Registry, disks: Mapping[str, SimDisk]) -> bool:
    """Whether a disk of a live table has latched: the metadata of a cache are not below what has taken its place.

    A cache device does not count: it is given up where the origin has everything.
    """
    names = {
        below.name for device in registry.devices() for below in device.devices_below()
    } - {"/cache"}
    return any(disk.is_latched for disk in disks.values() if disk.name in names)
