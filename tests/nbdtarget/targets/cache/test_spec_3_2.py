# SPDX-License-Identifier: Apache-2.0
"""Checklist 3.2: when a cache commits, in what order, and what a failed commit leaves.

Where the kernel is advised to do better, ours does: both devices are flushed before a commit, and
a change is committed within a second, whether anybody waits for it or not.
"""

import errno as errnos

import pytest

from nbdtarget.bio import FUA, OP_FLUSH, OP_READ, OP_WRITE, PENDING
from nbdtarget.common.errors import TableError
from nbdtarget_metadata.cache.superblock import PolicyIdentity
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle

BUSY = "2 migration_threshold 0"
PASSTHROUGH = f"1 passthrough smq {BUSY}"
WRITETHROUGH = f"1 writethrough smq {BUSY}"
A, B = 3, 4  # blocks of the origin


def flushes_then_superblock(ops: list[str]) -> bool:
    """Whether all flushes of data come before the last write of metadata."""
    last = len(ops) - 1 - ops[::-1].index("m write")
    return all(at < last for at, op in enumerate(ops) if op in ("c flush", "o flush"))


# When


async def test_3_2_flush_with_a_change_is_one_commit_and_no_second_flush(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.write(A)
    lab.log.clear()
    await lab.device.flush()
    ops = lab.ops()
    assert (ops.count("c flush"), ops.count("o flush")) == (1, 1)
    assert flushes_then_superblock(ops)
    assert (await lab.recorded()).maybe_cblock(A) == 0


async def test_3_2_flush_without_a_change_flushes_both_devices_only(
    lab: CacheLab,
) -> None:
    """A write hit is no change of the metadata."""
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.device.flush()
    await lab.write_part(A)
    await lab.write_part(B)
    lab.log.clear()
    await lab.device.flush()
    assert sorted(lab.ops()) == ["c flush", "o flush"]


@pytest.mark.parametrize("disk", ["c", "o"])
async def test_3_2_flush_fails_if_one_device_cannot_be_flushed(
    lab: CacheLab, disk: str
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.write_part(A)
    await lab.write(B)
    lab.fail(disk, OP_FLUSH)
    flush = lab.flush()
    await settle()
    assert flush.status == errnos.EIO


async def test_3_2_fua_miss_needs_no_commit(lab: CacheLab) -> None:
    await lab.create("0 cleaner 0")
    assert lab.submit(OP_WRITE, A * BLOCK, 512, FUA).status == 0
    assert ("write", A * BLOCK, 512, FUA) in lab.disks["o"].trace
    assert lab.asked("m") == []


async def test_3_2_demotion_ends_after_the_commit_of_its_removal(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(8))
    lab.hold("m")
    await lab.message("warm 20")
    await lab.pass_time(0.25)
    assert (await lab.used(), await lab.field("demotions")) == (8, "0")
    lab.metadata.let_go()
    await lab.pass_time(0.25)
    assert int(await lab.field("demotions")) > 0


async def test_3_2_write_that_waits_for_a_demotion_waits_for_no_second(
    lab: CacheLab,
) -> None:
    """A client may be waiting, so the removal is committed at once, and not with the next second."""
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(8))
    lab.hold("m")
    await lab.message("warm 20")
    await settle()
    (gone,) = [nr for nr in range(8) if lab.cblock(nr) is None]
    write = lab.submit(OP_WRITE, gone * BLOCK, 512)
    await settle()
    assert write.status == PENDING
    lab.metadata.let_go()
    await settle()
    assert write.status == 0


async def test_3_2_status_commits(lab: CacheLab) -> None:
    """The kernel does so even if nothing has changed; then there is nothing to be gained."""
    await lab.create(DIRTY_BUSY)
    await lab.write(A)
    lab.log.clear()
    await lab.status(noflush=False)
    recorded = await lab.recorded()
    assert (recorded.maybe_cblock(A), recorded.is_recorded_clean) == (0, False)
    lab.log.clear()
    await lab.status(noflush=False)
    assert lab.log == []


@pytest.mark.parametrize("why", ["noflush", "suspended", "ro", "fail"])
async def test_3_2_status_does_not_commit_when(lab: CacheLab, why: str) -> None:
    await lab.create(DIRTY_BUSY)
    if why in ("ro", "fail"):
        await lab.make_read_only()
    else:
        await lab.write(A)
    if why == "fail":
        lab.target._broken(AssertionError("a bug"))
    if why == "suspended":
        await lab.suspend()
    lab.log.clear()
    await lab.status(noflush=why == "noflush")
    assert lab.log == []


async def test_3_2_time_commits_a_second_after_a_change_and_never_idly(
    lab: CacheLab,
) -> None:
    """The kernel's documentation says so, its code waits until somebody asks."""
    await lab.create(DIRTY_BUSY)
    await lab.write(A)
    assert (await lab.recorded()).nr_mapped == 0
    await lab.pass_time(1.25)
    assert (await lab.recorded()).maybe_cblock(A) == 0
    lab.log.clear()
    await lab.pass_time(30, step=1)
    assert lab.asked("m") == []


async def test_3_2_promotion_waits_for_no_commit(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    lab.hold("m")
    assert lab.submit(OP_WRITE, A * BLOCK, BLOCK).status == 0
    await lab.message(f"warm {B}")
    await settle()
    assert await lab.field("promotions") == "2"


async def test_3_2_one_commit_serves_all_that_wait_when_it_starts(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A, B])
    lab.log.clear()
    bios = [lab.flush() for _ in range(20)]
    bios += [lab.submit(OP_WRITE, A * BLOCK, 512, FUA) for _ in range(20)]
    await settle()
    assert {bio.status for bio in bios} == {0}
    assert lab.ops().count("m flush") <= 2


# In what order


async def test_3_2_mapping_is_committed_after_the_flush_of_its_data(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.write(A)
    lab.log.clear()
    lab.hold("c", OP_FLUSH)
    await lab.pass_time(2)
    assert (await lab.recorded()).nr_mapped == 0
    lab.cache.let_go()
    await settle()
    assert (await lab.recorded()).maybe_cblock(A) == 0


async def test_3_2_removal_is_committed_after_the_flush_of_the_origin(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(8))
    await lab.clean()
    await lab.device.flush()
    lab.hold("o", OP_FLUSH)
    await lab.message("warm 20")
    await lab.pass_time(2)
    assert (await lab.recorded()).nr_mapped == 8
    lab.origin.let_go()
    await settle()
    assert (await lab.recorded()).nr_mapped == 7


async def test_3_2_full_sync_records_all_after_both_flushes(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.fill_clean([B])
    await lab.write_part(A)
    await lab.device.discard(8 * BLOCK, BLOCK)
    await lab.device.read(20 * BLOCK, 512)
    lab.log.clear()
    await lab.suspend()
    assert flushes_then_superblock(lab.ops())
    recorded = await lab.recorded()
    assert recorded.is_recorded_clean
    assert list(recorded.dirty.search(1)) == [lab.cblock(A)]
    assert recorded.statistics == lab.core.statistics
    assert recorded.discarded is not None
    assert list(recorded.discarded.bits.search(1)) == [8]
    mappings = recorded.mappings(PolicyIdentity("smq", (2, 0, 0), 4))
    hints = {mapping.oblock: mapping.hint for mapping in mappings}
    assert hints.keys() == {A, B}
    assert None not in hints.values()


async def test_3_2_full_sync_of_a_removed_table(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.remove()
    recorded = await lab.recorded()
    assert (recorded.is_recorded_clean, recorded.nr_dirty) == (True, 1)


@pytest.mark.parametrize("disk", ["c", "o", "m"])
async def test_3_2_failed_full_sync_does_not_say_clean(
    lab: CacheLab, disk: str
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.device.flush()
    await lab.write_part(20)  # it goes to the origin
    lab.spies[disk].fails = lambda bio: (
        errnos.EIO
        if bio.op == (OP_WRITE if disk == "m" else OP_FLUSH) and bio.op != OP_READ
        else 0
    )
    await lab.suspend()
    if disk == "m":
        assert not (await lab.recorded()).is_recorded_clean
    else:
        recorded = await lab.recorded()
        assert not recorded.is_recorded_clean
        assert not recorded.needs_check


# Failure


async def test_3_2_failed_commit_is_ro_and_the_disk_has_the_commit_before(
    lab: CacheLab,
) -> None:
    """needs_check is shown, as by the kernel, but nothing on the disk is in doubt."""
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.device.flush()
    events = lab.device.event_nr
    await lab.make_read_only()
    status = await lab.status()
    assert status[-3:] == ["ro", "needs_check", ""]
    assert lab.device.event_nr > events
    await lab.cut_power()
    await lab.create(DIRTY_BUSY)
    assert (await lab.status())[-3:] == ["rw", "-", ""]
    assert await lab.read(A) == b"w" * BLOCK


async def test_3_2_metadata_device_that_fails_all_writes_is_ro_and_serves_reads(
    lab: CacheLab,
) -> None:
    """The kernel does the same, with the flag in core only."""
    await lab.create(DIRTY_BUSY)
    await lab.write(A)
    lab.fail("m", OP_WRITE)
    flush = lab.flush()
    await settle()
    assert flush.status == errnos.EIO
    for noflush in (False, True):
        assert (await lab.status(noflush=noflush))[-3:-1] == ["ro", "needs_check"]
    assert await lab.read(A) == b"w" * BLOCK


@pytest.mark.parametrize("disk", ["c", "o"])
async def test_3_2_failed_flush_of_a_data_device_is_no_damage_of_the_metadata(
    lab: CacheLab, disk: str
) -> None:
    """No superblock was written: the metadata on disk are the last commit, and a new table goes on."""
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.device.flush()
    before = (await lab.recorded()).generation
    await lab.write(B)
    await lab.write_part(20)  # it goes to the origin
    lab.fail(disk, OP_FLUSH)
    flush = lab.flush()
    await settle()
    assert flush.status == errnos.EIO
    assert (await lab.status())[-3:-1] == ["ro", "-"]
    assert (await lab.recorded()).generation == before
    lab.fail(disk)
    later = lab.flush()
    await settle()
    assert later.status == errnos.EIO, "what was lost may be lost for good"
    losses = lab.device.losses
    await lab.reload(DIRTY_BUSY)
    assert (await lab.status())[-3:] == ["rw", "-", ""]
    assert await lab.read(A) == b"w" * BLOCK
    assert lab.device.losses > losses, "each connection tells of it"
    await lab.write(B)
    flush = lab.flush()
    await settle()
    assert flush.status == 0


async def test_3_2_origin_that_nothing_was_written_to_needs_no_flush(
    lab: CacheLab,
) -> None:
    """An idle cache whose origin goes away has nothing to lose, and its end is a clean one."""
    await lab.create("1 writethrough smq 0")
    await lab.write(A)
    await lab.device.flush()
    lab.fail("o", OP_FLUSH, OP_WRITE, OP_READ)
    flush = lab.flush()
    await settle()
    assert flush.status == 0
    await lab.remove()
    assert (await lab.recorded()).is_recorded_clean
    lab.fail("o")
    await lab.create("1 writethrough smq 0")
    assert await lab.read(A) == b"w" * BLOCK


async def test_3_2_written_back_block_needs_the_flush_of_the_origin(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.device.flush()
    await lab.clean()
    lab.fail("o", OP_FLUSH)
    await lab.remove()
    assert not (await lab.recorded()).is_recorded_clean


async def test_3_2_flush_that_began_beside_a_write_is_no_flush_of_that_write(
    lab: CacheLab,
) -> None:
    await lab.create("0 cleaner 0")
    lab.hold("o", OP_WRITE)
    write = lab.submit(OP_WRITE, A * BLOCK, 512)
    flush = lab.flush()
    await settle()
    assert flush.status == 0
    lab.origin.let_go()
    await settle()
    assert write.status == 0
    lab.fail("o", OP_FLUSH)
    later = lab.flush()
    await settle()
    assert later.status == errnos.EIO


@pytest.mark.parametrize("length", [512, BLOCK, 2 * BLOCK])
@pytest.mark.parametrize("offset", [4 * BLOCK, 31 * BLOCK, 32 * BLOCK - 512])
@pytest.mark.parametrize("mode", ["writethrough", "writeback", "passthrough"])
async def test_3_2_any_write_that_reached_the_origin_needs_its_flush(
    mode: str, offset: int, length: int
) -> None:
    lab = CacheLab(tail=3 * 512)
    length = min(length, lab.length - offset)
    await lab.create(f"1 {mode} cleaner 0")
    if mode != "passthrough":
        await lab.message("warm 4")
        await lab.pass_time(1)
    await lab.device.flush()
    lab.log.clear()
    await lab.device.write(offset, b"n" * length)
    has_reached_it = bool(lab.asked("o", "write"))
    lab.fail("o", OP_FLUSH)
    flush = lab.flush()
    await settle()
    assert flush.status == (errnos.EIO if has_reached_it else 0)
    await lab.close()


async def test_3_2_waiting_flush_fails_and_so_does_every_later_one(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.write(A)
    lab.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_FLUSH else 0
    waiting = [lab.flush(), lab.submit(OP_WRITE, A * BLOCK, 512, FUA)]
    await settle()
    assert [bio.status for bio in waiting] == [errnos.EIO] * 2
    assert ("write", 0, 512, FUA) not in lab.disks["c"].trace
    lab.fail("m")
    lab.log.clear()
    later = [lab.flush(), lab.submit(OP_WRITE, A * BLOCK, 512, FUA)]
    await settle()
    assert [bio.status for bio in later] == [errnos.EIO] * 2
    assert lab.log == [], "they are not sent down"


async def test_3_2_only_a_new_table_returns_to_rw(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.make_read_only()
    await lab.suspend()
    await lab.resume()
    assert (await lab.status())[-3] == "ro"
    await lab.reload(DIRTY_BUSY)
    assert (await lab.status())[-3:] == ["rw", "-", ""]


async def test_3_2_fail_is_never_left(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    lab.target._broken(AssertionError("a bug"))
    await lab.suspend()
    await lab.resume()
    assert await lab.status() == ["Fail"]


# RO


async def test_3_2_ro_promotes_and_demotes_nothing(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.device.flush()
    await lab.make_read_only()
    lab.log.clear()
    for _ in range(6):
        await lab.read(B)
        lab.submit(OP_WRITE, 20 * BLOCK, BLOCK)
        await lab.pass_time(1)
    fields = await lab.fields()
    assert fields["cache_blocks"].startswith("2/")
    assert lab.asked("c", "write") == []
    assert lab.asked("m", "write") == []
    assert lab.on_disk("o", 20) == b"w" * BLOCK, "a miss may be written"


async def test_3_2_ro_flush_and_fua_fail_changed_or_not(lab: CacheLab) -> None:
    """In the kernel they fail only if something was uncommitted. Here no further promise is made."""
    await lab.create(DIRTY_BUSY)
    await lab.make_read_only()
    bios = [lab.flush(), lab.submit(OP_WRITE, B * BLOCK, 512, FUA)]
    await settle()
    assert [bio.status for bio in bios] == [errnos.EIO] * 2


async def test_3_2_ro_writes_where_nothing_need_be_recorded(lab: CacheLab) -> None:
    """The kernel takes all writes in this mode (weakness 10)."""
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean([A])
    await lab.fill([B])
    await lab.device.flush()
    await lab.make_read_only(oblock=31)
    statuses = {
        what: lab.submit(OP_WRITE, nr * BLOCK, 512, fill="n").status
        for what, nr in {
            "clean": A,
            "dirty, recorded": B,
            "dirty, not recorded": 31,
            "not cached": 20,
        }.items()
    }
    assert statuses == {
        "clean": errnos.EIO,
        "dirty, recorded": 0,
        "dirty, not recorded": errnos.EIO,
        "not cached": 0,
    }


@pytest.mark.parametrize("mode", ["ro", "fail"])
@pytest.mark.parametrize("words", ["migration_threshold 64", "nonsense", "clean_now"])
async def test_3_2_ro_and_fail_take_no_messages(
    lab: CacheLab, mode: str, words: str
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.make_read_only()
    if mode == "fail":
        lab.target._broken(AssertionError("a bug"))
    with pytest.raises(TableError) as caught:
        await lab.message(words)
    assert caught.value.errno == errnos.EOPNOTSUPP
    text = "unable to service cache target messages in READ_ONLY or FAIL mode"
    assert str(caught.value) == text


# Events


async def test_3_2_event_when_nothing_is_dirty_any_more(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A, B])
    events = lab.device.event_nr
    await lab.clean()
    assert lab.device.event_nr == events + 1


async def test_3_2_fua_of_an_overwrite_ends_after_the_commit(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    lab.hold("m")
    write = lab.submit(OP_WRITE, A * BLOCK, BLOCK, FUA)
    await settle()
    assert write.status == PENDING
    lab.metadata.let_go()
    await settle()
    assert write.status == 0
    await lab.cut_power()
    await lab.create(DIRTY_BUSY)
    assert await lab.read(A) == b"w" * BLOCK
