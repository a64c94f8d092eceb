# SPDX-License-Identifier: Apache-2.0
"""Background hydration: what it starts, when, and what it makes of errors."""

import errno as errnos
from collections.abc import Callable

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE, OP_WRITE_ZEROES, PENDING
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.targets.clone.target import CloneTarget
from tests.support.clock import SimClock, SimTimer, settle
from tests.support.clone import REGION, Context, Rig

K64 = 1 << 16


async def pass_time(rig: Rig, seconds: float, step: float = 0.05) -> None:
    for _ in range(round(seconds / step)):
        await settle(20)
        rig.clock.advance(step)
    await settle(20)


async def hydrating(rig: Rig) -> int:
    return int((await rig.target.status(noflush=True)).split()[4])


async def make(words: str, regions: int = 128) -> Rig:
    return await Rig(size=regions * REGION, words=words).start()


async def test_everything_is_copied_and_one_event_says_so() -> None:
    rig = await make("8", 20)
    await settle(400)
    assert await rig.destination.device.read(0, rig.size) == rig.content
    assert await rig.hydrated() == "20/20"
    assert rig.ctx.nr_events == 1
    rig.log.clear()
    await pass_time(rig, 3)
    assert rig.log == []
    await rig.stop()


@pytest.mark.parametrize(
    ("threshold", "batch", "in_flight"),
    [(1, 1, 1), (64, 1, 64), (64, 16, 64), (16, 64, 16), (5, 2, 5), (3, 0, 3)],
)
async def test_threshold_is_kept_as_the_kernel_counts(
    threshold: int, batch: int, in_flight: int
) -> None:
    rig = await make("8 1 no_hydration")
    rig.source.hold = True
    await rig.target.message(["hydration_threshold", str(threshold)])
    await rig.target.message(["hydration_batch_size", str(batch)])
    await rig.target.message(["enable_hydration"])
    await settle(300)
    assert await hydrating(rig) in (in_flight, in_flight - in_flight % max(batch, 1))
    rig.source.let_go()
    await settle(1000)
    assert await rig.hydrated() == "128/128"
    await rig.stop()


async def test_clients_own_copies_count_against_the_threshold() -> None:
    # I7: background <= threshold - foreground
    rig = await make("8 1 no_hydration 2 hydration_threshold 4")
    rig.source.hold = True
    for nr in range(3):
        rig.bio(OP_WRITE, (100 + nr) * REGION + 512, 512)
    rig.clock.advance(1)
    await rig.target.message(["enable_hydration"])
    await pass_time(rig, 0.1)
    assert await hydrating(rig) == 4
    rig.source.let_go()
    await pass_time(rig, 0.2)
    await rig.stop()


async def test_batches_are_copied_as_one() -> None:
    rig = await make("8 0 4 hydration_threshold 64 hydration_batch_size 16", 64)
    await settle(200)
    reads = [(at, length) for device, op, at, length in rig.log if op == "read"]
    assert sorted(reads) == [(at * 16 * REGION, 16 * REGION) for at in range(4)]
    await rig.stop()


async def test_threshold_0_and_disable_stop_it_and_enable_goes_on() -> None:
    rig = await make("8 0 2 hydration_threshold 0")
    await settle()
    assert rig.log == []
    await rig.target.message(["disable_hydration"])
    await rig.target.message(["hydration_threshold", "8"])
    await settle()
    assert rig.log == []
    await rig.target.message(["enable_hydration"])
    await settle(600)
    assert await rig.hydrated() == "128/128"
    await rig.stop()


async def test_client_write_waits_for_the_copy_of_its_region() -> None:
    rig = await make("8", 4)
    rig.destination.hold = True
    await settle()
    assert rig.destination.held[0].offset == 0
    write = rig.bio(OP_WRITE, 512, 512)
    elsewhere = rig.bio(OP_READ, 0, REGION)
    assert write.status == PENDING
    assert elsewhere.status == 0
    assert elsewhere.payload is not None
    assert bytes(elsewhere.payload) == rig.content[:REGION]
    rig.destination.let_go()
    await pass_time(rig, 1)
    want = rig.content[:512] + b"w" * 512 + rig.content[1024:]
    assert await rig.destination.device.read(0, rig.size) == want
    await rig.stop()


