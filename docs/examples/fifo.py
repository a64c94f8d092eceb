# SPDX-License-Identifier: Apache-2.0
"""fifo: a cache policy that caches every block that is missed, in place of the oldest one.

Theory of operation. A miss puts its block into `_wanted`. `get_background_work` promotes a wanted
block if there is a free cblock, else it demotes the oldest block. When the cache is idle, it
writes dirty blocks back. What was given to the target is in `_pending` until it has ended.
"""

from collections import OrderedDict
from typing import ClassVar, Final

from nbdtarget.policies import base
from nbdtarget.policies.base import DEMOTE, PROMOTE, WRITEBACK, MappingError, Work
from nbdtarget.policies.simple import SimplePolicy

__all__ = ["Fifo"]

WANTED_MAX: Final = 1024  # oblocks; misses beyond that are not remembered


class Fifo(SimplePolicy):
    name: ClassVar[str] = "fifo"
    version: ClassVar[tuple[int, int, int]] = (1, 0, 0)

    def __init__(
        self, nr_cblocks: int, *, origin_size: int, block_size: int, now_ns: int
    ) -> None:
        super().__init__(
            nr_cblocks, origin_size=origin_size, block_size=block_size, now_ns=now_ns
        )
        self._free = set(range(nr_cblocks))
        self._cblocks: OrderedDict[int, int] = OrderedDict()  # by oblock, oldest first
        self._oblocks: dict[int, int] = {}  # by cblock
        self._dirty: set[int] = set()  # cblocks
        self._wanted: OrderedDict[int, None] = OrderedDict()  # oblocks
        self._pending: dict[int, Work] = {}  # by oblock
        self._nr_demotions = 0  # of those that are pending

    def lookup(self, oblock: int, is_write: bool) -> int:
        cblock = self._cblocks.get(oblock)
        if cblock is not None:
            return cblock
        can_want = self.may_migrate and oblock not in self._pending
        if not can_want or len(self._wanted) >= WANTED_MAX:
            return base.MISS
        self._wanted[oblock] = None
        return base.MISS_WAKE

    def set_dirty(self, cblock: int) -> None:
        self._dirty.add(cblock)

    def clear_dirty(self, cblock: int) -> None:
        self._dirty.discard(cblock)

    def get_background_work(self, idle: bool) -> Work | None:
        if self._wanted and self.may_migrate:
            if self._free:
                oblock, _ = self._wanted.popitem(last=False)
                return self._begin(Work(PROMOTE, oblock, self._free.pop()))
            # Demote no more blocks than there are blocks to come.
            if self._nr_demotions < len(self._wanted):
                for oblock, cblock in self._cblocks.items():
                    if oblock not in self._pending and cblock not in self.pinned:
                        self._nr_demotions += 1
                        return self._begin(Work(DEMOTE, oblock, cblock))
        if idle:
            for cblock in self._dirty:
                if self._oblocks[cblock] not in self._pending:
                    return self._begin(Work(WRITEBACK, self._oblocks[cblock], cblock))
        return None

    def _begin(self, work: Work) -> Work:
        self._pending[work.oblock] = work
        return work

    def complete_background_work(self, work: Work, success: bool) -> None:
        del self._pending[work.oblock]
        self._nr_demotions -= work.op == DEMOTE
        if work.op == PROMOTE and success:
            self._map(work.cblock, work.oblock)
        elif work.op == PROMOTE:
            self._release(work.cblock)
        elif work.op == DEMOTE and success:
            self.invalidate(work.cblock)

    def load_mapping(
        self, cblock: int, oblock: int, dirty: bool, hint: int | None
    ) -> None:
        if cblock not in self._free:
            raise MappingError(cblock, oblock, "there is no such cache block, or twice")
        if oblock in self._cblocks:
            raise MappingError(cblock, oblock, "the origin block is cached twice")
        self._free.discard(cblock)
        self._map(cblock, oblock)
        if dirty:
            self._dirty.add(cblock)

    def invalidate(self, cblock: int) -> bool:
        oblock = self._oblocks.pop(cblock, None)
        if oblock is None:
            return False
        del self._cblocks[oblock]
        self._release(cblock)
        return True

    @property
    def residency(self) -> int:
        return self.nr_cblocks - len(self._free)

    def _map(self, cblock: int, oblock: int) -> None:
        self._cblocks[oblock] = cblock
        self._oblocks[cblock] = oblock

    def _release(self, cblock: int) -> None:
        self._dirty.discard(cblock)
        self.pinned.discard(cblock)
        self._free.add(cblock)
