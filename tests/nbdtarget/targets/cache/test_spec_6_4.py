# SPDX-License-Identifier: Apache-2.0
"""Checklist 6.4: a cache's status. Beside what the kernel printed: test_report, test_recordings."""

import pytest

from nbdtarget.bio import OP_READ
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle

BUSY = "2 migration_threshold 0"
A, B = 3, 4  # blocks of the origin


async def test_6_4_metadata_blocks_of_4_kib_are_used_and_total(lab: CacheLab) -> None:
    await lab.create()
    status = await lab.status()
    assert status[0] == "8"
    used, _, total = status[1].partition("/")
    assert 0 < int(used) < int(total) == lab.metadata.size // 4096


async def test_6_4_used_blocks_have_those_that_are_on_the_way(lab: CacheLab) -> None:
    await lab.create()
    lab.hold("o", OP_READ)
    await lab.message(f"warm {A}")
    await settle()
    assert (await lab.used(), lab.cblock(A)) == (1, None)
    lab.origin.let_go()
    await settle()
    assert await lab.used() == 1


async def test_6_4_only_hits_and_misses_are_kept_for_the_next_table(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(8))
    await lab.message("warm 20")
    await lab.pass_time(2)
    for _ in range(3):
        await lab.device.read(20 * BLOCK, 512)
        await lab.device.read(30 * BLOCK, 512)
        await lab.write_part(20)
        await lab.write_part(30)
    hits = ["read_hits", "read_misses", "write_hits", "write_misses"]
    names = [*hits, "demotions", "promotions"]
    before = await lab.fields()
    assert [before[name] for name in names] == ["3", "3", "3", "3", "1", "9"]
    await lab.recreate(DIRTY_BUSY)
    after = await lab.fields()
    assert [after[name] for name in names] == ["3", "3", "3", "3", "0", "0"]


async def test_6_4_dirty_blocks_are_field_14_of_the_whole_line(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A, B])
    ((begin, length, kind, words),) = await lab.device.status()
    fields = f"{begin} {length} {kind} {words}".split()
    assert (fields[6], fields[13]) == ("2/8", "2")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("0 smq 0", "1 writeback"),
        ("3 no_discard_passdown WRITETHROUGH metadata2 smq 0", None),
        ("1 passthrough smq 0", "1 passthrough"),
    ],
)
async def test_6_4_features_are_counted_and_in_order(
    lab: CacheLab, words: str, shown: str | None
) -> None:
    await lab.create(words)
    line = " ".join((await lab.status())[11:])
    want = shown or "3 metadata2 writethrough no_discard_passdown"
    assert line.startswith(f"{want} 2 migration_threshold 2048 smq 0 rw - ")


async def test_6_4_line_ends_with_a_blank(lab: CacheLab) -> None:
    await lab.create()
    assert (await lab.device.status())[0][3].endswith(" rw - ")


async def test_6_4_fail_is_one_word_and_the_status_that_finds_out_says_error(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.write(A)
    lab.metadata.fails = lambda _: 5
    assert await lab.status(noflush=False) == ["Error"]
    assert await lab.status(noflush=False) == ["Fail"]


async def test_6_4_table_is_the_devices_then_the_words_as_given(lab: CacheLab) -> None:
    words = (
        "2 METADATA2 writeback default 4 MIGRATION_THRESHOLD 1 migration_threshold 7"
    )
    await lab.create(f"{words} trailing words")
    await lab.message("migration_threshold 9")
    assert lab.device.table()[0][3] == f"m c o 64 {words} trailing words"
    assert "migration_threshold 9 smq 0" in " ".join(await lab.status())
