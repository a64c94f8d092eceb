# SPDX-License-Identifier: Apache-2.0
import asyncio

import pytest

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.dm.in_flight import InFlight
from nbdtarget.dm.table import FAILED_DRAIN_S_MAX
from tests.support.clock import SimClock
from tests.support.patience import PATIENCE_S


def bio() -> Bio:
    return Bio(OP_READ, 0, 512, memoryview(bytearray(512)), 0, lambda _: None)


def test_bio_that_has_ended_is_not_counted() -> None:
    in_flight = InFlight(SimClock())
    ended = bio()
    ended.end(0)
    in_flight.enter(ended)
    assert in_flight.count == 0


def test_bio_is_counted_until_it_ends() -> None:
    in_flight = InFlight(SimClock())
    one, two = bio(), bio()
    in_flight.enter(one)
    in_flight.enter(two)
    counts = [in_flight.count]
    one.end(0)
    counts.append(in_flight.count)
    two.end(5)
    assert [*counts, in_flight.count] == [2, 1, 0]


def test_forgotten_bio_is_not_counted_off_again_when_it_ends() -> None:
    in_flight = InFlight(SimClock())
    queued, other = bio(), bio()
    in_flight.enter(queued)
    in_flight.enter(other)
    holds = [in_flight.holds(queued), in_flight.holds(bio())]
    in_flight.forget(queued)
    holds.append(in_flight.holds(queued))
    queued.end(0)
    assert (holds, in_flight.count) == ([True, False, False], 1)


async def test_drain_waits_for_the_last_bio() -> None:
    in_flight = InFlight(SimClock())
    last = bio()
    in_flight.enter(last)
    drained = asyncio.create_task(in_flight.drain(is_failed=False))
    await asyncio.sleep(0)
    waited = not drained.done()
    last.end(0)
    await asyncio.wait_for(drained, PATIENCE_S)
    assert waited


@pytest.mark.parametrize("is_failed", [True, False])
async def test_only_a_failed_table_is_not_waited_for_without_end(
    is_failed: bool,
) -> None:
    clock = SimClock()
    in_flight = InFlight(clock)
    lost = bio()
    in_flight.enter(lost)
    drained = asyncio.create_task(in_flight.drain(is_failed=is_failed))
    await asyncio.sleep(0)
    clock.advance(FAILED_DRAIN_S_MAX)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert drained.done() == is_failed
    lost.end(0)
    await asyncio.wait_for(drained, PATIENCE_S)
