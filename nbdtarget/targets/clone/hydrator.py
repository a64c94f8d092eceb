# SPDX-License-Identifier: Apache-2.0
"""Makes locked regions hydrated: what the background and CACHE have in common.

Data is copied, zeroes are written as zeroes, then the bits are set.

A range that fails is tried again by halves, so a bad sector costs its own region and not its
neighbours'. A region that still fails waits in `Failures`, longer each time. All failures are counted,
also those of copies that a client's write needed. An event is raised when their number reaches
`event_after_errors`, and from then on whenever a region fails that had not failed before; the log
has a line about new ones now and then.
"""

import logging
from collections.abc import Callable
from typing import Final

from nbdtarget.common.clock import Clock
from nbdtarget.common.errors import DeviceError
from nbdtarget.common.say_rarely import SayRarely
from nbdtarget.targets.clone.failures import Failures
from nbdtarget.targets.clone.holes import Piece
from nbdtarget.targets.clone.regions import Regions
from nbdtarget.targets.copier import CopyError
from nbdtarget_metadata.errors import MetadataError

__all__ = ["ERRORS_PER_JOB_MAX", "Hydrator"]

ERRORS_PER_JOB_MAX: Final = 64

log = logging.getLogger(__name__)


class Hydrator:
    """See the module head.

    Args:
        event: called for failures.

    Attributes:
        event_after_errors: the first failure that is worth an event; 0: none is.
        failures: what could not be copied.
    """

    def __init__(
        self,
        regions: Regions,
        clock: Clock,
        *,
        event_after_errors: int,
        event: Callable[[], None],
    ) -> None:
        self.regions = regions
        self.clock = clock
        self.event_after_errors = event_after_errors
        self.failures = Failures()
        self._event = event
        self._rarely = SayRarely(clock)
        regions.note_error = self._note_foreground_error

    async def hydrate(
        self,
        begin: int,
        end: int,
        pieces: list[Piece],
        nr_errors: int = 0,
        *,
        is_wanted: bool = True,
    ) -> list[int]:
        """Hydrate regions that the caller has locked, by halves if they fail together.

        Args:
            pieces: what the regions are on the source, as `Holes` tells.
            nr_errors: before this call; beyond `ERRORS_PER_JOB_MAX` halves are not tried.
            is_wanted: a client has asked for these regions: they stay in the page cache.

        Returns the errno of each failure. None, and still unhydrated: the metadata went
        read-only.
        """
        try:
            await self._fill(
                *self.regions.span(begin, end), pieces, is_wanted=is_wanted
            )
        except (CopyError, DeviceError) as error:
            errors = [_errno(error)]
            if end - begin == 1 or nr_errors + 1 >= ERRORS_PER_JOB_MAX:
                self._note_failure(begin, end, error)
                return errors
            middle = (begin + end) // 2
            for half in ((begin, middle), (middle, end)):
                errors += await self.hydrate(
                    *half, pieces, nr_errors + len(errors), is_wanted=is_wanted
                )
            return errors
        held = self.regions.prison.held(begin, end)
        assert held == [(begin, end)], "what hydrates locks"
        try:
            self.regions.set_hydrated(begin, end)
        except MetadataError:
            return []  # it has become read-only, and that was logged then
        self.failures.note_success(begin, end)
        if self.regions.metadata.nr_hydrated == self.regions.nr_regions:
            self.regions.committer.start_commit()
        return []

    async def _fill(
        self, begin: int, end: int, pieces: list[Piece], *, is_wanted: bool
    ) -> None:
        """Make the destination hold what the source says. Raises: CopyError, DeviceError."""
        for piece_begin, piece_end, zero in pieces:
            at, stop = max(begin, piece_begin), min(end, piece_end)
            if at >= stop:
                continue
            if zero:
                await self.regions.destination.write_zeroes(at, stop - at)
            elif is_wanted:
                await self.regions.copier.copy(at, stop - at)
            else:
                await self.regions.background.copy(at, stop - at)

    def _note_failure(self, begin: int, end: int, error: Exception) -> None:
        now_ns = self.clock.now_ns()
        is_new = self.failures.note_failure(begin, end, now_ns)
        self.failures.last_error = f"hydration: {error}"
        self._maybe_event(is_new=is_new)
        if not is_new:
            return
        self._say("hydration failed:", begin, end, error)

    def _note_foreground_error(self, begin: int, end: int, error: Exception) -> None:
        # The client tries again when it likes: no reason for the background to wait longer.
        self.failures.nr_errors += 1
        self.failures.last_error = f"copy for a client's write: {error}"
        self._maybe_event(is_new=False)
        self._say("a client's write needs", begin, end, error)

    def _say(self, what: str, begin: int, end: int, error: Exception) -> None:
        # A dead source has thousands of regions: one line says it, and the next how many more.
        nr_failures = self._rarely.count()
        if not nr_failures:
            return
        log.error(
            "%s: %s regions %d to %d%s: %s",
            self.regions.committer.name,
            what,
            begin,
            end - 1,
            f" (and {nr_failures - 1} more failures)" if nr_failures > 1 else "",
            error,
        )

    def _maybe_event(self, *, is_new: bool) -> None:
        after, count = self.event_after_errors, self.failures.nr_errors
        if after and (count == after or (is_new and count > after)):
            self._event()


def _errno(error: CopyError | DeviceError) -> int:
    return error.error.errno if isinstance(error, CopyError) else error.errno
