# SPDX-License-Identifier: Apache-2.0
"""Reads of a file that wait for the disk: by io_uring where it is allowed, else by worker threads."""

import asyncio
import errno as errnos
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.common.errors import DeviceError
from nbdtarget.devices import resolve
from nbdtarget.devices.base import Device
from nbdtarget.devices.file import ring
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.fast import compiled
from tests.support.patience import PATIENCE_S

needs_ring = pytest.mark.skipif(
    not compiled.is_available(), reason="io_uring is not built, or not allowed"
)

CONTENT = os.urandom(1 << 20)


@pytest.fixture
async def device(tmp_path: Path) -> AsyncIterator[FileDevice]:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    opened = await resolve.open_device(str(path), read_only=False)
    assert isinstance(opened, FileDevice)
    # Nothing is answered inline.
    opened._read_inline_max = -1
    yield opened
    await opened.close()


def begin(device: Device, offset: int, length: int) -> "asyncio.Future[Bio]":
    ended: asyncio.Future[Bio] = asyncio.get_running_loop().create_future()
    payload = memoryview(bytearray(length))
    device.submit(Bio(OP_READ, offset, length, payload, 0, ended.set_result))
    return ended


@needs_ring
async def test_reads_need_no_thread(device: FileDevice) -> None:
    nr_threads = len(device._pool._threads)  # from opening
    reads = [begin(device, nr * 4096, 4096) for nr in range(100)]
    assert device.nr_in_flight == 100
    for nr, bio in enumerate(await asyncio.gather(*reads)):
        assert bio.status == 0
        assert bytes(bio.payload or b"") == CONTENT[nr * 4096 : nr * 4096 + 4096]
    assert device.nr_in_flight == 0
    assert len(device._pool._threads) == nr_threads


@needs_ring
async def test_more_reads_than_the_ring_takes_go_to_threads(
    device: FileDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "_readers", {})
    monkeypatch.setattr(ring, "READS_MAX", 4)
    reads = [begin(device, nr * 4096, 4096) for nr in range(50)]
    for nr, bio in enumerate(await asyncio.gather(*reads)):
        assert bytes(bio.payload or b"") == CONTENT[nr * 4096 : nr * 4096 + 4096]


@needs_ring
async def test_read_that_comes_short_is_finished_by_a_thread(
    device: FileDevice, tmp_path: Path
) -> None:
    """A read behind the new end of a file that was cut under us is an error, and does not return zeroes."""
    os.truncate(tmp_path / "disk", 10_000)
    with pytest.raises(DeviceError) as caught:
        await device.read(8192, 4096)
    assert caught.value.errno == errnos.EIO


@needs_ring
async def test_read_that_fails_is_told_by_the_thread_that_meets_it_again(
    device: FileDevice,
) -> None:
    """The error in the log and in `health` is the one of a plain read."""
    fd, device._fd = device._fd, os.open("/", os.O_RDONLY)
    with pytest.raises(DeviceError) as caught:
        await device.read(0, 4096)
    assert caught.value.errno == errnos.EISDIR
    os.close(device._fd)
    device._fd = fd


async def test_without_io_uring_threads_read(
    device: FileDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "_readers", {})
    monkeypatch.setattr(ring, "_is_allowed", False)
    assert (await device.read(4096, 4096)) == CONTENT[4096:8192]


@needs_ring
async def test_io_uring_that_is_refused_is_not_tried_again(
    device: FileDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def refuse(_: int) -> None:
        tried.append(1)
        raise PermissionError(errnos.EPERM, "io_uring_setup")

    monkeypatch.setattr(ring, "_readers", {})
    monkeypatch.setattr(ring, "_is_allowed", True)
    monkeypatch.setattr(ring, "Ring", refuse)
    for _ in range(3):
        assert (await device.read(4096, 4096)) == CONTENT[4096:8192]
    assert tried == [1]


@needs_ring
async def test_callback_that_raises_keeps_no_other_read_waiting(
    device: FileDevice,
) -> None:
    loop = asyncio.get_running_loop()
    raised: list[object] = []
    loop.set_exception_handler(lambda _, context: raised.append(context))
    reader = ring.maybe_reader()
    assert reader is not None

    def bad(_: int) -> None:
        raise RuntimeError("planted")

    others: list[int] = []
    dones: list[Callable[[int], None]] = [bad, others.append, bad, others.append]
    for done in dones:
        assert reader.read(device._fd, memoryview(bytearray(16)), 0, done)
    async with asyncio.timeout(PATIENCE_S):
        while len(others) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert others == [16, 16]
    assert raised


@needs_ring
async def test_close_waits_for_what_a_thread_finishes(device: FileDevice) -> None:
    """A read that comes short is given to a worker, which must not be gone."""
    os.truncate(device.name, 1024)
    ended = begin(device, 0, 4096)
    await device.close()
    async with asyncio.timeout(PATIENCE_S):
        assert (await ended).status == errnos.EIO


async def test_close_waits_for_reads_of_the_compiled_path(device: FileDevice) -> None:
    """A table that has failed does not wait for its reads any more, but `close` does."""
    device._note_ring_reads(2)
    closing = asyncio.create_task(device.close())
    await asyncio.sleep(0)
    device._note_ring_reads(-1)
    await asyncio.sleep(0)
    assert device._fd >= 0
    device._note_ring_reads(-1)
    await closing


@needs_ring
@pytest.mark.parametrize("how", ["no room", "an error"])
async def test_reads_that_the_kernel_does_not_take_are_offered_again(
    device: FileDevice, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(ring, "_readers", {})
    reader = ring.maybe_reader()
    assert reader is not None
    real = reader.ring
    refused: list[str] = []

    class Refusing:
        """Takes nothing three times."""

        event_fd = real.event_fd
        read, reap = real.read, real.reap

        def flush(self) -> bool:
            if len(refused) == 3:
                return real.flush()
            refused.append(how)
            if how == "an error":
                raise OSError(errnos.ENOMEM, os.strerror(errnos.ENOMEM))
            return False

    monkeypatch.setattr(reader, "ring", Refusing())
    async with asyncio.timeout(PATIENCE_S):
        assert (await device.read(4096, 4096)) == CONTENT[4096:8192]
    assert len(refused) == 3


class RingWithoutReads:
    """Stands in for a ring, also where io_uring is not allowed."""

    def __init__(self, _: int) -> None:
        self.event_fd = os.eventfd(0)


def test_each_loop_has_a_reader_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_readers", {})
    monkeypatch.setattr(ring, "_is_allowed", True)
    monkeypatch.setattr(ring, "Ring", RingWithoutReads)

    async def reader() -> ring.RingReader:
        found = ring.maybe_reader()
        assert found is not None
        assert found.loop is asyncio.get_running_loop()
        return found

    loops = [asyncio.new_event_loop() for _ in range(3)]
    readers = [loop.run_until_complete(reader()) for loop in loops[:2]]
    # Each loop keeps its reader, although another loop has run meanwhile.
    assert [loop.run_until_complete(reader()) for loop in loops[:2]] == readers
    loops[0].close()
    readers.append(loops[2].run_until_complete(reader()))
    assert list(ring._readers) == loops[1:]  # a closed loop is forgotten
    for loop, each in zip(loops, readers, strict=True):
        loop.close()
        os.close(each.ring.event_fd)
