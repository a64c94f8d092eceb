# SPDX-License-Identifier: Apache-2.0
"""The `error` target: all I/O fails with EIO, discards too; a FLUSH has nothing to do."""

from collections.abc import Iterable, Sequence

from nbdtarget.bio import Bio
from nbdtarget.common.errors import ConstructorError
from nbdtarget.devices.base import Device
from nbdtarget.targets.arguments import Runs, close_all, parse_sectors
from nbdtarget.targets.base import KILL, Target, TargetContext

__all__ = ["ErrorTarget"]


class ErrorTarget(Target):
    """Takes `<dev> <offset>`; as in the kernel, any other number of words is ignored.

    The device is held open, so it is a dependency, and lends its queue limits; no I/O ever reaches it.
    The table line shows no words, as the kernel's: a table that is loaded again from it has no device.
    Source: drivers/md/dm-target.c.
    """

    type_name = "error"
    version = (1, 7, 0)

    num_flush_bios = 0
    can_discard = True
    can_write_zeroes = True
    can_fast_zero = True

    def __init__(self, ctx: TargetContext, device: Device | None) -> None:
        super().__init__(ctx)
        self._devices = () if device is None else (device,)

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "ErrorTarget":
        if len(args) != 2:
            return cls(ctx, None)
        start_sectors = parse_sectors(args[1])
        if start_sectors is None:
            raise ConstructorError("Invalid device sector", target=cls.type_name)
        async with Runs(ctx, cls.type_name) as runs:
            run = await runs.open(args[0], start_sectors, ctx.length)
        return cls(ctx, run.device)

    async def dtr(self) -> None:
        await close_all(self.ctx, self._devices)

    def map(self, bio: Bio) -> int:
        return KILL

    def iterate_devices(self) -> Iterable[Device]:
        return self._devices

    def data_devices(self) -> Iterable[Device]:
        return ()
