# SPDX-License-Identifier: Apache-2.0
"""The few system calls that a disk needs and that Python has no name for.

Each raises OSError, as those of `os` do. All but the locks may block for long and belong
in a worker; ctypes lets other threads run meanwhile.
"""

import array
import ctypes
import errno as errnos
import fcntl
import os
import stat
import struct
from contextlib import suppress
from typing import Final

__all__ = [
    "FALLOC_KEEP_SIZE",
    "FALLOC_PUNCH_HOLE",
    "FALLOC_ZERO_RANGE",
    "allocate",
    "block_device_limit",
    "block_device_sector",
    "can_punch_holes",
    "direct_unit",
    "discard_blocks",
    "fd_size",
    "is_memory_file_system",
    "is_rotational",
    "lock_for_reading",
    "lock_for_writing",
    "maps_at_once",
    "refuses_before_it_takes",
    "start_writeback",
    "wait_for_writeback",
    "write_back_range",
]

FALLOC_KEEP_SIZE: Final = 0x01
FALLOC_PUNCH_HOLE: Final = 0x02
FALLOC_ZERO_RANGE: Final = 0x10

_BLKSSZGET: Final = 0x1268
_BLKDISCARD: Final = 0x1277
_BLKGETSIZE64: Final = 0x80081272

_SYNC_FILE_RANGE_WAIT_BEFORE: Final = 1
_SYNC_FILE_RANGE_WRITE: Final = 2
_SYNC_FILE_RANGE_WAIT_AFTER: Final = 4

_AT_EMPTY_PATH: Final = 0x1000
_STATX_DIOALIGN: Final = 0x2000  # Linux 6.1
_STATX_SIZE: Final = 256
_STATX_DIO_ALIGNMENTS: Final = 0x98  # of memory; then of offset and length
_DIRECT_UNIT_MAX: Final = (
    4096  # where the kernel does not say: more is not asked for in practice
)

_TMPFS_MAGIC: Final = 0x01021994
_RAMFS_MAGIC: Final = 0x858458F6
_ZFS_MAGIC: Final = 0x2FC12FC1

# File systems that reserve the space for a buffered write before they take any of its bytes.
_RESERVING_MAGICS: Final = frozenset(
    {
        _TMPFS_MAGIC,
        _RAMFS_MAGIC,
        0x0000EF53,  # ext2, ext3, ext4
        0x58465342,  # xfs
        0x9123683E,  # btrfs
        0xF2F52010,  # f2fs
        0xCA451A4E,  # bcachefs
        _ZFS_MAGIC,
    }
)

# File systems whose mmap asks no server and no other process, and that show in the mapping what their page cache has (zfs does not).
_MAPPING_MAGICS: Final = _RESERVING_MAGICS - {_ZFS_MAGIC}

# File systems that are known to punch holes.
_PUNCHING_MAGICS: Final = frozenset(
    {_TMPFS_MAGIC, 0x0000EF53, 0x58465342, 0x9123683E, 0xF2F52010}
)

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, len, pid

# QEMU's lock bytes: one for each permission in use, one for each that is not shared.
_QEMU_USED: Final = 100
_QEMU_UNSHARED: Final = 200
_QEMU_READ: Final = 0
_QEMU_WRITE: Final = 1
_QEMU_RESIZE: Final = 3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_int64,
]
_libc.fallocate.restype = ctypes.c_int
_libc.sync_file_range.argtypes = [
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_uint,
]
_libc.sync_file_range.restype = ctypes.c_int
_libc.statx.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_void_p,
]
_libc.statx.restype = ctypes.c_int
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
_libc.fstatfs.restype = ctypes.c_int


def allocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Raises: OSError: EOPNOTSUPP where the file system cannot."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        errno = ctypes.get_errno()
        # ctypes does not repeat an interrupted call as the functions of `os` do.
        if errno != errnos.EINTR:
            raise OSError(errno, os.strerror(errno))


def can_punch_holes(fd: int, size: int) -> bool:
    """Whether a regular file of `size` bytes takes FALLOC_PUNCH_HOLE; it stays as it is.

    Raises: OSError.
    """
    if _file_system_magic(fd) in _PUNCHING_MAGICS:
        return True  # to try it would change the file's time for a moment
    status = os.fstat(fd)
    try:
        # Nothing lies past the end of the file, so nothing is punched there.
        allocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, size, 1)
    except OSError as error:
        if error.errno in (errnos.EOPNOTSUPP, errnos.ENOSYS, errnos.EINVAL):
            return False
        raise
    # It counts as a change all the same, and by the time of the last change a disk is recognised.
    with suppress(PermissionError):  # only the owner may: see `identify_fd`
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
    return True


def is_memory_file_system(fd: int) -> bool:
    """Whether the file lies on tmpfs or ramfs, where no read or write waits for a disk."""
    return _file_system_magic(fd) in (_TMPFS_MAGIC, _RAMFS_MAGIC)


