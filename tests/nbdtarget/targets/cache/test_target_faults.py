# SPDX-License-Identifier: Apache-2.0
"""A cache whose disks fail: which copy counts, which clients are told, and which requests still work."""

import asyncio
import errno as errnos

from nbdtarget.bio import OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE
from nbdtarget.targets.disks import ORIGIN_ROLE
from nbdtarget_metadata.mode import Mode
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle


async def start_fails(lab: CacheLab) -> None:
    """Suspend, and let the commit of the resume fail: the disk still says that all is clean."""
    await lab.suspend()
    lab.fail("c", OP_FLUSH)
    error = await lab.resume_refused()
    assert "metadata commit failed" in str(error)
    lab.fail("c")
    await lab.resume()
    assert lab.core.mode is Mode.RO
    assert lab.core.is_recorded_clean


async def test_read_only_cache_takes_no_write_while_its_stop_stays_recorded(
    lab: CacheLab,
) -> None:
    # Otherwise the next start would find disks that changed after the recorded stop. And
    # it would fill the discarded block with zeroes as soon as that is promoted.
    await lab.create(DIRTY_BUSY)
    discard = lab.submit(OP_DISCARD, 5 * BLOCK, BLOCK)
    await settle()
    assert discard.status == 0
    await start_fails(lab)
    discarded = lab.submit(OP_WRITE, 5 * BLOCK, 512)
    other = lab.submit(OP_WRITE, 6 * BLOCK, 512)
    await settle()
    assert discarded.status == errnos.EIO
    assert other.status == errnos.EIO


async def test_table_loaded_during_a_failing_commit_is_kept(
    lab: CacheLab,
) -> None:
    """After the abort the failing table only reads: no generation of its own comes later."""
    await lab.create(DIRTY_BUSY)
    await lab.write(3)
    await lab.write_part(20)
    lab.fail_once("o", OP_FLUSH)
    lab.hold("m", OP_READ)  # the look whether the metadata can be read still
    flush = lab.flush()
    await settle()
    assert flush.status < 0
    assert lab.core.mode is Mode.RO
    lab.fail("o")
    loading = asyncio.ensure_future(lab.load(DIRTY_BUSY))
    await settle()
    lab.log.clear()
    lab.metadata.let_go()
    await loading
    await settle()
    assert flush.status == errnos.EIO
    assert not lab.asked("m", "write")
    await lab.resume()
    await lab.write(4)
    again = lab.flush()
    await settle()
    assert again.status == 0
    await lab.cut_power()
    await lab.create(DIRTY_BUSY)
    assert await lab.read(4) == b"w" * BLOCK


async def test_origin_that_lost_nothing_of_ours_leaves_the_cache_as_it_is(
    lab: CacheLab,
) -> None:
    """Its table was swapped while its flush failed, but all that we wrote was flushed before."""
    await lab.create(DIRTY_BUSY)
    await lab.fill([3])
    await lab.device.flush()
    lab.origin.health.note_loss()
    await settle()
    assert lab.core.mode is Mode.RW
    flush = lab.flush()
    await settle()
    assert flush.status == 0
    await lab.write_part(20)  # it goes to the origin
    lab.origin.health.note_loss()
    await settle()
    assert (await lab.status())[-3] == "ro"
    flush = lab.flush()
    await settle()
    assert flush.status == errnos.EIO


async def test_origin_that_could_not_be_flushed_is_not_sampled_at_a_stop(
    lab: CacheLab,
) -> None:
    """A sample may contain the zeroes of a DISCARD that a power cut undoes. The next start would then refuse the disk."""
    await lab.create()
    await lab.device.flush()
    lab.fail("o", OP_FLUSH)
    await lab.device.flush()
    assert ORIGIN_ROLE not in lab.target._samples()
    lab.fail("o")
    await lab.device.flush()
    assert ORIGIN_ROLE in lab.target._samples()
