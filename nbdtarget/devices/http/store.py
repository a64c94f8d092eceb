# SPDX-License-Identifier: Apache-2.0
"""`HttpStore`: a file on a web server, read by GET with Range. Implements `nbdtarget.devices.ranged.store.Store`.

Never HEAD: a signed URL is signed for GET. What is checked of an answer: `answer.py`.

*Encoding.* `Accept-Encoding: identity` is sent, nothing is decompressed, and an encoded answer is refused.

*The pin* is sent as If-Match, or as If-Unmodified-Since if there is no strong ETag, and compared on every answer.

*Redirects* are followed by hand: at most `REDIRECTS_MAX`, to http and https only, never from https to http, and the URL of
each hop goes out exactly as the server wrote it, because signatures do not survive another encoding. The original URL is
what is kept. Where it leads is remembered, and asked for anew when the server there does not accept it any more: such URLs
are signed for minutes.

*Secrets.* `user:password@` becomes an Authorization header, which is sent to the origin (scheme, host, port) of the original URL
only. There are no cookies. Errors name no URL of a redirect.

*Connections.* Two pools: what clients wait for finds a connection that no background copy has taken. They are kept open for
`KEEPALIVE_S`. A proxy is taken from the environment (`https_proxy` and so on), as other programs do.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from nbdtarget import __version__
from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.http.answer import ESCAPE, check_head, failure_of
from nbdtarget.devices.http.url import HttpUrl, origin_of, parse_http_url
from nbdtarget.devices.http.url_command import run_url_command
from nbdtarget.devices.ranged.pin import Pin
from nbdtarget.devices.ranged.store import (
    SourceAway,
    SourceDenied,
    SourceError,
    SourceUnfit,
    Store,
    Take,
)

__all__ = ["HEAD_BYTES", "HttpStore"]

HEAD_BYTES: Final = 256 << 10  # asked for when an image is opened
CONNECT_S_MAX: Final = 10.0
READ_S_MAX: Final = 30.0  # between two arrivals
KEEPALIVE_S: Final = 60.0
REDIRECTS_MAX: Final = 5
TEXT_MAX: Final = 4096  # bytes of a refusal's body that are looked at
BUFFER_BYTES: Final = 1 << 20  # received and not taken, for each request
PROXIES_MAX: Final = 64  # origins whose proxies are known; redirects may lead anywhere
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MOVED_AWAY: Final = (SourceDenied, SourceUnfit)


class HttpStore:
    """See the module head."""

    def __init__(self, url: HttpUrl, command: tuple[str, ...] = ()) -> None:
        """Args: command: prints the URL to use; see `url_command`."""
        self._url = url
        self._command = command
        self._context: ssl.SSLContext | None = None
        self._making_context = asyncio.Lock()
        self._is_renewed = False
        self._leads_to = ""  # where the redirects of the URL ended; empty: not known
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        # By origin: to look through the environment takes longer than all else that a request does.
        self._proxies: dict[tuple[str, str, int], str | None] = {}
        self._is_closed = False

    @property
    def url(self) -> HttpUrl:
        return self._url

    async def open(self, take: Take) -> Pin:
        if self._command and not self._is_renewed:
            await self.renew()
        return await self._read(0, HEAD_BYTES, None, take, is_urgent=True)

    async def get(
        self, begin: int, end: int, pin: Pin, take: Take, *, is_urgent: bool
    ) -> None:
        await self._read(begin, end, pin, take, is_urgent=is_urgent)

    async def renew(self) -> bool:
        if not self._command:
            return False
        self._url = await run_url_command(self._command, self._url)
        self._is_renewed = True
        self._leads_to = ""
        return True

    def elsewhere(self, name: str) -> "tuple[Store, str]":
        if not name.lower().startswith(("http://", "https://")):
            raise ResolveError(name, "is no URL of a web server")
        url = parse_http_url(name)
        return HttpStore(url, self._command), url.place

    async def close(self) -> None:
        self._is_closed = True
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()
        if sessions:
            await asyncio.sleep(0)  # aiohttp closes its sockets in the next turn

    async def _read(
        self, begin: int, end: int, pin: Pin | None, take: Take, *, is_urgent: bool
    ) -> Pin:
        while True:
            leads_to = self._leads_to
            try:
                return await self._read_once(begin, end, pin, take, leads_to, is_urgent)
            except _MOVED_AWAY:
                if not leads_to:
                    raise
                # The redirect was for a while only. Ask the original URL where the file is now.
                if self._leads_to == leads_to:
                    self._leads_to = ""

    async def _read_once(
        self,
        begin: int,
        end: int,
        pin: Pin | None,
        take: Take,
        leads_to: str,
        is_urgent: bool,
    ) -> Pin:
        async with self._answer(begin, end, pin, leads_to, is_urgent) as answer:
            if answer.status == 400:
                text = (await answer.content.read(TEXT_MAX)).decode("utf-8", "replace")
                raise failure_of(400, answer.headers, pin, text)
            body = check_head(answer.status, answer.headers, begin, end, pin)
            left = body.length
            async for data in answer.content.iter_any():
                if len(data) > left:
                    take(memoryview(data)[:left])
                    raise SourceAway("the server sent more than it was asked for")
                take(data)
                left -= len(data)
        if left:
            raise SourceAway("the server sent less than it was asked for")
        return body.pin

    @asynccontextmanager
    async def _answer(
        self, begin: int, end: int, pin: Pin | None, leads_to: str, is_urgent: bool
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Yield the answer at the end of all redirects. Raises: SourceError."""
        original = self._url
        url = leads_to or original.url
        headers = _headers(begin, end, pin)
        session = self._session(is_urgent)
        try:
            for _ in range(REDIRECTS_MAX + 1):
                proxy = self._maybe_proxy(url)
                needs_tls = "https" in (origin_of(url)[0], origin_of(proxy or "")[0])
                async with session.get(
                    _parsed(url),
                    headers=_with_secret(headers, url, original),
                    allow_redirects=False,
                    ssl=await self._tls() if needs_tls else True,
                    proxy=proxy,
                ) as answer:
                    if answer.status not in _REDIRECTS:
                        if url != original.url and answer.status in (200, 206):
                            self._leads_to = url if self._url is original else ""
                        yield answer
                        return
                    url = _next_hop(url, answer.headers.get("Location", ""))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _failure(error) from error
        raise SourceUnfit(f"the server redirects more than {REDIRECTS_MAX} times")

    def _maybe_proxy(self, url: str) -> str | None:
        """Return the proxy for a URL, which the environment names. Raises: SourceUnfit."""
        origin = origin_of(url)
        if origin not in self._proxies:
            if len(self._proxies) >= PROXIES_MAX:
                self._proxies.clear()
            self._proxies[origin] = _maybe_proxy(url)
        return self._proxies[origin]

    def _session(self, is_urgent: bool) -> aiohttp.ClientSession:
        session = self._sessions.get(is_urgent)
        if session is None:
            if (
                self._is_closed
            ):  # meanwhile, by another task: a new session would never be closed
                raise SourceAway("the image is closed")
            session = self._sessions[is_urgent] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,  # the fetcher's slots are the limit
                    keepalive_timeout=KEEPALIVE_S,
                ),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=CONNECT_S_MAX, sock_read=READ_S_MAX
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                read_bufsize=BUFFER_BYTES,
            )
        return session

    async def _tls(self) -> ssl.SSLContext:
        """Return the context, which is made in a thread: to read the system's authorities takes tens of milliseconds.

        Raises: SourceUnfit.
        """
        ca = self._url.options.ca
        async with self._making_context:
            if self._context is None:
                make = partial(ssl.create_default_context, cafile=ca or None)
                try:
                    self._context = await asyncio.to_thread(make)
                except OSError as error:  # ssl.SSLError is one
                    reason = f"the authorities in {ca or 'the system'} cannot be read: {error.strerror or error}"
                    raise SourceUnfit(reason) from error
        return self._context


