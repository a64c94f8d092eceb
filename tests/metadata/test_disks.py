# SPDX-License-Identifier: Apache-2.0
"""Which disk is the recorded one: the table of evidence, and what a torn record leaves."""

from itertools import product

import msgspec
import pytest

from nbdtarget_metadata.clone.superblock import CLONE
from nbdtarget_metadata.disks import (
    FILE,
    ID_MAX,
    IDS_MAX,
    NOT_MARKED,
    RECORD_MAX,
    SAMPLE_BYTES,
    Disk,
    Evidence,
    Mark,
    Sample,
    Verdict,
    bounded_id,
    changed_since,
    compare,
    decode_disks,
    encode_disks,
    record_of,
    sample_of,
    spread_offsets,
)
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.superblock import (
    choose_superblock,
    superblock_block,
    superblock_writes,
)
from nbdtarget_metadata.operations import Write
from nbdtarget_metadata.tools.clone_dump import render_clone
from nbdtarget_metadata.tools.clone_dump_parser import parse_clone
from nbdtarget_metadata.tools.clone_restore import restore_clone
from nbdtarget_metadata.tools.clone_salvage import salvage_clone
from nbdtarget_metadata.tools.dump import disks_from_text, disks_text
from tests.support.metadata.store import Store, drive
from tests.support.metadata.superblocks import make_superblock

SAME, MOVED, OTHER = Verdict.SAME, Verdict.MOVED, Verdict.OTHER
UUID, FOREIGN = bytes(range(16)), bytes(16)
SIZE = 1 << 20
PLACE, ELSEWHERE, SAME_INODE = (8, 100), (8, 200), (9, 100)

RECORDED = Disk(role="origin", kind=FILE, name="/o", size=SIZE, place=PLACE)
MARKED = msgspec.structs.replace(RECORDED, mark_generation=5)
BLOCK_DEVICE = Disk(
    role="origin",
    kind="block",
    name="/dev/sda",
    size=SIZE,
    ids=("wwid=naa.5", "serial=X"),
)
LOOP = Disk(
    role="cache",
    kind="block",
    name="/dev/loop0",
    size=SIZE,
    ids=("backing-file=/f",),
)
NBD = Disk(
    role="source",
    kind="nbd",
    name="nbd://a/x",
    size=SIZE,
    ids=("export=x", "server=a:10809"),
)


ETAG = 'etag="one"'
WEB = Disk(
    role="source",
    kind="url",
    name="https://a/disk.img",
    size=SIZE,
    ids=(ETAG, "url=https://a/disk.img"),
)


def file(name: str = "/o", place: tuple[int, int] = PLACE, **more: object) -> Evidence:
    return Evidence(FILE, name, SIZE, place=place)._replace(**more)  # type: ignore[arg-type]


def block(name: str, *ids: str) -> Evidence:
    return Evidence("block", name, SIZE, ids)


def nbd(*ids: str) -> Evidence:
    return Evidence("nbd", "nbd://somewhere", SIZE, ids)


def web(*ids: str) -> Evidence:
    return Evidence("url", "https://b/disk.img", SIZE, ids)


def mark(generation: int, uuid: bytes = UUID) -> Mark:
    return Mark(uuid, generation)


