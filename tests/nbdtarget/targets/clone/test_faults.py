# SPDX-License-Identifier: Apache-2.0
"""Each operation on each device fails once, or from there on; then the power goes.

No randomness in what fails: the workload runs clean once to be counted, then once for each
N. Whatever fails, what a FLUSH or FUA acknowledged is there after the power cut, the rest is
old or new, the source is untouched, and no request waits for ever.
"""

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import Device
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget.targets.metadata_io import run
from nbdtarget_metadata.clone.metadata import CloneMetadata
from tests.support.clock import SimClock, settle
from tests.support.clone import REGION, Context, Disk
from tests.support.devices import CrashDevice, FaultDevice
from tests.support.metadata.report import check
from tests.support.model import DiskModel
from tests.support.patience import PATIENCE_S

SIZE = 9 * REGION + 512
CONTENT = random.Random(5).randbytes(SIZE)
WORDS = [
    "m",
    "d",
    "s",
    "8",
    "0",
    "4",
    "hydration_threshold",
    "2",
    "hydration_batch_size",
    "2",
]


class FaultRig:
    """A clone on devices of which one fails."""

    def __init__(self, images: dict[str, bytes] | None = None) -> None:
        metadata_size = CloneMetadata.device_size_min(10)
        garbage = random.Random(6).randbytes(SIZE)
        images = images or {"m": bytes(metadata_size), "d": garbage, "s": CONTENT}
        self.disks = {
            name: CrashDevice(len(image), 1, content=image, name=name)
            for name, image in images.items()
        }
        self.faults = {name: FaultDevice(disk) for name, disk in self.disks.items()}
        devices: dict[str, Device] = dict(self.faults)
        self.clock = SimClock()
        self.ctx = Context(devices, SIZE, self.clock)

    async def start(self) -> None:
        self.target = await CloneTarget.ctr(self.ctx, WORDS)
        self.target.resume()
        self.disk = Disk(self.target)

    async def stop(self) -> None:
        self.target.presuspend()
        await self.target.postsuspend()
        await self.target.dtr()

    def after_power_cut(self, seed: int) -> "FaultRig":
        assert self.disks["s"].image() == CONTENT
        images = {name: disk.crash(seed) for name, disk in self.disks.items()}
        return FaultRig(images)


class Client:
    """Writes, one bio at a time, and remembers what it was promised."""

    def __init__(self, rig: FaultRig, model: DiskModel) -> None:
        self.rig = rig
        self.model = model
        self.stamp = 0

    async def write(self, offset: int, length: int, *, fua: bool = False) -> None:
        self.stamp += 1
        data = bytes([self.stamp]) * length
        started = self.model.start_write(offset, data, length, f"write#{self.stamp}")
        done = self.rig.disk.write(offset, data, fua=fua)
        self.model.end_write(started, ok=await _is_ok(done), fua=fua)

    async def zero(self, offset: int, length: int) -> None:
        started = self.model.start_write(offset, bytes(length), length, "zero")
        ok = await _is_ok(self.rig.disk.write_zeroes(offset, length))
        self.model.end_write(started, ok=ok)

    async def discard(self, offset: int, length: int) -> None:
        started = self.model.start_write(offset, None, length, "discard")
        ok = await _is_ok(self.rig.disk.discard(offset, length))
        self.model.end_write(started, ok=ok)

    async def flush(self) -> None:
        promised = self.model.start_flush()
        self.model.end_flush(promised, ok=await _is_ok(self.rig.disk.flush()))


async def _is_ok(io: Coroutine[Any, Any, None]) -> bool:
    try:
        await asyncio.wait_for(io, PATIENCE_S)
    except DeviceError:
        return False
    return True


async def workload(client: Client) -> None:
    clock = client.rig.clock
    await client.write(0, REGION)
    await client.write(REGION + 512, 1024)
    await client.flush()
    await client.write(2 * REGION + 512, 2 * REGION, fua=True)
    await client.write(512, 512)
    await client.discard(5 * REGION, REGION)
    await settle(10)
    await client.zero(6 * REGION + 512, 512)
    clock.advance(1.5)
    await settle(10)
    await client.write(0, 512, fua=True)
    await client.write(9 * REGION, 512)
    await client.flush()
    await client.write(5 * REGION, 512)
    for _ in range(5):
        await settle(10)
        clock.advance(0.3)
    await client.write(8 * REGION + 7, 1000)
    await client.flush()
    await client.rig.target.status()


async def run_with_fault(name: str, fail_at: int | None, sticky: bool) -> int:
    """Run the workload, then look at what power cuts leave; return operations seen."""
    rig = FaultRig()
    model = DiskModel(CONTENT)
    client = Client(rig, model)
    await rig.start()  # a constructor that fails is the constructor's tests' business
    fault = rig.faults[name]
    begun = fault.count
    fault.sticky = sticky
    fault.fail_at = None if fail_at is None else begun + fail_at
    await workload(client)
    await rig.stop()
    for seed in range(4):
        rebooted = rig.after_power_cut(seed)
        await rebooted.start()
        model.check_survivor(await rebooted.disk.read(0, SIZE))
        await rebooted.stop()
        await run(rebooted.disks["m"], check(rebooted.disks["m"].size))
    return fault.count - begun


@pytest.mark.slow
@pytest.mark.parametrize("sticky", [True, False])
@pytest.mark.parametrize("name", ["m", "d", "s"])
async def test_no_acknowledged_flush_is_lost_whatever_fails(
    name: str, sticky: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL")
    nr = await run_with_fault(name, None, sticky)
    assert nr >= 5
    for fail_at in range(nr):
        await run_with_fault(name, fail_at, sticky)
    assert not caplog.records
