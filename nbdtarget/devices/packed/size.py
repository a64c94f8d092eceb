# SPDX-License-Identifier: Apache-2.0
"""How large the image in a packed file is, without unpacking it; nothing here does I/O by itself.

    xz      the index at the end of each stream says it
    zstd    the header of a frame may say it. Of several frames only the first is looked at
    gzip    the last four bytes say it modulo 4 GiB, which is no answer: it is told to the user as a hint

The device compares the answer with what is unpacked in the end, so a wrong one is never silent.
"""

import struct
from collections.abc import Awaitable, Callable
from typing import Final

__all__ = ["gzip_hint", "maybe_xz_size", "maybe_zstd_size"]

Read = Callable[[int, int], Awaitable[bytes]]  # offset and length of the packed file

_XZ_FOOTER: Final = 12
_XZ_HEADER: Final = 12
XZ_INDEX_MAX: Final = 16 << 20
_ZSTD_MAGIC: Final = 0xFD2FB528


async def maybe_xz_size(read: Read, packed_size: int) -> int | None:
    """Return the bytes of all streams; None: the file is no intact xz file."""
    end, total = packed_size, 0
    while end > 0:
        if end < _XZ_FOOTER + _XZ_HEADER:
            return None
        footer = await read(end - _XZ_FOOTER, _XZ_FOOTER)
        if footer[8:] == bytes(4):  # padding comes in fours
            end -= 4
            continue
        if footer[10:] != b"YZ":
            return None
        index_size = (struct.unpack_from("<I", footer, 4)[0] + 1) * 4
        index_begin = end - _XZ_FOOTER - index_size
        if index_size > XZ_INDEX_MAX or index_begin < _XZ_HEADER:
            return None
        try:
            packed, unpacked = _sum_of_index(await read(index_begin, index_size))
        except (IndexError, ValueError):
            return None
        total += unpacked
        end = index_begin - packed - _XZ_HEADER
    return total if end == 0 else None


def _sum_of_index(index: bytes) -> tuple[int, int]:
    """Return the bytes of all blocks of a stream, packed and unpacked. Raises: IndexError, ValueError."""
    if index[0] != 0:
        raise ValueError("no index")
    nr_records, at = _number(index, 1)
    packed = unpacked = 0
    for _ in range(nr_records):
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
    """Return what the header of the first frame says; None: nothing."""
    head = await read(0, min(18, packed_size))
    if len(head) < 6 or struct.unpack_from("<I", head)[0] != _ZSTD_MAGIC:
        return None
    descriptor = head[4]
    is_single = bool(descriptor & 0x20)
    at = 5 + (0 if is_single else 1) + (0, 1, 2, 4)[descriptor & 3]
    length = (1 if is_single else 0, 2, 4, 8)[descriptor >> 6]
    if not length or len(head) < at + length:
        return None
    size = int.from_bytes(head[at : at + length], "little")
    return size + 256 if length == 2 else size


async def gzip_hint(read: Read, packed_size: int) -> int:
    """Return the size modulo 4 GiB of the last member."""
    if packed_size < 18:
        return 0
    return int.from_bytes(await read(packed_size - 4, 4), "little")
