# SPDX-License-Identifier: Apache-2.0
"""Short workloads of a cache, each cut at every point."""

import logging
import os
from collections.abc import Callable, Iterator

import pytest

from nbdtarget.targets.cache.table import PASSTHROUGH, WRITEBACK, WRITETHROUGH
from tests.support.crash.cache_rigs import (
    BLOCK_SIZE,
    CacheRig,
    cache_table,
    small_blocks,
)
from tests.support.crash.cache_walks import CacheDriver
from tests.support.crash.cuts import Cuts
from tests.support.crash.lazy_device import LazyDevice
from tests.support.devices import FailAfter, FailFlush
from tests.support.model import SECTOR, DiskModel

__all__ = [
    "DEEP",
    "IDLE",
    "MATRIX",
    "SAMPLES",
    "IdleCacheRig",
    "LogRig",
    "ThroughLogRig",
    "ThroughRig",
    "Workload",
    "cache_that_shrinks_and_grows",
    "clean",
    "copy_promotion",
    "cuts_of",
    "demotion_and_reuse",
    "dirty_log",
    "dirty_log_comes_and_goes",
    "discard_and_write",
    "failed_flush_of_the_cache",
    "failed_flush_of_the_origin",
    "flush",
    "formatting",
    "is_cached",
    "metadata_that_die_in_a_commit",
    "overwrites_with_fua",
    "passthrough_invalidation",
    "policies",
    "rig_of",
    "small_blocks_that_take_their_time",
    "switch",
    "wait_until",
    "warm",
    "write",
    "write_hit",
    "write_through",
    "writeback_and_clean_shutdown",
]

DEEP = bool(os.environ.get("CRASH_DEEP"))
SAMPLES = 10 if DEEP else 1
Workload = Callable[[CacheDriver], None]
IDLE = "smq 2 migration_threshold 0"  # nothing is cleaned unless it is asked for


class IdleCacheRig(CacheRig):
    tables = (cache_table(WRITEBACK, policy=IDLE),)


class LogRig(CacheRig):
    tables = (cache_table(WRITEBACK, "dirty_log", policy=IDLE),)


class ThroughRig(CacheRig):
    tables = (cache_table(WRITETHROUGH, policy=IDLE),)


class ThroughLogRig(CacheRig):
    tables = (cache_table(WRITETHROUGH, "dirty_log", policy=IDLE),)


def rig_of(driver: CacheDriver) -> CacheRig:
    assert isinstance(driver.rig, CacheRig)
    return driver.rig


def wait_until(driver: CacheDriver, is_done: Callable[[], bool]) -> None:
    for _ in range(2000):
        if is_done():
            return
        driver.turn(1)
        driver.advance(0.02)
    raise AssertionError("it never happens")


def write(
    driver: CacheDriver, oblock: int, length: int = BLOCK_SIZE, *, fua: bool = False
) -> None:
    driver.write(oblock * BLOCK_SIZE, length, fua=fua)


def flush(driver: CacheDriver) -> None:
    """Wait for all writes, then FLUSH, so that all of them are promised from here on."""
    driver.drain()
    driver.flush()
    driver.drain()


def is_cached(driver: CacheDriver, oblock: int) -> bool:
    target = rig_of(driver).maybe_target()
    assert target is not None
    return target._metadata.maybe_cblock(oblock) is not None


def warm(driver: CacheDriver, oblock: int) -> None:
    driver.run(driver.rig.message("warm", str(oblock)))
    wait_until(driver, lambda: is_cached(driver, oblock))


def clean(driver: CacheDriver) -> None:
    driver.run(driver.rig.message("clean_now"))
    wait_until(driver, lambda: rig_of(driver).is_settled)


def switch(driver: CacheDriver, table: str) -> None:
    """Load another table, and swap to it with whatever is in flight."""
    rig_of(driver).tables = (table,)
    driver.reload()


def formatting(driver: CacheDriver) -> None:
    """Do nothing: the driver formats a new metadata device when it starts."""


