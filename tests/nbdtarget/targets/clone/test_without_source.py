# SPDX-License-Identifier: Apache-2.0
"""A clone of which everything is copied needs no source, and does not even open it."""

import asyncio
import errno as errnos
from collections.abc import AsyncIterator

import pytest

from nbdtarget.bio import OP_WRITE
from nbdtarget.common.errors import ConstructorError
from nbdtarget.config.devices import ConfiguredDevices
from nbdtarget.config.file import read
from nbdtarget.devices.base import Device
from nbdtarget.dm.registry import Registry
from nbdtarget.targets.registry import TARGET_TYPES
from nbdtarget_metadata.clone.metadata import CloneMetadata
from tests.support.clone import REGION, Rig
from tests.support.dm import RamOpener, make_registry

NR_REGIONS = 8
SIZE = NR_REGIONS * REGION
LINE = f"0 {SIZE // 512} clone /m /d /s 8 1 no_hydration"


class Lab:
    """A clone whose first regions are copied, and whose source is gone."""

    def __init__(self, registry: Registry, opener: RamOpener) -> None:
        self.registry = registry
        self.opener = opener

    async def copy(self, nr_regions: int) -> None:
        device = await self.registry.create("c", LINE)
        await device.write(0, b"w" * (nr_regions * REGION))
        await device.flush()
        await self.registry.remove("c")
        kept = {name: self.opener.open[name].data for name in ("/m", "/d")}
        del self.opener.sizes["/s"]
        self.opener.opened.clear()
        opening = self.opener.open_device

        async def open_with_content(name: str, *, read_only: bool) -> Device:
            opened = await opening(name, read_only=read_only)
            self.opener.open[name].data = kept[name]
            return opened

        self.opener.open_device = open_with_content  # type: ignore[method-assign]


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    size = CloneMetadata.device_size_for(NR_REGIONS)
    lab = Lab(*make_registry(m=size, d=SIZE, s=SIZE))
    yield lab
    await lab.registry.close()


async def test_hydrated_clone_starts_and_serves_without_its_source(lab: Lab) -> None:
    await lab.copy(NR_REGIONS)
    device = await lab.registry.create("c", LINE)
    assert "/s" not in lab.opener.opened
    assert await device.read(0, SIZE) == b"w" * SIZE
    await device.write(512, b"n" * 512)
    await device.flush()
    (line,) = await device.status_by_name()
    assert line[1]["source_open"] is False
    assert lab.registry.deps(device) == ["/m", "/d"]
    (table,) = device.table()
    assert table[3].split()[:3] == ["/m", "/d", "/s"], "it can be loaded again"
    await lab.registry.load("c", LINE)
    await lab.registry.resume("c")
    await device.suspend()
    await device.resume()
    assert (await device.read(512, 512)).tobytes() == b"n" * 512


async def test_hydrated_clone_is_linear_at_once_without_its_source(lab: Lab) -> None:
    await lab.copy(NR_REGIONS)
    line = LINE.replace("1 no_hydration", "2 no_hydration then_linear")
    device = await lab.registry.create("c", line)
    for _ in range(100):
        if device.table()[0][2] == "linear":
            break
        await asyncio.sleep(0)
    assert device.table()[0][2:] == ("linear", "/d 0")
    assert await device.read(0, SIZE) == b"w" * SIZE


async def test_configuration_file_starts_a_hydrated_clone_without_its_source(
    lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> None:
    await lab.copy(NR_REGIONS)
    path = tmp_path_factory.mktemp("config") / "disks.toml"
    path.write_text(f"[device.c]\ntable = '''{LINE}'''\n")
    devices = ConfiguredDevices(lab.registry, read(str(path), TARGET_TYPES))
    await devices.start()
    assert await lab.registry.get("c").read(0, SIZE) == b"w" * SIZE
    await devices.close()


async def test_error_of_a_missing_source_says_how_much_is_only_there(lab: Lab) -> None:
    await lab.copy(NR_REGIONS - 3)
    with pytest.raises(ConstructorError) as caught:
        await lab.registry.create("c", LINE)
    assert caught.value.reason == (
        "Error opening source device: /s: No such file or directory;"
        " 3 of 8 regions (12 KiB) must still be copied from it"
    )
    assert caught.value.errno == errnos.ENOENT
    assert lab.opener.still_open == []


async def test_what_is_hydrated_in_core_only_still_needs_the_source() -> None:
    """A crash would find regions that are not copied."""
    rig = await Rig().start()
    rig.bio(OP_WRITE, 0, rig.size)
    other = await type(rig.target).ctr(rig.ctx, rig.words)
    assert other._parts.has_source
    await other.dtr()
    await rig.disk.flush()
    another = await type(rig.target).ctr(rig.ctx, rig.words)
    assert not another._parts.has_source
    await another.dtr()
    await rig.stop()
    assert rig.ctx.nr_open == 0