# what was recorded, what is found, whether a sample is equal, the verdict, a word of the reason
TABLE = [
    # A mark decides, wherever the file is, and whatever it is called.
    (MARKED, file(mark=mark(5)), None, SAME, "mark"),
    (MARKED, file("/n", ELSEWHERE, mark=mark(7)), None, SAME, "mark"),
    (MARKED, file("/n", ELSEWHERE, mark=mark(9)), None, SAME, "mark"),
    (RECORDED, file("/n", ELSEWHERE, mark=mark(1)), None, SAME, "mark"),
    (MARKED, file(mark=mark(7, FOREIGN)), None, OTHER, "other metadata"),
    (MARKED, file(mark=mark(10)), None, OTHER, "10, the metadata only of 9"),
    (MARKED, file(mark=mark(4)), None, OTHER, "at 5: the disk comes from an older"),
    # One that has lost it is a copy or another disk, also in the same place: inodes are used again.
    (MARKED, file(), None, MOVED, "no mark"),
    (MARKED, file(), False, OTHER, "its content differs"),
    (MARKED, file(place=ELSEWHERE), None, MOVED, "no mark"),
    (MARKED, file("/oo", ELSEWHERE), None, MOVED, "no mark"),
    (MARKED, file("/oo", ELSEWHERE, is_elsewhere=True), None, OTHER, "/o is still"),
    (MARKED, file(place=ELSEWHERE), False, OTHER, "its content differs"),
    # Without a recorded mark, the same file is accepted, and another file in its place is not.
    (RECORDED, file(), None, SAME, "same file"),
    (RECORDED, file("/n"), None, SAME, "same file"),
    (RECORDED, file(place=SAME_INODE), None, SAME, "name and inode"),
    (RECORDED, file("/n", SAME_INODE), None, MOVED, "another file"),
    (RECORDED, file(place=ELSEWHERE), None, MOVED, "has its name now"),
    (RECORDED, file(place=ELSEWHERE), True, SAME, "time and content"),
    (RECORDED, file(place=ELSEWHERE, mtime_ns=1), True, MOVED, "has its name now"),
    (RECORDED, file("/oo", ELSEWHERE, is_elsewhere=True), True, OTHER, "still there"),
    # Whether the content of the same disk has changed is another question.
    (RECORDED, file(), False, SAME, "same file"),
    # A block device says what it is; its name may be another one after a restart.
    (BLOCK_DEVICE, block("/dev/sdb", "wwid=naa.5", "serial=X"), None, SAME, "itself"),
    (BLOCK_DEVICE, block("/dev/sda", "wwid=naa.6", "serial=X"), None, OTHER, "naa.6"),
    (BLOCK_DEVICE, block("/dev/sda", "serial=X"), None, SAME, "itself"),
    (BLOCK_DEVICE, block("/dev/sda"), None, SAME, "same name"),
    (BLOCK_DEVICE, block("/dev/sdb"), None, MOVED, "another name"),
    (BLOCK_DEVICE, file("/dev/sda"), None, MOVED, "was a block and is a file"),
    (LOOP, block("/dev/loop7", "backing-file=/f"), None, SAME, "itself"),
    (LOOP, block("/dev/loop0", "backing-file=/g"), None, MOVED, "/g, not /f"),
    # An export that moved to another server may be the same; another export is not, unless it
    # holds the same.
    (NBD, nbd("export=x", "server=a:10809"), None, SAME, "itself"),
    (NBD, nbd("export=x", "server=b:10809"), None, MOVED, "b:10809, not a:10809"),
    (NBD, nbd("export=x", "server=b:10809"), False, OTHER, "content differs"),
    (NBD, nbd("export=y", "server=a:10809"), None, OTHER, "export is y, not x"),
    (NBD, nbd("export=", "server=a:10809"), None, OTHER, "export is empty"),
    (NBD, nbd("export=y", "server=a:10809"), True, MOVED, "export is y, not x"),
    # Another place may serve the same remote image. Another ETag is another image, also if a sample is equal,
    # and a server that has stopped to tell it may have another one.
    (WEB, web(*WEB.ids), None, SAME, "itself"),
    (
        WEB,
        web(ETAG, "url=https://b/disk.img"),
        None,
        MOVED,
        "url is https://b/disk.img",
    ),
    (WEB, web('etag="two"', "url=https://a/disk.img"), True, OTHER, 'etag is "two"'),
    (WEB, web("url=https://a/disk.img"), None, MOVED, "etag any more"),
]


@pytest.mark.parametrize(("recorded", "found", "is_equal", "verdict", "word"), TABLE)
def test_evidence_decides_which_disk_it_is(
    recorded: Disk,
    found: Evidence,
    is_equal: bool | None,
    verdict: Verdict,
    word: str,
) -> None:
    comparison = compare(
        recorded, found, uuid=UUID, generation=9, is_sample_equal=is_equal
    )
    assert comparison.verdict is verdict
    assert word in comparison.reason
    assert "\n" not in comparison.reason


def test_disk_that_is_recorded_as_it_is_found_is_the_same() -> None:
    name = "/" + "ä" * 400
    for found in (
        file(name),
        Evidence("block", name, SIZE, ("wwid=" + "x" * 500,)),
        Evidence("mapped", name, SIZE),
        Evidence("", name, SIZE),
    ):
        recorded = record_of("origin", found)
        comparison = compare(recorded, found, uuid=UUID, generation=9)
        assert comparison.verdict is SAME