def write_hit(driver: CacheDriver) -> None:
    warm(driver, 2)
    write(driver, 2, 3 * SECTOR)
    flush(driver)
    write(driver, 2, SECTOR)
    driver.drain()
    write(driver, 2, 2 * SECTOR, fua=True)
    driver.drain()


def overwrites_with_fua(driver: CacheDriver) -> None:
    write(driver, 3, fua=True)
    driver.drain()
    write(driver, 4)
    driver.drain()
    write(driver, 4, SECTOR, fua=True)  # its mapping is not committed yet
    driver.drain()


def copy_promotion(driver: CacheDriver) -> None:
    write(driver, 3, SECTOR)
    driver.drain()
    warm(driver, 3)
    write(driver, 3, 2 * SECTOR)
    flush(driver)


def demotion_and_reuse(driver: CacheDriver) -> None:
    for oblock in range(4):
        write(driver, oblock)
    flush(driver)
    write(driver, 1, SECTOR)
    driver.drain()
    warm(driver, 5)
    flush(driver)
    for oblock in (5, 0, 3):
        write(driver, oblock, 2 * SECTOR)
    flush(driver)


def writeback_and_clean_shutdown(driver: CacheDriver) -> None:
    write(driver, 1)
    write(driver, 2)
    driver.drain()
    clean(driver)
    write(driver, 2, SECTOR)
    driver.restart()
    write(driver, 1, SECTOR)
    flush(driver)


def passthrough_invalidation(driver: CacheDriver) -> None:
    warm(driver, 1)
    warm(driver, 2)
    switch(driver, cache_table(PASSTHROUGH))
    write(driver, 1, SECTOR)
    write(driver, 2, SECTOR, fua=True)
    driver.drain()
    write(driver, 1)
    switch(driver, cache_table(WRITEBACK, policy=IDLE))
    warm(driver, 1)
    flush(driver)


def write_through(driver: CacheDriver) -> None:
    warm(driver, 2)
    write(driver, 2, SECTOR)
    flush(driver)
    write(driver, 2, 3 * SECTOR, fua=True)
    write(driver, 3)
    driver.drain()


def discard_and_write(driver: CacheDriver) -> None:
    write(driver, 2, SECTOR)
    driver.discard(2 * BLOCK_SIZE + SECTOR, 2 * BLOCK_SIZE - SECTOR)  # beside it
    driver.drain()
    driver.discard(4 * BLOCK_SIZE, 2 * BLOCK_SIZE)
    write(driver, 4, SECTOR)  # zeroes around it
    flush(driver)
    warm(driver, 5)
    write(driver, 5, 2 * SECTOR)
    driver.drain()
    clean(driver)
    flush(driver)


def dirty_log(driver: CacheDriver) -> None:
    warm(driver, 2)
    flush(driver)
    write(driver, 2, SECTOR)
    write(driver, 2, SECTOR, fua=True)
    driver.drain()
    clean(driver)
    flush(driver)
    write(driver, 2, 2 * SECTOR)
    flush(driver)


def dirty_log_comes_and_goes(driver: CacheDriver) -> None:
    write(driver, 1)
    driver.drain()
    switch(driver, cache_table(WRITEBACK, "dirty_log", policy=IDLE))
    write(driver, 1, SECTOR)
    driver.drain()
    clean(driver)
    switch(driver, cache_table(WRITEBACK, policy=IDLE))
    write(driver, 1, 2 * SECTOR)
    switch(driver, cache_table(WRITETHROUGH, "dirty_log", policy=IDLE))
    write(driver, 1, 3 * SECTOR)
    flush(driver)


def policies(driver: CacheDriver) -> None:
    write(driver, 1)
    write(driver, 2)
    driver.drain()
    switch(driver, cache_table(WRITEBACK, policy="cleaner 0"))
    write(driver, 2, SECTOR)
    driver.drain()
    wait_until(driver, lambda: rig_of(driver).is_settled)
    switch(driver, cache_table(WRITEBACK, policy="mq 2 migration_threshold 0"))
    write(driver, 2, 2 * SECTOR)
    flush(driver)


