# SPDX-License-Identifier: Apache-2.0
"""From a table line to open devices and metadata, in the kernel's order.

Every check that needs no metadata comes first; only then is a missing metadata file created or an
all-zero one formatted, and not if the destination holds data: then its metadata is elsewhere.
Whatever fails, what was opened is closed again.

A source from which everything has been copied is not opened: it may be gone for good, and a server
that does not answer must not hold the start up. `AbsentDevice` stands in its place.
"""

import errno as errnos
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from nbdtarget.common.errors import ConstructorError, DeviceError
from nbdtarget.common.permissions import OTHER_DISK
from nbdtarget.devices.absent import AbsentDevice
from nbdtarget.devices.base import Device
from nbdtarget.targets import metadata_io
from nbdtarget.targets.base import TargetContext
from nbdtarget.targets.clone.table import (
    ARGUMENTS_MIN,
    Options,
    parse_options,
    parse_region_size,
)
from nbdtarget.targets.disks import DESTINATION_ROLE, SOURCE_ROLE, DiskRecords, Role
from nbdtarget.targets.opening import NEWER_FEATURES, Opening
from nbdtarget_metadata.clone.metadata import NR_REGIONS_MAX, CloneMetadata
from nbdtarget_metadata.clone.superblock import CLONE, CloneSuperblock
from nbdtarget_metadata.disks import spread_offsets
from nbdtarget_metadata.errors import GeometryMismatch, MetadataError
from nbdtarget_metadata.log.superblock import read_superblock
from nbdtarget_metadata.mode import Mode

