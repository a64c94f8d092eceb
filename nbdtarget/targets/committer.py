# SPDX-License-Identifier: Apache-2.0
"""Group commit: the one order in which data and metadata become durable.

Theory of operation. Targets change their metadata in memory as I/O ends, and call
`note_change`. A commit makes what was changed so far durable:

    1  pre_commit    the changes so far become one transaction. There is no await in this step, so no
                     change is taken in part. A change from here on belongs to the next commit.
    2  together      flush every backing device, so that all data that the transaction
                     vouches for is durable; append the transaction to the journal, flush that
    3  superblock    written with FUA: from here on a crash finds the transaction
    4  done          then, and only then, the callers that waited are answered

Nothing refers to the journal's new records before step 3, so they may reach the disk before or after
the data; the superblock may not. A crash before step 3 loses the whole transaction, a crash after it
loses nothing.

Grouping. One commit runs at a time. A caller joins the *next* one to start. For example, a FLUSH that
arrives while a commit runs promises writes that ended after that commit's flush began, so that commit
cannot answer it. All callers that came meanwhile share the next commit, which starts when this
one is done. A commit is due when a caller waits, or `commit_period_s` after the first change.

Flushes. A commit that had something to commit has flushed the backing devices in step 2, after
its waiting FLUSHes arrived: they end with it. A commit that found nothing left (a change was taken
by the commit before) flushes the backing devices once, for all FLUSHes that wait.

    state      changed, running      FLUSH and FUA
    clean      no, no                the target passes them straight down
    dirty      one of them           wait for the next commit
    failed     any                   EIO until the table is loaded again

Failure. Whatever step fails, the disk holds the last commit, or all of the failed one:

    what failed                        what is on the disk
    a flush of a backing device        the last commit. Records of the journal may be there, but no
                                       superblock vouches for them
    a write or flush of the journal    the last commit, for the same reason
    a write of the superblock          the last commit or this one, each complete: data and journal were
                                       durable before, and opening takes the newest valid copy

So nothing on the disk is in doubt, no mark is written there, and a new table or another process that opens the
metadata goes on from a complete commit. The state in core is in doubt: a later
flush that "succeeds" would prove nothing (the kernel may have dropped the dirty pages), and
the changes that we have taken may rest on such pages. Therefore the metadata is aborted: it becomes
read-only, all callers that wait get EIO, and so does every later FLUSH and FUA until a table is
constructed anew, and reads the disk. If the metadata device cannot even be read any more, the
metadata goes to mode FAIL.

A device may go on, and say that it may have lost what no flush had covered (`Device.losses`). Its next flush then
counts as failed, once. If what is in core rests on that data (`rests_on_unflushed`), the metadata is aborted at once,
and not only at the next flush: until then clients would read whatever the device holds there instead.

A failed flush that nothing rests on (`can_do_without`; a writethrough cache's cache device, see
`nbdtarget.targets.cache.distrust`) is reported to the owner. No request fails by it.

A failed flush of a backing device to which nothing was written since its last good flush (`Unflushed`) has
lost nothing. No request fails by it, either.

Compaction (a new snapshot, so that the journal can start over) runs beside the commits as a task of
its own, and is waited for only by `quiesce`.
"""

import asyncio
import contextlib
import errno as errnos
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Protocol, TypeAlias

from nbdtarget.bio import Bio
from nbdtarget.common.clock import Clock, Timer
from nbdtarget.common.errors import DeviceError
from nbdtarget.common.turns import Tasks
from nbdtarget.devices.base import Device
from nbdtarget.targets import metadata_io
from nbdtarget_metadata.errors import FailedMetadata, MetadataError
from nbdtarget_metadata.operations import Steps

__all__ = ["COMMIT_PERIOD_S", "Committable", "Committer", "Transaction", "Unflushed"]

COMMIT_PERIOD_S: Final = 1.0
PROBE_BYTES: Final = 4096

log = logging.getLogger(__name__)


