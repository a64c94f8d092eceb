# SPDX-License-Identifier: Apache-2.0
"""The oracle of the crash tests: which bytes a disk may return.

Theory of operation. For each 512-byte sector the model keeps the values that it has held,
oldest first, as `Write`s. A read of a running disk must return the newest value. After a power cut,
a sector may hold any value from the *floor* on. The floor rises only with what a client was
promised:

- a FLUSH that ended with 0 raises it to the newest value whose write had **ended when the
  FLUSH was submitted** (a write that was under way then is not covered);
- a FUA write that ended with 0 raises it to itself.

A write that failed, or that was under way at the cut, may or may not be there. A discard
makes a sector `ANYTHING` until it is written again. After a cut, `settle` takes the content that the
disk returns as the new truth: it is on stable storage, and every later answer is compared with it.
Sectors that may have been discarded are an exception, if `discards_last`: a cache has two copies of
them, which may differ, and either of them may be read.

Concurrent bios must not overlap: the driver waits first (NBD leaves their order open). Where they
may, `tests.support.overlap_model` is the oracle.
"""

from dataclasses import dataclass, field

__all__ = ["SECTOR", "DiskModel", "Violation", "Write"]

SECTOR = 512


class Violation(AssertionError):
    """The disk returned bytes that it must not return."""


@dataclass(slots=True, eq=False)
class Write:
    """One value of one sector; None is ANYTHING (it was discarded).

    Attributes:
        ended: well; a failed write stays possible.
        began, over: its span, for `OverlapModel`.
        owner, in_doubt: the client that wrote it, and whether another client was told that it may be
            lost, for the simulation's model.
    """

    value: bytes | None
    ended: bool = False
    label: str = ""
    began: float = 0
    over: float = float("inf")
    owner: object = None
    in_doubt: bool = False


@dataclass(slots=True)
class _Sector:
    history: list[Write] = field(default_factory=list)


class DiskModel:
    """The values that each sector of a disk may hold.

    Attributes:
        nr_changes: counts up whenever what may be held has changed.
    """

    def __init__(self, content: bytes, *, discards_last: bool = False) -> None:
        assert len(content) % SECTOR == 0
        self.size = len(content)
        self.discards_last = discards_last
        self.nr_changes = 0
        self._sectors: list[_Sector] = []
        self.settle(content)

    def settle(self, content: bytes | memoryview) -> None:
        """Take `content` as the durable truth."""
        assert len(content) == self.size
        self.nr_changes += 1
        before = self._sectors
        self._sectors = [
            _Sector([Write(bytes(content[at : at + SECTOR]), True, "settled")])
            for at in range(0, self.size, SECTOR)
        ]
        if self.discards_last:
            for old, sector in zip(before, self._sectors, strict=False):
                if any(write.value is None for write in old.history):
                    sector.history = [Write(None, True, "discarded")]

    def start_write(
        self, offset: int, data: bytes | None, length: int, label: str
    ) -> list[tuple[int, Write]]:
        """Note a write that is submitted now; `data` None is a discard.

        Returns the sectors' new values, for `end_write`.
        """
        self.nr_changes += 1
        started = []
        for nr in range(offset // SECTOR, -(-(offset + length) // SECTOR)):
            history = self._sectors[nr].history
            value: bytes | None = None
            if data is not None:
                value = _patched(history[-1].value, nr * SECTOR, offset, data)
            write = Write(value, False, label)
            history.append(write)
            started.append((nr, write))
        return started

    def end_write(
        self, started: list[tuple[int, Write]], *, ok: bool, fua: bool = False
    ) -> None:
        """The write ended. A failed one stays possible and is never promised."""
        self.nr_changes += 1
        for nr, write in started:
            write.ended = ok
            history = self._sectors[nr].history
            if ok and fua:
                del history[: history.index(write)]

    def start_flush(self) -> list[Write]:
        """A FLUSH is submitted: what it will promise, sector by sector."""
        return [
            next((w for w in reversed(s.history) if w.ended), s.history[0])
            for s in self._sectors
        ]

    def end_flush(self, promised: list[Write], *, ok: bool) -> None:
        """The FLUSH ended; with `ok` what it promised can no longer be lost."""
        if not ok:
            return
        self.nr_changes += 1
        for sector, write in zip(self._sectors, promised, strict=True):
            if write in sector.history:
                del sector.history[: sector.history.index(write)]

    def lose_unflushed(self) -> None:
        """The running disk has said that writes which no FLUSH has covered may be gone.

        Until it is written again, a sector may hold any value from the floor on.
        """
        self.nr_changes += 1
        for sector in self._sectors:
            for write in sector.history[1:]:
                write.ended = False

    def check_read(self, offset: int, data: bytes | memoryview) -> None:
        """Hold a read of the running disk against the newest values.

        Raises: Violation, naming the sector and what it should hold.
        """
        self._check(offset, data, newest_only=True)

    def check_survivor(self, content: bytes | memoryview, offset: int = 0) -> None:
        """Hold the disk, or a part of it, after a power cut (or a failure) against all that
        it may hold.

        Raises: Violation, naming the sector and what it may hold.
        """
        self._check(offset, content, newest_only=False)

    def may_be_discarded(self, sector_nr: int) -> bool:
        """Whether a DISCARD is, or may be, the last that happened to a sector."""
        return any(write.value is None for write in self._sectors[sector_nr].history)

    def copy(self) -> "DiskModel":
        """Return a model of a power cut at this moment, which later promises do not change."""
        model = DiskModel(b"", discards_last=self.discards_last)
        model.size = self.size
        model._sectors = [_Sector(list(sector.history)) for sector in self._sectors]
        return model

    def _check(self, offset: int, data: bytes | memoryview, newest_only: bool) -> None:
        end = offset + len(data)
        for nr in range(offset // SECTOR, -(-end // SECTOR)):
            begin = nr * SECTOR
            low, high = max(begin, offset), min(begin + SECTOR, end)
            found = bytes(data[low - offset : high - offset])
            history = self._sectors[nr].history
            allowed = _visible(history) if newest_only else history
            if not any(
                w.value is None or w.value[low - begin : high - begin] == found
                for w in allowed
            ):
                raise Violation(
                    f"sector {nr}: found {_shown(found)}, allowed: "
                    + ", ".join(f"{w.label}={_shown(w.value)}" for w in allowed)
                )


def _visible(history: list[Write]) -> list[Write]:
    """Return the writes that a read of the running disk may see: the last write that ended well, and any
    later one that failed or is under way."""
    for nr in range(len(history) - 1, -1, -1):
        if history[nr].ended:
            return history[nr:]
    return history


def _patched(old: bytes | None, begin: int, offset: int, data: bytes) -> bytes | None:
    low, high = max(begin, offset), min(begin + SECTOR, offset + len(data))
    if high - low == SECTOR:
        return data[low - offset : high - offset]
    if old is None:
        return None  # a part of a discarded sector is written: the rest may still hold anything
    return old[: low - begin] + data[low - offset : high - offset] + old[high - begin :]


def _shown(value: bytes | None) -> str:
    return "anything" if value is None else value[:16].hex()
