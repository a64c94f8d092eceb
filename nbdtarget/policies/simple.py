# SPDX-License-Identifier: Apache-2.0
"""`SimplePolicy`: a policy whose optional parts are filled in.

Eight methods are left to write: `lookup`, `set_dirty`, `clear_dirty`, `get_background_work`,
`complete_background_work`, `load_mapping`, `invalidate` and `residency`. What the rest does here:

    lookup_with_work  a lookup; blocks are only promoted in the background
    allow_migrations  sets `may_migrate`, which `lookup` and `get_background_work` look at
    maybe_promote     promotes nothing, so the message `warm` has no effect
    pin, unpin        keep the set `pinned`. The subclass demotes no block that is in it, and takes a
                      block out of it when it becomes free
    get_hint          0: nothing is remembered from one start to the next (`hint_size` is 0)
    tick, catch_up    time has no effect

A worked example is docs/examples/fifo.py.
"""

from typing import ClassVar

from nbdtarget.policies.base import Policy, Work

__all__ = ["SimplePolicy"]


class SimplePolicy(Policy):
    """See the module head.

    Attributes:
        nr_cblocks: blocks of the cache.
        may_migrate: whether promotions and demotions may be decided on.
        pinned: cblocks that must not be demoted.
    """

    hint_size: ClassVar[int] = 0

    def __init__(
        self, nr_cblocks: int, *, origin_size: int, block_size: int, now_ns: int
    ) -> None:
        self.nr_cblocks = nr_cblocks
        self.may_migrate = True
        self.pinned: set[int] = set()

    def lookup_with_work(self, oblock: int, is_write: bool) -> tuple[int, Work | None]:
        return self.lookup(oblock, is_write), None

    def allow_migrations(self, allow: bool) -> None:
        self.may_migrate = allow

    def maybe_promote(self, oblock: int) -> Work | None:
        return None

    def pin(self, cblock: int) -> None:
        self.pinned.add(cblock)

    def unpin(self, cblock: int) -> None:
        self.pinned.discard(cblock)

    def is_pinned(self, cblock: int) -> bool:
        return cblock in self.pinned

    @property
    def nr_pinned(self) -> int:
        return len(self.pinned)

    def get_hint(self, cblock: int) -> int:
        return 0

    def tick(self, now_ns: int) -> bool:
        return False

    def catch_up(self) -> bool:
        return False