class Transaction(Protocol):
    """The changes that `pre_commit` took."""

    def journal(self) -> Steps[None]: ...

    def superblock(self) -> Steps[None]: ...

    def done(self) -> None: ...


class Committable(Protocol):
    """The metadata of a target, as far as committing it goes. See `nbdtarget_metadata.clone.metadata`."""

    @property
    def changed(self) -> bool: ...

    @property
    def needs_compaction(self) -> bool: ...

    def pre_commit(self, *, clean_shutdown: bool = False) -> Transaction | None: ...

    def compact(self) -> Steps[None]: ...

    def abort(self) -> None: ...

    def fail(self) -> None: ...


class Unflushed(Protocol):
    """Knows whether a backing device holds anything that no flush has covered yet."""

    def begin_flush(self) -> object:
        """A flush begins; what is returned is given back when it has ended well."""
        ...

    def end_flush(self, begun: object) -> None:
        """That flush has ended well."""
        ...

    @property
    def has_any(self) -> bool:
        """Whether anything was written since the last flush that ended well, or may have been."""
        ...


class _MetadataFailure(Exception):
    """The metadata device did not take what a commit wrote, or the metadata refused it."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


# None: the flush is needed. The function that is returned may raise the error again, if the flush is needed by now.
CanDoWithout: TypeAlias = Callable[
    [Device, Transaction | None], Callable[[DeviceError], None] | None
]


class Committer:
    """Commits the metadata of one target. See the module head.

    Args:
        name: the mapped device's, for logs.
        metadata, device: what is committed, and the device that it lies on.
        backing: the devices that hold the data which the metadata vouches for.
        committed: called after each successful commit, before the callers that waited are answered.
        failed: called after the metadata has been aborted, or has failed; again if it fails
            when it had been aborted before.
        metadata_failed: called before that if it was the metadata device that failed.
        aborts_on_loss: what is in core rests on data that no flush has covered, also when there is
            nothing to commit: so if these may be lost, the metadata is aborted.
        rests_on_unflushed: asked when backing devices may have lost what no flush had covered:
            whether what is in core rests on it. None: never.

    Attributes:
        can_do_without: asked when a backing device is about to be flushed for a transaction, or for FLUSH
            alone: whether nothing rests on that flush; then what to call if it fails. See `CanDoWithout`.
        unflushed: of backing devices of which the owner knows what was written to them.
        unflushable: the devices whose last flush failed, and nothing was lost by it. Their content may change in a power
            cut: a DISCARD promises nothing.
        last_error: why the last flush or commit failed, in one line; None: none has.
        nr_commits, commits_ns: how many there were, and how long they have taken together.
    """

    def __init__(
        self,
        name: str,
        metadata: Committable,
        device: Device,
        backing: Sequence[Device],
        clock: Clock,
        *,
        committed: Callable[[], None],
        failed: Callable[[], None],
        metadata_failed: Callable[[], None] | None = None,
        rests_on_unflushed: Callable[[Sequence[Device]], bool] | None = None,
        aborts_on_loss: bool = False,
        commit_period_s: float = COMMIT_PERIOD_S,
    ) -> None:
        self.name = name
        self.metadata = metadata
        self.device = device
        self.backing = backing
        self.clock = clock
        self.commit_period_s = commit_period_s
        self.has_failed = False
        self._committed = committed
        self._failed = failed
        self._metadata_failed = metadata_failed
        self._rests_on_unflushed = rests_on_unflushed
        self._is_watching = False
        self._has_given_up = False
        self.unflushed: dict[Device, Unflushed] = {}
        self.unflushable: set[Device] = set()
        self.can_do_without: CanDoWithout | None = None
        # Writes that a device had lost before this target used it are no loss of this target.
        self._losses = {each: each.losses for each in (device, *backing)}
        self._seen_losses = {each: each.losses for each in backing}
        self._aborts_on_loss = aborts_on_loss
        self.last_error: str | None = None
        self.nr_commits = 0
        self.commits_ns = 0
        self._commit_waiters: list[Callable[[int], None]] = []
        self._flush_waiters: list[Callable[[int], None]] = []
        self._wants_clean = False
        self._is_due = False
        self._compaction_error: Exception | None = None
        self._timer: Timer | None = None
        self._is_running = False
        self._is_compacting = False
        self._tasks = Tasks(failed=self._report)

    @property
    def is_clean(self) -> bool:
        """Everything is committed: FLUSH and FUA need nothing of us."""
        return not (self.metadata.changed or self._is_running or self.has_failed)

    @property
    def is_quiet(self) -> bool:
        """Whether no I/O of the committer is in flight, and none will begin by itself."""
        return self._timer is None and not len(self._tasks)

    def note_change(self) -> None:
        """The metadata has changed: commit it within the period."""
        if self._timer is None and not self.has_failed:
            self._timer = self.clock.call_later(self.commit_period_s, self.start_commit)

    def start_commit(self) -> None:
        """Commit soon, if there is anything to commit; without a caller that waits."""
        self._stop_timer()
        if self.metadata.changed:
            self._is_due = True
            self._wake()

    def after_commit(self, callback: Callable[[int], None]) -> None:
        """Call `callback(errno)` when all that is changed now has been committed (0), or not.

        Durable: on 0, the metadata and the data on the backing devices that it vouches for.
        """
        self._commit_waiters.append(callback)
        self._wake()

    def flush(self, bio: Bio) -> None:
        """Take a FLUSH, and end it after the next commit.

        Durable: on 0, all data whose write had ended when this was called, and its metadata.
        """
        self._flush_waiters.append(bio.end)
        self._wake()

    async def commit(self, *, clean_shutdown: bool = False) -> bool:
        """Commit what is changed now, and wait for it; False if that failed.

        With `clean_shutdown` the superblock says so, until the next commit.
        """
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._wants_clean |= clean_shutdown

        def ended(errno: int) -> None:
            if not done.done():  # it is, if this coroutine was cancelled
                done.set_result(errno)

        self.after_commit(ended)
        return await done == 0

    def watch(self) -> None:
        """Bios may come from now on: hear of what the backing devices lose."""
        if not self._is_watching:
            self._is_watching = True
            self._seen_losses = {each: each.losses for each in self.backing}
            for device in self.backing:
                device.health.watchers.append(self._look_for_losses)

    def unwatch(self) -> None:
        """No bio comes any more, and all is flushed."""
        if self._is_watching:
            self._is_watching = False
            for device in self.backing:
                device.health.watchers.remove(self._look_for_losses)

    def _look_for_losses(self) -> None:
        seen = self._seen_losses
        lost = [each for each in self.backing if each.losses != seen[each]]
        seen.update((each, each.losses) for each in lost)
        rests = self._rests_on_unflushed
        if lost and rests is not None and rests(lost):
            names = ", ".join(each.name for each in lost)
            self.last_error = f"{names} may have lost what was not flushed"
            log.error(
                "%s: %s: nothing more is written until its table is loaded again",
                self.name,
                self.last_error,
            )
            # The owner may have put the metadata into mode FAIL already.
            with contextlib.suppress(FailedMetadata):
                self.metadata.abort()
            self._give_up(is_worse=True)

    async def quiesce(self) -> None:
        """Stop the timer, and wait until nothing of ours is in flight."""
        self._stop_timer()
        await self._tasks.wait()
        self._stop_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        if not self._is_running:
            self._is_running = True
            self._tasks.start(self._run())

    def _is_wanted(self) -> bool:
        if self._commit_waiters or self._flush_waiters:
            return True
        if self.has_failed:
            return False  # a compaction's error is not looked at any more, and would keep the loop running
        return self._compaction_error is not None or (
            self._is_due and self.metadata.changed
        )

    async def _run(self) -> None:
        """Commit until no commit is wanted."""
        is_sound = False
        try:
            while self._is_wanted():
                await self._run_round()
            is_sound = True
        finally:
            self._is_running = False
            if not is_sound:
                # An unexpected exception, that is a bug: nothing can be trusted any more.
                self.metadata.fail()
                self._give_up(is_worse=True)
                # A callback may raise, and others may ask again while they are answered: until none is left.
                while self._commit_waiters or self._flush_waiters:
                    self._tell_failure()

    def _tell_failure(self) -> None:
        try:
            _tell(self._commit_waiters, errnos.EIO)
            _tell(self._flush_waiters, errnos.EIO)
        except Exception:
            log.critical("%s: commit", self.name, exc_info=True)

    async def _run_round(self) -> None:
        # The callers that are waiting now are answered by this round, and by no later one.
        commits, self._commit_waiters = self._commit_waiters, []
        flushes, self._flush_waiters = self._flush_waiters, []
        self._is_due = False
        errno = errnos.EIO
        try:
            if not self.has_failed:
                errno = await self._commit_or_flush(bool(flushes))
        finally:
            # Also when an exception passes: no caller must wait for ever.
            try:
                _tell(commits, errno)
                _tell(flushes, errno)
            finally:
                # A callback has raised, and those after it were not called: `_run` tells them.
                self._commit_waiters += commits
                self._flush_waiters += flushes

    async def _commit_or_flush(self, has_flushes: bool) -> int:
        """Commit; if nothing is left to commit, flush if a FLUSH waits; return errno."""
        self._stop_timer()  # this commit takes all changes so far
        clean, self._wants_clean = self._wants_clean, False
        try:
            if self._compaction_error is not None:
                raise _MetadataFailure(self._compaction_error)
            transaction = self.metadata.pre_commit(clean_shutdown=clean)
            if transaction is not None:
                begun_ns = self.clock.now_ns()
                await self._commit_transaction(transaction)
                self.nr_commits += 1
                self.commits_ns += self.clock.now_ns() - begun_ns
        except _MetadataFailure as failure:
            await self._abort(failure.cause, blames_metadata=True)
            return errnos.EIO
        except (DeviceError, MetadataError) as error:
            await self._abort(error, blames_metadata=False)
            return errnos.EIO
        if transaction is not None:
            self._committed()
            self._start_compaction()
            return 0
        if has_flushes:
            return await self._flush_only()
        # A callback that asks again at once must not keep the loop busy.
        await asyncio.sleep(0)
        return 0

    async def _commit_transaction(self, transaction: Transaction) -> None:
        """Steps 2 to 4 of the module head. Raises: DeviceError, _MetadataFailure."""
        assert not self.has_failed, "after an abort nothing is committed"
        # Step 2. All of it has ended when this returns, also if one part has failed.
        await _all(
            *(self._flush(device, transaction) for device in self.backing),
            self._run_steps(transaction.journal()),
        )
        if self.has_failed:
            # A device has reported a loss meanwhile, and the metadata was aborted: no superblock for it.
            raise DeviceError(errnos.EIO, self.name, "flush", 0, 0)
        # Step 3. If this fails, the transaction may be on the disk or not; both are complete states.
        await self._run_steps(transaction.superblock())
        # Step 4. Only now does the metadata object take the transaction for recorded.
        transaction.done()

    async def _run_steps(self, steps: Steps[None]) -> None:
        """Run steps over the metadata device. Raises: _MetadataFailure."""
        try:
            await metadata_io.run(self.device, steps)
            self._check_losses(self.device)
        except (DeviceError, MetadataError) as error:
            raise _MetadataFailure(error) from error

    def _has_lost(self, losses: Mapping[Device, int]) -> bool:
        """Whether a backing device has lost anything since its losses were these."""
        return any(each.losses != losses[each] for each in self.backing)

    def _check_losses(self, device: Device) -> None:
        """Once for each loss, raise DeviceError: what was written before may be gone."""
        losses = device.losses
        if losses != self._losses[device]:
            self._losses[device] = losses
            raise DeviceError(errnos.EIO, device.name, "flush", 0, 0)

    async def _flush(self, device: Device, transaction: Transaction | None) -> None:
        """Flush a backing device. Raises: DeviceError: and something may be lost by that.

        Args: transaction: the one that will vouch for what is flushed; None: none is under way.
        """
        ask = self.can_do_without
        if ask is None or (let_go := ask(device, transaction)) is None:
            await self._flush_needed(device)
            return
        try:
            await self._flush_needed(device)
        except DeviceError as error:
            self.last_error = f"flush: {error}"
            let_go(error)

    async def _flush_needed(self, device: Device) -> None:
        """Raises: DeviceError."""
        unflushed = self.unflushed.get(device)
        if unflushed is None:
            await device.flush()
            self._check_losses(device)
            return
        # Asked before the flush begins: a write that is sent while it is under way proves nothing.
        had_any = unflushed.has_any
        begun = unflushed.begin_flush()
        try:
            await device.flush()
            self._check_losses(device)
        except DeviceError as error:
            if had_any:
                raise
            self.unflushable.add(device)
            log.warning("%s: %s; nothing was left to be flushed", self.name, error)
        else:
            unflushed.end_flush(begun)
            self.unflushable.discard(device)

    async def _flush_only(self) -> int:
        losses = dict(self._losses)
        try:
            await _all(*(self._flush(device, None) for device in self.backing))
        except DeviceError as error:
            if self._aborts_on_loss and self._has_lost(losses):
                await self._abort(error, blames_metadata=False)
                return errnos.EIO
            # Data may be lost, but no metadata depends on it: all metadata is committed.
            self.last_error = f"flush: {error}"
            log.error("%s: flush: %s", self.name, error)
            return error.errno
        return 0

    async def _abort(self, error: Exception, *, blames_metadata: bool) -> None:
        self.last_error = f"commit: {error}"
        log.error("%s: commit failed: %s", self.name, error)
        # Before the first await: while the device is probed, nothing may build on what is reverted.
        self.has_failed = True
        self._compaction_error = None
        # The metadata may be in mode FAIL already, because of a loss below.
        with contextlib.suppress(FailedMetadata):
            self.metadata.abort()
        is_worse = False
        try:
            # Mode RO is of use only while the metadata can be read.
            await self.device.read(0, PROBE_BYTES)
        except DeviceError as unusable:
            log.error("%s: switching to fail mode: %s", self.name, unusable)
            self.metadata.fail()
            is_worse = True
        else:
            if blames_metadata and self._metadata_failed is not None:
                self._metadata_failed()
            log.error(
                "%s: read-only until its table is loaded again: no FLUSH can be promised;"
                " %s holds the last commit, and is not damaged",
                self.name,
                self.device.name,
            )
        self._give_up(is_worse=is_worse)

    def _give_up(self, *, is_worse: bool = False) -> None:
        """`is_worse`: it had been aborted before perhaps, and now it has failed."""
        self.has_failed = True
        self._stop_timer()
        if is_worse or not self._has_given_up:
            self._has_given_up = True
            self._failed()

    def _start_compaction(self) -> None:
        if not self._is_compacting and self.metadata.needs_compaction:
            self._is_compacting = True
            self._tasks.start(self._compact())

    async def _compact(self) -> None:
        try:
            await metadata_io.run(self.device, self.metadata.compact())
        except (DeviceError, MetadataError) as error:
            # A commit may be under way, and is left alone. The next round aborts.
            self._compaction_error = error
            self._wake()
        finally:
            self._is_compacting = False

    def _report(self, error: BaseException) -> None:
        log.critical("%s: commit", self.name, exc_info=error)


def _tell(waiters: list[Callable[[int], None]], errno: int) -> None:
    while waiters:
        waiters.pop(0)(errno)


async def _all(*awaitables: Awaitable[None]) -> None:
    """Await all to their end, then raise the first error: nothing is left in flight."""
    for result in await asyncio.gather(*awaitables, return_exceptions=True):
        if result is not None:
            raise result
