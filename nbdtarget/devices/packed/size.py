# SPDX-License-Identifier: Apache-2.0
"""How large the image in a packed file is, without unpacking it; nothing here does I/O by itself.

    xz      the index at the end of each stream says it
    zstd    the seek table at the end says it, if there is one (the seekable format), or the header of a frame may. If there are
            several frames without a table, nothing does. Frames are told apart as far as the first `ZSTD_BLOCKS_MAX` blocks reach
    gzip    the last four bytes say it modulo 4 GiB, which is no answer: it is told to the user as a hint

The device compares the answer with what is unpacked in the end, so a wrong one is never silent.

The size may also stand behind the name of the file, as `#size=` (`split_size`).

An index may have millions of entries. It is added up on the event loop in slices, and others have their turn after each.
"""

import re
import struct
from collections.abc import Awaitable, Callable
from typing import Final

__all__ = [
    "gzip_hint",
    "maybe_xz_size",
    "maybe_zstd_size",
    "split_size",
    "with_size",
]

Read = Callable[[int, int], Awaitable[bytes]]  # offset and length of the packed file

_SIZE: Final = re.compile(r"([#&])size=([^&#]*)(?:&|\Z)")
_XZ_FOOTER: Final = 12
_XZ_HEADER: Final = 12
INDEX_MAX: Final = 16 << 20  # bytes of the index of a stream, or of a seek table
SLICE_ENTRIES: Final = (
    1024  # added up between two turns of the loop: half a millisecond or so
)
PADDING_BYTES: Final = 64 << 10  # looked at at a time
ZSTD_BLOCKS_MAX: Final = 64
_ZSTD_MAGIC: Final = 0xFD2FB528
_SKIPPABLE_MAGIC: Final = 0x184D2A50  # and the 15 numbers behind it
_SEEK_TABLE_MAGIC: Final = 0x8F92EAB1
_SEEK_FOOTER: Final = 9


def split_size(inner: str) -> tuple[str, str | None]:
    """Return DISK without `size=`, and the size as it is written, or None."""
    match = _SIZE.search(inner)
    if match is None:
        return inner, None
    bare = (inner[: match.start()] + match[1] + inner[match.end() :]).rstrip("#&")
    return bare, match[2]


def with_size(inner: str, size_word: str | None) -> str:
    """Undo `split_size`."""
    if size_word is None:
        return inner
    return f"{inner}{'&' if '#' in inner else '#'}size={size_word}"


async def maybe_xz_size(read: Read, packed_size: int) -> int | None:
    """Return the bytes of all streams; None: the file is no intact xz file."""
    end, total = packed_size, 0
    while end > 0:
        if end < _XZ_FOOTER + _XZ_HEADER:
            return None
        footer = await read(end - _XZ_FOOTER, _XZ_FOOTER)
        if footer[8:] == bytes(4):
            end = await _without_padding(read, end)
            continue
        if footer[10:] != b"YZ":
            return None
        index_size = (struct.unpack_from("<I", footer, 4)[0] + 1) * 4
        index_begin = end - _XZ_FOOTER - index_size
        if index_size > INDEX_MAX or index_begin < _XZ_HEADER:
            return None
        try:
            packed, unpacked = await _sum_of_index(await read(index_begin, index_size))
        except (IndexError, ValueError):
            return None
        total += unpacked
        end = index_begin - packed - _XZ_HEADER
    return total if end == 0 else None


async def _without_padding(read: Read, end: int) -> int:
    """Return where the zeroes before `end` begin; they come in fours."""
    begin = max(0, end - PADDING_BYTES)
    data = await read(begin, end - begin)
    nr_zeroes = len(data) - len(data.rstrip(b"\0"))
    return end - max(4, nr_zeroes // 4 * 4)


async def _sum_of_index(index: bytes) -> tuple[int, int]:
    """Return the bytes of all blocks of a stream, packed and unpacked. Raises: IndexError, ValueError."""
    if index[0] != 0:
        raise ValueError("no index")
    # Here, because a name is taken apart with this module, and a command that does only that needs no event loop.
    from nbdtarget.common.clock import sleep

    nr_records, at = _number(index, 1)
    packed = unpacked = 0
    for nr in range(nr_records):
        if nr % SLICE_ENTRIES == SLICE_ENTRIES - 1:
            await sleep(0)
        size, at = _number(index, at)
        packed += -(-size // 4) * 4
        size, at = _number(index, at)
        unpacked += size
    return packed, unpacked


def _number(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of variable length, and where it ends."""
    value = 0
    for shift in range(0, 63, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
    raise ValueError("too long")


async def maybe_zstd_size(read: Read, packed_size: int) -> int | None:
    """Return what the seek table says, or else the header of the only frame; None: nothing does."""
    try:
        size = await _maybe_seek_table_size(read, packed_size)
        if size is not None:
            return size
        return await _maybe_only_frame_size(read, packed_size)
    except (IndexError, struct.error):  # the file ends in the middle
        return None


async def _maybe_seek_table_size(read: Read, packed_size: int) -> int | None:
    """Return the sum of the frames' sizes, if the file ends with a seek table. Raises: struct.error."""
    if packed_size < 8 + _SEEK_FOOTER:
        return None
    footer = await read(packed_size - _SEEK_FOOTER, _SEEK_FOOTER)
    nr_frames, descriptor, magic = struct.unpack("<IBI", footer)
    if magic != _SEEK_TABLE_MAGIC:
        return None
    entry = 12 if descriptor & 0x80 else 8  # with a checksum, or without
    length = nr_frames * entry
    begin = packed_size - _SEEK_FOOTER - length
    if length > INDEX_MAX or begin < 8:
        return None
    head = struct.unpack("<II", await read(begin - 8, 8))
    if head != (_SKIPPABLE_MAGIC + 14, length + _SEEK_FOOTER):
        return None
    table = await read(begin, length)
    from nbdtarget.common.clock import sleep  # here, as above

    total = 0
    for nr in range(nr_frames):
        if nr % SLICE_ENTRIES == SLICE_ENTRIES - 1:
            await sleep(0)
        total += struct.unpack_from("<I", table, nr * entry + 4)[0]
    return total


async def _maybe_only_frame_size(read: Read, packed_size: int) -> int | None:
    """Raises: IndexError, struct.error."""
    head = await read(0, min(18, packed_size))
    if struct.unpack_from("<I", head)[0] != _ZSTD_MAGIC:
        return None
    descriptor = head[4]
    is_single = bool(descriptor & 0x20)
    at = 5 + (0 if is_single else 1) + (0, 1, 2, 4)[descriptor & 3]
    length = (1 if is_single else 0, 2, 4, 8)[descriptor >> 6]
    if not length or len(head) < at + length:
        return None
    size = int.from_bytes(head[at : at + length], "little")
    at += length
    for _ in range(ZSTD_BLOCKS_MAX):
        block = int.from_bytes(await read(at, min(3, packed_size - at)), "little")
        is_last, kind, block_bytes = block & 1, block >> 1 & 3, block >> 3
        at += 3 + (1 if kind == 1 else block_bytes)  # 1: one byte, many times
        if is_last:
            at += 4 if descriptor & 4 else 0  # a checksum
            if at != packed_size:
                return None  # another frame, or something else
            break
        if at >= packed_size:
            return None
    return size + 256 if length == 2 else size


async def gzip_hint(read: Read, packed_size: int) -> int:
    """Return the size modulo 4 GiB of the last member."""
    if packed_size < 18:
        return 0
    return int.from_bytes(await read(packed_size - 4, 4), "little")
