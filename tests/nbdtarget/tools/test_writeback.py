# SPDX-License-Identifier: Apache-2.0
"""Offline writeback: what goes home, in which order, and that no dirty bit is cleared too early.

The power is cut at every operation on any of the three devices: afterwards each mapped block must be
dirty still, or the origin must have its data for good, and the cache the same.
"""

import asyncio
import contextlib
import random
from collections.abc import Iterator
from functools import cache

import pytest

from nbdtarget.bio import FUA, OP_FLUSH, OP_READ, OP_WRITE, Bio
from nbdtarget.common.errors import NbdTargetError, ResolveError
from nbdtarget.devices.base import Device
from nbdtarget.tools import writeback as offline_writeback
from nbdtarget.tools.writeback import WritebackAnswer, WritebackJob, write_back
from nbdtarget_metadata.cache.content import CacheContent
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.cache.superblock import PolicyIdentity
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN
from tests.support.devices import BadRange, CrashDevice, FailFlush
from tests.support.metadata.cache_contents import content_of
from tests.support.metadata.small_cache import commit, start
from tests.support.metadata.store import Store, drive

BLOCK = 32 << 10
NR_CBLOCKS = 8
NR_OBLOCKS = 20
CACHE_SIZE = NR_CBLOCKS * BLOCK
ORIGIN_SIZE = NR_OBLOCKS * BLOCK + 512
METADATA_SIZE = CacheMetadata.device_size_min(NR_CBLOCKS)
# By cache block: which origin block it holds, and whether it is dirty.
MAPPED = {0: (17, True), 1: (3, False), 3: (9, True), 4: (0, True), 6: (12, False)}
DIRTY = {0, 3, 4}
IN_ORDER = [0, 9, 17]


@cache
def metadata_image(
    *, clean: bool = True, dirty_log: bool = False, writes_back: bool = True
) -> bytes:
    store = Store(METADATA_SIZE)
    steps = CacheMetadata.format(
        device_size=METADATA_SIZE,
        block_size=BLOCK,
        origin_size=ORIGIN_SIZE,
        nr_cblocks=NR_CBLOCKS,
        uuid=bytes(range(16)),
    )
    metadata = drive(store, steps)
    start(store, metadata, dirty_log=dirty_log, writes_back=writes_back)
    for cblock, (oblock, dirty) in MAPPED.items():
        metadata.insert(cblock, oblock, dirty=dirty and writes_back)
    commit(store, metadata)
    if clean:
        metadata.prepare_shutdown(policy=PolicyIdentity("smq", (2, 0, 0)))
        commit(store, metadata, clean=True)
    return bytes(store.durable)


