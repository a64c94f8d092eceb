# SPDX-License-Identifier: Apache-2.0
"""A discard that a disk refuses fails alone, whatever target it went through.

Many SSDs and SAN volumes answer UNMAP with errors.
"""

import errno
from collections.abc import Iterator

import pytest

from nbdtarget.bio import FUA, OP_DISCARD, PENDING, Bio
from nbdtarget.dm.registry import Registry
from tests.support.clock import SimClock
from tests.support.crash.cache_rigs import CacheRig, WritethroughRig, small_blocks
from tests.support.crash.rigs import (
    DISK_SIZE,
    REGION_SIZE,
    CloneRig,
    DeviceTable,
    LinearRig,
)
from tests.support.devices import BadRange, CrashDevice
from tests.support.model import SECTOR

NO_DISCARDS = BadRange(0, 1 << 40, frozenset({OP_DISCARD}))


@pytest.fixture(autouse=True)
def blocks_of_any_size() -> Iterator[None]:
    with small_blocks():
        yield


async def discarded(disk: object, flags: int) -> int:
    bio = Bio(OP_DISCARD, 0, REGION_SIZE, None, flags, lambda _: None)
    disk.submit(bio)  # type: ignore[attr-defined]
    assert bio.status != PENDING or flags
    await disk.flush()  # type: ignore[attr-defined]
    return bio.status


@pytest.mark.parametrize("flags", [0, FUA])
@pytest.mark.parametrize("rig", [LinearRig, CloneRig, CacheRig, WritethroughRig])
async def test_a_discard_that_the_disk_refuses_makes_nothing_read_only(
    rig: type[LinearRig | CloneRig | CacheRig], flags: int
) -> None:
    lab = rig(1, 1.0)
    for device in lab.at_risk:
        device.lie = NO_DISCARDS
    await lab.start()
    await lab.disk.write(0, bytes([1]) * 2 * REGION_SIZE)
    assert await discarded(lab.disk, flags) == errno.EIO
    assert any(device.failed for device in lab.at_risk), "one was passed down"
    for nr in range(3):
        await lab.disk.write(nr * REGION_SIZE, bytes([2]) * REGION_SIZE, fua=nr == 2)
    await lab.disk.flush()
    data = bytes(await lab.disk.read(0, 3 * REGION_SIZE))
    assert data == bytes([2]) * 3 * REGION_SIZE
    assert "ro" not in (await lab.status()).split()[6:] or rig is LinearRig
    await lab.stop()


@pytest.mark.parametrize(
    "line",
    [
        f"striped 2 {REGION_SIZE // SECTOR} /a 0 /b 0",
        "log-writes /a /log",
        "delay /a 0 0",
        "dust /a 0 512",
    ],
)
async def test_a_discard_that_the_disk_refuses_fails_alone_in_the_small_targets(
    line: str,
) -> None:
    size = DISK_SIZE // (2 * REGION_SIZE) * 2 * REGION_SIZE
    devices = {
        name: CrashDevice(size, nr, name=name, lie=NO_DISCARDS)
        for nr, name in enumerate(("/a", "/b", "/log"))
    }
    registry = Registry(DeviceTable(dict(devices)), clock=SimClock())
    disk = await registry.create("d", f"0 {size // SECTOR} {line}")
    assert await discarded(disk, 0) == errno.EIO
    await disk.write(0, bytes([3]) * REGION_SIZE, fua=True)
    await disk.flush()
    assert bytes(await disk.read(0, REGION_SIZE)) == bytes([3]) * REGION_SIZE
    await registry.close()
