# SPDX-License-Identifier: Apache-2.0
"""Writes of parts of one sector, all in flight at the same time: none may undo another one.

The clients of the simulation never do this: the oracle keeps whole sectors, one value of each
write. Here every byte is written once, so that what it must be at the end is known.
"""

import asyncio
import random

import pytest

from nbdtarget.common.permissions import OVERWRITE
from nbdtarget.dm.registry import Registry
from nbdtarget.targets.powercut.volatile_cache import Fate
from tests.sim.catalog import RIGS
from tests.sim.disks import LATENCIES, SimDisk
from tests.sim.loop import SimLoop, SimLoopClock
from tests.sim.rigs import Rig
from tests.support.crash.cache_rigs import small_blocks
from tests.support.crash.rigs import DeviceTable

SEEDS = 8  # for each rig
PIECE_MAX = 200  # bytes
LATENCY_NAMES = ("inline", "next turn", "flash", "disk")


def _disks(rig: Rig, rng: random.Random, images: dict[str, bytes]) -> list[SimDisk]:
    disks = []
    for disk in rig.disks:
        latency = LATENCIES[rng.choice(LATENCY_NAMES)]
        device = SimDisk(
            disk.size,
            rng.randrange(1 << 32),
            content=images[disk.name],
            name=disk.name,
            inline_chance=latency.inline,
        )
        device.latency = latency
        disks.append(device)
    return disks


async def _create(rig: Rig, disks: list[SimDisk], loop: SimLoop) -> Registry:
    table = DeviceTable({disk.name: disk for disk in disks})
    registry = Registry(table, clock=SimLoopClock(loop))
    for name, lines in rig.tables.items():
        # The disks hold what the model says before their metadata is made.
        await registry.create(name, lines, permissions=frozenset((OVERWRITE,)))
    return registry


def _pieces(rng: random.Random, size: int) -> list[tuple[int, bytes]]:
    """Half of a span of the disk, in pieces of a few bytes, in any order."""
    at = rng.randrange(size // 2)
    end = min(size, at + 6000)
    pieces = []
    while at < end:
        length = min(rng.randrange(1, PIECE_MAX), end - at)
        if rng.random() < 0.5:
            pieces.append((at, rng.randbytes(length)))
        at += length
    rng.shuffle(pieces)
    return pieces


async def _write_at_once(
    rig: Rig, rng: random.Random, disks: list[SimDisk], loop: SimLoop
) -> tuple[bytes, dict[str, bytes]]:
    """Return the expected content of the disk, and the images that a power cut after a flush leaves."""
    registry = await _create(rig, disks, loop)
    device = registry.get("d")
    if rig.others:
        await device.message(0, ("warm", "0-4"))
        await asyncio.sleep(rng.choice((0.0, 0.001, 5.0)))
    pieces = _pieces(rng, device.size)
    expected = bytearray(rig.content)
    for at, data in pieces:
        expected[at : at + len(data)] = data
    await asyncio.gather(
        *(device.write(at, data, fua=rng.random() < 0.1) for at, data in pieces)
    )
    assert await device.read(0, device.size) == expected
    await device.flush()
    images = {
        disk.name: disk.crash(rng.randrange(1 << 32), Fate.DROP) for disk in disks
    }
    assert await device.read(0, device.size) == expected
    await registry.close()
    return bytes(expected), images


async def _read(rig: Rig, disks: list[SimDisk], loop: SimLoop) -> bytes:
    registry = await _create(rig, disks, loop)
    device = registry.get("d")
    data = bytes(await device.read(0, device.size))
    await registry.close()
    return data


@pytest.mark.parametrize("rig_name", [n for n in RIGS if "backend" not in n])
def test_ragged_writes_at_once_lose_nothing_of_each_other(rig_name: str) -> None:
    for seed in range(SEEDS):
        rng = random.Random(f"{rig_name} {seed}")
        rig = RIGS[rig_name][0](rng)
        images = {
            disk.name: rng.randbytes(disk.size)
            if disk.content is None
            else disk.content
            for disk in rig.disks
        }
        with small_blocks():
            loop = SimLoop(seed)
            expected, images = loop.run_until_complete(
                _write_at_once(rig, rng, _disks(rig, rng, images), loop)
            )
            loop.close()
            loop = SimLoop(seed)
            found = loop.run_until_complete(_read(rig, _disks(rig, rng, images), loop))
            loop.close()
        assert found == expected, f"seed {seed}: after the power cut"
