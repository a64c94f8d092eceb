# SPDX-License-Identifier: Apache-2.0
"""Before a hand-over: which connections are waited for, and for how long. Clients that keep the others waiting are left out."""

import asyncio

import pytest

from nbdtarget.common.tls_context import client_context
from nbdtarget.fast import compiled
from nbdtarget.server import reception, rest
from nbdtarget.server.listener import Listener
from nbdtarget.server.rest import come_to_rest
from nbdtarget.server.tls import ListenerTls, TlsOptions
from nbdtarget_protocol import consts as c
from tests.support.certificates import authority, needs_openssl
from tests.support.clock import SimClock
from tests.support.patience import until
from tests.support.peer import MIB, Peer, Served

FOR_EVER_S = 1e6


class Client:
    """A connection, as far as it is looked at."""

    def __init__(
        self, peer: str, *, busy: bool = False, left: int = 0, rests: bool = False
    ) -> None:
        self.peer, self.is_busy, self.payload_left = peer, busy, left
        self.is_at_rest, self.is_held = rests, False

    def hold(self) -> None:
        self.is_held = True


async def waiting(clock: SimClock, *clients: Client) -> "asyncio.Task[list[str]]":
    """Begin to wait for `clients`."""
    task = asyncio.create_task(come_to_rest(lambda: clients, clock, 10))
    await asyncio.sleep(0)
    return task


async def passes(clock: SimClock, seconds: float) -> None:
    """Let time pass look by look."""
    for _ in range(round(seconds / rest.LOOK_S)):
        clock.advance(rest.LOOK_S)
        for _ in range(3):
            await asyncio.sleep(0)


async def test_handshake_is_waited_for_for_a_moment_and_then_held() -> None:
    clock, silent, other = SimClock(), Client("silent"), Client("other", rests=True)
    task = await waiting(clock, silent, other)
    await passes(clock, rest.HANDSHAKE_REST_S - 2 * rest.LOOK_S)
    assert not task.done()
    await passes(clock, 4 * rest.LOOK_S)
    assert task.done()
    assert await task == []
    assert silent.is_held
    assert not other.is_held


async def test_payload_is_waited_for_while_bytes_of_it_come() -> None:
    clock, slow = SimClock(), Client("slow", left=1000)
    task = await waiting(clock, slow)
    for _ in range(4):
        await passes(clock, 0.8 * rest.PAYLOAD_REST_S)
        slow.payload_left -= 1
    assert not task.done()
    await passes(clock, rest.PAYLOAD_REST_S + 4 * rest.LOOK_S)
    assert task.done()
    assert await task == []
    assert slow.is_held


async def test_requests_in_flight_are_waited_for_to_the_end_and_then_named() -> None:
    clock, hung = SimClock(), Client("hung", busy=True)
    task = await waiting(clock, hung)
    await passes(clock, 9.9)
    assert not task.done()
    await passes(clock, 0.2)
    assert await task == ["hung"]
    assert not hung.is_held


async def test_requests_that_will_not_end_are_named_at_once() -> None:
    clock, hung = SimClock(), Client("hung", busy=True)
    assert await come_to_rest(lambda: [hung], clock, 10, lambda: True) == ["hung"]


