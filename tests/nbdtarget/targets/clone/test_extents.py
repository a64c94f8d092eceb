# SPDX-License-Identifier: Apache-2.0
"""A clone describes its extents, and the state of hydration."""

import errno as errnos
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdtarget.bio import OP_DISCARD, OP_WRITE, PENDING
from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import EXTENT_DATA, EXTENT_HOLE, EXTENT_ZERO, Extent
from nbdtarget.targets.clone.extents import (
    HYDRATION,
    HYDRATION_ACTIVE,
    HYDRATION_SOURCE,
)
from tests.support.clock import settle
from tests.support.clone import REGION, Rig

K64 = 1 << 16
THIN = EXTENT_HOLE | EXTENT_ZERO
NO_HYDRATION = "128 1 no_hydration"
HYDRATED = 0
NOT = HYDRATION_SOURCE
NOW = HYDRATION_SOURCE | HYDRATION_ACTIVE


@pytest.fixture
async def rig() -> Rig:
    """Eight regions of 4 KiB; nothing is copied unless it is written to."""
    return await Rig().start()


async def thin_rig(content: bytes) -> Rig:
    """Four regions of 64 KiB, which are what a device in memory tells apart."""
    assert len(content) == 4 * K64
    return await Rig(size=4 * K64, words=NO_HYDRATION, content=content).start()


async def whole(rig: Rig, context: str | None = None) -> list[Extent]:
    """Ask for all of the disk, in as many answers as it takes, and check each."""
    found: list[Extent] = []
    end = rig.target.begin + rig.size
    at = rig.target.begin
    while at < end:
        if context is None:
            answer = await rig.target.extents(at, end - at)
        else:
            answer = await rig.target.context_extents(context, at, end - at)
        assert answer
        assert all(extent.length for extent in answer)
        found += answer
        at += sum(extent.length for extent in answer)
    assert at == end
    return found


