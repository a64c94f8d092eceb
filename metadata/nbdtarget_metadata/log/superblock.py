# SPDX-License-Identifier: Apache-2.0
"""The superblock, of any kind: the only thing that is overwritten in place. It vouches for all the rest.

Theory of operation
===================

Blocks 0 to 3 hold two **slots** of two **copies**; between the copies of a slot lies one of the other:

    block 0: slot 0 copy 0    block 1: slot 1 copy 0    block 2: slot 0 copy 1    block 3: slot 1 copy 1

Generation g goes to slot g % 2, with FUA, after everything that it vouches for is durable: first
copy 0, then, **when that has ended**, copy 1. It is acknowledged when both have ended. So at a power cut
at most one copy is under way, and a disk that loses the sector which it is writing loses one copy.
Envelope and body lie in the first 512-byte sector of the block, so a torn write leaves a copy old or
new. Behind them lies the record of the disks (see below), and the rest is zero. Formatting writes generations 0 and 1, hence all four copies
are valid ever after.

An **invalid** copy holds something else, or cannot be read at all: each copy is read on its own, and an
error of the disk is a fault of that copy. It is rot, or the sector that a power cut has spoilt.

A crash while generation N is written to slot s leaves copy 0 at N-2 or N, and copy 1 at N-2 unless
copy 0 is N; the other slot holds N-1 twice. With one invalid copy (X), this is every case:

    slot s        other slot    opens at   why that is right
    N-2, N-2      N-1, N-1      N-1        nothing of N arrived
    N  , N-2      N-1, N-1      N          valid, so what it vouches for is durable. N-1 if the record of the
                                           disks is not there (see below)
    N  , N        N-1, N-1      N          the commit was complete
    X  , N-2      N-1, N-1      N-1        X was N-2, or an N whose sibling was never written: that
                                           commit was not acknowledged
    N-2, X        N-1, N-1      N-1        X was N-2: copy 0 would be N
    N  , X        N-1, N-1      N          one good copy is enough
    X  , N        N-1, N-1      N          one good copy is enough
    any of them   N-1, X        as above   one good copy is enough
    X  , X        anything      refused    two invalid copies: it may have been the newest
    zeroes twice  0 and 0/zero  format     formatting was interrupted: see below

The newest valid copy counts. A slot whose copies are not both valid and equal is **unhealed**:
what was read there is as good as before, but one more fault would lose it. So the metadata
counts as changed until commits have rewritten each unhealed slot. Nothing
is acknowledged on the strength of a single copy.

Opening begins with a flush: after a kill (not a power cut) what is read may lie in a cache that
no flush has covered, and an acknowledgement could rest on it. After an I/O error in the
same boot even that is not enough: a cache may show, and call clean, what never reached the disk.
So an opening takes both slots for unhealed (commit.py), and the first resume rewrites them.
The first of these commits writes nothing but its superblock, and copy 0 before copy 1. Thus an X that
was an N, and that can be read again later, is overwritten before what it vouches for is.

Formatting writes slot 0 (generation 0), flushes, writes slot 1 (generation 1), flushes. A
crash before the first flush leaves valid copies of generation 0 or zeroes, and slot 1 zero: that
state vouches for nothing and is formatted again. As soon as one copy of generation 1 is valid,
both copies of generation 0 are durable, and the metadata can be opened. Rot cannot turn
a used device into that state: generation 2 overwrites slot 0.

Which disks belong to the metadata. The record of that (disks.py) is too long for the sector. It lies behind
the sector, in the same block, and the superblock has its length and digest. A crash may leave a new
sector before an old record, or the other way round. So all four copies' records are looked at, and the one
that has the digest belongs to the superblock. If none has it for an N whose sibling is N-2, the power went while
copy 0 of N was written. Nothing of N was acknowledged, so N-1 is opened, whose record is there. In any other
case it is rot, and the disks are not known, as with metadata of older versions: no commit is in danger, and it is noted.
In core, the field `disks` holds the record itself.

Not handled: a device that loses writes it has acknowledged with FUA. Two lost copies of one
generation look like the generation before.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Generic, NamedTuple, TypeVar

import msgspec

from nbdtarget_metadata.errors import (
    CorruptMetadata,
    MetadataTooSmall,
    NeedsCheck,
    NotFormatted,
    NotOurs,
    UnsupportedFormat,
)
from nbdtarget_metadata.log.envelope import (
    BLOCK_SIZE,
    DIGEST_SIZE,
    HEADER_SIZE,
    UNDECODABLE,
    open_envelope,
    seal,
)
from nbdtarget_metadata.log.foreign import describe
from nbdtarget_metadata.operations import UNREADABLE, Flush, Steps, TryRead, Write, read
from nbdtarget_metadata.units import SECTOR

__all__ = [
    "ALL_SLOTS",
    "CLEAN_SHUTDOWN",
    "COUNTER_MAX",
    "NEEDS_CHECK",
    "NR_COPIES",
    "NR_SLOTS",
    "RO_COMPAT_KNOWN",
    "SUPERBLOCK_BLOCKS",
    "SUPERBLOCK_MAGIC",
    "Copy",
    "Found",
    "S",
    "Superblock",
    "SuperblockType",
    "check_ranges",
    "choose_superblock",
    "format_superblocks",
    "open_copies",
    "read_area",
    "read_superblock",
    "superblock_block",
    "superblock_writes",
    "tag_of",
    "write_superblock",
]

SUPERBLOCK_MAGIC: Final = b"nbdt-sb\0"
NR_SLOTS: Final = 2
NR_COPIES: Final = 2
ALL_SLOTS: Final = frozenset(range(NR_SLOTS))
SUPERBLOCK_BLOCKS: Final = NR_SLOTS * NR_COPIES

# Flags.
CLEAN_SHUTDOWN: Final = 1  # the last commit ended an orderly suspend
NEEDS_CHECK: Final = 2  # a tool must look at the metadata before it is used again
# Bits from 4 on belong to the kinds.

# Feature bits that this version knows: no kind has one yet. An unknown one of ro_compat means mode RO, an
# unknown one of compat is ignored. Which ones of incompat are known, each kind says; others are refused.
RO_COMPAT_KNOWN: Final = 0
# The largest generation or statistic that is believed. No metadata gets there by commits.
COUNTER_MAX: Final = 1 << 62

_ZERO_BLOCK: Final = bytes(BLOCK_SIZE)


class Superblock(msgspec.Struct, array_like=True, frozen=True, gc=False, kw_only=True):
    """The superblock fields of every kind of metadata. The order here is the format.

    FORMAT.md describes each field; each kind has its own behind these.
    """

    generation: int
    uuid: bytes
    flags: int
    compat: int
    ro_compat: int
    incompat: int
    nr_commits: int
    nr_compactions: int
    arena_blocks: int
    arena: int
    snapshot_block: int
    snapshot_blocks: int
    snapshot_digest: bytes
    journal_blocks: int
    journal_digest: bytes

    @property
    def disks(self) -> bytes:
        """The record of which disks belong to it (disks.py); empty if there is none.

        A field of each kind, behind its own: there it does not move those of older versions.
        """
        raise NotImplementedError

    @property
    def arena_begin(self) -> int:
        """The first block of the live arena."""
        return SUPERBLOCK_BLOCKS + self.arena * self.arena_blocks

    @property
    def arena_end(self) -> int:
        """The block after the live arena."""
        return self.arena_begin + self.arena_blocks

    @property
    def journal_block(self) -> int:
        """The first block of the journal."""
        return self.snapshot_block + self.snapshot_blocks

    @property
    def journal_end(self) -> int:
        """The block after the last vouched record: where the next one goes."""
        return self.journal_block + self.journal_blocks


S = TypeVar("S", bound=Superblock)


@dataclass(frozen=True)
class SuperblockType(Generic[S]):
    """One kind of superblock.

    Attributes:
        tag: what stands at its beginning.
        decoder: of its body.
        fixed: fields that are the same in all generations.
        incompat_known: the feature bits that this version knows; others are refused.
        check: raises CorruptMetadata if a field of this kind is out of range; the fields that every
            kind has are checked before.
    """

    tag: str
    decoder: msgspec.msgpack.Decoder[S]
    fixed: tuple[str, ...]
    incompat_known: int
    check: Callable[[S], None]


class Found(NamedTuple, Generic[S]):
    """The result of `choose_superblock`: the newest superblock, and the faults that were found.

    `unhealed` slots must be rewritten; `notes` says why, for people. `lost` slots have no valid
    copy; there are none unless the caller admits one.
    """

    superblock: S
    unhealed: frozenset[int]
    notes: tuple[str, ...]
    lost: frozenset[int] = frozenset()


class Copy(NamedTuple, Generic[S]):
    """One of the four; `fault` says why it is not valid, and is empty if it is.

    `note`: it is valid, but the record of its disks is lost.
    """

    superblock: S | None
    fault: str
    note: str = ""


_ENCODER: Final = msgspec.msgpack.Encoder()


def superblock_block(slot: int, copy: int) -> int:
    """Return the block number of a copy: the two copies of a slot are not neighbours."""
    return copy * NR_SLOTS + slot


def superblock_writes(superblock: Superblock) -> tuple[Write, Write]:
    """Return the FUA writes of both copies. The second may begin only after the first has ended."""
    record = superblock.disks
    stored = msgspec.structs.replace(superblock, disks=_reference(record))
    body = _ENCODER.encode(stored)
    assert HEADER_SIZE + len(body) <= SECTOR, "a torn copy must be old or new"
    slot = superblock.generation % NR_SLOTS
    return _write(slot, 0, body, record), _write(slot, 1, body, record)


def write_superblock(superblock: Superblock) -> Steps[None]:
    """Write both copies, one after the other.

    Durable: the generation, when this returns. Only call when what it vouches for is.
    """
    yield from superblock_writes(superblock)


def format_superblocks(superblock: S) -> Steps[S]:
    """Write generations 0 and 1 over zeroes; see the module head for the order.

    Durable: a formatted, empty metadata device.
    """
    assert superblock.generation == 0
    for generation in range(NR_SLOTS):
        superblock = msgspec.structs.replace(superblock, generation=generation)
        yield from write_superblock(superblock)
        # FUA alone would do; the flush also orders the zeroes that the owner found.
        yield Flush()
    return superblock


def read_superblock(kind: SuperblockType[S], device_size: int) -> Steps[Found[S]]:
    """Flush, then read and choose the superblock. Raises: MetadataError: there is none that can be used; DeviceError."""
    area = yield from read_area(device_size)
    return choose_superblock(kind, area)


def read_area(device_size: int) -> Steps[memoryview]:
    """Flush, then read the four blocks, each on its own: one that cannot be is `UNREADABLE`.

    Raises: NotOurs, MetadataTooSmall: they do not fit.
    """
    area_size = SUPERBLOCK_BLOCKS * BLOCK_SIZE
    yield Flush()
    if device_size < area_size:
        head = yield from read(0, device_size)
        is_cut_short = bytes(head[: len(SUPERBLOCK_MAGIC)]) == SUPERBLOCK_MAGIC
        if any(head) and not is_cut_short:
            raise NotOurs("block 0", describe(head))
        raise MetadataTooSmall(needed=area_size, given=device_size)
    area = bytearray()
    for block in range(SUPERBLOCK_BLOCKS):
        area += yield from read(block * BLOCK_SIZE, BLOCK_SIZE, TryRead)
    if area == UNREADABLE * SUPERBLOCK_BLOCKS:
        # All copies at once is not the fault of a copy: read them again so that the disk's error
        # is raised.
        return (yield from read(0, area_size))
    return memoryview(area)


def open_copies(kind: SuperblockType[S], area: memoryview) -> list[list[Copy[S]]]:
    """Open the four copies, by slot and copy, and compare nothing.

    Raises: NotOurs, UnsupportedFormat, CorruptMetadata: a copy is intact, but is not a superblock of
        this kind and version.
    """
    return [
        [
            _with_disks(area, _open_copy(kind, area, slot, copy))
            for copy in range(NR_COPIES)
        ]
        for slot in range(NR_SLOTS)
    ]


def tag_of(area: memoryview) -> str | None:
    """Return the kind that an intact copy names, also an unknown one; None if there is no such copy.

    Raises: UnsupportedFormat.
    """
    for slot in range(NR_SLOTS):
        for copy in range(NR_COPIES):
            block = superblock_block(slot, copy)
            data = _block_of(area, slot, copy)
            try:
                opened = open_envelope(SUPERBLOCK_MAGIC, block, data, f"block {block}")
            except CorruptMetadata:
                continue
            kind = _kind_of(opened.body)
            if kind is not None:
                return kind
    return None


def choose_superblock(
    kind: SuperblockType[S],
    area: memoryview,
    *,
    admit_needs_check: bool = False,
    admit_lost_slot: bool = False,
) -> Found[S]:
    """Choose the newest of the four copies by the case table in the module head.

    Args:
        admit_needs_check: return it although the flag is set: for tools that check it.
        admit_lost_slot: choose from the other slot if one has no valid copy. Its content
            may be older than the acknowledged one. Only for tools that tell this to the user.

    Raises:
        NotFormatted: all zeroes, or an interrupted format.
        NotOurs: there is other content than metadata.
        CorruptMetadata: a slot has no valid copy, or copies contradict each other.
        UnsupportedFormat: of a newer format version or with unknown incompatible features.
    """
    copies = open_copies(kind, area)
    _refuse_foreign(area, copies)
    _refuse_unfinished(area, copies)
    lost = set()
    # A slot without a valid copy may have held the newest superblock: to open the other one
    # could roll back what was acknowledged. So that is refused, except for tools.
    for slot in range(NR_SLOTS):
        if admit_lost_slot and not any(copy.superblock for copy in copies[slot]):
            lost.add(slot)
        else:
            _check_slot(slot, copies[slot])
    valid = [copy.superblock for slot in copies for copy in slot if copy.superblock]
    # A single valid copy is enough: it was written after what it vouches for was durable.
    newest = max(valid, key=lambda superblock: superblock.generation)
    first, second = copies[newest.generation % NR_SLOTS]
    is_torn = first.superblock == newest and first.note
    if is_torn and second.superblock and second.superblock != newest:
        complete = [superblock for superblock in valid if superblock != newest]
        newest = max(complete, key=lambda superblock: superblock.generation)
    for field in kind.fixed:
        for other in valid:
            expected, found = getattr(newest, field), getattr(other, field)
            if expected != found:
                raise CorruptMetadata(
                    f"{field} of superblock generation {other.generation}",
                    expected,
                    found,
                )
    unknown = newest.incompat & ~kind.incompat_known
    if unknown:
        raise UnsupportedFormat(1, unknown)
    _check_fields(newest)
    kind.check(newest)
    if newest.flags & NEEDS_CHECK and not admit_needs_check:
        raise NeedsCheck
    # Copies that differ are what a crash between the two writes leaves, or rot.
    unhealed, notes = set(), []
    for slot in range(NR_SLOTS):
        first, second = copies[slot]
        if slot in lost or first.superblock != second.superblock:
            unhealed.add(slot)
            notes.append(first.fault or second.fault or f"slot {slot}: copies differ")
    notes += {
        copy.note
        for copy in copies[newest.generation % NR_SLOTS]
        if copy.note and copy.superblock == newest
    }
    return Found(newest, frozenset(unhealed), tuple(notes), frozenset(lost))


def _write(slot: int, copy: int, body: bytes, disks: bytes) -> Write:
    block = superblock_block(slot, copy)
    data, _ = seal(SUPERBLOCK_MAGIC, block, body)
    assert SECTOR + len(disks) <= BLOCK_SIZE
    sealed = data[:SECTOR] + disks + data[SECTOR + len(disks) :]
    return Write(block * BLOCK_SIZE, sealed, fua=True)


@lru_cache(maxsize=16)
def _reference(record: bytes) -> bytes:
    """Return the reference of a sector to the record behind it: length and digest."""
    if not record:
        return b""
    digest = hashlib.blake2b(record, digest_size=DIGEST_SIZE).digest()
    return len(record).to_bytes(2, "little") + digest


def _with_disks(area: memoryview, copy: Copy[S]) -> Copy[S]:
    """Put the record in the place of the reference to it."""
    superblock = copy.superblock
    if superblock is None or not superblock.disks:
        return copy
    reference = superblock.disks
    length = int.from_bytes(reference[:2], "little")
    record = b""
    for block in range(SUPERBLOCK_BLOCKS):
        begin = block * BLOCK_SIZE + SECTOR
        end = min(begin + length, (block + 1) * BLOCK_SIZE)
        candidate = bytes(area[begin:end])
        if _reference(candidate) == reference:
            record = candidate
            break
    known = msgspec.structs.replace(superblock, disks=record)
    note = "" if record else "the record of which disks belong to it is damaged"
    return Copy(known, copy.fault, note)


def _block_of(area: memoryview, slot: int, copy: int) -> memoryview:
    begin = superblock_block(slot, copy) * BLOCK_SIZE
    return area[begin : begin + BLOCK_SIZE]


def _open_copy(
    kind: SuperblockType[S], area: memoryview, slot: int, copy: int
) -> Copy[S]:
    """Open one copy. A fault that rot can cause is returned; only an intact copy can raise."""
    block = superblock_block(slot, copy)
    where = f"superblock slot {slot} copy {copy} (block {block})"
    data = _block_of(area, slot, copy)
    if data == UNREADABLE:
        return Copy(None, f"{where} cannot be read")
    try:
        opened = open_envelope(SUPERBLOCK_MAGIC, block, data, where)
    except CorruptMetadata as error:
        return Copy(None, str(error))
    try:
        return Copy(kind.decoder.decode(opened.body), "")
    except UNDECODABLE as error:
        tag = _kind_of(opened.body)
        if tag is not None and tag != kind.tag:
            raise NotOurs(where, f"metadata of a {tag}") from error
        raise CorruptMetadata(where, f"a {kind.tag} superblock", error) from error


def _kind_of(body: memoryview) -> str | None:
    """Return the tag of a superblock of any kind, if it has one."""
    try:
        fields = msgspec.msgpack.decode(body, type=list[object])
    except UNDECODABLE:
        return None
    return fields[0] if fields and isinstance(fields[0], str) else None


def _refuse_foreign(area: memoryview, copies: list[list[Copy[S]]]) -> None:
    if any(copy.superblock for slot in copies for copy in slot):
        return
    if not bytes(area).lstrip(b"\0"):
        raise NotFormatted
    for slot in range(NR_SLOTS):
        for copy in range(NR_COPIES):
            block = _block_of(area, slot, copy)
            if (
                block == UNREADABLE
                or bytes(block[: len(SUPERBLOCK_MAGIC)]) == SUPERBLOCK_MAGIC
            ):
                faults = [each.fault for pair in copies for each in pair]
                raise CorruptMetadata(
                    "all superblocks", "a valid copy", "; ".join(faults)
                )
    raise NotOurs("the superblock area (blocks 0 to 3)", describe(area))


def _refuse_unfinished(area: memoryview, copies: list[list[Copy[S]]]) -> None:
    """Tell an interrupted format from rot: slot 1 zero, slot 0 zero or generation 0."""
    for copy in range(NR_COPIES):
        if _block_of(area, 1, copy) != _ZERO_BLOCK:
            return
        superblock = copies[0][copy].superblock
        if superblock is None:
            if _block_of(area, 0, copy) != _ZERO_BLOCK:
                return
        elif superblock.generation != 0:
            return
    raise NotFormatted


def _check_slot(slot: int, copies: list[Copy[S]]) -> None:
    """Raise CorruptMetadata if the slot cannot have come about by a crash and one rot."""
    valid = [copy.superblock for copy in copies if copy.superblock]
    if not valid:
        raise CorruptMetadata(
            f"superblock slot {slot} (blocks {superblock_block(slot, 0)} and"
            f" {superblock_block(slot, 1)})",
            "a valid copy",
            "; ".join(copy.fault for copy in copies),
        )
    for superblock in valid:
        if superblock.generation % NR_SLOTS != slot:
            raise CorruptMetadata(
                f"generation in superblock slot {slot}",
                "even" if slot == 0 else "odd",
                superblock.generation,
            )
    first, last = valid[0], valid[-1]
    if first.generation == last.generation and first != last:
        raise CorruptMetadata(
            f"superblock slot {slot}, generation {first.generation}",
            "equal copies",
            "copies that contradict each other",
        )


def check_ranges(superblock: Superblock, rules: dict[str, bool]) -> None:
    """Raise CorruptMetadata for the first field whose rule does not hold."""
    for field, holds in rules.items():
        if not holds:
            raise CorruptMetadata(
                f"{field} of superblock generation {superblock.generation}",
                "a value in range",
                getattr(superblock, field),
            )


def _check_fields(superblock: Superblock) -> None:
    """Check what would otherwise be believed: ranges, digests' lengths."""
    rules = {
        "generation": 0 <= superblock.generation <= COUNTER_MAX,
        "nr_commits": 0 <= superblock.nr_commits <= COUNTER_MAX,
        "nr_compactions": 0 <= superblock.nr_compactions <= COUNTER_MAX,
        "uuid": len(superblock.uuid) == 16,
        "snapshot_digest": len(superblock.snapshot_digest) == DIGEST_SIZE,
        "journal_digest": len(superblock.journal_digest) == DIGEST_SIZE,
        "arena": superblock.arena in (0, 1),
        "snapshot_block": superblock.snapshot_block >= superblock.arena_begin,
        "snapshot_blocks": superblock.snapshot_blocks >= 0
        and superblock.journal_block <= superblock.arena_end,
        "journal_blocks": superblock.journal_blocks >= 0
        and superblock.journal_end <= superblock.arena_end,
    }
    check_ranges(superblock, rules)
