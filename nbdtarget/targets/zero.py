# SPDX-License-Identifier: Apache-2.0
"""The `zero` target: reads as zeroes, forgets what is written."""

from collections.abc import Sequence
from typing import Final

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.common.errors import ConstructorError
from nbdtarget.devices.base import EXTENT_HOLE, EXTENT_ZERO, Extent
from nbdtarget.targets.base import SUBMITTED, Target, TargetContext

__all__ = ["ZeroTarget"]

_ZEROES: Final = memoryview(bytes(1 << 20))


def fill_zeroes(payload: memoryview) -> None:
    """Overwrite `payload` with zeroes."""
    step = len(_ZEROES)
    for at in range(0, len(payload), step):
        part = payload[at : at + step]
        part[:] = _ZEROES[: len(part)]


class ZeroTarget(Target):
    """Takes no arguments. Source: drivers/md/dm-zero.c."""

    type_name = "zero"
    version = (1, 2, 0)

    num_flush_bios = 0
    can_discard = True
    can_write_zeroes = True
    can_fast_zero = True

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "ZeroTarget":
        if args:
            raise ConstructorError("No arguments required", target=cls.type_name)
        return cls(ctx)

    def map(self, bio: Bio) -> int:
        # The buffer may hold another request's data: it has to be overwritten.
        if bio.op == OP_READ:
            assert bio.payload is not None
            fill_zeroes(bio.payload)
        bio.end(0)
        return SUBMITTED

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return [Extent(length, EXTENT_HOLE | EXTENT_ZERO)]