def cache_that_shrinks_and_grows(driver: CacheDriver) -> None:
    for oblock in range(4):
        write(driver, oblock)
    flush(driver)
    clean(driver)
    device = rig_of(driver).cache
    whole = device.size
    driver.suspend()
    device.size = whole - BLOCK_SIZE
    driver.resume()
    write(driver, 2, SECTOR)
    write(driver, 3, SECTOR)
    flush(driver)
    device.size = whole
    driver.reload()
    write(driver, 5)
    flush(driver)


def failed_flush_of_the_cache(driver: CacheDriver) -> None:
    write(driver, 2)
    flush(driver)
    rig_of(driver).cache.lie = FailFlush()
    write(driver, 3)
    flush(driver)
    write(driver, 2, SECTOR)
    write(driver, 5, SECTOR, fua=True)
    flush(driver)


def failed_flush_of_the_origin(driver: CacheDriver) -> None:
    warm(driver, 2)
    write(driver, 2, SECTOR)
    flush(driver)
    clean(driver)
    rig_of(driver).origin.lie = FailFlush()
    for oblock in (0, 3):
        write(driver, oblock)
        driver.drain()
    driver.run(driver.rig.message("warm", "5"))
    for _ in range(20):
        driver.turn(2)
        driver.advance(0.2)
    write(driver, 2, SECTOR)
    flush(driver)


def metadata_that_die_in_a_commit(driver: CacheDriver) -> None:
    rig_of(driver).metadata.lie = FailAfter(3)
    write(driver, 3)
    flush(driver)
    write(driver, 3, SECTOR)
    flush(driver)


def cuts_of(
    make_rig: type[CacheRig], workload: Workload, inline: float, seed: int
) -> Cuts:
    """Run it once, and note all that a power cut may leave."""
    rig = make_rig(seed, inline)
    model = DiskModel(rig.content, discards_last=rig.discards_last)
    cuts = Cuts(rig, model, seed=seed, samples=SAMPLES)
    driver = CacheDriver(rig)
    try:
        driver.model = cuts.model
        workload(driver)
        cuts.note()
    finally:
        driver.discard_loop()
    # The caches that are booted from the images need not be slow again.
    rig.cache.inline_chance = 1.0
    return cuts


@pytest.fixture(autouse=True)
def small_blocks_that_take_their_time(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    monkeypatch.setattr("tests.support.crash.cache_rigs.CrashDevice", LazyDevice)
    logging.disable(logging.CRITICAL)
    with small_blocks():
        yield
    logging.disable(logging.NOTSET)


MATRIX: list[tuple[type[CacheRig], Workload, int, int]] = [
    (IdleCacheRig, formatting, 27, 5),
    (IdleCacheRig, write_hit, 44, 11),
    (IdleCacheRig, overwrites_with_fua, 51, 14),
    (IdleCacheRig, copy_promotion, 43, 14),
    (IdleCacheRig, demotion_and_reuse, 88, 79),
    (IdleCacheRig, writeback_and_clean_shutdown, 88, 42),
    (IdleCacheRig, passthrough_invalidation, 108, 30),
    (ThroughRig, write_through, 48, 17),
    (ThroughLogRig, write_through, 51, 14),
    (IdleCacheRig, discard_and_write, 62, 48),
    (LogRig, dirty_log, 64, 14),
    (LogRig, demotion_and_reuse, 97, 81),
    (IdleCacheRig, dirty_log_comes_and_goes, 115, 37),
    (IdleCacheRig, policies, 96, 32),
    (IdleCacheRig, cache_that_shrinks_and_grows, 120, 60),
    (IdleCacheRig, failed_flush_of_the_cache, 54, 16),
    (IdleCacheRig, failed_flush_of_the_origin, 64, 33),
    (IdleCacheRig, metadata_that_die_in_a_commit, 40, 7),
]
