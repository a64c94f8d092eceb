# SPDX-License-Identifier: Apache-2.0
"""Traces: lists of what was read and written, in order. Which format a file has is seen from its first lines.

    plain           a line for each request: `R,OFFSET,LENGTH` or `W,OFFSET,LENGTH` in bytes, as a device records them
                    (`@trace_print`); or a block of --block-size bytes: `1234`, `R 1234`, `W 1234`
    fio             what fio writes with write_iolog, versions 2 and 3
    blkparse        what blkparse prints. Of each request its queueing (Q) counts, or its issue (D) where no line has a Q
    msr             the CSV files of MSR Cambridge: Timestamp,Hostname,DiskNumber,Type,Offset,Size,ResponseTime
    oracleGeneral   the binary files of libCacheSim: records of 24 bytes. An object is one block, and all are reads

A request that touches several blocks is an access of each of them. Lines of requests that read and write nothing (syncs, discards, remarks) are passed
over. Any other line that is no request is an error that names it: half a trace would give wrong advice.
"""

import re
import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.units import SECTOR

__all__ = ["FORMATS", "Trace", "TraceError", "read_trace"]

FORMATS: Final = ("plain", "fio", "blkparse", "msr", "oracleGeneral")
_LOOK_BYTES: Final = 1 << 16
_BLOCKS_OF_ONE_MAX: Final = 1 << 20  # of one request: more is a mistake in the file

_FIO_OPS: Final = {"read": False, "write": True}
_FIO_REMARKS: Final = ("add", "open", "close")
_FIO_NO_ACCESS: Final = ("sync", "datasync", "trim", "wait", "sync_file_range")
# DEVICE CPU SEQUENCE TIME PID ACTION RWBS [SECTOR + COUNT]
_BLKPARSE: Final = re.compile(
    r"\s*\d+,\d+\s+\d+\s+\d+\s+\d+\.\d+\s+\d+\s+(?P<action>[A-Z]+)\s+(?P<rwbs>[A-Z]+)"
    r"(?:\s+(?P<sector>\d+)\s+\+\s+(?P<count>\d+))?"
)
_BLKPARSE_ANY: Final = re.compile(r"\s*\d+,\d+\s+\d+\s+\d+\s+\d+\.\d+\s")
_ORACLE: Final = struct.Struct(
    "<IQIq"
)  # time, object, its size, next access (-1: none)
_MSR_TYPES: Final = {"read": False, "write": True}


class TraceError(NbdTargetError):
    """A line of a trace file is not an access."""

    def __init__(self, name: str, line: int, text: str) -> None:
        super().__init__(name, line, text)
        self.name, self.line, self.text = name, line, text

    def __str__(self) -> str:
        return f"{self.name}:{self.line}: not an access ([R|W] block, or R|W,offset,length): {self.text!r}"


@dataclass
class Trace:
    """Accesses in order: which block, and whether it is written."""

    nr_blocks: int
    blocks: "array[int]" = field(default_factory=lambda: array("Q"))
    writes: bytearray = field(default_factory=bytearray)

    def add(self, block: int, is_write: bool) -> None:
        self.blocks.append(block)
        self.writes.append(is_write)


def read_trace(path: Path, block_size: int, kind: str | None = None) -> Trace:
    """Read a trace file.

    Args: kind: one of FORMATS; None: what its first lines look like.
    Raises:
        TraceError: a line that is no access.
        NbdTargetError: it has no access at all, or is binary and not whole.
        OSError: the file cannot be read.
    """
    kind = kind or _looks_like(path)
    trace = Trace(0)
    if kind == "oracleGeneral":
        _read_objects(path, trace)
    else:
        _read_lines(path, block_size, kind, trace)
    if not trace.blocks:
        raise NbdTargetError(f"{path}: this trace reads and writes nothing")
    trace.nr_blocks = max(trace.blocks) + 1
    return trace


def _looks_like(path: Path) -> str:
    with path.open("rb") as file:
        begin = file.read(_LOOK_BYTES)
    if b"\0" in begin:
        return "oracleGeneral"
    lines = begin.decode("utf-8", "replace").splitlines()
    for line in lines:
        words = line.replace(",", " ").split()
        if words[:2] == ["fio", "version"]:
            return "fio"
        if _BLKPARSE_ANY.match(line):
            return "blkparse"
        fields = line.split(",")
        if len(fields) == 7 and fields[3].strip().lower() in (*_MSR_TYPES, "type"):
            return "msr"
    return "plain"


