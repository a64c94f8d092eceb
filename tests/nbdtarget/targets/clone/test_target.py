# SPDX-License-Identifier: Apache-2.0
"""Decisions of `map`, with the requests to each device."""

import asyncio
import errno as errnos

import pytest

from nbdtarget.bio import (
    FAST_ZERO,
    FUA,
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    PENDING,
    Bio,
)
from nbdtarget.common.errors import TableError
from nbdtarget.targets.base import KILL, REMAPPED
from tests.support.clock import settle
from tests.support.clone import REGION, Rig


@pytest.fixture
async def rig() -> Rig:
    return await Rig().start()


async def test_read_goes_to_the_source_when_nothing_is_hydrated(rig: Rig) -> None:
    assert await rig.disk.read(100, 3 * REGION) == rig.content[100 : 100 + 3 * REGION]
    assert rig.log == [("s", "read", 100, 3 * REGION)]
    assert await rig.hydrated() == "0/8"


async def test_read_is_cut_into_runs_when_regions_differ(rig: Rig) -> None:
    rig.bio(OP_WRITE, 2 * REGION, 2 * REGION)
    rig.log.clear()
    read = rig.bio(OP_READ, REGION + 8, 4 * REGION)
    assert rig.log == [
        ("s", "read", REGION + 8, REGION - 8),
        ("d", "read", 2 * REGION, 2 * REGION),
        ("s", "read", 4 * REGION, REGION + 8),
    ]
    want = bytearray(rig.content[REGION + 8 : 5 * REGION + 8])
    want[REGION - 8 : 3 * REGION - 8] = b"w" * (2 * REGION)
    assert read.status == 0
    assert read.payload is not None
    assert bytes(read.payload) == want


async def test_read_of_many_runs_is_submitted_in_turns() -> None:
    rig = await Rig(size=400 * REGION).start()
    for nr in range(0, 400, 2):
        rig.bio(OP_WRITE, nr * REGION, REGION)
    read = rig.bio(OP_READ, 0, 400 * REGION)
    assert read.status == PENDING
    await settle()
    want = bytearray(rig.content)
    for nr in range(0, 400, 2):
        want[nr * REGION : (nr + 1) * REGION] = b"w" * REGION
    assert read.status == 0
    assert read.payload is not None
    assert bytes(read.payload) == want


async def test_whole_region_write_copies_nothing(rig: Rig) -> None:
    write = rig.bio(OP_WRITE, REGION, 2 * REGION)
    assert write.status == 0
    assert rig.log == [("d", "write", REGION, 2 * REGION)]
    assert await rig.hydrated() == "2/8"


async def test_part_write_brings_the_rest_of_the_region_first(rig: Rig) -> None:
    write = rig.bio(OP_WRITE, REGION + 512, 1024)
    assert write.status == 0
    assert rig.log == [
        ("s", "read", REGION, 512),
        ("s", "read", REGION + 1536, REGION - 1536),
        ("d", "write", REGION, REGION),
    ]
    want = bytearray(rig.content[REGION : 2 * REGION])
    want[512:1536] = b"w" * 1024
    assert await rig.destination.device.read(REGION, REGION) == want
    assert await rig.hydrated() == "1/8"


async def test_ragged_write_brings_only_its_edges(rig: Rig) -> None:
    rig.bio(OP_WRITE, REGION - 512, 2 * REGION + 1024)
    assert rig.log == [
        ("s", "read", 0, REGION - 512),
        ("s", "read", 3 * REGION + 512, REGION - 512),
        ("d", "write", 0, 4 * REGION),
    ]
    assert await rig.hydrated() == "4/8"


async def test_edge_of_a_hydrated_region_is_not_read_again(rig: Rig) -> None:
    rig.bio(OP_WRITE, 0, REGION)
    rig.log.clear()
    rig.bio(OP_WRITE, REGION - 512, 1024)
    assert rig.log == [
        ("s", "read", REGION + 512, REGION - 512),
        ("d", "write", REGION - 512, REGION + 512),
    ]


async def test_large_ragged_write_is_copied_in_chunks_when_regions_are_large() -> None:
    rig = await Rig(size=4 << 20, words="2048 1 no_hydration").start()
    await rig.disk.write(512, b"x" * 512)
    want = bytearray(rig.content[: 1 << 20])
    want[512:1024] = b"x" * 512
    assert await rig.disk.read(0, 1 << 20) == want
    assert await rig.hydrated() == "1/4"


