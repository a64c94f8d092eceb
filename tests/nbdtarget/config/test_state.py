# SPDX-License-Identifier: Apache-2.0
"""Devices that survive their server: what is kept, from when on, and what happens when it cannot be written."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.config import state as state_module
from nbdtarget.config import state_file as state_file_module
from nbdtarget.config.state import DEVICES_FILE, StateDirectory
from nbdtarget.config.state_file import read_state
from nbdtarget.control import messages as m
from nbdtarget.control.calls import Calls
from nbdtarget.control.verbs import Verbs
from nbdtarget.devices import resolve
from nbdtarget.devices.base import Device
from nbdtarget.dm.registry import Registry
from nbdtarget.targets.registry import TARGET_TYPES

MIB = 1 << 20
SECTORS = MIB // 512


class Server:
    """A registry with its verbs and its state, which a crash ends at any moment."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.path = work / "state" / DEVICES_FILE

    async def start(self, **taken: str) -> "Server":
        self.registry = Registry(resolve)
        self.verbs = Verbs(self.registry)
        self.state = StateDirectory(
            str(self.work / "state"), self.registry, TARGET_TYPES
        )
        self.state.open(taken)
        self.verbs.state = self.state
        await self.state.restore()
        return self

    async def crash(self) -> None:
        """End the process as a crash does, and check that its end leaves the file as it was."""
        before = self.path.read_bytes() if self.path.exists() else None
        await self.state.close()
        await self.registry.close()
        assert before == (self.path.read_bytes() if self.path.exists() else None)

    async def call(self, verb: str, request: m.Request) -> m.Answer:
        return await Calls(self.verbs).carry_out(verb, request)

    async def create(self, name: str, table: str | None, **more: bool | str) -> None:
        request = m.Create(name=name, table=table, directory=str(self.work))
        values = {field: getattr(request, field) for field in request.__struct_fields__}
        await self.call("create", m.Create(**{**values, **more}))

    def kept(self) -> dict[str, str]:
        """Return the tables that a restart at this moment would load, by device."""
        devices = read_state(str(self.path), TARGET_TYPES, AnyName()).devices
        return {each.name: each.table.strip() for each in devices}

    def served(self) -> list[str]:
        return [device.dm_name for device in self.registry.devices()]


class AnyName:
    def __contains__(self, name: object) -> bool:
        return True


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path)
    await server.start()
    yield server
    await server.state.close()
    await server.registry.close()


def linear(name: str) -> str:
    return f"0 {SECTORS} linear {name} 0"


async def test_devices_that_are_kept_are_there_after_a_crash(server: Server) -> None:
    (server.work / "a.img").write_bytes(b"x" * MIB)
    await server.create("a", linear("a.img"), persist=True, uuid="U-1", rotational=True)
    await server.create("gone", "0 8 zero")
    await server.create("bare", None, persist=True)
    await server.crash()
    await server.start()
    assert server.served() == ["a", "bare"]
    device = server.registry.get("a")
    assert (device.uuid, device.said_rotational) == ("U-1", True)
    assert device.table() == [(0, SECTORS, "linear", f"{server.work}/a.img 0")]
    assert server.registry.get("bare").active is None


async def test_a_server_that_keeps_nothing_writes_nothing(server: Server) -> None:
    await server.create("a", "0 8 zero")
    assert not server.path.exists()


async def test_later_changes_are_kept(server: Server) -> None:
    await server.create("a", "0 8 zero", persist=True)
    await server.call("load", m.Load(name="a", table="0 16 zero"))
    assert server.kept() == {"a": "0 8 zero"}, "an inactive table is not kept"
    await server.call("resume", m.Resume(name="a"))
    assert server.kept() == {"a": "0 16 zero"}
    await server.call("rename", m.Rename(name="a", new_name="b"))
    assert server.kept() == {"b": "0 16 zero"}
    await server.call("remove", m.Remove(name="b"))
    assert server.kept() == {}


async def test_a_new_table_is_kept_before_a_request_goes_through_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.create("a", "0 8 zero", persist=True)
    device = server.registry.get("a")
    kept_when_it_ran: list[dict[str, str]] = []
    run = device._run

    def watched(table: object) -> None:
        kept_when_it_ran.append(server.kept())
        run(table)  # type: ignore[arg-type]

    monkeypatch.setattr(device, "_run", watched)
    await server.call("load", m.Load(name="a", table="0 16 zero"))
    await server.call("resume", m.Resume(name="a"))
    assert kept_when_it_ran == [{"a": "0 16 zero"}]


