# SPDX-License-Identifier: Apache-2.0
"""Checklist 5.4: mappings, hints and discards, loaded by a table. The parts: test_activation."""

import pytest

from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab

A, B = 3, 4  # blocks of the origin
BUSY = "2 migration_threshold 0"


def levels(lab: CacheLab) -> list[int]:
    policy = lab.target._blocks.policy
    return [policy.get_hint(nr) for nr in range(8)]


async def give_levels(lab: CacheLab) -> list[int]:
    """Eight cached blocks, of which the first is the hottest, as no hash would have it."""
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(8))
    for _ in range(9):
        await lab.pass_time(62, step=15.5)
        await lab.device.read(0, 512)
    before = levels(lab)
    assert before[0] == max(before)
    return before


async def test_5_4_clean_start_has_the_stored_dirty_bits(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean([A])
    await lab.fill([B])
    await lab.recreate(DIRTY_BUSY)
    assert list(lab.core.dirty.search(1)) == [lab.cblock(B)]
    await lab.clean()
    assert lab.asked("o", "write") == [("write", B * BLOCK, BLOCK)]


@pytest.mark.parametrize(("mode", "nr_dirty"), [("writeback", 2), ("writethrough", 0)])
async def test_5_4_unclean_start_has_every_mapping_dirty(
    lab: CacheLab, mode: str, nr_dirty: int
) -> None:
    """Writethrough is an exception: its mappings are given up, because the origin has everything."""
    await lab.create(f"1 {mode} smq {BUSY}")
    await lab.message(f"warm {A}-{B + 1}")
    await lab.pass_time(2)
    assert await lab.field("dirty") == "0"
    await lab.cut_power()
    await lab.create(f"1 {mode} smq {BUSY}")
    assert await lab.field("dirty") == str(nr_dirty)
    assert await lab.used() == nr_dirty


async def test_5_4_hints_are_used_after_a_clean_shutdown(lab: CacheLab) -> None:
    before = await give_levels(lab)
    await lab.recreate(DIRTY_BUSY)
    after = levels(lab)
    assert after[0] == max(after)
    assert sorted(range(8), key=before.__getitem__) == sorted(
        range(8), key=after.__getitem__
    )


@pytest.mark.parametrize("via", ["crash", "cleaner", "mq"])
async def test_5_4_hints_are_dropped_by(lab: CacheLab, via: str) -> None:
    """A crash, and a table whose policy has another name, also mq after smq and back."""
    await give_levels(lab)
    if via == "crash":
        await lab.device.flush()
        await lab.cut_power()
        await lab.create(DIRTY_BUSY)
    else:
        await lab.recreate(f"0 {via} {BUSY}")
        await lab.recreate(DIRTY_BUSY)
    assert await lab.used() == 8
    after = levels(lab)
    assert after[0] < max(after)


@pytest.mark.parametrize("is_clean", [True, False])
async def test_5_4_discards_are_loaded_after_a_clean_shutdown_only(
    lab: CacheLab, is_clean: bool
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.device.discard(A * BLOCK, 2 * BLOCK)
    await lab.device.flush()
    if is_clean:
        await lab.remove()
    else:
        await lab.cut_power()
    await lab.create(DIRTY_BUSY)
    assert lab.target._discards.nr_discarded == (2 if is_clean else 0)


async def test_5_4_discards_are_clipped_to_a_shorter_origin(lab: CacheLab) -> None:
    whole = lab.length
    await lab.create(DIRTY_BUSY)
    await lab.device.discard(12 * BLOCK, 8 * BLOCK)
    lab.length = 16 * BLOCK
    await lab.reload(DIRTY_BUSY)
    assert lab.target._discards.nr_discarded == 4
    lab.length = whole
    await lab.reload(DIRTY_BUSY)
    assert lab.target._discards.nr_discarded == 4, "what it grew by was not discarded"
