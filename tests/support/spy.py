# SPDX-License-Identifier: Apache-2.0
"""A device between a target and its disk: it keeps a log of all I/O, holds it back, and fails it."""

from collections.abc import Callable

from nbdtarget.bio import OP_NAMES, Bio
from nbdtarget.devices.base import Device, Extent

__all__ = ["Spy"]


class Spy(Device):
    """Passes bios on and keeps a log of them; holds them back while `hold` is set."""

    def __init__(self, device: Device, log: list[tuple[str, str, int, int]]) -> None:
        super().__init__(device.name, device.size, read_only=device.read_only)
        self.device = device
        self.log = log
        self.hold = False
        self.held: list[Bio] = []
        self.fails: Callable[[Bio], int] = lambda _: 0
        self.can_discard = device.can_discard
        self.can_write_zeroes = device.can_write_zeroes
        self.can_fast_zero = device.can_fast_zero

    def submit(self, bio: Bio) -> None:
        self.log.append((self.name, OP_NAMES[bio.op], bio.offset, bio.length))
        if self.hold:
            bio.own()
            self.held.append(bio)
        else:
            self._serve(bio)

    def let_go(self) -> None:
        self.hold = False
        while self.held:
            self._serve(self.held.pop(0))

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await self.device.extents(offset, length)

    async def close(self) -> None:
        await self.device.close()

    def _serve(self, bio: Bio) -> None:
        if errno := self.fails(bio):
            bio.end(errno)
        else:
            self.device.submit(bio)
