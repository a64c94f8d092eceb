# SPDX-License-Identifier: Apache-2.0
"""Shared by the constructors of clone and cache: they open the devices and the metadata of one table line.

    async with Opening(ctx, "clone", "Failed to load metadata") as opening:
        metadata_device = await opening.maybe_metadata_device(name)
        destination = await opening.device("destination", name)
        …
        opening.keep()

If the block is left without `keep`, what was opened is closed again. Every error is a
ConstructorError that names the target; the kernel's text comes first.

Metadata is shared: the live and the inactive table of a mapped device find one metadata object. One
that has failed is left to the table that saw it fail: a table that is loaded after that starts
over from what is on disk.

New metadata is made only for a disk that is empty. If the disk holds data, then its metadata is somewhere else.

A disk whose name does not say in which format it is counts as raw. If it begins or ends like an image in a format, a compressed
file or an archive, it is refused (`nbdtarget.devices.image_format`): before metadata is made for it, or when it takes the
place of another disk. A disk that metadata knows has been looked at before. Its beginning was since written by its
clients, who may write an image to it. For the same reason a mapped device is not looked at.
"""

import errno as errnos
import logging
from collections.abc import Awaitable, Callable, Container
from contextlib import AsyncExitStack
from typing import Any, Final, TypeVar

from nbdtarget.common.clock import timeout
from nbdtarget.common.errors import (
    ConstructorError,
    DeviceError,
    ResolveError,
    TableError,
)
from nbdtarget.common.permissions import OVERWRITE, Permission
from nbdtarget.devices.base import Device
from nbdtarget.devices.content import maybe_content
from nbdtarget.devices.image_format import ImageFormat
from nbdtarget.devices.image_look import maybe_image_on
from nbdtarget.devices.resolve import path_of, says_format
from nbdtarget.targets import metadata_io
from nbdtarget.targets.base import TargetContext
from nbdtarget.targets.metadata_faults import explain
from nbdtarget_metadata.errors import (
    MetadataError,
    MetadataTooSmall,
    NeedsCheck,
    NotFormatted,
    NotOurs,
)
from nbdtarget_metadata.log.commit import JournaledMetadata
from nbdtarget_metadata.mode import Mode
from nbdtarget_metadata.operations import Steps

__all__ = ["NEWER_FEATURES", "NO_WRITE_ACCESS", "Opening", "refuse_stale"]

NO_WRITE_ACCESS: Final = (
    "Unable to get write access to metadata, please check/repair metadata."
)
# Why metadata may be in mode RO when it has just been read.
NEWER_FEATURES: Final = (
    "A newer version has written it, with features that this version may only read."
)

LOOK_S_MAX: Final = 5.0  # for the first bytes of one disk

log = logging.getLogger(__name__)

T = TypeVar("T")


M = TypeVar("M", bound=JournaledMetadata[Any, Any])


