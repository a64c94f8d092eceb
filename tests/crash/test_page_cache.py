# SPDX-License-Identifier: Apache-2.0
"""Random walks with disks that fail for a while, and servers that are started again in the same boot.

The page cache lies then, as Linux's does (`tests.support.pagecache`). A server that is started again
must not believe it: what it has read, and what was flushed after that, is there after a power cut.
"""

import errno as errnos
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbdtarget.bio import FUA, OP_WRITE, Bio
from nbdtarget.common.errors import ConstructorError, DeviceError, TableError
from nbdtarget.dm.registry import Registry
from nbdtarget.targets.powercut.volatile_cache import Fate
from nbdtarget_metadata.clone.superblock import CloneSuperblock
from nbdtarget_metadata.errors import MetadataError
from nbdtarget_metadata.log.superblock import superblock_writes
from nbdtarget_metadata.operations import Steps
from tests.support.crash.cache_fault_walks import FaultDriver as CacheFaultDriver
from tests.support.crash.cache_fault_walks import draw_walk as draw_cache_walk
from tests.support.crash.cache_rigs import (
    CacheRig,
    LoggedCacheRig,
    SwitchingCacheRig,
    WritethroughRig,
    small_blocks,
)
from tests.support.crash.cache_walks import take_cache
from tests.support.crash.fault_walks import FaultDriver, draw_walk
from tests.support.crash.machine import Driver
from tests.support.crash.rigs import REGION_SIZE, CloneRig, QuietCloneRig
from tests.support.crash.walks import Step, take
from tests.support.model import SECTOR
from tests.support.pagecache import PAGE, PageCacheDevice, Stay

CLONE_WALKS = int(os.environ.get("SIM_WALKS", "40"))
CACHE_WALKS = int(os.environ.get("SIM_WALKS", "30"))
SEED = int(os.environ.get("SIM_SEED", "0"))
LIVES = 4
STEPS_IN_A_LIFE = 12
REFUSALS = (ConstructorError, TableError, DeviceError)


@pytest.fixture(autouse=True)
def lying_page_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tests.support.crash.rigs.CrashDevice", PageCacheDevice)
    monkeypatch.setattr("tests.support.crash.cache_rigs.CrashDevice", PageCacheDevice)
    logging.disable(logging.CRITICAL)
    with small_blocks():
        yield
    logging.disable(logging.NOTSET)


class LyingCacheRig(SwitchingCacheRig):
    """Refusals of passthrough are counted as refusals: the walk ends there."""

    def _check_refusal(self, error: TableError, before: Any) -> None:
        if any(disk(each).nr_failures for each in self.at_risk):
            raise error
        super()._check_refusal(error, before)


class LyingLoggedCacheRig(LyingCacheRig):
    """Its dirty log is what a restart after a kill believes."""

    tables = LoggedCacheRig.tables  # type: ignore[assignment]  # fewer of them


def disk(device: object) -> PageCacheDevice:
    assert isinstance(device, PageCacheDevice)
    return device


