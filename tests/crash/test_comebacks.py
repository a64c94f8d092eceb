# SPDX-License-Identifier: Apache-2.0
"""Random walks over disks that fail, hang, go away and come back, and over what an operator does then.

A disk fails some requests and then no more; it hangs and goes on; it goes, and comes back with
what was not flushed, or without. Meanwhile the table is loaded again, the server is stopped
and started, or killed and started, in the same boot; and the power is cut. What must hold:

- what an acknowledged FLUSH or FUA write covered is there, whatever happened: a loss is
  confessed by a FLUSH that fails, before one succeeds (`LossModel`),
- **availability**: as soon as every disk is well again, the same table can be loaded, and
  one restart with the same line serves all data,
- nothing asks for a tool: `needs_check` is not on disk when no metadata device has failed.
"""

import asyncio
import contextlib
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from nbdtarget.bio import OP_FLUSH, OP_READ, Bio
from nbdtarget.common.errors import DeviceError, NbdTargetError, TableError
from nbdtarget.devices.health import Health
from nbdtarget.devices.losses import FlushObserver
from nbdtarget.dm.bio_path import State
from nbdtarget.dm.open_devices import DeviceOpener
from nbdtarget.targets import metadata_io
from nbdtarget.targets.cache.target import CacheTarget
from nbdtarget.targets.committer import Committer
from nbdtarget.targets.powercut.volatile_cache import Fate
from nbdtarget_metadata.errors import NotFormatted
from nbdtarget_metadata.tools.cache_check import CACHE_CHECKS
from nbdtarget_metadata.tools.check import examine
from tests.support.crash.cache_rigs import (
    BLOCK_SIZE,
    REFUSALS,
    CacheRig,
    LoggedCacheRig,
    SwitchingCacheRig,
    WritethroughRig,
    checked,
    small_blocks,
)
from tests.support.crash.cache_walks import CacheDriver, take_cache
from tests.support.crash.images import run_over
from tests.support.crash.invariants import Invariants
from tests.support.crash.lazy_device import LazyDevice
from tests.support.crash.rigs import (
    CONTENT,
    DISK_SIZE,
    REGION_SIZE,
    CloneRig,
    LinearRig,
)
from tests.support.crash.walks import Step
from tests.support.devices import BadRange, CrashDevice, FailAfter, FailFlush, Lie
from tests.support.loss_model import LossModel
from tests.support.model import SECTOR, DiskModel
from tests.support.openings import Openings

DEEP = 30 if os.environ.get("CRASH_DEEP") else 1
WALKS = int(os.environ.get("SIM_WALKS", "8")) * DEEP
STEPS = int(os.environ.get("SIM_STEPS", "80"))
SEED = int(os.environ.get("SIM_SEED", "0"))
MUTANT_WALKS_MAX = 40

WEIGHTS = {
    "write": 10,
    "zero": 1,
    "discard": 1,
    "read": 3,
    "flush": 5,
    "turn": 8,
    "advance": 3,
    "drain": 1,
    "message": 2,
    "cache": 1,
    "fail": 2,
    "hang": 1,
    "go": 1,
    "forget": 1,
    "heal": 2,
    "reload": 2,
    "restart": 1,
    "kill": 1,
    "cut_power": 1,
}
FATES = (Fate.KEEP, Fate.KEEP, Fate.DROP, Fate.TEAR, Fate.MIXED)


class Watching(Invariants):
    """Checks no invariant, because all of them assume disks that stay. The oracle alone decides."""

    may_differ = True

    def watch(self, target: object) -> None:
        """Do nothing: no invariant is checked."""

    watch_jobs = watch


