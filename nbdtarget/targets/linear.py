# SPDX-License-Identifier: Apache-2.0
"""The `linear` target: a run of sectors of one device, `<dev> <offset>`.

Theory of operation. `map` adds a constant to the offset and lets the mapped device pass the
bio on; there is no state. Everything that the device below can do (discard, zeroing, FUA,
flush, extents) shines through unchanged.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from nbdtarget.bio import OP_FLUSH, Bio
from nbdtarget.devices.base import Device, Extent
from nbdtarget.errors import ConstructorError, ResolveError
from nbdtarget.targets.base import REMAPPED, Target, TargetContext
from nbdtarget.words import quote_word

__all__ = ["LinearTarget"]

_SECTOR: Final = 512
_SECTORS_MAX: Final = (1 << 63) // _SECTOR


class LinearTarget(Target):
    """`<dev> <offset>`: offset in sectors. Source: drivers/md/dm-linear.c."""

    type_name = "linear"
    version = (1, 4, 0)

    def __init__(self, ctx: TargetContext, device: Device, start: int) -> None:
        """Args: device: what lies below; start: bytes, where the run begins there."""
        super().__init__(ctx)
        self._device = device
        self._start = start
        self._delta = start - self.begin
        self.can_discard = device.can_discard
        self.can_write_zeroes = device.can_write_zeroes
        self.can_fast_zero = device.can_fast_zero

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "LinearTarget":
        if len(args) != 2:
            raise ConstructorError("Invalid argument count", target=cls.type_name)
        name, sectors = args
        if not (sectors.isascii() and sectors.isdecimal()):
            raise ConstructorError("Invalid device sector", target=cls.type_name)
        start_sectors = int(sectors)
        if start_sectors > _SECTORS_MAX:
            raise ConstructorError("Invalid device sector", target=cls.type_name)
        try:
            device = await ctx.open_device(name, read_only=ctx.read_only, shared=True)
        except ResolveError as error:
            raise ConstructorError(
                f"Device lookup failed: {error}", error.errno, cls.type_name
            ) from error
        start = start_sectors * _SECTOR
        if start + ctx.length > device.size:
            size = device.size
            await ctx.close_device(device)
            # The text of dm_table.c, which checks this for every target's devices.
            raise ConstructorError(
                f"{name} too small for target: start={start_sectors}, "
                f"len={ctx.length // _SECTOR}, dev_size={size // _SECTOR}",
                target=cls.type_name,
            )
        return cls(ctx, device, start)

    async def dtr(self) -> None:
        await self.ctx.close_device(self._device)

    def map(self, bio: Bio) -> int:
        # hot: 0.1 us.
        bio.device = self._device
        if bio.op != OP_FLUSH:
            bio.offset += self._delta
        return REMAPPED

    def table_words(self) -> str:
        return f"{quote_word(self._device.name)} {self._start // _SECTOR}"

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await self._device.extents(offset + self._delta, length)

    @property
    def contexts(self) -> tuple[str, ...]:
        return self._device.contexts

    async def context_extents(
        self, context: str, offset: int, length: int
    ) -> list[Extent]:
        return await self._device.context_extents(context, offset + self._delta, length)

    def maybe_remap(self) -> tuple[Device, int]:
        return self._device, self._delta

    def iterate_devices(self) -> Iterable[Device]:
        return (self._device,)
