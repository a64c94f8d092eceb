# SPDX-License-Identifier: Apache-2.0
"""A resume refuses, resizes and loads a cache, and a crash may come in between."""

import asyncio
import errno as errnos

import pytest

from nbdtarget.bio import OP_WRITE
from nbdtarget.common.errors import TableError
from nbdtarget.policies.base import MappingError, Policy
from nbdtarget.targets.committer import COMMIT_PERIOD_S
from nbdtarget_metadata.mode import Mode
from tests.support.cache_parts import BLOCK, Bench, Table

WRITEBACK = "1 writeback smq 0"
PASSTHROUGH = "1 passthrough smq 0"

UNCLEAN = "unable to resume into passthrough mode after unclean shutdown"
NOT_CLEAN = "cannot enter passthrough mode unless all blocks are clean"
RELOAD = "unable to resume cache due to missing proper cache table reload"
EXTEND = "unable to extend cache due to missing cache table reload"


# A commit without changes: both devices, both copies of one superblock slot, no record.
HEAL = ["flush", "flush", "write", "write"]


async def refusal(table: Table) -> tuple[str, int]:
    """Return why the table cannot be resumed. Check that only a healing commit is written, and that no failure is noted."""
    table.bench.log.clear()
    with pytest.raises(TableError) as caught:
        await table.resume()
    assert [op for _, op, _, _ in table.bench.log] in ([], HEAL)
    assert table.nr_failures == 0
    assert table.metadata.mode is Mode.RW
    return str(caught.value), caught.value.errno


def loaded(policy: Policy, nr_oblocks: int = 32) -> dict[int, int]:
    """Return the blocks that the policy has as cached: cblocks by oblock."""
    found = {oblock: policy.lookup(oblock, False) for oblock in range(nr_oblocks)}
    return {oblock: cblock for oblock, cblock in found.items() if cblock >= 0}


async def stopped(
    mapped: dict[int, int], dirty: tuple[int, ...] = (), words: str = WRITEBACK
) -> Bench:
    """A cache that was shut down cleanly. No target has it in core."""
    bench = Bench()
    table = await bench.resumed(words, mapped=mapped.items(), dirty=dirty)
    await table.suspend()
    bench.cut_power()
    return bench


async def crashed(
    mapped: dict[int, int], dirty: tuple[int, ...] = (), words: str = WRITEBACK
) -> Bench:
    """A cache whose mappings were committed when the power went."""
    bench = Bench()
    table = await bench.resumed(words, mapped=mapped.items(), dirty=dirty)
    assert await table.committer.commit()
    bench.cut_power()
    return bench


# ---- loading ----


async def test_mappings_are_loaded_with_their_dirty_bits() -> None:
    bench = await stopped({4: 20, 1: 3}, dirty=(4,))
    table = await bench.resumed()
    assert loaded(table.parts.policy) == {20: 4, 3: 1}
    assert (table.metadata.nr_dirty, table.metadata.nr_mapped) == (1, 2)
    work = table.parts.policy.get_background_work(True)
    assert work is not None
    assert work.cblock == 4


async def test_after_a_crash_every_mapped_block_is_dirty() -> None:
    bench = await crashed({4: 20, 1: 3}, dirty=(4,))
    table = await bench.resumed()
    assert table.metadata.nr_dirty == 2


async def test_with_a_dirty_log_only_those_that_may_be_are_dirty_after_a_crash() -> (
    None
):
    bench = await crashed({4: 20, 1: 3}, dirty=(4,), words="1 dirty_log smq 0")
    table = await bench.resumed("1 dirty_log smq 0")
    assert list(table.metadata.dirty.search(1)) == [4]


class Hints(dict[int, int | None]):
    """Records the hints that a policy is given."""

    def watch(self, policy: Policy) -> None:
        load = policy.load_mapping

        def load_mapping(
            cblock: int, oblock: int, dirty: bool, hint: int | None
        ) -> None:
            self[cblock] = hint
            load(cblock, oblock, dirty, hint)

        policy.load_mapping = load_mapping  # type: ignore[method-assign]


async def hints_of(table: Table) -> Hints:
    hints = Hints()
    hints.watch(table.parts.policy)
    await table.resume()
    return hints


