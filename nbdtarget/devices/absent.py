# SPDX-License-Identifier: Apache-2.0
"""A disk that a table line names and that was not opened, as nothing is needed of it.

It stands where a device is wanted, so that the code there need not ask whether there is one.
"""

import errno as errnos

from nbdtarget.bio import OP_FLUSH, Bio
from nbdtarget.common.redaction import has_secrets, redacted
from nbdtarget.devices.base import Device

__all__ = ["AbsentDevice"]


class AbsentDevice(Device):
    """Has a name and a size; each bio but a FLUSH ends with ENXIO."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(redacted(name), size, read_only=True)
        self.secret_name = name if has_secrets(name) else ""

    def submit(self, bio: Bio) -> None:
        bio.end(0 if bio.op == OP_FLUSH else errnos.ENXIO)

    async def close(self) -> None:
        """Do nothing: nothing is open."""
