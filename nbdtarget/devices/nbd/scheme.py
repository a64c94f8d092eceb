# SPDX-License-Identifier: Apache-2.0
"""Device names that are NBD URIs. What such a URI says: `nbdtarget.devices.nbd.uri`."""

import re
from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar, Final
from urllib.parse import quote

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.nbd.uri import parse_nbd_uri
from nbdtarget.devices.scheme import Scheme

if TYPE_CHECKING:
    from nbdtarget.devices.base import Device

__all__ = [
    "NbdScheme",
    "NbdUnixScheme",
    "NbdVsockScheme",
    "NbdsScheme",
    "NbdsUnixScheme",
    "NbdsVsockScheme",
]

# A query key whose value is a path that begins with neither "/" nor NUL.
_RELATIVE_PATH: Final = re.compile(
    r"((?:\A|&)(?:socket|tls-certificates|tls-psk-file)=)(?!/|%2f|%00|&|\Z)",
    re.IGNORECASE,
)


class NbdScheme(Scheme):
    name: ClassVar[str] = "nbd"
    syntax: ClassVar[str] = "nbd://HOST[:PORT]/EXPORT"
    summary: ClassVar[str] = "an export of another NBD server"

    async def open(self, name: str, *, read_only: bool) -> "Device":
        from nbdtarget.devices.nbd.device import open_nbd

        return await open_nbd(name, read_only=read_only)

    def identity(self, name: str) -> Hashable:
        try:
            return parse_nbd_uri(name).identity
        except ResolveError:
            return name

    def absolute(self, name: str, directory: str) -> str:
        before = quote(directory.rstrip("/"), errors="surrogateescape") + "/"
        head, mark, behind = name.partition("?")
        query, hash_, fragment = behind.partition("#")
        query = _RELATIVE_PATH.sub(lambda key: key[1] + before, query)
        return f"{head}{mark}{query}{hash_}{fragment}"


class NbdUnixScheme(NbdScheme):
    name: ClassVar[str] = "nbd+unix"
    syntax: ClassVar[str] = "nbd+unix:///EXPORT?socket=PATH"
    summary: ClassVar[str] = "the same over a unix socket"


class NbdVsockScheme(NbdScheme):
    name: ClassVar[str] = "nbd+vsock"
    syntax: ClassVar[str] = "nbd+vsock://[CID[:PORT]]/EXPORT"
    summary: ClassVar[str] = "the same between a virtual machine and its host"


class NbdsScheme(NbdScheme):
    name: ClassVar[str] = "nbds"
    syntax: ClassVar[str] = "nbds://HOST[:PORT]/EXPORT"
    summary: ClassVar[str] = "the same with TLS"


class NbdsUnixScheme(NbdScheme):
    name: ClassVar[str] = "nbds+unix"
    syntax: ClassVar[str] = "nbds+unix:///EXPORT?socket=PATH"
    summary: ClassVar[str] = "the same over a unix socket with TLS"


class NbdsVsockScheme(NbdScheme):
    name: ClassVar[str] = "nbds+vsock"
    syntax: ClassVar[str] = "nbds+vsock://[CID[:PORT]]/EXPORT"
    summary: ClassVar[str] = "the same between a virtual machine and its host with TLS"
