# SPDX-License-Identifier: Apache-2.0
"""What an open file tells of itself: `identity.py`, asked in the device's own workers."""

from functools import partial

from nbdtarget.devices.base import Device
from nbdtarget.devices.identity import identify_fd, mark_fd, sync_attributes_fd
from nbdtarget.devices.workers import WorkerPool
from nbdtarget_metadata.disks import Evidence, Mark

__all__ = ["RecognisedFile"]


class RecognisedFile(Device):
    """The part of `FileDevice` by which it is recognised at the next start."""

    _fd: int
    _pool: WorkerPool

    async def identify(self, role: str) -> Evidence:
        look = partial(identify_fd, self.name, self._fd, self.size, role)
        return await self._pool.ask(look, Evidence("", self.name, self.size))

    async def mark(self, role: str, mark: Mark) -> bool:
        write = partial(mark_fd, self._fd, role, mark)
        return not self.read_only and await self._pool.ask(write, False)

    async def sync_attributes(self) -> bool:
        return await self._pool.ask(partial(sync_attributes_fd, self._fd), False)
