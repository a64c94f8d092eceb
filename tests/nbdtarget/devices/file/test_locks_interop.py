# SPDX-License-Identifier: Apache-2.0
"""Locks against QEMU: a source may be looked at by both, and changed by neither."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.resolve import open_device
from tests.support.patience import PATIENCE_S

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        not (shutil.which("qemu-img") and shutil.which("qemu-nbd")),
        reason="qemu-utils is not installed",
    ),
]

SIZE = 1 << 20
READ = ("qemu-io", "-r", "-f", "raw", "-c", "read 0 512")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    return path


async def exit_status(*command: str) -> int:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    return await process.wait()


@asynccontextmanager
async def qemu_nbd(disk: Path, *options: str) -> AsyncIterator[None]:
    """qemu-nbd with the disk open. It listens before it opens, but greets only after."""
    socket = disk.parent / "qemu.sock"
    process = await asyncio.create_subprocess_exec(
        "qemu-nbd", "-t", "-f", "raw", "-k", str(socket), *options, str(disk)
    )
    try:
        await asyncio.wait_for(greeting(socket), PATIENCE_S)
        yield
    finally:
        process.terminate()
        await process.wait()


async def greeting(socket: Path) -> None:
    while True:
        try:
            reader, writer = await asyncio.open_unix_connection(socket)
        except OSError:
            await asyncio.sleep(0.02)
            continue
        await reader.readexactly(18)
        writer.close()
        await writer.wait_closed()
        return


async def test_qemu_may_read_our_source_but_not_write_it(disk: Path) -> None:
    source = await open_device(str(disk), read_only=True)
    assert await exit_status(*READ, str(disk)) == 0
    write = ("qemu-io", "-f", "raw", "-c", "write 0 512", str(disk))
    assert await exit_status(*write) != 0
    await source.close()
    assert await exit_status(*write) == 0


async def test_qemu_may_not_even_read_our_destination(disk: Path) -> None:
    destination = await open_device(str(disk))
    assert await exit_status(*READ, str(disk)) != 0
    await destination.close()


@pytest.mark.parametrize("read_only", [True, False])
async def test_what_qemu_writes_is_nobodys_source(disk: Path, read_only: bool) -> None:
    async with qemu_nbd(disk):
        with pytest.raises(ResolveError, match="in use"):
            await open_device(str(disk), read_only=read_only)


async def test_what_qemu_reads_may_be_our_source_but_not_destination(
    disk: Path,
) -> None:
    async with qemu_nbd(disk, "--read-only"):
        await (await open_device(str(disk), read_only=True)).close()
        with pytest.raises(ResolveError, match="in use"):
            await open_device(str(disk))
