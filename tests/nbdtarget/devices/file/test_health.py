# SPDX-License-Identifier: Apache-2.0
"""The errors for which a FileDevice latches, those for which it does not, and its health then."""

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.bio import FUA, OP_DISCARD
from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import Device
from nbdtarget.devices.file import device as file_module
from nbdtarget.devices.file import space
from nbdtarget.devices.health import HealthState
from nbdtarget.devices.resolve import create_device
from tests.support.file_device import SIZE, Syncs, bio_of, ended


@pytest.fixture
async def device(tmp_path: Path) -> AsyncIterator[Device]:
    device = await create_device(str(tmp_path / "disk"), SIZE, sparse=True)
    yield device
    await device.close()


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    return Syncs(monkeypatch)


@pytest.mark.parametrize("flags", [0, FUA])
async def test_a_discard_that_fails_fails_alone(
    device: Device, monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(space, "allocate", fail)
        bio = bio_of(OP_DISCARD, 0, 4096, flags)
        device.submit(bio)
        assert await ended(bio) == [errno.EIO]
    assert device.health.state is HealthState.OK
    assert device.health.errors == {"discard": 1}
    await device.write(0, bytes(512), fua=True)
    await device.flush()


async def test_a_discard_with_fua_whose_sync_fails_latches(
    device: Device, syncs: Syncs
) -> None:
    syncs.fail_with = errno.EIO
    bio = bio_of(OP_DISCARD, 0, 4096, FUA)
    device.submit(bio)
    assert await ended(bio) == [errno.EIO]
    syncs.fail_with = 0
    with pytest.raises(DeviceError):
        await device.flush()


async def test_health_says_what_has_failed_and_since_when(
    device: Device, syncs: Syncs
) -> None:
    health = device.health
    assert (health.state, health.errors, health.last_error) == (HealthState.OK, {}, "")
    os.truncate(device.name, 4096)
    with pytest.raises(DeviceError):
        await device.read(8192, 512)
    assert (health.state, dict(health.errors)) == (HealthState.OK, {"read": 1})
    syncs.fail_with = errno.ENXIO
    with pytest.raises(DeviceError):
        await device.flush()
    assert (health.state, health.errno) == (HealthState.LATCHED, errno.ENXIO)
    assert health.since_s > 0
    assert dict(health.errors) == {"read": 1, "flush": 1}
    assert health.last_error == "flush: No such device or address"
    with pytest.raises(DeviceError):
        await device.flush()  # refused, and nothing new has failed
    assert health.errors["flush"] == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
async def test_want_of_space_latches_where_it_may_be_news_of_an_earlier_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """On NFS, and wherever we do not know better."""
    monkeypatch.setattr(file_module, "refuses_before_it_takes", lambda _: False)
    device = await create_device(str(tmp_path / "disk"), SIZE, sparse=True)

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(file_module, "_pwrite", fail)
        with pytest.raises(DeviceError):
            await device.write(0, bytes(512))
    with pytest.raises(DeviceError):
        await device.flush()
    await device.close()