async def test_hydration_skips_regions_that_clients_work_on() -> None:
    rig = await make("8 1 no_hydration 2 hydration_threshold 64", 8)
    rig.source.hold = True
    rig.bio(OP_WRITE, 3 * REGION + 512, 512)
    held = rig.source.held[:]
    rig.source.held.clear()
    rig.source.let_go()
    rig.clock.advance(1)
    await rig.target.message(["enable_hydration"])
    await pass_time(rig, 1)
    assert await rig.hydrated() == "7/8"
    for bio in held:
        rig.source.device.submit(bio)
    await pass_time(rig, 1)
    assert await rig.hydrated() == "8/8"
    await rig.stop()


async def test_source_that_keeps_clients_apart_is_copied_at_full_speed() -> None:
    rig = await make("8 0 4 hydration_threshold 64 hydration_batch_size 4")
    rig.source.has_lanes = True
    rig.source.hold = True
    await settle()
    most = 0
    for _ in range(20):
        rig.bio(OP_READ, 100 * REGION, 512)
        await settle(3)
        rig.clock.advance(0.002)
        most = max(most, await hydrating(rig))
    assert most == 64
    rig.source.let_go()
    await pass_time(rig, 1)
    assert await rig.hydrated() == "128/128"
    await rig.stop()


async def test_clients_get_most_of_the_time_and_hydration_goes_on() -> None:
    rig = await make("8 0 4 hydration_threshold 64 hydration_batch_size 4")
    rig.source.hold = True
    await settle()
    rig.source.let_go()
    at_once = []
    for _ in range(200):
        rig.bio(OP_READ, 100 * REGION, 512)
        at_once.append(await hydrating(rig))
        await settle(3)
        rig.clock.advance(0.002)
    await settle()
    assert max(at_once[10:]) <= 4
    assert await rig.hydrated() == "128/128"
    await rig.stop()


# Holes


