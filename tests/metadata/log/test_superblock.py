# SPDX-License-Identifier: Apache-2.0
"""The case table at the head of superblock.py, every case of it."""

from itertools import product

import msgspec
import pytest

from nbdtarget_metadata.clone.superblock import CLONE, CloneSuperblock
from nbdtarget_metadata.disks import RECORD_MAX
from nbdtarget_metadata.errors import (
    CorruptMetadata,
    MetadataError,
    MetadataTooSmall,
    NotFormatted,
    NotOurs,
    UnsupportedFormat,
)
from nbdtarget_metadata.log import envelope
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, seal
from nbdtarget_metadata.log.superblock import (
    NEEDS_CHECK,
    SUPERBLOCK_MAGIC,
    Found,
    choose_superblock,
    read_superblock,
    superblock_block,
    superblock_writes,
)
from nbdtarget_metadata.operations import Flush, Write
from tests.support.metadata.store import Store, drive
from tests.support.metadata.superblocks import (
    LOST,
    NEW,
    OLD,
    ROT,
    ZERO,
    N,
    area_of,
    make_superblock,
    put,
    put_all,
    put_body,
)


def choose(area: bytearray) -> Found[CloneSuperblock]:
    return choose_superblock(CLONE, memoryview(area))


STATES = list(product((NEW, OLD, ROT, ZERO, LOST), repeat=2))
DAMAGES = list(product((OLD, ROT, ZERO, LOST), repeat=2))


@pytest.mark.parametrize("slot_1", DAMAGES, ids="-".join)
@pytest.mark.parametrize("slot_0", STATES, ids="-".join)
def test_newest_valid_copy_counts_unless_a_slot_has_none(
    slot_0: tuple[str, str], slot_1: tuple[str, str]
) -> None:
    area = area_of(slot_0, slot_1)
    bad = {ROT, ZERO, LOST}
    if {*slot_0, *slot_1} == {ZERO}:
        with pytest.raises(NotFormatted):
            choose(area)
        return
    if set(slot_0) <= bad or set(slot_1) <= bad:
        with pytest.raises(CorruptMetadata, match="a valid copy") as caught:
            choose(area)
        for slot, pair in enumerate((slot_0, slot_1)):
            if set(pair) == {LOST} and (slot == 0 or not set(slot_0) <= bad):
                for copy in range(2):
                    assert f"block {superblock_block(slot, copy)}) cannot be read" in (
                        str(caught.value)
                    )
        return
    found = choose(area)
    assert found.superblock.generation == (N if NEW in slot_0 else N - 1)
    differing = {slot for slot, pair in enumerate((slot_0, slot_1)) if len({*pair}) > 1}
    assert found.unhealed == differing
    assert len(found.notes) == len(differing)


FORMATTING = list(product((0, ZERO), (0, ZERO), (1, ZERO), (1, ZERO)))


