# SPDX-License-Identifier: Apache-2.0
"""Damaged and forged metadata of a cache: images, each made from a seed. See fuzz.py.

Damages are the same; lies in records are of a cache's own: mappings, dirty bits, hints, discards.

The oracle. Whatever comes: opening ends within its bounds, in a MetadataError of one line or in
metadata that holds exactly what its vouched records say (read by cache_reader.py, without our
code) and keeps FORMAT.md's rules; `examine` agrees. What opens can be started, committed to and shut down, and opens again as it was left.
"""

import random
import struct
from array import array
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.errors import (
    BlockSizeMismatch,
    MetadataError,
    MetadataTooSmall,
    NotFormatted,
    NotOurs,
)
from nbdtarget_metadata.log.chain import RECORD_MAGIC
from nbdtarget_metadata.log.envelope import BLOCK_SIZE as META_BLOCK
from nbdtarget_metadata.log.superblock import SUPERBLOCK_BLOCKS, SUPERBLOCK_MAGIC
from nbdtarget_metadata.mode import Mode
from nbdtarget_metadata.tools.cache_check import CACHE_CHECKS
from nbdtarget_metadata.tools.check import examine
from tests.support.metadata.cache_images import (
    NR_CBLOCKS,
    ORIGIN_SIZE,
    SMQ,
    CacheAged,
    cache_ages,
    held_by,
    open_cache,
    opening,
)
from tests.support.metadata.cache_reader import Held, held_in, live_ranges, read_records
from tests.support.metadata.fuzz import (
    BODIES,
    COMMITS_MAX,
    LIES,
    MISHAPS,
    NR_DAMAGES,
    Damage,
    assert_one_line,
    assert_that,
    change_field,
    digest_at,
    encoded,
    lie_in_superblock,
    make_digests_fit,
    maybe_fields,
    reseal,
)
from tests.support.metadata.small_cache import BLOCK_SIZE, UUID, commit, start
from tests.support.metadata.store import Store, drive, read_image

__all__ = ["fuzz_cache_image"]

UNREADABLE: Final = (
    *(struct.error, msgspec.MsgspecError, RecursionError),
    *(AssertionError, ArithmeticError, LookupError, TypeError, ValueError),
)
SYNC_DIGEST: Final = 25  # element of the superblock


def fuzz_cache_image(seed: int) -> str:
    """Damage an image, open it, judge what comes; return that in one word.

    Raises: AssertionError, or whatever opening raised that it must not.
    """
    rng = random.Random(seed)
    every = list(cache_ages().values())
    aged = rng.choice(every)
    image = bytearray(aged.image)
    for _ in range(rng.choice(NR_DAMAGES)):
        rng.choice(DAMAGES)(rng, image, aged, rng.choice(every))
    return judge(bytes(image))


def judge(image: bytes) -> str:
    try:
        metadata = open_cache(image)
    except MetadataError as error:
        assert_one_line(error)
        # `examine` asks for no block size; all else it finds, too.
        assert_that(isinstance(error, BlockSizeMismatch) or is_damaged(image))
        if isinstance(error, NotFormatted):
            format_again(image)
        return type(error).__name__
    fields = msgspec.to_builtins(metadata._superblock, builtin_types=(bytes,))
    held = held_by(metadata)
    assert held == held_in(image, fields)
    assert_legal(held, metadata)
    assert not is_damaged(image)
    if metadata.mode is Mode.RW:
        live_on(image)
    return "repaired" if metadata.notes else "opened"


def assert_legal(held: Held, metadata: CacheMetadata) -> None:
    values = held.values
    oblocks = {value >> 16 for value in values.values()}
    assert all(value & 0xFFFF in (1, 3) for value in values.values())
    assert len(oblocks) == len(values) == metadata.nr_mapped
    assert all(oblock < metadata.nr_oblocks for oblock in oblocks)
    assert all(cblock < metadata.nr_cblocks for cblock in values)
    assert held.dirty <= set(values)
    assert len(held.dirty) == metadata.nr_dirty
    assert not metadata.dirty_log or all(values[at] & 2 for at in held.dirty)


