# SPDX-License-Identifier: Apache-2.0
"""Drive the generators of `metadata`: over a device, or over a file in offline tools.

An operation that has been started is waited for before the generator is closed, also
when the task is cancelled: after that the metadata object may use its place on the disk again,
and a write that lands late would destroy what stands there then.

A device's error ends the generator and comes out of `run`: the metadata object is then in the
middle of something, and the caller decides between `abort` and `fail`.
"""

import asyncio
import errno as errnos
import logging
import os
from typing import Final, TypeVar

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import Device
from nbdtarget_metadata.operations import (
    UNREADABLE,
    Answer,
    Flush,
    Operation,
    Read,
    Steps,
    TryRead,
    Write,
)

__all__ = ["run", "run_file"]

T = TypeVar("T")

log = logging.getLogger(__name__)

# How disks report that they cannot read a sector; the page cache makes EIO of all of them.
_CANNOT_READ: Final = frozenset({errnos.EIO, errnos.ENODATA, errnos.EILSEQ})


async def run(device: Device, steps: Steps[T]) -> T:
    """Run `steps` over `device` and return its result.

    A flush also fails if the device has lost anything since the run began (`Device.losses`): what
    `steps` has written may be gone, although the device goes on.

    Raises: DeviceError, after every operation under way has ended; whatever `steps` raises.
    Durable: what `steps` says.
    """
    answer: Answer | tuple[Answer, ...] = None
    losses = device.losses
    try:
        while True:
            try:
                # Sending None to a generator that has not begun starts it.
                operation = steps.send(answer)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if isinstance(operation, Read | Write | Flush):
                (answer,) = await _carry_out_all(device, (operation,))
                if isinstance(operation, Flush) and device.losses != losses:
                    raise DeviceError(errnos.EIO, device.name, "flush", 0, 0)
            elif operation:
                answer = await _carry_out_all(device, operation)
            else:
                await asyncio.sleep(0)
                answer = ()
    finally:
        steps.close()


async def _carry_out_all(
    device: Device, operations: tuple[Operation, ...]
) -> tuple[Answer, ...]:
    """Carry out `operations` at the same time; return or raise when all have ended."""
    tasks = [asyncio.ensure_future(_carry_out(device, each)) for each in operations]
    cancelled: asyncio.CancelledError | None = None
    pending: set[asyncio.Future[Answer]] = set(tasks)
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancelled = error
            pending = {task for task in tasks if not task.done()}
    failures = [fault for task in tasks if (fault := task.exception()) is not None]
    if cancelled is not None:
        raise cancelled
    if failures:
        raise failures[0]
    return tuple(task.result() for task in tasks)


async def _carry_out(device: Device, operation: Operation) -> Answer:
    if isinstance(operation, Read):
        try:
            return await device.read(operation.offset, operation.length)
        except DeviceError as error:
            if not isinstance(operation, TryRead) or error.errno not in _CANNOT_READ:
                raise
            log.warning("%s", error)
            return _unreadable(operation.length)
    if isinstance(operation, Write):
        await device.write(operation.offset, operation.data, fua=operation.fua)
    else:
        await device.flush()
    return None


def run_file(
    file: str | os.PathLike[str] | int,
    steps: Steps[T],
    *,
    read_only: bool = False,
    name: str | None = None,
    unreadable: list[int] | None = None,
) -> T:
    """Run `steps` over a path, or an open file descriptor, synchronously. For tools.

    Args:
        name: what errors call a descriptor.
        unreadable: if given, a block that the disk cannot read does not end the run: it is
            answered as if it held `UNREADABLE`, and its offset is noted here.

    Raises: DeviceError; OSError if the path cannot be opened; whatever `steps` raises.
    Durable: what `steps` says.
    """
    if isinstance(file, int):
        return _run_fd(file, name or str(file), steps, unreadable)
    try:
        fd = os.open(file, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError:
        steps.close()
        raise
    try:
        return _run_fd(fd, os.fspath(file), steps, unreadable)
    finally:
        os.close(fd)


def _run_fd(fd: int, name: str, steps: Steps[T], unreadable: list[int] | None) -> T:
    answer: Answer | tuple[Answer, ...] = None
    try:
        while True:
            try:
                operation = steps.send(answer)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if isinstance(operation, Read | Write | Flush):
                answer = _carry_out_fd(fd, name, operation, unreadable)
            else:
                answer = tuple(
                    _carry_out_fd(fd, name, each, unreadable) for each in operation
                )
    finally:
        steps.close()


def _carry_out_fd(
    fd: int, name: str, operation: Operation, unreadable: list[int] | None
) -> Answer:
    offset, length, verb = 0, 0, "flush"
    try:
        if isinstance(operation, Read):
            offset, length, verb = operation.offset, operation.length, "read"
            if unreadable is None and not isinstance(operation, TryRead):
                return _pread(fd, offset, length)
            return _pread_around(
                fd, offset, length, [] if unreadable is None else unreadable
            )
        if isinstance(operation, Write):
            offset, length, verb = operation.offset, len(operation.data), "write"
            _pwrite(fd, offset, operation.data)
            if operation.fua:
                os.fdatasync(fd)
        else:
            os.fdatasync(fd)
    except OSError as error:
        raise DeviceError(
            error.errno or errnos.EIO, name, verb, offset, length
        ) from error
    return None


def _pread(fd: int, offset: int, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    at = 0
    while at < length:
        count = os.preadv(fd, [view[at:]], offset + at)
        if count == 0:
            raise OSError(errnos.EIO, "read behind the end")
        at += count
    return data


def _pread_around(
    fd: int, offset: int, length: int, unreadable: list[int]
) -> bytearray:
    """Read what can be read, block by block if it must be."""
    try:
        return _pread(fd, offset, length)
    except OSError as error:
        if error.errno not in _CANNOT_READ:
            raise
    if length <= len(UNREADABLE):
        unreadable.append(offset)
        return _unreadable(length)
    data = bytearray()
    for at in range(offset, offset + length, len(UNREADABLE)):
        size = min(len(UNREADABLE), offset + length - at)
        data += _pread_around(fd, at, size, unreadable)
    return data


def _unreadable(length: int) -> bytearray:
    return bytearray(UNREADABLE * -(-length // len(UNREADABLE)))[:length]


def _pwrite(fd: int, offset: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view = view[count:]
        offset += count
