# SPDX-License-Identifier: Apache-2.0
"""`Syncs`: FUA is a write and a sync, all that wait share one, and one that fails fails all."""

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbdtarget.bio import FUA, OP_FLUSH, OP_WRITE, OP_WRITE_ZEROES, PENDING, Bio
from nbdtarget.common.errors import DeviceError, ResolveError
from nbdtarget.devices.base import Device
from nbdtarget.devices.file import device as file_device
from nbdtarget.devices.file import open as file_open
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.devices.file.sync import Syncs as FileSyncs
from nbdtarget.devices.file.sync_pace import SyncPace
from nbdtarget.devices.resolve import create_device, open_device
from nbdtarget.fast.compiled import IS_COMPILED, FastFile
from nbdtarget_metadata.disks import Mark
from tests.support.file_device import SIZE, Syncs, bio_of, ended
from tests.support.patience import PATIENCE_S, until


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


# ---- the thread is lent to the compiled path ----


@pytest.fixture
async def lent(device: Device) -> FileSyncs:
    """A device whose thread the compiled path has, after so many quick syncs."""
    if not IS_COMPILED:
        pytest.skip("there is no thread in C")
    syncs = syncs_of(device)
    syncs._pace = AlwaysQuick()
    device.maybe_fast_file()
    await device.flush()
    assert is_lent(device)
    return syncs


