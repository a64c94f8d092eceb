# SPDX-License-Identifier: Apache-2.0
"""Rounds of `make fuzz-fast` with `Syncer`s: syncs and writeback of ranges, of files that misbehave, and calls at the wrong moment."""

import errno
import os
import random
import select
from pathlib import Path
from typing import TYPE_CHECKING, Final

from scripts.fuzz_fast_files import FlakyFile

if TYPE_CHECKING:
    from nbdtarget_sync import Syncer

__all__ = ["SyncRound"]

SIZE: Final = 1 << 20
SYNCS_MAX: Final = 20  # of one Syncer
TIMEOUT_S: Final = 120
# The errors of the kernel for a device that cannot be synced, and for a range that there cannot be.
ERRORS: Final = {errno.EINVAL, errno.ESPIPE, errno.EBADF}
Ranges = list[tuple[int, int]]


class SyncRound:
    """One file, and one Syncer after the other."""

    def __init__(self, seed: int, folder: Path) -> None:
        import nbdtarget_sync

        self.sync = nbdtarget_sync
        self.random = random.Random(seed)
        self.file = FlakyFile(folder / "sync", bytes(SIZE), self.random)

    def run(self, nr_messages: int) -> int:
        """Carry out so many syncs, about."""
        nr = 0
        while nr < nr_messages:
            nr += self._life()
        return nr

    def _life(self) -> int:
        pick = self.random
        syncer = self.sync.Syncer(self.file.fd, pick.choice((0, 0, 5)))
        nr_syncs = pick.randrange(SYNCS_MAX)
        for _ in range(nr_syncs):
            if self.file.kind in ("whole", "short"):
                os.pwrite(self.file.fd, b"x" * 5000, pick.randrange(SIZE))
            has_ranges = pick.random() < 0.6
            self._wrong_call(syncer)
            if has_ranges:
                syncer.begin_behind(self._ranges(), self._ranges())
            else:
                syncer.begin()
            if pick.random() < 0.2:
                self._too_early(syncer)
            status = self._end(syncer)
            may_fail = has_ranges or self.file.kind == "full"
            assert status == 0 or (may_fail and status in ERRORS), os.strerror(status)
        if pick.random() < 0.9 or nr_syncs:
            syncer.close()
        return nr_syncs

    def _ranges(self) -> Ranges:
        pick = self.random
        found = []
        for _ in range(pick.choice((0, 1, 1, 3, 300))):
            begin = pick.randrange(2 * SIZE)
            found.append((begin, begin + pick.choice((0, 1, 4096, SIZE, 64 * SIZE))))
            if pick.random() < 0.01:  # nonsense
                found.append(pick.choice(((-1, 5), (5, 1), (-SIZE, -1))))
        return found

    def _wrong_call(self, syncer: "Syncer") -> None:
        """Make a call that Python refuses. It begins nothing."""
        wrong = self.random.choice(([(1, 1 << 70)], [(1,)], [None], [(1, 2, 3)], None))
        if self.random.random() < 0.2:
            try:
                syncer.begin_behind([(0, 1)], wrong)  # type: ignore[arg-type]
            except (TypeError, ValueError, OverflowError):
                return
            raise AssertionError(f"taken: {wrong}")

    def _too_early(self, syncer: "Syncer") -> None:
        """Nothing else begins, and nothing ends, before the sync was taken."""
        for call in (syncer.begin, syncer.close):
            try:
                call()
            except ValueError:
                continue
            raise AssertionError("it has begun, or has ended, in the middle of a sync")

    def _end(self, syncer: "Syncer") -> int:
        status = self.sync.RUNS
        while status == self.sync.RUNS:
            if self.random.random() < 0.5:
                ready = select.select([syncer.event_fd], [], [], TIMEOUT_S)[0]
                assert ready, "the sync does not end"
            status = syncer.take()
        return status

    def close(self) -> None:
        self.file.close()