async def test_hints_are_given_to_the_policy_that_made_them() -> None:
    bench = Bench()
    table = await bench.resumed(mapped=[(1, 3), (2, 4)])
    given = {cblock: table.parts.policy.get_hint(cblock) for cblock in (1, 2)}
    await table.suspend()
    bench.cut_power()
    assert await hints_of(await bench.table()) == given


async def test_no_commit_becomes_due_while_mappings_are_loaded() -> None:
    # The first commit heals one slot of the superblock, and the other one is due a second
    # later. A load that takes longer must not meet that commit: the metadata cannot be started
    # beside it.
    bench = await stopped({1: 3, 2: 4})
    table = await bench.table(WRITEBACK)
    assert table.metadata.needs_rewrite
    load = table.parts.policy.load_mapping

    def load_slowly(cblock: int, oblock: int, dirty: bool, hint: int | None) -> None:
        load(cblock, oblock, dirty, hint)
        bench.clock.advance(2 * COMMIT_PERIOD_S)
        bench.metadata.hold = True  # a commit that is under way stays so

    table.parts.policy.load_mapping = load_slowly  # type: ignore[method-assign]
    asyncio.get_running_loop().call_later(0.05, bench.metadata.let_go)
    await table.resume()
    assert table.metadata
    assert loaded(table.parts.policy) == {3: 1, 4: 2}


@pytest.mark.parametrize("words", ["0 mq 0", "0 cleaner 0"])
async def test_hints_are_not_given_to_another_policy(words: str) -> None:
    bench = await stopped({1: 3, 2: 4})
    assert await hints_of(await bench.table(words)) == {1: None, 2: None}


async def test_hints_are_not_given_after_a_crash() -> None:
    bench = await crashed({1: 3})
    assert await hints_of(await bench.table()) == {1: None}


async def test_pins_are_kept_by_a_clean_shutdown() -> None:
    bench = Bench()
    table = await bench.resumed(mapped=[(1, 3), (2, 4)])
    table.parts.policy.pin(2)
    await table.suspend()
    bench.cut_power()
    policy = (await bench.resumed()).parts.policy
    assert (policy.is_pinned(1), policy.is_pinned(2)) == (False, True)


async def test_discards_are_those_of_the_last_clean_shutdown() -> None:
    bench = Bench()
    table = await bench.resumed()
    table.discards.set_range(3 * BLOCK, 2 * BLOCK)
    await table.suspend()
    bench.cut_power()
    again = await bench.resumed()
    assert list(again.discards.bits.search(1)) == [3, 4]
    bench.cut_power()
    assert (await bench.resumed()).discards.nr_discarded == 0


async def test_table_swap_hands_over_dirty_bits_hints_and_discards() -> None:
    bench = Bench()
    live = await bench.resumed(mapped=[(1, 3), (2, 4)], dirty=[2])
    inactive = await bench.table("1 writethrough smq 0")
    live.map(5, 9, dirty=True)  # after the other one was loaded
    live.discards.set_range(20 * BLOCK, BLOCK)
    await live.suspend()
    hints = await hints_of(inactive)
    assert loaded(inactive.parts.policy) == {3: 1, 4: 2, 9: 5}
    assert list(inactive.metadata.dirty.search(1)) == [2, 5]
    assert None not in hints.values()
    assert list(inactive.discards.bits.search(1)) == [20]


async def test_plain_resume_loads_nothing_again() -> None:
    bench = Bench()
    table = await bench.resumed(mapped=[(1, 3)])
    table.discards.set_range(0, BLOCK)
    policy = table.parts.policy
    await table.suspend()
    await table.resume()
    assert table.parts.policy is policy
    assert policy.residency == 1
    assert table.discards.nr_discarded == 1
    assert table.metadata.may_change


async def test_loading_lets_others_have_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nbdtarget.targets.cache.activation.STEP_BLOCKS", 2)
    bench = await stopped({nr: nr for nr in range(7)})
    table = await bench.table()
    residencies = set()

    async def watch() -> None:
        while True:
            residencies.add(table.parts.policy.residency)
            await asyncio.sleep(0)

    watching = asyncio.ensure_future(watch())
    await table.resume()
    watching.cancel()
    assert {2, 4, 6, 7} <= residencies


