# SPDX-License-Identifier: Apache-2.0
"""The file of a trace."""

import os
from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.porcelain.trace_file import (
    TraceRecorder,
    check_writable,
    read_trace,
    write_trace,
)
from nbdtarget.targets.clone.trace import Trace


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = str(tmp_path / "boot.trace")
    for ranges in ([(65536, 131072), (0, 512)], []):
        write_trace(path, ranges)
        assert read_trace(path) == ranges
    assert os.listdir(tmp_path) == ["boot.trace"]


def test_people_may_write_one(tmp_path: Path) -> None:
    path = tmp_path / "boot.trace"
    path.write_text("nbdtarget-trace 1\n# the kernel\n\n  512   1024 \n")
    assert read_trace(str(path)) == [(512, 1536)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no trace: it does not begin with `nbdtarget-trace 1'"),
        ("0 512\n", "is no trace"),
        (
            "nbdtarget-trace 1\n0 512\n1M 4K\n",
            "line 3 is not an offset and a length in bytes",
        ),
        ("nbdtarget-trace 1\n5\n", "line 2 is not an offset and a length in bytes"),
        ("nbdtarget-trace 1\n" + "#" * (5 << 20), "is no trace"),
    ],
    ids=range(5),
)
def test_mistakes(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "boot.trace"
    path.write_text(text)
    with pytest.raises(ResolveError) as caught:
        read_trace(str(path))
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_places(tmp_path: Path) -> None:
    with pytest.raises(ResolveError, match="No such file"):
        read_trace(str(tmp_path / "x"))
    with pytest.raises(ResolveError, match="cannot be written to"):
        check_writable(str(tmp_path / "no" / "x"))
    check_writable(str(tmp_path / "x"))
    with pytest.raises(OSError, match="No such file"):
        write_trace(str(tmp_path / "no" / "x"), [])


async def test_what_a_client_reads_on_is_saved(tmp_path: Path) -> None:
    path = str(tmp_path / "boot.trace")
    trace = Trace(1 << 20, 16)
    recorder = TraceRecorder(path)
    recorder.trace = trace
    await recorder.save()
    assert read_trace(path) == []
    trace.note(0, 65536)
    await recorder.save()
    trace.note(65536, 65536)
    await recorder.save()
    assert read_trace(path) == [(0, 131072)]
