# SPDX-License-Identifier: Apache-2.0
"""Short workloads of a clone, each cut at every point."""

import os
from collections.abc import Callable

from tests.support.crash.cuts import Cuts
from tests.support.crash.machine import Driver
from tests.support.crash.rigs import REGION_SIZE, QuietCloneRig, WornCloneRig
from tests.support.devices import BadRange, FailAfter, FailFlush, Slow
from tests.support.model import SECTOR, DiskModel

__all__ = [
    "DEEP",
    "MATRIX",
    "SAMPLES",
    "Workload",
    "WornQuietRig",
    "clone",
    "commit_by_the_timer",
    "compaction_during_commits",
    "cuts_of",
    "destination_that_dies",
    "discards",
    "eight_writes_without_a_flush",
    "failed_flush_of_the_destination",
    "failed_flush_of_the_metadata",
    "first_write_and_flush",
    "flush",
    "flush_beside_a_write",
    "formatting",
    "fua_before_its_region_is_committed",
    "fua_overwrite",
    "hydration_from_a_bad_source",
    "hydration_of_all",
    "metadata_that_dies_in_a_commit",
    "overwrites_of_a_hydrated_region",
    "partial_write_and_flush",
    "reload_with_io_in_flight",
    "slow_destination",
    "suspend_and_resume",
    "two_parts_of_a_region_at_once",
    "write",
    "write_after_a_clean_restart",
    "writes_and_flush_during_a_commit",
    "writes_while_hydrating",
    "zeroes",
]

DEEP = bool(os.environ.get("CRASH_DEEP"))
SAMPLES = 10 if DEEP else 2
Workload = Callable[[Driver], None]


class WornQuietRig(WornCloneRig, QuietCloneRig):
    """The journal is about to be compacted."""


def clone(driver: Driver) -> QuietCloneRig:
    assert isinstance(driver.rig, QuietCloneRig)
    return driver.rig


def write(
    driver: Driver, region_nr: int, length: int = REGION_SIZE, *, fua: bool = False
) -> None:
    driver.write(region_nr * REGION_SIZE, length, fua=fua)


def formatting(driver: Driver) -> None:
    """Do nothing: the driver formats a new metadata device when it starts."""


def flush(driver: Driver) -> None:
    """Wait for all writes, then FLUSH, so that all of them are promised from here on."""
    driver.drain()
    driver.flush()
    driver.drain()


def first_write_and_flush(driver: Driver) -> None:
    write(driver, 3)
    flush(driver)


def flush_beside_a_write(driver: Driver) -> None:
    write(driver, 3)
    driver.flush()
    driver.drain()


def fua_overwrite(driver: Driver) -> None:
    write(driver, 3, fua=True)
    driver.drain()
    write(driver, 3, SECTOR, fua=True)
    driver.drain()


def fua_before_its_region_is_committed(driver: Driver) -> None:
    write(driver, 3)
    driver.drain()
    write(driver, 3, SECTOR, fua=True)
    driver.drain()


def partial_write_and_flush(driver: Driver) -> None:
    driver.write(REGION_SIZE + SECTOR, 2 * SECTOR, fua=False)
    flush(driver)
    driver.write(5 * REGION_SIZE - 100, 200, fua=False)  # parts of two regions
    flush(driver)


def two_parts_of_a_region_at_once(driver: Driver) -> None:
    for nr in (0, 2, 4):
        driver.write(3 * REGION_SIZE + nr * SECTOR, SECTOR, fua=nr == 4)
    driver.drain()
    flush(driver)


def writes_and_flush_during_a_commit(driver: Driver) -> None:
    write(driver, 3)
    driver.drain()
    driver.flush()
    driver.turn(2)
    write(driver, 5)
    write(driver, 3, SECTOR)
    driver.turn(1)
    driver.flush()
    driver.drain()


def hydration_of_all(driver: Driver) -> None:
    while driver.hydrate_a_step():
        driver.flush()
    driver.drain()


def writes_while_hydrating(driver: Driver) -> None:
    driver.run(driver.rig.set_background(on=True))
    driver.turn(3)
    write(driver, 0, SECTOR)
    write(driver, 7, SECTOR, fua=True)
    driver.turn(3)
    write(driver, 1)
    driver.flush()
    driver.drain()


def discards(driver: Driver) -> None:
    driver.discard(2 * REGION_SIZE, 2 * REGION_SIZE)
    flush(driver)
    write(driver, 3, SECTOR)
    flush(driver)


