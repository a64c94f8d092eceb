# SPDX-License-Identifier: Apache-2.0
"""How a clone's changes are written: what fits, and the bitmap as it was at a pre_commit."""

import pytest
from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.clone import encoding
from nbdtarget_metadata.clone.encoding import CloneEncoding, SavedChunks
from nbdtarget_metadata.clone.records import RUNS_PER_RECORD_MAX, Runs, new_runs
from nbdtarget_metadata.log.chain import Chain
from nbdtarget_metadata.operations import Steps, Write

CHUNK = 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHUNK_REGIONS", CHUNK)


def runs_of(*regions: int) -> Runs:
    runs = new_runs()
    for region in regions:
        runs.extend((region, 1))
    return runs


def empty_chain(end: int = 1000) -> Chain:
    return Chain(block=0, end=end, digest=bytes(16))


def nr_writes(steps: Steps[None]) -> int:
    return sum(isinstance(each, Write) for each in steps)


def left_by(steps: Steps[Runs]) -> Runs:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            left: Runs = stop.value
            return left


def test_chunk_that_changes_before_its_turn_is_taken_as_it_was() -> None:
    hydrated = zeros(3 * CHUNK, "little")
    saved = SavedChunks(hydrated)
    saved.save(CHUNK, CHUNK + 1)
    hydrated[CHUNK] = 1
    assert not saved.take(0, CHUNK).any()
    assert not saved.take(CHUNK, 2 * CHUNK).any()
    assert hydrated[CHUNK]


def test_chunk_is_saved_once() -> None:
    hydrated = zeros(CHUNK, "little")
    saved = SavedChunks(hydrated)
    for region in (1, 2):
        saved.save(region, region + 1)
        hydrated[region] = 1
    assert not saved.take(0, CHUNK).any()


def test_chunk_that_was_taken_is_not_saved_any_more() -> None:
    hydrated = zeros(2 * CHUNK, "little")
    saved = SavedChunks(hydrated)
    saved.take(0, CHUNK)
    saved.save(0, 2 * CHUNK)
    assert [*saved._chunks] == [1], "only the chunk that is still to come"


def test_snapshot_asks_for_each_chunk_once_and_in_order() -> None:
    hydrated = bitarray("1" * (2 * CHUNK + 3), endian="little")
    taken: list[tuple[int, int]] = []

    def take(begin: int, end: int) -> bitarray:
        taken.append((begin, end))
        return hydrated[begin:end]

    chain = empty_chain()
    assert nr_writes(CloneEncoding(hydrated, take).snapshot(chain, 1)) == 3
    assert taken == [(0, 8), (8, 16), (16, 19)]
    assert chain.block == 3


def test_union_keeps_both_and_counts_runs() -> None:
    encoding_ = CloneEncoding(zeros(CHUNK, "little"))
    both = encoding_.union(runs_of(1, 3), runs_of(5))
    assert both == runs_of(1, 3, 5)
    assert encoding_.count(both) == 3
    assert encoding_.count(encoding_.nothing()) == 0


def test_all_records_before_the_end_are_written() -> None:
    chain = empty_chain()
    encoding_ = CloneEncoding(zeros(CHUNK, "little"))
    left = left_by(encoding_.records_before(1, chain, 1, runs_of(1, 3)))
    assert encoding_.count(left) == 0
    assert chain.block == 1


def test_changes_that_do_not_fit_before_the_end_are_left() -> None:
    runs = runs_of(*range(0, 2 * (RUNS_PER_RECORD_MAX + 5), 2))
    chain = empty_chain()
    encoding_ = CloneEncoding(zeros(CHUNK, "little"))
    full = encoding_.blocks_for(runs[: 2 * RUNS_PER_RECORD_MAX])
    left = left_by(encoding_.records_before(full, chain, 1, runs))
    assert chain.block == full
    assert left == runs[2 * RUNS_PER_RECORD_MAX :]
