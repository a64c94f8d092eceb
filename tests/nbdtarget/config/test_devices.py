# SPDX-License-Identifier: Apache-2.0
"""The devices of a configuration file: made, and followed when it changes."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nbdtarget.common.clock import sleep, timeout
from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.config import devices, openings
from nbdtarget.config.devices import ConfiguredDevices
from nbdtarget.config.file import ConfigError, read
from nbdtarget.devices import resolve
from nbdtarget.dm import reopenings
from nbdtarget.dm.handover import Parking
from nbdtarget.dm.mapped_device import State
from nbdtarget.dm.registry import Registry
from nbdtarget.server.export import DirectoryExports
from nbdtarget.targets.cache.target import CacheTarget
from nbdtarget.targets.registry import TARGET_TYPES
from nbdtarget_protocol.errors import OptionError
from tests.support.patience import PATIENCE_S, until

NOTHING: dict[str, list[str]] = {"created": [], "loaded": [], "refused": []}


class Server:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.registry = Registry(resolve)
        self.devices: ConfiguredDevices | None = None

    def write(self, **tables: str) -> None:
        self.path.write_text(
            "".join(f"[device.{n}]\ntable = '''{t}'''\n" for n, t in tables.items())
        )

    async def start(self) -> None:
        config = read(str(self.path), TARGET_TYPES)
        self.devices = ConfiguredDevices(self.registry, config)
        await self.devices.start()

    async def reload(self) -> dict[str, list[str]]:
        assert self.devices is not None
        return await self.devices.reload()

    def tables(self) -> dict[str, str]:
        return {
            device.dm_name: "; ".join(
                " ".join(map(str, line)).rstrip() for line in device.table()
            )
            for device in self.registry.devices()
        }


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path / "disks.toml")
    yield server
    if server.devices is not None:
        await server.devices.close()
    await server.registry.close()


async def test_start_makes_lower_devices_first(server: Server) -> None:
    server.write(top="0 8 linear /dev/mapper/low 0", low="0 8 zero")
    await server.start()
    assert server.tables() == {
        "low": "0 8 zero",
        "top": "0 8 linear /dev/mapper/low 0",
    }


async def test_one_missing_disk_does_not_keep_the_others_from_being_served(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.write(
        a="0 8 zero",
        b="0 8 linear missing.img 0",
        c="0 8 linear /dev/mapper/b 0",
        d="0 8 zero",
    )
    await server.start()
    assert server.tables() == {"a": "0 8 zero", "b": "", "c": "", "d": "0 8 zero"}
    missing = f"{tmp_path}/missing.img: no such file"
    failures = {each.dm_name: each.failure for each in server.registry.devices()}
    assert missing in failures["b"]
    assert failures["c"].startswith("linear: Device lookup failed: /dev/mapper/b: ")
    assert missing in failures["c"]
    assert f"{server.path}: device b: linear: Device lookup failed" in caplog.text


async def test_device_that_could_not_be_opened_is_tried_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openings, "RETRY_S_MIN", 0.01)
    server.write(c="0 8 linear /dev/mapper/b 0", b="0 8 linear late.img 0")
    await server.start()
    assert server.tables() == {"b": "", "c": ""}
    (tmp_path / "late.img").write_bytes(bytes(4096))
    async with timeout(PATIENCE_S):
        while "" in server.tables().values():
            await sleep(0.01)
    assert server.tables() == {
        "b": f"0 8 linear {tmp_path}/late.img 0",
        "c": "0 8 linear /dev/mapper/b 0",
    }


async def test_a_reload_tries_at_once_what_could_not_be_opened(
    server: Server, tmp_path: Path
) -> None:
    server.write(b="0 8 linear late.img 0", c="0 8 linear /dev/mapper/b 0")
    await server.start()
    assert await server.reload() == {**NOTHING, "refused": ["b", "c"]}
    (tmp_path / "late.img").write_bytes(bytes(4096))
    assert await server.reload() == {**NOTHING, "created": ["b", "c"]}
    assert await server.reload() == NOTHING


async def test_a_reload_tries_at_once_what_an_upgrade_has_closed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upgrade failed, and the disk could not be opened again."""
    monkeypatch.setattr(reopenings, "RETRY_S_MIN", 1e6)
    disk, moved = tmp_path / "disk", tmp_path / "moved"
    disk.write_bytes(bytes(4096))
    server.write(a=f"0 8 linear {disk} 0")
    await server.start()
    device = server.registry.get("a")
    parking = Parking(server.registry)
    await parking.park()
    disk.rename(moved)
    assert len(await parking.undo()) == 1
    assert device.failure
    moved.rename(disk)
    assert await server.reload() == NOTHING
    await until(lambda: device.active is not None and device.state is State.ACTIVE)
    assert device.failure == ""


