# SPDX-License-Identifier: Apache-2.0
"""Checklist 11.2, items 1 to 9 and 11: which blocks are written back, when, and that no data is lost.

The kernel's own battery, sizes and times scaled down; time is simulated.
"""

import asyncio
import errno as errnos

import pytest

from nbdtarget.common.errors import DeviceError
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.cache_battery import BackgroundIo
from tests.support.clock import settle

POLICIES = ["smq", "mq"]
FORMATS = ["0", "1 metadata2"]


@pytest.mark.parametrize("features", FORMATS)
@pytest.mark.parametrize("policy", POLICIES)
async def test_11_2_1_clean_data_never_gets_written_back(
    lab: CacheLab, policy: str, features: str
) -> None:
    await lab.create(f"{features} {policy} 0")
    await lab.fill_clean(range(32))
    await lab.pass_time(15)
    assert lab.asked("o", "write") == []


@pytest.mark.parametrize("sorts", [False, True])
async def test_11_2_2_dirty_data_always_gets_written_back(
    lab: CacheLab, sorts: bool
) -> None:
    await lab.create("1 sorted_writeback smq 0" if sorts else "0 smq 0")
    await lab.fill(range(31, -1, -1))
    lab.log.clear()
    await lab.pass_time(180, step=0.5)
    assert await lab.field("dirty") == "0"
    written = [at // BLOCK for _, at, _ in lab.asked("o", "write")]
    assert sorted(written) == list(range(32)), "exactly one write for each block"
    assert not sorts or written == sorted(written)


async def test_11_2_3_cache_remains_clean_through_reload(lab: CacheLab) -> None:
    await lab.create()
    await lab.fill_clean(range(32))
    await lab.reload()
    await lab.recreate()
    await lab.pass_time(15)
    assert lab.asked("o", "write") == []
    assert (await lab.used(), await lab.field("dirty")) == (32, "0")


async def test_11_2_4_clean_a_cache_with_large_blocks() -> None:
    lab = CacheLab(nr_cblocks=256, nr_oblocks=512)
    lab.block_size = 2 << 20
    await lab.create("0 smq 2 migration_threshold 102400")
    await lab.fill(range(4))
    await lab.pass_time(180, step=1)
    assert await lab.field("dirty") == "0"
    # With the default there is room for no block at all.
    await lab.recreate("0 smq 0")
    await lab.write_part(0)
    await lab.pass_time(180, step=1)
    assert await lab.field("dirty") == "1"
    await lab.close()


async def test_11_2_5_a_fresh_cache_is_trivial_to_clean(lab: CacheLab) -> None:
    await lab.create("0 cleaner 0")
    assert await lab.field("dirty") == "0"
    await lab.recreate("1 passthrough smq 0")


@pytest.mark.parametrize("how", ["recreate", "reload"])
async def test_11_2_5_a_dirtied_cache_can_be_cleaned(lab: CacheLab, how: str) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(32))
    swap = lab.recreate if how == "recreate" else lab.reload
    await swap("0 cleaner 0")
    await lab.pass_time(10)
    assert await lab.field("dirty") == "0"
    await swap("1 passthrough smq 0")
    assert await lab.read(7) == lab.on_disk("o", 7) == b"w" * BLOCK


async def test_11_2_6_uncache(lab: CacheLab) -> None:
    await lab.create("0 smq 0")
    fire = BackgroundIo(lab)
    burning = asyncio.create_task(fire.burn_until_stopped())
    await lab.pass_time(20, step=0.5)
    assert await lab.used() > 0
    await lab.reload("1 writethrough cleaner 0")
    for _ in range(120):
        await lab.pass_time(0.5)
        if await lab.field("dirty") == "0":
            break
    assert await lab.field("dirty") == "0", "though I/O goes on"
    nr_before = fire.nr_done
    await lab.registry.load("c", f"0 {lab.length // 512} linear /o 0")
    await lab.resume()
    await settle(500)
    assert fire.nr_done > nr_before
    fire.stop()
    await burning
    await fire.verify()
    assert lab.disks["o"].image() == fire.want


async def test_11_2_7_decommission_with_checksums(lab: CacheLab) -> None:
    await lab.create("0 smq 0")
    fire = BackgroundIo(lab)
    await fire.burn(400)
    await lab.recreate("0 cleaner 0")
    await lab.pass_time(10)
    assert await lab.field("dirty") == "0"
    await lab.remove()
    assert lab.disks["o"].image() == fire.want


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("features", ["1 no_discard_passdown", "0"])
async def test_11_2_8_discard_with_concurrent_io(
    lab: CacheLab, features: str, seed: int
) -> None:
    await lab.create(f"{features} smq 0")
    fire = BackgroundIo(lab, seed, discards=True)
    burning = asyncio.create_task(fire.burn_until_stopped())
    await lab.pass_time(20, step=0.5)
    fire.stop()
    await burning
    await fire.verify()
    await lab.clean()
    await fire.verify()


async def test_11_2_8_discard_out_of_bounds(lab: CacheLab) -> None:
    device = await lab.create()
    with pytest.raises(DeviceError) as caught:
        await device.discard(device.size, BLOCK)
    assert caught.value.errno in (errnos.EINVAL, errnos.ENOSPC)


async def test_11_2_8_discard_passed_to_origin(lab: CacheLab) -> None:
    await lab.create()
    await lab.device.discard(3 * BLOCK + 512, 7 * BLOCK)
    assert lab.asked("o", "discard") == [("discard", 3 * BLOCK + 512, 7 * BLOCK)]


@pytest.mark.parametrize("policy", ["smq", "mq", "cleaner"])
@pytest.mark.parametrize("features", ["0", "1 writethrough", "1 passthrough"])
async def test_11_2_9_dt_cache(lab: CacheLab, features: str, policy: str) -> None:
    await lab.create(f"{features} {policy} 0")
    fire = BackgroundIo(lab)
    for _ in range(3):
        await fire.burn(150)
        await lab.pass_time(2)
        await lab.suspend()
        await lab.resume()
        await fire.verify()
    await lab.recreate(f"{features} {policy} 0")
    await fire.verify()


@pytest.mark.parametrize("mode", ["writeback", "writethrough", "passthrough"])
async def test_11_2_11_no_io_when_idle(lab: CacheLab, mode: str) -> None:
    await lab.create()
    await lab.fill_clean(range(32))
    await lab.recreate(f"1 {mode} smq 0")
    await lab.read(0)
    await lab.pass_time(3)
    lab.log.clear()
    await lab.pass_time(30)
    assert lab.log == []
