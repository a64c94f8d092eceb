# SPDX-License-Identifier: Apache-2.0
"""Whether the head of an HTTP answer is what was asked for; nothing here does I/O.

    206 with our range in Content-Range    good
    200                                    good only if the whole image was asked for: a server that ignores Range
                                           answers every request with the whole file
    412, 416, another size or validator    the image was replaced
    401, 403, 407                          denied; 400, if its body says that a token has expired
    408, 425, 429, 5xx                     later, perhaps
    everything else                        the server cannot do it, or has no such file

A Content-Encoding is refused: a piece of a compressed body is not a piece of the image. So is a Content-Length that does not
agree with the range. Accept-Ranges is not looked at, because servers are wrong about it in both ways.
"""

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from nbdtarget.common.clock import wall_clock_s
from nbdtarget.devices.ranged.pin import Pin
from nbdtarget.devices.ranged.retry import retry_after_s
from nbdtarget.devices.ranged.store import (
    SourceAway,
    SourceChanged,
    SourceDenied,
    SourceError,
    SourceUnfit,
    check_pin,
)

__all__ = ["ESCAPE", "Body", "check_head", "failure_of", "told"]

ESCAPE: Final = "\\x"  # see `told`

_CONTENT_RANGE: Final = re.compile(r"\s*bytes\s+(\d{1,19})-(\d{1,19})/(\d{1,19})\s*")
_UNSATISFIED: Final = re.compile(r"\s*bytes\s+\*/(\d{1,19})\s*")
_DENIED: Final = frozenset({401, 403, 407})
_LATER: Final = frozenset({408, 425, 429})
_OVERLOADED: Final = frozenset({429, 503})
_EXPIRED: Final = re.compile(
    r"Expired|TokenRefreshRequired|InvalidToken|AuthenticationFailed", re.IGNORECASE
)
_NO_RANGES: Final = (
    "the server does not support ranges: it answers a request for {length} bytes with the whole file (status 200)."
    " Download the file, or give another server"
)


class Body(NamedTuple):
    """The body of an answer: `length` bytes of the image that `pin` describes."""

    pin: Pin
    length: int


def told(headers: Mapping[str, str], name: str) -> str:
    """Return a header, with `ESCAPE` and two digits for each byte that is not printable ASCII; empty: it is not there."""
    value = headers.get(name, "")
    if value.isascii() and value.isprintable():
        return value
    # aiohttp has decoded the bytes like this.
    data = value.encode("utf-8", "surrogateescape")
    return "".join(
        chr(byte) if 32 <= byte < 127 else f"{ESCAPE}{byte:02x}" for byte in data
    )


def check_head(
    status: int,
    headers: Mapping[str, str],
    begin: int,
    end: int,
    pinned: Pin | None,
) -> Body:
    """Check the answer to a request for `begin` to `end`, half-open.

    Args:
        headers: case-insensitive.
        pinned: None: the image is being opened, and `end` may be past its end.

    Raises: SourceError.
    """
    if status not in (200, 206):
        raise failure_of(status, headers, pinned)
    encoding = told(headers, "Content-Encoding").strip().lower()
    if encoding not in ("", "identity"):
        raise SourceUnfit(f"the server sends it encoded ({encoding}), not as it is")
    length = _content_length(headers)
    if status == 200:
        size = _whole_size(length, begin, end)
        first = begin
    else:
        first, behind, size = _content_range(headers)
    pin = Pin(size, told(headers, "ETag"), told(headers, "Last-Modified"))
    if pinned is not None:
        check_pin(pin, pinned, "server")
    if status == 200:
        return Body(pin, size)
    if (first, behind) != (begin, min(end, size)):
        reason = f"the server sent bytes {first} to {behind - 1} when asked for {begin} to {end - 1}"
        raise SourceUnfit(reason)
    if length is not None and length != behind - first:
        reason = f"the server sends {length} bytes for a range of {behind - first}"
        raise SourceUnfit(reason)
    return Body(pin, behind - first)


def failure_of(
    status: int, headers: Mapping[str, str], pinned: Pin | None, text: str = ""
) -> SourceError:
    """Return what an answer without data means. Args: text: the beginning of its body, if it was read."""
    if pinned is not None and status == 412:
        now = Pin(pinned.size, told(headers, "ETag"))
        why = pinned.difference(now) or "the server has another state of it now"
        return SourceChanged(f"it was replaced: {why}")
    if status == 416:
        match = _UNSATISFIED.fullmatch(headers.get("Content-Range", ""))
        if pinned is None:
            return SourceUnfit("is empty" if match and match[1] == "0" else _said(416))
        if match and int(match[1]) != pinned.size:
            reason = f"its size is {match[1]} bytes, not {pinned.size}"
            return SourceChanged(reason)
        return SourceUnfit(_said(status))
    if status in _DENIED or (status == 400 and _EXPIRED.search(text)):
        return SourceDenied(f"access is denied (status {status})")
    if status in _LATER or status >= 500:
        after_s = retry_after_s(headers.get("Retry-After"), wall_clock_s())
        return SourceAway(_said(status), after_s, is_overload=status in _OVERLOADED)
    if status in (404, 410):
        return SourceUnfit(f"the server has no such file (status {status})")
    return SourceUnfit(_said(status))


def _said(status: int) -> str:
    return f"the server answers with status {status}"


def _content_length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("Content-Length", "").strip()
    return int(text) if text.isdecimal() and len(text) < 20 else None


def _whole_size(length: int | None, begin: int, end: int) -> int:
    """Return the size of an image that came whole. Raises: SourceUnfit: it was not asked for whole."""
    if begin or length is None or length > end:
        raise SourceUnfit(_NO_RANGES.format(length=end - begin))
    if not length:
        raise SourceUnfit("is empty")
    return length


def _content_range(headers: Mapping[str, str]) -> tuple[int, int, int]:
    """Return begin and end, half-open, and the size of the image. Raises: SourceUnfit."""
    text = told(headers, "Content-Range")
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None:
        said = f"`{text[:80]}'" if text else "nothing"
        reason = f"the server does not say which range it sends, and how large the file is: Content-Range says {said}"
        raise SourceUnfit(reason)
    return int(match[1]), int(match[2]) + 1, int(match[3])
