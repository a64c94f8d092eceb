# SPDX-License-Identifier: Apache-2.0
"""From a table line to open devices, policy and metadata, in the kernel's order.

Every check that needs no metadata comes first; only then is a missing metadata file created or an
all-zero one formatted, and not if the cache device holds data: then its metadata is elsewhere.
Whatever fails, what was opened is closed again.

Opening changes nothing on disk: whether the last shutdown was clean stands there until the first
resume succeeds. So a table that is refused, or loaded and never resumed, costs nothing.
"""

import errno as errnos
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from nbdtarget.bio import OP_FLUSH, OP_NAMES
from nbdtarget.common.errors import DeviceError
from nbdtarget.common.permissions import OTHER_DISK
from nbdtarget.devices import resolve
from nbdtarget.devices.base import Device
from nbdtarget.devices.content import maybe_content
from nbdtarget.policies.base import Policy, PolicyConfigError
from nbdtarget.policies.registry import policy_type
from nbdtarget.targets import metadata_io
from nbdtarget.targets.base import TargetContext
from nbdtarget.targets.cache.discards import DiscardBits
from nbdtarget.targets.cache.table import (
    ARGUMENTS_MIN,
    BAD_FEATURE_COUNT,
    PASSTHROUGH,
    WRITETHROUGH,
    Options,
    parse_block_size,
    parse_options,
)
from nbdtarget.targets.disks import CACHE_ROLE, ORIGIN_ROLE, DiskRecords, Role
from nbdtarget.targets.opening import NEWER_FEATURES, Opening
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.cache.records import NR_CBLOCKS_MAX
from nbdtarget_metadata.errors import BlockSizeMismatch
from nbdtarget_metadata.mode import Mode
from nbdtarget_metadata.operations import Steps, without_flushes

__all__ = ["Parts", "construct", "make_policy"]

NR_CBLOCKS_WARNING: Final = 1 << 20

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Parts:
    """The parts of a cache target.

    Attributes:
        words: the table line's.
        metadata: not started: nothing in it may change yet. Shared with this device's other table.
        policy: for the size that the cache device has now; it knows no mappings yet.
        discards: none yet.
        stale: why what is mapped and clean is not to be believed; empty: it is.
    """

    words: tuple[str, ...]
    options: Options
    block_size: int
    metadata_device: Device
    cache: Device
    origin: Device
    metadata: CacheMetadata
    policy: Policy
    discards: DiscardBits
    disks: DiskRecords
    stale: str


async def construct(ctx: TargetContext, words: Sequence[str]) -> Parts:
    """Open everything that the table line names.

    Raises: ConstructorError, with the kernel's text first; then nothing stays open.
    """
    async with Opening(ctx, "cache", "Error creating metadata object") as opening:
        if len(words) < ARGUMENTS_MIN:
            # A count of features with none behind it is a bad count, says the kernel.
            is_count = len(words) == ARGUMENTS_MIN - 1 and words[-1] != "0"
            raise opening.error(BAD_FEATURE_COUNT if is_count else "Insufficient args")
        metadata_name, cache_name, origin_name, block_word = words[:4]
        metadata_device = await opening.maybe_metadata_device(metadata_name)
        cache = await opening.device(CACHE_ROLE, cache_name)
        origin = await _open_origin(opening, ctx, origin_name, words[4:])
        if origin.size < ctx.length:
            raise opening.error("Device size larger than cached device")
        block_size = parse_block_size(block_word, cache_size=cache.size)
        options = parse_options(words[4:])
        nr_cblocks = cache.size // block_size
        if nr_cblocks > NR_CBLOCKS_MAX:
            raise opening.error(
                "Too many cache blocks. Consider increasing the block size"
            )
        try:
            policy = make_policy(ctx, options, nr_cblocks, block_size)
        except PolicyConfigError as error:
            reason = f"Error setting cache policy's config values: {error}"
            raise opening.error(reason) from error
        if metadata_device is None:
            metadata_device = await opening.create_metadata_device(
                metadata_name,
                CacheMetadata.device_size_for(nr_cblocks),
                CACHE_ROLE,
                cache,
            )
        metadata = await _open_metadata(
            opening, metadata_device, cache, block_size, ctx.length
        )
        disks = DiskRecords(
            ctx.name,
            metadata,
            (Role(CACHE_ROLE, cache), Role(ORIGIN_ROLE, origin)),
            ctx.shared(metadata_device),
        )
        stale = await _check_disks(
            opening, ctx, disks, metadata, cache, metadata_device.name
        )
        opening.keep()
    if nr_cblocks > NR_CBLOCKS_WARNING:
        log.warning(
            "%s: %d cache blocks take much memory, and time to load;"
            " consider increasing the block size",
            ctx.name,
            nr_cblocks,
        )
    return Parts(
        tuple(words),
        options,
        block_size,
        metadata_device,
        cache,
        origin,
        metadata,
        policy,
        DiscardBits(block_size, ctx.length),
        disks,
        stale,
    )


