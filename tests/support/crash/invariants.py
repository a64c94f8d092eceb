# SPDX-License-Identifier: Apache-2.0
"""The invariants of the clone, I1 to I7, which must hold besides the oracle; and the base class for any target.

Theory of operation. `Invariants` is what the machine knows: it says when a FLUSH is submitted
and ends, when a verb comes between, and when it is time to look. `CloneInvariants` also watches
the crash devices, so most of what it asserts it sees with its own eyes:

    I1  at any crash point, a region whose bit is committed holds on the destination what the
        oracle allows                                                      the crash images
    I2  the source is never modified                                       bios of the source
    I3  bits never go 1 -> 0, but in core after a failed commit; and not across a power
        cut, once a FLUSH was acknowledged                                 the bitmap, each look
    I4  at most one hydration per region; a write to it waits              destination bios
    I5  with no metadata change, a FLUSH is one destination flush and no metadata write
    I6  with a change, one FLUSH is one destination flush and one metadata transaction
    I7  background hydrations, when one more starts, and the foreground ones do not exceed
        the threshold                                                      locks, jobs

I5 and I6 are held against a FLUSH that begins when no commit and no compaction is
running, until it ends; if another FLUSH or a verb comes between, only as far as one can
still tell whose I/O it was. `counts` says how often each was held against something: a check
that never had anything to check proves nothing.

Each invariant is one function; each raises `Broken` with its name.
"""

from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from bitarray import bitarray

