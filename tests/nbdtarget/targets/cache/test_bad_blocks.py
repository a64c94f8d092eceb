# SPDX-License-Identifier: Apache-2.0
"""The cache device fails, and the origin has everything: clients notice nothing."""

import errno as errnos
from collections.abc import AsyncIterator

import pytest

from nbdtarget.bio import FUA, OP_FLUSH, OP_READ, OP_WRITE, OP_WRITE_ZEROES, Bio
from nbdtarget.targets.powercut.volatile_cache import Fate
from nbdtarget_metadata.mode import Mode
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle

THROUGH = "1 writethrough smq 0"
A, B = 2, 3


@pytest.fixture(params=["inline", "later"])
async def lab(request: pytest.FixtureRequest) -> AsyncIterator[CacheLab]:
    """A cache device that fails inside `submit`, and one that fails later."""
    lab = CacheLab()
    lab.put("o", bytes(range(256)))
    lab.cache.fails_inline = request.param == "inline"
    yield lab
    await lab.check()
    await lab.close()


async def cached(lab: CacheLab, *oblocks: int) -> None:
    """A writethrough cache in which these blocks are, and durably so."""
    await lab.create(THROUGH)
    for oblock in oblocks:
        await lab.message(f"warm {oblock}")
        await lab.pass_time(1)
        assert lab.cblock(oblock) is not None
    await lab.device.flush()
    lab.log.clear()


async def ended(lab: CacheLab, *bios: Bio) -> list[int]:
    """Let what the cache device holds back fail or end; what the bios have ended with."""
    await settle()
    lab.cache.let_go()
    await settle()
    return [bio.status for bio in bios]


def fail(lab: CacheLab, *ops: int) -> None:
    lab.fail("c", *ops)
    if not lab.cache.fails_inline:
        lab.hold("c", *ops)


async def test_failed_read_of_a_clean_block_goes_to_the_origin(lab: CacheLab) -> None:
    await cached(lab, A, B)
    events = lab.device.event_nr
    fail(lab, OP_READ)
    reads = [lab.submit(OP_READ, A * BLOCK + at, 512) for at in (0, 512, 4096)]
    assert await ended(lab, *reads) == [0] * 3
    for bio in reads:
        assert bytes(bio.payload or b"") == bytes(range(256)) * 2
    assert lab.cblock(A) is None
    assert (await lab.recorded()).maybe_cblock(A) is None, "durably"
    assert lab.cblock(B) is not None
    assert lab.device.event_nr > events
    fields = lab.target.status_fields()
    assert fields["errors"] == 3
    assert fields["blocks_given_up"] == 1
    assert str(fields["last_error"]).startswith("cache device: c: read of 512 bytes")
    lab.fail("c")
    assert await lab.used() == 1
    await lab.message(f"warm {A}")
    await lab.pass_time(1)
    assert lab.cblock(A) is not None, "it may be cached again"