def filled(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


class Disks:
    """The three devices, and their opener. `offset`: the bytes before the data on cache and origin."""

    def __init__(
        self, metadata: bytes, *, offset: int = 0, inline_chance: float = 1.0
    ) -> None:
        self.offset = offset
        cache_data = filled(offset + CACHE_SIZE, 1)
        origin_data = bytearray(filled(offset + ORIGIN_SIZE, 2))
        for cblock, (oblock, dirty) in MAPPED.items():
            if not dirty:  # the same on both
                at = offset + oblock * BLOCK
                data = cache_data[offset + cblock * BLOCK :][:BLOCK]
                origin_data[at : at + BLOCK] = data
        self.origin_before = bytes(origin_data)
        self.cache_data = cache_data
        contents = {
            "metadata": metadata,
            "cache": cache_data,
            "origin": bytes(origin_data),
        }
        self.devices = {
            name: CrashDevice(
                len(content), content=content, name=name, inline_chance=inline_chance
            )
            for name, content in contents.items()
        }
        self.opened: list[tuple[str, bool]] = []

    async def open(self, name: str, read_only: bool) -> Device:
        device = self.devices[name]
        self.opened.append((name, read_only))
        device.read_only = read_only
        device.is_latched = False
        return device

    def run(self, **options: object) -> WritebackAnswer:
        job = WritebackJob(
            metadata="metadata",
            cache="cache",
            origin="origin",
            cache_offset=self.offset,
            origin_offset=self.offset,
            **options,  # type: ignore[arg-type]
        )
        return asyncio.run(write_back(job, self.progress, opener=self.open))

    def progress(self, done: int, total: int) -> None:
        assert 0 <= done <= total

    def written(self, name: str) -> list[int]:
        """Where it was written, in order; blocks of cache and origin."""
        trace = self.devices[name].trace
        unit = 1 if name == "metadata" else BLOCK
        return [
            (offset - self.offset) // unit for op, offset, *_ in trace if op == "write"
        ]

    def content(self) -> CacheContent:
        return content_of(self.devices["metadata"].stable_image())

    def cache_block(self, cblock: int) -> bytes:
        return self.cache_data[self.offset + cblock * BLOCK :][:BLOCK]

    def origin_block(self, oblock: int) -> bytes:
        image = self.devices["origin"].stable_image()
        return image[self.offset + oblock * BLOCK :][:BLOCK]


def check_home(disks: Disks, cblocks: set[int]) -> None:
    """These blocks are home, and nothing else has changed."""
    expected = bytearray(disks.origin_before)
    for cblock in cblocks:
        at = disks.offset + MAPPED[cblock][0] * BLOCK
        expected[at : at + BLOCK] = disks.cache_block(cblock)
    assert disks.devices["origin"].stable_image() == expected
    assert disks.devices["cache"].image() == disks.cache_data


# Which blocks, and in which order


@pytest.mark.parametrize("offset", [0, 4096, 1 << 20])
def test_after_a_clean_shutdown_dirty_blocks_go_home_in_origin_order(
    offset: int,
) -> None:
    disks = Disks(metadata_image(), offset=offset)
    before = disks.content()
    answer = disks.run()
    assert str(answer) == "3/3 blocks successfully copied"
    assert (answer.recorded, answer.failed) == (True, ())
    assert disks.written("origin") == IN_ORDER
    check_home(disks, DIRTY)
    after = disks.content()
    assert not after.dirty.any()
    assert after == before._replace(
        dirty=after.dirty,
        generation=before.generation + 1,
        nr_commits=before.nr_commits + 1,
    )


def test_unclean_cache_is_written_back_whole() -> None:
    disks = Disks(metadata_image(clean=False))
    answer = disks.run()
    assert str(answer) == "5/5 blocks successfully copied"
    assert not answer.clean_shutdown
    assert disks.written("origin") == sorted(oblock for oblock, _ in MAPPED.values())
    check_home(disks, set(MAPPED))
    assert disks.content().flags == CLEAN_SHUTDOWN
    assert not disks.content().dirty.any()


def test_unclean_cache_with_a_dirty_log_writes_back_logged_blocks() -> None:
    disks = Disks(metadata_image(clean=False, dirty_log=True))
    assert str(disks.run()) == "3/3 blocks successfully copied"
    assert disks.written("origin") == IN_ORDER
    assert disks.content().flags == CLEAN_SHUTDOWN


def test_writeback_tool_skips_a_crashed_writethrough_cache() -> None:
    """The origin has everything; and to call the blocks clean would have old ones read."""
    disks = Disks(metadata_image(clean=False, writes_back=False))
    answer = disks.run()
    assert str(answer) == "0/0 blocks successfully copied"
    assert not answer.recorded
    assert disks.written("origin") == []
    assert disks.content().gives_up_mappings


def test_nothing_dirty_writes_nothing() -> None:
    disks = Disks(metadata_image())
    disks.run()
    for device in disks.devices.values():
        device.trace.clear()
    answer = disks.run()
    assert str(answer) == "0/0 blocks successfully copied"
    assert not answer.recorded
    for device in disks.devices.values():
        assert not any(op == "write" for op, *_ in device.trace)
    assert disks.devices["origin"].trace == []


def test_empty_cache_that_was_not_shut_down_is_recorded_clean() -> None:
    store = Store(METADATA_SIZE)
    steps = CacheMetadata.format(
        device_size=METADATA_SIZE,
        block_size=BLOCK,
        origin_size=ORIGIN_SIZE,
        nr_cblocks=NR_CBLOCKS,
        uuid=bytes(16),
    )
    start(store, drive(store, steps))
    disks = Disks(bytes(store.durable))
    assert disks.content().flags == 0
    assert disks.run().recorded
    assert disks.content().flags == CLEAN_SHUTDOWN


@pytest.mark.parametrize("clean", [True, False])
def test_without_metadata_update_only_the_origin_is_written(clean: bool) -> None:
    image = metadata_image(clean=clean)
    disks = Disks(image)
    answer = disks.run(update_metadata=False)
    assert not answer.recorded
    check_home(disks, DIRTY if clean else set(MAPPED))
    assert disks.devices["metadata"].image() == image
    assert disks.opened == [("metadata", True), ("cache", True), ("origin", False)]


def test_devices_that_are_only_read_are_opened_so() -> None:
    disks = Disks(metadata_image())
    disks.run()
    assert disks.opened == [("metadata", False), ("cache", True), ("origin", False)]


@pytest.mark.parametrize("inline_chance", [0.0, 0.5])
def test_slow_devices_come_to_the_same(inline_chance: float) -> None:
    disks = Disks(metadata_image(), inline_chance=inline_chance)
    assert str(disks.run()) == "3/3 blocks successfully copied"
    check_home(disks, DIRTY)
    assert not disks.content().dirty.any()


# Refusals


def refused(disks: Disks, **options: object) -> str:
    with pytest.raises(NbdTargetError) as caught:
        disks.run(**options)
    for device in disks.devices.values():
        assert not any(op == "write" for op, *_ in device.trace)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_damaged_metadata_are_refused() -> None:
    image = bytearray(metadata_image())
    image[4 * 4096 + 100] ^= 1
    line = refused(Disks(bytes(image)))
    assert line.startswith("metadata: corrupt metadata: ")
    assert "nothing is written back from damaged metadata" in line


def test_metadata_that_are_none_are_refused() -> None:
    assert "metadata is not formatted" in refused(Disks(bytes(METADATA_SIZE)))
    assert "no nbdtarget metadata of this kind" in refused(Disks(b"x" * METADATA_SIZE))


def test_needs_check_is_refused() -> None:
    store = Store(METADATA_SIZE, metadata_image(clean=False))
    steps = CacheMetadata.open(device_size=store.size, block_size=BLOCK)
    metadata = drive(store, steps)
    metadata.abort()
    drive(store, metadata.record_needs_check())
    line = refused(Disks(bytes(store.durable)))
    assert "run `nbdtarget metadata check --clear-needs-check metadata` first" in line


def test_metadata_of_a_clone_are_refused() -> None:
    from tests.support.metadata.clone_images import ages

    line = refused(Disks(ages()["commits"].image))
    assert "is metadata of a clone: only a cache is written back" in line


@pytest.mark.parametrize("name", ["cache", "origin"])
def test_device_that_is_smaller_than_the_metadata_say_is_refused_by_name(
    name: str,
) -> None:
    disks = Disks(metadata_image(), offset=4096)
    size = disks.devices[name].size
    disks.devices[name] = CrashDevice(size - 512, name=name)
    line = refused(disks)
    length = size - 4096
    kind = "a cache" if name == "cache" else "an origin"
    assert line == (
        f"{name}: has {length - 512} bytes behind offset 4096, but the metadata"
        f" belongs to {kind} of {length} bytes"
    )


@pytest.mark.parametrize("option", ["cache_offset", "origin_offset"])
def test_crooked_offset_is_refused(option: str) -> None:
    job = WritebackJob(metadata="m", cache="c", origin="o", **{option: 512})  # type: ignore[arg-type]
    disks = Disks(metadata_image())
    with pytest.raises(NbdTargetError, match="is not a multiple of 4096"):
        asyncio.run(write_back(job, disks.progress, opener=disks.open))
    assert disks.opened == []


# Failures


READ = frozenset({OP_READ})
WRITE = frozenset({OP_WRITE})


def bad_block(nr: int, ops: frozenset[int]) -> BadRange:
    return BadRange(nr * BLOCK + 512, nr * BLOCK + 1024, ops)


def test_block_that_cannot_be_read_stays_dirty_and_is_told() -> None:
    disks = Disks(metadata_image())
    disks.devices["cache"].lie = bad_block(3, READ)
    answer = disks.run(retry=2)
    assert str(answer) == "2/3 blocks successfully copied"
    (failed,) = answer.failed
    assert str(failed).startswith("cache block 3, origin block 9: cache: read of ")
    check_home(disks, {0, 4})
    assert set(disks.content().dirty.search(1)) == {3}
    # Tried four times: once, once more, and as often as told.
    assert disks.devices["cache"].failed == 4


def test_unclean_stop_with_a_failure_leaves_that_block_dirty_alone() -> None:
    disks = Disks(metadata_image(clean=False))
    disks.devices["cache"].lie = bad_block(3, READ)
    assert str(disks.run()) == "4/5 blocks successfully copied"
    assert disks.content().flags == CLEAN_SHUTDOWN
    assert set(disks.content().dirty.search(1)) == {3}


def test_nothing_copied_records_nothing() -> None:
    image = metadata_image(clean=False)
    disks = Disks(image)
    disks.devices["cache"].lie = BadRange(0, CACHE_SIZE, READ)
    answer = disks.run()
    assert (answer.nr_copied, answer.recorded) == (0, False)
    assert disks.devices["metadata"].image() == image


class Latching(Disks):
    """An origin that latches when a write fails, as a file does; `heal_after` openings it is whole."""

    def __init__(self, metadata: bytes, bad: int, *, heal_after: int = 99) -> None:
        super().__init__(metadata)
        self.heal_after = heal_after
        origin = self.devices["origin"]
        origin.lie = bad_block(bad, WRITE)
        origin.watchers.append(self)

    def started(self, device: CrashDevice, bio: Bio) -> None:
        """Nothing to do."""

    def finished(self, device: CrashDevice, bio: Bio, errno: int) -> None:
        if errno and bio.op == OP_WRITE:
            device.is_latched = True

    async def open(self, name: str, read_only: bool) -> Device:
        device = await super().open(name, read_only)
        if self.opened.count(("origin", False)) > self.heal_after:
            self.devices["origin"].lie = None
        return device


def test_latched_origin_is_opened_again_and_the_rest_written_again() -> None:
    disks = Latching(metadata_image(), 9)
    answer = disks.run()
    assert str(answer) == "2/3 blocks successfully copied"
    assert "origin: write of" in answer.failed[0].error
    check_home(disks, {0, 4})
    assert set(disks.content().dirty.search(1)) == {3}
    # The first leg, without the bad block again; then that alone. Each failure latches.
    assert disks.written("origin") == [0, 17, 0, 17]
    assert disks.opened.count(("origin", False)) == 3


def test_retry_copies_what_has_healed() -> None:
    disks = Latching(metadata_image(), 9, heal_after=3)
    assert str(disks.run()) == "2/3 blocks successfully copied"
    disks = Latching(metadata_image(), 9, heal_after=2)
    answer = disks.run(retry=1)
    assert str(answer) == "3/3 blocks successfully copied"
    check_home(disks, DIRTY)
    assert not disks.content().dirty.any()


def test_failed_flush_of_the_origin_proves_nothing() -> None:
    disks = Disks(metadata_image())
    disks.devices["origin"].lie = FailFlush()
    answer = disks.run()
    assert str(answer) == "3/3 blocks successfully copied"
    assert disks.written("origin") == IN_ORDER * 2
    check_home(disks, DIRTY)


def test_origin_that_goes_on_after_a_loss_gets_everything_again() -> None:
    """As an NBD server that was restarted: its next flush succeeds, and proves nothing."""
    disks = Disks(metadata_image())
    losses = iter([True])

    def progress(done: int, total: int) -> None:
        if done and next(losses, False):
            disks.devices["origin"].health.note_loss()

    disks.progress = progress  # type: ignore[method-assign]  # once, for this test
    answer = disks.run()
    assert str(answer) == "3/3 blocks successfully copied"
    assert disks.written("origin") == IN_ORDER * 2
    check_home(disks, DIRTY)


class DeadFlush(Disks):
    """An origin of which no flush ever succeeds."""

    async def open(self, name: str, read_only: bool) -> Device:
        device = await super().open(name, read_only)
        if name == "origin":
            self.devices[name].lie = FailFlush()
        return device


def test_origin_that_never_flushes_has_nothing() -> None:
    image = metadata_image()
    disks = DeadFlush(image)
    answer = disks.run(retry=3)
    assert str(answer) == "0/3 blocks successfully copied"
    assert "flush" in answer.failed[0].error
    assert disks.devices["metadata"].image() == image


def test_failed_flush_of_the_cache_records_nothing() -> None:
    image = metadata_image()
    disks = Disks(image)
    disks.devices["cache"].lie = FailFlush()
    with pytest.raises(NbdTargetError, match="cache: flush"):
        disks.run()
    assert disks.devices["metadata"].image() == image


def test_origin_that_cannot_be_opened_again_ends_it() -> None:
    class Gone(Latching):
        async def open(self, name: str, read_only: bool) -> Device:
            if (name, read_only) in self.opened:
                raise ResolveError(name, "in use by another process")
            return await super().open(name, read_only)

    image = metadata_image()
    disks = Gone(image, 9)
    with pytest.raises(ResolveError, match="in use"):
        disks.run()
    assert disks.devices["metadata"].image() == image


def test_origin_that_is_another_one_when_opened_again_ends_it() -> None:
    class Another(Latching):
        async def open(self, name: str, read_only: bool) -> Device:
            if (name, read_only) == ("origin", False) == self.opened[-1]:
                return CrashDevice(ORIGIN_SIZE + 512, name=name)
            return await super().open(name, read_only)

    image = metadata_image()
    disks = Another(image, 9)
    disks.opened.append(("", False))
    with pytest.raises(NbdTargetError, match="origin: has another size than before"):
        disks.run()
    assert disks.devices["metadata"].image() == image


def test_legs_end_with_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline_writeback, "LEG_BYTES", 2 * BLOCK)
    disks = Disks(metadata_image(clean=False))
    disks.run()
    ops = [op for op, *_ in disks.devices["origin"].trace]
    assert ops == ["write", "write", "flush"] * 2 + ["write", "flush"]


