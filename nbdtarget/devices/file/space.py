# SPDX-License-Identifier: Apache-2.0
"""`Space`: freeing the space of a file and filling it with zeroes, by the fastest call that it takes.

    DISCARD        fallocate (PUNCH_HOLE), or BLKDISCARD for a block device; whole units only
    WRITE_ZEROES   fallocate: PUNCH_HOLE, or ZERO_RANGE where the space must stay allocated (NO_UNMAP);
                   by writing where neither is supported, and at the ragged ends

Which calls a file takes is not known before they have been tried once, because trying ZERO_RANGE past the end
would allocate. Everything here runs in a worker, and holds the lock of the inode meanwhile.
"""

import errno as errnos
from collections.abc import Callable
from typing import Final

from nbdtarget.bio import FAST_ZERO, NO_UNMAP
from nbdtarget.devices.file.pieces import write_rest
from nbdtarget.devices.file.syscalls import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    allocate,
    discard_blocks,
)

__all__ = ["Space"]

ZEROES: Final = bytes(1 << 20)  # what zeroes are written from, piece by piece


class Space:
    """The space of one open file.

    Attributes:
        can_zero_range: ZERO_RANGE has not failed yet.
    """

    def __init__(
        self,
        fd: int,
        *,
        unit: int,
        is_block_device: bool,
        can_zero_range: bool,
        write: Callable[[memoryview, int], int] | None = None,
    ) -> None:
        """
        Args:
            unit: bytes; only whole units can be freed or zeroed without writing.
            write: writes a payload at an offset, and returns an errno or 0; None: through the page cache.
        """
        self._fd = fd
        self._write = write or (lambda payload, at: write_rest(fd, payload, at, 0))
        self._unit = unit
        self._is_block_device = is_block_device
        self.can_zero_range = can_zero_range

    def zeroes_fast(self, offset: int, length: int, flags: int) -> bool:
        """Whether a WRITE_ZEROES would need no writing, on a device that can zero at all."""
        if flags & NO_UNMAP and not self.can_zero_range:
            return False
        return (offset | length) % self._unit == 0

    def discard(self, offset: int, length: int) -> None:
        """Free the whole units inside the range. Raises: OSError: EOPNOTSUPP: never tried with success."""
        begin, end = self._aligned(offset, length)
        if begin >= end:
            return
        if self._is_block_device:
            discard_blocks(self._fd, begin, end - begin)
        else:
            mode = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
            allocate(self._fd, mode, begin, end - begin)

    def zero(self, offset: int, length: int, flags: int, *, by_writing: bool) -> int:
        """Fill the range with zeroes, and return an errno or 0. Raises: OSError.

        Args: by_writing: the device has no other way.
        """
        begin, end = self._aligned(offset, length)
        if by_writing or begin >= end:
            return self._zero_by_writing(offset, length)
        try:
            self._zero_aligned(begin, end - begin, flags)
        except OSError as error:
            if error.errno != errnos.EOPNOTSUPP or flags & FAST_ZERO:
                raise
            return self._zero_by_writing(offset, length)
        return self._zero_by_writing(offset, begin - offset) or self._zero_by_writing(
            end, offset + length - end
        )

    def _zero_aligned(self, offset: int, length: int, flags: int) -> None:
        if flags & NO_UNMAP and self.can_zero_range:
            mode = FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE
            try:
                allocate(self._fd, mode, offset, length)
                return
            except OSError as error:
                if error.errno != errnos.EOPNOTSUPP:
                    raise
                self.can_zero_range = False
                if flags & FAST_ZERO or self._is_block_device:
                    raise
        allocate(self._fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length)
        if flags & NO_UNMAP:
            # The hole must have space again. It reads as zeroes all the same.
            allocate(self._fd, FALLOC_KEEP_SIZE, offset, length)

    def _zero_by_writing(self, offset: int, length: int) -> int:
        zeroes = memoryview(ZEROES)
        end = offset + length
        while offset < end:
            piece = zeroes[: min(len(zeroes), end - offset)]
            status = self._write(piece, offset)
            if status:
                return status
            offset += len(piece)
        return 0

    def _aligned(self, offset: int, length: int) -> tuple[int, int]:
        """The begin and end of what lies in whole units inside the range."""
        unit = self._unit
        return -(-offset // unit) * unit, (offset + length) // unit * unit
