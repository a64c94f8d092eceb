# SPDX-License-Identifier: Apache-2.0
"""`count <dev> <offset>`: a linear target that counts what passes through it.

Theory of operation. `map` runs once for each bio, must not wait, and is on the way of every request.
It adds to a counter and says where the bio goes. The mapped device then sends it there. A request
that fails is counted by a hook, which runs when the bio ends.

    status    <reads> <writes> <others> <failed>
    message   reset
"""

from collections.abc import Sequence
from types import MappingProxyType

from nbdtarget.bio import OP_FLUSH, OP_READ, OP_WRITE, Bio
from nbdtarget.common.errors import ConstructorError
from nbdtarget.targets.arguments import Run, Runs, parse_sectors
from nbdtarget.targets.base import REMAPPED, StatusFields, TargetContext
from nbdtarget.targets.run import RunTarget

__all__ = ["CountTarget"]


class CountTarget(RunTarget):
    type_name = "count"
    version = (1, 0, 0)
    messages = MappingProxyType({"reset": "Set all four counters to 0."})

    def __init__(self, ctx: TargetContext, run: Run) -> None:
        super().__init__(ctx, run)
        self._reads = self._writes = self._others = self._failed = 0

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "CountTarget":
        if len(args) != 2:
            raise ConstructorError("Invalid argument count", target=cls.type_name)
        start_sectors = parse_sectors(args[1])
        if start_sectors is None:
            raise ConstructorError("Invalid device sector", target=cls.type_name)
        # `Runs` closes the device again if anything after this refuses.
        async with Runs(ctx, cls.type_name) as runs:
            return cls(ctx, await runs.open(args[0], start_sectors, ctx.length))

    def map(self, bio: Bio) -> int:
        if bio.op == OP_READ:
            self._reads += 1
        elif bio.op == OP_WRITE:
            self._writes += 1
        else:
            self._others += 1
        bio.on_end(self._ended)
        bio.device = self._device
        if bio.op != OP_FLUSH:  # a FLUSH is about the whole device, and has no offset
            bio.offset += self._delta
        return REMAPPED

    def _ended(self, bio: Bio) -> None:
        self._failed += bio.status != 0

    async def status(self, *, noflush: bool = False) -> str:
        return f"{self._reads} {self._writes} {self._others} {self._failed}"

    def status_fields(self) -> StatusFields:
        return {
            "reads": self._reads,
            "writes": self._writes,
            "others": self._others,
            "failed": self._failed,
        }

    def table_words(self) -> str:
        return self._run.words

    async def message(self, words: Sequence[str]) -> str | None:
        if list(words) != ["reset"]:
            raise self.unknown_message(words)
        self._reads = self._writes = self._others = self._failed = 0
        return None
