# SPDX-License-Identifier: Apache-2.0
"""The constructor: the kernel's order of checks, and nothing touched when one fails."""

import errno as errnos

import pytest

from nbdtarget.bio import OP_WRITE
from nbdtarget.common.errors import ConstructorError
from nbdtarget.devices.base import Device
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.policies.base import PROMOTE
from nbdtarget.targets import metadata_io
from nbdtarget.targets.cache.constructor import construct
from nbdtarget_metadata.cache.metadata import CacheMetadata, Statistics
from nbdtarget_metadata.mode import Mode
from tests.support.cache_parts import BLOCK, SECTORS, Bench
from tests.support.clock import SimClock
from tests.support.clone import Context

SIZE = 64 * BLOCK
CONFIG = "Error setting cache policy's config values"


def context(**sizes: int) -> Context:
    devices: dict[str, Device] = {
        name: MemoryDevice(size, name=name)
        for name, size in {"m": 1 << 20, "c": 8 * BLOCK, "o": SIZE, **sizes}.items()
    }
    return Context(devices, SIZE, SimClock())


def chunks(ctx: Context) -> dict[str, int]:
    return {
        name: device.nr_chunks
        for name, device in ctx.devices.items()
        if isinstance(device, MemoryDevice)
    }


@pytest.mark.parametrize(
    ("line", "text", "errno"),
    [
        ("", "Insufficient args", errnos.EINVAL),
        ("no no no x 0", "Insufficient args", errnos.EINVAL),
        ("no no no x x x", "Error opening metadata device", errnos.ENOENT),
        ("m no no x x x", "Error opening cache device", errnos.ENOENT),
        ("m c no x x x", "Error opening origin device", errnos.ENOENT),
        ("m c tiny x x x", "Device size larger than cached device", errnos.EINVAL),
        ("m c o x x x", "Invalid data block size", errnos.EINVAL),
        ("m c o 96 x x", "Invalid data block size", errnos.EINVAL),
        (
            "m tiny o 64 x x",
            "Data block size is larger than the cache device",
            errnos.EINVAL,
        ),
        (
            "m c o 64 x x",
            "Invalid number of cache feature arguments",
            errnos.EINVAL,
        ),
        ("m c o 64 1 x x", "Unrecognised cache feature requested", errnos.EINVAL),
        (
            "m c o 64 2 writeback writeback x",
            "Duplicate cache io_mode features requested",
            errnos.EINVAL,
        ),
        ("m c o 64 1 writeback", "Insufficient args", errnos.EINVAL),
        ("m c o 64 0", "Insufficient args", errnos.EINVAL),
        ("m c o 64 1", "Invalid number of cache feature arguments", errnos.EINVAL),
        ("m c o 64 0 x", "Invalid number of policy arguments", errnos.EINVAL),
        ("m c o 64 0 x 1 x", "Error creating cache's policy", errnos.EINVAL),
        ("tiny c o 64 0 smq 1 x", CONFIG, errnos.EINVAL),
        (
            "tiny c o 64 0 smq 2 sequential_threshold 8",
            f"{CONFIG}: bad config value for sequential_threshold: 8",
            errnos.EINVAL,
        ),
        ("tiny c o 64 0 mq 2 sequential_threshold x", CONFIG, errnos.EINVAL),
        ("tiny c o 64 0 smq 0", "Error creating metadata object", errnos.ENOSPC),
        ("foreign c o 64 0 smq 0", "Error creating metadata object", errnos.EILSEQ),
        ("new c o 64 0 smq 2 migration_threshold x", CONFIG, errnos.EINVAL),
    ],
)
async def test_refusal_touches_nothing(line: str, text: str, errno: int) -> None:
    ctx = context(tiny=8192, foreign=1 << 20)
    await ctx.devices["foreign"].write(0, b"LABELONE" * 512)
    before = chunks(ctx)
    with pytest.raises(ConstructorError) as caught:
        await construct(ctx, line.split())
    assert caught.value.reason.startswith(text)
    assert caught.value.errno == errno
    assert ctx.nr_open == 0
    assert ctx.created == {}
    assert chunks(ctx) == before


async def test_missing_metadata_is_created_at_the_right_size() -> None:
    ctx = context()
    parts = await construct(ctx, ["new", "c", "o", "64", "0", "default", "0"])
    assert ctx.created == {"new": CacheMetadata.device_size_for(8)}
    assert ctx.nr_open == 3
    assert parts.metadata.nr_cblocks == 8
    assert parts.metadata.origin_size == SIZE
    assert parts.policy.name == "smq"


async def test_block_size_may_be_no_power_of_two_and_the_origin_smaller_than_it() -> (
    None
):
    ctx = context()
    ctx.length = BLOCK + 512
    parts = await construct(ctx, ["m", "c", "o", "192", "0", "default", "0"])
    assert parts.block_size == 3 * BLOCK
    assert (parts.metadata.nr_cblocks, parts.metadata.nr_oblocks) == (2, 0)


