# SPDX-License-Identifier: Apache-2.0
"""Checklist 1.2: a cache's table line, where test_table and test_constructor say nothing yet."""

import errno as errnos

import pytest

from nbdtarget.bio import OP_READ
from nbdtarget.devices.base import Device
from nbdtarget.policies.registry import policy_type
from nbdtarget.targets.cache.migrations import MIGRATIONS_MAX
from tests.support.cache import BLOCK, DIRTY_BUSY, SECTORS, CacheLab
from tests.support.clock import settle


async def test_1_2_step_2_all_three_are_opened_for_writing(lab: CacheLab) -> None:
    asked: dict[str, bool] = {}
    really_open = lab.open_device

    async def open_device(name: str, *, read_only: bool) -> Device:
        asked[name.strip("/")] = read_only
        return await really_open(name, read_only=read_only)

    lab.open_device = open_device  # type: ignore[method-assign]
    await lab.create()
    assert asked == {"m": False, "c": False, "o": False}


async def test_1_2_step_3_origin_shorter_than_the_table(lab: CacheLab) -> None:
    lab.length += BLOCK
    error = await lab.refused("0 smq 0")
    assert (error.errno, error.reason) == (
        errnos.EINVAL,
        "Device size larger than cached device",
    )
    lab.length -= BLOCK


async def test_1_2_step_3_excess_of_the_origin_is_not_touched(lab: CacheLab) -> None:
    lab.length = 16 * BLOCK
    await lab.create(DIRTY_BUSY)
    assert lab.device.size == 16 * BLOCK
    await lab.fill([15])
    await lab.clean()
    await lab.device.discard(0, 16 * BLOCK)
    ends = [at + length for _, at, length in lab.asked("o")]
    assert max(ends) <= 16 * BLOCK


async def test_1_2_step_7_sizes_are_rounded_down() -> None:
    lab = CacheLab(nr_cblocks=8, nr_oblocks=4, tail=BLOCK // 2)
    lab.resize("c", 8 * BLOCK - 512)
    await lab.create(DIRTY_BUSY)
    assert await lab.field("cache_blocks") == "0/7"
    assert lab.target._blocks.nr_oblocks == 4
    await lab.fill(range(4))
    assert lab.asked("c", "write")[-1] == ("write", 3 * BLOCK, BLOCK)
    await lab.close()


async def test_1_2_block_size_need_not_be_a_power_of_two() -> None:
    lab = CacheLab(nr_cblocks=12, nr_oblocks=32)
    lab.block_size = 3 * BLOCK
    await lab.create(DIRTY_BUSY)
    await lab.write(5)
    await lab.clean()
    assert lab.on_disk("o", 5) == b"w" * 3 * BLOCK
    assert (await lab.status())[2:4] == ["192", "1/4"]
    await lab.device.write(0, b"x" * lab.length)
    assert await lab.device.read(0, lab.length) == b"x" * lab.length
    await lab.recreate(DIRTY_BUSY)
    assert await lab.device.read(0, lab.length) == b"x" * lab.length
    await lab.close()


async def test_1_2_defaults(lab: CacheLab) -> None:
    await lab.create("0 default 0")
    status = " ".join(await lab.status())
    assert " 1 writeback 2 migration_threshold 2048 smq 0 rw - " in status
    await lab.device.discard(0, BLOCK)
    assert lab.asked("o", "discard") == [("discard", 0, BLOCK)]


async def test_1_2_metadata2_is_shown_as_the_table_has_it(lab: CacheLab) -> None:
    """There is one format, which has the dirty bits apart; the word changes nothing."""
    await lab.create("1 metadata2 smq 0")
    assert "metadata2" in await lab.status()
    await lab.recreate("0 smq 0")
    assert "metadata2" not in await lab.status()


@pytest.mark.parametrize(
    ("word", "name"),
    [("smq", "smq"), ("default", "smq"), ("mq", "mq"), ("cleaner", "cleaner")],
)
async def test_1_2_policies_and_the_names_they_report(
    lab: CacheLab, word: str, name: str
) -> None:
    await lab.create(f"0 {word} 0")
    assert policy_type(word).name == name
    assert (await lab.status())[16] == name
    assert lab.device.table()[0][3].endswith(f" 0 {word} 0")


async def test_1_2_migrations_under_way_are_bounded() -> None:
    """The bound is lower than the kernel's 128, because each migration has a whole block in memory."""
    lab = CacheLab(nr_cblocks=64, nr_oblocks=64)
    await lab.create()
    lab.hold("o", OP_READ)
    await lab.message("warm 0-64")
    await settle()
    assert len(lab.origin.held) == MIGRATIONS_MAX
    lab.origin.let_go()
    await lab.pass_time(5)
    assert await lab.used() == 64
    await lab.close()


async def test_1_2_cache_need_not_begin_at_sector_0(lab: CacheLab) -> None:
    """The kernel's cache forgets to subtract the sector at which it begins."""
    sectors = lab.length // 512
    cache = f"{SECTORS} {sectors} cache /m /c /o {SECTORS} {DIRTY_BUSY}"
    device = await lab.registry.create("c", f"0 {SECTORS} zero\n{cache}")
    await device.write(BLOCK, b"1" * BLOCK)
    await device.write(4 * BLOCK + 512, b"2" * 512)
    assert lab.asked("c", "write") == [("write", 0, BLOCK)]
    assert lab.asked("o", "write") == [("write", 3 * BLOCK + 512, 512)]
    assert await device.read(BLOCK, BLOCK) == b"1" * BLOCK
    await device.discard(BLOCK, BLOCK)
    assert lab.asked("o", "discard") == [("discard", 0, BLOCK)]
    assert await device.extents(BLOCK, BLOCK) != []
    await lab.registry.remove("c")