async def test_holes_become_zeroes_without_being_read() -> None:
    content = b"a" * K64 + bytes(20 * K64) + b"b" * K64
    rig = Rig(
        size=len(content),
        words="8 0 4 hydration_threshold 64 hydration_batch_size 16",
        content=content,
    )
    await rig.destination.device.write(0, b"garbage!" * (rig.size // 8))
    await rig.start()
    await settle(300)
    assert await rig.destination.device.read(0, rig.size) == content
    zeroes = [(at, n) for d, op, at, n in rig.log if op == "write_zeroes"]
    assert zeroes == [(K64, 20 * K64)]
    assert sum(n for d, op, _, n in rig.log if (d, op) == ("s", "read")) == 2 * K64
    await rig.stop()


async def test_zero_part_of_a_region_is_not_copied() -> None:
    content = b"a" * K64 + bytes(3 * K64)
    rig = await Rig(size=4 * K64, words="512", content=content).start()
    await rig.destination.device.write(0, b"garbage!" * (rig.size // 8))
    await settle(100)
    assert await rig.destination.device.read(0, rig.size) == content
    assert [e for e in rig.log if e[0] != "m"][:3] == [
        ("s", "read", 0, K64),
        ("d", "write", 0, K64),
        ("d", "write_zeroes", K64, 3 * K64),
    ]
    await rig.stop()


async def test_destination_that_must_write_its_zeroes_gets_them_in_pieces() -> None:
    rig = Rig(size=64 << 20, words="8", content=bytes(64 << 20))
    rig.destination.can_write_zeroes = False
    await rig.start()
    await settle(300)
    zeroes = [n for d, op, at, n in rig.log if op == "write_zeroes"]
    assert zeroes == [4 << 20] * 16
    await rig.stop()


async def test_a_terabyte_of_hole_is_hydrated_in_few_steps() -> None:
    size = 1 << 40
    devices = {
        "d": MemoryDevice(size),
        "s": MemoryDevice(size),
    }
    ctx = Context({**devices}, size, SimClock())
    await devices["s"].write((5 << 37) + 4096, b"data" * 1024)
    target = await CloneTarget.ctr(ctx, ["new", "d", "s", "8"])
    target.resume()
    for _ in range(3000):
        await settle(10)
        if target._is_hydrated:
            break
    assert target._is_hydrated
    assert await devices["d"].read((5 << 37) + 4096, 4096) == b"data" * 1024
    assert devices["d"].nr_chunks == 1
    target.presuspend()
    await target.postsuspend()
    await target.dtr()


# Errors


async def test_bad_sector_costs_its_own_region_only() -> None:
    rig = Rig(
        size=64 * REGION,
        words="8 0 4 hydration_threshold 16 hydration_batch_size 16",
    )
    bad = 21 * REGION + 1024
    rig.source.fails = lambda bio: (
        errnos.EIO if bio.offset <= bad < bio.offset + bio.length else 0
    )
    await rig.start()
    await settle(400)
    assert await rig.hydrated() == "63/64"
    assert rig.ctx.nr_events == 1
    assert await hydrating(rig) == 0
    # Tried again, ever more seldom, and never in a hot loop; told once.
    rig.log.clear()
    await pass_time(rig, 20)
    retries = [e for e in rig.log if e[:2] == ("s", "read")]
    assert 2 <= len(retries) <= 6
    assert rig.ctx.nr_events == 1
    assert rig.bio(OP_WRITE, 21 * REGION, 512).status == errnos.EIO
    assert rig.bio(OP_READ, 21 * REGION, REGION).status == errnos.EIO
    rig.source.fails = lambda bio: 0
    await pass_time(rig, 40)
    assert await rig.hydrated() == "64/64"
    assert rig.ctx.nr_events == 2
    await rig.stop()


async def test_overwrite_of_a_bad_region_heals_it() -> None:
    rig = Rig(size=4 * REGION, words="8")
    rig.source.fails = lambda bio: errnos.EIO if bio.offset == REGION else 0
    await rig.start()
    await settle(100)
    assert await rig.hydrated() == "3/4"
    assert rig.bio(OP_WRITE, REGION, REGION).status == 0
    await pass_time(rig, 3)
    assert await rig.hydrated() == "4/4"
    await rig.stop()


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_dead_device_is_tried_less_and_less_often(side: str) -> None:
    rig = Rig(
        size=512 * REGION,
        words="8 0 4 hydration_threshold 16 hydration_batch_size 4",
    )
    device = rig.source if side == "source" else rig.destination
    device.fails = lambda bio: errnos.EIO
    await rig.start()
    await settle(3000)
    assert len(rig.log) < 2000
    rig.log.clear()
    await settle(500)
    assert rig.log == []
    await pass_time(rig, 10)
    assert len(rig.log) < 2000
    device.fails = lambda bio: 0
    await pass_time(rig, 60)
    assert await rig.hydrated() == "512/512"
    assert await rig.destination.device.read(0, rig.size) == rig.content
    await rig.stop()


async def test_failed_zeroes_are_tried_by_halves() -> None:
    rig = Rig(size=64 * REGION, words="8", content=bytes(64 * REGION))
    bad = 33 * REGION
    rig.destination.fails = lambda bio: (
        errnos.EIO if bio.offset <= bad < bio.offset + bio.length else 0
    )
    await rig.start()
    await settle(300)
    assert await rig.hydrated() == "63/64"
    await rig.stop()


async def test_nothing_is_hydrated_after_the_metadata_went_read_only() -> None:
    rig = await make("8 0 2 hydration_threshold 4")
    rig.source.hold = True
    await settle()
    rig.metadata.fails = lambda bio: errnos.EIO
    rig.bio(OP_WRITE, 100 * REGION, REGION)
    flush = rig.flush()
    await settle()
    assert flush.status == errnos.EIO
    rig.source.let_go()
    rig.log.clear()
    await pass_time(rig, 3)
    assert not [e for e in rig.log if e[:2] == ("s", "read")]
    await rig.stop()


class CountingClock(SimClock):
    nr_timers = 0

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> SimTimer:
        self.nr_timers += 1
        return super().call_later(delay_s, callback)


async def test_failed_region_that_a_client_has_overwritten_is_not_waited_for() -> None:
    # Its time to be tried again has come and will never be used: no reason to look for it
    # again and again until the other failed region is due.
    rig = Rig(size=4 * REGION, words="8")
    clock = rig.clock = rig.ctx.clock = CountingClock()
    bad = (REGION, 3 * REGION)
    rig.source.fails = lambda bio: errnos.EIO if bio.offset in bad else 0
    await rig.start()
    await pass_time(rig, 3)
    assert await rig.hydrated() == "2/4"
    rig.bio(OP_WRITE, REGION, REGION)
    await pass_time(rig, 30)
    assert await rig.hydrated() == "3/4"
    before = clock.nr_timers
    for _ in range(50):
        clock.advance(0)
        await settle(10)
    assert clock.nr_timers - before <= 1
    rig.source.fails = lambda _: 0
    await pass_time(rig, 60)
    assert await rig.hydrated() == "4/4"
    await rig.stop()


async def test_dead_source_is_one_line_in_the_log_not_one_a_region(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = Rig(size=128 * REGION, words="8")
    rig.source.fails = lambda bio: errnos.EIO
    await rig.start()
    await pass_time(rig, 4)
    lines = [r.getMessage() for r in caplog.records if "hydration" in r.getMessage()]
    assert len(lines) == 1
    assert rig.ctx.nr_events > 1
    await pass_time(rig, 60)
    lines = [r.getMessage() for r in caplog.records if "hydration" in r.getMessage()]
    assert 1 < len(lines) <= 14
    assert any("more failures" in line for line in lines)
    await rig.stop()


@pytest.mark.parametrize("op", [OP_WRITE, OP_WRITE_ZEROES])
async def test_writes_that_need_a_dead_source_are_logged_once(
    op: int, caplog: pytest.LogCaptureFixture
) -> None:
    rig = await make("8 1 no_hydration", 64)
    rig.source.fails = lambda bio: errnos.EIO
    for nr in range(64):
        bio = rig.bio(op, nr * REGION + 1024, 512)
        await settle()
        assert bio.status == errnos.EIO
    (line,) = [r.getMessage() for r in caplog.records if "write" in r.getMessage()]
    assert line.startswith("c: a client's write needs regions 0 to 0: s: read of ")
    assert line.endswith(": Input/output error")
    await pass_time(rig, 6)
    rig.bio(op, 1024, 512)
    await settle()
    assert "regions 0 to 0 (and 63 more failures): s: read" in caplog.text
    await rig.stop()


async def test_slow_copy_does_not_block_the_start_of_others() -> None:
    rig = await make("8 1 no_hydration 2 hydration_threshold 8", 16)
    rig.bio(OP_READ, 0, 512)
    rig.source.hold = True
    await rig.target.message(["enable_hydration"])
    await settle()
    assert await hydrating(rig) == 1, "a client was here a moment ago"
    await pass_time(rig, 0.1)
    assert await hydrating(rig) == 8
    rig.source.let_go()
    await settle(300)
    assert await rig.hydrated() == "16/16"
    await rig.stop()


async def test_jobs_are_small_while_clients_are_active(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nbdtarget.targets.clone.hydration.BUSY_BYTES_MAX", 2 * REGION)
    words = "8 1 no_hydration 4 hydration_threshold 16 hydration_batch_size 8"
    rig = await make(words, 64)
    rig.source.hold = True
    rig.bio(OP_READ, 0, 512)
    await rig.target.message(["enable_hydration"])
    await settle()
    assert await hydrating(rig) == 2, "a client was here a moment ago"
    rig.source.let_go()
    await settle()
    rig.source.hold = True
    await pass_time(rig, 0.2)
    assert await hydrating(rig) == 10, "a small one, then a whole batch"
    rig.source.let_go()
    await settle(300)
    assert await rig.hydrated() == "64/64"
    await rig.stop()
