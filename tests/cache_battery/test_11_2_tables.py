# SPDX-License-Identifier: Apache-2.0
"""Checklist 11.2, items 10 and 12 to 24, and 11.3: passthrough, failures, policies, sizes."""

import asyncio
import errno as errnos

import pytest

from nbdtarget.bio import OP_READ
from nbdtarget.common.errors import TableError
from nbdtarget.common.permissions import OVERWRITE
from nbdtarget_metadata.log.superblock import SUPERBLOCK_BLOCKS
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.cache_battery import BackgroundIo
from tests.support.cache_parts import Bench

PASSTHROUGH = "1 passthrough smq 0"


async def hundred_in_passthrough(*, full: bool) -> CacheLab:
    lab = CacheLab(nr_cblocks=100, nr_oblocks=128)
    await lab.create(DIRTY_BUSY)
    if full:
        await lab.fill_clean(range(100))
    await lab.recreate(PASSTHROUGH)
    return lab


# 10: invalidate_cblocks


async def test_11_2_10_must_be_in_passthrough_mode(lab: CacheLab) -> None:
    for mode in ("writeback", "writethrough"):
        await lab.create(f"1 {mode} smq 0")
        with pytest.raises(TableError) as caught:
            await lab.message("invalidate_cblocks 0-32")
        assert caught.value.errno == errnos.EPERM
        await lab.remove()


@pytest.mark.parametrize("full", [False, True])
async def test_11_2_10_invalidate_all_leaves_no_mappings(full: bool) -> None:
    lab = await hundred_in_passthrough(full=full)
    await lab.message("invalidate_cblocks 0-100")
    assert await lab.used() == 0
    await lab.remove()
    assert (await lab.recorded()).nr_mapped == 0
    await lab.close()


async def test_11_2_10_invalidate_unmaps_exactly_what_is_named() -> None:
    lab = await hundred_in_passthrough(full=True)
    await lab.message("invalidate_cblocks 0 5 11 50-60 91-99")
    gone = [nr for nr in range(100) if lab.core.maybe_oblock(nr) is None]
    assert gone == [0, 5, 11, *range(50, 60), *range(91, 99)]
    await lab.close()


@pytest.mark.parametrize(
    "words", ["50-500", "50..60", "50--60", "-60", "50-", "fred", "0x5", "5 fred"]
)
async def test_11_2_10_bad_ranges_fail(words: str) -> None:
    lab = await hundred_in_passthrough(full=True)
    with pytest.raises(TableError) as caught:
        await lab.message(f"invalidate_cblocks {words}")
    assert caught.value.errno == errnos.EINVAL
    assert await lab.used() == (99 if words.startswith("5 ") else 100)
    await lab.close()


# 12


async def test_11_2_12_bad_metadata_is_detected(lab: CacheLab) -> None:
    lab.put("m", b"\x45\x30 version 12345")
    error = await lab.refused("0 smq 0")
    assert error.reason.startswith("Error creating metadata object")
    lab.put("m", b"\0")


async def test_11_2_12_can_reactivate_unused_cache(lab: CacheLab) -> None:
    await lab.create()
    for _ in range(3):
        await lab.recreate()
    assert await lab.used() == 0


# 13


@pytest.mark.parametrize("breaking", ["error", "flakey"])
async def test_11_2_13_commit_failure_shows_needs_check_until_it_is_loaded_again(
    breaking: str,
) -> None:
    """The body of the metadata breaks: the superblocks' first blocks can be written still.

    The kernel then records needs_check there, and wants a tool to take it back. But nothing on
    the disk is in doubt, so here the same line works as soon as the disk is well.
    """
    lab = CacheLab(nr_cblocks=32, nr_oblocks=128)
    sectors, head = lab.metadata.size // 512, SUPERBLOCK_BLOCKS * 8
    whole = f"0 {sectors} linear /m 0"
    await lab.registry.create("m", whole)
    line = f"0 {lab.length // 512} cache /dev/mapper/m /c /o 64 {DIRTY_BUSY}"
    device = await lab.registry.create("c", line)
    await device.write(0, b"w" * BLOCK)
    body = f"{head} {sectors - head} "
    if breaking == "error":
        body += "error"
    else:
        body += f"flakey /m {head} 0 3600 1 error_writes"
    await lab.registry.load("m", f"0 {head} linear /m 0\n{body}")
    await lab.registry.resume("m")
    await device.status()
    mode = (await lab.status())[-3:]
    await lab.remove()
    await lab.registry.load("m", whole)
    await lab.registry.resume("m")
    assert mode == ["ro", "needs_check", ""]
    await lab.registry.remove("m")
    await lab.create(DIRTY_BUSY)
    assert (await lab.status())[-3:] == ["rw", "-", ""]
    await lab.close()


