# SPDX-License-Identifier: Apache-2.0
"""`Syncs`: FUA is a write and a sync, all that wait share one, and one that fails fails all."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.bio import ALONE, FUA, IN_LOOP, OP_FLUSH, OP_WRITE, PENDING, Bio
from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import Device
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.devices.file.sync import Syncs as FileSyncs
from nbdtarget.devices.file.sync_pace import QUICK_NS, SyncPace
from nbdtarget.devices.resolve import create_device
from nbdtarget.fast.compiled import IS_COMPILED
from tests.support.file_device import SIZE, Syncs, bio_of, ended
from tests.support.patience import until


@pytest.fixture
async def device(tmp_path: Path) -> AsyncIterator[Device]:
    device = await create_device(str(tmp_path / "disk"), SIZE, sparse=True)
    yield device
    await device.close()


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    return Syncs(monkeypatch)


@pytest.mark.parametrize("length", [1, SIZE], ids=["inline", "by a worker"])
async def test_fua_write_is_written_once_and_ends_with_a_sync(
    device: Device, syncs: Syncs, length: int
) -> None:
    syncs.gate.clear()
    data = os.urandom(length)
    bio = Bio(OP_WRITE, 0, length, memoryview(data), FUA, lambda _: None, borrowed=True)
    device.submit(bio)
    await until(lambda: syncs.count == 1)
    written = bytes(await device.read(0, length))
    status, is_borrowed = bio.status, bio.borrowed
    syncs.gate.set()  # first, or a failure hangs
    assert written == data
    assert status == PENDING
    assert not is_borrowed
    assert await ended(bio) == [0]
    assert syncs.count == 1


async def test_fua_writes_share_the_next_sync_and_never_the_running_one(
    device: Device, syncs: Syncs
) -> None:
    syncs.gate.clear()
    bios = [
        Bio(OP_WRITE, nr * 512, 512, memoryview(bytes(512)), FUA, lambda _: None)
        for nr in range(10)
    ]
    for bio in bios:
        device.submit(bio)
    syncs.gate.set()
    assert await ended(*bios) == [0] * 10
    assert syncs.count == 2


async def test_next_sync_begins_before_the_bios_of_the_last_one_end(
    device: Device, syncs: Syncs
) -> None:
    syncs.gate.clear()
    counts: list[int] = []
    late = bio_of(OP_FLUSH, 0, 0)

    def first_ended(_: Bio) -> None:
        flush = syncs_of(device)._flush
        counts.append(len(flush.bios) if flush is not None else 0)
        device.submit(late)  # no sync that has begun covers it

    first = Bio(OP_FLUSH, 0, 0, None, 0, first_ended)
    second = bio_of(OP_FLUSH, 0, 0)
    device.submit(first)
    device.submit(second)
    syncs.gate.set()
    assert await ended(first, second, late) == [0, 0, 0]
    assert counts == [1]
    assert syncs.count == 3


def syncs_of(device: Device) -> FileSyncs:
    assert isinstance(device, FileDevice)
    return device._syncs


async def test_latched_device_refuses_fua_before_it_writes(
    device: Device, syncs: Syncs
) -> None:
    syncs.fail_with = errno.EIO
    with pytest.raises(DeviceError):
        await device.flush()
    with pytest.raises(DeviceError):
        await device.write(0, b"x", fua=True)
    assert bytes(await device.read(0, 1)) == b"\0"


async def test_failed_sync_fails_all_that_ride_on_it_and_all_that_wait(
    device: Device, syncs: Syncs
) -> None:
    syncs.gate.clear()
    syncs.fail_with = errno.EIO
    fua = [
        Bio(OP_WRITE, at, 1, memoryview(b"x"), FUA, lambda _: None) for at in range(3)
    ]
    bios = [*fua, bio_of(OP_FLUSH, 0, 0)]
    for bio in bios:
        device.submit(bio)
    syncs.gate.set()
    assert await ended(*bios) == [errno.EIO] * 4
    assert syncs.count == 1


@pytest.mark.parametrize("status", [0, errno.EIO])
async def test_flush_waits_for_an_overlapping_writeback_and_fails_with_it(
    device: Device, syncs: Syncs, status: int
) -> None:
    """The kernel may tell the flush's error to the writeback, and then forget it."""
    writeback = syncs_of(device).begin_writeback()
    flush = bio_of(OP_FLUSH, 0, 0)
    fua = Bio(OP_WRITE, 0, 1, memoryview(b"x"), FUA, lambda _: None)
    device.submit(flush)
    device.submit(fua)
    await until(lambda: syncs.count == 2 and syncs_of(device)._flush is None)
    assert flush.status == fua.status == PENDING
    syncs_of(device).done(writeback, status)
    assert [flush.status, fua.status] == [status, status]


