# SPDX-License-Identifier: Apache-2.0
"""The simulation: what it finds, that it finds it, and that a seed is a history."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from nbdtarget.bio import FUA, OP_FLUSH, OP_WRITE, Bio
from nbdtarget.devices.base import Extent
from nbdtarget.devices.health import Health
from nbdtarget.devices.nbd import device as nbd_device
from nbdtarget.devices.nbd.device import NbdDevice
from nbdtarget.server.gate import Gate
from nbdtarget.server.in_flight import InFlight
from nbdtarget.targets import metadata_io
from nbdtarget.targets.base import REMAPPED, Target
from nbdtarget.targets.clone.extents import hydration_extents
from nbdtarget.targets.clone.foreground import Foreground
from nbdtarget.targets.clone.regions import Regions
from nbdtarget.targets.committer import Committer, Transaction
from nbdtarget.targets.powercut.target import PowercutTarget
from nbdtarget.targets.registry import TARGET_TYPES
from nbdtarget.targets.striped import StripedTarget
from nbdtarget_metadata.operations import Flush, Steps
from tests.sim.catalog import RIGS
from tests.sim.disks import SimDisk
from tests.sim.world import simulate
from tests.support.crash import cache_bugs

ROOT = Path(__file__).parent.parent.parent
SEEDS = 18  # of `make test`, for each rig; `make sim` draws new ones
CACHE_SEEDS = 21
BACKEND_SEEDS = 10
MUTANT_SEEDS_MAX = 150

# The rigs with a cache must reach each of these: a simulation that never does proves nothing.
MOVES = (
    "uncached 0",
    "promotions",
    "demotions",
    "discards",
    "J1",
    "J2",
    "J5",
    "J7",
    "J8",
)
CACHE_EVENTS = {
    "cache": (*MOVES, "J4", "writebacks", "sweeps", "overwrites", "logged writes"),
    "cache_writethrough": (*MOVES, "J4", "writes through", "logged writes"),
    "cache_passthrough": (*MOVES, "J3", "J4", "invalidations", "refusals"),
    "cache_switching": (*MOVES, "J4", "writebacks", "writes through", "overwrites"),
    "cache_over_clone": (*MOVES, "writebacks", "writes through", "overwrites"),
}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("rig", RIGS)
def test_nothing_acknowledged_is_lost(rig: str) -> None:
    crashes = requests = 0
    counts: Counter[str] = Counter()
    nr_seeds = CACHE_SEEDS if rig in CACHE_EVENTS else SEEDS
    if "backend" in rig:
        nr_seeds = BACKEND_SEEDS
    for seed in range(nr_seeds):
        history = simulate(seed, rig_name=rig)
        counts += history.counts
        crashes += history.nr_crashes
        requests += history.nr_requests
        if history.failure is not None:
            events = "\n".join(history.events)
            raise AssertionError(
                f"make sim SEED={seed} RIG={rig}\n{events}"
            ) from history.failure
    assert crashes > nr_seeds
    assert requests > 10 * nr_seeds
    assert counts["upgrades"], "no machine has lived with the older version"
    missing = [what for what in CACHE_EVENTS.get(rig, ()) if not counts[what]]
    assert not missing, counts


@pytest.mark.long
@pytest.mark.slow
def test_a_seed_is_the_same_history_in_any_process() -> None:
    seeds = range(100, 106)
    here = " ".join(simulate(seed).digest for seed in seeds)
    program = (
        "from tests.sim.world import simulate;"
        f"print(*(simulate(s).digest for s in range({seeds.start}, {seeds.stop})))"
    )
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == here


def test_two_seeds_are_two_histories() -> None:
    assert simulate(1).digest != simulate(2).digest


def is_caught(rig: str, first: int = 0, disk_type: type[SimDisk] = SimDisk) -> bool:
    """Whether the history of some seed shows the bug that has been planted.

    Args: first: the seed to try first: of a bug that few histories show, one that shows it.
    """
    seeds = (first, *range(MUTANT_SEEDS_MAX))
    return any(simulate(s, rig_name=rig, disk_type=disk_type).failure for s in seeds)


class CommitBeforeFlush(Committer):
    """Vouches for data before it is durable."""

    async def _commit_transaction(self, transaction: Transaction) -> None:
        await metadata_io.run(self.device, transaction.journal())
        await metadata_io.run(self.device, transaction.superblock())
        for device in self.backing:
            await device.flush()
        transaction.done()


class SuperblockBeforeJournal(Committer):
    """Lets the superblock vouch for a journal that may still be lost."""

    async def _commit_transaction(self, transaction: Transaction) -> None:
        for device in self.backing:
            await device.flush()
        await metadata_io.run(self.device, _without_flush(transaction.journal()))
        await metadata_io.run(self.device, transaction.superblock())
        transaction.done()


class FuaWithoutCommit(Foreground):
    """A FUA write to a hydrated region whose bit is not committed."""

    def write_hydrated(self, bio: Bio) -> None:
        self.regions.destination.submit(bio)


def upside_down(regions: Regions, offset: int, length: int) -> list[Extent]:
    """Takes hydrated for not hydrated."""
    told = hydration_extents(regions, offset, length)
    return [Extent(extent.length, int(extent.flags == 0)) for extent in told]


def _without_flush(steps: Steps[None]) -> Steps[None]:
    for operation in steps:
        if not isinstance(operation, Flush):
            yield operation


class HastyServer(InFlight):
    """Answers a FLUSH before it is carried out."""

    def start(self, bio: Bio) -> None:
        if bio.op == OP_FLUSH:
            self._flow.begin_request(0)
            bio.end(0)
        else:
            super().start(bio)


class DeafToFua(InFlight):
    """Takes no notice of FUA where a request does not take the fast path."""

    def start(self, bio: Bio) -> None:
        bio.flags &= ~FUA
        super().start(bio)


def hold_nothing(gate: Gate, bio: Bio) -> list[Bio]:
    """Lets a client's new write go beside one of its lost connection."""
    return []


