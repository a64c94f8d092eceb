# SPDX-License-Identifier: Apache-2.0
"""One export uses only its share of the bounds for requests in flight, and handshakes keep no client out."""

import asyncio
from dataclasses import replace

import pytest

from nbdtarget.server.limits import Budget, Limits
from nbdtarget.server.shares import Share, Shares
from nbdtarget_protocol import consts as c
from tests.support.patience import until
from tests.support.peer import Disk, Served

LIMITS = Limits(export_requests_max=3, export_bytes_max=1000, export_connections_max=2)


@pytest.fixture
def budget() -> Budget:
    return Budget(LIMITS)


def test_what_is_in_flight_counts_for_the_export_and_for_all(budget: Budget) -> None:
    one, other = Share(budget, LIMITS), Share(budget, LIMITS)
    one.take(3, 10)
    other.take(1, 20)
    assert (budget.nr_requests, budget.nr_bytes) == (4, 30)
    assert one.is_full(0)
    assert not other.is_full(0)
    assert one.room()[0] == 0
    assert other.room() == (2, 980)
    one.give_back(3, 10)
    other.give_back(1, 20)
    assert not one.is_full(0)
    assert (budget.nr_requests, budget.nr_bytes) == (0, 0)


def test_a_request_of_any_size_may_begin_alone(budget: Budget) -> None:
    share = Share(budget, LIMITS)
    assert not share.is_full(5000)
    share.take(1, 500)
    assert share.is_full(501)
    assert not share.is_full(500)
    share.give_back(1, 500)


def test_payloads_that_have_begun_are_received_above_the_share(budget: Budget) -> None:
    share, writer = Share(budget, LIMITS), object()
    share.take(1, 900)
    assert share.grow(writer, 400)
    assert budget.nr_bytes == share.nr_bytes == 1300
    assert share.is_full(0)
    share.end_growth(writer, 400)
    share.give_back(1, 1300)


def test_those_that_wait_are_woken_by_their_own_export(budget: Budget) -> None:
    one, other = Share(budget, LIMITS), Share(budget, LIMITS)
    woken: list[str] = []

    def first() -> None:
        woken.append("first")

    def second() -> None:
        woken.append("second")

    one.take(3, 0)
    one.wait(first)
    one.wait(second)
    assert budget.nr_waiters == 2
    other.take(1, 0)
    other.give_back(1, 0)
    assert woken == []
    one.stop_waiting(second)
    one.give_back(1, 0)
    assert woken == ["first"]
    assert budget.nr_waiters == 0
    # There is room in the share, so the requests wait for the budget.
    one.wait(second)
    other.take(1, 0)
    other.give_back(1, 0)
    assert woken == ["first", "second"]
    one.give_back(2, 0)


def test_shares_are_forgotten_with_the_last_connection(budget: Budget) -> None:
    shares, disk = Shares(budget, LIMITS), Disk()
    first = shares.enter(disk)
    assert shares.enter(disk) is first
    assert shares.why_full(disk) == (
        "2 connections are attached to it (export_connections_max)"
    )
    assert shares.why_full(Disk()) == ""
    shares.leave(disk)
    assert shares.why_full(disk) == ""
    shares.leave(disk)
    assert shares.enter(disk) is not first
    shares.leave(disk)


async def test_an_export_that_hangs_leaves_room_for_the_others(served: Served) -> None:
    served.limits = replace(
        served.limits,
        requests_in_flight_max=12,
        export_requests_max=8,
        requests_total_max=20,
    )
    other = Disk()
    served.directory.devices["other"] = other
    served.directory.nr_open["other"] = 0
    served.disk.hold = True
    for _ in range(4):
        peer = await served.attach("disk")
        for _ in range(5):
            peer.send(c.CMD_READ, 0, 512)
    await served.disk.until_held(8)
    await asyncio.sleep(0.02)
    # Each connection may be above its bounds by the one request of its fast path.
    assert len(served.disk.held) <= 12
    quiet = await served.attach("other")
    other.hold = True
    for _ in range(3):
        quiet.send(c.CMD_READ, 0, 512)
    await other.until_held(3)
    other.hold = False
    other.let_go()
    for _ in range(3):
        assert (await quiet.reply()).error == 0
    served.disk.hold = False
    served.disk.let_go()
    for peer in served.peers[:4]:
        for _ in range(5):
            assert (await peer.reply()).error == 0


async def test_one_connection_more_is_refused_with_the_reason(served: Served) -> None:
    served.limits = replace(served.limits, export_connections_max=1)
    first = await served.attach()
    late = await served.connect()
    await late.greet()
    late.option(c.OPT_GO, bytes(6))
    kind, reason = await late.option_reply()
    assert kind == c.REP_ERR_POLICY
    assert reason == b"1 connections are attached to it (export_connections_max)"
    first.send(c.CMD_DISC)
    await served.until_connections(1)
    late.option(c.OPT_GO, bytes(6))
    assert (await late.option_reply())[0] == c.REP_INFO


async def test_silent_clients_do_not_keep_others_out(served: Served) -> None:
    served.limits = replace(served.limits, handshakes_max=3)
    attached = await served.attach()
    silent = [await served.connect() for _ in range(5)]
    good = await served.attach()
    assert (await good.ask(c.CMD_READ, 0, 512)).error == 0
    assert (await attached.ask(c.CMD_READ, 0, 512)).error == 0
    listener = await served.start()
    await until(lambda: listener.nr_connections <= 5)
    for peer in silent[:2]:
        await peer.reader.read(18)
        assert await peer.at_end()
