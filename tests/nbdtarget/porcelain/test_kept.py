# SPDX-License-Identifier: Apache-2.0
"""KeptSource: a source that a plan has opened is not opened again, and is closed if it is not used."""

from pathlib import Path

import pytest

from nbdtarget.devices import resolve
from nbdtarget.devices.base import Device
from nbdtarget.devices.helper.device import HelperDevice
from nbdtarget.porcelain import look
from nbdtarget.porcelain.kept import KeptSource
from tests.support.clients import needs


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of devices that were opened."""
    names: list[str] = []
    open_device = resolve.open_device

    async def noted(name: str, *, read_only: bool = False) -> Device:
        names.append(name)
        return await open_device(name, read_only=read_only)

    monkeypatch.setattr(resolve, "open_device", noted)
    return names


@needs("qemu-nbd")
async def test_image_is_opened_once(tmp_path: Path, opened: list[str]) -> None:
    (tmp_path / "disk").write_bytes(b"x" * 4096)
    name = f"qemu:raw:{tmp_path}/disk"
    kept = KeptSource()
    assert await look.disk_size(name, read_only=True, kept=kept) == 4096
    device = await kept.open_device(name, read_only=True)
    assert opened == [name]
    assert bytes(await device.read(0, 2)) == b"xx"
    await kept.close()  # the device was taken out, so it stays open
    assert bytes(await device.read(0, 2)) == b"xx"
    await device.close()
    again = await kept.open_device(name, read_only=True)
    assert opened == [name, name]
    await again.close()


@needs("qemu-nbd")
async def test_what_nobody_wants_is_closed(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"x" * 4096)
    kept = KeptSource()
    device = await resolve.open_device(f"qemu:raw:{tmp_path}/disk", read_only=True)
    assert isinstance(device, HelperDevice)
    assert kept.keep(device.name, device)
    assert not kept.keep(device.name, device)  # there is room for one
    other = await kept.open_device("memory:1M", read_only=True)
    await other.close()
    await kept.close()
    assert device.helper_pid is None


async def test_disk_that_could_be_written_to_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"x" * 4096)
    kept = KeptSource()
    name = str(tmp_path / "disk")
    assert await look.disk_size(name, read_only=True, kept=kept) == 4096
    device = await resolve.open_device(name, read_only=False)  # it is not locked
    await device.close()
    assert kept.may_create(str(tmp_path / "other"))
    made = await kept.create_device(str(tmp_path / "other"), 512)
    await made.close()
    assert kept.identity(name) == resolve.identity(name)
    await kept.remove_created(str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
