# SPDX-License-Identifier: Apache-2.0
"""Device names that are URLs of files on web servers. What such a URL says: `nbdtarget.devices.http.url`."""

from typing import TYPE_CHECKING, ClassVar

from nbdtarget.devices.http.url import HttpUrl, parse_http_url
from nbdtarget.devices.ranged.scheme import RangedScheme

if TYPE_CHECKING:
    from nbdtarget.devices.ranged.store import Store

__all__ = ["HttpScheme", "HttpsScheme"]


class HttpScheme(RangedScheme):
    name: ClassVar[str] = "http"
    syntax: ClassVar[str] = "http://HOST[:PORT]/PATH"
    summary: ClassVar[str] = "a file on a web server that supports ranges, read-only"

    def parse(self, name: str) -> HttpUrl:
        return parse_http_url(name)

    def store(self, name: str) -> "Store":
        from nbdtarget.devices.http.store import HttpStore
        from nbdtarget.devices.http.url_command import url_command_for

        url = parse_http_url(name)
        return HttpStore(url, url_command_for(url.place))


class HttpsScheme(HttpScheme):
    name: ClassVar[str] = "https"
    syntax: ClassVar[str] = "https://HOST[:PORT]/PATH"
    summary: ClassVar[str] = "the same with TLS"