def test_last_change_counts_after_a_clean_stop_only() -> None:
    stopped = msgspec.structs.replace(RECORDED, is_stopped=True, mtime_ns=7)
    running = msgspec.structs.replace(stopped, is_stopped=False)
    assert changed_since(stopped, file(mtime_ns=7)) == ""
    assert changed_since(stopped, file(mtime_ns=8)) == "it has been written to"
    assert changed_since(stopped, file(mtime_ns=0)) == ""  # it cannot be told
    assert changed_since(running, file(mtime_ns=8)) == ""
    # To grow a file changes its time: then the content decides, where it is known.
    grown = file(mtime_ns=8)._replace(size=2 * SIZE)
    assert changed_since(stopped, grown) == "it has been written to"
    assert changed_since(stopped, grown, is_sample_equal=True) == ""
    assert "content" in changed_since(stopped, grown, is_sample_equal=False)
    assert "content" in changed_since(stopped, file(mtime_ns=7), is_sample_equal=False)


@pytest.mark.parametrize("nr_blocks", [0, 1, 31, 32, 33, 100, 1 << 28])
def test_sample_lies_within_the_disk_and_has_its_head_and_end(nr_blocks: int) -> None:
    size = nr_blocks * SAMPLE_BYTES + 512
    offsets = spread_offsets(size)
    assert len(offsets) == min(nr_blocks, 32)
    assert list(offsets) == sorted({*offsets})
    if nr_blocks:
        assert offsets[0] == 0
        assert offsets[-1] == (nr_blocks - 1) * SAMPLE_BYTES


def test_sample_knows_what_stands_where() -> None:
    first, second = b"a" * SAMPLE_BYTES, b"b" * SAMPLE_BYTES
    assert sample_of((0, 8192), (first, second)) == sample_of(
        (0, 8192), (first, second)
    )
    assert sample_of((0, 8192), (second, first)) != sample_of(
        (0, 8192), (first, second)
    )


def test_longest_record_fits_and_comes_back() -> None:
    ids = tuple(f"key{nr}=" + "ö" * 500 for nr in range(2 * IDS_MAX))
    found = Evidence("nbd", "/" + "ü" * 5000, 1 << 62, ids, (1 << 63, 1 << 63), 1 << 62)
    disks = [
        msgspec.structs.replace(
            record_of(role, found),
            mark_generation=1 << 62,
            is_stopped=True,
            sample=Sample((1 << 62,) * 32, bytes(16)),
        )
        for role in ("destination", "source")
    ]
    record = encode_disks(disks)
    assert len(record) <= RECORD_MAX
    assert decode_disks(record) == tuple(disks)
    assert disks_from_text(disks_text(record)) == record


def test_name_that_is_no_text_can_be_recorded() -> None:
    found = file("/\udcff")
    disk = record_of("origin", found)
    assert decode_disks(encode_disks([disk])) == (disk,)
    assert compare(disk, found, uuid=UUID, generation=1).verdict is SAME


@pytest.mark.parametrize("record", [b"", b"\xc1", b"\x93", b"\x91\x01", b"x" * 100])
def test_record_that_cannot_be_read_is_none(record: bytes) -> None:
    assert decode_disks(record) == ()


@pytest.mark.parametrize("text", [7, "?", "AAAA", disks_text(bytes(RECORD_MAX + 1))])
def test_dump_with_a_record_that_is_none_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        disks_from_text(text)


RECORD = encode_disks([MARKED, NBD])
OLD_RECORD = encode_disks([MARKED])


def put(area: bytearray, generation: int, record: bytes, *copies: int) -> None:
    writes = superblock_writes(make_superblock(generation, disks=record))
    for nr in copies:
        write = writes[nr]
        assert isinstance(write, Write)
        area[write.offset : write.offset + BLOCK_SIZE] = write.data


def area_of(old: bytes, new: bytes) -> bytearray:
    """Generations 9 and 10 with the old record, then copies of 11 with the new one."""
    area = bytearray(4 * BLOCK_SIZE)
    put(area, 9, old, 0, 1)
    put(area, 10, old, 0, 1)
    put(area, 11, new, 0, 1)
    return area


