# SPDX-License-Identifier: Apache-2.0
"""Checklist 14: the kernel's weaknesses that a cache could have, by number. Ours must not."""

import random

import pytest

from nbdtarget.bio import OP_DISCARD, OP_WRITE, PENDING
from nbdtarget.common.errors import TableError
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle

BUSY = "2 migration_threshold 0"
PASSTHROUGH = f"1 passthrough smq {BUSY}"
A, B = 3, 4  # blocks of the origin


# 1: data before the mapping that vouches for them


async def test_14_1_committed_mapping_never_points_at_lost_data(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(8))
    await lab.pass_time(3)  # committed by time, without a FLUSH
    await lab.cut_power()
    await lab.create(DIRTY_BUSY)
    assert await lab.used() == 8
    for nr in range(8):
        assert await lab.read(nr) == b"w" * BLOCK


async def test_14_1_committed_removal_never_leaves_an_old_origin(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(8))
    await lab.device.flush()
    await lab.message("warm 20")
    await lab.pass_time(3)
    (gone,) = [nr for nr in range(8) if lab.cblock(nr) is None]
    await lab.cut_power()
    await lab.create(DIRTY_BUSY)
    assert lab.cblock(gone) is None
    assert await lab.read(gone) == b"w" * BLOCK


async def test_14_1_block_that_is_recorded_clean_is_on_the_origin(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(4))
    await lab.clean()
    await lab.suspend()
    await lab.cut_power()
    assert [lab.on_disk("o", nr) for nr in range(4)] == [b"w" * BLOCK] * 4


# 2: a whole block with FUA


@pytest.mark.parametrize("mode", ["writeback", "writethrough"])
async def test_14_2_acknowledged_fua_survives_a_crash(lab: CacheLab, mode: str) -> None:
    await lab.create(f"1 {mode} smq {BUSY}")
    await lab.write(A, "1")
    await lab.device.flush()
    await lab.write(A, "2", fua=True)
    await lab.write(B, "3", fua=True)
    await lab.cut_power()
    await lab.create(DIRTY_BUSY)
    assert await lab.read(A) == b"2" * BLOCK
    assert await lab.read(B) == b"3" * BLOCK


# 3: CLEAN_SHUTDOWN after a resume


