# SPDX-License-Identifier: Apache-2.0
"""`PageCacheDevice`: a crash device behind a page cache that lies as Linux's does.

Theory of operation. What is pending in a `CrashDevice` are the dirty pages. They are written to the disk
by FLUSH, by FUA, and now and then by themselves. While the disk `fails`, a page that should be
written becomes **clean all the same**, and goes on showing its new content: a lie. Linux does just
that. Its error is told once to each open file, by the next sync; an opening after that sees no error, writes nothing,
and reads the lies. They go

    when the page is written again     the whole page is, also the bytes that were not changed
    when clean pages are dropped       and then the disk's content is read
    with the power                     they never were on the disk

A crash image never has them. `reopened` is a new process that opens the file in the same boot: it
runs the product's own `believe_the_disk`, over system calls that this module answers. `Stay`
says what becomes of the advice to drop pages.
"""

import enum
import errno as errnos
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

from nbdtarget.bio import FUA, OP_FLUSH, OP_READ, OP_WRITE, Bio
from nbdtarget.common.units import SECTOR
from nbdtarget.devices.file import page_cache
from nbdtarget.targets.powercut.volatile_cache import (
    Sectors,
    covering,
    lay_over,
    split_sectors,
)
from tests.support.devices import CrashDevice

__all__ = ["PAGE", "PageCacheDevice", "Stay"]

PAGE: Final = 4096
WRITEBACK_CHANCE: Final = 0.05  # after each operation, of what is dirty then
SECTORS_PER_PAGE: Final = PAGE // SECTOR


class Stay(enum.Enum):
    """Which clean pages stay in the page cache although they should be dropped."""

    NONE = "none"
    MAPPED = "mapped"  # another process has them mapped; cachestat counts them
    UNTOLD = "untold"  # the same, and the kernel has no cachestat


