# SPDX-License-Identifier: Apache-2.0
"""CACHE hydrates its range, and ends when that is done, or with the error."""

import errno as errnos

import pytest

from nbdtarget.bio import OP_CACHE, OP_DISCARD, OP_WRITE, PENDING
from nbdtarget.targets.clone.prefetch import STEP_BYTES, STEPS_AT_ONCE_MAX
from tests.support.clock import settle
from tests.support.clone import REGION, Rig

MIB = 1 << 20


async def make(regions: int = 64, words: str = "8 1 no_hydration") -> Rig:
    return await Rig(size=regions * REGION, words=words).start()


@pytest.mark.parametrize("words", ["8 1 no_hydration", "8 0 2 hydration_threshold 0"])
async def test_cache_ends_when_its_regions_are_hydrated(words: str) -> None:
    rig = await make(words=words)
    rig.destination.hold = True
    cache = rig.bio(OP_CACHE, 3 * REGION + 512, 2 * REGION)
    await settle()
    assert cache.status == PENDING
    assert (await rig.target.status(noflush=True)).split()[4] == "3"
    rig.destination.let_go()
    await settle()
    assert cache.status == 0
    assert await rig.hydrated() == "3/64"
    assert rig.log[-1] == ("d", "cache", 3 * REGION + 512, 2 * REGION)
    want = rig.content[3 * REGION : 6 * REGION]
    assert await rig.destination.device.read(3 * REGION, 3 * REGION) == want
    await rig.stop()


async def test_cache_copies_only_what_is_not_there() -> None:
    rig = await make()
    for nr in (1, 2, 5):
        rig.bio(OP_WRITE, nr * REGION, REGION)
    rig.log.clear()
    cache = rig.bio(OP_CACHE, 0, 8 * REGION)
    await settle()
    assert cache.status == 0
    reads = [(at, n) for device, op, at, n in rig.log if (device, op) == ("s", "read")]
    assert reads == [
        (0, REGION),
        (3 * REGION, 2 * REGION),
        (6 * REGION, 2 * REGION),
    ]
    assert await rig.hydrated() == "8/64"
    await rig.stop()


