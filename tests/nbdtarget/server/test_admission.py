# SPDX-License-Identifier: Apache-2.0
"""Connections: a stranger keeps no client out, and a client that is not admitted is told so at once."""

import asyncio
import resource
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import pytest

from nbdtarget.server.admission import (
    DESCRIPTORS_RESERVE,
    Admission,
    origin_of,
    raise_descriptor_limit,
)
from nbdtarget.server.limits import Limits
from nbdtarget_protocol import consts as c
from tests.support.clock import SimClock
from tests.support.patience import PATIENCE_S
from tests.support.peer import MIB, Disk, Peer, Served

LIMITS: Final = Limits(connections_max=3, peer_connections_max=2)


@pytest.fixture
def descriptor_limit() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def greeted(port: int) -> Peer | None:
    """A connection by TCP; None: it was closed at once."""
    peer = Peer(*await asyncio.open_connection("127.0.0.1", port))
    async with asyncio.timeout(PATIENCE_S):
        try:
            await peer.greet()
        except (asyncio.IncompleteReadError, ConnectionError):
            peer.close()
            return None
    return peer


async def test_many_refused_clients_are_one_line_in_the_log(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.limits = replace(served.limits, connections_max=1)
    listener = await served.start()
    (uri,) = await listener.start("tcp:127.0.0.1:0")
    port = int(uri.split(":")[2].split("/")[0])
    first = await greeted(port)
    assert first is not None
    served.peers.append(first)
    for _ in range(20):
        assert await greeted(port) is None
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["clients refused: 1: 1 connections (connections_max)"]


async def test_idle_network_clients_do_not_lock_out_local_ones(
    served: Served,
) -> None:
    served.limits = replace(served.limits, connections_max=3)
    listener = await served.start()
    (uri,) = await listener.start("tcp:127.0.0.1:0")
    port = int(uri.split(":")[2].split("/")[0])
    idle = [await greeted(port) for _ in range(5)]
    assert [peer is not None for peer in idle] == [True] * 3 + [False] * 2
    here = await served.attach()
    assert (await here.ask(c.CMD_READ, 0, 1)).error == 0
    assert idle[0] is not None
    idle[0].close()
    await served.until_connections(3)
    served.peers += [peer for peer in [*idle, await greeted(port)] if peer is not None]
    assert len(served.peers) == 5


async def test_one_above_the_bound_of_unix_sockets_is_closed_at_once(
    served: Served,
) -> None:
    served.limits = replace(served.limits, connections_max=1)
    first, second = await served.attach(), await served.connect()
    async with asyncio.timeout(PATIENCE_S):
        assert await second.at_end()
    assert (await first.ask(c.CMD_READ, 0, 1)).error == 0


async def test_one_address_does_not_take_what_is_there_for_all(served: Served) -> None:
    admission = Admission(LIMITS)
    for _ in range(2):
        assert not admission.maybe_refusal("192.0.2.1", 5)
        admission.enter("192.0.2.1")
    assert "192.0.2.1" in str(admission.maybe_refusal("192.0.2.1", 5))
    assert not admission.maybe_refusal("192.0.2.2", 5)
    admission.enter("192.0.2.2")
    assert "connections_max" in str(admission.maybe_refusal("192.0.2.3", 5))
    assert not admission.maybe_refusal("", 5)
    admission.leave("192.0.2.1")
    assert not admission.maybe_refusal("192.0.2.3", 5)


def test_the_last_descriptors_are_not_for_clients(
    descriptor_limit: tuple[int, int],
) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, descriptor_limit[1]))
    admission = Admission(LIMITS)
    assert not admission.maybe_refusal("", 1000 - DESCRIPTORS_RESERVE - 1)
    assert "ulimit -n" in str(admission.maybe_refusal("", 1000 - DESCRIPTORS_RESERVE))


def test_the_soft_limit_of_descriptors_is_raised(
    descriptor_limit: tuple[int, int],
) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, descriptor_limit[1]))
    raise_descriptor_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1000