def is_damaged(image: bytes) -> bool:
    """Ask the offline tool."""
    try:
        findings = read_image(image, examine(CACHE_CHECKS, len(image)))
    except MetadataError as error:
        assert_one_line(error)
        return True
    assert all(line and "\n" not in line for line in findings.damage)
    return bool(findings.damage) or findings.needs_check


def format_again(image: bytes) -> None:
    """Check that an image which counts as unformatted may be formatted only if it never held a record."""
    store = Store(len(image), image)
    steps = CacheMetadata.format(
        device_size=store.size,
        block_size=BLOCK_SIZE,
        origin_size=ORIGIN_SIZE,
        nr_cblocks=NR_CBLOCKS,
        uuid=UUID,
    )
    try:
        drive(store, steps)
    except (NotOurs, MetadataTooSmall) as error:
        assert_one_line(error)
        assert_that(bytes(store.current()) == image)
        return
    assert_that(not any(image[SUPERBLOCK_BLOCKS * META_BLOCK :]))


def live_on(image: bytes) -> None:
    """Start, change a block, commit, shut down; open again each time."""
    store = Store(len(image), image)
    metadata = drive(store, opening(store.size))
    if metadata.gives_up_mappings:
        drive(store, metadata.drop_clean())
    start(store, metadata, dirty_log=metadata.generation % 3 > 0)
    change(metadata)
    for _ in range(COMMITS_MAX):
        if metadata.changed:
            commit(store, metadata)
    assert not metadata.changed
    again = open_cache(bytes(store.durable))
    assert again.notes == ()
    assert held_by(again).values == held_by(metadata).values
    assert held_by(again).dirty >= held_by(metadata).dirty
    hints = array("I", range(metadata.nr_cblocks))
    metadata.prepare_shutdown(policy=SMQ, hints=hints)
    commit(store, metadata, clean=True)
    assert held_by(open_cache(bytes(store.durable))) == held_by(metadata)


def change(metadata: CacheMetadata) -> None:
    cblocks = range(metadata.nr_cblocks)
    free = [cblock for cblock in cblocks if metadata.maybe_oblock(cblock) is None]
    for oblock in range(min(metadata.nr_oblocks, NR_CBLOCKS + 1)):
        if free and metadata.maybe_cblock(oblock) is None:
            metadata.insert(free[0], oblock, dirty=True)
            return
    if metadata.nr_mapped:
        cblock = next(at for at in cblocks if metadata.maybe_oblock(at) is not None)
        metadata.set_clean(cblock)
        metadata.remove(cblock)


# ---- lies ----


def lie_in_record(
    rng: random.Random, image: bytearray, aged: CacheAged, _: CacheAged
) -> None:
    """Seal a wrong record; sometimes make all digests behind it fit."""
    superblock = aged.superblock()
    fields = msgspec.to_builtins(superblock, builtin_types=(bytes,))
    snapshot, journal, sync = live_ranges(fields)
    is_sync = rng.random() < 0.5
    ranges = (sync,) if is_sync else (snapshot, journal)
    blocks = [
        block for blocks in ranges for block, _, _ in read_records(aged.image, blocks)
    ]
    if not blocks:
        return
    at = rng.randrange(len(blocks))
    record = maybe_fields(image, blocks[at])
    if rng.random() < 0.15:
        reseal(image, RECORD_MAGIC, blocks[at], rng.choice(BODIES))
    elif record is not None:
        lie_about_blocks(rng, record)
        reseal(image, RECORD_MAGIC, blocks[at], encoded(record))
    if rng.random() < 0.2:
        return
    slot = superblock.generation % 2
    if is_sync:
        make_sync_fit(image, slot, blocks, at)
    else:
        make_digests_fit(image, slot, blocks, at)
    if rng.random() < 0.7:
        make_counts_fit(image, slot)