async def test_cancelled_job_waits_for_its_io_and_goes_no_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offline_writeback, "COPIES_IN_FLIGHT", 1)
    image = metadata_image(clean=False)
    disks = Disks(image, inline_chance=0.0)
    job = WritebackJob(metadata="metadata", cache="cache", origin="origin")
    copied = asyncio.Event()

    def progress(done: int, total: int) -> None:
        if done:
            copied.set()

    task = asyncio.create_task(write_back(job, progress, opener=disks.open))
    await copied.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task  # a crash device that is closed with I/O in flight says so
    assert 1 <= len(disks.written("origin")) < len(MAPPED)
    assert disks.devices["metadata"].image() == image


@pytest.mark.parametrize("clean", [True, False])
async def test_interrupted_job_records_the_legs_that_are_done(
    clean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline_writeback, "LEG_BYTES", BLOCK)
    disks = Disks(metadata_image(clean=clean), inline_chance=0.0)
    before = disks.content().dirty
    job = WritebackJob(metadata="metadata", cache="cache", origin="origin")
    copied = asyncio.Event()

    def progress(done: int, total: int) -> None:
        if done > BLOCK:
            copied.set()

    task = asyncio.create_task(write_back(job, progress, opener=disks.open))
    await copied.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    after = disks.content()
    assert after.flags == CLEAN_SHUTDOWN
    assert 0 < after.dirty.count() < before.count()
    check_home(disks, set((before & ~after.dirty).search(1)))


