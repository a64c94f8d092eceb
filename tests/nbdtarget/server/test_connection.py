# SPDX-License-Identifier: Apache-2.0
"""Connections: how they begin, end, survive bad clients, and shut down."""

import asyncio
import logging
from dataclasses import replace

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE, Bio
from nbdtarget.devices.base import Device
from nbdtarget_protocol import consts as c
from tests.support.clock import SimClock
from tests.support.patience import PATIENCE_S
from tests.support.peer import MIB, Disk, Served

# ---- the handshake ----


async def test_attach_tells_size_and_flags(served: Served) -> None:
    peer = await served.attach()
    assert peer.size == MIB
    assert peer.flags & c.FLAG_CAN_MULTI_CONN
    assert served.directory.nr_open == {"disk": 1}


async def test_requests_right_behind_the_handshake(served: Served) -> None:
    peer = await served.connect()
    await peer.greet()
    peer.option(c.OPT_EXPORT_NAME, b"disk")
    for _ in range(3):
        peer.send(c.CMD_READ, 0, 8)
    await peer.reader.readexactly(10)
    assert [(await peer.reply()).cookie for _ in range(3)] == [1, 2, 3]


async def test_disc_right_behind_the_handshake(served: Served) -> None:
    peer = await served.connect()
    await peer.greet()
    peer.option(c.OPT_EXPORT_NAME, b"disk")
    peer.send(c.CMD_DISC)
    await peer.reader.readexactly(10)
    assert await peer.at_end()
    await served.until_connections(0)


async def test_unknown_export_is_refused_and_the_handshake_goes_on(
    served: Served,
) -> None:
    peer = await served.connect()
    await peer.greet()
    peer.option(c.OPT_GO, b"\0\0\0\1x\0\0")
    assert (await peer.option_reply())[0] == c.REP_ERR_UNKNOWN
    peer.option(c.OPT_ABORT)
    assert await peer.option_reply() == (c.REP_ACK, b"")
    assert await peer.at_end()


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"\xff" * 9])
async def test_garbage_costs_its_own_connection(served: Served, garbage: bytes) -> None:
    good, bad = await served.attach(), await served.connect()
    bad.writer.write(garbage)
    await bad.reader.readexactly(18)
    assert await bad.at_end()
    assert (await good.ask(c.CMD_READ, 0, 1)).error == 0


async def test_handshake_that_stalls_times_out_trap_9(served: Served) -> None:
    served.clock = clock = SimClock()
    attached, stalled = await served.attach(), await served.connect()
    await stalled.greet()
    clock.advance(served.limits.handshake_timeout_s)
    assert await stalled.at_end()
    assert (await attached.ask(c.CMD_READ, 0, 1)).error == 0


async def test_export_that_vanishes_before_it_is_acquired(served: Served) -> None:
    def gone(name: str) -> Device:
        raise KeyError(name)

    served.directory.acquire = gone  # type: ignore[method-assign]  # as a registry does
    peer = await served.connect()
    await peer.greet()
    peer.option(c.OPT_EXPORT_NAME, b"disk")
    await peer.reader.readexactly(10)
    assert await peer.at_end()


# ---- ends ----


async def test_disc_lets_requests_in_flight_finish_trap_24(served: Served) -> None:
    served.disk.hold = True
    peer = await served.attach()
    peer.send(c.CMD_READ, 0, 4096)
    peer.send(c.CMD_WRITE, 0, payload=b"x" * 100_000)
    peer.send(c.CMD_DISC, 1 << 60, 77, flags=0xFFFF)
    peer.send(c.CMD_WRITE, 0, payload=b"never")
    await served.disk.until_held(2)
    served.disk.let_go()
    assert {(await peer.reply()).cookie for _ in range(2)} == {1, 2}
    assert await peer.at_end()
    assert [bio[0] for bio in served.disk.bios] == [OP_READ, OP_WRITE]


