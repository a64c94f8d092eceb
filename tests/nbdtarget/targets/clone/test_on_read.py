# SPDX-License-Identifier: Apache-2.0
"""`hydrate_on_read`: what is read comes first, and no read waits for it."""

import errno as errnos

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE
from tests.support.clock import settle
from tests.support.clone import REGION, Rig

PAUSE_S = 0.2


async def make(words: str, regions: int = 64) -> Rig:
    return await Rig(size=regions * REGION, words=words).start()


def copies(rig: Rig) -> list[int]:
    """The regions that were written to the destination, in order."""
    return [
        at // REGION for device, op, at, _ in rig.log if (device, op) == ("d", "write")
    ]


async def pause(rig: Rig) -> None:
    """Let the background have its turn: it yields to clients for a moment."""
    for _ in range(20):
        await settle(20)
        rig.clock.advance(PAUSE_S / 20)
    await settle(20)


async def test_reads_bring_nothing_in_by_default() -> None:
    rig = await make("8 1 no_hydration")
    rig.bio(OP_READ, 0, 8 * REGION)
    await pause(rig)
    assert await rig.hydrated() == "0/64"
    await rig.stop()


async def test_read_is_answered_at_once_and_brings_its_regions_in() -> None:
    rig = await make("8 2 no_hydration hydrate_on_read")
    rig.destination.hold = True
    read = rig.bio(OP_READ, 10 * REGION + 512, REGION)
    assert read.status == 0
    assert read.payload is not None
    assert bytes(read.payload) == rig.content[10 * REGION + 512 : 11 * REGION + 512]
    await pause(rig)
    again = rig.bio(OP_READ, 10 * REGION, REGION)
    assert again.status == 0  # while it is being copied, too
    rig.destination.let_go()
    await pause(rig)
    assert await rig.hydrated() == "2/64"
    assert set(copies(rig)) == {10, 11}
    await rig.stop()


async def test_what_was_read_last_is_copied_first_and_then_the_rest_goes_on() -> None:
    rig = await make("8 1 hydrate_on_read 2 hydration_threshold 1")
    rig.source.hold = True
    await settle()
    held = rig.source.held[:]
    rig.source.held.clear()
    rig.source.hold = False
    for nr in (40, 20, 30):
        rig.bio(OP_READ, nr * REGION, 512)
    for bio in held:
        rig.source.device.submit(bio)
    for _ in range(200):
        await settle(10)
        rig.clock.advance(0.05)
    assert copies(rig)[:6] == [0, 30, 20, 40, 1, 2]
    assert await rig.hydrated() == "64/64"
    await rig.stop()


async def test_hole_that_is_read_becomes_a_hole() -> None:
    content = b"a" * REGION + bytes(40 << 16)
    rig = Rig(
        size=len(content), words="8 2 no_hydration hydrate_on_read", content=content
    )
    await rig.destination.device.write(0, b"garbage!" * (rig.size // 8))
    await rig.start()
    rig.bio(OP_READ, 20 * REGION, 4 * REGION)
    await pause(rig)
    assert [e for e in rig.log if e[1].startswith("write") and e[0] == "d"] == [
        ("d", "write_zeroes", 20 * REGION, 4 * REGION)
    ]
    await rig.stop()


async def test_region_that_can_not_be_read_is_not_tried_by_every_read() -> None:
    rig = await make("8 2 no_hydration hydrate_on_read")
    rig.destination.fails = lambda bio: errnos.ENOSPC
    for _ in range(20):
        rig.bio(OP_READ, 5 * REGION, 512)
        await settle(10)
        rig.clock.advance(0.01)
    await settle()
    assert len(copies(rig)) == 1
    assert await rig.hydrated() == "0/64"
    await rig.stop()


async def test_threshold_0_stops_it() -> None:
    rig = await make("8 1 hydrate_on_read 2 hydration_threshold 0")
    rig.bio(OP_READ, 5 * REGION, 512)
    await pause(rig)
    assert await rig.hydrated() == "0/64"
    await rig.target.message(["hydration_threshold", "1"])
    await pause(rig)
    assert copies(rig)[0] == 5
    await rig.stop()


@pytest.mark.parametrize("word", ["disable_hydrate_on_read", "DISABLE_Hydrate_On_Read"])
async def test_messages_turn_it_on_and_off(word: str) -> None:
    rig = await make("8 1 no_hydration")
    await rig.target.message(["enable_hydrate_on_read"])
    assert " 2 no_hydration hydrate_on_read 4 " in await rig.target.status()
    rig.bio(OP_READ, 0, 512)
    await pause(rig)
    assert await rig.hydrated() == "1/64"
    rig.bio(OP_READ, 8 * REGION, 512)
    await rig.target.message([word])
    rig.bio(OP_READ, 9 * REGION, 512)
    await pause(rig)
    assert await rig.hydrated() == "1/64"
    assert " 1 no_hydration 4 " in await rig.target.status()
    await rig.stop()


async def test_suspend_forgets_no_read() -> None:
    rig = await make("8 2 no_hydration hydrate_on_read")
    rig.bio(OP_WRITE, 0, REGION)
    rig.bio(OP_READ, 8 * REGION, 512)
    await rig.suspend()
    rig.target.resume()
    await pause(rig)
    assert await rig.hydrated() == "2/64"
    await rig.stop()