def _read_lines(path: Path, block_size: int, kind: str, trace: Trace) -> None:
    wanted = _blkparse_action(path) if kind == "blkparse" else ""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if kind == "blkparse":
                    found = _of_blkparse(line, block_size, wanted)
                elif kind == "msr":
                    found = _of_msr(line, block_size, number)
                else:
                    found = _of_words(line, block_size)
            except ValueError:
                raise TraceError(str(path), number, line.strip()[:200]) from None
            if found is not None:
                blocks, is_write = found
                for block in blocks:
                    trace.add(block, is_write)


_Access = tuple[Iterable[int], bool]


def _touched(offset: int, length: int, block_size: int) -> range:
    if length <= 0:
        raise ValueError(length)
    blocks = range(offset // block_size, (offset + length - 1) // block_size + 1)
    if len(blocks) > _BLOCKS_OF_ONE_MAX:
        raise ValueError(length)
    return blocks


def _of_words(line: str, block_size: int) -> _Access | None:
    """A line of `plain` or `fio`. Raises: ValueError: it is no request."""
    words = line.replace(",", " ").split()
    if not words or words[0].startswith("#") or _is_remark_of_fio(words):
        return None
    if len(words) >= 4 and words[-3] in _FIO_OPS:  # [time,] file, op, offset, length
        is_write, numbers = _FIO_OPS[words[-3]], words[-2:]
    elif words[0].upper() in ("R", "W"):
        is_write, numbers = words[0].upper() == "W", words[1:]
    else:
        is_write, numbers = False, words
        if len(words) > 1:
            raise ValueError(words)
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(words)
    if len(numbers) == 1:
        return (int(numbers[0]),), is_write
    offset, length = map(int, numbers)
    return _touched(offset, length, block_size), is_write


def _is_remark_of_fio(words: list[str]) -> bool:
    is_head = words[:2] == ["fio", "version"]
    is_file = len(words) in (2, 3) and words[-1] in _FIO_REMARKS
    # [time,] file, what, offset, length: it neither reads nor writes.
    is_other = len(words) in (4, 5) and words[-3] in _FIO_NO_ACCESS
    return is_head or is_file or is_other


def _blkparse_action(path: Path) -> str:
    """Return the action to count: Q, unless no line has one."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            match = _BLKPARSE.match(line)
            if match is not None and match["action"] == "Q":
                return "Q"
    return "D"


def _of_blkparse(line: str, block_size: int, wanted: str) -> _Access | None:
    """Everything that is not such an event is a remark or the summary at the end."""
    match = _BLKPARSE.match(line)
    if match is None or match["action"] != wanted or match["sector"] is None:
        return None
    rwbs = match["rwbs"]
    if "D" in rwbs or not ("R" in rwbs or "W" in rwbs) or match["count"] == "0":
        return None  # a discard, or a flush
    offset, length = int(match["sector"]) * SECTOR, int(match["count"]) * SECTOR
    return _touched(offset, length, block_size), "W" in rwbs


def _of_msr(line: str, block_size: int, number: int) -> _Access | None:
    fields = [field.strip() for field in line.split(",")]
    if fields == [""] or (number == 1 and fields[3:4] == ["Type"]):
        return None
    if len(fields) != 7 or not (fields[4].isdecimal() and fields[5].isdecimal()):
        raise ValueError(line)
    is_write = _MSR_TYPES.get(fields[3].lower())
    if is_write is None:
        raise ValueError(line)
    if fields[5] == "0":
        return None
    return _touched(int(fields[4]), int(fields[5]), block_size), is_write


def _read_objects(path: Path, trace: Trace) -> None:
    """Objects have no order, so they get numbers in the order in which they come first."""
    raw = path.read_bytes()
    if len(raw) % _ORACLE.size:
        raise NbdTargetError(
            f"{path}: is binary, and no file of oracleGeneral: its size is not a multiple of {_ORACLE.size} bytes"
        )
    numbers: dict[int, int] = {}
    for _, name, size, _ in _records(raw):
        if size:
            trace.add(numbers.setdefault(name, len(numbers)), False)


def _records(raw: bytes) -> Iterator[tuple[int, int, int, int]]:
    return _ORACLE.iter_unpack(raw)
