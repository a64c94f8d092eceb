# SPDX-License-Identifier: Apache-2.0
"""Records and chains: what is written is read again, and nothing else is believed."""

import random
from itertools import pairwise

import msgspec
import pytest
from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.clone.records import (
    CHUNK_REGIONS,
    RUNS_PER_RECORD_MAX,
    Record,
    Runs,
    SetBits,
    SetRuns,
    append_content,
    append_runs,
    apply_record,
    blocks_for_runs,
    decode_record,
    encode_chunk,
    new_runs,
    pack_runs,
    snapshot_blocks_max,
    unpack_runs,
)
from nbdtarget_metadata.errors import CorruptMetadata
from nbdtarget_metadata.log.chain import (
    CHUNK_BYTES,
    READ_BLOCKS,
    RECORD_MAGIC,
    Chain,
    read_chain,
)
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, seal
from tests.support.metadata.store import Store, drive

UUID = bytes(range(16))


def runs_of(*pairs: tuple[int, int]) -> Runs:
    runs = new_runs()
    for pair in pairs:
        runs.extend(pair)
    return runs


def write_chain(
    store: Store, contents: list[Runs | tuple[int, bytes]], *, block: int = 4
) -> Chain:
    chain = Chain(block=block, end=store.size // BLOCK_SIZE, digest=UUID)
    for generation, content in enumerate(contents):
        store.do(append_content(chain, generation, content))
    return chain


def read_back(
    store: Store, chain: Chain, nr_regions: int, *, block: int = 4
) -> bitarray:
    bits = zeros(nr_regions, "little")
    begin_min: int | None = 0

    def apply(record: Record, where: str) -> None:
        nonlocal begin_min
        begin_min = apply_record(bits, record, where, bits_begin_min=begin_min)

    digest = drive(
        store,
        read_chain(
            kind="test",
            begin=block,
            end=chain.block,
            digest=UUID,
            generation_max=100,
            decode=decode_record,
            apply=apply,
        ),
    )
    assert digest == chain.digest
    return bits


def test_adjacent_runs_become_one() -> None:
    runs = new_runs()
    for begin in (5, 6, 7, 9, 8):
        append_runs(runs, begin, 1)
    assert list(runs) == [5, 3, 9, 1, 8, 1]


@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_packed_runs_are_unpacked_on_any_machine(
    byteorder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_of((1, 2), (0x01020304, 5))
    monkeypatch.setattr("nbdtarget_metadata.clone.records.sys.byteorder", byteorder)
    assert unpack_runs(pack_runs(runs)) == runs


def test_runs_are_stored_little_endian() -> None:
    assert pack_runs(runs_of((1, 2))) == bytes([1, 0, 0, 0, 2, 0, 0, 0])


def test_chain_of_runs_and_bits_is_read_back() -> None:
    store = Store(64 * BLOCK_SIZE)
    chain = write_chain(
        store, [runs_of((3, 1), (5, 1)), runs_of((7, 3), (2, 1)), (16, b"\x01\x80")]
    )
    bits = read_back(store, chain, 32)
    assert bits.search(1, 0, 32) is not None
    assert [at for at in range(32) if bits[at]] == [2, 3, 5, 7, 8, 9, 16, 31]


@pytest.mark.parametrize("nr_runs", [1, 499, 500, RUNS_PER_RECORD_MAX])
def test_reckoned_blocks_are_enough_for_one_record(nr_runs: int) -> None:
    runs = runs_of(*((2 * at, 1) for at in range(nr_runs)))
    chain = Chain(block=0, end=100, digest=UUID)
    append_content(chain, 1 << 40, runs)
    assert chain.block <= blocks_for_runs(nr_runs) <= chain.block + 1


def test_reckoned_blocks_of_long_transactions_add_up() -> None:
    one = blocks_for_runs(RUNS_PER_RECORD_MAX)
    assert blocks_for_runs(2 * RUNS_PER_RECORD_MAX) == 2 * one
    assert blocks_for_runs(RUNS_PER_RECORD_MAX + 1) == one + 1
    assert blocks_for_runs(0) == 0


@pytest.mark.parametrize(
    "nr_regions", [1, 8, 32000, 32001, CHUNK_REGIONS, CHUNK_REGIONS + 1]
)
def test_worst_snapshot_fits_its_reckoning(nr_regions: int) -> None:
    chunk_max = bytes(min(CHUNK_BYTES, -(-nr_regions // 8)))
    chain = Chain(block=0, end=1 << 20, digest=UUID)
    append_content(chain, 1 << 60, (1 << 31, chunk_max))
    blocks = snapshot_blocks_max(nr_regions)
    assert chain.block <= blocks <= chain.block + 1


def test_full_bits_record_is_read_in_one_piece() -> None:
    chain = Chain(block=0, end=1000, digest=UUID)
    append_content(chain, 1 << 60, (1 << 31, bytes(CHUNK_BYTES)))
    assert chain.block == READ_BLOCKS


def test_records_across_pieces_are_read_back() -> None:
    # One-block records shift the long ones over the borders of what is read at a time.
    rng = random.Random(3)
    nr_regions = 2 * CHUNK_REGIONS
    store = Store(600 * BLOCK_SIZE)
    first, second = rng.randbytes(CHUNK_BYTES), rng.randbytes(CHUNK_BYTES)
    chain = write_chain(
        store, [runs_of((0, 1)), (0, first), runs_of((9, 1)), (CHUNK_REGIONS, second)]
    )
    bits = read_back(store, chain, nr_regions)
    expected = bitarray(endian="little")
    expected.frombytes(first + second)
    expected[9] = True
    assert bits == expected


def test_empty_chunk_needs_no_record() -> None:
    assert encode_chunk(512, zeros(512, "little")) is None


def test_full_chunk_is_one_run() -> None:
    chunk = ~zeros(512, "little")
    assert encode_chunk(512, chunk) == runs_of((512, 512))


def test_scattered_chunk_is_stored_as_bits() -> None:
    chunk = bitarray("10" * 256, endian="little")
    assert encode_chunk(512, chunk) == (512, b"\x55" * 64)


@pytest.mark.parametrize("seed", range(8))
def test_chunk_is_never_longer_than_its_bits(seed: int) -> None:
    rng = random.Random(seed)
    chunk = zeros(4096, "little")
    for _ in range(rng.choice([1, 10, 60, 64, 70, 300])):
        chunk[rng.randrange(4096)] = True
    content = encode_chunk(0, chunk)
    assert content is not None
    if not isinstance(content, tuple):
        assert len(pack_runs(content)) <= 512


def read_record(record: object, *, nr_regions: int = 64) -> None:
    """Read a chain that consists of one (wrong) record with a valid envelope."""
    store = Store(8 * BLOCK_SIZE)
    data, digest = seal(RECORD_MAGIC, 4, msgspec.msgpack.encode(record))
    store.durable[4 * BLOCK_SIZE : 4 * BLOCK_SIZE + len(data)] = data
    chain = Chain(block=5, end=8, digest=digest)
    read_back(store, chain, nr_regions)


def set_runs(runs: bytes, *, generation: int = 1, previous: bytes = UUID) -> SetRuns:
    return SetRuns(generation=generation, previous=previous, runs=runs)


def set_bits(begin: int, bits: bytes) -> SetBits:
    return SetBits(generation=1, previous=UUID, begin=begin, bits=bits)


WRONG: dict[str, tuple[object, str]] = {
    "another predecessor": (set_runs(bytes(8), previous=bytes(16)), "predecessor"),
    "generation from the future": (set_runs(bytes(8), generation=101), "generation"),
    "no runs": (set_runs(b""), "length"),
    "half a run": (set_runs(bytes(12)), "length"),
    "run of nothing": (set_runs(pack_runs(runs_of((1, 0)))), "regions"),
    "run past the end": (set_runs(pack_runs(runs_of((60, 5)))), "regions"),
    "region past the end": (set_runs(pack_runs(runs_of((64, 1)))), "regions"),
    "bits past the end": (set_bits(56, b"\0\0"), "bits"),
    "bits before the start": (set_bits(-8, b"\0"), "bits"),
    "bits off the byte": (set_bits(4, b"\0"), "bits"),
    "unknown kind": (["what", 1, UUID, b""], "snapshot or journal record"),
    "not an array": ({"a": 1}, "snapshot or journal record"),
}


@pytest.mark.parametrize("name", WRONG)
def test_record_is_refused_for(name: str) -> None:
    record, words = WRONG[name]
    with pytest.raises(CorruptMetadata, match=words):
        read_record(record)


@pytest.mark.parametrize(
    "body",
    [b"", b"\x94\xa2\xff\xfe\x01\xc4\0\xc4\0", b"\x95" + b"\xa4runs\x01\xc4\0\xc4\0"],
    ids=["empty", "no text", "deep"],
)
def test_record_that_is_no_message_is_refused(body: bytes) -> None:
    if body.startswith(b"\x95"):
        body += b"\x91" * 3000 + b"\0"  # what a later version might have appended
    store = Store(8 * BLOCK_SIZE)
    data, digest = seal(RECORD_MAGIC, 4, body)
    store.durable[4 * BLOCK_SIZE : 5 * BLOCK_SIZE] = data
    # Where Python has room for so deep a field, the record can be read, and is another one than expected.
    refused = "snapshot or journal record"
    if body.startswith(b"\x95"):
        refused += "|predecessor of test record"
    with pytest.raises(CorruptMetadata, match=refused):
        read_back(store, Chain(block=5, end=8, digest=digest), 64)


def test_bits_are_refused_in_a_journal() -> None:
    bits = zeros(64, "little")
    with pytest.raises(CorruptMetadata, match="expected none"):
        apply_record(bits, set_bits(0, b"\1"), "it", bits_begin_min=None)


def test_bits_are_refused_out_of_order() -> None:
    bits = zeros(64, "little")
    begin_min = apply_record(bits, set_bits(8, b"\1"), "it", bits_begin_min=0)
    assert begin_min == 16
    with pytest.raises(CorruptMetadata, match="expected 16 to 64"):
        apply_record(bits, set_bits(8, b"\1"), "it", bits_begin_min=begin_min)


@pytest.mark.parametrize("nr_regions", [64, 61])
def test_bits_clear_nothing_that_runs_have_set(nr_regions: int) -> None:
    bits = zeros(nr_regions, "little")
    runs = set_runs(pack_runs(runs_of((9, 1), (60, 1))))
    begin_min = apply_record(bits, runs, "it", bits_begin_min=0)
    end = apply_record(bits, set_bits(0, b"\1" * 8), "it", bits_begin_min=begin_min)
    assert end == 64
    assert list(bits.search(1)) == [0, 8, 9, 16, 24, 32, 40, 48, 56, 60]


def test_generation_may_not_go_back() -> None:
    store = Store(64 * BLOCK_SIZE)
    chain = Chain(block=4, end=10, digest=UUID)
    for generation in (7, 6):
        store.do(append_content(chain, generation, runs_of((1, 1))))
    with pytest.raises(CorruptMetadata, match="generation of test record at block 5"):
        read_back(store, chain, 64)


def test_record_longer_than_the_vouched_area_is_refused() -> None:
    store = Store(64 * BLOCK_SIZE)
    chain = write_chain(store, [(0, b"\xff" * 8192)])
    chain.block -= 1
    with pytest.raises(CorruptMetadata, match="length of test record at block 4"):
        read_back(store, chain, 8192 * 8)


def test_records_never_share_a_block() -> None:
    chain = Chain(block=4, end=10, digest=UUID)
    writes = [append_content(chain, 1, runs_of((at, 1))) for at in range(4)]
    assert all(b.offset - a.offset == BLOCK_SIZE for a, b in pairwise(writes))