@pytest.mark.parametrize("states", FORMATTING, ids=str)
def test_unfinished_format_is_formatted_again_until_generation_1_is_there(
    states: tuple[int | str, ...],
) -> None:
    area = bytearray(4 * BLOCK_SIZE)
    for at, state in enumerate(states):
        if isinstance(state, int):
            put(area, at // 2, at % 2, make_superblock(state))
    if 1 not in states:
        with pytest.raises(NotFormatted):
            choose(area)
    elif 0 not in states:
        # Slot 0 is durable before slot 1 is begun: no crash leaves this.
        with pytest.raises(CorruptMetadata):
            choose(area)
    else:
        assert choose(area).superblock.generation == 1


@pytest.mark.parametrize("rotten", [(0, 0), (1, 0)])
def test_unfinished_format_with_rot_is_refused(rotten: tuple[int, int]) -> None:
    area = bytearray(4 * BLOCK_SIZE)
    put(area, 0, 0, make_superblock(0))
    put(area, 0, 1, make_superblock(0))
    area[superblock_block(*rotten) * BLOCK_SIZE + 50] ^= 1
    with pytest.raises(CorruptMetadata):
        choose(area)


def test_committed_slot_0_never_counts_as_unfinished_format() -> None:
    area = bytearray(4 * BLOCK_SIZE)
    put(area, 0, 0, make_superblock(2))
    put(area, 0, 1, make_superblock(2))
    with pytest.raises(CorruptMetadata, match="slot 1"):
        choose(area)


def test_only_rotten_copies_are_corrupt_not_foreign() -> None:
    area = area_of((ROT, ROT), (ROT, ROT))
    with pytest.raises(CorruptMetadata, match="all superblocks"):
        choose(area)


@pytest.mark.parametrize(
    ("at", "content", "words"),
    [
        (1080, b"\x53\xef", "53ef000000000000 at byte 1080"),
        (32, (0x8AF27F64).to_bytes(8, "little"), "the kernel's dm-clone metadata"),
        (32, (0x18C403).to_bytes(8, "little"), "the kernel's dm-cache metadata"),
        (4 * BLOCK_SIZE - 1, b"\1", "at byte 16383"),
    ],
)
def test_foreign_content_is_named(at: int, content: bytes, words: str) -> None:
    area = bytearray(4 * BLOCK_SIZE)
    area[at : at + len(content)] = content
    with pytest.raises(NotOurs, match=words):
        choose(area)


def test_copies_of_one_generation_may_not_contradict_each_other() -> None:
    area = put_all(make_superblock(N), make_superblock(N - 1))
    put(area, 0, 1, make_superblock(N, nr_commits=5))
    with pytest.raises(CorruptMetadata, match="equal copies"):
        choose(area)


def test_generation_in_the_wrong_slot_is_refused() -> None:
    with pytest.raises(CorruptMetadata, match="generation in superblock slot 1"):
        choose(put_all(make_superblock(N), make_superblock(N)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("uuid", bytes(16)),
        ("region_size", 8192),
        ("target_size", 512),
        ("arena_blocks", 30),
    ],
)
def test_slots_of_two_devices_are_refused(field: str, value: object) -> None:
    other = make_superblock(N - 1, **{field: value})
    with pytest.raises(CorruptMetadata, match=f"{field} of superblock generation 9"):
        choose(put_all(make_superblock(N), other))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("snapshot_digest", b"short"),
        ("journal_digest", b""),
        ("arena", 2),
        ("arena", -1),
        ("snapshot_block", 3),
        ("snapshot_blocks", -1),
        ("snapshot_blocks", 25),
        ("journal_blocks", 25),
        ("journal_blocks", -1),
        ("nr_hydrated", 257),
        ("nr_hydrated", -1),
        ("flags", NEEDS_CHECK),
    ],
)
def test_field_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    area = put_all(make_superblock(N, **{field: value}), make_superblock(N - 1))
    with pytest.raises(CorruptMetadata) as caught:
        choose(area)
    assert field in caught.value.where


@pytest.mark.parametrize("field", ["region_size", "target_size", "uuid"])
def test_impossible_geometry_is_refused_by_name(field: str) -> None:
    value: object = b"short" if field == "uuid" else 0
    area = put_all(
        make_superblock(N, **{field: value}), make_superblock(N - 1, **{field: value})
    )
    with pytest.raises(CorruptMetadata, match=field):
        choose(area)


def test_unknown_incompatible_feature_is_unsupported() -> None:
    area = put_all(make_superblock(N, incompat=4), make_superblock(N - 1))
    with pytest.raises(UnsupportedFormat) as caught:
        choose(area)
    assert caught.value.bits == 4


def test_unknown_compatible_features_are_ignored() -> None:
    area = put_all(make_superblock(N, compat=4, ro_compat=8), make_superblock(N - 1))
    assert choose(area).superblock.ro_compat == 8


def test_newer_format_version_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    area = area_of((OLD, OLD), (OLD, OLD))
    monkeypatch.setattr(envelope, "FORMAT_VERSION", 2)
    put(area, 0, 0, make_superblock(N))
    monkeypatch.undo()
    with pytest.raises(UnsupportedFormat):
        choose(area)


def test_superblock_of_a_cache_is_not_ours() -> None:
    with pytest.raises(NotOurs, match="metadata of a cache"):
        choose(put_body(msgspec.msgpack.encode(["cache", 1])))


@pytest.mark.parametrize("body", [["clone"], ["clone", "x"], [], [1], {"a": 1}])
def test_intact_envelope_around_nonsense_is_corrupt(body: object) -> None:
    with pytest.raises(CorruptMetadata, match="a clone superblock"):
        choose(put_body(msgspec.msgpack.encode(body)))


