# SPDX-License-Identifier: Apache-2.0
"""Checklist 2.2: where a cache sends what clients ask for, row by row.

The kernel's core cuts reads and writes at block borders; ours does not, the target does. What a
client sees, and what is counted, is the same.
"""

import errno as errnos

import pytest

from nbdtarget.bio import FUA, OP_DISCARD, OP_READ, OP_WRITE, PENDING
from nbdtarget.common.errors import DeviceError
from nbdtarget.dm.mapped_device import State
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle

BUSY = "2 migration_threshold 0"
WRITETHROUGH = f"1 writethrough smq {BUSY}"
PASSTHROUGH = f"1 passthrough smq {BUSY}"
A, B = 3, 4  # blocks of the origin


async def give_clean(lab: CacheLab, words: str, *oblocks: int) -> None:
    """A table that has these blocks cached and clean."""
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(oblocks)
    await lab.recreate(words)


# 2.2.1 locks


async def test_2_2_1_read_passes_a_block_that_is_copied_a_write_waits(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    lab.origin.hold = True
    await lab.message("clean_now")
    await settle()
    assert lab.origin.held, "the writeback is under way"
    read = lab.submit(OP_READ, A * BLOCK, 512)
    write = lab.submit(OP_WRITE, A * BLOCK, 512, fill="n")
    assert (read.status, write.status) == (0, PENDING)
    lab.origin.let_go()
    await settle()
    assert write.status == 0
    assert (await lab.read(A))[:513] == b"n" * 512 + b"w"


async def test_2_2_1_read_waits_only_while_a_cblock_becomes_another_ones(
    lab: CacheLab,
) -> None:
    """Level 1: a demotion's reads go on until its removal is durable, the last is waited for."""
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(8))
    lab.hold("c", OP_READ)
    reads = [lab.submit(OP_READ, nr * BLOCK, 512) for nr in range(8)]
    lab.hold("m")
    await lab.message("warm 20")
    await lab.pass_time(0.1)
    (gone,) = [nr for nr in range(8) if lab.cblock(nr) is None]
    early = lab.submit(OP_READ, gone * BLOCK, 512)
    assert len(lab.cache.held) == 9, "it is read from the cache as long as it is there"
    lab.metadata.let_go()
    await lab.pass_time(0.1)
    assert (await lab.recorded()).maybe_cblock(gone) is None
    assert await lab.field("demotions") == "0", "not while somebody reads it"
    late = lab.submit(OP_READ, gone * BLOCK, 512)
    assert (len(lab.cache.held), late.status) == (9, PENDING)
    lab.cache.let_go()
    await lab.pass_time(0.1)
    assert [read.status for read in (*reads, early, late)] == [0] * 10
    assert await lab.field("demotions") == "1"
    assert lab.cblock(20) is not None


