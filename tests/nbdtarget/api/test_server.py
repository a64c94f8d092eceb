# SPDX-License-Identifier: Apache-2.0
"""A server as an object: what it makes is what the command line makes, and a refusal leaves nothing."""

import errno as errnos
import os
from pathlib import Path

import pytest

from nbdtarget.api.hosts import OwnHost
from nbdtarget.api.nbd_client import NbdError
from nbdtarget.api.server import Server, table_line
from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.common.heap import LEFT_ALONE
from nbdtarget.control.client import NoServerError
from nbdtarget.control.status_fields import CacheFields, CloneFields

MIB = 1 << 20


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("linear", MIB, None, ()), "0 2048 linear memory:1048576 0"),
        (("delay", MIB, "/a b", (9,)), r"0 2048 delay /a\ b 0 9"),
        (("flakey", 512, "/d", (10, 2)), "0 1 flakey /d 0 10 2"),
        (("zero", MIB, None, ()), "0 2048 zero"),
    ],
)
def test_table_of_one_line(
    given: tuple[str, int, str | None, tuple[int, ...]], line: str
) -> None:
    assert table_line(*given) == line


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("clone", MIB, None, ()), "clone: only linear, powercut"),
        (("zero", MIB, "/d", ()), "stands on no disk"),
        (("linear", 100, None, ()), "multiple of 512"),
        (("linear", 0, None, ()), "more than 0"),
    ],
)
def test_table_that_cannot_be_made_is_refused(
    given: tuple[str, int, str | None, tuple[int, ...]], reason: str
) -> None:
    with pytest.raises(NbdTargetError, match=reason):
        table_line(*given)


async def test_heap_of_the_program_that_has_a_server_is_left_alone() -> None:
    async with Server() as server:
        host = server._host
        assert isinstance(host, OwnHost)
        assert host._daemon is not None
        assert host._daemon._listener._spare_memory._heap is LEFT_ALONE


async def test_disk_is_as_large_as_the_file_below(tmp_path: Path) -> None:
    image = tmp_path / "an image.img"
    image.write_bytes(b"i" * MIB)
    async with Server() as server:
        disk = await server.create("d", disk=image, read_only=True)
        export = await server.export(image, name="again", read_only=True)
        with disk.connect() as client:
            assert (client.size, client.read(0, 3)) == (MIB, b"iii")
        assert (await export.info()).read_only
        assert {each.name for each in await server.disks()} == {"d", "again"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "give `size`, `disk` or `table`"),
        ({"size": "1X"}, "size: not a size: '1X'"),
        ({"size": 512, "table": "0 1 zero"}, "give either `table`"),
        ({"disk": "no/such/file"}, "no such file"),
    ],
)
async def test_refused_disk_leaves_nothing(
    arguments: dict[str, str], reason: str
) -> None:
    async with Server() as server:
        with pytest.raises(NbdTargetError, match=reason):
            await server.create("d", **arguments)  # type: ignore[arg-type]
        assert await server.disks() == []


async def test_clone_and_cache_in_one_call(tmp_path: Path) -> None:
    source, dest, fast = (tmp_path / name for name in ("source", "dest", "fast"))
    source.write_bytes(b"s" * MIB)
    async with Server() as server:
        clone = await server.clone(source, dest, region_size="8K", hydration=False)
        with clone.connect() as client:
            assert client.read(0, 3) == b"sss"
        fields = (await clone.status()).fields
        assert isinstance(fields, CloneFields)
        assert fields.region_size_bytes == 8192
        assert not fields.hydration
        await clone.remove()
        cache = await server.cache(source, fast, cache_size="256K", mode="writeback")
        fields = (await cache.status()).fields
        assert isinstance(fields, CacheFields)
        assert (fields.io_mode, fields.dirty_log) == ("writeback", True)
    assert dest.stat().st_size == MIB
    assert fast.stat().st_size == 256 * 1024


async def test_scratch_copy_is_reset_while_a_client_is_attached(tmp_path: Path) -> None:
    image = tmp_path / "golden.img"
    image.write_bytes(b"g" * MIB)
    async with Server() as server:
        disk = await server.scratch(image, name="one", size_max="4K")
        other = await server.scratch(image, name="two")
        with disk.connect() as client:
            client.write(0, b"w" * 4096)
            with pytest.raises(NbdError, match="space"):
                client.write(4096, b"w")
            await disk.reset()
            assert client.read(0, 2) == b"gg"
            client.write(4096, b"w")
        with other.connect() as client:
            assert client.read(0, MIB) == b"g" * MIB
        with pytest.raises(TableError, match="cycle"):
            await disk.power_cut()
    assert image.read_bytes() == b"g" * MIB


async def test_refused_clone_leaves_no_file(tmp_path: Path) -> None:
    source, dest = tmp_path / "source", tmp_path / "dest"
    source.write_bytes(bytes(MIB))
    async with Server() as server:
        await server.create("dest", "zero", size="1M")
        with pytest.raises(TableError) as caught:
            await server.clone(source, dest)
        assert caught.value.errno == errnos.EBUSY
    assert os.listdir(tmp_path) == ["source"]


async def test_running_server_is_used_and_goes_on() -> None:
    async with Server() as ours:
        async with Server.connect(ours.control) as theirs:
            disk = await theirs.create("d", "powercut", size="1M")
            assert disk.uri == ours.disk("d").uri
            with pytest.raises(TableError) as caught:
                await theirs.create("d", "zero", size="1M")
            assert caught.value.errno == errnos.EBUSY
        assert [each.name for each in await ours.disks()] == ["d"]


async def test_server_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(NoServerError, match="no server on"):
        async with Server.connect(tmp_path / "control.sock"):
            pass


async def test_two_servers_at_once_know_nothing_of_each_other() -> None:
    async with Server() as one, Server() as other:
        await one.create("d", "zero", size="1M")
        await other.create("d", "zero", size="2M")
        sizes = [(await each.disk("d").info()).size for each in (one, other)]
    assert sizes == [MIB, 2 * MIB]


async def test_server_that_was_not_started_is_said_so() -> None:
    server = Server()
    with pytest.raises(NbdTargetError, match="inside of its with block"):
        await server.create("d", "zero", size="1M")
    with pytest.raises(NbdTargetError, match="inside of its with block"):
        server.disk("d")
