# SPDX-License-Identifier: Apache-2.0
"""A machine from one seed: life after life on the same disks, until the last one looks back.

`simulate(seed)` draws a rig and a number of lives, lives them and returns what happened. The same
seed is the same history, in any process: every choice is drawn from generators that the seed
names, and the digest over all that happened, with the step and the simulated time of each
event, tells whether two histories are one.
"""

import asyncio
import hashlib
import logging
import random
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final
from unittest import mock

from nbdtarget.control import uncache
from nbdtarget.devices.nbd import connection as nbd_connection
from nbdtarget.targets.clone import holes
from tests.sim.backend import connect_in_memory
from tests.sim.catalog import RIGS
from tests.sim.disks import SimDisk
from tests.sim.faults import Fault
from tests.sim.hydration import HydrationModel
from tests.sim.life import Life, Plan
from tests.sim.model import SECTOR, ClientModel
from tests.sim.older import check_recorded, older_version
from tests.sim.operator import REFUSALS
from tests.sim.rigs import Rig, Role
from tests.support.crash.cache_rigs import small_blocks

__all__ = ["History", "simulate"]

LIVES_MAX: Final = 10
EVENTS_SHOWN: Final = 40
UNCOMMITTED: Final = (
    "could not be committed: writes that no FLUSH has covered may be lost"
)
OFF_S: Final = 60.0  # between two lives
UPGRADES: Final = 0.3  # how many machines see their first lives with an older version


@dataclass
class History:
    """The outcome of a seed.

    Attributes:
        nr_crashes: power cuts and kills; clean shutdowns do not count.
        failure: what went wrong, or None; the last events before it are in `events`.
        digest: of everything that happened.
        counts: what caches have done, and how often their invariants were looked at.
    """

    seed: int
    rig: str
    nr_lives: int = 0
    nr_crashes: int = 0
    nr_requests: int = 0
    nr_steps: int = 0
    simulated_s: float = 0.0
    failure: BaseException | None = None
    events: tuple[str, ...] = ()
    digest: str = ""
    counts: Counter[str] = field(default_factory=Counter)

    def fail(self, error: BaseException) -> None:
        """Note a failure in the images that a life has left."""
        self.failure = self.failure or error


class _Recorder:
    """Takes every event: the newest as they are, all of them into the digest."""

    def __init__(self) -> None:
        self.events: deque[tuple[object, ...]] = deque(maxlen=EVENTS_SHOWN)
        self._digest = hashlib.blake2b(digest_size=16)

    def note(self, *event: object) -> None:
        self.events.append(event)
        self._digest.update(repr(event).encode())

    def digest(self) -> str:
        return self._digest.hexdigest()

    def lines(self) -> tuple[str, ...]:
        return tuple(
            f"{now_s:14.6f} s  step {steps:<6} {who:<14} {' '.join(map(str, what))}"
            for now_s, steps, who, *what in self.events
        )


def draw_rig(rng: random.Random, name: str | None) -> Rig:
    """The rig called `name`, or any."""
    drawn = rng.choices(list(RIGS), [weight for _, weight in RIGS.values()])[0]
    make, _ = RIGS[name or drawn]
    return make(rng)


def simulate(
    seed: int, *, rig_name: str | None = None, disk_type: type[SimDisk] = SimDisk
) -> History:
    """Live through everything that `seed` says."""
    rng = random.Random(f"world {seed}")
    rig = draw_rig(rng, rig_name)
    history = History(seed, rig.name)
    recorder = _Recorder()
    model = ClientModel(rig.content, discards_last=rig.discards_last)
    hydration = HydrationModel()
    images = {
        disk.name: rng.randbytes(disk.size) if disk.content is None else disk.content
        for disk in rig.disks
    }
    assert all(d.content is not None for d in rig.disks if d.role is not Role.DATA)
    nr_lives = rng.randrange(2, LIVES_MAX + 1)
    nr_older = rng.randrange(1, nr_lives) if rng.random() < UPGRADES else 0
    has_booted = is_uncached = False
    with _watched_log() as log:
        for nr in range(nr_lives):
            is_last = nr == nr_lives - 1
            plan = Plan.last() if is_last else Plan.draw(rng)
            life = Life(
                rig,
                model,
                plan,
                f"{seed} life {nr}",
                images,
                recorder.note,
                hydration,
                fault=None if is_last else Fault.maybe_draw(rng, rig),
                now_s=history.simulated_s + OFF_S,
                has_booted=has_booted,
                is_uncached=is_uncached and rng.random() < 0.5,
                disk_type=disk_type,
            )
            log.life = life
            try:
                with older_version(lives=nr < nr_older):
                    images = life.run()
            except Exception as error:
                history.failure = error
            if history.failure is None and nr >= nr_older:
                _check_recorded(life, images, history)
            if history.failure is None:
                images = life.repaired(images, history.fail)
            has_booted, is_uncached = life.has_booted, life.is_uncached
            history.counts["upgrades"] += has_booted and nr == nr_older > 0
            history.counts += life.counts
            history.nr_lives += 1
            history.nr_crashes += life.was_cut
            history.nr_requests += life.nr_requests
            history.nr_steps += life.loop.steps
            history.simulated_s = life.ended_s
            if history.failure is not None:
                break
    history.events = recorder.lines()
    history.digest = recorder.digest()
    return history


def _check_recorded(life: Life, images: dict[str, bytes], history: History) -> None:
    """A start has recorded what the disks are, whatever came after it."""
    starts_cache = life.table == life.rig.table
    if not (life.is_booted and starts_cache) or life.fault is not None:
        return
    for disk in life.rig.disks:
        if disk.role is Role.METADATA:
            try:
                check_recorded(disk, images[disk.name])
            except Exception as error:
                history.fail(error)
            else:
                history.counts["recorded"] += 1


class _LogWatch(logging.Handler):
    """Where nothing may fail, a line of level ERROR is a bug of ours; an exception always is."""

    life: Life | None = None

    def emit(self, record: logging.LogRecord) -> None:
        life = self.life
        if life is None or record.levelno < logging.ERROR:
            return
        message = record.getMessage()
        if record.exc_info is None and any(reason in message for reason in REFUSALS):
            return  # the operator tries, and is told so
        # A server has lost unflushed writes, or the operator has suspended a device without a flush.
        may_be_uncommitted = life.is_stopping and (life.is_hurt or life.suspended)
        if may_be_uncommitted and UNCOMMITTED in message:
            return
        if record.exc_info or record.levelno > logging.ERROR or not life.may_fail:
            error = AssertionError(f"logged: {message}")
            if record.exc_info and record.exc_info[1]:
                error.__cause__ = record.exc_info[1]
            life.fail(error)


def _simulated_ns() -> int:
    return round(asyncio.get_running_loop().time() * 1e9)


@contextmanager
def _watched_log() -> Iterator[_LogWatch]:
    logger = logging.getLogger("nbdtarget")
    watch = _LogWatch()
    old = logger.level, logger.propagate
    logger.addHandler(watch)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        # Holes as small as the disks here have them.
        with (
            mock.patch.object(holes, "HOLE_BYTES_MIN", SECTOR),
            mock.patch.object(nbd_connection, "_connected", connect_in_memory),
            mock.patch.object(uncache, "monotonic_ns", _simulated_ns),
            small_blocks(),
        ):
            yield watch
    finally:
        logger.removeHandler(watch)
        logger.setLevel(old[0])
        logger.propagate = old[1]
