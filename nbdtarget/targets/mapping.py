# SPDX-License-Identifier: Apache-2.0
"""`MappingTarget`: what clone and cache have in common, as targets that keep metadata.

Each of them maps blocks of a device to one of two places, records in metadata which place that is, and
commits the metadata in groups (`Committer`). Here stands what does not depend on what is
mapped: opening and closing, words, modes, contexts, and the frame of suspend and resume.

The handling of clients' bios is not here: a clone looks up ranges of bits, a cache asks a policy and holds blocks, and
the two share no step.

    mode   meaning                                        FLUSH   how it is reached
    RW     mappings may change                            0       -
    RO     the disk holds the last commit, and what is    EIO     a commit has failed, or the metadata device
           mapped stays as it is                                  could not be written when it was opened
    FAIL   nothing is known about any block               EIO     the metadata cannot be read, or an unexpected
                                                                  exception (a bug) has left it in doubt
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Final, Generic, Protocol, TypeVar

from nbdtarget.bio import Bio
from nbdtarget.common.words import join_words
from nbdtarget.devices.base import Device, Extent, QueueLimits
from nbdtarget.targets.base import Target, TargetContext
from nbdtarget.targets.committer import Committable, Committer
from nbdtarget.targets.disks import DiskRecords
from nbdtarget_metadata.mode import Mode

__all__ = ["METADATA_BLOCK_SECTORS", "MappingTarget"]

METADATA_BLOCK_SECTORS: Final = 8  # as a status line shows it

log = logging.getLogger(__name__)


class MappingMetadata(Committable, Protocol):
    """The metadata of such a target, as far as this module goes."""

    @property
    def mode(self) -> Mode: ...


M = TypeVar("M", bound=MappingMetadata)


class MappingTarget(Target, Generic[M]):
    """A target that keeps metadata about where its blocks are.

    Args:
        words: of the table line.
        devices: those that the table line names first, in its order; the first holds the metadata.
        backing: those of `devices` that hold the data which the metadata vouches for.
        metadata: shared with the other table of the mapped device.
        disks: records which disks belong to the metadata.
        block_size: bytes of a region or a block.
        metadata_failed, aborts_on_loss: of `Committer`.

    Attributes:
        context: the name of the metadata context.
    """

    context: ClassVar[str]

    can_discard = True

    def __init__(
        self,
        ctx: TargetContext,
        *,
        words: Sequence[str],
        devices: Sequence[Device],
        backing: Sequence[Device],
        metadata: M,
        disks: DiskRecords,
        block_size: int,
        metadata_failed: Callable[[], None] | None = None,
        aborts_on_loss: bool = False,
    ) -> None:
        super().__init__(ctx)
        self.can_write_zeroes = all(device.can_write_zeroes for device in backing)
        self.can_fast_zero = all(device.can_fast_zero for device in backing)
        self._words = words
        self._devices = devices
        self._disks = disks
        self._metadata = metadata
        self._committer = Committer(
            ctx.name,
            metadata,
            devices[0],
            backing,
            ctx.clock,
            committed=self._committed,
            failed=self._failed,
            rests_on_unflushed=self._rests_on_unflushed,
            metadata_failed=metadata_failed,
            aborts_on_loss=aborts_on_loss,
        )
        self._block_size = block_size
        self._passdown = False
        self._discard_granularity = block_size  # of what is not passed down
        self._is_suspended = True

    async def dtr(self) -> None:
        assert self._is_suspended
        assert self._committer.is_quiet, "a commit would meet a closed device"
        for device in self.iterate_devices():
            await self.ctx.close_device(device)
        # The parts refer to each other. Without this, metadata and policy, which may be large, would stay in
        # memory until the garbage collector runs.
        for part in (*self._own_parts(), self._committer, self):
            vars(part).clear()

    def _own_parts(self) -> Sequence[object]:
        """The objects that this target alone has, and that refer to each other. They are not used after `dtr`."""
        raise NotImplementedError

    # ---- what a subclass says ----

    def _held_back(self) -> list[Bio]:
        """Forget, and return, the bios that have not begun; their offsets are relative to the target."""
        raise NotImplementedError

    def _committed(self) -> None:
        """A commit is done."""
        raise NotImplementedError

    def _rests_on_unflushed(self, lost: Sequence[Device]) -> bool:
        """Whether what is in core rests on data which these devices may have lost: see `Committer`."""
        raise NotImplementedError

    def _look_at_mode(self) -> None:
        """The mode of the metadata may have changed: decide again what `map` may do."""
        raise NotImplementedError

    async def _record_stop(self) -> None:
        """Commit all that a crash would forget, as a clean shutdown, if there is no doubt about it."""
        raise NotImplementedError

    async def _get_ready(self) -> None:
        """`preresume`. Raises: TableError: refused."""
        raise NotImplementedError

    def _status_line(self) -> str:
        """The INFO words. Not in mode FAIL."""
        raise NotImplementedError

    def _describe(self, offset: int, length: int) -> list[Extent]:
        """The metadata context's answer, or its beginning; `offset` is relative to the target."""
        raise NotImplementedError

    # ---- life ----

    async def preresume(self) -> None:
        try:
            await self._get_ready()
        except BaseException:
            # It has committed perhaps, and that may have begun a compaction. The table that runs next, or is
            # destroyed next, shares the metadata and the device.
            await self._committer.quiesce()
            raise

    def resume(self) -> None:
        self._is_suspended = False
        self._committer.watch()
        self._look_at_mode()
        if self._metadata.changed and self._metadata.mode is Mode.RW:
            self._committer.note_change()

    def push_back(self) -> list[Bio]:
        bios = self._held_back()
        for bio in bios:
            bio.offset += self.begin
        return bios

    def _give_back(self, bio: Bio) -> None:
        """A suspend leaves this bio undone; its offset is relative to the target."""
        bio.offset += self.begin
        self.ctx.give_back(bio)

    async def postsuspend(self) -> None:
        self.presuspend()
        await self.quiesce()
        await self._record_stop()
        await self._committer.quiesce()
        self._committer.unwatch()
        self._is_suspended = True

    async def _note_stop(
        self, samples: Callable[[], Mapping[str, Sequence[int]]]
    ) -> None:
        """Have the last commit record what the disks are like.

        Args: samples: tells of which offsets of which disk a sample is taken.
        """
        if not (self._disks.are_known and self._metadata.mode is Mode.RW):
            return
        # A disk that is marked with a generation must have all that is recorded with it: so commit first.
        if await self._committer.commit():
            await self._disks.note_stop(samples())

    # ---- failures ----

    def _failed(self) -> None:
        """The metadata has gone to mode RO or FAIL."""
        self._look_at_mode()
        self.ctx.event()

    def _is_failed(self) -> bool:
        return self._metadata.mode is Mode.FAIL

    def _broken(self, error: BaseException) -> None:
        """An unexpected exception has come up, which is a bug: trust nothing any more."""
        log.critical("%s: switching to fail mode", self.ctx.name, exc_info=error)
        self._metadata.fail()
        self._committer.has_failed = True
        self._failed()

    def has_lost_writes(self) -> bool:
        return self._committer.has_failed

    # ---- words ----

    async def status(self, *, noflush: bool = False) -> str:
        if self._is_failed():
            return "Fail"
        if not (noflush or self._is_suspended or self._committer.has_failed):
            await self._committer.commit()
            if self._is_failed():
                return "Error"
        return self._status_line()

    def table_words(self) -> str:
        # As the kernel shows major:minor for whatever name was given: one that means the same
        # device in every directory, and today. The other words stay as they were typed.
        names = [device.loadable_name for device in self._devices]
        return join_words((*names, *self._words[len(names) :]))

    # ---- devices ----

    def _pass_down(self, role: str, device: Device) -> None:
        """Pass discards on to `device`, if it takes any."""
        self._passdown = device.can_discard
        if not device.can_discard:
            log.warning(
                "%s: %s %s does not support discards: no passdown",
                self.ctx.name,
                role,
                device.name,
            )

    @property
    def contexts(self) -> tuple[str, ...]:
        return (self.context,)

    async def context_extents(
        self, context: str, offset: int, length: int
    ) -> list[Extent]:
        if context != self.context:
            return await super().context_extents(context, offset, length)
        return self._describe(offset - self.begin, length)

    def io_hints(self, limits: QueueLimits) -> QueueLimits:
        size = self._block_size
        if not self._passdown:
            granularity = self._discard_granularity
            limits = limits._replace(discard_granularity=granularity)
        if limits.io_opt < size or limits.io_opt % size:
            limits = limits._replace(io_min=size, io_opt=size)
        return limits

    def iterate_devices(self) -> Iterable[Device]:
        return self._devices
