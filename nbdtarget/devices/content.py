# SPDX-License-Identifier: Apache-2.0
"""Does a disk hold data, or is it blank? Asked before new metadata lets its content be overwritten.

Theory of operation. A disk is blank if it reads as zeroes. Reading all of a large one would take
hours, so we look where something would be, in this order, and stop at the first byte that is not
zero:

    head       partition tables, file systems, LVM, md, LUKS, bcache, swap: they begin here
    tail       the second GPT, md with its superblock at the end
    the rest   of what may be data: holes of files and what an NBD server calls zeroes are left out
               - up to 256 MiB: all of it
               - more: where file systems keep copies of their superblock, and 512 places that are
                 spread over the whole

What this misses: data of no known kind, with zeroes at both ends of the disk, that fill less than one
percent of it. A sparse file, a new logical volume or a disk after a TRIM takes milliseconds. Where a
disk cannot be read, or is so slow that looking takes more than `LOOK_S_MAX`, we cannot tell, and say so.

Nothing here writes.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Final, NamedTuple

from nbdtarget.common.clock import monotonic_ns
from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import EXTENT_DATA, Device

__all__ = ["LOOK_S_MAX", "maybe_content"]

LOOK_S_MAX: Final = 20.0

HEAD_BYTES: Final = 4 << 20
TAIL_BYTES: Final = 1 << 20
READ_ALL_MAX: Final = 256 << 20
READ_STEP: Final = 4 << 20
NR_PLACES: Final = 512
PLACE_BYTES: Final = 16 << 10
IN_FLIGHT: Final = 8
EXTENTS_STEP: Final = 1 << 40
RANGES_MAX: Final = 1 << 16
GOLDEN: Final = 0.6180339887498949

_MD: Final = b"\xfc\x4e\x2b\xa9"
_BCACHE: Final = bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")
_SWAP: Final = (b"SWAPSPACE2", b"SWAP-SPACE")


class _Signature(NamedTuple):
    """`magic` at byte `offset` from the beginning of the disk means `what`."""

    offset: int
    magic: bytes
    what: str


# The more telling ones first: a GPT has an MBR before it, and a file system a boot sector.
_SIGNATURES: Final = (
    _Signature(0, b"nbdt-sb\0", "metadata of nbdtarget"),
    _Signature(512, b"EFI PART", "a GPT partition table"),
    _Signature(4096, b"EFI PART", "a GPT partition table"),
    _Signature(0, b"LUKS\xba\xbe", "a LUKS volume"),
    _Signature(0, b"XFSB", "an XFS file system"),
    _Signature(1080, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    _Signature(65600, b"_BHRfS_M", "a btrfs file system"),
    _Signature(1024, b"\x10\x20\xf5\xf2", "an F2FS file system"),
    _Signature(3, b"NTFS    ", "an NTFS file system"),
    _Signature(3, b"EXFAT   ", "an exFAT file system"),
    _Signature(54, b"FAT", "a FAT file system"),
    _Signature(82, b"FAT", "a FAT file system"),
    _Signature(32769, b"CD001", "an ISO 9660 file system"),
    _Signature(65588, b"ReIsEr", "a ReiserFS file system"),
    _Signature(0, b"hsqs", "a squashfs file system"),
    _Signature(0, b"QFI\xfb", "a qcow2 image"),
    *(_Signature(at, b"LABELONE", "an LVM volume") for at in range(0, 2048, 512)),
    _Signature(0, _MD, "a RAID member (md)"),
    _Signature(4096, _MD, "a RAID member (md)"),
    _Signature(4096 + 24, _BCACHE, "a bcache device"),
    *(
        _Signature(page - 10, magic, "swap space")
        for page in (4096, 8192, 16384, 65536)
        for magic in _SWAP
    ),
    _Signature(510, b"\x55\xaa", "an MBR partition table or a boot sector"),
)


async def maybe_content(device: Device) -> str | None:
    """Say what `device` holds, as "holds an XFS file system"; None if it is blank.

    "may hold data: …" if that cannot be told. Takes `LOOK_S_MAX` at most, and what the reads
    take that are under way then: the device may be closed when this returns.
    """
    look = _Look(device)
    try:
        return await look.maybe_content()
    except TimeoutError:
        return (
            f"may hold data: in {LOOK_S_MAX:.0f} s only {look.nr_bytes >> 10} KiB of it"
            " could be read"
        )
    except DeviceError as error:
        return f"may hold data: {error}"


class _Look:
    """One look at a device. `nr_bytes`: that were read so far."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._deadline_ns = monotonic_ns() + round(LOOK_S_MAX * 1e9)
        self.nr_bytes = 0

    async def maybe_content(self) -> str | None:
        device = self._device
        head = await self._read(0, min(HEAD_BYTES, device.size))
        for offset, magic, what in _SIGNATURES:
            if head[offset : offset + len(magic)] == magic:
                return f"holds {what}"
        tail_begin = max(0, device.size - TAIL_BYTES)
        tail = await self._read(tail_begin, device.size - tail_begin)
        if at_the_end := _maybe_tail_signature(device.size, tail):
            return f"holds {at_the_end}"
        if found := _maybe_data(0, head) or _maybe_data(tail_begin, tail):
            return found
        ranges = await self._data_ranges()
        if sum(length for _, length in ranges) <= READ_ALL_MAX:
            return await self._look_at(
                (offset + at, min(READ_STEP, length - at))
                for offset, length in ranges
                for at in range(0, length, READ_STEP)
            )
        return await self._look_at(_places(ranges, device.size))

    def _check_time(self) -> None:
        if monotonic_ns() >= self._deadline_ns:
            raise TimeoutError

    async def _read(self, offset: int, length: int) -> bytes:
        data = await self._device.read(offset, length) if length else memoryview(b"")
        self.nr_bytes += length
        return data.tobytes()

    async def _data_ranges(self) -> list[tuple[int, int]]:
        """(offset, length) of what may be data; the last one may be more than that."""
        device = self._device
        ranges: list[tuple[int, int]] = []
        at = 0
        while at < device.size:
            self._check_time()
            for extent in await device.extents(at, min(EXTENTS_STEP, device.size - at)):
                if extent.flags == EXTENT_DATA:
                    ranges.append((at, extent.length))
                at += extent.length
            if len(ranges) > RANGES_MAX:
                ranges.append((at, device.size - at))
                break
        return [(offset, length) for offset, length in ranges if length]

    async def _look_at(self, pieces: Iterator[tuple[int, int]]) -> str | None:
        """Read the pieces, some at a time, until one has other bytes than zeroes."""
        while batch := [piece for _, piece in zip(range(IN_FLIGHT), pieces)]:  # noqa: B905
            self._check_time()
            read = await asyncio.gather(
                *(self._read(*piece) for piece in batch), return_exceptions=True
            )
            for (offset, _), data in zip(batch, read, strict=True):
                if isinstance(data, BaseException):
                    raise data
                if found := _maybe_data(offset, data):
                    return found
        return None


