# SPDX-License-Identifier: Apache-2.0
"""Metadata images of every age, made by the real code; and opening them within bounds.

An image is small: 1200 regions, 48 blocks. Snapshots have several records all the same, as
chunks are made small while an image is built; a reader knows nothing of chunks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, Final, Protocol, TypeVar

import msgspec
import pytest
from bitarray import bitarray

from nbdtarget_metadata.clone import encoding, records
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.clone.superblock import CloneSuperblock
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, HEADER_SIZE
from nbdtarget_metadata.log.superblock import (
    CLEAN_SHUTDOWN,
    NEEDS_CHECK,
    SUPERBLOCK_BLOCKS,
    Superblock,
    superblock_writes,
)
from nbdtarget_metadata.operations import Answer, Flush, Read, Steps, Write
from tests.support.metadata.small_clone import commit
from tests.support.metadata.store import Store, drive

__all__ = [
    "NR_REGIONS",
    "REGION_SIZE",
    "TARGET_SIZE",
    "Aged",
    "AnyAged",
    "ages",
    "format_steps",
    "live_blocks",
    "needing_check",
    "open_image",
    "opening",
    "record_blocks",
    "run_bounded",
    "vouched_bits",
]

NR_REGIONS: Final = 1200
REGION_SIZE: Final = 4096
TARGET_SIZE: Final = NR_REGIONS * REGION_SIZE - 512
UUID: Final = bytes(range(16))

T = TypeVar("T")


class AnyAged(Protocol):
    """An image of either kind, as far as damaging it goes."""

    @property
    def image(self) -> bytes: ...

    def superblock(self) -> Superblock: ...

    def live_blocks(self) -> Sequence[int]:
        """Blocks of the records that the superblock vouches for."""


@dataclass(frozen=True)
class Aged:
    """One image.

    Attributes:
        states: the bits of each generation that a superblock was ever written for.
        acknowledged: the generation that must never be rolled back.
    """

    name: str
    image: bytes
    states: dict[int, bytes]
    acknowledged: int

    def superblock(self) -> CloneSuperblock:
        return open_image(self.image)._superblock

    def live_blocks(self) -> range:
        superblock = self.superblock()
        return range(superblock.snapshot_block, superblock.journal_end)


class Life:
    """A clone that is led through the ages."""

    def __init__(self) -> None:
        self.store = Store(CloneMetadata.device_size_min(NR_REGIONS))
        self.metadata = drive(
            self.store,
            format_steps(CloneMetadata.device_size_min(NR_REGIONS)),
        )
        bits = self.metadata.hydrated.tobytes()
        self.states = {0: bits, 1: bits}
        self.next_region = 1

    def change(self, count: int = 1) -> None:
        for _ in range(count):
            self.metadata.set_hydrated(self.next_region, self.next_region + 1)
            self.next_region = (self.next_region + 7) % NR_REGIONS

    def commit(self, *, clean: bool = False) -> None:
        self.change()
        commit(self.store, self.metadata, clean=clean)
        self.states[self.metadata.generation] = self.metadata.hydrated.tobytes()

    def fill(self) -> None:
        while not self.metadata.needs_compaction:
            self.commit()

    def compact(self) -> None:
        drive(self.store, self.metadata.compact())

    def interrupt_compaction(self) -> None:
        """As a crash would: one record of the snapshot is written, no more."""
        for operation in self.metadata.compact():
            if isinstance(operation, Write):
                self.store.do(operation)
                return

    def interrupt_commit(self, *, copies: int) -> None:
        """Journal a transaction, then write only so many copies of its superblock."""
        self.change()
        transaction = self.metadata.pre_commit()
        assert transaction is not None
        drive(self.store, transaction.journal())
        for write in islice(transaction.superblock(), copies):
            assert isinstance(write, Write)
            self.store.do(write)
        if copies:
            bits = self.metadata.hydrated.tobytes()
            self.states[transaction.generation] = bits

    def overtake(self) -> None:
        """Commit until a commit writes a snapshot of its own."""
        arena = self.metadata._superblock.arena
        while self.metadata._superblock.arena == arena:
            self.commit()

    def aged(self, name: str) -> Aged:
        image = bytes(self.store.current())
        return Aged(name, image, dict(self.states), self.metadata.generation)


def _fresh(life: Life) -> None:
    """Formatted, and nothing else."""


def _commits(life: Life) -> None:
    for _ in range(3):
        life.change(20)
        life.commit()


def _mid_journal(life: Life) -> None:
    _commits(life)
    life.interrupt_commit(copies=0)


def _torn_commit(life: Life) -> None:
    _commits(life)
    life.interrupt_commit(copies=1)


def _compacted(life: Life) -> None:
    life.change(300)
    life.fill()
    life.compact()
    life.commit()
    life.commit()


def _compaction_interrupted(life: Life) -> None:
    _compacted(life)
    life.fill()
    life.interrupt_compaction()
    life.commit()


def _overtaken(life: Life) -> None:
    _compacted(life)
    life.overtake()
    life.commit()


def _clean_shutdown(life: Life) -> None:
    _compacted(life)
    life.commit(clean=True)


_AGES: Final[tuple[Callable[[Life], None], ...]] = (
    _fresh,
    _commits,
    _mid_journal,
    _torn_commit,
    _compacted,
    _compaction_interrupted,
    _overtaken,
    _clean_shutdown,
)


@cache
def ages() -> dict[str, Aged]:
    """Every age by its name."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK_BYTES", 64)
        patch.setattr(encoding, "CHUNK_REGIONS", 512)
        for live in _AGES:
            life = Life()
            live(life)
            name = live.__name__[1:]
            found[name] = life.aged(name)
    return found


