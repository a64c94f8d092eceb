# SPDX-License-Identifier: Apache-2.0
"""What a cache policy is: it decides which blocks are cached, and does nothing about it.

Theory of operation. A cache target asks its policy about every bio (`lookup`), tells it what
became of each block (`set_dirty`, `clear_dirty`, `complete_background_work`), lets time pass for
it (`tick`), and fetches the migrations that it wants (`get_background_work`). A policy does no
I/O, reads no clock and waits for nothing: the same calls give the same answers.

    oblock   number of a block of the origin device
    cblock   number of a block of the cache device, 0 ... nr_cblocks - 1
    Work     one migration: PROMOTE oblock into cblock, DEMOTE or WRITEBACK oblock from cblock

The life of a migration: the policy queues it, or hands it out at once from `lookup_with_work`; the
target carries it out; then it calls `complete_background_work`, exactly once for each `Work` that
it was given. Between the two the block is *pending*: no second migration of it is handed out.

Nothing here survives a power cut. The target keeps mappings and dirty bits, and may keep one
32-bit `get_hint` for each cblock, to give back to `load_mapping` of a policy of the same
`name`, major `version` and `hint_size`. A pin is kept that way too.

A *pinned* block is never chosen for demotion. Who pins decides what is cached from then on: when
all blocks are pinned, there are no promotions.

A policy of your own is one file in this package: a subclass of `Policy`, named in `POLICIES` at
the end of the file. `registry` finds it.

Errors, all the user's doing, so not AssertionErrors:

    NbdTargetError
     +- PolicyConfigError   a key that the policy has not, or a value that is no number
     +- MappingError        a mapping to load contradicts another, or the size of the cache
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Final

from nbdtarget.common.errors import NbdTargetError

__all__ = [
    "DEMOTE",
    "MISS",
    "MISS_WAKE",
    "OP_NAMES",
    "PROMOTE",
    "WRITEBACK",
    "MappingError",
    "Policy",
    "PolicyConfigError",
    "Work",
]

# What `lookup` says of an oblock that is not cached.
MISS: Final = -1
MISS_WAKE: Final = -2  # and `get_background_work` may have something new

PROMOTE: Final = 0  # copy from origin to cache, then insert the mapping
DEMOTE: Final = 1  # write back if dirty, then remove the mapping
WRITEBACK: Final = 2  # copy from cache to origin, keep the mapping
OP_NAMES: Final = ("promote", "demote", "writeback")


class PolicyConfigError(NbdTargetError):
    """A policy key or its value is refused. The text is the kernel's."""

    def __init__(self, key: str, value: str) -> None:
        super().__init__(key, value)
        self.key = key
        self.value = value

    def __str__(self) -> str:
        return f"bad config value for {self.key}: {self.value}"


class MappingError(NbdTargetError):
    """A mapping cannot be loaded: what the metadata says contradicts itself or the table."""

    def __init__(self, cblock: int, oblock: int, reason: str) -> None:
        super().__init__(cblock, oblock, reason)
        self.cblock = cblock
        self.oblock = oblock
        self.reason = reason

    def __str__(self) -> str:
        return f"cache block {self.cblock} -> origin block {self.oblock}: {self.reason}"


class Work:
    """One migration that a policy wants. Compared by identity: it is a claim, not a value."""

    __slots__ = ("cblock", "oblock", "op")

    def __init__(self, op: int, oblock: int, cblock: int) -> None:
        self.op = op
        self.oblock = oblock
        self.cblock = cblock

    def __repr__(self) -> str:
        return f"<Work {OP_NAMES[self.op]} oblock {self.oblock} cblock {self.cblock}>"