async def test_loading_few_of_many_blocks_lets_others_have_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nbdtarget.targets.cache.activation.STEP_BLOCKS", 1)
    turns: dict[tuple[int, ...], int] = {}
    for mapped in ((), (0,), (7,)):
        bench = await stopped({nr: nr for nr in mapped})
        table = await bench.table()
        turns[mapped] = 0

        async def watch(mapped: tuple[int, ...]) -> None:
            while True:
                turns[mapped] += 1
                await asyncio.sleep(0)

        watching = asyncio.ensure_future(watch(mapped))
        await table.resume()
        watching.cancel()
        assert table.parts.policy.residency == len(mapped)
    # The loop gets a turn for each block up to the last mapped one, and none for the blocks behind it.
    assert turns[0,] <= turns[()] + 2
    assert turns[7,] >= turns[0,] + 7


async def test_mapping_that_the_policy_refuses_refuses_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = await stopped({1: 3})
    table = await bench.table()

    def refuse(cblock: int, oblock: int, dirty: bool, hint: int | None) -> None:
        raise MappingError(cblock, oblock, "no")

    monkeypatch.setattr(table.parts.policy, "load_mapping", refuse)
    assert await refusal(table) == (
        "could not load cache mappings: cache block 1 -> origin block 3: no",
        errnos.EINVAL,
    )
    assert await refusal(table) == (RELOAD, errnos.EINVAL)


# ---- the clean shutdown ----


async def test_clean_shutdown_is_cleared_durably_before_a_resume_ends() -> None:
    bench = await stopped({1: 3})
    table = await bench.table()
    assert (await table.from_disk()).is_recorded_clean
    await table.resume()
    assert not (await table.from_disk()).is_recorded_clean
    assert table.metadata.may_change
    await table.suspend()
    assert (await table.from_disk()).is_recorded_clean
    await table.resume()  # the same table again
    assert not (await table.from_disk()).is_recorded_clean


async def test_resume_is_read_only_if_the_clean_shutdown_cannot_be_cleared() -> None:
    """It serves reads, as the kernel's does."""
    bench = await stopped({1: 3}, dirty=(1,))
    table = await bench.table()
    bench.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
    await table.resume()
    assert table.metadata.mode is Mode.RO
    assert table.metadata.needs_check
    assert not table.metadata.may_change
    assert table.nr_failures == 1
    bench.metadata.fails = lambda bio: 0
    again = await bench.resumed()  # which starts over from disk
    assert list(again.metadata.dirty.search(1)) == [1]


# ---- passthrough ----


async def test_passthrough_is_refused_after_an_unclean_shutdown() -> None:
    bench = await crashed({1: 3})
    assert await refusal(await bench.table(PASSTHROUGH)) == (UNCLEAN, errnos.EINVAL)


async def test_passthrough_is_refused_after_a_crash_with_nothing_cached() -> None:
    bench = await crashed({})
    table = await bench.table(PASSTHROUGH)
    assert await refusal(table) == (UNCLEAN, errnos.EINVAL)
    assert await refusal(table) == (UNCLEAN, errnos.EINVAL)


async def test_passthrough_is_refused_while_a_block_is_dirty() -> None:
    bench = await stopped({1: 3, 2: 4}, dirty=(2,))
    table = await bench.table(PASSTHROUGH)
    assert await refusal(table) == (NOT_CLEAN, errnos.EBUSY)
    assert await refusal(table) == (RELOAD, errnos.EINVAL)
    assert (await table.from_disk()).is_recorded_clean


async def test_passthrough_is_taken_when_all_is_clean() -> None:
    bench = await stopped({1: 3, 2: 4})
    table = await bench.resumed(PASSTHROUGH)
    assert loaded(table.parts.policy) == {3: 1, 4: 2}


async def test_passthrough_that_was_loaded_early_is_refused_late() -> None:
    bench = Bench()
    live = await bench.resumed(WRITEBACK)
    inactive = await bench.table(PASSTHROUGH)
    live.map(0, 7, dirty=True)
    await live.suspend()
    assert await refusal(inactive) == (NOT_CLEAN, errnos.EBUSY)
    assert await refusal(inactive) == (RELOAD, errnos.EINVAL)
    # Another table can be loaded, and the data is intact.
    table = await bench.resumed("1 writeback cleaner 0")
    assert loaded(table.parts.policy) == {7: 0}
    assert list(table.metadata.dirty.search(1)) == [0]


