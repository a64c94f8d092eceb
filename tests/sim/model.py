# SPDX-License-Identifier: Apache-2.0
"""The oracle, held at the client: `DiskModel`, with reads that overlap writes.

Theory of operation. A client knows when it sent a request and when the answer reached it;
what the server did between is its own affair. So a READ may return, sector by sector, what was
the newest value when it was sent, or any value whose write was sent since (`start_read`, `end_read`).
A FLUSH promises the writes whose answers some client had when it was sent, once its own answer
has reached the client.

A device below may lose its power, and the machine goes on (`lose_unflushed`): each sector may
then hold anything from its floor on. A write that was in flight when that happened proves nothing by
its answer: it may have been carried out before; nor does a FLUSH. `nr_losses` tells them.

A failed commit takes bits back that were never promised: a clone then reads from its source
again (`is_lossy`), and from then on a READ may return whatever a power cut may leave.

After a power cut the disk is read piece by piece, and each piece is held against all it may
be and becomes the truth at once (`check_survivor_at`): the power may go again before the rest
was looked at, or a bad disk may hide it. Until then that rest holds anything from its floor on,
whatever a client had been answered before the cut.
"""

from collections.abc import Sequence

from tests.support.model import SECTOR, DiskModel, Violation, Write

__all__ = ["SECTOR", "ClientModel", "RunningRead", "Violation"]


class RunningRead:
    """A READ on its way: the values that each of its sectors may come back with."""

    __slots__ = ("allowed",)

    def __init__(self, allowed: dict[int, list[Write]]) -> None:
        self.allowed = allowed


