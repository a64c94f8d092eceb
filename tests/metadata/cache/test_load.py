# SPDX-License-Identifier: Apache-2.0
"""Opening a cache refuses wrong content with right digests, and rot of every bit. The error names what is wrong."""

import struct
from typing import Any

import msgspec
import pytest

from nbdtarget_metadata.cache.records import (
    DirtyBits,
    Discards,
    Hints,
    SetEntries,
    SetValues,
    snapshot_blocks_max,
)
from nbdtarget_metadata.cache.superblock import (
    CacheSuperblock,
    PolicyIdentity,
    first_superblock,
    layout_for,
)
from nbdtarget_metadata.disks import RECORD_MAX
from nbdtarget_metadata.errors import CorruptMetadata, UnsupportedFormat
from nbdtarget_metadata.log.chain import Chain
from nbdtarget_metadata.log.superblock import SUPERBLOCK_BLOCKS, superblock_writes
from tests.support.metadata.small_cache import (
    BLOCK_SIZE,
    NR_CBLOCKS,
    NR_OBLOCKS,
    ORIGIN_SIZE,
    SIZE,
    UUID,
    open_on,
)
from tests.support.metadata.store import Store

LAYOUT = layout_for(NR_CBLOCKS, SIZE)


def entries(*pairs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<IQ", cblock, value) for cblock, value in pairs)


def value(oblock: int, flags: int = 1) -> int:
    return oblock << 16 | flags


def values(*items: int) -> bytes:
    return struct.pack(f"<{len(items)}Q", *items)


def forge(
    snapshot: list[tuple[Any, ...]],
    journal: list[tuple[Any, ...]],
    sync: list[tuple[Any, ...]],
    **fields: Any,
) -> Store:
    """Seal records, each a type and its fields, and a superblock that vouches for them."""
    store = Store(SIZE)
    superblock = first_superblock(
        UUID,
        block_size=BLOCK_SIZE,
        origin_size=ORIGIN_SIZE,
        nr_cblocks=NR_CBLOCKS,
        nr_cblocks_max=LAYOUT.nr_cblocks_max,
        arena_blocks=LAYOUT.arena_blocks,
    )
    lengths, digests = [], []
    chain = Chain(block=SUPERBLOCK_BLOCKS, end=superblock.sync_begin, digest=UUID)
    for records in (snapshot, journal, sync):
        if records is sync:
            chain = Chain(block=superblock.sync_begin, end=SIZE, digest=UUID)
        begin = chain.block
        for kind, content in records:
            record = kind(generation=0, previous=chain.digest, **content)
            store.do(chain.append(record))
        lengths.append(chain.block - begin)
        digests.append(chain.digest)
    fields = {
        "snapshot_blocks": lengths[0],
        "journal_blocks": lengths[1],
        "sync_blocks": lengths[2],
        "snapshot_digest": digests[0],
        "journal_digest": digests[1],
        "sync_digest": digests[2],
        **fields,
    }
    for generation in range(2):
        forged = msgspec.structs.replace(superblock, generation=generation, **fields)
        for write in superblock_writes(forged):
            store.do(write)
    return store


ONE = [(SetEntries, {"entries": entries((3, value(9)))})]
LOGGED = [(SetEntries, {"entries": entries((3, value(9, 3)))})]
DIRTY_3 = (DirtyBits, {"begin": 0, "bits": b"\x08"})


def test_forged_metadata_opens_if_it_is_right() -> None:
    store = forge(
        [(SetValues, {"begin": 2, "values": values(0, value(9), value(8))})],
        [(SetEntries, {"entries": entries((4, 0), (5, value(8, 3)))})],
        [
            DIRTY_3,
            (Hints, {"begin": 3, "hints": b"\7\0\0\0"}),
            (Discards, {"bits": b"\5"}),
        ],
        nr_mapped=2,
        nr_logged=1,
        nr_dirty=1,
        policy_name="smq",
        discard_block_size=BLOCK_SIZE,
        nr_dblocks=3,
    )
    metadata = open_on(store)
    found = list(metadata.mappings(PolicyIdentity("smq", (0, 0, 0))))
    assert found == [(3, 9, True, 7), (5, 8, False, 0)]
    assert metadata.discarded is not None
    assert metadata.discarded.bits.to01() == "101"


# Name of the case: snapshot, journal, sync, fields, and the words of the error.
LIES: dict[str, tuple[list[Any], list[Any], list[Any], dict[str, Any], str]] = {
    "two cache blocks hold one origin block": (
        [],
        [(SetEntries, {"entries": entries((3, value(9)), (7, value(9)))})],
        [],
        {"nr_mapped": 2},
        r"cache blocks of origin block 9: .* found 3 and 7",
    ),
    "origin block beyond the end": (
        [],
        [(SetEntries, {"entries": entries((3, value(NR_OBLOCKS)))})],
        [],
        {"nr_mapped": 1},
        "origin block of cache block 3: expected below 100, found 100",
    ),
    "cache block beyond what there may be": (
        [],
        [(SetEntries, {"entries": entries((1 << 30, value(1)))})],
        [],
        {"nr_mapped": 1},
        "cache blocks of journal record at block 4",
    ),
    "values beyond what there may be": (
        [(SetValues, {"begin": LAYOUT.nr_cblocks_max, "values": values(value(1))})],
        [],
        [],
        {"nr_mapped": 1},
        "cache blocks of snapshot record at block 4",
    ),
    "values in a journal": (
        [],
        [(SetValues, {"begin": 0, "values": values(value(1))})],
        [],
        {"nr_mapped": 1},
        "cache blocks of journal record at block 4: expected no values",
    ),
    "values before earlier ones": (
        [
            (SetValues, {"begin": 3, "values": values(value(1))}),
            (SetValues, {"begin": 2, "values": values(value(2))}),
        ],
        [],
        [],
        {"nr_mapped": 2},
        "cache blocks of snapshot record at block 5",
    ),
    "half a value": (
        [(SetValues, {"begin": 3, "values": b"1234"})],
        [],
        [],
        {},
        "length of snapshot record",
    ),
    "half an entry": (
        [],
        [(SetEntries, {"entries": b"1234"})],
        [],
        {},
        "length of journal record",
    ),
    "entry that is mapped but not valid": (
        [],
        [(SetEntries, {"entries": entries((3, value(9, 0)))})],
        [],
        {"nr_mapped": 1},
        "mapping in journal record at block 4",
    ),
    "value with unknown flags": (
        [(SetValues, {"begin": 3, "values": values(value(9, 0x101))})],
        [],
        [],
        {"nr_mapped": 1},
        "mapping in snapshot record at block 4",
    ),
    "value that is mapped but not valid": (
        [(SetValues, {"begin": 3, "values": values(value(9, 0))})],
        [],
        [],
        {"nr_mapped": 1},
        "mapping in snapshot record at block 4",
    ),
    "mapping behind a cache that has shrunk": (
        [],
        ONE,
        [],
        {"nr_mapped": 1, "nr_cblocks": 3},
        "number of mappings beyond the cache",
    ),
    "other number of mappings": ([], ONE, [], {}, "number of mapped cache blocks"),
    "other number of logged blocks": (
        [],
        LOGGED,
        [],
        {"nr_mapped": 1},
        "number of logged cache blocks",
    ),
    "other number of dirty blocks": (
        [],
        ONE,
        [DIRTY_3],
        {"nr_mapped": 1},
        "number of dirty cache blocks",
    ),
    "dirty bit of an unmapped block": (
        [],
        [],
        [DIRTY_3],
        {},
        "dirty bit of cache block 3, which is unmapped",
    ),
    "dirty block that is not logged": (
        [],
        ONE,
        [DIRTY_3],
        {"nr_mapped": 1, "nr_dirty": 1, "incompat": 1},
        "dirty bit of cache block 3, which is not logged",
    ),
    "dirty bits beyond the cache": (
        [],
        [],
        [(DirtyBits, {"begin": NR_CBLOCKS, "bits": b"\1"})],
        {},
        "cache blocks of clean shutdown's record",
    ),
    "hints beyond the cache": (
        [],
        [],
        [(Hints, {"begin": NR_CBLOCKS, "hints": bytes(4)})],
        {"policy_name": "smq"},
        "cache blocks of clean shutdown's record",
    ),
    "half a hint": (
        [],
        [],
        [(Hints, {"begin": 0, "hints": bytes(3)})],
        {"policy_name": "smq"},
        "length of clean shutdown's record",
    ),
    "hints of nobody": (
        [],
        [],
        [(Hints, {"begin": 0, "hints": bytes(4)})],
        {},
        "expected no hints without a policy",
    ),
    "other number of discard blocks": (
        [],
        [],
        [(Discards, {"bits": bytes(2)})],
        {"nr_dblocks": 8},
        "discard blocks of clean shutdown's record",
    ),
    "discard blocks that are not there": (
        [],
        [],
        [],
        {"nr_dblocks": 8},
        "number of discard blocks recorded",
    ),
    "record of the wrong kind": ([], [DIRTY_3], [], {}, "a snapshot or journal record"),
    "record of a shutdown of the wrong kind": (
        [],
        [],
        ONE,
        {},
        "a record of a clean shutdown",
    ),
    "other digest of the shutdown": (
        [],
        ONE,
        [DIRTY_3],
        {"nr_mapped": 1, "nr_dirty": 1, "sync_digest": UUID},
        "digest of the clean shutdown",
    ),
    "other digest of the journal": (
        [],
        ONE,
        [],
        {"nr_mapped": 1, "journal_digest": UUID},
        "digest of the journal",
    ),
    "other digest of the snapshot": (
        ONE,
        [],
        [],
        {"nr_mapped": 1, "snapshot_digest": UUID},
        "digest of the snapshot",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_lie_is_refused_by_name(name: str) -> None:
    snapshot, journal, sync, fields, words = LIES[name]
    store = forge(snapshot, journal, sync, **fields)
    with pytest.raises(CorruptMetadata, match=words):
        open_on(store)


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("block_size", 32768 + 512),
        ("block_size", 0),
        ("block_size", (1 << 30) + 32768),
        ("origin_size", 0),
        ("nr_cblocks", 0),
        ("nr_cblocks", LAYOUT.nr_cblocks_max + 1),
        ("nr_cblocks_max", 0),
        ("nr_cblocks_max", 1 << 32),
        ("nr_mapped", NR_CBLOCKS + 1),
        ("nr_logged", 1),
        ("nr_dirty", 1),
        ("sync_area", 2),
        ("sync_blocks", 1000),
        ("sync_digest", b"short"),
        ("policy_name", "a name too long for it"),
        ("policy_version", (0, 0, 1 << 32)),
        ("hint_size", 8),
        ("nr_dblocks", 32770),
        ("discard_block_size", -1),
        ("read_hits", -1),
        ("write_misses", -1),
        ("arena_blocks", 2 * snapshot_blocks_max(LAYOUT.nr_cblocks_max) - 1),
    ],
)
def test_superblock_out_of_range_is_refused_by_its_field(
    field: str, found: object
) -> None:
    with pytest.raises(CorruptMetadata, match=rf"^corrupt metadata: {field} of"):
        open_on(forge([], [], [], **{field: found}))


def test_origin_of_too_many_blocks_is_refused() -> None:
    with pytest.raises(CorruptMetadata, match="origin_size"):
        open_on(forge([], [], [], block_size=32768, origin_size=(1 << 64) - 1))


@pytest.mark.parametrize("field", ["nr_dirty", "sync_blocks", "nr_dblocks"])
def test_superblock_of_an_unclean_shutdown_vouches_for_no_more(field: str) -> None:
    fields = {"flags": 0, "nr_mapped": 1, field: 1}
    with pytest.raises(CorruptMetadata, match=field):
        open_on(forge([], ONE, [], **fields))


def test_unknown_incompatible_feature_is_refused() -> None:
    with pytest.raises(UnsupportedFormat, match="0x2"):
        open_on(forge([], [], [], incompat=3))


def test_largest_superblock_fits_into_a_sector() -> None:
    large = 1 << 62
    superblock = first_superblock(
        UUID,
        block_size=1 << 30,
        origin_size=large,
        nr_cblocks=1 << 31,
        nr_cblocks_max=1 << 31,
        arena_blocks=large,
    )
    text = ("policy_name", "snapshot_digest", "journal_digest", "uuid", "sync_digest")
    fields = {
        field: large
        for field in CacheSuperblock.__struct_fields__
        if field not in (*text, "policy_version", "generation", "disks")
    }
    large_one = msgspec.structs.replace(
        superblock,
        generation=large,
        policy_name="a" * 16,
        policy_version=((1 << 32) - 1,) * 3,
        disks=bytes(RECORD_MAX),
        **fields,
    )
    superblock_writes(large_one)  # asserts it
