# SPDX-License-Identifier: Apache-2.0
"""`Pin`: what tells one state of a remote image from another.

Theory of operation. An image is read in thousands of requests, over hours, and another one may be put in its place between two of them.
Half of one and half of the other would be a disk that looks whole and is not. So the first answer *pins* the image:

    size             always
    version          of an object store that keeps versions
    etag             a strong one proves equal bytes; a weak one (W/"…") only that the server calls them equal. The weak form of a
                     strong one that is pinned, which proxies make, proves nothing
    last_modified    compared where there is no strong ETag; it has a resolution of a second

Each later answer must show the same pin, before a byte of it is used. One that shows another pin proves that the image was
replaced (`difference`). One that lacks what is pinned proves nothing, and is not used either (`missing`).

The pin is recorded in metadata as ids (`Pin.ids`, `nbdtarget_metadata.disks`), and compared at the next start.
"""

from typing import NamedTuple

from nbdtarget_metadata.disks import ID_MAX, bounded_id

__all__ = ["Pin"]


class Pin(NamedTuple):
    """See the module head. ETags keep their quotes; what is not told is empty.

    Attributes:
        size: bytes of the image, which may be no multiple of a sector.
    """

    size: int
    etag: str = ""
    last_modified: str = ""
    version: str = ""

    @property
    def is_strong(self) -> bool:
        """Whether equal pins prove equal bytes."""
        return bool(self.version) or self.has_strong_etag

    @property
    def has_strong_etag(self) -> bool:
        return bool(self.etag) and not self.etag.startswith("W/")

    @property
    def is_size_only(self) -> bool:
        """Whether an image of the same size could not be told from this one."""
        return not (self.version or self.etag or self.last_modified)

    def only_size(self) -> "Pin":
        """Return a pin that proves nothing but the size."""
        return Pin(self.size)

    def _compared(self) -> dict[str, str]:
        """Return the facts that have to be equal, by name."""
        told = {"version": self.version, "etag": self.etag}
        if not self.is_strong:
            told["last-modified"] = self.last_modified
        return {key: value for key, value in told.items() if value}

    def difference(self, found: "Pin") -> str:
        """Say what proves that `found` is another image or another state; empty: nothing does."""
        if found.size != self.size:
            return f"its size is {found.size} bytes, not {self.size}"
        new = found._asdict() | {"last-modified": found.last_modified}
        for key, value in self._compared().items():
            if key == "etag" and new[key] == f"W/{value}":
                continue  # see `missing`
            if new[key] and new[key] != value:
                return f"its {key} is {new[key]}, not {value}"
        return ""

    def missing(self, found: "Pin") -> str:
        """Return the name of what is pinned and `found` does not tell; empty: it tells all. `found` has no `difference`."""
        new = found._asdict() | {"last-modified": found.last_modified}
        told = self._compared().items()
        return next((key for key, value in told if new[key] != value), "")

    def ids(self, url: str) -> tuple[str, ...]:
        """Return what metadata records. Args: url: without secrets."""
        told = {"url": url, "size": str(self.size), **self._compared()}
        return tuple(bounded_id(key, value, ID_MAX) for key, value in told.items())
