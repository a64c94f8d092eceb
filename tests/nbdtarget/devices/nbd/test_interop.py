# SPDX-License-Identifier: Apache-2.0
"""NbdDevice against real servers."""

import asyncio
import contextlib
import os
import random
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdtarget.devices.base import EXTENT_ZERO
from nbdtarget.devices.resolve import open_device
from tests.support.patience import attempts

pytestmark = pytest.mark.interop

SIZE = 8 << 20
NBDKIT = ["nbdkit", "-f", "-U", "{socket}"]
QEMU = ["qemu-nbd", "-f", "raw", "-k", "{socket}", "--persistent", "--shared=4"]
STRICT = ["blocksize-minimum=4096", "blocksize-error-policy=error"]
SERVERS = {
    "nbdkit": [*NBDKIT, "file", "{disk}"],
    "nbdkit without zeroes": [*NBDKIT, "--filter=nozero", "file", "{disk}"],
    "nbdkit without status": [*NBDKIT, "--filter=noextents", "file", "{disk}"],
    "nbdkit one connection": [
        *[*NBDKIT, "--filter=multi-conn", "file", "{disk}"],
        "multi-conn-mode=disable",
    ],
    "nbdkit 4k blocks": [
        *NBDKIT,
        "--filter=blocksize-policy",
        "file",
        "{disk}",
        *STRICT,
    ],
    "qemu": [*QEMU, "--discard=unmap", "{disk}"],
}


@asynccontextmanager
async def running(command: list[str], directory: Path) -> AsyncIterator[str]:
    """Run a server on a unix socket; yield the export's URI."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    path = directory / "s"
    words = [
        word.format(socket=path, disk=directory / "disk", port=0) for word in command
    ]
    process = await asyncio.create_subprocess_exec(*words)
    try:
        async for _ in attempts():
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(path))
                break
        yield f"nbd+unix:///?socket={path}"
    finally:
        process.kill()
        await process.wait()


@pytest.fixture
def disk(tmp_path: Path) -> bytearray:
    """Data at the start and the end, nothing between."""
    content = bytearray(SIZE)
    content[: 1 << 20] = os.urandom(1 << 20)
    content[-(64 << 10) :] = os.urandom(64 << 10)
    with (tmp_path / "disk").open("wb") as file:
        file.write(content[: 1 << 20])
        file.seek(SIZE - (64 << 10))
        file.write(content[-(64 << 10) :])
    return content


@pytest.mark.parametrize("server", SERVERS)
async def test_read_write_zero_flush(
    tmp_path: Path, disk: bytearray, server: str
) -> None:
    rng = random.Random(1)
    async with running(SERVERS[server], tmp_path) as uri:
        device = await open_device(uri)
        assert device.size == SIZE
        assert bytes(await device.read(0, SIZE)) == disk
        for _ in range(30):
            offset = rng.randrange(SIZE)
            length = min(rng.choice([1, 512, 4096, 100_000, 5 << 20]), SIZE - offset)
            data = rng.randbytes(length)
            if rng.random() < 0.3:
                data = bytes(length)
                await device.write_zeroes(offset, length, no_unmap=rng.random() < 0.5)
            else:
                await device.write(offset, data, fua=rng.random() < 0.3)
            disk[offset : offset + length] = data
        await device.flush()
        assert bytes(await device.read(0, SIZE)) == disk
        await device.close()
    assert (tmp_path / "disk").read_bytes() == disk


@pytest.mark.parametrize("server", SERVERS)
async def test_extents_are_true(tmp_path: Path, disk: bytearray, server: str) -> None:
    async with running(SERVERS[server], tmp_path) as uri:
        device = await open_device(uri, read_only=True)
        for offset, length in ((0, SIZE), (1000, 3 << 20), (SIZE - 5000, 4000)):
            extents = await device.extents(offset, length)
            assert sum(extent.length for extent in extents) == length
            at = offset
            for extent in extents:
                if extent.flags & EXTENT_ZERO:
                    assert not any(disk[at : at + extent.length])
                at += extent.length
        if "without status" not in server:
            extents = await device.extents(0, SIZE)
            assert any(extent.flags & EXTENT_ZERO for extent in extents)
        await device.close()


async def test_many_reads_at_once(tmp_path: Path, disk: bytearray) -> None:
    async with running(SERVERS["nbdkit"], tmp_path) as uri:
        device = await open_device(uri, read_only=True)
        offsets = range(0, SIZE, 16384)
        pieces = await asyncio.gather(*(device.read(at, 16384) for at in offsets))
        assert b"".join(pieces) == disk
        await device.close()


async def test_killed_server_is_an_error_not_a_hang(
    tmp_path: Path, disk: bytearray
) -> None:
    async with running(SERVERS["nbdkit"], tmp_path) as uri:
        device = await open_device(uri)
        await device.write(0, b"x")
    results = await asyncio.gather(
        *(device.read(0, 512) for _ in range(8)), device.flush(), return_exceptions=True
    )
    assert all(isinstance(result, Exception) for result in results)
    await device.close()


async def test_tcp_too(tmp_path: Path, disk: bytearray) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    unix = running(SERVERS["nbdkit"], tmp_path)
    tcp = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "nbd", "socket={socket}"]
    async with unix:
        words = [word.format(socket=tmp_path / "s") for word in tcp]
        process = await asyncio.create_subprocess_exec(*words)
        async for _ in attempts():
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
        device = await open_device(f"nbd://127.0.0.1:{port}/")
        assert bytes(await device.read(0, SIZE)) == disk
        await device.close()
        process.kill()
        await process.wait()