# 14


@pytest.mark.parametrize("nr_cblocks", [23, 513, 1023, 4095])
@pytest.mark.parametrize("clean", [False, True])
async def test_11_2_14_no_resize_retains_mappings(nr_cblocks: int, clean: bool) -> None:
    bench = Bench(nr_cblocks=nr_cblocks, nr_oblocks=2 * nr_cblocks)
    mapped = [(nr, 2 * nr_cblocks - 1 - nr) for nr in range(nr_cblocks)]
    table = await bench.resumed(mapped=mapped)
    if clean:
        await table.suspend()
    else:
        assert await table.committer.commit()
        await table.committer.quiesce()
    bench.cut_power()
    table = await bench.table()
    await table.resume()
    metadata = table.metadata
    assert [(nr, metadata.maybe_oblock(nr)) for nr in range(nr_cblocks)] == mapped
    assert metadata.nr_dirty == (0 if clean else nr_cblocks)


# 15


async def test_11_2_15_passthrough_never_promotes(lab: CacheLab) -> None:
    await lab.create(PASSTHROUGH)
    for _ in range(100):
        await lab.device.write(0, bytes(640 * 512))
        await lab.pass_time(0.25)
    assert (await lab.used(), await lab.field("promotions")) == (0, "0")


async def test_11_2_15_passthrough_demotes_writes(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(32))
    await lab.recreate(PASSTHROUGH)
    await lab.device.write(0, bytes(lab.length))
    assert (await lab.used(), await lab.field("demotions")) == (0, "32")
    assert lab.disks["o"].image() == bytes(lab.length)


async def test_11_2_15_passthrough_does_not_demote_reads(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(32))
    await lab.recreate(PASSTHROUGH)
    await lab.device.read(0, lab.length)
    assert (await lab.used(), await lab.field("demotions")) == (32, "0")


