# SPDX-License-Identifier: Apache-2.0
"""A target over one run of one device: what shines through it unchanged."""

from collections.abc import Iterable

from nbdtarget.devices.base import Device, Extent
from nbdtarget.targets.arguments import Run
from nbdtarget.targets.base import Target, TargetContext

__all__ = ["RunTarget"]


class RunTarget(Target):
    """Byte x of the target is byte `run.start + x` of the device; subclasses map bios."""

    def __init__(self, ctx: TargetContext, run: Run) -> None:
        super().__init__(ctx)
        self._run = run
        self._device = run.device
        # Added to a bio's offset, which is relative to the mapped device.
        self._delta = run.start - self.begin
        self.can_discard = run.device.can_discard
        self.can_write_zeroes = run.device.can_write_zeroes
        self.can_fast_zero = run.device.can_fast_zero

    async def dtr(self) -> None:
        await self.ctx.close_device(self._device)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await self._device.extents(offset + self._delta, length)

    @property
    def contexts(self) -> tuple[str, ...]:
        return self._device.contexts

    async def context_extents(
        self, context: str, offset: int, length: int
    ) -> list[Extent]:
        return await self._device.context_extents(context, offset + self._delta, length)

    def iterate_devices(self) -> Iterable[Device]:
        return (self._device,)
