# SPDX-License-Identifier: Apache-2.0
"""`Store`: what a protocol has to do so that an image can be read by ranges, and how it says that it could not.

    SourceAway       no answer, or one that says "later": the same request may succeed
    SourceDenied     credentials or a signed URL are not accepted, or not any more: renew them, then try again
    SourceChanged    the image is not the pinned one: nothing of it may be used, now or later
    SourceUnfit      the server answers, but cannot do what is needed, or the image is not there

The first three are what `nbdtarget.devices.ranged.fetcher` acts upon. `SourceUnfit` refuses a source that is being opened.
A source that is open has served ranges before, so its server is probably being repaired, and is tried again as one that is away.
"""

from collections.abc import Callable
from typing import Protocol

from nbdtarget.devices.ranged.pin import Pin

__all__ = [
    "SourceAway",
    "SourceChanged",
    "SourceDenied",
    "SourceError",
    "SourceUnfit",
    "Store",
    "Take",
    "check_pin",
]

# Called with bytes as they arrive, in order.
Take = Callable[[bytes | bytearray | memoryview], None]


class SourceError(Exception):
    """See the module head. `reason` follows the name of the source in a sentence, and holds no secret."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SourceAway(SourceError):
    """Args: retry_after_s: what the server asked for; is_overload: it has too much to do."""

    def __init__(
        self,
        reason: str,
        retry_after_s: float | None = None,
        *,
        is_overload: bool = False,
    ) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.is_overload = is_overload


class SourceDenied(SourceError):
    pass


class SourceChanged(SourceError):
    pass


class SourceUnfit(SourceError):
    pass


class Store(Protocol):
    """One image behind one protocol."""

    async def open(self, take: Take) -> Pin:
        """Ask for the image's first bytes, which `take` gets, and return the pin.

        Raises: SourceError.
        """
        ...

    async def get(
        self, begin: int, end: int, pin: Pin, take: Take, *, is_urgent: bool
    ) -> None:
        """Read the bytes `begin` to `end`, half-open and inside the image.

        `take` gets nothing of an answer that does not show the pin, and never more than was asked for. If this
        raises, what `take` has got by then is good.

        Args: is_urgent: a client waits for it, so it should not stand behind others.
        Raises: SourceError.
        """
        ...

    async def renew(self) -> bool:
        """Get new credentials or a new URL; return whether that may have helped. Raises: SourceAway."""
        ...

    def elsewhere(self, name: str) -> "tuple[Store, str]":
        """Return a store for the same image under another name, and the name without secrets. Raises: ResolveError."""
        ...

    async def close(self) -> None: ...


def check_pin(found: Pin, pinned: Pin, who: str) -> None:
    """Compare what an answer shows with the pinned image. Args: who: sends the answer, for the reason.

    Raises: SourceChanged: it is another image; SourceAway: it cannot be told.
    """
    if pinned.is_size_only:
        found = found.only_size()
    if difference := pinned.difference(found):
        raise SourceChanged(f"it was replaced: {difference}")
    if missing := pinned.missing(found):
        raise SourceAway(f"the {who} does not tell its {missing}, as it did before")