class AlwaysQuick(SyncPace):
    """On a busy machine no sync may be quick.

    Attributes: nr_worth: what it was told of syncs that were worth the wait, each time that one was not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nr_worth: list[int] = []

    @property
    def is_quick(self) -> bool:
        return True

    def waited_in_vain(self, nr_worth: int) -> None:
        self.nr_worth.append(nr_worth)


def fast_file_of(device: Device) -> FastFile:
    fast = device.maybe_fast_file()
    assert fast is not None
    return fast


def is_lent(device: Device) -> bool:
    return fast_file_of(device).syncer is not None


async def test_the_thread_is_lent_while_nothing_else_runs(
    device: Device, lent: FileSyncs
) -> None:
    device.submit(flush := bio_of(OP_FLUSH, 0, 0))
    assert not is_lent(device)
    assert await ended(flush) == [0]
    assert is_lent(device)
    writeback = lent.begin_writeback()
    assert not is_lent(device)
    lent.done(writeback, 0)
    assert is_lent(device)


async def test_the_thread_is_lent_only_while_syncs_are_quick(
    device: Device, lent: FileSyncs
) -> None:
    lent._pace = SyncPace()
    device.submit(flush := bio_of(OP_FLUSH, 0, 0))
    assert await ended(flush) == [0]
    assert not is_lent(device)  # that was the first one


@pytest.mark.usefixtures("lent")
async def test_a_latched_device_does_not_lend_its_thread(device: Device) -> None:
    syncs_of(device).latch("write", errno.EIO)
    assert not is_lent(device)


@pytest.mark.usefixtures("lent")
async def test_a_closed_device_has_its_thread_back(device: Device) -> None:
    fast = fast_file_of(device)
    await device.close()
    assert fast.syncer is None


class HeldSyncer:
    """A thread whose sync the compiled path has begun, and left.

    Attributes: status: of that sync; -1: it runs.
    """

    event_fd = -1

    def __init__(self) -> None:
        self.status = -1
        self.nr_begun = 0

    def begin(self) -> None:
        self.nr_begun += 1
        self.status = -1

    def take(self) -> int:
        return self.status


@pytest.fixture
def held(lent: FileSyncs, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldSyncer]:
    """The thread of `lent`, and nothing but that."""
    held = HeldSyncer()
    with monkeypatch.context() as patch:
        patch.setattr(lent, "_fast", SimpleNamespace(syncer=held, nr_synced=0))
        patch.setattr(lent, "_syncer", held)
        yield held
        lent._flush = None  # after a failure, `close` would wait for it


@pytest.mark.parametrize("status", [0, errno.EIO])
async def test_a_sync_that_was_left_counts_and_the_request_waits_for_the_next_one(
    device: Device, lent: FileSyncs, held: HeldSyncer, status: int
) -> None:
    fast = lent._fast
    assert fast is not None
    lent.left_over()
    device.submit(bio := bio_of(OP_FLUSH, 0, 0))
    assert (held.nr_begun, bio.status) == (0, PENDING)  # not with the running one
    assert fast.syncer is None
    held.status = status
    lent._reap()
    assert bio.status == (status or PENDING)
    assert lent.is_latched == bool(status)
    assert held.nr_begun == (0 if status else 1)
    held.status = 0
    if not status:
        lent._reap()
    assert bio.status == status
    assert (fast.syncer is None) == bool(status)


async def test_a_sync_that_has_failed_already_is_told_at_once(
    device: Device, lent: FileSyncs, held: HeldSyncer
) -> None:
    held.status = errno.EIO
    lent.left_over()
    assert lent.is_latched
    device.submit(bio := bio_of(OP_FLUSH, 0, 0))
    assert bio.status == errno.EIO


async def test_what_was_worth_the_wait_is_counted_from_the_last_time(
    lent: FileSyncs, held: HeldSyncer
) -> None:
    for nr_synced in (100, 130):
        vars(lent._fast)["nr_synced"] = nr_synced
        held.status = -1
        lent.left_over()
        held.status = 0
        lent._reap()
    pace = lent._pace
    assert isinstance(pace, AlwaysQuick)
    assert pace.nr_worth == [100, 30]


@pytest.mark.parametrize(
    ("status", "is_latched"),
    [(errno.EIO, True), (errno.ENOSPC, True), (errno.EINVAL, False)],
)
async def test_writing_back_that_cannot_begin_latches_unless_nobody_knows_it(
    device: Device, status: int, is_latched: bool
) -> None:
    syncs_of(device).writeback_failed(status)
    assert syncs_of(device).is_latched == is_latched


# ---- other threads that may be told an error ----


class Gate:
    """Stands for a system call of a worker: it has been told an error, and has not returned yet.

    Attributes:
        is_inside: whether it was called.
        left: set: it returns.
    """

    def __init__(self, error: int) -> None:
        self.is_inside = threading.Event()
        self.left = threading.Event()
        self._error = error

    def __call__(self, *_: object, **__: object) -> int:
        self.is_inside.set()
        self.left.wait(PATIENCE_S)
        if self._error:
            raise OSError(self._error, os.strerror(self._error))
        return 0


async def flush_beside(device: Device, syncs: Syncs, gate: Gate) -> int:
    """Flush while the call is under way; it returns when the fdatasync has. Returns what the FLUSH ends with."""
    await until(gate.is_inside.is_set)
    flush = bio_of(OP_FLUSH, 0, 0)
    device.submit(flush)
    try:
        await until(lambda: syncs.count == 1 and syncs_of(device)._flush is None)
        assert flush.status == PENDING
    finally:
        gate.left.set()
    return (await ended(flush))[0]


@pytest.mark.parametrize("error", [0, errno.EIO, errno.ENOSPC, errno.EINVAL])
async def test_a_flush_waits_for_the_hint_to_write_back_and_fails_with_it(
    device: Device, syncs: Syncs, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """The kernel may tell an error to the hint alone. EINVAL: the file system does not know the call."""
    gate = Gate(error)
    monkeypatch.setattr(file_device, "start_writeback", gate)
    await device.write(0, b"x" * 4096)
    device.start_writeback()
    status = await flush_beside(device, syncs, gate)
    is_lost = error in (errno.EIO, errno.ENOSPC)
    assert status == (errno.EIO if is_lost else 0)
    assert syncs_of(device).is_latched == is_lost


async def test_a_hint_that_its_waiter_gives_up_counts_until_it_ends(
    device: Device, syncs: Syncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(errno.EIO)
    monkeypatch.setattr(file_device, "start_writeback", gate)
    device.start_writeback()
    assert isinstance(device, FileDevice)
    assert device._writeback is not None
    device._writeback.cancel()
    assert await flush_beside(device, syncs, gate) == errno.EIO


async def test_the_next_hint_is_given_when_the_last_one_has_ended(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    nr_calls = 0

    def count(_: int) -> None:
        nonlocal nr_calls
        nr_calls += 1

    monkeypatch.setattr(file_device, "start_writeback", count)
    for _ in range(2):
        device.start_writeback()
        device.start_writeback()
        await until(lambda: not syncs_of(device)._running)
    assert nr_calls == 2


async def test_the_thread_is_not_lent_while_the_hint_runs(
    device: Device, lent: FileSyncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(0)
    monkeypatch.setattr(file_device, "start_writeback", gate)
    device.start_writeback()
    assert not is_lent(device)
    gate.left.set()
    await until(lambda: not lent._running)
    assert is_lent(device)


@pytest.fixture
def nfs(device: Device) -> Device:
    """A device on a file system that may tell a write of the want of space of an earlier one."""
    syncs_of(device).refuses_before_it_takes = False
    return device


async def test_a_flush_waits_for_a_workers_write_that_may_be_told_of_an_earlier_one(
    nfs: Device, syncs: Syncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(errno.ENOSPC)
    monkeypatch.setattr(file_device, "write_rest", gate)
    await nfs.write(0, b"x" * 4096)
    write = Bio(OP_WRITE, 0, SIZE, memoryview(bytes(SIZE)), 0, lambda _: None)
    nfs.submit(write)
    assert await flush_beside(nfs, syncs, gate) == errno.EIO
    assert await ended(write) == [errno.ENOSPC]


async def test_a_flush_waits_for_zeroes_that_are_written_and_may_be_told_of_an_earlier_write(
    nfs: Device, syncs: Syncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(errno.ENOSPC)
    monkeypatch.setattr(nfs, "_zero", gate)
    zero = bio_of(OP_WRITE_ZEROES, 0, SIZE)
    nfs.submit(zero)
    assert await flush_beside(nfs, syncs, gate) == errno.EIO
    assert await ended(zero) == [errno.ENOSPC]


async def test_a_write_by_a_worker_that_succeeds_lets_the_flush_end(
    nfs: Device, syncs: Syncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(0)
    monkeypatch.setattr(file_device, "write_rest", gate)
    write = Bio(OP_WRITE, 0, SIZE, memoryview(bytes(SIZE)), FUA, lambda _: None)
    nfs.submit(write)
    assert await flush_beside(nfs, syncs, gate) == 0
    assert await ended(write) == [0]
    assert not syncs_of(nfs)._running


async def test_a_flush_does_not_wait_for_writes_where_they_tell_of_no_others(
    device: Device, syncs: Syncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs_of(device).refuses_before_it_takes = True
    gate = Gate(0)
    monkeypatch.setattr(file_device, "write_rest", gate)
    write = Bio(OP_WRITE, 0, SIZE, memoryview(bytes(SIZE)), 0, lambda _: None)
    device.submit(write)
    flush = bio_of(OP_FLUSH, 0, 0)
    device.submit(flush)
    status = await ended(flush)
    gate.left.set()
    assert status == [0]
    assert syncs.count == 1
    assert await ended(write) == [0]


@pytest.mark.parametrize("error", [0, errno.EIO])
async def test_a_flush_waits_for_the_sync_of_the_attributes_and_fails_with_it(
    device: Device, syncs: Syncs, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """A disk that cannot empty its cache tells that to the one who asks."""
    gate = Gate(error)
    monkeypatch.setattr(os, "fsync", gate)
    syncing = asyncio.ensure_future(device.sync_attributes())
    assert await flush_beside(device, syncs, gate) == error
    assert await syncing == (not error)
    assert syncs_of(device).is_latched == bool(error)


async def test_a_sync_of_the_attributes_fails_what_comes_later_too(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "lost")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert not await device.mark("origin", Mark(bytes(16), 1))
    with pytest.raises(DeviceError):
        await device.flush()


async def test_a_device_that_is_only_read_has_nothing_to_lose_in_a_sync(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await device.close()
    source = await open_device(str(tmp_path / "disk"), read_only=True)
    assert await source.sync_attributes()
    gate = Gate(errno.EIO)
    gate.left.set()
    monkeypatch.setattr(os, "fsync", gate)
    assert not await source.sync_attributes()
    assert source.health.is_usable
    await source.close()


@pytest.mark.parametrize("error", [0, errno.EIO])
async def test_a_flush_waits_for_the_sync_of_an_opening_beside_and_fails_with_it(
    device: Device, syncs: Syncs, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    gate = Gate(error)
    monkeypatch.setattr(file_open, "believe_the_disk", gate)
    opening = asyncio.ensure_future(device.reopened(device.name, read_only=False))
    assert await flush_beside(device, syncs, gate) == error
    assert syncs_of(device).is_latched == bool(error)
    if error:
        with pytest.raises(ResolveError):
            await opening
    else:
        opened = await opening
        assert opened is not None
        await opened.close()


async def test_an_opening_beside_that_is_refused_for_another_reason_latches_nothing(
    device: Device, tmp_path: Path
) -> None:
    (tmp_path / "disk").rename(tmp_path / "other")
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    with pytest.raises(ResolveError, match="replaced"):
        await device.reopened(device.name, read_only=False)
    await device.flush()