class Walk:
    """A few lives of one rig in one boot, then a power cut."""

    def __init__(self, make_rig: type[CloneRig | CacheRig], seed: int) -> None:
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        rig = make_rig(seed, self.rng.choice([0.0, 0.5, 1.0]))
        self.is_clone = isinstance(rig, CloneRig)
        if not self.is_clone:
            rig.invariants.may_differ = True  # type: ignore[union-attr]  # a cache's
        self.driver: Driver = (FaultDriver if self.is_clone else CacheFaultDriver)(
            rig  # type: ignore[arg-type]  # it asks for no more than a rig
        )

    def run(self) -> Counter[str]:
        try:
            for life in range(LIVES):
                is_up = self.live(fails=life % 2 == 0)
                if life == LIVES - 1:
                    break
                if not self.restart(is_up=is_up):
                    self.counts["refused"] += 1
                    break
            self.mend()
            self.driver.cut_power(
                self.rng.randrange(1 << 30), self.rng.choice([Fate.DROP, Fate.MIXED])
            )
            self.driver.verify()
            self.driver.run(self.driver.rig.stop())
        finally:
            self.driver.discard_loop()
        return self.counts

    def live(self, *, fails: bool) -> bool:
        """Some steps; in the middle of them a disk begins to fail, if it shall. Returns whether it runs."""
        steps = (draw_walk if self.is_clone else draw_cache_walk)(self.rng)
        do: Callable[[Any, Step], None] = take if self.is_clone else take_cache
        for nr, step in enumerate(steps[: 2 * STEPS_IN_A_LIFE]):
            if nr == STEPS_IN_A_LIFE and fails:
                disk(self.rng.choice(self.driver.rig.at_risk)).fails = True
            if step[0] == "reload" and self.has_failed:
                continue  # of a table over latched devices: the registry's own matter
            try:
                do(self.driver, step)
            except REFUSALS:
                assert self.has_failed, "refused without a reason"
                return False
        return True

    @property
    def has_failed(self) -> bool:
        return any(disk(each).nr_failures for each in self.driver.rig.at_risk)

    def mend(self) -> None:
        for each in self.driver.rig.at_risk:
            disk(each).fails = False

    def restart(self, *, is_up: bool) -> bool:
        """End the server in order or by a kill, mend the disks, start it again in the same boot."""
        driver, rng = self.driver, self.rng
        self.counts["lies"] += sum(
            len(disk(each).lies) > 0 for each in driver.rig.at_risk
        )
        if is_up and not driver.suspended and rng.random() < 0.5:
            try:
                driver.drain()
                driver.run(driver.rig.stop())
            except REFUSALS:
                assert self.has_failed
        self.mend()
        old = [disk(each) for each in driver.rig.at_risk]
        for each in old:
            each.finish_or_forget(rng)
        images = tuple(each.image() for each in old)
        rig = driver.rig.reboot(rng.randrange(1 << 30), images)
        for each in old:
            each.cut_power()  # the tasks that are being ended reach no disk
        driver.discard_loop()
        driver.suspended = False
        driver.loop = driver._new_loop()
        driver.rig = rig
        for before, device in zip(old, rig.at_risk, strict=True):
            disk(device).adopt(before)
            self._open(disk(device))
        try:
            driver.run(rig.start())
        except (*REFUSALS, MetadataError):
            return False  # for example needs_check; no client has been promised anything since
        content = driver.run(rig.disk.read(0, driver.model.size))
        driver.model.check_survivor(content)
        driver.model.settle(content)
        return True

    def _open(self, device: PageCacheDevice) -> None:
        """Open the device. An opening that finds an error not yet reported is refused; the next one is not."""
        stay = self._stay(device.name)
        try:
            device.open_again(stay)
        except OSError:
            self.counts["told at open"] += 1
            device.open_again(stay)

    def _stay(self, name: str) -> Stay:
        if name == "/metadata" and self.rng.random() < 0.5:
            return Stay.UNTOLD  # then the first commits of the resume must be enough
        return self.rng.choice([Stay.NONE, Stay.MAPPED])