@pytest.mark.parametrize("length", [1024, 2 * REGION])
async def test_write_zeroes_of_unhydrated_regions_is_zeroes(
    rig: Rig, length: int
) -> None:
    await rig.destination.device.write(0, b"garbage!" * (rig.size // 8))
    await rig.disk.write_zeroes(REGION + 512, length)
    want = bytearray(rig.content)
    want[REGION + 512 : REGION + 512 + length] = bytes(length)
    assert await rig.disk.read(0, rig.size) == want
    assert ("d", "write_zeroes", REGION + 512, length) in rig.log


async def test_fast_zero_of_a_part_fails_at_once_and_changes_nothing(rig: Rig) -> None:
    zero = rig.bio(OP_WRITE_ZEROES, 512, 2 * REGION, FAST_ZERO)
    assert zero.status == errnos.ENOTSUP
    assert rig.log == []
    assert rig.bio(OP_WRITE_ZEROES, 0, REGION, FAST_ZERO).status == 0


async def test_short_last_region_written_to_its_end_is_an_overwrite() -> None:
    rig = await Rig(size=3 * REGION + 512).start()
    rig.bio(OP_WRITE, 3 * REGION, 512)
    assert rig.log == [("d", "write", 3 * REGION, 512)]
    assert await rig.hydrated() == "1/4"


async def test_plain_write_to_a_hydrated_region_passes_on(rig: Rig) -> None:
    rig.bio(OP_WRITE, 0, REGION)
    bio = Bio(OP_WRITE, 8, 8, memoryview(b"12345678"), 0, lambda _: None)
    assert rig.target.map(bio) == REMAPPED
    assert bio.device is rig.destination


async def test_offsets_are_relative_to_the_target_when_it_begins_later() -> None:
    rig = await Rig(begin=1 << 20).start()
    assert await rig.disk.read((1 << 20) + 7, 100) == rig.content[7:107]
    rig.bio(OP_WRITE, (1 << 20) + REGION, REGION)
    rig.bio(OP_WRITE, (1 << 20) + 512, 512)
    rig.bio(OP_DISCARD, (1 << 20) + 4 * REGION, REGION)
    assert ("d", "write", REGION, REGION) in rig.log
    assert ("d", "write", 0, REGION) in rig.log
    assert ("d", "discard", 4 * REGION, REGION) in rig.log
    extents = await rig.target.extents(1 << 20, rig.size)
    assert sum(extent.length for extent in extents) == rig.size


async def test_cache_of_hydrated_regions_passes_on(rig: Rig) -> None:
    rig.bio(OP_WRITE, 0, 2 * REGION)
    rig.log.clear()
    rig.bio(OP_CACHE, 100, REGION)
    assert rig.log == [("d", "cache", 100, REGION)]


async def test_cache_goes_where_the_data_is_when_nothing_can_be_hydrated(
    rig: Rig,
) -> None:
    rig.bio(OP_WRITE, 0, REGION)
    await rig.disk.flush()
    rig.target._metadata.abort()
    rig.log.clear()
    rig.bio(OP_CACHE, 0, 2 * REGION)
    assert rig.ops() == ["d cache", "s cache"]


async def test_discard_hydrates_whole_regions_and_is_trimmed_to_them(rig: Rig) -> None:
    assert rig.bio(OP_DISCARD, 512, 3 * REGION).status == 0
    assert rig.log == [("d", "discard", REGION, 2 * REGION)]
    assert await rig.hydrated() == "2/8"


@pytest.mark.parametrize(("offset", "length"), [(512, 1024), (512, REGION)])
async def test_discard_of_no_whole_region_does_nothing(
    rig: Rig, offset: int, length: int
) -> None:
    assert rig.bio(OP_DISCARD, offset, length).status == 0
    assert rig.log == []
    assert await rig.hydrated() == "0/8"


async def test_discard_never_reaches_a_short_last_region() -> None:
    rig = await Rig(size=2 * REGION + 512).start()
    rig.bio(OP_DISCARD, REGION, REGION + 512)
    assert rig.log == [("d", "discard", REGION, REGION)]
    assert await rig.hydrated() == "1/3"


async def test_discard_stays_here_without_passdown() -> None:
    rig = await Rig(words="8 2 no_hydration no_discard_passdown").start()
    rig.bio(OP_DISCARD, 0, 2 * REGION)
    rig.bio(OP_DISCARD, 0, 2 * REGION)
    assert rig.log == []
    assert await rig.hydrated() == "2/8"


async def test_discard_waits_for_a_copy_of_its_region(rig: Rig) -> None:
    rig.source.hold = True
    write = rig.bio(OP_WRITE, 512, 512)
    discard = rig.bio(OP_DISCARD, 0, REGION)
    assert discard.status == PENDING
    rig.source.let_go()
    assert (write.status, discard.status) == (0, 0)
    assert rig.ops()[-2:] == ["d write", "d discard"]


async def test_flush_passes_on_when_nothing_changed(rig: Rig) -> None:
    # I5: exactly one destination flush, no metadata write.
    rig.bio(OP_WRITE, 0, REGION)
    await rig.disk.flush()
    rig.bio(OP_WRITE, 0, REGION)
    rig.log.clear()
    assert rig.flush().status == 0
    assert rig.ops() == ["d flush"]


async def test_flush_commits_with_one_destination_flush_when_changed(rig: Rig) -> None:
    # I6: one destination flush, one transaction, no second destination flush.
    rig.bio(OP_WRITE, 0, REGION)
    rig.log.clear()
    await rig.disk.flush()
    ops = rig.ops()
    assert ops.count("d flush") == 1
    journal_flush = ops.index("m flush")
    superblock = [at for at, op in enumerate(ops) if op == "m write"][-1]
    assert ops.index("d flush") < superblock
    assert journal_flush < superblock


async def test_flush_that_comes_during_a_commit_waits_for_the_next(rig: Rig) -> None:
    rig.bio(OP_WRITE, 0, REGION)
    rig.destination.hold = True
    first = rig.flush()
    await settle()
    second = rig.flush()
    assert rig.ops().count("d flush") == 1
    rig.destination.let_go()
    await settle()
    assert (first.status, second.status) == (0, 0)
    assert rig.ops().count("d flush") == 1  # its own


async def test_fua_overwrite_ends_after_a_commit(rig: Rig) -> None:
    write = rig.bio(OP_WRITE, 0, REGION, FUA)
    assert write.status == PENDING
    await settle()
    assert write.status == 0
    assert rig.ops()[:2] == ["d write", "d flush"]


async def test_fua_discard_ends_after_a_commit(rig: Rig) -> None:
    discard = rig.bio(OP_DISCARD, 0, REGION, FUA)
    assert discard.status == PENDING
    await settle()
    assert discard.status == 0
    assert "m write" in rig.ops()


async def test_fua_write_to_a_hydrated_region_waits_for_its_bit(rig: Rig) -> None:
    rig.bio(OP_WRITE, 0, REGION)
    rig.log.clear()
    write = rig.bio(OP_WRITE, 512, 512, FUA)
    assert rig.log == []
    await settle()
    assert write.status == 0
    assert rig.ops()[-1] == "d write"
    again = rig.bio(OP_WRITE, 512, 512, FUA)
    assert again.status == 0
    assert rig.ops() == ["d write"]


async def test_writes_queue_behind_the_copy_of_their_region(rig: Rig) -> None:
    rig.source.hold = True
    writes = [rig.bio(OP_WRITE, 512 * nr, 512) for nr in range(8)]
    assert all(write.status == PENDING for write in writes)
    rig.source.let_go()
    assert all(write.status == 0 for write in writes)
    assert rig.ops() == ["s read", *["d write"] * 8]
    assert await rig.disk.read(0, REGION) == b"w" * REGION


async def test_thousands_of_writes_to_one_region_do_not_recurse(rig: Rig) -> None:
    rig.source.hold = True
    writes = [rig.bio(OP_WRITE, 512, 512) for _ in range(3000)]
    rig.source.let_go()
    assert all(write.status == 0 for write in writes)


async def test_failed_copy_fails_the_writes_that_need_it(rig: Rig) -> None:
    rig.source.fails = lambda bio: errnos.ENODATA
    assert rig.bio(OP_WRITE, 512, 512).status == errnos.EIO
    assert await rig.hydrated() == "0/8"
    assert rig.bio(OP_WRITE, 0, REGION).status == 0
    assert await rig.hydrated() == "1/8"


async def test_failed_overwrite_says_why_and_leaves_the_region(rig: Rig) -> None:
    rig.destination.fails = lambda bio: errnos.ENOSPC
    assert rig.bio(OP_WRITE, 0, REGION).status == errnos.ENOSPC
    rig.destination.fails = lambda bio: 0
    assert await rig.disk.read(0, REGION) == rig.content[:REGION]


async def test_hydrated_and_committed_is_one_attribute_test(rig: Rig) -> None:
    rig.bio(OP_WRITE, 0, rig.size)
    assert rig.ctx.nr_events == 0
    await rig.disk.flush()
    assert rig.ctx.nr_events == 1
    bio = Bio(OP_READ, 8, 8, memoryview(bytearray(8)), 0, lambda _: None)
    assert rig.target.map(bio) == REMAPPED
    await rig.disk.flush()
    assert rig.ctx.nr_events == 1
    await rig.stop()
    await rig.restart()
    assert rig.ctx.nr_events == 1


async def test_commit_comes_a_second_after_a_change(rig: Rig) -> None:
    rig.bio(OP_WRITE, 0, REGION)
    rig.log.clear()
    rig.clock.advance(0.9)
    await settle()
    assert rig.log == []
    rig.clock.advance(0.2)
    await settle()
    assert rig.ops().count("d flush") == 1
    rig.clock.advance(5)
    await settle()
    assert rig.log == []


async def test_failed_commit_reverts_and_goes_read_only(rig: Rig) -> None:
    rig.bio(OP_WRITE, 0, REGION)
    await rig.disk.flush()
    rig.bio(OP_WRITE, REGION, REGION)
    rig.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
    flush = rig.flush()
    await settle()
    assert flush.status == errnos.EIO
    assert rig.ctx.nr_events == 1
    status = await rig.target.status()
    assert status.split()[3] == "1/8"
    assert status.endswith(" ro")
    content = await rig.disk.read(0, 3 * REGION)
    assert content == b"w" * REGION + rig.content[REGION : 3 * REGION]
    assert rig.flush().status == errnos.EIO
    assert rig.bio(OP_WRITE, 0, 512).status == 0
    assert rig.bio(OP_WRITE, 0, 512, FUA).status == errnos.EIO
    assert rig.bio(OP_WRITE, REGION, REGION).status == errnos.EIO
    assert rig.bio(OP_DISCARD, REGION, REGION).status == 0
    await rig.stop()


async def test_hydrated_is_decided_from_committed_bits(rig: Rig) -> None:
    # The last bit belongs to the next transaction: a commit that ends does not vouch for it.
    rig.bio(OP_WRITE, 0, 7 * REGION)
    rig.destination.hold = True
    flush = rig.flush()
    await settle()
    rig.destination.hold = False
    rig.bio(OP_WRITE, 7 * REGION, REGION)
    rig.destination.let_go()
    await settle()
    assert flush.status == 0
    assert await rig.hydrated() == "8/8"
    assert rig.ctx.nr_events == 0
    rig.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
    rig.flush()
    await settle()
    assert await rig.hydrated() == "7/8"
    assert await rig.disk.read(7 * REGION, REGION) == rig.content[7 * REGION :]


async def test_unreadable_metadata_fails_the_target(rig: Rig) -> None:
    rig.bio(OP_WRITE, 0, REGION)
    rig.metadata.fails = lambda bio: errnos.EIO
    assert await rig.target.status() == "Error"
    assert await rig.target.status() == "Fail"
    for op in (OP_READ, OP_WRITE, OP_DISCARD, OP_WRITE_ZEROES):
        assert rig.bio(op, 0, REGION).status == errnos.EIO
    assert rig.target.map(Bio(OP_FLUSH, 0, 0, None, 0, lambda _: None)) == KILL
    await rig.target.message(["enable_hydration"])
    await rig.stop()


async def test_discard_that_can_not_be_recorded_is_an_error(rig: Rig) -> None:
    rig.source.hold = True
    rig.bio(OP_WRITE, 512, 512)
    discard = rig.bio(OP_DISCARD, 0, REGION)
    rig.target._metadata.abort()
    rig.source.let_go()
    assert discard.status == errnos.EIO


async def test_bits_survive_a_reload_and_messages_do_not(rig: Rig) -> None:
    rig.bio(OP_WRITE, 0, REGION)
    await rig.target.message(["hydration_threshold", "9"])
    await rig.stop()
    await rig.restart()
    assert await rig.hydrated() == "1/8"
    assert "hydration_threshold 1 " in await rig.target.status()


async def test_preloaded_table_sees_what_the_live_one_hydrates(rig: Rig) -> None:
    live = rig.target
    preloaded = await type(live).ctr(rig.ctx, rig.words)
    rig.bio(OP_WRITE, 0, REGION)
    await rig.suspend()
    preloaded.resume()
    assert (await preloaded.status()).split()[3] == "1/8"
    await live.dtr()
    preloaded.presuspend()
    await preloaded.postsuspend()


async def test_status_words_are_the_kernels(rig: Rig) -> None:
    words = (await rig.target.status()).split()
    assert words[0] == "8"
    assert " ".join(words[2:]) == (
        "8 0/8 0 1 no_hydration 4 hydration_threshold 1 hydration_batch_size 1 rw"
    )


async def test_status_commits_unless_told_not_to_or_suspended(rig: Rig) -> None:
    rig.bio(OP_WRITE, 0, REGION)
    rig.log.clear()
    await rig.target.status(noflush=True)
    assert rig.log == []
    await rig.target.status()
    assert "d flush" in rig.ops()
    await rig.suspend()
    rig.log.clear()
    await rig.target.status()
    assert rig.log == []


@pytest.mark.parametrize(
    "words",
    [
        ["hydration_threshold"],
        ["hydration_threshold", "x"],
        ["hydration_threshold", "-1"],
        ["hydration_threshold", "4294967296"],
        ["hydration_threshold", "1", "2"],
        ["hydration_batch_size", ""],
        ["hydration_rate"],
        ["hydration_rate", "18446744073709551616"],
        ["hydration_rate", "1", "2"],
        ["event_after_errors", "4294967296"],
        ["hydrate_on_read", "on"],
        ["nonsense"],
        ["nonsense", "1"],
    ],
)
async def test_bad_message_is_refused(rig: Rig, words: list[str]) -> None:
    with pytest.raises(TableError) as caught:
        await rig.target.message(words)
    assert caught.value.errno == errnos.EINVAL
    assert (
        "hydration_threshold 1 hydration_batch_size 1 rw" in await rig.target.status()
    )


async def test_messages_are_case_blind_and_change_status_not_table(rig: Rig) -> None:
    table = rig.target.table_words()
    await rig.target.message(["HYDRATION_THRESHOLD", "65"])
    await rig.target.message(["hydration_batch_size", "4294967295"])
    await rig.target.message(["Enable_Hydration", "with", "extra", "words"])
    status = await rig.target.status(noflush=True)
    assert status.endswith(
        " 0 4 hydration_threshold 65 hydration_batch_size 4294967295 rw"
    )
    assert rig.target.table_words() == table == "m d s 8 1 no_hydration"
    await rig.stop()


async def test_suspend_waits_for_copies_and_commits_clean(rig: Rig) -> None:
    await rig.target.message(["hydration_threshold", "8"])
    rig.source.hold = True
    await rig.target.message(["enable_hydration"])
    await settle()
    rig.target.presuspend()
    rig.clock.advance(0.01)
    assert rig.source.held
    suspending = asyncio.ensure_future(rig.target.postsuspend())
    await settle()
    assert not suspending.done()
    rig.source.let_go()
    await suspending
    status = await rig.target.status()
    assert status.split()[4] == "0"
    assert not rig.target._metadata.changed
    await rig.target.dtr()
    assert rig.ctx.nr_open == 0


async def test_suspend_commits_what_no_flush_has_committed(rig: Rig) -> None:
    rig.bio(OP_WRITE, 0, REGION)
    await rig.suspend()
    assert "d flush" in rig.ops()
    assert not rig.target._metadata.changed
    await rig.restart()
    assert await rig.hydrated() == "1/8"
    assert rig.target._metadata.clean_shutdown
    await rig.stop()


async def test_exception_of_our_own_making_fails_the_target(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def wrong(offset: int, length: int) -> None:
        raise AssertionError("wrong")

    monkeypatch.setattr(rig.target._regions.copier, "copy", wrong)
    zero = rig.bio(OP_WRITE_ZEROES, 512, 512)
    await settle()
    assert zero.status == errnos.EIO
    assert await rig.target.status() == "Fail"
    assert rig.ctx.nr_events == 1
    assert "wrong" in caplog.text
    await rig.stop()


@pytest.mark.parametrize("op", [OP_DISCARD, OP_WRITE_ZEROES])
async def test_many_regions_are_marked_in_turns(
    op: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdtarget.targets.clone.foreground.REGIONS_AT_ONCE_MAX", 100)
    rig = await Rig(size=1000 * REGION).start()
    for nr in range(0, 1000, 2):
        rig.bio(OP_WRITE, nr * REGION, REGION)
    many = rig.bio(op, 0, 950 * REGION, FUA)
    part = rig.bio(OP_WRITE, 501 * REGION + 512, 512)
    beside = rig.bio(OP_WRITE, 999 * REGION, REGION)
    assert (many.status, part.status, beside.status) == (PENDING, PENDING, 0)
    await settle(100)
    assert (many.status, part.status) == (0, 0)
    assert await rig.hydrated() == "976/1000"
    assert await rig.disk.read(501 * REGION, 1024) == bytes(512) + b"w" * 512
    await rig.stop()
