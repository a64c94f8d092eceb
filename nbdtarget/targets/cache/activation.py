# SPDX-License-Identifier: Apache-2.0
"""Before I/O may come: what a resume refuses, and what it loads. And at the end: what a stop records.

Theory of operation. A table is constructed while another one, with the same metadata, may still
be at work. So nothing that can change meanwhile is looked at before preresume: then the other
table is suspended, and a full sync has recorded what it left. In the kernel's order:

    1  an earlier resume of this table failed half-way               EINVAL: load it again
    2  passthrough, and what is dirty is not known for sure          EINVAL
    3  the cache device is larger than when this was constructed     EINVAL: load it again
       it is smaller, and a dirty block would be cut off             EINVAL
    4  passthrough, and a block is dirty                             EBUSY
       the origin is smaller, and a dirty block would be cut off     EFBIG
    -  the metadata device has no room for a cache grown so far      ENOSPC
    -  rewrite one superblock slot by a commit that changes nothing, if the metadata were just opened:
       what was read of it may be in a page cache only (metadata/nbdtarget_metadata/log/commit.py)
    -  after a crash of a cache that did not write back: drop all mappings, see below
    5  resize the metadata: clean mappings behind an end are removed; so are all of them if the
       constructor has found that a disk was exchanged or changed without us
    6  load mappings into the policy, and discards, if the origin was surely not written to since
    7  have CLEAN_SHUTDOWN cleared, durably, in the commit that makes 5 durable, too, and that
       rewrites the other slot

A refusal, 1 to 4, changes nothing: neither in core, nor what is recorded on disk. So the recorded dirty bits are
not lost, and another table can be loaded and resumed. Here the kernel differs: it takes a shrink over a dirty
block for a failure of the metadata, which then needs a check.

A later resume of the same table does 3 if the cache device has shrunk, and 7; if the device has grown, it goes
on with the blocks that it has (where the kernel refuses), for the next table to take the rest. Its policy is
then replaced by one of the new size, which is loaded with the other one's mappings and hints: a policy
that went on would promote into blocks that are gone.

It is *known for sure* which blocks are dirty if the metadata is recorded clean now (a full sync of the
table before this one is as good as a shutdown), or has a dirty log, or says that the origin has everything.

*The origin has everything* while the mode is writethrough or passthrough and no block is dirty; the metadata says
so from step 7 on, or from the commit after the last dirty block was written back, and a table in writeback mode takes
that back in step 7. After a crash the two copies of a block that was just written may differ,
and the origin may have been used alone meanwhile, which is allowed. So all mappings are
given up then: nothing is written back, and nothing old is read.

Mode RO: there is nothing to commit. A metadata device that can be read, but not written, leads there, too: it serves
reads, and refuses each FLUSH; the status line says `needs_check`. The mappings in core are loaded and can be read, as they still tell
where the data are; a resize is refused. Mode FAIL: a table that had been resumed before is resumed, to fail
all I/O; a new one is refused.

What a crash leaves: before the commit of step 7 what was there before; after it mappings only.
"""

import asyncio
import errno as errnos
import logging
from array import array
from typing import Final

from nbdtarget.common.errors import TableError
from nbdtarget.policies.base import MappingError, Policy, PolicyConfigError
from nbdtarget.targets import metadata_io
from nbdtarget.targets.base import TargetContext
from nbdtarget.targets.cache.constructor import Parts, make_policy
from nbdtarget.targets.cache.table import PASSTHROUGH, WRITEBACK
from nbdtarget.targets.committer import Committer
from nbdtarget.targets.disks import ORIGIN_ROLE
from nbdtarget.targets.opening import refuse_stale
from nbdtarget_metadata.cache.superblock import PolicyIdentity
from nbdtarget_metadata.errors import CannotShrink, FailedMetadata, MetadataError
from nbdtarget_metadata.mode import Mode

__all__ = ["Activation"]

STEP_BLOCKS: Final = 500  # looked at, and loaded, before others have their turn
STEP_HINTS: Final = 4096  # asked for between two turns of the loop: a millisecond or so

log = logging.getLogger(__name__)


