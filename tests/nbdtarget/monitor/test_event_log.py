# SPDX-License-Identifier: Apache-2.0
"""Events are kept in order, reported once, and can be waited for."""

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest

from nbdtarget.control.figures import EventsAnswer
from nbdtarget.monitor import event_log
from nbdtarget.monitor.event_log import EventLog
from tests.support.clock import SimClock

targets = logging.getLogger("nbdtarget.targets.clone.target")
clients = logging.getLogger("nbdtarget.server.connection")


@pytest.fixture
async def events() -> AsyncIterator[EventLog]:
    level = logging.getLogger("nbdtarget").level
    logging.getLogger("nbdtarget").setLevel(logging.INFO)
    made = EventLog(SimClock())
    made.start()
    yield made
    made.stop()
    logging.getLogger("nbdtarget").setLevel(level)


async def test_an_event_says_what_it_is_about(events: EventLog) -> None:
    targets.info("%s: hydrated", "/dev/mapper/web")
    clients.warning("client 7 (%s): gone", "https://user:secret@far/x")
    first, second = (await events.after(0, 0)).events
    assert (first.nr, first.level, first.device) == (1, "info", "web")
    assert first.text == "hydrated"
    assert (second.nr, second.level, second.device) == (2, "warning", "")
    assert "secret" not in second.text
    assert (await events.after(1, 0)).events == (second,)
    assert (await events.after(2, 0)).events == ()
    assert (await events.after(None, 0)).events == ()


async def test_a_reader_waits_for_the_next_one_also_from_a_thread(
    events: EventLog,
) -> None:
    reader = asyncio.create_task(events.after(None, 20))
    await asyncio.sleep(0)
    await asyncio.to_thread(targets.error, "%s: lost", "/dev/mapper/db")
    answer = await reader
    assert [(each.device, each.text) for each in answer.events] == [("db", "lost")]
    assert answer.last == 1


async def test_a_reader_does_not_wait_for_ever(events: EventLog) -> None:
    answer = await events.after(None, 0.01)
    assert (answer.events, answer.last, answer.lost) == ((), 0, 0)
    reader = asyncio.create_task(events.after(None, 20))
    await asyncio.sleep(0)
    events.stop()
    assert (await reader).events == ()


async def test_lines_of_clients_push_out_no_others(
    events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets.info("%s: hydrated", "/dev/mapper/web")
    for nr in range(event_log.CLIENT_EVENTS_MAX + 5):
        clients.info("client %d: gone", nr)
    answer = await events.after(0, 0)
    assert answer.events[0].text == "hydrated"
    assert len(answer.events) == event_log.CLIENT_EVENTS_MAX + 1
    assert answer.lost == 5
    assert [each.nr for each in answer.events] == sorted(
        each.nr for each in answer.events
    )


async def test_a_number_of_the_process_before_gets_all(events: EventLog) -> None:
    targets.info("%s: hydrated", "/dev/mapper/web")
    answer = await events.after(900, 0)
    assert [each.nr for each in answer.events] == [1]
    assert answer.lost == 0


async def test_a_reader_of_a_server_before_this_one_does_not_wait(
    events: EventLog,
) -> None:
    async def at_once() -> EventsAnswer:
        reader = asyncio.create_task(events.after(57, 20))
        await asyncio.sleep(0)
        assert reader.done()
        return await reader

    empty = await at_once()
    assert (empty.events, empty.last, empty.lost) == ((), 0, 0)
    targets.info("%s: hydrated", "/dev/mapper/web")
    answer = await at_once()
    assert [each.text for each in answer.events] == ["hydrated"]
    assert (answer.last, answer.lost) == (1, 0)
