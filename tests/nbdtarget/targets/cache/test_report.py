# SPDX-License-Identifier: Apache-2.0
"""The status line, field for field as the kernel prints it, and the named fields."""

import pytest

from nbdtarget.targets.base import StatusFields
from nbdtarget.targets.cache.blocks import Blocks
from nbdtarget.targets.cache.constructor import construct
from nbdtarget.targets.cache.report import status_fields, status_line
from nbdtarget_metadata.cache.metadata import Statistics
from tests.support.cache_parts import BLOCK, Bench, Table

MQ = (
    "mq 10 random_threshold 0 sequential_threshold 0 discard_promote_adjustment 0"
    " read_promote_adjustment 0 write_promote_adjustment 0"
)


async def recorded(words: str) -> Table:
    """A table as in the recordings: 64 MiB, cached in 256 blocks of 64 KiB."""
    bench = Bench(nr_cblocks=512, nr_oblocks=2048)
    line = ["m", "c", "o", "128", *words.split()]
    table = Table(bench, await construct(bench.ctx, line))
    await table.resume()
    return table


def line_of(blocks: Blocks, *, passdown: bool = True) -> str:
    """The status line, but for how many metadata blocks are used: these are not the kernel's."""
    words = status_line(blocks, discard_passdown=passdown).split(" ")
    used, total = map(int, words[1].split("/"))
    assert 4 <= used < total == 1024
    words[1] = "*/1024"
    return " ".join(words)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "1 metadata2 default 0",
            "8 */1024 128 0/256 0 0 0 0 0 0 0 2 metadata2 writeback 2"
            " migration_threshold 2048 smq 0 rw - ",
        ),
        (
            "0 mq 4 sequential_threshold 1024 random_threshold 8",
            "8 */1024 128 0/256 0 0 0 0 0 0 0 1 writeback 2"
            f" migration_threshold 2048 {MQ} rw - ",
        ),
        (
            "2 no_discard_passdown metadata2 smq 2 migration_threshold 0",
            "8 */1024 128 0/256 0 0 0 0 0 0 0 3 metadata2 writeback"
            " no_discard_passdown 2 migration_threshold 0 smq 0 rw - ",
        ),
        (
            "1 WRITETHROUGH smq 0",
            "8 */1024 128 0/256 0 0 0 0 0 0 0 1 writethrough 2"
            " migration_threshold 2048 smq 0 rw - ",
        ),
        (
            "2 metadata2 passthrough cleaner 0",
            "8 */1024 128 0/256 0 0 0 0 0 0 0 2 metadata2 passthrough 2"
            " migration_threshold 2048 cleaner 0 rw - ",
        ),
        (
            "3 sorted_writeback no_discard_passdown dirty_log smq 2 migration_rate 9",
            "8 */1024 128 0/256 0 0 0 0 0 0 0 4 writeback no_discard_passdown"
            " dirty_log sorted_writeback 4 migration_threshold 2048 migration_rate 9"
            " smq 0 rw - ",
        ),
    ],
)
async def test_fresh_line_is_as_recorded(words: str, line: str) -> None:
    table = await recorded(words)
    passdown = table.parts.options.discard_passdown
    assert line_of(table.blocks(), passdown=passdown) == line


async def used() -> Blocks:
    table = await recorded("2 metadata2 writeback smq 0")
    for nr in range(6):
        table.map(nr, 100 + nr, dirty=nr < 3)
    table.metadata.statistics = Statistics(12, 8, 3, 1)
    blocks = table.blocks()
    blocks.nr_demotions = 4
    blocks.nr_promotions = 7
    return blocks


async def test_line_of_a_used_cache_has_every_count_in_its_place() -> None:
    assert line_of(await used()) == (
        "8 */1024 128 6/256 12 8 3 1 4 7 3 2 metadata2 writeback 2"
        " migration_threshold 2048 smq 0 rw - "
    )


async def test_passdown_that_the_origin_refuses_is_shown_as_off() -> None:
    line = line_of(await used(), passdown=False)
    assert " 3 metadata2 writeback no_discard_passdown 2 migr" in line


async def test_values_that_messages_changed_are_shown() -> None:
    blocks = await used()
    blocks.options.migration_threshold = 64
    assert " 2 migration_threshold 64 smq" in line_of(blocks)


async def test_read_only_metadata_need_a_check_if_their_device_is_to_blame() -> None:
    table = await recorded("0 smq 0")
    table.map(0, 0)
    table.metadata.abort()
    assert line_of(table.blocks()).endswith(" smq 0 ro - ")
    table.metadata.blame()
    assert line_of(table.blocks()).endswith(" smq 0 ro needs_check ")


async def test_table_that_was_not_resumed_knows_of_no_blocks() -> None:
    bench = Bench()
    await bench.resumed(mapped=[(0, 5), (1, 6)], dirty=[1])
    blocks = (await bench.table("1 passthrough smq 0")).blocks()
    assert line_of(blocks) == (
        "8 */1024 64 0/8 0 0 0 0 0 0 0 1 passthrough 2 migration_threshold 2048"
        " smq 0 rw - "
    )


async def test_fields_say_what_the_line_does() -> None:
    blocks = await used()
    blocks.policy.pin(2)
    blocks.nr_migrating = 2
    blocks.nr_written_back = 5
    blocks.discards.set_range(0, 4 * BLOCK)
    expected: StatusFields = {
        "mode": "rw",
        "needs_check": False,
        "io_mode": "writeback",
        "metadata_block_size_sectors": 8,
        "metadata_blocks_used": blocks.metadata.used_blocks,
        "metadata_blocks_total": 1024,
        "block_size_bytes": 65536,
        "cache_blocks_used": 6,
        "cache_blocks_total": 256,
        "read_hits": 12,
        "read_misses": 8,
        "write_hits": 3,
        "write_misses": 1,
        "hit_ratio": 0.625,
        "demotions": 4,
        "promotions": 7,
        "migrating": 2,
        "dirty_blocks": 3,
        "dirty_bytes": 3 * 65536,
        "written_back_bytes": 5 * 65536,
        "pinned_blocks": 1,
        "discarded_bytes": 2 * 65536,
        "metadata2": True,
        "discard_passdown": True,
        "dirty_log": False,
        "sorted_writeback": False,
        "migration_threshold_sectors": 2048,
        "migration_rate_bytes_per_s": 0,
        "policy": "smq",
    }
    assert status_fields(blocks, discard_passdown=True) == expected


async def test_hit_ratio_of_nothing_is_nothing() -> None:
    table = await recorded("0 smq 0")
    fields = status_fields(table.blocks(), discard_passdown=True)
    assert fields["hit_ratio"] is None


async def test_fields_are_there_when_the_metadata_have_failed() -> None:
    blocks = await used()
    blocks.metadata.fail()
    fields = status_fields(blocks, discard_passdown=True)
    assert (fields["mode"], fields["cache_blocks_used"]) == ("Fail", 6)
