# SPDX-License-Identifier: Apache-2.0
"""A server in this process: its files, its end, and what it must not do to the process it is in."""

import asyncio
import errno as errnos
import os
import socket
from pathlib import Path

import pytest

from nbdtarget.api.hosts import OwnHost, RunningHost
from nbdtarget.api.nbd_client import NbdClient
from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.control import messages as m
from nbdtarget.control.client import ControlClient
from nbdtarget.control.paths import TcpControl

ZERO = "0 2048 zero"


async def create(host: OwnHost | RunningHost, name: str, table: str = ZERO) -> None:
    await host.ask("create", m.Create(name, table), m.Done)


async def test_sockets_are_this_users_alone_and_gone_at_the_end() -> None:
    host = OwnHost()
    await host.open()
    assert isinstance(host.control, Path)
    directory = host.control.parent
    assert directory.stat().st_mode & 0o777 == 0o700
    answer = ControlClient(host.control).ask("version", m.Version(), m.VersionAnswer)
    assert answer == await host.ask("version", m.Version(), m.VersionAnswer)
    await host.close()
    assert not directory.exists()
    await host.close()


async def test_failed_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    host = OwnHost(listen=["tcp:127.0.0.1:99999"])
    with pytest.raises(NbdTargetError, match="99999"):
        await host.open()
    assert os.listdir(tmp_path) == []
    with pytest.raises(NbdTargetError, match="limits: "):
        await OwnHost(limits={"no_such": 1}).open()


async def test_long_path_of_temporary_files_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    await asyncio.to_thread(long.mkdir)
    monkeypatch.setattr("tempfile.tempdir", str(long))
    host = OwnHost()
    await host.open()
    assert str(long) not in str(host.control)
    await host.close()


async def test_server_cannot_start_this_program_again() -> None:
    host = OwnHost()
    await host.open()
    try:
        with pytest.raises(TableError) as caught:
            await host.ask("upgrade", m.Upgrade(), m.UpgradeAnswer)
        assert caught.value.errno == errnos.EOPNOTSUPP
    finally:
        await host.close()


async def test_service_manager_of_the_process_hears_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        host = OwnHost()
        await host.open()
        await create(host, "d")
        await host.close()
        with pytest.raises(BlockingIOError):
            manager.recv(4096)


async def test_server_answers_while_the_loop_of_the_program_is_blocked() -> None:
    host = OwnHost()
    await host.open()
    try:
        await create(host, "d")
        answer = await host.ask("version", m.Version(), m.VersionAnswer)
        # This blocks the loop that runs the test.
        with NbdClient(answer.uris[0].replace("{name}", "d")) as client:
            assert client.read(0, 512) == bytes(512)
    finally:
        await host.close()


async def test_cancelled_wait_for_a_running_server_ends_at_once() -> None:
    host = OwnHost()
    await host.open()
    try:
        await create(host, "d")
        other = RunningHost(host.control)
        waiting = asyncio.create_task(other.ask("wait", m.Wait("d"), m.WaitAnswer))
        await other.ask("info", m.Info(), m.InfoAnswer)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    finally:
        await host.close()


async def test_disks_of_another_machine_are_not_looked_at() -> None:
    async def look() -> None:
        raise AssertionError

    with pytest.raises(TableError, match="another machine"):
        await RunningHost(TcpControl("127.0.0.1", 1)).look(look())
