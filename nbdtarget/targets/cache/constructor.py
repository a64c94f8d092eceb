# SPDX-License-Identifier: Apache-2.0
"""From a table line to open devices, policy and metadata, in the kernel's order.

Every check that needs no metadata comes first; only then is a missing metadata file created or an
all-zero one formatted. Whatever fails, what was opened is closed again.

Opening changes nothing on disk: whether the last shutdown was clean stands there until the first
resume succeeds. So a table that is refused, or loaded and never resumed, costs nothing.
"""

import errno as errnos
import logging
import uuid
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final, TypeVar

from metadata.cache import CacheMetadata
from metadata.cache_records import NR_CBLOCKS_MAX
from metadata.errors import (
    BlockSizeMismatch,
    CorruptMetadata,
    MetadataError,
    MetadataTooSmall,
    NotFormatted,
    NotOurs,
    ReadOnlyMetadata,
)
from metadata.mode import Mode
from nbdtarget import metadata_io
from nbdtarget.devices.base import Device
from nbdtarget.errors import ConstructorError, DeviceError, ResolveError
from nbdtarget.policies.base import Policy, PolicyConfigError
from nbdtarget.policies.registry import policy_type
from nbdtarget.targets.base import TargetContext
from nbdtarget.targets.cache.table import (
    ARGUMENTS_MIN,
    PASSTHROUGH,
    Options,
    parse_block_size,
    parse_options,
)

__all__ = ["Parts", "construct", "make_policy"]

SHARED_KEY: Final = "cache"
NR_CBLOCKS_WARNING: Final = 1 << 20

NO_WRITE_ACCESS: Final = (
    "Unable to get write access to metadata, please check/repair metadata."
)

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Parts:
    """What a cache target is made of.

    Attributes:
        words: the table line's.
        metadata: not started: nothing in it may change yet. Shared with this device's other table.
        policy: for the size that the cache device has now; it knows no mappings yet.
    """

    words: tuple[str, ...]
    options: Options
    block_size: int
    metadata_device: Device
    cache: Device
    origin: Device
    metadata: CacheMetadata
    policy: Policy


async def construct(ctx: TargetContext, words: Sequence[str]) -> Parts:
    """Open everything that the table line names.

    Raises: ConstructorError, with the kernel's text first; then nothing stays open.
    """
    if len(words) < ARGUMENTS_MIN:
        raise _error("Insufficient args")
    metadata_name, cache_name, origin_name, block_word = words[:4]
    async with AsyncExitStack() as opened:
        metadata_device = await _opened(
            "Error opening metadata device", ctx.maybe_open_device(metadata_name)
        )
        if metadata_device is not None:
            opened.push_async_callback(ctx.close_device, metadata_device)
        cache = await _opened("Error opening cache device", ctx.open_device(cache_name))
        opened.push_async_callback(ctx.close_device, cache)
        origin = await _opened(
            "Error opening origin device", ctx.open_device(origin_name)
        )
        opened.push_async_callback(ctx.close_device, origin)
        if origin.size < ctx.length:
            raise _error("Device size larger than cached device")
        block_size = parse_block_size(block_word, cache_size=cache.size)
        options = parse_options(words[4:])
        nr_cblocks = cache.size // block_size
        if nr_cblocks > NR_CBLOCKS_MAX:
            raise _error("Too many cache blocks. Consider increasing the block size")
        policy = _policy(ctx, options, nr_cblocks, block_size)
        if metadata_device is None:
            metadata_device = await _opened(
                "Error opening metadata device",
                ctx.create_device(
                    metadata_name, CacheMetadata.device_size_for(nr_cblocks)
                ),
            )
            opened.push_async_callback(ctx.close_device, metadata_device)
        metadata = await _open_metadata(ctx, metadata_device, block_size, nr_cblocks)
        opened.pop_all()
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
    )


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


def _policy(
    ctx: TargetContext, options: Options, nr_cblocks: int, block_size: int
) -> Policy:
    try:
        return make_policy(ctx, options, nr_cblocks, block_size)
    except PolicyConfigError as error:
        raise _error(f"Error setting cache policy's config values: {error}") from error


async def _open_metadata(
    ctx: TargetContext, device: Device, block_size: int, nr_cblocks: int
) -> CacheMetadata:
    """Return the one metadata object of this device, from its other table or from disk.

    One that has failed is left to the table that saw it fail: a table that is loaded after
    that starts over from what is on disk, which mostly says `needs_check`, and is refused.
    """
    shared = ctx.shared(device)
    metadata = shared.get(SHARED_KEY)
    try:
        if isinstance(metadata, CacheMetadata) and metadata.mode is Mode.RW:
            if metadata.block_size != block_size:
                raise BlockSizeMismatch(stored=metadata.block_size, given=block_size)
        else:
            metadata = await _read_metadata(device, block_size, ctx.length, nr_cblocks)
            for note in metadata.notes:
                log.warning("%s: %s: %s", ctx.name, device.name, note)
            if metadata.mode is not Mode.RW:
                raise ReadOnlyMetadata  # features that we may only read
    except MetadataError as error:
        if isinstance(error, CorruptMetadata) and error.found == "needs_check":
            raise _error(NO_WRITE_ACCESS) from error
        reason = f"Error creating metadata object: {error}"
        raise _error(reason, _errno(error)) from error
    except DeviceError as error:
        reason = f"Error creating metadata object: {error}"
        raise _error(reason, error.errno) from error
    shared[SHARED_KEY] = metadata
    return metadata


async def _read_metadata(
    device: Device, block_size: int, origin_size: int, nr_cblocks: int
) -> CacheMetadata:
    try:
        return await metadata_io.run(
            device, CacheMetadata.open(device_size=device.size, block_size=block_size)
        )
    except NotFormatted:
        return await metadata_io.run(
            device,
            CacheMetadata.format(
                device_size=device.size,
                block_size=block_size,
                origin_size=origin_size,
                nr_cblocks=nr_cblocks,
                uuid=uuid.uuid4().bytes,
            ),
        )


async def _opened(reason: str, opening: Awaitable[T]) -> T:
    try:
        return await opening
    except ResolveError as error:
        raise _error(f"{reason}: {error}", error.errno) from error


def _errno(error: MetadataError) -> int:
    """The kernel's errno for metadata that cannot be used."""
    match error:
        case MetadataTooSmall():
            return errnos.ENOSPC
        case NotOurs():
            return errnos.EILSEQ
        case _:
            return errnos.EINVAL


def _error(reason: str, errno: int = errnos.EINVAL) -> ConstructorError:
    return ConstructorError(reason, errno, "cache")