async def test_a_reload_opens_as_the_file_says_now_and_forgets_what_is_not_in_it(
    server: Server,
) -> None:
    server.write(b="0 8 linear missing.img 0", c="0 8 linear missing.img 0")
    await server.start()
    server.write(b="0 8 zero")
    assert await server.reload() == {**NOTHING, "created": ["b"]}
    assert server.tables() == {"b": "0 8 zero"}


async def test_a_device_that_could_not_be_opened_is_left_to_who_loads_a_table(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(openings, "RETRY_S_MIN", 0.01)
    server.write(b="0 8 linear late.img 0", c="0 8 linear late.img 0")
    await server.start()
    await server.registry.load("b", "0 8 zero")
    await server.registry.resume("b")
    await server.registry.remove("c")
    (tmp_path / "late.img").write_bytes(bytes(4096))
    await sleep(0.05)
    assert server.tables() == {"b": "0 8 zero"}


async def test_a_device_that_is_tried_again_is_there_all_the_time(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Between two attempts, and during each, a command finds it."""
    monkeypatch.setattr(openings, "RETRY_S_MIN", 0.001)
    server.write(b="0 8 linear late.img 0")
    await server.start()
    device = server.registry.get("b")
    for _ in range(100):
        assert server.registry.get("b") is device
        assert device.failure
        await sleep(0.0005)
    (tmp_path / "late.img").write_bytes(bytes(4096))
    async with timeout(PATIENCE_S):
        while device.failure:
            assert server.registry.get("b") is device
            await sleep(0.001)
    assert server.tables() == {"b": f"0 8 linear {tmp_path}/late.img 0"}


async def test_damaged_metadata_of_one_device_leaves_the_others_served(
    server: Server, tmp_path: Path
) -> None:
    for name in ("source", "dest"):
        (tmp_path / name).write_bytes(bytes(64 << 10))
    (tmp_path / "metadata").write_bytes(b"no metadata".ljust(1 << 20, b"x"))
    server.write(a="0 128 clone metadata dest source 8", b="0 8 zero")
    await server.start()
    assert server.tables() == {"a": "", "b": "0 8 zero"}
    assert "Failed to load metadata" in server.registry.get("a").failure


async def test_a_device_that_takes_long_to_open_does_not_hold_up_the_start(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "START_S_MAX", 0.05)
    path = tmp_path / "silent.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        server.write(a=f"0 8 linear nbd+unix:///?socket={path} 0", b="0 8 zero")
        async with timeout(PATIENCE_S):
            await server.start()
            while not server.tables()["b"]:
                await sleep(0.01)
        assert server.tables() == {"a": "", "b": "0 8 zero"}
        assert server.registry.get("a").failure == "is being opened"


async def test_a_client_of_a_device_that_could_not_be_opened_is_told_why(
    server: Server, tmp_path: Path
) -> None:
    server.write(a="0 8 linear missing.img 0", b="0 8 zero")
    await server.start()
    exports = DirectoryExports(server.registry)
    with pytest.raises(OptionError, match=r"cannot be served now: .*no such file"):
        exports.lookup("a")
    assert exports.lookup("") is None, "the only one that is there is not the only one"
    assert exports.lookup("b") is not None
    assert exports.lookup("c") is None


async def test_reload_creates_and_loads_and_touches_nothing_else(
    server: Server,
) -> None:
    server.write(a="0 8 zero", b="0 8 zero")
    await server.start()
    a, b = server.registry.get("a"), server.registry.get("b")
    live = a.active
    server.write(a="# the same\n0 8 zero", b="0 16 zero", c="0 8 error")
    assert await server.reload() == {**NOTHING, "created": ["c"], "loaded": ["b"]}
    assert a.active is live
    assert (server.registry.get("b"), b.size) == (b, 16 * 512)
    assert await server.reload() == NOTHING


async def test_a_table_changed_by_command_stays_until_the_file_changes(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.write(a="0 8 zero")
    await server.start()
    await server.registry.load("a", "0 8 error")
    await server.registry.resume("a")
    assert await server.reload() == NOTHING
    assert server.tables() == {"a": "0 8 error"}
    changed = "device a: its table has been changed since it was loaded from"
    assert changed in caplog.text
    caplog.clear()
    server.write(a="0 24 zero")
    assert await server.reload() == {**NOTHING, "loaded": ["a"]}
    assert await server.reload() == NOTHING
    assert changed not in caplog.text


async def test_a_device_made_by_command_follows_the_file_once_it_is_there(
    server: Server,
) -> None:
    server.write()
    await server.start()
    await server.registry.create("a", "0 8 zero")
    server.write(a="0 16 zero")
    assert await server.reload() == {**NOTHING, "loaded": ["a"]}


async def test_a_reload_says_anew_whether_a_disk_is_rotational(server: Server) -> None:
    server.write(a="0 8 zero")
    await server.start()
    assert not server.registry.get("a").is_rotational
    text = server.path.read_text()
    server.path.write_text(f"{text}rotational = true\n")
    assert await server.reload() == NOTHING
    assert server.registry.get("a").is_rotational
    server.path.write_text(text)
    assert await server.reload() == NOTHING
    assert not server.registry.get("a").is_rotational


async def test_what_has_gone_from_the_file_stays(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.write(a="0 8 zero")
    await server.start()
    server.write()
    assert await server.reload() == NOTHING
    assert server.tables() == {"a": "0 8 zero"}
    assert f"device a is no longer in {server.path}; it is still served" in caplog.text


async def test_a_file_with_a_mistake_changes_nothing(server: Server) -> None:
    server.write(a="0 8 zero")
    await server.start()
    server.write(a="0 16 zero", b="0 8 nix")
    with pytest.raises(ConfigError, match="nix: unknown target type"):
        await server.reload()
    assert server.tables() == {"a": "0 8 zero"}


async def test_one_refused_device_does_not_hold_up_the_others(
    server: Server, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    server.write(a="0 8 zero", b="0 8 zero")
    await server.start()
    image = tmp_path / "late.img"
    server.write(a=f"0 8 linear {image} 0", b="0 16 zero", c="0 8 zero")
    assert await server.reload() == {
        "created": ["c"],
        "loaded": ["b"],
        "refused": ["a"],
    }
    assert server.tables()["a"] == "0 8 zero"
    assert f"{image}" in caplog.text
    image.write_bytes(bytes(4096))
    assert await server.reload() == {**NOTHING, "loaded": ["a"]}


async def test_listeners_and_limits_wait_for_a_restart(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.write()
    await server.start()
    server.path.write_text("listen = 'tcp::1'\n[limits]\nbacklog_max = 3\n")
    assert await server.reload() == NOTHING
    assert "`listen' has changed; restart the server" in caplog.text
    assert "`limits' has changed; restart the server" in caplog.text
    caplog.clear()
    assert await server.reload() == NOTHING
    assert "`listen' has changed; restart the server" in caplog.text
    # What runs is compared, and not what was read last.
    server.write()
    caplog.clear()
    assert await server.reload() == NOTHING
    assert "has changed" not in caplog.text


async def test_key_that_has_changed_is_named_as_it_is_in_the_file(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.write()
    await server.start()
    server.path.write_text(
        "listen = [{address = 'unix:s', tls = 'off'}]\ntls_certificates = 'pki'\nstate = '/s'\n"
    )
    assert await server.reload() == NOTHING
    said = [each.getMessage().partition("`")[2] for each in caplog.records]
    named = [each.partition("'")[0] for each in said if "has changed" in each]
    assert sorted(named) == ["listen", "state", "tls_certificates"]


async def test_reload_and_tell_says_everything_in_the_log(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    server.write(a="0 8 zero")
    await server.start()
    assert server.devices is not None
    await server.devices.reload_and_tell()
    assert "reloaded: nothing has changed" in caplog.text
    server.write(a="0 16 zero", b="0 8 zero")
    await server.devices.reload_and_tell()
    assert "reloaded: b created; a loaded" in caplog.text
    server.write(a="nonsense")
    await server.devices.reload_and_tell()
    assert f"{server.path}:2: Invalid format" in caplog.text
    assert "not reloaded: nothing has changed" in caplog.text
    server.path.unlink()
    await server.devices.reload_and_tell()
    assert "not reloaded: " in caplog.text


async def test_a_table_that_cannot_be_resumed_leaves_the_device_as_it_was(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.write(a="0 8 zero")
    await server.start()

    async def refuse(name: str) -> None:
        raise TableError("no")

    monkeypatch.setattr(server.registry, "resume", refuse)
    server.write(a="0 16 zero")
    assert await server.reload() == {**NOTHING, "refused": ["a"]}
    device = server.registry.get("a")
    assert (device.inactive, device.size) == (None, 8 * 512)


async def dirty_cache(server: Server, directory: Path) -> str:
    """Serve a cache with a dirty block, as `c`; return its table up to the mode."""
    for name, size in (("origin", 2 << 20), ("fast", 1 << 20)):
        (directory / name).write_bytes(bytes(size))
    line = "0 4096 cache meta fast origin 128 1"
    server.write(c=f"{line} writeback smq 0")
    await server.start()
    device = server.registry.get("c")
    await device.message(0, ("warm", "0"))
    async with timeout(PATIENCE_S):
        while " 1/16 " not in (await device.status())[0][3]:
            await sleep(0.01)
    await device.write(0, b"dirty" * 100)
    return line


async def test_a_reload_whose_table_is_refused_at_resume_goes_on_serving(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = await dirty_cache(server, tmp_path)
    before = server.tables()
    server.write(c=f"{line} passthrough smq 0")
    assert await server.reload() == {**NOTHING, "refused": ["c"]}
    assert "unless all blocks are clean" in caplog.text
    assert "goes on with the table that it had" in caplog.text
    assert server.tables() == before
    device = server.registry.get("c")
    assert device.inactive is None
    async with timeout(PATIENCE_S):
        assert bytes(await device.read(0, 5)) == b"dirty"
    server.write(c=f"{line} writeback smq 0")  # the old text again
    assert await server.reload() == NOTHING
    server.write(c=f"{line} writethrough smq 0")
    assert await server.reload() == {**NOTHING, "loaded": ["c"]}


async def test_device_left_suspended_by_a_refused_table_takes_the_old_table(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = await dirty_cache(server, tmp_path)

    async def refuse(self: CacheTarget) -> None:
        raise TableError("not now")

    monkeypatch.setattr(CacheTarget, "preresume", refuse)
    server.write(c=f"{line} passthrough smq 0")
    assert await server.reload() == {**NOTHING, "refused": ["c"]}
    device = server.registry.get("c")
    assert device.state is State.SUSPENDED
    monkeypatch.undo()
    server.write(c=f"{line} writeback smq 0")
    assert await server.reload() == {**NOTHING, "loaded": ["c"]}
    async with timeout(PATIENCE_S):
        assert bytes(await device.read(0, 5)) == b"dirty"


async def test_reload_does_not_take_the_answer_of_an_attempt_that_had_begun_before(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openings, "RETRY_S_MIN", 0.0)
    server.write(b="0 8 linear late.img 0")
    await server.start()
    fill, try_now = server.registry.fill, openings.Opening.try_now
    has_failed, go_on = asyncio.Event(), asyncio.Event()

    async def fill_late(name: str, table: str, **how: Any) -> None:
        try:
            await fill(name, table, **how)
        except NbdTargetError:
            has_failed.set()
            await go_on.wait()
            raise

    def go_on_after_this(opening: openings.Opening) -> None:
        try_now(opening)
        go_on.set()

    monkeypatch.setattr(server.registry, "fill", fill_late)
    monkeypatch.setattr(openings.Opening, "try_now", go_on_after_this)
    async with timeout(PATIENCE_S):
        await has_failed.wait()
        (tmp_path / "late.img").write_bytes(bytes(4096))
        assert await server.reload() == {**NOTHING, "created": ["b"]}
