# SPDX-License-Identifier: Apache-2.0
"""The `error` target: all I/O fails with EIO, discards too; a FLUSH has nothing to do."""

from collections.abc import Sequence

from nbdtarget.bio import Bio
from nbdtarget.errors import ConstructorError
from nbdtarget.targets.base import KILL, Target, TargetContext
from nbdtarget.words import join_words

__all__ = ["ErrorTarget"]


class ErrorTarget(Target):
    """Takes no arguments, or `<dev> <offset>`, which it ignores as newer kernels do.

    The device is not opened: its only use in the kernel is to lend its queue limits.
    Source: drivers/md/dm-target.c.
    """

    type_name = "error"
    version = (1, 7, 0)

    num_flush_bios = 0
    can_discard = True
    can_write_zeroes = True
    can_fast_zero = True

    def __init__(self, ctx: TargetContext, args: Sequence[str]) -> None:
        super().__init__(ctx)
        self._args = tuple(args)

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "ErrorTarget":
        if args:
            if len(args) != 2:
                raise ConstructorError("Invalid argument count", target=cls.type_name)
            if not (args[1].isascii() and args[1].isdecimal()):
                raise ConstructorError("Invalid device sector", target=cls.type_name)
        return cls(ctx, args)

    def map(self, bio: Bio) -> int:
        return KILL

    def table_words(self) -> str:
        return join_words(self._args)
