# SPDX-License-Identifier: Apache-2.0
"""The oracle for disks that fail and go on: a FLUSH that fails puts what it should have covered in doubt.

As after a failed fsync: of what was written and not flushed before, nobody may say any more that it
is there, or that it is not, so no later FLUSH promises it. As long as no FLUSH has failed, each
that succeeds promises all that had ended when it was submitted: a loss must be confessed
before a FLUSH ends with 0. A process that dies and is started again in the same boot forgets
nothing that has reached the system, but promises nothing either (`doubt`). What it then
reads (`observe`) is the truth that its next FLUSH makes durable.

The writes are of whole sectors: of a part of one, nobody could say what it was laid over.
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
            # What another FLUSH has put in doubt meanwhile, this one does not promise.
            if write.ended and write in sector.history:
                del sector.history[: sector.history.index(write)]

    def doubt(self) -> None:
        """What is not flushed may be lost, and somebody was told."""
        self.nr_changes += 1
        for sector in self._sectors:
            first, *others = sector.history
            first.ended = True
            for write in others:
                self.nr_doubts += write.ended
                write.ended = False

    def observe(self, content: bytes | memoryview) -> None:
        """Everything was read after a start: hold it against what it may be; it stays so.

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
        """Hold a read of a disk that has failed: anything that a crash could leave."""
        self.check_survivor(data, offset)
