# SPDX-License-Identifier: Apache-2.0
"""The few system calls that a disk needs and that Python has no name for.

Each raises OSError, as those of `os` do. All but `lock_whole` may block for long and belong
in a worker; ctypes lets other threads run meanwhile.
"""

import array
import ctypes
import errno as errnos
import fcntl
import os
import struct
from typing import Final

__all__ = [
    "FALLOC_KEEP_SIZE",
    "FALLOC_PUNCH_HOLE",
    "FALLOC_ZERO_RANGE",
    "allocate",
    "block_device_limit",
    "block_device_sector",
    "block_device_size",
    "discard_blocks",
    "is_memory_file_system",
    "lock_whole",
]

FALLOC_KEEP_SIZE: Final = 0x01
FALLOC_PUNCH_HOLE: Final = 0x02
FALLOC_ZERO_RANGE: Final = 0x10

_BLKSSZGET: Final = 0x1268
_BLKDISCARD: Final = 0x1277
_BLKGETSIZE64: Final = 0x80081272

_TMPFS_MAGIC: Final = 0x01021994
_RAMFS_MAGIC: Final = 0x858458F6

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, len, pid

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_int64,
]
_libc.fallocate.restype = ctypes.c_int
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
_libc.fstatfs.restype = ctypes.c_int


def allocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Raises: OSError: EOPNOTSUPP where the file system cannot."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        errno = ctypes.get_errno()
        # ctypes does not repeat an interrupted call as the functions of `os` do.
        if errno != errnos.EINTR:
            raise OSError(errno, os.strerror(errno))


def is_memory_file_system(fd: int) -> bool:
    """Whether the file lies on tmpfs or ramfs, where no read or write waits for a disk."""
    # struct statfs is 120 bytes on 64-bit Linux; its first word is the magic number.
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    (magic,) = struct.unpack_from("l", buffer.raw)
    return magic & 0xFFFFFFFF in (_TMPFS_MAGIC, _RAMFS_MAGIC)


def lock_whole(fd: int, *, exclusive: bool) -> None:
    """Lock the whole file for this open file description, or fail at once.

    Raises: BlockingIOError, PermissionError: another open file has a lock that forbids it.
    """
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))


def block_device_size(fd: int) -> int:
    """Bytes."""
    return _ioctl_number(fd, _BLKGETSIZE64, "Q")


def block_device_sector(fd: int) -> int:
    """The logical block size in bytes."""
    return _ioctl_number(fd, _BLKSSZGET, "i")


def block_device_limit(rdev: int, limit: str) -> int:
    """A number of the request queue as sysfs shows it; 0 if it shows none.

    A partition has no queue of its own: its disk is one directory up.
    """
    device = f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}"
    for directory in (f"{device}/queue", f"{device}/../queue"):
        try:
            with open(f"{directory}/{limit}", encoding="ascii") as file:
                return int(file.read())
        except FileNotFoundError:
            continue
    return 0


def discard_blocks(fd: int, offset: int, length: int) -> None:
    """BLKDISCARD. Raises: OSError: EOPNOTSUPP, or EINVAL if not aligned."""
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", offset, length))


def _ioctl_number(fd: int, request: int, typecode: str) -> int:
    number = array.array(typecode, [0])
    fcntl.ioctl(fd, request, number, True)
    return number[0]
