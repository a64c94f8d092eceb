# SPDX-License-Identifier: Apache-2.0
"""The losses of a mapped device: its own, and those below its live table."""

import errno as errnos
from pathlib import Path

import pytest

from nbdtarget.bio import OP_WRITE
from nbdtarget.common.clock import sleep, timeout
from nbdtarget.common.errors import DeviceError
from nbdtarget.devices import resolve
from nbdtarget.devices.losses import FlushObserver
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from tests.support.dm import RamOpener, make_registry
from tests.support.nbd_server import StrictServer
from tests.support.patience import PATIENCE_S
from tests.support.tables import submit

LOWER = "/dev/mapper/lower"


async def stack() -> tuple[Registry, RamOpener, MappedDevice, MappedDevice]:
    """Two mapped devices on halves of a third one, which stands on /a."""
    registry, opener = make_registry(a=8192, b=8192)
    await registry.create("lower", "0 16 linear /a 0")
    left = await registry.create("left", f"0 8 linear {LOWER} 0")
    right = await registry.create("right", f"0 8 linear {LOWER} 8")
    return registry, opener, left, right


async def tells_once(observer: FlushObserver) -> None:
    with pytest.raises(DeviceError, match="flush"):
        await observer.flush()
    await observer.flush()


async def test_loss_of_a_disk_is_told_once_to_each_client_of_everything_above() -> None:
    _, opener, *devices = await stack()
    clients = [FlushObserver(device) for device in devices for _ in range(2)]
    opener.open["/a"].health.note_loss()
    for client in clients:
        await tells_once(client)


async def test_loss_of_a_table_swap_below_is_told_to_each_client_above() -> None:
    registry, opener, *devices = await stack()
    clients = [FlushObserver(device) for device in devices]
    for device in devices:
        submit(device, OP_WRITE, 0, b"data")
    opener.open["/a"].flush_errno = errnos.EIO
    await registry.load("lower", "0 16 linear /b 0")
    await registry.resume("lower")
    for client in clients:
        await tells_once(client)


async def test_table_swap_neither_hides_a_loss_nor_invents_one() -> None:
    registry, opener = make_registry(a=4096, b=4096)
    device = await registry.create("x", "0 8 linear /a 0")
    await registry.create("y", "0 8 linear /b 0")
    for _ in range(3):
        opener.open["/b"].health.note_loss()
    untold = FlushObserver(device)
    opener.open["/a"].health.note_loss()
    told = FlushObserver(device)
    await registry.load("x", "0 8 linear /b 0")
    await registry.resume("x")
    await told.flush()  # a loss of /b before x used it is no loss of x
    await tells_once(untold)
    opener.open["/b"].health.note_loss()
    await tells_once(told)


async def test_replaced_table_without_a_flush_that_leaves_the_disk_is_a_loss(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry, _ = make_registry(a=4096, b=4096)
    device = await registry.create("x", "0 8 linear /a 0")
    client = FlushObserver(device)
    submit(device, OP_WRITE, 0, b"data")
    await registry.suspend("x", noflush=True)
    await registry.load("x", "0 8 linear /b 0")
    await registry.resume("x")
    await tells_once(client)
    assert "the next FLUSH of each client fails" in caplog.text


@pytest.mark.parametrize("verb", ["same disk", "flushed", "read-only"])
async def test_replaced_table_without_a_loss(verb: str) -> None:
    registry, _ = make_registry(a=4096, b=4096)
    device = await registry.create(
        "x", "0 8 linear /a 0", read_only=verb == "read-only"
    )
    client = FlushObserver(device)
    submit(device, OP_WRITE, 0, b"data")
    await registry.suspend("x", noflush=verb != "flushed")
    disk = "/a" if verb == "same disk" else "/b"
    await registry.load("x", f"0 8 linear {disk} 0")
    await registry.resume("x")
    await client.flush()


async def test_table_that_has_failed_has_lost_what_it_did_not_flush() -> None:
    registry, _ = make_registry(a=4096)
    device = await registry.create("x", "0 8 linear /a 0")
    client = FlushObserver(device)
    assert device.active is not None
    device.active.failed = True
    await registry.load("x", "0 8 linear /a 0")
    await registry.resume("x")
    await tells_once(client)


async def test_trouble_of_a_disk_is_one_event_of_everything_above_it() -> None:
    registry, opener, left, right = await stack()
    other = await registry.create("other", "0 8 linear /b 0")
    devices = [registry.get("lower"), left, right]
    health = opener.open["/a"].health
    for trouble in (
        lambda: health.latch(errnos.EIO),
        lambda: health.latch(errnos.EIO),  # no news
        lambda: health.lose(errnos.EIO),
        health.note_loss,
    ):
        trouble()
    assert [device.event_nr for device in devices] == [3, 3, 3]
    assert other.event_nr == 0
    await registry.load("lower", "0 16 linear /b 0")
    await registry.resume("lower")
    before = [device.event_nr for device in devices]
    health.note_loss()  # no table uses the disk any more
    assert [device.event_nr for device in devices] == before
    await registry.remove("left")
    await registry.remove("right")
    await registry.remove("lower")
    opener.open["/b"].health.latch(errnos.EIO)
    # Its removal was its last event.
    assert (devices[0].event_nr, other.event_nr) == (before[0] + 1, 1)


async def test_loss_of_a_restarted_nbd_server_is_told_through_two_tables(
    tmp_path: Path,
) -> None:
    registry = Registry(resolve)
    async with StrictServer(tmp_path) as server:
        await registry.create("lower", f"0 16 linear {server.uri} 0")
        upper = await registry.create("upper", f"0 8 linear {LOWER} 8")
        clients = [FlushObserver(upper) for _ in range(2)]
        await upper.write(0, b"data")
        server.hang_up_after = len(server.noted)
        with pytest.raises(DeviceError):
            await upper.read(0, 512)
        server.hang_up_after = -1
        (device,) = upper.devices_below()
        async with timeout(PATIENCE_S):
            while not device.health.is_usable:
                await sleep(0.01)
        for client in clients:
            await tells_once(client)
        await FlushObserver(upper).flush()
        await registry.close()
