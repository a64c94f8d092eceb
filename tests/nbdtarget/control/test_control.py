# SPDX-License-Identifier: Apache-2.0
"""The control socket, both ends of it, over a real unix socket."""

import asyncio
import errno as errnos
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.control import api
from nbdtarget.control import messages as m
from nbdtarget.control.api import ControlServer
from nbdtarget.control.client import ControlClient, NoServerError
from nbdtarget.control.paths import (
    ControlAddress,
    TcpControl,
    control_address,
    runtime_directory,
)
from nbdtarget.control.sockets import NoSocketError, SocketInUseError
from nbdtarget.control.tokens import ControlTokens
from nbdtarget.control.verbs import Verbs
from tests.support.dm import RamOpener, make_registry

A = TypeVar("A", bound=m.Answer)


class Server:
    """A control server over RAM devices, and its client."""

    def __init__(self, address: ControlAddress, token: str | None = None) -> None:
        self.registry, self.opener = make_registry(a=8192, b=4096)
        verbs = Verbs(self.registry, lambda: ["nbd://x"])
        self.control = ControlServer(verbs, address, tokens=ControlTokens(token))
        self.client = ControlClient(address, token)

    async def ask(self, verb: str, request: m.Request, answer: type[A]) -> A:
        return await asyncio.to_thread(self.client.ask, verb, request, answer)

    async def create(self, table: str | None = "0 8 linear /a 0") -> None:
        await self.ask("create", m.Create("x", table), m.Done)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path / "control.sock")
    await server.control.start()
    yield server
    await server.control.close()
    await server.registry.close()
    assert isinstance(server.opener, RamOpener)
    assert server.opener.still_open == []


async def test_life_of_a_device(server: Server) -> None:
    await server.create()
    status = await server.ask("status", m.Status(), m.LinesAnswer)
    lines = (m.TableLine(0, 8, "linear", ""),)
    assert status.devices == (m.DeviceLines("x", lines, below=(m.BelowLine("/a"),)),)
    await server.ask("load", m.Load("x", "0 16 linear /a 0"), m.Done)
    await server.ask("suspend", m.Suspend("x"), m.Done)
    (info,) = (await server.ask("info", m.Info(("x",)), m.InfoAnswer)).devices
    assert (info.state, info.live, info.inactive) == ("SUSPENDED", True, True)
    await server.ask("resume", m.Resume("x"), m.Done)
    table = await server.ask("table", m.Table(("x",)), m.LinesAnswer)
    assert table.devices[0].lines == (m.TableLine(0, 16, "linear", "/a 0"),)
    await server.ask("rename", m.Rename("x", "y"), m.Done)
    deps = await server.ask("deps", m.Deps(), m.DevicesAnswer)
    assert deps.devices == (m.DeviceDeps("y", ("/a",)),)
    await server.ask("remove", m.Remove("y"), m.Done)
    assert (await server.ask("info", m.Info(), m.InfoAnswer)).devices == ()


async def test_clear_wipe_and_remove_all(server: Server) -> None:
    await server.create()
    await server.ask("load", m.Load("x", "0 8 linear /b 0"), m.Done)
    await server.ask("clear", m.Clear("x"), m.Done)
    await server.ask("wipe_table", m.WipeTable("x"), m.Done)
    table = await server.ask("table", m.Table(), m.LinesAnswer)
    assert table.devices[0].lines[0].type == "error"
    held = server.registry.acquire("x")
    done = await server.ask("remove_all", m.RemoveAll(), m.Done)
    assert done.busy == ("x",)
    server.registry.release(held)
    assert await server.ask("remove_all", m.RemoveAll(), m.Done) == m.Done()


async def test_message_answers_and_event_wakes_a_waiting_client(server: Server) -> None:
    await server.create("0 8 probe /a /b")
    words = m.Message("x", 0, ("say", "-1"))
    assert (await server.ask("message", words, m.MessageAnswer)).text == "say -1"
    waiting = asyncio.create_task(server.ask("wait", m.Wait("x", 0), m.WaitAnswer))
    event = m.Message("x", 0, ("event",))
    assert (await server.ask("message", event, m.MessageAnswer)).text is None
    assert (await waiting).event_nr == 1


@pytest.mark.parametrize(
    ("verb", "request_", "reason", "errno"),
    [
        ("status", m.Status(("nosuch",)), "Device does not exist", errnos.ENXIO),
        ("remove", m.Remove("nosuch"), "Device does not exist", errnos.ENXIO),
        ("create", m.Create("x", "0 8 foo"), "unknown target type", errnos.EINVAL),
        ("create", m.Create("x", "0 8 linear /c 0"), "Device lookup", errnos.ENOENT),
        ("create", m.Create("x", None, directory="."), "absolute", errnos.EINVAL),
        ("create", m.Create("a/b", None), "not allowed", errnos.EINVAL),
    ],
)
async def test_failure_has_reason_and_errno(
    server: Server, verb: str, request_: m.Request, reason: str, errno: int
) -> None:
    with pytest.raises(TableError) as caught:
        await server.ask(verb, request_, m.VERBS[verb][1])
    assert reason in caught.value.reason
    assert caught.value.errno == errno
    assert server.registry.devices() == []


async def test_targets_and_version(server: Server) -> None:
    targets = await server.ask("targets", m.Targets(), m.TargetsAnswer)
    assert m.TargetType("linear", (1, 4, 0)) in targets.targets
    version = await server.ask("version", m.Version(), m.VersionAnswer)
    assert (version.pid, version.uris) == (os.getpid(), ("nbd://x",))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"name": 1}', b'{"name": "x", "nme": "y"}', b"\xff"]
)
async def test_bad_request_is_refused(server: Server, body: bytes) -> None:
    status, answer = await asyncio.to_thread(
        server.client._post, "/v1/clear", body, None
    )
    assert status == 400
    failure = msgspec.json.decode(answer, type=m.Failure)
    assert failure.reason.startswith("bad request")


