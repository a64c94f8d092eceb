# SPDX-License-Identifier: Apache-2.0
"""Writes that a client has given up must not be carried out after the requests that it sends on its next connection."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from nbdtarget.bio import OP_WRITE, Bio
from nbdtarget.devices import resolve
from nbdtarget.devices.file import device as file_device
from nbdtarget.devices.file import pieces
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.devices.resolve import open_device
from nbdtarget.dm.registry import Registry
from nbdtarget.server import gate
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener
from nbdtarget_protocol import consts as c
from tests.support.clock import SimClock
from tests.support.devices import CrashDevice
from tests.support.nbd_server import StrictServer
from tests.support.patience import PATIENCE_S, until
from tests.support.peer import Directory, Peer, Served

OLD = b"o" * 4096
NEW = b"n" * 4096


async def abandoned_write(served: Served, how: str = "close") -> Peer:
    """Attach, send a write that the disk holds back, and leave."""
    served.disk.hold = True
    peer = await served.attach()
    peer.send(c.CMD_WRITE, 4096, payload=OLD)
    await served.disk.until_held(1)
    if how == "half-close":
        peer.writer.write_eof()
    elif how == "disc":
        peer.send(c.CMD_DISC)
    elif how == "abort":
        peer.writer.transport.abort()
    else:
        peer.close()
    return peer


@pytest.mark.parametrize("how", ["close", "abort", "disc", "half-close"])
@pytest.mark.parametrize("offset", [4096, 0, 5000, 8191])
async def test_write_waits_for_an_overlapping_one_of_a_connection_that_is_gone(
    served: Served, how: str, offset: int
) -> None:
    await abandoned_write(served, how)
    back = await served.attach()
    back.send(c.CMD_WRITE, offset, payload=NEW * 2)
    await asyncio.sleep(0.02)
    assert len(served.disk.held) == 1
    served.disk.hold = False
    served.disk.let_go()
    assert (await back.reply()).error == 0
    assert (await back.ask(c.CMD_FLUSH)).error == 0
    assert served.disk.data[offset : offset + 8192] == NEW * 2


@pytest.mark.parametrize("younger", [c.CMD_WRITE_ZEROES, c.CMD_TRIM, c.CMD_READ])
@pytest.mark.parametrize("elder", [c.CMD_WRITE_ZEROES, c.CMD_TRIM])
async def test_every_request_waits_whose_order_matters(
    served: Served, elder: int, younger: int
) -> None:
    served.disk.hold = True
    peer = await served.attach()
    peer.send(elder, 0, 1 << 19)
    await served.disk.until_held(1)
    peer.close()
    back = await served.attach()
    back.send(younger, (1 << 19) - 512, 512)
    await asyncio.sleep(0.02)
    assert len(served.disk.held) == 1
    served.disk.let_go()
    await served.disk.until_held(1)
    served.disk.let_go()
    assert (await back.reply()).error == 0


async def test_block_status_waits_too(served: Served) -> None:
    await abandoned_write(served)
    back = await served.connect()
    await back.attach("disk", structured=True, contexts=True)
    back.send(c.CMD_BLOCK_STATUS, 0, 8192)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await back.reader.read(1)
    served.disk.let_go()
    assert (await back.reply()).extents == ((8192, 0),)


async def test_what_does_not_overlap_goes_on_beside_a_write_that_hangs(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "HELD_LOG_S", 0.05)
    await abandoned_write(served)
    served.disk.hold = False
    back = await served.attach()
    for offset in (0, 8192):
        assert (await back.ask(c.CMD_WRITE, offset, payload=NEW)).error == 0
        assert (await back.ask(c.CMD_READ, offset, 4096)).data == NEW
    assert (await back.ask(c.CMD_FLUSH)).error == 0
    back.send(c.CMD_READ, 4096, 1)
    with caplog.at_level(logging.WARNING):
        await until(lambda: "requests wait for 1 earlier writes" in caplog.text)
    served.disk.let_go()
    assert (await back.reply()).data == b"o"


async def test_client_that_was_there_before_waits_as_well(served: Served) -> None:
    other = await served.attach()
    peer = await abandoned_write(served)
    await until(lambda: peer.writer.is_closing())
    await asyncio.sleep(0.02)
    other.send(c.CMD_WRITE, 4096, payload=NEW)
    await asyncio.sleep(0.02)
    assert len(served.disk.held) == 1
    served.disk.hold = False
    served.disk.let_go()
    assert (await other.reply()).error == 0
    assert served.disk.data[4096:8192] == NEW


async def test_connection_that_looks_alive_when_its_client_is_back(
    served: Served,
) -> None:
    # For example, the network was cut, so the server does not know that the old connection is dead.
    served.disk.hold = True
    silent = await served.attach()
    silent.send(c.CMD_WRITE, 4096, payload=OLD)
    await served.disk.until_held(1)
    back = await served.attach()
    back.send(c.CMD_WRITE, 4096, payload=NEW)
    await asyncio.sleep(0.02)
    assert len(served.disk.held) == 1
    served.disk.hold = False
    served.disk.let_go()
    assert (await silent.reply()).error == 0
    assert (await back.reply()).error == 0
    assert served.disk.data[4096:8192] == NEW


async def test_held_requests_go_in_the_order_in_which_they_came(served: Served) -> None:
    await abandoned_write(served)
    second = await served.attach()
    second.send(c.CMD_WRITE, 4096, payload=b"2" * 8192)
    second.writer.write_eof()
    await asyncio.sleep(0.02)
    third = await served.attach()
    third.send(c.CMD_WRITE, 8192, payload=b"3" * 4096)  # only the second is in its way
    await asyncio.sleep(0.02)
    assert len(served.disk.held) == 1
    served.disk.let_go()
    await served.disk.until_held(1)
    served.disk.hold = False
    served.disk.let_go()
    assert (await second.reply()).error == 0
    assert (await third.reply()).error == 0
    assert served.disk.data[4096:12288] == b"2" * 4096 + b"3" * 4096


async def test_held_write_of_a_client_that_goes_again_never_begins(
    served: Served,
) -> None:
    await abandoned_write(served)
    second = await served.attach()
    second.send(c.CMD_WRITE, 4096, payload=b"2" * 4096)
    await asyncio.sleep(0.02)
    second.writer.transport.abort()
    third = await served.attach()
    third.send(c.CMD_WRITE, 4096, payload=NEW)
    await asyncio.sleep(0.02)
    served.disk.hold = False
    served.disk.let_go()
    assert (await third.reply()).error == 0
    assert served.disk.data[4096:8192] == NEW
    await served.until_connections(1)


async def test_requests_left_unread_by_a_client_that_has_gone(served: Served) -> None:
    served.limits = replace(served.limits, requests_in_flight_max=1)
    served.disk.hold = True
    peer = await served.attach()
    for at in (4096, 0):  # the second stays in the socket
        peer.send(c.CMD_WRITE, at, payload=OLD)
    await served.disk.until_held(1)
    peer.close()
    await asyncio.sleep(0.02)
    back = await served.attach()
    served.disk.hold = False
    assert (await back.ask(c.CMD_WRITE, 0, payload=NEW)).error == 0
    served.disk.let_go()
    await served.until_connections(1)
    assert served.disk.data[:8192] == NEW + OLD


async def test_socket_is_closed_when_the_last_write_has_ended(served: Served) -> None:
    served.disk.hold = True
    peer = await served.attach()
    peer.send(c.CMD_WRITE, 4096, payload=OLD)
    await served.disk.until_held(1)
    (connection,) = (await served.start())._connections
    peer.writer.write(b"garbage that ends every connection")
    end = asyncio.create_task(peer.at_end())
    await until(lambda: connection.is_closed)
    assert not end.done()
    served.disk.let_go()
    assert await end


async def test_shutdown_does_not_wait_for_what_is_held(served: Served) -> None:
    await abandoned_write(served)
    back = await served.attach()
    back.send(c.CMD_WRITE, 4096, payload=NEW)
    await asyncio.sleep(0.02)
    async with asyncio.timeout(PATIENCE_S):
        await (await served.start()).close(grace_s=0.05)
    served.disk.let_go()
    await served.until_connections(0)
    assert served.disk.data[4096:8192] == OLD


async def test_nothing_is_kept_when_all_have_gone(served: Served) -> None:
    peer = await abandoned_write(served)
    served.disk.hold = False
    served.disk.let_go()
    await served.until_connections(0)
    peer = await served.attach()
    assert (await peer.ask(c.CMD_WRITE, 4096, payload=NEW)).error == 0
    peer.close()
    await served.until_connections(0)
    listener = await served.start()
    assert listener._shared is not None
    assert listener._shared.gates._gates == {}


# ---- with real devices below ----


async def test_large_write_of_a_dead_connection_to_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(bytes(1 << 21))
    device = await open_device(str(tmp_path / "f"))
    assert isinstance(device, FileDevice)
    go, has_begun = threading.Event(), threading.Event()

    def slow(*args: object, **kwargs: object) -> int:
        has_begun.set()
        go.wait(PATIENCE_S)
        return pieces.write_rest(*args, **kwargs)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(file_device, "write_rest", slow)
    listener = Listener(Directory({"disk": device}), limits=Limits())
    await listener.start(f"unix:{tmp_path}/s")
    peer = await Peer.connect(tmp_path / "s")
    await peer.attach()
    peer.send(c.CMD_WRITE, 0, payload=b"o" * (1 << 20))
    await until(has_begun.is_set)
    peer.close()
    back = await Peer.connect(tmp_path / "s")
    await back.attach()
    back.send(c.CMD_WRITE, 4096, payload=NEW)  # small enough to go inline
    await asyncio.sleep(0.02)
    go.set()
    assert (await back.reply()).error == 0
    assert (await back.ask(c.CMD_FLUSH)).error == 0
    back.close()
    await listener.close()
    await device.close()
    assert (tmp_path / "f").read_bytes()[:8193] == b"o" * 4096 + NEW + b"o"


@asynccontextmanager
async def registry_at(path: Path, table: str) -> AsyncIterator[None]:
    """Serve one mapped device with this table."""
    registry = Registry(resolve)
    await registry.create("d", table)
    listener = Listener(registry)
    await listener.start(f"unix:{path}")
    yield
    await listener.close()
    await registry.close()


async def test_write_of_a_dead_connection_that_delay_holds_back(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(1 << 20))
    table = f"0 2048 delay {tmp_path}/f 0 0 {tmp_path}/f 0 150"
    async with registry_at(tmp_path / "s", table):
        peer = await Peer.connect(tmp_path / "s")
        await peer.attach()
        peer.send(c.CMD_WRITE, 4096, payload=OLD)
        await asyncio.sleep(0.02)
        peer.close()
        back = await Peer.connect(tmp_path / "s")
        await back.attach()
        # A READ is not delayed: it would read what the write is about to change.
        assert (await back.ask(c.CMD_READ, 4096, 4096)).data == OLD
        assert (await back.ask(c.CMD_WRITE, 4096, payload=NEW)).error == 0
        back.close()
    assert (tmp_path / "f").read_bytes()[4096:8192] == NEW


async def test_write_of_a_dead_connection_under_way_at_an_nbd_server(
    tmp_path: Path,
) -> None:
    (tmp_path / "back").mkdir()
    async with StrictServer(tmp_path / "back") as server:
        async with registry_at(tmp_path / "s", f"0 2048 linear {server.uri} 0"):
            peer = await Peer.connect(tmp_path / "s")
            await peer.attach()
            server.gate.clear()
            peer.send(c.CMD_WRITE, 4096, payload=OLD)
            await until(lambda: len(server.noted) == 1)
            peer.close()
            back = await Peer.connect(tmp_path / "s")
            await back.attach()
            back.send(c.CMD_WRITE, 4096, payload=NEW)
            await asyncio.sleep(0.05)
            assert len(server.noted) == 1
            server.gate.set()
            assert (await back.reply()).error == 0
            back.close()
        assert server.disk[4096:8192] == NEW


class FakeMember:
    """A connection whose client has gone: it is noticed when another one attaches."""

    def __init__(self, gates: gate.Gates, device: CrashDevice) -> None:
        self.gates = gates
        self.device = device
        self.writes: list[tuple[Bio, int, int]] = []
        self.submit: Callable[[Bio], None] = device.submit

    def writes_in_flight(self) -> list[tuple[Bio, int, int]]:
        return self.writes

    def route(self, submit: Callable[[Bio], None]) -> None:
        self.submit = submit

    def settle(self) -> None:
        self.gates.of(self.device).leave(self)
        self.gates.forget_idle(self.device)


def test_gate_survives_a_connection_that_attaches_while_one_leaves() -> None:
    device = CrashDevice(1 << 13)
    gates = gate.Gates(SimClock())
    gone, new, third = (FakeMember(gates, device) for _ in range(3))
    gates.of(device).join(gone)
    gates.of(device).join(new)
    write = Bio(OP_WRITE, 0, 512, memoryview(bytes(512)), 0, lambda _: None)
    new.writes = [(write, 0, 512)]
    gates.of(device).leave(new)
    assert gates.of(device).elders == {write: (0, 512)}
    gates.of(device).join(third)
    assert third.submit == gates.of(device).submit
