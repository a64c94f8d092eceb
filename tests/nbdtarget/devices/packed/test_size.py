# SPDX-License-Identifier: Apache-2.0
"""The size of an image is read out of its packed file, where it stands there."""

import asyncio
import io
import lzma
import random
import struct
from functools import lru_cache

import pytest

from nbdtarget.devices.packed import size as module
from nbdtarget.devices.packed.size import gzip_hint, maybe_xz_size, maybe_zstd_size
from tests.support.image_server import image_of
from tests.support.packed import PACKERS, zstd_module


class Packed:
    """A packed file, and what was read of it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.nr_bytes = self.nr_reads = 0

    async def read(self, offset: int, length: int) -> bytes:
        assert offset >= 0
        assert offset + length <= len(self.data)
        self.nr_bytes += length
        self.nr_reads += 1
        return self.data[offset : offset + length]


@pytest.mark.parametrize("size", [0, 1, 5000, 300_000])
async def test_xz_tells_its_size(size: int) -> None:
    packed = Packed(lzma.compress(image_of(size)))
    assert await maybe_xz_size(packed.read, len(packed.data)) == size
    assert packed.nr_bytes < 100


async def test_xz_of_several_streams_and_padding() -> None:
    data = (
        lzma.compress(image_of(1000))
        + bytes(8)
        + lzma.compress(image_of(77))
        + bytes(4)
    )
    assert await maybe_xz_size(Packed(data).read, len(data)) == 1077


async def test_long_padding_is_not_read_four_bytes_at_a_time() -> None:
    data = lzma.compress(image_of(1000)) + bytes(1 << 20)
    packed = Packed(data)
    assert await maybe_xz_size(packed.read, len(data)) == 1000
    assert packed.nr_reads < 50
    # Padding that is no multiple of four is not padding.
    assert await maybe_xz_size(Packed(data + b"\0").read, len(data) + 1) is None


def index_of(nr_records: int) -> bytes:
    """A stream of nothing but an index of blocks of 100 bytes that hold 1000, for what looks at indexes only."""
    number = bytearray()
    left = nr_records
    while True:
        number.append(left & 0x7F | (0x80 if left > 0x7F else 0))
        left >>= 7
        if not left:
            break
    index = b"\0" + number + b"\x64\xe8\x07" * nr_records
    index += bytes(-len(index) % 4) + b"CRC!"
    footer = b"CRC!" + struct.pack("<I", len(index) // 4 - 1) + b"\0\0YZ"
    return bytes(12 + 100 * nr_records) + index + footer


async def test_long_index_leaves_others_their_turns() -> None:
    """Between two turns of the loop, so many entries are added up and no more."""
    data = index_of(50 * module.SLICE_ENTRIES)
    nr_turns = 0
    is_over = False

    async def others() -> None:
        nonlocal nr_turns
        while not is_over:
            nr_turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    await asyncio.sleep(0)
    before = nr_turns
    size = await maybe_xz_size(Packed(data).read, len(data))
    is_over = True
    assert size == 50 * module.SLICE_ENTRIES * 1000
    assert nr_turns - before >= 50
    await task
    table = seekable([b"x" * 10] * (50 * module.SLICE_ENTRIES))
    is_over, before = False, nr_turns
    task = asyncio.create_task(others())
    size = await maybe_zstd_size(Packed(table).read, len(table))
    is_over = True
    assert size == 50 * module.SLICE_ENTRIES * 10
    assert nr_turns - before >= 50
    await task


async def test_index_that_is_too_long_is_not_read() -> None:
    data = bytearray(lzma.compress(image_of(1000)))
    data[-8:-4] = struct.pack("<I", module.INDEX_MAX // 4)
    packed = Packed(bytes(module.INDEX_MAX) + bytes(data))
    assert await maybe_xz_size(packed.read, len(packed.data)) is None
    assert packed.nr_bytes < 100


async def test_what_is_no_xz_has_no_size() -> None:
    good = lzma.compress(image_of(1000))
    source = random.Random(1)
    for _ in range(300):
        data = bytearray(good)
        for _ in range(3):
            data[source.randrange(len(data))] = source.randrange(256)
        await maybe_xz_size(
            Packed(bytes(data)).read, len(data)
        )  # any answer, and no exception
    for bad in (b"x" * 50, good[:-1], good[1:]):
        assert await maybe_xz_size(Packed(bad).read, len(bad)) is None


@pytest.mark.parametrize("size", [1, 200, 300, 70_000, 300_000])
async def test_zstd_tells_its_size(size: int) -> None:
    packed = Packed(PACKERS["zstd"](image_of(size)))
    assert await maybe_zstd_size(packed.read, len(packed.data)) == size


async def test_zstd_that_was_a_stream_does_not() -> None:
    buffer = io.BytesIO()
    with zstd_module().ZstdFile(buffer, "w") as file:
        file.write(image_of(1000))
    data = buffer.getvalue()
    assert await maybe_zstd_size(Packed(data).read, len(data)) is None
    assert await maybe_zstd_size(Packed(b"x" * 30).read, 30) is None
    assert await maybe_zstd_size(Packed(b"x").read, 1) is None


def seekable(frames: list[bytes], has_checksums: bool = False) -> bytes:
    """The seekable format: frames, and a table of their sizes. Equal frames are packed once."""
    pack = lru_cache(PACKERS["zstd"])
    packed = [pack(frame) for frame in frames]
    table = b"".join(
        struct.pack("<II", len(there), len(frame)) + b"CRC!" * has_checksums
        for there, frame in zip(packed, frames, strict=True)
    )
    footer = struct.pack("<IBI", len(frames), 0x80 * has_checksums, 0x8F92EAB1)
    head = struct.pack("<II", 0x184D2A5E, len(table) + len(footer))
    return b"".join(packed) + head + table + footer


@pytest.mark.parametrize("has_checksums", [False, True])
async def test_zstd_with_a_seek_table(has_checksums: bool) -> None:
    data = seekable([image_of(1000), image_of(70_000), b""], has_checksums)
    assert await maybe_zstd_size(Packed(data).read, len(data)) == 71_000
    # A table that is cut off, or that does not fit, says nothing.
    for bad in (data[:-1], data[:-20] + data[-9:], data[-9:], data[-20:]):
        assert await maybe_zstd_size(Packed(bad).read, len(bad)) is None


@pytest.mark.parametrize("size", [1, 1000, 300_000])
async def test_first_of_several_zstd_frames_does_not_speak_for_all(size: int) -> None:
    data = PACKERS["zstd"](image_of(size)) + PACKERS["zstd"](image_of(5))
    assert await maybe_zstd_size(Packed(data).read, len(data)) is None
    damaged = data[: len(data) // 2]
    assert await maybe_zstd_size(Packed(damaged).read, len(damaged)) is None


async def test_large_zstd_frame_is_looked_at_in_its_beginning_only() -> None:
    data = PACKERS["zstd"](image_of(20 << 20))
    packed = Packed(data)
    assert await maybe_zstd_size(packed.read, len(data)) == 20 << 20
    assert packed.nr_reads < module.ZSTD_BLOCKS_MAX + 5


async def test_gzip_gives_a_hint() -> None:
    data = PACKERS["gzip"](image_of(12345))
    assert await gzip_hint(Packed(data).read, len(data)) == 12345
    assert await gzip_hint(Packed(b"x").read, 1) == 0
