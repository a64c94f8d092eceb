# SPDX-License-Identifier: Apache-2.0
"""A disk that has grown while it is served: a table that is loaded finds its new size."""

import errno as errnos
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.common.clock import sleep, timeout
from nbdtarget.common.errors import ConstructorError, DeviceError
from nbdtarget.devices import resolve
from nbdtarget.dm import open_devices
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from tests.support.nbd_server import StrictServer
from tests.support.patience import PATIENCE_S

MIB = 1 << 20
S = MIB // 512  # sectors


class Server:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.registry = Registry(resolve)

    def size(self, size: int, *names: str) -> None:
        for name in names:
            (self.directory / name).touch()
            os.truncate(self.directory / name, size)

    async def create(self, table: str) -> MappedDevice:
        return await self.registry.create("d", table, directory=str(self.directory))

    async def load(self, table: str) -> None:
        await self.registry.load("d", table, directory=str(self.directory))
        await self.registry.resume("d")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path)
    yield server
    await server.registry.close()


async def test_grown_file_is_used_by_the_next_table_while_it_is_served(
    server: Server,
) -> None:
    server.size(MIB, "disk")
    device = await server.create(f"0 {S} linear disk 0")
    await device.write(MIB - 512, b"a" * 512)
    server.size(2 * MIB, "disk")
    assert device.size == MIB
    await server.load(f"0 {2 * S} linear disk 0")
    assert device.size == 2 * MIB
    await device.write(2 * MIB - 512, b"b" * 512)
    await device.flush()
    data = (server.directory / "disk").read_bytes()
    assert (data[MIB - 512], data[2 * MIB - 512]) == (ord("a"), ord("b"))


async def test_live_table_serves_what_it_had_when_the_disk_has_grown(
    server: Server,
) -> None:
    server.size(MIB, "disk")
    device = await server.create(f"0 {S} linear disk 0")
    server.size(2 * MIB, "disk")
    await server.registry.load(
        "d", f"0 {2 * S} linear disk 0", directory=str(server.directory)
    )
    await server.registry.clear("d")
    assert bytes(await device.read(MIB - 512, 512)) == bytes(512)
    with pytest.raises(DeviceError) as caught:
        await device.write(MIB, b"x" * 512)
    assert caught.value.errno == errnos.ENOSPC


async def test_grown_disk_read_only(server: Server) -> None:
    server.size(MIB, "disk")
    disk = str(server.directory / "disk")
    device = await server.registry.create("d", f"0 {S} linear {disk} 0", read_only=True)
    server.size(2 * MIB, "disk")
    await server.registry.load("d", f"0 {2 * S} linear {disk} 0", read_only=True)
    await server.registry.resume("d")
    assert bytes(await device.read(2 * MIB - 512, 512)) == bytes(512)


async def test_shrunken_disk_is_named_when_a_table_does_not_fit_any_more(
    server: Server,
) -> None:
    server.size(2 * MIB, "disk")
    await server.create(f"0 {2 * S} linear disk 0")
    server.size(MIB, "disk")
    for _ in range(2):
        with pytest.raises(ConstructorError) as caught:
            await server.load(f"0 {2 * S} linear disk 0")
        reason = str(caught.value)
        assert "too small for target" in reason
        assert reason.endswith(
            f"disk has shrunk from {2 * MIB} to {MIB} bytes since it was opened"
        )
    await server.load(f"0 {S} linear disk 0")


async def test_cache_takes_the_new_room_of_its_origin_and_of_its_cache_device(
    server: Server,
) -> None:
    def table(nr_sectors: int) -> str:
        return f"0 {nr_sectors} cache meta fast origin 128 1 writeback smq 0"

    server.size(2 * MIB, "origin")
    server.size(MIB, "fast")
    device = await server.create(table(2 * S))
    await device.write(0, b"c" * 4096)
    server.size(4 * MIB, "origin")
    server.size(2 * MIB, "fast")
    await server.registry.suspend("d")
    await server.registry.resume("d")
    await server.load(table(4 * S))
    status = (await device.status())[0][3]
    assert status.split()[3].endswith("/32"), status
    assert bytes(await device.read(0, 4096)) == b"c" * 4096
    await device.write(4 * MIB - 4096, b"d" * 4096)
    await device.flush()
    assert bytes(await device.read(4 * MIB - 4096, 4096)) == b"d" * 4096


