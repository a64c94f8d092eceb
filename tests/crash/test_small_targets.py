# SPDX-License-Identifier: Apache-2.0
"""The walks of the crash machine over the small targets, alone and stacked."""

import random

import pytest

from tests.support.crash.machine import Driver
from tests.support.crash.rigs import CONTENT, DISK_SIZE, LinearRig
from tests.support.crash.walks import MakeRig, draw_walk, seeds_that_fail, walk_or_tell
from tests.support.devices import CrashDevice
from tests.support.model import SECTOR, DiskModel

WALKS = 15
SECTORS = (
    DISK_SIZE // SECTOR
)  # 59, a prime: no stripes but with a linear line behind them


class DelayRig(LinearRig):
    """Writes and flushes wait, so that later reads overtake them."""

    table = f"0 {SECTORS} delay /disk 0 0 /disk 0 5 /disk 0 7"


class DustRig(LinearRig):
    """Bad blocks that every write repairs: reads of them are kept away by `bypass`."""

    table = f"0 {SECTORS} dust /disk 0 512"
    messages = (("addbadblock", "3"), ("clearbadblocks",), ("quiet",))

    async def message(self, *words: str) -> None:
        if words[0] == "addbadblock":
            await super().message("clearbadblocks")
        await super().message(*words)


class PowercutRig(LinearRig):
    """linear over powercut: what powercut has promised outlives a cut of the medium's power."""

    table = f"0 {SECTORS} linear /dev/mapper/below 0"
    below = f"0 {SECTORS} powercut /disk 0 2 volatile_cache_max 16"

    async def load(self) -> None:
        registry = self._registry
        if registry.maybe_device("below") is None:
            await registry.create("below", self.below)
        await super().load()


class CycledRig(LinearRig):
    """powercut, whose own power is cut: what it has promised is there afterwards."""

    table = f"0 {SECTORS} powercut /disk 0"


class LogWritesRig(LinearRig):
    """log-writes: the disk is as any other, whatever becomes of the log."""

    table = f"0 {SECTORS} log-writes /disk /log"

    def __init__(
        self, seed: int, inline: float, images: tuple[bytes, ...] = (CONTENT,)
    ) -> None:
        super().__init__(seed, inline, images)
        log = CrashDevice(1 << 16, seed, inline_chance=inline, name="/log")
        self.devices["/log"] = log


class StripedRig(LinearRig):
    """Three stripes of one disk in chunks of three sectors, and the rest behind them."""

    striped = 54
    table = (
        f"0 {striped} striped 3 3 /disk 0 /disk 18 /disk 36\n"
        f"{striped} {SECTORS - striped} linear /disk {striped}"
    )

    def __init__(
        self, seed: int, inline: float, images: tuple[bytes, ...] | None = None
    ) -> None:
        super().__init__(
            seed, inline, (self.laid_out(CONTENT),) if images is None else images
        )

    def laid_out(self, content: bytes) -> bytes:
        """Return the bytes of the device when the disk holds `content`."""
        image = bytearray(content)
        for sector in range(self.striped):
            at = self.place(sector) * SECTOR
            image[at : at + SECTOR] = content[sector * SECTOR : (sector + 1) * SECTOR]
        return bytes(image)

    def place(self, sector: int) -> int:
        """Return the sector of the device at which a sector of the disk lies."""
        row, rest = divmod(sector, 9)
        stripe, within = divmod(rest, 3)
        return stripe * 18 + row * 3 + within

    def check_survivors(self, model: DiskModel, promised: object) -> None:
        image = self.device.image()
        disk = bytearray(image)
        for sector in range(self.striped):
            at = self.place(sector) * SECTOR
            disk[sector * SECTOR : (sector + 1) * SECTOR] = image[at : at + SECTOR]
        model.check_survivor(bytes(disk))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rig", [StripedRig, DelayRig, DustRig, PowercutRig, CycledRig, LogWritesRig]
)
def test_no_acknowledged_flush_is_lost(rig: MakeRig) -> None:
    for seed in range(WALKS):
        walk_or_tell(rig, seed)


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["keep", "drop", "tear", "mixed"])
def test_powercut_cuts_as_a_power_failure_does(fate: str) -> None:
    """The model of a real power cut holds for powercut's own, on a machine that goes on."""
    for seed in range(WALKS):
        driver = Driver(CycledRig(seed, (0.0, 0.5, 1.0)[seed % 3]))
        rng = random.Random(seed)
        try:
            for kind, offset, length, flag in draw_walk(seed):
                if kind == "cut_power":
                    cycle(driver, fate, rng.randrange(1 << 30))
                elif kind == "write":
                    driver.write(offset, length, fua=flag)
                elif kind == "flush":
                    driver.flush()
                elif kind == "zero":
                    driver.zero(offset, length, fua=flag)
                elif kind == "turn":
                    driver.turn(length % 20)
                elif kind == "read":
                    driver.read(offset, length)
            driver.verify()
        finally:
            driver.discard_loop()


def cycle(driver: Driver, fate: str, seed: int) -> None:
    """Cut and restore the power of the target; what it then holds is the truth."""
    drain_reads(driver)
    driver.run(driver.rig.message("cycle", fate, str(seed)))
    driver.turn(100)
    assert not driver.in_flight
    content = driver.run(driver.rig.disk.read(0, driver.model.size))
    driver.model.check_survivor(content)
    driver.model.settle(content)


def drain_reads(driver: Driver) -> None:
    """Wait for the reads before the power is cut, because the driver does not accept a failing read."""
    while any(bio.op == 0 for bio in driver.in_flight):
        driver.turn(1)


def test_machine_catches_a_powercut_that_forgets_fua(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nbdtarget.targets.powercut.target.FUA", 0)
    assert seeds_that_fail(PowercutRig, 20)


def test_machine_catches_a_powercut_that_does_not_flush(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def nothing(*_: object) -> None:
        """Write nothing to the medium, in place of a flush."""

    monkeypatch.setattr(
        "nbdtarget.targets.powercut.target.PowercutTarget._write_back", nothing
    )
    assert seeds_that_fail(PowercutRig, 20)
