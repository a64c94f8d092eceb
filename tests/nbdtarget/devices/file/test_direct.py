# SPDX-License-Identifier: Apache-2.0
"""DirectDevice: the same disk without the page cache, whatever the alignment of a request."""

import asyncio
import errno
import itertools
import os
import random
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from nbdtarget.bio import FUA, OP_FLUSH, OP_READ, OP_WRITE, PENDING, Bio
from nbdtarget.common.errors import DeviceError, ResolveError
from nbdtarget.devices import resolve
from nbdtarget.devices.file import direct, ring
from nbdtarget.devices.file.direct import DirectDevice
from nbdtarget.devices.file.page_cache import cached_pages
from nbdtarget.devices.file.syscalls import direct_unit
from tests.support.file_device import SIZE, Syncs, bio_of, ended
from tests.support.patience import PATIENCE_S, until

SHM = Path("/dev/shm")


@pytest.fixture(params=["io_uring", "workers"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How reads go to the disk."""
    if request.param == "workers":
        monkeypatch.setattr(direct, "maybe_reader", lambda: None)
    return str(request.param)


@pytest.fixture
async def device(tmp_path: Path, way: str) -> AsyncIterator[DirectDevice]:
    if way == "io_uring" and ring.maybe_reader() is None:
        pytest.skip("io_uring is not built, or not allowed")
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    try:
        device = await resolve.open_device(f"direct:{path}")
    except ResolveError as error:
        pytest.skip(f"no direct I/O in {tmp_path}: {error}")
    assert isinstance(device, DirectDevice)
    yield device
    await device.close()


def path_of(device: DirectDevice) -> str:
    return device.name.removeprefix("direct:")


@pytest.mark.parametrize("seed", range(2))
async def test_it_is_an_array_of_bytes(
    device: DirectDevice, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "PIECE", 64 << 10)
    rng = random.Random(seed)
    model = bytearray(SIZE)
    for _ in range(60):
        offset = rng.randrange(SIZE)
        length = min(rng.choice([1, 511, 4096, 70_000, 300_000]), SIZE - offset)
        if rng.random() < 0.5:
            offset, length = offset // 4096 * 4096, -(-length // 4096) * 4096
            length = min(length, SIZE - offset)
        action = rng.randrange(4)
        fua = rng.random() < 0.2
        if action <= 1:
            data = rng.randbytes(length)
            await device.write(offset, data, fua=fua)
            model[offset : offset + length] = data
        elif action == 2:
            await device.write_zeroes(
                offset, length, fua=fua, no_unmap=rng.random() < 0.5
            )
            model[offset : offset + length] = bytes(length)
        here = bytes(await device.read(offset, length))
        assert here == model[offset : offset + length]
    assert bytes(await device.read(0, SIZE)) == model
    assert Path(path_of(device)).read_bytes() == model  # noqa: ASYNC240


async def test_writes_to_parts_of_one_unit_lose_nothing(device: DirectDevice) -> None:
    """They do not overlap, so all of them must be there, in whichever order they were made."""
    rng = random.Random(1)
    cuts = [0, *sorted(rng.sample(range(1, 20_000), 60)), 20_000]
    data = rng.randbytes(20_000)
    bios = [
        Bio(OP_WRITE, at, end - at, memoryview(data)[at:end], 0, lambda _: None)
        for at, end in itertools.pairwise(cuts)
    ]
    rng.shuffle(bios)
    for bio in bios:
        device.submit(bio)
    assert await ended(*bios) == [0] * len(bios)
    assert bytes(await device.read(0, 20_000)) == data


async def test_write_that_is_not_aligned_runs_alone(
    device: DirectDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    running: list[int] = []
    most: list[int] = []
    put = device._put

    def gated(payload: memoryview, offset: int) -> int:
        running.append(offset)
        most.append(len(running))
        gate.wait(PATIENCE_S)
        status = put(payload, offset)
        running.remove(offset)
        return status

    monkeypatch.setattr(device, "_put", gated)
    aligned = [
        Bio(OP_WRITE, at, 4096, memoryview(bytes(4096)), 0, lambda _: None)
        for at in (0, 4096)
    ]
    ragged = Bio(OP_WRITE, 10, 10, memoryview(bytes(10)), 0, lambda _: None)
    later = Bio(OP_WRITE, 8192, 4096, memoryview(bytes(4096)), 0, lambda _: None)
    for bio in (*aligned, ragged, later):
        device.submit(bio)
    try:
        await until(lambda: len(running) == 2)
        await asyncio.sleep(0.01)
        assert sorted(running) == [0, 4096]
        assert device.nr_in_flight == 4
    finally:
        gate.set()
    assert await ended(*aligned, ragged, later) == [0] * 4
    assert most[2:] == [1, 1]


async def test_nothing_is_left_in_the_page_cache(device: DirectDevice) -> None:
    await device.write(0, os.urandom(SIZE))
    await device.read(0, SIZE)
    fd = os.open(path_of(device), os.O_RDONLY)
    try:
        assert cached_pages(fd, 0, SIZE) == 0
    finally:
        os.close(fd)


async def test_borrowed_payloads_are_copied(device: DirectDevice) -> None:
    buffer = bytearray(b"a" * 4096)
    write = Bio(OP_WRITE, 0, 4096, memoryview(buffer), 0, lambda _: None, borrowed=True)
    device.submit(write)
    buffer[:] = b"b" * 4096
    assert await ended(write) == [0]
    read = Bio(OP_READ, 0, 4096, memoryview(buffer), 0, lambda _: None, borrowed=True)
    device.submit(read)
    assert read.status == PENDING
    assert await ended(read) == [0]
    assert bytes(buffer) == b"b" * 4096
    assert bytes(read.payload or b"") == b"a" * 4096


async def test_read_of_a_truncated_file_is_an_error(device: DirectDevice) -> None:
    os.truncate(path_of(device), 4096)
    with pytest.raises(DeviceError) as caught:
        await device.read(0, 8192)
    assert caught.value.errno == errno.EIO
    assert device.health.errors["read"] == 1


# ---- durability ----


async def test_fua_and_flush_are_synced(
    device: DirectDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data of a direct write may still lie in the disk's own cache."""
    syncs = Syncs(monkeypatch)
    await device.write(0, bytes(4096), fua=True)
    await device.write(0, bytes(10), fua=True)
    await device.flush()
    assert syncs.count == 3
    syncs.fail_with = errno.EIO
    with pytest.raises(DeviceError):
        await device.write(0, bytes(4096), fua=True)
    syncs.fail_with = 0
    with pytest.raises(DeviceError):
        await device.flush()


@pytest.mark.parametrize("length", [4096, 10])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
async def test_failed_write_latches_unless_for_want_of_space(
    device: DirectDevice, monkeypatch: pytest.MonkeyPatch, code: int, length: int
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        bio = Bio(OP_WRITE, 0, length, memoryview(bytes(length)), FUA, lambda _: None)
        device.submit(bio)
        assert await ended(bio) == [code]
    flush = bio_of(OP_FLUSH, 0, 0)
    device.submit(flush)
    assert await ended(flush) == [errno.EIO if code == errno.EIO else 0]


async def test_unit_that_cannot_be_read_fails_the_write_into_it(
    device: DirectDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the data around the write would be overwritten with arbitrary bytes."""
    await device.write(0, b"a" * 4096)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "unreadable")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(DeviceError):
            await device.write(5, b"b")
        patch.setattr(os, "preadv", lambda *_: 0)
        with pytest.raises(DeviceError):
            await device.write(5, b"b")
    assert bytes(await device.read(0, 4096)) == b"a" * 4096


async def test_short_writes_are_finished(
    device: DirectDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev = os.pwritev

    def short(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return pwritev(fd, [buffers[0][:4096]], offset)

    data = os.urandom(20_000)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", short)
        await device.write(100, data)
    assert bytes(await device.read(100, 20_000)) == data


# ---- opening ----


async def test_it_is_created_and_opened_again(device: DirectDevice) -> None:
    name = device.name + "2"
    made = await resolve.create_device(name, SIZE)
    assert isinstance(made, DirectDevice)
    await made.write(0, b"x")
    again = await made.reopened(name, read_only=False)
    assert isinstance(again, DirectDevice)
    assert bytes(await again.read(0, 1)) == b"x"
    await again.close()
    await made.close()
    await resolve.remove_created(name)
    assert resolve.may_create(name)


async def test_limits_tell_the_alignment(device: DirectDevice) -> None:
    fd = os.open(path_of(device), os.O_RDONLY)
    unit = direct_unit(fd)
    os.close(fd)
    assert device.limits.logical_block_size == max(unit, 512)
    assert device.maybe_fast_file() is None
    assert device.maybe_bulk_writer() is None


async def test_odd_size_is_refused(device: DirectDevice) -> None:
    path = path_of(device) + ".odd"
    Path(path).write_bytes(bytes(1000))  # noqa: ASYNC240
    with pytest.raises(ResolveError, match=r"size that is a multiple of \d+ bytes"):
        await resolve.open_device(f"direct:{path}")


@pytest.mark.skipif(not os.access(SHM, os.W_OK), reason="no writable /dev/shm")
async def test_tmpfs_is_refused_in_one_line() -> None:
    path = SHM / f"nbdtarget-test-{os.getpid()}"
    path.write_bytes(bytes(4096))
    try:
        with pytest.raises(ResolveError) as caught:
            await resolve.open_device(f"direct:{path}")
    finally:
        path.unlink()
    assert "no direct I/O" in str(caught.value)
    assert "\n" not in str(caught.value)