class _Comebacks:
    """Makes a rig one whose disks go and come back. The rig itself is the other base class.

    Attributes:
        is_hurt: something has failed, or is gone, since a table was last loaded in health.
        is_metadata_hurt: and it was the metadata device, in this boot.
        gone: names of disks that cannot be opened.
    """

    devices: dict[str, Any]

    def __init__(self, seed: int, inline: float, *args: Any) -> None:
        super().__init__(seed, inline, *args)  # type: ignore[call-arg]
        self.inline_chance = inline
        disks = list(self.devices.values())
        for disk in disks:
            disk.watchers.clear()
        self.openings = Openings(disks)
        self.gone: set[str] = set()
        self.is_hurt = False
        self.is_metadata_hurt = False
        self.counts: Counter[str] = Counter()
        self.invariants: Any = Watching()

    def opener(self) -> DeviceOpener:
        return self.openings

    def reboot(self, seed: int, images: tuple[bytes, ...]) -> Any:
        if self.is_metadata_hurt and isinstance(self, CacheRig):
            images = (checked(images[0]), *images[1:])
        rig = type(self)(seed, self.inline_chance, images)
        rig.counts = self.counts
        return rig

    def check_survivors(self, model: DiskModel, promised: object) -> None:
        """Check nothing here: the disks are read after the start."""

    def _check_refusal(self, error: TableError, before: CacheTarget | None) -> None:
        """Only passthrough is refused, unless a disk is unwell."""
        if error.reason.removeprefix("cache: ") not in REFUSALS:
            raise error


class LinearComebacks(_Comebacks, LinearRig):
    """A linear target."""


class CloneComebacks(_Comebacks, CloneRig):
    """A clone."""

    messages = tuple(m for m in CloneRig.messages if m != ("then_linear",))


class CacheComebacks(_Comebacks, CacheRig):
    """A writeback cache."""


class LoggedComebacks(_Comebacks, LoggedCacheRig):
    """A writeback cache, with or without a dirty log."""


class WritethroughComebacks(_Comebacks, WritethroughRig):
    """A writethrough cache."""


class SwitchingComebacks(_Comebacks, SwitchingCacheRig):
    """A cache in any mode, with another one at each reload."""