def zeroes(driver: Driver) -> None:
    driver.zero(REGION_SIZE // 2, 2 * REGION_SIZE, fua=False)
    driver.drain()
    driver.zero(0, SECTOR, fua=True)
    driver.drain()


def compaction_during_commits(driver: Driver) -> None:
    for region_nr in range(4):
        write(driver, region_nr)
        flush(driver)
    assert clone(driver).nr_compactions, "too few commits"


def reload_with_io_in_flight(driver: Driver) -> None:
    write(driver, 3)
    driver.load()
    write(driver, 4, SECTOR)
    driver.resume()
    driver.flush()
    driver.drain()


def suspend_and_resume(driver: Driver) -> None:
    write(driver, 3)
    driver.suspend()
    write(driver, 4)
    driver.flush()
    driver.turn(3)
    driver.resume()
    driver.drain()


def write_after_a_clean_restart(driver: Driver) -> None:
    write(driver, 3)
    driver.restart()
    write(driver, 4)
    write(driver, 3, SECTOR)
    flush(driver)


def overwrites_of_a_hydrated_region(driver: Driver) -> None:
    write(driver, 3)
    flush(driver)
    for length in (3 * SECTOR, 2 * SECTOR, SECTOR):
        write(driver, 3, length)
        driver.drain()
    flush(driver)
    write(driver, 3, SECTOR)
    flush(driver)


def eight_writes_without_a_flush(driver: Driver) -> None:
    for region_nr in (3, 4):
        write(driver, region_nr)
    flush(driver)
    for nr in range(8):
        driver.write(3 * REGION_SIZE + (4 + nr) * SECTOR, 2 * SECTOR, fua=False)
    driver.drain()


def commit_by_the_timer(driver: Driver) -> None:
    write(driver, 3)
    driver.drain()
    driver.advance(1.5)
    driver.turn(20)


def failed_flush_of_the_destination(driver: Driver) -> None:
    write(driver, 2)
    flush(driver)
    clone(driver).destination.lie = FailFlush()
    write(driver, 3)
    flush(driver)
    write(driver, 2, SECTOR)
    flush(driver)


def failed_flush_of_the_metadata(driver: Driver) -> None:
    clone(driver).metadata.lie = FailFlush()
    write(driver, 3)
    flush(driver)


def metadata_that_dies_in_a_commit(driver: Driver) -> None:
    clone(driver).metadata.lie = FailAfter(3)
    write(driver, 3)
    flush(driver)


def destination_that_dies(driver: Driver) -> None:
    clone(driver).destination.lie = FailAfter(2)
    write(driver, 3, SECTOR)
    flush(driver)
    write(driver, 4)
    flush(driver)


def hydration_from_a_bad_source(driver: Driver) -> None:
    bad = BadRange(REGION_SIZE, REGION_SIZE + SECTOR)
    clone(driver).source.lie = bad
    for _ in range(4):
        driver.hydrate_a_step()
    write(driver, 1)  # over the bad sector: it is not needed then
    flush(driver)


def slow_destination(driver: Driver) -> None:
    clone(driver).destination.lie = Slow(0.05, driver.rig.clock)
    write(driver, 3)
    driver.turn(1)
    driver.write(4 * REGION_SIZE, SECTOR, fua=True)
    driver.advance(0.06)
    flush(driver)


def cuts_of(workload: Workload, inline: float, seed: int) -> Cuts:
    """Run it once, and note all that a power cut may leave."""
    make_rig = WornQuietRig if workload is compaction_during_commits else QuietCloneRig
    rig = make_rig(seed, inline)
    cuts = Cuts(rig, DiskModel(rig.content), seed=seed, samples=SAMPLES)
    driver = Driver(rig)
    try:
        driver.model = cuts.model
        workload(driver)
        cuts.note()
    finally:
        driver.discard_loop()
    return cuts


# A workload, and the crash points and different images that two orders of it have at least.
MATRIX: list[tuple[Workload, int, int]] = [
    (formatting, 92, 10),
    (first_write_and_flush, 115, 18),
    (flush_beside_a_write, 100, 12),
    (fua_overwrite, 120, 20),
    (fua_before_its_region_is_committed, 120, 20),
    (partial_write_and_flush, 140, 28),
    (two_parts_of_a_region_at_once, 125, 26),
    (writes_and_flush_during_a_commit, 140, 58),
    (hydration_of_all, 140, 52),
    (writes_while_hydrating, 140, 105),
    (discards, 122, 18),
    (zeroes, 125, 32),
    (compaction_during_commits, 165, 50),
    (reload_with_io_in_flight, 152, 27),
    (suspend_and_resume, 135, 27),
    (write_after_a_clean_restart, 240, 45),
    (overwrites_of_a_hydrated_region, 138, 36),
    (eight_writes_without_a_flush, 75, 265),
    (commit_by_the_timer, 112, 17),
    (failed_flush_of_the_destination, 138, 31),
    (failed_flush_of_the_metadata, 110, 14),
    (metadata_that_dies_in_a_commit, 118, 16),
    (destination_that_dies, 122, 18),
    (hydration_from_a_bad_source, 138, 62),
    (slow_destination, 122, 31),
]