@pytest.mark.parametrize(
    ("where", "mutant", "first"),
    [
        ("nbdtarget.targets.mapping.Committer", CommitBeforeFlush, 0),
        ("nbdtarget.targets.mapping.Committer", SuperblockBeforeJournal, 0),
        ("nbdtarget.targets.clone.target.Foreground", FuaWithoutCommit, 98),
        ("nbdtarget.targets.clone.target.hydration_extents", upside_down, 93),
        ("nbdtarget.server.requests.InFlight", HastyServer, 0),
        pytest.param(
            "nbdtarget.server.requests.InFlight",
            DeafToFua,
            23,
            marks=pytest.mark.long,
        ),
    ],
)
def test_simulation_catches(
    where: str, mutant: object, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, mutant)
    # Of two clones side by side, more is told of what is hydrated.
    assert is_caught("two_clones" if mutant is upside_down else "clone", first)


def test_simulation_catches_a_late_write_of_a_lost_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Gate, "_overlapped", hold_nothing)
    assert is_caught("linear")


async def _nothing(*_: object) -> None:
    """Does nothing."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("owner", "name", "mutant", "rig", "first"),
    [
        # Clients are not told of a server's lost writes.
        (Health, "note_loss", lambda health: None, "linear_over_backend", 65),
        (Health, "note_loss", lambda health: None, "clone_over_backends", 128),
        # Another disk is taken for ours.
        (
            nbd_device,
            "check_same",
            lambda name, size, before, after: None,
            "linear_over_backend",
            0,
        ),
        # The client does not connect again to a server that comes back.
        (NbdDevice, "_connect_again", _nothing, "linear_over_backend", 97),
        # A dead device counts as open.
        (Health, "is_usable", True, "cache_over_backends", 0),
    ],
)
def test_simulation_of_backends_catches(
    owner: object,
    name: str,
    mutant: object,
    rig: str,
    first: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, mutant)
    assert is_caught(rig, first)


class KeepingDisk(SimDisk):
    """Keeps a borrowed payload after `submit`, without owning it."""

    def submit(self, bio: Bio) -> None:
        if bio.op == OP_WRITE:
            bio.borrowed = False
        super().submit(bio)


class LyingDisk(SimDisk):
    """Ends each FLUSH, and makes nothing durable."""

    def submit(self, bio: Bio) -> None:
        if bio.op == OP_FLUSH:
            bio.end(0)
        else:
            super().submit(bio)


class ForgetfulPowercut(PowercutTarget):
    """Flushes its medium, but not what it has cached."""

    async def _write_back(self, mark: int, life: int) -> None:
        """Write nothing: the data can be read from the cache until the power is cut."""


class HalfStriped(StripedTarget):
    """Flushes the first stripe alone."""

    def map(self, bio: Bio) -> int:
        if bio.op != OP_FLUSH:
            return super().map(bio)
        bio.device = next(iter(self.iterate_devices()))
        return REMAPPED


@pytest.mark.parametrize(
    ("mutant", "rig"),
    [
        (ForgetfulPowercut, "powercut_over_clone"),
        (ForgetfulPowercut, "clone_over_powercut"),
        pytest.param(HalfStriped, "striped_over_clones", marks=pytest.mark.long),
    ],
)
def test_simulation_of_a_stack_catches(
    mutant: type[Target], rig: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGET_TYPES, mutant.type_name, mutant)
    assert is_caught(rig)


@pytest.mark.parametrize(
    ("where", "mutant", "rig"),
    [
        (
            "nbdtarget.targets.committer.Committer._commit_transaction",
            cache_bugs.commit_without_flushes,
            "cache",
        ),
        (
            cache_bugs.MIGRATIONS + "_demote",
            cache_bugs.demote_without_commit,
            "cache_over_clone",
        ),
        (
            cache_bugs.CACHED_WRITES + "_invalidate",
            cache_bugs.invalidate_after_the_write,
            "cache_passthrough",
        ),
        (
            cache_bugs.CACHED_WRITES + "_write_through",
            cache_bugs.write_through_to_one,
            "cache_writethrough",
        ),
        (
            cache_bugs.MIGRATIONS + "_tick_and_wait",
            cache_bugs.tick_with_io,
            "cache_switching",
        ),
    ],
)
def test_simulation_of_a_cache_catches(
    where: str, mutant: object, rig: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, mutant)
    assert is_caught(rig, first=17 if rig == "cache_passthrough" else 0)


class UnlatchedDisk(SimDisk):
    """Fails a FLUSH, and ends the next one as if nothing had been lost."""

    def _lies_to(self, bio: Bio) -> bool:
        self.lies = super()._lies_to(bio)
        return self.lies

    def _errno(self, bio: Bio) -> int:
        errno = super()._errno(bio)
        return errno if self.lies else 0


@pytest.mark.parametrize("disk_type", [KeepingDisk, LyingDisk, UnlatchedDisk])
def test_simulation_catches_a_disk_that_lies(disk_type: type[SimDisk]) -> None:
    assert is_caught("linear", disk_type=disk_type)
