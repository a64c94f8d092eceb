# SPDX-License-Identifier: Apache-2.0
"""Parts of files that are mapped for long READs: when a file gets them, and when they are given back."""

import asyncio
import errno
import fcntl
import os
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.devices import resolve
from nbdtarget.devices.file import device as file_device
from nbdtarget.devices.file import syscalls
from nbdtarget.devices.file import windows as file_windows
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.devices.file.syscalls import lock_for_writing
from nbdtarget.fast import compiled
from tests.support.patience import PATIENCE_S, until
from tests.support.plane import SIZE, Bench, data_chunk, request

pytestmark = pytest.mark.skipif(
    not compiled.IS_COMPILED, reason=f"{compiled.describe()}"
)
if compiled.IS_COMPILED:
    from nbdtarget_fast import DONE, Route
    from nbdtarget_map import Windows

READ = 0
LENGTH = 64 << 10
NFS_MAGIC = 0x6969


class Served:
    """A file device that a plane serves.

    Args: bench: has the socket; its own file is not used.
    """

    def __init__(self, bench: Bench, device: FileDevice, path: Path) -> None:
        self.bench, self.device, self.path = bench, device, path
        self.use(device)

    def use(self, device: FileDevice) -> None:
        fast = device.maybe_fast_file()
        assert fast is not None
        self.fast = fast
        self.bench.route.close()
        self.bench.route = Route.flat(fast, 0, SIZE)
        self.bench.route.can_read = True

    def read(self) -> None:
        assert self.bench.turn(request(READ, 0, LENGTH)) == DONE
        data = os.pread(self.device._fd, LENGTH, 0)
        assert self.bench.replies() == data_chunk(0, data)

    @property
    def is_mapped(self) -> bool:
        return f"{self.path}\n" in Path("/proc/self/maps").read_text()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(SIZE))
    device = await resolve.open_device(str(path), read_only=False)
    assert isinstance(device, FileDevice)
    bench = Bench(tmp_path / "unused")
    with path.open("rb") as opened:
        opened.read()  # opening the device has dropped it from the page cache
    yield Served(bench, device, path)
    bench.close()
    await device.close()


async def test_long_read_of_a_file_is_sent_from_a_window(served: Served) -> None:
    windows = file_windows.windows_of_loop()
    before = windows.nr_sent
    served.read()
    assert served.is_mapped
    assert windows.nr_sent == before + 1


async def test_closed_file_has_neither_windows_nor_its_lock(served: Served) -> None:
    served.read()
    await served.device.close()
    assert not served.is_mapped
    with served.path.open("r+b") as opened:
        lock_for_writing(opened.fileno())  # raises if it is locked


async def test_file_that_is_opened_anew_has_no_windows_meanwhile(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.read()
    was_mapped: list[bool] = []
    real = FileDevice._probe

    def probe(device: FileDevice) -> object:
        was_mapped.append(served.is_mapped)
        return real(device)

    monkeypatch.setattr(FileDevice, "_probe", probe)
    device = await served.device.reopened(str(served.path), read_only=False)
    assert isinstance(device, FileDevice)
    assert was_mapped == [False]
    served.use(served.device)
    served.path.read_bytes()
    served.read()
    assert not served.is_mapped  # the old device copies from now on
    served.use(device)
    served.read()
    assert served.is_mapped
    served.bench.route.close()
    await device.close()
    served.device.reopening_undone()
    served.use(served.device)
    served.read()
    assert served.is_mapped  # it is alone again


@pytest.mark.parametrize("is_made", [False, True])
async def test_file_that_cannot_be_opened_anew_has_windows_again(
    served: Served, monkeypatch: pytest.MonkeyPatch, *, is_made: bool
) -> None:
    served.read()
    if not is_made:
        served.bench.route.close()
        served.device._fast = None
        file_windows.windows_of_loop().drop(served.fast.owner, 100)

    def probe(_: FileDevice) -> object:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(FileDevice, "_probe", probe)
    with pytest.raises((OSError, NbdTargetError)):
        await served.device.reopened(str(served.path), read_only=False)
    assert not served.is_mapped
    served.use(served.device)
    served.path.read_bytes()
    served.read()
    assert served.is_mapped


async def test_file_that_a_server_may_be_asked_about_is_not_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(SIZE))
    # mmap asks the server there, on the loop, and keeps the memory of the whole process locked until it answers.
    monkeypatch.setattr(syscalls, "_file_system_magic", lambda _: NFS_MAGIC)
    asked: list[int] = []
    monkeypatch.setattr(file_device, "windows_of_loop", lambda: asked.append(1))
    device = await resolve.open_device(str(path), read_only=True)
    assert isinstance(device, FileDevice)
    bench = Bench(tmp_path / "unused")
    path.read_bytes()
    served = Served(bench, device, path)
    served.read()
    assert not served.is_mapped

    def probe(_: FileDevice) -> object:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(FileDevice, "_probe", probe)
    with pytest.raises(NbdTargetError):
        await device.reopened(str(path), read_only=True)
    assert served.fast.windows is None
    assert not asked
    bench.close()
    await device.close()


def test_each_thread_s_loop_keeps_its_windows() -> None:
    async def twice(barrier: threading.Barrier) -> tuple[Windows, Windows]:
        first = file_windows.windows_of_loop()
        barrier.wait(timeout=PATIENCE_S)
        return first, file_windows.windows_of_loop()

    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(lambda: asyncio.run(twice(barrier))) for _ in range(2)]
        (a, again_a), (b, again_b) = (run.result() for run in runs)
    assert a is again_a
    assert b is again_b
    assert a is not b


async def test_windows_that_are_not_used_are_given_back(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_windows, "SWEEP_S", 0.01)
    served.read()
    assert served.is_mapped
    await until(lambda: not served.is_mapped)
    served.read()
    await until(lambda: not served.is_mapped)


async def test_source_that_only_reads_has_windows_too(tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(SIZE))
    device = await resolve.open_device(str(path), read_only=True)
    assert isinstance(device, FileDevice)
    assert fcntl.fcntl(device._fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    bench = Bench(tmp_path / "unused")
    read = Served(bench, device, path)
    read.read()
    assert read.is_mapped
    bench.close()
    await device.close()
    assert not read.is_mapped


def test_windows_are_bounded_by_the_memory_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"SC_PHYS_PAGES": 1 << 18, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert file_windows.bytes_max() == 128 << 20
    sizes["SC_PHYS_PAGES"] = 1 << 24
    assert file_windows.bytes_max() == file_windows.WINDOWS_MAX