def test_origin_that_goes_away_leaves_a_record_of_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Gone(Latching):
        async def open(self, name: str, read_only: bool) -> Device:
            if (name, read_only) == ("origin", False) and self.opened[-1][0] == name:
                raise ResolveError(name, "in use by another process")
            return await super().open(name, read_only)

    monkeypatch.setattr(offline_writeback, "LEG_BYTES", BLOCK)
    disks = Gone(metadata_image(), 9)
    with pytest.raises(ResolveError, match="in use"):
        disks.run()
    assert set(disks.content().dirty.search(1)) == {0, 3}
    assert disks.origin_block(0) == disks.cache_block(4)


# Power cuts


class Cut:
    """Cuts the power of all three devices before operation number `at`."""

    def __init__(self, disks: Disks, at: int) -> None:
        self.at = at
        self.count = 0
        self._disks = disks
        for device in disks.devices.values():
            device.watchers.append(self)

    def started(self, device: CrashDevice, bio: Bio) -> None:
        """Counted when it ends: what is under way is at risk."""

    def finished(self, device: CrashDevice, bio: Bio, errno: int) -> None:
        self.count += bio.op in (OP_WRITE, OP_FLUSH)
        if self.count == self.at:
            for each in self._disks.devices.values():
                each.cut_power()


