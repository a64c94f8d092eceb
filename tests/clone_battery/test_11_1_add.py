# SPDX-License-Identifier: Apache-2.0
"""Checklist 11.1, "Add": cases that no test suite of the kernel has."""

import errno as errnos

import pytest

from nbdtarget.bio import FUA, OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, PENDING
from nbdtarget.common.errors import DeviceError
from tests.support.clock import settle
from tests.support.clone_battery import Lab

REGION = 4096
SIZE = 16 * REGION
NO_HYDRATION = "8 1 no_hydration"


@pytest.mark.parametrize(
    ("name", "op"), [("dest", OP_FLUSH), ("meta", OP_FLUSH), ("meta", OP_WRITE)]
)
async def test_11_1_add_flush_failure_at_commit(lab: Lab, name: str, op: int) -> None:
    content = lab.make_files(SIZE)
    device = await lab.create(SIZE, NO_HYDRATION)
    await device.write(0, b"a" * REGION)
    await device.flush()
    before = lab.generation()
    await device.write(REGION, b"b" * REGION)
    lab.fail(name, op)
    with pytest.raises(DeviceError) as caught:
        await device.flush()
    assert caught.value.errno == errnos.EIO
    lab.fail(name)
    status = await lab.status()
    assert (status[3], status[-1]) == ("1/16", "ro")
    assert await device.read(0, 2 * REGION) == b"a" * REGION + content[REGION:][:REGION]
    for _ in range(2):
        with pytest.raises(DeviceError):
            await device.flush()
    assert lab.generation() == before
    # Another table starts over from what is on disk.
    await lab.registry.remove("c")
    await lab.create(SIZE, NO_HYDRATION)
    status = await lab.status()
    assert (status[3], status[-1]) == ("1/16", "rw")


async def test_11_1_add_short_tail_region_write_and_discard(lab: Lab) -> None:
    size = 3 * REGION + 1024
    content = lab.make_files(size)
    device = await lab.create(size, NO_HYDRATION)
    await device.discard(2 * REGION, REGION + 1024)
    assert (await lab.status())[3] == "1/4", "the tail is never discarded"
    await device.write(3 * REGION + 512, b"t" * 512)
    assert lab.asked("source", "read") == [(3 * REGION, 512)]
    assert (await lab.status())[3] == "2/4"
    tail = content[3 * REGION : 3 * REGION + 512] + b"t" * 512
    assert await device.read(3 * REGION, 1024) == tail
    await device.flush()
    assert (lab.work / "dest").read_bytes()[3 * REGION :] == tail


async def test_11_1_add_short_tail_written_whole_copies_nothing(lab: Lab) -> None:
    # The kernel copies it first.
    size = 3 * REGION + 1024
    lab.make_files(size)
    device = await lab.create(size, NO_HYDRATION)
    await device.write(3 * REGION, b"t" * 1024)
    assert lab.asked("source", "read") == []
    assert (await lab.status())[3] == "1/4"


async def test_11_1_add_overwrite_with_fua(lab: Lab) -> None:
    lab.make_files(SIZE)
    device = await lab.create(SIZE, NO_HYDRATION)
    before = lab.generation()
    await device.write(0, b"f" * REGION, fua=True)
    assert lab.generation() == before + 1
    order = [(path.rpartition("/")[2], op) for path, op, *_ in lab.log]
    assert order[0] == ("dest", "write")
    assert order.index(("dest", "flush")) < len(order) - 2
    assert order[-2:] == [("meta", "write")] * 2, "the superblock comes last"
    assert lab.asked("source", "read") == []


async def test_11_1_add_discard_vs_in_flight_copy(lab: Lab) -> None:
    lab.make_files(SIZE)
    device = await lab.create(SIZE, NO_HYDRATION)
    source = lab.spies["source"]
    source.hold = True
    part = lab.submit(OP_WRITE, 512, 512)
    discard = lab.submit(OP_DISCARD, 0, 2 * REGION)
    write = lab.submit(OP_WRITE, 0, REGION)
    await settle()
    assert [bio.status for bio in (part, discard, write)] == [PENDING] * 3
    source.let_go()
    await lab.until(lambda: PENDING not in (part.status, discard.status, write.status))
    assert [bio.status for bio in (part, discard, write)] == [0, 0, 0]
    await device.flush()
    assert await device.read(0, REGION) == b"w" * REGION
    assert (lab.work / "dest").read_bytes()[:REGION] == b"w" * REGION


async def test_11_1_add_second_flush_is_elided(lab: Lab) -> None:
    lab.make_files(SIZE)
    device = await lab.create(SIZE, NO_HYDRATION)
    await device.write(0, b"x" * REGION)
    await device.flush()
    assert len(lab.asked("dest", "flush")) == 1
    await device.flush()
    assert len(lab.asked("dest", "flush")) == 2


async def test_11_1_add_second_flush_is_not_elided(lab: Lab) -> None:
    # The status request has just committed, so the FLUSH finds nothing changed and goes down without a commit.
    lab.make_files(SIZE)
    device = await lab.create(SIZE, NO_HYDRATION)
    await device.write(0, b"x" * REGION)
    await lab.status(noflush=False)
    await device.write(0, b"y" * REGION)
    assert len(lab.asked("dest", "flush")) == 1
    before = lab.generation()
    await device.flush()
    assert len(lab.asked("dest", "flush")) == 2
    assert lab.generation() == before


@pytest.mark.parametrize("threshold", [0, 1, 5])
async def test_11_1_add_threshold_limits(lab: Lab, threshold: int) -> None:
    lab.make_files(SIZE)
    device = await lab.create(
        SIZE, f"8 1 no_hydration 2 hydration_threshold {threshold}"
    )
    source = lab.spies["source"]
    source.hold = True
    await device.message(0, ["enable_hydration"])
    # A worker asks the file system for holes: settle until the log stays the same.
    if threshold:
        await lab.until(lambda: len(source.held) == threshold)
    await settle(200)
    assert len(source.held) == threshold
    assert (await lab.status())[4] == str(threshold)
    source.let_go()
    await settle(200)
    if threshold == 0:
        assert (await lab.status())[3] == "0/16"


async def test_11_1_add_copy_failure_is_tried_again(lab: Lab) -> None:
    content = lab.make_files(SIZE)
    device = await lab.create(SIZE, NO_HYDRATION)
    lab.fail("source", OP_READ, errno=errnos.ENODATA)
    part = lab.submit(OP_WRITE, 512, 512)
    await lab.until(lambda: part.status != PENDING)
    assert part.status == errnos.EIO
    lab.fail("source")
    await device.write(512, b"x" * 512)
    want = content[:512] + b"x" * 512 + content[1024:REGION]
    assert await device.read(0, REGION) == want
    lab.fail("source", OP_READ)
    await device.message(0, ["enable_hydration"])

    def is_told() -> bool:
        lab.clock.advance(0.001)
        return device.event_nr > 0

    await lab.until(is_told)
    lab.fail("source")
    await lab.hydrate()
    assert (lab.work / "dest").read_bytes() == want + content[REGION:]


async def test_11_1_add_status_while_suspended_does_not_commit(lab: Lab) -> None:
    lab.make_files(SIZE)
    device = await lab.create(SIZE, NO_HYDRATION)
    await device.write(0, b"x" * REGION)
    await lab.registry.suspend("c")
    before = lab.generation()
    lab.log.clear()
    lab.submit(OP_WRITE, REGION, REGION, FUA)  # waits
    await lab.status(noflush=False)
    assert lab.log == []
    assert lab.generation() == before
    await lab.registry.resume("c")
