# SPDX-License-Identifier: Apache-2.0
"""A metadata device that can be read, but not written: the cache serves reads, and says why not more."""

import errno as errnos

import pytest

from nbdtarget.bio import OP_FLUSH, OP_READ, OP_WRITE
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle

A, B = 2, 3


async def left_dirty(lab: CacheLab) -> None:
    """A cache that was shut down with a dirty block in it."""
    await lab.create(DIRTY_BUSY)
    await lab.write(A)
    await lab.remove()


@pytest.mark.parametrize("ops", [(OP_WRITE,), (OP_WRITE, OP_FLUSH), (OP_FLUSH,)])
async def test_table_can_be_loaded_and_serves_reads(
    lab: CacheLab, ops: tuple[int, ...]
) -> None:
    await left_dirty(lab)
    image = lab.disks["m"].image()
    lab.fail("m", *ops)
    await lab.create(DIRTY_BUSY)
    for noflush in (False, True):
        assert (await lab.status(noflush=noflush))[-3:] == ["ro", "needs_check", ""]
    assert await lab.read(A) == b"w" * BLOCK
    assert await lab.read(B) == bytes(BLOCK)
    flush = lab.flush()
    await settle()
    assert flush.status == errnos.EIO
    assert lab.cblock(B) is None
    await lab.remove()
    if OP_WRITE in ops:
        assert lab.disks["m"].image() == image
    lab.fail("m")
    await lab.create(DIRTY_BUSY)
    assert (await lab.status())[-3:] == ["rw", "-", ""]
    assert await lab.read(A) == b"w" * BLOCK


async def test_table_that_is_loaded_again_over_the_live_one_is_well_again(
    lab: CacheLab,
) -> None:
    await left_dirty(lab)
    lab.fail("m", OP_WRITE, OP_FLUSH)
    await lab.create(DIRTY_BUSY)
    lab.fail("m")
    await lab.reload(DIRTY_BUSY)
    assert (await lab.status())[-3:] == ["rw", "-", ""]
    await lab.write_part(A)
    flush = lab.flush()
    await settle()
    assert flush.status == 0


async def test_blocks_that_may_be_stale_are_not_served(lab: CacheLab) -> None:
    """After a crash of a writethrough cache only the origin counts, and that cannot be recorded."""
    await lab.create("1 writethrough smq 0")
    await lab.message(f"warm {A}")
    await lab.pass_time(1)
    await lab.device.flush()
    await lab.cut_power()
    lab.fail("m", OP_WRITE, OP_FLUSH)
    with pytest.raises(Exception, match="m cannot be written"):
        await lab.create("1 writethrough smq 0")


async def test_metadata_that_cannot_be_read_are_refused(lab: CacheLab) -> None:
    await left_dirty(lab)
    lab.fail("m", OP_READ, OP_FLUSH, OP_WRITE)
    error = await lab.refused(DIRTY_BUSY)
    assert error.reason.startswith("Error creating metadata object: m: read")


async def test_metadata_that_fail_altogether_say_fail_for_good(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.write(A)
    lab.fail("m", OP_READ, OP_WRITE, OP_FLUSH)
    await lab.status(noflush=False)
    for noflush in (False, True):
        assert await lab.status(noflush=noflush) == ["Fail"]