def wrong_blocks(metadata: bytes, cache_data: bytes, origin: bytes) -> Iterator[int]:
    """Yield the mapped blocks that are called clean and are not."""
    content = content_of(metadata)
    for cblock, each in enumerate(content.values):
        if each and not content.dirty[cblock]:
            at = (each >> 16) * BLOCK
            cached = cache_data[cblock * BLOCK :][:BLOCK]
            if origin[at : at + BLOCK] != cached:
                yield cblock


def crashes(*, clean: bool, dirty_log: bool, pending: bool) -> tuple[int, set[int]]:
    """Cut at each operation; check every image. Returns how many, and how much was dirty."""
    nr_dirty = set()
    at = 0
    while True:
        at += 1
        disks = Disks(metadata_image(clean=clean, dirty_log=dirty_log))
        if pending:
            _write_without_flush(disks)
        cut = Cut(disks, at)
        with contextlib.suppress(NbdTargetError):
            disks.run()
        devices = disks.devices
        for metadata in devices["metadata"].crash_images():
            nr_dirty.add(content_of(metadata).dirty.count())
            for origin in devices["origin"].crash_images(subsets_max=3, samples=3):
                for cached in devices["cache"].crash_images():
                    assert not [*wrong_blocks(metadata, cached, origin)]
        if cut.count < at:
            return at, nr_dirty


