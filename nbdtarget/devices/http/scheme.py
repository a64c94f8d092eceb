# SPDX-License-Identifier: Apache-2.0
"""Device names that are URLs of files on web servers. What such a URL says: `nbdtarget.devices.http.url`."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.http.url import parse_http_url
from nbdtarget.devices.ranged.options import (
    REMOTE_COPY_BYTES,
    REMOTE_IN_FLIGHT_BYTES,
    absolute_options,
)
from nbdtarget.devices.scheme import Scheme

if TYPE_CHECKING:
    from nbdtarget.devices.base import Device

__all__ = ["HttpScheme", "HttpsScheme"]


class HttpScheme(Scheme):
    name: ClassVar[str] = "http"
    syntax: ClassVar[str] = "http://HOST[:PORT]/PATH"
    summary: ClassVar[str] = "a file on a web server that supports ranges, read-only"

    async def open(self, name: str, *, read_only: bool) -> "Device":
        from nbdtarget.devices.http.store import HttpStore
        from nbdtarget.devices.http.url_command import url_command_for
        from nbdtarget.devices.ranged.device import open_ranged, refuse_writing

        refuse_writing(name, read_only=read_only)
        url = parse_http_url(name)
        store = HttpStore(url, url_command_for(url.place))
        return await open_ranged(name, url.place, store, url.options)

    def identity(self, name: str) -> Hashable:
        try:
            return parse_http_url(name).identity
        except ResolveError:
            return name

    def is_read_only(self, name: str) -> bool:
        return True

    def copy_sizes(self, name: str) -> tuple[int, int]:
        return REMOTE_COPY_BYTES, REMOTE_IN_FLIGHT_BYTES

    def absolute(self, name: str, directory: str) -> str:
        return absolute_options(name, directory)


class HttpsScheme(HttpScheme):
    name: ClassVar[str] = "https"
    syntax: ClassVar[str] = "https://HOST[:PORT]/PATH"
    summary: ClassVar[str] = "the same with TLS"
