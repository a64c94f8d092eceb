# SPDX-License-Identifier: Apache-2.0
"""Bulk copies from and to a file: reads and writes of threads, and writing back and dropping pages behind them."""

import asyncio
import errno
import os
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.bio import OP_FLUSH, OP_WRITE, PENDING
from nbdtarget.common.errors import DeviceError
from nbdtarget.devices import bulk as bulk_module
from nbdtarget.devices.bulk import BulkCopies
from nbdtarget.devices.bulk_streams import BulkFailure, Chunk
from nbdtarget.devices.file import bulk
from nbdtarget.devices.file import device as device_module
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.devices.file.page_cache import cached_pages
from nbdtarget.devices.health import HealthState
from nbdtarget.devices.resolve import create_device, open_device
from nbdtarget.fast.compiled import IS_COMPILED, describe
from tests.support.file_device import SIZE, bio_of, ended
from tests.support.patience import PATIENCE_S, until

CONTENT = random.Random(3).randbytes(SIZE)
WINDOW = [(0, SIZE // 2)]
NEXT = [(SIZE // 2, SIZE)]


@pytest.fixture
def by_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a Python thread write back, also where compiled code could."""
    monkeypatch.setattr(bulk, "IS_COMPILED", False)


@pytest.fixture(
    params=[
        "worker",
        pytest.param(
            "compiled", marks=pytest.mark.skipif(not IS_COMPILED, reason=describe())
        ),
    ]
)
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(bulk, "IS_COMPILED", request.param == "compiled")
    return str(request.param)


class FakeThread:
    """Stands for a `Syncer` whose work ends with `status`, once `gate` is set.

    Attributes:
        asked: what it was asked to do.
    """

    status = 0
    gate: "asyncio.Event"

    def __init__(self, fd: int, nice_step: int) -> None:
        self.asked: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]] = []
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.tasks: set[asyncio.Task[None]] = set()

    def begin_behind(
        self, ranges: list[tuple[int, int]], before: list[tuple[int, int]]
    ) -> None:
        assert not self.tasks
        self.asked.append((ranges, before))
        self.tasks.add(asyncio.ensure_future(self._end()))

    async def _end(self) -> None:
        await self.gate.wait()
        os.eventfd_write(self.event_fd, 1)

    def take(self) -> int:
        os.eventfd_read(self.event_fd)
        self.tasks.clear()
        return self.status

    def close(self) -> None:
        assert not self.tasks
        os.close(self.event_fd)


@pytest.fixture
def fake_thread(monkeypatch: pytest.MonkeyPatch) -> type[FakeThread]:
    class Fake(FakeThread):
        gate = asyncio.Event()

    monkeypatch.setattr(bulk, "IS_COMPILED", True)
    monkeypatch.setattr(bulk, "Syncer", Fake)
    return Fake


async def made(tmp_path: Path) -> FileDevice:
    device = await create_device(str(tmp_path / "disk"), SIZE)
    assert isinstance(device, FileDevice)
    return device


async def test_a_writer_writes_all_also_where_the_kernel_takes_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = await made(tmp_path)
    device._syncs.refuses_before_it_takes = True
    writer = device.maybe_bulk_writer()
    assert writer is not None
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:100], at))
    assert writer.write(memoryview(b"0123456789" * 33), 4096) == 0
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    assert writer.write(memoryview(b"x"), 0) == errno.EIO
    monkeypatch.undo()
    assert bytes(await device.read(4096, 330)) == b"0123456789" * 33
    await device.close()


@pytest.mark.parametrize(("status", "latches"), [(errno.EIO, 1), (errno.ENOSPC, 0)])
async def test_a_failed_write_latches_unless_it_was_refused_for_want_of_space(
    tmp_path: Path, status: int, latches: int
) -> None:
    device = await made(tmp_path)
    device._syncs.refuses_before_it_takes = True
    writer = device.maybe_bulk_writer()
    assert writer is not None
    writer.write_failed(status)
    device.submit(bio := bio_of(OP_FLUSH, 0, 0))
    assert await ended(bio) == [errno.EIO * latches]
    await device.close()


async def test_a_device_that_is_read_only_has_no_writer(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    device = await open_device(str(tmp_path / "disk"), read_only=True)
    assert device.maybe_bulk_writer() is None
    await device.close()


async def test_where_a_write_may_tell_of_an_earlier_one_there_is_no_writer(
    tmp_path: Path,
) -> None:
    """The loop would hear too late of what a thread of the copy has been told."""
    device = await made(tmp_path)
    device._syncs.refuses_before_it_takes = False
    assert device.maybe_bulk_writer() is None
    await device.close()


@pytest.mark.usefixtures("by_worker")
async def test_a_window_is_begun_at_once_and_dropped_when_the_next_one_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        bulk, "write_back_range", lambda _, b, e: calls.append(("begin", b, e))
    )
    monkeypatch.setattr(
        bulk, "wait_for_writeback", lambda _, b, e: calls.append(("wait", b, e))
    )
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _, b, n, __: calls.append(("drop", b, b + n))
    )
    device = await made(tmp_path)
    await device.write_behind(WINDOW)
    assert calls == [("begin", *WINDOW[0])]
    await device.write_behind(NEXT)
    assert calls[1:] == [
        ("begin", *NEXT[0]),
        ("wait", *WINDOW[0]),
        ("drop", *WINDOW[0]),
    ]
    await device.write_behind([])
    assert calls[4:] == [("wait", *NEXT[0]), ("drop", *NEXT[0])]
    await device.write_behind([])
    assert len(calls) == 6
    await device.close()


@pytest.mark.usefixtures("by_worker")
@pytest.mark.parametrize(
    ("quick_s", "nr_begun"), [(PATIENCE_S, bulk.BEGUN_MAX), (0.0, 2)]
)
async def test_a_quick_disk_has_more_windows_under_way_than_a_slow_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_s: float, nr_begun: int
) -> None:
    begun: list[int] = []
    most = 0

    def begin(_: int, at: int, __: int) -> None:
        nonlocal most
        begun.append(at)
        most = max(most, len(begun))

    monkeypatch.setattr(bulk, "QUICK_S", quick_s)
    monkeypatch.setattr(bulk, "write_back_range", begin)
    monkeypatch.setattr(bulk, "wait_for_writeback", lambda _, at, __: begun.remove(at))
    device = await made(tmp_path)
    for nr in range(4 * bulk.BEGUN_MAX):
        await device.write_behind([(nr * 4096, nr * 4096 + 4096)])
    assert most == nr_begun
    assert begun == sorted(begun)  # the oldest was waited for first
    await device.write_behind([])
    assert begun == []
    await device.close()


@pytest.mark.usefixtures("each_way")
async def test_what_was_written_leaves_the_page_cache_of_a_real_file(
    tmp_path: Path,
) -> None:
    device = await made(tmp_path)
    if device._behind is None:
        pytest.skip("the file system has no disk")
    await device.write(0, b"x" * SIZE)
    if not cached_pages(device._fd, 0, SIZE):
        pytest.skip("the kernel has no cachestat")
    await device.write_behind(WINDOW)
    await device.write_behind([])
    assert cached_pages(device._fd, *WINDOW[0]) == 0
    assert cached_pages(device._fd, *NEXT[0]) > 0
    assert bytes(await device.read(0, SIZE)) == b"x" * SIZE
    await device.close()


@pytest.mark.usefixtures("by_worker")
async def test_an_error_of_the_wait_latches_and_fails_the_flush_that_overlapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has told the error here, and does not tell the fdatasync any more."""
    gate = threading.Event()

    def fail(fd: int, begin: int, end: int) -> None:
        gate.wait(PATIENCE_S)
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(bulk, "wait_for_writeback", fail)
    device = await made(tmp_path)
    await device.write_behind(WINDOW)
    waiting = asyncio.ensure_future(device.write_behind([]))
    await asyncio.sleep(0)
    flushing = asyncio.ensure_future(device.flush())
    await asyncio.sleep(0.01)  # its fdatasync has succeeded by now, or soon
    assert not flushing.done()
    gate.set()
    await waiting
    with pytest.raises(DeviceError):
        await flushing
    assert device.health.state is HealthState.LATCHED
    assert "writeback" in device.health.last_error
    await device.close()


async def test_an_error_of_the_thread_latches_and_fails_the_flush_that_overlapped(
    tmp_path: Path, fake_thread: type[FakeThread]
) -> None:
    fake_thread.status = errno.EIO
    device = await made(tmp_path)
    waiting = asyncio.ensure_future(device.write_behind(WINDOW))
    await asyncio.sleep(0)
    flushing = asyncio.ensure_future(device.flush())
    await asyncio.sleep(0.01)  # its fdatasync has succeeded by now, or soon
    assert not flushing.done()
    fake_thread.gate.set()
    await waiting
    with pytest.raises(DeviceError):
        await flushing
    assert device.health.state is HealthState.LATCHED
    assert "writeback" in device.health.last_error
    await device.close()


@pytest.mark.parametrize("status", [0, errno.EIO])
async def test_a_wait_whose_caller_is_cancelled_counts_until_it_ends(
    tmp_path: Path, fake_thread: type[FakeThread], status: int
) -> None:
    fake_thread.status = status
    device = await made(tmp_path)
    waiting = asyncio.ensure_future(device.write_behind(WINDOW))
    await asyncio.sleep(0)
    waiting.cancel()
    device.submit(flush := bio_of(OP_FLUSH, 0, 0))
    await until(lambda: device._syncs._flush is None)
    assert flush.status == PENDING
    fake_thread.gate.set()
    assert await ended(flush) == [status]
    await device.close()


async def test_windows_go_to_the_thread_one_after_the_other(
    tmp_path: Path, fake_thread: type[FakeThread]
) -> None:
    device = await made(tmp_path)
    behind = device._behind
    if behind is None:
        pytest.skip("the file system has no disk")
    first = asyncio.ensure_future(device.write_behind(WINDOW))
    second = asyncio.ensure_future(device.write_behind(NEXT))
    await asyncio.sleep(0)
    thread = behind._thread
    assert isinstance(thread, FakeThread)
    assert thread.asked == [(WINDOW, [])]
    first.cancel()  # the thread goes on, and the next one waits for it
    closing = asyncio.ensure_future(device.close())
    await asyncio.sleep(0)
    assert not closing.done()
    fake_thread.gate.set()
    await second
    await closing
    assert thread.asked == [(WINDOW, []), (NEXT, WINDOW)]


async def test_without_a_thread_a_worker_writes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, nice_step: int) -> None:
        raise OSError(errno.EAGAIN, "no thread")

    monkeypatch.setattr(bulk, "IS_COMPILED", True)
    monkeypatch.setattr(bulk, "Syncer", refuse)
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(bulk, "write_back_range", lambda _, b, e: calls.append((b, e)))
    device = await made(tmp_path)
    await device.write_behind(WINDOW)
    await device.write_behind([])
    assert calls == WINDOW
    await device.close()


@pytest.mark.usefixtures("by_worker")
@pytest.mark.parametrize("status", sorted(bulk._NOT_SUPPORTED))
async def test_where_it_is_not_supported_it_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    nr_calls = 0

    def refuse(fd: int, begin: int, end: int) -> None:
        nonlocal nr_calls
        nr_calls += 1
        raise OSError(status, "not here")

    monkeypatch.setattr(bulk, "write_back_range", refuse)
    device = await made(tmp_path)
    for _ in range(3):
        await device.write_behind(WINDOW)
    assert nr_calls == 1
    await device.flush()
    await device.close()


async def test_a_bio_of_which_write_behind_is_told_is_written_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    pwritev = os.pwritev

    def counted(fd: int, parts: tuple[memoryview], at: int, flags: int) -> int:
        lengths.append(len(parts[0]))
        return pwritev(fd, parts, at, flags)

    monkeypatch.setattr("nbdtarget.devices.file.pieces.IS_COMPILED", False)
    monkeypatch.setattr(os, "pwritev", counted)
    device = await made(tmp_path)
    if device._behind is None:
        pytest.skip("the file system has no disk")
    bio = bio_of(OP_WRITE, 0, SIZE)
    bio.payload = memoryview(b"x" * SIZE)
    device.submit_behind(bio)
    assert await ended(bio) == [0]
    assert lengths == [SIZE]
    outside = bio_of(OP_WRITE, SIZE, 512)
    outside.payload = memoryview(bytes(512))
    device.submit_behind(outside)
    assert await ended(outside) == [errno.ENOSPC]
    assert bytes(await device.read(0, SIZE)) == b"x" * SIZE
    await device.close()


# ---- streams ----


@pytest.fixture
async def source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FileDevice]:
    """A file that is only read; it lends streams also where nothing is compiled."""
    monkeypatch.setattr(device_module, "IS_COMPILED", True)
    (tmp_path / "source").write_bytes(CONTENT)
    source = await open_device(str(tmp_path / "source"), read_only=True)
    assert isinstance(source, FileDevice)
    yield source
    await source.close()


@pytest.fixture
async def copies(
    source: FileDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each_way: str
) -> AsyncIterator[BulkCopies]:
    monkeypatch.setattr(bulk_module, "CHUNK_BYTES", 64 << 10)
    destination = await create_device(str(tmp_path / "copy"), SIZE, sparse=True)
    copies = BulkCopies(source, destination)
    yield copies
    copies.rest()
    await destination.close()


async def copied(copies: BulkCopies) -> BulkFailure | None:
    copying = copies.maybe_copy(0, SIZE)
    assert copying is not None
    return await asyncio.wait_for(copying, PATIENCE_S)


async def test_a_file_is_copied_by_threads_which_come_back(
    copies: BulkCopies, source: FileDevice, tmp_path: Path
) -> None:
    assert await copied(copies) is None
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert source._nr_lent == bulk.STREAMS
    copies.rest()
    await until(lambda: source._nr_lent == 0)
    assert await copied(copies) is None


async def test_a_read_of_a_file_that_fails_is_noted_and_others_go_on(
    copies: BulkCopies, source: FileDevice, tmp_path: Path
) -> None:
    os.truncate(tmp_path / "source", SIZE // 2)
    failure = await copied(copies)
    assert failure is not None
    assert (failure.status, failure.is_read) == (errno.EIO, True)
    assert source.health.errors == {"read": 1}
    os.truncate(tmp_path / "source", SIZE)
    assert await copied(copies) is None
    assert (tmp_path / "copy").read_bytes() == CONTENT[: SIZE // 2] + bytes(SIZE // 2)


async def test_a_file_is_not_closed_while_streams_are_lent(source: FileDevice) -> None:
    streams = source.lend_streams()
    closing = asyncio.ensure_future(source.close())
    for stream in streams:
        await asyncio.sleep(0)
        assert not closing.done()
        assert os.fstat(source._fd).st_size == SIZE
        stream.give_back("")
    await asyncio.wait_for(closing, PATIENCE_S)
    assert source._fd == -1


async def test_files_of_which_nothing_is_lent(
    source: FileDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "IS_COMPILED", False)
    assert source.lend_streams() == []  # Python's threads are no help
    monkeypatch.setattr(device_module, "IS_COMPILED", True)
    source.hides_zeroes = True  # as a block device does: a copy by bios looks for them
    assert source.lend_streams() == []
    written = await create_device(str(tmp_path / "written"), SIZE, sparse=True)
    assert written.lend_streams() == []
    await written.close()


def test_a_stream_of_a_file_can_read_everything_and_is_never_lost() -> None:
    stream = bulk.FileStream(-1, lambda _: None, lambda: None)
    assert stream.can_read(1, 3)
    assert stream.is_near
    chunk = Chunk(None, 0, 1)  # type: ignore[arg-type]
    chunk.buffer = memoryview(bytearray(1))
    stream.start([chunk])
    assert [each.status for each in stream.wait()] == [errno.EBADF]
    with pytest.raises(AssertionError, match="never lost"):
        stream.lost_reason("", 0)