__all__ = ["Parts", "construct"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Parts:
    """The parts of a clone target."""

    words: tuple[str, ...]
    options: Options
    region_size: int
    metadata_device: Device
    destination: Device
    source: Device
    metadata: CloneMetadata
    disks: DiskRecords

    @property
    def has_source(self) -> bool:
        """Whether the source is open."""
        return not isinstance(self.source, AbsentDevice)


async def construct(ctx: TargetContext, words: Sequence[str]) -> Parts:
    """Open everything that the table line names.

    Raises: ConstructorError, with the kernel's text first; then nothing stays open.
    """
    async with Opening(ctx, "clone", "Failed to load metadata") as opening:
        if len(words) < ARGUMENTS_MIN:
            raise opening.error("Invalid number of arguments")
        metadata_name, destination_name, source_name, region_word = words[
            :ARGUMENTS_MIN
        ]
        metadata_device = await opening.maybe_metadata_device(metadata_name)
        destination = await opening.device(DESTINATION_ROLE, destination_name)
        if destination.size < ctx.length:
            raise opening.error("Device size larger than destination device")
        source = await _open_source(
            opening, ctx, source_name, await _maybe_superblock(metadata_device)
        )
        if source.size < ctx.length:
            raise opening.error("Device size larger than source device")
        block_size = max(source.logical_block_size, destination.logical_block_size)
        region_size = parse_region_size(region_word, block_size=block_size)
        nr_regions = -(-ctx.length // region_size)
        if nr_regions > NR_REGIONS_MAX:
            raise opening.error("Too many regions. Consider increasing the region size")
        options = parse_options(words[ARGUMENTS_MIN:])
        if metadata_device is None:
            metadata_device = await opening.create_metadata_device(
                metadata_name,
                CloneMetadata.device_size_for(nr_regions),
                DESTINATION_ROLE,
                destination,
            )
        metadata = await _open_metadata(
            opening, metadata_device, destination, region_size, ctx.length
        )
        disks = DiskRecords(
            ctx.name,
            metadata,
            _roles(destination, source),
            ctx.shared(metadata_device),
        )
        await _check_disks(opening, ctx, disks, metadata, metadata_device.name)
        opening.keep()
    return Parts(
        tuple(words),
        options,
        region_size,
        metadata_device,
        destination,
        source,
        metadata,
        disks,
    )


async def _maybe_superblock(metadata_device: Device | None) -> CloneSuperblock | None:
    """Return the committed state, as far as it can be read; `_open_metadata` says what is wrong."""
    if metadata_device is None:
        return None
    reading = read_superblock(CLONE, metadata_device.size)
    try:
        return (await metadata_io.run(metadata_device, reading)).superblock
    except (MetadataError, DeviceError):
        return None


async def _open_source(
    opening: Opening, ctx: TargetContext, name: str, known: CloneSuperblock | None
) -> Device:
    """Open the source, if it is needed. Raises: ConstructorError."""
    if known is None or known.target_size != ctx.length:
        return await opening.device(SOURCE_ROLE, name, read_only=True)
    nr_left = known.nr_regions - known.nr_hydrated
    if not nr_left:
        log.info("%s: everything is copied: source %s is not opened", ctx.name, name)
        return AbsentDevice(ctx.full_name(name), ctx.length)
    try:
        return await opening.device(SOURCE_ROLE, name, read_only=True)
    except ConstructorError as error:
        raise opening.error(
            f"{error.reason}; {nr_left} of {known.nr_regions} regions"
            f" ({nr_left * known.region_size >> 10} KiB) must still be copied from it",
            error.errno,
        ) from error


def _roles(destination: Device, source: Device) -> tuple[Role, ...]:
    """The disks that are to be recognised: not a source that is not needed."""
    role = Role(DESTINATION_ROLE, destination)
    if isinstance(source, AbsentDevice):
        return (role,)
    offsets = spread_offsets(source.size)
    return role, Role(SOURCE_ROLE, source, is_ours=False, sample_at_start=offsets)


async def _check_disks(
    opening: Opening,
    ctx: TargetContext,
    disks: DiskRecords,
    metadata: CloneMetadata,
    metadata_name: str,
) -> None:
    """Refuse disks that do not belong together. Raises: ConstructorError.

    A source does not matter before anything was copied, nor after everything was.
    """
    is_partly_copied = 0 < metadata.nr_hydrated < metadata.nr_regions
    roles = (DESTINATION_ROLE, SOURCE_ROLE) if is_partly_copied else (DESTINATION_ROLE,)
    findings = await disks.look(roles)
    for finding in findings:
        if not finding.is_allowed(ctx.permissions):
            raise opening.error(
                finding.refusal(metadata_name), allowed_by=finding.allowed_by
            )
        if finding.changed and is_partly_copied and OTHER_DISK not in ctx.permissions:
            why = "parts of two states would be mixed"
            raise opening.error(
                finding.refusal_of_change(metadata_name, why),
                allowed_by=OTHER_DISK,
            )
    is_used = metadata.nr_hydrated > 0
    await opening.refuse_images(disks.known_roles(findings, is_used=is_used))


async def _open_metadata(
    opening: Opening,
    device: Device,
    destination: Device,
    region_size: int,
    target_size: int,
) -> CloneMetadata:
    """Raises: ConstructorError."""
    metadata = await opening.metadata(
        device,
        CloneMetadata,
        check=lambda known: _check_geometry(known, region_size, target_size),
        read=lambda: metadata_io.run(
            device,
            CloneMetadata.open(
                device_size=device.size,
                region_size=region_size,
                target_size=target_size,
            ),
        ),
        make=lambda: CloneMetadata.format(
            device_size=device.size,
            region_size=region_size,
            target_size=target_size,
            uuid=uuid.uuid4().bytes,
        ),
        role=DESTINATION_ROLE,
        disk=destination,
    )
    if metadata.mode is not Mode.RW:
        raise opening.no_write_access(NEWER_FEATURES, errnos.EPERM)
    return metadata


def _check_geometry(
    metadata: CloneMetadata, region_size: int, target_size: int
) -> None:
    for field, stored, given in (
        ("region_size", metadata.region_size, region_size),
        ("target_size", metadata.target_size, target_size),
    ):
        if stored != given:
            raise GeometryMismatch(field, stored=stored, given=given)
