# SPDX-License-Identifier: Apache-2.0
"""`Policy`: what decides which blocks are cached. It decides, and the cache target acts.

Theory of operation. A cache target

- asks its policy about every bio (`lookup`);
- reports what became of each block (`set_dirty`, `clear_dirty`, `complete_background_work`);
- lets time pass for it (`tick`);
- fetches the migrations that the policy wants (`get_background_work`).

A policy does no I/O, reads no clock and waits for nothing. The same calls give the same answers.

    oblock   number of a block of the origin device
    cblock   number of a block of the cache device, 0 ... nr_cblocks - 1
    Work     one migration: PROMOTE oblock into cblock, DEMOTE or WRITEBACK oblock from cblock

The life of a migration. The policy queues it, or returns it at once from `lookup_with_work`. The
target carries it out, and then calls `complete_background_work`, exactly once for each `Work`
that it was given. Between the two the block is *pending*, and no second migration of it is given
to the target.

What is durable. A policy itself stores nothing. The target stores mappings and dirty bits, and one
32-bit hint for each cblock if the policy has hints (`hint_size` is 4). At the next start it passes
them to `load_mapping` of a policy of the same `name`, major `version` and `hint_size`. smq keeps
its pins in the hints.

A *pinned* block is never demoted. If all blocks are pinned, nothing is promoted any more.

How to write a policy: docs/extending.md. Most begin with `nbdtarget.policies.simple`, which fills
in what is optional.

Errors. All of them are mistakes of the user or damage on disk, so none is an AssertionError:

    NbdTargetError
     +- PolicyConfigError   the policy has no such key, or the value is not a number
     +- MappingError        a mapping to load contradicts another one, or the size of the cache
"""

from abc import ABC, abstractmethod
from array import array
from typing import ClassVar, Final, NamedTuple

from nbdtarget.common.errors import NbdTargetError

__all__ = [
    "DEMOTE",
    "MISS",
    "MISS_WAKE",
    "OP_NAMES",
    "PROMOTE",
    "WRITEBACK",
    "HitTables",
    "MappingError",
    "Policy",
    "PolicyConfigError",
    "Work",
]

# `lookup` returns this for an oblock that is not cached.
MISS: Final = -1
MISS_WAKE: Final = -2  # a miss, and `get_background_work` may have something new

PROMOTE: Final = 0  # copy from origin to cache, then insert the mapping
DEMOTE: Final = 1  # write back if dirty, then remove the mapping
WRITEBACK: Final = 2  # copy from cache to origin, keep the mapping
OP_NAMES: Final = ("promote", "demote", "writeback")


class PolicyConfigError(NbdTargetError):
    """The policy refuses a key or its value. The text is the kernel's."""

    def __init__(self, key: str, value: str) -> None:
        super().__init__(key, value)
        self.key = key
        self.value = value

    def __str__(self) -> str:
        return f"bad config value for {self.key}: {self.value}"


class MappingError(NbdTargetError):
    """A mapping cannot be loaded: the metadata contradicts itself or the table."""

    def __init__(self, cblock: int, oblock: int, reason: str) -> None:
        super().__init__(cblock, oblock, reason)
        self.cblock = cblock
        self.oblock = oblock
        self.reason = reason

    def __str__(self) -> str:
        return f"cache block {self.cblock} -> origin block {self.oblock}: {self.reason}"


class Work:
    """One migration that a policy wants. Two are equal only if they are the same object."""

    __slots__ = ("cblock", "oblock", "op")

    def __init__(self, op: int, oblock: int, cblock: int) -> None:
        self.op = op
        self.oblock = oblock
        self.cblock = cblock

    def __repr__(self) -> str:
        return f"<Work {OP_NAMES[self.op]} oblock {self.oblock} cblock {self.cblock}>"


class HitTables(NamedTuple):
    """The mappings, as flat arrays: see `Policy.hit_tables`, and `smq/block_table.py` for the hash table.

    Attributes:
        blocks, buckets, chain, shift: the hash table that finds the cblock of an oblock.
        is_hit: a byte for each cblock: 0 if `lookup` has something to note at the next hit.
    """

    blocks: "array[int]"
    buckets: "array[int]"
    chain: "array[int]"
    shift: int
    is_hit: bytearray


