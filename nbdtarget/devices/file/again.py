# SPDX-License-Identifier: Apache-2.0
"""Whether a file that is open could be opened once more by its path, after it has been closed."""

import errno as errnos
import os
import stat

from nbdtarget.common.errors import ResolveError

__all__ = ["maybe_refusal"]


def maybe_refusal(
    name: str, path: str, fd: int, *, read_only: bool
) -> ResolveError | None:
    """Look where `path` leads, and whether we may open that. It may block.

    Nothing is opened: closing a descriptor may have effects, for example on a tape or on locks of another kind.
    Returns why not: it leads nowhere, or not to what is open as `fd`, or may not be opened; None: nothing speaks against it.
    """
    try:
        there = os.stat(path)
    except OSError as error:
        reason = (
            f"{error.strerror}: the file that is open was renamed, moved or removed"
        )
        return ResolveError(name, reason, error.errno or errnos.EIO)
    if _disk(there) != _disk(os.fstat(fd)):
        reason = "is another file now than the one that is open"
        return ResolveError(name, reason, errnos.ESTALE)
    mode = os.R_OK if read_only else os.R_OK | os.W_OK
    by_effective = os.access in os.supports_effective_ids
    if not os.access(path, mode, effective_ids=by_effective):
        reason = (
            f"{os.strerror(errnos.EACCES)}: it is open, but may not be opened again"
        )
        return ResolveError(name, reason, errnos.EACCES)
    return None


def _disk(status: os.stat_result) -> tuple[int, ...]:
    if stat.S_ISBLK(status.st_mode):
        return (status.st_rdev,)
    return (status.st_dev, status.st_ino)