@pytest.fixture(params=["compiled", "pure"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pure":
        monkeypatch.setattr(reception, "IS_COMPILED", False)
    elif not compiled.IS_COMPILED:
        pytest.skip("there is no compiled code")


@pytest.fixture
def waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "HANDSHAKE_REST_S", 0)
    monkeypatch.setattr(rest, "PAYLOAD_REST_S", 0)


@pytest.mark.usefixtures("waits_for_nobody")
async def test_client_that_says_nothing_holds_nobody_up_and_loses_nothing(
    served: Served,
) -> None:
    """Its handshake stands still, and goes on when the hand-over has failed."""
    peer = await served.attach()
    silent = await served.connect()
    await silent.greet()
    listener = await served.start()
    assert await listener.freeze(FOR_EVER_S) == []
    moved, fds = listener.moved_state()
    assert len(moved.connections) == 1
    assert moved.nr_descriptors == len(fds)
    silent.option(c.OPT_LIST)
    answer = asyncio.create_task(silent.option_reply())
    await asyncio.sleep(0.01)
    assert not answer.done()  # devices have no size now
    listener.thaw()
    kind, _ = await answer
    assert kind == c.REP_SERVER
    assert await silent.option_reply() == (c.REP_ACK, b"")
    assert (await peer.ask(c.CMD_READ, 0, 512)).error == 0
    silent.option(c.OPT_ABORT)
    assert await silent.option_reply() == (c.REP_ACK, b"")
    assert await silent.at_end()


async def test_handshake_that_ends_in_time_moves(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest, "HANDSHAKE_REST_S", FOR_EVER_S)
    peer = await served.connect()
    listener = await served.start()
    await served.until_connections(1)
    frozen = asyncio.create_task(listener.freeze(FOR_EVER_S))
    await asyncio.sleep(0)
    await peer.attach()
    assert await frozen == []
    moved, _ = listener.moved_state()
    assert len(moved.connections) == 1
    listener.thaw()
    assert (await peer.ask(c.CMD_READ, 0, 512)).error == 0


@pytest.mark.usefixtures("waits_for_nobody", "path")
async def test_client_that_stops_in_a_payload_goes_on_when_the_hand_over_has_failed(
    served: Served,
) -> None:
    half = await served.attach()
    refused = await served.attach()
    served.disk.read_only = True
    payload = b"p" * MIB
    requests = [
        half.request(c.CMD_WRITE, 0, payload=payload),
        refused.request(c.CMD_WRITE, MIB, payload=payload),  # behind the end
    ]
    for peer, request in zip((half, refused), requests, strict=True):
        peer.writer.write(request[:300_000])
    listener = await served.start()
    await until(lambda: all(each.payload_left for each in listener._connections))
    assert await listener.freeze(FOR_EVER_S) == []
    assert listener.moved_state()[0].connections == ()
    for peer, request in zip((half, refused), requests, strict=True):
        peer.writer.write(request[300_000:])
    await asyncio.sleep(0.01)
    assert served.disk.bios == []
    listener.thaw()
    assert (await half.reply()).error == 0
    assert served.disk.data == payload
    assert (await refused.reply()).error != 0
    for peer in (half, refused):
        assert (await peer.ask(c.CMD_READ, 0, 512)).data == payload[:512]


@needs_openssl
@pytest.mark.usefixtures("waits_for_nobody")
@pytest.mark.parametrize("where", ["before TLS", "in TLS", "behind TLS"])
async def test_tls_handshake_stands_still_and_goes_on(
    served: Served, where: str
) -> None:
    pki = str(authority()[1])
    tls = ListenerTls(TlsOptions("require", pki))
    served.listener = listener = Listener(served.directory, tls=tls)
    await listener.start(f"unix:{served.path}")
    peer = await served.connect()
    await peer.greet()
    context = client_context(pki)
    if where != "before TLS":
        peer.option(c.OPT_STARTTLS)
        assert await peer.option_reply() == (c.REP_ACK, b"")
    if where == "behind TLS":
        await peer.writer.start_tls(context, server_hostname="localhost")
    assert await listener.freeze(FOR_EVER_S) == []
    assert listener.moved_state()[0].connections == ()

    async def go_on() -> None:
        if where == "before TLS":
            await peer.encrypt(context)
        elif where == "in TLS":
            await peer.writer.start_tls(context, server_hostname="localhost")
        peer.option(c.OPT_ABORT)
        assert await peer.option_reply() == (c.REP_ACK, b"")

    going_on = asyncio.create_task(go_on())
    await asyncio.sleep(0.01)
    assert not going_on.done()
    listener.thaw()
    await going_on


async def test_client_that_takes_no_replies_behind_its_disc_is_left_out(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest, "HANDSHAKE_REST_S", 0)
    peer: Peer = await served.attach()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    for _ in range(8):
        peer.send(c.CMD_READ, 0, MIB)
    peer.send(c.CMD_DISC)
    listener = await served.start()
    await until(lambda: listener.budget is not None and not listener.budget.nr_requests)
    assert await listener.freeze(FOR_EVER_S) == []
    listener.thaw()
    peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert [(await peer.reply()).error for _ in range(8)] == [0] * 8
    assert await peer.at_end()
