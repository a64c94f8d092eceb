# SPDX-License-Identifier: Apache-2.0
"""Opening and creating what a `FileDevice` stands on.

*Lock.* Open file description locks: on the whole file for writing, on a few bytes for reading,
chosen as QEMU chooses them. So no two programs (this one or QEMU) write to the same file, and none writes to a
file that is a source; but several may read a source. Block devices are also opened with O_EXCL for writing, which
fails while they are mounted or part of something else.

*Truth.* After a write to the disk has failed, Linux shows in its page cache what the disk does not
have, also to programs that open the file later. So what is opened for writing is first made to show
what is on the disk (page_cache.py); a failure there refuses the opening. The directory of an existing
file is synced as well: the program that made the file may not have done so, and an fsync of the file alone
need not keep its name.

*Once more.* A file that is latched is opened anew while the old descriptor, which has the lock (and a block
device's O_EXCL), is still in use. A lock cannot be handed from one open file description to another, but
it lives as long as any descriptor of its description does. So the new device keeps a duplicate of the old
descriptor beside its own, only for the lock: there is no moment in which another process could take it. The
new descriptor is a description of its own, which has not been told of any error.

Everything here that may block runs in the new device's own worker.
"""

import asyncio
import errno as errnos
import logging
import os
import stat
from collections.abc import Callable
from functools import partial

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.devices.file.page_cache import believe_the_disk
from nbdtarget.devices.file.syscalls import (
    allocate,
    fd_size,
    is_rotational,
    lock_for_reading,
    lock_for_writing,
)
from nbdtarget.devices.workers import WorkerPool

__all__ = [
    "create_fd",
    "create_file",
    "give_space",
    "open_fd",
    "open_file",
    "sync_directory",
]

log = logging.getLogger(__name__)


class _NotWrittenError(ResolveError):
    """The sync with which an opening begins has failed."""


async def open_file(
    name: str,
    path: str,
    *,
    read_only: bool,
    beside: FileDevice | None = None,
    kind: type[FileDevice] = FileDevice,
) -> FileDevice:
    """Open and lock an existing file or block device.

    Args:
        beside: we have the same one open already, at least as writable: share its lock.
        kind: of device to make of it.

    Raises: ResolveError.
    Durable: unless `read_only`, everything that is read from it, and its name.
    """
    lock_fd = -1 if beside is None else beside.share_lock()
    opening = partial(_open, name, path, read_only, lock_fd, kind.open_flags)
    device = await _make(
        name, opening, read_only=read_only, lock_fd=lock_fd, beside=beside, kind=kind
    )
    device.path, device.open_beside = path, partial(_open_beside, path)
    return device


async def create_file(
    name: str,
    path: str,
    size: int,
    *,
    sparse: bool,
    kind: type[FileDevice] = FileDevice,
) -> FileDevice:
    """Create a file of `size` zero bytes that did not exist, and open it for writing.

    Raises: ResolveError; then there is no file.
    Durable: the file, its size and its name; unless `sparse`, its space, where the file
        system can promise that.
    """
    create = partial(_create, name, path, size, sparse, kind.open_flags)
    undo = partial(os.unlink, path)
    device = await _make(name, create, read_only=False, undo=undo, kind=kind)
    device.path, device.open_beside = path, partial(_open_beside, path)
    return device


def open_fd(path: str, *, read_only: bool) -> tuple[int, int]:
    """Open and lock an existing file or block device for a tool, which may block.

    Returns the descriptor, to be closed, and the size in bytes. Raises: ResolveError.
    Durable: as of `open_file`.
    """
    fd = -1
    try:
        fd = _open(path, path, read_only)
        return fd, _size(path, fd)
    except (OSError, ResolveError) as error:
        if fd >= 0:
            os.close(fd)
        raise (_refused(path, error) if isinstance(error, OSError) else error) from None


def create_fd(path: str, size: int) -> int:
    """Create a file of `size` zero bytes that did not exist, for a tool, which may block.

    Returns the descriptor, locked for writing. Raises: ResolveError; then there is no file.
    Durable: as of `create_file`.
    """
    try:
        return _create(path, path, size, False)
    except OSError as error:
        raise _refused(path, error) from None


def give_space(path: str, size: int) -> None:
    """Grow an existing, empty file to `size` zero bytes, for a tool, which may block.

    Raises: OSError; then it is empty as before.
    Durable: the size, and its space where the file system can promise that.
    """
    fd = os.open(path, os.O_CLOEXEC | os.O_RDWR)
    try:
        if not _allocated(fd, size):
            os.ftruncate(fd, size)
        os.fsync(fd)
    except OSError:
        os.ftruncate(fd, 0)  # what there was room for
        raise
    finally:
        os.close(fd)