async def test_bug_in_a_verb_does_not_end_the_server(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    await server.create("0 8 buggy")
    assert server.registry.get("x").active is not None
    path = server.registry.get("x")._path
    path.table = "a bug"  # type: ignore[assignment]  # on purpose
    with pytest.raises(TableError, match="internal error") as caught:
        await server.ask("status", m.Status(), m.LinesAnswer)
    assert caught.value.errno == errnos.EIO
    assert "Traceback" in caplog.text
    path.table = None
    await server.ask("version", m.Version(), m.VersionAnswer)


async def test_socket_is_private_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "control.sock"
    server = Server(path)
    await server.control.start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    await server.control.close()
    await server.control.close()
    assert not path.exists()


async def test_second_server_is_refused(server: Server) -> None:
    second = Server(server.control.address)
    with pytest.raises(SocketInUseError, match="another server is listening"):
        await second.control.start()
    await second.control.close()
    await server.ask("version", m.Version(), m.VersionAnswer)


async def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    server = Server(path)
    await server.control.start()
    await server.ask("version", m.Version(), m.VersionAnswer)
    await server.control.close()


async def test_file_in_the_sockets_place_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    path.write_text("precious")
    with pytest.raises(SocketInUseError, match="not a socket"):
        await Server(path).control.start()
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", ["x" * 200, "file/control.sock"])
async def test_impossible_path_is_refused_in_one_line(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NoSocketError) as caught:
        await Server(tmp_path / name).control.start()
    assert "\n" not in str(caught.value)


def test_client_without_a_server(tmp_path: Path) -> None:
    with pytest.raises(NoServerError, match="no server on"):
        ControlClient(tmp_path / "nosuch").ask("clear", m.Clear("x"), m.Done)


async def test_client_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other.sock"

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"NBDMAGIC")
        writer.close()

    other = await asyncio.start_unix_server(greet, str(path))
    with pytest.raises(NoServerError):
        await asyncio.to_thread(ControlClient(path).ask, "clear", m.Clear("x"), m.Done)
    other.close()
    await other.wait_closed()


def test_control_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("NBDTARGET_CONTROL", raising=False)
    assert control_address(None) == tmp_path / "nbdtarget" / "control.sock"
    monkeypatch.setenv("NBDTARGET_CONTROL", "/run/c.sock")
    assert control_address(None) == Path("/run/c.sock")
    assert control_address("here.sock") == Path("here.sock")
    assert control_address("unix:here.sock") == Path("here.sock")
    assert control_address("tcp:[::1]:9") == TcpControl("::1", 9)
    assert str(control_address("tcp:[::1]:9")) == "tcp:[::1]:9"
    for bad in ("tcp:", "tcp:x", "tcp::9", "tcp:x:99999", "tcp:x:y"):
        with pytest.raises(NbdTargetError, match="is not tcp:HOST:PORT"):
            control_address(bad)


def test_runtime_directory_without_xdg(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert runtime_directory() == Path("/run/nbdtarget")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert runtime_directory() == tmp_path / "nbdtarget"
    # systemd makes it, and names it; with several, the first is ours.
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/disks:/run/other")
    assert runtime_directory() == Path("/run/disks")


async def test_a_passed_socket_is_answered_on_and_its_file_stays(
    tmp_path: Path,
) -> None:
    path = tmp_path / "passed.sock"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    server = Server(tmp_path / "elsewhere.sock")
    server.client = ControlClient(path)
    server.control.start_passed(listening.detach())
    assert server.control.address == path
    await server.create()
    await server.control.close()
    await server.registry.close()
    assert path.exists()
    assert not (tmp_path / "elsewhere.sock").exists()


async def test_a_passed_tcp_socket_needs_a_token(tmp_path: Path) -> None:
    server = Server(tmp_path / "elsewhere.sock")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with pytest.raises(
            NbdTargetError, match="a control socket on TCP needs a token"
        ):
            server.control.start_passed(os.dup(listening.fileno()))


async def test_socket_that_cannot_answer_says_so_and_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = api.HTTP_MODULE
    monkeypatch.setattr(api, "HTTP_MODULE", "nbdtarget.no_such_module")
    monkeypatch.setattr(api, "RETRY_S", 0.001)
    server = Server(tmp_path / "control.sock")
    await server.control.start()
    for _ in range(2):
        with pytest.raises(NbdTargetError):
            await server.ask("version", m.Version(), m.VersionAnswer)
    assert "control.sock: clients cannot be answered" in caplog.text
    assert "No module named" in caplog.text
    monkeypatch.setattr(api, "HTTP_MODULE", module)
    await server.ask("version", m.Version(), m.VersionAnswer)
    await server.control.close()
    await server.registry.close()


@pytest.mark.parametrize("retry_s", [0.001, 180.0])
async def test_socket_that_cannot_answer_can_be_paused_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retry_s: float
) -> None:
    monkeypatch.setattr(api, "HTTP_MODULE", "nbdtarget.no_such_module")
    monkeypatch.setattr(api, "RETRY_S", retry_s)
    server = Server(tmp_path / "control.sock")
    await server.control.start()
    with pytest.raises(NbdTargetError):
        await server.ask("version", m.Version(), m.VersionAnswer)
    await server.control.pause()
    await server.control.resume()
    with pytest.raises(NbdTargetError):
        await server.ask("version", m.Version(), m.VersionAnswer)
    await server.control.close()
    await server.registry.close()
