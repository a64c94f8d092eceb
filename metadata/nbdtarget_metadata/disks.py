# SPDX-License-Identifier: Apache-2.0
"""Which disks belong to this metadata: what is recorded of them, and how it is compared.

Theory of operation
===================

A superblock says nothing about the disks that its regions or blocks lie on. So metadata records,
for each disk, what it **is**: its name, and evidence that survives a restart of the machine. At
the next start the same evidence is collected anew (`Evidence`), and `compare` tells:

    SAME      it is the recorded disk
    MOVED     it may be the recorded disk in another place, or a copy: a person has to say so
    OTHER     there is evidence that it is another disk, or another state of the disk

Evidence, from the strongest on:

    mark      an extended attribute of a file: the uuid of the metadata and a generation. It is
              lost in a copy without extended attributes, and a file system may have none
    ids       what a block device or an NBD export says of itself, as "key=value". Two values of
              one key that differ prove another disk. A remote image is *pinned* by some of its ids (size,
              ETag, version, time of last modification): those prove another disk or another state of it, whatever
              a sample says, and one that is not told any more proves nothing
    place     device number and inode of a file. The device number may change at a restart
    name      as it was given

and one that is of another nature: a **sample**, the digest of some blocks that must not have
changed. Blocks that differ prove another disk, or a changed one (`changed_since`). Equal blocks
prove little by themselves: two disks made from one template have many blocks in common.

Generations. A mark is written with a generation that is durable in the metadata already, and the
metadata records the generation of a mark only after the mark is durable. So for the disks and the
metadata of one history, and after any crash,

    generation recorded for the mark  <=  generation in the mark  <=  generation of the metadata

A mark that is newer than the metadata proves that the metadata comes from an old backup; one that is
older than recorded proves the same of the disk. A copy of disk and metadata together keeps the order.

Last change. A clean stop records size, modification time and a sample (`changed_since`). The time of the
last change of the inode is not compared: a renaming, a changed mode, and our own mark change it. A block
device or an export has no such time; there only the sample shows a change, of what it covers: the head of the
disk is part of it, which a file system writes to when it is mounted. A change within the same tick of a file's
time as our last write (some milliseconds; on old file systems a second) is seen in the sample at most.

On disk. The record is a msgpack array; log/superblock.py says where it lies. Strings are cut to bounds, so
that it never exceeds `RECORD_MAX`. A record that cannot be decoded counts as none: the disks are then
accepted and recorded anew, as with metadata of older versions.
"""

import hashlib
from collections.abc import Sequence
from enum import Enum
from typing import Final, NamedTuple

import msgspec

from nbdtarget_metadata.log.envelope import DIGEST_SIZE, UNDECODABLE

__all__ = [
    "FILE",
    "ID_MAX",
    "NOT_MARKED",
    "PIN_IDS",
    "RECORD_MAX",
    "SAMPLE_BYTES",
    "Comparison",
    "Disk",
    "Evidence",
    "Mark",
    "Sample",
    "Verdict",
    "bounded_id",
    "changed_since",
    "compare",
    "decode_disks",
    "encode_disks",
    "record_of",
    "sample_of",
    "spread_offsets",
]

FILE: Final = "file"

RECORD_MAX: Final = 2816  # bytes; in base64 it is one token of a dump
NAME_MAX: Final = 256  # bytes of UTF-8; the end of a longer name is kept
ID_MAX: Final = 128
IDS_MAX: Final = 4
SAMPLE_BYTES: Final = 4096
SAMPLES_MAX: Final = 32
# Where a disk is, not what.
MOVABLE_IDS: Final = frozenset({"server", "backing-file", "url", "image", "helper"})
# The facts about a remote image when it was read; see `nbdtarget.devices.ranged.pin`, and `nbdtarget.devices.helper.state` for Ceph.
PIN_IDS: Final = frozenset(
    {"etag", "version", "last-modified", "size", "image-id", "snapshot-id"}
)
NOT_MARKED: Final = -1


class Mark(msgspec.Struct, array_like=True, frozen=True):
    """The mark on the disk itself: the owner of the disk, and the metadata's generation at that time."""

    uuid: bytes
    generation: int


class Sample(msgspec.Struct, array_like=True, frozen=True):
    """Blocks of SAMPLE_BYTES bytes at `offsets`, and the digest of their contents."""

    offsets: tuple[int, ...]
    digest: bytes


class Evidence(NamedTuple):
    """The facts that a device reports of itself now.

    Attributes:
        kind: `file`, `block`, `nbd`, `url`, `helper`, `mapped`, `memory`; empty: not known.
        name: as it stands in the table line.
        ids: "key=value"; equal values of one key mean one disk, different ones two disks.
        place: device number and inode of a file.
        mtime_ns: of a file's last modification; 0: not known.
        can_be_marked: it may carry a mark.
        mark: that it carries for the role in question.
        is_elsewhere: the disk that was recorded still stands under its name and in its place, so
            this is not the one.
        is_pinned: equal ids prove equal content, so no sample has to be taken.
    """

    kind: str
    name: str
    size: int
    ids: tuple[str, ...] = ()
    place: tuple[int, int] = (0, 0)
    mtime_ns: int = 0
    can_be_marked: bool = False
    mark: Mark | None = None
    is_elsewhere: bool = False
    is_pinned: bool = False


