# SPDX-License-Identifier: Apache-2.0
"""A clone that lives on a `Store`: bits set, commits, compactions, kills, crashes, by a seed.

Everything that takes time (a metadata operation, the destination's flush) is submitted and ends
later, in an order that the seed chooses. After every event the power is cut, in a copy: each
image that the store may leave is opened and judged.

The oracle. An image opens; at a generation that was pre-committed, and not before the last one
that anybody could rely on; with exactly that generation's bits; and for each of them the
destination's data is durable. It still does so after any one superblock copy has rotted.

`Mutant` switches deliberate bugs on, in the driver; bugs in the code itself are patched in by
the tests.
"""

import random
from dataclasses import dataclass

from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.clone.metadata import CloneMetadata, CloneTransaction
from nbdtarget_metadata.clone.superblock import device_size_with
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.layout import JOURNAL_BLOCKS_MIN
from nbdtarget_metadata.log.superblock import SUPERBLOCK_BLOCKS
from nbdtarget_metadata.operations import Flush, Read, Steps, Write
from tests.support.metadata.store import SECTOR, Store, Ticket, drive, read_image

NR_REGIONS = 2048
REGION_SIZE = 4096
TARGET_SIZE = NR_REGIONS * REGION_SIZE - 512
UUID = bytes(range(16))


@dataclass(frozen=True)
class Mutant:
    """Which bugs the driver has."""

    journal_unflushed: bool = False
    superblock_without_fua: bool = False
    superblock_before_destination: bool = False
    snapshot_unflushed: bool = False
    acknowledged_early: bool = False
    single_copy: bool = False
    opened_without_flush: bool = False


class Process:
    """A generator with the operations that it waits for."""

    def __init__(self, world: "CloneWorkload", steps: Steps[None], kind: str) -> None:
        self.world = world
        self.steps = steps
        self.kind = kind
        self.tickets: list[Ticket] = []
        self.written: list[Ticket] = []
        self.done = False
        self._advance()

    def end_one(self, rng: random.Random) -> None:
        """End one of the operations under way; go on when it was the last."""
        ticket = self.tickets.pop(rng.randrange(len(self.tickets)))
        self.world.store.end(ticket)
        if not self.tickets:
            self._advance()

    def _advance(self) -> None:
        mutant = self.world.mutant
        while not self.tickets:
            try:
                operation = self.steps.send(None)
            except StopIteration:
                self.done = True
                return
            if isinstance(operation, Read | Write | Flush):
                operation = (operation,)
            for each in operation:
                if isinstance(each, Write) and mutant.superblock_without_fua:
                    each = each._replace(fua=False)
                if isinstance(each, Flush) and self._skips_flush():
                    continue
                if self.kind == "superblock" and self.written and mutant.single_copy:
                    continue
                ticket = self.world.store.submit(each)
                if isinstance(each, Write):
                    self.written.append(ticket)
                elif mutant.snapshot_unflushed and self.kind == "journal":
                    ticket.covered = [w for w in ticket.covered if w in self.written]
                self.tickets.append(ticket)

    def _skips_flush(self) -> bool:
        mutant = self.world.mutant
        if self.kind == "compact":
            return mutant.snapshot_unflushed
        return self.kind == "journal" and mutant.journal_unflushed