class PageCacheDevice(CrashDevice):
    """An open file. See the module head.

    Attributes:
        fails: the disk takes no write.
        lies: sectors that a read returns and that no disk has.
        nr_failures: pages that could not be written.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fails = False
        self.lies: Sectors = {}
        self.nr_failures = 0
        self._error_nr = 0  # of the mapping, as the kernel's errseq_t
        self._told_nr = 0  # the last that anybody was told of
        self._seen_nr = 0  # of this open file

    def adopt(self, before: "PageCacheDevice") -> None:
        """Take over the disk and the page cache of an earlier open file of it."""
        for name in ("_stable", "_cache", "lies", "fails", "nr_failures"):
            setattr(self, name, getattr(before, name))
        self._error_nr, self._told_nr = before._error_nr, before._told_nr

    def open_again(self, stay: Stay) -> None:
        """Open the file in the same boot, as the product does. Raises: OSError."""
        # The kernel reports an error that was not reported yet to the next open file.
        self._seen_nr = self._told_nr
        with _system_calls_of(self, stay):
            page_cache.believe_the_disk(-1, self.size)

    def finish_or_forget(self, rng: random.Random) -> None:
        """The process is killed: each of its requests under way is carried out now, or never."""
        for bio, mark, errno in self._deferred:
            if not errno and bio.op not in (OP_READ, OP_FLUSH) and rng.random() < 0.5:
                self._take_effect(_without_fua(bio), mark)
        self._deferred.clear()

    # The page cache

    def sync(self, mark: int) -> int:
        """fdatasync: write what is dirty; return the errno that this open file is told."""
        self._write_back(self._cache.covered(mark))
        self._cache.forget(mark)
        if self._seen_nr == self._error_nr:
            return 0
        self._seen_nr = self._told_nr = self._error_nr
        return errnos.EIO

    def drop_clean_pages(self) -> None:
        self.lies.clear()

    def write_dirty(self, offset: int, data: bytes) -> None:
        """Write whole sectors to the page cache."""
        self._take_write(
            Bio(OP_WRITE, offset, len(data), memoryview(data), 0, lambda _: None), data
        )

    def _write_back(self, sectors: Sectors) -> None:
        pages = {nr // SECTORS_PER_PAGE for nr in sectors}
        if pages and self.fails:
            self.lies.update(sectors)
            self.nr_failures += len(pages)
            self._error_nr += 1
            return
        for nr, value in sectors.items():
            self._stable[nr * SECTOR : (nr + 1) * SECTOR] = value
            self.lies.pop(nr, None)

    # The crash device

    def _carry_out(self, bio: Bio, mark: int, errno: int) -> None:
        if not errno:
            if bio.op == OP_FLUSH:
                self.trace.append(("flush", 0, 0, 0))
                errno = self._synced(mark)
            elif bio.flags & FUA and bio.op != OP_READ:
                self._take_effect(_without_fua(bio), mark)
                numbers = covering(bio.offset, bio.length)
                # The pages of the range alone; they may hold more than was written now.
                self._write_back(self._cache.newest(_whole_pages(numbers)))
                self._cache.supersede(_whole_pages(numbers))
                errno = self._synced(0)
            else:
                self._take_effect(bio, mark)
        if self._random.random() < WRITEBACK_CHANCE:
            self._write_back(self._cache.covered(self._cache.mark))
            self._cache.forget(self._cache.mark)
        for watcher in self.watchers:
            watcher.finished(self, bio, errno)
        bio.end(errno)

    def _synced(self, mark: int) -> int:
        if self.sync(mark):
            self.is_latched = True
        # It was submitted before the device latched: it must not end well after that.
        if not self.is_latched:
            return 0
        self.failed += 1
        return errnos.EIO

    def _read(self, offset: int, length: int) -> bytearray:
        data = self._stable[offset : offset + length]
        lies = {nr: self.lies[nr] for nr in covering(offset, length) if nr in self.lies}
        lay_over(lies, offset, data)
        self._cache.overlay(offset, data)
        return data

    def _take_write(self, bio: Bio, data: bytes | memoryview) -> None:
        numbers = covering(bio.offset, bio.length)
        begin = numbers.start * SECTOR
        whole = self._read(begin, len(numbers) * SECTOR)
        whole[bio.offset - begin : bio.offset - begin + bio.length] = data
        sectors = split_sectors(numbers.start, whole)
        for nr in _whole_pages(numbers):
            if nr in self.lies and nr not in sectors:
                # The page is dirty again, all of it: also what was written over a lie since.
                sectors[nr] = bytes(self._read(nr * SECTOR, SECTOR))
        self._cache.write(sectors)


def _without_fua(bio: Bio) -> Bio:
    return Bio(
        bio.op, bio.offset, bio.length, bio.payload, bio.flags & ~FUA, lambda _: None
    )


def _whole_pages(sectors: range) -> range:
    begin = sectors.start // SECTORS_PER_PAGE * SECTORS_PER_PAGE
    return range(begin, -(-sectors.stop // SECTORS_PER_PAGE) * SECTORS_PER_PAGE)


@contextmanager
def _system_calls_of(device: PageCacheDevice, stay: Stay) -> Iterator[None]:
    """Let `page_cache` call this device instead of the kernel."""

    def fdatasync(_: int) -> None:
        errno = device.sync(device._cache.mark)
        if errno:
            raise OSError(errno, os.strerror(errno))

    def advise(_: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        if stay is Stay.NONE:
            device.drop_clean_pages()

    def cached(_: int, begin: int, end: int) -> int:
        if stay is not Stay.MAPPED:
            return 0
        nr = {nr // SECTORS_PER_PAGE for nr in device.lies}
        return sum(begin <= page * PAGE < end for page in nr)

    def pwrite(_: int, data: bytes, offset: int) -> int:
        device.write_dirty(offset, data)
        return len(data)

    calls = SimpleNamespace(
        fdatasync=fdatasync,
        posix_fadvise=advise,
        pread=lambda _, length, offset: bytes(device._read(offset, length)),
        pwrite=pwrite,
        fstat=lambda _: SimpleNamespace(st_mode=0o100600),
        POSIX_FADV_DONTNEED=os.POSIX_FADV_DONTNEED,
    )
    with mock.patch.multiple(
        page_cache,
        os=calls,
        cached_pages=cached,
        is_memory_file_system=lambda _: False,
    ):
        yield