@pytest.mark.parametrize(
    "body",
    [b"\xc1", b"", b"\x92\xa2\xff\xfe\x01", b"\x91" * 4000, b"\xdd\xff\xff\xff\xff"],
    ids=["unused byte", "empty", "no text", "deep", "huge"],
)
def test_intact_envelope_around_no_message_is_corrupt(body: bytes) -> None:
    with pytest.raises(CorruptMetadata, match="a clone superblock"):
        choose(put_body(body))


def test_later_fields_that_are_too_deep_are_skipped_or_corrupt() -> None:
    # How deep is too deep is up to Python: 3.12 and later have more room.
    fields = msgspec.to_builtins(make_superblock(N), builtin_types=(bytes,))
    body = bytearray(msgspec.msgpack.encode([*fields, 0]))
    body[-1:] = b"\x91" * 3000 + b"\0"
    try:
        found = choose(put_body(bytes(body))).superblock.generation
    except CorruptMetadata as error:
        assert "a clone superblock" in str(error)  # noqa: PT017 - one of two outcomes
    else:
        assert found == N


@pytest.mark.parametrize("field", ["generation", "nr_commits", "nr_compactions"])
@pytest.mark.parametrize("value", [-2, (1 << 64) - 2])
def test_counter_that_could_not_go_on_is_refused_by_name(
    field: str, value: int
) -> None:
    # The next commit could not encode this value: the clone would fail in the middle of its work.
    generations = {"generation": N, field: value}
    other = generations["generation"] - 1
    newest = make_superblock(generations.pop("generation"), **generations)
    with pytest.raises(CorruptMetadata, match=field):
        choose(put_all(newest, make_superblock(other)))


def test_bitmap_that_its_arena_could_not_hold_is_refused() -> None:
    # Otherwise a wrong target_size would take 256 MiB of memory before anything else is checked.
    huge = {"region_size": 512, "target_size": 512 << 31}
    area = put_all(make_superblock(N, **huge), make_superblock(N - 1, **huge))
    with pytest.raises(CorruptMetadata, match="arena_blocks"):
        choose(area)


def test_later_fields_are_ignored() -> None:
    fields = msgspec.to_builtins(make_superblock(N), builtin_types=(bytes,))
    area = area_of((OLD, OLD), (OLD, OLD))
    for copy in range(2):
        block = superblock_block(0, copy)
        body = msgspec.msgpack.encode([*fields, "later"])
        data, _ = seal(SUPERBLOCK_MAGIC, block, body)
        area[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = data
    assert choose(area).superblock == make_superblock(N)


def test_largest_superblock_fits_one_sector() -> None:
    huge = (1 << 64) - 1
    fields = {
        field: huge
        for field in CloneSuperblock.__struct_fields__
        if field not in ("uuid", "snapshot_digest", "journal_digest", "disks")
    }
    record = b"d" * RECORD_MAX
    superblock = msgspec.structs.replace(make_superblock(N), **fields, disks=record)
    for write in superblock_writes(superblock):
        assert isinstance(write, Write)
        assert write.fua
        assert bytes(write.data)[512 : 512 + RECORD_MAX] == record
        assert not any(bytes(write.data)[512 + RECORD_MAX :])


def test_copies_of_a_slot_are_not_neighbours() -> None:
    blocks = [superblock_block(slot, copy) for slot in range(2) for copy in range(2)]
    assert sorted(blocks) == [0, 1, 2, 3]
    assert abs(superblock_block(0, 0) - superblock_block(0, 1)) > 1


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (bytes(100), MetadataTooSmall),
        (b"x" * 100, NotOurs),
        (SUPERBLOCK_MAGIC + b"x" * 100, MetadataTooSmall),  # what was ours, cut short
    ],
)
def test_device_shorter_than_the_superblock_area(
    content: bytes, error: type[MetadataError]
) -> None:
    with pytest.raises(error):
        drive(Store(100, content), read_superblock(CLONE, 100))


def test_opening_begins_with_a_flush() -> None:
    """The data may lie only in the disk's own cache, where a killed server has left it."""
    store = Store(8 * BLOCK_SIZE)
    with pytest.raises(NotFormatted):
        drive(store, read_superblock(CLONE, store.size))
    assert isinstance(store.log[0], Flush)