def walks(make_rig: type[CloneRig | CacheRig], number: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in range(SEED, SEED + number):
        try:
            counts += Walk(make_rig, seed).run()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    return counts


def test_a_clone_that_is_restarted_after_an_io_error_keeps_its_word() -> None:
    counts = walks(CloneRig, CLONE_WALKS)
    assert counts["lies"] > CLONE_WALKS // 2, counts
    assert counts["told at open"], counts


@pytest.mark.long
@pytest.mark.parametrize("rig", [LyingCacheRig, LyingLoggedCacheRig])
def test_a_cache_that_is_restarted_after_an_io_error_keeps_its_word(
    rig: type[CacheRig],
) -> None:
    counts = walks(rig, CACHE_WALKS)
    assert counts["lies"] > CACHE_WALKS // 4, counts


def test_page_cache_shows_what_was_written_over_a_lie() -> None:
    """The page stays right when another part of it is written after that."""
    device = PageCacheDevice(PAGE, 1, inline_chance=1.0)
    ended: list[int] = []

    def write(nr: int, byte: bytes, flags: int = 0) -> None:
        data = memoryview(byte * SECTOR)
        bio = Bio(OP_WRITE, nr * SECTOR, SECTOR, data, flags, lambda _: None)
        device._carry_out(bio, 0, 0)
        ended.append(bio.status)

    device.fails = True
    write(0, b"a", FUA)
    assert device.lies
    write(0, b"b")
    write(1, b"c")
    assert ended == [errnos.EIO, 0, 0]
    assert device._read(0, 2 * SECTOR) == b"b" * SECTOR + b"c" * SECTOR
    device.fails = False
    device.sync(device._cache.mark)
    assert device.image()[: 2 * SECTOR] == b"b" * SECTOR + b"c" * SECTOR


class FailsItsSuperblock:
    """Makes a metadata device fail as soon as a superblock is written."""

    def started(self, device: Any, bio: Bio) -> None:
        if bio.flags & FUA:
            disk(device).fails = True

    def finished(self, device: Any, bio: Bio, errno: int) -> None:
        """Do nothing: `started` has made the device fail."""


def at_once(superblock: CloneSuperblock) -> Steps[None]:
    """Write both copies at the same time: then both may be lies, and equal."""
    yield superblock_writes(superblock)


@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize("stay", Stay)
def test_flush_survives_a_superblock_read_from_the_page_cache(
    stay: Stay, in_turn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two measures prevent the loss: the order of the copies, and the first commits of a resume. Each is enough alone."""
    walk = Walk(QuietCloneRig, 1)
    if not in_turn:
        monkeypatch.setattr("nbdtarget_metadata.log.commit.write_superblock", at_once)
    driver = walk.driver
    driver.write(0, REGION_SIZE, fua=False)
    driver.flush()
    driver.drain()
    metadata = disk(driver.rig.at_risk[1])
    metadata.watchers.append(FailsItsSuperblock())
    driver.write(3 * REGION_SIZE, REGION_SIZE, fua=False)
    driver.flush()
    driver.drain()
    assert metadata.lies, "the newest superblock is in the page cache only"
    monkeypatch.setattr(walk, "_stay", lambda _: stay)
    assert walk.restart(is_up=False)
    # The write goes to the destination alone, unless the metadata that was read is written first.
    driver.write(3 * REGION_SIZE, REGION_SIZE, fua=False)
    driver.flush()
    driver.drain()
    driver.cut_power(1, Fate.DROP)
    driver.verify()
    driver.discard_loop()


@pytest.mark.parametrize("make_rig", [QuietCloneRig, WritethroughRig])
def test_load_writes_nothing_and_an_idle_disk_does_no_io(
    make_rig: type[CloneRig | CacheRig],
) -> None:
    driver = Driver(make_rig(1, 1.0))
    driver.write(0, 2 * REGION_SIZE, fua=False)
    driver.flush()
    driver.drain()
    driver.run(driver.rig.stop())
    rig = driver.rig.reboot(2, tuple(each.image() for each in driver.rig.at_risk))
    assert isinstance(rig, CloneRig | CacheRig)
    metadata = next(each for each in rig.at_risk if each.name == "/metadata")

    def written() -> list[int]:
        return [at for op, at, _, _ in metadata.trace if op not in ("read", "flush")]

    async def load_alone() -> None:
        rig.registry = Registry(rig.opener(), clock=rig.clock)
        rig.disk = await rig.registry.create("d", None)
        await rig.load()

    driver.rig = rig
    driver.run(load_alone())
    assert written() == []
    driver.run(rig.resume())
    # Only the two copies of the two slots are written, one after the other.
    slots = [at // PAGE for at in written()]
    assert sorted(slots) == [0, 1, 2, 3]
    assert [block % 2 for block in slots] in ([0, 0, 1, 1], [1, 1, 0, 0])
    before = [len(each.trace) for each in rig.at_risk]
    for _ in range(10):
        driver.advance(2.0)
        driver.turn(50)
    assert [len(each.trace) for each in rig.at_risk] == before
    driver.run(rig.stop())
    driver.discard_loop()
