# SPDX-License-Identifier: Apache-2.0
"""`RoundedDevice`: a disk that is only read, and whose size is no multiple of a sector.

Theory of operation. Disks consist of sectors of 512 bytes, files of bytes. The size is rounded up, as QEMU does it,
and what lies behind the end reads as zeroes. A READ that stays before the end goes to the device below as it is.
"""

import logging

from nbdtarget.bio import OP_CACHE, OP_READ, Bio
from nbdtarget.common.units import SECTOR
from nbdtarget.devices.base import (
    EXTENT_ZERO,
    Device,
    Extent,
    append_extent,
)
from nbdtarget_metadata.disks import Evidence

__all__ = ["RoundedDevice"]

log = logging.getLogger(__name__)


class RoundedDevice(Device):
    """See the module head. It closes the device below with itself.

    Attributes:
        note: a sentence without the name that says what was rounded.
    """

    can_resize = False  # of another size, it may have another end, or none

    def __init__(self, inner: Device) -> None:
        assert inner.read_only
        super().__init__(inner.name, _rounded(inner.size), read_only=True)
        self.bare_name = inner.bare_name
        self.health = inner.health
        self._inner = inner
        (
            self.logical_block_size,
            self.io_min,
            self.io_opt,
            self.discard_granularity,
        ) = inner.limits
        self.rotational = inner.rotational
        self.has_lanes = inner.has_lanes
        self.is_forward_only = inner.is_forward_only
        self.may_be_container = inner.may_be_container
        self.fails_inline = inner.fails_inline
        self.note = (
            f"its size, {inner.size} bytes, is no multiple of {SECTOR}:"
            f" {self.size - inner.size} zero bytes are added"
        )
        log.info("%s: %s", self.name, self.note)

    def submit(self, bio: Bio) -> None:
        inner = self._inner
        if bio.op == OP_READ and bio.offset + bio.length > inner.size:
            if status := self.check_bounds(bio):
                bio.end(status)
            else:
                self._read_over_the_end(bio)
            return
        if bio.op == OP_CACHE and not self.check_bounds(bio):
            if bio.offset >= inner.size:
                bio.end(0)
                return
            bio.length = min(bio.length, inner.size - bio.offset)
        inner.submit(bio)

    @property
    def exact_size(self) -> int:
        return self._inner.size

    def submit_ahead(self, bio: Bio) -> None:
        if bio.offset + bio.length > self._inner.size:
            self.submit(bio)
        else:
            self._inner.submit_ahead(bio)

    def _read_over_the_end(self, bio: Bio) -> None:
        bio.own()
        payload = bio.payload
        assert payload is not None
        length = max(self._inner.size - bio.offset, 0)
        payload[length:] = bytes(bio.length - length)
        if not length:
            bio.end(0)
            return

        def ended(child: Bio) -> None:
            bio.end(child.status)

        self._inner.submit(Bio(OP_READ, bio.offset, length, payload[:length], 0, ended))

    async def extents(self, offset: int, length: int) -> list[Extent]:
        inside = min(length, max(self._inner.size - offset, 0))
        found = list(await self._inner.extents(offset, inside)) if inside else []
        if sum(extent.length for extent in found) == inside and inside < length:
            append_extent(found, length - inside, EXTENT_ZERO)
        return found

    async def measure(self) -> int:
        return _rounded(await self._inner.measure())

    async def identify(self, role: str) -> Evidence:
        return await self._inner.identify(role)

    async def reopened(self, name: str, *, read_only: bool) -> Device | None:
        device = await self._inner.reopened(name, read_only=read_only)
        if device is self._inner:
            return self
        if device is None or not read_only or not device.size % SECTOR:
            return device
        return RoundedDevice(device)

    async def check_again(self) -> None:
        await self._inner.check_again()

    def reopening_undone(self) -> None:
        self._inner.reopening_undone()

    @property
    def nr_in_flight(self) -> int:
        return self._inner.nr_in_flight

    def give_up_reads(self) -> None:
        self._inner.give_up_reads()

    async def close(self) -> None:
        await self._inner.close()


def _rounded(size: int) -> int:
    return -(-size // SECTOR) * SECTOR