async def test_passthrough_is_taken_once_a_table_after_the_crash_has_cleaned() -> None:
    bench = await crashed({1: 3}, dirty=(1,))
    cleaner = await bench.resumed("1 writeback cleaner 0")
    assert cleaner.metadata.nr_dirty == 1
    cleaner.blocks().set_clean(1)
    inactive = await bench.table(PASSTHROUGH)
    await cleaner.suspend()
    await inactive.resume()
    assert loaded(inactive.parts.policy) == {3: 1}


async def test_refusal_of_passthrough_leaves_the_dirty_bits_on_disk() -> None:
    bench = await stopped({1: 3, 2: 4}, dirty=(2,))
    await refusal(await bench.table(PASSTHROUGH))
    bench.cut_power()
    table = await bench.resumed(WRITEBACK)
    assert list(table.metadata.dirty.search(1)) == [2]


@pytest.mark.parametrize("dirty", [(), (1,)])
async def test_with_a_dirty_log_passthrough_is_refused_for_dirty_blocks_only(
    dirty: tuple[int, ...],
) -> None:
    bench = await crashed({1: 3, 2: 4}, dirty=dirty, words="1 dirty_log smq 0")
    table = await bench.table("2 passthrough dirty_log smq 0")
    if dirty:
        assert await refusal(table) == (NOT_CLEAN, errnos.EBUSY)
    else:
        await table.resume()
        assert loaded(table.parts.policy) == {3: 1, 4: 2}


async def test_passthrough_is_resumed_again() -> None:
    bench = await stopped({1: 3})
    table = await bench.resumed(PASSTHROUGH)
    await table.suspend()
    await table.resume()
    assert loaded(table.parts.policy) == {3: 1}


# ---- the cache device's size ----


async def test_larger_cache_device_needs_a_table_reload() -> None:
    bench = await stopped({1: 3})
    table = await bench.table()
    bench.resize_cache(12)
    assert await refusal(table) == (EXTEND, errnos.EINVAL)
    assert await refusal(table) == (EXTEND, errnos.EINVAL)
    table = await bench.resumed()
    assert (table.metadata.nr_cblocks, loaded(table.parts.policy)) == (12, {3: 1})
    assert (await table.from_disk()).nr_cblocks == 12
    table.map(11, 9)


async def test_larger_cache_device_is_no_news_to_a_resumed_table() -> None:
    bench = Bench()
    table = await bench.resumed(mapped=[(1, 3)])
    await table.suspend()
    bench.resize_cache(12)
    await table.resume()  # which the kernel refuses
    assert (table.metadata.nr_cblocks, loaded(table.parts.policy)) == (8, {3: 1})


async def test_cache_grows_as_far_as_the_metadata_device_has_room() -> None:
    bench = await stopped({1: 3})
    nr_max = (await bench.table()).metadata.nr_cblocks_max
    bench.cut_power()
    bench.resize_cache(nr_max + 1)
    reason, errno = await refusal(await bench.table())
    assert f"the metadata device has room for {nr_max}" in reason
    assert errno == errnos.ENOSPC


@pytest.mark.parametrize("is_resumed", [False, True])
async def test_smaller_cache_loses_clean_blocks(is_resumed: bool) -> None:
    bench = await stopped({1: 3, 2: 4, 6: 5, 7: 8}, dirty=(2,))
    table = await bench.table()
    if is_resumed:
        await table.resume()
        await table.suspend()
    bench.resize_cache(3)
    await table.resume()
    policy = table.parts.policy
    assert loaded(policy) == {3: 1, 4: 2}
    assert table.metadata.nr_cblocks == 3
    on_disk = await table.from_disk()
    assert (on_disk.nr_cblocks, on_disk.nr_mapped) == (3, 2)
    # One block is free, and the next promotion gets that one.
    work = policy.maybe_promote(20)
    assert work is not None
    assert work.cblock == 0
    assert policy.maybe_promote(21) is None


@pytest.mark.parametrize("is_resumed", [False, True])
async def test_smaller_cache_is_refused_if_a_dirty_block_would_be_cut_off(
    is_resumed: bool,
) -> None:
    bench = await stopped({1: 3, 6: 5, 7: 8}, dirty=(1, 7))
    table = await bench.table()
    if is_resumed:
        await table.resume()
        await table.suspend()
    bench.resize_cache(6)
    reason = "unable to shrink cache; cache block 7 is dirty"
    assert await refusal(table) == (reason, errnos.EINVAL)
    assert table.metadata.nr_mapped == 3
    bench.resize_cache(8)
    await table.resume()
    assert loaded(table.parts.policy) == {3: 1, 5: 6, 8: 7}


