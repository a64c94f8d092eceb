# SPDX-License-Identifier: Apache-2.0
"""Slots: at most so many at a time, more after successes, half as many after an overload."""

import asyncio

import pytest

from nbdtarget.devices.ranged.slots import Slots


async def test_those_that_wait_get_a_slot_in_order() -> None:
    slots = Slots(1, width_max=4)
    await slots.acquire()
    order: list[int] = []

    async def use(nr: int) -> None:
        await slots.acquire()
        order.append(nr)
        slots.release()

    tasks = [asyncio.create_task(use(nr)) for nr in range(3)]
    await asyncio.sleep(0)
    assert order == []
    assert not slots.has_room
    slots.release()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2]
    assert slots.nr_used == 0


@pytest.mark.parametrize("is_given", [False, True])
async def test_a_cancelled_wait_takes_no_slot(is_given: bool) -> None:
    slots = Slots(1, width_max=1)
    await slots.acquire()
    waiting = asyncio.create_task(slots.acquire())
    await asyncio.sleep(0)
    if is_given:
        slots.release()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    if not is_given:
        slots.release()
    assert slots.nr_used == 0
    assert slots.has_room


async def test_width_grows_by_successes_up_to_its_end() -> None:
    slots = Slots(2, width_max=4)
    for _ in range(2 + 3):
        slots.note_success()
    assert slots.width == 4
    for _ in range(20):
        slots.note_success()
    assert slots.width == 4


async def test_one_overload_halves_once() -> None:
    slots = Slots(8, width_max=32, width_min=3)
    began_s = asyncio.get_running_loop().time()
    slots.note_overload(began_s)
    slots.note_overload(began_s - 1)  # was under way together with the first
    assert slots.width == 4
    slots.note_overload(began_s + 1000)
    assert slots.width == 3