async def test_failed_read_across_blocks_is_whole(lab: CacheLab) -> None:
    await cached(lab, A, B)
    fail(lab, OP_READ)
    read = lab.submit(OP_READ, A * BLOCK + 512, 3 * BLOCK)
    assert await ended(lab, read) == [0]
    assert bytes(read.payload or b"") == bytes(range(256)) * (3 * BLOCK // 256)


async def test_failed_read_of_a_dirty_block_is_an_error(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.write(A)
    fail(lab, OP_READ)
    read = lab.submit(OP_READ, A * BLOCK, 512)
    assert await ended(lab, read) == [errnos.EIO]
    assert lab.cblock(A) is not None
    lab.fail("c")
    assert await lab.read(A) == b"w" * BLOCK


async def test_failed_read_of_what_the_origin_may_have_lost_is_an_error(
    lab: CacheLab,
) -> None:
    """A block was written back and not flushed, and the origin's power cut has lost it. The origin holds older data."""
    await lab.create(DIRTY_BUSY)
    await lab.write(A, "n")
    await (
        lab.device.flush()
    )  # acknowledged: the block is dirty, and its mapping durable
    await lab.clean()
    lab.disks["o"].lose_power(0, Fate.DROP)
    lab.origin.health.note_loss()
    assert lab.core.mode is Mode.RO
    assert await lab.read(A) == b"n" * BLOCK
    fail(lab, OP_READ)
    read = lab.submit(OP_READ, A * BLOCK, 512)
    assert await ended(lab, read) == [errnos.EIO]
    lab.fail("c")
    assert await lab.read(A) == b"n" * BLOCK


async def test_failed_read_of_what_was_flushed_goes_to_the_origin_after_a_failed_commit(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.write(A, "n")
    await lab.clean()
    await lab.device.flush()
    await lab.make_read_only()
    assert not lab.target._blocks.is_writable
    fail(lab, OP_READ)
    read = lab.submit(OP_READ, A * BLOCK, 512)
    assert await ended(lab, read) == [0]
    assert bytes(read.payload or b"") == b"n" * 512


async def test_failed_read_that_the_origin_cannot_serve_either_is_an_error(
    lab: CacheLab,
) -> None:
    await cached(lab, A)
    fail(lab, OP_READ)
    lab.fail("o", OP_READ)
    read = lab.submit(OP_READ, A * BLOCK, 512)
    assert await ended(lab, read) == [errnos.EIO]


async def test_suspend_waits_for_a_read_that_went_to_the_origin(lab: CacheLab) -> None:
    """It is still counted in flight, although the cache device has ended it."""
    await cached(lab, A)
    fail(lab, OP_READ)
    lab.hold("o", OP_READ)
    read = lab.submit(OP_READ, A * BLOCK, 512)
    await settle()
    lab.cache.let_go()
    await settle()
    assert read.status < 0
    assert lab.device._path.in_flight.count == 1
    lab.origin.let_go()
    await lab.suspend()
    assert read.status == 0
    await lab.resume()


@pytest.mark.parametrize("flags", [0, FUA])
async def test_write_through_that_only_the_origin_took_ends_well_and_durably(
    lab: CacheLab, flags: int
) -> None:
    await cached(lab, A, B)
    fail(lab, OP_WRITE)
    writes = [
        lab.submit(OP_WRITE, A * BLOCK + at, 512, flags, fill="n") for at in (0, 512)
    ]
    assert await ended(lab, *writes) == [0, 0]
    assert (await lab.recorded()).maybe_cblock(A) is None, "before it has ended"
    flush = lab.flush()
    await settle()
    assert flush.status == 0
    await lab.cut_power()
    await lab.create(THROUGH)
    assert (await lab.read(A))[:1024] == b"n" * 1024


async def test_write_through_that_only_the_origin_took_waits_for_the_removal(
    lab: CacheLab,
) -> None:
    """A crash would bring the mapping back, and its old copy would hide what was acknowledged."""
    await cached(lab, A)
    fail(lab, OP_WRITE)
    lab.metadata.hold = True
    write = lab.submit(OP_WRITE, A * BLOCK, 512, fill="n")
    assert await ended(lab, write) == [-1]
    lab.metadata.let_go()
    await settle()
    assert write.status == 0


async def test_write_through_whose_removal_cannot_be_recorded_is_an_error(
    lab: CacheLab,
) -> None:
    await cached(lab, A)
    fail(lab, OP_WRITE)
    lab.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
    write = lab.submit(OP_WRITE, A * BLOCK, 512, fill="n")
    assert await ended(lab, write) == [errnos.EIO]


async def test_write_to_a_bad_block_waits_until_it_is_removed(
    lab: CacheLab,
) -> None:
    await cached(lab, A)
    fail(lab, OP_WRITE)
    lab.metadata.hold = True
    lost = lab.submit(OP_WRITE, A * BLOCK, 512, fill="n")
    await ended(lab, lost)
    lab.fail("c")
    late = lab.submit(OP_WRITE, A * BLOCK + 256, 512, fill="m")
    await settle()
    lab.metadata.let_go()
    await settle()
    assert (lost.status, late.status) == (0, 0)
    assert (await lab.read(A))[:768] == b"n" * 256 + b"m" * 512


async def test_write_that_neither_took_is_an_error_and_the_origin_counts(
    lab: CacheLab,
) -> None:
    await cached(lab, A)
    fail(lab, OP_WRITE)
    lab.fail("o", OP_WRITE)
    write = lab.submit(OP_WRITE, A * BLOCK, 512, fill="n")
    assert await ended(lab, write) == [errnos.EIO]
    await lab.pass_time(1)
    assert lab.cblock(A) is None
    assert await lab.read(A) == bytes(range(256)) * (BLOCK // 256)


@pytest.mark.parametrize("flags", [0, FUA])
async def test_write_error_of_the_origin_keeps_no_given_up_block(
    lab: CacheLab, flags: int
) -> None:
    """Its copy is older than the origin: it must not be what counts."""
    await cached(lab, A)
    lab.hold("o", OP_WRITE)
    failing = lab.submit(OP_WRITE, A * BLOCK + 1024, 512, flags, fill="z")
    lab.origin.hold = False
    fail(lab, OP_WRITE)
    write = lab.submit(OP_WRITE, A * BLOCK, 512, flags, fill="w")
    assert (await ended(lab, write, failing)) == [-1, -1]
    lab.fail("c")
    lab.fail("o", OP_WRITE)
    lab.origin.let_go()
    await settle()
    lab.fail("o")
    await lab.pass_time(1)
    assert (write.status, failing.status) == (0, errnos.EIO)
    assert not lab.core.nr_dirty
    assert lab.cblock(A) is None
    assert (await lab.read(A))[:512] == b"w" * 512


async def test_promotion_that_the_cache_device_fails_fails_no_request(
    lab: CacheLab,
) -> None:
    await cached(lab)
    lab.fail("c", OP_WRITE)
    await lab.message(f"warm {A}")
    await lab.pass_time(2)
    assert lab.cblock(A) is None
    assert await lab.read(A) == bytes(range(256)) * (BLOCK // 256)
    assert lab.target.status_fields()["errors"] == 1


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("length", [512, BLOCK])
@pytest.mark.parametrize("op", [OP_WRITE, OP_WRITE_ZEROES])
async def test_write_to_a_block_whose_removal_is_not_on_disk_is_refused(
    lab: CacheLab, op: int, length: int, is_loaded: bool
) -> None:
    """The next start finds the old copy, clean: the origin must not have changed under it."""
    await lab.create("0 smq 0")
    await lab.fill_clean([A])
    await lab.device.flush()
    assert not (await lab.recorded()).gives_up_mappings
    await lab.write_part(20)  # to the origin, whose flush is needed then
    if is_loaded:
        await lab.load("0 smq 0")  # it shares the metadata, which are well still
    fail(lab, OP_READ)
    lab.fail("o", OP_FLUSH)
    read = lab.submit(OP_READ, A * BLOCK, 512)
    assert await ended(lab, read) == [0]
    await lab.pass_time(1)
    assert lab.core.mode is Mode.RO
    assert lab.cblock(A) is None
    assert (await lab.recorded()).maybe_cblock(A) is not None
    if is_loaded:
        await lab.resume()  # its policy does not know the block
    assert lab.core.mode is Mode.RO
    lab.fail("c")
    lab.fail("o")
    fill = "n" if op == OP_WRITE else ""
    write = lab.submit(op, A * BLOCK, length, fill=fill)
    other = lab.submit(op, 20 * BLOCK, length, fill=fill)
    await settle()
    assert (write.status, other.status) == (errnos.EIO, 0)
    assert (await lab.read(A)) == lab.on_disk("o", A)
    await lab.cut_power(kills_only=True)
    await lab.create("0 smq 0")
    cblock = lab.cblock(A)
    assert cblock is not None
    assert lab.on_disk("c", cblock) == lab.on_disk("o", A)