class ComebackDriver(CacheDriver):
    """See the module head."""

    model_type = LossModel
    model: LossModel
    rig: Any
    losses_told = 0

    def read(self, offset: int, length: int) -> None:
        if self.overlaps(offset, length):
            self.wait()

        def ended(bio: Bio) -> None:
            if self.in_flight.pop(bio, None) is None:
                return
            assert not bio.status or self.rig.is_hurt, f"read failed: {bio}"
            if not bio.status:
                assert bio.payload is not None
                self.model.check_running(offset, bio.payload)

        payload = memoryview(bytearray(length))
        self._submit(Bio(OP_READ, offset, length, payload, 0, ended), offset, length)

    def flush(self) -> None:
        promised = self.model.start_flush()

        def ended(bio: Bio) -> None:
            if self.in_flight.pop(bio, None) is None:
                return
            losses = self.rig.disk.losses
            is_told, self.losses_told = losses == self.losses_told, losses
            self.model.end_flush(promised, ok=bio.status == 0 and is_told)

        self._submit(Bio(OP_FLUSH, 0, 0, None, 0, ended), -1, 0)

    def discard_loop(self) -> None:
        """End the process. Each request under way has been carried out or not; none is carried out later."""
        self.in_flight.clear()
        self.call_inside(self.rig.openings.die)
        super().discard_loop()

    # ---- what happens to the disks ----

    def disk_of(self, at: int) -> CrashDevice:
        disks: list[CrashDevice] = list(self.rig.openings.disks.values())
        return disks[at // SECTOR % len(disks)]

    def fail(self, offset: int, length: int, happens: bool) -> None:
        """Some requests of one disk fail, from now on, for a while."""
        disk, rng = self.disk_of(offset), random.Random(offset * 31 + length)
        begin = rng.randrange(disk.size // SECTOR) * SECTOR
        lies: list[Lie] = [
            FailFlush(rng.randrange(3)),
            FailFlush(),
            FailAfter(rng.randrange(10)),
            BadRange(begin, begin + length),
        ]
        disk.lie = rng.choice(lies)
        disk.happens = rng.choice([0.5, 1.0]) if happens else 0.0
        self._hurt(disk, "fails")

    def hang(self, offset: int) -> None:
        disk = self.disk_of(offset)
        if disk.name not in self.rig.gone:
            self.rig.openings.hang(disk)
            self.rig.counts["hangs"] += 1

    def go(self, offset: int, stays_away: bool) -> None:
        disk = self.disk_of(offset)
        self._hurt(disk, "goes")
        self.call_inside(lambda: self.rig.openings.go(disk))
        self.rig.gone.add(disk.name)
        if not stays_away:
            self._come_back(disk, offset)

    def forget(self, offset: int) -> None:
        """The disk has lost what was not flushed; its openings say so, and go on."""
        disk = self.disk_of(offset)
        if disk.name not in self.rig.gone:
            self._hurt(disk, "forgets")
            fate = random.Random(offset).choice(FATES)
            self.call_inside(lambda: self.rig.openings.forget(disk, offset, fate))

    def heal(self, offset: int = 0) -> None:
        """Every disk is well again; what was opened before may be latched or lost."""
        openings = self.rig.openings
        rng = random.Random(offset)
        for disk in openings.disks.values():
            disk.lie = None
            if disk.name in self.rig.gone:
                self._come_back(disk, offset)
            self._go_on(disk, rng)

    def wait(self) -> None:
        """Wait for all; a disk that hangs goes on first."""
        self.unhang()
        super().drain()

    def drain(self) -> None:
        self.wait()

    def unhang(self) -> None:
        for disk in self.rig.openings.disks.values():
            self._go_on(disk, random.Random(0))

    def _go_on(self, disk: CrashDevice, rng: random.Random) -> None:
        self.call_inside(lambda: self.rig.openings.go_on(disk, rng))

    def _come_back(self, disk: CrashDevice, seed: int) -> None:
        rng = random.Random(seed)
        self.rig.openings.come_back(disk, seed, rng.choice(FATES))
        self.rig.gone.discard(disk.name)
        self.rig.counts["comes back"] += 1

    def _hurt(self, disk: CrashDevice, what: str) -> None:
        self.rig.is_hurt = True
        self.rig.is_metadata_hurt |= disk.name == "/metadata"
        self.rig.counts[what] += 1

    @property
    def is_well(self) -> bool:
        """Whether each disk would work if it were opened now."""
        disks = self.rig.openings.disks.values()
        return not self.rig.gone and all(disk.lie is None for disk in disks)

    # ---- what an operator does ----

    def attempt(self, what: str, verb: Coroutine[Any, Any, None]) -> bool:
        """Try a verb. Returns whether it succeeded. Raises: AssertionError: it failed, although it had to succeed."""
        self.unhang()
        was_well = self.is_well
        try:
            self.run(verb)
        except NbdTargetError as error:
            # The old table's last commit has failed: what was loaded before that is stale.
            if was_well and "load it again" not in str(error):
                raise AssertionError(f"all is well, and {what} is refused") from error
            self.rig.counts[f"{what} refused"] += 1
            return False
        self.rig.counts[what] += 1
        return True

    def reload(self) -> None:
        """The same table again: what is latched or lost is opened again."""
        well = self.is_well
        done = self.attempt("load", self.rig.load())
        if done and not self.attempt("resume", self.rig.resume()):
            done = self.attempt("load", self.rig.load())
            done = done and self.attempt("resume", self.rig.resume())
        if not done:
            self.retry()
        elif well and self.is_well:
            if not self.is_writable:
                # The new table has the metadata of the old one, whose last commit has failed.
                self.attempt("load", self.rig.load())
                self.attempt("resume", self.rig.resume())
                assert self.is_writable, "loaded twice in health, and still read-only"
            self.rig.is_hurt = False

    @property
    def is_writable(self) -> bool:
        """Whether the status line says `rw`. A linear device is always writable."""
        words = self.run(self.rig.status()).split()
        return not words or "rw" in words

    def retry(self) -> None:
        """A refused table must not be the end: when all is well, load and resume again."""
        device = self.rig._registry.get("d")
        if device.state is State.SUSPENDED:
            self.heal()
            self.attempt("load", self.rig.load())
            self.attempt("resume", self.rig.resume())

    def restart(self) -> None:
        """Stop and start the server; the boot goes on."""
        self.unhang()
        try:
            self.run(self.rig.stop())
        except NbdTargetError:
            assert self.rig.is_hurt, "it stops with an error, and nothing has failed"
        assert not self.in_flight, "stopped, and bios never ended"
        self.start_again("restart")

    def kill(self) -> None:
        """SIGKILL, and a start in the same boot."""
        self.discard_loop()
        self.rig.registry = None
        self.loop = self._new_loop()
        self.start_again("kill")

    def start_again(self, what: str) -> None:
        self.rig.counts[what] += 1
        self.model.doubt()
        self.losses_told = 0
        self.check_metadata()
        if not self.attempt("start", self.rig.start()):
            self.heal()
            self.rig.registry = None
            self.call_inside(self.rig.openings.die)
            self.check_metadata()
            self.attempt("start", self.rig.start())
        self.look_at_all()

    def look_at_all(self) -> None:
        """Read everything after a start; where a disk fails still, it is healed first."""
        if not self.is_well:
            self.heal()
            self.reload()
        self.rig.is_hurt = False
        self.unhang()
        content = self.run(self.rig.disk.read(0, self.model.size))
        self.model.observe(content)

    def check_metadata(self) -> None:
        """Check that no metadata needs an offline tool, if no metadata device has failed."""
        metadata = self.rig.openings.disks.get("/metadata")
        if metadata is None or self.rig.is_metadata_hurt:
            return
        if not isinstance(self.rig, CacheRig):
            return
        image = bytearray(metadata.image())
        try:
            found = run_over(image, examine(CACHE_CHECKS, len(image), unused=False))
        except NotFormatted:
            return
        assert not found.needs_check, "needs_check, and no metadata device has failed"

    def message(self, words: tuple[str, ...]) -> None:
        self.unhang()
        try:
            self.run(self.rig.message(*words))
        except NbdTargetError:
            assert self.rig.is_hurt, f"{words} refused"

    def cut_power(self, seed: int, fate: Fate = Fate.MIXED) -> None:
        super().cut_power(seed, fate)
        self.losses_told = 0
        self.rig.counts["power cuts"] += 1


def draw_walk(seed: int) -> list[Step]:
    rng = random.Random(seed)
    walk: list[Step] = []
    for kind in rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=STEPS):
        unit = rng.choice([REGION_SIZE, SECTOR])
        begin = rng.randrange(-(-DISK_SIZE // unit)) * unit
        length = rng.randrange(1, 3 * REGION_SIZE // unit + 1) * unit
        length = min(length, DISK_SIZE - begin)
        walk.append((kind, begin, length, rng.random() < 0.3))
    return walk


def take(driver: ComebackDriver, step: Step) -> None:
    kind, offset, length, flag = step
    if kind == "fail":
        driver.fail(offset, length, flag)
    elif kind == "hang":
        driver.hang(offset)
    elif kind == "go":
        driver.go(offset, flag)
    elif kind == "forget":
        driver.forget(offset)
    elif kind == "heal":
        driver.heal(offset)
    elif kind == "kill":
        driver.kill()
    elif kind == "restart":
        driver.restart()
    elif kind == "reload":
        driver.reload()
    elif kind == "message":
        if messages := driver.rig.messages:
            driver.message(messages[length % len(messages)])
    elif kind == "cut_power":
        driver.cut_power(offset * 7 + length)
    else:
        take_cache(driver, step)


def run_walk(make_rig: Callable[[int, float], Any], seed: int) -> Counter[str]:
    """Returns what has happened. Raises: Violation, AssertionError."""
    driver = ComebackDriver(make_rig(seed, (0.0, 0.5, 1.0)[seed % 3]))
    try:
        for step in draw_walk(seed):
            take(driver, step)
        # All is well again: one restart with the same line serves all data, and takes more.
        driver.heal()
        driver.wait()
        driver.restart()
        driver.run(driver.rig.disk.write(0, b"well" * (SECTOR // 4)))
        driver.run(driver.rig.disk.flush())
    finally:
        driver.discard_loop()
    counts: Counter[str] = driver.rig.counts
    return counts


@pytest.fixture(autouse=True)
def small_and_lazy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for rigs in ("rigs", "cache_rigs"):
        monkeypatch.setattr(f"tests.support.crash.{rigs}.CrashDevice", LazyDevice)
    logging.disable(logging.CRITICAL)
    with small_blocks():
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rig",
    [
        LinearComebacks,
        CloneComebacks,
        LoggedComebacks,
        *(
            pytest.param(rig, marks=pytest.mark.long)
            for rig in (CacheComebacks, WritethroughComebacks, SwitchingComebacks)
        ),
    ],
)
def test_disks_that_come_back_serve_all_data_again(
    rig: Callable[[int, float], Any],
) -> None:
    counts: Counter[str] = Counter()
    for seed in range(SEED, SEED + WALKS):
        try:
            counts += run_walk(rig, seed)
        except BaseException as error:
            error.add_note(f"SIM_SEED={seed}")
            raise
    for what in ("fails", "goes", "comes back", "load", "restart", "kill"):
        assert counts[what] >= WALKS // 2, counts


async def test_region_that_the_destination_has_lost_is_read_from_the_source() -> None:
    rig = CloneComebacks(1, 1.0)
    await rig.start()
    client = FlushObserver(rig.disk)
    await rig.message("disable_hydration")
    # It hydrates the region, and is not flushed.
    await rig.disk.write(0, bytes(REGION_SIZE))
    rig.openings.forget(rig.destination, 0, Fate.DROP)
    assert await rig.disk.read(0, REGION_SIZE) == CONTENT[:REGION_SIZE]
    assert (await rig.status()).endswith(" ro")
    await rig.load()
    await rig.resume()
    with pytest.raises(DeviceError):
        await client.flush()
    await rig.disk.write(0, bytes(REGION_SIZE))
    await client.flush()
    await rig.stop()


async def test_idle_clone_goes_on_when_its_destination_has_lost_no_data() -> None:
    rig = CloneComebacks(1, 1.0)
    await rig.start()
    await rig.message("disable_hydration")
    await rig.disk.write(0, bytes(REGION_SIZE))
    await rig.disk.flush()
    rig.openings.forget(rig.destination, 0, Fate.DROP)
    assert (await rig.status()).endswith(" rw")
    assert await rig.disk.read(0, REGION_SIZE) == bytes(REGION_SIZE)
    await rig.stop()


async def test_block_that_the_cache_has_lost_is_not_read_from_it() -> None:
    rig = CacheComebacks(1, 1.0)
    await rig.start()
    await rig.message("warm", "0-2")
    for _ in range(100):
        await asyncio.sleep(0)
        rig.clock.advance(0.001)
    target = rig.maybe_target()
    assert target is not None
    assert target._metadata.maybe_cblock(1) is not None
    assert target._metadata.changed, "it is mapped in core alone"
    rig.openings.forget(rig.cache, 0, Fate.DROP)
    with pytest.raises(DeviceError):
        await rig.disk.read(BLOCK_SIZE, BLOCK_SIZE)
    await rig.load()
    await rig.resume()
    block = slice(BLOCK_SIZE, 2 * BLOCK_SIZE)
    assert await rig.disk.read(BLOCK_SIZE, BLOCK_SIZE) == CONTENT[block]
    await rig.stop()


async def resume_failing(rig: Any, disk: CrashDevice) -> None:
    """Suspend, which records how the disks are; then the commit of the resume fails."""
    registry = rig._registry
    await registry.suspend("d")
    disk.lie = FailFlush()
    for _ in range(3):
        if registry.get("d").state is State.SUSPENDED:
            with contextlib.suppress(NbdTargetError):
                await registry.resume("d")
    disk.lie = None


async def test_cache_whose_stop_stays_recorded_changes_no_disk_under_it() -> None:
    rig = CacheComebacks(1, 1.0)
    await rig.start()
    await rig.message("warm", "0-2")
    for _ in range(100):
        await asyncio.sleep(0)
        rig.clock.advance(0.001)
    await rig.disk.write(BLOCK_SIZE, bytes(SECTOR))
    await rig.disk.flush()
    target = rig.maybe_target()
    assert target is not None
    assert target._metadata.nr_dirty
    await resume_failing(rig, rig.cache)
    for offset in (BLOCK_SIZE, DISK_SIZE - SECTOR):
        with contextlib.suppress(DeviceError):
            await rig.disk.write(offset, b"\1" * SECTOR)
    await restart_and_read(rig)


async def test_clone_whose_stop_stays_recorded_changes_no_disk_under_it() -> None:
    rig = CloneComebacks(1, 1.0)
    await rig.start()
    await rig.message("disable_hydration")
    await rig.disk.write(0, bytes(REGION_SIZE))
    await rig.disk.flush()
    await resume_failing(rig, rig.destination)
    with contextlib.suppress(DeviceError):
        await rig.disk.write(0, b"\1" * SECTOR)
    await restart_and_read(rig)


@pytest.mark.parametrize("name", ["/origin", "/cache"])
async def test_exchanged_disk_is_refused_by_name_and_the_right_one_serves(
    name: str,
) -> None:
    rig = CacheComebacks(1, 1.0)
    await rig.start()
    await rig.disk.write(0, bytes(REGION_SIZE))
    await rig.disk.flush()
    await rig.stop()
    right = rig.openings.disks[name]
    content = random.Random(9).randbytes(right.size)
    other = CrashDevice(right.size, 9, content=content, name=name)
    rig.openings.exchange(right, other)
    with pytest.raises(NbdTargetError, match=f"{name} is not as /metadata knows it"):
        await rig.start()
    assert other.image() == content, "a disk that was refused was written"
    rig.openings.exchange(other, right)
    await rig.start()
    assert await rig.disk.read(0, REGION_SIZE) == bytes(REGION_SIZE)
    await rig.stop()


async def restart_and_read(rig: Any) -> None:
    """All disks are well: one restart with the same line serves all data."""
    with contextlib.suppress(NbdTargetError):
        await rig.stop()
    await rig.start()
    await rig.disk.read(0, DISK_SIZE)
    await rig.stop()


def fails(rig: Callable[[int, float], Any]) -> bool:
    for seed in range(MUTANT_WALKS_MAX):
        try:
            run_walk(rig, seed)
        except Exception:
            return True
    return False


def test_comebacks_catch_a_dead_device_that_is_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Health, "is_usable", True)
    assert fails(LinearComebacks)
    assert fails(CacheComebacks)


async def blame_the_metadata(committer: Committer, *args: Any, **kwargs: Any) -> None:
    """Takes whatever a commit fails of for damaged metadata."""
    await original_abort(committer, *args, **kwargs)
    metadata: Any = committer.metadata
    await metadata_io.run(committer.device, metadata.record_needs_check())


original_abort = Committer._abort


def test_comebacks_catch_needs_check_for_an_origin_that_was_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Committer, "_abort", blame_the_metadata)
    assert fails(CacheComebacks)


@pytest.mark.parametrize("rig", [LinearComebacks, CloneComebacks, CacheComebacks])
def test_comebacks_catch_a_loss_that_is_not_confessed(
    rig: Callable[[int, float], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Health, "note_loss", lambda health: None)
    assert fails(rig)