class Policy(ABC):
    """The decisions of one cache. See the module head.

    Args:
        nr_cblocks: blocks of the cache.
        origin_size, block_size: bytes.
        now_ns: the time; later `tick`s go on from it.
    """

    name: ClassVar[str]
    version: ClassVar[tuple[int, int, int]]
    hint_size: ClassVar[int]  # bytes for each cblock: 0 or 4

    @abstractmethod
    def __init__(
        self, nr_cblocks: int, *, origin_size: int, block_size: int, now_ns: int
    ) -> None: ...

    # ---- for each bio ----------------------------------------------------------------------

    @abstractmethod
    def lookup(self, oblock: int, is_write: bool) -> int:
        """Note one access to `oblock`; return its cblock, or MISS, or MISS_WAKE.

        MISS_WAKE: the policy wanted a promotion; whether it queued any work is another matter.
        """

    @abstractmethod
    def lookup_with_work(self, oblock: int, is_write: bool) -> tuple[int, Work | None]:
        """`lookup` for a bio that could be sent to a new cblock as it is, without a copy.

        Returns the cblock or MISS; after a MISS maybe a PROMOTE of this oblock, which the
        caller carries out with this bio. Work of other blocks is never returned here.
        """

    @abstractmethod
    def set_dirty(self, cblock: int) -> None:
        """The block now has data that the origin has not."""

    @abstractmethod
    def clear_dirty(self, cblock: int) -> None:
        """The block is now the same as the origin's."""

    # ---- migrations ------------------------------------------------------------------------

    @abstractmethod
    def get_background_work(self, idle: bool) -> Work | None:
        """The next migration to carry out. `idle`: there is room for unforced writebacks."""

    @abstractmethod
    def complete_background_work(self, work: Work, success: bool) -> None:
        """`work` has ended. After a PROMOTE the block is clean until `set_dirty`."""

    @abstractmethod
    def allow_migrations(self, allow: bool) -> None:
        """Whether promotions and demotions may be decided on; work that is queued stays."""

    # ---- what the user wants cached -------------------------------------------------------

    @abstractmethod
    def maybe_promote(self, oblock: int) -> Work | None:
        """A PROMOTE of `oblock`, as from `get_background_work`, however cold it is.

        None if it is cached or pending, if migrations are not allowed, or if no cblock is free.
        Then work that may lead to a free one is queued, once for each such call: so after a
        None with nothing under way or queued there is no room for it at all.
        """

    @abstractmethod
    def pin(self, cblock: int) -> None:
        """Choose the block for no demotion until `unpin`; one that is only queued is dropped.

        The cblock is cached, or is being promoted into: then the pin is for what it will
        hold. A pin is forgotten when its cblock becomes free: with a demotion that was
        handed out before, a promotion that fails, or `invalidate`.
        """

    @abstractmethod
    def unpin(self, cblock: int) -> None:
        """Back to the others; nothing happens if the cblock is not pinned."""

    @abstractmethod
    def is_pinned(self, cblock: int) -> bool: ...

    @property
    @abstractmethod
    def nr_pinned(self) -> int:
        """Pinned cblocks."""

    # ---- mappings --------------------------------------------------------------------------

    @abstractmethod
    def load_mapping(
        self, cblock: int, oblock: int, dirty: bool, hint: int | None
    ) -> None:
        """Take over a mapping of the metadata; `hint` is None when hints are not valid.

        Raises:
            MappingError: cblock is out of range or taken, or oblock is mapped already.
        """

    @abstractmethod
    def invalidate(self, cblock: int) -> bool:
        """Forget a mapping; False if the cblock has none.

        A migration of it that is queued is dropped; one that was handed out must have ended.
        """

    @abstractmethod
    def get_hint(self, cblock: int) -> int:
        """What to give `load_mapping` next time; 0 for a free block."""

    @property
    @abstractmethod
    def residency(self) -> int:
        """Used cblocks, with those that are reserved for promotions under way."""

    # ---- time ------------------------------------------------------------------------------

    @abstractmethod
    def tick(self, now_ns: int) -> bool:
        """Time has passed: at least once a second, and as often as bios complete.

        Returns whether there is more to do than fits into a call: then call `catch_up`.
        """

    @abstractmethod
    def catch_up(self) -> bool:
        """Go on with what a tick left undone; True if there is still more."""

    # ---- table line, messages, status --------------------------------------------------------

    def set_config_value(self, key: str, value: str) -> str | None:
        """Set one key. Returns a warning to log, if there is something to say.

        Raises:
            PolicyConfigError: no such key, or no number.
        """
        raise PolicyConfigError(key, value)

    def config_values(self) -> list[tuple[str, str]]:
        """The pairs that the status line prints."""
        return []
