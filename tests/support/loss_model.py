# SPDX-License-Identifier: Apache-2.0
"""The oracle for disks that fail and go on: a FLUSH that fails puts what it should have covered in doubt.

As after a failed fsync, writes that were not flushed before may be there or not, so no later FLUSH
promises them. As long as no FLUSH has failed, each FLUSH that succeeds promises all writes that had
ended when it was submitted: a loss must be reported before a FLUSH ends with 0. A process that dies
and is started again in the same boot loses no write that has reached the system, but promises none
either (`doubt`). The content that it then reads (`observe`) is made durable by its next FLUSH.

All writes are of whole sectors. After a write of a part, the rest of its sector would be unknown.
"""

from tests.support.model import SECTOR, DiskModel, Write

__all__ = ["LossModel"]


class LossModel(DiskModel):
    """See the module head.

    Attributes:
        nr_doubts: how often something was put in doubt.
    """

    def __init__(self, content: bytes, *, discards_last: bool = False) -> None:
        self.nr_doubts = 0
        super().__init__(content, discards_last=discards_last)

    def end_flush(self, promised: list[Write], *, ok: bool) -> None:
        if not ok:
            self.doubt()
            return
        self.nr_changes += 1
        for sector, write in zip(self._sectors, promised, strict=True):
            # This FLUSH does not promise writes that another one has put in doubt meanwhile.
            if write.ended and write in sector.history:
                del sector.history[: sector.history.index(write)]

    def doubt(self) -> None:
        """Unflushed writes may be lost, and a client was told of it."""
        self.nr_changes += 1
        for sector in self._sectors:
            first, *others = sector.history
            first.ended = True
            for write in others:
                self.nr_doubts += write.ended
                write.ended = False

    def observe(self, content: bytes | memoryview) -> None:
        """Check the content that was read after a start. It must not change from now on.

        Raises: Violation.
        """
        self.check_survivor(content)
        self.nr_changes += 1
        for nr, sector in enumerate(self._sectors):
            found = bytes(content[nr * SECTOR : (nr + 1) * SECTOR])
            is_any = self.discards_last and self.may_be_discarded(nr)
            value = None if is_any else found
            sector.history.append(Write(value, True, "observed"))

    def check_running(self, offset: int, data: bytes | memoryview) -> None:
        """Check a read of a disk that has failed: it may return anything that a crash could leave."""
        self.check_survivor(data, offset)
