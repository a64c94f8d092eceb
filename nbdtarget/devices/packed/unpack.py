# SPDX-License-Identifier: Apache-2.0
"""The decompressors behind one interface: bytes of a packed file in, bytes of the image out, in pieces that have a bound.

A packed file may consist of several members, streams or frames one after the other; so the image goes on when one has
ended. Zeroes behind the last one are padding.
"""

import importlib
import lzma
import zlib
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Final, Protocol

__all__ = ["FORMATS", "DamagedError", "MissingPackageError", "Unpacker"]

_GZIP_WINDOW: Final = 31  # zlib: a gzip header, and the largest window
XZ_MEMORY_MAX: Final = 512 << 20


class DamagedError(Exception):
    """The packed file is not what its format says. `str` follows the name of the file in a sentence."""


class MissingPackageError(Exception):
    """The decompressor is not installed."""


class _Decompressor(Protocol):
    """As in the module lzma."""

    eof: bool
    unused_data: bytes
    needs_input: bool

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gzip:
    """zlib's decompressor with the interface of the others."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(_GZIP_WINDOW)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        found = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        # A full piece may have more behind it, without any input.
        self.needs_input = not self._inner.unconsumed_tail and len(found) < max_length
        return found


def _xz() -> Any:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_MAX)


def _zstd() -> Any:
    for module in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(module).ZstdDecompressor()
        except ImportError:
            continue
    raise MissingPackageError(
        "needs a decompressor for zstd: pip install 'nbdtarget[zstd]'"
    )


FORMATS: Final = MappingProxyType({"gzip": _Gzip, "xz": _xz, "zstd": _zstd})


class Unpacker:
    """Unpacks one file from its beginning. See the module head.

    Attributes:
        needs_input: `feed` has to be called before there is more.
    """

    def __init__(self, format_name: str) -> None:
        """Raises: MissingPackageError."""
        self._format = format_name
        self._new: Callable[[], Any] = FORMATS[format_name]
        self._decompressor: _Decompressor | None = self._new()
        self._input = b""
        self._has_begun = False

    @property
    def needs_input(self) -> bool:
        decompressor = self._decompressor
        if self._input:
            return False
        return decompressor is None or decompressor.needs_input or decompressor.eof

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the packed file."""
        self._input += data

    def take(self, length: int) -> bytes:
        """Return at most `length` bytes of the image; none: more input is needed. Raises: DamagedError."""
        while not self.needs_input:
            if self._decompressor is None:
                # Between two members, or behind the last one, there may be zeroes.
                self._input = self._input.lstrip(b"\0")
                if not self._input:
                    break
                self._decompressor = self._new()
                self._has_begun = False
            data, self._input = self._input, b""
            self._has_begun = True
            try:
                found = self._decompressor.decompress(data, length)
            except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
                raise DamagedError(
                    f"is no intact {self._format} file: {error}"
                ) from None
            except Exception as error:  # zstd's own type, which may not be installed
                if type(error).__name__ != "ZstdError":
                    raise
                raise DamagedError(
                    f"is no intact {self._format} file: {error}"
                ) from None
            if self._decompressor.eof:
                self._input = bytes(self._decompressor.unused_data)
                self._decompressor = None
            if found:
                return found
        return b""

    def finish(self) -> None:
        """The packed file has ended. Raises: DamagedError: in the middle of it."""
        if self._decompressor is not None and self._has_begun:
            raise DamagedError(
                f"ends in the middle: it is no whole {self._format} file"
            )
