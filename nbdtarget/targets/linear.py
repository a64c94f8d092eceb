# SPDX-License-Identifier: Apache-2.0
"""The `linear` target: a run of sectors of one device, `<dev> <offset>`.

Theory of operation. `map` adds a constant to the offset and lets the mapped device pass the
bio on; there is no state. Everything that the device below can do (discard, zeroing, FUA,
flush, extents) shines through unchanged.
"""

from collections.abc import Sequence

from nbdtarget.bio import OP_FLUSH, Bio
from nbdtarget.common.errors import ConstructorError
from nbdtarget.common.units import SECTOR
from nbdtarget.devices.base import Device
from nbdtarget.targets.arguments import Runs, parse_sectors
from nbdtarget.targets.base import REMAPPED, TargetContext
from nbdtarget.targets.measured import target_attributes
from nbdtarget.targets.run import RunTarget

__all__ = ["LinearTarget"]


class LinearTarget(RunTarget):
    """`<dev> <offset>`: offset in sectors. Source: drivers/md/dm-linear.c."""

    type_name = "linear"
    version = (1, 4, 0)

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "LinearTarget":
        start_sectors = cls._start_sectors(args)
        async with Runs(ctx, cls.type_name) as runs:
            return cls(ctx, await runs.open(args[0], start_sectors, ctx.length))

    @classmethod
    def check_words(cls, args: Sequence[str]) -> None:
        cls._start_sectors(args)

    @classmethod
    def _start_sectors(cls, args: Sequence[str]) -> int:
        """Raises: ConstructorError."""
        if len(args) != 2:
            raise ConstructorError("Invalid argument count", target=cls.type_name)
        start_sectors = parse_sectors(args[1])
        if start_sectors is None:
            raise ConstructorError("Invalid device sector", target=cls.type_name)
        return start_sectors

    def map(self, bio: Bio) -> int:
        # hot: 0.1 us.
        bio.device = self._device
        if bio.op != OP_FLUSH:
            bio.offset += self._delta
        return REMAPPED

    def table_words(self) -> str:
        return self._run.words

    def measured_words(self) -> str:
        start = self._run.start // SECTOR
        pairs = (("device_name", self._device.name), ("start", start))
        return target_attributes(self, pairs)

    def maybe_remap(self) -> tuple[Device, int]:
        return self._device, self._delta