class Opening:
    """See the module head.

    Args:
        target: the target's type.
        metadata_fault: the kernel's words for metadata that cannot be used.
    """

    def __init__(self, ctx: TargetContext, target: str, metadata_fault: str) -> None:
        self._ctx = ctx
        self._target = target
        self._metadata_fault = metadata_fault
        self._opened = AsyncExitStack()
        self._created: Device | None = None
        self._named: dict[str, tuple[str, Device]] = {}  # by role

    async def __aenter__(self) -> "Opening":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._opened.aclose()

    def keep(self) -> None:
        """From here on the opened devices belong to the target."""
        self._opened.pop_all()

    def error(
        self,
        reason: str,
        errno: int = errnos.EINVAL,
        allowed_by: Permission | None = None,
    ) -> ConstructorError:
        """A refusal of this target's, to be raised."""
        return ConstructorError(reason, errno, self._target, allowed_by)

    async def device(self, role: str, name: str, *, read_only: bool = False) -> Device:
        """Open the device that is the table line's `role`. Raises: ConstructorError."""
        opening = self._ctx.open_device(name, read_only=read_only)
        device = await self._awaited(role, opening)
        self._opened.push_async_callback(self._ctx.close_device, device)
        self._named[role] = name, device
        return device

    async def refuse_images(self, known: Container[str] = ()) -> None:
        """Refuse disks that begin or end like an image, while their names do not say that they are raw.

        Args: known: roles whose disks need not be looked at, because metadata knows them.
        Raises: ConstructorError.
        """
        for role, (name, device) in self._named.items():
            if role in known or says_format(name) or not device.may_be_container:
                continue
            image = await self._maybe_image(device)
            if image is None:
                continue
            refusal = image.refusal(device.name, path_of(device.name))
            raise self.error(f"{role} device {device.name} {refusal}")

    async def _maybe_image(self, device: Device) -> ImageFormat | None:
        """Return the format of the image; None also if it cannot be read now: then nothing can be copied by mistake either."""
        try:
            async with timeout(LOOK_S_MAX):
                return await maybe_image_on(device)
        except (DeviceError, TimeoutError) as error:
            log.warning(
                "%s: %s: its format cannot be looked at: %s",
                self._ctx.name,
                device.name,
                str(error) or "no answer",
            )
            return None

    async def maybe_metadata_device(self, name: str) -> Device | None:
        """Open the metadata device; None if a file can be made. Raises: ConstructorError."""
        opening = self._ctx.maybe_open_device(name)
        device = await self._awaited("metadata", opening)
        if device is not None:
            self._opened.push_async_callback(self._ctx.close_device, device)
        return device

    async def create_metadata_device(
        self, name: str, size: int, role: str, disk: Device
    ) -> Device:
        """Make a metadata file of `size` bytes for `disk`, and open it.

        Raises: ConstructorError: for example, because the disk is not empty.
        """
        await self.refuse_images()
        await self._refuse_content(role, disk, name, "is missing")
        device = await self._awaited("metadata", self._ctx.create_device(name, size))
        self._opened.push_async_callback(self._ctx.close_device, device)
        self._created = device
        return device

    async def _refuse_content(
        self, role: str, disk: Device, metadata_name: str, state: str
    ) -> None:
        """Refuse to make metadata for a disk that holds data: its own may be elsewhere.

        Args: state: what is wrong with the metadata: "is missing".
        Raises: ConstructorError; not if the user allows to overwrite.
        """
        if OVERWRITE in self._ctx.permissions:
            return
        content = await maybe_content(disk)
        if content is not None:
            raise ConstructorError(
                f"{role} device {disk.name} {content}, but its metadata"
                f" {metadata_name} {state}: name the metadata that belongs to it, or"
                " give --overwrite if what it holds may be lost",
                errnos.EEXIST,
                self._target,
                OVERWRITE,
            )

    async def metadata(
        self,
        device: Device,
        kind: type[M],
        *,
        check: Callable[[M], None],
        read: Callable[[], Awaitable[M]],
        make: Callable[[], Steps[M]],
        role: str,
        disk: Device,
    ) -> M:
        """Return the one metadata object of `device`: from its other table, or read, or made new.

        Args:
            check: raises MetadataError if a shared object is not what the table line says.
            read: reads what is on `device`.
            make: formats a `device` that is blank.
            role, disk: the disk whose content the metadata tells about.

        Raises: ConstructorError. The object may be in mode RO: see `no_write_access`.
        """

        async def read_or_make() -> M:
            try:
                return await read()
            except NotFormatted:
                if device is not self._created:
                    await self.refuse_images()
                    await self._refuse_content(role, disk, device.name, "is blank")
                return await metadata_io.run(device, make())

        try:
            return await self._shared_or_read(device, kind, check, read_or_make)
        except NeedsCheck as error:
            raise self.no_write_access(explain(error, device.name)) from error
        except MetadataError as error:
            reason = f"{self._metadata_fault}: {explain(error, device.name)}"
            raise self.error(reason, _metadata_errno(error)) from error
        except DeviceError as error:
            reason = f"{self._metadata_fault}: {error}"
            raise self.error(reason, error.errno) from error

    def no_write_access(self, why: str, errno: int = errnos.EINVAL) -> ConstructorError:
        """The refusal of metadata that can be read, but in which nothing may be recorded."""
        return self.error(f"{NO_WRITE_ACCESS} {why}", errno)

    async def _shared_or_read(
        self,
        device: Device,
        kind: type[M],
        check: Callable[[M], None],
        read: Callable[[], Awaitable[M]],
    ) -> M:
        """Raises: whatever `check` and `read` do."""
        shared = self._ctx.shared(device)
        live = shared.get(self._target)
        if isinstance(live, JournaledMetadata) and live.beside is not None:
            live = live.beside[0]  # of a table that was loaded, and never resumed
        if not isinstance(live, kind):
            live = None
        # The generation before anything is read: `refuse_stale` compares it at the resume.
        generation = 0 if live is None else live.generation
        if live is not None and live.mode is Mode.RW:
            check(live)
            # Usually both tables share one object. If the live table's disk is latched or lost, what it knows in
            # core cannot become durable any more: then this table goes on from what is on the disk.
            if not self._ctx.replaces_unusable:
                shared[self._target] = live
                return live
        metadata = await read()
        if live is not None and live.mode is Mode.RW:
            metadata.beside = live, generation
        for note in metadata.notes:
            log.warning("%s: %s: %s", self._ctx.name, device.name, note)
        # Only metadata that can be committed is shared: read-only metadata is read anew by the next table.
        if metadata.mode is Mode.RW:
            shared[self._target] = metadata
        return metadata

    async def _awaited(self, role: str, opening: Awaitable[T]) -> T:
        try:
            return await opening
        except ResolveError as error:
            reason = f"Error opening {role} device: {error}"
            raise self.error(reason, error.errno) from error


def refuse_stale(metadata: JournaledMetadata[Any, Any]) -> None:
    """Refuse metadata that was read beside a live table which has committed since.

    While the live table's disk was latched or lost it could not commit. If the disk has come back, it may have.
    Called before anything is done with the metadata. Raises: TableError.
    """
    if metadata.beside is not None:
        other, generation = metadata.beside
        if other.generation != generation:
            raise TableError(
                "the metadata was written since this table was loaded: load it again",
                errnos.ESTALE,
            )
        metadata.beside = None


def _metadata_errno(error: MetadataError) -> int:
    """The kernel's errno for metadata that cannot be used."""
    match error:
        case MetadataTooSmall():
            return errnos.ENOSPC
        case NotOurs():
            return errnos.EILSEQ
        case _:
            return errnos.EINVAL