async def test_blocks_that_are_clean_in_core_may_be_cut_off_after_a_crash() -> None:
    bench = await crashed({7: 8}, dirty=(7,))
    table = await bench.resumed()
    assert table.metadata.nr_dirty == 1
    table.blocks().set_clean(7)
    await table.suspend()
    bench.resize_cache(6)
    await table.resume()
    assert loaded(table.parts.policy) == {}


async def test_policy_of_a_shrunken_cache_is_as_the_one_before() -> None:
    bench = Bench()
    table = await bench.resumed("1 passthrough mq 2 random_threshold 4")
    table.map(1, 3)
    table.map(2, 4)
    table.parts.policy.pin(2)
    await table.suspend()
    before = table.parts.policy
    bench.resize_cache(4)
    after = await table.activation.preresume()
    assert after is table.parts.policy
    assert after is not before
    assert after.name == "mq"
    assert after.is_pinned(2)
    assert after.maybe_promote(9) is None  # passthrough still


async def test_cache_device_of_less_than_a_block_is_refused() -> None:
    bench = await stopped({})
    table = await bench.table()
    bench.cache.size = BLOCK - 512
    assert await refusal(table) == (
        "Data block size is larger than the cache device",
        errnos.EINVAL,
    )


# ---- the origin's size ----


async def test_larger_origin_is_recorded() -> None:
    bench = await stopped({1: 3})
    bench.origin.size = 40 * BLOCK
    table = await bench.table(nr_oblocks=40)
    await table.resume()
    table.map(2, 39)
    assert (await table.from_disk()).origin_size == 40 * BLOCK


async def test_smaller_origin_loses_clean_blocks() -> None:
    bench = await stopped({1: 3, 2: 20, 5: 31}, dirty=(1,))
    table = await bench.table(nr_oblocks=20)
    await table.resume()
    assert loaded(table.parts.policy) == {3: 1}
    on_disk = await table.from_disk()
    assert (on_disk.origin_size, on_disk.nr_mapped) == (20 * BLOCK, 1)


async def test_smaller_origin_is_refused_if_a_dirty_block_would_be_cut_off() -> None:
    bench = await stopped({1: 3, 2: 20, 5: 31}, dirty=(5,))
    table = await bench.table(nr_oblocks=20)
    reason = "unable to shrink origin; cache block 5 is dirty"
    assert await refusal(table) == (reason, errnos.EFBIG)
    assert table.metadata.nr_mapped == 3
    assert await refusal(table) == (RELOAD, errnos.EINVAL)
    again = await bench.table(nr_oblocks=32)
    await again.resume()
    assert loaded(again.parts.policy) == {3: 1, 20: 2, 31: 5}


async def test_refused_origin_leaves_a_cache_that_shrinks_as_it_was() -> None:
    bench = await stopped({1: 3, 5: 31, 7: 8}, dirty=(5,))
    table = await bench.table(nr_oblocks=20)
    bench.resize_cache(6)
    assert (await refusal(table))[1] == errnos.EFBIG
    assert (table.metadata.nr_cblocks, table.metadata.nr_mapped) == (8, 3)


# ---- in modes RO and FAIL ----


async def test_read_only_metadata_are_resumed_to_be_read() -> None:
    bench = Bench()
    table = await bench.resumed(mapped=[(1, 3)], dirty=[1])
    inactive = await bench.table()
    table.metadata.abort()
    await table.resume()
    assert loaded(table.parts.policy) == {3: 1}
    # The inactive table can be resumed, too: the mappings in core tell where the data are.
    await inactive.resume()
    assert loaded(inactive.parts.policy) == {3: 1}


async def test_read_only_metadata_are_not_resized() -> None:
    bench = Bench()
    table = await bench.resumed(mapped=[(1, 3)])
    table.metadata.abort()
    bench.resize_cache(6)
    with pytest.raises(TableError, match="resume cache: metadata is read-only"):
        await table.resume()


async def test_failed_metadata_refuse_a_new_table_only() -> None:
    bench = Bench()
    table = await bench.resumed()
    inactive = await bench.table()
    table.metadata.fail()
    await table.resume()
    with pytest.raises(TableError, match="resume cache: metadata has failed"):
        await inactive.resume()