from nbdtarget.bio import (
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.targets.clone.holes import Piece
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget.targets.prison import Cell
from nbdtarget_metadata.mode import Mode
from tests.support.crash.images import committed_bits
from tests.support.devices import CrashDevice
from tests.support.model import DiskModel

__all__ = ["Broken", "CloneInvariants", "Invariants"]

WRITES: Final = (OP_WRITE, OP_WRITE_ZEROES, OP_DISCARD)


class Broken(AssertionError):
    """An invariant does not hold."""


class Invariants:
    """No invariants: for a target that keeps no state."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.nr_jobs_done = 0

    def promised(self) -> object:
        """Return the promises that a power cut now must keep, besides those that the model knows."""
        return None

    def look(self) -> None:
        """Check the invariants, because something may have changed. Raises: Broken."""

    def verb_begins(self) -> None:
        """Note that a verb begins (a suspend, a message, …), whose I/O does not belong to a FLUSH in flight."""

    def flush_submitted(self) -> object:
        """Note that a FLUSH is submitted to the running disk. The result is passed to `flush_ended`."""
        return None

    def flush_ended(self, begun: object) -> None:
        """Note that this FLUSH has ended with 0. Raises: Broken."""


@dataclass
class _Flush:
    """Where things stood when a FLUSH was submitted."""

    bits: bitarray
    was_quiet: bool
    was_changed: bool
    generation: int
    nr_destination_flushes: int
    nr_metadata_writes: int
    nr_flushes: int
    nr_verbs: int


class CloneInvariants(Invariants):
    """Watches one life of a clone. Put on its devices by the rig.

    Args:
        find_target: returns what serves bios now, if anything does.
        content: of the source.
        before: of the life before the power cut; its `counts` go on.

    Attributes:
        floor: bits that an acknowledged FLUSH has made durable.
        nr_jobs_done: background hydrations that have ended.
    """

    def __init__(
        self,
        find_target: Callable[[], CloneTarget | None],
        source: CrashDevice,
        destination: CrashDevice,
        metadata: CrashDevice,
        *,
        content: bytes,
        region_size: int,
        before: "CloneInvariants | None" = None,
    ) -> None:
        super().__init__()
        self.find_target = find_target
        self.source = source
        self.destination = destination
        self.metadata = metadata
        self.content = content
        self.region_size = region_size
        self.nr_regions = -(-len(content) // region_size)
        self.floor = bitarray(self.nr_regions, endian="little")
        if before is not None:
            self.counts = before.counts
        self.broken: Broken | None = None
        self.nr_jobs_done = 0
        self._bits: bitarray | None = None
        self._under_way: dict[int, tuple[range, bitarray]] = {}
        self._jobs: dict[Cell, int] = {}
        self._nr_destination_flushes = 0
        self._nr_metadata_writes = 0
        self._nr_flushes = 0
        self._nr_verbs = 0
        for device in (source, destination, metadata):
            device.watchers.append(self)

    def watch_jobs(self, target: CloneTarget) -> None:
        """See this target's background jobs begin. Call before it is resumed."""
        hydration = target._hydration
        job = hydration._job

        def watched_job(
            cell: Cell, weight: int, pieces: list[Piece], *, is_wanted: bool
        ) -> Coroutine[Any, Any, None]:
            self.i7_hydrations_stay_under_the_threshold(target, cell)
            return self._until_done(
                cell, lambda: job(cell, weight, pieces, is_wanted=is_wanted)
            )

        hydration._job = watched_job  # type: ignore[method-assign]

    # ---- what the devices see ----

    def started(self, device: CrashDevice, bio: Bio) -> None:
        if device is self.source:
            self.i2_source_is_never_modified(bio)
        elif device is self.destination:
            self._nr_destination_flushes += bio.op == OP_FLUSH
            if bio.op in WRITES and (target := self.find_target()):
                self.i4_one_hydration_per_region(target, bio)
        elif bio.op in WRITES:
            self._nr_metadata_writes += 1

    def finished(self, device: CrashDevice, bio: Bio, errno: int) -> None:
        self._under_way.pop(id(bio), None)
        self.look()

    # ---- what the machine says ----

    def promised(self) -> bitarray:
        return self.floor.copy()

    def look(self) -> None:
        """Check all invariants, and raise an error found inside a bio's `submit`, where it may have been caught."""
        if (target := self.find_target()) is not None:
            self.i3_bits_never_go_back(target)
        if self.broken is not None:
            raise self.broken

    def verb_begins(self) -> None:
        self._nr_verbs += 1

    def flush_submitted(self) -> _Flush | None:
        self._nr_flushes += 1
        target = self.find_target()
        if target is None:
            return None
        committer, metadata = target._committer, target._metadata
        return _Flush(
            bits=metadata.hydrated.copy(),
            was_quiet=not (committer._is_running or committer._is_compacting),
            was_changed=metadata.changed,
            generation=metadata.generation,
            nr_destination_flushes=self._nr_destination_flushes,
            nr_metadata_writes=self._nr_metadata_writes,
            nr_flushes=self._nr_flushes,
            nr_verbs=self._nr_verbs,
        )

    def flush_ended(self, begun: object) -> None:
        target = self.find_target()
        if not isinstance(begun, _Flush) or target is None:
            return
        self.floor |= begun.bits
        if begun.was_quiet and begun.nr_verbs == self._nr_verbs:
            if begun.was_changed:
                self.i6_flush_with_change_is_one_transaction(target, begun)
            elif begun.bits == target._metadata.hydrated:
                self.i5_flush_without_change_is_one_flush(begun)

    # ---- the invariants ----

    def i1_committed_regions_are_on_the_destination(
        self, model: DiskModel, promised: bitarray
    ) -> None:
        """Hold what the devices contain, after a power cut, against the oracle."""
        bits = committed_bits(
            self.metadata.image(), self.region_size, len(self.content)
        )
        if bits is None:
            bits = bitarray(self.nr_regions, endian="little")
        if (promised & ~bits).any():
            raise self._broken(f"I3: flushed bits {promised} are now {bits}")
        self.floor, self._bits = bits.copy(), bits
        image = self.destination.image()
        for region_nr in bits.search(1):
            begin = region_nr * self.region_size
            end = min(begin + self.region_size, len(image))
            self.counts["I1"] += 1
            try:
                model.check_survivor(image[begin:end], begin)
            except AssertionError as error:
                raise self._broken(
                    f"I1: region {region_nr} is committed, but {error}"
                ) from error

    def i2_source_is_never_modified(self, bio: Bio) -> None:
        self.counts["I2"] += 1
        if bio.op not in (OP_READ, OP_CACHE):
            raise self._broken(f"I2: the source gets {bio}")

    def i3_bits_never_go_back(self, target: CloneTarget) -> None:
        if target._committer.has_failed or target._metadata.mode is not Mode.RW:
            self._bits = None
            return
        bits = target._metadata.hydrated
        if self._bits is not None and self._bits != bits:
            self.counts["I3"] += 1
            if (self._bits & ~bits).any():
                raise self._broken(f"I3: bits {self._bits} became {bits}")
            self._bits = bits.copy()
        elif self._bits is None:
            self._bits = bits.copy()

    def i4_one_hydration_per_region(self, target: CloneTarget, bio: Bio) -> None:
        """Of two writes to one region at a time, neither may find it unhydrated."""
        bits = target._metadata.hydrated
        regions = range(
            bio.offset // self.region_size,
            -(-(bio.offset + bio.length) // self.region_size),
        )
        for others, then in self._under_way.values():
            for region_nr in range(
                max(regions.start, others.start), min(regions.stop, others.stop)
            ):
                if not (bits[region_nr] and then[region_nr]):
                    raise self._broken(f"I4: {bio} meets another in {region_nr}")
        self.counts["I4"] += not bits[regions.start : regions.stop].all()
        self._under_way[id(bio)] = (regions, bits.copy())

    def i5_flush_without_change_is_one_flush(self, begun: _Flush) -> None:
        self.counts["I5"] += 1
        writes = self._nr_metadata_writes - begun.nr_metadata_writes
        if writes:
            raise self._broken(f"I5: nothing was changed, {writes} metadata writes")
        flushes = self._nr_destination_flushes - begun.nr_destination_flushes
        requests = 1 + self._nr_flushes - begun.nr_flushes
        if not 1 <= flushes <= requests:
            raise self._broken(f"I5: {requests} FLUSH, {flushes} destination flushes")

    def i6_flush_with_change_is_one_transaction(
        self, target: CloneTarget, begun: _Flush
    ) -> None:
        self.counts["I6"] += 1
        transactions = target._metadata.generation - begun.generation
        flushes = self._nr_destination_flushes - begun.nr_destination_flushes
        if (transactions, flushes) != (1, 1):
            raise self._broken(
                f"I6: {transactions} transactions, {flushes} destination flushes"
            )

    def i7_hydrations_stay_under_the_threshold(
        self, target: CloneTarget, cell: Cell
    ) -> None:
        """Counted by ourselves: what is locked and unhydrated is being hydrated."""
        self.counts["I7"] += 1
        self._jobs[cell] = self._weight(cell)
        bits = target._metadata.hydrated
        foreground = sum(
            bits.count(0, held.begin, held.end)
            for held in target._regions.prison._held
            if held not in self._jobs
        )
        background = sum(self._jobs.values())
        if background + foreground > target._hydration.threshold:
            raise self._broken(
                f"I7: {background} in the background, {foreground} in the foreground,"
                f" threshold {target._hydration.threshold}"
            )

    def _weight(self, cell: Cell) -> int:
        """A hole is one, however many regions."""
        begin, end = cell.begin * self.region_size, cell.end * self.region_size
        return cell.end - cell.begin if any(self.content[begin:end]) else 1

    async def _until_done(
        self, cell: Cell, job: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        try:
            await job()
        finally:
            del self._jobs[cell]
            self.nr_jobs_done += 1

    def _broken(self, what: str) -> Broken:
        """Make the error, and keep it: the target may catch the exception of the task that raises it."""
        self.broken = self.broken or Broken(what)
        return self.broken
