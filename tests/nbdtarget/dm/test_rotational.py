# SPDX-License-Identifier: Apache-2.0
"""Whether a disk has to seek: told from below, through any table, or as people say."""

import io
import os
from pathlib import Path

import pytest

from nbdtarget.common.errors import TableError
from nbdtarget.devices import resolve
from nbdtarget.devices.file import syscalls
from nbdtarget.dm.registry import Registry
from tests.support.dm import RamOpener, make_registry

MIB = 1 << 20


def make() -> tuple[Registry, RamOpener]:
    return make_registry(m=MIB, a=MIB, b=MIB, c=4 * MIB)


@pytest.mark.parametrize(
    "table",
    [
        "0 8 linear /a 0\n8 8 linear /b 0",
        "0 16 striped 2 8 /a 0 /b 0",
        "0 2048 clone /m /a /b 8",
        "0 2048 cache /m /a /b 128 0 smq 0",
        "0 2048 linear /dev/mapper/low 0",
    ],
)
@pytest.mark.parametrize("disk", ["/a", "/b", "/m"])
async def test_device_is_rotational_if_any_part_with_data_is(
    table: str, disk: str
) -> None:
    registry, opener = make()
    if "low" in table:
        await registry.create("low", "0 1024 linear /a 0\n1024 1024 linear /b 0")
    device = await registry.create("d", table)
    assert not device.is_rotational
    if disk in opener.open:
        opener.open[disk].rotational = True
    assert device.is_rotational is (disk != "/m")
    await registry.close()


async def test_what_people_say_stands_above_what_the_disks_are() -> None:
    registry, opener = make()
    device = await registry.create("d", "0 8 linear /a 0", rotational=True)
    assert device.is_rotational
    await registry.load("d", "0 8 linear /b 0")
    await registry.resume("d")
    assert device.is_rotational
    await device.message(0, ["@rotational", "no"])
    opener.open["/b"].rotational = True
    assert not device.is_rotational
    await device.message(0, ["@rotational", "auto"])
    assert device.is_rotational
    for words in (["@rotational"], ["@rotational", "maybe"]):
        with pytest.raises(TableError, match="expected @rotational"):
            await device.message(0, words)


class SysBlock:
    """The queues of a machine: /dev/major:minor has a disk that seeks, if it is in `seeks`."""

    def __init__(self, *seeks: int) -> None:
        self.seeks = seeks

    def open(self, path: str, **_: object) -> io.StringIO:
        assert path.startswith("/sys/dev/block/")
        device, _slash, rest = path.removeprefix("/sys/dev/block/").partition("/")
        if rest != "queue/rotational":
            raise FileNotFoundError
        major, minor = map(int, device.split(":"))
        return io.StringIO(f"{int(os.makedev(major, minor) in self.seeks)}\n")


async def test_file_is_as_rotational_as_the_disk_below_its_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))

    async def opened() -> bool:
        device = await resolve.open_device(str(path))
        await device.close()
        return device.is_rotational

    disk = path.stat().st_dev
    for seeks in (disk, 0, disk + 1):
        sys_block = SysBlock(seeks)
        monkeypatch.setattr(syscalls, "open", sys_block.open, raising=False)
        assert await opened() is (seeks == disk)
