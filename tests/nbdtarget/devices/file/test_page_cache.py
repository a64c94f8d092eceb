# SPDX-License-Identifier: Apache-2.0
"""Opening for writing: what the page cache shows is made to be what the disk holds.

The fault itself needs a kernel whose disk fails: `tests/support/pagecache.py` is a model of it, and the
crash suite's `test_page_cache.py` walks through it. Here is what a real kernel is asked.
"""

import errno
import mmap
import os
from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.file import open as file_open
from nbdtarget.devices.file.page_cache import believe_the_disk, cached_pages
from nbdtarget.devices.resolve import open_device

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(SIZE))
    return path


class Calls:
    """Notes each fdatasync and fadvise with the path that it is for, and fails one on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.order: list[str] = []
        self.fail_with = 0
        inode = path.stat().st_ino
        fdatasync, fadvise = os.fdatasync, os.posix_fadvise

        def sync(fd: int) -> None:
            if os.fstat(fd).st_ino == inode:
                self.order.append("sync")
                if self.fail_with:
                    code, self.fail_with = self.fail_with, 0  # told once, as Linux does
                    raise OSError(code, os.strerror(code))
            fdatasync(fd)

        def advise(fd: int, offset: int, length: int, advice: int) -> None:
            if os.fstat(fd).st_ino == inode and advice == os.POSIX_FADV_DONTNEED:
                assert (offset, length) == (0, 0), "the whole file"
                self.order.append("drop")
            fadvise(fd, offset, length, advice)

        monkeypatch.setattr(os, "fdatasync", sync)
        monkeypatch.setattr(os, "posix_fadvise", advise)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, path: Path) -> Calls:
    return Calls(monkeypatch, path)


async def test_open_for_writing_syncs_and_drops_clean_pages(
    path: Path, calls: Calls
) -> None:
    device = await open_device(str(path))
    await device.close()
    assert calls.order[:2] == ["sync", "drop"]


def test_offline_tools_sync_and_drop_clean_pages_as_well(
    path: Path, calls: Calls
) -> None:
    fd, size = file_open.open_fd(str(path), read_only=False)
    os.close(fd)
    assert size == SIZE
    assert calls.order[:2] == ["sync", "drop"]


async def test_what_is_only_read_is_left_in_the_page_cache(
    path: Path, calls: Calls
) -> None:
    await (await open_device(str(path), read_only=True)).close()
    assert calls.order == []


async def test_an_error_that_nobody_has_seen_refuses_the_opening_once(
    path: Path, calls: Calls
) -> None:
    calls.fail_with = errno.EIO
    with pytest.raises(ResolveError) as caught:
        await open_device(str(path))
    assert caught.value.errno == errno.EIO
    assert "cannot be written to the disk (Input/output error)" in str(caught.value)
    assert "\n" not in str(caught.value)
    calls.order.clear()
    await (
        await open_device(str(path))
    ).close()  # the lock is gone, and nothing is left
    assert calls.order[:2] == ["sync", "drop"]


def test_clean_pages_are_gone_and_the_content_is_the_same(path: Path) -> None:
    content = path.read_bytes()
    fd = os.open(path, os.O_RDWR)
    try:
        believe_the_disk(fd, SIZE)
        assert cached_pages(fd, 0, SIZE) == 0
        assert os.pread(fd, SIZE, 0) == content
    finally:
        os.close(fd)


def test_pages_mapped_by_another_process_are_rewritten(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = path.read_bytes()
    written: list[tuple[int, int]] = []
    pwrite = os.pwrite

    def noted(fd: int, data: bytes, offset: int) -> int:
        written.append((offset, len(data)))
        return pwrite(fd, data, offset)

    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as mapped:
            touched = {at: mapped[at] for at in (0, 5 * mmap.PAGESIZE, SIZE - 1)}
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if not cached_pages(fd, 0, SIZE):
                pytest.skip("this kernel has no cachestat: it came with Linux 6.5")
            monkeypatch.setattr(os, "pwrite", noted)
            believe_the_disk(fd, SIZE)
        assert all(
            any(begin <= at < begin + length for begin, length in written)
            for at in touched
        )
        assert sum(length for _, length in written) < SIZE, "no more than what stayed"
        assert os.pread(fd, SIZE, 0) == content
    finally:
        os.close(fd)


async def test_the_name_of_an_existing_file_is_made_durable_when_it_is_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(path)
    synced: list[int] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    await (await open_device(str(link))).close()
    assert os.stat(tmp_path).st_ino in synced
    synced.clear()
    await (await open_device(str(link), read_only=True)).close()
    assert synced == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EINVAL])
async def test_a_directory_that_cannot_be_synced_hinders_nobody(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(_: str) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(file_open, "sync_directory", refuse)
    await (await open_device(str(path))).close()