async def _make(
    name: str,
    open_fd: Callable[[], int],
    *,
    read_only: bool,
    lock_fd: int = -1,
    beside: FileDevice | None = None,
    undo: Callable[[], None] | None = None,
    kind: type[FileDevice],
) -> FileDevice:
    """Open in the new device's own worker: on a dead network mount even that may block.

    Args:
        lock_fd: has the lock, if `open_fd` does not take one; it is closed with the device.
        beside: as of `open_file`.
        undo: takes back what `open_fd` did, if the caller is cancelled.
    """
    pool = WorkerPool(name, threads_max=kind.threads_max)
    made: list[FileDevice] = []
    refused: list[ResolveError] = []

    def make() -> int:
        fd = -1
        try:
            fd = open_fd()
            size = _size(name, fd)
            device = kind(name, fd, size, pool, read_only=read_only, lock_fd=lock_fd)
            device.rotational = is_rotational(fd)
            made.append(device)
        except ResolveError as error:
            refused.append(error)
        except OSError as error:
            refused.append(_refused(name, error))
        if not made:
            for each in (fd, lock_fd):
                if each >= 0:
                    os.close(each)
        return 0

    making = pool.start(make)
    if beside is not None and not read_only:
        _count_beside(beside, making, refused)
    try:
        await asyncio.shield(making)
    except asyncio.CancelledError:
        # The worker goes on, and what it opens has to be closed (and so unlocked) here.
        await making
        for device in made:
            if undo is not None:
                undo()
            await device.close()
        await pool.close()
        raise
    if not made:
        await pool.close()
        raise refused[0]
    return made[0]


def _count_beside(
    old: FileDevice, making: "asyncio.Future[int]", refused: list[ResolveError]
) -> None:
    """The opening begins with a sync: it may be told an error of what was written through `old`, and `old` then is not."""
    done = old.begin_sync_beside()

    def has_ended(_: "asyncio.Future[int]") -> None:
        lost = [error for error in refused if isinstance(error, _NotWrittenError)]
        done(lost[0].errno if lost else 0)

    making.add_done_callback(has_ended)


async def _open_beside(
    path: str, old: FileDevice, name: str, read_only: bool
) -> FileDevice:
    kind = type(old)
    device = await open_file(name, path, read_only=read_only, beside=old, kind=kind)
    device.bare_name = old.bare_name
    return device


def _open(
    name: str, path: str, read_only: bool, lock_fd: int = -1, more_flags: int = 0
) -> int:
    # Looked at before it is opened: opening a FIFO blocks, opening a tape rewinds it.
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise ResolveError(name, "is a directory", errnos.EISDIR)
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise ResolveError(name, "is not a regular file or block device")
    flags = os.O_CLOEXEC | more_flags | (os.O_RDONLY if read_only else os.O_RDWR)
    if stat.S_ISBLK(mode) and not read_only and lock_fd < 0:
        flags |= os.O_EXCL
    fd = os.open(path, flags)
    try:
        if lock_fd < 0:
            _lock(name, fd, exclusive=not read_only)
        elif not os.path.sameopenfile(fd, lock_fd):
            raise ResolveError(
                name, "was replaced while it was opened: try again", errnos.ESTALE
            )
        if not read_only:
            _make_true(name, fd)
            if stat.S_ISREG(mode):
                _sync_directory_of(path)
    except (OSError, ResolveError):
        os.close(fd)
        raise
    return fd


def _make_true(name: str, fd: int) -> None:
    """Have reads of `fd` return what is on the disk. Raises: ResolveError."""
    try:
        believe_the_disk(fd, _size(name, fd))
    except OSError as error:
        raise _NotWrittenError(
            name,
            "what had been written to it before cannot be written to the disk"
            f" ({os.strerror(error.errno or errnos.EIO)}): see the kernel's log, mend"
            " the disk, and try again",
            error.errno or errnos.EIO,
        ) from error


def _sync_directory_of(path: str) -> None:
    """Make the name of an existing file durable, where we may and the file system can."""
    directory = os.path.dirname(os.path.realpath(path))
    try:
        sync_directory(directory)
    except OSError as error:
        # EACCES: we may pass through the directory, but not open it. EINVAL: no such fsync.
        if error.errno not in (errnos.EACCES, errnos.EPERM, errnos.EINVAL):
            raise
        log.debug("%s: not synced: %s", directory, error)


def _create(name: str, path: str, size: int, sparse: bool, more_flags: int = 0) -> int:
    assert size > 0
    flags = os.O_CLOEXEC | os.O_RDWR | os.O_CREAT | os.O_EXCL | more_flags
    fd = os.open(path, flags, 0o666)
    try:
        _lock(name, fd, exclusive=True)
        if sparse or not _allocated(fd, size):
            os.ftruncate(fd, size)
        os.fsync(fd)
        sync_directory(os.path.dirname(path) or ".")
    except (OSError, ResolveError):
        os.unlink(path)
        os.close(fd)
        raise
    return fd


def _allocated(fd: int, size: int) -> bool:
    """Grow the file to `size` with all its space; False where that cannot be asked for."""
    try:
        allocate(fd, 0, 0, size)
    except OSError as error:
        if error.errno in (errnos.EOPNOTSUPP, errnos.ENOSYS):
            return False
        raise
    return True


def sync_directory(path: str) -> None:
    """Make the names in a directory durable. It may block. Raises: OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock(name: str, fd: int, *, exclusive: bool) -> None:
    try:
        if exclusive:
            lock_for_writing(fd)
        else:
            lock_for_reading(fd)
    except (BlockingIOError, PermissionError):
        raise _in_use(name) from None


def _size(name: str, fd: int) -> int:
    size = fd_size(fd)
    if size == 0:
        raise ResolveError(name, "is empty")
    return size


def _in_use(name: str) -> ResolveError:
    reason = "in use by another process (or another device of this one)"
    return ResolveError(name, reason, errnos.EBUSY)


def _refused(name: str, error: OSError) -> ResolveError:
    errno = error.errno or errnos.EIO
    if errno == errnos.EBUSY:
        return _in_use(name)
    reason = os.strerror(errno)
    return ResolveError(name, reason[:1].lower() + reason[1:], errno)
