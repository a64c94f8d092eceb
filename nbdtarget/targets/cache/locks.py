# SPDX-License-Identifier: Apache-2.0
"""Block locks: I/O on a block holds it, and what moves the block locks it.

Theory of operation. Every READ or WRITE that does not end at once *holds* its block, shared, until
it ends. Work that moves a block (a migration, an overwrite, a discard, an invalidation) *locks* it,
exclusively; a discard locks a whole range. I/O that ends at once takes neither: nothing else can
run meanwhile, so a look at the locks is enough.

A lock has two levels:

    level   new READs   new WRITEs   granted when these have ended, of those that were there before
    0       pass        are parked   WRITEs
    1       are parked  are parked   READs, too

While a block is copied it may still be read, from the origin or from the cache: the copy stays right until
a write comes. Only a cache block that is to be used for another block must not be read any more.
Then its lock is raised to level 1, which is short.

    asked for --WRITEs gone, older locks gone--> granted --raise--> raising --READs gone--> raised
        |                                           |                                          |
        +------------------------------------- unlock ----------------------------------------+

Nothing starves, and nothing deadlocks. From the moment at which a lock is asked for, nothing new
comes in that it would have to wait for, so it waits only for what is under way. That ends by
itself: I/O that holds its block waits for a device, or for a commit, never for a lock. No lock on a
single block waits for another lock (`maybe_lock` returns None instead); ranges wait for older
locks, and what holds a lock asks for no second one.

Parked bios come back from `unlock`, in their order, and are mapped anew from the beginning.

Bounds: holds and parked bios are clients' requests in flight, which the server bounds.

Nothing here survives a crash or needs to.
"""

from collections import deque
from collections.abc import Callable
from functools import partial

from nbdtarget.bio import Bio
from nbdtarget.common.turns import Pump

__all__ = ["BlockLock", "BlockLocks"]


class BlockLock:
    """An exclusive lock on oblocks, half-open. Made by `BlockLocks` only.

    Attributes:
        parked: bios that came meanwhile, in their order.
        held: it was granted.
    """

    __slots__ = ("begin", "end", "granted", "held", "level", "nr_awaited", "parked")

    def __init__(
        self, begin: int, end: int, granted: Callable[["BlockLock"], None]
    ) -> None:
        self.begin = begin
        self.end = end
        self.granted = granted
        self.held = False
        self.level = 0
        self.nr_awaited = 0  # holds, and older locks
        self.parked: list[Bio] = []

    def __repr__(self) -> str:
        state = "held" if self.held else f"waits for {self.nr_awaited}"
        return f"<BlockLock {self.begin}-{self.end} level {self.level} {state}>"


class CachedRead:
    """The hook of a READ that is served from the cache: its hold, and what to try if it fails."""

    __slots__ = ("_cblock", "_is_rescued", "_locks", "_oblock")

    def __init__(self, locks: "BlockLocks", oblock: int, cblock: int) -> None:
        self._locks = locks
        self._oblock = oblock
        self._cblock = cblock
        self._is_rescued = False

    def __call__(self, _: Bio) -> None:
        self._locks.end_read(self._oblock)

    def rescue(self, bio: Bio, status: int) -> bool:
        """The bio has failed; whether it was sent to the origin, still holding its block."""
        if self._is_rescued:
            return False
        self._is_rescued = True
        return self._locks.rescue(bio, status, self._oblock, self._cblock)


