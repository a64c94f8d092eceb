# SPDX-License-Identifier: Apache-2.0
"""Parses an HTTP URL that is the name of a device: where to ask, with which secret, and the options behind the `#`."""

from base64 import b64encode
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit, urlunsplit

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.redaction import redacted
from nbdtarget.devices.ranged.options import SourceOptions, parse_options

__all__ = ["HttpUrl", "origin_of", "parse_http_url"]

URL_MAX: Final = 8192  # characters
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class HttpUrl:
    """See the module head.

    Attributes:
        url: what is asked for; with the query, without `user:password@` and fragment.
        authorization: a header's value, which only `url`'s own origin may get; empty: none.
        place: the URL without any secret, for metadata.
    """

    url: str
    authorization: str
    place: str
    options: SourceOptions

    @property
    def identity(self) -> Hashable:
        """Return the same value for each way to write this URL. A query may choose the file, so it counts."""
        parts = urlsplit(self.url)
        return ("url", origin_of(self.url), parts.path, parts.query)


def origin_of(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port. Raises: ValueError."""
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    return scheme, (parts.hostname or "").lower(), parts.port or _PORTS.get(scheme, 0)


def parse_http_url(name: str) -> HttpUrl:
    """Take the name of a device apart. Raises: ResolveError."""
    if len(name) > URL_MAX:
        shown = redacted(name.partition("?")[0])[:100] + "…"
        raise ResolveError(shown, f"is longer than {URL_MAX} characters")
    if not name.isascii() or any(character <= " " for character in name):
        # Where the secrets end cannot be told, so nothing of it is shown.
        shown = name.partition("://")[0] + "://…"
        reason = "the URL holds blanks or letters that must be written as %XX"
        raise ResolveError(shown, reason)
    try:
        parts = urlsplit(name)
        _ = parts.port  # may be no number
    except ValueError as error:
        raise ResolveError(name, f"not a URL: {error}") from None
    if not parts.hostname:
        raise ResolveError(name, "the URL names no host")
    options = parse_options(name, parts.fragment)
    bare = _with_netloc(parts, parts.netloc.rpartition("@")[2])
    place = urlunsplit(bare._replace(query="", scheme=bare.scheme.lower()))
    return HttpUrl(urlunsplit(bare), _authorization(parts), place, options)


def _with_netloc(parts: SplitResult, netloc: str) -> SplitResult:
    return parts._replace(netloc=netloc, path=parts.path or "/", fragment="")


def _authorization(parts: SplitResult) -> str:
    user, at, _ = parts.netloc.rpartition("@")
    if not at:
        return ""
    name, _, password = user.partition(":")
    pair = unquote_to_bytes(name) + b":" + unquote_to_bytes(password)
    return "Basic " + b64encode(pair).decode("ascii")