def _maybe_data(offset: int, data: bytes) -> str | None:
    if data.count(0) == len(data):
        return None
    first = offset + len(data) - len(data.lstrip(b"\0"))
    return f"holds data (byte {first} is not zero)"


def _maybe_tail_signature(size: int, tail: bytes) -> str | None:
    """Return the mark at a distance from the end of the disk, if there is one."""

    def at(offset: int, length: int) -> bytes:
        begin = offset - (size - len(tail))
        return tail[begin : begin + length] if begin >= 0 else b""

    for sector in (512, 4096):
        if at(size - sector, 8) == b"EFI PART":
            return "the end of a GPT partition table"
    old_md = (size & ~0xFFFF) - 0x10000
    new_md = ((size >> 9) - 16 & ~7) << 9
    if _MD in (at(old_md, 4), at(new_md, 4)):
        return "a RAID member (md)"
    return None


def _places(ranges: list[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Where to look in `ranges`: copies of superblocks, then places spread over the whole."""
    begins = [offset for offset, _ in ranges]
    for offset in _superblock_copies(size):
        index = bisect_right(begins, offset) - 1
        if index >= 0 and offset < sum(ranges[index]):
            yield offset, min(PLACE_BYTES, size - offset)
    ends = list(accumulate(length for _, length in ranges))
    step = ends[-1] / NR_PLACES
    for number in range(NR_PLACES):
        # Not at even distances: what lies there may be even, too.
        at = int((number + number * GOLDEN % 1) * step)
        index = bisect_right(ends, at)
        offset, length = ranges[index]
        inside = at - (ends[index] - length)
        yield offset + inside, min(PLACE_BYTES, length - inside)


def _superblock_copies(size: int) -> list[int]:
    """Where a file system is still found when its first superblock is gone."""
    groups = (1, 3, 5, 7, 9, 25, 27, 49)  # of ext4, with blocks of 4 KiB
    quarter = size // 4 & ~4095  # XFS: four allocation groups, up to 4 TiB
    places = {
        64 << 20,  # btrfs
        256 << 30,
        *(group * (128 << 20) for group in groups),
        *(quarter * number for number in (1, 2, 3)),
        *range(1 << 40, size, 1 << 40),
    }
    return sorted(place for place in places if place < size)