async def by_region(rig: Rig) -> list[int]:
    """Each region's hydration flags."""
    found: list[int] = []
    for length, flags in await whole(rig, HYDRATION):
        assert length % REGION == 0
        found += [flags] * (length // REGION)
    return found


# ---- extents: the source or the destination, whichever is valid ----


async def test_unhydrated_zeroes_are_holes_where_the_destination_is_thin() -> None:
    rig = await thin_rig(b"a" * K64 + bytes(2 * K64) + b"b" * K64)
    await rig.destination.device.write(K64, b"old")
    assert await whole(rig) == [
        (K64, EXTENT_DATA),
        (K64, EXTENT_ZERO),  # room is there already
        (K64, THIN),
        (K64, EXTENT_DATA),
    ]


async def test_unhydrated_data_is_data_whatever_the_destination_says() -> None:
    rig = await thin_rig(b"a" * (4 * K64))
    assert await whole(rig) == [(4 * K64, EXTENT_DATA)]


async def test_hydrated_regions_are_what_the_destination_says() -> None:
    rig = await thin_rig(b"a" * (4 * K64))
    await rig.disk.discard(K64, 2 * K64)
    assert await rig.target.extents(512, 3 * K64) == [
        (K64 - 512, EXTENT_DATA),
        (2 * K64, THIN),
        (512, EXTENT_DATA),
    ]


async def test_zeroes_of_the_source_end_where_they_were_overwritten() -> None:
    rig = await thin_rig(bytes(4 * K64))
    await rig.disk.write(2 * K64 + 512, b"x")
    assert await whole(rig) == [(2 * K64, THIN), (K64, EXTENT_DATA), (K64, THIN)]


async def test_source_is_not_asked_when_everything_asked_for_is_hydrated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = await thin_rig(bytes(4 * K64))
    await rig.disk.write(0, b"x" * (2 * K64))

    async def refuse(offset: int, length: int) -> list[Extent]:
        raise DeviceError(errnos.EIO, "s", "extents", offset, length)

    monkeypatch.setattr(rig.source, "extents", refuse)
    assert await rig.target.extents(0, 2 * K64) == [(2 * K64, EXTENT_DATA)]
    with pytest.raises(DeviceError):
        await rig.target.extents(0, 3 * K64)


async def test_source_that_can_not_tell_is_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def mute(offset: int, length: int) -> list[Extent]:
        return [Extent(length, EXTENT_DATA)]

    rig = await thin_rig(bytes(4 * K64))
    await rig.disk.discard(K64, K64)
    monkeypatch.setattr(rig.source, "extents", mute)
    assert await whole(rig) == [
        (K64, EXTENT_DATA),
        (K64, THIN),  # the destination can
        (2 * K64, EXTENT_DATA),
    ]


@pytest.mark.parametrize("terse", ["source", "destination"])
async def test_answer_is_as_short_as_the_shorter_of_both(
    terse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def first_half(offset: int, length: int) -> list[Extent]:
        return [Extent(-(-length // 2), THIN)]

    rig = await thin_rig(bytes(4 * K64))
    monkeypatch.setattr(getattr(rig, terse), "extents", first_half)
    assert await rig.target.extents(0, 4 * K64) == [(2 * K64, THIN)]
    assert sum(extent.length for extent in await whole(rig)) == 4 * K64


async def test_failed_commit_makes_it_the_source_s_word_again() -> None:
    rig = await thin_rig(b"a" * K64 + bytes(3 * K64))
    await rig.disk.write(2 * K64, b"x" * K64)
    await rig.disk.flush()
    await rig.disk.discard(0, K64)
    await rig.disk.write(3 * K64, b"x" * K64)
    assert await whole(rig) == [(2 * K64, THIN), (2 * K64, EXTENT_DATA)]
    rig.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
    rig.flush()
    await settle()
    # Read-only, and only what was committed is hydrated.
    assert await whole(rig) == [
        (K64, EXTENT_DATA),
        (K64, THIN),
        (K64, EXTENT_DATA),
        (K64, EXTENT_ZERO),
    ]
    assert await whole(rig, HYDRATION) == [(2 * K64, NOT), (K64, HYDRATED), (K64, NOT)]
    await rig.stop()


async def test_in_fail_mode_all_is_data_and_hydration_unknown(rig: Rig) -> None:
    rig.bio(OP_WRITE, 0, REGION)
    rig.metadata.fails = lambda bio: errnos.EIO
    assert await rig.target.status() == "Error"
    assert await whole(rig) == [(rig.size, EXTENT_DATA)]
    with pytest.raises(DeviceError, match="hydration"):
        await rig.target.context_extents(HYDRATION, 0, rig.size)
    await rig.stop()


async def test_many_runs_are_described_in_several_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nbdtarget.targets.clone.extents.RUNS_MAX", 100)
    rig = await Rig(size=1000 * REGION).start()
    for nr in range(0, 1000, 2):
        rig.bio(OP_WRITE, nr * REGION, REGION)
    answer = await rig.target.extents(0, rig.size)
    assert sum(extent.length for extent in answer) == 100 * REGION
    answer = await rig.target.context_extents(HYDRATION, 0, rig.size)
    assert answer == [(REGION, HYDRATED), (REGION, NOT)] * 50
    assert await by_region(rig) == [HYDRATED, NOT] * 500


# ---- hydration ----


async def test_target_has_one_context_and_others_are_0(rig: Rig) -> None:
    assert rig.target.contexts == (HYDRATION,)
    assert await whole(rig, "cache") == [(rig.size, 0)]


async def test_hydration_goes_from_not_to_now_to_hydrated(rig: Rig) -> None:
    assert await whole(rig, HYDRATION) == [(rig.size, NOT)]
    rig.source.hold = True
    part = rig.bio(OP_WRITE, REGION + 512, 512)
    waiting = rig.bio(OP_WRITE, REGION, 2 * REGION)
    rig.destination.hold = True
    overwrite = rig.bio(OP_WRITE, 4 * REGION, 2 * REGION)
    # A write that waits for a region does not change its state yet.
    assert await by_region(rig) == [NOT, NOW, NOT, NOT, NOW, NOW, NOT, NOT]
    rig.source.let_go()
    rig.destination.let_go()
    assert (part.status, waiting.status, overwrite.status) == (0, 0, 0)
    assert await by_region(rig) == [1, 0, 0, 1, 0, 0, 1, 1]
    await rig.stop()


async def test_background_copies_are_hydrating() -> None:
    rig = await Rig(words="8").start()
    rig.source.hold = True
    await settle()
    assert (await by_region(rig))[0] == NOW
    rig.source.let_go()
    while await rig.hydrated() != "8/8":
        rig.clock.advance(0.1)
        await settle()
    assert await whole(rig, HYDRATION) == [(rig.size, HYDRATED)]
    await rig.stop()


async def test_write_over_both_kinds_hydrates_only_what_is_not(rig: Rig) -> None:
    rig.bio(OP_WRITE, 2 * REGION, REGION)
    rig.destination.hold = True
    write = rig.bio(OP_WRITE, REGION, 3 * REGION)
    assert write.status == PENDING
    assert await by_region(rig) == [NOT, NOW, HYDRATED, NOW, NOT, NOT, NOT, NOT]
    rig.destination.let_go()


async def test_discarded_regions_are_hydrated(rig: Rig) -> None:
    rig.bio(OP_DISCARD, 0, 3 * REGION)
    assert await by_region(rig) == [0, 0, 0, 1, 1, 1, 1, 1]


async def test_hydration_of_parts_of_regions_and_a_short_last_one() -> None:
    rig = await Rig(size=3 * REGION + 512, begin=1 << 20).start()
    rig.bio(OP_WRITE, (1 << 20) + REGION, REGION)
    ask = rig.target.context_extents
    begin = 1 << 20
    assert await whole(rig, HYDRATION) == [
        *[(REGION, NOT), (REGION, HYDRATED), (REGION + 512, NOT)]
    ]
    assert await ask(HYDRATION, begin + 100, 50) == [(50, NOT)]
    assert await ask(HYDRATION, begin + REGION - 1, 2) == [(1, NOT), (1, HYDRATED)]
    assert await ask(HYDRATION, begin + 3 * REGION + 511, 1) == [(1, NOT)]


@given(st.integers(0, 1 << 32))
async def test_hydration_is_what_bits_and_locks_say(seed: int) -> None:
    rng = random.Random(seed)
    nr_regions = rng.randrange(1, 40)
    rig = await Rig(
        size=nr_regions * REGION, content=bytes(nr_regions * REGION)
    ).start()
    regions = rig.target._regions
    expected = [NOT] * nr_regions
    for _ in range(rng.randrange(5)):
        begin = rng.randrange(nr_regions)
        end = rng.randrange(begin + 1, nr_regions + 1)
        if regions.prison.maybe_lock(begin, end) is not None:
            expected[begin:end] = [NOW] * (end - begin)
    for _ in range(rng.randrange(9)):
        nr = rng.randrange(nr_regions)
        regions.metadata.set_hydrated(nr, nr + 1)
        expected[nr] = HYDRATED
    assert await by_region(rig) == expected
    begin = rng.randrange(rig.size)
    length = rng.randrange(1, rig.size - begin + 1)
    at = begin
    for extent in await rig.target.context_extents(HYDRATION, begin, length):
        inside = range(at // REGION, -(-(at + extent.length) // REGION))
        assert {expected[nr] for nr in inside} == {extent.flags}
        at += extent.length
    assert at == begin + length
