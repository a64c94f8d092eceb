# SPDX-License-Identifier: Apache-2.0
"""The oracle for writes that overlap in flight: either order, but once both ended one of them.

Theory of operation. Each write has a span, from its submission to its end. A write is
**superseded** by another one that was submitted after it had ended, and that has itself ended well.
A write that is not superseded may be read, and may survive:

    two writes overlap in flight      after both ended, the sector holds one of the two
    a read sees which (no write is    it stays that one: from then on the others count as
      in flight there meanwhile)        older, so a FLUSH submitted now promises it
    a FLUSH ends with 0               what was superseded when the FLUSH was submitted, by
                                        writes that had ended then, cannot survive any more
    a FUA write ends with 0           what had ended when it was submitted cannot, either

All writes are of whole sectors. After a write of a part, the rest of its sector would be unknown.
"""

from dataclasses import replace

from tests.support.model import SECTOR, DiskModel, Violation, Write

__all__ = ["OverlapModel", "OverlapRead"]


class OverlapRead:
    """A read under way.

    Attributes:
        allowed: the writes that each of its sectors may come back with.
        quiet: the sectors to which no write has been in flight since it was submitted.
    """

    def __init__(self, allowed: dict[int, list[Write]], quiet: set[int]) -> None:
        self.allowed = allowed
        self.quiet = quiet


class OverlapModel(DiskModel):
    """See the module head."""

    def __init__(self, content: bytes, *, discards_last: bool = False) -> None:
        self._now = 0
        self._reads: set[OverlapRead] = set()
        super().__init__(content, discards_last=discards_last)

    def settle(self, content: bytes | memoryview) -> None:
        self._reads.clear()  # of a life that has ended
        super().settle(content)
        for sector in self._sectors:
            for write in sector.history:
                write.began = write.over = self._now

    def start_write(
        self, offset: int, data: bytes | None, length: int, label: str
    ) -> list[tuple[int, Write]]:
        assert offset % SECTOR == length % SECTOR == 0, "whole sectors only"
        started = super().start_write(offset, data, length, label)
        self._now += 1
        for nr, write in started:
            write.began = self._now
            for read in self._reads:
                if nr in read.allowed:
                    read.allowed[nr].append(write)
                    read.quiet.discard(nr)
        return started

    def end_write(
        self, started: list[tuple[int, Write]], *, ok: bool, fua: bool = False
    ) -> None:
        self._now += 1
        self.nr_changes += 1
        for nr, write in started:
            write.ended = ok
            write.over = self._now
            if ok and fua:
                self._drop(nr, write.began)

    def start_flush(self) -> list[Write]:
        """For each sector, the write that was submitted last among those that have ended.

        As it is now: what a read tells of the order later is not promised.
        """
        return [
            replace(max((w for w in s.history if w.ended), key=lambda w: w.began))
            for s in self._sectors
        ]

    def end_flush(self, promised: list[Write], *, ok: bool) -> None:
        if not ok:
            return
        self.nr_changes += 1
        for nr, write in enumerate(promised):
            self._drop(nr, write.began)

    def start_read(self, offset: int, length: int) -> OverlapRead:
        """A read is submitted."""
        numbers = range(offset // SECTOR, -(-(offset + length) // SECTOR))
        read = OverlapRead(
            {nr: self._visible_at(nr) for nr in numbers},
            {
                nr
                for nr in numbers
                if all(w.over < float("inf") for w in self._sectors[nr].history)
            },
        )
        self._reads.add(read)
        return read

    def end_read(
        self, read: OverlapRead, offset: int, data: bytes | memoryview
    ) -> None:
        """The read has ended: hold it against the writes that it may have seen.

        Raises: Violation.
        """
        self._reads.discard(read)
        for nr in read.allowed:
            begin = nr * SECTOR
            low, high = max(begin, offset), min(begin + SECTOR, offset + len(data))
            found = bytes(data[low - offset : high - offset])
            matching = [
                write
                for write in read.allowed[nr]
                if write.value is None
                or write.value[low - begin : high - begin] == found
            ]
            if not matching:
                raise Violation(
                    f"sector {nr}: found {found[:16].hex()}, allowed: "
                    + ", ".join(
                        f"{w.label}={'anything' if w.value is None else w.value[:16].hex()}"
                        for w in read.allowed[nr]
                    )
                )
            if nr in read.quiet and len(matching) == 1 and high - low == SECTOR:
                self._seen(nr, matching[0])

    def check_read(self, offset: int, data: bytes | memoryview) -> None:
        self.end_read(self.start_read(offset, len(data)), offset, data)

    def _visible_at(self, nr: int) -> list[Write]:
        history = self._sectors[nr].history
        newest = max((w.began for w in history if w.ended), default=-1)
        return [write for write in history if not write.over < newest]

    def _seen(self, nr: int, write: Write) -> None:
        """A read without writes in flight has returned this write: the others that had ended are older."""
        if write.ended and len(self._visible_at(nr)) > 1:
            self._now += 1
            write.began = write.over = self._now

    def _drop(self, nr: int, began: float) -> None:
        sector = self._sectors[nr]
        sector.history = [write for write in sector.history if not write.over < began]