def _headers(begin: int, end: int, pin: Pin | None) -> dict[str, str]:
    headers = {
        "Range": f"bytes={begin}-{end - 1}",
        "Accept-Encoding": "identity",
        "User-Agent": f"nbdtarget/{__version__}",
    }
    if pin is not None and pin.has_strong_etag:
        headers["If-Match"] = pin.etag
    elif pin is not None and pin.last_modified:
        headers["If-Unmodified-Since"] = pin.last_modified
    # An ETag that had to be escaped cannot be sent as it was. It is compared all the same.
    return {key: value for key, value in headers.items() if ESCAPE not in value}


def _with_secret(
    headers: dict[str, str], url: str, original: HttpUrl
) -> dict[str, str]:
    if not original.authorization or origin_of(url) != origin_of(original.url):
        return headers
    return headers | {"Authorization": original.authorization}


def _parsed(url: str) -> URL:
    """Raises: SourceUnfit."""
    try:
        return URL(url, encoded=True)
    except ValueError as error:
        raise SourceUnfit("the server redirects to what is no URL") from error


def _next_hop(url: str, location: str) -> str:
    """Return where a redirect leads. Raises: SourceUnfit."""
    if not location or not location.isascii():
        raise SourceUnfit("the server redirects and does not say where to")
    try:
        target = urljoin(url, location)
        scheme = origin_of(target)[0]
    except ValueError as error:
        raise SourceUnfit("the server redirects to what is no URL") from error
    if scheme not in ("http", "https"):
        raise SourceUnfit(f"the server redirects to {scheme}:, which is not followed")
    if scheme == "http" and origin_of(url)[0] == "https":
        raise SourceUnfit(
            "the server redirects from https to http, which is not followed"
        )
    parts = urlsplit(target)
    if not parts.hostname:
        raise SourceUnfit("the server redirects to a URL without a host")
    # A name and a password in a redirect are not ours, and are not sent.
    netloc = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=netloc, fragment="").geturl()


def _maybe_proxy(url: str) -> str | None:
    """Raises: SourceUnfit: the environment names a proxy that cannot be used."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if not proxy or proxy_bypass(parts.hostname or ""):
        return None
    if "://" not in proxy:
        proxy = f"http://{proxy}"  # as curl does
    try:
        scheme, host, _ = origin_of(proxy)
    except ValueError:
        scheme = host = ""
    if scheme not in ("http", "https") or not host:
        # It may hold a password, so it is not shown.
        raise SourceUnfit(
            f"the environment variable {parts.scheme}_proxy names no HTTP proxy: set it to http://HOST:PORT, or unset it"
        )
    return proxy


def _failure(error: Exception) -> SourceError:
    """Say what went wrong below HTTP, without the URL, which aiohttp puts into its texts."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        reason = (
            str(getattr(error.certificate_error, "verify_message", "")) or "refused"
        )
        return SourceAway(f"the server's certificate is not accepted: {reason}")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return SourceAway(f"the name of the server {error.host} cannot be resolved")
    if isinstance(error, aiohttp.ClientConnectorError):
        why = error.os_error.strerror or "no connection"
        return SourceAway(
            f"cannot connect to {error.host} port {error.port}: {why.lower()}"
        )
    if isinstance(error, aiohttp.InvalidURL):
        return SourceUnfit("the server redirects to what is no URL")
    if isinstance(error, TimeoutError):
        return SourceAway("the server does not answer")
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError):
        return SourceAway("the server hung up")
    return SourceAway(f"the connection failed ({type(error).__name__})")
