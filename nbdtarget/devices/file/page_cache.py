# SPDX-License-Identifier: Apache-2.0
"""Make the page cache of a file, or of a block device, say what the disk says.

Theory of operation. When Linux fails to write a page to the disk, it calls the page clean, goes on
showing its new content to all readers, and reports the error once to each file that
is open at that moment. A program that opens the file afterwards, in the same boot, sees no error,
writes nothing with fsync, and reads what the disk does not hold. An acknowledgement that rests on
such a read is lost with the next power cut. So whatever is opened for writing begins with:

    1  fdatasync           what is dirty reaches the disk. An error that was not reported yet is reported here
    2  DONTNEED            the clean pages are dropped: what is read from now on comes from the disk
    3  cachestat           step 2 is advice: pages that another process has mapped into its memory
                           stay, as do those that are being read at this moment. Has anything stayed?
    4  write them again    what has stayed is written as it shows, and synced: the disk then says
                           what the page cache says. That is allowed, because there is no promise that a
                           write whose flush had failed would *not* be there

Block devices have a page cache, too. It is dropped when the last user closes the device, so only a
device that another program holds open needs this; DONTNEED works on it as on a file. (BLKFLSBUF would do
the same as steps 1 and 2, but needs to be root.) An NFS client drops the pages of a file after a
failed write by itself; the steps do no harm there. What a server across the network keeps in its own page cache
is beyond our reach. tmpfs has no disk, and its pages are the data: nothing is done.

cachestat came with Linux 6.5. On an older kernel the advice is trusted; for metadata, which is all that
an acknowledgement can rest on without a write of the client, the first resume of each opening
rewrites the superblock in any case (see `metadata/nbdtarget_metadata/log/commit.py`).
"""

import ctypes
import errno as errnos
import mmap
import os
import platform
import stat
import struct
from typing import Final

from nbdtarget.devices.file.syscalls import is_memory_file_system

__all__ = ["believe_the_disk", "cached_pages"]

PIECE: Final = 1 << 20  # bytes that are written again at a time

_CACHESTAT: Final = 451  # the same number on every architecture but these
_OTHER_NUMBERS: Final = ("alpha", "mips")
_RANGE: Final = struct.Struct("QQ")  # struct cachestat_range: offset, length
_CACHESTAT_SIZE: Final = (
    40  # struct cachestat: five u64; the first is the pages in the cache
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def believe_the_disk(fd: int, size: int) -> None:
    """Sync what is dirty, and drop or write again what is not; see the module head.

    It may block for as long as the disk takes.

    Args:
        size: of the file or block device, in bytes.

    Raises: OSError: something could not be written, now or earlier.
    Durable: all that a read of `fd` returns from here on.
    """
    os.fdatasync(fd)
    # A block device lies on devtmpfs, but its data do not.
    if is_memory_file_system(fd) and not stat.S_ISBLK(os.fstat(fd).st_mode):
        return
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(fd, 0, size):
        _write_again(fd, 0, size)
        os.fdatasync(fd)


def cached_pages(fd: int, begin: int, end: int) -> int:
    """Return how many pages of [begin, end) are in the page cache; 0 if the kernel cannot tell."""
    if platform.machine().startswith(_OTHER_NUMBERS):
        return 0
    where = ctypes.create_string_buffer(_RANGE.pack(begin, end - begin))
    answer = ctypes.create_string_buffer(_CACHESTAT_SIZE)
    number, flags = ctypes.c_long(_CACHESTAT), ctypes.c_uint(0)
    if _libc.syscall(number, ctypes.c_int(fd), where, answer, flags) != 0:
        errno = ctypes.get_errno()
        # Not known, not for this file system, or forbidden inside a container.
        if errno in (errnos.ENOSYS, errnos.EOPNOTSUPP, errnos.EPERM):
            return 0
        raise OSError(errno, os.strerror(errno))
    (nr_cached,) = struct.unpack_from("Q", answer.raw)
    return int(nr_cached)


def _write_again(fd: int, begin: int, end: int) -> None:
    """Write each cached page of [begin, end) as it is: halve the range until all of it is cached."""
    nr_pages = -(-(end - begin) // mmap.PAGESIZE)
    nr_cached = cached_pages(fd, begin, end)
    if nr_cached == 0:
        return
    if nr_cached < nr_pages:
        middle = begin + nr_pages // 2 * mmap.PAGESIZE
        _write_again(fd, begin, middle)
        _write_again(fd, middle, end)
        return
    for at in range(begin, end, PIECE):
        data = os.pread(fd, min(PIECE, end - at), at)
        put = 0
        while put < len(data):
            put += os.pwrite(fd, data[put:], at + put)