class Disk(msgspec.Struct, array_like=True, frozen=True):
    """The record of one disk. New fields go to the end and have defaults.

    Attributes:
        role: `destination` or `source` of a clone, `cache` or `origin` of a cache.
        mark_generation: of the mark that is known to be on it; NOT_MARKED: there may be none.
        is_stopped: size and mtime_ns are those of a clean stop. Every start takes it back.
        sample: of what must not have changed.
        Others: see `Evidence`.
    """

    role: str
    kind: str
    name: str
    size: int
    ids: tuple[str, ...] = ()
    place: tuple[int, int] = (0, 0)
    mark_generation: int = NOT_MARKED
    is_stopped: bool = False
    mtime_ns: int = 0
    sample: Sample | None = None


class Verdict(Enum):
    """See the module head."""

    SAME = "same"
    MOVED = "moved"
    OTHER = "other"


class Comparison(NamedTuple):
    """A verdict, and the evidence for it in words."""

    verdict: Verdict
    reason: str


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(tuple[Disk, ...])


def encode_disks(disks: Sequence[Disk]) -> bytes:
    """Return the record of `disks`."""
    record = _ENCODER.encode(tuple(disks))
    assert len(record) <= RECORD_MAX
    return record


def decode_disks(record: bytes) -> tuple[Disk, ...]:
    """Return what a record says; nothing if there is none, or if it cannot be decoded."""
    if not record:
        return ()
    try:
        return _DECODER.decode(record)
    except UNDECODABLE:
        return ()


def record_of(role: str, found: Evidence) -> Disk:
    """Return what is to be recorded of a disk; without a mark and a sample."""
    return Disk(
        role=role,
        kind=found.kind,
        name=_bounded(found.name, NAME_MAX),
        size=found.size,
        ids=tuple(_bounded(each, ID_MAX) for each in found.ids[:IDS_MAX]),
        place=found.place,
        mtime_ns=found.mtime_ns,
    )


def compare(
    recorded: Disk,
    found: Evidence,
    *,
    uuid: bytes,
    generation: int,
    is_sample_equal: bool | None = None,
) -> Comparison:
    """Tell whether `found` is the disk that was recorded.

    Args:
        uuid, generation: of the metadata, as it was opened.
        is_sample_equal: what the recorded sample's blocks say; None: they were not read.
    """
    by_mark = _compare_mark(recorded, found, uuid, generation)
    if by_mark is not None:
        return by_mark
    comparison = _compare_unmarked(recorded, found, is_sample_equal)
    if comparison.verdict is Verdict.MOVED and is_sample_equal is False:
        return Comparison(Verdict.OTHER, f"{comparison.reason}; its content differs")
    return comparison


def changed_since(
    recorded: Disk, found: Evidence, *, is_sample_equal: bool | None = None
) -> str:
    """Say what has changed on the same disk since it was recorded.

    Empty: nothing has, or it is not known.
    """
    if is_sample_equal is False:
        return "its content has changed"
    if not recorded.is_stopped:
        return ""
    if recorded.size != found.size and is_sample_equal:
        return ""  # to grow or shrink a file changes its time, too
    if recorded.mtime_ns and found.mtime_ns and recorded.mtime_ns != found.mtime_ns:
        return "it has been written to"
    return ""


def _compare_unmarked(
    recorded: Disk, found: Evidence, is_sample_equal: bool | None
) -> Comparison:
    if recorded.kind != found.kind:
        what = f"it was a {recorded.kind or 'disk'} and is a {found.kind or 'disk'}"
        return Comparison(Verdict.MOVED, what)
    by_ids = _compare_ids(recorded.ids, found.ids, is_sample_equal)
    if by_ids is not None:
        return by_ids
    if recorded.kind == FILE:
        return _compare_files(recorded, found, is_sample_equal)
    if recorded.name == _bounded(found.name, NAME_MAX):
        return Comparison(Verdict.SAME, "it has the same name")
    return Comparison(
        Verdict.MOVED, "it has another name, and there is no other evidence"
    )


def spread_offsets(size: int, nr_max: int = SAMPLES_MAX) -> tuple[int, ...]:
    """Choose where a disk of `size` bytes is sampled: its head, its end, and evenly between."""
    nr_blocks = size // SAMPLE_BYTES
    if nr_blocks <= nr_max:
        return tuple(range(0, nr_blocks * SAMPLE_BYTES, SAMPLE_BYTES))
    # The head shows most: partition tables and file systems have their uuids there.
    head = nr_max // 4
    spread = nr_max - head
    blocks = {*range(head)}
    blocks |= {
        head + (nr_blocks - 1 - head) * nr // (spread - 1) for nr in range(spread)
    }
    return tuple(block * SAMPLE_BYTES for block in sorted(blocks))


