# SPDX-License-Identifier: Apache-2.0
"""The geometry of a disk: three numbers that old partition tools ask for, and where the disk begins.

NBD has no place for it: it is kept, and shown, and no client learns of it.
"""

from typing import Final, NamedTuple

from nbdtarget.common.errors import TableError

__all__ = ["Geometry"]

CYLINDERS_MAX: Final = 65535
HEADS_MAX: Final = 255
SECTORS_MAX: Final = 255


class Geometry(NamedTuple):
    """`start`: the first sector of the device, on the disk that has this geometry."""

    cylinders: int
    heads: int
    sectors: int
    start: int

    def check(self) -> None:
        """Raises: TableError, EINVAL, as the kernel's."""
        if (
            min(self) < 0
            or self.cylinders > CYLINDERS_MAX
            or self.heads > HEADS_MAX
            or self.sectors > SECTORS_MAX
        ):
            raise TableError("Invalid argument: Geometry exceeds range limits")
        if self.start > self.cylinders * self.heads * self.sectors:
            raise TableError(
                "Invalid argument: Start sector is beyond the geometry limits"
            )
