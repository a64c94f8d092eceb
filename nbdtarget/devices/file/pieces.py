# SPDX-License-Identifier: Apache-2.0
"""Writing a payload to a file in pieces, in a worker."""

import errno as errnos
import os
from typing import Final

from nbdtarget.fast.compiled import IS_COMPILED, write_pieces

__all__ = ["WRITE_PIECE", "write_rest"]

# Large writes go to the page cache in such pieces. ext4 (6.16 and later) makes folios as large as the
# write that fills them, and each later small write to a folio pays for its size: 4 KiB rewrites of a
# file that was written in 1 MiB pieces took 4.6 us and more, of one in 64 KiB pieces 3.8, in 4 KiB
# pieces 2.0; filling it is not slower at 64 KiB. A clone is first hydrated, then written at random.
WRITE_PIECE: Final = 64 << 10


def write_rest(
    fd: int, payload: memoryview, offset: int, put: int, *, piece: int = WRITE_PIECE
) -> int:
    """Write what is left of `payload`, of which `put` bytes are written, and return an errno or 0. Raises: OSError.

    Args:
        offset: of the whole payload in the file.
        piece: bytes of one call at most.
    """
    if IS_COMPILED:
        # Once without Python's lock: the event loop, which wants it all the time, is not asked for it after each piece.
        put, error = write_pieces(fd, payload, put, offset, piece)
        if error:
            raise OSError(error, os.strerror(error))
        return 0 if put == len(payload) else errnos.EIO
    while put < len(payload):
        part = payload[put : put + piece]
        more = os.pwritev(fd, (part,), offset + put, 0)
        if more == 0:
            return errnos.EIO
        put += more
    return 0