async def test_2_2_1_lock_waits_for_the_writes_that_were_there_before(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    lab.log.clear()
    lab.cache.hold = True
    write = lab.submit(OP_WRITE, A * BLOCK, 512)
    await lab.message("clean_now")
    await settle()
    assert (write.status, lab.asked("c", "read")) == (PENDING, [])
    lab.cache.let_go()
    await lab.pass_time(1)
    assert lab.asked("c", "read") == [("read", 0, BLOCK)]
    assert lab.on_disk("o", A) == b"w" * BLOCK


async def test_2_2_1_admitted_reads_do_not_starve_a_migration(lab: CacheLab) -> None:
    """In the kernel they can: its quiesce waits for reads that are still admitted."""
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    lab.origin.hold = True
    await lab.message("clean_now")
    await settle()
    lab.cache.hold = True
    reads = [lab.submit(OP_READ, A * BLOCK, 512) for _ in range(20)]
    lab.origin.let_go()
    await settle()
    assert await lab.field("dirty") == "0", "while 20 reads are under way"
    assert {read.status for read in reads} == {PENDING}
    lab.cache.let_go()


async def test_2_2_1_parked_bios_run_from_the_beginning(lab: CacheLab) -> None:
    """Parked bios look their block up again when they run: here it is no longer cached."""
    await give_clean(lab, PASSTHROUGH, A)
    lab.metadata.hold = True
    first = lab.submit(OP_WRITE, A * BLOCK, 512, fill="1")
    parked = lab.submit(OP_WRITE, A * BLOCK, 512, fill="2")
    await settle()
    assert (first.status, parked.status) == (PENDING, PENDING)
    lab.metadata.let_go()
    await settle()
    assert (first.status, parked.status) == (0, 0)
    fields = await lab.fields()
    assert (fields["write_hits"], fields["write_misses"]) == ("1", "1")
    assert lab.on_disk("o", A)[:512] == b"2" * 512


# 2.2.2 dispatch


@pytest.mark.parametrize("words", ["0 smq 0", WRITETHROUGH, PASSTHROUGH])
async def test_2_2_2_tail_block_goes_straight_to_the_origin(words: str) -> None:
    lab = CacheLab(nr_oblocks=4, tail=1024)
    await lab.create(f"2 no_discard_passdown {words[2:]}" if words[0] == "1" else words)
    lab.log.clear()
    for _ in range(4):
        await lab.device.write(4 * BLOCK, b"t" * 1024)
        await lab.device.read(4 * BLOCK, 1024)
    await lab.device.write(4 * BLOCK, b"u" * 512, fua=True)
    await lab.device.discard(4 * BLOCK, 1024)
    assert [op for op, *_ in lab.asked("o")] == ["write", "read"] * 4 + [
        "write",
        "discard",
    ]
    fields = await lab.fields()
    assert [fields[name] for name in ("read_misses", "write_misses")] == ["0", "0"]
    assert await lab.used() == 0
    await lab.close()


async def test_2_2_2_write_into_the_tail_is_cut_where_it_begins() -> None:
    lab = CacheLab(nr_oblocks=4, tail=1024)
    await lab.create(DIRTY_BUSY)
    await lab.device.write(3 * BLOCK, b"x" * (BLOCK + 1024))
    assert (lab.cblock(3), await lab.used()) == (0, 1)
    assert lab.asked("o", "write") == [("write", 4 * BLOCK, 1024)]
    assert await lab.device.read(3 * BLOCK, BLOCK + 1024) == b"x" * (BLOCK + 1024)
    await lab.close()


async def test_2_2_2_ro_serves_reads_and_fail_serves_nothing(lab: CacheLab) -> None:
    """The kernel goes on in Fail as in ro, though its documentation says that it does not."""
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.device.flush()
    await lab.make_read_only()
    assert (await lab.status())[-3:] == ["ro", "needs_check", ""]
    assert await lab.read(A) == b"w" * BLOCK
    assert await lab.read(B) == bytes(BLOCK)
    lab.target._broken(AssertionError("a bug"))
    assert await lab.status() == ["Fail"]
    for op in (OP_READ, OP_WRITE, OP_DISCARD):
        assert lab.submit(op, A * BLOCK, 512).status == errnos.EIO
    assert lab.flush().status == errnos.EIO


# 2.2.3 the table


async def test_2_2_3_any_mode_miss_goes_to_the_origin_and_is_counted(
    lab: CacheLab,
) -> None:
    for words in ("0 cleaner 0", WRITETHROUGH, PASSTHROUGH):
        await lab.create(words)
        before = await lab.fields()
        await lab.device.read(A * BLOCK, 512)
        await lab.device.write(A * BLOCK, b"x" * 512)
        assert lab.asked("o") == [
            ("read", A * BLOCK, 512),
            ("write", A * BLOCK, 512),
        ]
        assert lab.asked("c") == []
        after = await lab.fields()
        for name in ("read_misses", "write_misses"):
            assert int(after[name]) == int(before[name]) + 1
        await lab.remove()


async def test_2_2_3_miss_is_promoted_later_if_the_policy_wants(lab: CacheLab) -> None:
    lab.put("o", bytes(range(256)))
    await lab.create(WRITETHROUGH)
    await lab.warm(A)
    fields = await lab.fields()
    assert (fields["promotions"], fields["dirty"]) == ("1", "0")
    assert lab.on_disk("c", 0) == lab.on_disk("o", A)


async def test_2_2_3_writeback_whole_block_is_promoted_without_a_copy(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.write(A)
    assert [entry for entry in lab.log if entry[0] != "m"] == [("c", "write", 0, BLOCK)]
    fields = await lab.fields()
    assert (fields["promotions"], fields["dirty"]) == ("1", "1")
    assert (fields["write_hits"], fields["write_misses"]) == ("0", "0")


async def test_2_2_3_writeback_part_of_a_discarded_block_is_promoted_zero_filled(
    lab: CacheLab,
) -> None:
    """The rest of the block becomes zeroes here. The kernel keeps the old bytes of the cache device there."""
    lab.put("c", b"secret!!")
    await lab.create(DIRTY_BUSY)
    await lab.device.discard(A * BLOCK, 2 * BLOCK)
    await lab.write_part(A)
    assert lab.cblock(A) == 0
    assert await lab.read(A) == bytes(512) + b"p" * 512 + bytes(BLOCK - 1024)
    assert lab.asked("o", "read", "write") == []


async def test_2_2_3_writeback_read_of_a_discarded_block_is_the_origins(
    lab: CacheLab,
) -> None:
    """The kernel may promote the block as it is, so that a read returns old data of another user."""
    lab.put("c", b"secret!!")
    await lab.create(DIRTY_BUSY)
    await lab.device.discard(A * BLOCK, BLOCK)
    assert b"secret" not in await lab.read(A)
    assert lab.asked("c") == []


async def test_2_2_3_writeback_hit(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean([A])
    assert await lab.field("dirty") == "0"
    await lab.write_part(A)
    await lab.device.read(A * BLOCK, 512)
    assert lab.asked("c") == [("write", 512, 512), ("read", 0, 512)]
    assert lab.asked("o") == []
    fields = await lab.fields()
    assert (fields["write_hits"], fields["read_hits"]) == ("1", "1")
    assert fields["dirty"] == "1"


async def test_2_2_3_writethrough_hit_of_a_clean_block(lab: CacheLab) -> None:
    await give_clean(lab, WRITETHROUGH, A)
    await lab.write_part(A)
    data = [entry for entry in lab.log if entry[0] != "m"]
    assert data == [("o", "write", A * BLOCK + 512, 512), ("c", "write", 512, 512)]
    await lab.device.read(A * BLOCK, 512)
    assert lab.log[-1] == ("c", "read", 0, 512)
    fields = await lab.fields()
    assert (fields["write_hits"], fields["read_hits"]) == ("1", "1")
    assert fields["dirty"] == "0"
    assert lab.on_disk("o", A) == lab.on_disk("c", 0)


@pytest.mark.parametrize("first", ["o", "c"])
async def test_2_2_3_writethrough_completes_when_both_have(
    lab: CacheLab, first: str
) -> None:
    await give_clean(lab, WRITETHROUGH, A)
    lab.origin.hold = lab.cache.hold = True
    write = lab.submit(OP_WRITE, A * BLOCK, 512)
    lab.spies[first].let_go()
    assert write.status == PENDING
    lab.origin.let_go()
    lab.cache.let_go()
    assert write.status == 0


@pytest.mark.parametrize("broken", ["o", "c"])
async def test_2_2_3_writethrough_error_of_either_leaves_one_copy_that_counts(
    lab: CacheLab, broken: str
) -> None:
    """The kernel's is the write's error; but what the origin took, the client need not be told of."""
    await give_clean(lab, WRITETHROUGH, A)
    lab.fail(broken, OP_WRITE, errno=errnos.ENOSPC)
    write = lab.submit(OP_WRITE, A * BLOCK, 512, fill="n")
    await settle()
    assert write.status == (errnos.ENOSPC if broken == "o" else 0)
    lab.fail(broken)
    await lab.pass_time(3)
    if broken == "c":
        assert lab.cblock(A) is None
        assert (await lab.read(A))[:512] == b"n" * 512
    else:
        await lab.clean()
        assert (await lab.read(A))[:512] == lab.on_disk("o", A)[:512]


async def test_2_2_3_writethrough_hit_of_a_dirty_block(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.recreate(WRITETHROUGH)
    await lab.write_part(A)
    assert lab.asked("c") == [("write", 512, 512)]
    assert lab.asked("o") == []
    assert await lab.field("dirty") == "1"


async def test_2_2_3_passthrough_read_hit_is_the_origins(lab: CacheLab) -> None:
    await give_clean(lab, PASSTHROUGH, A)
    await lab.device.read(A * BLOCK, 512)
    assert lab.asked("o") == [("read", A * BLOCK, 512)]
    assert lab.asked("c") == []
    assert (await lab.field("read_hits"), await lab.used()) == ("1", 1)


async def test_2_2_3_passthrough_write_hit_gives_the_block_up(lab: CacheLab) -> None:
    await give_clean(lab, PASSTHROUGH, A)
    await lab.write_part(A)
    fields = await lab.fields()
    assert (fields["write_hits"], fields["demotions"]) == ("1", "1")
    assert (lab.cblock(A), await lab.used()) == (None, 0)
    assert lab.asked("o", "write") == [("write", A * BLOCK + 512, 512)]
    assert lab.asked("c", "read", "write") == []


@pytest.mark.parametrize("words", [WRITETHROUGH, PASSTHROUGH])
async def test_2_2_3_nothing_is_optimisable_but_in_writeback(
    lab: CacheLab, words: str
) -> None:
    await lab.create(words)
    await lab.device.discard(A * BLOCK, BLOCK)
    await lab.write(A)
    await lab.device.discard(B * BLOCK, BLOCK)
    await lab.write_part(B)
    assert lab.asked("c", "write") == []
    assert await lab.field("write_misses") == "2"


async def test_2_2_3_passthrough_never_promotes_and_never_wakes_the_migrations(
    lab: CacheLab,
) -> None:
    await lab.create("1 passthrough smq 0")
    for _ in range(20):
        await lab.read(A)
        await lab.write(A)
        await lab.pass_time(0.5)
    assert await lab.used() == 0
    assert await lab.field("promotions") == "0"
    assert lab.asked("c") == []


async def test_2_2_3_second_write_to_a_discarded_block_finds_a_hit(
    lab: CacheLab,
) -> None:
    """The kernel asks anew whether a locked block is still discarded. Here it always is."""
    await lab.create(DIRTY_BUSY)
    await lab.device.discard(A * BLOCK, BLOCK)
    lab.cache.hold = True
    first = lab.submit(OP_WRITE, A * BLOCK, 512, fill="1")
    second = lab.submit(OP_WRITE, A * BLOCK + 512, 512, fill="2")
    lab.cache.let_go()
    await settle()
    assert (first.status, second.status) == (0, 0)
    fields = await lab.fields()
    assert (fields["promotions"], fields["write_hits"]) == ("1", "1")
    assert await lab.read(A) == b"1" * 512 + b"2" * 512 + bytes(BLOCK - 1024)


async def test_2_2_3_failed_overwrite_goes_to_the_origin_and_frees_the_cblock(
    lab: CacheLab,
) -> None:
    """In the kernel the bio fails with the error."""
    await lab.create(DIRTY_BUSY)
    lab.fail("c", OP_WRITE, errno=errnos.ENOSPC)
    await lab.write(A)
    assert (await lab.used(), await lab.field("promotions")) == (0, "0")
    assert lab.on_disk("o", A) == b"w" * BLOCK
    assert await lab.read(A) == b"w" * BLOCK
    lab.fail("c")
    await lab.fill(range(8))


async def test_2_2_3_fua_waits_for_the_commit_of_its_mapping_then_goes_with_fua(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.write(A)
    lab.log.clear()
    lab.metadata.hold = True
    write = lab.submit(OP_WRITE, A * BLOCK, 512, FUA)
    await settle()
    assert write.status == PENDING
    assert lab.asked("c", "write") == []
    lab.metadata.let_go()
    await settle()
    assert write.status == 0
    assert lab.log[-1] == ("c", "write", 0, 512)
    assert ("write", 0, 512, FUA) in lab.disks["c"].trace


async def test_2_2_3_fua_with_nothing_to_commit_goes_at_once(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.device.flush()
    lab.log.clear()
    assert lab.submit(OP_WRITE, A * BLOCK, 512, FUA).status == 0
    assert lab.asked("m") == []


async def test_2_2_3_fua_whose_commit_fails_is_an_error(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.write(A)
    lab.fail("m", OP_WRITE)
    write = lab.submit(OP_WRITE, A * BLOCK, 512, FUA)
    await settle()
    assert write.status == errnos.EIO


async def test_2_2_3_counters_count_blocks_touched_and_no_flush_or_discard(
    lab: CacheLab,
) -> None:
    """The kernel counts bios, which its core has cut at block borders."""
    await lab.create("0 cleaner 0")
    await lab.device.write(A * BLOCK - 512, b"x" * (2 * BLOCK))
    await lab.device.read(A * BLOCK, 2 * BLOCK)
    await lab.device.flush()
    await lab.device.discard(0, 8 * BLOCK)
    fields = await lab.fields()
    assert (fields["write_misses"], fields["read_misses"]) == ("3", "2")
    assert (fields["write_hits"], fields["read_hits"]) == ("0", "0")


async def test_2_2_3_time_passes_with_the_bios_too(lab: CacheLab) -> None:
    """The kernel's tick bio: the second access promotes, without a second having passed."""
    await lab.create(WRITETHROUGH)
    await lab.pass_time(1.5)
    for _ in range(2):
        await lab.device.read(A * BLOCK, 512)
        await settle()
    assert lab.cblock(A) is not None


# 2.2.4 passthrough write hit


async def test_2_2_4_order_is_remove_commit_then_write(lab: CacheLab) -> None:
    await give_clean(lab, PASSTHROUGH, A)
    lab.metadata.hold = True
    write = lab.submit(OP_WRITE, A * BLOCK, 512, fill="n")
    await settle()
    assert lab.asked("o", "write") == []
    assert write.status == PENDING
    lab.metadata.let_go()
    await settle()
    assert write.status == 0
    assert (await lab.recorded()).nr_mapped == 0


async def test_2_2_4_two_writes_to_one_block_at_once(lab: CacheLab) -> None:
    """Busy: the second waits, and is no error; older kernels failed it."""
    await give_clean(lab, PASSTHROUGH, A, B)
    writes = [
        lab.submit(OP_WRITE, at, 512, fill=fill)
        for at, fill in ((A * BLOCK, "1"), (A * BLOCK + 512, "2"), (B * BLOCK, "3"))
    ]
    await settle()
    assert [write.status for write in writes] == [0, 0, 0]
    assert await lab.field("demotions") == "2"
    assert lab.on_disk("o", A)[:1024] == b"1" * 512 + b"2" * 512


async def test_2_2_4_block_that_is_unmapped_meanwhile_is_fine(lab: CacheLab) -> None:
    await give_clean(lab, PASSTHROUGH, A)
    lab.metadata.hold = True
    first = lab.submit(OP_WRITE, A * BLOCK, 512, fill="1")
    second = lab.submit(OP_WRITE, A * BLOCK + 512, 512, fill="2")
    await settle()
    lab.metadata.let_go()
    await lab.message("invalidate_cblocks 0-8")
    await settle()
    assert (first.status, second.status) == (0, 0)


async def test_2_2_4_failed_commit_is_eio_and_the_origin_is_not_written(
    lab: CacheLab,
) -> None:
    await give_clean(lab, PASSTHROUGH, A)
    lab.fail("m", OP_WRITE)
    write = lab.submit(OP_WRITE, A * BLOCK, 512, fill="n")
    await settle()
    assert write.status == errnos.EIO
    assert lab.asked("o", "write") == []
    assert (await lab.status())[0] == "Fail" or (await lab.status())[-3] == "ro"


async def test_2_2_4_write_clears_the_discard_bit_and_has_the_origins_status(
    lab: CacheLab,
) -> None:
    await give_clean(lab, PASSTHROUGH, A)
    await lab.device.discard(A * BLOCK, BLOCK)
    assert lab.target._discards.is_discarded(A)
    lab.fail("o", OP_WRITE, errno=errnos.ENOSPC)
    write = lab.submit(OP_WRITE, A * BLOCK, 512)
    await settle()
    assert write.status == errnos.ENOSPC
    assert not lab.target._discards.is_discarded(A)
    assert not lab.target._locks.locked


# 2.2.5 discards


async def test_2_2_5_whole_dblocks_only_are_marked(lab: CacheLab) -> None:
    await lab.create()
    await lab.device.discard(2 * BLOCK + 512, 3 * BLOCK)
    marked = [nr for nr in range(32) if lab.target._discards.is_discarded(nr)]
    assert marked == [3, 4]


async def test_2_2_5_cached_blocks_stay_cached_and_dirty(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.device.discard(0, 8 * BLOCK)
    assert (lab.cblock(A), await lab.field("dirty")) == (0, "1")
    await lab.device.read(A * BLOCK, 512)
    assert await lab.field("read_hits") == "1"
    assert lab.asked("c", "discard") == []


async def test_2_2_5_whole_discard_goes_to_the_origin_untrimmed(lab: CacheLab) -> None:
    await lab.create()
    await lab.device.discard(512, 3 * BLOCK)
    assert lab.asked("o", "discard") == [("discard", 512, 3 * BLOCK)]


async def test_2_2_5_without_passdown_it_ends_here(lab: CacheLab) -> None:
    await lab.create("1 no_discard_passdown smq 0")
    await lab.device.discard(0, 3 * BLOCK)
    assert lab.asked("o") == lab.asked("c") == []
    assert lab.target._discards.nr_discarded == 3


async def test_2_2_5_discard_waits_for_writes_and_writes_for_it(lab: CacheLab) -> None:
    """In the kernel the user must take care that they do not race."""
    await lab.create("0 cleaner 0")
    lab.origin.hold = True
    write = lab.submit(OP_WRITE, A * BLOCK, 512, fill="1")
    discard = lab.submit(OP_DISCARD, A * BLOCK, BLOCK)
    assert [bio.op for bio in lab.origin.held] == [OP_WRITE]
    lab.origin.let_go()
    lab.origin.hold = True
    later = lab.submit(OP_DISCARD, A * BLOCK, BLOCK)
    after = lab.submit(OP_WRITE, A * BLOCK, 512, fill="2")
    assert [bio.op for bio in lab.origin.held] == [OP_DISCARD]
    lab.origin.let_go()
    assert [bio.status for bio in (write, discard, later, after)] == [0] * 4
    assert lab.on_disk("o", A)[:512] == b"2" * 512
    assert not lab.target._discards.is_discarded(A)


async def test_2_2_5_write_to_any_part_clears_the_whole_dblock() -> None:
    lab = CacheLab(nr_oblocks=32)
    await lab.create("0 cleaner 0")
    await lab.device.discard(0, 8 * BLOCK)
    await lab.write_part(A)
    marked = [nr for nr in range(8) if lab.target._discards.is_discarded(nr)]
    assert marked == [0, 1, 2, 4, 5, 6, 7]
    await lab.close()


async def test_2_2_5_promotion_clears_it_once_it_is_done(lab: CacheLab) -> None:
    """The kernel does so also when it failed. Then nothing has been written, so nothing changes."""
    await lab.create()
    await lab.device.discard(A * BLOCK, BLOCK)
    lab.cache.fails = lambda _: errnos.EIO
    await lab.message(f"warm {A}")
    await lab.pass_time(2)
    assert lab.target._discards.is_discarded(A)
    lab.cache.fails = lambda _: 0
    await lab.message(f"warm {A}")
    await lab.pass_time(2)
    assert lab.cblock(A) is not None
    assert not lab.target._discards.is_discarded(A)


async def test_2_2_5_migrations_of_discarded_blocks_copy_nothing(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.device.discard(A * BLOCK, 2 * BLOCK)
    lab.log.clear()
    await lab.clean()
    await lab.message(f"warm {B}")
    await lab.pass_time(2)
    assert lab.cblock(B) is not None
    assert lab.asked("o", "read", "write") == lab.asked("c", "read") == []
    # The block in the cache is all zeroes, and on the origin it may be anything, so it is dirty.
    assert await lab.field("dirty") == "1"


async def test_2_2_5_io_hints_are_the_block_size(lab: CacheLab) -> None:
    await lab.create("1 no_discard_passdown smq 0")
    limits = lab.device.limits
    assert (limits.io_min, limits.io_opt) == (BLOCK, BLOCK)
    assert limits.discard_granularity == lab.target._discards.dblock_size
    await lab.recreate()
    assert lab.device.limits.discard_granularity <= BLOCK


async def test_2_2_5_passdown_is_off_if_the_origin_takes_no_discards(
    lab: CacheLab, caplog: pytest.LogCaptureFixture
) -> None:
    lab.origin.can_discard = False
    await lab.create()
    assert "no passdown" in caplog.text
    assert "no_discard_passdown" in await lab.status()
    await lab.device.discard(0, BLOCK)
    assert lab.asked("o") == []


async def test_2_2_5_discard_beyond_the_end_is_refused(lab: CacheLab) -> None:
    device = await lab.create()
    with pytest.raises(DeviceError) as caught:
        await device.discard(device.size - BLOCK, 2 * BLOCK)
    assert caught.value.errno in (errnos.EINVAL, errnos.ENOSPC)
    assert lab.asked("o") == []
    assert device.state is State.ACTIVE
