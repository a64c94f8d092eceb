# SPDX-License-Identifier: Apache-2.0
"""Migrations: what moves blocks between origin and cache, and how much of that at a time.

Theory of operation. The policy decides, `Migrations` carries out, one task for each migration:

    promote    lock the block; copy it to the cache device (or zero it there, if it is discarded, which
               makes it dirty); insert the mapping
    demote     lock; write it back if it is dirty; remove the mapping; commit, which flushes the origin
               first; wait for reads of the cache block; only then is it free
    writeback  lock; copy it to the origin; it is clean

The lock keeps writes out, not reads: those go on from where the block is, and the copy stays right
meanwhile. A demotion's reads go on from the cache block until the removal is durable. So no read
waits for a copy or a commit, and a crash at any point finds one place which has everything.

What a failure leaves: everything as it was, apart from copies that no mapping refers to. A promotion is
forgotten until the block is asked for again; a writeback is tried again, after a pause that grows
with each failure in a row. Failures are counted, and logged now and then.

How many at a time. `MIGRATIONS_MAX`, the copiers' buffers and `migration_rate` bound all migrations. Writebacks
that are done only because the cache is idle are bounded by `migration_threshold` too, as in the kernel: none is started
if the blocks under way would exceed it. A cache is idle if it had no bio in the last second.

The message `clean_now`, and the feature `sorted_writeback` when the cache is idle, write back in the origin's
order: `Sweep`.

Clients go first. Long chunks of a copy go through worker threads, short ones through the loop, where they
delay a client's bio that comes at that moment. `Throttle` says how often that may happen while clients hit.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final

from nbdtarget.common.clock import Clock, Timer
from nbdtarget.common.errors import DeviceError
from nbdtarget.common.turns import Soon, Tasks
from nbdtarget.common.units import SECTOR
from nbdtarget.policies.base import DEMOTE, OP_NAMES, PROMOTE, Work
from nbdtarget.targets.cache.blocks import Blocks
from nbdtarget.targets.cache.locks import BlockLock
from nbdtarget.targets.cache.promotion_requests import PromotionRequests
from nbdtarget.targets.cache.sweep import Sweep
from nbdtarget.targets.cache.throttle import Throttle
from nbdtarget.targets.copier import Copier, CopyError
from nbdtarget.targets.rate import Rate
from nbdtarget_metadata.errors import MetadataError

__all__ = ["MIGRATIONS_MAX", "TICK_S", "Migrations"]

MIGRATIONS_MAX: Final = 32
COPY_BYTES_MAX: Final = 16 << 20  # in each direction
TICK_S: Final = 1.0
RETRY_S_MIN: Final = 1.0
RETRY_S_MAX: Final = 64.0
LOCKED_MAX: Final = 64  # that a sweep passes over in a turn of the loop
_NS: Final = 1_000_000_000

log = logging.getLogger(__name__)


class Migrations:
    """Carries out what the policy wants. See the module head.

    Attributes:
        rate: migration_rate.
        requests: blocks that are to be promoted whatever the policy thinks of them.
    """

    def __init__(self, blocks: Blocks, clock: Clock) -> None:
        self._blocks = blocks
        self._clock = clock
        self.rate = Rate(clock, blocks.options.migration_rate)
        self._throttle = Throttle(clock, blocks.metadata.statistics)
        self._promoter = Copier(
            blocks.origin,
            blocks.cache,
            copy_bytes_max=COPY_BYTES_MAX,
            background=True,
        )
        self._demoter = Copier(
            blocks.cache,
            blocks.origin,
            copy_bytes_max=COPY_BYTES_MAX,
            background=True,
        )
        self._sweep = Sweep(blocks)
        self.requests = PromotionRequests(blocks)
        self._tasks = Tasks(failed=blocks.broken)
        self._nr_migrations = 0
        self._nr_demoting = 0
        self._is_stopped = True
        self._pump_soon = Soon(self._pump)
        self._catch_up_soon = Soon(self._catch_up)
        self._may_gather = False
        self._is_gathering = False
        self._waker: Timer | None = None
        self._pause: Timer | None = None
        self._nr_bios_seen = 0
        self._is_idle = False
        self._retry_s = RETRY_S_MIN
        self._retry_ns = 0
        blocks.wake = self.wake

    # ---- life ----

    def resume(self) -> None:
        self._is_stopped = False
        self._nr_bios_seen = -1  # whether clients come is not known yet: not idle
        self._tick_and_wait()

    def presuspend(self) -> None:
        """Start nothing more."""
        self._is_stopped = True
        for timer in (self._waker, self._pause):
            if timer is not None:
                timer.cancel()
        self._waker = self._pause = None

    async def quiesce(self) -> None:
        """Wait for what is under way. After `presuspend`."""
        await self._tasks.wait()
        for copier in (self._promoter, self._demoter):
            copier.drop_buffers()

    # ---- when ----

    def clean_now(self) -> None:
        """Write back everything that is dirty, idle or not."""
        self._sweep.start()
        self._retry_ns = 0
        self.wake()

    def wake(self) -> None:
        """There may be something to do."""
        if not self._is_stopped:
            self._pump_soon.ask()

    def tick(self) -> None:
        """Let time pass for the policy."""
        if self._blocks.policy.tick(self._clock.now_ns()):
            self._catch_up_soon.ask()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run what ends before a suspend does."""
        self._tasks.start(coroutine)

    def _catch_up(self) -> None:
        """Do more of what a tick left undone, in each turn of the loop."""
        if not self._is_stopped and self._blocks.policy.catch_up():
            self._catch_up_soon.ask()

    def _nr_bios(self) -> int:
        seen = self._blocks.metadata.statistics
        nr_bios = (
            seen.read_hits + seen.read_misses + seen.write_hits + seen.write_misses
        )
        # A bio that a block is overwritten with counts as neither.
        return nr_bios + self._blocks.nr_promotions

    def _tick_and_wait(self) -> None:
        nr_bios = self._nr_bios()
        self._is_idle = (
            nr_bios == self._nr_bios_seen and not self._blocks.locks.nr_holds
        )
        self._nr_bios_seen = nr_bios
        self._may_gather = True
        if self._is_idle:
            self._clear_log()
        self.requests.tick(is_migrating=self._nr_migrations > 0)
        self.tick()
        self.wake()
        self._waker = self._clock.call_later(TICK_S, self._tick_and_wait)

    def _clear_log(self) -> None:
        """Have it recorded which blocks have been cleaned: a crash would leave them dirty."""
        metadata = self._blocks.metadata
        if metadata.dirty_log and self._blocks.is_writable and metadata.nr_cleaned:
            metadata.clear_log()
            self._blocks.committer.note_change()

    def _pump(self) -> None:
        """Start what may be started."""
        blocks = self._blocks
        if blocks.is_passthrough or blocks.distrusts_cache:
            return
        while (
            self._nr_migrations < MIGRATIONS_MAX
            and not self._is_stopped
            and blocks.is_writable
        ):
            now_ns = self._clock.now_ns()
            ready_ns = max(self.rate.ready_ns, self._throttle.ready_ns)
            if now_ns < ready_ns:
                self._wait(ready_ns - now_ns)
                return
            if not self._start_one(may_write_back=now_ns >= self._retry_ns):
                return

    def _start_one(self, *, may_write_back: bool) -> bool:
        """Start a migration, if there is one to be started."""
        blocks = self._blocks
        is_idle = (
            self._is_idle
            and may_write_back
            and self._nr_bios() == self._nr_bios_seen
            and self._is_below_threshold()
        )
        sorts = blocks.options.sorted_writeback
        sweeps = self._sweep.is_asked_for or (is_idle and sorts)
        if sweeps and may_write_back and self._start_sweeping():
            return True
        work = self.requests.maybe_next(self._nr_demoting)
        if work is None:
            work = blocks.policy.get_background_work(is_idle and not sorts)
        if work is None:
            return False
        lock = None
        if work.op == PROMOTE or may_write_back:
            lock = blocks.locks.maybe_lock(
                work.oblock, lambda lock: self.spawn(self._migrate(work, lock))
            )
        if lock is None:
            # The block is locked, for example by the sweep: unlocking it wakes us. Or it is too soon to try again.
            blocks.policy.complete_background_work(work, False)
            if work.op == PROMOTE:
                self.requests.failed(work)
            return False
        self._started()
        self._nr_demoting += work.op == DEMOTE
        return True

    def _is_below_threshold(self) -> bool:
        """Whether idle writebacks may have one more block under way."""
        size = self._blocks.block_size
        threshold = self._blocks.options.migration_threshold
        return (self._nr_migrations + 1) * size <= threshold * SECTOR

    def _started(self) -> None:
        self._nr_migrations += 1
        self._blocks.nr_migrating += 1
        self.rate.charge(self._blocks.block_size)
        self._throttle.note_start()

    def _ended(self) -> None:
        self._nr_migrations -= 1
        assert self._nr_migrations >= 0
        self._may_gather = True
        self._blocks.nr_migrating -= 1
        self.wake()

    def _wait(self, wait_ns: int) -> None:
        if self._pause is None:
            self._pause = self._clock.call_later(wait_ns / _NS, self._pause_has_ended)

    def _pause_has_ended(self) -> None:
        self._pause = None
        self.wake()

    # ---- what ----

    async def _migrate(self, work: Work, lock: BlockLock) -> None:
        """Carry out a migration of the policy's; the block is locked."""
        assert lock.held
        assert lock.begin == work.oblock
        blocks = self._blocks
        success = False
        try:
            if not blocks.is_writable:
                return  # a commit has failed while the lock was waited for
            if work.op == PROMOTE:
                success = await self._promote(work)
            elif work.op == DEMOTE:
                success = await self._demote(work, lock)
            else:
                success = await self._write_back(work.oblock, work.cblock)
        except CopyError as error:
            self._note_failure(OP_NAMES[work.op], error.error, work.op)
        except DeviceError as error:
            self._note_failure(OP_NAMES[work.op], error, work.op)
        except MetadataError as error:
            log.error("%s: %s: %s", blocks.name, OP_NAMES[work.op], error)
        except asyncio.CancelledError as error:
            # The loop ends. The metadata may have lost a mapping that the policy still has: all I/O
            # must be refused before the bios that are parked for the block are mapped.
            blocks.broken(error)
            raise
        except Exception as error:
            blocks.broken(error)
        finally:
            self._finish(work, lock, success=success)

    def _finish(self, work: Work, lock: BlockLock, *, success: bool) -> None:
        blocks = self._blocks
        try:
            blocks.policy.complete_background_work(work, success)
            if success:
                self._count(work)
            elif work.op == PROMOTE:
                self.requests.failed(work)
        except Exception as error:
            # An unexpected exception, that is a bug. All I/O must be refused before parked bios are mapped.
            blocks.broken(error)
        self._nr_demoting -= work.op == DEMOTE
        blocks.unlock(lock)
        self._ended()

    def _count(self, work: Work) -> None:
        blocks = self._blocks
        if work.op == PROMOTE:
            blocks.nr_promotions += 1
            if blocks.metadata.dirty[work.cblock]:
                blocks.policy.set_dirty(work.cblock)
            self.requests.promoted(work)
        elif work.op == DEMOTE:
            blocks.nr_demotions += 1

    async def _promote(self, work: Work) -> bool:
        blocks = self._blocks
        size = blocks.block_size
        if not blocks.metadata.may_insert(work.cblock):
            blocks.committer.start_commit()  # its removal is not durable yet
            return False
        # A discarded block's data are not needed. But what is read from now on must not change again
        # when the block is demoted: so the block is dirty, and the zeroes are written back then.
        zeroes = blocks.is_writeback and blocks.discards.is_discarded(work.oblock)
        if zeroes:
            await blocks.cache.write_zeroes(work.cblock * size, size)
        else:
            await self._promoter.copy(work.oblock * size, size, work.cblock * size)
        # Now, and not before: until the copy is whole, no commit may have the mapping.
        blocks.metadata.insert(work.cblock, work.oblock, dirty=zeroes)
        blocks.discards.clear(work.oblock)
        blocks.committer.note_change()
        return True

    async def _demote(self, work: Work, lock: BlockLock) -> bool:
        blocks = self._blocks
        if blocks.metadata.dirty[work.cblock]:
            await self._write_back(work.oblock, work.cblock)
        # The commit flushes the origin first, so what was written back is durable when the mapping goes.
        blocks.metadata.remove(work.cblock)
        if not await blocks.committer.commit():
            return False
        # READs that began before may still be reading the cache block. Only then is it free.
        unread = asyncio.get_running_loop().create_future()
        blocks.locks.raise_level(lock, unread.set_result)
        await unread
        return True

    async def _write_back(self, oblock: int, cblock: int) -> bool:
        blocks = self._blocks
        size = blocks.block_size
        if not blocks.metadata.dirty[cblock]:
            return True
        if not blocks.discards.is_discarded(oblock):
            await self._demoter.copy(cblock * size, size, oblock * size)
            # Not before the copy: after one that failed the block is dirty still, and nothing is lost.
            blocks.origin_writes.nr_sent += 1
            blocks.nr_written_back += 1
        self._retry_s = RETRY_S_MIN
        blocks.set_clean(cblock)
        return True

    # ---- the sweep ----

    def _start_sweeping(self) -> bool:
        """Start the sweep's next writeback, if there is one now."""
        blocks = self._blocks
        for _ in range(LOCKED_MAX):
            found = self._sweep.maybe_next()
            if found is None:
                break
            if self._start_write_back(*found):
                return True
        else:
            return False  # unlocking them wakes us
        if not self._sweep.has_ended:
            self.wake()
            return False
        # Not again and again while the last ones are under way, or locked for another reason.
        if (
            self._may_gather
            and not self._is_gathering
            and blocks.metadata.nr_dirty
            and not self._nr_migrations
        ):
            self._may_gather = False
            self._is_gathering = True
            self.spawn(self._gather())
        return False

    def _start_write_back(self, oblock: int, cblock: int) -> bool:
        lock = self._blocks.locks.maybe_lock(
            oblock, lambda lock: self.spawn(self._sweep_block(oblock, cblock, lock))
        )
        if lock is not None:
            self._started()
        return lock is not None

    async def _gather(self) -> None:
        try:
            await self._sweep.gather()
        finally:
            self._is_gathering = False
        self.wake()

    async def _sweep_block(self, oblock: int, cblock: int, lock: BlockLock) -> None:
        assert lock.held
        blocks = self._blocks
        try:
            if blocks.is_writable:
                await self._write_back(oblock, cblock)
        except CopyError as error:
            self._note_failure("writeback", error.error, DEMOTE)
        except MetadataError as error:
            log.error("%s: writeback: %s", blocks.name, error)
        finally:
            blocks.unlock(lock)
            self._ended()

    # ---- inside ----

    def _note_failure(self, what: str, error: DeviceError, op: int) -> None:
        self._blocks.failures.note(what, error)
        now_ns = self._clock.now_ns()
        if op != PROMOTE:
            self._retry_ns = now_ns + int(self._retry_s * _NS)
            self._retry_s = min(2 * self._retry_s, RETRY_S_MAX)