async def test_cache_of_holes_writes_zeroes() -> None:
    rig = Rig(size=MIB, words="8 1 no_hydration", content=bytes(MIB))
    await rig.destination.device.write(0, b"garbage!" * (MIB // 8))
    await rig.start()
    cache = rig.bio(OP_CACHE, 0, MIB)
    await settle()
    assert cache.status == 0
    ops = rig.ops()
    assert [op for op in ops if op.endswith(("read", "zeroes", "cache"))] == [
        "d write_zeroes",
        "d cache",
    ]
    await rig.stop()


async def test_cache_request_waits_for_work_on_its_regions() -> None:
    rig = await make()
    rig.source.hold = True
    write = rig.bio(OP_WRITE, 2 * REGION + 512, 512)
    cache = rig.bio(OP_CACHE, 2 * REGION, REGION)
    discard = rig.bio(OP_DISCARD, 2 * REGION, REGION)
    await settle()
    assert (write.status, cache.status) == (PENDING, PENDING)
    rig.source.let_go()
    await settle()
    assert (write.status, cache.status, discard.status) == (0, 0, 0)
    await rig.stop()


async def test_client_write_waits_for_the_copy_that_a_cache_makes() -> None:
    rig = await make()
    rig.destination.hold = True
    cache = rig.bio(OP_CACHE, 0, REGION)
    await settle()
    write = rig.bio(OP_WRITE, 0, REGION)
    assert [bio.offset for bio in rig.destination.held] == [0]  # the copy, alone
    assert write.status == PENDING
    rig.destination.let_go()
    await settle()
    assert (cache.status, write.status) == (0, 0)
    assert await rig.destination.device.read(0, REGION) == b"w" * REGION
    await rig.stop()


async def test_bad_sector_costs_its_own_region_and_ends_cache_with_its_error() -> None:
    rig = await make()
    bad = 21 * REGION + 1024
    rig.source.fails = lambda bio: (
        errnos.ENODATA if bio.offset <= bad < bio.offset + bio.length else 0
    )
    cache = rig.bio(OP_CACHE, 0, rig.size)
    await settle(300)
    assert cache.status == errnos.ENODATA
    assert await rig.hydrated() == "63/64"
    fields = rig.target.status_fields()
    assert (fields["regions_failed"], fields["regions_hydrating"]) == (1, 0)
    rig.source.fails = lambda _: 0
    again = rig.bio(OP_CACHE, 0, rig.size)  # whatever the background waits for
    await settle(100)
    assert again.status == 0
    assert rig.target.status_fields()["regions_failed"] == 0
    await rig.stop()


async def test_cache_of_a_dead_source_ends_soon() -> None:
    rig = await make(4096)
    rig.source.fails = lambda _: errnos.EIO
    rig.log.clear()
    cache = rig.bio(OP_CACHE, 0, rig.size)
    await settle(3000)
    assert cache.status == errnos.EIO
    assert len(rig.log) < 200
    await rig.stop()


async def test_cache_ends_with_an_error_when_metadata_goes_read_only() -> None:
    rig = await make(1024)
    rig.source.hold = True
    cache = rig.bio(OP_CACHE, 0, rig.size)
    await settle()
    rig.target._metadata.abort()
    rig.source.let_go()
    await settle()
    assert cache.status == errnos.EIO
    assert await rig.hydrated() == "0/1024"


async def test_huge_cache_takes_turns_with_small_ones() -> None:
    rig = await Rig(size=32 * MIB, words="128 1 no_hydration").start()
    rig.source.hold = True
    huge = [rig.bio(OP_CACHE, 0, rig.size) for _ in range(2 * STEPS_AT_ONCE_MAX)]
    small = rig.bio(OP_CACHE, 31 * MIB, MIB)
    await settle()
    nr_steps = 0
    while small.status == PENDING:
        in_flight = {bio.offset // STEP_BYTES for bio in rig.source.held}
        assert len(in_flight) <= STEPS_AT_ONCE_MAX
        held, rig.source.held = rig.source.held, []
        nr_steps += len(in_flight)
        for bio in held:
            rig.source.device.submit(bio)
        await settle()
    assert nr_steps <= 3 * STEPS_AT_ONCE_MAX
    assert all(bio.status == PENDING for bio in huge)
    rig.source.let_go()
    await settle(2000)
    assert all(bio.status == 0 for bio in huge)
    await rig.stop()


async def test_suspend_waits_for_a_step_and_not_for_the_rest() -> None:
    rig = await Rig(size=32 * MIB, words="128 1 no_hydration").start()
    rig.source.hold = True
    caches = [rig.bio(OP_CACHE, 0, rig.size) for _ in range(STEPS_AT_ONCE_MAX + 1)]
    await settle()
    rig.target.presuspend()
    assert rig.ctx.given_back == caches[-1:]
    assert caches[0].status == PENDING
    rig.source.let_go()
    await settle()
    assert {cache.status for cache in caches} == {PENDING}
    assert set(rig.ctx.given_back) == set(caches)
    await rig.target.postsuspend()
    hydrated = await rig.hydrated()
    assert hydrated == f"{STEP_BYTES >> 16}/512"
    rig.target.resume()
    cache = rig.bio(OP_CACHE, 0, rig.size)
    await settle(1000)
    assert cache.status == 0
    await rig.stop()


async def test_cache_that_lacks_nothing_any_more_ends_well_at_suspend() -> None:
    rig = await make(1024)
    rig.source.hold = True
    caches = [rig.bio(OP_CACHE, 0, REGION) for _ in range(STEPS_AT_ONCE_MAX + 4)]
    await settle()
    rig.source.let_go()
    rig.target.presuspend()
    await settle()
    assert rig.target._metadata.nr_hydrated == 1
    assert [c.status for c in caches[:STEPS_AT_ONCE_MAX]] == [0] * STEPS_AT_ONCE_MAX
    await rig.target.postsuspend()
    await rig.target.dtr()


async def test_exception_of_our_own_making_ends_the_cache(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = await make()

    async def wrong(*_: object) -> list[int]:
        raise AssertionError("wrong")

    monkeypatch.setattr(type(rig.target._hydrator), "hydrate", wrong)
    cache = rig.bio(OP_CACHE, 0, REGION)
    await settle()
    assert cache.status == errnos.EIO
    assert await rig.target.status() == "Fail"
    assert "wrong" in caplog.text
    await rig.stop()