async def _check_disks(
    opening: Opening,
    ctx: TargetContext,
    disks: DiskRecords,
    metadata: CacheMetadata,
    cache: Device,
    metadata_name: str,
) -> str:
    """Refuse disks that do not belong together; return why clean blocks are stale, if they are.

    Raises: ConstructorError.
    """
    nr_dirty = metadata.nr_dirty
    stale = ""
    findings = await disks.look((CACHE_ROLE, ORIGIN_ROLE))
    for finding in findings:
        if not finding.is_allowed(ctx.permissions) and not (
            # The origin has everything: any empty disk can take the place of a lost cache.
            finding.role == CACHE_ROLE
            and not nr_dirty
            and await maybe_content(cache) is None
        ):
            raise opening.error(
                finding.refusal(metadata_name), allowed_by=finding.allowed_by
            )
        if finding.is_same and not finding.changed:
            continue
        if finding.changed and nr_dirty and OTHER_DISK not in ctx.permissions:
            why = f"{nr_dirty} blocks are waiting to be written back"
            raise opening.error(
                finding.refusal_of_change(metadata_name, why),
                allowed_by=OTHER_DISK,
            )
        stale = stale or (
            f"{finding.role} {finding.found.name}:"
            f" {finding.changed or finding.comparison.reason}"
        )
    is_used = metadata.nr_mapped > 0
    await opening.refuse_images(disks.known_roles(findings, is_used=is_used))
    return stale


def make_policy(
    ctx: TargetContext, options: Options, nr_cblocks: int, block_size: int
) -> Policy:
    """Make the policy that the table line names, for `nr_cblocks`, and set what it says.

    Raises: PolicyConfigError.
    """
    policy = policy_type(options.policy_name)(
        nr_cblocks,
        origin_size=ctx.length,
        block_size=block_size,
        now_ns=ctx.clock.now_ns(),
    )
    for key, value in options.policy_config:
        warning = policy.set_config_value(key, value)
        if warning is not None:
            log.warning("%s: %s", ctx.name, warning)
    if options.mode == PASSTHROUGH:
        policy.allow_migrations(False)
    return policy


async def _open_origin(
    opening: Opening, ctx: TargetContext, name: str, option_words: Sequence[str]
) -> Device:
    """Open the origin; refuse a table that would write to one that can only be read. Raises: ConstructorError."""
    if not resolve.is_read_only(name):
        return await opening.device(ORIGIN_ROLE, name)
    if not ctx.read_only:
        reason = "the origin can only be read: load the table read-only (--readonly)"
        raise opening.error(reason, errnos.EROFS)
    if parse_options(option_words).mode != WRITETHROUGH:
        reason = "the origin can only be read: the mode must be writethrough"
        raise opening.error(reason, errnos.EROFS)
    return await opening.device(ORIGIN_ROLE, name, read_only=True)


async def _open_metadata(
    opening: Opening,
    device: Device,
    cache: Device,
    block_size: int,
    origin_size: int,
) -> CacheMetadata:
    """Raises: ConstructorError."""
    metadata = await opening.metadata(
        device,
        CacheMetadata,
        check=lambda known: _check_block_size(known, block_size),
        read=lambda: _read_metadata(device, block_size),
        make=lambda: CacheMetadata.format(
            device_size=device.size,
            block_size=block_size,
            origin_size=origin_size,
            nr_cblocks=cache.size // block_size,
            uuid=uuid.uuid4().bytes,
        ),
        role=CACHE_ROLE,
        disk=cache,
    )
    # With `needs_check` it is `_read_metadata` that has made it read-only.
    if metadata.mode is not Mode.RW and not metadata.needs_check:
        raise opening.no_write_access(NEWER_FEATURES)
    return metadata


def _check_block_size(metadata: CacheMetadata, block_size: int) -> None:
    if metadata.block_size != block_size:
        raise BlockSizeMismatch(stored=metadata.block_size, given=block_size)


async def _read_metadata(device: Device, block_size: int) -> CacheMetadata:
    """Read what is on `device`. If it can be read, but not written, the result is in mode RO."""

    def open_() -> Steps[CacheMetadata]:
        return CacheMetadata.open(device_size=device.size, block_size=block_size)

    try:
        return await metadata_io.run(device, open_())
    except DeviceError as error:
        if error.op != OP_NAMES[OP_FLUSH]:
            raise
        # The metadata cannot be written, but they can be read, and tell where the data are.
        metadata = await metadata_io.run(device, without_flushes(open_()))
        metadata.abort()
        metadata.blame()
        log.error(
            "%s: %s: the cache is read-only until its table is loaded again",
            device.name,
            error,
        )
        return metadata
