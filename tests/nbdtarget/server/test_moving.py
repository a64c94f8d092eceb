# SPDX-License-Identifier: Apache-2.0
"""Connections that go on in another process: nothing that was sent is lost, and nothing is answered twice."""

import asyncio
import os

import msgspec
import pytest

from nbdtarget.server import rest
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener
from nbdtarget.server.moving import ListenerState
from nbdtarget.server.tls import ListenerTls, TlsOptions
from nbdtarget_protocol import consts as c
from tests.support.certificates import authority, needs_openssl
from tests.support.patience import until
from tests.support.peer import MIB, Disk, Peer, Served


class Moved:
    """The listener of `served`, and the one that has taken its place; both in this process."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.disk = Disk()
        self.disk.data = served.disk.data

    async def move(self) -> None:
        """Freeze the first listener, and let a second one go on."""
        served = self.served
        old = await served.start()
        assert await old.freeze(5) == []
        moved, fds = old.moved_state()
        assert moved.nr_descriptors == len(fds)
        moved = msgspec.msgpack.decode(
            msgspec.msgpack.encode(moved), type=ListenerState
        )
        fds = [os.dup(fd) for fd in fds]
        old.forget()
        assert not any(served.directory.nr_open.values())
        served.directory.devices["disk"] = self.disk
        new = Listener(served.directory, limits=served.limits)
        uris = new.take_over(moved, fds)
        assert uris == [f"nbd+unix:///{{name}}?socket={served.path}"]
        served.listener, served.disk = new, self.disk
        new.go_on()


@pytest.mark.parametrize("how", ["simple", "structured", "extended"])
async def test_a_client_goes_on_and_new_ones_can_connect(
    served: Served, how: str
) -> None:
    structured = how != "simple"
    peer = await served.attach(
        structured=structured, extended=how == "extended", contexts=structured
    )
    await peer.ask(c.CMD_WRITE, 4096, payload=b"x" * 512)
    await Moved(served).move()
    assert (await peer.ask(c.CMD_READ, 4096, 512)).data == b"x" * 512
    assert (await peer.ask(c.CMD_FLUSH)).error == 0
    if structured:
        assert (await peer.ask(c.CMD_BLOCK_STATUS, 0, 512)).extents
    other = await served.attach()
    assert (await other.ask(c.CMD_READ, 4096, 512)).data == b"x" * 512
    assert served.directory.nr_open == {"disk": 2}
    peer.send(c.CMD_DISC)
    assert await peer.at_end()


async def test_who_a_client_is_stays_known(served: Served) -> None:
    await served.attach()
    before = (await served.start()).clients()
    await Moved(served).move()
    after = (await served.start()).clients()
    assert [client.identity for client in after] == [before[0].identity]
    assert after[0].identity.uid == os.getuid()


async def test_address_of_a_client_stays_known(served: Served) -> None:
    served.listener = old = Listener(served.directory)
    (uri,) = await old.start("tcp:127.0.0.1:0")
    port = int(uri.split(":")[2].partition("/")[0])
    peer = Peer(*await asyncio.open_connection("127.0.0.1", port))
    served.peers.append(peer)
    await peer.attach()
    await old.freeze(5)
    moved, fds = old.moved_state()
    fds = [os.dup(fd) for fd in fds]
    old.forget()
    new = served.listener = Listener(served.directory)
    new.take_over(moved, fds)
    new.go_on()
    (client,) = new.clients()
    assert client.identity.address == "127.0.0.1"
    assert (await peer.ask(c.CMD_READ, 0, 512)).error == 0


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("cut", [1, 27, 28, 29, 31, 32, 33, 400])
async def test_half_a_request_is_finished_by_the_other_half(
    served: Served, cut: int, extended: bool
) -> None:
    peer = await served.attach(extended=extended)
    request = peer.request(c.CMD_WRITE, 512, payload=b"y" * 512)
    peer.writer.write(request[:cut])
    await asyncio.sleep(0.01)
    await Moved(served).move()
    peer.writer.write(request[cut:])
    assert (await peer.reply()).error == 0
    assert served.disk.data[512:1024] == b"y" * 512


async def test_requests_that_wait_are_begun_once_and_there(served: Served) -> None:
    old = served.disk
    old.hold = True
    peer = await served.attach()
    first = peer.send(c.CMD_WRITE, 0, payload=b"a" * 512)
    await old.until_held(1)
    listener = await served.start()
    frozen = asyncio.create_task(listener.freeze(5))
    await asyncio.sleep(0.01)
    second = peer.send(c.CMD_WRITE, 0, payload=b"b" * 512)
    await asyncio.sleep(0.01)
    assert not frozen.done()
    assert len(old.bios) == 1
    old.let_go()
    assert await frozen == []
    await Moved(served).move()
    assert {(await peer.reply()).cookie for _ in range(2)} == {first, second}
    assert len(old.bios) == len(served.disk.bios) == 1
    assert served.disk.data[:512] == b"b" * 512


async def test_the_payload_of_a_large_write_is_received_before(served: Served) -> None:
    peer = await served.attach()
    payload = os.urandom(MIB)
    request = peer.request(c.CMD_WRITE, 0, payload=payload)
    behind = peer.request(c.CMD_READ, 0, 512)
    peer.writer.write(request[:300_000])
    listener = await served.start()
    await until(lambda: listener.budget is not None and listener.budget.nr_bytes > 0)
    frozen = asyncio.create_task(listener.freeze(5))
    await asyncio.sleep(0.01)
    assert not frozen.done()
    peer.writer.write(request[300_000:] + behind)
    assert await frozen == []
    await Moved(served).move()
    assert (await peer.reply()).error == 0
    assert (await peer.reply()).data == payload[:512]


@pytest.mark.parametrize("extended", [False, True])
async def test_replies_that_were_not_taken_come_whole(
    served: Served, extended: bool
) -> None:
    data = served.disk.data[:] = os.urandom(MIB)
    peer = await served.attach(extended=extended)
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    for at in range(8):
        peer.send(c.CMD_READ, at * 1024, MIB - 8192)
    listener = await served.start()
    await until(lambda: listener.budget is not None and not listener.budget.nr_requests)
    await asyncio.sleep(0.05)
    await Moved(served).move()
    peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
    for at in range(8):
        reply = await peer.reply()
        assert reply.data == data[at * 1024 :][: MIB - 8192]


@needs_openssl
async def test_socket_that_asks_for_tls_does_so_in_the_other_process(
    served: Served,
) -> None:
    tls = ListenerTls(TlsOptions("require", str(authority()[1])))
    old = served.listener = Listener(served.directory)
    await old.start(f"unix:{served.path}", tls)
    await old.start(f"unix:{served.path}2")
    await old.freeze(5)
    moved, fds = old.moved_state()
    fds = [os.dup(fd) for fd in fds]
    old.forget()
    new = served.listener = Listener(served.directory)
    assert new.take_over(moved, fds) == [
        f"nbds+unix:///{{name}}?socket={served.path}",
        f"nbd+unix:///{{name}}?socket={served.path}2",
    ]
    new.go_on()
    peer = await served.connect()
    await peer.greet()
    peer.option(c.OPT_LIST)
    assert (await peer.option_reply())[0] == c.REP_ERR_TLS_REQD


async def test_bounds_stay_what_they_were(served: Served) -> None:
    """A client was told how much it may send in one request."""
    served.limits = Limits(payload_max=1 << 20, connections_max=2)
    await served.attach()
    old = await served.start()
    await old.freeze(5)
    moved, fds = old.moved_state()
    fds = [os.dup(fd) for fd in fds]
    old.forget()
    new = served.listener = Listener(served.directory)
    new.take_over(moved, fds)
    assert new.limits == served.limits
    new.go_on()
    await served.attach()
    third = await served.connect()
    assert await third.at_end()


async def test_thaw_goes_on_with_what_came_meanwhile(served: Served) -> None:
    peer = await served.attach()
    listener = await served.start()
    assert await listener.freeze(5) == []
    peer.send(c.CMD_WRITE, 0, payload=b"z" * 512)
    late = await Peer.connect(served.path)
    served.peers.append(late)
    await asyncio.sleep(0.01)
    assert served.disk.bios == []
    listener.thaw()
    assert (await peer.reply()).error == 0
    await late.attach()
    assert (await late.ask(c.CMD_READ, 0, 512)).data == b"z" * 512


async def test_clients_whose_requests_hang_are_named_and_the_slow_are_left_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest, "PAYLOAD_REST_S", 0)
    hung = await served.attach()
    half = await served.attach()
    shy = await served.connect()
    served.disk.hold = True
    hung.send(c.CMD_READ, 0, 512)
    await served.disk.until_held(1)
    write = half.request(c.CMD_WRITE, 0, payload=bytes(MIB))
    half.writer.write(write[:300_000])
    await shy.greet()
    listener = await served.start()
    await until(lambda: listener.budget is not None and listener.budget.nr_bytes > 600)
    (name,) = await listener.freeze(0.05)
    assert name.startswith("client ")
    assert name.endswith(" (READ of disk)")
    listener.thaw()
    half.writer.write(write[300_000:])
    await served.disk.until_held(2)
    served.disk.let_go()
    assert (await half.reply()).error == 0
    shy.option(c.OPT_ABORT)
    assert await shy.option_reply() == (c.REP_ACK, b"")
    assert (await hung.reply()).error == 0
