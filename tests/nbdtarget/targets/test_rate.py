# SPDX-License-Identifier: Apache-2.0
"""The rate of the background: a bound for bytes a second, kept smoothly."""

import pytest

from nbdtarget.bio import OP_CACHE, OP_WRITE
from nbdtarget.targets.rate import CREDIT_S, JOB_S_MAX, Rate
from tests.support.clock import SimClock, settle
from tests.support.clone import REGION, Rig

S = 1_000_000_000
K64 = 1 << 16


async def copied_after(rig: Rig, seconds: float, *, step: float = 0.01) -> int:
    """Let time pass; return the bytes that were read from the source meanwhile."""
    rig.log.clear()
    for _ in range(round(seconds / step)):
        await settle(10)
        rig.clock.advance(step)
    await settle(10)
    return sum(n for device, op, _, n in rig.log if (device, op) == ("s", "read"))


def test_what_is_charged_is_paid_for_in_time() -> None:
    clock = SimClock()
    rate = Rate(clock, 1000)
    clock.advance(100)
    assert rate.ready_ns <= clock.now_ns()
    rate.charge(500)
    assert rate.ready_ns == int((100 + 0.5 - CREDIT_S) * S)
    rate.charge(1000)
    assert rate.ready_ns == int((100 + 1.5 - CREDIT_S) * S)
    assert rate.job_bytes_max == 1000 * JOB_S_MAX


def test_no_bound_charges_nothing() -> None:
    rate = Rate(SimClock(), 0)
    rate.charge(1 << 60)
    assert rate.ready_ns == 0
    assert rate.job_bytes_max is None


@pytest.mark.parametrize("bytes_per_s", [0, 1, 1 << 40])
def test_new_rate_forgets_what_was_charged_at_the_old_one(bytes_per_s: int) -> None:
    rate = Rate(SimClock(), 1)
    rate.charge(1 << 30)
    rate.set(bytes_per_s)
    assert rate.ready_ns == 0
    assert rate.bytes_per_s == bytes_per_s


@pytest.mark.parametrize("regions_per_s", [10, 100])
async def test_background_keeps_to_its_rate(regions_per_s: int) -> None:
    rate = regions_per_s * REGION
    rig = Rig(
        size=4096 * REGION,
        words=f"8 0 6 hydration_threshold 64 hydration_batch_size 64"
        f" hydration_rate {rate}",
    )
    await rig.start()
    for _ in range(3):
        copied = await copied_after(rig, 2)
        assert 1.8 * rate <= copied <= 2.2 * rate
    await rig.stop()


async def test_batches_are_cut_so_that_a_slow_rate_is_smooth() -> None:
    rig = Rig(
        size=1024 * REGION,
        words=f"8 0 6 hydration_threshold 512 hydration_batch_size 512"
        f" hydration_rate {100 * REGION}",
    )
    await rig.start()
    await copied_after(rig, 1)
    reads = [n for device, op, _, n in rig.log if (device, op) == ("s", "read")]
    assert max(reads) <= 10 * REGION
    await rig.stop()


async def test_rate_changes_at_once_by_message() -> None:
    rig = await Rig(size=256 * REGION, words="8 0 2 hydration_rate 1").start()
    assert await copied_after(rig, 5) <= REGION
    await rig.target.message(["Hydration_Rate", str(40 * REGION)])
    assert 36 * REGION <= await copied_after(rig, 1) <= 44 * REGION
    await rig.target.message(["hydration_rate", "0"])
    await settle(3000)
    assert await rig.hydrated() == "256/256"
    await rig.stop()


async def test_holes_cost_nothing() -> None:
    rig = Rig(
        size=100 * K64,
        words="8 0 2 hydration_rate 1",
        content=bytes(99 * K64) + b"x" * K64,
    )
    await rig.start()
    await settle(300)
    assert await rig.hydrated() == "1585/1600"
    await rig.stop()


async def test_holes_cost_what_they_write_where_zeroes_are_written() -> None:
    rig = Rig(
        size=64 << 20,
        words=f"2048 0 2 hydration_rate {4 << 20}",
        content=bytes(64 << 20),
    )
    rig.destination.can_write_zeroes = False
    await rig.start()
    rig.log.clear()
    await copied_after(rig, 4)
    written = sum(n for _, op, _, n in rig.log if op == "write_zeroes")
    assert 14 << 20 <= written <= 18 << 20
    await rig.stop()


async def test_slowest_rate_lets_one_region_go_also_of_written_zeroes() -> None:
    rig = Rig(size=8 << 20, words="8 0 2 hydration_rate 1", content=bytes(8 << 20))
    rig.destination.can_write_zeroes = False
    await rig.start()
    await copied_after(rig, 10)
    assert await rig.hydrated() == "1/2048"
    await rig.stop()


@pytest.mark.parametrize("op", [OP_WRITE, OP_CACHE])
async def test_what_clients_ask_for_is_not_held_back(op: int) -> None:
    rig = await Rig(size=64 * REGION, words="8 0 2 hydration_rate 1").start()
    await settle()
    bios = [rig.bio(op, nr * REGION + 512, 512) for nr in range(32, 64)]
    await settle(600)
    assert all(bio.status == 0 for bio in bios)
    await rig.stop()