async def test_14_3_crash_right_after_a_resume_has_no_stale_dirty_bits(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean([A])
    await lab.suspend()
    await lab.resume()
    await lab.write_part(A)
    await lab.device.flush()  # of a write hit: no metadata are committed
    await lab.cut_power()
    await lab.create(DIRTY_BUSY)
    assert await lab.field("dirty") == "1"
    await lab.clean()
    assert lab.on_disk("o", A)[512:1024] == b"p" * 512


# 4: a dirty start is not remembered for ever


async def test_14_4_table_after_a_clean_sync_is_a_clean_start(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean([A])
    await lab.device.discard(8 * BLOCK, BLOCK)
    await lab.cut_power()
    await lab.create(DIRTY_BUSY)
    await lab.device.discard(9 * BLOCK, BLOCK)
    await lab.clean()
    await lab.reload(DIRTY_BUSY)
    assert await lab.field("dirty") == "0"
    assert lab.target._discards.is_discarded(9)
    await lab.reload(PASSTHROUGH)


# 5: old data of other users on the cache device


@pytest.mark.parametrize("what", ["part", "read", "warm"])
async def test_14_5_discarded_block_shows_nothing_of_the_cache_device(
    lab: CacheLab, what: str
) -> None:
    lab.put("c", b"secret!!")
    await lab.create(DIRTY_BUSY)
    await lab.device.discard(A * BLOCK, BLOCK)
    if what == "part":
        await lab.write_part(A)
    elif what == "warm":
        await lab.message(f"warm {A}")
        await lab.pass_time(2)
    for _ in range(6):
        assert b"secret" not in await lab.read(A)
        await lab.pass_time(0.75)
    await lab.clean()
    assert b"secret" not in lab.on_disk("o", A)


# 10: writes that can never be recorded


async def test_14_10_ro_takes_no_write_that_a_crash_would_undo(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean([A])
    await lab.fill([B])
    await lab.device.flush()
    await lab.make_read_only()
    fills = {A: "a", B: "b", 20: "c", 31: "d"}
    taken = {
        nr: lab.submit(OP_WRITE, nr * BLOCK, BLOCK, fill=fill).status == 0
        for nr, fill in fills.items()
    }
    assert taken == {A: False, B: True, 20: True, 31: False}
    await lab.cut_power(kills_only=True)
    # The mappings that a table sees after a check has cleared the flag
    recorded = await lab.unchecked()
    for nr in (B, 20):
        cblock = recorded.maybe_cblock(nr)
        disk, at = ("o", nr) if cblock is None else ("c", cblock)
        assert lab.on_disk(disk, at) == fills[nr].encode() * BLOCK
        assert cblock is None or recorded.dirty[cblock]


# 11 and 12: shrinking


async def test_14_11_shrunken_cache_uses_no_block_that_is_gone(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(8))
    await lab.suspend()
    lab.resize("c", 3 * BLOCK)
    await lab.resume()
    for nr in range(8, 20):
        await lab.write(nr)
        await lab.read(nr)
        await lab.pass_time(1)
    assert await lab.field("cache_blocks") == "3/3"
    assert lab.target._blocks.policy.residency == lab.core.nr_mapped == 3
    assert max(at + length for _, at, length in lab.asked("c")) <= 3 * BLOCK


async def test_14_12_shrinking_after_a_crash_goes_by_what_is_dirty_now(
    lab: CacheLab,
) -> None:
    """On disk the bits are of the last clean sync, which says that nothing is dirty."""
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(8))
    await lab.suspend()
    await lab.resume()
    await lab.write_part(7)
    await lab.device.flush()
    await lab.cut_power()
    lab.resize("c", 4 * BLOCK)
    with pytest.raises(TableError, match="unable to shrink cache"):
        await lab.create(DIRTY_BUSY)
    lab.resize("c", 8 * BLOCK)
    lab.disks["c"]._stable[7 * BLOCK :] = b"7" * BLOCK
    await lab.create(DIRTY_BUSY)
    assert await lab.field("dirty") == "8"


# 13: commits by time


async def test_14_13_idle_device_is_committed_by_time(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.write(A)
    await lab.pass_time(1.5)
    await lab.cut_power()
    await lab.create(DIRTY_BUSY)
    assert await lab.read(A) == b"w" * BLOCK


# 14: needs_check


async def test_14_14_mode_falls_and_a_restart_goes_on_from_the_last_commit(
    lab: CacheLab,
) -> None:
    """The kernel records needs_check, where nothing is in doubt; here no tool is needed."""
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.device.flush()
    await lab.make_read_only()
    assert (await lab.status())[-3:-1] == ["ro", "needs_check"]
    await lab.cut_power()
    await lab.create(DIRTY_BUSY)
    assert (await lab.status())[-3:] == ["rw", "-", ""]
    assert await lab.read(A) == b"w" * BLOCK


# 15: discards and writes at once


@pytest.mark.parametrize("passdown", [True, False])
async def test_14_15_no_discarded_bit_over_fresh_data(
    lab: CacheLab, passdown: bool
) -> None:
    rng = random.Random(7)
    words = "2 writeback no_discard_passdown" if not passdown else "1 writeback"
    await lab.create(f"{words} smq {BUSY}")
    want: dict[int, bytes] = {}
    for step in range(120):
        lab.hold("o", OP_WRITE, OP_DISCARD)
        lab.hold("c", OP_WRITE)
        nr = rng.randrange(12)
        fill = chr(97 + step % 26)
        bios = [
            lab.submit(OP_DISCARD, nr * BLOCK, 2 * BLOCK),
            lab.submit(OP_WRITE, nr * BLOCK, rng.choice((512, BLOCK)), fill=fill),
        ]
        await settle(rng.randrange(4))
        for spy in rng.sample([lab.origin, lab.cache], 2):
            spy.let_go()
        await settle()
        assert [bio.status for bio in bios] == [0, 0]
        want[nr] = fill.encode() * 512
        want.pop(nr + 1, None)
        assert not lab.target._discards.is_discarded(nr)
        if step % 10 == 0:
            await lab.clean()
    for nr, data in want.items():
        assert (await lab.read(nr))[:512] == data
    await lab.clean()
    for nr, data in want.items():
        assert (await lab.read(nr))[:512] == data


async def test_14_15_discard_waits_for_a_write_that_was_sent_while_it_waited(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean([A, B])
    await lab.recreate(PASSTHROUGH)
    lab.metadata.hold = True
    lab.hold("o", OP_WRITE)
    writes = [lab.submit(OP_WRITE, nr * BLOCK, 512, fill="n") for nr in (A, B)]
    await settle()
    discard = lab.submit(OP_DISCARD, A * BLOCK, 2 * BLOCK)
    lab.metadata.let_go()
    await settle()
    assert [bio.op for bio in lab.origin.held] == [OP_WRITE, OP_WRITE]
    assert [bio.status for bio in (*writes, discard)] == [PENDING] * 3
    assert lab.asked("o", "discard") == []
    lab.origin.let_go()
    await settle()
    assert [bio.status for bio in (*writes, discard)] == [0, 0, 0]
    assert lab.asked("o", "write", "discard")[-1][0] == "discard"
