# SPDX-License-Identifier: Apache-2.0
"""From a table line to open devices and metadata, in the kernel's order.

Every check that needs no metadata comes first; only then is a missing metadata file created or an
all-zero one formatted. Whatever fails, what was opened is closed again.
"""

import errno as errnos
import logging
import uuid
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final, TypeVar

from metadata.clone import NR_REGIONS_MAX, CloneMetadata
from metadata.errors import (
    GeometryMismatch,
    MetadataError,
    MetadataTooSmall,
    NotFormatted,
    NotOurs,
)
from metadata.mode import Mode
from nbdtarget import metadata_io
from nbdtarget.devices.base import Device
from nbdtarget.errors import ConstructorError, DeviceError, ResolveError
from nbdtarget.targets.base import TargetContext
from nbdtarget.targets.clone.table import (
    ARGUMENTS_MIN,
    Options,
    parse_options,
    parse_region_size,
)

__all__ = ["Parts", "construct"]

SHARED_KEY: Final = "clone"

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Parts:
    """What a clone target is made of."""

    words: tuple[str, ...]
    options: Options
    region_size: int
    metadata_device: Device
    destination: Device
    source: Device
    metadata: CloneMetadata


async def construct(ctx: TargetContext, words: Sequence[str]) -> Parts:
    """Open everything that the table line names.

    Raises: ConstructorError, with the kernel's text first; then nothing stays open.
    """
    if len(words) < ARGUMENTS_MIN:
        raise _error("Invalid number of arguments")
    metadata_name, destination_name, source_name, region_word = words[:ARGUMENTS_MIN]
    async with AsyncExitStack() as opened:
        metadata_device = await _opened(
            "Error opening metadata device", ctx.maybe_open_device(metadata_name)
        )
        if metadata_device is not None:
            opened.push_async_callback(ctx.close_device, metadata_device)
        destination = await _opened(
            "Error opening destination device", ctx.open_device(destination_name)
        )
        opened.push_async_callback(ctx.close_device, destination)
        if destination.size < ctx.length:
            raise _error("Device size larger than destination device")
        source = await _opened(
            "Error opening source device", ctx.open_device(source_name, read_only=True)
        )
        opened.push_async_callback(ctx.close_device, source)
        if source.size < ctx.length:
            raise _error("Device size larger than source device")
        block_size = max(source.logical_block_size, destination.logical_block_size)
        region_size = parse_region_size(region_word, block_size=block_size)
        nr_regions = -(-ctx.length // region_size)
        if nr_regions > NR_REGIONS_MAX:
            raise _error("Too many regions. Consider increasing the region size")
        options = parse_options(words[ARGUMENTS_MIN:])
        if metadata_device is None:
            metadata_device = await _opened(
                "Error opening metadata device",
                ctx.create_device(
                    metadata_name, CloneMetadata.device_size_for(nr_regions)
                ),
            )
            opened.push_async_callback(ctx.close_device, metadata_device)
        metadata = await _open_metadata(ctx, metadata_device, region_size)
        opened.pop_all()
    return Parts(
        tuple(words),
        options,
        region_size,
        metadata_device,
        destination,
        source,
        metadata,
    )


async def _open_metadata(
    ctx: TargetContext, device: Device, region_size: int
) -> CloneMetadata:
    """Return the one metadata object of this device, from its other table or from disk.

    One that has failed is left to the table that saw it fail: a table that is loaded after
    that starts over from what is on disk, as in the kernel.
    """
    shared = ctx.shared(device)
    metadata = shared.get(SHARED_KEY)
    try:
        if isinstance(metadata, CloneMetadata) and metadata.mode is Mode.RW:
            _check_geometry(metadata, region_size, ctx.length)
        else:
            metadata = await _read_metadata(device, region_size, ctx.length)
    except MetadataError as error:
        raise _error(f"Failed to load metadata: {error}", _errno(error)) from error
    except DeviceError as error:
        raise _error(f"Failed to load metadata: {error}", error.errno) from error
    for note in metadata.notes:
        log.warning("%s: %s: %s", ctx.name, device.name, note)
    if metadata.mode is not Mode.RW:
        raise _error(
            "Unable to get write access to metadata, please check/repair metadata",
            errnos.EPERM,
        )
    shared[SHARED_KEY] = metadata
    return metadata


async def _read_metadata(
    device: Device, region_size: int, target_size: int
) -> CloneMetadata:
    try:
        return await metadata_io.run(
            device,
            CloneMetadata.open(
                device_size=device.size,
                region_size=region_size,
                target_size=target_size,
            ),
        )
    except NotFormatted:
        return await metadata_io.run(
            device,
            CloneMetadata.format(
                device_size=device.size,
                region_size=region_size,
                target_size=target_size,
                uuid=uuid.uuid4().bytes,
            ),
        )


def _check_geometry(
    metadata: CloneMetadata, region_size: int, target_size: int
) -> None:
    for field, stored, given in (
        ("region_size", metadata.region_size, region_size),
        ("target_size", metadata.target_size, target_size),
    ):
        if stored != given:
            raise GeometryMismatch(field, stored=stored, given=given)


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
    return ConstructorError(reason, errno, "clone")