async def test_construction_leaves_the_clean_shutdown_on_disk() -> None:
    bench = Bench()
    table = await bench.resumed(mapped=[(1, 5)], dirty=[1])
    await table.suspend()
    bench.cut_power()
    bench.log.clear()
    again = await bench.table()
    assert "write" not in {op for _, op, _, _ in bench.log}
    assert again.metadata.clean_when_opened
    assert again.metadata.is_recorded_clean


async def test_statistics_are_those_of_the_last_table() -> None:
    bench = Bench()
    table = await bench.resumed()
    table.metadata.statistics.read_hits = 7
    table.metadata.statistics.write_misses = 3
    await table.suspend()
    bench.cut_power()
    again = await bench.table()
    assert again.metadata.statistics == Statistics(7, 0, 0, 3)


async def test_both_tables_have_one_metadata_object() -> None:
    bench = Bench()
    live = await bench.resumed()
    inactive = await bench.table("1 writethrough cleaner 0")
    assert inactive.metadata is live.metadata
    assert inactive.parts.policy is not live.parts.policy


@pytest.mark.parametrize("is_open", [True, False])
async def test_other_block_size_is_refused(is_open: bool) -> None:
    bench = Bench()
    await bench.resumed()
    if not is_open:
        bench.cut_power()
    nr_open = bench.ctx.nr_open
    with pytest.raises(
        ConstructorError, match="metadata object: m: data block size"
    ) as caught:
        await construct(bench.ctx, f"m c o {3 * SECTORS} 0 smq 0".split())
    assert caught.value.errno == errnos.EINVAL
    assert bench.ctx.nr_open == nr_open


async def test_metadata_that_need_a_check_are_refused() -> None:
    bench = Bench()
    table = await bench.resumed(mapped=[(0, 0)])
    table.metadata.abort()
    await metadata_io.run(bench.metadata, table.metadata.record_needs_check())
    with pytest.raises(ConstructorError) as caught:
        await bench.table()
    assert caught.value.reason == (
        "Unable to get write access to metadata, please check/repair metadata."
        " m is marked as needing a check: `nbdtarget metadata check"
        " --clear-needs-check m` checks it, and removes the mark if there is no damage"
    )
    assert caught.value.errno == errnos.EINVAL


@pytest.mark.parametrize("part", ["journal", "superblock"])
async def test_metadata_that_refused_a_commit_are_opened_again_as_they_are(
    part: str,
) -> None:
    """The disk holds a complete commit, which needs no check."""
    bench = Bench()
    table = await bench.resumed(mapped=[(0, 0)])
    is_journal = part == "journal"
    bench.metadata.fails = lambda bio: (
        errnos.EIO
        if bio.op == OP_WRITE and (bio.offset >= 4 * 4096) == is_journal
        else 0
    )
    assert not await table.committer.commit()
    assert table.metadata.needs_check, "as the kernel says it, in core"
    bench.metadata.fails = lambda bio: 0
    again = await bench.resumed()
    assert not again.metadata.needs_check
    assert again.metadata.mode is Mode.RW


async def test_failed_metadata_are_read_anew_by_the_next_table() -> None:
    bench = Bench()
    failed = await bench.resumed(mapped=[(0, 0)])
    failed.metadata.fail()
    table = await bench.table()
    assert table.metadata is not failed.metadata
    assert table.metadata.nr_mapped == 0


async def test_unreadable_metadata_are_refused_with_the_devices_errno() -> None:
    bench = Bench()
    bench.metadata.fails = lambda bio: errnos.ENOLINK
    with pytest.raises(ConstructorError, match="metadata object: m: read") as caught:
        await bench.table()
    assert caught.value.errno == errnos.ENOLINK
    assert bench.ctx.nr_open == 0


async def test_rotten_superblock_copy_is_a_warning_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench()
    await bench.resumed()
    bench.cut_power()
    await bench.metadata.device.write(40, b"\x55\xaa")
    await bench.table()
    await bench.table()
    assert caplog.text.count("(block 0)") == 1


async def test_old_keys_of_mq_are_taken_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench()
    table = await bench.table("0 mq 2 sequential_threshold 1024")
    assert "tunable 'sequential_threshold' no longer has any effect" in caplog.text
    assert table.parts.policy.name == "mq"


@pytest.mark.parametrize(
    ("mode", "promotes"),
    [("writeback", True), ("writethrough", True), ("passthrough", False)],
)
async def test_passthrough_promotes_nothing(mode: str, promotes: bool) -> None:
    bench = Bench()
    table = await bench.resumed(f"1 {mode} smq 0")
    work = table.parts.policy.maybe_promote(3)
    assert (work is not None and work.op == PROMOTE) is promotes


async def test_many_cache_blocks_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    monkeypatch.setattr("nbdtarget.targets.cache.constructor.NR_CBLOCKS_WARNING", 7)
    await bench.table()
    assert "c: 8 cache blocks take much memory" in caplog.text
