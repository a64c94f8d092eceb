# SPDX-License-Identifier: Apache-2.0
"""The disks of a simulated machine: a `CrashDevice` that takes its time."""

import asyncio
import random
from dataclasses import dataclass

from nbdtarget.devices.base import EXTENT_DATA, EXTENT_ZERO, Extent
from nbdtarget.devices.identity import BLOCK
from nbdtarget_metadata.disks import Evidence
from tests.support.devices import CrashDevice
from tests.support.model import SECTOR

__all__ = ["LATENCIES", "Latency", "SimDisk"]


@dataclass(frozen=True)
class Latency:
    """How long a disk takes for one operation, in simulated seconds.

    Args:
        inline: how often it is served inside `submit`.
        low_s, high_s: else, between these.
        stall: how often it takes `stall_s` instead.
    """

    inline: float = 0.0
    low_s: float = 0.0
    high_s: float = 0.0
    stall: float = 0.0
    stall_s: float = 0.0

    def draw(self, rng: random.Random) -> float:
        if self.stall and rng.random() < self.stall:
            return self.stall_s
        return rng.uniform(self.low_s, self.high_s) if self.high_s else 0.0


LATENCIES = {
    "inline": Latency(inline=1.0),
    "next turn": Latency(),
    "page cache": Latency(inline=0.7, low_s=50e-6, high_s=500e-6),
    "flash": Latency(low_s=20e-6, high_s=300e-6),
    "disk": Latency(low_s=1e-3, high_s=15e-3),
    "slow": Latency(low_s=0.02, high_s=0.4),
    "very slow": Latency(low_s=0.5, high_s=3.0),
    "stalling": Latency(inline=0.3, high_s=1e-3, stall=0.03, stall_s=6.0),
}


class SimDisk(CrashDevice):
    """A disk whose bios end after a time drawn from its seed, in any order."""

    latency = Latency()

    async def identify(self, role: str) -> Evidence:
        """It tells its serial number, as disks do."""
        return Evidence(BLOCK, self.name, self.size, (f"serial={self.name[1:]}",))

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """The sectors that are all zeroes are known."""
        data = self._read(offset, length)
        await asyncio.sleep(self.latency.draw(self._random))
        extents: list[Extent] = []
        at = 0
        while at < length:
            stop = min(length, (offset + at) // SECTOR * SECTOR + SECTOR - offset)
            flags = EXTENT_DATA if any(data[at:stop]) else EXTENT_ZERO
            if extents and extents[-1].flags == flags:
                extents[-1] = Extent(extents[-1].length + stop - at, flags)
            else:
                extents.append(Extent(stop - at, flags))
            at = stop
        return extents

    def _carry_out_one(self) -> None:
        delay_s = 0.0 if self.is_cut else self.latency.draw(self._random)
        if delay_s:
            loop = asyncio.get_running_loop()
            loop.call_later(delay_s, super()._carry_out_one)
        else:
            super()._carry_out_one()