async def test_a_table_that_cannot_be_kept_does_not_become_live(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.create("a", "0 8 zero", persist=True)
    await server.call("load", m.Load(name="a", table="0 16 zero"))
    monkeypatch.setattr(state_module, "replace_file", no_space)
    with pytest.raises(TableError, match="No space left"):
        await server.call("resume", m.Resume(name="a"))
    assert server.registry.get("a").table() == [(0, 8, "zero", "")]
    assert server.kept() == {"a": "0 8 zero"}
    monkeypatch.undo()
    await server.call("resume", m.Resume(name="a"))
    assert server.kept() == {"a": "0 16 zero"}


def no_space(path: str, text: str) -> None:
    raise OSError(28, "No space left on device")


async def test_a_device_that_cannot_be_kept_is_not_created(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "replace_file", no_space)
    with pytest.raises(TableError, match=r"devices\.toml: No space left on device"):
        await server.create("a", "0 8 zero", persist=True)
    assert server.served() == []
    monkeypatch.undo()
    await server.create("b", "0 8 zero", persist=True)
    assert server.kept() == {"b": "0 8 zero"}


async def test_more_than_can_be_read_again_is_not_written(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.create("a", "0 8 zero", persist=True)
    before = server.kept()
    monkeypatch.setattr(state_module, "FILE_SIZE_MAX", 300)
    with pytest.raises(TableError, match="more than 300 bytes"):
        await server.create(
            "b", "\n".join(f"{nr} 1 zero" for nr in range(9)), persist=True
        )
    assert server.kept() == before
    assert server.served() == ["a"]


async def test_a_device_that_cannot_be_kept_and_is_in_use_stays(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str, text: str) -> None:
        server.registry.acquire("a")  # a client attaches at this moment
        monkeypatch.undo()
        no_space(path, text)

    monkeypatch.setattr(state_module, "replace_file", fail)
    with pytest.raises(TableError, match="the device is there and is not kept"):
        await server.create("a", "0 8 zero", persist=True)
    assert server.served() == ["a"]
    server.registry.release(server.registry.get("a"))


async def test_a_disk_that_is_missing_at_the_start_stays_kept(server: Server) -> None:
    image = server.work / "a.img"
    image.write_bytes(bytes(MIB))
    await server.create("a", linear("a.img"), persist=True)
    await server.crash()
    image.rename(server.work / "elsewhere")
    await server.start()
    assert "no such file" in server.registry.get("a").failure
    await server.create("b", "0 8 zero", persist=True)
    assert server.kept() == {
        "a": f"0 {SECTORS} linear {server.work}/a.img 0",
        "b": "0 8 zero",
    }


async def test_a_device_may_stand_on_one_that_is_not_kept(server: Server) -> None:
    await server.create("lower", "0 8 zero")
    await server.create("upper", "0 8 linear /dev/mapper/lower 0", persist=True)
    await server.crash()
    await server.start()
    assert "lower" in server.registry.get("upper").failure


async def test_a_damaged_file_ends_the_start_and_stays(server: Server) -> None:
    await server.create("a", "0 8 zero", persist=True)
    await server.crash()
    server.path.write_text(server.path.read_text().replace("0 8 zero", "0 9 zero"))
    before = server.path.read_bytes()
    with pytest.raises(NbdTargetError, match="it does not fit its checksum"):
        await server.start()
    assert server.path.read_bytes() == before
    assert server.served() == []


async def test_two_servers_do_not_share_a_directory(server: Server) -> None:
    other = Server(server.work)
    with pytest.raises(NbdTargetError, match="another server keeps its state here"):
        await other.start()


async def test_a_name_that_a_file_has_too_is_refused(server: Server) -> None:
    await server.create("a", "0 8 zero", persist=True)
    await server.crash()
    with pytest.raises(NbdTargetError, match=r"/etc/disks\.toml both have a device a:"):
        await server.start(a="/etc/disks.toml")
    await server.state.close()


async def test_after_a_hand_over_that_failed_it_goes_on(server: Server) -> None:
    await server.create("a", "0 8 zero", persist=True)
    await server.state.pause()
    with pytest.raises(TableError, match="stopping or handing over"):
        await server.create("b", "0 8 zero", persist=True)
    await server.state.resume()
    await server.create("b", "0 8 zero", persist=True)
    assert server.kept().keys() == {"a", "b"}


async def test_after_a_hand_over_that_failed_devices_are_those_of_before_it(
    server: Server,
) -> None:
    image = server.work / "away.img"
    image.write_bytes(bytes(MIB))
    await server.create("away", linear("away.img"), persist=True)
    await server.create("removed", "0 8 zero", persist=True)
    await server.crash()
    image.unlink()
    await server.start()
    await server.call("remove", m.Remove(name="removed"))
    await server.state.pause()
    await server.state.resume()
    assert server.served() == ["away"]
    assert "no such file" in server.registry.get("away").failure
    await server.create("b", "0 8 zero", persist=True)
    assert server.kept().keys() == {"away", "b"}


async def test_a_name_that_may_not_be_durable_is_written_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory cannot be flushed, but the new file has its name already."""
    await server.create("a", "0 8 zero", persist=True)

    def fails(_: str) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(state_file_module, "sync_directory", fails)
    with pytest.raises(TableError, match="Input/output error"):
        await server.create("b", "0 8 zero", persist=True)
    monkeypatch.undo()
    assert server.served() == ["a"]
    await server.call("suspend", m.Suspend(name="a"))
    assert server.kept().keys() == {"a"}


async def test_a_table_that_refuses_is_not_kept_when_the_old_one_goes_on(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.create("a", "0 8 zero", persist=True)
    device = server.registry.get("a")
    await server.call("load", m.Load(name="a", table="0 16 zero"))
    assert device.inactive is not None
    kept_when_it_ran: list[dict[str, str]] = []
    run = device._run

    async def refuses(*_: object) -> None:
        raise TableError("refused")

    def watched(table: object) -> None:
        kept_when_it_ran.append(server.kept())
        run(table)  # type: ignore[arg-type]

    monkeypatch.setattr(device.inactive, "preresume", refuses)
    monkeypatch.setattr(device, "_run", watched)
    with pytest.raises(TableError, match="refused"):
        await server.call("resume", m.Resume(name="a"))
    assert kept_when_it_ran == [{"a": "0 8 zero"}]


async def test_a_server_without_state_refuses(server: Server) -> None:
    verbs = Verbs(server.registry)
    request = m.Create(name="a", table="0 8 zero", persist=True)
    with pytest.raises(TableError, match="this server keeps no state"):
        await Calls(verbs).carry_out("create", request)
    assert server.served() == []


async def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NbdTargetError, match="file/state: Not a directory"):
        await Server(tmp_path / "file").start()


class SlowOpener:
    """As `resolve`, but a disk is opened only when `go` is set."""

    identity = staticmethod(resolve.identity)
    may_create = staticmethod(resolve.may_create)
    remove_created = staticmethod(resolve.remove_created)
    create_device = staticmethod(resolve.create_device)

    def __init__(self) -> None:
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def open_device(self, name: str, *, read_only: bool) -> Device:
        self.asked.set()
        await self.go.wait()
        return await resolve.open_device(name, read_only=read_only)


async def restarting(server: Server) -> "tuple[SlowOpener, asyncio.Task[None]]":
    """A server with one kept device has crashed, and starts again: its disk is being opened."""
    (server.work / "a.img").write_bytes(b"x" * MIB)
    await server.create("a", linear("a.img"), persist=True)
    await server.crash()
    opener = SlowOpener()
    server.registry = Registry(opener)
    server.verbs = Verbs(server.registry)
    server.state = StateDirectory(
        str(server.work / "state"), server.registry, TARGET_TYPES
    )
    server.state.open({})
    server.verbs.state = server.state
    restoring = asyncio.create_task(server.state.restore())
    await opener.asked.wait()
    return opener, restoring


async def test_what_is_not_restored_yet_stays_in_the_file(server: Server) -> None:
    opener, restoring = await restarting(server)
    await server.create("b", "0 8 zero")
    assert server.kept() == {"a": f"0 {SECTORS} linear {server.work}/a.img 0"}
    await server.create("c", "0 16 zero", persist=True)
    assert server.kept().keys() == {"a", "c"}
    opener.go.set()
    await restoring
    assert server.kept().keys() == {"a", "c"}
    await server.call("remove", m.Remove(name="a"))
    assert server.kept() == {"c": "0 16 zero"}


async def test_a_restore_that_is_broken_off_loses_nothing(server: Server) -> None:
    opener, restoring = await restarting(server)
    restoring.cancel()
    await asyncio.wait([restoring])
    await server.create("c", "0 16 zero", persist=True)
    assert server.kept().keys() == {"a", "c"}
    opener.go.set()
