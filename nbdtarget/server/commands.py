# SPDX-License-Identifier: Apache-2.0
"""NBD commands without payload, as bios."""

from typing import Final

from nbdtarget.bio import (
    FAST_ZERO,
    FUA,
    NO_UNMAP,
    OP_CACHE,
    OP_DISCARD,
    OP_WRITE_ZEROES,
)
from nbdtarget_protocol.consts import (
    CMD_CACHE,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_NO_HOLE,
    CMD_TRIM,
    CMD_WRITE_ZEROES,
)

__all__ = ["OPS", "bio_flags_of"]

OPS: Final = {
    CMD_TRIM: OP_DISCARD,
    CMD_CACHE: OP_CACHE,
    CMD_WRITE_ZEROES: OP_WRITE_ZEROES,
}


def bio_flags_of(command: int, flags: int) -> int:
    """Return the flags of the bio for a command. CACHE has none, because FUA means nothing to it."""
    if command == CMD_CACHE:
        return 0
    bio_flags = flags & FUA
    if flags & CMD_FLAG_NO_HOLE:
        bio_flags |= NO_UNMAP
    if flags & CMD_FLAG_FAST_ZERO:
        bio_flags |= FAST_ZERO
    return bio_flags