def direct_unit(fd: int) -> int:
    """Return what offset and length of direct I/O must be multiples of, in bytes; 0: there is none here."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return block_device_sector(fd)
    if is_memory_file_system(fd):
        return 0  # newer kernels take O_DIRECT there, and copy to and from the page cache all the same
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) != 0:
        return _DIRECT_UNIT_MAX  # no such call, or forbidden inside a container
    (mask,) = struct.unpack_from("I", buffer.raw)
    if not mask & _STATX_DIOALIGN:
        return _DIRECT_UNIT_MAX  # an older kernel, or a file system that does not say
    _, unit = struct.unpack_from("II", buffer.raw, _STATX_DIO_ALIGNMENTS)
    return int(unit)


def refuses_before_it_takes(fd: int) -> bool:
    """Whether a write that fails for want of space (or quota) says nothing of earlier writes.

    NFS, for one, answers a write with the ENOSPC of an earlier one, and then forgets that.
    """
    return _file_system_magic(fd) in _RESERVING_MAGICS


def maps_at_once(fd: int) -> bool:
    """Whether mmap of this regular file does not wait for a server or another process.

    On NFS and SMB it asks the server whether the file has changed. The memory of the process is locked meanwhile, for all of its threads.
    """
    return _file_system_magic(fd) in _MAPPING_MAGICS


def _file_system_magic(fd: int) -> int:
    # struct statfs is 120 bytes on 64-bit Linux; its first word is the magic number.
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    (magic,) = struct.unpack_from("l", buffer.raw)
    return int(magic) & 0xFFFFFFFF


def start_writeback(fd: int) -> None:
    """Begin to write all dirty pages of the file to its disk; waits for none of them.

    What goes wrong with one is still reported by the next fdatasync.
    """
    _sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)


def write_back_range(fd: int, begin: int, end: int) -> None:
    """As `start_writeback`, for the pages of one range."""
    _sync_file_range(fd, begin, end - begin, _SYNC_FILE_RANGE_WRITE)


def wait_for_writeback(fd: int, begin: int, end: int) -> None:
    """Write the dirty pages of a range to the disk, and wait for them.

    Not durable: the disk may have a cache of its own. An error is told here, and then the next fdatasync of the
    same open file does not tell it any more.
    """
    _sync_file_range(
        fd,
        begin,
        end - begin,
        _SYNC_FILE_RANGE_WAIT_BEFORE
        | _SYNC_FILE_RANGE_WRITE
        | _SYNC_FILE_RANGE_WAIT_AFTER,
    )


def _sync_file_range(fd: int, offset: int, length: int, flags: int) -> None:
    """Args: length: 0: to the end of the file."""
    if _libc.sync_file_range(fd, offset, length, flags) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))


def lock_for_writing(fd: int) -> None:
    """Lock the whole file for this open file description alone, or fail at once.

    Raises: BlockingIOError, PermissionError: another open file has any lock on it.
    """
    _set_lock(fd, fcntl.F_WRLCK, 0, 0)


def lock_for_reading(fd: int) -> None:
    """Lock the file so that all may read and none may write, or fail at once.

    The locks are those of a QEMU that reads and does not share writing: a shared lock on one
    byte for each permission that we use, and for each one that others may not have. So QEMU and its
    tools may look at a clone's source while it is served, but not change it.

    Raises: BlockingIOError, PermissionError: it is open for writing elsewhere.
    Source: QEMU, block/file-posix.c, "Image locking".
    """
    _set_lock(fd, fcntl.F_RDLCK, 0, 1)  # seen by each `lock_for_writing`
    _set_lock(fd, fcntl.F_RDLCK, _QEMU_USED + _QEMU_READ, 1)
    for permission in (_QEMU_WRITE, _QEMU_RESIZE):
        _set_lock(fd, fcntl.F_RDLCK, _QEMU_UNSHARED + permission, 1)
        if _is_locked(fd, _QEMU_USED + permission):
            raise BlockingIOError(errnos.EAGAIN, "a writer has it open")
    if _is_locked(fd, _QEMU_UNSHARED + _QEMU_READ):
        raise BlockingIOError(errnos.EAGAIN, "it is open for one user only")


def _set_lock(fd: int, kind: int, start: int, length: int) -> None:
    flock = _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock)


def _is_locked(fd: int, start: int) -> bool:
    """Whether another open file has any lock on the byte."""
    flock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, flock)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def fd_size(fd: int) -> int:
    """Bytes of a file or block device, now."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return _ioctl_number(fd, _BLKGETSIZE64, "Q")
    return status.st_size


def block_device_sector(fd: int) -> int:
    """The logical block size in bytes."""
    return _ioctl_number(fd, _BLKSSZGET, "i")


def block_device_limit(rdev: int, limit: str) -> int:
    """A number of the request queue as sysfs shows it; 0 if it shows none, or may not be read: containers hide it.

    A partition has no queue of its own: its disk is one directory up.
    """
    device = f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}"
    for directory in (f"{device}/queue", f"{device}/../queue"):
        try:
            with open(f"{directory}/{limit}", encoding="ascii") as file:
                return int(file.read())
        except OSError:  # it is advice, and no reason to refuse the disk
            continue
    return 0


def is_rotational(fd: int) -> bool:
    """Whether the block device, or the one below the file's file system, has to seek."""
    status = os.fstat(fd)
    disk = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    return block_device_limit(disk, "rotational") > 0


def discard_blocks(fd: int, offset: int, length: int) -> None:
    """BLKDISCARD. Raises: OSError: EOPNOTSUPP, or EINVAL if not aligned."""
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", offset, length))


def _ioctl_number(fd: int, request: int, typecode: str) -> int:
    number = array.array(typecode, [0])
    fcntl.ioctl(fd, request, number, True)
    return number[0]
