# SPDX-License-Identifier: Apache-2.0
"""The blocking twins have the same methods with the same arguments, and each does the same."""

import inspect
from pathlib import Path

import pytest

from nbdtarget.api.blocking import BlockingDisk, BlockingServer
from nbdtarget.api.disk import Disk
from nbdtarget.api.server import Server
from nbdtarget.common.errors import NbdTargetError, TableError

TWINS = [(Server, BlockingServer), (Disk, BlockingDisk)]


def members(cls: type) -> dict[str, object]:
    return {name: each for name, each in vars(cls).items() if not name.startswith("_")}


@pytest.mark.parametrize(("cls", "twin"), TWINS, ids=["server", "disk"])
def test_twins_have_the_same_members(cls: type, twin: type) -> None:
    # The blocking server asks its twin for the URIs.
    assert set(members(cls)) | {"uris"} == set(members(twin)) | {"uris"}
    for name, method in members(cls).items():
        if inspect.isfunction(method):
            wanted = inspect.signature(method).parameters
            assert inspect.signature(getattr(twin, name)).parameters == wanted, name


def test_everything_blocks(tmp_path: Path) -> None:
    source = tmp_path / "source.img"
    source.write_bytes(b"s" * (1 << 20))
    with BlockingServer() as server:
        disk = server.create("d", "powercut", size="1M")
        with disk.connect() as client:
            client.write(0, b"x" * 512)
            assert disk.status(noflush=True).targets[0].line == "on 1 512 0"
            assert disk.power_cut("keep", stay_off=True).nr_sectors_left == 1
            disk.power_on()
            assert client.read(0, 512) == b"x" * 512
        event_nr = disk.info().event_nr
        disk.message("cycle", "drop")
        assert disk.wait(event_nr) == event_nr + 1
        disk.suspend()
        disk.resume()
        disk.load("0 2048 zero")
        assert disk.table() == "0 2048 zero"
        export = server.export(source, read_only=True)
        clone = server.clone(source, tmp_path / "dest.img", name="c")
        with clone.connect() as client:
            assert client.read(0, 3) == b"sss"
        clone.remove()
        export.remove(force=True)
        cache = server.cache(source, tmp_path / "fast.img", cache_size="128K")
        assert [each.name for each in server.disks()] == ["d", cache.name]
        with cache.connect() as client:
            client.write(0, b"c" * 512)
        assert cache.uncache() == (
            f"{source} alone is the disk; {tmp_path}/fast.img and {tmp_path}/fast.img.nbdtarget are not used any more"
        )
        assert cache.table() == f"0 2048 linear {source} 0"
        assert server.disk("d").uri == disk.uri == server.uris[0].replace("{name}", "d")
        copy = server.scratch(tmp_path / "dest.img", name="s")
        copy.reset()
        copy.remove()
        with BlockingServer.connect(server.control) as other:
            assert [each.name for each in other.disks()] == ["d", cache.name]
            with pytest.raises(TableError):
                other.disk("nothing").info()
        assert repr(disk) == f"<BlockingDisk d {disk.uri}>"


def test_server_that_was_not_started_or_has_ended_is_said_so(tmp_path: Path) -> None:
    server = BlockingServer()
    with pytest.raises(NbdTargetError, match="inside of its with block"):
        server.disks()
    with server:
        pass
    with pytest.raises(NbdTargetError, match="inside of its with block"):
        server.disks()
    server.stop()
    with pytest.raises(NbdTargetError), BlockingServer.connect(tmp_path / "none"):
        pass


def test_a_method_says_what_its_twin_says() -> None:
    assert BlockingDisk.power_cut.__doc__ == Disk.power_cut.__doc__
    assert BlockingDisk.power_cut.__qualname__ == "BlockingDisk.power_cut"
    assert inspect.signature(BlockingServer.create).return_annotation is BlockingDisk
    with BlockingServer() as server:
        disk = server.create("d", size="1M")
        with pytest.raises(TypeError, match="unexpected keyword"):
            disk.load("0 8 zero", nonsense=1)  # type: ignore[call-arg]  # that is the test
        assert disk.table().startswith("0 2048 linear")