class BlockLocks:
    """The locks and holds of one cache.

    Attributes:
        rescue: called for a READ of a cached block that failed: see `CachedRead.rescue`.
        locked: not empty while anything is locked or about to be. Others only read it.
    """

    def __init__(self) -> None:
        self._readers: dict[int, int] = {}  # oblock: how many READs hold it
        self._writers: dict[int, int] = {}
        self._ranges: list[BlockLock] = []  # oldest first
        # Locks on single blocks by oblock; a range, by a number that is no oblock.
        self.locked: dict[int, BlockLock] = {}
        self._due: deque[BlockLock] = deque()  # held; their `granted` is to be called
        self._pump = Pump(self._grant)
        self.rescue: Callable[[Bio, int, int, int], bool] = _no_rescue

    @property
    def nr_holds(self) -> int:
        return sum(self._readers.values()) + sum(self._writers.values())

    @property
    def has_writers(self) -> bool:
        """Whether any write holds a block."""
        return bool(self._writers)

    # ---- shared ----

    def nr_writers(self, oblock: int) -> int:
        """How many writes hold `oblock`."""
        return self._writers.get(oblock, 0)

    def hold(self, oblock: int, bio: Bio, *, is_write: bool) -> None:
        """`bio`, which has not ended, does I/O on `oblock` until it ends."""
        holds = self._writers if is_write else self._readers
        holds[oblock] = holds.get(oblock, 0) + 1
        if is_write:
            # A range that was asked for earlier does not keep this write out if the write comes from the owner of the
            # single block's lock, which lets the block go now. The range has to wait for the write, too.
            for waiting in self._ranges:
                if not waiting.held and waiting.begin <= oblock < waiting.end:
                    waiting.nr_awaited += 1
            bio.on_end(partial(self._end_write, oblock))
        else:
            bio.on_end(lambda _: self.end_read(oblock))

    def hold_cached(self, oblock: int, cblock: int, bio: Bio) -> None:
        """`bio`, a READ that has not ended, reads `oblock` from the cache until it ends."""
        self._readers[oblock] = self._readers.get(oblock, 0) + 1
        bio.on_end(CachedRead(self, oblock, cblock))

    def hold_read(self, oblock: int) -> None:
        """As `hold_cached`, for a READ without a bio: `end_read` is called when it has ended."""
        self._readers[oblock] = self._readers.get(oblock, 0) + 1

    def let_go(self, bio: Bio) -> None:
        """`bio`, a write that holds its block, does no more I/O on it, and ends later."""
        assert bio.hooks is not None
        for nr, hook in enumerate(bio.hooks):
            if isinstance(hook, partial) and hook.func == self._end_write:
                del bio.hooks[nr]
                hook(bio)
                return
        raise AssertionError("it holds nothing")

    def is_locked(self, oblock: int) -> bool:
        """Whether `oblock` is locked, or about to be: `maybe_blocking` tells by which lock."""
        # hot: one call for each bio while there is any lock at all.
        return oblock in self.locked or bool(self._ranges)

    def maybe_blocking(self, oblock: int, *, is_write: bool) -> BlockLock | None:
        """Return the lock that a READ or WRITE of `oblock` must wait for."""
        lock = self.locked.get(oblock)
        if lock is None and self._ranges:
            lock = next((r for r in self._ranges if r.begin <= oblock < r.end), None)
        return lock if lock is not None and (is_write or lock.level) else None

    # ---- exclusive ----

    def maybe_lock(
        self, oblock: int, granted: Callable[[BlockLock], None]
    ) -> BlockLock | None:
        """Lock one block, at level 0, unless it is locked or about to be.

        `granted(lock)` is called once, now or later.
        """
        if self.maybe_blocking(oblock, is_write=True) is not None:
            return None
        lock = BlockLock(oblock, oblock + 1, granted)
        self.locked[oblock] = lock
        # At level 0 only WRITEs are waited for.
        lock.nr_awaited = self._writers.get(oblock, 0)
        self._maybe_grant(lock)
        return lock

    def lock_range(
        self, begin: int, end: int, granted: Callable[[BlockLock], None]
    ) -> BlockLock:
        """Lock blocks, half-open, at level 0; waits for older locks on any of them."""
        assert begin < end
        lock = BlockLock(begin, end, granted)
        lock.nr_awaited = sum(
            count for oblock, count in self._writers.items() if begin <= oblock < end
        ) + sum(
            other.begin < end and begin < other.end for other in self.locked.values()
        )
        self._ranges.append(lock)
        self.locked[~id(lock)] = lock  # a negative number, which no oblock has
        self._maybe_grant(lock)
        return lock

    def raise_level(
        self, lock: BlockLock, granted: Callable[[BlockLock], None]
    ) -> None:
        """Keep READs out, too, of a single block; `granted` is called when the last one has ended."""
        assert lock.held
        assert not lock.level
        assert lock.end - lock.begin == 1
        lock.held = False
        lock.level = 1
        lock.granted = granted
        lock.nr_awaited = self._readers.get(lock.begin, 0)
        self._maybe_grant(lock)

    def unlock(self, lock: BlockLock) -> list[Bio]:
        """Let the blocks go; return the bios that were parked, to be mapped anew."""
        assert lock.held, "only a held lock is unlocked, and once"
        lock.held = False
        if self.locked.get(lock.begin) is lock:
            del self.locked[lock.begin]
        else:
            del self.locked[~id(lock)]
            self._ranges.remove(lock)
        # Each younger range that overlaps has counted this lock: now it has one less to wait for.
        for younger in self._ranges.copy():
            if (
                not younger.held
                and younger.begin < lock.end
                and lock.begin < younger.end
            ):
                self._stop_awaiting(younger)
        parked, lock.parked = lock.parked, []
        return parked

    def take_parked(self, is_wanted: Callable[[Bio], bool]) -> list[Bio]:
        """Forget, and return, the parked bios that are wanted."""
        taken = []
        for lock in self.locked.values():
            taken += [bio for bio in lock.parked if is_wanted(bio)]
            lock.parked = [bio for bio in lock.parked if not is_wanted(bio)]
        return taken

    # ---- inside ----

    def _end_write(self, oblock: int, _: Bio) -> None:
        _count_down(self._writers, oblock)
        # A lock at level 1 waits for READs: it had waited for the WRITEs before it was raised.
        lock = self.locked.get(oblock)
        if lock is not None and not lock.held and not lock.level:
            self._stop_awaiting(lock)
        for waiting in self._ranges.copy():
            if not waiting.held and waiting.begin <= oblock < waiting.end:
                self._stop_awaiting(waiting)

    def end_read(self, oblock: int) -> None:
        """A READ that held `oblock` has ended."""
        _count_down(self._readers, oblock)
        lock = self.locked.get(oblock)
        if lock is not None and not lock.held and lock.level:
            self._stop_awaiting(lock)

    def _stop_awaiting(self, lock: BlockLock) -> None:
        lock.nr_awaited -= 1
        assert lock.nr_awaited >= 0
        if lock.nr_awaited:
            return
        lock.held = True
        self._due.append(lock)
        # Not a recursion: ranges that overlap like tiles may all wait for the first one, each for its neighbour.
        self._pump.run()

    def _grant(self) -> None:
        while self._due:
            due = self._due.popleft()
            due.granted(due)

    def _maybe_grant(self, lock: BlockLock) -> None:
        assert lock.nr_awaited >= 0
        if not lock.nr_awaited:
            lock.held = True
            lock.granted(lock)


def _no_rescue(bio: Bio, errno: int, oblock: int, cblock: int) -> bool:
    return False


def _count_down(holds: dict[int, int], oblock: int) -> None:
    left = holds[oblock] - 1
    if left:
        holds[oblock] = left
    else:
        del holds[oblock]