def tear(area: bytearray, copy: int, before: bytearray, *, head: bool) -> None:
    """Give back to a copy of generation 11 its first sector as it was, or all but that."""
    begin = superblock_block(1, copy) * BLOCK_SIZE
    first, last = (begin, begin + 512) if head else (begin + 512, begin + BLOCK_SIZE)
    area[first:last] = before[first:last]


@pytest.mark.parametrize(
    "torn", list(product(("whole", "head", "tail"), repeat=2)), ids="-".join
)
def test_torn_superblock_loses_the_record_of_disks_at_most(
    torn: tuple[str, str],
) -> None:
    before = bytearray(4 * BLOCK_SIZE)
    put(before, 9, OLD_RECORD, 0, 1)
    area = area_of(OLD_RECORD, RECORD)
    for copy, what in enumerate(torn):
        if what != "whole":
            tear(area, copy, before, head=what == "head")
    found = choose_superblock(CLONE, memoryview(area))
    if torn == ("head", "head"):
        assert found.superblock.generation == 10
        assert found.superblock.disks == OLD_RECORD
        return
    assert found.superblock.generation == 11
    if "head" in torn and "tail" in torn:
        # The new record reached the copy whose sector did not: there it is found.
        assert found.superblock.disks == RECORD
    elif torn == ("tail", "tail"):
        assert found.superblock.disks == b""
        assert "disks" in found.notes[0]
    else:
        assert found.superblock.disks == RECORD


@pytest.mark.parametrize("is_rotten", [False, True])
def test_commit_whose_record_was_torn_before_its_second_copy_is_not_opened(
    is_rotten: bool,
) -> None:
    """The commit was never acknowledged, and the commit before it knows the disks."""
    area = bytearray(4 * BLOCK_SIZE)
    put(area, 10, OLD_RECORD, 0, 1)
    put(area, 9, OLD_RECORD, 0, 1)
    before = bytearray(area)
    put(area, 11, RECORD, 0)
    tear(area, 0, before, head=False)
    if is_rotten:  # the sibling: the commit may have been complete
        area[superblock_block(1, 1) * BLOCK_SIZE] ^= 1
    found = choose_superblock(CLONE, memoryview(area))
    if not is_rotten:
        assert found.superblock.generation == 10
        assert found.superblock.disks == OLD_RECORD
    else:
        assert found.superblock.generation == 11
        assert found.superblock.disks == b""
    assert found.unhealed == {1}


def test_metadata_without_a_record_has_none() -> None:
    area = area_of(b"", b"")
    found = choose_superblock(CLONE, memoryview(area))
    assert found.superblock.disks == b""
    assert not found.notes


def test_dump_restore_and_repair_keep_the_record() -> None:
    size = 1 << 18
    store = Store(size)
    text = "".join(
        render_clone(
            parse_clone(
                [
                    b'{"format": "nbdtarget metadata dump", "version": 1,'
                    b' "kind": "clone", "uuid": "'
                    + UUID.hex().encode()
                    + b'", "generation": 9, "flags": [], "compat": 0, "ro_compat": 0,'
                    b' "nr_commits": 1, "nr_compactions": 0, "region_size_bytes": 4096,'
                    b' "target_size_bytes": 65536, "nr_regions": 16, "nr_hydrated": 1,'
                    b' "disks": "' + disks_text(RECORD).encode() + b'",'
                    b' "hydrated": [[3, 1]]}'
                ]
            )
        )
    )
    drive(store, restore_clone(parse_clone([text.encode()]), device_size=size))
    assert drive(store, salvage_clone(size)).content.disks == RECORD
    assert NOT_MARKED in {disk.mark_generation for disk in decode_disks(RECORD)}


def test_id_that_is_too_long_is_cut_and_all_of_it_counts() -> None:
    assert bounded_id("url", "x" * 100) == "url=" + "x" * 100
    first = bounded_id("url", "x" * 2000 + "a")
    second = bounded_id("url", "x" * 2000 + "b")
    assert len(first.encode()) <= ID_MAX
    assert first.startswith("url=xxx")
    assert first != second