class Activation:
    """Takes a cache's parts into use at each resume. See the module head.

    Args:
        parts: `parts.policy` may be another one after `preresume`. `parts.discards` are filled by the first one.
        committer: of `parts.metadata`.
    """

    def __init__(
        self,
        ctx: TargetContext,
        parts: Parts,
        committer: Committer,
    ) -> None:
        self._ctx = ctx
        self._parts = parts
        self._committer = committer
        self._nr_cblocks = parts.cache.size // parts.block_size  # that this table has
        self._is_sized = False
        self._is_loaded = False

    async def preresume(self) -> Policy:
        """Check, resize, load, and start the metadata; return the policy to ask from now on.

        Raises: TableError: refused, with the kernel's text.
        Durable: that the cache is in use, before anything can change.
        """
        metadata = self._parts.metadata
        refuse_stale(metadata)
        if metadata.mode is Mode.FAIL and self._is_loaded:
            return self._parts.policy
        nr_cblocks = self._check()
        # First, as it may take long, and before anything is written.
        believes_discards = not self._is_loaded and await self._look_again()
        try:
            if metadata.needs_rewrite:
                await self._commit()
            # The other slot would be due in a second: the commit of `_start` takes care of it.
            await self._committer.quiesce()
            if metadata.mode is Mode.RO and not self._is_loaded:
                self._check_read_only()
            await self._give_up()
            await self._resize(nr_cblocks)
            await self._drop_stale()
            if not self._is_loaded or nr_cblocks != self._nr_cblocks:
                await self._load(nr_cblocks)
            if not self._is_loaded:
                discarded = metadata.discarded if believes_discards else None
                self._parts.discards.load(discarded)
            if metadata.mode is Mode.RW:
                await self._start()
        except MetadataError as error:
            raise TableError(f"unable to resume cache: {error}") from error
        self._is_loaded = True
        return self._parts.policy

    async def prepare_stop(self) -> None:
        """Put into the metadata what a crash would forget; a commit of the clean shutdown comes next.

        Nothing may change meanwhile: neither mappings nor what is dirty. Raises: MetadataError.
        """
        policy, metadata = self._parts.policy, self._parts.metadata
        hints: array[int] | None = None
        if policy.hint_size:
            hints = array("I")
            nr_cblocks = metadata.nr_cblocks
            for begin in range(0, nr_cblocks, STEP_HINTS):
                end = min(begin + STEP_HINTS, nr_cblocks)
                hints.extend(map(policy.get_hint, range(begin, end)))
                await asyncio.sleep(0)
        metadata.prepare_shutdown(
            policy=_recorded(policy),
            hints=hints,
            discarded=self._parts.discards.as_recorded(),
        )

    def _check_read_only(self) -> None:
        """Refuse what cannot be served without recording anything. Raises: TableError."""
        metadata = self._parts.metadata
        if self._parts.stale or metadata.gives_up_mappings:
            raise TableError(
                f"unable to resume cache: {self._parts.metadata_device.name} cannot be"
                " written, and cached blocks that may be stale must be given up",
                errnos.EIO,
            )

    def _check(self) -> int:
        """Refuse, by steps 1 to 4; return how many cache blocks there are now."""
        metadata = self._parts.metadata
        if self._is_sized and not self._is_loaded:
            raise TableError(
                "unable to resume cache due to missing proper cache table reload"
            )
        enters_passthrough = (
            self._parts.options.mode == PASSTHROUGH and not self._is_loaded
        )
        if enters_passthrough and not (
            metadata.is_recorded_clean
            or metadata.dirty_log
            or metadata.is_recorded_complete
        ):
            raise TableError(
                "unable to resume into passthrough mode after unclean shutdown"
            )
        nr_cblocks = self._checked_size()
        self._is_sized = True
        if enters_passthrough and metadata.nr_dirty:
            raise TableError(
                "cannot enter passthrough mode unless all blocks are clean",
                errnos.EBUSY,
            )
        return nr_cblocks

    def _checked_size(self) -> int:
        """Return how many cache blocks there are now. Raises: TableError: they cannot be used."""
        parts = self._parts
        metadata = parts.metadata
        nr_cblocks = parts.cache.size // parts.block_size
        if self._is_loaded:
            nr_cblocks = min(nr_cblocks, self._nr_cblocks)
        elif nr_cblocks > self._nr_cblocks:
            raise TableError("unable to extend cache due to missing cache table reload")
        if not nr_cblocks:
            raise TableError("Data block size is larger than the cache device")
        if nr_cblocks < metadata.nr_cblocks:
            dirty = metadata.dirty.find(1, nr_cblocks)
            if dirty >= 0:
                raise TableError(str(CannotShrink("cache", dirty)))
        if nr_cblocks > metadata.nr_cblocks_max:
            raise TableError(
                f"unable to extend cache to {nr_cblocks} cache blocks;"
                f" the metadata device has room for {metadata.nr_cblocks_max}",
                errnos.ENOSPC,
            )
        return nr_cblocks

    async def _give_up(self) -> None:
        """Drop the mappings after a crash of a cache that did not write back. Raises: MetadataError."""
        metadata = self._parts.metadata
        is_old = metadata.is_distrusted and not self._is_loaded
        if (metadata.gives_up_mappings or is_old) and metadata.mode is Mode.RW:
            nr_mapped = metadata.nr_mapped
            dropping = metadata.drop_clean()
            await metadata_io.run(self._parts.metadata_device, dropping)
            if nr_mapped:
                log.warning(
                    "%s: was not shut down cleanly: the origin has everything, and %d"
                    " cached blocks are given up",
                    self._ctx.name,
                    nr_mapped,
                )

    async def _resize(self, nr_cblocks: int) -> None:
        """Make the metadata's sizes those of the table and of the cache device.

        The origin first: it may be refused still. Raises: TableError, MetadataError.
        """
        metadata, device = self._parts.metadata, self._parts.metadata_device
        if metadata.origin_size != self._ctx.length:
            try:
                resizing = metadata.resize_origin(self._ctx.length)
                await metadata_io.run(device, resizing)
            except CannotShrink as error:
                raise TableError(str(error), errnos.EFBIG) from error
        if metadata.nr_cblocks != nr_cblocks:
            await metadata_io.run(device, metadata.resize_cache(nr_cblocks))

    async def _look_again(self) -> bool:
        """Look at the origin once more: since the load another table may have written to it.

        Returns whether what is recorded as discarded may be believed: if the origin was surely not
        written to. A discarded block that is promoted is filled with zeroes, and these are written back: that
        would destroy what was written to the origin alone.
        Raises: TableError: it was written to, and a dirty block would overwrite that.
        """
        parts = self._parts
        for finding in () if parts.stale else await parts.disks.look((ORIGIN_ROLE,)):
            if not finding.changed:
                continue
            if nr_dirty := parts.metadata.nr_dirty:
                why = f"{nr_dirty} blocks are waiting to be written back"
                name = parts.metadata_device.name
                raise TableError(finding.refusal_of_change(name, why))
            parts.stale = f"{finding.role} {finding.found.name}: {finding.changed}"
        return not (parts.stale or await parts.disks.may_have_changed(ORIGIN_ROLE))

    async def _drop_stale(self) -> None:
        """Give up the clean blocks if a disk was exchanged or changed. Raises: MetadataError."""
        parts = self._parts
        if not parts.stale or self._is_loaded or parts.metadata.mode is not Mode.RW:
            return
        nr_before = parts.metadata.nr_mapped
        await metadata_io.run(parts.metadata_device, parts.metadata.drop_clean())
        nr_dropped = nr_before - parts.metadata.nr_mapped
        if nr_dropped:
            log.warning(
                "%s: %s: %d cached blocks may be stale and are dropped",
                self._ctx.name,
                parts.stale,
                nr_dropped,
            )

    async def _load(self, nr_cblocks: int) -> None:
        """Load the mappings into a policy for `nr_cblocks`. Raises: TableError, MetadataError."""
        metadata = self._parts.metadata
        if metadata.mode is Mode.FAIL:
            raise FailedMetadata
        try:
            policy = self._policy_for(nr_cblocks)
            nr_left = metadata.nr_mapped
            for begin in range(0, metadata.nr_cblocks, STEP_BLOCKS):
                if not nr_left:
                    break  # mostly the rest is free: looking at all of it would take long
                step = metadata.mappings(_recorded(policy), begin, begin + STEP_BLOCKS)
                for mapping in step:
                    policy.load_mapping(*mapping)
                    nr_left -= 1
                await asyncio.sleep(0)
        except (MappingError, PolicyConfigError) as error:
            raise TableError(f"could not load cache mappings: {error}") from error
        self._parts.policy = policy
        self._nr_cblocks = nr_cblocks

    def _policy_for(self, nr_cblocks: int) -> Policy:
        """Return this table's policy, or an empty one like it if the size has changed."""
        parts = self._parts
        if nr_cblocks == self._nr_cblocks:
            return parts.policy
        policy = make_policy(self._ctx, parts.options, nr_cblocks, parts.block_size)
        for key, value in parts.policy.config_values():
            policy.set_config_value(key, value)  # messages may have changed it
        return policy

    async def _start(self) -> None:
        """Have the metadata admit changes. Raises: TableError, MetadataError."""
        metadata = self._parts.metadata
        # The disks are recorded by the same commit, and marked after it.
        await self._parts.disks.prepare()
        options = self._parts.options
        starting = metadata.start(
            dirty_log=options.dirty_log, writes_back=options.mode == WRITEBACK
        )
        await metadata_io.run(self._parts.metadata_device, starting)
        await self._commit()
        if metadata.mode is Mode.RW:
            assert metadata.may_change
            await self._parts.disks.confirm()

    async def _commit(self) -> None:
        """Raises: TableError; not if the metadata device is to blame: then the mode is RO."""
        if await self._committer.commit():
            return
        metadata = self._parts.metadata
        if metadata.mode is not Mode.RO or not metadata.needs_check:
            raise TableError(
                "unable to resume cache: metadata commit failed", errnos.EIO
            )


def _recorded(policy: Policy) -> PolicyIdentity:
    """How the metadata names a policy, to tell which policy's hints they are."""
    return PolicyIdentity(policy.name, policy.version, policy.hint_size)
