# SPDX-License-Identifier: Apache-2.0
"""Closing the descriptors of a file in a thread, because close(2) may wait.

NFS writes back what is dirty, and asks its server to unlock the file. The last close of a block device writes back all of its pages. On a
dead mount neither ends, and the event loop must go on.
"""

import errno as errnos
import logging
import os
from collections.abc import Iterable
from functools import partial

from nbdtarget.devices.workers import WorkerPool

__all__ = ["close_descriptors"]

log = logging.getLogger(__name__)


async def close_descriptors(name: str, fds: Iterable[int]) -> None:
    """Close them, in this order. Also when it is cancelled it returns only when they are closed.

    An error is logged: all that was acknowledged as durable has been synced before.

    Args: name: of the device, for the log.
    """
    pool = WorkerPool(f"{name}-close", threads_max=1)
    closing = pool.start(partial(_close, tuple(fds)))
    try:
        status = await closing
    finally:
        await pool.close()
    if status:
        log.warning(
            "%s: closed with an error: %s: writes that no FLUSH has covered may be lost",
            name,
            os.strerror(status),
        )


def _close(fds: tuple[int, ...]) -> int:
    status = 0
    for fd in fds:
        try:
            os.close(fd)
        except OSError as error:
            status = error.errno or errnos.EIO
    return status
