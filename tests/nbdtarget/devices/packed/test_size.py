# SPDX-License-Identifier: Apache-2.0
"""The size of an image is read out of its packed file, where it stands there."""

import io
import lzma
import random

import pytest

from nbdtarget.devices.packed.size import gzip_hint, maybe_xz_size, maybe_zstd_size
from tests.support.image_server import image_of
from tests.support.packed import PACKERS, zstd_module


class Packed:
    """A packed file, and what was read of it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.nr_bytes = 0

    async def read(self, offset: int, length: int) -> bytes:
        assert offset >= 0
        assert offset + length <= len(self.data)
        self.nr_bytes += length
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


async def test_gzip_gives_a_hint() -> None:
    data = PACKERS["gzip"](image_of(12345))
    assert await gzip_hint(Packed(data).read, len(data)) == 12345
    assert await gzip_hint(Packed(b"x").read, 1) == 0
