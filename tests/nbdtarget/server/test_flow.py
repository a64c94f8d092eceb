# SPDX-License-Identifier: Apache-2.0
"""`Flow`: what is in flight, and when a connection is paused and goes on."""

import asyncio

import pytest

from nbdtarget.common.clock import LoopClock
from nbdtarget.common.turns import Turns
from nbdtarget.server.buffers import BufferPool
from nbdtarget.server.flow import FULL, IN_LINE, RUNNING, Flow
from nbdtarget.server.limits import Budget, Limits

LIMITS = Limits(
    requests_in_flight_max=2,
    requests_total_max=3,
    bytes_in_flight_max=100,
    bytes_total_max=150,
    payload_max=100,
    guaranteed_bytes=10,
    turn_us=0,
    turn_bytes_max=1000,
)


class Connection:
    """Notes what its flow asks for."""

    def __init__(self, budget: Budget, turns: Turns) -> None:
        self.said: list[str] = []
        self.flow = Flow(
            self,
            LIMITS,
            budget,
            BufferPool(0),
            LoopClock(),
            turns,
            lambda: self.said.append("starved"),
        )

    def pause(self) -> None:
        self.said.append("pause")

    def resume(self) -> None:
        self.said.append("resume")


@pytest.fixture
def budget() -> Budget:
    return Budget(LIMITS)


@pytest.fixture
def connection(budget: Budget) -> Connection:
    return Connection(budget, Turns())


def test_an_answer_about_bounds_changes_nothing(
    connection: Connection, budget: Budget
) -> None:
    flow = connection.flow
    flow.begin_request(80)
    assert flow.bound_met(20) == RUNNING
    assert flow.bound_met(21) == FULL
    flow.begin_request(0)
    assert flow.bound_met(0) == FULL
    budget.take(1, 0)
    flow.end_request()
    flow.end_request()
    budget.take(2, 0)
    flow.take(1)
    assert flow.bound_met(0) == IN_LINE
    flow.give_back(1, None)
    assert not flow.is_paused
    assert budget.nr_waiters == 0
    assert connection.said == []


def test_a_connection_with_no_bytes_in_flight_may_begin_whatever_the_size(
    connection: Connection,
) -> None:
    assert connection.flow.bound_met(120) == RUNNING
    connection.flow.take(1)
    assert connection.flow.bound_met(120) == FULL


def test_a_short_request_never_waits_for_what_others_have_in_flight(
    connection: Connection, budget: Budget
) -> None:
    flow = connection.flow
    budget.take(3, 200)
    assert flow.bound_met(10) == RUNNING
    assert flow.room() == (1, 10)
    assert flow.bound_met(11) == IN_LINE
    flow.begin_request(10)
    assert flow.bound_met(0) != RUNNING
    assert flow.room()[0] <= 0


def test_a_connection_leaves_something_to_the_others(
    connection: Connection, budget: Budget
) -> None:
    """Some that take none of their replies do not use up all that there is."""
    flow = connection.flow
    flow.take(50)
    budget.take(0, 150 - 50 - 15)
    assert flow.bound_met(10) == RUNNING
    assert flow.bound_met(11) == FULL
    assert flow.room() == (2, 10)


async def test_a_full_connection_is_looked_at_once_a_turn(
    connection: Connection,
) -> None:
    flow = connection.flow
    flow.pause(FULL)
    assert flow.is_paused
    flow.ask()
    flow.ask()
    assert connection.said == ["pause"]
    await asyncio.sleep(0)
    assert connection.said == ["pause", "resume"]
    flow.run()
    flow.ask()
    await asyncio.sleep(0)
    assert connection.said == ["pause", "resume"]


async def test_in_line_only_the_budget_wakes(
    connection: Connection, budget: Budget
) -> None:
    flow = connection.flow
    flow.pause(IN_LINE)
    flow.pause(IN_LINE)
    assert budget.nr_waiters == 1
    flow.ask()
    await asyncio.sleep(0)
    assert connection.said == ["starved", "pause", "starved", "pause"]
    budget.give_back(0, 0)
    await asyncio.sleep(0)
    assert connection.said[4:] == ["resume"]
    assert budget.nr_waiters == 0


async def test_a_yielding_connection_waits_for_its_turn_only(
    connection: Connection,
) -> None:
    flow = connection.flow
    flow.spend(999)
    assert flow.may_serve_on()
    flow.spend(1)
    assert not flow.may_serve_on()
    assert flow.is_yielding
    flow.ask()
    assert connection.said == ["pause"]
    await asyncio.sleep(0)
    assert connection.said == ["pause", "resume"]
    flow.end_turn()
    flow.run()
    assert flow.may_serve_on()
    assert flow.bound_met(0) == RUNNING


async def test_a_closed_connection_leaves_the_line(
    connection: Connection, budget: Budget
) -> None:
    flow = connection.flow
    flow.begin_request(10)
    flow.pause(IN_LINE)
    flow.close()
    assert budget.nr_waiters == 0
    flow.end_request()
    flow.give_back(10, None)
    flow.ask()
    await asyncio.sleep(0)
    assert connection.said == ["starved", "pause"]
    assert (budget.nr_requests, budget.nr_bytes) == (0, 0)


def test_one_half_received_write_may_go_beyond_the_budget(budget: Budget) -> None:
    turns = Turns()
    first, second = Connection(budget, turns).flow, Connection(budget, turns).flow
    writes = object(), object()
    assert first.grow(writes[0], 70)
    assert second.grow(writes[1], 50)  # above the half of the budget: favoured
    assert not first.grow(writes[0], 10)
    assert second.grow(writes[1], 60)  # above all of it
    assert second.bound_met(0, writes[1]) == FULL
    assert first.bound_met(0, writes[0], 70) == IN_LINE
    second.end_growth(writes[1], 110)
    second.give_back(110, None)
    assert first.grow(writes[0], 10)
    first.end_growth(writes[0], 80)
    first.give_back(80, None)
    assert budget.nr_bytes == 0


def test_a_half_received_write_does_not_wait_for_itself(connection: Connection) -> None:
    """It may be larger than the bound, and nothing else would end, and wake the connection."""
    flow, write = connection.flow, object()
    flow.take(120)
    assert flow.bound_met(0, write, 120) == RUNNING
    flow.take(101)
    assert flow.bound_met(0, write, 120) == FULL