async def test_thread_in_c_or_a_worker_syncs_and_both_end(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        await asyncio.gather(device.flush(), device.write(0, b"x", fua=True))
    monkeypatch.setattr(syncs_of(device), "_has_no_thread", True)
    await device.flush()


async def test_error_that_the_kernel_tells_the_thread_latches(device: Device) -> None:
    """Without a stand-in: the descriptor is one that cannot be synced."""
    reading, writing = os.pipe()
    syncs = syncs_of(device)
    fd, syncs._fd = syncs._fd, reading
    try:
        with pytest.raises(DeviceError) as caught:
            await device.flush()
    finally:
        syncs._fd = fd
        os.close(writing)
    assert caught.value.errno == errno.EINVAL
    assert syncs.is_latched
    with pytest.raises(DeviceError):
        await device.flush()
    await syncs.close()
    os.close(reading)


async def test_close_waits_for_the_sync_that_runs(tmp_path: Path) -> None:
    device = await create_device(str(tmp_path / "disk"), SIZE, sparse=True)
    flush = bio_of(OP_FLUSH, 0, 0)
    device.submit(flush)
    await device.close()
    assert flush.status == 0


# ---- syncs that the loop makes itself ----


@pytest.fixture
def quick(device: Device, monkeypatch: pytest.MonkeyPatch) -> FileSyncs:
    """A device whose syncs count as quick."""

    def begin(_: SyncPace, *, may_be_ours: bool) -> bool:
        return may_be_ours

    monkeypatch.setattr(SyncPace, "begin", begin)
    return syncs_of(device)


@pytest.mark.usefixtures("quick")
async def test_the_loop_syncs_for_a_client_that_is_alone(
    device: Device, syncs: Syncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def noted(fd: int) -> None:
        order.append("sync")
        syncs.fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", noted)
    bio = Bio(OP_FLUSH, 0, 0, None, ALONE | IN_LOOP, lambda _: order.append("end"))
    device.submit(bio)
    assert bio.status == 0  # at once, and after the sync
    assert order == ["sync", "end"]
    device.submit(other := bio_of(OP_FLUSH, 0, 0))
    assert other.status == PENDING
    assert await ended(other) == [0]
    assert syncs.count == 2


async def test_a_sync_of_the_loop_that_fails_latches(
    device: Device, quick: FileSyncs, syncs: Syncs
) -> None:
    syncs.fail_with = errno.EIO
    device.submit(bio := bio_of(OP_FLUSH, 0, 0, ALONE | IN_LOOP))
    assert bio.status == errno.EIO
    assert quick.is_latched
    syncs.fail_with = 0
    device.submit(bio := bio_of(OP_FLUSH, 0, 0, ALONE | IN_LOOP))
    assert bio.status == errno.EIO
    assert syncs.count == 1


async def test_the_loop_does_not_sync_while_another_sync_may_be_told_an_error(
    device: Device, quick: FileSyncs, syncs: Syncs
) -> None:
    other = quick.begin_writeback()
    device.submit(bio := bio_of(OP_FLUSH, 0, 0, ALONE | IN_LOOP))
    assert bio.status == PENDING
    await until(lambda: syncs.count == 1)
    await until(lambda: quick._flush is None)
    assert bio.status == PENDING
    quick.done(other, errno.EIO)
    assert bio.status == errno.EIO


async def test_a_flush_waits_for_the_next_sync_also_if_it_is_alone(
    device: Device, quick: FileSyncs, syncs: Syncs
) -> None:
    syncs.gate.clear()
    device.submit(first := bio_of(OP_FLUSH, 0, 0))
    device.submit(second := bio_of(OP_FLUSH, 0, 0, ALONE | IN_LOOP))
    syncs.gate.set()
    assert await ended(first, second) == [0, 0]
    assert syncs.count == 2


# ---- syncs that the loop waits for ----


class HeldSyncer:
    """A thread that has not synced yet."""

    event_fd = -1

    def __init__(self) -> None:
        self.waited: list[int] = []
        self.status = -1

    def begin(self) -> None:
        self.status = -1

    def take(self, wait_ns: int = 0) -> int:
        self.waited.append(wait_ns)
        return self.status


@pytest.mark.skipif(not IS_COMPILED, reason="there is no thread in C")
async def test_the_loop_waits_for_the_sync_of_a_client_that_is_alone(
    device: Device, quick: FileSyncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdtarget.devices.file.sync.QUICK_NS", 20 * 10**9)
    device.submit(bio := bio_of(OP_FLUSH, 0, 0, ALONE))
    assert bio.status == 0  # at once
    assert quick.nr_running == 0
    device.submit(bio := bio_of(OP_FLUSH, 0, 0))
    assert bio.status == PENDING
    assert await ended(bio) == [0]


@pytest.mark.parametrize("status", [0, errno.EIO])
async def test_a_sync_that_takes_longer_is_left_to_the_loop(
    device: Device,
    quick: FileSyncs,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    held = HeldSyncer()
    monkeypatch.setattr(quick, "_syncer", held)
    monkeypatch.setattr("nbdtarget.devices.file.sync.IS_COMPILED", True)
    device.submit(bio := bio_of(OP_FLUSH, 0, 0, ALONE))
    device.submit(other := bio_of(OP_FLUSH, 0, 0, ALONE))
    assert held.waited == [QUICK_NS]  # the second one rides on the next sync
    assert [bio.status, other.status] == [PENDING, PENDING]
    held.status = status
    quick._reap()
    assert bio.status == status
    held.status = status
    if not status:
        quick._reap()
    assert other.status == status
    monkeypatch.undo()


async def test_a_worker_is_not_waited_for(
    device: Device, quick: FileSyncs, syncs: Syncs
) -> None:
    device.submit(bio := bio_of(OP_FLUSH, 0, 0, ALONE))
    assert bio.status == PENDING
    assert await ended(bio) == [0]
    assert syncs.count == 1
