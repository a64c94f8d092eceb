# SPDX-License-Identifier: Apache-2.0
"""FileDevice on real files: what is read, what is durable, what is refused."""

import asyncio
import builtins
import errno
import logging
import os
import random
import resource
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbdtarget.bio import (
    FAST_ZERO,
    FUA,
    NO_UNMAP,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    PENDING,
    Bio,
)
from nbdtarget.common.errors import DeviceError, ResolveError
from nbdtarget.devices.base import EXTENT_DATA, EXTENT_HOLE, EXTENT_ZERO, Device, Extent
from nbdtarget.devices.file import device as file_module
from nbdtarget.devices.file import extents, space, syscalls
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.devices.file.pieces import WRITE_PIECE
from nbdtarget.devices.resolve import create_device, open_device
from tests.support.file_device import SIZE, Syncs, bio_of, ended
from tests.support.patience import PATIENCE_S, until

HOLE = EXTENT_HOLE | EXTENT_ZERO
SHM = Path("/dev/shm")


@pytest.fixture(params=["disk", "tmpfs"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where files lie: pytest's directory, and tmpfs, which knows no RWF_NOWAIT."""
    if request.param == "disk":
        yield tmp_path
        return
    if not os.access(SHM, os.W_OK):
        pytest.skip("no writable /dev/shm")
    path = SHM / f"nbdtarget-test-{os.getpid()}-{tmp_path.name}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def device(directory: Path) -> AsyncIterator[Device]:
    device = await create_device(str(directory / "disk"), SIZE, sparse=True)
    yield device
    await device.close()


async def test_cached_read_and_small_write_end_inline(device: Device) -> None:
    log: list[Bio] = []
    data = os.urandom(4096)
    device.submit(Bio(OP_WRITE, 8192, 4096, memoryview(data), 0, log.append))
    view = memoryview(bytearray(4096))
    device.submit(Bio(OP_READ, 8192, 4096, view, 0, log.append))
    assert [bio.status for bio in log] == [0, 0]
    assert view == data


@pytest.mark.parametrize("seed", range(3))
async def test_it_is_an_array_of_bytes(device: Device, seed: int) -> None:
    rng = random.Random(seed)
    model = bytearray(SIZE)
    for _ in range(80):
        offset = rng.randrange(SIZE)
        length = min(rng.choice([1, 511, 4096, 70_000, 400_000]), SIZE - offset)
        action = rng.randrange(5)
        fua = rng.random() < 0.2
        if action <= 1:
            data = rng.randbytes(length)
            await device.write(offset, data, fua=fua)
            model[offset : offset + length] = data
        elif action == 2:
            no_unmap = rng.random() < 0.5
            await device.write_zeroes(offset, length, fua=fua, no_unmap=no_unmap)
            model[offset : offset + length] = bytes(length)
        elif action == 3:
            await device.flush()
        assert (
            bytes(await device.read(offset, length)) == model[offset : offset + length]
        )
    assert bytes(await device.read(0, SIZE)) == model


async def test_read_that_is_not_cached_goes_to_a_worker(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        buffers[0][:100] = data[:100]  # the page cache has a part of it
        return 100

    data = os.urandom(4096)
    await device.write(0, data)
    monkeypatch.setattr(file_module, "_preadv", preadv)
    scratch = memoryview(bytearray(4096))
    bio = Bio(OP_READ, 0, 4096, scratch, 0, lambda _: None, borrowed=True)
    device.submit(bio)
    assert bio.status == PENDING
    scratch[:] = b"x" * 4096  # the submitter's next request
    assert await ended(bio) == [0]
    assert bytes(bio.payload or b"") == data


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EOPNOTSUPP])
async def test_read_without_the_page_cache_is_read_by_a_worker(
    device: Device, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    calls = 0

    def preadv(*_: object) -> int:
        nonlocal calls
        calls += 1
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(file_module, "_preadv", preadv)
    await device.write(0, b"abc")
    assert bytes(await device.read(0, 3)) == b"abc"
    assert bytes(await device.read(0, 3)) == b"abc"
    # A file system that does not know RWF_NOWAIT is not asked again.
    assert calls == (1 if code == errno.EOPNOTSUPP else 2)


async def test_deferred_write_owns_its_borrowed_payload(device: Device) -> None:
    buffer = bytearray(b"a" * SIZE)
    bio = Bio(OP_WRITE, 0, SIZE, memoryview(buffer), 0, lambda _: None, borrowed=True)
    device.submit(bio)
    buffer[:] = b"b" * SIZE
    assert await ended(bio) == [0]
    assert bytes(await device.read(0, SIZE)) == b"a" * SIZE


async def test_read_of_a_truncated_file_is_an_error(device: Device) -> None:
    os.truncate(device.name, 4096)
    with pytest.raises(DeviceError) as caught:
        await device.read(0, 8192)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(
    ("op", "offset", "expected"),
    [
        (OP_READ, SIZE - 1, errno.EINVAL),
        (OP_WRITE, SIZE - 1, errno.ENOSPC),
        (OP_WRITE_ZEROES, SIZE, errno.ENOSPC),
    ],
)
async def test_past_the_end_is_refused(
    device: Device, op: int, offset: int, expected: int
) -> None:
    view = memoryview(bytearray(2))
    bio = Bio(op, offset, 2, view, 0, lambda _: None)
    device.submit(bio)
    assert bio.status == expected
    assert os.stat(device.name).st_size == SIZE


async def test_read_only_refuses_writes(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 4096)
    device = await open_device(str(path), read_only=True)
    for bio in (
        Bio(OP_WRITE, 0, 1, memoryview(b"y"), 0, lambda _: None),
        bio_of(OP_WRITE_ZEROES, 0, 512),
    ):
        device.submit(bio)
        assert bio.status == errno.EPERM
    await device.flush()
    await device.close()
    assert path.read_bytes() == b"x" * 4096


# ---- space ----


async def test_extents_of_a_sparse_file(device: Device) -> None:
    await device.write(128 << 10, b"x" * (64 << 10))
    assert await device.extents(0, SIZE) == [
        Extent(128 << 10, HOLE),
        Extent(64 << 10, EXTENT_DATA),
        Extent(SIZE - (192 << 10), HOLE),
    ]
    assert await device.extents(130 << 10, 1024) == [Extent(1024, EXTENT_DATA)]


async def test_extents_are_bounded(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extents, "EXTENTS_MAX", 3)
    for nr in range(4):
        await device.write(nr << 16, b"x" * 4096)
    found = await device.extents(0, SIZE)
    assert len(found) <= 4
    assert sum(extent.length for extent in found) < SIZE
    while (at := sum(extent.length for extent in found)) < SIZE:
        found += await device.extents(at, SIZE - at)
    data = [extent for extent in found if extent.flags == EXTENT_DATA]
    assert [extent.length for extent in data] == [4096] * 4


async def test_discard_gives_space_back(device: Device) -> None:
    await device.write(0, b"x" * SIZE)
    await device.flush()
    before = os.stat(device.name).st_blocks
    await device.discard(0, SIZE)
    assert os.stat(device.name).st_blocks < before
    assert await device.extents(0, SIZE) == [Extent(SIZE, HOLE)]


async def test_no_unmap_keeps_the_space(device: Device) -> None:
    await device.write_zeroes(0, SIZE, no_unmap=True)
    assert os.stat(device.name).st_blocks * 512 >= SIZE
    assert bytes(await device.read(0, SIZE)) == bytes(SIZE)


async def test_fast_zero_is_refused_where_it_is_not_fast(device: Device) -> None:
    device.can_fast_zero = False
    await device.write(0, b"x")
    bio = bio_of(OP_WRITE_ZEROES, 0, 4096, FAST_ZERO)
    device.submit(bio)
    assert bio.status == errno.ENOTSUP
    assert bytes(await device.read(0, 1)) == b"x"


async def test_fast_zero_with_no_unmap_zeroes_or_is_refused_and_latches_nothing(
    device: Device,
) -> None:
    await device.write(0, b"x")
    bio = bio_of(OP_WRITE_ZEROES, 0, 4096, FAST_ZERO | NO_UNMAP | FUA)
    device.submit(bio)
    (status,) = await ended(bio)
    assert status in (0, errno.ENOTSUP)
    assert bytes(await device.read(0, 1)) == (b"x" if status else b"\0")
    await device.flush()


async def test_zeroes_are_written_where_fallocate_is_not_supported(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(space, "allocate", allocate)
    monkeypatch.setattr(space, "ZEROES", bytes(1000))
    await device.write(0, b"x" * 8192)
    await device.write_zeroes(10, 5000)
    expected = b"x" * 10 + bytes(5000) + b"x" * 3182
    assert bytes(await device.read(0, 8192)) == expected
    await device.discard(0, 4096)
    await device.flush()


async def test_no_write_is_inline_while_space_is_freed(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    allocate = syscalls.allocate

    def gated(*args: int) -> None:
        gate.wait()
        allocate(*args)

    monkeypatch.setattr(space, "allocate", gated)
    zero = bio_of(OP_WRITE_ZEROES, 0, 4096)
    write = Bio(OP_WRITE, 8192, 1, memoryview(b"x"), 0, lambda _: None)
    device.submit(zero)
    device.submit(write)
    assert write.status == PENDING
    assert await ended(write) == [0]
    gate.set()
    assert await ended(zero) == [0]
    again = Bio(OP_WRITE, 8192, 1, memoryview(b"x"), 0, lambda _: None)
    device.submit(again)
    assert again.status == 0


# ---- durability ----


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    return Syncs(monkeypatch)


async def test_flushes_that_come_while_one_runs_share_the_next(
    device: Device, syncs: Syncs
) -> None:
    syncs.gate.clear()
    bios = [bio_of(OP_FLUSH, 0, 0) for _ in range(10)]
    for bio in bios:
        device.submit(bio)
    syncs.gate.set()
    assert await ended(*bios) == [0] * 10
    assert syncs.count == 2


async def test_failed_flush_latches_until_opened_again(
    device: Device, syncs: Syncs, caplog: pytest.LogCaptureFixture
) -> None:
    syncs.fail_with = errno.EIO
    with pytest.raises(DeviceError):
        await device.flush()
    syncs.fail_with = 0
    with pytest.raises(DeviceError):
        await device.flush()
    with pytest.raises(DeviceError):
        await device.write(0, b"x", fua=True)
    await device.write(0, b"y")
    assert bytes(await device.read(0, 1)) == b"y"
    assert syncs.count == 1
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    await device.close()
    again = await open_device(device.name)
    await again.flush()
    await again.close()


@pytest.mark.parametrize("op", [OP_WRITE_ZEROES, OP_DISCARD])
async def test_fua_zeroes_and_discards_are_synced(
    device: Device, syncs: Syncs, op: int
) -> None:
    syncs.gate.clear()
    bio = bio_of(op, 0, 4096, FUA)
    device.submit(bio)
    await until(lambda: syncs.count == 1)
    assert bio.status == PENDING
    syncs.gate.set()
    assert await ended(bio) == [0]


async def test_overlapping_syncs_that_succeed_all_end(device: Device) -> None:
    bios = [bio_of(OP_FLUSH, 0, 0)]
    for nr in range(12):
        view = memoryview(bytes([nr]) * 512)
        bios.append(Bio(OP_WRITE, nr * 512, 512, view, FUA, lambda _: None))
        bios.append(bio_of(OP_WRITE_ZEROES, SIZE - 4096, 512, FUA))
    for bio in bios:
        device.submit(bio)
    assert await ended(*bios) == [0] * len(bios)


async def test_flush_from_an_endio_ends_too(device: Device) -> None:
    second = bio_of(OP_FLUSH, 0, 0)
    first = Bio(OP_FLUSH, 0, 0, None, 0, lambda _: device.submit(second))
    device.submit(first)
    assert await ended(first, second) == [0, 0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("inline", [True, False])
async def test_failed_write_latches_unless_for_want_of_space(
    device: Device, monkeypatch: pytest.MonkeyPatch, code: int, inline: bool
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(file_module, "_pwrite", fail)
        patch.setattr("nbdtarget.devices.file.pieces.IS_COMPILED", False)
        patch.setattr(os, "pwritev", fail)
        with pytest.raises(DeviceError) as caught:
            await device.write(0, bytes(512 if inline else SIZE))
    assert caught.value.errno == code
    if code == errno.EIO:
        with pytest.raises(DeviceError):
            await device.flush()
    else:
        await device.flush()


# ---- slow disks ----


class SlowWrites:
    """Inline writes that take `took_ns` by the device's own clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 10**9
        self.took_ns = 0
        self.inline = 0
        self.sleeps = 0
        pwrite: Callable[[int, memoryview, int], int] = os.pwrite

        def slow(fd: int, data: memoryview, offset: int) -> int:
            self.now_ns += self.took_ns
            self.inline += 1
            self.sleeps += self.took_ns > 0
            return pwrite(fd, data, offset)

        def getrusage(_: int) -> object:
            return SimpleNamespace(ru_nvcsw=self.sleeps)

        monkeypatch.setattr(file_module, "_pwrite", slow)
        monkeypatch.setattr(file_module, "_now_ns", lambda: self.now_ns)
        monkeypatch.setattr(file_module, "_getrusage", getrusage)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowWrites:
    return SlowWrites(monkeypatch)


async def test_slow_disk_gets_two_inline_writes_then_one_a_backoff(
    device: Device, slow: SlowWrites
) -> None:
    slow.took_ns = 50_000_000
    for _ in range(10):
        await device.write(0, b"x")
    assert slow.inline == 2
    for backoff_s in (1, 2, 4):
        slow.now_ns += backoff_s * 10**9
        await device.write(0, b"x")
        slow.now_ns += 10**8
        await device.write(0, b"x")
    assert slow.inline == 5


async def test_one_slow_write_alone_changes_nothing(
    device: Device, slow: SlowWrites
) -> None:
    slow.took_ns = 3_000_000
    await device.write(0, b"x")
    slow.took_ns = 0
    for _ in range(400):
        await device.write(0, b"x")
    assert slow.inline == 401


async def test_quick_again_writes_inline_and_forgets(
    device: Device, slow: SlowWrites
) -> None:
    slow.took_ns = 3_000_000
    for _ in range(2):
        await device.write(0, b"x")
    slow.took_ns = 0
    slow.now_ns += 10**9
    for _ in range(file_module.WATCHED_WRITES):
        await device.write(0, b"x")
    slow.inline = 0
    slow.took_ns = 3_000_000
    for _ in range(3):
        await device.write(0, b"x")
    slow.now_ns += 10**9  # the first back-off is one second again
    await device.write(0, b"x")
    assert slow.inline == 3


async def test_inline_write_that_is_cut_short_between_pieces_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def short(fd: int, data: memoryview, offset: int) -> int:
        calls.append(len(data))
        return os.pwrite(fd, data[:100] if len(calls) == 2 else data, offset)

    monkeypatch.setattr(file_module, "_pwrite", short)
    content = random.Random(1).randbytes(file_module.INLINE_WRITE_MAX)
    device = await create_device(str(tmp_path / "disk"), len(content))
    await device.write(0, content)
    assert calls == [WRITE_PIECE] * 2
    assert bytes(await device.read(0, len(content))) == content
    await device.close()


# ---- writeback ----


async def test_writeback_is_one_job_at_a_time_and_over_before_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr("nbdtarget.devices.file.device.start_writeback", calls.append)
    device = await create_device(str(tmp_path / "disk"), SIZE)
    device.start_writeback()
    device.start_writeback()
    await device.close()
    assert len(calls) == 1


async def test_failed_writeback_latches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr("nbdtarget.devices.file.device.start_writeback", fail)
    device = await create_device(str(tmp_path / "disk"), SIZE)
    await device.write(0, b"x")
    assert isinstance(device, FileDevice)
    device.start_writeback()
    assert device._writeback is not None
    await device._writeback
    with pytest.raises(DeviceError):
        await device.flush()
    await device.close()


async def test_writeback_of_a_real_file(tmp_path: Path) -> None:
    device = await create_device(str(tmp_path / "disk"), SIZE)
    await device.write(0, bytes(SIZE))
    device.start_writeback()
    await device.flush()
    await device.close()


# ---- locks and leaks ----


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (False, False, False),
        (False, True, False),
        (True, False, False),
        (True, True, True),
    ],
)
async def test_writer_is_alone_and_readers_share(
    tmp_path: Path, first: bool, second: bool, shared: bool
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    held = await open_device(str(path), read_only=first)
    if shared:
        await (await open_device(str(path), read_only=second)).close()
    else:
        with pytest.raises(ResolveError, match="in use by another") as caught:
            await open_device(str(path), read_only=second)
        assert caught.value.errno == errno.EBUSY
    await held.close()
    await (await open_device(str(path))).close()


async def test_nothing_is_left_open(tmp_path: Path) -> None:
    def left() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = left()
    device = await create_device(str(tmp_path / "disk"), SIZE)
    await asyncio.gather(*(device.write(0, bytes(SIZE), fua=True) for _ in range(8)))
    with pytest.raises(ResolveError):
        await open_device(str(tmp_path / "disk"))
    await device.close()
    assert left() == before


@pytest.mark.parametrize("op", [OP_WRITE, OP_WRITE_ZEROES])
async def test_fua_that_finds_no_room_does_not_latch(tmp_path: Path, op: int) -> None:
    # Refused before anything was lost: when there is room again, all goes on.
    device = await create_device(str(tmp_path / "disk"), SIZE, sparse=True)
    device.can_write_zeroes = False  # zeroes are written, and find no room either
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        payload = memoryview(bytes(4096)) if op == OP_WRITE else None
        full = Bio(op, 8192, 4096, payload, FUA, lambda _: None)
        device.submit(full)
        await ended(full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.status == errno.EFBIG
    await device.flush()
    await device.write(8192, bytes(4096), fua=True)
    await device.close()


async def test_slow_writes_of_a_file_occupy_one_thread(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    writers: set[int] = set()
    pwritev = os.pwritev

    def gated(fd: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        writers.add(threading.get_ident())
        gate.wait(PATIENCE_S)
        return pwritev(fd, buffers, offset, flags)

    monkeypatch.setattr("nbdtarget.devices.file.pieces.IS_COMPILED", False)
    monkeypatch.setattr(os, "pwritev", gated)
    data = memoryview(bytes(file_module.INLINE_WRITE_MAX + 1))
    bios = [Bio(OP_WRITE, 0, len(data), data, 0, lambda _: None) for _ in range(4)]
    for bio in bios:
        device.submit(bio)
    flushes = [bio_of(OP_FLUSH, 0, 0) for _ in range(2)]
    for bio in flushes:
        device.submit(bio)
    assert await ended(*flushes) == [0, 0]
    assert all(bio.status == PENDING for bio in bios)
    gate.set()
    assert await ended(*bios) == [0] * 4
    assert len(writers) == 1


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError, OSError])
async def test_a_disk_is_opened_where_sysfs_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    real = builtins.open

    def hidden(name: Any, *args: Any, **more: Any) -> Any:
        if str(name).startswith("/sys/"):
            raise error(errno.EACCES, "hidden")
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "open", hidden)
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    device = await open_device(str(tmp_path / "disk.img"))
    assert not device.is_rotational
    await device.write(0, b"x" * 512)
    await device.close()