def sample_of(offsets: Sequence[int], blocks: Sequence[bytes | memoryview]) -> Sample:
    """Return the sample of `blocks`, which were read at `offsets`."""
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for offset, block in zip(offsets, blocks, strict=True):
        digest.update(offset.to_bytes(8, "little"))
        digest.update(block)
    return Sample(tuple(offsets), digest.digest())


def _compare_mark(
    recorded: Disk, found: Evidence, uuid: bytes, generation: int
) -> Comparison | None:
    """Compare what is marked; None if there is no mark on the disk."""
    mark = found.mark
    if mark is None:
        return None
    if mark.uuid != uuid:
        return Comparison(Verdict.OTHER, "it is marked as a disk of other metadata")
    if mark.generation > generation:
        return Comparison(
            Verdict.OTHER,
            f"the disk is of generation {mark.generation}, the metadata only of"
            f" {generation}: the metadata comes from an older backup",
        )
    if mark.generation < recorded.mark_generation:
        return Comparison(
            Verdict.OTHER,
            f"the disk is of generation {mark.generation}, the metadata has seen it at"
            f" {recorded.mark_generation}: the disk comes from an older backup",
        )
    return Comparison(Verdict.SAME, "it has the mark of this metadata")


def _compare_ids(
    recorded: Sequence[str], found: Sequence[str], is_sample_equal: bool | None
) -> Comparison | None:
    """Compare what both have; None if they have no key in common."""
    new = dict(each.split("=", 1) for each in found if "=" in each)
    differs = lost = ""
    is_other = is_equal = is_replaced = False
    for each in recorded:
        key, _, value = each.partition("=")
        if key not in new:
            if key in PIN_IDS:
                lost = lost or f"it does not tell its {key} any more"
            continue
        if _bounded(f"{key}={new[key]}", ID_MAX) == each:
            is_equal = True
        else:
            differs = differs or f"its {key} is {new[key] or 'empty'}, not {value}"
            is_other |= key not in MOVABLE_IDS
            is_replaced |= key in PIN_IDS
    if differs:
        # Another export with the same content may be the same disk behind another server.
        is_other = is_replaced or (is_other and not is_sample_equal)
        return Comparison(Verdict.OTHER if is_other else Verdict.MOVED, differs)
    if lost:
        return Comparison(Verdict.MOVED, lost)
    if is_equal:
        return Comparison(Verdict.SAME, "it says so itself")
    return None


def _compare_files(
    recorded: Disk, found: Evidence, is_sample_equal: bool | None
) -> Comparison:
    """Compare two files of which the found one has no mark."""
    is_name_equal = recorded.name == _bounded(found.name, NAME_MAX)
    if recorded.mark_generation != NOT_MARKED:
        # Also in the same place: a file system gives the inode of a removed file to the next.
        if found.is_elsewhere:
            return Comparison(Verdict.OTHER, f"{recorded.name} is still there")
        reason = "it has no mark of this metadata: a copy, or another disk"
        return Comparison(Verdict.MOVED, reason)
    if recorded.place == found.place:
        return Comparison(Verdict.SAME, "it is the same file on the same device")
    if is_name_equal and recorded.place[1] == found.place[1]:
        return Comparison(Verdict.SAME, "it has the same name and inode")
    if found.is_elsewhere:
        return Comparison(Verdict.OTHER, f"{recorded.name} is still there")
    if is_name_equal and is_sample_equal and recorded.mtime_ns == found.mtime_ns:
        return Comparison(Verdict.SAME, "it has the same name, time and content")
    if is_name_equal:
        reason = "another file has its name now: a copy, or another disk"
    else:
        reason = "it is another file in another place"
    return Comparison(Verdict.MOVED, reason)


def bounded_id(key: str, value: str, length_max: int = ID_MAX) -> str:
    """Return an id in at most `length_max` bytes; of a longer value a digest stands in it, so that all of it counts."""
    whole = f"{key}={value}"
    if len(whole.encode("utf-8", "backslashreplace")) <= length_max:
        return whole
    data = value.encode("utf-8", "backslashreplace")
    digest = hashlib.blake2b(data, digest_size=DIGEST_SIZE).hexdigest()
    room = length_max - len(key) - len(digest) - 5
    return f"{key}={_bounded(value, room)}…#{digest}"


def _bounded(text: str, length_max: int) -> str:
    """Return the end of `text` in at most `length_max` bytes of UTF-8."""
    data = text.encode("utf-8", "backslashreplace")
    return data[-length_max:].decode("utf-8", "ignore")
