# SPDX-License-Identifier: Apache-2.0
"""Each format of traces is known by its look, and gives the blocks that were touched."""

import struct
from pathlib import Path

import pytest

from nbdtarget.advise.traces import TraceError, read_trace
from nbdtarget.common.errors import NbdTargetError

BLOCK = 65536
BLKPARSE = """\
  8,0    3        1     0.000000000   697  A   W 223490 + 8 <- (8,1) 223490
  8,0    3        2     0.000001829   697  Q   R 128 + 8 [fio]
  8,0    3        3     0.000003000   697  Q  WS 255 + 2 [fio]
  8,0    3        4     0.000004000   697  Q  FN [fio]
  8,0    3        5     0.000005000   697  Q   D 0 + 4096 [fio]
  8,0    3        6     0.000006000     0  C   R 128 + 8 [0]
CPU3 (8,0):
 Reads Queued:           1,        4KiB
"""
MSR = """\
128166372003061629,hm,1,Read,383451136,32768,1331
128166372016382155,hm,1,Write,65536,65537,2000
128166372026382245,hm,1,Write,0,0,1
"""
FIO = """\
fio version 3 iolog
1 /d add
2 /d open
3 /d read 65536 4096
4 /d write 0 131072
5 /d sync 0 0
6 /d close
"""


def blocks_of(path: Path, text: str | bytes) -> list[tuple[int, bool]]:
    if isinstance(text, str):
        path.write_text(text)
    else:
        path.write_bytes(text)
    trace = read_trace(path, BLOCK)
    assert trace.nr_blocks == max(trace.blocks) + 1
    return [(b, bool(w)) for b, w in zip(trace.blocks, trace.writes, strict=True)]


def test_lines_of_a_device(tmp_path: Path) -> None:
    found = blocks_of(tmp_path / "t", "# a device\nR,0,512\nW,65535,2\n\n7\nr 9\n")
    assert found == [(0, False), (0, True), (1, True), (7, False), (9, False)]


def test_fio(tmp_path: Path) -> None:
    assert blocks_of(tmp_path / "t", FIO) == [(1, False), (0, True), (1, True)]
    old = FIO.replace("version 3", "version 2")
    old = "\n".join(
        line[2:] if line[0].isdigit() else line for line in old.splitlines()
    )
    assert blocks_of(tmp_path / "t", old) == [(1, False), (0, True), (1, True)]


def test_blkparse_counts_what_was_queued(tmp_path: Path) -> None:
    assert blocks_of(tmp_path / "t", BLKPARSE) == [(1, False), (1, True), (2, True)]


def test_blkparse_without_queueing_counts_what_was_issued(tmp_path: Path) -> None:
    text = BLKPARSE.replace("  Q ", "  D ")
    assert blocks_of(tmp_path / "t", text) == [(1, False), (1, True), (2, True)]


def test_msr(tmp_path: Path) -> None:
    expected = [(383451136 // BLOCK, False), (1, True), (2, True)]
    assert blocks_of(tmp_path / "t", MSR) == expected
    head = "Timestamp,Hostname,DiskNumber,Type,Offset,Size,ResponseTime\n"
    assert blocks_of(tmp_path / "t", head + MSR) == expected


def test_objects_are_blocks(tmp_path: Path) -> None:
    records = [
        (1, 1 << 60, 4096, 2),
        (2, 7, 0, -1),
        (3, 1 << 60, 4096, -1),
        (4, 9, 512, -1),
    ]
    raw = b"".join(struct.pack("<IQIq", *each) for each in records)
    assert blocks_of(tmp_path / "t", raw) == [(0, False), (0, False), (1, False)]
    (tmp_path / "t").write_bytes(raw[:-1])
    with pytest.raises(NbdTargetError, match="not a multiple of 24 bytes"):
        read_trace(tmp_path / "t", BLOCK)


@pytest.mark.parametrize(
    "line",
    ["nonsense", "R,1,0", "R,-1,512", "X 5", "1 2", f"R,0,{1 << 40}", "R,1.5,512"],
)
def test_a_line_that_is_no_access_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "t").write_text(f"R,0,512\n{line}\n")
    with pytest.raises(TraceError) as caught:
        read_trace(tmp_path / "t", BLOCK)
    assert str(caught.value).startswith(f"{tmp_path}/t:2: not an access")


def test_a_line_of_msr_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "t").write_text(MSR + "1,hm,1,Trim,0,512,1\n")
    with pytest.raises(TraceError, match=":4: not an access"):
        read_trace(tmp_path / "t", BLOCK)


def test_a_trace_without_accesses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("# nothing\n")
    with pytest.raises(NbdTargetError, match="reads and writes nothing"):
        read_trace(tmp_path / "t", BLOCK)
