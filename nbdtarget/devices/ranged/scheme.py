# SPDX-License-Identifier: Apache-2.0
"""`RangedScheme`: what all schemes of remote images have in common. A scheme says what its URLs mean, and which store reads them."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Protocol

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.ranged.options import (
    REMOTE_COPY_BYTES,
    REMOTE_IN_FLIGHT_BYTES,
    SourceOptions,
    absolute_options,
)
from nbdtarget.devices.scheme import Scheme

if TYPE_CHECKING:
    from nbdtarget.devices.base import Device
    from nbdtarget.devices.ranged.store import Store

__all__ = ["RangedScheme", "RangedUrl"]


class RangedUrl(Protocol):
    """The name of a remote image, taken apart.

    Attributes:
        place: the URL without any secret, for metadata.
        identity: the same for each way to write the URL.
    """

    @property
    def place(self) -> str: ...

    @property
    def options(self) -> SourceOptions: ...

    @property
    def identity(self) -> Hashable: ...


class RangedScheme(Scheme):
    """See the module head. Subclasses implement `parse` and `store`."""

    def parse(self, name: str) -> RangedUrl:
        """Take `name` apart. Raises: ResolveError."""
        raise NotImplementedError  # each scheme has its own

    def store(self, name: str) -> "Store":
        """Return what reads the image; nothing is asked yet. Its modules are imported here. Raises: ResolveError."""
        raise NotImplementedError  # each scheme has its own

    async def open(self, name: str, *, read_only: bool) -> "Device":
        from nbdtarget.devices.ranged.device import open_ranged, refuse_writing

        refuse_writing(name, read_only=read_only)
        url = self.parse(name)
        return await open_ranged(name, url.place, self.store(name), url.options)

    def identity(self, name: str) -> Hashable:
        try:
            return self.parse(name).identity
        except ResolveError:
            return name

    def is_read_only(self, name: str) -> bool:
        return True

    def copy_sizes(self, name: str) -> tuple[int, int]:
        return REMOTE_COPY_BYTES, REMOTE_IN_FLIGHT_BYTES

    def absolute(self, name: str, directory: str) -> str:
        return absolute_options(name, directory)