@pytest.mark.parametrize(
    ("family", "address", "origin"),
    [
        (socket.AF_UNIX, "", ""),
        (socket.AF_INET, ("192.0.2.1", 7), "192.0.2.1"),
        (socket.AF_INET6, ("2001:db8:0:1:2::3", 7, 0, 0), "2001:db8:0:1::/64"),
        (socket.AF_INET6, ("fe80::1%eth0", 7, 0, 2), "fe80::/64"),
    ],
)
def test_where_a_connection_comes_from(
    family: int, address: object, origin: str
) -> None:
    with socket.socket(family) as sock:
        assert origin_of(sock, address) == origin


async def test_a_client_that_leaves_and_does_not_take_its_replies_is_closed(
    served: Served,
) -> None:
    served.limits = replace(served.limits, stall_timeout_s=0.1, socket_buffer=64 << 10)
    served.directory.devices["disk"] = disk = Disk(8 * MIB)
    disk.data[:] = b"x" * len(disk.data)
    peer = await served.attach()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a read transport
    peer.send(c.CMD_READ, 0, 8 * MIB)
    peer.send(c.CMD_DISC)
    await served.until_connections(0)


@pytest.mark.parametrize("length", [512, 64 << 10, 8 * MIB])
async def test_client_that_disconnects_without_taking_replies_is_closed(
    served: Served, length: int
) -> None:
    """The DISC stands behind READs that are not served, because the client takes no replies."""
    served.limits = replace(served.limits, stall_timeout_s=0.1, socket_buffer=64 << 10)
    served.directory.devices["disk"] = disk = Disk(8 * MIB)
    disk.data[:] = b"x" * len(disk.data)
    peer = await served.attach()
    other = await served.attach()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a read transport
    nr = max(100, 4 * MIB // length)
    peer.writer.write(b"".join(peer.request(c.CMD_READ, 0, length) for _ in range(nr)))
    peer.send(c.CMD_DISC)
    await served.until_connections(1)
    assert (await other.ask(c.CMD_READ, 0, 512)).error == 0


async def test_a_client_that_takes_no_replies_and_stays_is_left_alone(
    served: Served,
) -> None:
    served.limits = replace(served.limits, stall_timeout_s=0.05, socket_buffer=64 << 10)
    peer = await served.attach()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a read transport
    for _ in range(300):
        peer.send(c.CMD_READ, 0, 64 << 10)
    await asyncio.sleep(0.3)
    peer.writer.transport.resume_reading()  # type: ignore[attr-defined]  # the same
    assert {(await peer.reply()).cookie for _ in range(300)} == set(range(1, 301))


async def test_a_client_that_leaves_while_its_disk_is_slow_gets_its_replies(
    served: Served,
) -> None:
    served.limits = replace(served.limits, stall_timeout_s=0.05)
    served.disk.hold = True
    peer = await served.attach()
    peer.send(c.CMD_READ, 0, 512)
    peer.send(c.CMD_DISC)
    await served.disk.until_held(1)
    await asyncio.sleep(0.2)
    served.disk.let_go()
    assert (await peer.reply()).error == 0
    assert await peer.at_end()


@pytest.mark.parametrize(("total_s", "is_cut_off"), [(600.0, False), (30.0, True)])
async def test_a_handshake_that_goes_on_has_more_time_but_not_for_ever(
    served: Served, total_s: float, is_cut_off: bool
) -> None:
    served.clock = clock = SimClock()
    served.limits = replace(
        served.limits, handshake_timeout_s=10, handshake_total_s=total_s
    )
    peer = await served.connect()
    await peer.greet()

    async def haggle() -> None:
        for _ in range(50):
            peer.option(c.OPT_LIST)
            while (await peer.option_reply())[0] != c.REP_ACK:
                pass
            clock.advance(1)

    if is_cut_off:
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await haggle()
    else:
        await haggle()
        clock.advance(20)  # it has gone silent
        assert await peer.at_end()