def make_sync_fit(
    image: bytearray, slot: int, blocks: Sequence[int], changed: int
) -> None:
    """Chain what a clean shutdown wrote anew, and let the superblock vouch for it."""
    fields = maybe_fields(image, slot)
    if fields is None or len(fields) <= SYNC_DIGEST:
        return
    digest = digest_at(image, blocks[changed])
    for block in blocks[changed + 1 :]:
        record = maybe_fields(image, block)
        if record is None or len(record) < 3:
            return
        record[2] = digest
        digest = reseal(image, RECORD_MAGIC, block, encoded(record))
    fields[SYNC_DIGEST] = digest
    for block in (slot, slot + 2):
        reseal(image, SUPERBLOCK_MAGIC, block, encoded(fields))


def make_counts_fit(image: bytearray, slot: int) -> None:
    """Let the superblock count what its records say, if that can be told."""
    fields = maybe_fields(image, slot)
    if fields is None or len(fields) < 31 or fields[18] not in range(1000):
        return
    try:
        held = held_in(bytes(image), fields)
    except UNREADABLE:
        return
    logged = [value for value in held.values.values() if value & 2]
    dirty = held.dirty if fields[3] & 1 else ()
    fields[20:23] = len(held.values), len(logged), len(dirty)
    for block in (slot, slot + 2):
        reseal(image, SUPERBLOCK_MAGIC, block, encoded(fields))


def lie_about_blocks(rng: random.Random, record: list[Any]) -> None:
    """A wrong field, or a content of either kind that is wrong, or right by chance."""
    head = record[1:3]
    begin = rng.choice([0, 1, 8, 16, 30, 59, 60, 61, -1, 1 << 31, 1 << 40])
    contents = (
        ["entries", *head, lying_entries(rng)],
        ["values", *head, begin, lying_values(rng)],
        ["dirty", *head, begin, rng.randbytes(rng.choice([0, 1, 4, 8, 9]))],
        ["hints", *head, begin, rng.randbytes(rng.choice([0, 3, 4, 100, 240, 244]))],
        ["discards", *head, rng.randbytes(rng.choice([0, 24, 25, 26]))],
    )
    draw = rng.random()
    if draw < 0.3 or len(head) < 2:
        index = rng.randrange(-1, len(record) or 1)
        change_field(rng, record, index, rng.choice(LIES))
    elif draw < 0.4:
        record[1] = rng.choice([0, 1, 2, 3, 1000, 1 << 62, -1])
    elif draw < 0.7:  # of its own kind, if it has one
        same = [each for each in contents if each[0] == record[0]]
        record[:] = rng.choice(same or list(contents))
    else:
        record[:] = rng.choice(contents)


def lying_value(rng: random.Random) -> int:
    oblock = rng.choice([0, 1, 150, 199, 200, (1 << 48) - 1, rng.randrange(200)])
    flags = rng.choice([1, 1, 1, 3, 3, 0, 2, 4, 1 << 15])
    return rng.choice([0, oblock << 16 | flags])


def lying_entries(rng: random.Random) -> bytes:
    cblocks = [0, 59, 60, (1 << 32) - 1, *(rng.randrange(60) for _ in range(6))]
    entries = b"".join(
        struct.pack("<IQ", rng.choice(cblocks), lying_value(rng))
        for _ in range(rng.choice([0, 1, 1, 1, 2, 9]))
    )
    return entries + bytes(rng.choice([0, 0, 0, 0, 1, 8]))


def lying_values(rng: random.Random) -> bytes:
    values = [lying_value(rng) for _ in range(rng.choice([0, 1, 1, 2, 16, 61]))]
    return struct.pack(f"<{len(values)}Q", *values) + bytes(rng.choice([0, 0, 0, 4]))


DAMAGES: Final[tuple[Damage, ...]] = (
    *MISHAPS,
    *(lie_in_superblock,) * 4,
    *(lie_in_record,) * 4,
)
