# SPDX-License-Identifier: Apache-2.0
"""Clients that stop in the middle of something are disconnected after a named time, and silent ones never."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import pytest

from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener
from nbdtarget.server.stalls import Stalls
from nbdtarget_protocol import consts as c
from tests.support.clock import SimClock
from tests.support.patience import PATIENCE_S, until
from tests.support.peer import MIB, Disk, Peer, Served

LIMITS = Limits(stall_timeout_s=30, stall_total_s=300)


@dataclass
class Client:
    """A connection whose client has moved last at `moved_s`; None: the client is between requests."""

    moved_s: float | None
    peer: str = "client"
    nr_notices: int = 0
    nr_aborts: int = 0

    def is_stalled(self, now_ns: int, within_s: float) -> bool:
        return self.moved_s is not None and now_ns / 1e9 - self.moved_s > within_s

    def notice_next_bytes(self) -> None:
        self.nr_notices += 1

    def abort(self) -> None:
        self.nr_aborts += 1
        self.moved_s = None


class Site:
    """The stalls of some clients, in simulated time."""

    def __init__(self, *clients: Client) -> None:
        self.clients = list(clients)
        self.nr_waiters = 0
        self.clock = SimClock()
        self.met: list[str] = []
        self.stalls = Stalls(
            LIMITS,
            self.clock,
            lambda: self.clients,
            lambda: self.nr_waiters,
            self.met.append,
        )
        self.stalls.connected()


def test_a_client_has_the_whole_time_and_at_most_half_as_much_again() -> None:
    stalled, silent = Client(moved_s=10), Client(moved_s=None)
    site = Site(stalled, silent)
    site.clock.advance(309)
    assert stalled.nr_aborts == 0
    site.clock.advance(450 - 309)
    assert (stalled.nr_aborts, silent.nr_aborts) == (1, 0)
    assert silent.nr_notices > 1


def test_a_client_that_moves_is_left_alone() -> None:
    client = Client(moved_s=0)
    site = Site(client)
    for second in range(0, 2000, 200):
        client.moved_s = second
        site.clock.advance(200)
    assert client.nr_aborts == 0


def test_without_connections_nothing_is_looked_at() -> None:
    client = Client(moved_s=None)
    site = Site()
    site.clock.advance(1000)
    site.clients.append(client)
    site.clock.advance(1000)
    assert client.nr_notices == 0
    site.stalls.connected()
    site.stalls.connected()
    site.clock.advance(LIMITS.stall_total_s / 4)
    assert client.nr_notices == 1
    site.stalls.close()
    site.stalls.connected()
    site.stalls.starved()
    site.clock.advance(1000)
    assert client.nr_notices == 1


@pytest.mark.parametrize("nr_waiters", [0, 1])
def test_a_stalled_client_has_less_time_while_others_wait(nr_waiters: int) -> None:
    client = Client(moved_s=0)
    site = Site(client)
    site.nr_waiters = nr_waiters
    site.stalls.starved()
    site.stalls.starved()
    site.clock.advance(70)
    assert client.nr_aborts == nr_waiters


# ---- over a socket ----


async def stops_in_a_short_write(peer: Peer) -> None:
    peer.send(c.CMD_WRITE, 0, 4096)
    peer.writer.write(bytes(1000))


async def stops_in_a_long_write(peer: Peer) -> None:
    peer.send(c.CMD_WRITE, 0, MIB)
    peer.writer.write(bytes(100_000))


async def stops_in_a_header(peer: Peer) -> None:
    peer.writer.write(peer.request(c.CMD_READ, 0, 512)[:11])


async def stops_in_a_refused_write(peer: Peer) -> None:
    peer.send(c.CMD_WRITE, 100 * MIB, MIB)
    peer.writer.write(bytes(100_000))


async def takes_no_replies(peer: Peer) -> None:
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a read transport
    for _ in range(300):
        peer.send(c.CMD_READ, 0, 64 << 10)


STALLS = (
    stops_in_a_short_write,
    stops_in_a_long_write,
    stops_in_a_header,
    stops_in_a_refused_write,
    takes_no_replies,
)


async def start(served: Served) -> tuple[Listener, SimClock]:
    clock = SimClock()
    limits = replace(served.limits, stall_total_s=300, socket_buffer=64 << 10)
    served.directory.devices["disk"] = Disk(2 * MIB)
    served.listener = Listener(served.directory, limits=limits, clock=clock)
    await served.listener.start(f"unix:{served.path}")
    return served.listener, clock


@pytest.mark.parametrize("stall", STALLS, ids=lambda stall: stall.__name__)
async def test_a_client_that_stalls_is_disconnected_and_a_silent_one_is_not(
    served: Served, stall: Callable[[Peer], Awaitable[None]]
) -> None:
    listener, clock = await start(served)
    silent, stalled = await served.attach(), await served.attach()
    assert (await stalled.ask(c.CMD_READ, 0, 512)).error == 0
    await stall(stalled)
    async with asyncio.timeout(PATIENCE_S):
        while listener.nr_connections > 1:
            clock.advance(100)
            await asyncio.sleep(0.001)
    assert (await silent.ask(c.CMD_READ, 0, 512)).error == 0


async def test_a_client_that_sends_a_byte_now_and_then_goes_on(served: Served) -> None:
    listener, clock = await start(served)
    peer = await served.attach()
    assert (await peer.ask(c.CMD_READ, 0, 512)).error == 0
    (connection,) = listener._connections
    request = peer.request(c.CMD_READ, 0, 512)
    for nr in range(len(request) - 1):
        peer.writer.write(request[nr : nr + 1])
        received = connection._input
        assert received is not None
        await until(lambda: received.end == nr + 1)  # noqa: B023  # in this round
        clock.advance(200)
    assert listener.nr_connections == 1
    peer.writer.write(request[-1:])
    assert (await peer.reply()).error == 0


async def test_a_client_whose_rest_came_while_it_was_looked_for_is_only_silent(
    served: Served,
) -> None:
    """The rest of a request may be received in a turn that the connection has asked for, and not because the loop called."""
    listener, clock = await start(served)
    peer = await served.attach()
    (connection,) = listener._connections
    request = peer.request(c.CMD_READ, 0, 512)
    peer.writer.write(request[:11])
    await until(lambda: connection._input is not None and connection._input.end == 11)
    clock.advance(100)
    assert connection._watch.is_noticing
    peer.writer.write(request[11:])
    connection.read_on()
    assert (await peer.reply()).error == 0
    clock.advance(1000)
    assert listener.nr_connections == 1
    assert (await peer.ask(c.CMD_READ, 0, 512)).error == 0


async def test_silent_clients_are_not_looked_for_among_all_connections(
    served: Served,
) -> None:
    """Those that are attached make no room for a handshake, and a closed one is forgotten."""
    served.limits = replace(served.limits, handshakes_max=2)
    listener = await served.start()
    attached = [await served.attach() for _ in range(4)]
    first, second = await served.connect(), await served.connect()
    await served.until_connections(6)
    assert len(listener._shaking) <= 3
    third = await served.connect()
    await first.reader.read(18)
    assert await first.at_end()
    for peer in (second, third):
        await peer.greet()
    for peer in attached:
        assert (await peer.ask(c.CMD_READ, 0, 512)).error == 0