# Opening


def opening(size: int) -> Steps[CloneMetadata]:
    return CloneMetadata.open(
        device_size=size, region_size=REGION_SIZE, target_size=TARGET_SIZE
    )


def format_steps(size: int) -> Steps[CloneMetadata]:
    return CloneMetadata.format(
        device_size=size, region_size=REGION_SIZE, target_size=TARGET_SIZE, uuid=UUID
    )


def run_bounded(image: bytes | bytearray, steps: Steps[T]) -> T:
    """Run `steps`, which must not write, over `image`, and hold them to their bounds.

    Whatever lengths the image claims: nothing is read behind its end, no block more than
    twice on average, and the number of steps follows its size. So nothing hangs.
    """
    view = memoryview(image)
    bytes_left = 2 * len(image)
    steps_left = 16 + 4 * (len(image) // BLOCK_SIZE)
    answer: Answer | tuple[Answer, ...] = None
    while True:
        try:
            operation = steps.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result
        steps_left -= 1
        assert steps_left >= 0, "too many steps"
        answer = None
        if isinstance(operation, Read):
            end = operation.offset + operation.length
            assert 0 <= operation.offset <= end <= len(image), operation
            bytes_left -= operation.length
            assert bytes_left >= 0, "too much is read"
            answer = view[operation.offset : end]
        elif not isinstance(operation, Flush):
            assert operation == (), "opening writes nothing"


def open_image(image: bytes | bytearray) -> CloneMetadata:
    return run_bounded(image, opening(len(image)))


# By FORMAT.md alone, with none of our code


def record_blocks(image: bytes, superblock: CloneSuperblock) -> list[tuple[int, int]]:
    """Return (block, bytes of header and body) of each record that is vouched for."""
    found = []
    block = superblock.snapshot_block
    while block < superblock.journal_end:
        at = block * BLOCK_SIZE
        length = HEADER_SIZE + int.from_bytes(image[at + 12 : at + 16], "little")
        found.append((block, length))
        block += -(-length // BLOCK_SIZE)
    return found


def vouched_bits(image: bytes, superblock: CloneSuperblock) -> bytes:
    """Return the bitmap that the vouched records hold, and nothing else."""
    bits = bitarray(superblock.nr_regions, endian="little")
    for block, length in record_blocks(image, superblock):
        at = block * BLOCK_SIZE
        body = image[at + HEADER_SIZE : at + length]
        record: list[Any] = msgspec.msgpack.decode(body)
        if record[0] == "runs":
            for run in range(0, len(record[3]), 8):
                begin = int.from_bytes(record[3][run : run + 4], "little")
                count = int.from_bytes(record[3][run + 4 : run + 8], "little")
                for region in range(begin, begin + count):
                    bits[region] = 1
        else:
            for region in range(8 * len(record[4])):
                if record[4][region // 8] >> region % 8 & 1:
                    bits[record[3] + region] = 1
    return bits.tobytes()


assert SUPERBLOCK_BLOCKS == 4


def live_blocks(name: str) -> list[int]:
    superblock = ages()[name].superblock()
    return list(range(superblock.snapshot_block, superblock.journal_end))


def needing_check(name: str, *, clean: bool = False) -> bytes:
    """The image with the flag, in an otherwise equal next generation."""
    aged = ages()[name]
    store = Store(len(aged.image), aged.image)
    superblock = aged.superblock()
    flags = NEEDS_CHECK | (CLEAN_SHUTDOWN if clean else 0)
    generation = superblock.generation + 1
    marked = msgspec.structs.replace(superblock, flags=flags, generation=generation)
    for write in superblock_writes(marked):
        store.do(write)
    return bytes(store.durable)
