# SPDX-License-Identifier: Apache-2.0
"""The state that the parts of one clone share: devices, geometry, which regions are hydrated, and which are locked
for work.

Offsets here are relative to the target, which is also where the bytes lie on the source and
on the destination. The last region may be short: spans are clipped to the target's length.
"""

from collections.abc import Callable

from nbdtarget.targets.background_copier import BackgroundCopier
from nbdtarget.targets.clone.constructor import Parts
from nbdtarget.targets.committer import Committer
from nbdtarget.targets.copier import Copier
from nbdtarget.targets.prison import Prison
from nbdtarget_metadata.mode import Mode

__all__ = ["Regions"]


class Regions:
    """The regions of one clone target.

    Attributes:
        nr_hydrating: regions that are being copied or overwritten now, as status counts them.
        nr_bios: client I/O seen while not everything was hydrated; hydration yields to it.
        wake: tells background hydration that regions were unlocked.
        note_error: takes the regions, half-open, for which a client's write needed a copy, and why
            that failed.
        broken: takes an unexpected exception (a bug), after which nothing can be trusted.
    """

    def __init__(
        self,
        parts: Parts,
        length: int,
        committer: Committer,
        broken: Callable[[BaseException], None],
    ) -> None:
        region_size = parts.region_size
        assert region_size & (region_size - 1) == 0
        self.source = parts.source
        self.destination = parts.destination
        self.metadata = parts.metadata
        self.committer = committer
        self.prison = Prison()
        self.copier = Copier(parts.source, parts.destination)
        self.background = BackgroundCopier(parts.source, parts.destination, broken)
        self.length = length
        self.region_size = region_size
        self.shift = region_size.bit_length() - 1
        self.nr_regions = -(-length // region_size)
        self.nr_hydrating = 0
        self.nr_bios = 0
        self.wake: Callable[[], None] = _do_nothing
        self.note_error: Callable[[int, int, Exception], None] = _do_nothing
        self.broken = broken
        assert self.metadata.nr_regions == self.nr_regions

    @property
    def is_writable(self) -> bool:
        """Whether regions may become hydrated."""
        return self.metadata.mode is Mode.RW

    @property
    def has_failed(self) -> bool:
        """Whether nothing can be said about any region any more."""
        return self.metadata.mode is Mode.FAIL

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Return the bytes, half-open, of the regions `begin` to `end`."""
        return begin << self.shift, min(end << self.shift, self.length)

    def set_hydrated(self, begin: int, end: int) -> None:
        """The destination's copy of these regions is whole: from here on it counts, and not the source.

        Called with the regions locked, after the last write to them has ended.
        Raises: MetadataError: read-only or failed; then nothing has changed.
        Durable: nothing before a commit.
        """
        self.metadata.set_hydrated(begin, end)
        self.committer.note_change()


def _do_nothing(*_: object) -> None:
    """The part that is to be told is not made yet."""
