# SPDX-License-Identifier: Apache-2.0
"""Where a file has data and where it has holes, in a worker."""

import errno as errnos
import os
from typing import Final

from nbdtarget.devices.base import EXTENT_DATA, EXTENT_HOLE, EXTENT_ZERO, Extent

__all__ = ["find_extents"]

EXTENTS_MAX: Final = 1024  # one call finds at most so many; each costs a system call


def find_extents(fd: int, offset: int, length: int, found: list[Extent]) -> int:
    """Fill `found` with what the range is, from its beginning on, and return 0. Raises: OSError.

    lseek moves the position of the file, which nothing here uses.
    """
    at, end = offset, offset + length
    while at < end and len(found) < EXTENTS_MAX:
        try:
            data = min(os.lseek(fd, at, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno == errnos.ENXIO:  # no data up to the end of the file
                data = end
            elif error.errno == errnos.EINVAL and not found:
                break  # a file system that cannot tell
            else:
                raise
        if data > at:
            found.append(Extent(data - at, EXTENT_HOLE | EXTENT_ZERO))
        at = data
        if at < end:
            hole = min(os.lseek(fd, at, os.SEEK_HOLE), end)
            if hole <= at:
                break  # punched between the two calls: call the rest data
            found.append(Extent(hole - at, EXTENT_DATA))
            at = hole
    if at < end and len(found) < EXTENTS_MAX:
        found.append(Extent(end - at, EXTENT_DATA))
    return 0
