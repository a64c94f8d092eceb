# SPDX-License-Identifier: Apache-2.0
"""Checklist 6.3: messages to a cache. What the kernel answered: test_recordings."""

import errno as errnos

import pytest

from nbdtarget.bio import OP_WRITE
from nbdtarget.common.errors import TableError
from tests.support.cache import DIRTY_BUSY, CacheLab
from tests.support.clock import settle

BUSY = "2 migration_threshold 0"
PASSTHROUGH = f"1 passthrough smq {BUSY}"


async def wrong(lab: CacheLab, words: str) -> int:
    """Send a message that must be refused; return the errno."""
    with pytest.raises(TableError) as caught:
        await lab.message(words)
    return caught.value.errno


async def full_passthrough(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(8))
    await lab.recreate(PASSTHROUGH)


@pytest.mark.parametrize("words", ["migration_threshold 64", "MIGRATION_THRESHOLD +64"])
async def test_6_3_migration_threshold(lab: CacheLab, words: str) -> None:
    await lab.create()
    table = lab.device.table()
    await lab.message(words)
    assert "migration_threshold 64 " in " ".join(await lab.status())
    assert lab.device.table() == table, "messages never alter it"


@pytest.mark.parametrize(
    "words",
    [
        "migration_threshold x",
        "migration_threshold -- -1",
        "migration_threshold",
        "migration_threshold 1 2",
        "random_threshold 1",
        "nonsense 1",
        "nonsense",
        "nonsense 1 2",
    ],
)
async def test_6_3_other_words_are_einval_and_change_nothing(
    lab: CacheLab, words: str
) -> None:
    await lab.create()
    before = await lab.status()
    assert await wrong(lab, words) == errnos.EINVAL
    assert await lab.status() == before


@pytest.mark.parametrize(
    "key",
    [
        "random_threshold",
        "sequential_threshold",
        "discard_promote_adjustment",
        "read_promote_adjustment",
        "write_promote_adjustment",
    ],
)
async def test_6_3_mq_takes_its_old_keys_and_ignores_them(
    lab: CacheLab, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    await lab.create("0 mq 0")
    before = await lab.status()
    await lab.message(f"{key} 8")
    assert await lab.status() == before
    assert f"tunable '{key}' no longer has any effect" in caplog.text
    assert await wrong(lab, f"{key} x") == errnos.EINVAL


async def test_6_3_value_of_a_message_ends_with_the_table(lab: CacheLab) -> None:
    await lab.create()
    await lab.message("migration_threshold 64")
    await lab.reload("0 smq 0")
    assert "migration_threshold 2048 " in " ".join(await lab.status())


@pytest.mark.parametrize("mode", ["writeback", "writethrough"])
async def test_6_3_invalidate_cblocks_needs_passthrough(
    lab: CacheLab, mode: str
) -> None:
    await lab.create(f"1 {mode} smq 0")
    assert await wrong(lab, "invalidate_cblocks 0") == errnos.EPERM
    assert await wrong(lab, "invalidate_cblocks nonsense") == errnos.EPERM


async def test_6_3_invalidate_cblocks_without_a_range_does_nothing(
    lab: CacheLab,
) -> None:
    await full_passthrough(lab)
    await lab.message("invalidate_cblocks")
    assert await lab.used() == 8


async def test_6_3_first_bad_range_stops_and_earlier_ones_stay_applied(
    lab: CacheLab,
) -> None:
    await full_passthrough(lab)
    assert await wrong(lab, "invalidate_cblocks 0-2 4 7-9 6") == errnos.EINVAL
    cached = [nr for nr in range(8) if lab.core.maybe_oblock(nr) is not None]
    assert cached == [2, 3, 5, 6, 7]


async def test_6_3_unmapped_blocks_in_a_range_are_fine(lab: CacheLab) -> None:
    await full_passthrough(lab)
    for _ in range(2):
        await lab.message("invalidate_cblocks 2-6")
    assert await lab.used() == 4


async def test_6_3_number_above_32_bits_is_refused(lab: CacheLab) -> None:
    """The kernel cuts the number off, so that 4294967296 is 0."""
    await full_passthrough(lab)
    assert await wrong(lab, "invalidate_cblocks 4294967296") == errnos.EINVAL
    assert await lab.used() == 8


async def test_6_3_invalidation_is_durable_and_counts_as_no_demotion(
    lab: CacheLab,
) -> None:
    """The kernel commits it with the next flush. Until then a crash brings the block back, over
    what has been written to the origin since."""
    await full_passthrough(lab)
    await lab.message("invalidate_cblocks 0-3")
    assert (await lab.recorded()).nr_mapped == 5
    assert await lab.field("demotions") == "0"
    await lab.write(0, "n")
    await lab.cut_power()
    # After a crash in this mode no mapping counts at all.
    await lab.create(DIRTY_BUSY)
    assert await lab.used() == 0


async def test_6_3_invalidation_that_cannot_be_committed_is_an_error(
    lab: CacheLab,
) -> None:
    await full_passthrough(lab)
    lab.metadata.fails = lambda _: errnos.EIO
    assert await wrong(lab, "invalidate_cblocks 0-3") == errnos.EIO


async def test_6_3_failed_invalidation_lets_no_write_pass_the_block(
    lab: CacheLab,
) -> None:
    """Its mapping is on disk still, and would hide what was written to the origin."""
    await full_passthrough(lab)
    lab.fail_once("m", OP_WRITE)
    assert await wrong(lab, "invalidate_cblocks 0-3") == errnos.EIO
    assert (await lab.status())[-3:-1] == ["ro", "needs_check"]
    write = lab.submit(OP_WRITE, 0, 512)
    await settle()
    assert write.status == errnos.EIO
    assert lab.asked("o", "write") == []
