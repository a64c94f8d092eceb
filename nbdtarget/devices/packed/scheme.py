# SPDX-License-Identifier: Apache-2.0
"""Device names of the form `gzip:DISK`, `xz:DISK` and `zstd:DISK`, with `#size=SIZE` where the size is not known otherwise."""

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, ClassVar

from nbdtarget.common.errors import DeviceError, ResolveError
from nbdtarget.common.redaction import has_secrets, redacted
from nbdtarget.common.units import SIZE_MAX, parse_size
from nbdtarget.devices.packed.size import split_size, with_size
from nbdtarget.devices.ranged.options import (
    REMOTE_COPY_BYTES,
    REMOTE_IN_FLIGHT_BYTES,
)
from nbdtarget.devices.scheme import Scheme, scheme_of

if TYPE_CHECKING:
    from nbdtarget.devices.base import Device

__all__ = ["GzipScheme", "PackedScheme", "XzScheme", "ZstdScheme"]


class PackedScheme(Scheme):
    """Every question goes to the scheme of DISK, which is one of `schemes`."""

    def __init__(self, schemes: Mapping[str, Scheme]) -> None:
        self._schemes = schemes

    async def open(self, name: str, *, read_only: bool) -> "Device":
        from nbdtarget.devices.packed.device import PackedDevice
        from nbdtarget.devices.packed.unpack import MissingPackageError, Unpacker
        from nbdtarget.devices.ranged.device import refuse_writing

        refuse_writing(name, read_only=read_only)
        scheme, inner_name, size_word = self._inner(name)
        try:
            Unpacker(self.name)
        except MissingPackageError as error:
            raise ResolveError(name, str(error)) from None
        inner = await scheme.open(inner_name, read_only=True)
        try:
            size = await self._size(name, inner, size_word)
        except DeviceError as error:
            await inner.close()
            raise ResolveError(name, "cannot be read", error.errno) from error
        except BaseException:  # it may be cancelled, and then the disk below is closed
            await inner.close()
            raise
        secret = name if has_secrets(name) else ""
        return PackedDevice(redacted(name), inner, self.name, size, secret_name=secret)

    async def _size(self, name: str, inner: "Device", size_word: str | None) -> int:
        """Raises: ResolveError, DeviceError."""
        from nbdtarget.devices.packed.size import (
            gzip_hint,
            maybe_xz_size,
            maybe_zstd_size,
        )

        async def read(offset: int, length: int) -> bytes:
            return bytes(await inner.read(offset, length))

        size: int | None
        if size_word is not None:
            try:
                size = parse_size(size_word)
            except ValueError as error:
                raise ResolveError(name, str(error)) from None
        elif self.name == "xz":
            size = await maybe_xz_size(read, inner.exact_size)
        elif self.name == "zstd":
            size = await maybe_zstd_size(read, inner.exact_size)
        else:
            hint = await gzip_hint(read, inner.exact_size)
            raise ResolveError(
                name,
                "a gzip file does not tell how large the image in it is: add #size=SIZE."
                f" If the image is smaller than 4 GiB, that is #size={hint}",
            )
        if size is None:
            reason = f"the {self.name} file does not tell how large the image in it is: add #size=SIZE"
            raise ResolveError(name, reason)
        if not 0 < size <= SIZE_MAX - 512:
            raise ResolveError(name, f"a disk cannot have {size} bytes")
        return size

    def identity(self, name: str) -> Hashable:
        try:
            scheme, inner, size_word = self._inner(name)
        except ResolveError:
            return name
        return (self.name, scheme.identity(inner), size_word)

    def absolute(self, name: str, directory: str) -> str:
        try:
            scheme, inner, size_word = self._inner(name)
        except ResolveError:
            return name
        inner = with_size(scheme.absolute(inner, directory), size_word)
        return f"{self.name}:{inner}"

    def may_start_programs(self, name: str) -> bool:
        try:
            scheme, inner, _ = self._inner(name)
        except ResolveError:
            return False
        return scheme.may_start_programs(inner)

    def is_read_only(self, name: str) -> bool:
        return True

    def copy_sizes(self, name: str) -> tuple[int, int]:
        return REMOTE_COPY_BYTES, REMOTE_IN_FLIGHT_BYTES

    def _inner(self, name: str) -> tuple[Scheme, str, str | None]:
        """Return the scheme of DISK, DISK, and the size as it is written. Raises: ResolveError."""
        inner, size_word = split_size(name.partition(":")[2])
        return scheme_of(self._schemes, inner), inner, size_word


class GzipScheme(PackedScheme):
    name: ClassVar[str] = "gzip"
    syntax: ClassVar[str] = "gzip:DISK#size=SIZE"
    summary: ClassVar[str] = (
        "the image in a gzip file, read once in order: as the source of a clone"
    )


class XzScheme(PackedScheme):
    name: ClassVar[str] = "xz"
    syntax: ClassVar[str] = "xz:DISK"
    summary: ClassVar[str] = "the image in an xz file, the same"


class ZstdScheme(PackedScheme):
    name: ClassVar[str] = "zstd"
    syntax: ClassVar[str] = "zstd:DISK"
    summary: ClassVar[str] = (
        "the image in a zstd file, the same; needs nbdtarget[zstd] before Python 3.14"
    )