class Policy(ABC):
    """The decisions of one cache. See the module head.

    Args:
        nr_cblocks: number of blocks that the cache has.
        origin_size, block_size: bytes.
        now_ns: the time now, in nanoseconds; each `tick` passes a later one.

    Attributes:
        name: as the table line and the status line write it.
        version: recorded with the hints; hints of another major version are not loaded.
        hint_size: bytes of the hint of each cblock: 0 (there are no hints) or 4.
    """

    name: ClassVar[str]
    version: ClassVar[tuple[int, int, int]]
    hint_size: ClassVar[int]

    @abstractmethod
    def __init__(
        self, nr_cblocks: int, *, origin_size: int, block_size: int, now_ns: int
    ) -> None: ...

    # ---- for each bio ----

    @abstractmethod
    def lookup(self, oblock: int, is_write: bool) -> int:
        """Note one access to `oblock`; return its cblock, MISS or MISS_WAKE.

        MISS_WAKE makes the target call `get_background_work` soon. There need not be any work by then.
        """

    def hit_tables(self) -> HitTables | None:
        """Return the tables by which the compiled fast path tells hits without `lookup`, or None.

        They stay the same objects for the life of the policy, and change in place.
        """
        return None

    @abstractmethod
    def lookup_with_work(self, oblock: int, is_write: bool) -> tuple[int, Work | None]:
        """Do a `lookup` for a bio that could be sent to a new cblock as it is, without a copy.

        Returns: what `lookup` returns, and after a miss perhaps a PROMOTE of this oblock, which
            the caller carries out with this bio. No work on another block is returned here.
        """

    @abstractmethod
    def set_dirty(self, cblock: int) -> None:
        """The block now holds data that the origin does not have."""

    @abstractmethod
    def clear_dirty(self, cblock: int) -> None:
        """The block now holds the same data as the origin."""

    # ---- migrations ----

    @abstractmethod
    def get_background_work(self, idle: bool) -> Work | None:
        """Return the next migration to carry out, if there is one.

        Args:
            idle: no client is waiting, so blocks may be written back that nothing forces out.
        """

    @abstractmethod
    def complete_background_work(self, work: Work, success: bool) -> None:
        """`work` has ended. After a PROMOTE the block is clean until `set_dirty` is called."""

    @abstractmethod
    def allow_migrations(self, allow: bool) -> None:
        """Set whether promotions and demotions may be decided on. Queued work stays queued."""

    # ---- what the user wants cached ----

    @abstractmethod
    def maybe_promote(self, oblock: int) -> Work | None:
        """Return a PROMOTE of `oblock`, however cold it is; the caller carries it out.

        None: the block is cached or pending, migrations are not allowed, or no cblock is free. In
        the last case the policy queues work that may free one, once for each call. So if this
        returns None while no work is queued or under way, there is no room for the block.
        """

    @abstractmethod
    def pin(self, cblock: int) -> None:
        """Do not demote the block until `unpin`. A demotion of it that is only queued is dropped.

        The cblock holds a block, or a block is being promoted into it. A pin ends when its
        cblock becomes free: by a demotion that the target had been given before, by a promotion
        that fails, or by `invalidate`.
        """

    @abstractmethod
    def unpin(self, cblock: int) -> None:
        """Allow demotions of the block again. Nothing happens if it is not pinned."""

    @abstractmethod
    def is_pinned(self, cblock: int) -> bool: ...

    @property
    @abstractmethod
    def nr_pinned(self) -> int:
        """How many cblocks are pinned."""

    # ---- mappings ----

    @abstractmethod
    def load_mapping(
        self, cblock: int, oblock: int, dirty: bool, hint: int | None
    ) -> None:
        """Take over a mapping from the metadata. `hint` is None if hints are not valid.

        Raises:
            MappingError: the cblock is out of range or in use, or the oblock is mapped already.
        """

    @abstractmethod
    def invalidate(self, cblock: int) -> bool:
        """Forget the mapping of a cblock. Returns False if it has none.

        A migration of it that is only queued is dropped. One that the target was given must have
        ended.
        """

    @abstractmethod
    def get_hint(self, cblock: int) -> int:
        """Return what to pass to `load_mapping` at the next start; 0 for a free block."""

    @property
    @abstractmethod
    def residency(self) -> int:
        """How many cblocks are in use or reserved for promotions under way."""

    # ---- time ----

    @abstractmethod
    def tick(self, now_ns: int) -> bool:
        """Take note that time has passed. Called at least once a second, and more often under load.

        Returns True if there is more to do than fits into one call: then `catch_up` follows.
        """

    @abstractmethod
    def catch_up(self) -> bool:
        """Continue what a tick left undone. Returns True if there is still more to do."""

    # ---- table line, messages, status ----

    def set_config_value(self, key: str, value: str) -> str | None:
        """Set one key, from the table line or from a message. Returns a warning to log, or None.

        Raises:
            PolicyConfigError: there is no such key, or the value is not a number.
        """
        raise PolicyConfigError(key, value)

    def config_values(self) -> list[tuple[str, str]]:
        """Return the keys and values that the status line prints."""
        return []
