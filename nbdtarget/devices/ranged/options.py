# SPDX-License-Identifier: Apache-2.0
"""The options of a remote image, which stand in the fragment of its URL: `https://host/disk.img#source-timeout=60&pin=size`.

A fragment is never sent to a server, so it takes nothing from the URL. A key that is not known is refused by its name.

    source-timeout=SECONDS   how long a request waits for a source that does not answer; then it ends with an error.
                             0: for ever. A day by default, because a client that waits goes on when the source is back,
                             and a client that got an error does not
    connections=NUMBER       at most so many requests of a background copy at a time; 32
    pin=etag, pin=size       what tells that the image is still the same. With `size`, a change that keeps the size
                             is not noticed
    ca=FILE                  the authorities that a server's certificate may come from, instead of the system's
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.numbers import maybe_number

__all__ = [
    "CONNECTIONS",
    "REMOTE_COPY_BYTES",
    "REMOTE_IN_FLIGHT_BYTES",
    "SOURCE_TIMEOUT_S",
    "SOURCE_TIMEOUT_S_MAX",
    "SourceOptions",
    "absolute_options",
    "parse_options",
]

SOURCE_TIMEOUT_S: Final = 86_400.0
SOURCE_TIMEOUT_S_MAX: Final = 31_536_000  # a year
CONNECTIONS: Final = 32
CONNECTIONS_MAX: Final = 64
# Of background copies: enough to fill a fast line to a distant server.
REMOTE_COPY_BYTES: Final = 8 << 20
REMOTE_IN_FLIGHT_BYTES: Final = 32 << 20
_KEYS: Final = ("source-timeout", "connections", "pin", "ca")


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """See the module head.

    Attributes:
        source_timeout_s: 0: no bound.
        ca: path of a file; empty: those that the system trusts.
        said: every option as it was written, those of one kind of images included.
    """

    source_timeout_s: float = SOURCE_TIMEOUT_S
    connections: int = CONNECTIONS
    is_pinned_by_size: bool = False
    ca: str = ""
    said: Mapping[str, str] = field(default_factory=dict)


def parse_options(
    name: str, fragment: str, also: tuple[str, ...] = ()
) -> SourceOptions:
    """Parse what stands behind the `#` of `name`. Args: also: further keys. Raises: ResolveError."""
    keys = (*_KEYS, *also)
    found: dict[str, str] = {}
    for item in fragment.split("&"):
        if not item:
            continue
        key, _, value = item.partition("=")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            hint = f"did you mean `{near[0]}'?" if near else f"write {', '.join(keys)}"
            raise ResolveError(name, f"unknown option `{key}' behind the #; {hint}")
        if key in found:
            raise ResolveError(name, f"option `{key}' stands twice behind the #")
        found[key] = unquote(value)
    pin = found.get("pin", "etag")
    if pin not in ("etag", "size"):
        raise ResolveError(name, f"pin is etag or size, not {pin}")
    return SourceOptions(
        float(_number(name, found, "source-timeout", 0, SOURCE_TIMEOUT_S_MAX))
        if "source-timeout" in found
        else SOURCE_TIMEOUT_S,
        _number(name, found, "connections", 1, CONNECTIONS_MAX)
        if "connections" in found
        else CONNECTIONS,
        pin == "size",
        found.get("ca", ""),
        found,
    )


def absolute_options(name: str, directory: str) -> str:
    """Return `name` with the path of `ca=` as it is called from anywhere."""
    head, mark, fragment = name.partition("#")
    items = [
        f"ca={directory.rstrip('/')}/{item[3:]}"
        if item.startswith("ca=") and item[3:] and not item.startswith("ca=/")
        else item
        for item in fragment.split("&")
    ]
    return head + mark + "&".join(items)


def _number(name: str, found: dict[str, str], key: str, least: int, most: int) -> int:
    text = found[key]
    number = maybe_number(text, most)
    if number is None or number < least:
        raise ResolveError(
            name, f"{key} is a number from {least} to {most}, not {text}"
        )
    return number
