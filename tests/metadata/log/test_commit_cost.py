# SPDX-License-Identifier: Apache-2.0
"""The bytes that a commit writes, and the work that it does between two yields. Both are counted, never timed.

A clone of 1 TiB in regions of 4 KiB. Its snapshot is 32 MiB as soon as its regions are
scattered; a thousand random regions change between two commits.
"""

import random
from collections.abc import Generator, Iterable
from typing import Final, Literal, TypeVar

import pytest
from bitarray import bitarray, util

from nbdtarget_metadata.clone import encoding, load, records
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.log import chain, envelope
from nbdtarget_metadata.log.chain import CHUNK_BYTES, STEP_BLOCKS
from nbdtarget_metadata.log.commit import CATCH_UP_MAX
from nbdtarget_metadata.operations import Answer, Flush, Operation, Read, Steps, Write

NR_REGIONS: Final = 1 << 28
CHANGES: Final = 1000
COMMIT_BYTES_MAX: Final = 64 << 10
PIECE: Final = 1 << 16

T = TypeVar("T")


class SparseStore:
    """A metadata device of 130 MiB of which only what is written takes memory."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pieces: dict[int, bytearray] = {}

    def do(self, operation: Operation) -> Answer:
        if isinstance(operation, Read):
            end = operation.offset + operation.length
            data = bytearray()
            while (at := operation.offset + len(data)) < end:
                piece = self._pieces.get(at // PIECE, bytes(PIECE))
                data += piece[at % PIECE : min(PIECE, at % PIECE + end - at)]
            return data
        if isinstance(operation, Write):
            view = memoryview(operation.data)
            at = operation.offset
            while view:
                piece = self._pieces.setdefault(at // PIECE, bytearray(PIECE))
                length = min(len(view), PIECE - at % PIECE)
                piece[at % PIECE : at % PIECE + length] = view[:length]
                view, at = view[length:], at + length
        return None

    def turns(self, steps: Steps[T]) -> Generator[tuple[Operation, ...], None, T]:
        """Carry out one step at a time; yield what it asked for."""
        answer: Answer | tuple[Answer, ...] = None
        while True:
            try:
                asked = steps.send(answer)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if isinstance(asked, Read | Write | Flush):
                answer = self.do(asked)
                yield (asked,)
            else:
                answer = tuple(self.do(each) for each in asked)
                yield asked

    def run(self, steps: Steps[T], meter: "Meter | None" = None) -> T:
        """Carry out all steps; the meter sees where each ends."""
        turns = self.turns(steps)
        while True:
            try:
                next(turns)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if meter is not None:
                meter.step = 0


class Clone:
    """The metadata of a clone, and a client that writes all over it."""

    def __init__(
        self, nr_regions: int = NR_REGIONS, meter: "Meter | None" = None
    ) -> None:
        self.nr_regions = nr_regions
        self.store = SparseStore(CloneMetadata.device_size_for(nr_regions))
        self.rng = random.Random(9)
        self.geometry = {"region_size": 4096, "target_size": nr_regions * 4096}
        steps = CloneMetadata.format(
            device_size=self.store.size, uuid=bytes(16), **self.geometry
        )
        self.metadata = self.store.run(steps, meter)

    def opened(self, meter: "Meter | None" = None) -> CloneMetadata:
        """Open the metadata that is on the device now."""
        size = self.store.size
        steps = CloneMetadata.open(device_size=size, **self.geometry)
        return self.store.run(steps, meter)

    def change(self, nr: int = CHANGES) -> None:
        for _ in range(nr):
            region_nr = self.rng.randrange(self.nr_regions)
            self.metadata.set_hydrated(region_nr, region_nr + 1)

    def commit(self, *, clean: bool = False) -> list[Operation]:
        """Commit; return all that was asked for."""
        transaction = self.metadata.pre_commit(clean_shutdown=clean)
        assert transaction is not None
        asked: list[Operation] = []
        for steps in (transaction.journal(), transaction.superblock()):
            for operations in self.store.turns(steps):
                asked += operations
        transaction.done()
        return asked


def bytes_written(asked: Iterable[Operation]) -> int:
    return sum(len(each.data) for each in asked if isinstance(each, Write))


@pytest.mark.slow
def test_commit_writes_what_changed_beside_a_compaction_too() -> None:
    clone = Clone()
    clone.change(100_000)  # scattered: each chunk of the snapshot is all its bits
    clone.commit()
    commits = []
    snapshot = 0
    for operations in clone.store.turns(clone.metadata.compact()):
        # A commit for each chunk: much more than a compaction leaves to the last one.
        if written := bytes_written(operations):
            snapshot += written
            clone.change()
            commits.append(clone.commit())
    assert snapshot > NR_REGIONS // 8
    assert len(commits) > 10 * CATCH_UP_MAX // CHANGES
    for _ in range(2):
        clone.change()
        commits.append(clone.commit())
        assert clone.metadata._superblock.arena == 1, "it has switched at once"
    for asked in commits:
        assert bytes_written(asked) < COMMIT_BYTES_MAX
        assert sum(isinstance(each, Flush) for each in asked) == 1
    assert clone.opened().hydrated == clone.metadata.hydrated


def test_commit_is_one_journal_write_a_flush_and_the_superblocks_two_copies() -> None:
    clone = Clone(nr_regions=1 << 20)
    clone.change()
    journal, flush, *copies = clone.commit()
    assert isinstance(journal, Write)
    assert (len(journal.data), journal.fua) == (2 * 4096, False)
    assert isinstance(flush, Flush)
    assert [isinstance(copy, Write) and copy.fua for copy in copies] == [True, True]
    assert bytes_written(copies) == 2 * 4096


def test_commit_of_nothing_but_the_flag_is_a_superblock() -> None:
    clone = Clone(nr_regions=512)
    clone.change(1)
    clone.commit()
    kinds = [type(each) for each in clone.commit(clean=True)]
    assert kinds == [Write, Write]
    assert clone.metadata.pre_commit(clean_shutdown=True) is None


# Steps. Work on many bytes of the bitmap takes long, so these bytes are counted for each step.


class Meter:
    """Bytes looked at, copied or hashed since the last yield."""

    def __init__(self) -> None:
        self.step = self.longest = 0

    def add(self, nr_bytes: int) -> None:
        self.step += nr_bytes
        self.longest = max(self.longest, self.step)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    meter = Meter()
    encode, seal = records.encode_chunk, envelope.seal_in_place
    opened, zeros = envelope.open_envelope, util.zeros

    def encode_chunk(begin: int, chunk: bitarray) -> object:
        meter.add(len(chunk) // 8)
        return encode(begin, chunk)

    def seal_in_place(magic: bytes, block: int, data: bytearray) -> bytes:
        meter.add(len(data))
        return seal(magic, block, data)

    def open_envelope(
        magic: bytes, block: int, data: memoryview, where: str
    ) -> envelope.Opened:
        found = opened(magic, block, data, where)
        meter.add(len(found.body))
        return found

    def new_zeros(length: int, endian: Literal["little"]) -> bitarray:
        meter.add(length // 8)
        return zeros(length, endian)

    monkeypatch.setattr(encoding, "encode_chunk", encode_chunk)
    monkeypatch.setattr(chain, "seal_in_place", seal_in_place)
    monkeypatch.setattr(chain, "open_envelope", open_envelope)
    monkeypatch.setattr(load, "zeros", new_zeros)
    return meter


@pytest.mark.slow
def test_no_step_works_on_more_than_a_megabyte(meter: Meter) -> None:
    clone = Clone(meter=meter)
    assert 0 < meter.longest <= 1 << 20
    clone.change(100_000)
    clone.commit()
    meter.step = meter.longest = 0
    clone.store.run(clone.metadata.compact(), meter)
    assert CHUNK_BYTES <= meter.longest <= CHUNK_BYTES + 8192, "one chunk, once"
    assert bytes_written(clone.commit(clean=True)) < COMMIT_BYTES_MAX
    assert clone.metadata._superblock.arena == 1
    meter.step = meter.longest = 0
    clone.opened(meter)
    assert CHUNK_BYTES <= meter.longest <= 1 << 20


def test_journal_of_small_commits_is_read_in_steps(meter: Meter) -> None:
    # A piece that is read holds 128 of such records: a step takes a few of them.
    clone = Clone(nr_regions=1 << 17)
    for _ in range(100):
        clone.change(400)
        assert bytes_written(clone.commit()) == 3 * 4096
    meter.step = meter.longest = 0
    clone.opened(meter)
    assert 0 < meter.longest <= STEP_BLOCKS * 4096