class ClientModel(DiskModel):
    """See the module head.

    Attributes:
        nr_losses: how often `lose_unflushed` was called.
        is_lossy: a write may be undone at any time, until it is flushed.
    """

    def __init__(self, content: bytes, *, discards_last: bool = False) -> None:
        self._reads: set[RunningRead] = set()
        self.nr_losses = 0
        self.is_lossy = False
        self._partial: set[Write] = set()  # in flight, and over a part of their sector
        super().__init__(content, discards_last=discards_last)

    def start_write(
        self, offset: int, data: bytes | None, length: int, label: str
    ) -> list[tuple[int, Write]]:
        started = super().start_write(offset, data, length, label)
        for read in self._reads:
            for nr, write in started:
                if nr in read.allowed:
                    read.allowed[nr].append(write)
        for nr, write in started:
            if offset > nr * SECTOR or offset + length < (nr + 1) * SECTOR:
                self._partial.add(write)
        return started

    def end_write(
        self, started: list[tuple[int, Write]], *, ok: bool, fua: bool = False
    ) -> None:
        super().end_write(started, ok=ok, fua=fua)
        self._partial.difference_update(write for _, write in started)

    def is_certain_at(self, offset: int) -> bool:
        """Whether a sector's value is known, so that a part of it may be written.

        True at the border of two sectors. A write whose answer was lost leaves two values.
        """
        if offset % SECTOR == 0:
            return True
        return len(self._readable(self._sectors[offset // SECTOR].history)) == 1

    def start_read(self, offset: int, length: int) -> RunningRead:
        """A READ is sent."""
        read = RunningRead(
            {
                nr: self._readable(self._sectors[nr].history)
                for nr in range(offset // SECTOR, -(-(offset + length) // SECTOR))
            }
        )
        self._reads.add(read)
        return read

    def drop_read(self, read: RunningRead) -> None:
        """The READ failed, or will never be answered."""
        self._reads.discard(read)

    def check_piece(
        self, read: RunningRead, offset: int, data: bytes | memoryview
    ) -> None:
        """Hold a part of what a READ brought against the model. Raises: Violation."""
        for nr, begin, found in _by_sector(offset, data):
            _check(nr, begin, found, read.allowed[nr])

    def check_survivor_at(self, offset: int, data: bytes | memoryview) -> None:
        """Hold whole sectors, read after a power cut, against all they may hold; settle them.

        Raises: Violation.
        """
        assert offset % SECTOR == len(data) % SECTOR == 0
        for nr, begin, found in _by_sector(offset, data):
            sector = self._sectors[nr]
            _check(nr, begin, found, sector.history)
            if self.discards_last and self.may_be_discarded(nr):
                sector.history = [Write(None, True, "discarded")]
            else:
                sector.history = [Write(found, True, "survived")]

    def start_flush_of(self, owner: object) -> list[Write]:
        """As `start_flush`, for one of several who flush: what others wrote may be in doubt."""
        return [
            next(
                (
                    w
                    for w in reversed(s.history)
                    if w.ended and (w.owner is owner or not w.in_doubt)
                ),
                s.history[0],
            )
            for s in self._sectors
        ]

    def doubt(self, owner: object) -> None:
        """A FLUSH of `owner` has failed: what it has written and not flushed may be lost.

        What others have written too, but they must be told themselves.
        """
        self.nr_changes += 1
        for sector in self._sectors:
            sector.history[0].ended = True
            for write in sector.history[1:]:
                if write.owner is owner:
                    write.ended = False
                else:
                    write.in_doubt = True

    def end_flush_of(self, owner: object, promised: list[Write]) -> None:
        """That FLUSH has ended with 0. What was put in doubt meanwhile is not promised.

        Also what another FLUSH of `owner` has put in doubt, which was answered while this one was on
        its way.
        """
        self.nr_changes += 1
        for sector, write in zip(self._sectors, promised, strict=True):
            is_doubtful = write.in_doubt and write.owner is not owner
            if write.ended and not is_doubtful and write in sector.history:
                del sector.history[: sector.history.index(write)]

    def lose_unflushed(self) -> None:
        """A device has lost its power, and what was not flushed may be gone."""
        self.nr_losses += 1
        self._keep_only_promises()
        self._doubt()

    def become_lossy(self) -> None:
        """A disk has failed under something that believes its own bits."""
        self.is_lossy = True
        self._doubt()

    def _keep_only_promises(self) -> None:
        """Each sector may hold anything from its floor on: no later answer counts any more."""
        for sector in self._sectors:
            sector.history[0].ended = True
            for write in sector.history[1:]:
                write.ended = False

    def _doubt(self) -> None:
        """Let reads in flight return older values, too, and writes of parts of a sector be laid over them."""
        for write in self._partial:
            write.value = None
        for read in self._reads:
            for nr, allowed in read.allowed.items():
                known = set(map(id, allowed))
                older = [w for w in self._sectors[nr].history if id(w) not in known]
                allowed[:0] = older

    def _readable(self, history: list[Write]) -> list[Write]:
        return history[:] if self.is_lossy else _visible(history)

    def power_off(self) -> None:
        """No READ will be answered any more, and what a disk did wrong is over.

        A life may end before all was looked at, or a bad disk not let us: until a sector is
        (`check_survivor_at`), all that the power cut may have left of it stays possible.
        """
        self._keep_only_promises()
        self._reads.clear()
        self._partial.clear()
        self.is_lossy = False


def _visible(history: list[Write]) -> list[Write]:
    for nr in range(len(history) - 1, -1, -1):
        if history[nr].ended:
            return history[nr:]
    return history[:]


def _by_sector(offset: int, data: bytes | memoryview) -> list[tuple[int, int, bytes]]:
    """(sector number, first byte within it, the bytes) of each sector that is touched."""
    view, end, pieces = memoryview(data), offset + len(data), []
    at = offset
    while at < end:
        stop = min(end, (at // SECTOR + 1) * SECTOR)
        piece = bytes(view[at - offset : stop - offset])
        pieces.append((at // SECTOR, at % SECTOR, piece))
        at = stop
    return pieces


def _check(nr: int, begin: int, found: bytes, allowed: Sequence[Write]) -> None:
    end = begin + len(found)
    # The newest first: it is nearly always that.
    for write in reversed(allowed):
        if write.value is None or write.value[begin:end] == found:
            return
    shown = ", ".join(
        f"{w.label}={'anything' if w.value is None else w.value[begin:end][:16].hex()}"
        for w in allowed
    )
    raise Violation(f"sector {nr}: found {found[:16].hex()}, allowed: {shown}")
