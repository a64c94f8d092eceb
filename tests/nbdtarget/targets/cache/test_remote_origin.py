# SPDX-License-Identifier: Apache-2.0
"""A cache in front of an image on a web server: read-only, pinned, and hit without a request."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdtarget.common.errors import DeviceError, NbdTargetError
from nbdtarget.devices import resolve
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from tests.support.image_server import ImageServer, image_of

SIZE = 2 << 20
BLOCK = 64 << 10
IMAGE = image_of(SIZE)


@asynccontextmanager
async def cache_of(
    url: str,
    path: Path,
    *,
    mode: str = "writethrough",
    read_only: bool = True,
) -> AsyncIterator[MappedDevice]:
    registry = Registry(resolve)
    try:
        yield await registry.create(
            "c",
            f"0 {SIZE // 512} cache {path}/meta {path}/fast {url} {BLOCK // 512} 1 {mode} smq 0",
            read_only=read_only,
        )
    finally:
        await registry.close()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ImageServer]:
    (tmp_path / "fast").write_bytes(bytes(SIZE // 2))
    async with ImageServer(IMAGE) as server:
        yield server


async def test_cached_blocks_are_read_without_a_request(
    server: ImageServer, tmp_path: Path
) -> None:
    async with cache_of(server.url("/a?sig=1"), tmp_path) as device:
        await device.message(0, ["warm", "0-8"])
        assert bytes(await device.read(0, SIZE)) == IMAGE
        with pytest.raises(DeviceError):
            await device.write(0, b"x" * 512)
    asked = len(server.noted)
    async with cache_of(server.url("/a?sig=2"), tmp_path) as device:
        nr_opening = len(server.noted) - asked
        for nr in range(8):
            assert (
                bytes(await device.read(nr * BLOCK, BLOCK))
                == IMAGE[nr * BLOCK :][:BLOCK]
            )
        assert len(server.noted) - asked == nr_opening  # all of them hits


async def test_blocks_of_another_image_are_never_served(
    server: ImageServer, tmp_path: Path
) -> None:
    async with cache_of(server.url(), tmp_path) as device:
        await device.message(0, ["warm", "0-8"])
    server.image, server.etag = IMAGE[::-1], '"two"'
    with pytest.raises(NbdTargetError, match="is not the origin that"):
        async with cache_of(server.url(), tmp_path):
            pass


@pytest.mark.parametrize(
    ("mode", "read_only", "says"),
    [
        (
            "writethrough",
            False,
            "the origin can only be read: load the table read-only",
        ),
        (
            "writeback",
            True,
            "the origin can only be read: the mode must be writethrough",
        ),
    ],
)
async def test_tables_that_would_write_are_refused(
    server: ImageServer, tmp_path: Path, mode: str, read_only: bool, says: str
) -> None:
    with pytest.raises(NbdTargetError, match=says):
        async with cache_of(server.url(), tmp_path, mode=mode, read_only=read_only):
            pass
    assert server.noted == []