def _write_without_flush(disks: Disks) -> None:
    """As a killed server leaves it: the newest data of dirty blocks are in a page cache only."""
    device = disks.devices["cache"]
    for cblock in DIRTY:
        data = filled(BLOCK, 100 + cblock)
        bio = Bio(OP_WRITE, cblock * BLOCK, BLOCK, memoryview(data), 0, _ended)
        device.submit(bio)


def _ended(bio: Bio) -> None:
    assert not bio.status


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clean", "dirty_log", "pending"),
    [
        (True, False, False),
        (False, False, False),
        (False, True, False),
        pytest.param(False, False, True, marks=pytest.mark.long),
        (False, True, True),
    ],
)
def test_power_cut_anywhere_leaves_no_block_clean_that_is_not(
    clean: bool, dirty_log: bool, pending: bool
) -> None:
    nr_cuts, nr_dirty = crashes(clean=clean, dirty_log=dirty_log, pending=pending)
    assert nr_cuts > 8
    before = content_of(metadata_image(clean=clean, dirty_log=dirty_log)).dirty.count()
    assert nr_dirty == {0, before}


class NoFlush(CrashDevice):
    """A mutant: flushes are not sent."""

    def submit(self, bio: Bio) -> None:
        if bio.op == OP_FLUSH or bio.flags & FUA:
            bio.flags = 0
        if bio.op == OP_FLUSH:
            bio.end(0)
            return
        super().submit(bio)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["origin", pytest.param("cache", marks=pytest.mark.long)]
)
def test_crash_test_catches_a_missing_flush(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Disks.__init__

    def init(self: Disks, metadata: bytes) -> None:
        real(self, metadata)
        self.devices[name].__class__ = NoFlush

    monkeypatch.setattr(Disks, "__init__", init)
    with pytest.raises(AssertionError):
        crashes(clean=False, dirty_log=False, pending=name == "cache")


def test_oracle_sees_a_clean_block_that_is_not() -> None:
    disks = Disks(metadata_image())
    image = metadata_image()
    assert not [*wrong_blocks(image, disks.cache_data, disks.origin_before)]
    changed = bytearray(disks.cache_data)
    changed[BLOCK] ^= 1
    assert [*wrong_blocks(image, bytes(changed), disks.origin_before)] == [1]