class CloneWorkload:
    """See the module head. `store` and `metadata` are of the life now running."""

    def __init__(
        self, seed: int, mutant: Mutant | None = None, *, lazy: bool = False
    ) -> None:
        self.rng = random.Random(seed)
        # Apart, as which states are judged depends on identities: events are the seed's alone.
        self.image_rng = random.Random(seed + 1)
        self.mutant = mutant or Mutant()
        self.lazy = lazy  # compactions are slow, so that commits overtake them
        # With a longer journal, compactions catch up beyond the place of a snapshot.
        longer = 8 if seed % 4 >= 2 else 0
        self.size = device_size_with(NR_REGIONS, JOURNAL_BLOCKS_MIN + longer)
        self.store = Store(self.size)
        self.expected = {0: bytes(NR_REGIONS // 8), 1: bytes(NR_REGIONS // 8)}
        self.acknowledged = 1
        self.destination = zeros(NR_REGIONS, "little")
        self.nr_images = 0
        self.nr_moves = 0
        self.nr_overtaken = 0
        self._seen: set[tuple[object, ...]] = set()
        self.metadata = self._format()
        self._forget_processes()

    def _format(self) -> CloneMetadata:
        steps = CloneMetadata.format(
            device_size=self.size,
            region_size=REGION_SIZE,
            target_size=TARGET_SIZE,
            uuid=UUID,
        )
        return drive(self.store, steps)

    def _forget_processes(self) -> None:
        self.journal: Process | None = None
        self.superblock: Process | None = None
        self.compaction: Process | None = None
        self.transaction: CloneTransaction | None = None
        self.flush_of: bitarray | None = None

    # Events

    def run(self, nr_events: int) -> None:
        for _ in range(nr_events):
            self._event()
            self.check()

    def _event(self) -> None:
        draw = self.rng.random()
        if draw < 0.006:
            self.kill()
        elif draw < 0.008:
            self.crash()
        elif draw < 0.01:
            self.metadata.abort()
            assert (
                self.metadata.hydrated.tobytes()
                == (self.expected[self.metadata.generation])
            )
            self.kill()
        elif draw < 0.3:
            self._set_hydrated()
        elif draw < (0.32 if self.lazy else 0.45):
            self._step_compaction()
        else:
            self._step_commit()

    def _set_hydrated(self) -> None:
        begin = self.rng.randrange(NR_REGIONS)
        count = 1 if self.rng.random() < 0.8 else self.rng.randrange(1, 6)
        self.metadata.set_hydrated(begin, min(begin + count, NR_REGIONS))

    def _step_compaction(self) -> None:
        if self.compaction is None:
            if self.metadata.needs_compaction or self.rng.random() < 0.05:
                self.compaction = Process(self, self.metadata.compact(), "compact")
        elif not self.compaction.done:
            self.compaction.end_one(self.rng)
        if self.compaction is not None and self.compaction.done:
            self.compaction = None

    def _step_commit(self) -> None:
        if self.transaction is None:
            clean = self.rng.random() < 0.1
            self.transaction = self.metadata.pre_commit(clean_shutdown=clean)
            if self.transaction is None:
                return
            self.nr_moves += self.transaction.moves
            self.nr_overtaken += self.transaction.moves and self.compaction is not None
            self.expected[self.transaction.generation] = (
                self.metadata.hydrated.tobytes()
            )
            self.flush_of = self.metadata.hydrated.copy()
            self.journal = Process(self, self.transaction.journal(), "journal")
        elif self.superblock is not None:
            self._step_superblock()
        elif self.flush_of is not None and self.rng.random() < 0.5:
            self._end_destination_flush()
        elif self.journal is not None and not self.journal.done:
            self.journal.end_one(self.rng)
        elif self.flush_of is None or self.mutant.superblock_before_destination:
            steps = self.transaction.superblock()
            self.superblock = Process(self, steps, "superblock")
            if self.mutant.acknowledged_early:
                self.acknowledged = self.transaction.generation

    def _end_destination_flush(self) -> None:
        assert self.flush_of is not None
        self.destination |= self.flush_of
        self.flush_of = None

    def _step_superblock(self) -> None:
        assert self.superblock is not None
        assert self.transaction is not None
        self.superblock.end_one(self.rng)
        if not self.superblock.done:
            return
        self.transaction.done()
        self.acknowledged = self.transaction.generation
        self.transaction = self.superblock = self.journal = None
        if self.flush_of is not None:
            self._end_destination_flush()

    # Ends of a life

    def kill(self) -> None:
        """SIGKILL and start again: the device's cache lives on."""
        self.store.kill(self.rng)
        self._reopen()

    def crash(self) -> None:
        """Cut the power, for good, and start again."""
        images = list(self.store.crash_images(self.rng))
        self.store = Store(self.size, self.rng.choice(images))
        self._reopen()

    def _reopen(self) -> None:
        self._forget_processes()
        log = len(self.store.log)
        self.store.flush_counts = not self.mutant.opened_without_flush
        self.metadata = drive(self.store, _opening(self.size))
        self.store.flush_counts = True
        assert not any(isinstance(each, Write) for each in self.store.log[log:])
        generation = self.metadata.generation
        for later in [each for each in self.expected if each > generation]:
            del self.expected[later]
        if not self.metadata.changed:
            # From here on a FLUSH is acknowledged without any metadata I/O.
            self.acknowledged = generation

    # The oracle

    def check(self) -> None:
        """Judge each image that a crash may leave now; see the module head."""
        key = (*self.store.state(), self.acknowledged, self.destination.count())
        if key in self._seen:
            return
        self._seen.add(key)
        for image in self.store.crash_images(self.image_rng):
            self.judge(image)
        slot_copy = self.image_rng.randrange(SUPERBLOCK_BLOCKS)
        self.judge(rotten(image, slot_copy * BLOCK_SIZE // SECTOR))

    def judge(self, image: bytes) -> None:
        self.nr_images += 1
        metadata = open_image(image)
        generation = metadata.generation
        assert generation >= self.acknowledged, "an acknowledged commit is lost"
        bits = metadata.hydrated
        assert bits.tobytes() == self.expected[generation], "a third state"
        assert metadata.nr_hydrated == bits.count()
        assert (bits & ~self.destination).count() == 0, "hydrated before its data"


def rotten(image: bytes, sector: int) -> bytes:
    """Return `image` with another sector's worth of bytes at `sector`."""
    at = sector * SECTOR
    flipped = bytes(byte ^ 0x55 for byte in image[at : at + SECTOR])
    return image[:at] + flipped + image[at + SECTOR :]


def open_image(image: bytes) -> CloneMetadata:
    """Open without writing."""
    return read_image(image, _opening(len(image)))


def _opening(size: int) -> Steps[CloneMetadata]:
    return CloneMetadata.open(
        device_size=size, region_size=REGION_SIZE, target_size=TARGET_SIZE
    )