async def test_cache_whose_grown_table_is_cleared_again_goes_on(server: Server) -> None:
    server.size(2 * MIB, "origin")
    server.size(MIB, "fast")
    table = f"0 {2 * S} cache meta fast origin 128 1 writeback smq 0"
    device = await server.create(table)
    await device.write(0, b"c" * 4096)
    server.size(2 * MIB, "fast")
    await server.registry.load("d", table, directory=str(server.directory))
    await server.registry.clear("d")
    await server.registry.suspend("d")
    await server.registry.resume("d")
    async with timeout(PATIENCE_S):
        assert bytes(await device.read(0, 4096)) == b"c" * 4096


async def test_clone_is_followed_by_the_new_room_of_its_destination(
    server: Server,
) -> None:
    server.size(MIB, "source", "dest")
    (server.directory / "source").write_bytes(b"s" * MIB)
    clone = f"0 {S} clone meta dest source 8"
    device = await server.create(clone)
    await device.write(0, b"c" * 4096)
    server.size(2 * MIB, "dest")
    await server.load(f"{clone}\n{S} {S} linear dest {S}")
    await device.write(2 * MIB - 4096, b"d" * 4096)
    await device.flush()
    async with timeout(PATIENCE_S):
        while f" {S // 8}/{S // 8} " not in (await device.status())[0][3]:
            await sleep(0.01)
    data = (server.directory / "dest").read_bytes()
    assert data == b"c" * 4096 + b"s" * (MIB - 4096) + bytes(MIB - 4096) + b"d" * 4096


@pytest.mark.parametrize("read_only", [False, True])
async def test_grown_export_of_an_nbd_server_is_used_by_the_next_table(
    server: Server, read_only: bool
) -> None:
    async with StrictServer(server.directory, MIB) as nbd:
        line = f"linear {nbd.uri} 0"

        async def load(nr_sectors: int) -> None:
            await server.registry.load(
                "d", f"0 {nr_sectors} {line}", read_only=read_only
            )
            await server.registry.resume("d")

        device = await server.registry.create("d", f"0 {S} {line}", read_only=read_only)
        nr_connections = nbd.nr_connections
        await load(S)
        assert nbd.nr_connections == nr_connections + 1  # it has asked for the size
        nbd.disk += bytes(range(256)) * (MIB // 256)
        await load(2 * S)
        assert bytes(await device.read(MIB, 256)) == bytes(range(256))
        if not read_only:
            await device.write(2 * MIB - 512, b"b" * 512)
            await device.flush()
            assert nbd.disk[-512:] == b"b" * 512
        assert device.losses == 0
        del nbd.disk[MIB:]
        with pytest.raises(
            ConstructorError, match="has shrunk from 2097152 to 1048576"
        ):
            await load(2 * S)
        await load(S)
        assert bytes(await device.read(MIB - 512, 512)) == bytes(512)
        await server.registry.remove("d")
        assert server.registry.opens.lower_devices(device) == []


async def test_cache_takes_the_new_room_of_an_origin_behind_nbd(server: Server) -> None:
    server.size(MIB, "fast")
    async with StrictServer(server.directory, 2 * MIB) as nbd:

        def table(nr_sectors: int) -> str:
            return f"0 {nr_sectors} cache meta fast {nbd.uri} 128 1 writeback smq 0"

        device = await server.create(table(2 * S))
        await device.write(0, b"c" * 4096)
        nbd.disk += bytes(2 * MIB)
        await server.load(table(4 * S))
        await device.write(4 * MIB - 4096, b"d" * 4096)
        await device.flush()
        assert bytes(await device.read(4 * MIB - 4096, 4096)) == b"d" * 4096
        assert bytes(await device.read(0, 4096)) == b"c" * 4096
        await server.registry.remove("d")


async def test_server_that_takes_no_second_connection_costs_a_moment_only(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_devices, "MEASURE_S_MAX", 0.05)
    async with StrictServer(server.directory, MIB) as nbd:
        device = await server.create(f"0 {S} linear {nbd.uri} 0")
        nbd.greeting, nbd.is_silent = b"", True
        async with timeout(PATIENCE_S):
            await server.load(f"0 {S} linear {nbd.uri} 0")
        nbd.greeting = None
        await device.write(0, b"a" * 512)
        assert nbd.disk[:512] == b"a" * 512
        await server.registry.remove("d")
