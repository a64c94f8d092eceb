# SPDX-License-Identifier: Apache-2.0
"""`ObjectStore`: an object in S3, Google Cloud Storage or Azure, through obstore. Implements `nbdtarget.devices.ranged.store.Store`.

What obstore is trusted with: signatures, endpoints, credentials of the environment, TLS. What it is not:

- *Retries.* Its own end after seconds, and a body that breaks off would be continued without If-Match. They are off (`max_retries`
  is 0), and the fetcher does it. obstore does not tell Retry-After, so only the jitter bounds how soon the store is asked again.
- *The pin.* `get` with a range and If-Match is used, because `get_range` knows no If-Match. Size, ETag, version and range of
  every answer are compared before a byte is used. A store that answers a range with status 200 is refused.
- *Redirects.* It follows ten, and takes the signature along to the same host only; never from https to http, unless the endpoint
  is http itself.
- *Time limits.* Its limit for a whole request is an hour; the fetcher has shorter ones.

Errors of obstore hold URLs, requests and answers, so nothing of their text is shown but the status.
"""

import asyncio
import importlib.util
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.http.url import parse_http_url
from nbdtarget.devices.objects.credentials import Credentials, run_credential_command
from nbdtarget.devices.objects.url import OBJECT_SCHEMES, ObjectUrl, parse_object_url
from nbdtarget.devices.ranged.pin import Pin
from nbdtarget.devices.ranged.store import (
    SourceAway,
    SourceChanged,
    SourceDenied,
    SourceError,
    SourceUnfit,
    Store,
    Take,
    check_pin,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket

__all__ = ["ObjectStore", "is_obstore_installed"]

HEAD_BYTES: Final = 256 << 10
CHUNK_BYTES: Final = 256 << 10
_STATUS: Final = re.compile(r"status code: (\d{3})")
_EXPIRED: Final = re.compile(
    r"ExpiredToken|RequestExpired|TokenRefreshRequired|InvalidToken|AuthenticationFailed"
)
_NO_RANGES: Final = (
    "the store does not support ranges: it answers them with status 200, and not with 206. Give another store, or its web"
    " address"
)
# Answers that obstore does not take, by what stands in its texts. A key may be called anything, so these are not just words.
_NO_RANGE_TOLD: Final = (
    "the store does not say which range it sends, and how large the object is"
)
_UNFIT: Final = (
    ("source: NotPartial", _NO_RANGES),
    ("source: UnexpectedRange {", "the store sent another range than it was asked for"),
    ("source: ParseContentRange {", _NO_RANGE_TOLD),
    ("source: NoContentRange", _NO_RANGE_TOLD),
    ("source: MissingContentLength", "the store does not tell how long its answer is"),
    ("source: MissingLastModified", "the store does not tell when the object was written"),
    ("kind: Redirect,", "the store redirects too often, or from https to http, which is not followed"),
)  # fmt: skip
_CREDENTIALS: Final = re.compile(r"credential|metadata endpoint|MetadataError", re.I)


def is_obstore_installed() -> bool:
    return importlib.util.find_spec("obstore") is not None


class ObjectStore:
    """See the module head."""

    def __init__(self, url: ObjectUrl, command: tuple[str, ...] = ()) -> None:
        """Args: command: prints credentials; see `credentials`."""
        self._url = url
        self._command = command
        self._credentials: Credentials | None = None
        self._bucket: Bucket | None = None
        self._opening = asyncio.Lock()

    async def open(self, take: Take) -> Pin:
        if not is_obstore_installed():
            raise SourceUnfit(
                "needs the package obstore: pip install 'nbdtarget[objects]'"
            )
        return await self._read(0, HEAD_BYTES, None, take)

    async def get(
        self, begin: int, end: int, pin: Pin, take: Take, *, is_urgent: bool
    ) -> None:
        await self._read(begin, end, pin, take)

    async def renew(self) -> bool:
        # The next request makes a new client, which looks for credentials anew in all places.
        self._bucket = None
        self._credentials = None
        return True

    def elsewhere(self, name: str) -> tuple[Store, str]:
        if name.partition("://")[0].lower() not in OBJECT_SCHEMES:
            raise ResolveError(name, "is no URL of an object")
        url = parse_object_url(name)
        return ObjectStore(url, self._command), url.place

    async def close(self) -> None:
        self._bucket = None

    async def _read(self, begin: int, end: int, pin: Pin | None, take: Take) -> Pin:
        import obstore
        from obstore.exceptions import BaseError

        options: dict[str, Any] = {"range": (begin, end)}
        if version := self._url.options.said.get("version"):
            options["version"] = version
        if pin is not None and pin.has_strong_etag:
            options["if_match"] = pin.etag
        try:
            bucket = await self._open_once()
            answer = await obstore.get_async(bucket, self._url.key, options=options)  # type: ignore[arg-type]  # obstore wants a TypedDict
            found = _pin_of(answer.meta)
            _check(found, pin, answer.attributes)
            if tuple(answer.range) != (begin, min(end, found.size)):
                raise SourceUnfit("the store sent another range than it was asked for")
            left = min(end, found.size) - begin
            async for data in answer.stream(min_chunk_size=CHUNK_BYTES):
                view = memoryview(data)
                if len(view) > left:
                    raise SourceAway("the store sent more than it was asked for")
                take(view)
                left -= len(view)
        except (BaseError, OSError, ValueError) as error:
            raise _failure(error, pin) from None
        if left:
            raise SourceAway("the store sent less than it was asked for")
        return found

    async def _provide(self) -> dict[str, Any]:
        """Give obstore the credentials that the command prints."""
        self._credentials = await run_credential_command(self._command)
        return self._credentials.as_obstore()

    async def _open_once(self) -> "Bucket":
        """Return the client, which is made in a thread: it reads the system's authorities. Raises: SourceUnfit."""
        async with self._opening:
            if self._bucket is None:
                self._bucket = await asyncio.to_thread(self._open_bucket)
            return self._bucket

    def _open_bucket(self) -> "Bucket":
        """Raises: SourceUnfit."""
        from obstore.store import AzureStore, GCSStore, S3Store

        url, said = self._url, self._url.options.said
        config: dict[str, Any] = {}
        endpoint = said.get("endpoint", "")
        if endpoint:
            parse_http_url(endpoint)
            config["base_url" if url.scheme == "gs" else "endpoint"] = endpoint
        if said.get("anonymous") == "yes":
            config["skip_signature"] = True
        common: dict[str, Any] = {
            "client_options": self._client_options(endpoint),
            "retry_config": {"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
        }
        if url.scheme == "gs":
            return GCSStore(url.bucket, config=config, **common)  # type: ignore[arg-type]  # obstore wants a TypedDict
        if url.scheme == "az":
            if account := said.get("account"):
                config["account_name"] = account
            return AzureStore(url.bucket, config=config, **common)  # type: ignore[arg-type]  # obstore wants a TypedDict
        if region := said.get("region"):
            config["region"] = region
        if endpoint:
            config["virtual_hosted_style_request"] = False
        if self._command:
            common["credential_provider"] = self._provide
        return S3Store(url.bucket, config=config, **common)  # type: ignore[arg-type]  # obstore wants a TypedDict

    def _client_options(self, endpoint: str) -> dict[str, Any]:
        options: dict[str, Any] = {
            "allow_http": endpoint.lower().startswith("http:"),
            "connect_timeout": "10s",
            "read_timeout": "30s",
            "timeout": "1h",
        }
        if ca := self._url.options.ca:
            try:
                options["root_certificate"] = Path(ca).read_bytes()
            except OSError as error:
                reason = f"the authorities in {ca} cannot be read: {error.strerror}"
                raise SourceUnfit(reason) from error
        return options


def _pin_of(meta: Mapping[str, Any]) -> Pin:
    modified = meta.get("last_modified")
    # obstore says 1970 where an S3 says nothing.
    told = "" if modified is None or not modified.timestamp() else modified.isoformat()
    return Pin(
        int(meta["size"]),
        meta.get("e_tag") or "",
        told,
        meta.get("version") or "",
    )


def _check(found: Pin, pinned: Pin | None, attributes: Mapping[Any, Any]) -> None:
    """Raises: SourceError: not the pinned object, or not as it is."""
    encoding = str(attributes.get("Content-Encoding", "identity")).lower()
    if encoding not in ("", "identity", "aws-chunked"):
        raise SourceUnfit(f"the object is encoded ({encoding}), not as it is")
    if pinned is None:
        if not found.size:
            raise SourceUnfit("is empty")
        return
    check_pin(found, pinned, "store")


def _failure(error: Exception, pinned: Pin | None) -> SourceError:
    """Say what an error of obstore means, and show nothing of its text but a status."""
    from obstore import exceptions as obstore_errors

    text = str(error)
    match = _STATUS.search(text)
    status = int(match[1]) if match else 0
    told = f" (status {status})" if status else ""
    if isinstance(error, obstore_errors.PreconditionError) and pinned is not None:
        return SourceChanged("it was replaced: the store has another state of it now")
    if isinstance(
        error,
        obstore_errors.PermissionDeniedError | obstore_errors.UnauthenticatedError,
    ) or (status == 400 and _EXPIRED.search(text)):
        return SourceDenied(f"access is denied{told}")
    if isinstance(error, FileNotFoundError):
        return SourceUnfit(f"the store has no such object{told}")
    for sign, reason in _UNFIT:
        if sign in text:
            return SourceUnfit(reason)
    if status == 416:
        if pinned is None:
            return SourceUnfit("is empty")
        return SourceChanged("it was replaced: it is shorter now")
    if status in (408, 425, 429) or status >= 500:
        overload = status in (429, 503)
        return SourceAway(f"the store answers{told}", is_overload=overload)
    if 300 <= status < 500:
        return SourceUnfit(f"the store answers{told}")
    if not status and _CREDENTIALS.search(text):
        return SourceDenied(
            "there are no credentials for the store: set them in the environment, or write #anonymous=yes"
        )
    return SourceAway("the store does not answer")