async def test_11_2_15_passthrough_fails_with_dirty_blocks(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([3])
    await lab.remove()
    with pytest.raises(TableError, match="unless all blocks are clean"):
        await lab.create(PASSTHROUGH)


# 16


async def test_11_2_16_switch_through_the_policies(lab: CacheLab) -> None:
    await lab.create("0 cleaner 0")
    fire = BackgroundIo(lab)
    for policy in ("smq", "mq", "cleaner", "mq", "smq", "mq"):
        await fire.burn(80)
        await lab.reload(f"0 {policy} 0")
        assert policy in await lab.status()
        await fire.verify()


async def test_11_2_16_reload_cleaner(lab: CacheLab) -> None:
    await lab.create()
    for _ in range(3):
        await lab.fill(range(16))
        await lab.reload("0 cleaner 0")
        await lab.pass_time(5)
        assert await lab.field("dirty") == "0"
        await lab.reload()
        assert await lab.used() == 16


async def test_11_2_16_alternate_under_io(lab: CacheLab) -> None:
    await lab.create("0 smq 0")
    fire = BackgroundIo(lab)
    burning = asyncio.create_task(fire.burn_until_stopped())
    for policy in ("mq", "smq") * 5:
        await lab.pass_time(1)
        await lab.reload(f"0 {policy} 0")
    fire.stop()
    await burning
    await fire.verify()


# 17


@pytest.mark.parametrize("how", ["teardown", "reload"])
async def test_11_2_17_resize_origin_with_discards(lab: CacheLab, how: str) -> None:
    swap = lab.recreate if how == "teardown" else lab.reload
    whole = lab.length
    await lab.create()
    await lab.device.discard(0, whole)
    await lab.fill_clean(range(4))
    lab.length = whole // 4
    await swap("0 smq 0")
    assert lab.device.size == whole // 4
    assert lab.target._discards.nr_discarded == 28
    lab.length = whole
    await swap("0 smq 0")
    assert (await lab.used(), lab.target._discards.nr_discarded) == (4, 28)


async def test_11_2_17_metadata_can_grow() -> None:
    bench = Bench(nr_cblocks=1024, nr_oblocks=8192)
    bench.metadata.size = bench.metadata.device.size = 8 << 20
    mapped = [(nr, nr * 3) for nr in range(1024)]
    table = await bench.resumed(mapped=mapped)
    await table.suspend()
    bench.cut_power()
    bench.resize_cache(1024 + 5678)
    table = await bench.table()
    await table.resume()
    assert table.metadata.nr_cblocks == 6702
    kept = [(nr, table.metadata.maybe_oblock(nr)) for nr in range(1024)]
    assert kept == mapped
    assert table.metadata.nr_mapped == 1024


async def test_11_2_17_metadata_can_shrink() -> None:
    bench = Bench(nr_cblocks=1024, nr_oblocks=8192)
    mapped = [(nr, nr * 3) for nr in range(1024)]
    table = await bench.resumed(mapped=mapped)
    await table.suspend()
    bench.cut_power()
    bench.resize_cache(512)
    table = await bench.table()
    await table.resume()
    kept = [(nr, table.metadata.maybe_oblock(nr)) for nr in range(512)]
    assert kept == mapped[:512]
    assert table.metadata.nr_mapped == table.parts.policy.residency == 512


# 18 and 19


async def test_11_2_18_small_stack() -> None:
    """One block and a tail on each."""
    lab = CacheLab(nr_cblocks=1, nr_oblocks=1, tail=50 * 1024 - BLOCK)
    lab.resize("c", 50 * 1024)
    await lab.create("0 smq 0")
    fire = BackgroundIo(lab)
    data = bytes(range(256)) * 200
    for _ in range(4):
        await lab.device.write(0, data)
        assert await lab.device.read(0, len(data)) == data
        await lab.pass_time(2)
    assert await lab.field("cache_blocks") == "1/1"
    assert fire.nr_done == 0
    await lab.recreate("0 smq 0")
    assert await lab.device.read(0, len(data)) == data
    await lab.close()


async def test_11_2_19_writethrough_has_nothing_dirty(lab: CacheLab) -> None:
    await lab.create("1 writethrough smq 0")
    fire = BackgroundIo(lab)
    await lab.message("warm 0-16")
    await lab.pass_time(3)
    for _ in range(5):
        await fire.burn(60)
        assert await lab.field("dirty") == "0"
    assert int(await lab.field("write_hits")) > 0
    assert lab.disks["o"].image() == fire.want


async def test_11_2_19_clean_after_crash(lab: CacheLab) -> None:
    await lab.create("1 writethrough smq 0")
    await lab.message("warm 0-16")
    await lab.pass_time(3)
    assert await lab.used() == 16
    await lab.cut_power()
    await lab.create("1 writethrough smq 0")
    # At once: the origin has everything, and nothing that was cached counts.
    assert (await lab.field("dirty"), await lab.used()) == ("0", 0)


# 21


@pytest.mark.parametrize("damage", ["the superblocks", "all that is in use"])
async def test_11_2_21_damaged_metadata_are_refused_and_left_alone(
    lab: CacheLab, damage: str
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(32))
    await lab.remove()
    image = bytearray(lab.disks["m"].image())
    nr_blocks = SUPERBLOCK_BLOCKS if damage == "the superblocks" else 64
    for at in range(0, nr_blocks * 4096, 4096):
        image[at + 100 : at + 612] = b"damaged!" * 64
    lab.put("m", bytes(image))
    error = await lab.refused(DIRTY_BUSY)
    assert error.reason.startswith("Error creating metadata object")
    assert lab.disks["m"].image() == image
    lab.put("m", b"\0")


# 23 and 24


async def test_11_2_23_huge_error_devices_just_create(lab: CacheLab) -> None:
    sectors = 1 << 38  # 128 TiB
    await lab.registry.create("huge", f"0 {sectors} error")
    await lab.registry.create("fast", f"0 {1 << 33} error")
    devices = "/m /dev/mapper/fast /dev/mapper/huge"
    await lab.registry.create(
        "c",
        f"0 {sectors} cache {devices} 2097152 0 smq 0",
        # A device that cannot be read may hold data.
        permissions=frozenset((OVERWRITE,)),
    )
    assert (await lab.status())[2:4] == ["2097152", "0/4096"]
    read = lab.submit(OP_READ, 1 << 46, 512)
    assert read.status == errnos.EIO
    lab.block_size = 1 << 30


async def test_11_2_24_cache_in_a_stack(lab: CacheLab) -> None:
    """Over a striped origin and a linear cache device; under a linear device."""
    half = lab.length // 1024
    lines = {
        "orig": f"0 {half} striped 2 128 /o 0 /o {half // 2}",
        "fast": f"0 {8 * 64} linear /c 64",
        "c": f"0 {half} cache /m /dev/mapper/fast /dev/mapper/orig 64 0 smq 0",
        "top": f"0 {half - 64} linear /dev/mapper/c 64",
    }
    for name, line in lines.items():
        await lab.registry.create(name, line)
    top = lab.registry.get("top")
    data = bytes(range(256)) * (top.size // 256)
    await top.write(0, data)
    await lab.pass_time(5)
    assert await top.read(0, top.size) == data
    await top.discard(BLOCK, BLOCK)
    await top.flush()
    assert (await top.read(2 * BLOCK, BLOCK)) == data[2 * BLOCK : 3 * BLOCK]
    await lab.registry.remove("top")


# 11.3


async def test_11_3_small_config(lab: CacheLab) -> None:
    lab.length = BLOCK
    await lab.create("0 smq 0")
    await lab.fill([0])
    assert await lab.used() == 1


async def test_11_3_expand_origin_with_reload(lab: CacheLab) -> None:
    whole = lab.length
    lab.length = whole // 4
    await lab.create()
    await lab.device.discard(0, lab.length)
    lab.length = whole
    await lab.reload()
    assert (lab.target._discards.nr_dblocks, lab.target._discards.nr_discarded) == (
        128,
        32,
    )
    await lab.suspend()
    discarded = (await lab.recorded()).discarded
    assert discarded is not None
    assert len(discarded.bits) == 128


@pytest.mark.parametrize("how", ["teardown", "reload"])
async def test_11_3_shrink_origin_drops_mappings(lab: CacheLab, how: str) -> None:
    await lab.create()
    await lab.fill_clean([0, 5, 63, 64, 100, 127])
    lab.length //= 2
    await (lab.recreate if how == "teardown" else lab.reload)("0 smq 0")
    cached = [nr for nr in range(128) if lab.cblock(nr) is not None]
    assert cached == [0, 5, 63]
    await lab.remove()
    assert (await lab.recorded()).nr_mapped == 3


@pytest.mark.parametrize("how", ["teardown", "reload"])
async def test_11_3_shrink_origin_should_fail_if_blocks_dirty(
    lab: CacheLab, how: str
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([5, 100])
    whole = lab.length
    lab.length //= 2
    with pytest.raises(TableError) as caught:
        await (lab.recreate if how == "teardown" else lab.reload)(DIRTY_BUSY)
    assert caught.value.errno == errnos.EFBIG
    lab.length = whole
    await (lab.create if how == "teardown" else lab.reload)(DIRTY_BUSY)
    assert await lab.field("dirty") == "2"
    assert await lab.read(100) == b"w" * BLOCK
