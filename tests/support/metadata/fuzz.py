# SPDX-License-Identifier: Apache-2.0
"""Damaged and forged metadata: whole images and single chains, each made from a seed.

Two kinds of damage. *Rot and mishaps*: flipped bits, blocks that are doubled, swapped, zeroed,
from another image, cut off. *Lies*: an envelope with a valid digest around a body whose fields
are wrong, or which is no message at all; if the seed says so, with every digest that
follows made to fit, so that nothing but the field itself is wrong.

The oracle. Whatever comes: opening ends within its bounds, in a MetadataError of one line or in
metadata whose bits are exactly those that its vouched records hold, none more, none
less; `check` agrees; and what opens can be committed to, and opens again with one bit more.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import pytest
from bitarray.util import zeros

from nbdtarget_metadata.clone.records import Record, apply_record, decode_record
from nbdtarget_metadata.clone.superblock import NR_REGIONS_MAX
from nbdtarget_metadata.errors import (
    GeometryMismatch,
    MetadataError,
    MetadataTooSmall,
    NotFormatted,
    NotOurs,
)
from nbdtarget_metadata.log import chain
from nbdtarget_metadata.log.chain import RECORD_MAGIC, read_chain
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, HEADER_SIZE, blocks_for, seal
from nbdtarget_metadata.log.superblock import SUPERBLOCK_BLOCKS, SUPERBLOCK_MAGIC
from nbdtarget_metadata.mode import Mode
from tests.support.metadata.clone_images import (
    Aged,
    AnyAged,
    ages,
    format_steps,
    open_image,
    opening,
    record_blocks,
    run_bounded,
    vouched_bits,
)
from tests.support.metadata.report import check
from tests.support.metadata.small_clone import commit
from tests.support.metadata.store import Store, drive

__all__ = [
    "BODIES",
    "COMMITS_MAX",
    "LIES",
    "MISHAPS",
    "NR_DAMAGES",
    "Damage",
    "assert_one_line",
    "assert_that",
    "change_field",
    "digest_at",
    "encoded",
    "fuzz_chain",
    "fuzz_image",
    "lie_in_superblock",
    "make_digests_fit",
    "maybe_fields",
    "reseal",
]

MESSAGE_MAX: Final = 2000  # bytes of an error's one line
NR_DAMAGES: Final = (1, 1, 1, 2, 4)
CHAIN_REGIONS: Final = 36_804
COMMITS_MAX: Final = 3  # one for the change, and one for each slot to heal

# Values that replace a number, a text or bytes.
LIES: Final[tuple[Any, ...]] = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 255, 256, 4096, 1 << 16, 1 << 20, -1, -2, -(1 << 63)),
    *((1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
    *(None, True, False, 0.5, float("nan"), float("inf"), "", "clone", "cache"),
    *("runs", "bits", b"", bytes(8), bytes(15), bytes(16), bytes(17), b"\xff" * 64),
    *([], [1], {}, {"a": 1}, [[[]]]),
)
# Bodies that are no message, or a message with absurd content.
BODIES: Final = (
    b"",
    b"\xc1",
    b"\x91" * 3000,
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\x92\xa2\xff\xfe\x01",
    b"\x92\xa5clone\xc1",
    b"\x93\xa4runs\x01\x81\x91\x01\x01",
)


# ---- images ----


def fuzz_image(seed: int) -> str:
    """Damage an image, open it, judge what comes; return that in one word.

    Raises: AssertionError, or whatever opening raised that it must not.
    """
    rng = random.Random(seed)
    every = list(ages().values())
    aged = rng.choice(every)
    image = bytearray(aged.image)
    for _ in range(rng.choice(NR_DAMAGES)):
        rng.choice(DAMAGES)(rng, image, aged, rng.choice(every))
    return judge(bytes(image))


def judge(image: bytes) -> str:
    try:
        metadata = open_image(image)
    except MetadataError as error:
        assert_one_line(error)
        # `check` asks for no geometry; all else it refuses, too.
        assert_that(isinstance(error, GeometryMismatch) or error_of_check(image))
        if isinstance(error, NotFormatted):
            format_again(image)
        return type(error).__name__
    assert error_of_check(image) is None
    superblock = metadata._superblock
    assert metadata.nr_hydrated == metadata.hydrated.count()
    assert metadata.hydrated.tobytes() == vouched_bits(image, superblock)
    commit_to(image, metadata.mode)
    return "repaired" if metadata.notes else "opened"


def error_of_check(image: bytes) -> str | None:
    try:
        report = run_bounded(image, check(len(image)))
    except MetadataError as error:
        assert_one_line(error)
        return str(error)
    assert report.nr_hydrated <= report.nr_regions <= NR_REGIONS_MAX
    assert report.nr_regions <= 8 * len(image), "more memory than the device is large"
    return None


def format_again(image: bytes) -> None:
    """Check that an image which counts as unformatted may be formatted only if it never held a record."""
    store = Store(len(image), image)
    try:
        drive(store, format_steps(store.size))
    except (NotOurs, MetadataTooSmall) as error:
        assert_one_line(error)
        assert_that(bytes(store.current()) == image)
        return
    assert_that(not any(image[SUPERBLOCK_BLOCKS * BLOCK_SIZE :]))


def assert_that(holds: object) -> None:
    assert holds


def assert_one_line(error: MetadataError) -> None:
    text = str(error)
    assert text
    assert "\n" not in text
    assert len(text) <= MESSAGE_MAX, text


def commit_to(image: bytes, mode: Mode) -> None:
    """Set a bit, commit it until nothing is left to heal, and open again."""
    store = Store(len(image), image)
    metadata = drive(store, opening(store.size))
    region = metadata.maybe_next_unhydrated(0, metadata.nr_regions)
    if mode is not Mode.RW or region is None:
        return
    metadata.set_hydrated(region, region + 1)
    for _ in range(COMMITS_MAX):
        if metadata.changed:
            commit(store, metadata)
    assert not metadata.changed
    expected = metadata.hydrated.tobytes()
    again = open_image(bytes(store.durable))
    assert again.hydrated.tobytes() == expected
    assert again.notes == ()


# ---- rot and mishaps ----

Damage = Callable[[random.Random, bytearray, Any, Any], None]


def flip_bits(rng: random.Random, image: bytearray, aged: AnyAged, _: AnyAged) -> None:
    for _nr in range(rng.choice([1, 1, 1, 2, 8, 64])):
        at = rng.randrange(len(aged.image))
        if rng.random() < 0.7:
            at = pick_block(rng, aged) * BLOCK_SIZE + rng.randrange(160)
        if at < len(image):
            image[at] ^= 1 << rng.randrange(8)


def double_block(
    rng: random.Random, image: bytearray, aged: AnyAged, _: AnyAged
) -> None:
    put_block(image, pick_block(rng, aged), block_of(image, pick_block(rng, aged)))


def swap_blocks(
    rng: random.Random, image: bytearray, aged: AnyAged, _: AnyAged
) -> None:
    first, second = pick_block(rng, aged), pick_block(rng, aged)
    kept = block_of(image, first)
    put_block(image, first, block_of(image, second))
    put_block(image, second, kept)


def splice_block(
    rng: random.Random, image: bytearray, aged: AnyAged, other: AnyAged
) -> None:
    """A block of another age in its own place: a lost write, or a mixed-up backup."""
    block = pick_block(rng, aged)
    put_block(image, block, block_of(other.image, block))


def splice_bytes(
    rng: random.Random, image: bytearray, aged: AnyAged, other: AnyAged
) -> None:
    at = pick_block(rng, aged) * BLOCK_SIZE + rng.randrange(512)
    length = rng.choice([1, 8, 64, 512, 4096])
    source = rng.randrange(len(other.image))
    piece = other.image[source : source + length][: len(image) - at]
    image[at : at + len(piece)] = piece


def swap_slots(rng: random.Random, image: bytearray, aged: AnyAged, _: AnyAged) -> None:
    copy = rng.randrange(2)
    kept = block_of(image, 2 * copy)
    put_block(image, 2 * copy, block_of(image, 2 * copy + 1))
    put_block(image, 2 * copy + 1, kept)


def zero_blocks(
    rng: random.Random, image: bytearray, aged: AnyAged, _: AnyAged
) -> None:
    first = pick_block(rng, aged)
    for block in range(first, first + rng.choice([1, 1, 2, 4])):
        put_block(image, block, bytes(BLOCK_SIZE))


def truncate(rng: random.Random, image: bytearray, aged: AnyAged, _: AnyAged) -> None:
    size = rng.randrange(len(image) + 1)
    if rng.random() < 0.7:
        size = size // BLOCK_SIZE * BLOCK_SIZE
    if rng.random() < 0.3:
        del image[size:]


# ---- lies ----


def lie_in_superblock(
    rng: random.Random, image: bytearray, aged: AnyAged, _: AnyAged
) -> None:
    """Seal a wrong superblock into one copy, a slot, or all."""
    newest = aged.superblock().generation % 2
    blocks = rng.choice([[newest], [newest, newest + 2], [0, 1, 2, 3], [0], [1, 3]])
    if rng.random() < 0.15:
        for block in blocks:
            reseal(image, SUPERBLOCK_MAGIC, block, rng.choice(BODIES))
        return
    nr_fields = 1 + len(aged.superblock().__struct_fields__)
    index, value = rng.randrange(-1, nr_fields), rng.choice(LIES)
    if rng.random() < 0.3:
        value = rng.randrange(64)
    for block in blocks:
        fields = maybe_fields(image, block)
        if fields is not None:
            change_field(rng, fields, index, value)
            reseal(image, SUPERBLOCK_MAGIC, block, encoded(fields))


def lie_in_record(rng: random.Random, image: bytearray, aged: Aged, _: Aged) -> None:
    """Seal a wrong record; sometimes make all digests behind it fit."""
    superblock = aged.superblock()
    blocks = [block for block, _ in record_blocks(aged.image, superblock)]
    if not blocks:
        return
    at = rng.randrange(len(blocks))
    fields = maybe_fields(image, blocks[at])
    if rng.random() < 0.15:
        reseal(image, RECORD_MAGIC, blocks[at], rng.choice(BODIES))
    elif fields is not None:
        lie_about_bits(rng, fields)
        reseal(image, RECORD_MAGIC, blocks[at], encoded(fields))
    if rng.random() < 0.8:
        make_digests_fit(image, superblock.generation % 2, blocks, at)


def lie_about_bits(rng: random.Random, fields: list[Any]) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        change_field(rng, fields, rng.randrange(-1, len(fields) or 1), rng.choice(LIES))
    elif kind == 1 and len(fields) > 3:
        fields[:] = ["runs", *fields[1:3], lying_runs(rng)]
    elif kind == 2 and len(fields) > 3:
        begin = rng.choice([0, 8, 512, 1024, 1192, 1200, 1, -8, 1 << 40])
        bits = rng.randbytes(rng.choice([0, 1, 8, 22, 64, 150, 151, 3000]))
        fields[:] = ["bits", *fields[1:3], begin, bits]
    elif len(fields) > 1:
        fields[1] = rng.choice([0, 1, 2, 3, 1000, 1 << 62, -1])


def lying_runs(rng: random.Random) -> bytes:
    numbers = [0, 1, 2, 600, 1198, 1199, 1200, 1201, (1 << 31) - 1, (1 << 32) - 1]
    runs = b"".join(
        rng.choice(numbers).to_bytes(4, "little") for _ in range(rng.randrange(9))
    )
    return runs + bytes(rng.choice([0, 0, 0, 1, 4]))


def make_digests_fit(
    image: bytearray, slot: int, blocks: Sequence[int], changed: int
) -> None:
    """Chain the records behind a changed one anew, and let the superblock vouch for them."""
    fields = maybe_fields(image, slot)
    if fields is None or len(fields) < 19:
        return
    digest = digest_at(image, blocks[changed])
    for block in blocks[changed + 1 :]:
        record = maybe_fields(image, block)
        if record is None or len(record) < 3:
            return
        record[2] = digest
        digest = reseal(image, RECORD_MAGIC, block, encoded(record))
    begin, length = fields[11:13]
    if isinstance(begin, int) and isinstance(length, int):
        last = [block for block in blocks if block < begin + length]
        fields[13] = digest_at(image, last[-1]) if last else fields[2]
        fields[15] = digest
    for block in (slot, slot + 2):
        reseal(image, SUPERBLOCK_MAGIC, block, encoded(fields))


MISHAPS: Final[tuple[Damage, ...]] = (
    flip_bits,
    double_block,
    swap_blocks,
    splice_block,
    splice_bytes,
    swap_slots,
    zero_blocks,
    truncate,
)
DAMAGES: Final[tuple[Damage, ...]] = (
    *MISHAPS,
    *(lie_in_superblock,) * 4,
    *(lie_in_record,) * 4,
)


# ---- a chain by itself ----


def fuzz_chain(seed: int) -> str:
    """Seal a few records, lying or not, and read them as a snapshot and as a journal."""
    rng = random.Random(seed)
    blocks = 24
    image = bytearray(rng.randbytes(BLOCK_SIZE) * blocks)
    digest, block, nr_records = bytes(16), 0, 0
    generation = 1
    while block < blocks and rng.random() < 0.9:
        fields = ["runs", generation, digest, lying_runs(rng)]
        if rng.random() < 0.6:
            begin = rng.randrange(150)
            fields = ["runs", generation, digest, run_of(begin, rng.randrange(1, 50))]
        if rng.random() < 0.2:
            lie_about_bits(rng, fields)
        elif rng.random() < 0.1:  # more than a block
            begin = 8 * rng.randrange(100)
            fields = ["bits", generation, digest, begin, rng.randbytes(4500)]
        body = rng.choice(BODIES) if rng.random() < 0.05 else encoded(fields)
        if block + blocks_for(HEADER_SIZE + len(body)) > blocks:
            break
        digest = reseal(image, RECORD_MAGIC, block, body)
        block += blocks_for(HEADER_SIZE + len(body))
        generation += rng.randrange(2)
        nr_records += 1
    if rng.random() < 0.2:
        image[rng.randrange(block * BLOCK_SIZE + 1)] ^= 1 << rng.randrange(8)
    with pytest.MonkeyPatch.context() as patch:
        # Records that go on behind the piece which was read, as only a large device has them.
        patch.setattr(chain, "READ_BLOCKS", rng.choice([2, 3, 4, 128]))
        outcomes = [read_alone(image, block, kind) for kind in ("snapshot", "journal")]
    return "+".join(outcomes)


def run_of(begin: int, count: int) -> bytes:
    return begin.to_bytes(4, "little") + count.to_bytes(4, "little")


def read_alone(image: bytearray, end: int, kind: str) -> str:
    bits = zeros(CHAIN_REGIONS, "little")
    begin_min = 0 if kind == "snapshot" else None
    expected: set[int] = set()

    def apply(record: Record, where: str) -> None:
        nonlocal begin_min
        begin_min = apply_record(bits, record, where, bits_begin_min=begin_min)
        expected.update(regions_of(msgspec.to_builtins(record, builtin_types=(bytes,))))

    steps = read_chain(
        kind=kind,
        begin=0,
        end=end,
        digest=bytes(16),
        generation_max=100,
        decode=decode_record,
        apply=apply,
    )
    try:
        run_bounded(image, steps)
    except MetadataError as error:
        assert_one_line(error)
        return "refused"
    assert set(bits.search(1)) == expected
    return "read"


def regions_of(fields: Sequence[Any]) -> set[int]:
    if fields[0] == "runs":
        packed = fields[3]
        words = [
            int.from_bytes(packed[at : at + 4], "little")
            for at in range(0, len(packed), 4)
        ]
        pairs = zip(words[::2], words[1::2], strict=True)
        return {at for begin, count in pairs for at in range(begin, begin + count)}
    return {
        fields[3] + at
        for at in range(8 * len(fields[4]))
        if fields[4][at // 8] >> at % 8 & 1
    }


# ---- blocks ----


def pick_block(rng: random.Random, aged: AnyAged) -> int:
    """A block that is read, most of the time."""
    if rng.random() < 0.4:
        return rng.randrange(SUPERBLOCK_BLOCKS)
    live = aged.live_blocks()
    if live and rng.random() < 0.9:
        return rng.choice(live)
    return rng.randrange(len(aged.image) // BLOCK_SIZE)


def block_of(image: bytes | bytearray, block: int) -> bytes:
    return bytes(image[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE])


def put_block(image: bytearray, block: int, data: bytes) -> None:
    """Put `data` at a block, as far as the image still reaches."""
    at = block * BLOCK_SIZE
    image[at : at + len(data)] = data[: max(0, len(image) - at)]


def maybe_fields(image: bytearray, block: int) -> list[Any] | None:
    """Return the fields of the message at `block`, if there is one."""
    at = block * BLOCK_SIZE
    length = int.from_bytes(image[at + 12 : at + 16], "little")
    try:
        fields = msgspec.msgpack.decode(
            image[at + HEADER_SIZE : at + HEADER_SIZE + length]
        )
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError):
        return None
    return fields if isinstance(fields, list) else None


def change_field(
    rng: random.Random, fields: list[Any], index: int, value: object
) -> None:
    """Replace a field; -1: take one away, or add one, at the end or anywhere."""
    if index >= 0 and index < len(fields):
        fields[index] = value
    elif index < 0 and fields and rng.random() < 0.5:
        del fields[rng.randrange(len(fields))]
    else:
        fields.insert(rng.choice([len(fields), rng.randrange(len(fields) + 1)]), value)


def encoded(fields: list[Any]) -> bytes:
    return msgspec.msgpack.encode(fields)


def reseal(image: bytearray, magic: bytes, block: int, body: bytes) -> bytes:
    """Put an intact envelope around `body` at `block`; return its digest."""
    data, digest = seal(magic, block, body)
    put_block(image, block, data)
    return digest


def digest_at(image: bytearray, block: int) -> bytes:
    return bytes(image[block * BLOCK_SIZE + 16 : block * BLOCK_SIZE + 32])