async def test_disc_and_close_at_once_is_no_error_trap_24(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nbdtarget.server")
    served.disk.hold = True
    peer = await served.attach()
    caplog.clear()
    peer.send(c.CMD_READ, 0, 4096)
    peer.send(c.CMD_DISC)
    await served.disk.until_held(1)
    peer.close()
    await peer.writer.wait_closed()
    served.disk.let_go()
    await served.until_connections(0)
    assert caplog.records == []


async def test_half_closed_client_gets_its_replies(served: Served) -> None:
    served.disk.hold = True
    peer = await served.attach()
    peer.send(c.CMD_READ, 0, 4096)
    peer.writer.write_eof()
    await served.disk.until_held(1)
    served.disk.let_go()
    assert (await peer.reply()).data == bytes(4096)
    assert await peer.at_end()


@pytest.mark.parametrize("length", [512, 4096, 100_000])
async def test_client_that_vanishes_with_bios_in_flight(
    served: Served, length: int
) -> None:
    served.disk.hold = True
    peer = await served.attach()
    for _ in range(5):
        peer.send(c.CMD_READ, 0, length)
        peer.send(c.CMD_WRITE, 0, payload=b"x" * length)
    await served.disk.until_held(10)
    peer.writer.transport.abort()
    await asyncio.sleep(0.02)
    # The device stays open until the last bio has ended, into a connection that is no more.
    served.disk.let_go(9)
    await asyncio.sleep(0.02)
    assert served.directory.nr_open == {"disk": 1}
    served.disk.let_go()
    await served.until_connections(0)
    assert served.directory.nr_open == {"disk": 0}


@pytest.mark.parametrize("cut", [1, 27, 28, 100, 70_000])
async def test_client_that_vanishes_inside_a_request(served: Served, cut: int) -> None:
    other, peer = await served.attach(), await served.attach()
    peer.writer.write(peer.request(c.CMD_WRITE, 0, payload=b"x" * 80_000)[:cut])
    await asyncio.sleep(0.01)
    peer.close()
    await served.until_connections(1)
    assert served.disk.bios == []
    assert (await other.ask(c.CMD_READ, 0, 1)).error == 0


async def test_client_that_vanishes_while_replies_wait(served: Served) -> None:
    served.limits = replace(served.limits, socket_buffer=32 << 10)
    peer = await served.attach()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a read transport
    for _ in range(20):
        peer.send(c.CMD_READ, 0, 200_000)
    await asyncio.sleep(0.02)
    peer.writer.transport.abort()
    await served.until_connections(0)


async def test_device_that_raises_costs_one_connection(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Disk):
        def submit(self, bio: Bio) -> None:
            raise RuntimeError("bug")

    served.directory.devices["broken"] = Broken()
    served.directory.nr_open["broken"] = 0
    good, bad = await served.attach("disk"), await served.attach("broken")
    bad.send(c.CMD_READ, 0, 1)
    assert await bad.at_end()
    assert "connection failed" in caplog.text
    assert (await good.ask(c.CMD_READ, 0, 1)).error == 0


# ---- shutdown ----


async def test_shutdown_finishes_what_is_in_flight_trap_25(served: Served) -> None:
    served.disk.hold = True
    peer = await served.attach()
    peer.send(c.CMD_READ, 0, 4096)
    await served.disk.until_held(1)
    listener = await served.start()
    closing = asyncio.create_task(listener.close(grace_s=PATIENCE_S))
    await asyncio.sleep(0.01)
    assert not closing.done()
    served.disk.let_go()
    assert (await peer.reply()).data == bytes(4096)
    assert await peer.at_end()
    await closing


@pytest.mark.parametrize("command", [c.CMD_READ, c.CMD_WRITE, c.CMD_FLUSH, c.CMD_TRIM])
async def test_requests_during_shutdown_are_eshutdown_trap_36(
    served: Served, command: int
) -> None:
    served.disk.hold = True
    peer = await served.attach(structured=True)
    first = peer.send(c.CMD_READ, 0, 4096)
    await served.disk.until_held(1)
    closing = asyncio.create_task((await served.start()).close(grace_s=PATIENCE_S))
    await asyncio.sleep(0.01)
    payload = b"x" * 512 if command == c.CMD_WRITE else b""
    reply = await peer.ask(command, 0, 512, payload=payload)
    assert reply.error == c.ESHUTDOWN
    served.disk.let_go()
    assert (await peer.reply()).cookie == first
    assert await peer.at_end()
    peer.close()
    await closing


async def test_shutdown_closes_an_idle_connection(served: Served) -> None:
    peer = await served.attach()
    closing = asyncio.create_task((await served.start()).close(grace_s=PATIENCE_S))
    assert await peer.at_end()
    peer.close()
    await asyncio.wait_for(closing, PATIENCE_S)


async def test_shutdown_in_the_handshake(served: Served) -> None:
    peer = await served.connect()
    await peer.greet()
    await asyncio.sleep(0.01)
    closing = asyncio.create_task((await served.start()).close(grace_s=PATIENCE_S))
    await asyncio.sleep(0.01)
    peer.option(c.OPT_LIST)
    assert (await peer.option_reply())[0] == c.REP_ERR_SHUTDOWN
    assert await peer.at_end()
    await closing


async def test_shutdown_does_not_wait_longer_than_its_grace(served: Served) -> None:
    served.disk.hold = True
    peer = await served.attach()
    peer.send(c.CMD_READ, 0, 4096)
    await served.disk.until_held(1)
    await (await served.start()).close(grace_s=0.01)
    assert await peer.at_end()
    assert served.directory.nr_open == {"disk": 1}
    served.disk.let_go()
    await served.until_connections(0)


async def test_shutdown_under_a_flood_of_requests(served: Served) -> None:
    peer = await served.attach()
    peer.writer.write(b"".join(peer.request(c.CMD_READ, 0, 512) for _ in range(20_000)))
    await peer.reply()
    closing = asyncio.create_task((await served.start()).close(grace_s=PATIENCE_S))
    errors = await peer.errors_to_the_end()
    await closing
    assert set(errors) <= {0, c.ESHUTDOWN}
    assert errors == sorted(errors)  # none is served any more after the first refusal
